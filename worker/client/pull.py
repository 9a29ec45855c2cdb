"""Pull: the files of a version come to a local folder, each one verified before it gets its name.

A file is written to `<name>.partial` beside its place, hashed as it comes, made durable, and renamed when it has the
sha256 it should have. What is left by an interrupted pull is gone on with; what is there already is not fetched again.
A lock on the partial file keeps other pulls from writing into it: what was hashed is what it holds. On a file system
without locks each pull writes a file of its own, and removes it unless it is killed.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import aiohttp

from schemas.errors import ModelManagerError
from schemas.ids import check_path, check_paths, digest_of, hex_of, new_ulid
from schemas.model import DeliveredFile, version_digest
from schemas.rpc import GetModelReply
from worker.client.progress import Meter, Report
from worker.client.transfer import (
    CHUNK_BYTES,
    TransferError,
    check,
    exact,
    in_lanes,
    sha256_of,
    transfer_session,
    with_attempts,
)

if TYPE_CHECKING:
    from worker.client.client import ModelManagerClient

_NO_LOCKS = frozenset({errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS})

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class PulledFile:
    """A file that is in its place now; `fetched` is False if it was there before."""

    path: str
    target: Path
    size: int
    sha256: str
    fetched: bool


@dataclass(frozen=True, slots=True)
class Pulled:
    """A version that is here now; `destination` is the file, or the folder of several."""

    model_id: str
    version: str
    checksum: str
    destination: Path
    files: tuple[PulledFile, ...]

    def as_dict(self) -> dict[str, Any]:
        """As the replies of the worker look."""
        return {
            "success": True,
            "modelId": self.model_id,
            "version": self.version,
            "checksum": self.checksum,
            "destination": str(self.destination),
            "files": [
                {
                    "path": file.path,
                    "target": str(file.target),
                    "size": file.size,
                    "checksum": digest_of(file.sha256),
                    "fetched": file.fetched,
                }
                for file in self.files
            ],
        }


async def pull(
    client: ModelManagerClient,
    model_id: str,
    reference: str | None,
    destination: Path | None,
    *,
    force: bool,
    report: Report,
) -> Pulled:
    """Fetch the files of a version, alias or the latest version.

    Several files go below the folder `destination` (`<name>-<version>`), one goes to the file or into the folder
    `destination` (its own name). Raises ERR_CONFLICT, before a byte is fetched, when something else is in a file's
    place and `force` is not set, and at any file that another pull is writing; ERR_CHECKSUM_MISMATCH when bytes are
    wrong, which leaves nothing of that file.
    """
    reply = await client.get_model(model_id, reference, delivery="url")
    files = _checked(reply)
    root, targets = await asyncio.to_thread(_targets, reply, destination)
    present = {file["path"] for file in files if await _is_there(targets[file["path"]], file, force)}
    wanted = [file for file in files if file["path"] not in present]
    meter = Meter(report, "Fetching", sum(file["size"] for file in wanted))
    async with transfer_session() as session:
        fetcher = _Fetcher(client, session, reply, targets, meter)
        await in_lanes(wanted, fetcher.fetch)
    pulled = [
        PulledFile(path, targets[path], file["size"], hex_of(file["checksum"]), path not in present)
        for file in files
        for path in (file["path"],)
    ]
    return Pulled(reply["modelId"], reply["version"], reply["checksum"], root, tuple(pulled))


def _checked(reply: GetModelReply) -> list[DeliveredFile]:
    """The files of a reply that has been checked as if a stranger had sent it."""
    files = reply["files"]
    try:
        check_paths(check_path(file["path"]) for file in files)
    except ValueError as error:
        raise ModelManagerError("ERR_INTERNAL", f"The rack names a file that has no safe path: it {error}.") from None
    digest = version_digest((file["path"], file["size"], hex_of(file["checksum"])) for file in files)
    whole = hex_of(files[0]["checksum"]) if len(files) == 1 else digest
    if digest_of(whole) != reply["checksum"]:
        raise ModelManagerError("ERR_CHECKSUM_MISMATCH", "The list of files does not have the checksum of the version.")
    return files


def _targets(reply: GetModelReply, destination: Path | None) -> tuple[Path, dict[str, Path]]:
    """The file or folder all goes to, and the place of each file. Blocks."""
    paths = [file["path"] for file in reply["files"]]
    if len(paths) == 1:
        name = paths[0].rpartition("/")[2]
        target = Path(name) if destination is None else destination
        target = target / name if target.is_dir() else target
        return target, {paths[0]: target}
    root = destination or Path(f"{reply['modelId'].rpartition('/')[2]}-{reply['version']}")
    if root.exists() and not root.is_dir():
        raise ModelManagerError("ERR_CONFLICT", f"{root} is not a folder, and the version has several files.")
    targets = {path: root / path for path in paths}
    for path, target in targets.items():
        if not target.parent.resolve().is_relative_to(root.resolve()):
            raise ModelManagerError("ERR_CONFLICT", f"{path} would leave {root} through a link.")
    return root, targets


async def _is_there(target: Path, file: DeliveredFile, force: bool) -> bool:
    """Whether the very file is in its place. ERR_CONFLICT if something else is, which may not be replaced."""
    if not await asyncio.to_thread(os.path.lexists, target):
        return False
    regular = await asyncio.to_thread(target.is_file)
    same_size = regular and await asyncio.to_thread(os.path.getsize, target) == file["size"]
    if same_size and await sha256_of(target) == hex_of(file["checksum"]):
        return True
    if not force or not (regular or await asyncio.to_thread(target.is_symlink)):
        raise ModelManagerError("ERR_CONFLICT", f"{target} exists and is something else.", path=file["path"])
    return False


class _Fetcher:
    """Fetches files of one version."""

    def __init__(
        self,
        client: ModelManagerClient,
        session: aiohttp.ClientSession,
        reply: GetModelReply,
        targets: Mapping[str, Path],
        meter: Meter,
    ) -> None:
        self._client = client
        self._session = session
        self._reply = reply
        self._targets = targets
        self._meter = meter
        self._suffix = _free_suffix(list(targets))

    async def fetch(self, file: DeliveredFile) -> None:
        target = self._targets[file["path"]]
        partial = _Partial(target.with_name(target.name + self._suffix))
        try:
            await _to_its_end(partial.open, file["size"])
            while count := await _to_its_end(partial.take_in):
                self._meter.add(count)

            async def attempt(number: int) -> None:
                url = file["url"] if number == 1 else await self._new_url(file["path"])
                await self._stream(partial, file, url)
                if partial.sha256 != hex_of(file["checksum"]):
                    raise await self._wrong_bytes(partial, file)

            await with_attempts(attempt)
            await _to_its_end(partial.publish, target)
        finally:
            await _to_its_end(partial.close)

    async def _stream(self, partial: _Partial, file: DeliveredFile, url: str) -> None:
        """Bring `partial` to its full size."""
        if partial.offset == file["size"]:
            return
        headers = self._client.headers_for(url)
        if partial.offset:
            headers["Range"] = f"bytes={partial.offset}-"
        async with self._session.get(exact(url), headers=headers) as response:
            await check(response)
            if partial.offset and response.status == 200:
                await self._restart(partial)
            elif partial.offset and not _starts_at(response, partial.offset):
                raise TransferError("ERR_STORAGE_UNAVAILABLE", "The storage sent another range.", again=False)
            async for chunk in response.content.iter_chunked(CHUNK_BYTES):
                if partial.offset + len(chunk) > file["size"]:
                    raise await self._wrong_bytes(partial, file)
                await _to_its_end(partial.write, chunk)
                self._meter.add(len(chunk))
        if partial.offset < file["size"]:
            raise TransferError("ERR_STORAGE_UNAVAILABLE", "The transfer ended too early.", again=True)

    async def _wrong_bytes(self, partial: _Partial, file: DeliveredFile) -> TransferError:
        """Nothing of wrong bytes is kept. If some were of an earlier pull, they may be what is wrong: once more."""
        resumed = partial.resumed
        await self._restart(partial)
        if not resumed:
            await _to_its_end(partial.remove)
        text = f"The bytes of {file['path']} do not have the checksum they should have."
        return TransferError("ERR_CHECKSUM_MISMATCH", text, again=resumed, path=file["path"])

    async def _restart(self, partial: _Partial) -> None:
        self._meter.take_back(partial.offset)
        await _to_its_end(partial.restart)

    async def _new_url(self, path: str) -> str:
        reply = await self._client.get_model(self._reply["modelId"], self._reply["version"], delivery="url")
        return next(file["url"] for file in reply["files"] if file["path"] == path)


async def _to_its_end(work: Callable[..., Result], *given: Any) -> Result:
    """Await `work` in a thread; a cancellation takes effect when it has ended.

    A thread cannot be stopped, and the file it works on must not be closed, nor its lock be given up, under it.
    """
    running = asyncio.ensure_future(asyncio.to_thread(work, *given))
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.wait([running])
        raise


class _Partial:
    """A file on its way, with the hash of what it holds. All methods block."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._unlocked = False
        self._descriptor = -1
        self._digest = hashlib.sha256()
        self.offset = 0
        self.resumed = False

    def open(self, size: int) -> None:
        """Make the file, or take over what an interrupted pull has left, if that is not longer than `size` bytes.

        Raises ERR_CONFLICT when another pull has it.
        """
        self._path.parent.mkdir(parents=True, exist_ok=True)
        while not self._lock():
            self.close()
        if os.fstat(self._descriptor).st_size > size:
            self.restart()

    def _lock(self) -> bool:
        """Open and lock the file; False if that is not the one at the path any more: it was published or removed."""
        # A link in this place is not followed: it could lead anywhere.
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        self._descriptor = os.open(self._path, flags, 0o644)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return os.path.samestat(os.fstat(self._descriptor), os.lstat(self._path))
        except BlockingIOError:
            raise ModelManagerError("ERR_CONFLICT", f"Another pull is writing {self._path}.") from None
        except FileNotFoundError:
            return False
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            self._open_own()
            return True

    def _open_own(self) -> None:
        """There are no locks: another pull may be writing at the path, or will. There is nothing to go on with."""
        if os.fstat(self._descriptor).st_size == 0:
            self.remove()
        os.close(self._descriptor)
        self._descriptor = -1
        path = self._path.with_name(f"{self._path.name}-{new_ulid()}")
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        self._path, self._unlocked = path, True

    def take_in(self) -> int:
        """Hash some more of what was there; how many bytes, 0 at the end."""
        chunk = os.pread(self._descriptor, CHUNK_BYTES, self.offset)
        self._digest.update(chunk)
        self.offset += len(chunk)
        self.resumed = self.offset > 0
        return len(chunk)

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    def write(self, chunk: bytes) -> None:
        view = memoryview(chunk)
        while view:
            count = os.pwrite(self._descriptor, view, self.offset)
            self._digest.update(view[:count])
            self.offset += count
            view = view[count:]

    def restart(self) -> None:
        os.ftruncate(self._descriptor, 0)
        self._digest = hashlib.sha256()
        self.offset = 0
        self.resumed = False

    def remove(self) -> None:
        self._path.unlink(missing_ok=True)

    def publish(self, target: Path) -> None:
        """Give the file its name, durably."""
        os.fsync(self._descriptor)
        self._path.replace(target)
        folder = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
            if self._unlocked:
                self.remove()


def _free_suffix(paths: Sequence[str]) -> str:
    """An ending that no file of the version has, so that no partial file is another's place."""
    suffix = ".partial"
    while any(path.endswith(suffix) for path in paths):
        suffix += "~"
    return suffix


def _starts_at(response: aiohttp.ClientResponse, offset: int) -> bool:
    return response.status == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {offset}-")
