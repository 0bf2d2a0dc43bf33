"""Mistakes are found before anything heavy is imported, by classes that are held equal to the real ones."""

import dataclasses
import json
import subprocess
import sys
import typing

import pytest

from fedproxy.config import RunConfig, load_config, source, to_dict
from fedproxy.config.loading import _configure, _read
from fedproxy.errors import ConfigError
from fedproxy.recipe_files import recipe_names
from fedproxy.registry import Component

HEAVY = ("torch", "numpy", "transformers", "lightning", "peft", "datasets", "lm_eval", "pyarrow", "matplotlib")


def parts(cls):
    """Return every dataclass and component family below ``cls``, by path."""
    found = {"": cls}
    for name, hint in typing.get_type_hints(cls).items():
        hint = (typing.get_args(hint) or (hint,))[-1]  # of a value, or of the values of a mapping
        if dataclasses.is_dataclass(hint):
            found |= {f"{name}.{path}": part for path, part in parts(hint).items()}
    return found


def described(cls):
    hints = typing.get_type_hints(cls)
    return [(item.name, str(hints[item.name]).replace(" ", ""), str(item.default)) for item in dataclasses.fields(cls)]


def plain_hints(cls):
    """Return the fields that are no dataclasses themselves: those have other classes here and there."""
    return [(name, hint, default) for name, hint, default in described(cls) if "fedproxy." not in hint]


def test_the_classes_read_from_source_are_the_real_ones():
    early, real = parts(source.configuration_class()), parts(RunConfig)
    assert list(early) == list(real)
    members = 0
    for path, cls in real.items():
        assert plain_hints(early[path]) == plain_hints(cls)
        if issubclass(cls, Component):
            shipped = [name for name in cls.names() if cls.by_name(name).__module__.startswith("fedproxy.")]
            assert list(early[path].names()) == shipped, f"{path}: a class needs a library where it is defined"
            for name in shipped:
                assert plain_hints(early[path].by_name(name)) == plain_hints(cls.by_name(name))
                members += 1
    assert members > 50


def test_trainer_options_are_lightnings():
    from fedproxy.modules import trainer

    for options in ({"precison": 1}, {"max_epochs": 3}):
        with pytest.raises(ConfigError) as real:
            trainer.check_trainer_options(options)
        with pytest.raises(ConfigError) as early:
            source.check_trainer_options(options)
        assert str(early.value) == str(real.value)
    source.check_trainer_options(dict.fromkeys(trainer.trainer_options()))


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_means_the_same_to_both(name):
    words = [f"recipe={name}"]
    files, _ = _read(words)
    assert to_dict(_configure(source.configuration_class(), files, words)) == to_dict(load_config(words))


RULES = [
    "client.lr=0",
    "fusion.mode=add",
    "aggregator.name=h_tie",
    "aggregator.rho=0.5",
    "aggregator.trim_scope=all",
    "trainable.blocks=some",
    "trainable.r=0",
    "compression.ratio=1.5",
    "compression.calibration.rows=0",
    "healing.ridge=0.1",
    "distillation.lr=1",
    "regularizer.strength=-1",
    "engine.threads=0",
    "federation.validation.every=-1",
    "data.tasks=[]",
    "loggers=[wand]",
    "parts.precision.up=int7",
    "parts.precisoin.up=int8",
    "parts.precision.upp=int8",
    "parts.ranks.clients={a: 0}",
    "parts.clip_noise.clip=-1",
    "parts.conflict={}",
]


@pytest.mark.parametrize("word", RULES)
def test_rules_are_told_in_the_same_words(word):
    words = ["recipe=fedproxy_llama", word]
    with pytest.raises(ConfigError) as real:
        load_config(words)  # the real classes are imported in this process
    files, _ = _read(words)
    with pytest.raises(ConfigError) as early:
        _configure(source.configuration_class(), files, words)
    assert str(early.value) == str(real.value)


CHECK = """
import importlib, json, sys
cases, heavy = json.loads(sys.argv[1])
for command, *words in cases:
    try:
        importlib.import_module(f"fedproxy.{command}").main(words)
    except Exception as error:
        assert type(error).__name__ == "ConfigError", repr(error)
    else:
        raise SystemExit(f"{command} {words} was not refused")
    found = [name for name in heavy if name in sys.modules]
    assert not found, f"{command} {words} imported {found}"
"""


def refuse(cases, heavy=HEAVY):
    """Run commands in a fresh process: each has to end in one line, and none of ``heavy`` be imported."""
    command = [sys.executable, "-c", CHECK, json.dumps([cases, heavy])]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_mistake_in_a_run_imports_nothing_heavy():
    wrong = ["recipe=nope", "recipe=fedproxy_tiny trainer.foo=1", "recipe=fedproxy_tiny foo=1", "nonsense"]
    wrong += [f"recipe=fedproxy_llama {word}" for word in RULES]
    refuse([(command, *words.split(maxsplit=1)) for command in ("fit", "compress") for words in wrong])


def test_a_mistake_in_a_plan_imports_nothing_heavy():
    wrong = ["nope", "fedproxy_tiny foo=1", "fedproxy_tiny plan.foo=1", "fedproxy_tiny plan.devices=a"]
    refuse([("recipes", "plan", *words.split()) for words in [*wrong, "fedproxy_tiny fusion.mode=add"]])


def test_a_mistake_in_a_comparison_imports_nothing_but_numpy():
    wrong = ["recipes=[nope]", "recipes=[fedproxy_tiny] foo=1", "study=nope", "recipes=[fedproxy_tiny] seeds=[a]"]
    cases = [("compare", *words.split()) for words in [*wrong, "study=heterogeneous_4 fusion.mode=add"]]
    refuse(cases, [name for name in HEAVY if name != "numpy"])
