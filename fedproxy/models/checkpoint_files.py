"""What can be known to be wrong with a model's folder from its files alone, before any library reads them."""

import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from fedproxy.errors import ModelError, one_line
from fedproxy.files import open_regular, read_json

_SAFE, _PICKLED = "model.safetensors", "pytorch_model.bin"
_LFS = b"version https://git-lfs.github.com/"
_COPY = "copy or download the model again"
_PLAIN = {"F64", "F32", "F16", "BF16"}
"""Numbers that weights may be stored in, as safetensors names them; others need scales to mean anything."""
_DEPTHS = {"num_hidden_layers", "num_layers", "n_layer", "n_layers"}
_DEEPEST = 1000
"""Most blocks of a model that is read: a configuration that says more would build them for minutes."""


def check_config_files(folder: Path) -> None:
    """Check that a folder is that of a model, not of an adapter or of a clone without its files.

    Raises:
        ModelError: If it is not, or its configuration says that it has more blocks than any model.
    """
    check_readable(folder)
    config, adapter = folder / "config.json", folder / "adapter_config.json"
    if adapter.exists():
        what = "holds an adapter without its model" if not config.exists() else "holds an adapter beside the model"
        raise ModelError(
            f"{folder} {what} (adapter_config.json); merge the adapter into its base model (PEFT: merge_and_unload, "
            "save_pretrained) and give that folder, or give the base model alone"
        )
    if not config.exists():
        raise ModelError(f"{folder} has no config.json; give a from_pretrained folder")
    _check_depth(config, read_json(config, dict, error=ModelError, remedy=_COPY))
    _check_objects(folder, "generation_config.json")


def check_tokenizer_files(folder: Path) -> None:
    """Check that a tokenizer's settings are what they should be.

    Raises:
        ModelError: If they are not.
    """
    check_readable(folder)
    _check_objects(folder, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


def _check_objects(folder: Path, *names: str) -> None:
    """Check that those of the files that are there hold a JSON object each, which is all that libraries foresee."""
    for name in names:
        if (folder / name).exists():
            read_json(folder / name, dict, error=ModelError, remedy=_COPY)


def check_readable(folder: Path) -> None:
    """Check that a library can read what lies in a folder: no pipe, which it would wait for, and no Git LFS pointer.

    Raises:
        ModelError: If it cannot.
    """
    for path in sorted(folder.iterdir()):
        if path.is_dir() or not path.exists():
            continue
        try:
            with open_regular(path, follow=True) as file:
                pointer = file.read(len(_LFS)) == _LFS
        except OSError as error:
            raise ModelError(f"{path} cannot be read ({error.strerror or one_line(error)}); {_COPY}") from error
        if pointer:
            raise ModelError(f"{path} is a Git LFS pointer, not the file itself; run git lfs pull in {folder}")


def check_weight_files(folder: Path) -> None:
    """Check that all files with weights are there and whole.

    Raises:
        ModelError: If one is missing, cut off, damaged or not a regular file, or holds quantised weights.
    """
    for path in _weight_files(folder):
        kinds: dict[str, str] = {}
        try:
            with open_regular(path, follow=True):
                pass
            if path.suffix == ".safetensors":
                with safe_open(path, framework="pt") as file:
                    names = [name for name in file.keys() if name.endswith("weight")]  # noqa: SIM118 (no mapping)
                    kinds = {name: file.get_slice(name).get_dtype() for name in names}
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{path} is cut off or damaged ({one_line(error)}); {_COPY}") from error
        for name, kind in sorted(kinds.items()):
            if kind not in _PLAIN:
                raise ModelError(
                    f"{path} is quantised ({one_line(name, 120)} is of type {one_line(kind, 20)}), and config.json "
                    "does not say how; give the checkpoint that it was made from, in float32, bfloat16 or float16"
                )


def weight_bytes(folder: Path) -> int:
    """Return the size of all files with weights of a folder that :func:`check_weight_files` has checked."""
    return sum(path.stat().st_size for path in _weight_files(folder))


def _weight_files(folder: Path) -> list[Path]:
    """Return the files that transformers would read: the first form that is there, safetensors before pickles."""
    for name in (_SAFE, _PICKLED):
        whole, index = folder / name, folder / f"{name}.index.json"
        if whole.exists():
            return [whole]
        if index.exists():
            return _shards(index)
    raise ModelError(f"{folder} holds no weights (no {_SAFE}, no {_SAFE}.index.json); {_COPY}")


def _shards(index: Path) -> list[Path]:
    content = read_json(index, dict, error=ModelError, remedy=_COPY)
    places = content.get("weight_map")
    names = set(places.values()) if isinstance(places, dict) and all(map(_is_text, places.values())) else set()
    if not names or any(Path(name).name != name for name in names):
        raise ModelError(f"{index} must map every weight to a file beside it; {_COPY}")
    missing = sorted(name for name in names if not os.path.exists(index.parent / name))
    if missing:
        raise ModelError(
            f"{index.parent} lacks {one_line(missing[0])}, {len(missing)} of {len(names)} files with weights; "
            "download the rest"
        )
    return [index.parent / name for name in sorted(names)]


def _check_depth(path: Path, content: dict[str, Any]) -> None:
    parts = [content]
    while parts:
        part = parts.pop()
        parts += [value for value in part.values() if isinstance(value, dict)]
        for key in _DEPTHS & part.keys():
            if isinstance(part[key], int) and part[key] > _DEEPEST:
                raise ModelError(
                    f"{path}: {key} is {one_line(part[key], 40)}, and models of more than {_DEEPEST} blocks are not "
                    f"read; correct it, or {_COPY}"
                )


def _is_text(value: object) -> bool:
    return isinstance(value, str)
