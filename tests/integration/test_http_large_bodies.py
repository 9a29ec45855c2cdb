"""Bodies that are taken past the event loop: they keep every promise that small ones keep."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from schemas.errors import ModelManagerError
from tests.http_rack import HttpRack, blob_files, code_in, eventually, http_rack, open_files, sha256, split
from worker.transport.http_connection import Connection
from worker.transport.http_intake import PIECE_BYTES

DATA = os.urandom(5 * PIECE_BYTES + 12_345)
PATH = "/api/models/m/versions/1/content"
HEAD = f"PUT {PATH}?type=custom HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(DATA)}\r\n".encode()


@pytest.fixture
async def http(tmp_path: Path) -> AsyncIterator[HttpRack]:
    async with http_rack(tmp_path) as made:
        yield made


def in_steps(data: bytes, step: int) -> list[bytes]:
    return [data[at : at + step] for at in range(0, len(data), step)]


@pytest.mark.parametrize(
    "parts",
    [
        pytest.param([HEAD + b"\r\n" + DATA], id="with its head"),
        pytest.param([HEAD + b"\r\n", DATA], id="after its head"),
        pytest.param([HEAD + b"\r\n" + DATA[:7], DATA[7:]], id="begun with its head"),
        pytest.param([HEAD + b"\r\n", *in_steps(DATA, 77_777)], id="in small steps"),
        pytest.param([HEAD + b"\r\n" + DATA[:-1], DATA[-1:]], id="all but a byte"),
    ],
)
async def test_a_large_body_is_stored_as_it_came(http: HttpRack, parts: list[bytes]) -> None:
    status, headers, _ = split(await http.raw(*parts))
    assert (status, headers["connection"]) == (201, "close")
    assert http.seen.bytes["in"] == len(DATA)
    assert (await http.send("GET", PATH)).body == DATA


async def test_the_event_loop_sees_hardly_any_of_it(http: HttpRack, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = 0
    received = Connection.data_received

    def counting(self: Connection, data: bytes) -> None:
        nonlocal seen
        seen += len(data)
        received(self, data)

    monkeypatch.setattr(Connection, "data_received", counting)
    assert split(await http.raw(HEAD + b"\r\n", DATA))[0] == 201
    assert seen < PIECE_BYTES


async def test_the_file_of_an_upload_may_be_large(http: HttpRack) -> None:
    file = {"path": "f", "size": len(DATA), "sha256": f"sha256:{sha256(DATA)}"}
    created = await http.send("POST", "/api/uploads", json={"modelId": "m", "version": "1", "files": [file]})
    upload = created.json["uploadId"]
    answer = await http.send("PUT", f"/api/uploads/{upload}/files/f", data=DATA)
    assert (answer.status, answer.json["sha256"]) == (200, file["sha256"])


async def test_a_declared_digest_is_checked(http: HttpRack) -> None:
    digest = "sha-256=:47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU=:"
    answer = await http.put("m", "1", DATA, headers={"Repr-Digest": digest})
    assert (answer.status, answer.code) == (422, "ERR_CHECKSUM_MISMATCH")
    assert blob_files(http.rack) == 0


async def test_it_is_asked_for_when_the_client_waits_for_that(http: HttpRack) -> None:
    reader, writer = await http.connect()
    writer.write(HEAD + b"Expect: 100-continue\r\n\r\n")
    assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
    writer.write(DATA)
    assert (await reader.readline()).startswith(b"HTTP/1.1 201 ")
    writer.close()


async def test_what_follows_it_is_no_request(http: HttpRack) -> None:
    for parts in ([HEAD + b"\r\n" + DATA + b"GET /livez HTTP/1.1\r\n\r\n"], [HEAD + b"\r\n" + DATA, bytes(300_000)]):
        reply = await http.raw(*parts)
        assert (split(reply)[0] in (200, 201), reply.count(b"HTTP/1.1 ")) == (True, 1)


# --- that do not come as they should ---------------------------------------------------------------------------------


@pytest.mark.parametrize("sent", [0, 10, PIECE_BYTES + 10])
async def test_one_that_stops_is_408_and_leaves_nothing(tmp_path: Path, sent: int) -> None:
    async with http_rack(tmp_path, idle_timeout_s=0.3) as http:
        status, headers, body = split(await http.raw(HEAD + b"\r\n", DATA[:sent]))
        assert (status, code_in(body), headers["connection"]) == (408, "ERR_INVALID_REQUEST", "close")
        assert blob_files(http.rack) == 0


async def test_one_that_trickles_is_408(tmp_path: Path) -> None:
    async with http_rack(tmp_path, idle_timeout_s=0.5) as http:
        assert split(await http.raw(HEAD + b"\r\n", *[bytes(1000)] * 15, pause_s=0.05))[0] == 408


async def test_one_that_is_slow_but_fast_enough_is_stored(tmp_path: Path) -> None:
    """A piece takes longer than the idle timeout, yet the least that must come in it does."""
    async with http_rack(tmp_path, idle_timeout_s=0.5) as http:
        steps = in_steps(DATA, 400_000)
        assert split(await http.raw(HEAD + b"\r\n", *steps, pause_s=0.25))[0] == 201
        assert (await http.send("GET", PATH)).body == DATA


@pytest.mark.parametrize("sent", [0, 2 * PIECE_BYTES])
async def test_one_that_ends_too_early_is_400_and_leaves_nothing(http: HttpRack, sent: int) -> None:
    reader, writer = await http.connect()
    writer.write(HEAD + b"Expect: 100-continue\r\n\r\n")
    await reader.readuntil(b"\r\n\r\n")
    writer.write(DATA[:sent])
    writer.write_eof()
    status, _, body = split(await reader.read())
    assert (status, code_in(body)) == (400, "ERR_INVALID_REQUEST")
    assert blob_files(http.rack) == 0
    writer.close()


@pytest.mark.parametrize("begun", [0, 1000])
async def test_a_store_that_fails_on_the_way_is_told_to_a_client_that_still_sends(
    http: HttpRack, monkeypatch: pytest.MonkeyPatch, begun: int
) -> None:
    files = open_files()

    async def full(key: str, chunks: AsyncIterator[bytes], **declared: Any) -> None:
        await anext(chunks)
        raise ModelManagerError("ERR_STORAGE_FULL")

    monkeypatch.setattr(http.rack.store, "put", full)
    status, headers, body = split(await http.raw(HEAD + b"\r\n" + DATA[:begun], *in_steps(DATA[begun:], PIECE_BYTES)))
    assert (status, code_in(body), headers["connection"]) == (507, "ERR_STORAGE_FULL", "close")
    await eventually(lambda: open_files() <= files)


async def test_many_that_hardly_move_keep_no_other_waiting(http: HttpRack) -> None:
    # More than there are threads.
    slow = [await http.connect() for _ in range(10)]
    for number, (_, writer) in enumerate(slow):
        writer.write(HEAD.replace(b"/m/", b"/slow-%d/" % number) + b"\r\n" + bytes(1000))
    await eventually(lambda: blob_files(http.rack) == len(slow))
    started = time.monotonic()
    assert split(await http.raw(HEAD + b"\r\n", DATA))[0] == 201
    assert time.monotonic() - started < 4.0  # the idle timeout is 5 s
    for _, writer in slow:
        writer.transport.abort()
    await eventually(lambda: blob_files(http.rack) == 1)


# --- the end of the server -------------------------------------------------------------------------------------------


async def test_one_that_has_begun_finishes_while_the_server_stops(http: HttpRack) -> None:
    reader, writer = await http.connect()
    writer.write(HEAD + b"\r\n" + DATA[:10])
    await eventually(lambda: blob_files(http.rack) == 1)
    stopping = asyncio.create_task(http.server.stop(5.0))
    await asyncio.sleep(0.1)
    assert not stopping.done()
    writer.write(DATA[10:])
    assert split(await reader.read())[0] == 201
    await stopping
    writer.close()


async def test_one_that_does_not_finish_in_time_is_cut_off_and_leaves_nothing(http: HttpRack) -> None:
    files = open_files()
    tasks = len(asyncio.all_tasks())
    reader, writer = await http.connect()
    writer.write(HEAD + b"\r\n" + DATA[:-1])
    await eventually(lambda: blob_files(http.rack) == 1)
    started = time.monotonic()
    await http.server.stop(0.3)
    assert time.monotonic() - started < 2.5
    with suppress(ConnectionResetError):  # of what was not read
        assert b" 201 " not in await reader.read()
    writer.close()
    await eventually(lambda: blob_files(http.rack) == 0)
    await eventually(lambda: open_files() < files and len(asyncio.all_tasks()) <= tasks)
