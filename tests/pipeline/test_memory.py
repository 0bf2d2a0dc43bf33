"""Memory does not grow with rounds."""

import subprocess
import sys

import pytest

SCRIPT = """
import json, sys
from fedproxy.config import load_config
from fedproxy.pipeline import display
from fedproxy.pipeline.run import run

resident = []
def note(self, record, rounds):
    with open("/proc/self/status") as status:
        resident.append(next(int(line.split()[1]) for line in status if line.startswith("VmRSS")))
display.Display.round = note
run(load_config(sys.argv[1:]))
print(json.dumps(resident))
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads resident memory from /proc")
def test_twenty_rounds_stay_within_two_per_cent(tmp_path):
    small = ["data.rows_per_task=64", "federation.rounds=20", "evaluation.models=[]"]
    arguments = ["recipe=fedproxy_tiny", *small, f"output_dir={tmp_path / 'r'}"]
    done = subprocess.run([sys.executable, "-c", SCRIPT, *arguments], capture_output=True, text=True, check=True)
    resident = [int(value) for value in done.stdout.splitlines()[-1].strip("[]").split(",")]
    assert len(resident) == 20
    print(f"resident KiB after round 5: {resident[4]}, after round 20: {resident[19]}")
    assert max(resident[4:]) <= 1.02 * resident[4]
