"""Racks that hold copies of each other's models."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.racks import Network, ReplicatingRack, Start
from worker.storage.memory import MemoryStore


@pytest.fixture
def network() -> Network:
    return Network()


@pytest.fixture
async def start(network: Network, tmp_path: Path) -> AsyncIterator[Start]:
    """Starts a rack by its name, again on what it left."""
    stores: dict[str, MemoryStore] = {}
    started: list[ReplicatingRack] = []

    async def start(name: str, *, folder: Path | None = None, **changed: Any) -> ReplicatingRack:
        kept = stores.setdefault(name, MemoryStore()) if folder is None else MemoryStore()
        rack = ReplicatingRack(network, name, folder or tmp_path / name, kept, **changed)
        rack.open().start()
        started.append(rack)
        return rack

    yield start
    for rack in started:
        if network.racks.get(rack.name) is rack:
            await rack.close()
