"""Scrubbing: once a period all bytes are read back, and what is wrong is refused from then on."""

from __future__ import annotations

import asyncio
import base64
import itertools
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import orjson
import pytest

from schemas.errors import ModelManagerError
from schemas.journal import StoredFile
from tests.rack import LocalRack
from tests.registry_view import compact_here
from worker.storage.blobstore import Document
from worker.upkeep.scrub import DOCUMENT, Position, Scrub, ScrubObserver

DAY = 86_400.0


class Seen(ScrubObserver):
    def __init__(self) -> None:
        self.results: list[str] = []
        self.passes: list[float] = []

    def looked_at(self, result: str, size: int) -> None:
        self.results.append(result)

    def pass_ended(self, at: float) -> None:
        self.passes.append(at)


class Scrubbed:
    """The scrub of a rack, in a time of its own: it passes while the scrub rests, and while it reads."""

    def __init__(self, rack: LocalRack, *, period_s: float = DAY, reading_s: float = 0.0, now: float = 1e9) -> None:
        self.rack = rack
        self.now = self.timer = now
        self.seen = Seen()
        self.read: list[str] = []
        self.read_at: list[float] = []
        self.rests: list[float] = []
        self.rests_left = 10_000
        self.meanwhile: list[Callable[[], Awaitable[Any]]] = []
        self._reading_s = reading_s
        self.scrub = Scrub(
            rack.registry,
            rack.store,
            is_sound=self._is_sound,
            judge=rack.service.checking.judge,
            period_s=period_s,
            observe=self.seen,
            clock=lambda: self.now,
            timer=lambda: self.timer,
            sleep=self._sleep,
        )

    async def _is_sound(self, file: StoredFile) -> bool:
        self.read.append(file["key"])
        self.read_at.append(self.now)
        self._pass(self._reading_s)
        if self.meanwhile:
            await self.meanwhile.pop()()
        return await self.rack.service.checking.is_sound(file)

    async def _sleep(self, seconds: float) -> None:
        self.rests.append(seconds)
        self._pass(seconds)
        await asyncio.sleep(0)
        if len(self.rests) >= self.rests_left:
            raise asyncio.CancelledError

    def _pass(self, seconds: float) -> None:
        self.now += seconds
        self.timer += seconds

    async def set_clock(self, by: float) -> None:
        self.now += by

    async def go_through(self) -> Position:
        return await self.scrub.go_through(await self.scrub.position())

    async def run(self, *, rests: int) -> None:
        """Until it has rested so often."""
        self.rests_left = len(self.rests) + rests
        with pytest.raises(asyncio.CancelledError):
            await self.scrub.run()


@pytest.fixture
async def rack(tmp_path: Path) -> AsyncIterator[LocalRack]:
    rack = LocalRack(tmp_path).open()
    yield rack
    await rack.close()


def beginning(rack: LocalRack, now: float) -> Position:
    return Position(rack.registry.journal.registry_id, rack.registry.journal.epoch, now)


def place(rack: LocalRack, key: str) -> Path:
    return rack.folder / "models" / key


async def store(rack: LocalRack, model: str, data: bytes) -> str:
    key: str = (await rack.store_bytes(model, "1", data))["storageKey"]
    return key


async def state(rack: LocalRack, model: str) -> Any:
    return (await rack.call("getModelMetadata", {"modelId": model}))["state"]


async def refused(rack: LocalRack, model: str) -> str:
    with pytest.raises(ModelManagerError) as error:
        await rack.call("getModel", {"modelId": model})
    return error.value.code


