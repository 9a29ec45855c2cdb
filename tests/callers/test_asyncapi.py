"""The AsyncAPI document in the eyes of the standard's own parser."""

from __future__ import annotations

import json
import subprocess

from schemas.documents import FOLDER
from schemas.rpc import METHODS


def test_the_parser_of_the_standard_has_nothing_to_say_about_the_document(asyncapi_parser: list[str]) -> None:
    done = subprocess.run([*asyncapi_parser, FOLDER / "asyncapi.json"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    *diagnostics, found = [json.loads(line) for line in done.stdout.splitlines()]
    assert diagnostics == []
    assert sorted(found["operations"]) == sorted([*METHODS, "sendHint"])
