"""Flower's programs as a site or a hub keeps them: started, watched, started again, and ended whole."""

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fedproxy.errors import ConfigError, one_line
from fedproxy.sites.relay_user import other_user

_KEEPER = Path(__file__).parent / "keeper.py"
AGAIN_S = 10.0
"""Seconds after which a program that ended is started again."""
_TAIL, _MOST_LOG = 4096, 8 << 20


@dataclass
class Program:
    """One program that is to run as long as this process does.

    Args:
        name: What it is called in messages.
        command: Its command line.
        environment: Its environment.
        log: Where its output goes; it begins anew when it is large.
        user: User that it runs as; empty is this one's.
        reasons: Texts of its log, each with what it means, for the line that says why it ended.
    """

    name: str
    command: Sequence[str]
    environment: Mapping[str, str]
    log: Path
    user: str = ""
    reasons: Mapping[str, str] = field(default_factory=dict)
    starts: int = 0
    _process: "subprocess.Popen[bytes] | None" = None
    _not_before: float = 0.0

    def start(self) -> None:
        """Start it.

        Raises:
            ConfigError: If it cannot be started.
        """
        self.log.parent.mkdir(parents=True, exist_ok=True)
        large = self.log.exists() and self.log.stat().st_size > _MOST_LOG
        known = other_user(self.user) if self.user else None
        try:
            with open(self.log, "wb" if large else "ab") as log:
                self._process = subprocess.Popen(
                    [sys.executable, "-I", str(_KEEPER), *self.command],
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=dict(self.environment),
                    start_new_session=True,
                    user=known and known.pw_uid,
                    group=known and known.pw_gid,
                    extra_groups=None if known is None else [],
                )
        except OSError as error:
            way_out = f"; user {self.user!r} must be able to run {sys.executable}" if self.user else ""
            raise ConfigError(f"{self.name} cannot be started ({error.strerror}){way_out}") from error
        self.starts += 1

    @property
    def runs(self) -> bool:
        """Whether it runs."""
        return self._process is not None and self._process.poll() is None

    def look(self) -> str | None:
        """Start the program again if it ended a while ago; return a line when it has just ended."""
        if self._process is not None and self._process.poll() is not None:
            code, self._process = self._process.returncode, None
            self._not_before = time.monotonic() + AGAIN_S
            return f"{self.name} ended ({self._why(code)}); it is started again in {AGAIN_S:g} s"
        if self._process is None and time.monotonic() >= self._not_before:
            self.start()
        return None

    def end(self) -> None:
        """End it and all that it started."""
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None
        process.stdin.close()
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _why(self, code: int) -> str:
        tail = self.tail()
        for text, meaning in self.reasons.items():
            if text in tail:
                return meaning
        return f"exit status {code}; see {one_line(self.log)}"

    def tail(self) -> str:
        """Return the end of its log."""
        try:
            with open(self.log, "rb") as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL))
                return file.read().decode("utf-8", "replace")
        except OSError:
            return ""
