"""A clock that is wrong for a while: compaction goes on, and forgets nothing that was done a moment ago."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.rack import LocalRack
from tests.registry_view import compact_here, view, view_after_boot
from worker.catalog.retention import retained

DAY_S = 24 * 3600


class OffClock:
    """The time, and some more."""

    def __init__(self) -> None:
        self.off_s = 0.0

    def __call__(self) -> float:
        return time.time() + self.off_s


@pytest.fixture
def clock() -> OffClock:
    return OffClock()


def opened(folder: Path, clock: OffClock) -> LocalRack:
    rack = LocalRack(folder).open()
    rack.registry.journal._appender._clock = clock
    return rack


@pytest.fixture
async def rack(tmp_path: Path, clock: OffClock) -> AsyncIterator[LocalRack]:
    rack = opened(tmp_path, clock)
    yield rack
    await rack.close()


async def test_what_was_purged_after_the_clock_went_back_stays_gone(tmp_path: Path, clock: OffClock) -> None:
    rack = opened(tmp_path, clock)
    clock.off_s = 40 * DAY_S
    await rack.store_bytes("m", "1", b"x", key="store")
    await rack.registry.journal.rotate()
    clock.off_s = 0
    await rack.call("deleteModel", {"modelId": "m", "purge": True})
    await compact_here(rack.registry)
    seen = view(rack.registry)
    await rack.close()
    assert seen["versions"] == {}
    assert await view_after_boot(tmp_path / "registry") == seen


@pytest.mark.parametrize("off_s", [40 * DAY_S, -40 * DAY_S])
async def test_a_request_of_a_moment_ago_is_remembered(rack: LocalRack, clock: OffClock, off_s: float) -> None:
    """But for those from before a clock that is ahead: by its time they are too old."""
    await rack.store_bytes("m", "1", b"x")
    patch = {"modelId": "m", "metadata": {"a": 1}}
    first: dict[str, Any] = {}
    if off_s < 0:
        first["before"] = await rack.call("updateModelMetadata", patch, key="before")
    clock.off_s = off_s
    first["during"] = await rack.call("updateModelMetadata", patch, key="during")
    await rack.registry.journal.rotate()
    clock.off_s = 0
    first["after"] = await rack.call("updateModelMetadata", patch, key="after")
    await rack.call("updateModelMetadata", patch)
    await compact_here(rack.registry)
    assert {key: await rack.call("updateModelMetadata", patch, key=key) for key in first} == first
    assert retained(rack.registry.catalog).changes_from == 0


async def test_a_replay_knows_the_times_that_were(tmp_path: Path, clock: OffClock) -> None:
    rack = opened(tmp_path, clock)
    for version, clock.off_s in (("1", 0), ("2", 40 * DAY_S), ("3", 0)):
        await rack.store_bytes("m", version, b"x")
    live = rack.registry.catalog
    await rack.close()
    again = opened(tmp_path, clock)
    replayed = again.registry.catalog
    await again.close()
    assert (replayed.time_ms, replayed.last_ms) == (live.time_ms, live.last_ms)
    assert live.time_ms - live.last_ms > 39 * DAY_S * 1000
