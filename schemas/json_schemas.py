"""JSON Schema 2020-12 of everything on the wire and in the journal, from the models and the typed dictionaries.

The validators that pydantic cannot see through (names, paths, members that exclude each other) are spelled out here as
schema keywords, so that what a schema accepts is what the worker accepts, as far as JSON Schema can say it. Replies,
hints and records are open: later versions may add members, and readers ignore what they do not know.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from pydantic import TypeAdapter
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import core_schema
from typing_extensions import TypedDict

from schemas.errors import ERRORS
from schemas.hints import HINT_TYPES, Hint
from schemas.ids import (
    LABEL_PATTERN,
    MAX_PATH_BYTES,
    MODEL_ID_PATTERN,
    RACK_PATTERN,
    RESERVED_SECOND_PARTS,
    check_model_id,
    check_path,
    check_version,
    check_version_ref,
)
from schemas.journal import RECORDS
from schemas.model import Metadata, Wire
from schemas.rpc import METHODS, ChangesReply, Criteria, InlineFile, JobReply, Method, SearchModels, StoreModel
from schemas.uploads import GetUpload

Schema = dict[str, Any]

DIALECT = "https://json-schema.org/draft/2020-12/schema"
CONTRACT = "v1"


class ErrorDetail(TypedDict):
    """`code` is for programs, `message` for people; with `retryable` the same request may succeed later."""

    code: str
    message: str
    retryable: bool
    details: dict[str, Any]


class ErrorBody(TypedDict):
    """The answer to a request that failed, the same on every transport."""

    success: bool
    error: ErrorDetail


# What the validators of `ids.py` check, as keywords. Lengths count characters here and bytes there.
_NAME_KEYWORDS: dict[Callable[..., Any], Schema] = {
    check_model_id: {
        "pattern": MODEL_ID_PATTERN,
        "not": {"pattern": rf"\.\.|--|/({'|'.join(sorted(RESERVED_SECOND_PARTS))})$"},
        "description": "`name` or `org/name`.",
    },
    check_version: {
        "pattern": LABEL_PATTERN,
        "not": {"pattern": "^[Ll][Aa][Tt][Ee][Ss][Tt]$"},
        "description": "A name for a version; `latest` is reserved.",
    },
    check_version_ref: {"pattern": LABEL_PATTERN, "description": "A version, an alias, or `latest`."},
    check_path: {
        "minLength": 1,
        "maxLength": MAX_PATH_BYTES,
        "pattern": r"^[^\u0000-\u001f\u007f\\]+$",
        "not": {"pattern": r"(^|/)\.{0,2}(/|$)"},
        "description": "A relative path, `/` between its parts.",
    },
}

_BASE64 = {"contentEncoding": "base64", "description": "The bytes, in base64."}


def _refine_store(schema: Schema) -> None:
    schema["properties"]["modelData"] |= _BASE64
    schema["oneOf"] = [{"required": [source]} for source in ("modelData", "files", "uploadId")]
    schema["dependentRequired"] = {"filename": ["modelData"], "checksum": ["modelData"]}


def _refine_inline_file(schema: Schema) -> None:
    schema["properties"]["data"] |= _BASE64


def _refine_metadata(schema: Schema) -> None:
    schema["properties"]["tags"]["uniqueItems"] = True
    schema["additionalProperties"] = {"not": {"type": "null"}}


def _refine_search(schema: Schema) -> None:
    criteria = json_schema(Criteria)
    schema["properties"]["criteria"] = {
        "type": "object",
        "properties": {name: _inlined(member, criteria["$defs"]) for name, member in criteria["properties"].items()},
        "additionalProperties": True,
        "description": "`tags` all of; ranges inclusive; any other member equals the member of the metadata.",
    }


def _refine_upload_query(schema: Schema) -> None:
    schema["dependentRequired"] = {"path": ["parts"], "parts": ["path"]}


def _refine_error_body(schema: Schema) -> None:
    schema["properties"]["success"] = {"const": False, "type": "boolean"}


def _refine_error_detail(schema: Schema) -> None:
    schema["properties"]["code"]["enum"] = list(ERRORS)


def _refine_hint(schema: Schema) -> None:
    members = schema["properties"]
    members["specversion"]["const"] = "1.0"
    members["datacontenttype"]["const"] = "application/json"
    members["type"]["enum"] = list(HINT_TYPES)
    members["source"]["pattern"] = f"^/racks/{RACK_PATTERN[1:]}"
    members["time"]["format"] = "date-time"
    for name in ("rackseq", "rackepoch"):
        members[name]["pattern"] = r"^\d{1,16}$"
    schema["allOf"] = [
        {
            "if": {"properties": {"type": {"const": kind}}},
            "then": {"properties": {"data": {"properties": HINT_DATA[kind], "required": sorted(HINT_DATA[kind])}}},
        }
        for kind in HINT_TYPES
        if kind in HINT_DATA
    ]
    schema["allOf"].append(
        {
            "if": {"properties": {"type": {"enum": list(_OF_VERSIONS)}}},
            "then": {"properties": {"data": _ONE_OR_ALL_VERSIONS}},
        }
    )


_TEXT: Schema = {"type": "string"}
_TEXTS: Schema = {"type": "array", "items": _TEXT}
_COUNT: Schema = {"type": "integer", "minimum": 0}
_LABEL_OR_NULL: Schema = {"type": ["string", "null"]}
_STORED: dict[str, Schema] = {"version": _TEXT, "digest": _TEXT, "size": _COUNT, "replicas": _TEXTS}

# The members of a hint's `data` by its type; a delete or restore of all names `versions`, of one `version`. A delete
# without `restorableUntil` has purged them.
HINT_DATA: dict[str, dict[str, Schema]] = {
    "model-manager.version.stored": _STORED,
    "model-manager.version.updated": {**_STORED, "revision": _COUNT, "state": _TEXT},
    "model-manager.alias.changed": {"alias": _TEXT, "version": _LABEL_OR_NULL, "previous": _LABEL_OR_NULL},
    "model-manager.head": {"head": _COUNT},
}
_OF_VERSIONS = ("model-manager.version.deleted", "model-manager.version.restored")
_ONE_OR_ALL_VERSIONS: Schema = {
    "properties": {"version": _TEXT, "versions": _TEXTS, "replicas": _TEXTS, "restorableUntil": _TEXT},
    "required": ["replicas"],
    "oneOf": [{"required": ["version"]}, {"required": ["versions"]}],
}

_REFINEMENTS: dict[type, Callable[[Schema], None]] = {
    StoreModel: _refine_store,
    InlineFile: _refine_inline_file,
    Metadata: _refine_metadata,
    SearchModels: _refine_search,
    GetUpload: _refine_upload_query,
    ErrorBody: _refine_error_body,
    ErrorDetail: _refine_error_detail,
    Hint: _refine_hint,
}


class _WireSchemas(GenerateJsonSchema):
    """Schemas as the contract is meant: an optional member of a `Wire` is absent, null only where it is declared."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False

    def model_schema(self, schema: core_schema.ModelSchema) -> JsonSchemaValue:
        result = super().model_schema(schema)
        kind = cast(type[Wire], schema["cls"])
        for name, member in result.get("properties", {}).items():
            if member.get("default", ...) is None:
                del member["default"]  # None stands for absent in Python; on the wire null is another thing
            if name not in kind.nullable:
                _refuse_null(member)
        return _refined(kind, result)

    def typed_dict_schema(self, schema: core_schema.TypedDictSchema) -> JsonSchemaValue:
        result = super().typed_dict_schema(schema)
        kind = schema.get("cls")
        return result if kind is None else _refined(kind, result)

    def function_after_schema(self, schema: core_schema.AfterValidatorFunctionSchema) -> JsonSchemaValue:
        result = super().function_after_schema(schema)
        keywords = _NAME_KEYWORDS.get(cast(Callable[..., Any], schema["function"]["function"]), {})
        return {**result, **keywords}


