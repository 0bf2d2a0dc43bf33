"""`python -m fedproxy.recipes`: list, show, copy and plan the shipped recipes."""

import os
from collections.abc import Sequence
from pathlib import Path

from fedproxy.command import run_command
from fedproxy.errors import CheckpointError, ConfigError, one_line
from fedproxy.files import read_whole, write_bytes
from fedproxy.recipe_files import find_recipe, recipe_names, recipes_folder

USAGE = """
usage: python -m fedproxy.recipes ls | show NAME | cp NAME [FILE] | plan NAME [key=value ...]

ls      every shipped recipe with what it is
show    a recipe's file, header comment included
cp      copy a recipe to edit it; FILE is NAME.yaml in this folder by default
plan    parameters, bytes per round, memory of every role and seconds, without loading weights

keys of plan beside those of the recipe, each an assumption that the output names:
  plan.devices=1            devices that a round's clients share; in the field, as many as clients
  plan.tflops=100           TFLOP/s that a device sustains in training; `measure` times two of the target's blocks here
  plan.client_mbps=100      a client's link, Mbit/s each way; null where all is one machine
  plan.server_mbps=1000     the server's link, shared by a round's clients
  plan.merge_gb_per_s=0.5   GB of updates that the server merges per second
  plan.rows=...             rows of a client; from data.rows_per_task by default
  plan.input_tokens=...     tokens of a prompt and of an answer; the recipe's limits by default,
  plan.target_tokens=...    which real rows seldom reach

examples:
  python -m fedproxy.recipes ls
  python -m fedproxy.recipes cp fedproxy_llama my_recipe.yaml
  python -m fedproxy.recipes plan paper/fedproxy_llama2_7b_heterogeneous trainable.r=16
  python -m fedproxy.recipes plan fedproxy target.path=meta-llama/Llama-2-70b-hf target.dtype=bfloat16 \
      data.partition.name=iid data.partition.clients=10000 federation.clients_per_round=64 plan.devices=64
"""


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
            print(_text(find_recipe(name)), end="")
        case ["cp", name, *rest] if len(rest) <= 1:
            _copy(find_recipe(name), Path(rest[0]) if rest else Path(f"{Path(name).name}.yaml"))
        case ["plan", name, *overrides]:
            _plan([f"recipe={name}", *overrides])
        case _:
            words = " ".join(arguments) or "nothing"
            raise ConfigError(
                f"recipes: expected ls, show NAME, cp NAME [FILE] or plan NAME [key=value], got {words!r}"
            )


def _plan(words: Sequence[str]) -> None:
    from fedproxy.config import check_arguments
    from fedproxy.pipeline.planning.hardware import Hardware

    check_arguments(Hardware.split(words)[1])
    from fedproxy.pipeline.plan import plan

    print(plan(words), end="")


def _text(path: Path) -> str:
    """Return a recipe's text without what a terminal would take for commands."""
    try:
        text = read_whole(path).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else one_line(error)
        raise ConfigError(f"recipe file {path} cannot be read: {reason}; give another file") from None
    return "".join(character for character in text if character.isprintable() or character in "\n\t")


def _summary(path: Path) -> str:
    """Return the first sentence of a recipe's header comment."""
    header = [line.removeprefix("#").strip() for line in path.read_text().splitlines() if line.startswith("#")]
    return header[0] if header else ""


def _copy(source: Path, target: Path) -> None:
    if os.path.lexists(target):  # a link that leads nowhere would be followed
        raise ConfigError(f"{target} exists; give another file name")
    try:
        write_bytes(target, read_whole(source))
    except (OSError, CheckpointError) as error:
        raise ConfigError(f"{target} cannot be written ({error}); give another file name") from error
    print(f"wrote {target}; run it with: python -m fedproxy.fit recipe={target}")


if __name__ == "__main__":
    run_command(main, USAGE)
