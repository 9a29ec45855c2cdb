"""The body of a request: asked for only when it is wanted, in batches, within bounds of size and time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager
from typing import Any, cast

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.web_protocol import RequestPayloadError

from schemas.wire import MAX_BODY_BYTES, is_json, parse_object
from worker.transport.http_connection import Connection
from worker.transport.http_intake import LEAST_BYTES, PIECE_BYTES, Intake, late, lost
from worker.transport.http_replies import CLOSE, HttpFault

# A batch must be full within the idle timeout, which is a lowest rate: 4 kB/s at 60 s.
BATCH_BYTES = LEAST_BYTES
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


class RequestBody:
    """Reads the body of `request`. A client that waits for `100 Continue` gets it at the first read, so a handler that
    refuses before it has read gets its refusal through without the bytes."""

    def __init__(self, request: web.BaseRequest, *, idle_s: float, received: Callable[[int], None]) -> None:
        self._request = request
        self._idle_s = idle_s
        self._received = received
        self._awaits_continue = _check_framing(request)

    @property
    def length(self) -> int | None:
        """Content-Length, or None for a chunked body."""
        return self._request.content_length

    @property
    def present(self) -> bool:
        return "Transfer-Encoding" in self._request.headers or bool(self.length)

    def refuse(self) -> None:
        """400 if there is a body though this route takes none."""
        if self.present:
            raise HttpFault(400, "This request takes no body.")

    def check_announced(self) -> None:
        """411 if nothing says how long the body is or that it is chunked."""
        if self.length is None and "Transfer-Encoding" not in self._request.headers:
            raise HttpFault(411, "Content-Length is needed, or a chunked body.")

    async def json_object(self) -> dict[str, Any]:
        """The JSON object of the body; an absent body is an empty object."""
        if not self.present:
            return {}
        content_type = self._request.headers.get("Content-Type")
        if content_type is not None and not is_json(content_type):
            raise HttpFault(415, "The body must be application/json in UTF-8.")
        return parse_object(await self._whole(MAX_BODY_BYTES))

    @asynccontextmanager
    async def stream(self) -> AsyncGenerator[AsyncIterator[bytes], None]:
        """The same as `chunks`, for bytes that may be many: those of a large body are taken past the event loop."""
        large = self.length is not None and self.length > PIECE_BYTES
        async with aclosing(self._taken() if large else self.chunks()) as chunks:
            yield chunks

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        """The bytes in order. A fault if they stop coming (408) or break off (400)."""
        self._ask()
        while batch := await self._batch():
            self._received(len(batch))
            yield batch

    async def _taken(self) -> AsyncGenerator[bytes, None]:
        content = self._request.content
        self._ask()
        with _faults():
            begun, sock = cast(Connection, self._request.protocol).take_body(content)
        intake = Intake(begun, (self.length or 0) - content.total_bytes, sock, idle_s=self._idle_s)
        async with aclosing(intake.pieces()) as pieces:
            async for piece in pieces:
                self._received(len(piece))
                yield piece
        content.feed_eof()  # the parser does not know: the connection is read from again, until it is closed

    async def _whole(self, limit: int) -> bytes:
        too_large = HttpFault(413, f"The body is over {limit} bytes.", maxBodySize=limit)
        if (self.length or 0) > limit:
            raise too_large
        body = bytearray()
        async for batch in self.chunks():
            body += batch
            if len(body) > limit:
                raise too_large
        return bytes(body)

    async def _batch(self) -> bytes:
        content = self._request.content
        parts: list[bytes] = []
        size = 0
        with _faults():
            async with asyncio.timeout(self._idle_s):
                while size < BATCH_BYTES and (part := await content.readany()):
                    parts.append(part)
                    size += len(part)
        return b"".join(parts)

    def _ask(self) -> None:
        transport = self._request.transport
        if self._awaits_continue and transport is not None and not self._request.content.total_raw_bytes:
            transport.write(_CONTINUE)
        self._awaits_continue = False


@contextmanager
def _faults() -> Iterator[None]:
    """What goes wrong with a body, as the client is told it."""
    try:
        yield
    except TimeoutError:
        raise late() from None
    except ConnectionError:
        raise lost() from None
    except (HttpProcessingError, RequestPayloadError):
        raise HttpFault(400, "The body is not framed as HTTP says.") from None


def _check_framing(request: web.BaseRequest) -> bool:
    """Refuse what would make the body mean something else to a proxy; whether the client waits for `100 Continue`."""
    headers = request.headers
    coding = headers.get("Transfer-Encoding")
    if coding is not None and (coding.strip().lower() != "chunked" or request.version < (1, 1)):
        raise HttpFault(400, "The only transfer coding is chunked, with HTTP/1.1.", headers=CLOSE)
    if "Content-Encoding" in headers:
        raise HttpFault(415, "The body must not be encoded.")
    expected = headers.get("Expect")
    if expected is None:
        return False
    if expected.strip().lower() != "100-continue":
        raise HttpFault(417, "The only expectation that can be met is 100-continue.")
    return request.version >= (1, 1)
