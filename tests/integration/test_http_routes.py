"""Every RPC method over its route: statuses, headers, the one shape of errors."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import quote

import pytest

from schemas.wire import MAX_BODY_BYTES
from tests.http_rack import HttpRack, eventually, http_rack, sha256

DATA = b"0123456789"


@pytest.fixture
async def http(tmp_path: Path) -> AsyncIterator[HttpRack]:
    async with http_rack(tmp_path) as made:
        yield made


def store(model: str = "m", version: str = "1.0.0", data: bytes = DATA) -> dict[str, object]:
    return {
        "modelId": model,
        "metadata": {"type": "custom", "version": version, "tags": ["a"]},
        "modelData": base64.b64encode(data).decode(),
    }


# --- models ----------------------------------------------------------------------------------------------------------


async def test_a_store_is_201_with_its_location_and_a_second_one_200(http: HttpRack) -> None:
    first = await http.send("POST", "/api/models", json=store("org/m"))
    assert (first.status, first.headers["Location"]) == (201, "/api/models/org/m/versions/1.0.0")
    assert first.headers["Content-Type"] == "application/json"
    again = await http.send("POST", "/api/models", json=store("org/m"))
    assert (again.status, again.json["created"], "Location" in again.headers) == (200, False, False)
    assert (await http.send("GET", first.headers["Location"])).status == 200


async def test_other_bytes_for_a_stored_version_are_409(http: HttpRack) -> None:
    await http.send("POST", "/api/models", json=store())
    other = await http.send("POST", "/api/models", json=store(data=b"other"))
    assert (other.status, other.code) == (409, "ERR_MODEL_ALREADY_EXISTS")


async def test_a_model_is_its_latest_version_and_the_list_of_all(http: HttpRack) -> None:
    for version in ("1.0.0", "2.0.0"):
        await http.put("org/m", version, version.encode())
    answer = await http.send("GET", "/api/models/org%2Fm")
    assert answer.json["version"] == "2.0.0"
    assert [entry["version"] for entry in answer.json["versions"]] == ["1.0.0", "2.0.0"]
    assert (await http.send("GET", "/api/models/org/m")).json == answer.json


async def test_of_a_model_with_many_versions_those_stored_last_are_listed(
    http: HttpRack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.service.reading.VERSIONS_OF_MODEL", 2)
    for version in ("1", "2", "3", "4"):
        await http.put("m", version, version.encode())
    await http.send("DELETE", "/api/models/m/versions/3")
    answer = await http.send("GET", "/api/models/m")
    assert [entry["version"] for entry in answer.json["versions"]] == ["2", "4"]
    assert answer.json["omittedVersions"] == 1


@pytest.mark.parametrize("escaped", ["org/m-1.x", "org%2Fm-1.x", "org%2fm%2D1%2ex"])
async def test_a_name_may_be_written_with_escapes(http: HttpRack, escaped: str) -> None:
    await http.put("org/m-1.x", "1.0+b", DATA)
    answer = await http.send("GET", f"/api/models/{escaped}/versions/1.0%2Bb")
    assert (answer.json["modelId"], answer.json["version"]) == ("org/m-1.x", "1.0+b")
    assert (await http.send("GET", f"/api/models/{escaped}/versions/1.0+b")).status == 200


@pytest.mark.parametrize("name", ["..", "%2e%2e", "a%252Fb", "a..b", ".hidden", "a%5Cb", "%C3%A9", "a" * 97, "a;b"])
async def test_a_name_outside_the_grammar_is_400(http: HttpRack, name: str) -> None:
    answer = await http.send("GET", f"/api/models/{name}")
    assert (answer.status, answer.code) == (400, "ERR_INVALID_REQUEST")


async def test_what_is_not_there_is_404(http: HttpRack) -> None:
    for path in ("/api/models/x", "/api/models/x/versions/1", "/api/models/x/versions/1/content"):
        answer = await http.send("GET", path)
        assert (answer.status, answer.code) == (404, "ERR_MODEL_NOT_FOUND")
    job = await http.send("GET", "/api/jobs/01ARZ3NDEKTSV4RRFFQ69G5FAV")
    assert (job.status, job.code) == (404, "ERR_NOT_FOUND")


async def test_listing_takes_its_parameters_from_the_query(http: HttpRack) -> None:
    for name in ("a", "b", "c"):
        await http.put(name, "1", name.encode())
    page = (await http.send("GET", "/api/models?limit=2&type=custom")).json
    assert [entry["modelId"] for entry in page["models"]] == ["a", "b"]
    rest = (await http.send("GET", f"/api/models?limit=2&type=custom&cursor={page['nextCursor']}")).json
    assert [entry["modelId"] for entry in rest["models"]] == ["c"]


@pytest.mark.parametrize("query", ["limit=x", "limit=1.0", "limit=", "limit=0", "limit=1&limit=2", "size=1", "LIMIT=1"])
async def test_a_wrong_unknown_or_repeated_parameter_is_400(http: HttpRack, query: str) -> None:
    answer = await http.send("GET", f"/api/models?{query}")
    assert (answer.status, answer.code) == (400, "ERR_INVALID_REQUEST")


async def test_a_body_route_takes_no_query(http: HttpRack) -> None:
    answer = await http.send("POST", "/api/models?modelId=m", json=store())
    assert (answer.status, answer.code) == (400, "ERR_INVALID_REQUEST")


async def test_search_takes_a_body(http: HttpRack) -> None:
    await http.send("POST", "/api/models", json=store("a"))
    found = await http.send("POST", "/api/models/search", json={"criteria": {"tags": ["a"]}})
    assert [entry["modelId"] for entry in found.json["models"]] == ["a"]
    everything = await http.send("POST", "/api/models/search")
    assert everything.json["count"] == 1


async def test_metadata_has_its_revision_as_etag_and_changes_by_merge_patch(http: HttpRack) -> None:
    await http.put("m", "1", DATA, "type=custom&description=old&tag=x")
    path = "/api/models/m/versions/1"
    assert (await http.send("GET", path)).headers["ETag"] == '"1"'
    changed = await http.send("PATCH", path, json={"metadata": {"description": None, "owner": "me"}})
    assert (changed.status, changed.headers["ETag"]) == (200, '"2"')
    assert changed.json["metadata"]["owner"] == "me"
    assert changed.json["metadata"].get("description", "") == ""


async def test_if_match_lets_a_change_pass_for_the_revision_it_names_only(http: HttpRack) -> None:
    await http.put("m", "1", DATA)
    path, change = "/api/models/m/versions/1", {"metadata": {"a": 1}}
    for stale in ('"2"', 'W/"1"', '"x"'):
        refused = await http.send("PATCH", path, json=change, headers={"If-Match": stale})
        assert (refused.status, refused.code) == (412, "ERR_CONFLICT")
        assert refused.json["error"]["details"]["revision"] == 1
    for good in ('"1"', '"9", "2"', "*"):
        assert (await http.send("PATCH", path, json=change, headers={"If-Match": good})).status == 200
        change = {"metadata": {"a": change["metadata"]["a"] + 1}}
    assert (await http.send("PATCH", path, json=change, headers={"If-Match": "3"})).status == 400
    assert (await http.send("DELETE", path, headers={"If-Match": '"1"'})).status == 412
    assert (await http.send("DELETE", path, headers={"If-Match": '"4"'})).status == 200
    assert (await http.send("GET", "/api/models", headers={"If-Match": '"1"'})).status == 400


async def test_a_stale_expected_revision_in_the_body_is_409(http: HttpRack) -> None:
    await http.put("m", "1", DATA)
    answer = await http.send("PATCH", "/api/models/m/versions/1", json={"metadata": {}, "expectedRevision": 7})
    assert (answer.status, answer.code) == (409, "ERR_CONFLICT")


async def test_what_the_path_says_the_body_must_not_say_again(http: HttpRack) -> None:
    await http.put("m", "1", DATA)
    answer = await http.send("PATCH", "/api/models/m/versions/1", json={"modelId": "other", "metadata": {}})
    assert (answer.status, answer.code) == (400, "ERR_INVALID_REQUEST")


async def test_a_delete_is_undone_and_a_purge_is_not(http: HttpRack) -> None:
    await http.put("m", "1", DATA)
    await http.put("m", "2", DATA)
    deleted = await http.send("DELETE", "/api/models/m/versions/1")
    assert (deleted.json["versions"], "restorableUntil" in deleted.json) == (["1"], True)
    assert (await http.send("GET", "/api/models/m/versions/1")).status == 404
    assert (await http.send("POST", "/api/models/m/versions/1/restore")).json["versions"] == ["1"]
    assert sorted((await http.send("DELETE", "/api/models/m")).json["versions"]) == ["1", "2"]
    assert sorted((await http.send("POST", "/api/models/m/restore")).json["versions"]) == ["1", "2"]
    purged = await http.send("DELETE", "/api/models/m?purge=true")
    assert "restorableUntil" not in purged.json
    assert (await http.send("POST", "/api/models/m/restore")).status == 404
    assert (await http.send("DELETE", "/api/models/m?purge=yes")).status == 400


async def test_an_alias_is_set_compared_read_and_deleted(http: HttpRack) -> None:
    await http.put("m", "1", DATA)
    path = "/api/models/m/aliases/prod"
    fresh = await http.send("PUT", path, json={"version": "1", "expectedVersion": None})
    assert (fresh.status, fresh.json["previous"]) == (200, None)
    assert (await http.send("PUT", path, json={"version": "1", "expectedVersion": "2"})).status == 409
    assert (await http.send("GET", "/api/models/m/versions/prod")).json["version"] == "1"
    assert (await http.send("GET", "/api/models/m/versions/prod/content")).body == DATA
    assert (await http.send("DELETE", f"{path}?expectedVersion=2")).status == 409
    assert (await http.send("DELETE", f"{path}?expectedVersion=1")).status == 200
    gone = await http.send("DELETE", path)
    assert (gone.status, gone.code) == (404, "ERR_NOT_FOUND")


async def test_a_job_that_goes_on_is_202_with_its_address_and_one_that_is_done_is_200(http: HttpRack) -> None:
    await http.put("m", "1", DATA)
    begun = await http.send("POST", "/api/models/m/versions/1/validate", json={"waitMs": 0})
    assert begun.status == 202
    assert begun.headers["Location"] == f"/api/jobs/{begun.json['jobId']}"
    told = await http.send("GET", begun.headers["Location"] + "?waitMs=5000")
    assert (told.status, told.json["state"], told.json["result"]["isValid"]) == (200, "succeeded", True)
    cancelled = await http.send("DELETE", begun.headers["Location"])
    assert (cancelled.status, cancelled.json["state"]) == (200, "succeeded")
    done = await http.send("POST", "/api/models/m/versions/1/validate")
    assert (done.status, done.json["isValid"]) == (200, True)


async def test_an_upload_of_several_files_ends_in_a_version(http: HttpRack) -> None:
    files = {"a.bin": b"a" * 1000, "dir/ü b.bin": bytes(range(250)) * 280}
    declared = [{"path": path, "size": len(data), "sha256": "sha256:" + sha256(data)} for path, data in files.items()]
    begun = await http.send("POST", "/api/uploads", json={"modelId": "m", "version": "1", "files": declared})
    upload = f"/api/uploads/{begun.json['uploadId']}"
    assert (begun.status, begun.headers["Location"]) == (201, upload)
    assert (await http.send("PUT", f"{upload}/files/a.bin", data=files["a.bin"])).status == 200
    digest = base64.b64encode(bytes.fromhex(sha256(files["dir/ü b.bin"]))).decode()
    second = f"{upload}/files/dir%2F%C3%BC%20b.bin"
    wrong = await http.send("PUT", second, data=b"x" * 70_000)
    assert (wrong.status, wrong.code) == (422, "ERR_CHECKSUM_MISMATCH")
    right = await http.send("PUT", second, data=files["dir/ü b.bin"], headers={"Repr-Digest": f"sha-256=:{digest}:"})
    assert right.status == 200
    assert all(file["present"] for file in (await http.send("GET", upload)).json["files"])
    assert (await http.send("POST", f"{upload}/complete", json={"waitMs": 5000})).json["state"] == "completed"
    body = {"modelId": "m", "metadata": {"type": "custom", "version": "1"}, "uploadId": begun.json["uploadId"]}
    stored = await http.send("POST", "/api/models", json=body)
    assert stored.status == 201
    for path, data in files.items():
        assert (await http.send("GET", f"/api/models/m/versions/1/files/{quote(path)}")).body == data
    several = await http.send("GET", "/api/models/m/versions/1/content")
    assert (several.status, several.json["error"]["details"]["files"]) == (400, sorted(files))


async def test_an_aborted_upload_takes_nothing_more(http: HttpRack) -> None:
    declared = [{"path": "a", "size": 3, "sha256": "sha256:" + sha256(b"abc")}]
    begun = await http.send("POST", "/api/uploads", json={"modelId": "m", "version": "1", "files": declared})
    assert (await http.send("DELETE", begun.headers["Location"])).json["state"] == "aborted"
    late = await http.send("PUT", begun.headers["Location"] + "/files/a", data=b"abc")
    assert (late.status, late.code) == (409, "ERR_CONFLICT")


async def test_a_repeated_idempotency_key_gets_the_same_answer_and_another_request_409(http: HttpRack) -> None:
    key = {"Idempotency-Key": "one"}
    first = await http.send("POST", "/api/models", json=store(), headers=key)
    await http.send("DELETE", "/api/models/m?purge=true")
    again = await http.send("POST", "/api/models", json=store(), headers=key)
    assert (again.status, again.json) == (201, first.json)
    assert (await http.send("GET", "/api/models/m")).status == 404
    other = await http.send("POST", "/api/models", json=store("other"), headers=key)
    assert (other.status, other.code) == (409, "ERR_CONFLICT")


@pytest.mark.parametrize("revision", [{"json": {"expectedRevision": 1}}, {"headers": {"If-Match": '"1"'}}])
async def test_a_repeated_change_of_metadata_is_answered_as_the_first(
    http: HttpRack, revision: dict[str, dict[str, str]]
) -> None:
    await http.put("m", "1", DATA)
    body = {"metadata": {"a": 1}, **revision.get("json", {})}
    headers = {"Idempotency-Key": "one", **revision.get("headers", {})}
    first, again = [await http.send("PATCH", "/api/models/m/versions/1", json=body, headers=headers) for _ in range(2)]
    assert (first.status, first.json["revision"]) == (200, 2)
    assert (again.status, again.json) == (200, first.json)
    other = {"metadata": {"a": 2}}
    refused = await http.send("PATCH", "/api/models/m/versions/1", json=other, headers={"Idempotency-Key": "one"})
    assert (refused.status, refused.code) == (409, "ERR_CONFLICT")


@pytest.mark.parametrize("condition", [{}, {"If-Match": '"1"'}])
async def test_a_repeated_delete_is_answered_as_the_first_and_deletes_nothing_more(
    http: HttpRack, condition: dict[str, str]
) -> None:
    await http.put("m", "1", DATA)
    path, headers = "/api/models/m/versions/1", {"Idempotency-Key": "one", **condition}
    first, again = [await http.send("DELETE", path, headers=headers) for _ in range(2)]
    assert (first.status, first.json["versions"]) == (200, ["1"])
    assert (again.status, again.json) == (200, first.json)
    await http.send("POST", f"{path}/restore")
    assert (await http.send("DELETE", path, headers=headers)).json == first.json
    assert (await http.send("GET", path)).status == 200


async def test_a_repeated_removal_of_an_alias_is_answered_as_the_first(http: HttpRack) -> None:
    await http.put("m", "1", DATA)
    await http.send("PUT", "/api/models/m/aliases/prod", json={"version": "1"})
    headers = {"Idempotency-Key": "one"}
    first, again = [await http.send("DELETE", "/api/models/m/aliases/prod", headers=headers) for _ in range(2)]
    assert (first.status, again.status, again.json) == (200, 200, first.json)


@pytest.mark.parametrize("key", ["", "x" * 256, "é", "a\tb"])
async def test_a_malformed_idempotency_key_is_400(http: HttpRack, key: str) -> None:
    answer = await http.send("POST", "/api/models", json=store(), headers={"Idempotency-Key": key})
    assert (answer.status, answer.code) == (400, "ERR_INVALID_REQUEST")


async def test_stats_changes_and_ping_have_routes(http: HttpRack) -> None:
    await http.put("m", "1", DATA)
    assert (await http.send("GET", "/api/stats")).json["registry"]["versions"] == 1
    ping = (await http.send("GET", "/api/ping")).json
    assert ping["ready"] is True
    changes = await http.send("GET", f"/api/changes?epoch={ping['epoch']}&after=0")
    assert [change["subject"] for change in changes.json["changes"]] == ["m"]
    gone = await http.send("GET", f"/api/changes?epoch={ping['epoch'] + 1}&after=0")
    assert (gone.status, gone.code) == (410, "ERR_CHANGES_GONE")


# --- bodies ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("body", [b"{", b"[]", b'{"a":1,"a":2}', b"\xef\xbb\xbf{}", b'{"x":NaN}', b"\xff", b"{}x"])
async def test_what_is_no_json_object_is_400(http: HttpRack, body: bytes) -> None:
    answer = await http.send("POST", "/api/models/search", data=body, headers={"Content-Type": "application/json"})
    assert (answer.status, answer.code) == (400, "ERR_INVALID_REQUEST")


async def test_wrong_metadata_and_wrong_data_have_their_codes(http: HttpRack) -> None:
    for body, code in (
        ({**store(), "metadata": {}}, "ERR_INVALID_METADATA"),
        ({**store(), "modelData": "!"}, "ERR_INVALID_MODEL_DATA"),
        ({**store(), "other": 1}, "ERR_INVALID_REQUEST"),
    ):
        answer = await http.send("POST", "/api/models", json=body)
        assert (answer.status, answer.code) == (400, code)


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/json; charset=latin-1", "application/x-www-form-urlencoded"]
)
async def test_a_body_that_is_said_not_to_be_json_is_415(http: HttpRack, kind: str) -> None:
    answer = await http.send("POST", "/api/models/search", data=b"{}", headers={"Content-Type": kind})
    assert (answer.status, answer.code) == (415, "ERR_INVALID_REQUEST")


async def test_json_in_utf8_is_taken(http: HttpRack) -> None:
    for kind in ("application/json", "application/json; charset=utf-8", 'Application/JSON;charset="UTF-8"'):
        answer = await http.send("POST", "/api/models/search", data=b"{}", headers={"Content-Type": kind})
        assert answer.status == 200


async def test_an_encoded_body_is_415_and_never_inflated(http: HttpRack) -> None:
    for encoding in ("gzip", "deflate", "br", "identity"):
        headers = {"Content-Encoding": encoding, "Content-Type": "application/json"}
        answer = await http.send("POST", "/api/models/search", data=b"\x1f\x8b\x08" + bytes(100), headers=headers)
        assert (answer.status, answer.code) == (415, "ERR_INVALID_REQUEST")


async def test_a_json_body_over_the_limit_is_413_whether_its_length_is_told_or_not(http: HttpRack) -> None:
    async def chunked() -> AsyncIterator[bytes]:
        for _ in range(40):
            yield b" " * 100_000

    headers = {"Content-Type": "application/json"}
    told = await http.send("POST", "/api/models", data=b" " * (MAX_BODY_BYTES + 1), headers=headers)
    assert (told.status, told.code) == (413, "ERR_INVALID_REQUEST")
    untold = await http.send("POST", "/api/models", data=chunked(), headers=headers)
    assert (untold.status, untold.code) == (413, "ERR_INVALID_REQUEST")


async def test_a_body_where_none_belongs_is_400(http: HttpRack) -> None:
    for verb, path in (("GET", "/api/models"), ("DELETE", "/api/models/m"), ("GET", "/livez")):
        answer = await http.send(verb, path, data=b"{}")
        assert (answer.status, answer.code) == (400, "ERR_INVALID_REQUEST")


# --- routes and probes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/", "/api", "/api/models/", "//livez", "/livez/", "/API/models", "/.git/config"])
async def test_an_unknown_path_is_404_with_the_envelope(http: HttpRack, path: str) -> None:
    answer = await http.send("GET", path)
    assert (answer.status, answer.code) == (404, "ERR_UNKNOWN_METHOD")


async def test_a_wrong_verb_is_405_and_no_header_can_change_the_verb(http: HttpRack) -> None:
    for verb in ("POST", "OPTIONS", "TRACE", "PROPFIND"):
        origin = "http://x" if verb in ("OPTIONS", "TRACE") else http.url
        headers = {"X-HTTP-Method-Override": "DELETE", "Origin": origin, "Access-Control-Request-Method": "GET"}
        answer = await http.send(verb, "/api/models/m", headers=headers)
        assert (answer.status, answer.code) == (405, "ERR_UNKNOWN_METHOD")
        assert answer.headers["Allow"] == "DELETE, GET, HEAD"
        assert not [name for name in answer.headers if name.startswith("Access-Control")]


async def test_head_is_get_without_the_body(http: HttpRack) -> None:
    get, head = await http.send("GET", "/version"), await http.send("HEAD", "/version")
    assert (head.status, head.body) == (200, b"")
    assert head.headers["Content-Length"] == get.headers["Content-Length"] == str(len(get.body))


async def test_probes_tell_of_readiness_and_liveness_does_not_depend_on_it(http: HttpRack) -> None:
    assert (await http.send("GET", "/readyz")).json == {"ready": True}
    http.rack.readiness.set("storage", False, "no answer")
    for path in ("/readyz", "/health"):
        assert (await http.send("GET", path)).status == 503
    told = await http.send("GET", "/readyz?verbose")
    assert told.json == {
        "ready": False,
        "checks": {"registry": {"ok": True, "reason": ""}, "storage": {"ok": False, "reason": "no answer"}},
    }
    assert (await http.send("GET", "/health")).json == {"status": "unavailable"}
    alive = await http.send("GET", "/livez")
    assert (alive.status, alive.json) == (200, {"status": "ok"})
    http.rack.readiness.set("storage", True)
    assert (await http.send("GET", "/health")).json == {"status": "ok"}


async def test_metrics_version_and_document_are_served(http: HttpRack) -> None:
    metrics = await http.send("GET", "/metrics")
    assert (metrics.body, metrics.headers["Content-Type"]) == (b"model_manager_up 1\n", "text/plain; version=0.0.4")
    assert (await http.send("GET", "/version")).json["version"] == "1.2.3"
    assert (await http.send("GET", "/openapi.json")).json == {"openapi": "3.1.0"}


async def test_no_reply_tells_what_it_is_made_with(http: HttpRack) -> None:
    for path in ("/livez", "/nowhere", "/metrics", "/api/models"):
        assert (await http.send("GET", path)).headers["Server"] == "model-manager"


async def test_a_fault_of_ours_is_500_and_tells_nothing(http: HttpRack, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(model_id: str) -> list[object]:
        raise OSError(5, "Input/output error", "/srv/secret.py")

    await http.put("m", "1", DATA)
    monkeypatch.setattr(http.rack.service, "versions_of", broken)
    answer = await http.send("GET", "/api/models/m")
    assert (answer.status, answer.code) == (500, "ERR_INTERNAL")


async def test_the_observer_is_told_of_routes_not_of_names(http: HttpRack) -> None:
    await http.put("org/m", "1", DATA)
    await http.send("GET", "/api/models/org/m/versions/1/content")
    await http.send("GET", "/nowhere")
    content = "/api/models/{model}/versions/{version}/content"
    await eventually(lambda: len(http.seen.requests) == 3)
    assert http.seen.requests == [(content, "PUT", 201), (content, "GET", 200), ("none", "GET", 404)]
    assert http.seen.bytes["in"] == len(DATA)
    assert http.seen.bytes["out"] > len(DATA)
