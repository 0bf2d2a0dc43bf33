"""Who may take part in a secure sum: registered signing keys, and a fresh signed key share for every sum."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedproxy.errors import ClientError, ConfigError
from fedproxy.privacy.noise import derived_key

PUBLIC_BYTES, SHARE_BYTES = 32, 96
"""A share on the wire: 32 bytes of X25519 (RFC 7748), then 64 of an Ed25519 signature (RFC 8032)."""


@dataclass(frozen=True)
class Occasion:
    """The one sum that a key share is for."""

    run: str
    round: int
    attempt: int
    """0, and one more for every time that the round is repeated because a client was missing."""

    @property
    def words(self) -> tuple[str, str, str]:
        """Return it as words, for keys."""
        return self.run, str(self.round), str(self.attempt)


@dataclass(frozen=True)
class Identity:
    """A client's long-lived secret, from which its signing key is derived. What a share hides is made for one sum.

    Args:
        client_id: The client.
        secret: 32 bytes that nobody else knows.
    """

    client_id: str
    secret: bytes

    @property
    def public(self) -> bytes:
        """The Ed25519 key that is registered for this client, 32 bytes."""
        return _raw(self._signing().public_key())

    def share(self, occasion: Occasion, own: bytes) -> bytes:
        """Return this client's signed key share for one sum.

        Args:
            occasion: The sum.
            own: 32 random bytes, made for this share alone.
        """
        public = _raw(_agreeing(own).public_key())
        signature: bytes = self._signing().sign(_statement(self.client_id, occasion, public))
        return public + signature

    def secret_with(self, other: str, share: bytes, occasion: Occasion, own: bytes) -> bytes:
        """Return the 32-byte key that this client and another have in common for one sum, and for nothing else.

        Args:
            other: The other client.
            share: Its key share, verified.
            occasion: The sum.
            own: What this client's own share was made of.

        Raises:
            ClientError: If the share is none that a key can be agreed on with.
        """
        x25519 = _primitives("x25519")
        try:
            common = _agreeing(own).exchange(x25519.X25519PublicKey.from_public_bytes(share[:PUBLIC_BYTES]))
        except ValueError as error:  # a point of small order
            raise ClientError(f"the key share of client {other!r} is not usable; have it register anew") from error
        return derived_key(common, "pair", *occasion.words, *sorted((self.client_id, other)))

    def _signing(self) -> Any:
        return _primitives("ed25519").Ed25519PrivateKey.from_private_bytes(derived_key(self.secret, "sign"))


def verify(shares: Mapping[str, bytes], registered: Mapping[str, bytes], occasion: Occasion) -> None:
    """Check that every share was signed, for this very sum, by the registered key of the client it is in the name of.

    Args:
        shares: By client.
        registered: The clients' Ed25519 keys, as this client has pinned them.
        occasion: The sum.

    Raises:
        ClientError: Naming the first client whose share is unsigned, another's, of another sum, or not registered.
    """
    ed25519 = _primitives("ed25519")
    seen: dict[bytes, str] = {}
    for client, share in sorted(shares.items()):
        if client not in registered:
            raise ClientError(f"client {client!r} has no registered key; register it at every client or leave it out")
        if len(share) != SHARE_BYTES:
            raise ClientError(f"the key share of client {client!r} is unsigned: it has {len(share)} bytes, not 96")
        public, signature = share[:PUBLIC_BYTES], share[PUBLIC_BYTES:]
        try:
            key = ed25519.Ed25519PublicKey.from_public_bytes(registered[client])
            key.verify(signature, _statement(client, occasion, public))
        except Exception as error:  # InvalidSignature, or a registered key that is none
            raise ClientError(
                f"the key share of client {client!r} is not signed by its registered key for round {occasion.round} "
                f"(attempt {occasion.attempt}) of this run: it is forged, or an earlier one sent again"
            ) from error
        if public in seen:
            raise ClientError(
                f"clients {seen[public]!r} and {client!r} have the same key share; both must make their own"
            )
        seen[public] = client


def _statement(client_id: str, occasion: Occasion, public: bytes) -> bytes:
    """Return what a share's signature is over; no part can be moved into another."""
    said = ["fedproxy key share 1", *occasion.words, client_id, public.hex()]
    return json.dumps(said).encode()


def _agreeing(own: bytes) -> Any:
    return _primitives("x25519").X25519PrivateKey.from_private_bytes(own)


def _raw(key: Any) -> bytes:
    raw: bytes = key.public_bytes_raw()
    return raw


def _primitives(name: str) -> Any:
    import importlib

    try:
        return importlib.import_module(f"cryptography.hazmat.primitives.asymmetric.{name}")
    except ImportError as error:
        raise ConfigError("secure sums need the package cryptography; run pip install 'fedproxy[privacy]'") from error
