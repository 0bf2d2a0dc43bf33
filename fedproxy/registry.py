"""Named component families: subclassing registers, a dataclass's fields are its options."""

import importlib
import pkgutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from fedproxy.errors import ConfigError, nearest


@dataclass(frozen=True)
class Component:
    """Base of every component family.

    A family's base names the family (``class Aggregator(Component, family="aggregator")``), a member names itself
    (``class FedAvg(Aggregator, name="fedavg")``). A subclass without a name is abstract and stays out of the registry.
    """

    family: ClassVar[str] = ""
    name: ClassVar[str] = ""
    _members: ClassVar[dict[str, type["Component"]]] = {}

    def __init_subclass__(cls, *, family: str = "", name: str = "", **kwargs: Any) -> None:
        """Register the class, as a family where ``family`` is given, else as a member of its family.

        Args:
            family: What messages call the members of a new family.
            name: What recipes call the member; without one the class is a base of others.
            **kwargs: For other base classes.

        Raises:
            ConfigError: If the family has another member of this name.
        """
        super().__init_subclass__(**kwargs)
        if family:
            cls.family = family
            cls._members = {}
            return
        # dataclass(slots=True) builds the class a second time, without the class keywords but with the name already in
        # its body: the new class takes over.
        rebuilt = not name and bool(cls.__dict__.get("name"))
        name = name or cls.__dict__.get("name", "")
        if not name:
            cls.name = ""
            return
        other = cls._members.get(name)
        if other is not None and not (rebuilt or _is_same(other, cls)):
            raise ConfigError(
                f"{cls.family} {name!r} is registered twice, by {other.__module__}.{other.__qualname__} and "
                f"{cls.__module__}.{cls.__qualname__}; give one of them another name"
            )
        cls.name = name
        cls._members[name] = cls

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Return the names registered in this family, sorted."""
        return tuple(sorted(cls._members))

    @classmethod
    def by_name(cls, name: str) -> type[Self]:
        """Return the member called ``name``.

        Raises:
            ConfigError: If the family has no such member; the message names the nearest one.
        """
        try:
            return cls._members[name]  # type: ignore[return-value]
        except KeyError:
            hint = nearest(name, cls._members)
            raise ConfigError(f"{cls.family}.name: unknown {cls.family} {name!r}{hint}") from None

    @classmethod
    def made(cls, node: Mapping[str, Any]) -> Self:
        """Return the member that plain values describe: its name and its options.

        Raises:
            ConfigError: If the family has no such member, or an option is out of range.
        """
        options = {key: value for key, value in node.items() if key != "name"}
        return cls.by_name(node["name"])(**options)

    def require(self, option: str, ok: bool, rule: str) -> None:
        """Raise a one-line ConfigError about ``option`` unless ``ok``; for use in ``__post_init__``."""
        if not ok:
            raise ConfigError(f"{self.family}.{option} must be {rule}, got {getattr(self, option)!r}")


def _is_same(left: type, right: type) -> bool:
    """Whether two classes come from one definition, executed again (a reloaded module, a notebook cell)."""
    return (left.__module__, left.__qualname__) == (right.__module__, right.__qualname__)


def import_members(package: str, path: Iterable[str]) -> None:
    """Import every module of a package, so that the components they define are registered."""
    for module in pkgutil.iter_modules(path):
        importlib.import_module(f"{package}.{module.name}")
