"""A stream of chunks of any sizes, cut into blocks or gathered into pieces."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.errors import ModelManagerError
from worker.storage.hashing import Block, Expectation, blocks, pieces

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


async def gathered(chunks: AsyncIterator[bytes], size: int) -> list[Block]:
    return [piece async for piece in pieces(chunks, BLOCK, Expectation(None, None, size))]


@given(SIZES)
def test_the_pieces_are_the_bytes_in_their_order_and_all_but_the_last_are_large_enough(sizes: list[int]) -> None:
    data = bytes(n % 251 for n in range(sum(sizes)))
    found = asyncio.run(gathered(chunked(data, sizes), len(data)))
    assert b"".join(found) == data
    assert all(len(piece) >= BLOCK for piece in found[:-1])
    assert all(0 < len(piece) < BLOCK + max(sizes) for piece in found)


def test_a_chunk_that_is_large_enough_is_not_copied() -> None:
    chunks = [bytes(3), bytes(BLOCK), bytes(BLOCK + 1), bytes(3 * BLOCK), bytes(1)]

    async def given_ones() -> AsyncIterator[bytes]:
        for chunk in chunks:
            yield chunk

    first, *rest = asyncio.run(gathered(given_ones(), 100))
    assert len(first) == 3 + BLOCK
    assert [any(piece is chunk for chunk in chunks) for piece in rest] == [True, True, False]


@given(SIZES.filter(any))
def test_one_byte_too_many_is_refused_in_pieces_as_well(sizes: list[int]) -> None:
    with pytest.raises(ModelManagerError, match="ERR_MODEL_TOO_LARGE"):
        asyncio.run(gathered(chunked(bytes(sum(sizes)), sizes), sum(sizes) - 1))