@pytest.mark.parametrize("damage", [lambda path: path.write_bytes(b"other"), Path.unlink], ids=["other bytes", "gone"])
@pytest.mark.parametrize("booted", [False, True])
async def test_rot_is_found_in_every_version_that_has_the_bytes(tmp_path: Path, damage: Any, booted: bool) -> None:
    rack = LocalRack(tmp_path).open()
    bad = await store(rack, "a", b"bytes")
    assert await store(rack, "b", b"bytes") == bad
    await store(rack, "c", b"others")
    damage(place(rack, bad))
    if booted:
        await rack.close()
        rack = LocalRack(tmp_path).open()
    scrubbed = Scrubbed(rack)
    await scrubbed.go_through()
    assert [await state(rack, model) for model in "abc"] == ["quarantined", "quarantined", "available"]
    assert [await refused(rack, model) for model in "ab"] == ["ERR_CHECKSUM_MISMATCH"] * 2
    assert scrubbed.seen.results == ["wrong", "sound"], "what is shared is read once"
    # The one goes for good, and with it what it knew: the other one knows it, too.
    await rack.call("deleteModel", {"modelId": "a", "purge": True})
    assert await refused(rack, "b") == "ERR_CHECKSUM_MISMATCH"
    await rack.close()


async def test_bytes_that_are_right_again_are_given_out_again(rack: LocalRack) -> None:
    key = await store(rack, "a", b"bytes")
    place(rack, key).write_bytes(b"other")
    await Scrubbed(rack).go_through()
    place(rack, key).write_bytes(b"bytes")
    scrubbed = Scrubbed(rack, now=2e9)
    await scrubbed.scrub.go_through(beginning(rack, 2e9))
    assert await state(rack, "a") == "available"
    assert (await rack.call("getModel", {"modelId": "a"}))["success"]


async def test_each_pass_reads_anew(rack: LocalRack) -> None:
    key = await store(rack, "a", b"bytes")
    await store(rack, "b", b"bytes")
    scrubbed = Scrubbed(rack)
    await scrubbed.go_through()
    place(rack, key).write_bytes(b"other")
    await scrubbed.scrub.go_through(beginning(rack, scrubbed.now))
    assert scrubbed.seen.results == ["sound", "wrong"]
    assert [await state(rack, model) for model in "ab"] == ["quarantined"] * 2


async def test_a_sound_pass_records_nothing(rack: LocalRack) -> None:
    for model in "abc":
        await store(rack, model, model.encode())
    head = rack.registry.journal.head
    await Scrubbed(rack).go_through()
    assert rack.registry.journal.head == head


async def test_what_is_deleted_is_looked_at_while_it_can_be_restored(tmp_path: Path) -> None:
    rack = LocalRack(tmp_path).open()
    for model in "abc":
        place(rack, await store(rack, model, model.encode())).unlink()
    await rack.call("deleteModel", {"modelId": "a"})
    await rack.call("deleteModel", {"modelId": "b", "purge": True})
    scrubbed = Scrubbed(rack)
    await scrubbed.go_through()
    assert scrubbed.seen.results == ["wrong", "wrong"]
    await compact_here(rack.registry)
    await rack.close()
    rack = LocalRack(tmp_path).open()
    await rack.call("restoreModel", {"modelId": "a"})
    assert [await state(rack, model) for model in "ac"] == ["quarantined"] * 2
    await rack.close()


async def test_a_verdict_that_somebody_else_comes_to_meanwhile_is_not_taken_back(rack: LocalRack) -> None:
    key = await store(rack, "a", b"bytes")

    async def rot_for_a_moment() -> None:
        place(rack, key).write_bytes(b"wrong")
        assert (await rack.call("validateModel", {"modelId": "a"}))["isValid"] is False
        place(rack, key).write_bytes(b"bytes")

    scrubbed = Scrubbed(rack)
    scrubbed.meanwhile.append(rot_for_a_moment)
    await scrubbed.scrub._look_at(0)
    assert scrubbed.seen.results == ["sound"]
    assert await state(rack, "a") == "quarantined"


async def test_what_was_mended_since_is_read_again(rack: LocalRack) -> None:
    key = await store(rack, "a", b"bytes")
    await store(rack, "b", b"bytes")
    place(rack, key).write_bytes(b"wrong")
    scrubbed = Scrubbed(rack)
    await scrubbed.scrub._look_at(0)
    place(rack, key).write_bytes(b"bytes")
    assert (await rack.call("validateModel", {"modelId": "a"}))["isValid"] is True
    await scrubbed.scrub._look_at(1)
    assert [await state(rack, model) for model in "ab"] == ["available"] * 2
    assert scrubbed.seen.results == ["wrong", "sound"]


