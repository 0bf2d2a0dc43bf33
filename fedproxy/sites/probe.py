"""Whether the hub can be reached from here, and if not, what is wrong: certificate, clock, connection, front door."""

import http.client
import socket
import ssl
import time
from contextlib import closing
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path

from fedproxy.errors import one_line
from fedproxy.interrupts import check_interrupt

_WAIT_S, _LOOK_S = 10.0, 0.5
_STARTS_RUNS = "/v1/control/start-run"
"""What must not be reached: a SuperLink without a front door answers 405 here, and 404 at the prefix alone."""
CLOCK_S = 60.0
"""Most seconds that clocks may differ; Flower refuses what is 305 s apart."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    what: str
    ok: bool
    said: str
    """What was found; where it is not well, with the way out."""

    def __str__(self) -> str:
        """Return it as a line."""
        return f"{'ok  ' if self.ok else 'FAIL'} {self.what}: {self.said}"


def probe(address: str, ca: Path) -> list[Finding]:
    """Connect to the hub as Flower will, and look at what it answers.

    Args:
        address: Host and port of its front door.
        ca: Certificate that its own is signed with.
    """
    host, _, port = address.rpartition(":")
    try:
        context = ssl.create_default_context(cafile=str(ca))
    except (OSError, ssl.SSLError) as error:
        reason = getattr(error, "strerror", None) or "it is no certificate"
        return [Finding("certificate", False, f"{ca} cannot be read ({reason}); ask the hub's owner for ca.crt")]
    try:
        with closing(http.client.HTTPSConnection(host, int(port), timeout=_WAIT_S, context=context)) as connection:
            return _ask(connection, address)
    except ssl.SSLCertVerificationError as error:
        return [Finding("certificate", False, _certificate(error, host))]
    except ssl.SSLError as error:
        plain = "wrong version number" in str(error).lower() or "unexpected eof" in str(error).lower()
        what = "speaks plain HTTP, or is no hub's front door" if plain else f"gives no TLS ({one_line(error, 80)})"
        return [Finding("connection", False, f"{address} {what}; give the address of the hub's front door")]
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = getattr(error, "strerror", None) or one_line(error, 80)
        hint = "is the hub up, the address right, and the port open through firewalls?"
        return [Finding("connection", False, f"{address} does not answer ({reason}); {hint}")]


def _ask(connection: http.client.HTTPSConnection, address: str) -> list[Finding]:
    found = [Finding("certificate", True, f"{address} has one that ca.crt signed")]
    connection.request("GET", "/health")
    answer = connection.getresponse()
    answer.read(1 << 16)
    date, here = answer.getheader("Date"), time.time()
    if answer.status != 200:
        said = f"the front door answers, and Flower's SuperLink behind it does not ({answer.status}); is the hub up?"
        return [*found, Finding("connection", False, said)]
    found.append(Finding("connection", True, f"{address} answers"))
    found.append(_clock(date, here))
    connection.request("GET", _STARTS_RUNS)
    answer = connection.getresponse()
    answer.read(1 << 16)
    closed = answer.status == 404
    open_ = "whoever reaches it can start runs; tell the hub's owner, and do not connect"
    said = "publishes what sites need alone" if closed else f"publishes more than /v1/fleet/: {open_}"
    return [*found, Finding("front door", closed, said)]


def _clock(date: str | None, here: float) -> Finding:
    try:
        off = here - parsedate_to_datetime(date or "").timestamp()
    except (ValueError, TypeError):
        return Finding("clock", True, "the hub does not tell its time")
    if abs(off) > CLOCK_S:
        return Finding(
            "clock", False, f"this machine's is {off:+.0f} s off the hub's; set it (timedatectl set-ntp true)"
        )
    return Finding("clock", True, f"{abs(off):.0f} s off the hub's")


def _certificate(error: ssl.SSLCertVerificationError, host: str) -> str:
    reason = error.verify_message or "it cannot be verified"
    if "expired" in reason:
        return "the hub's has expired; its owner makes a new one by hub init, or this machine's clock is wrong"
    if "not yet valid" in reason:
        return "the hub's is not valid yet: this machine's clock is wrong; set it"
    if "mismatch" in reason or "doesn't match" in reason.lower():
        return f"the hub's is not for {host!r}; use a name under hosts in its hub.yaml"
    return f"the hub's is not signed by the ca.crt given here ({one_line(reason, 60)}); ask its owner for the right one"


def freed(port: int, seconds: float = 20.0) -> bool:
    """Return whether a port is free, or gets free in time, as those of a process that was just killed do."""
    until = time.monotonic() + seconds
    while not is_port_free(port):
        check_interrupt()
        if time.monotonic() > until:
            return False
        time.sleep(_LOOK_S)
    return True


def is_port_free(port: int) -> bool:
    """Return whether nothing listens on a port of this machine."""
    with socket.socket() as place:
        place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            place.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
