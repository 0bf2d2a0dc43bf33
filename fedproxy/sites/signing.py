"""Signing keys of a site's clients, and those of others that it has pinned, for secure sums."""

from collections.abc import Mapping

from fedproxy.errors import ConfigError
from fedproxy.privacy.registration import FOLDER, register_all, registered
from fedproxy.sites.site_config import SitePlace


def register_site(place: SitePlace) -> Mapping[str, str]:
    """Make the secrets of a site's clients, where there are none, and pin the keys of its peers and no others.

    Returns:
        The public keys of its own clients, as hexadecimal digits.

    Raises:
        ConfigError: If a peer is a client of this site.
        CheckpointError: If the folder cannot be used.
    """
    folder, own = place.folder / FOLDER, sorted(place.config.clients)
    both = sorted(set(own).intersection(place.config.peers))
    if both:
        raise ConfigError(f"peers.{both[0]} is a client of this site; name those of other sites")
    register_all(folder, own, place.config.peers)
    keys = registered(folder)
    return {client: keys[client].hex() for client in own}
