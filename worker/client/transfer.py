"""The bytes themselves: sending slices of files, what the answers mean, and how often a transfer is tried."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import aiohttp
from tenacity import AsyncRetrying, retry_if_exception, stop_after_attempt, wait_random_exponential
from yarl import URL

from schemas.errors import ModelManagerError
from schemas.wire import parse_object
from worker.client.caller import error_of
from worker.client.progress import Meter

LANES = 4
ATTEMPTS = 5
CHUNK_BYTES = 1024**2
_HASH_STEP_BYTES = 16 * 1024**2
_IDLE_S = 60.0
_CONNECT_S = 15.0
_ERROR_BYTES = 64 * 1024
# A signed address that has expired answers 401 or 403; a new one is asked for with the next attempt.
_WORTH_ANOTHER = frozenset({401, 403, 408, 410, 425, 429, 500, 502, 503, 504})
# What an object store says of bytes that are not, or no longer, what they should be.
_WRONG_BYTES = (
    b"BadDigest",
    b"XAmzContentSHA256Mismatch",
    b"XAmzContentChecksumMismatch",
    b"InvalidDigest",
    b"<Code>NoSuchKey</Code>",
)

Item = TypeVar("Item")
Result = TypeVar("Result")


class TransferError(ModelManagerError):
    """One attempt to move bytes has failed; `again` says whether another may do better."""

    def __init__(self, code: str, message: str, *, again: bool, **details: Any) -> None:
        super().__init__(code, message, **details)
        self.again = again

    @classmethod
    def of(cls, error: ModelManagerError, *, again: bool) -> TransferError:
        """The same error, as the outcome of an attempt. Its details may have any names."""
        same = cls(error.code, error.message, again=again)
        same.details = error.details
        return same


def transfer_session() -> aiohttp.ClientSession:
    """A session that never gives up on a transfer that moves, and does on one that stands still for a minute."""
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S, sock_read=_IDLE_S)
    connector = aiohttp.TCPConnector(limit=LANES * 2)
    return aiohttp.ClientSession(
        connector=connector,
        timeout=timeout,
        auto_decompress=False,
        read_bufsize=CHUNK_BYTES,
        headers={"Accept-Encoding": "identity"},
    )


async def with_attempts(attempt: Callable[[int], Awaitable[Result]]) -> Result:
    """Await `attempt(number)` up to 5 times, with jittered pauses, while its TransferError says so; raises the last."""
    number = 0

    async def numbered() -> Result:
        nonlocal number
        number += 1
        try:
            return await attempt(number)
        except (aiohttp.ClientError, TimeoutError) as error:
            text = f"The transfer was interrupted ({type(error).__name__})."
            raise TransferError("ERR_STORAGE_UNAVAILABLE", text, again=True) from error

    retrying = AsyncRetrying(
        retry=retry_if_exception(lambda error: isinstance(error, TransferError) and error.again),
        stop=stop_after_attempt(ATTEMPTS),
        wait=wait_random_exponential(multiplier=0.1, max=5),
        reraise=True,
    )
    return await retrying(numbered)


async def in_lanes(items: Iterable[Item], work: Callable[[Item], Awaitable[None]], *, lanes: int = LANES) -> None:
    """Do `work` on every item, some at a time. The first failure cancels the others and is raised."""
    remaining = iter(items)

    async def lane() -> None:
        for item in remaining:
            await work(item)

    # Not a TaskGroup: one that is cancelled just when a task of it fails forgets the cancellation.
    tasks = [asyncio.create_task(lane()) for _ in range(lanes)]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        failures = [task.exception() for task in tasks if not task.cancelled()]
    for failure in failures:
        if failure is not None:
            raise failure


def exact(url: str) -> URL:
    """The address as it was signed, with every escape as it is."""
    return URL(url, encoded=True)


async def check(response: aiohttp.ClientResponse) -> None:
    """Raise TransferError for an answer that is no success: the worker's own error, or what an object store said."""
    if response.status < 300:
        return
    body = await response.content.read(_ERROR_BYTES)
    try:
        error = error_of(parse_object(body))
    except ModelManagerError:
        code = "ERR_CHECKSUM_MISMATCH" if any(word in body for word in _WRONG_BYTES) else "ERR_STORAGE_UNAVAILABLE"
        error = ModelManagerError(code, f"The storage answered with status {response.status}.", status=response.status)
    again = error.code != "ERR_CHECKSUM_MISMATCH" and (response.status in _WORTH_ANOTHER or error.retryable)
    raise TransferError.of(error, again=again)


@asynccontextmanager
async def opened(path: Path) -> AsyncIterator[int]:
    """A file descriptor to read `path` with."""
    descriptor = await asyncio.to_thread(os.open, path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


async def sha256_of(path: Path, *, start: int = 0, length: int | None = None, meter: Meter | None = None) -> str:
    """The sha256 (hex) of a file, or of `length` bytes from `start`. Hashed in a thread, in steps that can be ended."""
    digest = hashlib.sha256()
    position = start
    end = None if length is None else start + length
    async with opened(path) as descriptor:
        while end is None or position < end:
            step = _HASH_STEP_BYTES if end is None else min(_HASH_STEP_BYTES, end - position)
            count = await asyncio.to_thread(_feed, digest, descriptor, position, step)
            if count == 0:
                break
            position += count
            if meter is not None:
                meter.add(count)
    return digest.hexdigest()


def _feed(digest: Any, descriptor: int, start: int, length: int) -> int:
    """Hash up to `length` bytes from `start`; how many there were."""
    done = 0
    while done < length and (chunk := os.pread(descriptor, min(CHUNK_BYTES, length - done), start + done)):
        digest.update(chunk)
        done += len(chunk)
    return done


class Slice:
    """`length` bytes of a file from `start`, as the body of one request. Memory: one chunk of 1 MiB."""

    def __init__(self, path: Path, start: int, length: int, meter: Meter) -> None:
        self._path = path
        self._start = start
        self._length = length
        self._meter = meter
        self._sent = 0
        self._short = False

    async def send(self, session: aiohttp.ClientSession, url: str, headers: dict[str, str]) -> None:
        """PUT the bytes to `url`. Raises TransferError, or aiohttp's errors when the connection fails."""
        fixed = {"Content-Length": str(self._length), "Content-Type": "application/octet-stream"}
        # The length is ours to say; the host follows from the address.
        given = {name: value for name, value in headers.items() if name.lower() not in ("host", "content-length")}
        try:
            async with session.put(
                exact(url), data=self._chunks() if self._length else b"", headers=fixed | given, allow_redirects=False
            ) as response:
                await check(response)
        except BaseException:
            self._meter.take_back(self._sent)
            if self._short:
                text = f"{self._path.name} became shorter while it was sent."
                raise TransferError("ERR_CHECKSUM_MISMATCH", text, again=False) from None
            raise

    async def _chunks(self) -> AsyncIterator[bytes]:
        async with opened(self._path) as descriptor:
            while self._sent < self._length:
                count = min(CHUNK_BYTES, self._length - self._sent)
                chunk = await asyncio.to_thread(os.pread, descriptor, count, self._start + self._sent)
                if not chunk:
                    self._short = True
                    raise EOFError
                yield chunk
                self._sent += len(chunk)
                self._meter.add(len(chunk))
