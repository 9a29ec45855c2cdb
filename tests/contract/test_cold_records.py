"""Records that are not in memory: they are read beside the event loop, and a decision is not begun again for each."""

from __future__ import annotations

import asyncio
import errno
import threading
from pathlib import Path

import pytest

from tests.rack import LocalRack
from worker.journal import Files

VERSIONS = [f"{number}.0.0" for number in range(40)]
FEW = 6


async def test_a_model_of_many_cold_versions_is_deleted_restored_and_purged_in_few_looks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = LocalRack(tmp_path).open()
    for version in VERSIONS:
        await first.store_bytes("net", version, version.encode())
    await first.close()

    read, looks = Files.pread, []

    def cold(self: Files, fd: int, length: int, offset: int, *, wait: bool = True) -> bytes:
        if not wait:
            looks.append(offset)
            raise BlockingIOError(errno.EAGAIN, "not in memory")
        return read(self, fd, length, offset)

    monkeypatch.setattr(Files, "pread", cold)
    for method, params in (
        ("deleteModel", {"modelId": "net"}),
        ("restoreModel", {"modelId": "net"}),
        ("deleteModel", {"modelId": "net", "purge": True}),
    ):
        rack = LocalRack(tmp_path).open()
        looks.clear()
        assert (await rack.call(method, params))["versions"] == VERSIONS
        assert 0 < len(looks) <= FEW
        await rack.close()


async def test_a_version_that_is_purged_while_the_versions_of_its_model_are_read_is_not_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = LocalRack(tmp_path).open()
    for version in ("1", "2"):
        await first.store_bytes("net", version, version.encode())
    await first.close()

    read, reached, go_on = Files.pread, threading.Event(), threading.Event()

    def held(self: Files, fd: int, length: int, offset: int, *, wait: bool = True) -> bytes:
        if not wait:
            raise BlockingIOError(errno.EAGAIN, "not in memory")
        if not reached.is_set():
            reached.set()
            go_on.wait(20)
        return read(self, fd, length, offset)

    rack = LocalRack(tmp_path).open()
    monkeypatch.setattr(Files, "pread", held)
    listing = asyncio.create_task(rack.service.versions_of("net"))
    await asyncio.to_thread(reached.wait, 20)
    await rack.call("deleteModel", {"modelId": "net", "version": "2", "purge": True})
    go_on.set()
    assert [entry["version"] for entry in (await listing)["versions"]] == ["1"]
    await rack.close()
