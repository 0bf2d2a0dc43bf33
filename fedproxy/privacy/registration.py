"""Where clients keep their signing secrets and the keys of all that they have pinned: one folder at each site."""

import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path

from fedproxy.errors import CheckpointError, ClientError
from fedproxy.files import private_folder, read_whole, write_bytes
from fedproxy.names import file_stem
from fedproxy.privacy.keys import Identity
from fedproxy.privacy.noise import KEY_BYTES
from fedproxy.sealed import read_sealed, write_sealed

FOLDER = ".signing_keys"
_REGISTRY = "registered.json"
_REMEDY = "ask the other clients for their registered keys again, and compare them by telephone"


def register_all(folder: Path, clients: Iterable[str], peers: Mapping[str, str] | None = None) -> None:
    """Make the secrets of clients that share a folder, where there are none, and pin their keys and those of others.

    Keys of clients that are neither are pinned no more: whoever is to be trusted no longer is left out.

    Args:
        folder: The folder.
        clients: Its own clients.
        peers: Public keys of others, as hexadecimal digits.

    Raises:
        CheckpointError: If the folder cannot be used.
    """
    names = sorted(clients)
    try:
        private_folder(folder)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be written ({error.strerror or error})") from error
    for name in names:
        if not _secret_file(folder, name).exists():
            write_bytes(_secret_file(folder, name), secrets.token_bytes(KEY_BYTES), private=True)
    own = {name: identity_of(folder, name).public.hex() for name in names}
    write_sealed(folder / _REGISTRY, {"clients": {**(peers or {}), **own}})


def identity_of(folder: Path, client_id: str) -> Identity:
    """Return a client's identity.

    Raises:
        ClientError: If its secret is missing or damaged.
    """
    path = _secret_file(folder, client_id)
    try:
        secret = read_whole(path, most=KEY_BYTES)
    except (OSError, ValueError) as error:
        raise ClientError(f"client {client_id!r} has no signing secret in {path}; register it") from error
    if len(secret) != KEY_BYTES:
        raise ClientError(f"the signing secret of client {client_id!r} in {path} is damaged; register it anew")
    return Identity(client_id, secret)


def registered(folder: Path) -> dict[str, bytes]:
    """Return the Ed25519 keys that are pinned in a folder, by client.

    Raises:
        CheckpointError: If the file is damaged.
    """
    content = read_sealed(folder / _REGISTRY, remedy=_REMEDY) or {"clients": {}}
    return {name: bytes.fromhex(key) for name, key in content["clients"].items()}


def _secret_file(folder: Path, client_id: str) -> Path:
    return folder / f"{file_stem(client_id)}.key"
