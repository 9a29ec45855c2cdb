"""The routes that carry the bytes of models: up as a raw body, down as a whole, in part, or by a redirect."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any, TypeVar, cast
from urllib.parse import quote

from aiohttp import web

from schemas.errors import ModelManagerError
from schemas.ids import FilePath, ModelId, Ulid, Version, VersionRef, digest_of
from schemas.model import Metadata, Wire
from schemas.routes import CONTENT, FILE, UPLOAD_FILE
from schemas.rpc import METHODS
from worker.content import OpenedFile, Redirect
from worker.dispatch import parse_params
from worker.transport.http_api import location_of
from worker.transport.http_download import Download, open_source
from worker.transport.http_exchange import Endpoint, Exchange, Files, HttpObserver, Requests
from worker.transport.http_ranges import (
    content_disposition,
    matches,
    not_modified,
    parse_repr_digest,
    range_applies,
    repr_digest,
    select_range,
)
from worker.transport.http_replies import SERVER, HttpFault, json_reply
from worker.transport.http_router import Router

Params = TypeVar("Params", bound=Wire)


class _Read(Wire):
    model_id: ModelId
    version: VersionRef
    path: FilePath | None = None


class _Store(Wire):
    model_id: ModelId
    version: Version
    filename: FilePath | None = None
    metadata: Metadata


class _Receive(Wire):
    upload_id: Ulid
    path: FilePath


class ContentRoutes:
    """Downloads, the streaming store of one file, and the files of an upload."""

    def __init__(self, requests: Requests, files: Files, *, idle_s: float, observe: HttpObserver) -> None:
        self._requests = requests
        self._files = files
        self._idle_s = idle_s
        self._sent = functools.partial(observe.moved, "out")

    def add_to(self, router: Router[Endpoint]) -> None:
        router.add("GET", CONTENT, self._read)
        router.add("GET", FILE, self._read)
        router.add("PUT", CONTENT, self._store)
        router.add("PUT", UPLOAD_FILE, self._receive)

    # --- down ---

    async def _read(self, exchange: Exchange) -> web.StreamResponse:
        variables = exchange.variables
        given = {"modelId": variables["model"], "version": variables["version"]}
        if "path" in variables:
            given["path"] = variables["path"]
        params = _checked(_Read, given)
        redirect = exchange.query.one("redirect")
        if redirect not in (None, "1"):
            raise HttpFault(400, "redirect: must be 1.", parameter="redirect")
        exchange.query.finish()
        exchange.body.refuse()
        # The bytes are sent outside the lane: a slow client must not keep lookups waiting.
        async with self._requests.admit("getModel", exchange.context):
            file = await self._files.open_file(
                params.model_id, params.version, params.path, redirect=redirect is not None
            )
        return await self._answer(exchange.request, file, params.model_id)

    async def _answer(self, request: web.BaseRequest, file: OpenedFile, model_id: str) -> web.StreamResponse:
        headers = _headers_of(file, model_id)
        if not matches(request.headers.get("If-Match"), file.sha256):
            raise HttpFault(412, "The file has another ETag.", code="ERR_CONFLICT")
        if not_modified(request.headers.get("If-None-Match"), file.sha256):
            return web.Response(status=304, headers=headers)
        if isinstance(file.content, Redirect):
            moved = {"Location": file.content.url, "Cache-Control": "no-store"}
            return web.Response(status=307, headers={**SERVER, **moved})
        headers["Content-Type"] = file.media_type
        part = None
        if request.method == "GET" and range_applies(request.headers.get("If-Range"), file.sha256):
            part = select_range(request.headers.get("Range"), file.size)
        start, length = (0, file.size) if part is None else (part.start, part.length)
        if part is not None:
            headers["Content-Range"] = part.content_range(file.size)
        wanted = 0 if request.method == "HEAD" else length
        return Download(
            await open_source(file.content, file.size, start, wanted),
            length,
            status=200 if part is None else 206,
            headers=headers,
            idle_s=self._idle_s,
            sent=self._sent,
        )

    # --- up ---

    async def _store(self, exchange: Exchange) -> web.StreamResponse:
        query, variables = exchange.query, exchange.variables
        metadata: dict[str, Any] = {"version": variables["version"]}
        for name in ("type", "description"):
            if (value := query.one(name)) is not None:
                metadata[name] = value
        if tags := query.every("tag"):
            metadata["tags"] = tags
        given = {"modelId": variables["model"], "version": variables["version"], "metadata": metadata}
        if (filename := query.one("filename")) is not None:
            given["filename"] = filename
        query.finish()
        params = _checked(_Store, given)
        sha256 = _declared_sha256(exchange)
        self._check_upload(exchange)
        async with self._requests.admit("storeModel", exchange.context), exchange.body.stream() as chunks:
            reply = await self._files.store_stream(
                params.model_id,
                params.metadata,
                filename=params.filename or f"model.{params.metadata.type}",
                chunks=chunks,
                size=exchange.body.length,
                sha256=sha256,
                context=exchange.context,
            )
        headers = {"Location": location_of(reply)}
        return json_reply(reply, status=201 if reply["created"] else 200, headers=headers)

    async def _receive(self, exchange: Exchange) -> web.StreamResponse:
        exchange.query.finish()
        params = _checked(_Receive, {"uploadId": exchange.variables["upload"], "path": exchange.variables["path"]})
        sha256 = _declared_sha256(exchange)
        self._check_upload(exchange)
        async with self._requests.admit("createUpload", exchange.context), exchange.body.stream() as chunks:
            reply = await self._files.receive_file(
                params.upload_id, params.path, chunks, exchange.body.length, context=exchange.context
            )
        if sha256 is not None and reply["sha256"] != digest_of(sha256):
            raise ModelManagerError(
                "ERR_CHECKSUM_MISMATCH",
                "The file is as the upload declared it, which Repr-Digest is not.",
                expected=digest_of(sha256),
                actual=reply["sha256"],
            )
        return json_reply(reply)

    def _check_upload(self, exchange: Exchange) -> None:
        """Refuse by the headers alone what can be refused, so that its bytes need not be sent."""
        headers = exchange.request.headers
        if headers.get("Content-Type", "").strip().lower().startswith("multipart/"):
            raise HttpFault(415, "Send the bytes themselves as the body, not a form.")
        if "Content-Range" in headers:
            raise HttpFault(400, "The bytes of a file come as a whole.")
        exchange.body.check_announced()
        limit = self._files.max_model_size
        if (exchange.body.length or 0) > limit:
            raise ModelManagerError(
                "ERR_MODEL_TOO_LARGE", f"A version may have at most {limit} bytes.", maxModelSize=limit
            )


def _checked(kind: type[Params], given: dict[str, Any]) -> Params:
    """The parameters, checked as those of a method are, with the same errors."""
    return cast(Params, parse_params(replace(METHODS["getModel"], params=kind), given))


def _declared_sha256(exchange: Exchange) -> str | None:
    header = exchange.request.headers.get("Repr-Digest")
    return None if header is None else parse_repr_digest(header)


def _headers_of(file: OpenedFile, model_id: str) -> dict[str, str]:
    """What is the same for the whole file and a part of it, and with 304."""
    version = {"modelId": model_id, "version": file.version}
    return {
        "ETag": f'"{file.sha256}"',
        "Repr-Digest": repr_digest(file.sha256),
        "Content-Location": f"{location_of(version)}/files/{quote(file.path)}",
        "Content-Disposition": content_disposition(file.path),
        "Accept-Ranges": "bytes",
        # A proxy must not compress; and what a label names may be another file next time.
        "Cache-Control": "no-cache, no-transform",
        "X-Content-Type-Options": "nosniff",
        **SERVER,
    }
