"""Where the rows of a task file of one's own come from: local files of plain values, or a data set of the hub."""

import json
import re
from pathlib import Path
from typing import Any

from fedproxy.data.assets import tables_folder
from fedproxy.errors import EvaluationError, one_line
from fedproxy.files import at_home

_READERS = ("csv", "json", "parquet", "text")
_OPTIONS = ("data_files", "field", "delimiter", "sep", "column_names")
_PLAIN = {"Value", "ClassLabel", "Sequence", "List", "LargeList"}
"""Column types of a parquet file of `datasets` that are read as they are; others fetch addresses and open paths."""
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")


def resolved_data(config: dict[str, Any], folder: Path, files: list[Path]) -> dict[str, Any]:
    """Return the keys of a task file that say where its rows are, with absolute paths.

    Args:
        config: The file's content.
        folder: Where the file lies; its relative paths begin there, or in the working directory.
        files: Gets the data files.

    Raises:
        EvaluationError: If the rows would come from elsewhere than local files or the hub, or a file is missing.
    """
    path, options = config.get("dataset_path"), config.get("dataset_kwargs") or {}
    if not isinstance(options, dict):
        raise EvaluationError("dataset_kwargs must be a mapping")
    if path not in _READERS:
        _require_hub_name(path, options)
        return {}
    unknown = sorted(set(map(str, options)) - set(_OPTIONS))
    if unknown or not options.get("data_files"):
        raise EvaluationError(
            f"dataset_kwargs of {path} takes {', '.join(_OPTIONS)}, and data_files it needs"
            + (f"; got {one_line(unknown[0], 60)!r}" if unknown else "")
        )
    found = _absolute(options["data_files"], folder, files)
    _check_splits(config, found)
    if path == "parquet":
        _check_columns(files)
    kwargs = {**options, "data_files": found, "cache_dir": str(tables_folder())}
    return {"dataset_kwargs": kwargs, "dataset_name": config.get("dataset_name")}


def _require_hub_name(path: object, options: dict[str, Any]) -> None:
    if not isinstance(path, str) or not _HUB_NAME.fullmatch(path) or Path(path).exists() or options:
        raise EvaluationError(
            f"dataset_path must be {', '.join(_READERS)} with data_files in dataset_kwargs, or the name of a data set "
            f"of the hub (owner/name) without dataset_kwargs, got {one_line(path)!r}"
        )


def _absolute(value: Any, folder: Path, files: list[Path]) -> Any:
    if isinstance(value, dict):
        return {str(key): _absolute(item, folder, files) for key, item in value.items()}
    if isinstance(value, list):
        return [_absolute(item, folder, files) for item in value]
    if not isinstance(value, str):
        raise EvaluationError(f"data_files must name files, got {one_line(value)!r}")
    given = at_home(value)
    path = next((place for place in (folder / given, given) if place.is_file()), None)
    if path is None:
        raise EvaluationError(f"data_files: there is no file {one_line(value, 120)}; correct the path")
    files.append(path.resolve())
    return str(path.resolve())


def _check_splits(config: dict[str, Any], data_files: Any) -> None:
    known = sorted(data_files) if isinstance(data_files, dict) else ["train"]
    for key in _SPLITS:
        if config.get(key) is not None and config[key] not in known:
            raise EvaluationError(f"{key}: {one_line(config[key], 60)!r} is not in data_files ({', '.join(known)})")


def _check_columns(files: list[Path]) -> None:
    import pyarrow.parquet

    for path in files:
        if path.suffix in (".yaml", ".yml"):
            continue
        try:
            about = (pyarrow.parquet.read_schema(path).metadata or {}).get(b"huggingface", b"{}")
            types = set(_types(json.loads(about)))
        except Exception as error:  # pyarrow raises many kinds on a file that it cannot read
            raise EvaluationError(f"data_files: {path.name} cannot be read ({one_line(error, 120)})") from error
        if types - _PLAIN:
            raise EvaluationError(f"data_files: {path.name} has a column of type {min(types - _PLAIN)}; leave it out")


def _types(value: Any) -> list[str]:
    if isinstance(value, list):
        return [name for item in value for name in _types(item)]
    if isinstance(value, dict):
        own = [value["_type"]] if isinstance(value.get("_type"), str) else []
        return own + [name for item in value.values() for name in _types(item)]
    return []
