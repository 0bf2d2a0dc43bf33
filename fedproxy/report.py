"""`python -m fedproxy.report`: make a run's pages again, compare two runs question by question, or watch one."""

from collections.abc import Sequence
from pathlib import Path

from fedproxy.command import run_command
from fedproxy.errors import ConfigError, nearest, one_line

USAGE = """
usage: python -m fedproxy.report RUN [OTHER_RUN]
       python -m fedproxy.report --watch RUN

Makes a run's report pages again from its report.json, or compares two runs on the same questions. --watch shows a run
that goes on in the browser, on this machine alone: rounds, clients, who is late, losses, bytes.

examples:
  python -m fedproxy.report runs/fedproxy_llama
      write report.md and report.html again
  python -m fedproxy.report runs/fedavg_llama runs/fedproxy_llama
      what the second run gains over the first: difference with a 95 % bootstrap interval, McNemar's exact
      test, Holm-corrected; printed, and written into the second run's folder
  python -m fedproxy.report --watch runs/fedproxy_llama
      prints an address to open; it ends with the run
"""


def main(arguments: Sequence[str]) -> None:
    """Render one run, compare two, or watch one.

    Raises:
        FedProxyError: If a run cannot be read or written, or two runs cannot be compared.
    """
    runs = [Path(argument) for argument in arguments if argument != "--watch"]
    odd = next((str(run) for run in runs if str(run).startswith("-") and not run.exists()), None)
    if odd is not None:
        raise ConfigError(f"{one_line(odd, 80)} is neither a run's folder nor an option{nearest(odd, ['--watch'])}")
    if len(runs) < len(arguments):
        _watch(runs)
    elif len(runs) == 1:
        _render(runs[0])
    elif len(runs) == 2:
        _compare(*runs)
    else:
        raise ConfigError(f"give one run's folder, or two to compare, got {len(runs)}; see --help")


def _render(run: Path) -> None:
    from fedproxy.locks import locked
    from fedproxy.reporting.pages import write_pages
    from fedproxy.reporting.run_report import RunReport, check_pages, report_file

    report, folder = RunReport.load(run), report_file(run).parent
    with locked(folder, "run"):
        check_pages(folder)
        for path in write_pages(report, folder):
            print(path)


def _watch(runs: Sequence[Path]) -> None:
    from fedproxy.pipeline.watch import watch

    if len(runs) != 1:
        raise ConfigError(f"--watch takes one run's folder, got {len(runs)}; see --help")
    watch(runs[0], say=lambda line: print(line, flush=True))


def _compare(first: Path, second: Path) -> None:
    from fedproxy.locks import locked
    from fedproxy.reporting.run_comparison import save_comparison

    for run in (first, second):
        if not run.is_dir():
            raise ConfigError(f"{run} is no folder; give the folder of a finished run")
    with locked(second, "run"):
        path = save_comparison(first, second)
    print(path.read_text(encoding="utf-8"))
    print(f"Saved as {path}")


if __name__ == "__main__":
    run_command(main, USAGE)
