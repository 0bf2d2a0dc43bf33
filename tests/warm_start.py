"""Starts FedProxy's commands and workers by a fork of a process that has imported what they need.

To import torch, Lightning and transformers takes a command longer than the work that most tests give it. So one process
imports them once, and each command that a test starts is a fork of it: a process of its own, child of the one that
started it, with its own pipes, environment, signals and exit code. Nothing that a test changed in its own process is in
it.

A command starts afresh, as it does for users, in a test marked ``cold``, ``slow`` or ``flower``, with other arguments
to Python than ``-m``, with other values of variables that libraries read at import, where a script starts it, and where
the system is not Linux.
"""

import ctypes
import gc
import importlib
import inspect
import json
import os
import runpy
import socket
import subprocess
import sys
from threading import Lock

MODULES = (
    "datasets",
    "fedproxy.command",
    "fedproxy.comparison.compare",
    "fedproxy.evaluation.prefix_sharing",
    "fedproxy.federation.client.setup",
    "fedproxy.pipeline.finished",
    "fedproxy.pipeline.run",
    "lm_eval.models.huggingface",
    "transformers.models.llama.modeling_llama",
)
READ_AT_IMPORT = ("HF_", "TRANSFORMERS_", "OMP_", "MKL_", "PYTHON")
"""Variables whose names begin so are as the forked process has them, or a command starts afresh; but for these."""
EXEMPT = {"PYTHONPATH", "PYTHONUNBUFFERED", "HF_XET_HIGH_PERFORMANCE"}  # the last one is set by a library
SUBREAPER = 36
"""PR_SET_CHILD_SUBREAPER of linux/prctl.h: orphans among a process's descendants become its children."""

Cold = subprocess.Popen
ARGUMENTS = inspect.signature(Cold._execute_child)
PIPES = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")


class Starts:
    """How this process starts commands."""

    warm = True
    """Whether by a fork, where that can be."""
    here = dict(os.environ)
    process: subprocess.Popen | None = None
    channel: socket.socket | None = None
    """To the process that is forked."""
    forkable = sys.platform == "linux"
    """Whether there can be one; a command that is itself a fork has one only if it may start workers."""
    turn = Lock()


class Popen(Cold):
    """``subprocess.Popen`` that forks where it can."""

    def _execute_child(self, *given):
        asked = ARGUMENTS.bind(self, *given).arguments
        if not can_be_forked(asked):
            super()._execute_child(*given)
            return
        order = {
            "words": [os.fspath(word) for word in asked["args"][2:]],
            "cwd": os.fspath(asked["cwd"] or os.getcwd()),
            "env": dict(os.environ if asked["env"] is None else asked["env"]),
            "session": asked["start_new_session"],
            "group": asked["process_group"],
        }
        ends = zip(("p2cread", "c2pwrite", "errwrite"), range(3), strict=True)
        self.pid = forked(order, [inherited if asked[name] == -1 else asked[name] for name, inherited in ends])
        self._child_created = True
        self._close_pipe_fds(*(asked[name] for name in PIPES))


def can_be_forked(asked):
    words, environment = asked["args"], os.environ if asked["env"] is None else asked["env"]
    return (
        Starts.warm
        and Starts.forkable
        and isinstance(words, list)
        and words[:2] == [sys.executable, "-m"]
        and words[2].split(".")[0] == "fedproxy"
        and not any(asked[name] for name in ("executable", "preexec_fn", "pass_fds", "shell"))
        and read_at_import(environment) == read_at_import(Starts.here)
    )


def read_at_import(environment):
    return {name: environment[name] for name in environment if name.startswith(READ_AT_IMPORT) and name not in EXEMPT}


def forked(order, ends):
    """Return the id of a new child of this process, which does what is ordered."""
    prctl = ctypes.CDLL(None).prctl
    with Starts.turn:
        if Starts.channel is None:
            Starts.channel = _start()
        prctl(SUBREAPER, 1, 0, 0, 0)
        socket.send_fds(Starts.channel, [json.dumps(order).encode()], ends)
        pid = int(Starts.channel.recv(32))
        prctl(SUBREAPER, 0, 0, 0, 0)
    return pid


def _start():
    mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    command = [sys.executable, "-c", "from tests import warm_start; warm_start.main()", str(theirs.fileno())]
    environment = {**Starts.here, "PYTHONPATH": os.pathsep.join(sys.path)}
    with theirs:
        nothing = subprocess.DEVNULL
        Starts.process = Cold(command, pass_fds=[theirs.fileno()], stdin=nothing, stdout=nothing, env=environment)
    return mine


def main():
    """Import, then wait to be forked; what goes on from ``wait`` is a fork."""
    for name in MODULES:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # pages stay shared
    words = wait(socket.socket(fileno=int(sys.argv[1])))
    for name in [name for name in sys.modules if name in (words[0], f"{words[0]}.__main__")]:
        del sys.modules[name]
    sys.argv = ["-m", *words[1:]]
    sys.orig_argv[:] = [sys.executable, "-m", *words]
    runpy.run_module(words[0], run_name="__main__", alter_sys=True)


def wait(channel):
    """Fork as ordered for as long as somebody orders, and return in each fork the words of its command.

    A fork's parent ends at once, so that the fork falls to who ordered it.
    """
    while True:
        said, ends, *_ = socket.recv_fds(channel, 1 << 20, 3)
        if not said:
            os._exit(0)
        read, write = os.pipe()
        between = os.fork()
        if between == 0:
            if os.fork():
                os._exit(0)
            channel.close()
            os.close(read)
            return _take_on(json.loads(said), ends, write)
        for end in (*ends, write):
            os.close(end)
        os.waitpid(between, 0)
        channel.send(os.read(read, 32))
        os.close(read)


def _take_on(order, ends, tell):
    """Become the process that is ordered, and return the words of its command."""
    if order["session"]:
        os.setsid()
    if order["group"] != -1:
        os.setpgid(0, order["group"])
    for place, end in enumerate(ends):
        os.dup2(end, place)
        os.close(end)
    os.chdir(order["cwd"])
    os.write(tell, str(os.getpid()).encode())
    os.close(tell)
    os.environ.clear()
    os.environ.update(order["env"])
    first = [order["cwd"], *filter(None, order["env"].get("PYTHONPATH", "").split(os.pathsep))]
    sys.path[:] = [*first, *(place for place in sys.path if place not in first)]
    Starts.here, Starts.forkable, subprocess.Popen = order["env"], False, Popen
    return _leave_one(order["words"]) if any("workers" in word for word in order["words"]) else order["words"]


def _leave_one(words):
    """Leave behind a fork of this process for the workers that it starts later."""
    Starts.channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    Starts.forkable = True
    if os.fork():
        theirs.close()
        return words
    Starts.channel.close()
    Starts.channel = None
    nothing = os.open(os.devnull, os.O_RDWR)
    for place in range(3):
        os.dup2(nothing, place)
    return wait(theirs)