async def test_rot_behind_what_was_read_is_not_lifted_at_the_next_that_shares_it(rack: LocalRack) -> None:
    key = await store(rack, "a", b"bytes")
    await store(rack, "b", b"bytes")
    scrubbed = Scrubbed(rack)
    await scrubbed.scrub._look_at(0)
    place(rack, key).write_bytes(b"wrong")
    assert (await rack.call("validateModel", {"modelId": "a"}))["isValid"] is False
    await scrubbed.scrub._look_at(1)
    assert [await state(rack, model) for model in "ab"] == ["quarantined"] * 2
    assert scrubbed.seen.results == ["sound", "wrong"]


async def test_passes_follow_each_other_evenly_through_the_period(rack: LocalRack) -> None:
    for number in range(10):
        await store(rack, f"m{number}", bytes([number]))
    scrubbed = Scrubbed(rack)
    await scrubbed.run(rests=35)
    rounds = [scrubbed.read_at[start : start + 10] for start in range(0, 30, 10)]
    for earlier, later in itertools.pairwise(rounds):
        assert [b - a for a, b in zip(earlier, later, strict=True)] == pytest.approx([DAY] * 10)
    gaps = [b - a for a, b in zip(rounds[0], rounds[0][1:], strict=False)]
    assert gaps == pytest.approx([0.09 * DAY] * 9)


async def test_a_pass_that_cannot_keep_up_reads_for_half_of_the_time(rack: LocalRack) -> None:
    for number in range(10):
        await store(rack, f"m{number}", bytes([number]))
    scrubbed = Scrubbed(rack, period_s=60, reading_s=30)
    await scrubbed.run(rests=25)
    assert scrubbed.rests[:10] == [30.0] * 10
    assert scrubbed.rests[10] == 0.0, "the next pass is due"


@pytest.mark.parametrize("jump", [-400 * DAY, 400 * DAY])
async def test_a_clock_that_jumps_does_not_stop_it(rack: LocalRack, jump: float) -> None:
    for number in range(10):
        await store(rack, f"m{number}", bytes([number]))
    scrubbed = Scrubbed(rack)
    await scrubbed.run(rests=3)
    scrubbed.now += jump
    scrubbed.meanwhile.append(lambda: scrubbed.set_clock(jump))
    await scrubbed.run(rests=12)
    assert max(scrubbed.rests) <= DAY
    assert len(set(scrubbed.read)) == 10


async def test_a_restart_goes_on_where_the_pass_was(tmp_path: Path) -> None:
    rack = LocalRack(tmp_path).open()
    for number in range(10):
        await store(rack, f"m{number}", bytes([number]))
    before = Scrubbed(rack)
    await before.run(rests=4)
    await rack.close()
    rack = LocalRack(tmp_path).open()
    after = Scrubbed(rack, now=before.now + 60)
    await after.go_through()
    # Its place is kept every few minutes, and a turn here takes longer.
    assert before.read + after.read == [rack.registry.catalog.files_of(row)[0]["key"] for row in range(10)]
    await rack.close()
    rack = LocalRack(tmp_path).open()
    later = Scrubbed(rack, now=after.now + 60)
    await later.run(rests=1)
    assert later.read == []
    assert later.rests[0] == pytest.approx(1e9 + DAY - later.now + later.rests[0]), "the next pass is not due yet"
    await rack.close()


@pytest.mark.parametrize("kept", [b"", b"{}", b"[1]", b'{"began":"x","after":1,"over":false}', b"\xff"])
async def test_a_place_that_cannot_be_read_begins_anew_and_is_written_over(rack: LocalRack, kept: bytes) -> None:
    await store(rack, "a", b"a")
    await rack.store.put_document(DOCUMENT, kept, etag=None)
    scrubbed = Scrubbed(rack)
    await scrubbed.go_through()
    assert scrubbed.seen.results == ["sound"]
    assert (await scrubbed.scrub.position()).over


