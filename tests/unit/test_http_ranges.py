"""Which bytes a request gets, by its headers alone."""

from __future__ import annotations

import base64
import hashlib

import pytest

from worker.transport.http_ranges import (
    ByteRange,
    content_disposition,
    matches,
    not_modified,
    parse_repr_digest,
    range_applies,
    repr_digest,
    select_range,
)
from worker.transport.http_replies import HttpFault

SIZE = 10
HUGE = "9" * 5000


@pytest.mark.parametrize(
    ("header", "start", "length"),
    [
        ("bytes=0-0", 0, 1),
        ("bytes=-1", 9, 1),
        ("bytes=5-", 5, 5),
        ("bytes=2-4", 2, 3),
        ("bytes=0-9", 0, 10),
        ("bytes=0-10", 0, 10),
        ("bytes=9-9", 9, 1),
        ("bytes=-10", 0, 10),
        ("bytes=-11", 0, 10),
        (f"bytes=3-{HUGE}", 3, 7),
        (f"bytes=-{HUGE}", 0, 10),
        ("bytes=000000000000000000003-04", 3, 2),
        ("BYTES=1-2", 1, 2),
    ],
)
def test_one_range_is_cut_to_the_file(header: str, start: int, length: int) -> None:
    assert select_range(header, SIZE) == ByteRange(start, length)


@pytest.mark.parametrize("header", ["bytes=10-", "bytes=10-20", "bytes=-0", f"bytes={HUGE}-", f"bytes={HUGE}-{HUGE}"])
def test_a_range_without_a_byte_of_the_file_is_416_with_the_size(header: str) -> None:
    with pytest.raises(HttpFault) as caught:
        select_range(header, SIZE)
    assert caught.value.status == 416
    assert caught.value.headers == {"Content-Range": "bytes */10"}


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "bytes",
        "bytes=",
        "bytes=-",
        "bytes=5-2",
        f"bytes={HUGE}-2",
        "bytes=0-0,2-3",
        "bytes=0-0, -1",
        "bytes=" + ",".join(f"{n}-{n}" for n in range(1000)),
        "items=0-1",
        "lines=1-2",
        "bytes=a-b",
        "bytes=0x1-2",
        "bytes=+1-2",
        "bytes=1.0-2",
        "bytes=\N{ARABIC-INDIC DIGIT ONE}-2",
        "bytes 0-1",
        "bytes = 0-1",
        "0-1",
    ],
)
def test_several_ranges_other_units_and_what_is_malformed_get_the_whole_file(header: str | None) -> None:
    assert select_range(header, SIZE) is None


def test_an_empty_file_has_no_first_byte_and_its_last_bytes_are_all_of_it() -> None:
    with pytest.raises(HttpFault):
        select_range("bytes=0-", 0)
    with pytest.raises(HttpFault):
        select_range("bytes=-0", 0)
    assert select_range("bytes=-5", 0) is None


def test_content_range_names_the_first_the_last_and_the_size() -> None:
    assert ByteRange(2, 3).content_range(10) == "bytes 2-4/10"


@pytest.mark.parametrize("header", ['"abc"', 'W/"abc"', '"x", "abc"', '"x",W/"abc" ,"y"', "*", ' , "abc",, '])
def test_if_none_match_compares_weakly_with_each_tag(header: str) -> None:
    assert not_modified(header, "abc")


@pytest.mark.parametrize("header", [None, '"x"', '"ABC"', '"x", W/"y"', ""])
def test_other_tags_are_a_modification(header: str | None) -> None:
    assert not not_modified(header, "abc")


@pytest.mark.parametrize("header", ["abc", '"abc', '"a" "b"', '"a";"b"', "W/abc", '"a",x'])
def test_a_malformed_list_of_tags_is_refused(header: str) -> None:
    with pytest.raises(HttpFault):
        not_modified(header, "abc")


def test_if_match_compares_strongly() -> None:
    assert matches(None, "abc")
    assert matches("*", "abc")
    assert matches('"x", "abc"', "abc")
    assert not matches('W/"abc"', "abc")
    assert not matches('"x"', "abc")


@pytest.mark.parametrize("header", ['W/"abc"', '"x"', "Tue, 24 Nov 2026 02:57:00 GMT", "abc", ""])
def test_if_range_lets_a_range_pass_for_the_very_same_tag_only(header: str) -> None:
    assert range_applies(None, "abc")
    assert range_applies('"abc"', "abc")
    assert not range_applies(header, "abc")


def test_repr_digest_is_read_as_it_is_written() -> None:
    sha256 = hashlib.sha256(b"x").hexdigest()
    assert parse_repr_digest(repr_digest(sha256)) == sha256
    assert parse_repr_digest(f"md5=:AAAA:, {repr_digest(sha256)}") == sha256


@pytest.mark.parametrize(
    "header",
    [
        "",
        "sha-256",
        "sha-256=",
        "sha-256=abc",
        "sha-256=:abc:",
        "sha-256=:!!!!:",
        "sha-256=::",
        "SHA-256=:" + base64.b64encode(bytes(32)).decode() + ":",
        "sha-512=:" + base64.b64encode(bytes(64)).decode() + ":",
        "sha-256=:" + base64.b64encode(bytes(31)).decode() + ":",
        ", ".join(["sha-256=:" + base64.b64encode(bytes(32)).decode() + ":"] * 2),
    ],
)
def test_a_digest_that_cannot_be_checked_is_refused_rather_than_ignored(header: str) -> None:
    with pytest.raises(HttpFault) as caught:
        parse_repr_digest(header)
    assert caught.value.status == 400


def test_the_file_name_is_plain_ascii_and_in_full_if_that_is_not_the_same() -> None:
    assert content_disposition("a/b/model.onnx") == 'attachment; filename="model.onnx"'
    assert (
        content_disposition('q"uo;te.bin') == "attachment; filename=\"q_uo_te.bin\"; filename*=UTF-8''q%22uo%3Bte.bin"
    )
    assert content_disposition("mödel.bin") == "attachment; filename=\"m_del.bin\"; filename*=UTF-8''m%C3%B6del.bin"
    assert content_disposition("100%.bin") == "attachment; filename=\"100_.bin\"; filename*=UTF-8''100%25.bin"
