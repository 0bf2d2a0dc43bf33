"""Damaged recipes, rows, models, updates, run folders and reports: one line and exit code 2, or they work.

Every case is drawn from its kind and number, so a case that fails is the same again: `pytest -k "rows-17"`.
"""

import json
import shutil
from pathlib import Path
from random import Random

import pytest
import yaml

from fedproxy.config import load_config
from fedproxy.config.loading import to_dict
from fedproxy.federation.engines.base import Engine
from fedproxy.registry import Component
from tests.fuzz import door
from tests.fuzz.harness import Runner, check
from tests.fuzz.mutations import (
    bytes_mutated,
    csv_mutated,
    json_mutated,
    odd_value,
    path_mutated,
    tree_mutated,
    yaml_mutated,
)

pytestmark = pytest.mark.slow
CASES = {"recipe": 140, "rows": 90, "task": 40, "model": 100, "update": 100, "run": 70, "report": 80}
SMALL = (
    *("data.rows_per_task=4", "client.batch_size=4", "federation.rounds=1", "evaluation.limit=2"),
    *("evaluation.tasks=[tiny_colors]", "evaluation.models=[fused]", "trainer.accelerator=cpu"),
    "compression={name: uniform, keep: [0, 3], calibration: {path: asset:tiny-calibration, rows: 4, max_tokens: 16}}",
)
ONE_TASK = ("data.tasks=[tiny_colors]", "data.partition.name=iid", "data.partition.clients=2")
SIZE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "head_dim": 8}
FAMILIES = {
    "gpt2": {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 512},
    "gemma2": {**SIZE, "num_key_value_heads": 2, "sliding_window": 4},
    "mixtral": {**SIZE, "num_key_value_heads": 2, "num_local_experts": 4},
}
"""Models of other families beside the tiny Llama: other names, kinds of blocks, experts."""
JSON = (".json", ".jsonl")


@pytest.fixture(scope="session")
def runner(tmp_path_factory):
    runner = Runner(tmp_path_factory.mktemp("home"))
    yield runner
    runner.close()


