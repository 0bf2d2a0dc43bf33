"""Where recipes and studies lie: shipped ones by name, a user's own by path."""

import os
from pathlib import Path

from fedproxy.errors import ConfigError, nearest, one_line
from fedproxy.files import at_home

_PACKAGE = Path(__file__).parent


def recipes_folder() -> Path:
    """Return the folder of shipped recipes: inside the installed package, or beside it in a checkout."""
    return _shipped("recipes")


def recipe_names() -> tuple[str, ...]:
    """Return the names of all shipped recipes, e.g. ``paper/fedproxy_llama2_7b_homogeneous``."""
    return _names(recipes_folder())


def studies_folder() -> Path:
    """Return the folder of shipped studies."""
    return _shipped("studies")


def study_names() -> tuple[str, ...]:
    """Return the names of all shipped studies."""
    return _names(studies_folder())


def _shipped(kind: str) -> Path:
    installed = _PACKAGE / f"_{kind}"
    return installed if installed.is_dir() else _PACKAGE.parent / kind


def _names(folder: Path) -> tuple[str, ...]:
    return tuple(sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml")))


def find_recipe(name: str) -> Path:
    """Return the file of a recipe.

    Args:
        name: A shipped recipe's name, or the path of a ``.yaml`` file.

    Raises:
        ConfigError: If there is none; the message names the nearest.
    """
    shown = one_line(name, 120)
    if name.endswith((".yaml", ".yml")):
        path = at_home(name)
        if not os.path.exists(path):
            raise ConfigError(
                f"recipe={shown}: no such file; `python -m fedproxy.recipes ls` lists the shipped recipes"
            )
        if not os.path.isfile(path):
            raise ConfigError(f"recipe={shown}: it is not a regular file; give a YAML file")
        return path.resolve()
    if name not in recipe_names():
        hint = nearest(name, recipe_names())
        if os.path.exists(name):
            hint = "; the name of a recipe file ends in .yaml"
        raise ConfigError(f"recipe={shown}: unknown recipe{hint}")
    return recipes_folder() / f"{name}.yaml"
