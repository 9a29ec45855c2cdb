"""A stream of chunks of any sizes, cut into blocks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.errors import ModelManagerError
from worker.storage.hashing import Expectation, blocks

BLOCK = 8
SIZES = st.lists(st.one_of(st.integers(0, 3 * BLOCK), st.just(BLOCK)), max_size=12)


async def chunked(data: bytes, sizes: list[int]) -> AsyncIterator[bytes]:
    start = 0
    for size in sizes:
        yield data[start : start + size]
        start += size


async def cut(data: bytes, sizes: list[int], max_size: int) -> list[bytes]:
    return [bytes(block) async for block in blocks(chunked(data, sizes), BLOCK, Expectation(None, None, max_size))]


@given(SIZES)
def test_the_blocks_are_the_bytes_in_their_order_and_all_but_the_last_are_whole(sizes: list[int]) -> None:
    data = bytes(n % 251 for n in range(sum(sizes)))
    found = asyncio.run(cut(data, sizes, len(data)))
    assert b"".join(found) == data
    assert {len(block) for block in found[:-1]} <= {BLOCK}
    assert all(0 < len(block) <= BLOCK for block in found[-1:])


@given(SIZES.filter(any))
def test_one_byte_too_many_is_refused(sizes: list[int]) -> None:
    with pytest.raises(ModelManagerError, match="ERR_MODEL_TOO_LARGE"):
        asyncio.run(cut(bytes(sum(sizes)), sizes, sum(sizes) - 1))
