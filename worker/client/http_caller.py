"""Calls over HTTP: the same methods, through the routes of `schemas/routes.py`."""

from __future__ import annotations

import string
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote, urlsplit

import aiohttp
from yarl import URL

from schemas.errors import ERRORS, ModelManagerError
from schemas.ids import LATEST
from schemas.routes import FILE, PATH_PARAMETERS, ROUTES, Route
from schemas.rpc import METHODS
from schemas.wire import dump, parse_object
from worker.client.caller import Unreachable, encoded, error_of, no_answer, until_answered
from worker.http_address import flaw_of

MAX_REPLY_BYTES = 16 * 1024**2


class HttpCaller:
    """Calls the worker whose HTTP service is at `url`. `token` is its bearer token, sent to that address only."""

    def __init__(self, url: str, token: str | None = None) -> None:
        if (flaw := flaw_of(url)) is not None:
            raise ModelManagerError("ERR_INVALID_REQUEST", f"The address {flaw}.")
        self._url = url.rstrip("/")
        self._authorization = {} if token is None else {"Authorization": f"Bearer {token}"}
        self._session: aiohttp.ClientSession | None = None
        self._reached = False

    async def call(
        self, method: str, params: Mapping[str, Any], *, timeout_s: float, idempotency_key: str | None = None
    ) -> dict[str, Any]:
        if method == "getModel":
            return await self._get_model(params, timeout_s)
        encoded(params)  # also what a path or a query carries must be text that can be sent
        params = with_version(method, params)

        async def attempt(left_s: float, key: str | None) -> dict[str, Any]:
            try:
                return await self._request(method, params, left_s, key)
            except TimeoutError:
                raise no_answer(timeout_s) from None
            except aiohttp.ClientConnectorError:
                message = "The worker is away." if self._reached else "There is no worker at that address."
                raise Unreachable(message, passing=self._reached) from None
            except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError):
                raise Unreachable("The connection was lost.", passing=True) from None
            except aiohttp.ClientError as error:
                raise _foreign(f"The answer is not HTTP as expected ({type(error).__name__}).") from None

        return await until_answered(method, attempt, timeout_s=timeout_s, key=idempotency_key)

    def headers_for(self, url: str) -> dict[str, str]:
        # A signed address of another host must never see the token.
        same = urlsplit(url)[:2] == urlsplit(self._url)[:2]
        return dict(self._authorization) if same else {}

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    async def _request(self, method: str, params: Mapping[str, Any], left_s: float, key: str | None) -> dict[str, Any]:
        if self._session is None:
            self._session = aiohttp.ClientSession(auto_decompress=False)
        route = route_for(method, params)
        path, rest = _fill(route, params)
        headers = self._authorization | ({} if key is None else {"Idempotency-Key": key})
        body: bytes | None = None
        query: dict[str, str] = {}
        if route.verb in ("GET", "DELETE"):
            query = {name: _query_text(value) for name, value in rest.items()}
        else:
            body = dump(rest)
            headers["Content-Type"] = "application/json"
        async with self._session.request(
            route.verb,
            URL(self._url + path, encoded=True),
            params=query,
            data=body,
            headers=headers,
            allow_redirects=False,
            timeout=aiohttp.ClientTimeout(total=max(left_s, 0.001)),
        ) as response:
            reply = await read_reply(response)
        self._reached = True
        return reply

    async def _get_model(self, params: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
        """`getModel` has no route: the same reply, with the addresses where this service serves the bytes."""
        if params.get("delivery") == "inline":
            raise ModelManagerError("ERR_INVALID_REQUEST", "Over HTTP bytes are not delivered inline.")
        wanted = {name: value for name, value in params.items() if name != "delivery"}
        known = await self.call("getModelMetadata", wanted, timeout_s=timeout_s)
        variables = {"model": known["modelId"], "version": known["version"]}
        files = [
            {**file, "url": self._url + _path(FILE, variables | {"path": file["path"]})} for file in known["files"]
        ]
        kept = ("success", "modelId", "version", "metadata", "checksum", "size")
        return {name: known[name] for name in kept} | {"files": files}


def with_version(method: str, params: Mapping[str, Any]) -> Mapping[str, Any]:
    """The parameters with the version that the contract lets out, for the path to have one."""
    known = METHODS.get(method)
    field = None if known is None else known.params.model_fields.get("version")
    return params if field is None or field.default != LATEST else {"version": LATEST, **params}


def route_for(method: str, params: Mapping[str, Any]) -> Route:
    """The route whose path takes most of `params`, and whose verb can carry the others."""
    routes = [route for route in ROUTES if route.method == method]
    if not routes:
        raise ModelManagerError("ERR_UNKNOWN_METHOD", f"{method} has no HTTP route.")
    fitting = [route for route in routes if all(PATH_PARAMETERS[name] in params for name in _variables(route.path))]
    if any(value is None or isinstance(value, dict | list) for value in params.values()):
        # A query carries plain values only.
        fitting = [route for route in fitting if route.verb not in ("GET", "DELETE")]
    if not fitting:
        needed = ", ".join(PATH_PARAMETERS[name] for name in _variables(routes[-1].path))
        raise ModelManagerError("ERR_INVALID_REQUEST", f"Over HTTP {method} needs {needed}.")
    return max(fitting, key=lambda route: len(_variables(route.path)))


async def read_reply(response: aiohttp.ClientResponse) -> dict[str, Any]:
    """The reply body of a success; the error a failure stands for, also one that a proxy in between has made."""
    body = await response.content.read(MAX_REPLY_BYTES + 1)
    while chunk := await response.content.read(MAX_REPLY_BYTES + 1 - len(body)):
        body += chunk
    try:
        reply = parse_object(body, limit=MAX_REPLY_BYTES)
    except ModelManagerError:
        raise _by_status(response.status) from None
    if reply.get("success") is True:
        return reply
    raise error_of(reply) if isinstance(reply.get("error"), dict) else _by_status(response.status)


def _by_status(status: int) -> ModelManagerError:
    """The error for an answer without our envelope."""
    if status in (502, 503, 504):
        return ModelManagerError("ERR_SHUTTING_DOWN", f"The service answered with status {status}.", status=status)
    if status in (401, 403, 413, 429):
        code = next(kind.code for kind in ERRORS.values() if kind.http_status == status)
        return ModelManagerError(code, status=status)
    return _foreign(f"The answer with status {status} is not from a model manager.", status=status)


def _foreign(message: str, **details: Any) -> ModelManagerError:
    return ModelManagerError("ERR_INTERNAL", message, **details)


def _variables(path: str) -> list[str]:
    return [name for _, name, _, _ in string.Formatter().parse(path) if name]


def _fill(route: Route, params: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The path with its variables put in, and the parameters it does not carry."""
    taken = {name: PATH_PARAMETERS[name] for name in _variables(route.path)}
    path = _path(route.path, {name: str(params[parameter]) for name, parameter in taken.items()})
    return path, {name: value for name, value in params.items() if name not in taken.values()}


def _path(template: str, variables: Mapping[str, str]) -> str:
    # The slash of `org/name` and of a file's path stays; `+` would be read as a blank by some.
    return template.format_map({name: quote(value, safe="/") for name, value in variables.items()})


def _query_text(value: Any) -> str:
    return value if isinstance(value, str) else dump(value).decode()
