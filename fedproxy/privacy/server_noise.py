"""Where noise at the server comes from: a secret beside the checkpoints, and what was merged in each round."""

import hashlib
import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fedproxy.errors import CheckpointError
from fedproxy.privacy.noise import KEY_BYTES, derived_key
from fedproxy.sealed import read_sealed, write_sealed

_REMEDY = "put back a copy of it, or start again with overwrite=true"


@dataclass(frozen=True)
class ServerNoise:
    """Keys of the noise on each round's updates.

    A round is charged once, so it may be merged from one set of updates alone. Merged again, as by a run that goes on
    from an earlier checkpoint, the same updates get the same noise; other updates are refused, since two sums under two
    draws of noise tell more than one.
    """

    path: Path
    """The file of the secret and of what was merged; made in the first round."""

    def key(self, round_: int, updates: Mapping[str, str]) -> bytes:
        """Return the key of a round's noise, and note what it is for before it is used.

        Args:
            round_: The round.
            updates: Each client's hash of its update.

        Raises:
            CheckpointError: If the file is damaged, gone or cannot be written, or the round was merged from other
                updates.
        """
        content = read_sealed(self.path, remedy=_REMEDY)
        if content is None:
            if round_ > 1:
                raise CheckpointError(f"{self.path}, the secret of the noise at the server, is gone; {_REMEDY}")
            content = {"secret": secrets.token_hex(KEY_BYTES), "rounds": {}}
        known = content["rounds"].setdefault(str(round_), dict(sorted(updates.items())))
        if known != updates:
            raise CheckpointError(
                f"round {round_} was merged before from updates of {', '.join(sorted(known))}, and one charge covers "
                "one merge of a round; resume=auto when these clients answer again, or start again with overwrite=true"
            )
        write_sealed(self.path, content, private=True)
        merged = hashlib.sha256(json.dumps(sorted(updates.items())).encode()).hexdigest()
        return derived_key(bytes.fromhex(content["secret"]), "server", str(round_), merged)
