"""`python -m fedproxy.fit`: run a recipe from compression to report."""

import sys
from collections.abc import Sequence

from fedproxy.command import run_command

USAGE = """
usage: python -m fedproxy.fit recipe=NAME [key=value ...]

Compresses the target, tunes the proxy with the clients, fuses, evaluates and writes a report.

examples:
  python -m fedproxy.fit recipe=fedproxy_tiny                          under a minute, offline
  python -m fedproxy.fit recipe=fedproxy_llama resume=auto             SmolLM2 with four clients
  python -m fedproxy.fit recipe=fedproxy_llama federation.rounds=5 aggregator.name=fedavg
  python -m fedproxy.fit recipe=my_recipe.yaml output_dir=runs/mine overwrite=true

`python -m fedproxy.recipes ls` lists the recipes. `--help aggregator` or `--help client.lr` says all about a node or a
key; docs/configuration.md has every key.
"""


def main(arguments: Sequence[str]) -> None:
    """Run the recipe that the arguments describe and print where its report lies."""
    from fedproxy.pipeline.finished import finished, note_finished

    report = finished(arguments)
    if report is not None:
        print("this run is finished; nothing left to do", file=sys.stderr)
    else:
        from fedproxy.config import load_config

        config = load_config(arguments)
        from fedproxy.pipeline.run import run

        report = run(config)
        note_finished(arguments, config)
    print(report)
    print(f"report: {report.path}/report.md (and report.html, report.json)")


def describe_keys(nodes: Sequence[str]) -> str:
    """Return what ``--help`` says of a recipe's keys."""
    from fedproxy.config import help as texts

    return texts.describe_keys(nodes)


if __name__ == "__main__":
    run_command(main, USAGE, describe_keys)
