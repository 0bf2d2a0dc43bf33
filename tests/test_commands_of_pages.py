"""Every command that a page shows is one that FedProxy takes, word for word, and the cheap ones are run.

README.md and the tutorials have tests of their own, which run theirs. What no test of pages runs stands in ``NOT_RUN``
with the reason; a new command runs here unless it is put there.
"""

import importlib
import json
import re
import shlex
import shutil
import sys
import tomllib
from functools import partial
from itertools import groupby
from pathlib import Path

import pytest

from fedproxy.assets import _parser
from fedproxy.comparison.arguments import read_study
from fedproxy.config import check_arguments, load_config
from fedproxy.data.assets.entries import by_name
from fedproxy.errors import FedProxyError
from fedproxy.evaluate import parse_arguments
from fedproxy.pipeline.planning.hardware import Hardware
from fedproxy.recipe_files import find_recipe, study_names
from fedproxy.sites.arguments import options, worded
from fedproxy.sites.hub_commands import HubInit
from fedproxy.sites.site_commands import SiteInit

ROOT = Path(__file__).parent.parent
PAGES = [path.relative_to(ROOT) for folder in (".", "docs", "examples") for path in ROOT.glob(f"{folder}/*.md")]
PAGES += [path.relative_to(ROOT) for folder in ("docs", "examples") for path in ROOT.glob(f"{folder}/*/**/*.md")]
WRITTEN_BY_PROGRAMS = ("docs/_build/", "docs/results/")
PAGES = sorted(path for path in PAGES if not str(path).startswith(WRITTEN_BY_PROGRAMS) and path.stem != "CHANGELOG")
FENCED = re.compile(r"^```(\w*).*?\n(.*?)^```$", re.DOTALL | re.MULTILINE)
OTHERS_RUN = ("README.md", "docs/tutorials/")  # tests/test_readme.py, tests/tutorials
NOT_RUN = {
    "assets fetch": "fetches 238 MB",
    "benchmarks.": "minutes to hours; tests/benchmarks has small ones",
    "compare ": "hours; README.md's is run, tests/comparison has the rest",
    "evaluate model=asset:smollm2-135m tasks=[arc_easy] apply_": "the tiny model has no template: tests/evaluation",
    "fit recipe=examples/": "make test-example",
    "fit recipe=fedproxy_llama data.partition.name=sites": "needs a hub: tests/sites",
    "fit recipe=fedproxy_llama engine.name=workers": "starts processes: tests/federation/engines",
    "fit recipe=fedproxy_llama loggers=[csv,tensorboard,mlflow,wandb]": "needs two extras: tests/pipeline/test_loggers",
    "fit recipe=fedproxy_llama trainer.devices=": "needs several GPUs",
    "fit recipe=fedproxy_tiny trainer.devices=2": "starts processes: tests/pipeline/test_devices",
    "hub ": "needs nginx and Flower: tests/sites",
    "make ": "make test would run itself",
    "pip ": "changes the environment",
    "pytest ": "make test-example",
    "recipes plan fedproxy_llama plan.tflops=measure": "needs SmolLM2: tests/pipeline/planning",
    "recipes plan paper/fedproxy_llama2_7b_heterogeneous target.path=": "four seconds: tests/pipeline/planning",
    "report --watch": "ends with a run that goes on: tests/pipeline/test_watch",
    "site ": "needs nginx and Flower: tests/sites",
}
"""How commands begin that no test of pages runs, and why."""
TINY = {
    "recipe=fedproxy_llama": "recipe=fedproxy_tiny",
    "runs/fedproxy_llama": "runs/fedproxy_tiny",
    "model=asset:smollm2-135m": "model=asset:tiny-llama",
    "model=runs/demo/fused": "model=asset:tiny-llama",
    "target.path=./my_llm": "target.path=asset:tiny-llama",
    "tasks=[arc_easy,openbookqa]": "tasks=[tiny_sums]",
    "tasks=[arc_easy,ward/triage.yaml]": "tasks=[tiny_sums]",  # tests/evaluation has files of tasks
    "tasks=[arc_easy]": "tasks=[tiny_sums]",
    "tasks=[csqa]": "tasks=[tiny_places]",
    "limit=100": "limit=2",
    "healing.rows=640": "healing.rows=8",
    "distillation.steps=100": "distillation.steps=2 distillation.rows=32",
    "federation.rounds=10": "federation.rounds=1",
    "privacy.epsilon=8": "privacy.epsilon=8 privacy.accountant=rdp",
}
SMALL = (
    "data.tasks=[tiny_sums,tiny_places]", "data.rows_per_task=16", "data.max_input_tokens=96", "federation.rounds=1",
    "target.path=asset:tiny-llama", "compression.calibration={path: asset:tiny-calibration, rows: 8, max_tokens: 32}",
    "evaluation.tasks=[tiny_sums]", "evaluation.models=[fused]", "evaluation.limit=2", "trainer.accelerator=cpu",
)  # fmt: skip


