"""The definitions for RabbitMQ: the committed ones follow the code, hold no secret, and give no role too much."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from schemas.rpc import METHODS
from worker.cli import app
from worker.transport.definitions import password_hash
from worker.transport.roles import LOOKUPS, UPLOADS, users
from worker.transport.topology import topology

COMMITTED = Path(__file__).parents[2] / "deploy/rabbitmq/definitions.json"
RACKS = ("--rack", "rack-1", "--rack", "rack-2")


def printed(*words: str | Path, status: int = 0) -> str:
    ran = CliRunner().invoke(app, ["topology", "definitions", *RACKS, *map(str, words)])
    assert ran.exit_code == status, ran.output
    return ran.output


def test_the_committed_definitions_are_what_the_command_prints() -> None:
    assert COMMITTED.read_text() == printed(), f"model-manager topology definitions {' '.join(RACKS)} > {COMMITTED}"


def test_the_committed_definitions_hold_no_password() -> None:
    assert {user["password_hash"] for user in json.loads(COMMITTED.read_text())["users"]} == {""}


def test_queues_are_declared_with_the_arguments_of_the_topology() -> None:
    found = {queue["name"]: queue["arguments"] for queue in json.loads(COMMITTED.read_text())["queues"]}
    assert found == {queue.name: queue.arguments for rack in ("rack-1", "rack-2") for queue in topology(rack).queues}


def test_passwords_come_from_files_as_salted_hashes(tmp_path: Path) -> None:
    (tmp_path / "inference").write_text("secret of inference\n")
    (tmp_path / "inference").chmod(0o600)
    (tmp_path / "..data").mkdir()
    text = printed("--passwords", tmp_path)
    assert "secret of inference" not in text
    hashes = {user["name"]: user["password_hash"] for user in json.loads(text)["users"]}
    raw = base64.b64decode(hashes.pop("inference"))
    assert raw[4:] == hashlib.sha256(raw[:4] + b"secret of inference").digest()
    assert set(hashes.values()) == {""}


def test_the_same_password_never_has_the_same_hash() -> None:
    assert password_hash("secret") != password_hash("secret")


def test_a_password_for_nobody_is_refused(tmp_path: Path) -> None:
    (tmp_path / "inferense").write_text("secret")
    assert "inferense: no such user" in printed("--passwords", tmp_path, status=2)


def test_a_password_that_everyone_can_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "inference").write_text("secret")
    (tmp_path / "inference").chmod(0o644)
    assert "readable by everyone" in printed("--passwords", tmp_path, status=8)


def test_a_name_that_no_rack_can_have_is_refused() -> None:
    ran = CliRunner().invoke(app, ["topology", "definitions", "--rack", "rack-.*"])
    assert ran.exit_code == 2


def test_lookups_change_nothing() -> None:
    assert [name for name in LOOKUPS if METHODS[name].lane != "lookup"] == []


def test_uploads_remove_nothing_that_is_stored() -> None:
    assert METHODS.keys() >= set(UPLOADS)
    assert not {"deleteModel", "deleteAlias", "setAlias", "updateModelMetadata"} & set(UPLOADS)


@pytest.mark.parametrize("user", users(["rack-1"]), ids=lambda user: user.name)
def test_every_permission_is_a_whole_expression(user: object) -> None:
    for name in ("configure", "write", "read", "call", "tap"):
        pattern = getattr(user, name)
        assert pattern.startswith("^")
        assert pattern.endswith("$")
        assert "|" not in re.sub(r"\([^()]*\)", "", pattern), "an alternative of its own would not be anchored"
