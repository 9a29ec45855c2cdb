"""A rack behind its HTTP server, an aiohttp client before it, raw sockets for what no client would send."""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import aiohttp
import psutil
from yarl import URL

from tests.rack import LocalRack
from worker.signing import SECRET_BYTES, UrlSigner
from worker.transport.http_server import HttpServer

PATIENCE_S = 10.0


@dataclass
class Seen:
    """An observer that remembers."""

    requests: list[tuple[str, str, int]] = field(default_factory=list)
    bytes: dict[str, int] = field(default_factory=lambda: {"in": 0, "out": 0})

    def answered(self, route: str, method: str, status: int, seconds: float) -> None:
        assert seconds >= 0
        self.requests.append((route, method, status))

    def moved(self, direction: str, count: int) -> None:
        self.bytes[direction] += count


@dataclass
class HttpRack:
    """What a test works with. `session` sends the address as it is written, and follows no redirect of its own."""

    rack: LocalRack
    server: HttpServer
    session: aiohttp.ClientSession
    signer: UrlSigner
    seen: Seen

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.port}"

    async def send(self, verb: str, path: str, **options: Any) -> Answer:
        """One request. `path` is sent byte for byte."""
        address = URL(self.url + path, encoded=True)
        async with self.session.request(verb, address, allow_redirects=False, **options) as response:
            return Answer(response.status, response.headers, await response.read())

    async def put(self, model: str, version: str, data: bytes, query: str = "type=custom", **options: Any) -> Answer:
        return await self.send("PUT", f"/api/models/{model}/versions/{version}/content?{query}", data=data, **options)

    async def raw(self, *parts: bytes, pause_s: float = 0.02) -> bytes:
        """What the server says to these bytes, sent with a short pause between the parts, until it closes."""
        reader, writer = await self.connect()
        try:
            for part in parts:
                writer.write(part)
                await asyncio.sleep(pause_s)
            async with asyncio.timeout(PATIENCE_S):
                return await reader.read()
        finally:
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self.server.port)


@dataclass(frozen=True)
class Answer:
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def code(self) -> str:
        """The code of an error, whose envelope is checked on the way."""
        return code_in(self.body)


def code_in(body: bytes) -> str:
    """The code in an error's body; the body has the one envelope that all errors have, and tells nothing of ours."""
    parsed = json.loads(body)
    assert parsed["success"] is False
    assert set(parsed["error"]) == {"code", "message", "retryable", "details"}
    for secret in ("Traceback", "aiohttp", ".py", str(Path.cwd()), gettempdir()):
        assert secret.encode() not in body
    return str(parsed["error"]["code"])


def split(reply: bytes) -> tuple[int, dict[str, str], bytes]:
    """The status, the headers (names in lower case) and the body of a raw reply."""
    head, _, body = reply.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines)
    return int(first.split(" ")[1]), headers, body


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


async def eventually(true: Callable[[], bool]) -> None:
    """Wait until `true()` is."""
    deadline = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < deadline, "it did not come true in time"
        await asyncio.sleep(0.01)


def open_files() -> int:
    """How many descriptors this process has open."""
    return int(psutil.Process().num_fds())


def blob_files(rack: LocalRack) -> int:
    """How many files the store holds, those included that no version has."""
    return sum(path.is_file() for path in (rack.folder / "models" / "blobs").rglob("*"))


@asynccontextmanager
async def http_rack(folder: Path, **changed: Any) -> AsyncIterator[HttpRack]:
    """A rack that serves HTTP. `changed` goes to the server (`token`, `port`, timeouts) or to the rack's policy."""
    names = ("token", "header_timeout_s", "idle_timeout_s", "port")
    settings: dict[str, Any] = {"token": None, "header_timeout_s": 5.0, "idle_timeout_s": 5.0, "port": 0}
    settings |= {name: changed.pop(name) for name in names if name in changed}
    rack = LocalRack(folder, **changed).open()
    signer, seen = UrlSigner(bytes(SECRET_BYTES)), Seen()
    server = HttpServer(
        host="127.0.0.1",
        dispatcher=rack.dispatcher,
        service=rack.service,
        readiness=rack.readiness,
        metrics=lambda: ("text/plain; version=0.0.4", b"model_manager_up 1\n"),
        version_info={"name": "wrk-model-manager", "version": "1.2.3", "revision": "abc"},
        signer=signer,
        openapi=b'{"openapi": "3.1.0"}\n',
        observe=seen,
        **settings,
    )
    rack.readiness.set("registry", True)
    await server.start()
    session = aiohttp.ClientSession(auto_decompress=False)
    try:
        yield HttpRack(rack, server, session, signer, seen)
    finally:
        await session.close()
        await server.stop(2.0)
        await rack.close()
