"""The parts of the OpenAPI document that belong to no method: bytes, probes, parameters, errors."""

from __future__ import annotations

from collections.abc import Iterable
from http import HTTPStatus
from typing import Any

from schemas.errors import ERRORS, ErrorKind, ModelManagerError
from schemas.ids import FilePath, ModelType
from schemas.json_schemas import Components, ErrorBody, Schema, json_schema
from schemas.model import Success, Tag
from schemas.routes import CONTENT, FILE, UPLOAD_FILE
from schemas.rpc import StoreReply

JSON_TYPE = "application/json"
BYTES_TYPE = "application/octet-stream"
BEARER: list[Schema] = [{"bearer": []}]
SIGNED: list[Schema] = [{"bearer": []}, {"signature": []}]
OPEN: list[Schema] = []

SECURITY_SCHEMES: dict[str, Schema] = {
    "bearer": {
        "type": "http",
        "scheme": "bearer",
        "description": "The token of `http.tokenFile`. Without it the worker only listens on loopback, open to all.",
    },
    "signature": {
        "type": "apiKey",
        "in": "query",
        "name": "signature",
        "description": "Of an address that a reply gave, together with its `expires`; good for one verb and path.",
    },
}

_BINARY: Schema = {BYTES_TYPE: {}}
_DIGEST_HEADER = r"^sha-256=:[A-Za-z0-9+/]{43}=:$"
_STATUSES_OF_TRANSPORT = {
    HTTPStatus.PRECONDITION_FAILED: ("ERR_CONFLICT",),
    HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE: ("ERR_INVALID_REQUEST",),
}


# --- parameters ------------------------------------------------------------------------------------------------------


def _parameter(place: str, name: str, schema: Schema, description: str, *, required: bool = False) -> Schema:
    return {"in": place, "name": name, "schema": schema, "description": description, "required": required}


PARAMETERS: dict[str, Schema] = {
    "idempotencyKey": _parameter(
        "header",
        "Idempotency-Key",
        {"type": "string", "minLength": 1, "maxLength": 255},
        "Names the request among its caller's: a repeat gets the same answer and has no further effect.",
    ),
    "range": _parameter("header", "Range", {"type": "string"}, "One range of bytes; several are answered with all."),
    "ifRange": _parameter("header", "If-Range", {"type": "string"}, "The range holds only for this `ETag`."),
    "ifNoneMatch": _parameter("header", "If-None-Match", {"type": "string"}, "304 when the `ETag` is among these."),
    "ifMatch": _parameter("header", "If-Match", {"type": "string"}, "412 when the revision is not among these."),
    "reprDigest": _parameter(
        "header",
        "Repr-Digest",
        {"type": "string", "pattern": _DIGEST_HEADER},
        "The sha256 of the body in base64 (RFC 9530); other bytes are refused.",
    ),
    "redirect": _parameter(
        "query", "redirect", {"const": "1"}, "Answer 307 to where the object store has the bytes, if there is one."
    ),
    "expires": _parameter(
        "query", "expires", {"type": "integer"}, "The end of a signed address, in Unix seconds; goes with `signature`."
    ),
}


def parameter(name: str) -> Schema:
    """A reference to one of `PARAMETERS`."""
    return {"$ref": f"#/components/parameters/{name}"}


# --- errors ----------------------------------------------------------------------------------------------------------


def error_components(components: Components) -> dict[str, Schema]:
    """An answer for each status that errors have, with an example for each of its codes."""
    body = components.add("ErrorBody", json_schema(ErrorBody))
    statuses: dict[int, list[ErrorKind]] = {}
    for kind in ERRORS.values():
        statuses.setdefault(kind.http_status, []).append(kind)
    for status, codes in _STATUSES_OF_TRANSPORT.items():
        statuses.setdefault(status, []).extend(ERRORS[code] for code in codes)
    return {
        _response_name(status): {
            "description": " ".join(kind.sentence for kind in kinds)
            if status not in _STATUSES_OF_TRANSPORT
            else f"{HTTPStatus(status).phrase}.",
            "content": {
                JSON_TYPE: {
                    "schema": body,
                    "examples": {kind.code: {"value": ModelManagerError(kind.code).body()} for kind in kinds},
                }
            },
        }
        for status, kinds in statuses.items()
    } | {"Error": {"description": "Any other failure.", "content": {JSON_TYPE: {"schema": body}}}}


