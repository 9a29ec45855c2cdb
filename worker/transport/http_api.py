"""The routes of the RPC methods: path, query and body become the parameters, the reply becomes status and headers."""

from __future__ import annotations

import re
import types
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin
from urllib.parse import quote

from aiohttp import web

from schemas.errors import ModelManagerError
from schemas.routes import PATH_PARAMETERS, ROUTES, Route
from schemas.rpc import METHODS, Method
from worker.transport.http_exchange import Endpoint, Exchange, Files, Requests
from worker.transport.http_ranges import parse_etags
from worker.transport.http_replies import HttpFault, json_reply
from worker.transport.http_router import Router
from worker.transport.http_target import Query

_LATEST = "/api/models/{model}"
_INTEGER = re.compile(r"-?\d{1,16}", re.ASCII)
_FLAGS = {"true": True, "false": False}
_REVISION = re.compile(r"[1-9]\d{0,14}", re.ASCII)
_UNFINISHED = frozenset({"queued", "running"})


class ApiRoutes:
    """One endpoint for each row of `schemas/routes.py`."""

    def __init__(self, requests: Requests, files: Files) -> None:
        self._requests = requests
        self._files = files

    def add_to(self, router: Router[Endpoint]) -> None:
        for route in ROUTES:
            router.add(route.verb, route.path, self._endpoint(route))

    def _endpoint(self, route: Route) -> Endpoint:
        kinds = query_kinds(METHODS[route.method]) if route.verb in ("GET", "DELETE") else None

        async def answer(exchange: Exchange) -> web.StreamResponse:
            params = {PATH_PARAMETERS[name]: value for name, value in exchange.variables.items()}
            if kinds is None:
                exchange.query.finish()
                rest = await exchange.body.json_object()
            else:
                rest = _from_query(exchange.query, kinds, taken=params)
                exchange.body.refuse()
            if twice := sorted(params.keys() & rest.keys()):
                raise HttpFault(400, f"{twice[0]} is in the path already.")
            return await self._call(route, {**params, **rest}, exchange)

        return answer

    async def _call(self, route: Route, params: dict[str, Any], exchange: Exchange) -> web.StreamResponse:
        condition = exchange.request.headers.get("If-Match")
        if condition is None:
            reply = await self._requests.call(route.method, params, exchange.context)
        elif "{version}" in route.path and route.verb in ("PATCH", "DELETE"):
            reply = await self._call_if(condition, route, params, exchange)
        else:
            raise HttpFault(400, "If-Match goes with PATCH and DELETE of a version only.")
        if route.path == _LATEST and route.verb == "GET":
            reply = {**reply, **await self._files.versions_of(reply["modelId"])}
        return reply_of(route, reply)

    async def _call_if(
        self, condition: str, route: Route, params: dict[str, Any], exchange: Exchange
    ) -> dict[str, Any]:
        """The call, if the version has a revision that the caller names; else 412.

        PATCH carries the revision on, so nobody can change it in between; if it is one, the change alone checks it, so
        that a repeat is answered as the first was. A delete cannot lose what it has not seen but a change of the
        metadata in the same moment.
        """
        tags = parse_etags(condition)
        if tags is not None and not _carried_on(tags, route, params):
            await self._check_revision(tags, route, params, exchange)
        try:
            return await self._requests.call(route.method, params, exchange.context)
        except ModelManagerError as error:
            if error.code == "ERR_CONFLICT" and "revision" in error.details:
                raise _changed(error.details["revision"]) from None
            raise

    async def _check_revision(
        self, tags: Sequence[tuple[bool, str]], route: Route, params: dict[str, Any], exchange: Exchange
    ) -> None:
        known = {name: params[name] for name in ("modelId", "version")}
        try:
            current = (await self._requests.call("getModelMetadata", known, exchange.context))["revision"]
        except ModelManagerError as error:
            # With a key it may be the repeat of a delete, which is answered from its record.
            if error.code == "ERR_MODEL_NOT_FOUND" and exchange.context.idempotency_key is not None:
                return
            raise
        if (False, str(current)) not in tags:
            raise _changed(current)
        if route.method == "updateModelMetadata" and params.setdefault("expectedRevision", current) != current:
            raise _changed(current)


def _carried_on(tags: Sequence[tuple[bool, str]], route: Route, params: dict[str, Any]) -> bool:
    """Whether the one revision in `tags` is the `expectedRevision` now, so that the change itself checks it."""
    if route.method != "updateModelMetadata" or len(tags) != 1:
        return False
    weak, text = tags[0]
    if weak or not _REVISION.fullmatch(text):
        return False
    return bool(params.setdefault("expectedRevision", int(text)) == int(text))


def _changed(revision: int) -> HttpFault:
    return HttpFault(412, f"The metadata is at revision {revision}.", code="ERR_CONFLICT", revision=revision)


# --- replies ---------------------------------------------------------------------------------------------------------


def reply_of(route: Route, reply: Mapping[str, Any]) -> web.Response:
    """The response for a good reply: 202 for a job that goes on, the route's status for something new, else 200."""
    if METHODS[route.method].job and "jobId" in reply and reply.get("state") in _UNFINISHED:
        return json_reply(reply, status=202, headers={"Location": f"/api/jobs/{reply['jobId']}"})
    headers = {}
    if "revision" in METHODS[route.method].reply.__annotations__:
        headers["ETag"] = f'"{reply["revision"]}"'
    if route.created == 201 and reply.get("created", True):
        return json_reply(reply, status=201, headers={**headers, "Location": location_of(reply)})
    return json_reply(reply, headers=headers)


def location_of(reply: Mapping[str, Any]) -> str:
    """The path of the upload or the version that a reply tells of."""
    if "uploadId" in reply:
        return f"/api/uploads/{reply['uploadId']}"
    return f"/api/models/{quote(reply['modelId'])}/versions/{quote(reply['version'])}"


# --- queries ---------------------------------------------------------------------------------------------------------


def query_kinds(method: Method) -> dict[str, type]:
    """The parameters of a method that a query can carry, plain ones, with their types."""
    kinds = {field.alias or name: _kind(field.annotation) for name, field in method.params.model_fields.items()}
    return {name: kind for name, kind in kinds.items() if kind is not None}


def _kind(annotation: Any) -> type | None:
    """int, bool or str; None for what is structured."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _kind(get_args(annotation)[0])
    if origin is Literal:
        return type(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        members = [member for member in get_args(annotation) if member is not type(None)]
        return _kind(members[0]) if len(members) == 1 else None
    return annotation if annotation in (int, bool, str) else None


def _from_query(query: Query, kinds: Mapping[str, type], *, taken: Mapping[str, str]) -> dict[str, Any]:
    params: dict[str, Any] = {}
    for name, kind in kinds.items():
        text = None if name in taken else query.one(name)
        if text is not None:
            params[name] = _typed(name, text, kind)
    query.finish()
    return params


def _typed(name: str, text: str, kind: type) -> Any:
    if kind is int:
        if not _INTEGER.fullmatch(text):
            raise HttpFault(400, f"{name}: must be an integer.", parameter=name)
        return int(text)
    if kind is bool:
        if text not in _FLAGS:
            raise HttpFault(400, f"{name}: must be true or false.", parameter=name)
        return _FLAGS[text]
    return text
