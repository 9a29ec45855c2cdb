"""Signed addresses."""

from __future__ import annotations

import time
from urllib.parse import parse_qs, quote

import pytest

from worker.signing import UrlSigner

SIGNER = UrlSigner(b"s" * 32)
PATH = "/api/models/m/versions/1/files/a b+c.bin"
SOON = 4_000_000_000  # the year 2096: the same in every process that collects these tests


def signature(verb: str = "GET", path: str = PATH, expires: int = SOON) -> str:
    return parse_qs(SIGNER.sign(verb, path, expires=expires))["signature"][0]


def test_an_address_is_good_for_its_verb_and_path_until_it_expires() -> None:
    assert SIGNER.sign("GET", PATH, expires=SOON).startswith(f"expires={SOON}&signature=")
    assert SIGNER.verify("GET", PATH, SOON, signature())


def test_it_does_not_matter_how_a_client_writes_the_escapes() -> None:
    assert SIGNER.verify("GET", PATH, SOON, signature(path=quote(PATH)))
    assert SIGNER.verify("GET", PATH, SOON, signature(path=quote(PATH, safe="/+")))


@pytest.mark.parametrize(
    ("verb", "path", "expires"),
    [
        ("PUT", PATH, SOON),
        ("GET", PATH + "x", SOON),
        ("GET", PATH[:-1], SOON),
        ("GET", quote(PATH), SOON),
        ("GET", PATH, SOON + 1),
        ("GET", PATH, SOON - 1),
    ],
)
def test_it_is_good_for_nothing_else(verb: str, path: str, expires: int) -> None:
    assert not SIGNER.verify(verb, path, expires, signature())


@pytest.mark.parametrize("wrong", ["", "0" * 64, "é", "\udcff"])
def test_a_wrong_signature_is_refused(wrong: str) -> None:
    assert not SIGNER.verify("GET", PATH, SOON, wrong)
    assert not SIGNER.verify("GET", PATH, SOON, signature() + wrong + "0")


def test_it_is_refused_when_its_time_is_over() -> None:
    over = int(time.time())
    assert not SIGNER.verify("GET", PATH, over, signature(expires=over))


def test_another_secret_has_other_signatures() -> None:
    assert not UrlSigner(b"t" * 32).verify("GET", PATH, SOON, signature())


def test_a_secret_has_32_bytes() -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        UrlSigner(b"short")