def _response_name(status: int) -> str:
    return f"Error{int(status)}"


def error_responses(codes: Iterable[str], *statuses: int) -> dict[str, Schema]:
    """References to the answers for these codes and further statuses, and to the one for all others."""
    found = {ERRORS[code].http_status for code in codes} | set(statuses)
    references = {str(status): {"$ref": f"#/components/responses/{_response_name(status)}"} for status in sorted(found)}
    return {**references, "default": {"$ref": "#/components/responses/Error"}}


# What every route may answer, and every one that changes something besides.
COMMON_ERRORS = (
    "ERR_INVALID_REQUEST",
    "ERR_UNAUTHORIZED",
    "ERR_FORBIDDEN",
    "ERR_OVERLOADED",
    "ERR_STORAGE_UNAVAILABLE",
    "ERR_DEADLINE_EXCEEDED",
    "ERR_INTERNAL",
)
STORE_ERRORS = (
    "ERR_MODEL_ALREADY_EXISTS",
    "ERR_MODEL_TOO_LARGE",
    "ERR_UNSUPPORTED_FORMAT",
    "ERR_CHECKSUM_MISMATCH",
    "ERR_STORAGE_FULL",
)


# --- bytes -----------------------------------------------------------------------------------------------------------


def header(description: str, **keywords: Any) -> Schema:
    """A header of a response."""
    return {"description": description, "schema": {"type": "string", **keywords}}


_BYTES_HEADERS = {
    "ETag": header("The sha256 of the file in hex, in quotes."),
    "Repr-Digest": header("The sha256 of the whole file (RFC 9530).", pattern=_DIGEST_HEADER),
    "Content-Disposition": header("The name of the file."),
    "Accept-Ranges": header("`bytes`."),
}


def _reading(operation_id: str, summary: str, path: list[Schema], *, head: bool) -> Schema:
    body = {} if head else {"content": _BINARY}
    part = {**_BYTES_HEADERS, "Content-Range": header("Which bytes of how many.")}
    return {
        "operationId": operation_id,
        "summary": summary,
        "tags": ["content"],
        "parameters": [*path, *map(parameter, ("range", "ifRange", "ifNoneMatch", "redirect", "expires"))],
        "responses": {
            "200": {"description": "The bytes, never compressed.", "headers": _BYTES_HEADERS, **body},
            "206": {"description": "The range that was asked for.", "headers": part, **body},
            "304": {"description": "The caller has these bytes already.", "headers": _BYTES_HEADERS},
            "307": {"description": "The bytes are there.", "headers": {"Location": header("A signed address.")}},
            **error_responses((*COMMON_ERRORS, "ERR_MODEL_NOT_FOUND"), 416),
        },
        "security": SIGNED,
    }


def _storing(components: Components, path: list[Schema]) -> Schema:
    of_version = {"description": "Stored before, with the same bytes.", **_json(components, "StoreReply", StoreReply)}
    created = {"Location": header("The version.")}
    return {
        "operationId": "putContent",
        "summary": "Store a version of one file, streamed. The same bytes again are a success.",
        "tags": ["content"],
        "parameters": [
            *path,
            _parameter("query", "type", json_schema(ModelType), "The format of the model.", required=True),
            _parameter("query", "filename", json_schema(FilePath), "The path of the file; `model.<type>` if absent."),
            _parameter("query", "description", {"type": "string", "maxLength": 16_384}, "What the model is."),
            _parameter("query", "tag", {"type": "array", "items": json_schema(Tag)}, "A tag; may be repeated."),
            parameter("reprDigest"),
        ],
        "requestBody": {"required": True, "content": _BINARY, "description": "The bytes as they are: not encoded."},
        "responses": {
            "200": of_version,
            "201": {**of_version, "description": "Stored.", "headers": created},
            **error_responses((*COMMON_ERRORS, *STORE_ERRORS)),
        },
        "security": BEARER,
    }


