"""A worker whose event loop stands still: nobody tells its supervisor that it lives, and in the end it ends itself.

The loop beats. A thread of its own looks at the beats, and when the last one is older than `timeouts.loopStall` it ends
the process at once and without a drain: what is stuck cannot be waited for, and a standby may take over. For what was
acknowledged that is no more than SIGKILL. A beat that comes so late ends the process as well: it was stopped (SIGSTOP,
a suspended machine), somebody may have taken over meanwhile, and it must not go on with what it believes to be its own.
After a shorter absence it is in doubt: nothing is acknowledged before the storage was found to be its own still.

With NOTIFY_SOCKET set, as under systemd, READY=1 is sent once the loop runs, WATCHDOG=1 with the beats if WATCHDOG_USEC
asks for it, and STOPPING=1 at the end. A worker that waits for the lock of another one is ready in this sense.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Final

import structlog

from schemas.errors import ERRORS

EXIT_STALLED: Final = ERRORS["ERR_INTERNAL"].exit_code
_BEAT_S = 1.0
_BEATS_PER_LIMIT = 4
_DOUBT_S = 5.0
ABSENT_TURN_S: Final = _DOUBT_S - _BEAT_S
"""A turn of the event loop that took longer was one of an absence: the beat before it may be that old itself."""
_CLOCK: Final = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)

_log = structlog.get_logger()


class Supervisor:
    """Who started us and wants to hear of us, if anybody does. What cannot be sent is dropped."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        name = environment.get("NOTIFY_SOCKET", "")
        self._address = f"\0{name[1:]}" if name.startswith("@") else name
        self._socket: socket.socket | None = None
        if name.startswith(("/", "@")):
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
            self._socket.setblocking(False)
        self.watchdog_s = _watchdog_s(environment) if self._socket is not None else None

    def tell(self, state: str) -> None:
        """Send `state`, at once."""
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.sendto(state.encode(), self._address)


def _watchdog_s(environment: Mapping[str, str]) -> float | None:
    """How long the supervisor waits for a sign of life; None if it waits for none of ours."""
    text, pid = environment.get("WATCHDOG_USEC", ""), environment.get("WATCHDOG_PID", "")
    if not text.isdecimal() or int(text) == 0 or pid not in ("", str(os.getpid())):
        return None
    return int(text) / 1e6


class LoopWatch:
    """Runs beside the worker from its start to its end. `limit_s` is how long the loop may stand still."""

    def __init__(self, limit_s: float, supervisor: Supervisor) -> None:
        self._limit_s = limit_s
        self._supervisor = supervisor
        watchdog_s = supervisor.watchdog_s or limit_s
        self._period_s = min(_BEAT_S, limit_s / _BEATS_PER_LIMIT, watchdog_s / _BEATS_PER_LIMIT)
        self._last = clock()
        self._trusted = 0
        self._over = threading.Event()
        self.absences = 0
        """How often the loop stood still for so long that the storage may be another's since."""

    @property
    def doubtful(self) -> bool:
        """Whether there was an absence, and nobody has looked whose the storage is since."""
        self._beat()
        return self.absences > self._trusted

    async def settle(self, look: Callable[[], Awaitable[None]]) -> None:
        """Return once no doubt is left: `look` raises if the storage is another's, and may meet an absence itself."""
        while self.doubtful:
            absences = self.absences
            await look()
            self._trusted = absences

    async def run(self) -> None:
        """Beat until cancelled."""
        self._last = clock()
        threading.Thread(target=self._watch, name="loop-watch", daemon=True).start()
        self._supervisor.tell("READY=1")
        try:
            while True:
                self._beat()
                if self._supervisor.watchdog_s is not None:
                    self._supervisor.tell("WATCHDOG=1")
                await asyncio.sleep(self._period_s)
        finally:
            self._over.set()
            self._supervisor.tell("STOPPING=1")

    def _beat(self) -> None:
        self._look()
        now = clock()
        self.absences += now - self._last > _DOUBT_S
        self._last = now

    def _watch(self) -> None:
        while not self._over.wait(self._period_s):
            self._look()

    def _look(self) -> None:
        stalled_s = clock() - self._last
        if stalled_s > self._limit_s:
            _log.error("loop_stalled", seconds=round(stalled_s, 1), exit_code=EXIT_STALLED)
            sys.stderr.flush()
            os._exit(EXIT_STALLED)


def clock() -> float:
    """Seconds on a clock that nobody sets; where there is one, on one that goes on while the machine is suspended."""
    return time.clock_gettime(_CLOCK)
