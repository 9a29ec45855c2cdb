"""The HTTP server: every route, the order of checks around each, and the life cycle.

It is aiohttp's low-level server with a router of our own: `{model}` may hold a slash, a target is decoded once and
never normalised, errors below the routes have the same envelope, and `100 Continue` is sent only when a handler wants
the body. None of that can be had from aiohttp's `Application`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, cast

import structlog
from aiohttp import web

from schemas.errors import ModelManagerError
from worker.readiness import Readiness
from worker.signing import UrlSigner
from worker.transport.http_access import Access
from worker.transport.http_api import ApiRoutes
from worker.transport.http_bodies import RequestBody
from worker.transport.http_connection import Connection, ConnectionLimits, ConnectionServer
from worker.transport.http_content import ContentRoutes
from worker.transport.http_download import Download
from worker.transport.http_exchange import (
    Endpoint,
    Exchange,
    Files,
    HttpObserver,
    Requests,
    Unobserved,
    context_of,
)
from worker.transport.http_probes import ProbeRoutes
from worker.transport.http_replies import HttpFault, error_reply
from worker.transport.http_router import Found, Router
from worker.transport.http_target import parse_target

_log = structlog.get_logger()

NO_ROUTE = "none"  # the route of requests that have none, for the observer
_VERSIONS = ((1, 0), (1, 1))
_CANCEL_S = 1.0


class HttpServer:
    """Serves `dispatcher` and `service` on one address. Without a `token`, to this host only, and asks for none.

    `metrics` gives (content type, body). Timeouts are in seconds.
    """

    def __init__(
        self,
        *,
        host: str,
        port: int,
        token: str | None,
        dispatcher: Requests,
        service: Files,
        readiness: Readiness,
        metrics: Callable[[], tuple[str, bytes]],
        version_info: dict[str, Any],
        signer: UrlSigner,
        header_timeout_s: float,
        idle_timeout_s: float,
        openapi: bytes,
        observe: HttpObserver | None = None,
    ) -> None:
        self._host = host
        self._port = port
        self._dispatcher = dispatcher
        self._readiness = readiness
        self._limits = ConnectionLimits(header_s=header_timeout_s, idle_s=idle_timeout_s)
        self._observe = observe or Unobserved()
        self._access = Access(token, signer, host)
        self._router: Router[Endpoint] = Router()
        ProbeRoutes(readiness, metrics=metrics, version_info=version_info, openapi=openapi).add_to(self._router)
        ApiRoutes(dispatcher, service).add_to(self._router)
        ContentRoutes(dispatcher, service, idle_s=idle_timeout_s, observe=self._observe).add_to(self._router)
        self._server: ConnectionServer | None = None
        self._runner: web.ServerRunner | None = None
        self._site: web.TCPSite | None = None
        self._active: set[asyncio.Task[Any]] = set()
        self._draining = False

    @property
    def port(self) -> int:
        """The port that is listened on; before `start`, the one that was asked for."""
        return self._port if self._site is None else self._site.port

    # --- life cycle ---

    async def start(self) -> None:
        """Listen. OSError if the address cannot be had; it may be tried again."""
        server = ConnectionServer(self._handle, limits=self._limits, refused=self._refused)
        runner = web.ServerRunner(server, shutdown_timeout=_CANCEL_S)
        await runner.setup()
        site = web.TCPSite(runner, self._host, self._port)
        try:
            await site.start()
        except OSError:
            await runner.cleanup()
            raise
        self._server, self._runner, self._site = server, runner, site

    def begin_drain(self) -> None:
        """Not ready, no new writes, each connection closed after its reply; listening goes on. May be repeated."""
        self._draining = True
        self._dispatcher.draining = True
        self._readiness.set("draining", False, "the worker is shutting down")

    async def finish(self, timeout_s: float) -> None:
        """Wait for what is under way, at most `timeout_s`, and go on listening: probes can ask why it is not ready."""
        await self._finish(timeout_s)

    async def stop(self, timeout_s: float) -> None:
        """Stop listening, let what is under way finish within `timeout_s`, cut off the rest."""
        self.begin_drain()
        if self._runner is None or self._server is None or self._site is None:
            return
        runner, self._runner = self._runner, None
        self._port = self._site.port
        await self._site.stop()
        self._site = None
        # aiohttp's own shutdown makes every connection deaf at once, also to the rest of an upload.
        self._server.close_idle()
        await self._finish(timeout_s)
        for task in self._active:
            task.cancel()
        await self._finish(_CANCEL_S)
        await runner.cleanup()

    async def _finish(self, timeout_s: float) -> None:
        if self._active:
            await asyncio.wait(self._active, timeout=timeout_s)

    # --- one request ---

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        connection = cast(Connection, request.protocol)
        task = cast("asyncio.Task[Any]", asyncio.current_task())
        self._active.add(task)
        try:
            with connection.request(request):
                if request.version not in _VERSIONS:
                    await connection.refuse(HttpFault(400, "Only HTTP/1.0 and HTTP/1.1 are spoken here."))
                    raise ConnectionResetError("not HTTP/1")
                return await self._serve(connection, request)
        finally:
            self._active.discard(task)

    async def _serve(self, connection: Connection, request: web.BaseRequest) -> web.StreamResponse:
        started = asyncio.get_running_loop().time()
        route, response = await self._answer(request)
        last = self._draining or connection.taken or not request.content.is_eof()
        if last or response.headers.get("Connection") == "close":
            response.force_close()
        try:
            await self._send(request, response)
        except Exception as error:
            if isinstance(error, ModelManagerError | OSError):
                _log.info("http_reply_cut_off", route=route, reason=type(error).__name__)
            else:
                _log.exception("http_reply_failed", route=route)
            connection.abort()
            raise ConnectionResetError("the reply is cut off") from error
        finally:
            seconds = asyncio.get_running_loop().time() - started
            self._observe.answered(route, request.method, response.status, seconds)
        if not request.content.is_eof():
            await connection.linger()
        return response

    async def _send(self, request: web.BaseRequest, response: web.StreamResponse) -> None:
        if isinstance(response, Download):
            await response.transmit(request)
            return
        async with asyncio.timeout(self._limits.idle_s):
            await response.prepare(request)
            await response.write_eof()
        if isinstance(response, web.Response) and isinstance(response.body, bytes) and request.method != "HEAD":
            self._observe.moved("out", len(response.body))

    async def _answer(self, request: web.BaseRequest) -> tuple[str, web.StreamResponse]:
        """The route's template and the response; every error has become one."""
        template = NO_ROUTE
        try:
            target = parse_target(request.raw_path)
            found = self._find(request.method, target.path)
            template = found.template if isinstance(found, Found) else NO_ROUTE
            self._access.check(request, target, template)
            if isinstance(found, HttpFault):
                raise found
            body = RequestBody(request, idle_s=self._limits.idle_s, received=self._received)
            exchange = Exchange(request, found.variables, target.query, body, context_of(request))
            return template, await found.endpoint(exchange)
        except ModelManagerError as error:
            return template, error_reply(error)
        except Exception:  # noqa: BLE001 - the last place that can answer
            _log.exception("http_request_failed", route=template)
            return template, error_reply(ModelManagerError("ERR_INTERNAL"))

    def _find(self, verb: str, path: str) -> Found[Endpoint] | HttpFault:
        """The route, or why there is none: that is told only to those who may ask."""
        try:
            return self._router.find(verb, path)
        except HttpFault as fault:
            return fault

    def _received(self, count: int) -> None:
        self._observe.moved("in", count)

    def _refused(self, status: int) -> None:
        self._observe.answered(NO_ROUTE, "", status, 0.0)
