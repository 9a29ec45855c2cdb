"""One connection: what aiohttp leaves open below the handlers.

It answers what is no valid request (aiohttp does so in plain text), ends headers that come too slowly, tells the reader
of a body that it broke (aiohttp lets it wait), and closes so that the last reply is not lost: a socket closed with
unread input is reset, and a reset may destroy what the client has not read yet.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

import structlog
from aiohttp import StreamReader, web
from aiohttp.http_exceptions import BadHttpMessage, LineTooLong
from aiohttp.web_protocol import _ErrInfo

from schemas.errors import ModelManagerError
from worker.transport.http_replies import HttpFault, error_reply, raw_error, status_of

_log = structlog.get_logger()

# The two limits differ, since aiohttp's error tells nothing but the limit.
TARGET_BYTES_MAX = 8000
FIELD_BYTES_MAX = 8192
HEADERS_MAX = 100
READ_BUFFER_BYTES = 256 * 1024
LINGER_S = 5.0


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """Seconds. `header_s`: from connect, or a request's first byte, to the end of its headers.

    `idle_s`: between requests. `linger_s`: for a client to read a refusal and close.
    """

    header_s: float
    idle_s: float
    linger_s: float = LINGER_S


class Connection(web.RequestHandler):
    """aiohttp's protocol of one connection, hardened. `refused` is told the status of each refusal made here.

    `taken`: it has no other request after this one, since the rest of a body was read past aiohttp.
    """

    def __init__(
        self,
        server: web.Server,
        *,
        loop: asyncio.AbstractEventLoop,
        limits: ConnectionLimits,
        refused: Callable[[int], None],
        **settings: Any,
    ) -> None:
        super().__init__(server, loop=loop, **settings)
        self._limits = limits
        self._refused = refused
        self._lost = asyncio.Event()
        self._late: asyncio.TimerHandle | None = None
        self._refusing: asyncio.Task[None] | None = None
        self._bytes_seen = False
        self._discarding = False
        self._body: StreamReader | None = None
        self.serving = False
        self.taken = False

    # --- what the transport calls ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            # A client that takes nothing any more cannot hold the socket with bytes it does not read.
            sock = transport.get_extra_info("socket")
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(self._limits.idle_s * 1000))
        self._expect_headers()

    def data_received(self, data: bytes) -> None:
        if self._discarding:
            return
        super().data_received(data)
        if self._body is not None:
            self._tell_broken_body(self._body)
        elif data and not self.serving:
            self._bytes_seen = True
            self._expect_headers()

    def connection_lost(self, exc: BaseException | None) -> None:
        self._lost.set()
        self._stop_clock()
        super().connection_lost(exc)

    # --- what the server calls ---

    @contextlib.contextmanager
    def request(self, request: web.BaseRequest) -> Iterator[None]:
        """While a request is served: no clock on headers, and an eye on its body."""
        self._stop_clock()
        self.serving, self._body = True, request.content
        try:
            yield
        finally:
            self.serving, self._body, self._bytes_seen = False, None, False

    async def refuse(self, error: ModelManagerError) -> None:
        """Answer with an error that no request goes with, and close."""
        if self.transport is not None and not self.transport.is_closing() and not self._discarding:
            self._refused(status_of(error))
            self.transport.write(raw_error(error))
            await self.linger()

    async def linger(self) -> None:
        """Close once the client has: take and drop what it still sends, for `linger_s` at most."""
        transport = self.transport
        self._stop_clock()
        if transport is None or transport.is_closing():
            return
        self._discarding = True
        transport.resume_reading()
        transport.write_eof()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._limits.linger_s):
                await self._lost.wait()
        self.force_close()

    def take_body(self, content: StreamReader) -> tuple[bytes, socket.socket]:
        """Leave the rest of a body, `content`, to the caller: what has come of it, and a socket to read on from.

        The parser does not see that rest, so no other request can follow on this connection (`taken`). ConnectionError
        if it is lost.
        """
        transport = self.transport
        if transport is None or transport.is_closing():
            raise ConnectionResetError("the connection is lost")
        # Nothing can come in meanwhile: when all that was received has been read, the socket has the rest.
        parts = []
        while part := content.read_nowait():
            parts.append(part)
        sock: socket.socket = transport.get_extra_info("socket").dup()
        transport.pause_reading()
        self.taken = self._discarding = True
        return b"".join(parts), sock

    def close_if_idle(self) -> None:
        """Close, unless a request is being served."""
        if not self.serving:
            self.force_close()

    def abort(self) -> None:
        """Close at once, so that the client sees that its reply is cut off."""
        if self.transport is not None:
            self.transport.abort()

    # --- headers that do not come ---

    def _expect_headers(self) -> None:
        if self._late is None:
            self._late = asyncio.get_running_loop().call_later(self._limits.header_s, self._headers_are_late)

    def _stop_clock(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _headers_are_late(self) -> None:
        self._late = None
        if self.serving:
            return
        if self._bytes_seen:
            fault = HttpFault(408, "The headers did not come in time.")
            self._refusing = asyncio.get_running_loop().create_task(self.refuse(fault))
        else:
            self.force_close()

    # --- what is no HTTP ---

    def _tell_broken_body(self, body: StreamReader) -> None:
        """aiohttp queues the parser's error behind the request, whose reader would wait for ever."""
        if self._messages and isinstance(self._messages[-1][0], _ErrInfo) and not body.is_eof():
            body.set_exception(BadHttpMessage("The body is malformed."))

    def _make_error_handler(self, err_info: _ErrInfo) -> Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]:
        async def refused(request: web.BaseRequest) -> NoReturn:
            await self.refuse(_fault_of(err_info.exc))
            raise ConnectionResetError("not HTTP")

        return refused

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """The last resort, for what the server's own handler lets out: a lost connection, or a fault of ours."""
        if isinstance(exc, ConnectionError) or request.writer.output_size > 0:
            raise ConnectionResetError("the connection is lost") from exc
        _log.error("http_handler_failed", exc_info=exc)
        reply = error_reply(ModelManagerError("ERR_INTERNAL"))
        reply.force_close()
        return reply


