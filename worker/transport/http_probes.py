"""The routes of monitors and of people who look: no token, no dispatcher, no dependency."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from aiohttp import web

from worker.readiness import Readiness
from worker.transport.http_exchange import Endpoint, Exchange
from worker.transport.http_replies import JSON_TYPE, SERVER, json_reply
from worker.transport.http_router import Router


class ProbeRoutes:
    """`/livez` tells that the process answers, `/readyz` and `/health` whether it should be sent requests."""

    def __init__(
        self,
        readiness: Readiness,
        *,
        metrics: Callable[[], tuple[str, bytes]],
        version_info: dict[str, Any],
        openapi: bytes,
    ) -> None:
        self._readiness = readiness
        self._metrics = metrics
        self._version_info = version_info
        self._openapi = openapi

    def add_to(self, router: Router[Endpoint]) -> None:
        router.add("GET", "/livez", self._livez)
        router.add("GET", "/readyz", self._readyz)
        router.add("GET", "/health", self._health)
        router.add("GET", "/metrics", self._scrape)
        router.add("GET", "/version", self._version)
        router.add("GET", "/openapi.json", self._document)

    async def _livez(self, exchange: Exchange) -> web.StreamResponse:
        _check(exchange)
        return json_reply({"status": "ok"})

    async def _readyz(self, exchange: Exchange) -> web.StreamResponse:
        verbose = exchange.query.one("verbose") is not None
        _check(exchange)
        body: dict[str, Any] = {"ready": self._readiness.ready}
        if verbose:
            checks = self._readiness.checks.items()
            body["checks"] = {name: {"ok": good, "reason": reason} for name, (good, reason) in checks}
        return json_reply(body, status=self._status())

    async def _health(self, exchange: Exchange) -> web.StreamResponse:
        _check(exchange)
        return json_reply({"status": "ok" if self._readiness.ready else "unavailable"}, status=self._status())

    async def _scrape(self, exchange: Exchange) -> web.StreamResponse:
        _check(exchange)
        content_type, body = self._metrics()
        return web.Response(body=body, headers={"Content-Type": content_type, **SERVER})

    async def _version(self, exchange: Exchange) -> web.StreamResponse:
        _check(exchange)
        return json_reply(self._version_info)

    async def _document(self, exchange: Exchange) -> web.StreamResponse:
        _check(exchange)
        return web.Response(body=self._openapi, headers={"Content-Type": JSON_TYPE, **SERVER})

    def _status(self) -> int:
        return 200 if self._readiness.ready else 503


def _check(exchange: Exchange) -> None:
    exchange.query.finish()
    exchange.body.refuse()