async def test_a_place_that_another_process_has_written_meanwhile_is_written_over(rack: LocalRack) -> None:
    for number in range(3):
        await store(rack, f"m{number}", bytes([number]))
    scrubbed = Scrubbed(rack)
    await scrubbed.scrub.position()
    await rack.store.put_document(DOCUMENT, b'{"began":1,"after":1,"over":false}', etag=None)
    await scrubbed.scrub.go_through(beginning(rack, 1e9))
    assert (await Scrubbed(rack).scrub.position()).over


@pytest.mark.parametrize("of", ["another epoch", "another registry"])
async def test_a_place_in_another_journal_is_none(rack: LocalRack, of: str) -> None:
    await store(rack, "a", b"a")
    other = replace(beginning(rack, 1e9), after=10**6, over=True)
    other = replace(other, epoch=other.epoch + 1) if of == "another epoch" else replace(other, registry="0" * 32)
    await rack.store.put_document(DOCUMENT, orjson.dumps(asdict(other)), etag=None)
    scrubbed = Scrubbed(rack)
    await scrubbed.go_through()
    assert scrubbed.seen.results == ["sound"]


async def test_a_store_that_is_not_there_has_not_lost_its_bytes(rack: LocalRack) -> None:
    """As a disk that is not mounted: an empty folder, in which the worker writes that it is the owner."""
    for model in "ab":
        await store(rack, model, model.encode())
    scrubbed = Scrubbed(rack)
    await scrubbed.scrub._keep(beginning(rack, 1e9))
    models, away = rack.folder / "models", rack.folder / "away"
    models.rename(away)
    await rack.store.put_document("owner.json", b"{}", etag=None)
    scrubbed.rests_left = 5
    with pytest.raises(asyncio.CancelledError):
        await scrubbed.scrub.go_through(beginning(rack, 1e9))
    assert scrubbed.rests == [30.0] * 5
    shutil.rmtree(models)
    away.rename(models)
    scrubbed.rests_left = 1000
    await scrubbed.scrub.go_through(beginning(rack, 1e9))
    assert scrubbed.seen.results == ["sound", "sound"]
    assert [await state(rack, model) for model in "ab"] == ["available"] * 2


async def test_wrong_bytes_shared_with_a_version_whose_record_is_unreadable_do_not_end_the_pass(tmp_path: Path) -> None:
    rack = LocalRack(tmp_path).open()
    key = await store(rack, "a", b"bytes")
    await store(rack, "b", b"bytes")
    await store(rack, "c", b"others")
    await rack.close()
    rack = LocalRack(tmp_path).open()
    segment = max((tmp_path / "registry").glob("seg-*.jsonl"))
    segment.write_bytes(segment.read_bytes().replace(b'"model":"b"', b'"model":"x"'))
    place(rack, key).unlink()
    scrubbed = Scrubbed(rack)
    await scrubbed.go_through()
    assert scrubbed.seen.results == ["wrong", "sound"]
    await rack.close()


async def test_a_record_that_cannot_be_read_is_passed_over(tmp_path: Path) -> None:
    rack = LocalRack(tmp_path).open()
    for model in "abc":
        await store(rack, model, model.encode())
    await rack.close()
    rack = LocalRack(tmp_path).open()
    segment = max((tmp_path / "registry").glob("seg-*.jsonl"))
    segment.write_bytes(segment.read_bytes().replace(b'"model":"b"', b'"model":"x"'))
    scrubbed = Scrubbed(rack)
    await scrubbed.go_through()
    assert scrubbed.seen.results == ["sound", "sound"]
    await rack.close()


class Troubled:
    """The store of a rack that does not answer for a while, or does not give the bytes of one blob."""

    def __init__(self, rack: LocalRack, monkeypatch: pytest.MonkeyPatch) -> None:
        self.failures = 0
        self.stuck = ""
        self._hash = rack.store.hash
        self._probe = rack.store.probe
        monkeypatch.setattr(rack.store, "hash", self.hash)
        monkeypatch.setattr(rack.store, "probe", self.probe)

    async def hash(self, key: str, progress: Any = None) -> Any:
        if self.failures or key == self.stuck:
            raise ModelManagerError("ERR_STORAGE_UNAVAILABLE", "The disk cannot be read.")
        return await self._hash(key, progress)

    async def probe(self) -> None:
        if self.failures:
            self.failures -= 1
            raise ModelManagerError("ERR_STORAGE_UNAVAILABLE", "The disk is away.")
        await self._probe()


