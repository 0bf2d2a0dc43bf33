"""A teacher's outputs on disk: of every batch one file for the distributions, and one per block for hidden states."""

import hashlib
import json
import os
import re
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedproxy.errors import CheckpointError
from fedproxy.machine import processor
from fedproxy.sealed_tensors import check_tensors, sealed

_FORMAT = "teacher-4"
_STALE_S = 3600.0
_ENTRY = re.compile(r"[0-9a-f]{64}\.safetensors")
_PART = ".fedproxy-"
"""Age in seconds after which a temporary file is taken for one of a killed run."""


@dataclass(frozen=True)
class Entry:
    """What a teacher says about the real tokens of one batch, or a part of it."""

    index: Tensor | None
    """Likeliest tokens, int32 (tokens, k); None where distributions are not wanted."""
    log_p: Tensor | None
    """Their log-probabilities and, last, that of all others together, float32 (tokens, k + 1); k where k is all."""
    units: Mapping[int, Tensor] = field(default_factory=dict)
    """Hidden states by block divided by their root mean square, float16 (tokens, hidden)."""
    scales: Mapping[int, Tensor] = field(default_factory=dict)
    """Root mean squares, float32 (tokens, 1)."""

    @classmethod
    def of(cls, index: Tensor | None, log_p: Tensor | None, hidden: Mapping[int, Tensor]) -> "Entry":
        """Make an entry of the likeliest tokens and hidden states (tokens, hidden) by block."""
        units, scales = {}, {}
        for block, states in hidden.items():
            states = states.float()
            scale = states.square().mean(dim=-1, keepdim=True).sqrt()
            scales[block] = scale
            # The loss divides by the same root mean square: half precision then costs every token the same.
            units[block] = (states / scale.clamp_min(torch.finfo(torch.float32).tiny)).half()
        return cls(None if index is None else index.int(), log_p, units, scales)

    def hidden(self, block: int) -> Tensor:
        """Return a block's hidden states, float32 (tokens, hidden)."""
        return self.units[block].float() * self.scales[block]

    def tensors(self) -> dict[str, Tensor]:
        """Return the entry as named tensors."""
        named = {"index": self.index, "log_p": self.log_p}
        named |= {f"unit_{block}": tensor for block, tensor in self.units.items()}
        named |= {f"scale_{block}": tensor for block, tensor in self.scales.items()}
        return {name: tensor.cpu().contiguous() for name, tensor in named.items() if tensor is not None}

    @classmethod
    def from_tensors(cls, named: Mapping[str, Tensor]) -> "Entry":
        """Make an entry of what :meth:`tensors` gave."""
        parts = {
            kind: {int(name.removeprefix(kind)): tensor for name, tensor in named.items() if name.startswith(kind)}
            for kind in ("unit_", "scale_")
        }
        return cls(named.get("index"), named.get("log_p"), parts["unit_"], parts["scale_"])

    @classmethod
    def joined(cls, parts: Iterable["Entry"]) -> "Entry":
        """Make one entry of several parts."""
        return cls.from_tensors({name: tensor for part in parts for name, tensor in part.tensors().items()})

    def to(self, device: torch.device) -> "Entry":
        """Return the entry on a device."""
        return Entry.from_tensors({name: tensor.to(device) for name, tensor in self.tensors().items()})


