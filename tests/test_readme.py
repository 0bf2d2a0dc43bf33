"""Every command of the README runs, on the tiny recipe and with small budgets."""

import importlib
import json
import re
import shlex
import sys
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text()
TINY = (
    "target.path=asset:tiny-llama", "data.tasks=[tiny_sums,tiny_places]", "evaluation.tasks=[tiny_sums]",
    "data.max_input_tokens=96", "compression.calibration={path: asset:tiny-calibration, rows: 8, max_tokens: 32}",
    "trainer.accelerator=cpu",
)  # fmt: skip
SMALL = ["data.rows_per_task=16", "evaluation.limit=4", "federation.rounds=1"]


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands():
    """Return the words of every `python -m fedproxy.X ...` line, comments cut off, continued lines joined."""
    text = "\n".join(blocks("bash")).replace("\\\n", " ")
    return [shlex.split(line, comments=True) for line in text.splitlines() if "python -m fedproxy" in line]


def translated(words):
    """Return a command's module and arguments with SmolLM2's recipes, model and tasks replaced by tiny ones."""
    words = words[words.index("-m") + 1 :]
    module, arguments = words[0], words[1:]
    swap = {
        "target.path=/models/my-llm": "target.path=asset:tiny-llama",
        "tasks=[arc_easy]": "tasks=[tiny_sums]",
        "evaluation.tasks=[arc_easy]": "evaluation.tasks=[tiny_sums]",
        "limit=100": "limit=4",
    }
    arguments = [swap.get(argument, argument) for argument in arguments]
    if module in ("fedproxy.fit", "fedproxy.compress"):
        if "recipe=fedproxy_llama" in arguments:
            arguments = ["output_dir=runs/fedproxy_llama", *arguments]
        arguments = [argument.replace("recipe=fedproxy_llama", "recipe=fedproxy_tiny") for argument in arguments]
        arguments += [option for option in SMALL if not any(a.startswith(option.split("=")[0]) for a in arguments)]
        if "plugins=[my_rule]" in arguments:
            arguments.append("output_dir=runs/plugin")
    if module == "fedproxy.compare":
        arguments += [*TINY, *SMALL]
    if module == "fedproxy.recipes" and arguments[0] == "cp":
        arguments[1] = "fedproxy_tiny"
    return module, arguments


def test_readme_names_the_commands_that_exist():
    modules = {words[words.index("-m") + 1] for words in commands()}
    names = ("doctor", "fit", "compress", "recipes", "evaluate", "report", "compare")
    assert modules == {f"fedproxy.{name}" for name in names}
    makefile = (Path(__file__).parent.parent / "Makefile").read_text()
    for target in re.findall(r"^make ([a-z-]+)", "\n".join(blocks("bash")), flags=re.MULTILINE):
        assert f"\n{target}:" in makefile


def test_every_command_runs_in_order(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_rule", raising=False)  # of another page
    numbers = ("one", "two", "three", "four", "five")
    talks = [[("user", f"How much is {number}?"), ("assistant", number)] for number in numbers]
    rows = [{"messages": [{"role": role, "content": said} for role, said in talk]} for talk in talks]
    Path("ward_a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("ward_b.csv").write_text("prompt,target\n" + "".join(f"Say {number}:,one\n" for number in numbers))
    Path("my_rule.py").write_text(next(block for block in blocks("python") if "my_rule.py" in block))
    found = commands()
    assert len(found) >= 9
    for words in found:
        module, arguments = translated(words)
        importlib.import_module(module).main(arguments)
    printed = capsys.readouterr().out
    assert "runs/fedproxy_tiny/report.md" in printed
    assert "runs/mine/report.md" in printed
    assert "runs/plugin/report.md" in printed
    assert Path("runs/compared/comparison.html").is_file()
    assert Path("runs/arc/scores.json").is_file()


def test_unknown_words_of_recipes_are_one_line():
    from fedproxy.errors import ConfigError
    from fedproxy.recipes import main

    with pytest.raises(ConfigError, match=r"recipes: expected ls, show NAME, .* got 'list'"):
        main(["list"])
