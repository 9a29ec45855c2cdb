"""Bytes going up: a version of one file in one request."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import os
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest

from tests.http_rack import HttpRack, blob_files, code_in, eventually, http_rack, open_files, sha256, split

DATA = bytes(range(256)) * 1000
PATH = "/api/models/m/versions/1/content"
HEAD = b"PUT " + PATH.encode() + b"?type=custom HTTP/1.1\r\nHost: localhost\r\n"


@pytest.fixture
async def http(tmp_path: Path) -> AsyncIterator[HttpRack]:
    async with http_rack(tmp_path, max_model_size=10_000_000) as made:
        yield made


def digest_of(data: bytes) -> str:
    return f"sha-256=:{base64.b64encode(hashlib.sha256(data).digest()).decode()}:"


async def chunked(data: bytes, size: int = 10_000) -> AsyncIterator[bytes]:
    for start in range(0, len(data), size):
        yield data[start : start + size]


async def test_a_body_with_its_length_is_stored(http: HttpRack) -> None:
    query = "type=custom&filename=dir/f.bin&description=of+one%0Afile&tag=a&tag=b%20c"
    answer = await http.put("org/m", "1.0+x", DATA, query)
    assert (answer.status, answer.headers["Location"]) == (201, "/api/models/org/m/versions/1.0%2Bx")
    assert (answer.json["checksum"], answer.json["size"]) == (f"sha256:{sha256(DATA)}", len(DATA))
    assert [file["path"] for file in answer.json["files"]] == ["dir/f.bin"]
    metadata = (await http.send("GET", answer.headers["Location"])).json["metadata"]
    assert (metadata["description"], metadata["tags"]) == ("of one\nfile", ["a", "b c"])


async def test_a_chunked_body_is_stored_and_its_file_named_after_the_type(http: HttpRack) -> None:
    answer = await http.send("PUT", f"{PATH}?type=custom", data=chunked(DATA))
    assert (answer.status, answer.json["checksum"]) == (201, f"sha256:{sha256(DATA)}")
    assert [file["path"] for file in answer.json["files"]] == ["model.custom"]
    assert (await http.send("GET", PATH)).body == DATA


async def test_the_same_again_is_200_and_other_bytes_are_409(http: HttpRack) -> None:
    assert (await http.put("m", "1", DATA)).status == 201
    again = await http.put("m", "1", DATA)
    assert (again.status, again.json["created"]) == (200, False)
    other = await http.put("m", "1", b"other")
    assert (other.status, other.code) == (409, "ERR_MODEL_ALREADY_EXISTS")


async def test_an_empty_body_with_length_zero_is_a_file_of_no_bytes(http: HttpRack) -> None:
    status, _, _ = split(await http.raw(HEAD + b"Content-Length: 0\r\nConnection: close\r\n\r\n"))
    assert status == 201


async def test_a_declared_digest_is_checked(http: HttpRack) -> None:
    good = await http.put("m", "1", DATA, headers={"Repr-Digest": digest_of(DATA)})
    assert good.status == 201
    bad = await http.put("m", "2", DATA, headers={"Repr-Digest": digest_of(b"other")})
    assert (bad.status, bad.code) == (422, "ERR_CHECKSUM_MISMATCH")
    assert (await http.send("GET", "/api/models/m/versions/2")).status == 404
    malformed = await http.put("m", "2", DATA, headers={"Repr-Digest": "sha-256=abc"})
    assert (malformed.status, malformed.code) == (400, "ERR_INVALID_REQUEST")


@pytest.mark.parametrize(
    ("query", "status", "code"),
    [
        ("", 400, "ERR_INVALID_METADATA"),
        ("type=", 400, "ERR_INVALID_METADATA"),
        ("type=A", 400, "ERR_INVALID_METADATA"),
        ("type=custom&type=custom", 400, "ERR_INVALID_REQUEST"),
        ("type=custom&filename=../x", 400, "ERR_INVALID_REQUEST"),
        ("type=custom&filename=", 400, "ERR_INVALID_REQUEST"),
        ("type=custom&tag=a&tag=a", 400, "ERR_INVALID_METADATA"),
        ("type=custom&tag=", 400, "ERR_INVALID_METADATA"),
        ("type=custom&" + "&".join(f"tag={n}" for n in range(65)), 400, "ERR_INVALID_METADATA"),
        ("type=custom&version=2", 400, "ERR_INVALID_REQUEST"),
        ("type=custom&token=x", 400, "ERR_INVALID_REQUEST"),
        ("type=unheard-of", 415, "ERR_UNSUPPORTED_FORMAT"),
    ],
)
async def test_wrong_parameters_are_refused(http: HttpRack, query: str, status: int, code: str) -> None:
    answer = await http.put("m", "1", DATA, query)
    assert (answer.status, answer.code) == (status, code)
    assert blob_files(http.rack) == 0


@pytest.mark.parametrize("version", ["latest", "..", "a%2Fb%2Fc", "%2e%2e", "x" * 65])
async def test_a_version_outside_the_grammar_is_refused(http: HttpRack, version: str) -> None:
    answer = await http.put("m", version, DATA)
    assert answer.status in (400, 404, 405)
    assert answer.code in ("ERR_INVALID_REQUEST", "ERR_UNKNOWN_METHOD")


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Content-Type": "multipart/form-data; boundary=x"}, 415),
        ({"Content-Type": "Multipart/Mixed"}, 415),
        ({"Content-Encoding": "gzip"}, 415),
        ({"Content-Range": "bytes 0-1/2"}, 400),
    ],
)
async def test_forms_encodings_and_parts_are_refused(http: HttpRack, headers: dict[str, str], status: int) -> None:
    answer = await http.put("m", "1", DATA, headers=headers)
    assert (answer.status, answer.code) == (status, "ERR_INVALID_REQUEST")


async def test_a_body_of_unknown_length_that_is_not_chunked_is_411(http: HttpRack) -> None:
    status, _, body = split(await http.raw(HEAD + b"Connection: close\r\n\r\n"))
    assert (status, code_in(body)) == (411, "ERR_INVALID_REQUEST")


async def test_too_large_is_told_by_the_length_alone_and_the_reply_arrives(http: HttpRack) -> None:
    reply = await http.raw(HEAD + b"Content-Length: 10000001\r\n\r\n", b"x" * 5_000_000, b"x" * 5_000_000)
    status, headers, body = split(reply)
    assert (status, code_in(body), headers["connection"]) == (413, "ERR_MODEL_TOO_LARGE", "close")
    assert blob_files(http.rack) == 0


async def test_too_large_without_a_length_is_found_out_on_the_way(http: HttpRack) -> None:
    answer = await http.send("PUT", f"{PATH}?type=custom", data=chunked(bytes(10_500_000), 500_000))
    assert (answer.status, answer.code) == (413, "ERR_MODEL_TOO_LARGE")
    await eventually(lambda: blob_files(http.rack) == 0)


# --- 100-continue ----------------------------------------------------------------------------------------------------


async def test_the_body_is_asked_for_once_the_headers_are_good(http: HttpRack) -> None:
    reader, writer = await http.connect()
    writer.write(HEAD + b"Content-Length: 5\r\nExpect: 100-continue\r\n\r\n")
    assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
    writer.write(b"12345")
    assert (await reader.readline()).startswith(b"HTTP/1.1 201 ")
    writer.close()


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        (b"Content-Length: 10000001\r\n", 413),
        (b"Content-Length: 5\r\nContent-Type: multipart/form-data\r\n", 415),
        (b"Content-Length: 5\r\nRepr-Digest: x\r\n", 400),
        (b"Content-Length: 5\r\nIdempotency-Key: \x7f\r\n", 400),
    ],
)
async def test_the_body_is_never_asked_for_when_the_headers_are_not(
    http: HttpRack, headers: bytes, status: int
) -> None:
    reply = await http.raw(HEAD + headers + b"Expect: 100-continue\r\n\r\n")
    assert split(reply)[0] == status


async def test_the_service_decides_before_the_body_is_asked_for(http: HttpRack) -> None:
    head = HEAD.replace(b"type=custom", b"type=unheard-of")
    reply = await http.raw(head + b"Content-Length: 5\r\nExpect: 100-continue\r\n\r\n")
    assert split(reply)[0] == 415


async def test_an_expectation_that_cannot_be_met_is_417(http: HttpRack) -> None:
    status, _, body = split(await http.raw(HEAD + b"Content-Length: 5\r\nExpect: magic\r\n\r\n"))
    assert (status, code_in(body)) == (417, "ERR_INVALID_REQUEST")


# --- bodies that do not come as they should --------------------------------------------------------------------------


async def test_a_body_that_stops_is_408_and_leaves_nothing(tmp_path: Path) -> None:
    async with http_rack(tmp_path, idle_timeout_s=0.3) as http:
        reply = await http.raw(HEAD + b"Content-Length: 1000\r\n\r\n" + b"x" * 10)
        status, headers, body = split(reply)
        assert (status, code_in(body), headers["connection"]) == (408, "ERR_INVALID_REQUEST", "close")
        assert blob_files(http.rack) == 0


async def test_a_body_that_trickles_is_408(tmp_path: Path) -> None:
    async with http_rack(tmp_path, idle_timeout_s=0.5) as http:
        reply = await http.raw(HEAD + b"Content-Length: 1000\r\n\r\n", *[b"x"] * 15, pause_s=0.05)
        assert split(reply)[0] == 408


@pytest.mark.parametrize("garbage", [b"zz\r\nabc", b"f" * 20 + b"\r\nabc", b"-1\r\n\r\n", b"3\r\nabcdef\r\n"])
async def test_chunks_that_are_malformed_are_400_also_when_they_come_late(http: HttpRack, garbage: bytes) -> None:
    chunked_head = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
    for parts in ((chunked_head + garbage,), (chunked_head, garbage), (chunked_head + b"3\r\nabc\r\n", garbage)):
        status, headers, body = split(await http.raw(*parts))
        assert (status, code_in(body), headers["connection"]) == (400, "ERR_INVALID_REQUEST", "close")
    assert blob_files(http.rack) == 0


async def test_a_client_that_leaves_in_the_middle_leaves_nothing_behind(http: HttpRack) -> None:
    await http.send("GET", "/livez")
    tasks, files = len(asyncio.all_tasks()), open_files()
    for length in (b"Content-Length: 9000000", b"Transfer-Encoding: chunked"):
        for _ in range(10):
            _, writer = await http.connect()
            writer.write(HEAD + length + b"\r\n\r\n" + b"10000\r\n" + bytes(65_536))
            await writer.drain()
            writer.transport.abort()
    await eventually(lambda: len(http.seen.requests) == 21)
    await eventually(lambda: len(asyncio.all_tasks()) <= tasks and open_files() <= files)
    assert blob_files(http.rack) == 0
    assert (await http.put("m", "1", DATA)).status == 201


async def test_an_upload_does_not_stay_in_memory(tmp_path: Path) -> None:
    size = 192 * 1024 * 1024
    block = os.urandom(1024 * 1024)

    async def body() -> AsyncIterator[bytes]:
        for _ in range(size // len(block)):
            yield block

    async with http_rack(tmp_path) as http:
        process = psutil.Process()
        before, worst = process.memory_info().rss, 0

        async def watch() -> None:
            nonlocal worst
            while True:
                worst = max(worst, process.memory_info().rss - before)
                await asyncio.sleep(0.01)

        watching = asyncio.create_task(watch())
        answer = await http.send("PUT", f"{PATH}?type=custom", data=body())
        watching.cancel()
        assert (answer.status, answer.json["size"]) == (201, size)
        assert 0 < worst < 64 * 1024 * 1024
