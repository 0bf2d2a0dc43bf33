"""The layer map: which target block each proxy block came from. It never leaves the server."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from fedproxy.errors import CheckpointError, ModelError, one_line
from fedproxy.files import read_json, write_text


@dataclass(frozen=True)
class LayerMap:
    """The only thing that compression and fusion share.

    A repeated target index means that proxy blocks share the weights of one target block.
    """

    proxy_to_target: tuple[int, ...]
    """Entry j is the target's block index pi(j) of proxy block j (Eq 15)."""
    target_sha256: str
    """Hash of the target's weights (:func:`fedproxy.models.state_sha256`); fusion refuses any other target."""
    neurons: tuple[tuple[int, ...], ...] | None = None
    """Kept feed-forward neurons per proxy block, where compression removed neurons; None where blocks are whole."""

    @property
    def centres(self) -> tuple[int, ...]:
        """Proxy blocks that stand for a target block, one for each, ascending: all of them where none is repeated.

        Of proxy blocks that share one target block it is the one in that block's own place, or else the first.
        """
        own = {target: new for new, target in reversed(list(enumerate(self.proxy_to_target)))}
        own |= {target: new for new, target in enumerate(self.proxy_to_target) if new == target}
        return tuple(sorted(own.values()))

    def counterparts(self, depth: int) -> tuple[int, ...]:
        """Return, for each proxy block, the block of a target of ``depth`` behind which it stands in the same stead.

        Where blocks went, it is the block that it is a copy of; where shared blocks keep the depth, it is the one in
        the same place.
        """
        shared = len(set(self.proxy_to_target)) < len(self.proxy_to_target)
        return tuple(range(depth)) if shared and len(self.proxy_to_target) == depth else self.proxy_to_target

    def require_target(self, sha256: str) -> None:
        """Refuse a target whose weights have another hash than those that the map was made from.

        Raises:
            ModelError: Naming both hashes.
        """
        if sha256 != self.target_sha256:
            raise ModelError(
                f"fusion: the target's weights ({sha256[:12]}...) are not those that were compressed "
                f"({self.target_sha256[:12]}...); give the target of that run or compress this one"
            )

    def save(self, path: str | Path) -> None:
        """Write the map as JSON, whole or not at all.

        Raises:
            CheckpointError: If it cannot be written.
        """
        write_text(path, self.to_json())

    def to_json(self) -> str:
        """Return what :meth:`save` writes."""
        return json.dumps(asdict(self)) + "\n"

    @classmethod
    def load(cls, path: str | Path) -> "LayerMap":
        """Read a map that :meth:`save` wrote.

        Raises:
            CheckpointError: If the file is missing or broken.
        """
        remedy = "compress again with overwrite=true"
        fields = read_json(path, dict, remedy=remedy)
        try:
            neurons = fields["neurons"]
            return cls(
                tuple(map(int, fields["proxy_to_target"])),
                str(fields["target_sha256"]),
                None if neurons is None else tuple(tuple(map(int, block)) for block in neurons),
            )
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} is not a layer map ({one_line(error)}); {remedy}") from error
