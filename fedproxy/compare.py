"""`python -m fedproxy.compare`: several recipes and seeds, and one report on all of them."""

from collections.abc import Sequence

from fedproxy.command import run_command
from fedproxy.interrupts import interruption

USAGE = """
usage: python -m fedproxy.compare recipes=[NAME,...] [seeds=[...]] [key=value ...]
       python -m fedproxy.compare study=NAME [key=value ...]

Runs every recipe under every seed and writes comparison.md, .html, .json and .csv. Started again, it goes on: finished
runs are not repeated, killed ones continue. A run that fails is told and the others are done; the exit code is then 1.

  recipes       shipped recipes, or .yaml files
  seeds         one run per recipe and seed                                    ([42])
  study         a shipped study, or a .yaml file with these keys and the two that follow
  methods       in a study's file: a row each, its recipe and what it changes there
  overrides     in a study's file: what every recipe is changed by
  output_dir    report, and records/ with one small file per run               (runs/comparison)
  work_dir      the runs themselves and what they share                        (OUTPUT_DIR/work)
  ceiling       the upper bound                                                (centralised, if among the recipes)
  reference     the method that all others are compared with                   (fedproxy, if among the recipes)
  budget        equal refuses methods that see another number of examples, any tells it      (equal)
  equal_bytes   least, most or a method: a second table at the bytes of that   (null)
  keep_runs     keep the runs' models after their record is written            (false)
  only_report   run nothing, make the report from the records                  (false)
  title         heading of the report

Any other key changes every recipe, as it would change one run.

examples:
  python -m fedproxy.compare recipes=[fedproxy_tiny] seeds=[1,2] federation.rounds=2
  python -m fedproxy.compare recipes=[mine.yaml,yours.yaml] seeds=[42,43] output_dir=runs/ours evaluation.limit=100
  python -m fedproxy.compare study=heterogeneous_4

docs/compare.md says how to read the report.
"""

FAILED = 1


def main(arguments: Sequence[str]) -> int:
    """Compare what the arguments name; return 1 if a run failed, else 0.

    Raises:
        FedProxyError: If recipes cannot be compared, or nothing was finished.
    """
    from fedproxy.comparison.arguments import read_study

    study = read_study(arguments)
    from fedproxy.comparison.compare import compare
    from fedproxy.errors import one_line

    try:
        finished = compare(study, arguments)
    except KeyboardInterrupt as error:
        raise interruption(error, "go on with the same command") or error from None
    print(finished)
    print("report: " + ", ".join(str(path) for path in finished.files))
    for line in finished.failed:
        print(f"failed: {one_line(line)}")
    return FAILED if finished.failed else 0


if __name__ == "__main__":
    run_command(main, USAGE)
