"""``python -m fedproxy.report``: make a run's pages again, or compare two runs question by question."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from fedproxy.errors import FedProxyError

_EXAMPLES = """\
examples:
  python -m fedproxy.report runs/fedproxy_llama
      write report.md and report.html again from report.json
  python -m fedproxy.report runs/fedavg_llama runs/fedproxy_llama
      what the second run gains over the first on the same questions: difference with a 95 % bootstrap
      interval, McNemar's exact test, Holm-corrected; also written into the second run's folder
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0, or 2 with one line on standard error."""
    parser = argparse.ArgumentParser(
        prog="python -m fedproxy.report",
        description="Make a run's report pages again, or compare two runs on the same questions.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, help="a run's folder; the baseline where two are given")
    parser.add_argument("other", type=Path, nargs="?", help="the run to compare with the first")
    chosen = parser.parse_args(arguments)
    try:
        if chosen.other is None:
            _render(chosen.run)
        else:
            _compare(chosen.run, chosen.other)
    except FedProxyError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _render(run: Path) -> None:
    from fedproxy.reporting.run_report import RunReport, report_file

    report = RunReport.load(run)
    for path in report.render(report_file(run).parent):
        print(path)


def _compare(first: Path, second: Path) -> None:
    from fedproxy.reporting.run_comparison import compare_runs, save_comparison

    comparison = compare_runs(first, second)
    path = save_comparison(comparison, second)
    print(path.read_text(encoding="utf-8"))
    print(f"Saved as {path}")


if __name__ == "__main__":
    sys.exit(main())
