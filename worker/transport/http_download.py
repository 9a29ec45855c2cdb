"""Sending the bytes of a file: a small one with its headers, a large one by sendfile, a stream with back-pressure."""

from __future__ import annotations

import asyncio
import errno
import os
import stat
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import BinaryIO, Protocol

from aiohttp import web

from schemas.errors import ModelManagerError
from worker.content import LocalFile, Stream

# A slice must be taken within the idle timeout, which is a lowest rate: 35 kB/s at 60 s.
_SLICE_BYTES = 2 * 1024 * 1024
_SMALL_BYTES = 64 * 1024
_READ_BYTES = 256 * 1024


class Source(Protocol):
    """Bytes that are ready to be sent once."""

    async def send(self, download: Download) -> None:
        """Send all of them, after the headers."""

    async def close(self) -> None:
        """Free what it holds; may be called twice."""


class Download(web.StreamResponse):
    """A response of exactly `length` bytes. A client that takes nothing for `idle_s` seconds is given up."""

    def __init__(
        self,
        source: Source,
        length: int,
        *,
        status: int,
        headers: Mapping[str, str],
        idle_s: float,
        sent: Callable[[int], None],
    ) -> None:
        super().__init__(status=status, headers={**headers, "Content-Length": str(length)})
        self._source = source
        self._length = length
        self._idle_s = idle_s
        self._sent = sent
        self._remaining = length

    async def transmit(self, request: web.BaseRequest) -> None:
        """Send headers and bytes. Raises when not all could be sent: then the connection must be cut off."""
        try:
            await self.prepare(request)
            if request.method != "HEAD":
                await self._source.send(self)
                if self._remaining:
                    raise _gone()
            await self.write_eof()
        finally:
            await self._source.close()

    async def send_bytes(self, data: bytes) -> None:
        """Send some of the bytes; what is more than the length is dropped."""
        data = data[: self._remaining]
        async with asyncio.timeout(self._idle_s):
            await self.write(data)
        self._count(len(data))

    async def send_file(self, file: BinaryIO, start: int) -> None:
        """Send the bytes of `file` from `start`, by sendfile where the event loop and the transport can."""
        loop = asyncio.get_running_loop()
        while self._remaining:
            count = min(_SLICE_BYTES, self._remaining)
            try:
                async with asyncio.timeout(self._idle_s):
                    moved = await loop.sendfile(self._transport(), file, start, count, fallback=False)
            except (NotImplementedError, asyncio.SendfileNotAvailableError):
                await self._copy_file(file, start)
                return
            except RuntimeError as error:  # how asyncio says that the transport is closing
                raise ConnectionResetError("the client has gone") from error
            self._count(moved)
            start += moved
            if moved < count:
                return

    async def _copy_file(self, file: BinaryIO, start: int) -> None:
        while self._remaining:
            count = min(_READ_BYTES, self._remaining)
            data = await asyncio.to_thread(os.pread, file.fileno(), count, start)
            if not data:
                return
            await self.send_bytes(data)
            start += len(data)

    def _transport(self) -> asyncio.Transport:
        transport = self._req.transport if self._req is not None else None
        if transport is None or transport.is_closing():
            raise ConnectionResetError("the client has gone")
        return transport

    def _count(self, count: int) -> None:
        self._remaining -= count
        self._sent(count)


class _Bytes:
    def __init__(self, data: bytes) -> None:
        self._data = data

    async def send(self, download: Download) -> None:
        if self._data:
            await download.send_bytes(self._data)

    async def close(self) -> None:
        return


class _File:
    def __init__(self, file: BinaryIO, start: int) -> None:
        self._file = file
        self._start = start

    async def send(self, download: Download) -> None:
        await download.send_file(self._file, self._start)

    async def close(self) -> None:
        self._file.close()


class _Chunks:
    def __init__(self, first: bytes, rest: AsyncIterator[bytes]) -> None:
        self._first = first
        self._rest = rest

    async def send(self, download: Download) -> None:
        await download.send_bytes(self._first)
        async for chunk in self._rest:
            await download.send_bytes(chunk)

    async def close(self) -> None:
        if isinstance(self._rest, AsyncGenerator):
            await self._rest.aclose()


async def open_source(content: LocalFile | Stream, size: int, start: int, length: int) -> Source:
    """Make `length` bytes from `start` of a file of `size` bytes ready.

    Coded errors are raised here rather than while sending, when a status has been sent already: ERR_CHECKSUM_MISMATCH
    if the bytes are gone or have another size, and what the storage says.
    """
    if length == 0:
        return _Bytes(b"")
    if isinstance(content, LocalFile):
        return await asyncio.to_thread(_open_file, content.path, size, start, length)
    chunks = content.read(start, length)
    first = await anext(chunks, b"")
    return _Chunks(first, chunks)


def _open_file(path: Path, size: int, start: int, length: int) -> Source:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP):
            raise _gone() from error
        raise ModelManagerError("ERR_STORAGE_UNAVAILABLE") from error
    kept = False
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_size != size:
            raise _gone()
        if length <= _SMALL_BYTES:
            return _Bytes(os.pread(descriptor, length, start))
        kept = True
        return _File(os.fdopen(descriptor, "rb", buffering=0), start)
    finally:
        if not kept:
            os.close(descriptor)


def _gone() -> ModelManagerError:
    return ModelManagerError("ERR_CHECKSUM_MISMATCH", "The stored bytes are gone, or are not as many as were stored.")
