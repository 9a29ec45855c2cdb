"""What people type at the command line, and what it is taken for."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from schemas.errors import ModelManagerError
from worker.cli.arguments import assignments, guess_type, reference_of
from worker.cli.connection import DEFAULT_URL, Address, address_of
from worker.cli.output import json_line, json_text, plain, size_text
from worker.cli.versions import next_version


@pytest.mark.parametrize(
    ("text", "reference"),
    [
        ("bert", ("bert", None)),
        ("bert:1.0.0", ("bert", "1.0.0")),
        ("acme/bert:stable", ("acme/bert", "stable")),
        ("bert:latest", ("bert", "latest")),
    ],
)
def test_a_reference_names_a_model_and_maybe_a_version(text: str, reference: tuple[str, str | None]) -> None:
    assert reference_of(text) == reference


@pytest.mark.parametrize("text", ["", ":1", "../x", "a/b/c", "bert:..", "bert:a b", "bert:1:2"])
def test_a_bad_reference_is_a_usage_error(text: str) -> None:
    with pytest.raises(ModelManagerError) as caught:
        reference_of(text)
    assert caught.value.kind.exit_code == 2


def test_an_assignment_is_json_or_else_text() -> None:
    words = ["accuracy=0.98", "note=hello world", "gone=null", 'labels=["a"]', "formula=a=b", 'quoted="1"', "empty="]
    assert assignments(words) == {
        "accuracy": 0.98,
        "note": "hello world",
        "gone": None,
        "labels": ["a"],
        "formula": "a=b",
        "quoted": "1",
        "empty": "",
    }


@pytest.mark.parametrize("text", ["NaN", "-Infinity", "1e999", '{"a": [NaN]}', '{"a": 1, "a": 2}', "9" * 5000])
def test_what_may_be_meant_as_json_and_is_none_is_refused(text: str) -> None:
    with pytest.raises(ModelManagerError, match="loss: ") as caught:
        assignments([f"loss={text}"])
    assert caught.value.code == "ERR_INVALID_REQUEST"
    assert assignments(['loss="NaN"', "title=Infinity War"]) == {"loss": "NaN", "title": "Infinity War"}


@pytest.mark.parametrize("word", ["novalue", "=1"])
def test_an_assignment_needs_a_key_and_a_value(word: str) -> None:
    with pytest.raises(ModelManagerError, match="KEY=JSON"):
        assignments([word])


def test_the_type_is_that_of_the_largest_telling_file(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "vocab.txt").write_bytes(b"x" * 1000)
    (tmp_path / "small.onnx").write_bytes(b"x" * 10)
    (tmp_path / "sub/model.SafeTensors").write_bytes(b"x" * 100)
    assert guess_type(tmp_path) == "safetensors"
    assert guess_type(tmp_path / "small.onnx") == "onnx"


def test_a_type_that_no_name_tells_must_be_said(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_bytes(b"x")
    with pytest.raises(ModelManagerError, match="type") as caught:
        guess_type(tmp_path)
    assert "--type" in caught.value.details["hint"]


def stored(*versions: str, aliases: list[str] | None = None) -> list[Any]:
    return [{"version": version, "aliases": aliases or []} for version in versions]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (stored(), "1.0.0"),
        (stored("1.0.0"), "1.0.1"),
        (stored("v9"), "v10"),
        (stored("2026-rc1"), "2026-rc2"),
        (stored("build-007"), "build-008"),
        (stored("final"), "final.1"),
        (stored("1.2.9", "1.2.10"), "1.2.11"),
        (stored("1.0.0", aliases=["1.0.1"]), "1.0.2"),
    ],
)
def test_the_next_version_is_the_first_free_one_after_the_last(before: list[Any], after: str) -> None:
    assert next_version(before) == after


HTTP = {"MODEL_MANAGER_URL": "http://h:1"}
BROKER = {"MODEL_MANAGER_AMQP__URL": "amqp://b/", "MODEL_MANAGER_RACK": "rack-9"}


@pytest.mark.parametrize(
    ("flags", "environment", "address"),
    [
        ({}, {}, Address(url=DEFAULT_URL)),
        ({}, HTTP, Address(url="http://h:1")),
        ({}, BROKER, Address(amqp_url="amqp://b/", rack="rack-9")),
        ({}, HTTP | BROKER, Address(url="http://h:1")),
        ({"url": "http://f:2"}, HTTP | BROKER, Address(url="http://f:2")),
        ({"rack": "rack-2"}, HTTP | BROKER, Address(amqp_url="amqp://b/", rack="rack-2")),
        ({"amqp_url": "amqp://f/"}, HTTP | BROKER, Address(amqp_url="amqp://f/", rack="rack-9")),
        ({"rack": "rack-2", "amqp_url": "amqp://f/"}, {}, Address(amqp_url="amqp://f/", rack="rack-2")),
    ],
)
def test_flags_win_over_the_environment_and_http_over_the_broker(
    flags: dict[str, str], environment: dict[str, str], address: Address
) -> None:
    given: dict[str, str | None] = {"url": None, "amqp_url": None, "rack": None}
    assert address_of(**{**given, **flags}, environment=environment) == address


def test_two_ways_to_one_worker_are_refused() -> None:
    with pytest.raises(ModelManagerError, match="--url"):
        address_of(url="http://h:1", amqp_url=None, rack="rack-1", environment={})


def test_text_from_others_cannot_steer_the_terminal() -> None:
    evil = "a\x1b]0;owned\x07b\x9b31mc\u202egnp.exe\r\n"
    assert plain(evil) == r"a\x1b]0;owned\x07b\x9b31mc\u202egnp.exe\r\n"
    for text in (json_text({"d": evil}), json_line({"d": evil})):
        assert not set("\x1b\x07\x9b\u202e\r") & set(text)
    assert plain("Zürich 日本 💾") == "Zürich 日本 💾"


def test_the_name_of_a_file_that_is_no_text_can_be_printed() -> None:
    name = os.fsdecode(b"caf\xe9/\xff")
    assert plain(name) == r"caf\udce9/\udcff"
    for text in (json_text({"d": name}), json_line({"d": name})):
        assert text.encode("ascii")
        assert os.fsencode(json.loads(text)["d"]) == b"caf\xe9/\xff"


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 KB"), (90_868_376, "90.9 MB"), (999_600_000, "1 GB"), (10**17, "1e+05 TB")],
)
def test_sizes_are_told_in_three_digits(size: int, text: str) -> None:
    assert size_text(size) == text
