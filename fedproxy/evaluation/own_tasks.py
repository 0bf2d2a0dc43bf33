"""Task files of one's own: lm-eval's YAML, read such that nothing that the file holds runs as code.

A file may ``include`` another, beside it or one of lm-eval's own. Functions (``!function``), Python classes, metrics
that come as scripts and whatever ``generate`` would load are refused; templates run in a sandbox.
"""

import functools
import tempfile
from pathlib import Path
from typing import Any

import yaml

from fedproxy.errors import ConfigError, EvaluationError, first_line, nearest, one_line
from fedproxy.evaluation.loaded_task import LoadedTask
from fedproxy.evaluation.offline_tasks import Split, lm_eval_folder, task_names
from fedproxy.evaluation.quiet import quiet
from fedproxy.evaluation.task_data import resolved_data
from fedproxy.files import at_home, file_sha256, read_whole
from fedproxy.names import check_name
from fedproxy.yaml_files import MOST_BYTES, parse_yaml

_KEYS = {
    *("task", "task_alias", "tag", "include", "metadata", "output_type", "repeats", "num_fewshot"),
    *("dataset_path", "dataset_name", "dataset_kwargs", "process_docs", "process_results"),
    *("training_split", "validation_split", "test_split", "fewshot_split", "fewshot_config", "fewshot_delimiter"),
    *("description", "gen_prefix", "doc_to_text", "doc_to_target", "doc_to_choice", "target_delimiter"),
    *("metric_list", "filter_list", "generation_kwargs", "should_decontaminate", "doc_to_decontamination_query"),
}
_GENERATION = {
    *("until", "max_gen_toks", "max_new_tokens", "do_sample", "temperature"),
    *("top_p", "top_k", "num_beams", "repetition_penalty"),
}


def is_task_file(name: str) -> bool:
    """Tell whether a task is named by its file."""
    return name.endswith((".yaml", ".yml"))


def load_own(name: str, split: Split | None) -> LoadedTask:
    """Return the task of a file, to be scored on ``split``.

    Raises:
        EvaluationError: If the file cannot be read, asks for code to run, or is no task that lm-eval can load.
    """
    config, files = _resolved(name)
    stamp = tuple((str(path), path.stat().st_mtime_ns, path.stat().st_size) for path in files)
    return _load(name, yaml.safe_dump(config, sort_keys=False), stamp, split)


def read_task_file(path: Path) -> dict[str, Any]:
    """Return what a task file says, without what it includes.

    Raises:
        EvaluationError: If it cannot be read, is too large, or is no YAML of plain values.
    """
    try:
        return _read(path)
    except EvaluationError as error:
        raise EvaluationError(f"task file {path}: {error}") from None


def own_sha256(name: str) -> str:
    """Return the hash of all that a task file asks: its text, what it includes, and its data files."""
    return "".join(file_sha256(path) for path in _resolved(name)[1])


def own_scored_files(name: str) -> list[Path]:
    """Return the local files of the split that a task file scores, or all of them where splits are not named.

    Raises:
        EvaluationError: As for :func:`load_own`.
    """
    config, _ = _resolved(name)
    found = (config.get("dataset_kwargs") or {}).get("data_files") or []
    if isinstance(found, dict):
        found = found.get(config.get("test_split") or config.get("validation_split"), [])
    return [Path(file) for file in ([found] if isinstance(found, str) else found)]


@functools.lru_cache(maxsize=32)
def _load(name: str, text: str, stamp: tuple[object, ...], split: Split | None) -> LoadedTask:
    """Load a resolved file; ``stamp`` makes changed data a new entry."""
    from lm_eval.tasks import TaskManager

    config = yaml.safe_load(text)
    with quiet(), tempfile.TemporaryDirectory() as folder:
        try:
            _check_metrics(config)
            Path(folder, "task.yaml").write_text(text, encoding="utf-8")
            tasks = TaskManager(include_path=folder, include_defaults=False).load([config["task"]])["tasks"]
        except EvaluationError as error:
            raise EvaluationError(f"task file {name}: {error}") from None
        except Exception as error:  # whatever lm-eval or datasets raise on a file that they cannot use
            raise EvaluationError(
                f"task file {name}: lm-eval cannot load it ({type(error).__name__}: {first_line(error)}); compare it "
                "with docs/evaluation.md"
            ) from error
    return LoadedTask(tasks[config["task"]], split, {"dataset_kwargs": None, "config_source": Path(name).name})


