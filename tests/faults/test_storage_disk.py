"""A disk that is full, or that holds what nobody should have put there."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from schemas.errors import ModelManagerError
from tests.stores import INFO, MIB, content, keys, put, read, zeros
from worker.storage.blobstore import BlobMissing
from worker.storage.disk import DiskStore

LIMITED = """
import asyncio, pathlib, resource, sys
from schemas.errors import ModelManagerError
from tests.stores import INFO, MIB, zeros
from worker.storage.disk import DiskStore

async def main(root):
    store = DiskStore(root)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3 * MIB, 3 * MIB))
    try:
        await store.put("blobs/a", zeros(8 * MIB), info=INFO, size=8 * MIB, sha256=None, max_size=8 * MIB)
    except ModelManagerError as error:
        print(error.code, *(path.name for path in (root / "blobs").iterdir()))

asyncio.run(main(pathlib.Path(sys.argv[1])))
"""


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[DiskStore]:
    opened = DiskStore(tmp_path / "storage")
    await opened.probe()
    yield opened
    await opened.close()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


async def test_nobody_but_the_owner_and_its_group_reads_what_is_stored(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        store = DiskStore(tmp_path / "storage")
        await put(store, b"bytes")
        await store.put_document("journal/1/MANIFEST", b"{}", etag=None)
        await store.close()
    finally:
        os.umask(before)
    found = [tmp_path / "storage", *(tmp_path / "storage").rglob("*")]
    assert len(found) > 5
    assert {path.name: oct(path.stat().st_mode & 0o007) for path in found if path.stat().st_mode & 0o007} == {}


async def test_a_full_disk_is_told_and_keeps_no_piece(small_disk: Path) -> None:
    store = DiskStore(small_disk)
    kept = await put(store, content(MIB))
    with pytest.raises(ModelManagerError) as full:
        await store.put(store.new_key(), zeros(8 * MIB), info=INFO, size=8 * MIB, sha256=None, max_size=8 * MIB)
    assert full.value.code == "ERR_STORAGE_FULL"
    assert await keys(store) == {kept.key}
    assert await store.hash(kept.key) == kept
    assert (await put(store, content(2 * MIB))).size == 2 * MIB
    await store.close()


async def test_a_document_that_finds_no_room_stays_as_it_was(small_disk: Path) -> None:
    store = DiskStore(small_disk)
    before = await store.put_document("owner.json", b"before", etag=None)
    with pytest.raises(ModelManagerError, match="ERR_STORAGE_FULL"):
        await store.put_document("owner.json", bytes(8 * MIB), etag=before.etag)
    assert await store.get_document("owner.json") == before
    assert await store.put_document("owner.json", b"after", etag=before.etag)
    await store.close()


def test_a_file_over_the_limit_of_the_process_is_a_full_disk_too(tmp_path: Path) -> None:
    child = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    assert child.stdout.split() == ["ERR_STORAGE_FULL"]


async def test_a_link_planted_under_a_key_is_refused(store: DiskStore, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret")
    key = store.new_key()
    planted = tmp_path / "storage" / key
    planted.symlink_to(secret)
    for call in (
        lambda: read(store, key),
        lambda: store.read_at(key, 0, 5),
        lambda: store.stat(key),
        lambda: store.hash(key),
        lambda: put(store, b"overwritten", key),
    ):
        with pytest.raises(ModelManagerError):
            await call()
    assert await keys(store) == set()
    assert secret.read_bytes() == b"secret"
    await store.delete(key)
    assert secret.exists()
    assert not planted.is_symlink()


@pytest.mark.parametrize("kind", ["pipe", "folder"])
async def test_what_is_no_file_is_refused_and_never_waited_for(store: DiskStore, tmp_path: Path, kind: str) -> None:
    key = store.new_key()
    path = tmp_path / "storage" / key
    os.mkfifo(path) if kind == "pipe" else path.mkdir()
    with pytest.raises(ModelManagerError, match="ERR_STORAGE_UNAVAILABLE"):
        await asyncio.wait_for(read(store, key), 5)
    assert await keys(store) == set()


async def test_a_blob_deleted_under_a_reader_is_read_to_its_end(store: DiskStore) -> None:
    data = content(3 * MIB)
    key = (await put(store, data)).key
    chunks = store.read(key)
    seen = [await anext(chunks)]
    await store.delete(key)
    seen += [chunk async for chunk in chunks]
    assert b"".join(seen) == data
    with pytest.raises(BlobMissing):
        await store.stat(key)


async def test_a_folder_that_cannot_be_made_is_storage_that_is_away(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    store = DiskStore(tmp_path / "file" / "storage")
    for call in (store.probe, store.usage, lambda: put(store, b"bytes")):
        with pytest.raises(ModelManagerError) as away:
            await call()
        assert away.value.code == "ERR_STORAGE_UNAVAILABLE"
        assert str(tmp_path) not in away.value.message
    await store.close()


async def test_puts_that_are_cancelled_all_at_once_leave_no_file_and_no_descriptor(
    store: DiskStore, tmp_path: Path
) -> None:
    await put(store, b"first")
    held = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - the entries are not paths to follow
    tasks = [asyncio.create_task(put(store, content(MIB))) for _ in range(40)]
    await asyncio.sleep(0)
    for turn, task in enumerate(tasks):
        await asyncio.sleep(0.001 * (turn % 3))
        task.cancel()
    ended = await asyncio.gather(*tasks, return_exceptions=True)
    done = {blob.key for blob in ended if not isinstance(blob, BaseException)}
    assert len(done) < len(tasks)
    assert len(await keys(store)) == len(done) + 1
    assert len(os.listdir("/proc/self/fd")) <= held  # noqa: PTH208
