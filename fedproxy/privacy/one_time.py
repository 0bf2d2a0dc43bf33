"""Secrets of secure sums: made anew for every key share, kept until the sum is taken, and good for one set of values.

A mask hides what it is put on once. Two sets of values under the same masks would tell their difference, so a client
notes what it masks before it does, and masks nothing else under the same share.
"""

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from fedproxy.errors import CheckpointError, ClientError
from fedproxy.names import file_stem
from fedproxy.privacy.keys import Occasion
from fedproxy.privacy.noise import KEY_BYTES
from fedproxy.privacy.registration import identity_of
from fedproxy.sealed import read_sealed, write_sealed

_MOST_RUNS = 16
"""Runs whose last share is known; a run needs no earlier one."""
_WAIT_S = 60.0
_REMEDY = "delete it: a run that goes on asks for new key shares"


class OneTime:
    """One client's secrets of the sums under way, the last of each run.

    Args:
        folder: Folder of this client's signing secret and of the keys that it has pinned.
        client_id: The client.
    """

    def __init__(self, folder: Path, client_id: str) -> None:
        self.folder, self.client_id = folder, client_id
        self.path = folder / f"{file_stem(client_id)}.sums.json"

    def share(self, occasion: Occasion) -> bytes:
        """Return a signed share of a new secret; that of the run's last share is forgotten.

        Raises:
            ClientError: If the client has no signing secret.
            CheckpointError: If the secret cannot be kept.
        """
        identity, own = identity_of(self.folder, self.client_id), secrets.token_bytes(KEY_BYTES)
        with self._held() as sums:
            sums.pop(occasion.run, None)  # the latest run comes last
            sums[occasion.run] = {"round": occasion.round, "attempt": occasion.attempt, "secret": own.hex()}
            for old in list(sums)[:-_MOST_RUNS]:
                del sums[old]
        return identity.share(occasion, own)

    def secret_for(self, occasion: Occasion, share: bytes, values: str) -> bytes:
        """Return what a share was made of, to mask these values and no others.

        Args:
            occasion: The sum.
            share: The share that the server sent back.
            values: A hash of what is to be masked.

        Raises:
            ClientError: If it is not the last share that this client sent, or other values were masked with it.
            CheckpointError: If what is noted is damaged, or cannot be written.
        """
        with self._held() as sums:
            noted = sums.get(occasion.run, {})
            own = bytes.fromhex(noted.get("secret", ""))
            if not own or identity_of(self.folder, self.client_id).share(occasion, own) != share:
                raise ClientError(f"the key share of client {self.client_id!r} is not the last one that it sent")
            if noted.setdefault("values", values) != values:
                raise ClientError(
                    f"client {self.client_id!r} has masked other values with this key share, and two under one mask "
                    "would show their difference; ask for a new share"
                )
        return own

    @contextmanager
    def _held(self) -> Iterator[dict[str, Any]]:
        """Give what is noted of all runs, and write it when the context ends without an error."""
        try:
            with FileLock(self.path.with_suffix(".lock"), timeout=_WAIT_S):
                sums = (read_sealed(self.path, remedy=_REMEDY) or {"sums": []})["sums"]
                by_run = dict(sums)
                yield by_run
                write_sealed(self.path, {"sums": [list(pair) for pair in by_run.items()]}, private=True)
        except Timeout as error:
            raise CheckpointError(f"{self.path} is held by another process for {_WAIT_S:g} s; end that run") from error
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be written ({error.strerror or error}); make it so") from error
