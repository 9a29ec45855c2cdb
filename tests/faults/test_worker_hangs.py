"""A worker that hangs: its supervisor hears no more of it, it ends itself, and the one that waits takes over."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.process import Processes, Service, wait_until
from worker.stall import EXIT_STALLED

WATCHDOG_S = 1.0
HUNG = """
import asyncio, os, sys, time
from worker.logs import configure_logs
from worker.stall import LoopWatch, Supervisor

async def hang():
    watch = asyncio.create_task(LoopWatch(0.3, Supervisor(os.environ)).run())
    await asyncio.sleep(float(sys.argv[1]))
    time.sleep(float(sys.argv[2]))
    watch.cancel()

configure_logs("info", "json", "rack-1")
asyncio.run(hang())
"""


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    with Processes(tmp_path) as started:
        yield started


class Supervisor:
    """The socket on which systemd would listen."""

    def __init__(self, address: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(address)

    def hears(self, state: str, within_s: float = 20.0) -> bool:
        """Whether `state` arrives in time; what was said before it is passed over."""
        deadline = time.monotonic() + within_s
        while (left := deadline - time.monotonic()) > 0:
            self._socket.settimeout(left)
            try:
                if self._socket.recv(4096) == state.encode():
                    return True
            except TimeoutError:
                return False
        return False

    def forget(self) -> None:
        """Pass over what was said until now."""
        self._socket.setblocking(False)
        try:
            while True:
                self._socket.recv(4096)
        except BlockingIOError:
            return


def lives(service: Service) -> bool:
    try:
        with urllib.request.urlopen(f"{service.url}/livez", timeout=1) as answer:
            return bool(answer.status == 200)
    except (OSError, urllib.error.URLError):
        return False


@pytest.mark.parametrize("abstract", [False, True], ids=["path", "abstract name"])
def test_a_stopped_worker_gives_no_sign_of_life_and_one_that_goes_on_in_time_does(
    processes: Processes, abstract: bool
) -> None:
    place = str(processes.folder / "notify")
    supervisor = Supervisor(f"\0{place}" if abstract else place)
    environment = {
        "NOTIFY_SOCKET": f"@{place}" if abstract else place,
        "WATCHDOG_USEC": str(int(WATCHDOG_S * 1e6)),
    }
    service = processes.start(environment=environment)
    assert supervisor.hears("READY=1")
    service.until_ready()
    for _ in range(5):
        assert supervisor.hears("WATCHDOG=1", WATCHDOG_S), "it lives, and says so in time"
    assert lives(service)
    service.signal(signal.SIGSTOP)
    supervisor.forget()
    assert not supervisor.hears("WATCHDOG=1", 2 * WATCHDOG_S)
    assert not lives(service)
    service.signal(signal.SIGCONT)
    assert supervisor.hears("WATCHDOG=1", WATCHDOG_S)
    service.until(lambda: lives(service), "alive again")
    service.process.terminate()
    assert supervisor.hears("STOPPING=1")
    assert service.status() == 0


def test_a_watchdog_that_is_meant_for_another_process_hears_nothing_of_us(processes: Processes) -> None:
    place = str(processes.folder / "notify")
    supervisor = Supervisor(place)
    processes.start(environment={"NOTIFY_SOCKET": place, "WATCHDOG_USEC": "100000", "WATCHDOG_PID": "1"})
    assert supervisor.hears("READY=1")
    assert not supervisor.hears("WATCHDOG=1", 1.0)


def hang(*seconds: str) -> subprocess.CompletedProcess[str]:
    """A loop that runs for a time and then stands still for a time."""
    return subprocess.run(
        [sys.executable, "-c", HUNG, *seconds],
        env={"PYTHONPATH": ":".join(sys.path), "NOTIFY_SOCKET": "/nowhere/to/be/found"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_an_event_loop_that_stands_still_ends_the_process_with_the_reason() -> None:
    began = time.monotonic()
    hung = hang("0.1", "30")
    assert hung.returncode == EXIT_STALLED
    assert "loop_stalled" in hung.stderr
    assert time.monotonic() - began < 15


def test_an_event_loop_that_is_late_or_runs_for_long_ends_nothing() -> None:
    ran = hang("0.6", "0.1")
    assert (ran.returncode, ran.stderr) == (0, "")


def test_a_worker_that_was_stopped_for_too_long_ends_itself_and_the_next_one_takes_over(processes: Processes) -> None:
    settings = {"timeouts.loopStall": 1.0}
    first = processes.start(settings=settings).until_ready()
    assert first.put("net", b"1").status == 201
    second = processes.start(settings=settings)
    second.until(lambda: second.events("waiting_for_lock"), "waiting for the lock")
    first.signal(signal.SIGSTOP)
    stopped = time.monotonic()
    wait_until(lambda: time.monotonic() > stopped + 1.5, "longer than it may stand still")
    assert not second.ready, "a process that is stopped holds the lock"
    first.signal(signal.SIGCONT)
    assert first.status(10) == EXIT_STALLED
    [event] = first.events("loop_stalled")
    assert event["seconds"] > 1.0
    second.until_ready()
    assert second.send("GET", "/api/models/net/versions/1.0.0/content").body == b"1"
    assert second.stop() == 0
