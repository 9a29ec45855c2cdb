"""Direct uploads: what a caller may PUT to a signed address, and what the store makes of it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from typing import TYPE_CHECKING

import pytest
from aiohttp import ClientSession

from deploy.local import ObjectStore
from schemas.errors import ModelManagerError
from tests.stores import INFO, PREFIX, S3Place, content, keys, put, read, sha256
from worker.storage.blobstore import PartPlan, UploadedPart
from worker.storage.retrying import RetryingStore
from worker.storage.s3 import S3Store
from worker.storage.s3_layout import PART_BYTES_MIN, part_size_for

if TYPE_CHECKING:
    from types_boto3_s3 import S3Client

TAIL = 1000
DATA = content(PART_BYTES_MIN + TAIL)
PARTS = {1: DATA[:PART_BYTES_MIN], 2: DATA[PART_BYTES_MIN:]}


class Caller:
    """Someone who was told to upload `DATA`, and has nothing but the addresses."""

    def __init__(self, store: S3Store | RetryingStore, session: ClientSession) -> None:
        assert store.direct_uploads is not None
        self.store = store
        self.uploads = store.direct_uploads
        self.key = store.new_key()
        self._session = session

    async def begin(self) -> PartPlan:
        plan = await self.uploads.begin(self.key, info=INFO, size=len(DATA), sha256=sha256(DATA))
        self.id = plan.upload_id
        return plan

    async def send(
        self,
        number: int,
        data: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        *,
        expires_s: int = 60,
        wait: asyncio.Event | None = None,
    ) -> int:
        """The status of a PUT of `data` (or the part itself) to the address of part `number`."""
        part = PARTS[number]
        signed = await self.uploads.sign(
            self.key, self.id, number, sha256=sha256(part), length=len(part), expires_s=expires_s
        )
        if wait is not None:
            await wait.wait()
        headers = signed.headers if headers is None else headers
        async with self._session.put(signed.url, data=part if data is None else data, headers=headers) as reply:
            return reply.status

    async def send_all(self) -> dict[int, UploadedPart]:
        await self.begin()
        assert [await self.send(number) for number in PARTS] == [200, 200]
        return await self.uploads.parts(self.key, self.id)


@pytest.fixture
def place(object_store: ObjectStore, s3_bucket: str, s3_client: S3Client, monkeypatch: pytest.MonkeyPatch) -> S3Place:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", object_store.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", object_store.secret_key)
    return S3Place(object_store.endpoint_url, s3_bucket, s3_client)


@pytest.fixture
async def caller(request: pytest.FixtureRequest, place: S3Place) -> AsyncIterator[Caller]:
    store = place.store()
    async with ClientSession() as session:
        yield Caller(
            RetryingStore(store, wait_max_s=0.01) if getattr(request, "param", "") == "retrying" else store, session
        )
    await store.close()


@pytest.mark.parametrize("caller", ["plain", "retrying"], indirect=True)
async def test_parts_that_were_put_become_the_blob(caller: Caller, place: S3Place) -> None:
    plan = await caller.begin()
    assert (plan.part_size, plan.parts) == (PART_BYTES_MIN, 2)
    assert await caller.uploads.parts(caller.key, caller.id) == {}
    assert [await caller.send(number) for number in (2, 1)] == [200, 200]
    parts = await caller.uploads.parts(caller.key, caller.id)
    assert {number: (part.size, part.sha256) for number, part in parts.items()} == {
        number: (len(part), sha256(part)) for number, part in PARTS.items()
    }
    assert await keys(caller.store) == set()
    stat = await caller.uploads.complete(caller.key, caller.id, parts)
    assert (stat.key, stat.size) == (caller.key, len(DATA))
    assert (await caller.store.hash(caller.key)).sha256 == sha256(DATA)
    assert await read(caller.store, caller.key, PART_BYTES_MIN - 1, 2) == DATA[PART_BYTES_MIN - 1 :][:2]
    metadata = place.metadata(caller.key)
    assert metadata["model-manager-sha256"] == sha256(DATA)
    assert metadata["model-manager-size"] == str(len(DATA))
    assert await caller.uploads.parts(caller.key, caller.id) == {}


@pytest.mark.parametrize("caller", ["plain", "retrying"], indirect=True)
async def test_uploads_that_are_not_over_are_listed(caller: Caller, place: S3Place) -> None:
    place.client.create_multipart_upload(Bucket=place.bucket, Key="racks/r2/blobs/another-s")
    before = time.time()
    parts = await caller.send_all()
    (begun,) = [upload async for upload in caller.uploads.begun()]
    assert (begun.key, begun.upload_id) == (caller.key, caller.id)
    assert abs(begun.since - before) < 5
    await caller.uploads.complete(caller.key, caller.id, parts)
    assert [upload async for upload in caller.uploads.begun()] == []


async def test_an_altered_part_is_refused(caller: Caller) -> None:
    await caller.begin()
    altered = bytes([PARTS[2][0] ^ 1]) + PARTS[2][1:]
    assert await caller.send(2, altered) == 400
    assert await caller.uploads.parts(caller.key, caller.id) == {}


@pytest.mark.parametrize("by", [-1, 1], ids=["shorter", "longer"])
async def test_a_part_of_another_length_is_refused(caller: Caller, by: int) -> None:
    await caller.begin()
    data = (PARTS[2] + b"x")[: TAIL + by]
    signed = await caller.uploads.sign(caller.key, caller.id, 2, sha256=sha256(PARTS[2]), length=TAIL, expires_s=60)
    honest = {**signed.headers, "content-length": str(len(data))}
    assert await caller.send(2, data, honest) == 403
    assert await caller.uploads.parts(caller.key, caller.id) == {}


async def test_a_part_without_its_signed_checksum_is_refused(caller: Caller) -> None:
    await caller.begin()
    assert await caller.send(2, headers={"content-length": str(TAIL)}) in (400, 403)
    assert await caller.uploads.parts(caller.key, caller.id) == {}


async def test_a_part_with_another_checksum_than_the_signed_is_refused(caller: Caller) -> None:
    await caller.begin()
    other = content(TAIL + 1)[:TAIL]
    signed = await caller.uploads.sign(caller.key, caller.id, 1, sha256=sha256(other), length=TAIL, expires_s=60)
    assert await caller.send(2, other, signed.headers) == 403
    assert await caller.uploads.parts(caller.key, caller.id) == {}


async def test_an_expired_address_is_refused(caller: Caller) -> None:
    await caller.begin()
    late = asyncio.Event()
    asyncio.get_running_loop().call_later(2.1, late.set)
    assert await caller.send(2, expires_s=1, wait=late) == 403
    assert await caller.uploads.parts(caller.key, caller.id) == {}


async def test_a_part_may_be_put_again(caller: Caller) -> None:
    parts = await caller.send_all()
    assert await caller.send(2) == 200
    assert {n: p.sha256 for n, p in (await caller.uploads.parts(caller.key, caller.id)).items()} == {
        n: p.sha256 for n, p in parts.items()
    }


async def test_completing_with_a_gap_is_a_conflict(caller: Caller, place: S3Place) -> None:
    parts = await caller.send_all()
    with pytest.raises(ModelManagerError, match="ERR_CONFLICT"):
        await caller.uploads.complete(caller.key, caller.id, {2: parts[2]})
    assert await keys(caller.store) == set()
    assert (await caller.uploads.complete(caller.key, caller.id, parts)).size == len(DATA)


@pytest.mark.parametrize("caller", ["plain", "retrying"], indirect=True)
async def test_completing_with_a_part_that_never_arrived_is_a_conflict(caller: Caller) -> None:
    await caller.begin()
    assert await caller.send(1) == 200
    parts = await caller.uploads.parts(caller.key, caller.id)
    claimed = {**parts, 2: UploadedPart(TAIL, sha256(PARTS[2]), '"d41d8cd98f00b204e9800998ecf8427e"')}
    with pytest.raises(ModelManagerError, match="ERR_CONFLICT"):
        await caller.uploads.complete(caller.key, caller.id, claimed)
    assert await keys(caller.store) == set()
    assert await caller.uploads.parts(caller.key, caller.id) == parts


@pytest.mark.parametrize("caller", ["plain", "retrying"], indirect=True)
async def test_completing_again_succeeds_again(caller: Caller) -> None:
    parts = await caller.send_all()
    first = await caller.uploads.complete(caller.key, caller.id, parts)
    assert await caller.uploads.complete(caller.key, caller.id, parts) == first
    assert await caller.uploads.complete(caller.key, caller.id, {}) == first


async def test_completing_twice_at_once_succeeds(caller: Caller) -> None:
    parts = await caller.send_all()
    first, second = await asyncio.gather(*(caller.uploads.complete(caller.key, caller.id, parts) for _ in range(2)))
    assert first == second


async def test_completing_under_a_key_of_another_blob_is_refused(caller: Caller) -> None:
    parts = await caller.send_all()
    await put(caller.store, b"other bytes", caller.key)
    with pytest.raises(ModelManagerError):
        await caller.uploads.complete(caller.key, caller.id, parts)
    assert await read(caller.store, caller.key) == b"other bytes"


@pytest.mark.parametrize("caller", ["plain", "retrying"], indirect=True)
async def test_an_aborted_upload_takes_no_part_and_completes_no_blob(caller: Caller, place: S3Place) -> None:
    parts = await caller.send_all()
    await caller.uploads.abort(caller.key, caller.id)
    assert await caller.uploads.parts(caller.key, caller.id) == {}
    assert await caller.send(2) == 404
    with pytest.raises(ModelManagerError, match="ERR_CONFLICT"):
        await caller.uploads.complete(caller.key, caller.id, parts)
    assert place.traces(caller.key) == []
    await caller.uploads.abort(caller.key, caller.id)


async def test_aborting_after_completion_keeps_the_blob(caller: Caller) -> None:
    parts = await caller.send_all()
    await caller.uploads.complete(caller.key, caller.id, parts)
    await caller.uploads.abort(caller.key, caller.id)
    assert (await caller.store.stat(caller.key)).size == len(DATA)


async def test_parts_that_were_left_when_a_blob_is_deleted_do_not_bring_it_back(caller: Caller, place: S3Place) -> None:
    parts = await caller.send_all()
    await caller.uploads.complete(caller.key, caller.id, parts)
    await caller.store.delete(caller.key)
    assert await caller.send(2) == 404
    assert place.traces(caller.key) == []


async def test_a_signed_address_gives_the_bytes_under_a_name(caller: Caller) -> None:
    stored = await put(caller.store, DATA[:TAIL])
    url = await caller.store.presign_get(stored.key, expires_s=60, filename="größe.onnx")
    assert url is not None
    async with ClientSession() as session, session.get(url) as reply:
        assert await reply.read() == DATA[:TAIL]
        assert reply.headers["Content-Disposition"] == "attachment; filename*=UTF-8''gr%C3%B6%C3%9Fe.onnx"
    forged = url.replace(PREFIX, "racks/r2")
    async with ClientSession() as session, session.get(forged) as reply:
        assert reply.status == 403


@pytest.mark.parametrize(
    ("size", "part_mib"), [(0, 16), (100 * 10**9, 16), (9000 * 16 * 2**20, 16), (9000 * 16 * 2**20 + 1, 17)]
)
def test_parts_stay_within_what_s3_takes(size: int, part_mib: int) -> None:
    assert part_size_for(size) == part_mib * 2**20
    assert -(-size // part_size_for(size)) <= 9000