class TeacherCache:
    """Entries by what they depend on: target's hash, batch's tokens, autocast, device, and what they hold of it.

    The distributions of a batch (with k and temperature) are one entry, the hidden states of each block another, so
    that proxies of other blocks, or distillation without hidden states, find what they have in common.

    A batch, not a text, is the unit: the same text in another batch gives other last bits, and a run must not depend on
    who filled the cache. Batches are the same in every epoch and for every proxy of one recipe and seed.

    Files are written whole or not at all, and verified when read; a damaged one counts as missing. Where the bound
    is reached, entries that this run did not use go, the oldest first; where none is left, nothing more is kept.
    It holds what the target says: it is the server's and never sent.

    Args:
        folder: Where entries lie.
        target_sha256: Hash of the teacher's weights.
        top_k: Tokens kept of every distribution, >= 1.
        max_bytes: Largest size of all entries.
    """

    def __init__(self, folder: Path, *, target_sha256: str, top_k: int, max_bytes: float) -> None:
        self.folder, self.target_sha256, self.top_k, self.max_bytes = folder, target_sha256, top_k, max_bytes
        self.hits = self.misses = 0
        self._used: set[str] = set()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._unwritable(error) from error
        for part in folder.glob(f"{_PART}*.part"):
            with suppress(OSError):
                if time.time() - part.stat().st_mtime > _STALE_S:
                    part.unlink()
        self._bytes = sum(size for _, size, _ in self._entries())

    def keys(
        self, batch: Mapping[str, Tensor], blocks: Sequence[int], temperature: float, distributions: bool
    ) -> dict[int | None, str]:
        """Return the names of a batch's entries: by block for hidden states, under None for the distributions."""
        ids, mask = batch["input_ids"], batch["attention_mask"]
        device = ids.device.type
        precision = str(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else None
        common = hashlib.sha256(
            json.dumps([_FORMAT, self.target_sha256, precision, list(ids.shape), *_made_by(ids.device)]).encode()
        )
        for tensor in (ids, mask):
            common.update(tensor.cpu().contiguous().numpy().tobytes())
        parts: dict[int | None, list[Any]] = {None: ["distributions", self.top_k, temperature]} if distributions else {}
        parts |= {block: ["block", block] for block in blocks}
        found = {}
        for part, what in parts.items():
            digest = common.copy()
            digest.update(json.dumps(what).encode())
            found[part] = digest.hexdigest()
        return found

    def read(self, key: str) -> Entry | None:
        """Return an entry, or None where there is no whole one."""
        path = self._path(key)
        try:
            check_tensors(path, {"key": key})
            entry = Entry.from_tensors(load_file(path))
            os.utime(path)
        except (OSError, SafetensorError, ValueError):
            self.misses += 1
            return None
        self.hits += 1
        self._used.add(key)
        return entry

    def write(self, key: str, entry: Entry) -> None:
        """Keep an entry if there is room for it.

        Raises:
            CheckpointError: If the disk is full or the folder cannot be written.
        """
        tensors = entry.tensors()
        if not self._make_room(sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())):
            return
        part: str | None = None
        try:
            handle, part = tempfile.mkstemp(prefix=_PART, suffix=".part", dir=self.folder)
            os.close(handle)
            save_file(tensors, part, sealed(tensors, {"key": key}))
            self._bytes += os.path.getsize(part)
            os.replace(part, self._path(key))
        except (OSError, SafetensorError) as error:  # a full disk comes as either
            if part is not None:
                with suppress(OSError):
                    os.unlink(part)
            raise self._unwritable(error) from error
        self._used.add(key)

    def _make_room(self, size: int) -> bool:
        if size > self.max_bytes:
            return False
        if self._bytes + size > self.max_bytes:
            entries = self._entries()  # another process may have written or deleted
            self._bytes = sum(bytes_ for _, bytes_, _ in entries)
            for _, bytes_, path in sorted(entries):
                if self._bytes + size <= self.max_bytes:
                    break
                if path.stem not in self._used:
                    path.unlink(missing_ok=True)
                    self._bytes -= bytes_
        return self._bytes + size <= self.max_bytes

    def _entries(self) -> list[tuple[float, int, Path]]:
        found = []
        for path in self.folder.glob("*.safetensors"):
            if not _ENTRY.fullmatch(path.name):  # somebody else's
                continue
            with suppress(FileNotFoundError):
                facts = path.stat()
                found.append((facts.st_mtime, facts.st_size, path))
        return found

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"

    def _unwritable(self, error: Exception) -> CheckpointError:
        return CheckpointError(
            f"distillation.cache_teacher: {self.folder} cannot be written ({error}); free disk space, set "
            "FEDPROXY_CACHE to a larger disk, or lower distillation.cache_gib"
        )


def _made_by(device: torch.device) -> tuple[str | int, ...]:
    """Return what the last bits depend on beside the model: the device, and the version of its kernels."""
    if device.type == "cpu":
        return processor(), torch.get_num_threads(), torch.__version__
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return name, torch.__version__
