"""A queue worker under load whose storage another host takes over: it stops by itself, and what it said is true."""

from __future__ import annotations

import asyncio
import base64
import fcntl
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from schemas.errors import EXIT_CONFIG_INVALID, ModelManagerError
from tests.process import Processes, Service, environment_of
from worker.client.amqp_caller import AmqpCaller
from worker.client.client import ModelManagerClient

pytestmark = pytest.mark.broker

CALLERS = 8
PERIOD_S = 0.5
NOTICED_WITHIN_S = 20.0
BEFORE = 100
PATIENCE_S = 5.0
AWAY_S = 6.0  # longer than a worker that was absent trusts what it knew, and shorter than `timeouts.loopStall`


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    with Processes(tmp_path) as started:
        yield started


@dataclass
class Load:
    """Callers that store one model after the other, and remember when each was acknowledged."""

    url: str
    rack: str
    acknowledged: dict[str, float] = field(default_factory=dict)
    over: bool = False

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            for caller in range(CALLERS):
                group.create_task(self._store(caller))

    async def _store(self, caller: int) -> None:
        number = 0
        async with ModelManagerClient(AmqpCaller(self.url, self.rack), timeout_s=30) as client:
            while not self.over:
                name = f"net-{caller}-{number}"
                data = base64.b64encode(name.encode()).decode()
                try:
                    await client.store_model(name, {"type": "custom"}, model_data=data)
                except ModelManagerError as error:
                    assert error.retryable, error
                else:
                    self.acknowledged[name] = time.time()
                number += 1

    async def until(self, count: int) -> None:
        async with asyncio.timeout(60):
            while len(self.acknowledged) < count:
                await asyncio.sleep(0.01)


def rebuild(folder: Path, settings: dict[str, object]) -> float:
    """Make the registry again under another folder, as another host would; when the storage changed hands."""
    done = subprocess.run(
        [sys.executable, "-m", "worker", "rebuild", "--yes", "--patience", str(PATIENCE_S), "-o", "json"],
        cwd=folder,
        env={"PYTHONPATH": ":".join(sys.path), "PATH": "/usr/bin:/bin", **environment_of(settings)},
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    assert json.loads(done.stdout)["epoch"] == 2
    return (folder / "data/models/owner.json").stat().st_mtime


def freeze(service: Service, storage: Path) -> None:
    """Stop it while it writes no document: the storage would not change hands before that is over."""
    with (storage / ".documents.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        service.signal(signal.SIGSTOP)


@pytest.mark.parametrize("frozen", [False, True], ids=["alive", "frozen meanwhile"])
async def test_a_queue_worker_that_is_taken_over_stops_and_has_acknowledged_nothing_that_is_lost(
    processes: Processes, amqp_url: str, rack: str, frozen: bool
) -> None:
    settings: dict[str, object] = {"rack": rack, "amqp.url": amqp_url, "archive.periodSeconds": PERIOD_S}
    elsewhere = {**settings, "registry.path": "elsewhere"}
    first = await asyncio.to_thread(processes.start("worker", settings=settings).until_ready)
    load = Load(amqp_url, rack)
    running = asyncio.create_task(load.run())
    await load.until(BEFORE)
    await asyncio.sleep(3 * PERIOD_S)  # for more than the archive's lag
    if frozen:
        freeze(first, processes.folder / "data/models")
    stopped = time.time()
    taken = await asyncio.to_thread(rebuild, processes.folder, elsewhere)
    if frozen:
        await asyncio.sleep(max(0.0, stopped + AWAY_S - time.time()))
        first.signal(signal.SIGCONT)
    resumed = time.time()
    assert await asyncio.to_thread(first.status, NOTICED_WITHIN_S) == EXIT_CONFIG_INVALID
    noticed = time.time()
    [lost] = first.events("ownership_lost")
    assert "epoch 2" in lost["reason"]

    before = set(load.acknowledged)
    second = await asyncio.to_thread(processes.start("worker", settings=elsewhere).until_ready)
    await load.until(len(before) + BEFORE)
    load.over = True
    await running
    found = await asyncio.to_thread(second.model_ids)
    after_taken = [name for name in before if load.acknowledged[name] > taken]
    missing = before - found
    print(
        f"taken over {noticed - taken:.2f} s before it ended; {len(after_taken)} acknowledged in between,"
        f" {len(missing)} of {len(before)} acknowledged are missing"
    )
    if frozen:
        assert not [name for name in missing if load.acknowledged[name] < stopped - 3 * PERIOD_S], "more than the lag"
        assert not [name for name in before if load.acknowledged[name] > resumed], "it was in doubt, and kept silent"
    else:
        assert not missing, "it was given the time to say so, and closed its archive"
    assert set(load.acknowledged) - before <= found
    assert await asyncio.to_thread(second.stop) == 0
