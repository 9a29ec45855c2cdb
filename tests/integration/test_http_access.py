"""Who may ask, and what a web page must not be able to do."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.http_rack import HttpRack, http_rack, sha256, split

TOKEN = "correct-horse-battery-staple"
AUTHORIZED = {"Authorization": f"Bearer {TOKEN}"}
PATH = "/api/models/m/versions/1/content"
PROBES = ("/livez", "/readyz", "/readyz?verbose", "/health", "/metrics", "/version", "/openapi.json")


@pytest.fixture
async def http(tmp_path: Path) -> AsyncIterator[HttpRack]:
    async with http_rack(tmp_path, token=TOKEN) as made:
        assert (await made.put("m", "1", b"data", headers=AUTHORIZED)).status == 201
        yield made


@pytest.fixture
async def local(tmp_path: Path) -> AsyncIterator[HttpRack]:
    async with http_rack(tmp_path) as made:
        yield made


def signed(http: HttpRack, verb: str, path: str, seconds: int = 60) -> str:
    return f"{path}?{http.signer.sign(verb, path, expires=int(time.time()) + seconds)}"


async def test_the_token_opens_every_route(http: HttpRack) -> None:
    for given in (f"Bearer {TOKEN}", f"bearer {TOKEN}", f"BEARER  {TOKEN}"):
        assert (await http.send("GET", "/api/models", headers={"Authorization": given})).status == 200


@pytest.mark.parametrize(
    "given",
    [
        "",
        TOKEN,
        f"Basic {TOKEN}",
        f"Token {TOKEN}",
        f"Bearer {TOKEN}x",
        f"Bearer {TOKEN[:-1]}",
        f"Bearer {TOKEN.upper()}",
        f"Bearer x {TOKEN}",
        "Bearer",
        "Bearer ",
        "Bearer é",
    ],
)
async def test_anything_else_is_401_and_tells_how(http: HttpRack, given: str) -> None:
    answer = await http.send("GET", "/api/models", headers={"Authorization": given})
    assert (answer.status, answer.code) == (401, "ERR_UNAUTHORIZED")
    assert answer.headers["WWW-Authenticate"].startswith("Bearer ")


async def test_two_tokens_are_none(http: HttpRack) -> None:
    header = f"Authorization: Bearer {TOKEN}\r\n".encode()
    reply = await http.raw(b"GET /api/models HTTP/1.1\r\nHost: x\r\n" + header * 2 + b"Connection: close\r\n\r\n")
    assert split(reply)[0] == 401


@pytest.mark.parametrize(
    "path", ["/", "/nowhere", "/API/models", "/livez/", "/livez/../api/models", "//livez", "/LIVEZ"]
)
async def test_without_the_token_nobody_learns_which_routes_there_are(http: HttpRack, path: str) -> None:
    for verb in ("GET", "POST"):
        answer = await http.send(verb, path)
        assert (answer.status, answer.code) == (401, "ERR_UNAUTHORIZED")


async def test_a_token_in_the_query_is_no_token(http: HttpRack) -> None:
    assert (await http.send("GET", f"/api/models?token={TOKEN}")).status == 401
    assert (await http.send("GET", f"/api/models?token={TOKEN}", headers=AUTHORIZED)).status == 400


async def test_probes_need_no_token(http: HttpRack) -> None:
    for path in PROBES:
        assert (await http.send("GET", path)).status == 200


async def test_a_body_is_not_asked_for_without_the_token(http: HttpRack) -> None:
    request = f"PUT {PATH}?type=custom HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\nExpect: 100-continue\r\n\r\n"
    assert split(await http.raw(request.encode()))[0] == 401


async def test_a_signed_address_needs_no_token(http: HttpRack) -> None:
    for path in (PATH, "/api/models/m/versions/1/files/model.custom"):
        for verb in ("GET", "HEAD"):
            assert (await http.send(verb, signed(http, "GET", path))).status == 200
    assert (await http.send("GET", signed(http, "GET", PATH) + "&redirect=1")).body == b"data"


async def test_a_signed_address_is_good_for_one_verb_one_path_and_its_time(http: HttpRack) -> None:
    good = signed(http, "GET", PATH)
    for verb, address in (
        ("GET", good.replace("/1/", "/2/")),
        ("GET", good[:-1] + ("0" if good[-1] != "0" else "1")),
        ("GET", good.replace("expires=", "expires=9")),
        ("GET", good.replace("expires=", "expires=x")),
        ("GET", good.split("&")[0]),
        ("GET", signed(http, "GET", PATH, -1)),
        ("GET", signed(http, "PUT", PATH)),
        ("GET", f"{PATH}?expires={'9' * 4000}&signature=x"),
    ):
        answer = await http.send(verb, address)
        assert (answer.status, answer.code) == (403, "ERR_FORBIDDEN")
    assert (await http.send("GET", signed(http, "GET", PATH, -1), headers=AUTHORIZED)).status == 403
    assert (await http.send("PUT", good, data=b"x")).status == 401
    assert (await http.send("GET", good + "&" + good.split("?")[1])).status == 400


async def test_a_signature_opens_no_route_but_those_of_bytes(http: HttpRack) -> None:
    for path in ("/api/models", "/api/models/m", "/api/stats"):
        assert (await http.send("GET", signed(http, "GET", path))).status == 401


async def test_a_file_of_an_upload_is_put_to_its_signed_address(http: HttpRack) -> None:
    files = [{"path": "a b", "size": 5, "sha256": "sha256:" + sha256(b"right")}]
    body = {"modelId": "m", "version": "2", "files": files}
    begun = await http.send("POST", "/api/uploads", json=body, headers=AUTHORIZED)
    path = f"{begun.headers['Location']}/files/a%20b"
    assert (await http.send("PUT", path, data=b"wrong")).status == 401
    assert (await http.send("PUT", signed(http, "GET", path), data=b"wrong")).status == 403
    checked = await http.send("PUT", signed(http, "PUT", path), data=b"wrong")
    assert (checked.status, checked.code) == (422, "ERR_CHECKSUM_MISMATCH")
    assert (await http.send("PUT", signed(http, "PUT", path), data=b"right")).status == 200


@pytest.mark.parametrize("host", ["localhost", "localhost:8002", "127.0.0.1", "LOCALHOST", "[::1]:8002", "127.1.2.3"])
async def test_without_a_token_local_names_and_addresses_are_answered(local: HttpRack, host: str) -> None:
    assert (await local.send("GET", "/api/models", headers={"Host": host})).status == 200


@pytest.mark.parametrize("host", ["evil.example", "0.0.0.0:8002", "[::]", "10.1.2.3", "127.0.0.1.evil.example"])
async def test_without_a_token_a_name_that_was_pointed_here_is_not_answered(local: HttpRack, host: str) -> None:
    answer = await local.send("GET", "/api/models", headers={"Host": host})
    assert (answer.status, answer.code) == (403, "ERR_FORBIDDEN")
    assert (await local.send("GET", "/metrics", headers={"Host": "worker.example"})).status == 200


async def test_without_a_token_the_page_of_another_site_changes_nothing(local: HttpRack) -> None:
    for site in ("cross-site", "same-site"):
        headers = {"Sec-Fetch-Site": site}
        answer = await local.send("POST", "/api/models/m/restore", headers=headers)
        assert (answer.status, answer.code) == (403, "ERR_FORBIDDEN")
    assert (await local.send("POST", "/api/models/search", headers={"Sec-Fetch-Site": "same-origin"})).status == 200


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "", "http://localhost:3000", "http://evil.example/localhost:8002"]
)
async def test_without_a_token_the_page_of_another_origin_changes_nothing(local: HttpRack, origin: str) -> None:
    headers = {"Host": "localhost:8002", "Origin": origin}
    answer = await local.send("POST", "/api/models/search", headers=headers)
    assert (answer.status, answer.code) == (403, "ERR_FORBIDDEN")
    assert (await local.send("GET", "/api/models", headers=headers)).status == 200
    own = {"Host": "localhost:8002", "Origin": "http://localhost:8002"}
    assert (await local.send("POST", "/api/models/search", headers=own)).status == 200
