"""Start, drain and stop of the HTTP server."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.http_rack import HttpRack, blob_files, eventually, http_rack, open_files, split

GET = b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n"
PUT = b"PUT /api/models/m/versions/1/content?type=custom HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10\r\n\r\n"


@pytest.fixture
async def http(tmp_path: Path) -> AsyncIterator[HttpRack]:
    async with http_rack(tmp_path) as made:
        yield made


async def test_port_0_gives_a_free_port_that_can_be_asked_for(http: HttpRack) -> None:
    assert http.server.port > 0
    assert (await http.send("GET", "/livez")).status == 200


async def test_a_taken_port_is_an_oserror_and_the_start_may_be_tried_again(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match="in use"):
            async with http_rack(tmp_path / "a", port=port):
                pass
    async with http_rack(tmp_path / "b", port=port) as http:
        assert http.server.port == port
        await http.server.stop(1.0)
        await http.server.start()
        assert (await http.send("GET", "/livez")).status == 200


async def test_a_drain_is_not_ready_refuses_writes_and_answers_the_rest(http: HttpRack) -> None:
    await http.put("m", "1", b"data")
    http.server.begin_drain()
    ready = await http.send("GET", "/readyz")
    assert (ready.status, ready.json) == (503, {"ready": False})
    for verb, path, body in (
        ("PUT", "/api/models/m/versions/2/content?type=custom", b"x"),
        ("DELETE", "/api/models/m", None),
        ("POST", "/api/models/m/restore", None),
    ):
        answer = await http.send(verb, path, data=body)
        assert (answer.status, answer.code) == (503, "ERR_SHUTTING_DOWN")
        assert answer.headers["Retry-After"] == "1"
    read = await http.send("GET", "/api/models/m/versions/1/content")
    assert (read.body, read.headers["Connection"]) == (b"data", "close")
    assert (await http.send("GET", "/livez")).status == 200


async def test_a_drain_does_not_ask_for_a_body_it_would_refuse(http: HttpRack) -> None:
    http.server.begin_drain()
    reply = await http.raw(PUT.replace(b"\r\n\r\n", b"\r\nExpect: 100-continue\r\n\r\n"))
    assert split(reply)[0] == 503


async def test_an_upload_that_has_begun_finishes_while_the_server_stops(http: HttpRack) -> None:
    reader, writer = await http.connect()
    writer.write(PUT + b"12345")
    await eventually(lambda: blob_files(http.rack) == 1)
    stopping = asyncio.create_task(http.server.stop(5.0))
    await eventually(lambda: not listens(http.server.port))
    assert not stopping.done()
    writer.write(b"67890")
    status, headers, _ = split(await reader.read())
    assert (status, headers["connection"]) == (201, "close")
    await stopping
    writer.close()


async def test_idle_connections_end_with_the_server(http: HttpRack) -> None:
    reader, writer = await http.connect()
    writer.write(GET)
    await reader.readuntil(b'"ok"}')
    started = time.monotonic()
    await http.server.stop(5.0)
    assert await reader.read() == b""
    assert time.monotonic() - started < 2.0
    writer.close()


async def test_what_does_not_finish_in_time_is_cut_off_and_leaves_nothing(http: HttpRack) -> None:
    files = open_files()
    tasks = len(asyncio.all_tasks())
    reader, writer = await http.connect()
    writer.write(PUT + b"12345")
    await eventually(lambda: blob_files(http.rack) == 1)
    started = time.monotonic()
    await http.server.stop(0.3)
    assert time.monotonic() - started < 2.5
    assert b" 201 " not in await reader.read()
    writer.close()
    await eventually(lambda: blob_files(http.rack) == 0)
    await eventually(lambda: open_files() < files and len(asyncio.all_tasks()) <= tasks)


async def test_after_the_stop_nothing_listens_and_a_second_stop_is_harmless(http: HttpRack) -> None:
    port = http.server.port
    await http.server.stop(1.0)
    assert not listens(port)
    await http.server.stop(1.0)


def listens(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex(("127.0.0.1", port)) == 0
