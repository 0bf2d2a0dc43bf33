"""The tasks that need no hub: YAML files beside this module, each lm-eval's own task on files of the local cache."""

import copy
import functools
import importlib.util
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from fedproxy.data.assets import cache_root, tables_folder
from fedproxy.errors import EvaluationError

Split = Literal["test", "validation"]
_TASKS = Path(__file__).parent / "tasks"


@dataclass(frozen=True)
class OfflineTask:
    """One task file of ours: lm-eval's prompt, target and metrics, documents from jsonl files."""

    name: str
    text: str
    """Its content: ``include`` names a file beside it or in lm-eval's task folder, data files lie in the cache."""

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        """The file's content as a mapping, which nobody changes."""
        config: dict[str, Any] = yaml.safe_load(self.text)
        return config

    @property
    def declared(self) -> dict[str, str]:
        """The jsonl file that each split is declared to have, relative to the cache."""
        files: dict[str, str] = self.config["dataset_kwargs"]["data_files"]
        return files

    @property
    def asset(self) -> str:
        """Name of the asset that the files belong to."""
        return next(iter(self.declared.values())).partition("/")[0]

    @property
    def multiple_choice(self) -> bool:
        """Whether its questions have choices: those of all assets but one do."""
        return self.asset != "open-qa"

    @property
    def own(self) -> bool:
        """Whether the task is ours alone: its template stands beside it and no hub has its data."""
        return (_TASKS / str(self.config.get("include"))).is_file()

    def file(self, split: str) -> Path | None:
        """Return the file of ``train``, ``validation`` or ``test`` if the task declares the split and it exists."""
        for name, file in self.declared.items():
            if name.startswith(split) and (path := cache_root() / file).is_file():
                return path
        return None

    def has(self, splits: Iterable[str]) -> bool:
        """Tell whether all these splits are in the cache."""
        return all(self.file(split) is not None for split in splits)

    def scored_split(self, split: Split | None) -> Split:
        """Return the split that is scored: the wanted one, else lm-eval's choice (test where there is one)."""
        return split or ("test" if "test" in self.declared else "validation")

    def resolved(self) -> dict[str, Any]:
        """Return the file's content with absolute paths of the files that exist, as lm-eval can load it.

        A task without a train file keeps its other splits: ``training_split`` becomes null, so that lm-eval does not
        look for it.
        """
        config = copy.deepcopy(self.config)
        base = _TASKS if self.own else lm_eval_folder() / "tasks"
        config["include"] = str(base / config["include"])
        paths = {split: cache_root() / file for split, file in self.declared.items()}
        config["dataset_kwargs"] = {
            "data_files": {split: str(path) for split, path in paths.items() if path.is_file()},
            "cache_dir": str(tables_folder()),
        }
        for key, split in (("training_split", "train"), ("validation_split", "validation"), ("test_split", "test")):
            if self.file(split) is None:
                config[key] = None
        return config


@functools.cache
def offline_tasks() -> dict[str, OfflineTask]:
    """Return every task file of ours, by task name."""
    files = sorted(path for path in _TASKS.glob("*.yaml") if not path.name.startswith("_"))
    found = {path.stem: OfflineTask(path.stem, path.read_text(encoding="utf-8")) for path in files}
    return found | {task.name: task for task in _mmlu()}


def _mmlu() -> Iterator[OfflineTask]:
    """Yield mmlu's 57 subjects: one of our files for all, as each of lm-eval's files names its subject."""
    text = (_TASKS / "_mmlu.yaml").read_text(encoding="utf-8")
    for path in sorted((lm_eval_folder() / "tasks/mmlu/default").glob("mmlu_*.yaml")):
        yield OfflineTask(path.stem, text.replace("SUBJECT", path.stem.removeprefix("mmlu_")))


def task_names() -> tuple[str, ...]:
    """Return the names of the tasks that run on local files, sorted."""
    return tuple(sorted(offline_tasks()))


def missing_assets(names: Iterable[str]) -> list[str]:
    """Return the assets to fetch before tasks of these names can run on local files, each once."""
    tasks = [offline_tasks()[name] for name in names if name in offline_tasks()]
    return sorted({task.asset for task in tasks if not (cache_root() / task.asset).is_dir()})


def lm_eval_folder() -> Path:
    """Return the folder of the installed lm-eval without importing it.

    Raises:
        EvaluationError: If lm-eval is not installed.
    """
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or not spec.submodule_search_locations:
        raise EvaluationError("lm-eval is not installed; pip install 'lm-eval>=0.4.11,<0.5'")
    return Path(spec.submodule_search_locations[0])


def count_rows(path: Path) -> int:
    """Return the number of non-empty lines of a jsonl file."""
    with path.open("rb") as file:
        return sum(1 for line in file if line.strip())