def _resolved(name: str) -> tuple[dict[str, Any], list[Path]]:
    """Return the file with what it includes, paths absolute, and all files that it is made of."""
    files: list[Path] = []
    theirs: list[str] = []
    try:
        config = _merged(Path(name), files, theirs)
        _check_shape(config)
        if theirs and not {"dataset_path", "dataset_kwargs"} & set(config):
            return {"include": theirs} | config, files  # lm-eval's own data
        config |= resolved_data(config, Path(name).parent, files)
    except (EvaluationError, ConfigError) as error:
        raise EvaluationError(f"task file {name}: {error}") from None
    return {"include": theirs} | config if theirs else config, files


def _merged(path: Path, files: list[Path], theirs: list[str]) -> dict[str, Any]:
    """Read a file and what it includes; lm-eval's own files, which may hold functions, are only named."""
    path = at_home(path).resolve()
    if path in files:
        raise EvaluationError(f"it includes itself through {path.name}; remove one include")
    files.append(path)
    config = _read(path)
    merged: dict[str, Any] = {}
    included = config.pop("include", [])
    if isinstance(included, str):
        included = [included]
    if not isinstance(included, list):
        raise EvaluationError(f"include must be a file or a list of files, got {one_line(repr(included), 80)}")
    for part in included:
        beside, tasks = (path.parent / str(part)).resolve(), lm_eval_folder().resolve() / "tasks"
        found = beside if beside.is_file() else (tasks / str(part)).resolve()
        if not found.is_file():
            raise EvaluationError(f"include {one_line(part)!r} is neither a file beside it nor one of lm-eval's")
        if found.is_relative_to(tasks):
            theirs.append(str(found))
        else:
            merged |= _merged(found, files, theirs)
    return merged | config


def _read(path: Path) -> dict[str, Any]:
    try:
        config = parse_yaml(read_whole(path, most=MOST_BYTES).decode("utf-8-sig"))
    except OSError as error:
        raise EvaluationError(f"{path} cannot be read ({error.strerror or error}); correct the path") from None
    except ValueError as error:
        if "!function" in str(error):
            raise EvaluationError(
                f"{path.name} asks for Python code (!function), which only lm-eval's own task files may; write it as "
                "a template"
            ) from None
        raise EvaluationError(f"{path.name} is not valid YAML ({one_line(error, 120)})") from None
    if not isinstance(config, dict) or not all(isinstance(key, str) for key in config):
        raise EvaluationError(f"{path.name} must hold a mapping of keys to values")
    return config


def _check_shape(config: dict[str, Any]) -> None:
    """Refuse keys that run code, that lm-eval does not have, or that name several tasks."""
    if "group" in config or isinstance(config.get("task"), list):
        raise EvaluationError("it names a group; name the files of its tasks instead")
    for key in config:
        if key not in _KEYS:
            raise EvaluationError(
                f"key {one_line(key, 60)!r} is not one that a task file may have{nearest(key, _KEYS)}"
            )
    name = check_name(config.get("task"), "task")
    if name in task_names():
        raise EvaluationError(f"task: {name!r} is the name of another task; choose another name")
    generation = config.get("generation_kwargs") or {}
    if not isinstance(generation, dict) or not set(generation) <= _GENERATION:
        raise EvaluationError(f"generation_kwargs may have {', '.join(sorted(_GENERATION))}")
    for key in ("process_docs", "process_results"):
        if config.get(key) is not None:
            raise EvaluationError(f"{key} must be null: it would be Python code")


def _check_metrics(config: dict[str, Any]) -> None:
    """Refuse metrics that lm-eval does not have: it would look for a script of that name, and run it."""
    import lm_eval.api.metrics
    from lm_eval.api.registry import metric_registry

    assert lm_eval.api.metrics  # importing it fills the registry
    for entry in config.get("metric_list") or []:
        metric = entry.get("metric") if isinstance(entry, dict) else entry
        if metric not in metric_registry or entry.get("hf_evaluate"):
            raise EvaluationError(f"metric_list: {one_line(metric, 60)!r} is not one of lm-eval's metrics")
