"""The bytes of a model over HTTP: in whole, in part, conditionally, from a file and from a stream."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from schemas.errors import ModelManagerError
from tests.http_rack import HttpRack, eventually, http_rack, open_files, sha256, split
from worker.content import Content, LocalFile, OpenedFile, Redirect, Stream

DATA = bytes(range(256)) * 1000  # more than what is read at once
PATH = "/api/models/m/versions/1/content"
ETAG = f'"{sha256(DATA)}"'
GIB = 1024**3


@pytest.fixture
async def http(tmp_path: Path) -> AsyncIterator[HttpRack]:
    async with http_rack(tmp_path) as made:
        assert (await made.put("m", "1", DATA, "type=custom&filename=dir/m%C3%BC.bin")).status == 201
        yield made


def serve(http: HttpRack, content: Content, size: int, digest: str = "0" * 64) -> None:
    """Let the service answer every file with `content`."""

    async def open_file(model_id: str, ref: str, path: str | None, *, redirect: bool = False) -> OpenedFile:
        return OpenedFile(path or "big.bin", size, digest, "application/octet-stream", content, "1")

    http.rack.service.open_file = open_file  # type: ignore[method-assign]


# --- the whole -------------------------------------------------------------------------------------------------------


async def test_a_file_comes_with_what_identifies_it(http: HttpRack) -> None:
    answer = await http.send("GET", PATH)
    assert (answer.status, answer.body) == (200, DATA)
    digest = base64.b64encode(hashlib.sha256(DATA).digest()).decode()
    expected = {
        "ETag": ETAG,
        "Repr-Digest": f"sha-256=:{digest}:",
        "Content-Length": str(len(DATA)),
        "Content-Type": "application/octet-stream",
        "Content-Disposition": "attachment; filename=\"m_.bin\"; filename*=UTF-8''m%C3%BC.bin",
        "Content-Location": "/api/models/m/versions/1/files/dir/m%C3%BC.bin",
        "Accept-Ranges": "bytes",
    }
    assert {name: answer.headers[name] for name in expected} == expected
    assert (await http.send("GET", answer.headers["Content-Location"])).body == DATA


async def test_a_label_leads_to_the_address_of_the_version_it_means(http: HttpRack) -> None:
    answer = await http.send("GET", "/api/models/m/versions/latest/content")
    assert answer.headers["Content-Location"] == "/api/models/m/versions/1/files/dir/m%C3%BC.bin"


async def test_bytes_are_never_compressed(http: HttpRack) -> None:
    answer = await http.send("GET", PATH, headers={"Accept-Encoding": "gzip, br, zstd, *"})
    assert "Content-Encoding" not in answer.headers
    assert answer.body == DATA


async def test_head_has_the_headers_of_the_whole_also_when_a_range_is_asked_for(http: HttpRack) -> None:
    for headers in ({}, {"Range": "bytes=0-0"}, {"Range": "bytes=999999999-"}):
        answer = await http.send("HEAD", PATH, headers=headers)
        assert (answer.status, answer.body, answer.headers["Content-Length"]) == (200, b"", str(len(DATA)))
        assert answer.headers["ETag"] == ETAG


@pytest.mark.parametrize("size", [0, 1, 65_535, 65_536, 65_537, 2 * 1024 * 1024 + 1])
async def test_every_size_arrives_whole_and_the_connection_is_used_again(http: HttpRack, size: int) -> None:
    data = os.urandom(size)
    await http.put("sized", "1", data)
    path = "/api/models/sized/versions/1/content"
    request = b"GET " + path.encode() + b" HTTP/1.1\r\nHost: localhost\r\n"
    reply = await http.raw(request + b"\r\n" + request + b"Connection: close\r\n\r\n")
    status, _, rest = split(reply)
    assert (status, rest[:size]) == (200, data)
    status, headers, rest = split(rest[size:])
    assert (status, rest, headers["connection"]) == (200, data, "close")


async def test_http_1_0_gets_the_bytes_and_the_end_of_the_connection(http: HttpRack) -> None:
    status, _, body = split(await http.raw(b"GET " + PATH.encode() + b" HTTP/1.0\r\n\r\n"))
    assert (status, body) == (200, DATA)


# --- parts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("header", "start", "end"),
    [
        ("bytes=0-0", 0, 1),
        ("bytes=-1", len(DATA) - 1, len(DATA)),
        ("bytes=5-", 5, len(DATA)),
        ("bytes=100-199", 100, 200),
        ("bytes=10-99999999999999999999999999", 10, len(DATA)),
        ("bytes=-99999999999999999999999999", 0, len(DATA)),
    ],
)
async def test_one_range_is_206(http: HttpRack, header: str, start: int, end: int) -> None:
    answer = await http.send("GET", PATH, headers={"Range": header})
    assert (answer.status, answer.body) == (206, DATA[start:end])
    assert answer.headers["Content-Range"] == f"bytes {start}-{end - 1}/{len(DATA)}"
    assert answer.headers["Content-Length"] == str(end - start)
    assert answer.headers["ETag"] == ETAG


@pytest.mark.parametrize(
    "header", ["bytes=0-0,2-3", "bytes=3-1", "items=0-1", "bytes=x", "bytes=0-0,1-1" + ",2-2" * 900]
)
async def test_several_ranges_and_what_is_not_understood_get_the_whole(http: HttpRack, header: str) -> None:
    answer = await http.send("GET", PATH, headers={"Range": header})
    assert (answer.status, answer.body, "Content-Range" in answer.headers) == (200, DATA, False)


@pytest.mark.parametrize("header", ["bytes=-0", f"bytes={len(DATA)}-", "bytes=99999999999999999999999999-"])
async def test_a_range_beyond_the_file_is_416_with_its_size(http: HttpRack, header: str) -> None:
    answer = await http.send("GET", PATH, headers={"Range": header})
    assert (answer.status, answer.code) == (416, "ERR_INVALID_REQUEST")
    assert answer.headers["Content-Range"] == f"bytes */{len(DATA)}"


async def test_if_range_decides_whether_the_range_counts(http: HttpRack) -> None:
    for tag, status in ((ETAG, 206), (f"W/{ETAG}", 200), ('"x"', 200), ("Tue, 24 Nov 2026 02:57:00 GMT", 200)):
        answer = await http.send("GET", PATH, headers={"Range": "bytes=0-9", "If-Range": tag})
        assert answer.status == status


async def test_who_has_the_bytes_gets_304_without_them(http: HttpRack) -> None:
    for verb in ("GET", "HEAD"):
        for tags in (ETAG, f'"x", W/{ETAG}', "*"):
            answer = await http.send(verb, PATH, headers={"If-None-Match": tags, "Range": "bytes=0-1"})
            assert (answer.status, answer.body, answer.headers["ETag"]) == (304, b"", ETAG)
    assert (await http.send("GET", PATH, headers={"If-None-Match": '"x"'})).status == 200
    assert (await http.send("GET", PATH, headers={"If-None-Match": "x"})).status == 400


async def test_if_match_for_other_bytes_is_412(http: HttpRack) -> None:
    assert (await http.send("GET", PATH, headers={"If-Match": ETAG})).status == 200
    answer = await http.send("GET", PATH, headers={"If-Match": '"x"'})
    assert (answer.status, answer.code) == (412, "ERR_CONFLICT")


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [
        "../../etc/passwd",
        "%2e%2e/%2e%2e/etc/passwd",
        "a%2F..%2F..%2Fb",
        "/etc/passwd",
        "%2Fetc%2Fpasswd",
        "a//b",
        ".",
        "a/./b",
        "a%5C..%5Cb",
        "%00",
        "a%00.bin",
        "a%0d%0aX:%20y",
        "%ff",
        "%c0%ae%c0%ae/x",
        "x" * 513,
    ],
)
async def test_no_path_leads_out_of_the_version(http: HttpRack, path: str) -> None:
    answer = await http.send("GET", f"/api/models/m/versions/1/files/{path}")
    assert (answer.status, answer.code) == (400, "ERR_INVALID_REQUEST")


async def test_a_file_that_the_version_does_not_have_is_404(http: HttpRack) -> None:
    answer = await http.send("GET", "/api/models/m/versions/1/files/other.bin")
    assert (answer.status, answer.code) == (404, "ERR_NOT_FOUND")


@pytest.mark.parametrize(
    "query", ["redirect=2", "redirect=", "redirect=true", "x=1", "token=secret", "redirect=1&redirect=1"]
)
async def test_a_wrong_parameter_is_400(http: HttpRack, query: str) -> None:
    assert (await http.send("GET", f"{PATH}?{query}")).status == 400


async def test_redirect_on_a_disk_rack_sends_the_bytes(http: HttpRack) -> None:
    assert (await http.send("GET", f"{PATH}?redirect=1")).body == DATA


async def test_redirect_leads_to_where_the_store_has_the_bytes(http: HttpRack) -> None:
    serve(http, Redirect("http://store/x?signature=1"), 5)
    answer = await http.send("GET", f"{PATH}?redirect=1")
    assert (answer.status, answer.headers["Location"], answer.body) == (307, "http://store/x?signature=1", b"")
    assert answer.headers["Cache-Control"] == "no-store"


# --- streams ---------------------------------------------------------------------------------------------------------


async def test_a_stream_is_asked_for_the_range_only(http: HttpRack) -> None:
    asked = []

    async def read(start: int, length: int) -> AsyncIterator[bytes]:
        asked.append((start, length))
        for at in range(start, start + length, 1000):
            yield DATA[at : min(at + 1000, start + length)]

    serve(http, Stream(read), len(DATA))
    assert (await http.send("GET", PATH)).body == DATA
    assert (await http.send("GET", PATH, headers={"Range": "bytes=5-3004"})).body == DATA[5:3005]
    assert (await http.send("HEAD", PATH)).status == 200
    assert asked == [(0, len(DATA)), (5, 3000)]


async def test_a_storage_that_fails_at_once_is_a_coded_error(http: HttpRack) -> None:
    async def read(start: int, length: int) -> AsyncIterator[bytes]:
        if length:
            raise ModelManagerError("ERR_STORAGE_UNAVAILABLE")
        yield b""

    serve(http, Stream(read), 10)
    answer = await http.send("GET", PATH)
    assert (answer.status, answer.code, answer.headers["Retry-After"]) == (503, "ERR_STORAGE_UNAVAILABLE", "1")


@pytest.mark.parametrize("failure", [ModelManagerError("ERR_STORAGE_UNAVAILABLE"), ValueError("x"), None])
async def test_a_storage_that_fails_or_ends_in_the_middle_cuts_the_connection(
    http: HttpRack, failure: Exception | None
) -> None:
    async def read(start: int, length: int) -> AsyncIterator[bytes]:
        yield b"x" * 1000
        if failure is not None:
            raise failure

    serve(http, Stream(read), 2000)
    reader, writer = await http.connect()
    writer.write(b"GET " + PATH.encode() + b" HTTP/1.1\r\nHost: localhost\r\n\r\n")
    received = b""
    with pytest.raises((ConnectionResetError, EOFError)):
        while True:
            part = await reader.read(65_536)
            if not part:
                raise EOFError
            received += part
    writer.close()
    assert b"Content-Length: 2000" in received
    assert len(received.partition(b"\r\n\r\n")[2]) <= 1000


async def test_a_stream_waits_for_a_slow_client(http: HttpRack) -> None:
    given = 0

    async def read(start: int, length: int) -> AsyncIterator[bytes]:
        nonlocal given
        while given < length:
            given += 1024 * 1024
            yield bytes(1024 * 1024)

    serve(http, Stream(read), GIB)
    reader, writer = await http.connect()
    writer.write(b"GET " + PATH.encode() + b" HTTP/1.1\r\nHost: localhost\r\n\r\n")
    await reader.readuntil(b"\r\n\r\n")
    await settled(lambda: given)
    assert given < 64 * 1024 * 1024
    writer.transport.abort()


async def settled(value: Any) -> None:
    """Wait until `value()` has not changed for a moment."""
    before = None
    while before != (before := value()):
        for _ in range(20):
            await asyncio.sleep(0.005)


# --- files that are not as they should be ----------------------------------------------------------------------------


async def test_a_file_that_is_gone_shorter_or_no_file_is_refused_before_any_byte(
    http: HttpRack, tmp_path: Path
) -> None:
    (tmp_path / "short").write_bytes(b"abc")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "short")
    for name, size in (("gone", 3), ("short", 4), ("folder", 3), ("link", 3)):
        serve(http, LocalFile(tmp_path / name), size)
        answer = await http.send("GET", PATH)
        assert (answer.status, answer.code) == (422, "ERR_CHECKSUM_MISMATCH")


async def test_a_file_that_is_cut_while_it_is_sent_cuts_the_connection(http: HttpRack, tmp_path: Path) -> None:
    file = tmp_path / "big"
    with file.open("wb") as opened:
        opened.truncate(GIB)
    serve(http, LocalFile(file), GIB)
    reader, writer = await http.connect()
    writer.write(b"GET " + PATH.encode() + b" HTTP/1.1\r\nHost: localhost\r\n\r\n")
    await reader.readuntil(b"\r\n\r\n")
    os.truncate(file, 1024)
    total = 0
    with pytest.raises((ConnectionResetError, EOFError)):
        while part := await reader.read(1024 * 1024):
            total += len(part)
        raise EOFError
    assert total < GIB
    writer.close()


# --- large ones ------------------------------------------------------------------------------------------------------


async def test_a_gibibyte_goes_out_in_bounded_memory(http: HttpRack, tmp_path: Path) -> None:
    file = tmp_path / "sparse"
    with file.open("wb") as opened:
        opened.truncate(GIB)
    serve(http, LocalFile(file), GIB)
    process = psutil.Process()
    before = process.memory_info().rss
    worst = received = 0
    async with http.session.get(http.url + PATH) as response:
        async for part in response.content.iter_chunked(1024 * 1024):
            received += len(part)
            if received % (64 * 1024 * 1024) < 1024 * 1024:
                worst = max(worst, process.memory_info().rss)
    assert received == GIB
    assert worst - before < 64 * 1024 * 1024
    await eventually(lambda: http.seen.bytes["out"] >= GIB)


async def test_where_sendfile_cannot_be_used_the_file_is_read(http: HttpRack, monkeypatch: pytest.MonkeyPatch) -> None:
    async def none(*_: Any, **__: Any) -> int:
        raise asyncio.SendfileNotAvailableError

    monkeypatch.setattr(asyncio.get_running_loop(), "sendfile", none)
    assert (await http.send("GET", PATH, headers={"Range": "bytes=7-200006"})).body == DATA[7:200_007]


async def test_a_client_that_leaves_in_the_middle_leaves_nothing_behind(http: HttpRack, tmp_path: Path) -> None:
    file = tmp_path / "sparse"
    with file.open("wb") as opened:
        opened.truncate(GIB)
    serve(http, LocalFile(file), GIB)
    await http.send("GET", "/livez")
    tasks, files = len(asyncio.all_tasks()), open_files()
    for _ in range(20):
        reader, writer = await http.connect()
        writer.write(b"GET " + PATH.encode() + b" HTTP/1.1\r\nHost: localhost\r\n\r\n")
        await reader.readexactly(100_000)
        writer.transport.abort()
    await eventually(lambda: len(asyncio.all_tasks()) <= tasks and open_files() <= files)
    assert len([seen for seen in http.seen.requests if seen[2] == 200 and "content" in seen[0]]) >= 20


async def test_a_client_that_reads_nothing_is_given_up(tmp_path: Path) -> None:
    async with http_rack(tmp_path, idle_timeout_s=0.3) as http:
        file = tmp_path / "sparse"
        with file.open("wb") as opened:
            opened.truncate(GIB)
        serve(http, LocalFile(file), GIB)
        files = open_files()
        _, writer = await http.connect()
        writer.write(b"GET " + PATH.encode() + b" HTTP/1.1\r\nHost: localhost\r\n\r\n")
        await eventually(lambda: any("content" in seen[0] for seen in http.seen.requests))
        await eventually(lambda: open_files() <= files + 1)
        writer.close()


async def test_a_transfer_takes_no_place_in_the_lane_of_lookups(http: HttpRack, tmp_path: Path) -> None:
    file = tmp_path / "sparse"
    with file.open("wb") as opened:
        opened.truncate(GIB)
    serve(http, LocalFile(file), GIB)
    writers = []
    for _ in range(80):
        reader, writer = await http.connect()
        writer.write(b"GET " + PATH.encode() + b" HTTP/1.1\r\nHost: localhost\r\n\r\n")
        await reader.readuntil(b"\r\n\r\n")
        writers.append(writer)
    assert (await http.send("GET", "/api/models/m")).status == 200
    for writer in writers:
        writer.transport.abort()
