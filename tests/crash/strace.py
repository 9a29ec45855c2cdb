"""strace on one process: which calls it makes, and an error, a short write or a SIGKILL in place of one of them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

# Not every architecture has each of them.
CALLS = ("pwrite64", "fdatasync", "fsync", "ftruncate", "openat", "rename", "renameat", "unlink", "unlinkat")
_MARKS = ("access", "faccessat")

_ATTACHED_S = 10.0
_MARK = re.compile(r'"/mark/([^"]+)"')
_MADE = re.compile(r"(?P<thread>\d+) +(?P<call>\w+)\((?P<arguments>.*)")


@dataclass(frozen=True, slots=True)
class Call:
    """The `ordinal`-th (from 1) call of that name by a `thread`, as strace counts."""

    thread: int
    name: str
    ordinal: int
    arguments: str


def missing() -> str | None:
    """Why strace cannot be used here; None if it can."""
    if shutil.which("strace") is None:
        return "needs strace, which is not installed"
    with subprocess.Popen(["sleep", "60"]) as process:
        try:
            strace = record(process.pid)
        except OSError as error:
            return f"strace may not watch a process here: {error}"
        finally:
            process.kill()
        strace.end()
    return None


class Strace:
    """Attached to all threads of a process, and to those it starts later, until that ends."""

    def __init__(self, pid: int, calls: Iterable[str], *options: str) -> None:
        """Raises OSError if strace cannot attach to it."""
        self._folder = TemporaryDirectory(prefix="strace-")
        self._output = Path(self._folder.name) / "calls"
        traced = ",".join(f"?{call}" for call in calls)
        self._process = subprocess.Popen(
            ["strace", "-f", "-qq", "-p", str(pid), "-o", str(self._output), "-e", f"trace={traced}", *options],
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            text=True,
        )
        end = time.monotonic() + _ATTACHED_S
        while not _is_traced(pid):
            if self._process.poll() is not None or time.monotonic() > end:
                self._process.kill()
                self._folder.cleanup()
                raise OSError(self._process.communicate()[1].strip() or "it did not attach")
            time.sleep(0.001)

    def end(self) -> str:
        """Once the process has ended: what strace wrote."""
        self._process.communicate()
        written = self._output.read_text()
        self._folder.cleanup()
        return written


def record(pid: int) -> Strace:
    """Have all calls written down; `recorded` reads them."""
    return Strace(pid, (*CALLS, *_MARKS), "-s", "200")


def inject(pid: int, call: str, ordinal: int, how: str) -> Strace:
    """Do `how` in place of that call. What is written has INJECTED in it if it came to that."""
    return Strace(pid, [call], "-e", f"inject={call}:{how}:when={ordinal}")


def mark(name: str) -> None:
    """Stand in the calls that are recorded."""
    os.access(f"/mark/{name}", os.F_OK)


def recorded(written: str) -> dict[str, list[Call]]:
    """What was called after each mark, by its name."""
    found: dict[str, list[Call]] = {}
    counts: Counter[tuple[int, str]] = Counter()
    since = ""
    for line in written.splitlines():
        if not (made := _MADE.match(line)):
            continue
        thread, name, arguments = int(made["thread"]), made["call"], made["arguments"]
        if name in _MARKS:
            if marked := _MARK.search(arguments):
                since = marked[1]
                counts.clear()
            continue
        counts[thread, name] += 1
        found.setdefault(since, []).append(Call(thread, name, counts[thread, name], arguments))
    return found


def _is_traced(pid: int) -> bool:
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        return all("\nTracerPid:\t0\n" not in (task / "status").read_text() for task in tasks)
    except FileNotFoundError:
        return False
