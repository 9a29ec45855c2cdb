"""A stream of chunks cut into blocks, checked against what was declared, hashed on the way."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncGenerator, AsyncIterator

from schemas.errors import ModelManagerError
from schemas.ids import digest_of

# Of two kinds, since what came in one piece is passed on as it is.
Block = bytes | bytearray


class Expectation:
    """What a put was told of its bytes; raises the error of the contract when they turn out otherwise."""

    def __init__(self, size: int | None, sha256: str | None, max_size: int) -> None:
        self._size = size
        self._sha256 = sha256
        self._max_size = max_size
        self._hash = hashlib.sha256()
        self.seen = 0
        if size is not None and size > max_size:
            raise self._too_large()

    def admit(self, count: int) -> None:
        """Call before `count` more bytes are kept."""
        self.seen += count
        if self.seen > self._max_size:
            raise self._too_large()
        if self._size is not None and self.seen > self._size:
            raise self._wrong_size()

    def update(self, block: Block) -> None:
        """Hash a block. For a thread: blocking, one call at a time, in order."""
        self._hash.update(block)

    def finish(self) -> str:
        """The sha256 in hex, once all bytes were hashed."""
        if self._size is not None and self.seen != self._size:
            raise self._wrong_size()
        actual = self._hash.hexdigest()
        if self._sha256 is not None and actual != self._sha256:
            raise ModelManagerError(
                "ERR_CHECKSUM_MISMATCH",
                "The bytes do not have the declared checksum.",
                expected=digest_of(self._sha256),
                actual=digest_of(actual),
            )
        return actual

    def _too_large(self) -> ModelManagerError:
        return ModelManagerError(
            "ERR_MODEL_TOO_LARGE", f"A version may have at most {self._max_size} bytes.", maxModelSize=self._max_size
        )

    def _wrong_size(self) -> ModelManagerError:
        return ModelManagerError(
            "ERR_CHECKSUM_MISMATCH",
            f"{self._size} bytes were declared, and there are {'more' if self.seen > (self._size or 0) else 'fewer'}.",
            expectedSize=self._size,
        )


async def blocks(
    chunks: AsyncIterator[bytes], block_bytes: int, expectation: Expectation
) -> AsyncGenerator[Block, None]:
    """The bytes of `chunks`, admitted as they come, in blocks of `block_bytes` but the last. Holds one at most.

    A block grows in place: gathering chunks and joining them would hold its bytes twice.
    """
    block = bytearray()
    async for chunk in chunks:
        expectation.admit(len(chunk))
        if not block and len(chunk) == block_bytes:
            yield chunk
            continue
        view = memoryview(chunk)
        while view:
            room = block_bytes - len(block)
            block += view[:room]
            view = view[room:]
            if len(block) == block_bytes:
                yield block
                block = bytearray()
    if block:
        yield block


async def pieces(
    chunks: AsyncIterator[bytes], least_bytes: int, expectation: Expectation
) -> AsyncGenerator[Block, None]:
    """The bytes of `chunks`, admitted as they come, in pieces of `least_bytes` or more but the last.

    A chunk that is large enough is passed on as it is: to cut it to a size would be to copy it.
    """
    gathered = bytearray()
    async for chunk in chunks:
        expectation.admit(len(chunk))
        if not gathered and len(chunk) >= least_bytes:
            yield chunk
            continue
        gathered += chunk
        if len(gathered) >= least_bytes:
            yield gathered
            gathered = bytearray()
    if gathered:
        yield gathered
