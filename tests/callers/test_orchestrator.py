"""The orchestrator that the README shows, as a program against a real worker; and following what happens."""

from __future__ import annotations

import asyncio
import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from schemas.errors import ModelManagerError
from tests.process import Processes
from worker.client.amqp_caller import AmqpCaller
from worker.client.client import ModelManagerClient

pytestmark = pytest.mark.broker
ROOT = Path(__file__).parents[2]


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    with Processes(tmp_path) as started:
        yield started


async def test_the_orchestrator_stores_names_checks_hears_and_follows(
    processes: Processes, amqp_url: str, rack: str
) -> None:
    service = processes.start("worker", settings={"amqp.url": amqp_url, "rack": rack})
    await asyncio.to_thread(service.until_ready)
    assert await asyncio.to_thread(orchestrate, amqp_url, rack) == [
        "valid",
        "heard acme/net stable",
        "followed version.stored",
        "followed alias.changed",
    ]
    async with ModelManagerClient(AmqpCaller(amqp_url, rack), timeout_s=1) as client:
        followed = client.follow(1, 0)
        first = [await anext(followed), await anext(followed)]
        third = asyncio.ensure_future(anext(followed))
        await client.within(30).delete_alias("acme/net", "stable")
        assert [*(change["type"] for change in first), (await third)["data"]["version"]] == [
            "model-manager.version.stored",
            "model-manager.alias.changed",
            None,
        ]
        sequences = [int(change["rackseq"]) for change in (*first, third.result())]
        assert all(earlier < later for earlier, later in itertools.pairwise(sequences))
        with pytest.raises(ModelManagerError, match="ERR_CHANGES_GONE"):
            await anext(client.follow(2, 0))
        begun = await client.validate_model("acme/net", wait_ms=0)
        assert (await client.outcome(begun))["isValid"], "a job is waited for with short answers too"
    assert await asyncio.to_thread(service.stop) == 0


def orchestrate(url: str, rack: str) -> list[str]:
    """What the program prints."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.callers.orchestrator", url, rack],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout.splitlines()
