"""Configuration classes as their source states them, without the libraries that they work with.

A mistake in a recipe needs none of torch, Transformers or Lightning to be found, and importing them takes seconds. So
the modules of the schema and of the components are read a second time, as source: classes with their fields and rules
are made, what is imported from outside Python's own library is left out, and a statement that needs it is passed over.
The classes here only ever refuse; a run is always configured by the real ones. A test holds both equal.
"""

import ast
import importlib
import importlib.util
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

_PACKAGE = Path(__file__).parent.parent
_REAL = ("fedproxy.errors", "fedproxy.registry", "fedproxy.names", "fedproxy.files")
"""Modules that are light themselves, and imported."""
_DECORATORS = ("dataclass", "property", "classmethod", "staticmethod", "abstractmethod")
Names = dict[str, Any]


@cache
def configuration_class() -> type[Any]:
    """Return RunConfig with its parts and all components of this package."""
    found: type[Any] = _Reader().names_of("fedproxy.config.schema")["RunConfig"]
    return found


def check_trainer_options(options: Mapping[str, Any]) -> None:
    """Check the names of ``trainer`` options against lightning.Trainer's source.

    Raises:
        ConfigError: If Lightning has no such option, or another key sets it.
    """
    module = _Reader().names_of("fedproxy.modules.trainer")
    module["lightning"] = SimpleNamespace(Trainer=_trainer())
    module["check_trainer_options"](options)


def _trainer() -> Any:
    """Return a class with the arguments of lightning.Trainer, which is not imported."""
    spec = importlib.util.find_spec("lightning")
    assert spec is not None  # a dependency
    assert spec.submodule_search_locations is not None
    path = Path(spec.submodule_search_locations[0], "pytorch", "trainer", "trainer.py")
    found = (node for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.ClassDef))
    trainer = next(node for node in found if node.name == "Trainer")
    trainer.body = [node for node in trainer.body if getattr(node, "name", "") == "__init__"]
    trainer.decorator_list = []
    names: Names = {"__name__": "trainer"}
    _execute(_Bare().visit(trainer), names)
    return names["Trainer"]


class _Reader:
    """Reads modules of this package, each once."""

    def __init__(self) -> None:
        self._modules: dict[str, Names] = {}

    def names_of(self, module: str) -> Names:
        """Return what a module defines, as far as it can be defined without other libraries."""
        if module in _REAL:
            return vars(importlib.import_module(module))
        if module not in self._modules:
            path = source_file(module)
            names: Names = {"__name__": module, "import_members": self._members, "__path__": [str(path.parent)]}
            self._modules[module] = names  # before it is filled: modules may import each other in a circle
            for statement in ast.parse(path.read_text(encoding="utf-8")).body:
                self._define(statement, names)
        return self._modules[module]

    def _members(self, package: str, path: list[str]) -> None:
        """Read every module of a package: what ``registry.import_members`` does by importing."""
        for file in sorted(Path(path[0]).glob("*.py")):
            if file.stem != "__init__":
                self.names_of(f"{package}.{file.stem}")

    def _define(self, statement: ast.stmt, names: Names) -> None:
        match statement:
            case ast.Import(names=[alias]):
                if _is_python(alias.name):
                    _execute(statement, names)
                elif alias.name.startswith("fedproxy."):
                    self.names_of(alias.name)
            case ast.ImportFrom(module=str() as module, names=aliases):
                self._import_from(module, aliases, names)
            case ast.ClassDef() | ast.FunctionDef():
                _execute(_Bare().visit(statement), names)
            case ast.Assign() | ast.Expr():
                _execute(statement, names)

    def _import_from(self, module: str, aliases: list[ast.alias], names: Names) -> None:
        if module.split(".")[0] == "fedproxy":
            given = self.names_of(module)
        elif _is_python(module):
            given = vars(importlib.import_module(module))
        else:
            return
        for alias in aliases:
            if alias.name in given and alias.name != "import_members":
                names[alias.asname or alias.name] = given[alias.name]


class _Bare(ast.NodeTransformer):
    """Takes from functions what is evaluated where they are defined and may need a library: annotations, decorators."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        """Return the function without annotations, and with the decorators of Python itself alone."""
        node.decorator_list = [own for own in node.decorator_list if _name(own) in _DECORATORS]
        node.returns = None
        for argument in _arguments(node.args):
            argument.annotation = None
        return node


def _arguments(found: ast.arguments) -> Iterator[ast.arg]:
    yield from (*found.posonlyargs, *found.args, *found.kwonlyargs)
    yield from (own for own in (found.vararg, found.kwarg) if own is not None)


def _name(node: ast.expr) -> str:
    inner = node.func if isinstance(node, ast.Call) else node
    return inner.id if isinstance(inner, ast.Name) else ""


def _execute(statement: ast.stmt, names: Names) -> None:
    """Execute one of our own statements; one that needs what is left out defines nothing."""
    module = ast.fix_missing_locations(ast.Module(body=[statement], type_ignores=[]))
    try:
        exec(compile(module, str(names["__name__"]), "exec"), names)
    except Exception:
        return


def source_file(module: str) -> Path:
    """Return where a module of this package lies."""
    path = _PACKAGE.joinpath(*module.split(".")[1:])
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _is_python(module: str) -> bool:
    return module.split(".")[0] in sys.stdlib_module_names
