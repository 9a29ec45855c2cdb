"""Runs one command and lets nothing of it outlive the process that holds the other end of stdin.

Started by `deploy.local.process` as a program of its own. Stdin carries one line, the command as a JSON array, and
then stays open for as long as the command may live: when it ends, because the holder closed it or died in whatever
way, the command and all its descendants are killed. SIGTERM is passed on to the command. When the command ends by
itself, what it leaves behind is killed too, and its exit status becomes the one of this process.

On Linux this process is the one that orphans below it fall back to, so that a daemon which left its session and its
process group (Erlang's port mapper does) is found as well. Elsewhere only the command's process group is reached.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import sys
from pathlib import Path

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
NOT_FOUND = 127


def prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


def read_command() -> list[str]:
    line = bytearray()
    while not line.endswith(b"\n"):
        byte = os.read(0, 1)
        if not byte:
            raise SystemExit(0)
        line += byte
    command: list[str] = json.loads(line)
    return command


def start(command: list[str]) -> int:
    child = os.fork()
    if child:
        return child
    os.setsid()
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    try:
        os.execvp(command[0], command)
    except OSError as error:
        print(f"{command[0]}: {error.strerror}", file=sys.stderr, flush=True)
        os._exit(NOT_FOUND)


def wait(child: int, woken: int) -> int | None:
    """The wait status of `child` when it ends; None if stdin ended before."""
    while True:
        readable, _, _ = select.select([0, woken], [], [])
        if woken in readable:
            os.read(woken, 4096)
            while (ended := reap(os.WNOHANG)) is not None:
                if ended[0] == child:
                    return ended[1]
        if 0 in readable and not os.read(0, 4096):
            return None


def reap(options: int) -> tuple[int, int] | None:
    """One ended child and its status; None if none has ended, or if there is none."""
    try:
        pid, status = os.waitpid(-1, options)
    except ChildProcessError:
        return None
    return (pid, status) if pid else None


def descendants() -> list[int]:
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            # The second field is the program's name in parentheses, and may hold anything.
            parent = entry.read_text(errors="replace").rpartition(")")[2].split()[1]
        except OSError:
            continue
        children.setdefault(int(parent), []).append(int(entry.parent.name))
    found: list[int] = []
    waiting = [os.getpid()]
    while waiting:
        below = children.get(waiting.pop(), [])
        found += below
        waiting += below
    return found


def kill_all(child: int) -> None:
    """Returns when no descendant is left. The orphans of each round are ours in the next."""
    signal_group(child)
    while True:
        for pid in descendants():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        if reap(0) is None:
            return


def signal_group(child: int) -> None:
    try:
        os.killpg(child, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        return


def main() -> int:
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    command = read_command()
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    child = start(command)
    signal.signal(signal.SIGTERM, lambda *_: os.kill(child, signal.SIGTERM))
    status = wait(child, woken)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    kill_all(child)
    if status is None:
        return 128 + signal.SIGKILL
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main())
