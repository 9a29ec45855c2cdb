"""The grammar of names: what is one, and what is not."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from schemas import ids

ACCEPTED: list[tuple[Any, list[str]]] = [
    (
        ids.ModelId,
        ["a", "0", "Net", "a.b_c-d", "org/net", "n" * 96, f"{'o' * 96}/{'n' * 96}", "latest", "con", "versions"],
    ),
    (ids.Version, ["1", "1.0.0", "1.0.0-rc.1+build_5", "v" * 64, "latest2", "a--b", "1..0"]),
    (ids.VersionRef, ["latest", "1.0.0", "prod"]),
    (ids.FilePath, ["a", ".gitattributes", "a/b/c.bin", "...", "a b", "é.txt", "x" * 512, "--help", "~", "a:b"]),
    (ids.Rack, ["rack-1", "a", "0", "r" * 32]),
    (ids.ModelType, ["onnx", "x_1-2", "0", "t" * 32]),
    (ids.Digest, ["sha256:" + "0123456789abcdef" * 4]),
    (ids.Ulid, ["01ARZ3NDEKTSV4RRFFQ69G5FAV", "7" + "Z" * 25]),
]
REFUSED: list[tuple[Any, list[str]]] = [
    (
        ids.ModelId,
        ["", "-a", ".a", "_a", "a/", "/a", "a//b", "a/b/c", "a..b", "a--b", "n" * 97, "a\n", "é", "a/restore"],
    ),
    (ids.Version, ["", "latest", "Latest", "-1", "v" * 65, "a/b", "1.0\n", "é"]),
    (ids.VersionRef, ["", "LATEST", "a:b"]),
    (
        ids.FilePath,
        ["", "/a", "a/", "a//b", ".", "..", "./a", "a/..", "a\\b", "a\nb", "a\x7f", "a\x85", "é" * 257, "\ud800"],
    ),
    (ids.Rack, ["", "-a", "Rack", "a_b", "a.b", "r" * 33, "rack-1\n", "é"]),
    (ids.ModelType, ["", "ONNX", "-a", "a.b", "t" * 33, "onnx\n"]),
    (
        ids.Digest,
        ["", "0" * 64, "sha256:" + "A" * 64, "sha256:" + "0" * 63, "sha256:" + "0" * 64 + "\n", "md5:" + "0" * 64],
    ),
    (ids.Ulid, ["", "01arz3ndektsv4rrffq69g5fav", "8" + "Z" * 25, "I" * 26, "0" * 25, "0" * 27]),
]


def cases(table: list[tuple[Any, list[str]]]) -> list[tuple[Any, str]]:
    return [(kind, text) for kind, texts in table for text in texts]


@pytest.mark.parametrize(("kind", "text"), cases(ACCEPTED))
def test_a_name_within_the_grammar_stays_as_it_is(kind: Any, text: str) -> None:
    assert TypeAdapter(kind).validate_python(text, strict=True) == text


@pytest.mark.parametrize(("kind", "text"), cases(REFUSED))
def test_a_name_outside_the_grammar_is_refused(kind: Any, text: str) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(kind).validate_python(text, strict=True)


@given(st.text())
def test_whatever_is_accepted_as_a_model_id_is_plain_ascii_of_one_or_two_parts(text: str) -> None:
    if accepts(ids.check_model_id, text):
        assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?", text)
        assert ".." not in text


@given(st.lists(st.sampled_from(["a", "..", ".", "", "\\", "C:", "\x00", "é"]), max_size=4).map("/".join))
def test_whatever_is_accepted_as_a_path_stays_inside_its_folder(path: str) -> None:
    if accepts(ids.check_path, path):
        assert not path.startswith("/")
        assert not {"", ".", ".."} & set(path.split("/"))
        assert "\x00" not in path


def accepts(check: Callable[[str], str], text: str) -> bool:
    try:
        return check(text) == text
    except ValueError:
        return False


@pytest.mark.parametrize(
    "paths",
    [
        ["a", "a"],
        ["a", "A"],
        ["STRASSE", "straße"],
        ["mod\u00e8le", "mode\u0300le"],
        ["a", "a/b"],
        ["a/b/c", "A"],
        ["a/b", "a/b/c/d"],
    ],
)
def test_paths_that_some_file_system_takes_for_one_cannot_lie_side_by_side(paths: list[str]) -> None:
    for order in (paths, paths[::-1]):
        with pytest.raises(ValueError, match=r"twice|both a file and a folder"):
            ids.check_paths(order)


@pytest.mark.parametrize(
    "paths", [[], ["a"], ["a", "b"], ["a/b", "a/c"], ["a", "ab/c"], ["a.b", "a/c"], ["a-b", "a/b"]]
)
def test_other_paths_can(paths: list[str]) -> None:
    ids.check_paths(paths)


def test_a_new_ulid_is_one_and_they_sort_by_time() -> None:
    made = [ids.new_ulid() for _ in range(1000)]
    assert len(set(made)) == 1000
    assert all(re.fullmatch(ids.ULID_PATTERN, ulid) for ulid in made)
    times = [ulid[:10] for ulid in made]
    assert times == sorted(times)


def test_a_digest_and_its_hex_are_each_others_inverse() -> None:
    assert ids.hex_of(ids.digest_of("ab" * 32)) == "ab" * 32


@pytest.mark.parametrize(
    ("reference", "parts"),
    [
        ("net", ("net", None)),
        ("net:1.0.0", ("net", "1.0.0")),
        ("org/net:prod", ("org/net", "prod")),
        ("net:", ("net", None)),
    ],
)
def test_a_reference_is_a_model_and_perhaps_a_version(reference: str, parts: tuple[str, str | None]) -> None:
    assert ids.split_reference(reference) == parts