def _receiving(components: Components, path: list[Schema]) -> Schema:
    return {
        "operationId": "putUploadFile",
        "summary": "Bring the bytes of one file of an upload, on a rack that stores on disk.",
        "tags": ["uploads"],
        "parameters": [*path, parameter("reprDigest"), parameter("expires")],
        "requestBody": {"required": True, "content": _BINARY, "description": "The bytes as they are: not encoded."},
        "responses": {
            "200": {"description": "Received and verified.", **_json(components, "Success", Success)},
            **error_responses((*COMMON_ERRORS, *STORE_ERRORS, "ERR_NOT_FOUND", "ERR_CONFLICT")),
        },
        "security": SIGNED,
    }


def _json(components: Components, name: str, kind: Any) -> Schema:
    return {"content": {JSON_TYPE: {"schema": components.add(name, json_schema(kind))}}}


def content_paths(components: Components, path_parameters: Any) -> dict[str, Schema]:
    """The routes that carry the bytes of models; `path_parameters` gives the parameters of a path."""
    paths: dict[str, Schema] = {}
    for path, name, what in ((CONTENT, "Content", "The bytes of a version of one file."), (FILE, "File", "A file.")):
        variables = path_parameters(path, reading=True)
        paths[path] = {
            "get": _reading(f"get{name}", what, variables, head=False),
            "head": _reading(f"head{name}", f"{what[:-1]}: its headers only.", variables, head=True),
        }
    paths[CONTENT]["put"] = _storing(components, path_parameters(CONTENT, reading=False))
    paths[UPLOAD_FILE] = {"put": _receiving(components, path_parameters(UPLOAD_FILE, reading=False))}
    return paths


# --- probes ----------------------------------------------------------------------------------------------------------


def _probe(name: str, summary: str, *, content: Schema, failing: bool = False) -> Schema:
    responses = {"200": {"description": summary, "content": content}}
    if failing:
        responses["503"] = {"description": "Not now.", "content": content}
    return {"operationId": name, "summary": summary, "tags": ["probes"], "responses": responses, "security": OPEN}


def _object(**members: Schema) -> Schema:
    return {JSON_TYPE: {"schema": {"type": "object", "properties": members, "required": sorted(members)}}}


def probe_paths() -> dict[str, Schema]:
    """The routes of monitors; none asks for a token."""
    text, flag = {"type": "string"}, {"type": "boolean"}
    check = {"type": "object", "properties": {"ok": flag, "reason": text}, "required": ["ok"]}
    checks = {"type": "object", "additionalProperties": check}
    ready = _probe("readyz", "Whether requests should be sent here.", content={JSON_TYPE: {}}, failing=True)
    ready["parameters"] = [
        _parameter("query", "verbose", {"type": "string"}, "Every check with its reason.") | {"allowEmptyValue": True}
    ]
    for response in ready["responses"].values():
        response["content"] = {
            JSON_TYPE: {
                "schema": {"type": "object", "properties": {"ready": flag, "checks": checks}, "required": ["ready"]}
            }
        }
    return {
        "/livez": {
            "get": _probe("livez", "The process is alive, whatever it depends on.", content=_object(status=text))
        },
        "/readyz": {"get": ready},
        "/health": {"get": _probe("health", "The state in one word.", content=_object(status=text), failing=True)},
        "/metrics": {"get": _probe("metrics", "For Prometheus.", content={"text/plain": {"schema": text}})},
        "/version": {"get": _probe("version", "Which build this is.", content=_object(version=text))},
        "/openapi.json": {
            "get": _probe("openapi", "This document.", content={JSON_TYPE: {"schema": {"type": "object"}}})
        },
    }