def _refuse_null(member: Schema) -> None:
    """Turn "X or null" into X."""
    match member.get("anyOf"):
        case [kind, {"type": "null"}]:
            del member["anyOf"]
            member |= kind


def _refined(kind: type, schema: Schema) -> Schema:
    if kind in _REFINEMENTS:
        _REFINEMENTS[kind](schema)
    return schema


def _inlined(schema: Schema, definitions: dict[str, Schema]) -> Schema:
    """The schema with a reference to a definition replaced by what it says."""
    if "$ref" in schema:
        return definitions[schema["$ref"].rpartition("/")[2]]
    return schema


def json_schema(kind: Any) -> Schema:
    """The schema of a `Wire` class, a typed dictionary or a union of them; what it refers to is in its `$defs`."""
    schema = TypeAdapter(kind).json_schema(by_alias=True, schema_generator=_WireSchemas)
    if kind is ChangesReply:
        hint = json_schema(Hint)
        schema["properties"]["changes"]["items"] = {"$ref": "#/$defs/Hint"}
        schema["$defs"] = {**schema.get("$defs", {}), **hint.pop("$defs", {}), "Hint": hint}
    return schema


def reply_schema(method: Method) -> Schema:
    """The schema of a method's good reply; a job may also answer that it is not done yet."""
    return json_schema(method.reply | JobReply if method.job else method.reply)


