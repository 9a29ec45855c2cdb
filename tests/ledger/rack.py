"""The workers of the rack: one that serves, one that waits for its lock, and a supervisor that watches both."""

from __future__ import annotations

import asyncio
import re
import signal
import socket
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from tests.process import Processes, Service

WATCHDOG_S = 2.0
TAKEN_OVER_WITHIN_S = 60.0
_POLL_S = 0.01


async def until_ready(service: Service, within_s: float = TAKEN_OVER_WITHIN_S) -> None:
    """Return when it is ready; AssertionError when it ends first, or after `within_s` seconds."""
    deadline = time.monotonic() + within_s
    while not await asyncio.to_thread(lambda: service.ready):
        assert service.process.poll() is None, f"a worker ended by itself\n{service.log[-2000:]}"
        assert time.monotonic() < deadline, f"no worker was ready within {within_s} s"
        await asyncio.sleep(_POLL_S)


@dataclass
class Supervised:
    """A worker, and the socket on which it says that it lives, as under systemd."""

    service: Service
    pings: socket.socket
    heard: float = field(default_factory=time.monotonic)
    count: int = 0

    def hear(self) -> None:
        """Take note of what it said since it was last asked."""
        while True:
            try:
                said = self.pings.recv(4096)
            except BlockingIOError:
                return
            if b"WATCHDOG=1" in said:
                self.heard = time.monotonic()
                self.count += 1


@dataclass
class Rack:
    """Two workers on one registry. `metrics` has the counters of those that have ended, and of the last scrape."""

    processes: Processes
    name: str
    amqp_url: str
    active: Supervised = field(init=False)
    standby: Supervised = field(init=False)
    takeovers: list[float] = field(default_factory=list)
    metrics: Counter[str] = field(default_factory=Counter)
    _started: int = 0

    @property
    def registry(self) -> Path:
        return self.processes.folder / "data/registry"

    async def start(self) -> None:
        self.active = self._spawn()
        await until_ready(self.active.service)
        self.standby = self._spawn()
        await self._until_waiting()

    async def kill(self) -> None:
        """SIGKILL to the one that serves; the other one takes over, and gets a new standby."""
        await self._count()
        self.active.service.kill()
        await self._succeed(time.monotonic())

    async def freeze(self) -> float:
        """SIGSTOP to the one that serves: it keeps the lock until its supervisor misses its pings and kills it.

        The seconds from the signal to the kill.
        """
        await self._count()
        self.active.hear()
        assert self.active.count > 0, "the worker has never told its supervisor that it lives"
        stopped = time.monotonic()
        self.active.service.signal(signal.SIGSTOP)
        while time.monotonic() < self.active.heard + WATCHDOG_S:
            assert not await asyncio.to_thread(lambda: self.standby.service.ready), "two workers serve one registry"
            self.active.hear()
        killed = time.monotonic()
        self.active.service.kill()
        await self._succeed(killed)
        return killed - stopped

    async def stop(self) -> list[int]:
        """SIGTERM to the standby and then to the other one; their exit statuses."""
        await self._count()
        return [await asyncio.to_thread(worker.service.stop) for worker in (self.standby, self.active)]

    async def _succeed(self, since: float) -> None:
        await until_ready(self.standby.service)
        self.takeovers.append(time.monotonic() - since)
        self.active = self.standby
        self.standby = self._spawn()
        await self._until_waiting()

    async def _until_waiting(self) -> None:
        deadline = time.monotonic() + TAKEN_OVER_WITHIN_S
        while not self.standby.service.events("waiting_for_lock"):
            assert self.standby.service.process.poll() is None, self.standby.service.log[-2000:]
            assert time.monotonic() < deadline, "the standby does not wait for the lock"
            await asyncio.sleep(_POLL_S)

    def _spawn(self) -> Supervised:
        self._started += 1
        pings = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        pings.setblocking(False)
        place = f"\0model-manager-{self.name}-{self._started}"  # an abstract one needs no file
        pings.bind(place)
        service = self.processes.start(
            "worker",
            settings={"rack": self.name, "amqp.url": self.amqp_url, "limits.undoSeconds": 86_400, "log.format": "json"},
            environment={"NOTIFY_SOCKET": f"@{place[1:]}", "WATCHDOG_USEC": str(int(WATCHDOG_S * 1e6))},
        )
        return Supervised(service, pings)

    async def _count(self) -> None:
        """Add up what the one that serves has counted, before it goes."""
        text = (await asyncio.to_thread(self.active.service.send, "GET", "/metrics")).body.decode()
        for name, value in re.findall(r"^model_manager_(\w+_total)(?:\{[^}]*\})? (\S+)$", text, re.MULTILINE):
            self.metrics[name] += float(value)  # type: ignore[assignment]