def commands_of(page):
    """Return the words of every command of a page's blocks, ``fit recipe=...`` for all ways to write it."""
    blocks = FENCED.findall((ROOT / page).read_text())
    text = "\n".join(block for language, block in blocks if language in ("bash", "sh"))
    text = re.sub(r"(?<!\S)(?:python -m (?:fedproxy\.)?|fedproxy (?=[a-z]))", "", text.replace("\\\n", " "))
    text = re.sub(r"\bpython benchmarks/(\w+)\.py", r"benchmarks.\1", text)
    found = []
    for line in text.splitlines():
        reader = shlex.shlex(line, posix=True, punctuation_chars=";&|>")
        reader.whitespace_split = True
        for joined, words in groupby(reader, lambda word: set(word) <= set(";&|")):
            words = [word for word in words if word not in ("until", "do") and not re.match(r"[A-Z_]+=", word)]
            if words and not joined:
                found.append(words[: words.index(">")] if ">" in words else words)
    return found


COMMANDS_OF = {page: found for page in PAGES if (found := commands_of(page))}


def files_of(page, folder, recipe):
    """Write what the page's commands name and do not make."""
    study = re.search(r"```yaml\n(.*?)```", (ROOT / page).read_text(), re.DOTALL) if page.stem == "compare" else None
    folder.joinpath("mine.yaml").write_text(study[1] if study else f"extends: {recipe}\n")
    folder.joinpath("agreed.yaml").write_text(f"extends: {recipe}\n")
    numbers = ("one", "two", "three", "four", "five")
    rows = [{"prompt": f"How much is {number}?", "target": number} for number in numbers]
    for name in ("ward_a", "ward_test", "held_out"):
        folder.joinpath(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder.joinpath("ward_b.csv").write_text("prompt,target\n" + "".join(f"Say {number}:,one\n" for number in numbers))
    callback = "from lightning.pytorch.callbacks import Callback\n\n\nclass MyCallback(Callback):\n    pass\n"
    folder.joinpath("my_plugin.py").write_text(callback)


def takes_a_run(words):
    """With a plugin, classes are known once it is imported."""
    (check_arguments if any(word.startswith("plugins=") for word in words) else load_config)(words)


def takes_a_study(words):
    name = words[0].removeprefix("study=")
    if name in study_names():  # tests/comparison reads all that ship
        words = ["recipes=[fedproxy_tiny]", *words[1:]]
    read_study(words)


def takes_recipes(words):
    verb, *names = words
    if verb == "plan":
        check_arguments([f"recipe={names[0]}", *Hardware.split(names[1:])[1]])
    else:
        assert verb in ("ls", "show", "cp")
        assert all(map(find_recipe, names[:1]))


def takes_a_party(init, words):
    verb, _, rest = worded(words, init.__name__, ("init", "register", "check", "up", "status"))
    assert verb == "init" or len(rest) == (2 if verb == "register" else 0)
    options(rest if verb == "init" else [], init)


def takes_an_extra(words):
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {name for names in re.findall(r"\[(.*?)\]", " ".join(words)) for name in names.split(",")} <= set(known)


def takes_a_benchmark(name, words):
    program = (ROOT / name.replace(".", "/")).with_suffix(".py").read_text()
    assert all(f'"{word}"' in program for word in words if word.startswith("--"))


CHECKS = {
    "assets": lambda words: all(map(by_name, getattr(_parser().parse_args(words), "names", ()))),
    "compare": takes_a_study,
    "compress": takes_a_run,
    "evaluate": parse_arguments,
    "fit": takes_a_run,
    "hub": partial(takes_a_party, HubInit),
    "pip": takes_an_extra,
    "recipes": takes_recipes,
    "site": partial(takes_a_party, SiteInit),
}
OF_THE_SHELL = ("cat", "cp", "done", "for", "kill", "sleep")


def check(words):
    """Refuse what the command would refuse before any work, as far as the user's own files are not needed."""
    name, *rest = words
    if name in CHECKS:
        CHECKS[name](rest)
    elif name == "make":
        assert f"\n{rest[0]}:" in (ROOT / "Makefile").read_text()
    elif name.startswith("benchmarks."):
        takes_a_benchmark(name, rest)
    else:
        assert name in ("doctor", "report", *OF_THE_SHELL) or (name == "pytest" and (ROOT / rest[0]).exists()), words


def test_pages_show_commands_in_blocks_of_bash():
    for page in PAGES:
        text = FENCED.sub("", (ROOT / page).read_text())
        assert not re.findall(r"^ {4,}(?:python |fedproxy [a-z]|pip |make ).*", text, re.MULTILINE), page
    assert sum(map(len, COMMANDS_OF.values())) > 90


@pytest.mark.parametrize("page", COMMANDS_OF, ids=str)
def test_commands_are_taken_as_they_stand(page, tmp_path, monkeypatch):
    files_of(page, tmp_path, "fedproxy_llama")
    monkeypatch.syspath_prepend(tmp_path)
    for words in COMMANDS_OF[page]:
        monkeypatch.chdir(ROOT if any(word.startswith("recipe=examples/") for word in words) else tmp_path)
        check(words)


def reason(words):
    line = " ".join([*words, ""])
    return next((why for begins, why in NOT_RUN.items() if line.startswith(begins)), None)


def small(words):
    """Return a command's words on the tiny model; what the page itself sets comes last and stays."""
    name, *rest = " ".join(TINY.get(word, word) for word in words).split()
    if name == "evaluate":
        rest += ["limit=2", "overwrite=true"]
    return name, [rest[0], *SMALL, *rest[1:]] if name in ("fit", "compress") else rest


def test_commands_run_unless_a_reason_is_given(tmp_path, monkeypatch):
    every = [words for found in COMMANDS_OF.values() for words in found]
    assert [begins for begins in NOT_RUN if not any(" ".join([*words, ""]).startswith(begins) for words in every)] == []
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_plugin", raising=False)
    done = [words for page in COMMANDS_OF if str(page).startswith(OTHERS_RUN) for words in COMMANDS_OF[page]]
    for page, found in COMMANDS_OF.items():
        files_of(page, tmp_path, "fedproxy_tiny")
        for words in found:
            if words in done or reason(words):
                continue
            name, arguments = small(words)
            if name == "fit":  # of another page
                folder = arguments[0].removeprefix("recipe=").removesuffix(".yaml")
                shutil.rmtree(tmp_path / "runs" / folder, ignore_errors=True)
            done.append(words)
            try:
                assert not importlib.import_module(f"fedproxy.{name}").main(arguments), (page, words)
            except FedProxyError as error:
                pytest.fail(f"{page}: {' '.join(words)}: {error}")
    assert len(done) > 60