@pytest.fixture(scope="session")
def good(tmp_path_factory, runner):
    """A folder with what every case starts from: a model, rows, and a finished run."""
    folder = tmp_path_factory.mktemp("good")
    rows = [{"prompt": f"What follows {n}?", "target": str(n + 1), "kind": "ab"[n % 2]} for n in range(8)]
    (folder / "ward.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "ward.json").write_text(json.dumps(rows))
    (folder / "ward.csv").write_text("prompt,target\n" + "".join(f'"{r["prompt"]}",{r["target"]}\n' for r in rows))
    (folder / "ward.txt").write_text("".join(f"{row['prompt']} {row['target']}\n" for row in rows))
    _tables(rows, folder)
    models = "evaluation.models=[target,fused]"
    ended, said = runner.run(
        "fedproxy.fit", ["recipe=fedproxy_tiny", *SMALL, *ONE_TASK, models, "output_dir=run"], folder
    )
    assert ended["code"] == 0, said
    shutil.copytree(runner.home / "assets" / "tiny-llama", folder / "model")
    _models(folder)
    return folder


def _models(folder: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    for family, options in FAMILIES.items():
        tokens = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
        config = AutoConfig.for_model(family, vocab_size=len(tokenizer), **tokens, **options)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / family)
        tokenizer.save_pretrained(folder / family)


def _tables(rows: list[dict], folder: Path) -> None:
    import datasets

    table = datasets.Dataset.from_list(rows)
    table.to_parquet(folder / "ward.parquet")
    table.save_to_disk(folder / "ward")


@pytest.fixture
def place(tmp_path, good):
    """A folder to work in, with somebody's notes beside what a case makes."""
    place = tmp_path / "place"
    (place / "other" / "deep").mkdir(parents=True)
    (place / "notes.txt").write_text("mine")
    (place / "other" / "deep" / "config.yaml").write_text("a: 1\n")
    return place


def cases(kind: str) -> list:
    return [pytest.param(Random(f"{kind}-{n}"), id=f"{kind}-{n}") for n in range(CASES[kind])]


FAULTS = {
    "traceback": "ended with 1",
    "logged": "Traceback",
    "crash": "ended with -11",
    "hang": "killed after",
    "memory": "MiB",
    "too_much_memory": "MemoryError",
    "deleted": "changed outside of the run folder: .*other",
    "changed": "changed outside of the run folder: .*notes",
    "made": "changed outside of the run folder: .*beside",
    "escape": r"x1b\[31mred",
    "long": "xxx",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_this_test_sees_what_it_looks_for(runner, place, fault):
    with pytest.raises(AssertionError, match=FAULTS[fault]):
        check(runner, "tests.fuzz.faults", [fault], place, "run", longest_s=2 if fault == "hang" else 10)


@pytest.mark.parametrize("promise", ["good", "refusal"])
def test_this_test_passes_what_keeps_its_promises(runner, place, promise):
    check(runner, "tests.fuzz.faults", [promise], place, "run")


def _recipe(random: Random) -> bytes:
    recipe = to_dict(load_config(["recipe=fedproxy_tiny", *SMALL, *ONE_TASK]))
    del recipe["output_dir"]
    kind = random.random()
    if kind < 0.65:
        recipe = tree_mutated(recipe, random, random.choice((1, 1, 2, 4)))
    elif kind < 0.75:
        family = random.choice(
            [cls for cls in Component.__subclasses__() if cls.family in recipe and cls is not Engine]
        )
        recipe[family.family] = {**random.choice((recipe[family.family], {})), "name": random.choice(family.names())}
    text = yaml.safe_dump(recipe, allow_unicode=True)
    if 0.75 < kind < 0.88:
        text = yaml_mutated(text, random)
    return bytes_mutated(text.encode(), random) if kind > 0.88 else text.encode()


@pytest.mark.parametrize("random", cases("recipe"))
def test_recipes(random, runner, place):
    (place / "mine.yaml").write_bytes(_recipe(random))
    module = random.choice(["fedproxy.fit"] * 3 + ["fedproxy.compress"])
    arguments = ["recipe=mine.yaml", "output_dir=run"]
    if random.random() < 0.15:
        key = random.choice(("seed", "client.lr", "data", "target.path", "aggregator", "data.files.a b", "", "a.b.c"))
        arguments.append(f"{key}={odd_value(random)}".replace("\x00", "").encode("utf-8", "replace").decode())
    if random.random() < 0.15:
        module, arguments = "fedproxy.recipes", random.choice((["plan", "mine.yaml"], ["show", "mine.yaml"]))
    check(runner, module, arguments, place, "run")


@pytest.mark.parametrize("random", cases("rows"))
def test_rows(random, runner, place, good):
    name = random.choice(["ward.jsonl"] * 4 + ["ward.json", "ward.csv", "ward.csv", "ward.txt", "ward.parquet", "ward"])
    path = place / name
    (shutil.copytree if name == "ward" else shutil.copy)(good / name, path)
    damaged = random.choice(sorted(path.iterdir())) if name == "ward" else path
    if random.random() < 0.1:
        path_mutated(damaged, random, place / "notes.txt")
    else:
        mutate = json_mutated if damaged.suffix in JSON else csv_mutated if name == "ward.csv" else bytes_mutated
        damaged.write_bytes(mutate(damaged.read_bytes(), random))
    what = [f"data.files.ward={name}", "data.tasks=[]"]
    if name == "ward.txt" or random.random() < 0.2:
        calibration = f"{{path: {name}, rows: 4, max_tokens: 16}}"
        what = [f"compression={{name: block_influence, ratio: 0.5, calibration: {calibration}}}", *ONE_TASK]
    if random.random() < 0.15:
        owners = {"clients": {"a": ["ward/train/0", "ward/train/1"], "b": ["ward/train/2", "ward/train/3"]}}
        (place / "owners.json").write_bytes(json_mutated(json.dumps(owners).encode(), random))
        what.append("data.partition={name: file, path: owners.json}")
    check(runner, "fedproxy.fit", ["recipe=fedproxy_tiny", *SMALL, *what, "output_dir=run"], place, "run")


TASK = """\
task: ward
dataset_path: csv
dataset_kwargs: {data_files: {test: ward.csv}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{prompt}}"
doc_to_target: 0
doc_to_choice: ["{{target}}", "none"]
target_delimiter: " "
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
metadata: {version: 1.0}
"""


@pytest.mark.parametrize("random", cases("task"))
def test_task_files(random, runner, place, good):
    shutil.copy(good / "ward.csv", place)
    kind = random.random()
    task = yaml.safe_load(TASK)
    if kind < 0.7:
        task = tree_mutated(task, random, random.choice((1, 1, 2)))
    if kind < 0.2:
        key = random.choice(("include", "tag", "filter_list", "generation_kwargs", "fewshot_config", "description"))
        task = {**(task if isinstance(task, dict) else {}), key: odd_value(random)}
    text = yaml.safe_dump(task, allow_unicode=True) if kind < 0.7 else yaml_mutated(TASK, random)
    data = text.encode("utf-8", "replace")
    (place / "ward.yaml").write_bytes(bytes_mutated(data, random) if kind > 0.85 else data)
    arguments = ["model=asset:tiny-llama", "tasks=[ward.yaml]", "limit=2", "output_dir=run"]
    check(runner, "fedproxy.evaluate", arguments, place, "run")


@pytest.mark.parametrize("random", cases("model"))
def test_models(random, runner, place, good):
    shutil.copytree(good / random.choice(["model", "model", *FAMILIES]), place / "model")
    path = random.choice(sorted(path for path in (place / "model").iterdir() if path.is_file()))
    if random.random() < 0.15:
        path_mutated(path, random, place / "notes.txt")
    elif path.suffix == ".safetensors" and random.random() < 0.7:
        path.write_bytes(_header_mutated(path.read_bytes(), random))
    else:
        mutate = json_mutated if path.suffix in JSON else bytes_mutated
        path.write_bytes(mutate(path.read_bytes(), random))
    if random.random() < 0.7:
        trained = "trainable={name: full, blocks: ends, first: 1, last: 1}"
        arguments = ["recipe=fedproxy_tiny", *SMALL, *ONE_TASK, trained, "target.path=model", "output_dir=run"]
        check(runner, "fedproxy.fit", arguments, place, "run")
    else:
        arguments = ["model=model", "tasks=[tiny_colors]", "limit=2", "output_dir=run"]
        check(runner, "fedproxy.evaluate", arguments, place, "run")


def _header_mutated(data: bytes, random: Random) -> bytes:
    """Return a safetensors file with a damaged header, whose length mostly fits."""
    length = int.from_bytes(data[:8], "little")
    head = json.loads(data[8 : 8 + length])
    if random.random() < 0.4 and isinstance(head.get("__metadata__", {}).get("meta"), str):
        meta = json_mutated(head["__metadata__"]["meta"].encode(), random)
        head["__metadata__"]["meta"] = meta.decode("latin-1")
        text = json.dumps(head).encode()
    elif random.random() < 0.2:
        head |= {f"delta/{n}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for n in range(3000)}
        text = json.dumps(head).encode()
    else:
        text = json_mutated(data[8 : 8 + length], random)
    said = random.choice((0, 1, length, 1 << 40, (1 << 64) - 1)) if random.random() < 0.15 else len(text)
    return said.to_bytes(8, "little") + text + data[8 + length :]


def _values_mutated(data: bytes, random: Random) -> bytes:
    """Return a safetensors file some of whose numbers are NaN, infinite, huge, tiny or negative."""
    start = 8 + int.from_bytes(data[:8], "little")
    changed = bytearray(data)
    for _ in range(random.choice((1, 5))):
        at = random.randrange(start, len(data) - 1)
        changed[at : at + 2] = random.choice((b"\x80\x7f", b"\xc0\x7f", b"\x80\xff", b"\x7f\x7f", b"\x01\x00"))
    return bytes(changed)


@pytest.mark.parametrize("random", cases("update"))
def test_updates(random, runner, place):
    path = place / "run" / "update.safetensors"
    path.parent.mkdir()
    door.honest(path)
    if random.random() < 0.1:
        path_mutated(path, random, place / "notes.txt")
    else:
        mutate = random.choice((_header_mutated, _header_mutated, _header_mutated, _values_mutated, bytes_mutated))
        path.write_bytes(mutate(path.read_bytes(), random))
    check(runner, "tests.fuzz.door", [str(path)], place, "run")


def test_an_honest_update_is_let_in(runner, place):
    (place / "run").mkdir()
    door.honest(place / "run" / "update.safetensors")
    ended, said = runner.run("tests.fuzz.door", ["run/update.safetensors"], place)
    assert (ended["code"], said) == (0, "let in\n")


@pytest.mark.parametrize("random", cases("run"))
def test_run_folders(random, runner, place, good):
    shutil.copytree(good / "run", place / "run", symlinks=True)
    files = sorted(path for path in (place / "run").rglob("*") if path.is_file() and path.suffix != ".html")
    for _ in range(random.choice((1, 1, 2))):
        suffix = random.choice(sorted({path.suffix for path in files}))
        path = random.choice([path for path in files if path.suffix == suffix])
        if random.random() < 0.35:
            path_mutated(random.choice((path, path, path.parent)), random, place / "notes.txt")
            break
        mutate = json_mutated if path.suffix in JSON else bytes_mutated
        path.write_bytes(mutate(path.read_bytes(), random))
    arguments = ["recipe=fedproxy_tiny", *SMALL, *ONE_TASK, "evaluation.models=[target,fused]", "resume=auto"]
    arguments[-1] = random.choice(["resume=auto"] * 4 + ["overwrite=true"])
    arguments += [f"federation.rounds={random.choice((1, 2))}", "output_dir=run"]
    check(runner, "fedproxy.fit", arguments, place, "run")


@pytest.mark.parametrize("random", cases("report"))
def test_reports(random, runner, place, good):
    for name in ("a", "b"):
        (place / "run" / name).mkdir(parents=True)
        for path in (good / "run").glob("*.json*"):
            shutil.copy(path, place / "run" / name)
        shutil.copytree(good / "run" / "evaluation", place / "run" / name / "evaluation")
    files = sorted(path for path in (place / "run" / "b").rglob("*") if path.suffix in JSON)
    path = random.choice([place / "run" / "b" / "report.json"] * len(files) + files)
    if random.random() < 0.1:
        path_mutated(path, random, place / "notes.txt")
    else:
        path.write_bytes(json_mutated(path.read_bytes(), random))
    arguments = random.choice((["run/b"], ["run/a", "run/b"], ["run/b", "run/a"]))
    check(runner, "fedproxy.report", arguments, place, "run")
