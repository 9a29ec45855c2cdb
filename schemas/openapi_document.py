"""The OpenAPI 3.1 document of the HTTP service: the routes of the methods, and those of `openapi_content.py`."""

from __future__ import annotations

import re
from typing import Any

from schemas.examples import examples_of
from schemas.ids import Alias, FilePath, ModelId, Ulid, Version, VersionRef
from schemas.json_schemas import CONTRACT, Components, Schema, json_schema, reply_schema
from schemas.method_errors import errors_of
from schemas.model import VersionsOfModel
from schemas.openapi_content import (
    BEARER,
    COMMON_ERRORS,
    JSON_TYPE,
    PARAMETERS,
    SECURITY_SCHEMES,
    content_paths,
    error_components,
    error_responses,
    header,
    parameter,
    probe_paths,
)
from schemas.routes import PATH_PARAMETERS, ROUTES, Route
from schemas.rpc import METHODS, Method

_TAGS = {"/api/models": "models", "/api/uploads": "uploads", "/api/jobs": "jobs"}
_LATEST = Route("getModelMetadata", "GET", "/api/models/{model}")
_SLASH = "A `/` may also be written as `%2F`, and some clients must."
_VARIABLES: dict[str, tuple[Any, str]] = {
    "model": (ModelId, f"The model, `name` or `org/name`. {_SLASH}"),
    "version": (Version, "The version."),
    "alias": (Alias, "The alias."),
    "upload": (Ulid, "The upload."),
    "job": (Ulid, "The job."),
    "path": (FilePath, f"The path of the file. {_SLASH}"),
}


def openapi_document() -> Schema:
    """The whole document."""
    components = Components()
    responses = error_components(components)
    paths = {**content_paths(components, _path_parameters), **probe_paths()}
    for route in ROUTES:
        paths.setdefault(route.path, {})[route.verb.lower()] = _operation(route, components)
    return {
        "openapi": "3.1.0",
        "jsonSchemaDialect": "https://json-schema.org/draft/2020-12/schema",
        "info": {
            "title": "Model manager",
            "version": CONTRACT,
            "summary": "The AI-model catalog of one rack, over HTTP.",
            "description": "The same requests and error bodies as over RabbitMQ. Unknown parameters are refused.",
            "license": {"name": "Apache 2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "http://127.0.0.1:8002", "description": "The default address of a worker."}],
        "tags": [{"name": name} for name in ("models", "content", "uploads", "jobs", "rack", "probes")],
        "paths": paths,
        "components": {
            "parameters": PARAMETERS,
            "responses": responses,
            "schemas": components.schemas,
            "securitySchemes": SECURITY_SCHEMES,
        },
        "security": BEARER,
    }


def _path_parameters(path: str, *, reading: bool) -> list[Schema]:
    parameters = []
    for name in re.findall(r"{(\w+)}", path):
        kind, description = _VARIABLES[name]
        if name == "version" and reading:
            kind, description = VersionRef, "A version, an alias, or `latest`."
        schema = json_schema(kind)
        schema.pop("description", None)
        parameters.append({"in": "path", "name": name, "required": True, "schema": schema, "description": description})
    return parameters


def _operation(route: Route, components: Components) -> Schema:
    method = METHODS[route.method]
    schema = json_schema(method.params)
    carried = {PATH_PARAMETERS[name] for name in re.findall(r"{(\w+)}", route.path)}
    left = {name: member for name, member in schema["properties"].items() if name not in carried}
    # Whether the path's version may be an alias is the method's to say.
    reading = left.keys() | carried >= {"version"} and "not" not in schema["properties"]["version"]
    operation: Schema = {
        "operationId": _operation_id(route),
        "summary": method.summary,
        "tags": [next((tag for prefix, tag in _TAGS.items() if route.path.startswith(prefix)), "rack")],
        "parameters": _path_parameters(route.path, reading=reading),
        "responses": _responses(route, method, components),
        "security": BEARER,
    }
    if route.verb in ("GET", "DELETE"):
        operation["parameters"] += _query(schema, left)
    elif left:
        operation["requestBody"] = _body(route, schema, left, carried, components)
    if route.verb != "GET":
        operation["parameters"].append(parameter("idempotencyKey"))
    if route.verb == "PATCH":
        operation["parameters"].append(parameter("ifMatch"))
    return operation


def _operation_id(route: Route) -> str:
    """The method, or for its further routes the method and what the route is about."""
    first = next(other for other in ROUTES if other.method == route.method)
    if route is first:
        return route.method
    return f"{route.method}Of{'Version' if '{version}' in route.path else route.path.rpartition('/')[2].title()}"


def _query(schema: Schema, left: dict[str, Schema]) -> list[Schema]:
    """The parameters that fit in a query: plain ones, unless they go with one that is not."""
    structured = {name for name, member in left.items() if member.get("type") in ("array", "object")}
    goes_with = schema.get("dependentRequired", {})
    required = schema.get("required", [])
    return [
        {
            "in": "query",
            "name": name,
            "required": name in required,
            "schema": _without_null(member),
            "description": member.get("description", f"`{name}`, as in the request on RabbitMQ."),
        }
        for name, member in left.items()
        if name not in structured and not structured.intersection(goes_with.get(name, []))
    ]


def _without_null(member: Schema) -> Schema:
    """A query has no null."""
    kinds = [kind for kind in member.get("anyOf", []) if kind != {"type": "null"}]
    return kinds[0] if len(kinds) == 1 else member


def _body(route: Route, schema: Schema, left: Schema, carried: set[str], components: Components) -> Schema:
    rest = {**schema, "properties": left}
    rest["required"] = [name for name in schema.get("required", []) if name not in carried]
    if not rest["required"]:
        del rest["required"]
    examples = {
        example.title: {"value": {name: value for name, value in example.params.items() if name not in carried}}
        for example in examples_of(route.method)
        if not example.params.keys() <= carried
    }
    return {
        "required": "required" in rest,
        "content": {JSON_TYPE: {"schema": components.embed(rest), "examples": examples}},
    }


def _responses(route: Route, method: Method, components: Components) -> Schema:
    reply = components.add(f"{method.name}Reply", reply_schema(method))
    examples = {example.title: {"value": example.reply} for example in examples_of(method.name)}
    if route == _LATEST:
        reply, examples = _with_versions(reply, examples, components)
    answer: Schema = {"content": {JSON_TYPE: {"schema": reply, "examples": examples}}}
    good: Schema = {"200": {"description": "Done.", **answer}}
    if route.created == 201:
        located = {"Location": header("Where it is from now on.")}
        good["201"] = {"description": "Something new was made.", "headers": located, **answer}
    if "revision" in method.reply.__annotations__:
        good["200"]["headers"] = {"ETag": header("The revision, in quotes.")}
    codes = [*COMMON_ERRORS, *errors_of(method.name)]
    return {**good, **error_responses(codes, *((412,) if route.verb == "PATCH" else ()))}


def _with_versions(reply: Schema, examples: Schema, components: Components) -> tuple[Schema, Schema]:
    """What is known of the latest version, and the list of all versions."""
    versions = components.add("VersionsOfModel", json_schema(VersionsOfModel))
    listed = examples_of("listModels")[0].reply["models"]
    return (
        {"allOf": [reply, versions]},
        {title: {"value": {**example["value"], "versions": listed}} for title, example in examples.items()},
    )
