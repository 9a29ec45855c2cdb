"""One request on its way through the routes, and what the routes need of the worker."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from aiohttp import web

from schemas.model import Metadata, VersionsOfModel
from schemas.rpc import StoreReply
from worker.content import OpenedFile
from worker.context import Context
from worker.transport.http_access import CALLER
from worker.transport.http_bodies import RequestBody
from worker.transport.http_replies import HttpFault
from worker.transport.http_target import Query

_KEY = re.compile(r"[\x21-\x7e](?:[\x20-\x7e]{0,253}[\x21-\x7e])?")


@dataclass(frozen=True, slots=True)
class Exchange:
    """A request whose route is known. `variables` are those of the path, decoded."""

    request: web.BaseRequest
    variables: dict[str, str]
    query: Query
    body: RequestBody
    context: Context


Endpoint = Callable[[Exchange], Awaitable[web.StreamResponse]]


class Requests(Protocol):
    """The dispatcher. `draining`: new writes are refused."""

    draining: bool

    async def call(self, method: str, params: dict[str, Any], context: Context) -> dict[str, Any]: ...

    def admit(self, method: str, context: Context) -> AbstractAsyncContextManager[None]: ...


class Files(Protocol):
    """The use cases that carry bytes. Sizes are in bytes, `sha256` is in hex."""

    max_model_size: int

    async def open_file(self, model_id: str, ref: str, path: str | None, *, redirect: bool = False) -> OpenedFile: ...

    async def store_stream(
        self,
        model_id: str,
        metadata: Metadata,
        *,
        filename: str,
        chunks: AsyncIterator[bytes],
        size: int | None,
        sha256: str | None,
        context: Context,
    ) -> StoreReply: ...

    async def receive_file(
        self, upload_id: str, path: str, chunks: AsyncIterator[bytes], size: int | None, *, context: Context
    ) -> dict[str, Any]: ...

    async def versions_of(self, model_id: str) -> VersionsOfModel: ...


class HttpObserver(Protocol):
    """Told of every request: its route's template, verb, status, seconds; and of the bytes of bodies, `in` or `out`."""

    def answered(self, route: str, method: str, status: int, seconds: float) -> None: ...

    def moved(self, direction: str, count: int) -> None: ...


class Unobserved:
    """An HttpObserver that nobody listens to."""

    def answered(self, route: str, method: str, status: int, seconds: float) -> None:
        return

    def moved(self, direction: str, count: int) -> None:
        return


def context_of(request: web.BaseRequest) -> Context:
    """The context of a request; a fault if its Idempotency-Key is no key."""
    key = None if request.method in ("GET", "HEAD") else request.headers.get("Idempotency-Key")
    if key is not None and not _KEY.fullmatch(key):
        raise HttpFault(400, "Idempotency-Key must be 1 to 255 printable ASCII characters.")
    return Context(caller=CALLER, idempotency_key=key, transport="http")
