"""JSON replies, and the one shape of every error over HTTP."""

from __future__ import annotations

import math
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from aiohttp import web

from schemas.errors import ModelManagerError
from schemas.wire import dump

JSON_TYPE = "application/json"
# For faults after which a proxy and we might not agree on where the next request begins.
CLOSE = {"Connection": "close"}
# aiohttp would tell its own version and Python's.
SERVER = {"Server": "model-manager"}
_RETRY_AFTER_S = 1


class HttpFault(ModelManagerError):
    """An error with a status of its own: what is wrong with the request as a piece of HTTP."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str = "ERR_INVALID_REQUEST",
        headers: Mapping[str, str] | None = None,
        **details: Any,
    ) -> None:
        super().__init__(code, message, **details)
        self.status = status
        self.headers = dict(headers or {})


def json_reply(body: Any, *, status: int = 200, headers: Mapping[str, str] | None = None) -> web.Response:
    """`body` as JSON. It is never cached: the catalog changes."""
    fixed = {"Content-Type": JSON_TYPE, "Cache-Control": "no-store", **SERVER}
    return web.Response(body=dump(body), status=status, headers={**fixed, **(headers or {})})


def status_of(error: ModelManagerError) -> int:
    """The status a coded error is answered with."""
    return error.status if isinstance(error, HttpFault) else error.kind.http_status


def error_reply(error: ModelManagerError) -> web.Response:
    """The reply for a coded error."""
    return json_reply(error.body(), status=status_of(error), headers=_error_headers(error))


def raw_error(error: ModelManagerError) -> bytes:
    """The same reply as bytes that end the connection, for when there is no request that could be answered."""
    status = HTTPStatus(status_of(error))
    body = dump(error.body())
    headers = {
        "Content-Type": JSON_TYPE,
        "Content-Length": str(len(body)),
        "Connection": "close",
        **SERVER,
        **_error_headers(error),
    }
    lines = [f"HTTP/1.1 {status.value} {status.phrase}", *(f"{name}: {value}" for name, value in headers.items())]
    return "\r\n".join([*lines, "", ""]).encode("ascii") + body


def _error_headers(error: ModelManagerError) -> dict[str, str]:
    headers = dict(error.headers) if isinstance(error, HttpFault) else {}
    if error.code == "ERR_UNAUTHORIZED":
        headers["WWW-Authenticate"] = 'Bearer realm="model-manager"'
    if error.retryable and status_of(error) in (429, 503):
        wait_ms = error.details.get("retryAfterMs", 0)
        headers["Retry-After"] = str(max(_RETRY_AFTER_S, math.ceil(wait_ms / 1000)))
    return headers