def _fault_of(error: BaseException) -> HttpFault:
    """The parser's error without its text, which quotes the request."""
    if isinstance(error, LineTooLong):
        if TARGET_BYTES_MAX in error.args:
            return HttpFault(414, f"The request target is over {TARGET_BYTES_MAX} bytes.")
        return HttpFault(431, f"A header is over {FIELD_BYTES_MAX} bytes.")
    if "Too many headers" in str(error.args[:1]):
        return HttpFault(431, f"There are more than {HEADERS_MAX} headers.")
    return HttpFault(400, "This is not a valid HTTP request.")


class ConnectionServer(web.Server):
    """Makes a `Connection` for each client."""

    def __init__(
        self,
        handler: Callable[[web.BaseRequest], Awaitable[web.StreamResponse]],
        *,
        limits: ConnectionLimits,
        refused: Callable[[int], None],
    ) -> None:
        super().__init__(handler)
        self._limits = limits
        self._refused = refused

    def __call__(self) -> Connection:
        return Connection(
            self,
            loop=asyncio.get_running_loop(),
            limits=self._limits,
            refused=self._refused,
            keepalive_timeout=self._limits.idle_s,
            max_line_size=TARGET_BYTES_MAX,
            max_field_size=FIELD_BYTES_MAX,
            max_headers=HEADERS_MAX,
            read_bufsize=READ_BUFFER_BYTES,
            lingering_time=0,  # `Connection.linger` does that
            auto_decompress=False,  # a small request could become a big one
            access_log=None,
        )

    def close_idle(self) -> None:
        """Close the connections that serve no request now."""
        for connection in self.connections:
            if isinstance(connection, Connection):
                connection.close_if_idle()
