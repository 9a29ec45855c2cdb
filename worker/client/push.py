"""Push: a local file or folder becomes a version of a model.

Every file is hashed first, since the rack may have its bytes already; what it lacks is sent, four pieces at a time, in
signed parts to an object store or whole to a worker's disk. The version exists only after the rack has verified all.
"""

from __future__ import annotations

import asyncio
import contextlib
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp

from schemas.errors import ModelManagerError
from schemas.ids import MAX_FILES, check_path, check_paths, digest_of
from schemas.rpc import StoreReply
from schemas.uploads import SignedPartUrl, UploadFileState, UploadReply
from worker.client.caller import encoded
from worker.client.progress import Meter, Report
from worker.client.transfer import Slice, in_lanes, sha256_of, transfer_session, with_attempts

if TYPE_CHECKING:
    from worker.client.client import ModelManagerClient

_PARTS_SIGNED_AT_ONCE = 8
_ROUNDS = 3
_ABORT_S = 5.0


@dataclass(frozen=True, slots=True)
class LocalFile:
    """A file to push: its path in the version, where it lies, and its size in bytes."""

    path: str
    source: Path
    size: int


@dataclass(frozen=True, slots=True)
class _Piece:
    """What one lane sends at a time: some parts of a file, or the whole file if there are none."""

    file: LocalFile
    state: UploadFileState
    numbers: tuple[int, ...] = ()


async def push(
    client: ModelManagerClient,
    path: Path,
    model_id: str,
    version: str,
    *,
    metadata: Mapping[str, Any],
    report: Report,
) -> StoreReply:
    """Store the file or folder at `path` as `model_id:version`; `metadata` needs a `type`.

    The same files under the same version again succeed with `created: false`. Raises ModelManagerError; an upload that
    fails is aborted, so that the rack keeps nothing of it.
    """
    described = {**metadata, "version": version}
    encoded({"metadata": described})  # told before there are bytes, not after them
    files = {file.path: file for file in await asyncio.to_thread(local_files, path)}
    meter = Meter(report, "Hashing", sum(file.size for file in files.values()))
    digests = {file.path: await sha256_of(file.source, meter=meter) for file in files.values()}
    planned = [
        {"path": file.path, "size": file.size, "sha256": digest_of(digests[file.path])} for file in files.values()
    ]
    upload = await client.create_upload(model_id, version, planned)
    try:
        await _bring(client, upload, files, report)
        return await client.store_model(model_id, described, upload_id=upload["uploadId"])
    except BaseException:
        with contextlib.suppress(ModelManagerError, TimeoutError):
            await asyncio.wait_for(client.abort_upload(upload["uploadId"]), _ABORT_S)
        raise


async def _bring(
    client: ModelManagerClient, upload: UploadReply, files: Mapping[str, LocalFile], report: Report
) -> None:
    """Send what is missing and have it verified; again if the worker lost some of it by a restart."""
    current = upload
    for left in reversed(range(_ROUNDS)):
        await _send_missing(client, current, files, report)
        try:
            begun = await client.complete_upload(upload["uploadId"])
            await client.outcome(begun, report, step="Verifying")
            return
        except ModelManagerError as error:
            if error.code != "ERR_CONFLICT" or left == 0:
                raise
            current = await client.get_upload(upload["uploadId"])
            if current["state"] != "open" or not any(_pieces(current["files"], files)):
                raise


async def _send_missing(
    client: ModelManagerClient, upload: UploadReply, files: Mapping[str, LocalFile], report: Report
) -> None:
    pieces = list(_pieces(upload["files"], files))
    if not pieces:
        return
    meter = Meter(report, "Sending", sum(_piece_bytes(piece) for piece in pieces))
    async with transfer_session() as session:
        sender = _Sender(client, session, upload["uploadId"], meter)
        await in_lanes(pieces, sender.send)


def _pieces(states: Iterable[UploadFileState], files: Mapping[str, LocalFile]) -> Iterator[_Piece]:
    for state in states:
        if state["present"]:
            continue
        file = files[state["path"]]
        if "url" in state:
            yield _Piece(file, state)
            continue
        there = set(state.get("received", ()))
        missing = [number for number in range(1, state["parts"] + 1) if number not in there]
        for at in range(0, len(missing), _PARTS_SIGNED_AT_ONCE):
            yield _Piece(file, state, tuple(missing[at : at + _PARTS_SIGNED_AT_ONCE]))


