"""Kept safetensors files that are verified when they are read: each carries a hash of its content in its header."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fedproxy.errors import one_line
from fedproxy.files import flush, open_regular, parse_json
from fedproxy.tensor_files import write_tensors

_SEAL, _KEY = "sha256", "fedproxy"
"""One key holds all facts, as JSON: the library writes several keys in any order, and files could not be compared."""


def save_tensors(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, str] | None = None) -> str:
    """Write a safetensors file that carries facts and a hash of all of it, and flush it to the disk.

    Returns:
        The hash.

    Raises:
        OSError: If it cannot be written.
    """
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = sealed(whole, facts or {})
    write_tensors(path, whole, metadata)
    flush([path])
    return json.loads(metadata[_KEY])[_SEAL]  # type: ignore[no-any-return]


def sealed(tensors: Mapping[str, Tensor], facts: Mapping[str, str]) -> dict[str, str]:
    """Return the metadata of a safetensors file that :func:`check_tensors` can verify: facts, and the hash of all."""
    return {_KEY: json.dumps({**facts, _SEAL: tensors_sha256(tensors, facts)}, sort_keys=True)}


def tensors_sha256(tensors: Mapping[str, Tensor], facts: Mapping[str, str] | None = None) -> str:
    """Return the hash of tensors (names, dtypes, shapes, bytes) and of the facts that go with them."""
    digest = hashlib.sha256(json.dumps(dict(facts or {}), sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def facts_of(path: Path) -> dict[str, str]:
    """Return what a file of :func:`save_tensors` says of itself, without reading it through; nothing of others."""
    try:
        open_regular(path, follow=True).close()  # a pipe would be waited for
        with safe_open(path, framework="pt") as file:
            return _facts(file)
    except (OSError, SafetensorError, ValueError):
        return {}


def check_tensors(path: Path, facts: Mapping[str, str] | None = None) -> dict[str, str]:
    """Read a file of :func:`save_tensors` through, and return its facts, the hash under ``sha256`` among them.

    Args:
        path: The file.
        facts: What it must say, as far as that is known.

    Raises:
        ValueError: With the reason in one line, if it is not what was written.
    """
    try:
        open_regular(path, follow=True).close()  # a pipe would be waited for
        with safe_open(path, framework="pt") as file:
            found = _facts(file)
            seal = found.pop(_SEAL, "")
            same = seal == tensors_sha256(_Lazy(file), found)
    except (OSError, SafetensorError) as error:
        raise ValueError(getattr(error, "strerror", None) or one_line(error)) from None
    if not same:
        raise ValueError("its content does not have the hash that it was written with")
    for name, value in (facts or {}).items():
        if found.get(name) != value:
            raise ValueError(f"it is of {name} {one_line(found.get(name), 80)}, not {one_line(value, 80)}")
    return {**found, _SEAL: seal}


def _facts(file: Any) -> dict[str, str]:
    """Return what an open file says of itself.

    Raises:
        ValueError: If it says nothing.
    """
    said = (file.metadata() or {}).get(_KEY)
    if said is None:
        raise ValueError("it has no hash of its content: another version of FedProxy wrote it")
    return {str(name): str(value) for name, value in parse_json(said, dict).items()}


class _Lazy(Mapping[str, Tensor]):
    """Tensors of an open file, one at a time."""

    def __init__(self, file: Any) -> None:
        self._file, self._names = file, sorted(file.keys())

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._file.get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
