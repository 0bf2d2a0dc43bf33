"""`python -m fedproxy.recipes`: list, show, copy and plan the shipped recipes."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from fedproxy.command import run_command
from fedproxy.errors import ConfigError, nearest

USAGE = """
usage: python -m fedproxy.recipes ls | show NAME | cp NAME [FILE] | plan NAME [key=value ...]

ls      every shipped recipe with what it is
show    a recipe's file, header comment included
cp      copy a recipe to edit it; FILE is NAME.yaml in this folder by default
plan    parameters, memory and bytes per round, without loading weights

examples:
  python -m fedproxy.recipes ls
  python -m fedproxy.recipes cp fedproxy_llama my_recipe.yaml
  python -m fedproxy.recipes plan paper/fedproxy_llama2_7b_heterogeneous trainable.r=16
"""

_SHIPPED = Path(__file__).parent / "_recipes"
_CHECKOUT = Path(__file__).parent.parent / "recipes"


def recipes_folder() -> Path:
    """Return the folder of shipped recipes: inside the installed package, or beside it in a checkout."""
    return _SHIPPED if _SHIPPED.is_dir() else _CHECKOUT


def recipe_names() -> tuple[str, ...]:
    """Return the names of all shipped recipes, e.g. ``paper/fedproxy_llama2_7b_homogeneous``."""
    folder = recipes_folder()
    return tuple(sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml")))


def find_recipe(name: str) -> Path:
    """Return the file of a recipe.

    Args:
        name: A shipped recipe's name, or the path of a ``.yaml`` file.

    Raises:
        ConfigError: If there is none; the message names the nearest.
    """
    if name.endswith((".yaml", ".yml")):
        path = Path(name)
        if not path.is_file():
            raise ConfigError(f"recipe={name}: no such file; `python -m fedproxy.recipes ls` lists the shipped recipes")
        return path.resolve()
    if name not in recipe_names():
        raise ConfigError(f"recipe={name}: unknown recipe{nearest(name, recipe_names())}")
    return recipes_folder() / f"{name}.yaml"


def main(arguments: Sequence[str]) -> None:
    """List, show, copy or plan recipes.

    Raises:
        ConfigError: If the words make no command, or name no recipe.
    """
    match list(arguments):
        case ["ls"]:
            for name in recipe_names():
                print(f"{name:48} {_summary(recipes_folder() / f'{name}.yaml')}")
        case ["show", name]:
            print(find_recipe(name).read_text(), end="")
        case ["cp", name, *rest] if len(rest) <= 1:
            _copy(find_recipe(name), Path(rest[0]) if rest else Path(f"{Path(name).name}.yaml"))
        case ["plan", name, *overrides]:
            from fedproxy.pipeline.plan import plan

            print(plan([f"recipe={name}", *overrides]), end="")
        case _:
            words = " ".join(arguments) or "nothing"
            raise ConfigError(
                f"recipes: expected ls, show NAME, cp NAME [FILE] or plan NAME [key=value], got {words!r}"
            )


def _summary(path: Path) -> str:
    """Return the first sentence of a recipe's header comment."""
    header = [line.removeprefix("#").strip() for line in path.read_text().splitlines() if line.startswith("#")]
    return header[0] if header else ""


def _copy(source: Path, target: Path) -> None:
    if target.exists():
        raise ConfigError(f"{target} exists; give another file name")
    try:
        shutil.copyfile(source, target)
    except OSError as error:
        raise ConfigError(f"{target} cannot be written ({error}); give another file name") from error
    print(f"wrote {target}; run it with: python -m fedproxy.fit recipe={target}")


if __name__ == "__main__":
    run_command(main, USAGE)