def _piece_bytes(piece: _Piece) -> int:
    return sum(_part_range(piece, n)[1] for n in piece.numbers) if piece.numbers else piece.file.size


def _part_range(piece: _Piece, number: int) -> tuple[int, int]:
    """Where part `number` begins, and its length."""
    size = piece.state["partSize"]
    start = (number - 1) * size
    return start, min(size, piece.file.size - start)


class _Sender:
    """Sends pieces of one upload."""

    def __init__(
        self, client: ModelManagerClient, session: aiohttp.ClientSession, upload_id: str, meter: Meter
    ) -> None:
        self._client = client
        self._session = session
        self._upload_id = upload_id
        self._meter = meter

    async def send(self, piece: _Piece) -> None:
        if not piece.numbers:
            await self._send_whole(piece)
            return
        digests = {number: await self._part_sha256(piece, number) for number in piece.numbers}
        signed = {url["number"]: url for url in await self._sign(piece, digests)}
        for number, sha256 in digests.items():
            await self._send_part(piece, number, sha256, signed[number])

    async def _send_whole(self, piece: _Piece) -> None:
        async def attempt(number: int) -> None:
            url = piece.state["url"] if number == 1 else await self._new_url(piece.file.path)
            if url is not None:
                body = Slice(piece.file.source, 0, piece.file.size, self._meter)
                await body.send(self._session, url, self._client.headers_for(url))

        await with_attempts(attempt)

    async def _send_part(self, piece: _Piece, number: int, sha256: str, first: SignedPartUrl) -> None:
        start, length = _part_range(piece, number)

        async def attempt(count: int) -> None:
            signed = first if count == 1 else (await self._sign(piece, {number: sha256}))[0]
            body = Slice(piece.file.source, start, length, self._meter)
            await body.send(self._session, signed["url"], signed["headers"])

        await with_attempts(attempt)

    async def _part_sha256(self, piece: _Piece, number: int) -> str:
        if piece.state["parts"] == 1:
            return piece.state["sha256"]
        start, length = _part_range(piece, number)
        return digest_of(await sha256_of(piece.file.source, start=start, length=length))

    async def _sign(self, piece: _Piece, digests: Mapping[int, str]) -> list[SignedPartUrl]:
        parts = [{"number": number, "sha256": sha256} for number, sha256 in digests.items()]
        return (await self._client.get_upload(self._upload_id, path=piece.file.path, parts=parts))["urls"]

    async def _new_url(self, path: str) -> str | None:
        """A new address for a whole file; None if the file is there by now."""
        upload = await self._client.get_upload(self._upload_id)
        return next((state.get("url") for state in upload["files"] if state["path"] == path), None)


def local_files(path: Path) -> list[LocalFile]:
    """The file at `path`, or every file below the folder `path`, sorted by path.

    A link to a file counts as that file (the model caches of other tools are made of them); a link to a folder, and
    what is neither file nor folder, is refused. Raises ERR_INVALID_REQUEST. Blocks.
    """
    if not path.is_dir():
        return [_local_file(path.name or path.resolve().name, path)]
    files: list[LocalFile] = []
    for source in sorted(path.rglob("*")):
        name = source.relative_to(path).as_posix()
        if source.is_dir():
            if source.is_symlink():
                raise ModelManagerError(
                    "ERR_INVALID_REQUEST", f"{name} is a link to a folder; put a copy in its place."
                )
            continue
        files.append(_local_file(name, source))
        if len(files) > MAX_FILES:
            raise ModelManagerError("ERR_INVALID_REQUEST", f"A version has at most {MAX_FILES} files.")
    if not files:
        raise ModelManagerError("ERR_INVALID_REQUEST", "There is no file in that folder.")
    try:
        check_paths(file.path for file in files)
    except ValueError as error:
        raise ModelManagerError("ERR_INVALID_REQUEST", f"The folder cannot be a version: {error}.") from None
    return files


def _local_file(name: str, source: Path) -> LocalFile:
    try:
        status = source.stat()
    except OSError as error:
        raise ModelManagerError("ERR_INVALID_REQUEST", f"{name} cannot be read: {error.strerror}.") from None
    if not stat.S_ISREG(status.st_mode):
        raise ModelManagerError("ERR_INVALID_REQUEST", f"{name} is not a regular file.")
    try:
        return LocalFile(check_path(name), source, status.st_size)
    except ValueError as error:
        raise ModelManagerError("ERR_INVALID_REQUEST", f"{name!r} cannot be the path of a file: it {error}.") from None
