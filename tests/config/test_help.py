"""`fit --help` and the reference say of every key what the classes say, and every key says something."""

import dataclasses
import re

import pytest

from fedproxy import compare, evaluate
from fedproxy.comparison.arguments import KEYS
from fedproxy.config import RunConfig
from fedproxy.config.help import describe_keys
from fedproxy.config.keys import families, field_docs, first_line, leaves, mappings
from fedproxy.config.source import configuration_class
from fedproxy.errors import ConfigError
from fedproxy.sites.hub_config import HubConfig
from fedproxy.sites.site_config import ClientData, Policy, ServerPlace, SiteConfig


def every_key():
    """Return every key of every component, and every class that has some."""
    found, classes = list(leaves(RunConfig)), [RunConfig]
    for path, family, _ in families(RunConfig):
        classes += [family, *map(family.by_name, family.names())]
        found += [key for name in family.names() for key in leaves(family.by_name(name), f"{path}.")]
    for path, members in mappings(RunConfig):
        classes += members
        found += [key for member in members for key in leaves(member, f"{path}.{member.name}.")]
    return found, classes


def test_every_key_and_every_component_has_its_sentence():
    keys, classes = every_key()
    assert len({key.path for key in keys}) > 150
    assert not [key.path for key in keys if not key.meaning.endswith((".", ")"))]
    assert not [cls.__name__ for cls in classes if not first_line(cls).endswith((".", ":", ")"))]


@pytest.mark.parametrize("cls", [HubConfig, SiteConfig, ServerPlace, Policy, ClientData])
def test_every_key_of_sites_and_hubs_has_its_sentence(cls):
    texts = field_docs(cls)
    assert not [item.name for item in dataclasses.fields(cls) if not texts.get(item.name, "").endswith(".")]


@pytest.mark.parametrize(
    ("usage", "keys"),
    [
        (compare.USAGE, KEYS),
        (evaluate.USAGE, [item.name for item in dataclasses.fields(evaluate.EvaluateArguments)]),
    ],
)
def test_commands_explain_every_key_of_their_own(usage, keys):
    told = re.findall(r"^  (\w+)(?:\.NAME)?  +\w", usage, re.MULTILINE)
    assert not set(keys) - set(told)


def test_help_has_every_plain_key_with_its_default_and_meaning():
    text = describe_keys([])
    for key in leaves(RunConfig):
        default = " (must be given)" if key.default is None else f"={key.default}"
        assert f"\n  {key.path}{default}\n" in text
    assert "Learning rate; the highest one where the schedule changes it." in text
    assert max(map(len, text.splitlines())) <= 120
    assert "  aggregator.name=fedavg\n" in text


def test_a_node_is_described_with_all_that_it_can_name():
    text = describe_keys(["aggregator"])
    assert all(f"  aggregator.name={name}\n" in text for name in ("h_ties", "fedavg", "bulyan"))
    assert "    aggregator.rho=1.1\n        Least ratio of winning to losing mass" in text
    assert describe_keys(["client.lr"]).split("\n")[3:] == [
        "  client.lr=5e-05",
        "      Learning rate; the highest one where the schedule changes it.",
    ]
    assert "    parts.precision.up=" in describe_keys(["parts"])
    assert "parts.ranks" not in describe_keys(["parts.precision"])
    with pytest.raises(ConfigError, match=r"--help clinet: no key is called so; did you mean 'client'"):
        describe_keys(["clinet"])


def test_what_is_read_from_source_says_the_same_as_the_classes():
    assert list(leaves(configuration_class())) == list(leaves(RunConfig))
    for (path, family, default), (same, other, name) in zip(
        families(configuration_class()), families(RunConfig), strict=True
    ):
        assert (path, default, family.names()) == (same, name, other.names())
        assert first_line(family) == first_line(other)


def test_texts_of_base_classes_count_and_others_do_not():
    @dataclasses.dataclass(frozen=True)
    class Elsewhere:
        """Of no module of this package."""

        value: int = 0

    assert "scale" in field_docs(next(f for p, f, _ in families(RunConfig) if p == "aggregator").by_name("ties"))
    assert field_docs(Elsewhere) == {}