async def test_a_store_that_is_away_is_waited_for(rack: LocalRack, monkeypatch: pytest.MonkeyPatch) -> None:
    for model in "ab":
        await store(rack, model, model.encode())
    Troubled(rack, monkeypatch).failures = 3
    scrubbed = Scrubbed(rack)
    await scrubbed.go_through()
    assert scrubbed.seen.results == ["sound", "sound"]
    assert scrubbed.rests[:3] == [30.0] * 3
    assert await state(rack, "a") == "available"


async def test_trouble_in_the_middle_of_a_version_does_not_read_its_beginning_again(
    rack: LocalRack, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [{"path": f"{n}", "data": base64.b64encode(bytes([n])).decode()} for n in range(3)]
    await rack.call("storeModel", {"modelId": "a", "metadata": {"type": "custom"}, "files": files})
    troubled = Troubled(rack, monkeypatch)
    scrubbed = Scrubbed(rack)

    async def goes_away() -> None:
        troubled.failures = 3

    async def nothing() -> None:
        return

    scrubbed.meanwhile += [goes_away, nothing]  # at the second file
    await scrubbed.go_through()
    assert scrubbed.seen.results == ["sound"] * 3
    keys = [file["key"] for file in rack.registry.catalog.files_of(0)]
    assert scrubbed.read == [keys[0], *[keys[1]] * 4, keys[2]]


async def test_a_blob_that_cannot_be_read_is_told_and_does_not_stop_it(
    rack: LocalRack, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = [await store(rack, model, model.encode()) for model in "abc"]
    Troubled(rack, monkeypatch).stuck = keys[1]
    scrubbed = Scrubbed(rack)
    await scrubbed.go_through()
    assert scrubbed.seen.results == ["sound", "unreadable", "sound"]
    assert [await state(rack, model) for model in "abc"] == ["available"] * 3, "it is not known to be wrong"


async def test_a_place_that_cannot_be_kept_does_not_stop_it(rack: LocalRack, monkeypatch: pytest.MonkeyPatch) -> None:
    await store(rack, "a", b"a")

    async def full(name: str, data: bytes, *, etag: str | None) -> Document:
        raise ModelManagerError("ERR_STORAGE_FULL")

    monkeypatch.setattr(rack.store, "put_document", full)
    scrubbed = Scrubbed(rack)
    await scrubbed.go_through()
    assert scrubbed.seen.passes


async def test_what_is_stored_during_a_pass_is_looked_at_in_it(rack: LocalRack) -> None:
    await store(rack, "a", b"a")
    scrubbed = Scrubbed(rack)
    scrubbed.meanwhile.append(lambda: store(rack, "b", b"b"))
    await scrubbed.go_through()
    assert scrubbed.seen.results == ["sound", "sound"]


async def test_a_version_that_is_purged_while_it_is_read_is_no_harm(rack: LocalRack) -> None:
    await store(rack, "a", b"a")
    await store(rack, "b", b"b")

    async def purge() -> None:
        await rack.call("deleteModel", {"modelId": "a", "purge": True})
        await rack.clean_up.round()

    scrubbed = Scrubbed(rack)
    scrubbed.meanwhile.append(purge)
    await scrubbed.go_through()
    assert scrubbed.seen.results == ["wrong", "sound"]
    assert await state(rack, "b") == "available"


async def test_without_checksums_the_size_is_compared(tmp_path: Path) -> None:
    rack = LocalRack(tmp_path, check_checksums=False).open()
    for model in "ab":
        await store(rack, model, b"bytes" + model.encode())
    place(rack, rack.registry.catalog.files_of(0)[0]["key"]).write_bytes(b"short")
    await Scrubbed(rack).go_through()
    assert [await state(rack, model) for model in "ab"] == ["quarantined", "available"]
    await rack.close()
