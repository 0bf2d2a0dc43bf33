"""Registry: subclassing registers, names are unique, errors name the nearest."""

from dataclasses import dataclass

import pytest

from fedproxy.errors import ConfigError, nearest
from fedproxy.registry import Component


@dataclass(frozen=True)
class Fruit(Component, family="fruit"):
    weight: float = 1.0

    def __post_init__(self):
        self.require("weight", self.weight > 0, "positive")


@dataclass(frozen=True)
class Apple(Fruit, name="apple"):
    colour: str = "red"


class Citrus(Fruit):
    """No name: abstract."""


@dataclass(frozen=True)
class Lemon(Citrus, name="lemon"):
    pass


def test_members_are_found_by_name_and_abstract_classes_are_not():
    assert Fruit.names() == ("apple", "lemon")
    assert Fruit.by_name("apple")() == Apple(weight=1.0, colour="red")
    assert Citrus.by_name("lemon") is Lemon


def test_unknown_name_says_the_nearest():
    with pytest.raises(ConfigError, match=r"fruit.name: unknown fruit 'aple'; did you mean 'apple'\?"):
        Fruit.by_name("aple")


def test_options_are_checked_with_the_key_in_the_message():
    with pytest.raises(ConfigError, match=r"^fruit.weight must be positive, got -1.0$"):
        Apple(weight=-1.0)


def test_two_classes_of_one_name_are_refused():
    with pytest.raises(ConfigError, match=r"fruit 'apple' is registered twice"):

        class Other(Fruit, name="apple"):
            pass

    assert Fruit.by_name("apple") is Apple


def test_slots_dataclass_replaces_the_class_it_was_made_from():
    # dataclass(slots=True) creates a second class; the registry must not keep the first, whose fields are not slots
    @dataclass(frozen=True, slots=True)
    class Pear(Fruit, name="pear"):
        length: float = 2.0

    try:
        assert Fruit.by_name("pear") is Pear
        assert Fruit.by_name("pear")(length=3.0).length == 3.0
    finally:
        Fruit._members.pop("pear")


def test_families_do_not_mix():
    class Other(Component, family="other"):
        pass

    assert Other.names() == ()


def test_nearest_lists_all_names_when_none_is_close():
    assert nearest("zzz", ["fedavg", "ties"]) == "; known: fedavg, ties"
    assert nearest("zzz", []) == ""