@dataclass(frozen=True, slots=True)
class NamedSchema:
    """A schema with the names it has as a file (below `json-schema/`), as an `$id` and as a component."""

    file: str
    urn: str
    component: str
    schema: Schema

    def document(self) -> Schema:
        """The schema as it stands in its own file."""
        return {"$schema": DIALECT, "$id": f"urn:model-manager:{self.urn}:{CONTRACT}", **self.schema}


def named_schemas() -> list[NamedSchema]:
    """Every schema of the contract."""
    found = [
        NamedSchema("error.json", "error", "ErrorBody", json_schema(ErrorBody)),
        NamedSchema("hint.json", "hint", "Hint", json_schema(Hint)),
    ]
    for name, method in METHODS.items():
        params, reply = json_schema(method.params), reply_schema(method)
        found.append(NamedSchema(f"rpc.{name}.params.json", f"rpc:{name}:params", f"{name}Params", params))
        found.append(NamedSchema(f"rpc.{name}.reply.json", f"rpc:{name}:reply", f"{name}Reply", reply))
    for op, record in RECORDS.items():
        found.append(NamedSchema(f"journal.{op}.json", f"journal:{op}", record.__name__, json_schema(record)))
    return found


class Components:
    """The schemas that a larger document refers to, collected below `#/components/schemas`."""

    def __init__(self) -> None:
        self.schemas: dict[str, Schema] = {}

    def add(self, name: str, schema: Schema) -> Schema:
        """Take in a schema and its definitions; the reference to it."""
        self._keep(name, self.embed(schema))
        return {"$ref": f"#/components/schemas/{name}"}

    def embed(self, schema: Schema) -> Schema:
        """Take in the definitions of a schema only; the schema that refers to them here."""
        for name, definition in schema.get("$defs", {}).items():
            self._keep(name, _pointed_at_components(definition))
        moved: Schema = _pointed_at_components({key: value for key, value in schema.items() if key != "$defs"})
        return moved

    def _keep(self, name: str, schema: Schema) -> None:
        if self.schemas.setdefault(name, schema) != schema:
            raise ValueError(f"two different schemas are called {name}")


def _pointed_at_components(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            key: member.replace("#/$defs/", "#/components/schemas/")
            if key == "$ref"
            else _pointed_at_components(member)
            for key, member in value.items()
        }
    return [_pointed_at_components(member) for member in value] if isinstance(value, list) else value
