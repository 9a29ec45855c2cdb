"""What no well-behaved client sends: each gets a coded answer or the end of the connection, and harms nobody."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest

from tests.http_rack import HttpRack, code_in, eventually, http_rack, split

HOST = b"Host: localhost\r\n"
CLOSE = b"Connection: close\r\n"
GET = b"GET /livez HTTP/1.1\r\n" + HOST


@pytest.fixture
async def http(tmp_path: Path) -> AsyncIterator[HttpRack]:
    async with http_rack(tmp_path) as made:
        yield made


async def refusal(http: HttpRack, *parts: bytes) -> tuple[int, str]:
    status, headers, body = split(await http.raw(*parts))
    assert headers["content-type"] == "application/json"
    assert headers["server"] == "model-manager"
    return status, code_in(body)


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"GET /livez\r\n\r\n",
        b"GET /livez HTTP/2.0\r\n" + HOST + b"\r\n",
        b"GET /livez HTTP/1.1\r\n\r\n",
        b"GET /livez HTTP/1.1\r\n" + HOST + HOST + b"\r\n",
        b"GET /livez HTTP/1.1\r\nHost: a b\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nHost: a/../b\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nHost: user@localhost\r\n\r\n",
        b"GET /livez HTTP/1.1\nHost: localhost\n\n",
        b"GET /li vez HTTP/1.1\r\n" + HOST + b"\r\n",
        b"GET /li\x00vez HTTP/1.1\r\n" + HOST + b"\r\n",
        b"GET /\xc3\xa9 HTTP/1.1\r\n" + HOST + b"\r\n",
        b"GET livez HTTP/1.1\r\n" + HOST + b"\r\n",
        b"GET /livez%00 HTTP/1.1\r\n" + HOST + CLOSE + b"\r\n",
        b"GET /livez#x HTTP/1.1\r\n" + HOST + CLOSE + b"\r\n",
        b"GET /livez HTTP/1.1\r\n" + HOST + b"X : y\r\n\r\n",
        b"GET /livez HTTP/1.1\r\n" + HOST + b"X: a\r\n b\r\n\r\n",
        b"GET /livez HTTP/1.1\r\n" + HOST + b"X: a\x00b\r\n\r\n",
        b"GET /livez HTTP/1.1\r\n" + HOST + b"no colon\r\n\r\n",
        b"BREW /livez HTTP/1.1\r\n" + HOST + b"\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"\x00" * 100,
    ],
)
async def test_what_is_no_valid_request_is_400(http: HttpRack, request_bytes: bytes) -> None:
    assert await refusal(http, request_bytes) == (400, "ERR_INVALID_REQUEST")


@pytest.mark.parametrize(
    "headers",
    [
        b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n",
        b"Transfer-Encoding: chunked\r\nContent-Length: 3\r\n",
        b"Transfer-Encoding: gzip, chunked\r\n",
        b"Transfer-Encoding: chunked, chunked\r\n",
        b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n",
        b"Transfer-Encoding: xchunked\r\n",
        b"Transfer-Encoding:\x0bchunked\r\n",
        b"Content-Length: 3\r\nContent-Length: 4\r\n",
        b"Content-Length: 3, 3\r\n",
        b"Content-Length: +3\r\n",
        b"Content-Length: -3\r\n",
        b"Content-Length: 0x3\r\n",
        b"Content-Length: 99999999999999999999999\r\n",
    ],
)
async def test_a_body_with_two_readings_is_refused_and_the_connection_closed(http: HttpRack, headers: bytes) -> None:
    request = b"POST /api/models/search HTTP/1.1\r\n" + HOST + headers + b"\r\n" + b"0\r\n\r\n" + GET + b"\r\n"
    reply = await http.raw(request)
    status, _, body = split(reply)
    assert (status, reply.count(b"HTTP/1.1 ")) == (400, 1)
    assert b'"status":"ok"' not in body


async def test_a_chunked_body_with_http_1_0_is_400(http: HttpRack) -> None:
    request = b"POST /api/models/search HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n"
    assert await refusal(http, request) == (400, "ERR_INVALID_REQUEST")


async def test_a_target_that_is_too_long_is_414(http: HttpRack) -> None:
    for target in (b"/" + b"a" * 9000, b"/api/models?cursor=" + b"a" * 9000, b"/" + b"%41" * 100_000):
        assert await refusal(http, b"GET " + target + b" HTTP/1.1\r\n" + HOST + b"\r\n") == (414, "ERR_INVALID_REQUEST")


async def test_headers_that_are_too_long_or_too_many_are_431_and_the_reply_arrives(http: HttpRack) -> None:
    for headers in (
        b"X: " + b"a" * 9000 + b"\r\n",
        b"X" * 9000 + b": a\r\n",
        b"X: " + b"a" * 2_000_000 + b"\r\n",
        b"".join(b"X-%d: y\r\n" % n for n in range(10_000)),
    ):
        assert await refusal(http, GET + headers + b"\r\n") == (431, "ERR_INVALID_REQUEST")


async def test_the_absolute_form_is_served_by_its_path(http: HttpRack) -> None:
    reply = await http.raw(b"GET http://localhost/livez HTTP/1.1\r\n" + HOST + CLOSE + b"\r\n")
    assert split(reply)[0] == 200


async def test_a_tunnel_and_the_asterisk_are_no_routes(http: HttpRack) -> None:
    for line in (b"CONNECT localhost:80 HTTP/1.1\r\n", b"OPTIONS * HTTP/1.1\r\n"):
        status, code = await refusal(http, line + HOST + CLOSE + b"\r\n")
        assert (status, code) in ((400, "ERR_INVALID_REQUEST"), (404, "ERR_UNKNOWN_METHOD"))


async def test_an_offer_to_upgrade_is_ignored(http: HttpRack) -> None:
    for protocol in (b"websocket", b"h2c", b"tcp"):
        reply = await http.raw(
            GET + b"Connection: Upgrade\r\nUpgrade: " + protocol + b"\r\n\r\n", GET + CLOSE + b"\r\n"
        )
        assert reply.count(b"HTTP/1.1 200 OK") == 2


async def test_pipelined_requests_are_answered_in_their_order(http: HttpRack) -> None:
    paths = [b"/livez", b"/version", b"/nowhere", b"/health"] * 20
    request = b"".join(b"GET " + path + b" HTTP/1.1\r\n" + HOST + b"\r\n" for path in paths)
    reply = await http.raw(request + GET + CLOSE + b"\r\n")
    statuses = [part.split(b" ")[1] for part in reply.split(b"HTTP/1.1")[1:]]
    assert statuses == [b"200", b"200", b"404", b"200"] * 20 + [b"200"]


async def test_the_connection_goes_on_after_a_coded_error(http: HttpRack) -> None:
    reply = await http.raw(b"GET /nowhere HTTP/1.1\r\n" + HOST + b"\r\n", GET + CLOSE + b"\r\n")
    assert (b" 404 " in reply, reply.count(b"HTTP/1.1 ")) == (True, 2)


# --- time ------------------------------------------------------------------------------------------------------------


async def test_headers_that_trickle_are_408(tmp_path: Path) -> None:
    async with http_rack(tmp_path, header_timeout_s=0.4) as http:
        started = time.monotonic()
        status, headers, body = split(await http.raw(GET, *[b"X-%d: y\r\n" % n for n in range(10)], pause_s=0.03))
        assert (status, code_in(body), headers["connection"]) == (408, "ERR_INVALID_REQUEST", "close")
        assert time.monotonic() - started >= 0.4


async def test_a_connection_that_says_nothing_is_closed_without_a_word(tmp_path: Path) -> None:
    async with http_rack(tmp_path, header_timeout_s=0.2) as http:
        assert await http.raw() == b""


async def test_an_idle_connection_is_closed_and_one_in_use_is_not(tmp_path: Path) -> None:
    async with http_rack(tmp_path, header_timeout_s=0.2, idle_timeout_s=0.6) as http:
        reader, writer = await http.connect()
        for _ in range(4):
            writer.write(GET + b"\r\n")
            assert (await reader.readuntil(b'"ok"}')).startswith(b"HTTP/1.1 200")
            # Longer than headers may take: their clock begins with their first byte.
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.3):
                    await reader.read(1)
        async with asyncio.timeout(5):
            assert await reader.read() == b""
        writer.close()


async def test_many_slow_connections_keep_nobody_waiting(tmp_path: Path) -> None:
    async with http_rack(tmp_path, header_timeout_s=1.0) as http:
        slow = [await http.connect() for _ in range(200)]
        for _, writer in slow:
            writer.write(b"GET /livez HTTP/1.1\r\nX-")
        assert (await http.send("GET", "/livez")).status == 200
        async with asyncio.timeout(10):
            replies = [await reader.read() for reader, _ in slow]
        assert {split(reply)[0] for reply in replies} == {408}
        for _, writer in slow:
            writer.close()


async def test_refusals_are_counted(http: HttpRack) -> None:
    await http.raw(b"nonsense\r\n\r\n")
    assert http.seen.requests == [("none", "", 400)]


async def test_endless_pipelining_by_a_client_that_reads_nothing_is_bounded(http: HttpRack) -> None:
    process = psutil.Process()
    before = process.memory_info().rss
    _, writer = await http.connect()
    request = (b"GET /openapi.json HTTP/1.1\r\n" + HOST + b"\r\n") * 1000
    for _ in range(300):
        writer.write(request)
        try:
            async with asyncio.timeout(0.05):
                await writer.drain()
        except TimeoutError:
            break
    assert (await http.send("GET", "/livez")).status == 200
    assert process.memory_info().rss - before < 64 * 1024 * 1024
    writer.transport.abort()
    await eventually(lambda: len(asyncio.all_tasks()) < 10)
