"""Journals as earlier releases wrote them: each is read as it was meant, and gone on with.

`tests/samples/journal-<version>` holds one of each format version, with a base, a sealed segment and an active one. A
sample is never written anew: a change that cannot read one needs a reader of its own, and a new version.
"""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import pytest

from tests.contract.test_compaction import append, store, view
from worker.journal import verify
from worker.journal.format import FORMAT_VERSION
from worker.registry import Registry
from worker.upkeep.compaction import Compaction

SAMPLES = Path(__file__).parents[1] / "samples"


def test_there_is_a_sample_of_every_version_up_to_this_one() -> None:
    assert {path.name for path in SAMPLES.glob("journal-*")} == {f"journal-{n}" for n in range(1, FORMAT_VERSION + 1)}


@pytest.fixture
def sample(tmp_path: Path) -> Path:
    return shutil.copytree(SAMPLES / "journal-1", tmp_path / "registry")


def test_version_1_is_read_as_it_was_written(sample: Path) -> None:
    assert verify(sample).damage is None
    registry = Registry(sample)
    registry.open()
    catalog = registry.catalog
    assert registry.journal.registry_id == "dfd911c5c1234799985f0f67d344769d"
    assert registry.journal.head == 66
    assert (catalog.totals.models, catalog.totals.versions, catalog.totals.bytes) == (10, 16, 470)
    assert len(catalog.deleted) == 0
    assert catalog.table.fingerprint() == "53521ef3d2605d1a1c39fb909cbba1e18c4a19ef9634f90ad9ebd2be79e946f4"
    asyncio.run(registry.close())


async def test_version_1_is_gone_on_with_and_compacted(sample: Path) -> None:
    registry = Registry(sample)
    registry.open()
    registry.start()
    await append(registry, "store", store("new", "1", 3))
    before = view(registry)
    await Compaction(registry).compact()
    assert view(registry) == before
    await registry.close()
