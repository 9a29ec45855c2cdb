"""A native server: one command under a watchdog, so that it ends with us, all its descendants included."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from deploy.local import watchdog

KILL_S = 30.0
TAIL_LINES = 15


class Process:
    """Implements `Server` for a command in the foreground. Its output is appended to `log`."""

    def __init__(
        self, command: Sequence[str], *, env: Mapping[str, str], folder: Path, log: Path, stop_s: float
    ) -> None:
        self.command = list(command)
        self.env = dict(env)
        self.folder = folder
        self.log = log
        self.stop_s = stop_s
        self._watchdog: subprocess.Popen[bytes] | None = None
        self._log_start = 0

    def start(self) -> None:
        if self.exit_code() is None and self._watchdog is not None:
            return
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as output:
            self._log_start = output.tell()
            # A session of its own: Ctrl-C in a terminal goes to us, and we decide the order in which things end.
            self._watchdog = subprocess.Popen(
                [sys.executable, "-I", "-S", watchdog.__file__],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=self.env,
                cwd=self.folder,
                start_new_session=True,
            )
        assert self._watchdog.stdin is not None
        self._watchdog.stdin.write(json.dumps(self.command).encode() + b"\n")
        self._watchdog.stdin.flush()

    def stop(self) -> None:
        if self._watchdog is None:
            return
        self._watchdog.terminate()
        with suppress(subprocess.TimeoutExpired):
            self._watchdog.wait(self.stop_s)
        self.kill()

    def kill(self) -> None:
        if self._watchdog is None:
            return
        assert self._watchdog.stdin is not None
        self._watchdog.stdin.close()
        self._watchdog.wait(KILL_S)

    def close(self) -> None:
        self.kill()

    def exit_code(self) -> int | None:
        """The exit status, 128 + n after signal n; None while it runs or before it was started."""
        return None if self._watchdog is None else self._watchdog.poll()

    def failure(self) -> str | None:
        code = self.exit_code()
        return None if code is None else f"exit status {code}\n{self.tail()}"

    def tail(self) -> str:
        """The last lines of the log, of those written since the last start."""
        with self.log.open("rb") as log:
            log.seek(self._log_start)
            return "\n".join(log.read().decode(errors="replace").splitlines()[-TAIL_LINES:])
