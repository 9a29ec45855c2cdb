"""The generated documents: they follow their sources and their standards, and say what the worker does."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft7Validator, Draft202012Validator, ValidationError
from openapi_spec_validator import OpenAPIV31SpecValidator
from pydantic import ValidationError as ParamsError

from schemas.documents import FOLDER, documents, drift, main, write
from schemas.errors import ERRORS, ModelManagerError
from schemas.examples import STORY, Example, examples_of
from schemas.hints import HINT_TYPES, Hint, hint_of
from schemas.journal import RECORDS
from schemas.journal_examples import HINT_EXAMPLES, RECORD_EXAMPLES, WEIGHTS
from schemas.json_schemas import DIALECT, ErrorBody, json_schema, named_schemas, reply_schema
from schemas.model import version_digest
from schemas.routes import CONTENT, FILE, ROUTES, UPLOAD_FILE
from schemas.rpc import METHODS
from worker.transport import topology

ASYNCAPI_SCHEMA = Path(__file__).parent / "data" / "asyncapi-3.1.0.schema.json"
ULID = "01KAR5Z8S0V7M4T2Q9X3C6B1DE"
DIGEST = "sha256:" + "0" * 64


def committed(name: str) -> Any:
    return json.loads((FOLDER / name).read_text(encoding="utf-8"))


def accepts(schema: dict[str, Any], value: Any) -> bool:
    return Draft202012Validator(schema).is_valid(value)


def nodes(value: Any) -> Iterator[dict[str, Any]]:
    """Every object within a JSON value."""
    if isinstance(value, dict):
        yield value
    for member in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from nodes(member)


# --- generation ------------------------------------------------------------------------------------------------------


def test_the_committed_documents_follow_their_sources() -> None:
    assert drift() == [], "run python -m schemas.documents"


def test_generating_twice_gives_the_same_bytes() -> None:
    assert documents() == documents()
    assert all(text.endswith("}\n") for text in documents().values())


def test_check_finds_what_is_changed_missing_or_left_over_and_writing_mends_it(tmp_path: Path) -> None:
    write(tmp_path)
    assert drift(tmp_path) == []
    (tmp_path / "openapi.json").write_text("{}")
    (tmp_path / "json-schema" / "hint.json").unlink()
    (tmp_path / "json-schema" / "rpc.gone.params.json").write_text("{}")
    assert drift(tmp_path) == ["json-schema/hint.json", "json-schema/rpc.gone.params.json", "openapi.json"]
    write(tmp_path)
    assert drift(tmp_path) == []


def test_the_command_tells_by_its_exit_code_whether_the_documents_are_up_to_date() -> None:
    assert main(["--check"]) == 0


# --- JSON Schema -----------------------------------------------------------------------------------------------------


def test_there_is_a_schema_for_every_message_and_every_record() -> None:
    urns = {named.urn for named in named_schemas()}
    assert urns == (
        {"error", "hint"}
        | {f"rpc:{method}:{part}" for method in METHODS for part in ("params", "reply")}
        | {f"journal:{op}" for op in RECORDS}
    )


@pytest.mark.parametrize("named", named_schemas(), ids=lambda named: named.urn)
def test_a_schema_is_valid_draft_2020_12_with_a_stable_id(named: Any) -> None:
    document = committed(f"json-schema/{named.file}")
    Draft202012Validator.check_schema(document)
    assert document["$schema"] == DIALECT
    assert document["$id"] == f"urn:model-manager:{named.urn}:v1"


@pytest.mark.parametrize("method", METHODS.values(), ids=lambda method: method.name)
def test_parameters_have_camel_case_names_and_null_only_where_it_is_declared(method: Any) -> None:
    schema = json_schema(method.params)
    for part in nodes(schema):
        for name, member in part.get("properties", {}).items():
            assert "_" not in name
            assert "default" not in member or member["default"] is not None
    for name, member in schema.get("properties", {}).items():
        assert ({"type": "null"} in member.get("anyOf", [])) == (name in method.params.nullable)


REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("getModel", {"modelId": "a/b/c"}),
    ("getModel", {"modelId": "a--b"}),
    ("getModel", {"modelId": "a..b"}),
    ("getModel", {"modelId": "acme/versions"}),
    ("getModel", {"modelId": "a", "version": None}),
    ("getModel", {"modelId": "a", "version": ""}),
    ("getModel", {"modelId": "a", "unknown": 1}),
    ("getModel", {"modelId": "a", "delivery": "pigeon"}),
    ("getModel", {"model_id": "a"}),
    ("deleteModel", {"modelId": "a", "version": "Latest"}),
    ("deleteModel", {"modelId": "a", "purge": 1}),
    ("listModels", {"limit": 0}),
    ("listModels", {"limit": 1001}),
    ("listModels", {"cursor": None}),
    ("searchModels", {"sort": "colour"}),
    ("setAlias", {"modelId": "a", "alias": "latest", "version": "1"}),
    ("setAlias", {"modelId": "a", "alias": "b", "version": None}),
    ("storeModel", {"modelId": "a", "metadata": {"type": "onnx"}}),
    ("storeModel", {"modelId": "a", "metadata": {}, "modelData": "AA=="}),
    ("storeModel", {"modelId": "a", "metadata": {"type": "ONNX"}, "modelData": "AA=="}),
    ("storeModel", {"modelId": "a", "metadata": {"type": "onnx", "tags": ["x", "x"]}, "modelData": "AA=="}),
    ("storeModel", {"modelId": "a", "metadata": {"type": "onnx", "note": None}, "modelData": "AA=="}),
    ("storeModel", {"modelId": "a", "metadata": {"type": "onnx"}, "modelData": "AA==", "uploadId": ULID}),
    ("storeModel", {"modelId": "a", "metadata": {"type": "onnx"}, "modelData": "AA==", "filename": "../x"}),
    ("storeModel", {"modelId": "a", "metadata": {"type": "onnx"}, "modelData": "AA==", "filename": "/x"}),
    ("storeModel", {"modelId": "a", "metadata": {"type": "onnx"}, "modelData": "AA==", "filename": "a//x"}),
    ("storeModel", {"modelId": "a", "metadata": {"type": "onnx"}, "modelData": "AA==", "filename": "a\\x"}),
    ("storeModel", {"modelId": "a", "metadata": {"type": "onnx"}, "uploadId": ULID, "filename": "x"}),
    ("createUpload", {"modelId": "a", "version": "1", "files": []}),
    ("createUpload", {"modelId": "a", "version": "1", "files": [{"path": "x", "size": 2**53, "sha256": DIGEST}]}),
    ("getUpload", {"uploadId": ULID, "path": "x"}),
    ("getUpload", {"uploadId": ULID.lower()}),
    ("validateModel", {"modelId": "a", "waitMs": 5001}),
    ("getChanges", {"epoch": 0, "after": 0}),
]


@pytest.mark.parametrize(("method", "params"), REFUSED, ids=lambda value: json.dumps(value)[:70])
def test_what_the_worker_refuses_the_schema_refuses_too(method: str, params: dict[str, Any]) -> None:
    assert not accepts(json_schema(METHODS[method].params), params)
    with pytest.raises(ParamsError):
        METHODS[method].params.model_validate(params)


@pytest.mark.parametrize(
    ("method", "params"),
    [
        ("getModel", {"modelId": "Acme-1/net_v2.1", "version": "latest"}),
        ("deleteModel", {"modelId": "a", "version": "1.0.0+cu12"}),
        ("deleteAlias", {"modelId": "a", "alias": "b", "expectedVersion": None}),
        ("updateModelMetadata", {"modelId": "a", "metadata": {"description": None}}),
        ("searchModels", {"criteria": {"framework": "torch", "createdAt": {"from": "2026-01-01T00:00:00Z"}}}),
        (
            "storeModel",
            {"modelId": "a", "metadata": {"type": "x", "any": {"k": [1]}}, "files": [{"path": "a/b", "data": ""}]},
        ),
    ],
    ids=lambda value: json.dumps(value)[:70],
)
def test_what_the_worker_accepts_the_schema_accepts_too(method: str, params: dict[str, Any]) -> None:
    Draft202012Validator(json_schema(METHODS[method].params)).validate(params)
    METHODS[method].params.model_validate(params)


def test_a_job_that_is_not_done_has_a_good_reply_too() -> None:
    pending = {"success": True, "jobId": ULID, "state": "running"}
    assert {name for name, method in METHODS.items() if accepts(reply_schema(method), pending)} >= {
        name for name, method in METHODS.items() if method.job
    }
    assert not accepts(reply_schema(METHODS["storeModel"]), pending)


@pytest.mark.parametrize("code", ERRORS)
def test_the_body_of_every_error_follows_its_schema(code: str) -> None:
    schema = json_schema(ErrorBody)
    body = ModelManagerError(code, origin="rack-2").body()
    assert accepts(schema, body)
    assert not accepts(schema, {**body, "success": True})
    body["error"]["code"] = "ERR_OF_NO_TABLE"
    assert not accepts(schema, body)


# --- examples --------------------------------------------------------------------------------------------------------


def test_every_method_has_an_example_and_its_titles_differ() -> None:
    for method in METHODS:
        titles = [example.title for example in examples_of(method)]
        assert titles and len(set(titles)) == len(titles)
    assert {example.method for example in STORY} == set(METHODS)


@pytest.mark.parametrize("example", STORY, ids=lambda example: f"{example.method}: {example.title}")
def test_an_example_follows_the_schemas_and_the_worker_accepts_it(example: Example) -> None:
    method = METHODS[example.method]
    Draft202012Validator(json_schema(method.params)).validate(example.params)
    Draft202012Validator(reply_schema(method)).validate(example.reply)
    method.params.model_validate(example.params)


def test_the_sizes_and_checksums_of_the_examples_are_real() -> None:
    one, several = (example.reply for example in examples_of("storeModel"))
    assert one["size"] == len(WEIGHTS)
    for reply in (one, several):
        files = [(file["path"], file["size"], file["checksum"].removeprefix("sha256:")) for file in reply["files"]]
        assert reply["size"] == sum(size for _, size, _ in files)
        expected = files[0][2] if len(files) == 1 else version_digest(files)
        assert reply["checksum"] == f"sha256:{expected}"


def test_every_kind_of_record_has_an_example_that_follows_its_schema() -> None:
    assert RECORD_EXAMPLES.keys() == RECORDS.keys()
    for op, record in RECORD_EXAMPLES.items():
        Draft202012Validator(json_schema(RECORDS[op])).validate(record)


def test_every_kind_of_hint_has_an_example_that_follows_its_schema() -> None:
    assert {hint["type"] for hint in HINT_EXAMPLES} == set(HINT_TYPES)
    for hint in HINT_EXAMPLES:
        Draft202012Validator(json_schema(Hint)).validate(hint)


def test_the_schema_of_hints_knows_the_data_of_each_kind() -> None:
    validator = Draft202012Validator(json_schema(Hint))
    for hint in HINT_EXAMPLES:
        with pytest.raises(ValidationError):
            validator.validate({**hint, "data": {}})
    whole = hint_of(
        "delete", {**RECORD_EXAMPLES["delete"], "whole": True}, rack="rack-1", epoch=1, sequence=1, time_ms=0
    )
    validator.validate(whole)


# --- OpenAPI ---------------------------------------------------------------------------------------------------------


def test_the_openapi_document_is_valid() -> None:
    assert [str(error) for error in OpenAPIV31SpecValidator(committed("openapi.json")).iter_errors()] == []


def test_the_openapi_document_has_every_route() -> None:
    paths = committed("openapi.json")["paths"]
    expected = {(route.path, route.verb.lower()) for route in ROUTES}
    expected |= {(path, verb) for path in (CONTENT, FILE) for verb in ("get", "head")}
    expected |= {(CONTENT, "put"), (UPLOAD_FILE, "put")}
    probes = ("/livez", "/readyz", "/health", "/metrics", "/version", "/openapi.json")
    expected |= {(path, "get") for path in probes}
    assert {(path, verb) for path, item in paths.items() for verb in item} == expected
    assert all(paths[path]["get"]["security"] == [] for path in probes)


def test_every_parameter_of_a_method_can_be_given_on_one_of_its_routes() -> None:
    document = committed("openapi.json")
    given: dict[str, set[str]] = {}
    for route in ROUTES:
        operation = document["paths"][route.path][route.verb.lower()]
        body = operation.get("requestBody", {"content": {"application/json": {"schema": {}}}})
        names = set(body["content"]["application/json"]["schema"].get("properties", {}))
        names |= {entry["name"] for entry in operation["parameters"] if "name" in entry}
        given.setdefault(route.method, set()).update(names)
    carried = {"modelId": "model", "uploadId": "upload", "jobId": "job"}
    for name, method in METHODS.items():
        if name in given:
            wanted = json_schema(method.params).get("properties", {}).keys()
            assert {p for p in wanted if p not in given[name] and carried.get(p) not in given[name]} == set()


def test_every_error_code_occurs_in_the_openapi_document_under_its_status() -> None:
    responses = committed("openapi.json")["components"]["responses"]
    for code, kind in ERRORS.items():
        examples = responses[f"Error{kind.http_status}"]["content"]["application/json"]["examples"]
        assert examples[code]["value"]["error"]["code"] == code


def test_the_examples_in_the_openapi_document_follow_the_schemas_beside_them() -> None:
    document = committed("openapi.json")
    seen = 0
    for part in nodes(document):
        if "schema" in part and "examples" in part:
            schema = {"$schema": DIALECT, "components": document["components"], "allOf": [part["schema"]]}
            for example in part["examples"].values():
                Draft202012Validator(schema).validate(example["value"])
                seen += 1
    assert seen > len(STORY)


def test_the_openapi_document_takes_the_headers_of_the_contract() -> None:
    document = committed("openapi.json")
    names = {name: entry["name"] for name, entry in document["components"]["parameters"].items()}

    def headers(path: str, verb: str) -> set[str]:
        parameters = document["paths"][path][verb]["parameters"]
        return {names[entry["$ref"].rpartition("/")[2]] for entry in parameters if "$ref" in entry}

    assert {"Range", "If-Range", "If-None-Match"} <= headers(CONTENT, "get")
    assert "Repr-Digest" in headers(CONTENT, "put")
    assert "Idempotency-Key" not in headers(CONTENT, "put"), "what it would be compared by is known at the end only"
    assert "If-Match" in headers("/api/models/{model}/versions/{version}", "patch")
    for route in ROUTES:
        assert ("Idempotency-Key" in headers(route.path, route.verb.lower())) == (route.verb != "GET")


# --- AsyncAPI --------------------------------------------------------------------------------------------------------


def test_the_asyncapi_document_is_valid_by_the_schema_of_the_standard() -> None:
    validator = Draft7Validator(json.loads(ASYNCAPI_SCHEMA.read_text(encoding="utf-8")))
    assert [error.message for error in validator.iter_errors(committed("asyncapi.json"))] == []


def test_every_reference_in_the_documents_leads_somewhere() -> None:
    for name in ("asyncapi.json", "openapi.json"):
        document = committed(name)
        for part in nodes(document):
            if isinstance(reference := part.get("$ref"), str):
                target = document
                for step in reference.removeprefix("#/").split("/"):
                    target = target[step]


def test_every_method_is_an_operation_with_a_reply() -> None:
    document = committed("asyncapi.json")
    assert document["operations"].keys() == METHODS.keys() | {"sendHint"}
    for name in METHODS:
        operation = document["operations"][name]
        assert operation["reply"]["address"]["location"] == "$message.header#/replyTo"
        assert document["channels"][name]["address"] == f"{{rack}}.{name}"
        assert document["components"]["messages"][f"{name}Request"]["examples"]


def test_the_exchanges_in_the_asyncapi_document_are_those_the_worker_provisions() -> None:
    channels = committed("asyncapi.json")["channels"]
    exchanges = {
        (exchange["name"], exchange["type"])
        for channel in channels.values()
        if (exchange := channel.get("bindings", {}).get("amqp", {}).get("exchange"))
    }
    assert exchanges == {(topology.RPC_EXCHANGE, "topic"), (topology.HINT_EXCHANGE, "fanout")}


def test_the_payloads_in_the_asyncapi_document_accept_their_examples_as_draft_07() -> None:
    document = committed("asyncapi.json")
    for message in document["components"]["messages"].values():
        schema = {"components": document["components"], "allOf": [message["payload"]]}
        for example in message.get("examples", []):
            Draft7Validator(schema).validate(example["payload"])
