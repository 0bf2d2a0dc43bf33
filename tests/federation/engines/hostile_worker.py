"""A process in a worker's place that needs no torch: it obeys, or does what ``<folder>/<client>`` says.

A word with `` once`` behind it is obeyed a single time. The honest updates lie ready in ``<folder>/<client>.update``.
"""

import json
import os
import shutil
import sys
import time
from pathlib import Path

SETUP = json.loads(Path(sys.argv[1]).read_text())
FOLDER = Path(SETUP["options"]["folder"])


def say(text):
    os.write(1, text if isinstance(text, bytes) else json.dumps(text).encode() + b"\n")


def flood(line):
    while True:
        os.write(1, line)


def close():
    os.close(1)
    time.sleep(600)


def put(make):
    """Put something else into the update's place, and say that it is there."""

    def act(task):
        if "update" in task:  # the first process of a client alone is told
            make(Path(task["update"]))
        say({"task": task["task"]})

    return act


def sparse(path):
    with path.open("wb") as file:
        file.truncate(1 << 40)


def locked(path):
    """A folder that nobody else can delete what lies in."""
    (path / "inside").mkdir(parents=True)
    path.chmod(0)


WORDS = {
    "honest": lambda task: put(lambda path: shutil.copy(FOLDER / f"{task['client']}.update", path))(task),
    "busy": lambda task: (
        [say({"task": task["task"], "share": share}) for share in (0, 0.25, 0.5, 1)],
        time.sleep(0.2),
        WORDS["honest"](task),
    ),
    "no share": lambda task: say({"task": task["task"], "share": 1.5}),
    "share of another": lambda task: say({"task": 999, "share": 0.5}),
    "garbage": lambda task: say(b"Traceback (most recent call last)\n"),
    "list": lambda task: say([1, 2]),
    "deep": lambda task: say(b"[" * 8000 + b"\n"),
    "digits": lambda task: say(b'{"task": ' + b"9" * 8000 + b"}\n"),
    "bytes": lambda task: say(b'{"task": "\xff"}\n'),
    "types": lambda task: say({"task": "one", "dropped": 7}),
    "other task": lambda task: say({"task": 999}),
    "no reason": lambda task: say({"task": task["task"], "dropped": None}),
    "twice": lambda task: say({"started": task["task"]}),
    "ready again": lambda task: (say({"ready": True}), say({"ready": True})),
    "long": lambda task: say(b"x" * (1 << 20)),
    "flood": lambda task: flood(b'{"started": 0}\n'),
    "flood of bytes": lambda task: flood(b"x" * 4096),
    "closed": lambda task: close(),
    "exit": lambda task: (print("private row", file=sys.stderr), os._exit(3)),
    "signal": lambda task: (os.kill(os.getpid(), 40), time.sleep(600)),
    "reason": lambda task: say({"task": task["task"], "dropped": "\x1b[31mone\u202e\ntwo " + "x" * 9000}),
    "missing": put(lambda path: None),
    "fifo": put(os.mkfifo),
    "link": put(lambda path: path.symlink_to(FOLDER / "bob.update")),
    "folder": put(Path.mkdir),
    "sparse": put(sparse),
    "locked": put(locked),
}


def main():
    say({"ready": True})
    for line in sys.stdin:
        task = json.loads(line)
        with (FOLDER / "told").open("a") as file:
            file.write(line)
        say({"started": task["task"]})
        path = FOLDER / task["client"]
        word = path.read_text() if path.is_file() else "honest"
        if word.endswith(" once"):
            path.unlink()
        WORDS[word.removesuffix(" once")](task)


if __name__ == "__main__":
    main()
