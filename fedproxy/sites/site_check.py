"""What ``python -m fedproxy.site check`` does: everything is tried before anything federated runs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedproxy.errors import ConfigError, FedProxyError, one_line
from fedproxy.modules.devices import one_device
from fedproxy.modules.trainer import make_trainer
from fedproxy.sites.keys import expires
from fedproxy.sites.probe import Finding, probe
from fedproxy.sites.signing import register_site
from fedproxy.sites.site_config import SitePlace
from fedproxy.sites.site_rows import trained_on
from fedproxy.wire.flower import Flower


def check(path: Path, *, say: Callable[[str], None]) -> int:
    """Try data, model, key, certificate, clock and connection, and say what is wrong; 0 where nothing is."""
    place = SitePlace.read(path)
    found = [*_looked_at(place), *probe(place.config.server.address, place.path(place.config.server.ca))]
    for finding in found:
        say(str(finding))
    bad = sum(not finding.ok for finding in found)
    say("all is well: python -m fedproxy.site up may start" if not bad else f"{bad} of {len(found)} need mending")
    return 0 if not bad else 1


def _looked_at(place: SitePlace) -> list[Finding]:
    config = place.config
    found = []
    try:
        rows = place.rows()
        few = [name for name, own in rows.items() if trained_on(own) < config.policy.least_rows]
        shown = ", ".join(f"{name} {trained_on(own)} rows" for name, own in rows.items())
        more = f", of which policy.least_rows={config.policy.least_rows} leaves out {', '.join(few)}" if few else ""
        found.append(Finding("data", len(few) < len(rows), shown + more))
    except FedProxyError as error:
        found.append(Finding("data", False, one_line(error)))
    found.append(_trains(config.trainer))
    found.append(_key(place.path(config.server.key)))
    found.append(_signing(place))
    try:
        flower = Flower(place.folder / "flower", config.flower)
        found.append(Finding("Flower", True, f"{flower.command('flower-supernode')} {flower.version()}"))
    except ConfigError as error:
        found.append(Finding("Flower", False, str(error)))
    try:
        left = expires(place.path(config.server.ca))
        found.append(Finding("authority", True, f"ca.crt holds until {left:%Y-%m-%d}"))
    except ConfigError as error:
        found.append(Finding("authority", False, str(error)))
    return found


def _signing(place: SitePlace) -> Finding:
    try:
        shown = ", ".join(f"{client} {key}" for client, key in register_site(place).items())
    except FedProxyError as error:
        return Finding("signing keys", False, one_line(error))
    return Finding("signing keys", True, f"for peers of other sites, where sums are secure: {shown}")


def _trains(trainer: dict[str, Any]) -> Finding:
    try:
        make_trainer(one_device(trainer))
    except Exception as error:  # Lightning's own, for a device that is not there
        return Finding("model", False, f"the trainer does not start here ({one_line(error, 160)}); change trainer")
    return Finding("model", True, f"the trainer starts ({trainer.get('accelerator')}, {trainer.get('precision')})")


def _key(path: Path) -> Finding:
    if not path.is_file():
        return Finding("key", False, f"there is no {path}; run python -m fedproxy.site init")
    if path.stat().st_mode & 0o077:
        return Finding("key", False, f"others on this machine can read {path}; chmod 600 it")
    return Finding("key", True, f"{path} is readable by its owner alone")
