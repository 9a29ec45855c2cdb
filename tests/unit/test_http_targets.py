"""What a request line asks for, and which route that is."""

from __future__ import annotations

import pytest

from schemas.routes import CONTENT, FILE, ROUTES, UPLOAD_FILE
from schemas.rpc import METHODS
from worker.transport.http_api import query_kinds
from worker.transport.http_replies import HttpFault
from worker.transport.http_router import Router
from worker.transport.http_target import parse_target


def router() -> Router[str]:
    made: Router[str] = Router()
    for route in ROUTES:
        made.add(route.verb, route.path, route.method)
    made.add("GET", CONTENT, "read")
    made.add("PUT", CONTENT, "store")
    made.add("GET", FILE, "read")
    made.add("PUT", UPLOAD_FILE, "receive")
    return made


@pytest.mark.parametrize(
    ("raw", "path"),
    [
        ("/a/b", "/a/b"),
        ("/org%2Fname", "/org/name"),
        ("/a%20b%C3%A9", "/a bé"),
        ("/a+b", "/a+b"),
        ("/%252e", "/%2e"),
        ("/a/../b/%2e%2e", "/a/../b/.."),
        ("//a//", "//a//"),
        ("http://host:1/a?b=c", "/a"),
        ("https://host", "/"),
        ("*", "*"),
    ],
)
def test_a_path_is_decoded_once_and_never_normalised(raw: str, path: str) -> None:
    assert parse_target(raw).path == path


@pytest.mark.parametrize(
    "raw", ["/%", "/%2", "/%zz", "/%00", "/a%0Ab", "/%7f", "/%ff", "/%c0%af", "/a#b", "/?a=%", "/?a=%00", "/?%ff=1"]
)
def test_bad_escapes_controls_fragments_and_what_is_not_utf8_are_refused(raw: str) -> None:
    with pytest.raises(HttpFault) as caught:
        parse_target(raw)
    assert caught.value.status == 400


def test_a_query_is_read_by_name_and_what_nobody_asked_for_is_refused() -> None:
    query = parse_target("/?tag=a+b&tag=c%2Bd&x=&&y").query
    assert query.every("tag") == ["a b", "c+d"]
    assert query.one("x") == "" == query.one("y")
    assert query.one("absent") is None
    query.finish()
    with pytest.raises(HttpFault, match="more than once"):
        query.one("tag")
    with pytest.raises(HttpFault, match="Unknown parameter 'other'"):
        parse_target("/?other=1").query.finish()


def test_a_query_of_too_many_parameters_is_refused() -> None:
    with pytest.raises(HttpFault, match="more than 100"):
        parse_target("/?" + "&".join(f"p{n}" for n in range(101)))


@pytest.mark.parametrize(
    ("verb", "path", "method", "variables"),
    [
        ("GET", "/api/models", "listModels", {}),
        ("POST", "/api/models/search", "searchModels", {}),
        ("GET", "/api/models/search", "getModelMetadata", {"model": "search"}),
        ("GET", "/api/models/m", "getModelMetadata", {"model": "m"}),
        ("GET", "/api/models/org/m", "getModelMetadata", {"model": "org/m"}),
        ("GET", "/api/models/versions/m", "getModelMetadata", {"model": "versions/m"}),
        ("POST", "/api/models/m/restore", "restoreModel", {"model": "m"}),
        ("POST", "/api/models/o/m/restore", "restoreModel", {"model": "o/m"}),
        ("POST", "/api/models/restore/restore", "restoreModel", {"model": "restore"}),
        ("PATCH", "/api/models/o/m/versions/1.0", "updateModelMetadata", {"model": "o/m", "version": "1.0"}),
        ("PUT", "/api/models/m/aliases/prod", "setAlias", {"model": "m", "alias": "prod"}),
        ("PUT", "/api/models/m/versions/1/content", "store", {"model": "m", "version": "1"}),
        (
            "HEAD",
            "/api/models/o/m/versions/1/files/a/b/../c",
            "read",
            {"model": "o/m", "version": "1", "path": "a/b/../c"},
        ),
        ("PUT", "/api/uploads/u/files/a/content", "receive", {"upload": "u", "path": "a/content"}),
        ("POST", "/api/uploads/u/complete", "completeUpload", {"upload": "u"}),
    ],
)
def test_a_route_is_found_and_a_reserved_part_is_never_of_a_name(
    verb: str, path: str, method: str, variables: dict[str, str]
) -> None:
    found = router().find(verb, path)
    assert (found.endpoint, found.variables) == (method, variables)


@pytest.mark.parametrize(
    "path", ["", "/", "/api", "/api/models/", "/api/models/a/b/c", "/API/MODELS", "/api/models/m/versions", "*", "/a\n"]
)
def test_an_unknown_path_is_404(path: str) -> None:
    with pytest.raises(HttpFault) as caught:
        router().find("GET", path)
    assert (caught.value.status, caught.value.code) == (404, "ERR_UNKNOWN_METHOD")


def test_a_verb_that_a_path_does_not_have_is_405_and_tells_those_it_has() -> None:
    with pytest.raises(HttpFault) as caught:
        router().find("POST", "/api/models/m/versions/1")
    assert (caught.value.status, caught.value.code) == (405, "ERR_UNKNOWN_METHOD")
    assert caught.value.headers == {"Allow": "DELETE, GET, HEAD, PATCH"}


def test_a_query_carries_the_plain_parameters_of_a_method_with_their_types() -> None:
    assert query_kinds(METHODS["listModels"]) == {"type": str, "limit": int, "cursor": str}
    assert query_kinds(METHODS["deleteModel"]) == {"modelId": str, "version": str, "purge": bool}
    assert query_kinds(METHODS["getUpload"]) == {"uploadId": str, "path": str}
    assert query_kinds(METHODS["deleteAlias"])["expectedVersion"] is str
