"""A plugin for runs under test: clients that wait for others or for the test, and a server that is killed.

What happens lies as files in the folder that ``FEDPROXY_TEST_HOOKS`` names; without it nothing does.
"""

import os
import signal
import time
from pathlib import Path

from fedproxy.federation.client.site import Site
from fedproxy.federation.server import loop
from fedproxy.modules.causal_lm import CausalLMModule

NAME = __name__
VARIABLE = "FEDPROXY_TEST_HOOKS"

_train, _training_step, _write_journal = Site.train, CausalLMModule.training_step, loop.write_journal
_current = {"task": ""}


def wait_for_file(path: Path, seconds: float = 300.0) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{path.name} did not appear")
        time.sleep(0.01)


def _hooked_train(self, broadcast, client_id, **limits):
    """Train after the clients that ``<client>.after`` lists have finished this round."""
    if VARIABLE not in os.environ:
        return _train(self, broadcast, client_id, **limits)
    folder = Path(os.environ[VARIABLE])
    before = folder / f"{client_id}.after"
    for other in before.read_text().split() if before.exists() else ():
        wait_for_file(folder / f"{broadcast.round}_{other}.done")
    if before.exists():
        time.sleep(0.3)  # the others' answers are on their way
    _current["task"] = f"{broadcast.round}_{client_id}"
    update = _train(self, broadcast, client_id, **limits)
    (folder / f"{broadcast.round}_{client_id}.done").touch()
    return update


def _hooked_step(self, batch, batch_idx):
    """In the second step of the client ``<round>_<client>.hold`` names: tell the process id, and hold."""
    if VARIABLE in os.environ and batch_idx == 1:
        hold = Path(os.environ[VARIABLE]) / f"{_current['task']}.hold"
        if hold.exists():
            hold.unlink()
            hold.with_suffix(".part").write_text(str(os.getpid()))
            hold.with_suffix(".part").rename(hold.with_suffix(".pid"))
            wait_for_file(hold.with_suffix(".go"))
    return _training_step(self, batch, batch_idx)


def _hooked_journal(journal, records):
    """Die as by ``kill -9`` where ``<round>.kill`` asks for it, before the round's line is written."""
    last = records[-1]["round"] if records else 0
    if VARIABLE in os.environ and (Path(os.environ[VARIABLE]) / f"{last}.kill").exists():
        os.kill(os.getpid(), signal.SIGKILL)
    _write_journal(journal, records)


Site.train, CausalLMModule.training_step, loop.write_journal = _hooked_train, _hooked_step, _hooked_journal
