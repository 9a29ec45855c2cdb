"""Bad inputs over HTTP: the codes of the RPC, with their status, for bodies and for names inside addresses."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from schemas.errors import ERRORS
from tests.bad_inputs import BAD_INPUTS, MODEL_IDS, PATHS, seed
from tests.http_rack import HttpRack, blob_files, http_rack

ROUTES = {"storeModel": "/api/models", "searchModels": "/api/models/search", "createUpload": "/api/uploads"}


@pytest.fixture
async def http(tmp_path: Path) -> AsyncIterator[HttpRack]:
    async with http_rack(tmp_path) as http:
        yield http


async def test_a_body_gets_the_code_it_gets_over_rabbitmq(http: HttpRack) -> None:
    upload = await seed(http.rack)
    before = http.rack.registry.journal.stats().records, blob_files(http.rack)
    for bad in [bad for bad in BAD_INPUTS if bad.method in ROUTES]:
        options = {"data": bad.encoded(upload), "headers": {"Content-Type": "application/json"}}
        answer = await http.send("POST", ROUTES[bad.method], **options)
        assert (answer.code, answer.status) == (bad.code, ERRORS[bad.code].http_status), bad.name
    assert (http.rack.registry.journal.stats().records, blob_files(http.rack)) == before
    assert (await http.put("good", "1.0.0", b"bytes")).status == 201


def escaped(name: str) -> str:
    """Every byte as `%XX`: what a client sends so that nothing on the way takes it for a path."""
    return "".join(f"%{byte:02X}" for byte in name.encode())


NAMES = [name for _, name in MODEL_IDS.values() if isinstance(name, str) and 0 < len(name) < 1000]
FILES = [paths[0] for row, paths in PATHS.values() if row not in ("B35", "B66") and paths[0]]


async def test_a_name_outside_the_grammar_is_never_a_model(http: HttpRack) -> None:
    """The slash of `org%2Fname` is part of a name, so an escaped `..` is read and refused, and never walked."""
    before = http.rack.registry.journal.stats().records
    for name in NAMES:
        for verb, path in (("GET", ""), ("DELETE", ""), ("GET", "/versions/1.0.0/content")):
            answer = await http.send(verb, f"/api/models/{escaped(name)}{path}")
            assert answer.status in (400, 404), (verb, name)
            assert answer.code in ("ERR_INVALID_REQUEST", "ERR_UNKNOWN_METHOD"), (verb, name)
        stored = await http.send("PUT", f"/api/models/{escaped(name)}/versions/1/content?type=custom", data=b"x")
        assert stored.status in (400, 404), name
    assert http.rack.registry.journal.stats().records == before
    assert blob_files(http.rack) == 0


async def test_a_path_outside_the_version_leads_to_no_file(http: HttpRack) -> None:
    await http.put("net", "1.0.0", b"bytes")
    (http.rack.folder / "models" / "x").write_bytes(b"secret")
    for path in [*FILES, "../../x", "../../../registry/LOCK", "%2e%2e/x"]:
        for text in (path.replace("\r\n", "%0D%0A").replace("\x00", "%00"), escaped(path)):
            if not text.isascii() or " " in text or "\x1b" in text:
                continue
            answer = await http.send("GET", f"/api/models/net/versions/1.0.0/files/{text}")
            assert answer.status in (400, 404), text
            assert answer.code in ("ERR_INVALID_REQUEST", "ERR_NOT_FOUND", "ERR_MODEL_NOT_FOUND"), text
