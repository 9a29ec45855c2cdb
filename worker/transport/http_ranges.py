"""The grammar of partial and conditional requests (RFC 9110, 9530, 6266, 8187): headers in, decisions out; no I/O."""

from __future__ import annotations

import base64
import binascii
import re
from dataclasses import dataclass
from urllib.parse import quote

from worker.transport.http_replies import HttpFault

_ONE_RANGE = re.compile(r"bytes=(\d*)-(\d*)", re.ASCII | re.IGNORECASE)
_ENTITY_TAG = re.compile(r'(W/)?"([\x21\x23-\x7e\x80-\xff]*)"')
_LIST_GAP = re.compile(r"[ \t]*(?:,[ \t]*|$)")
_DIGEST_MEMBER = re.compile(r"([a-z*][a-z0-9_.*-]*)=:([A-Za-z0-9+/=]*):")
_PLAIN_NAME = re.compile(r"[A-Za-z0-9 ._()+,@=~^!-]")
_SHA256_BYTES = 32


@dataclass(frozen=True, slots=True)
class ByteRange:
    """`length` bytes from `start`; never empty."""

    start: int
    length: int

    def content_range(self, size: int) -> str:
        """The value of Content-Range for this part of `size` bytes."""
        return f"bytes {self.start}-{self.start + self.length - 1}/{size}"


def select_range(header: str | None, size: int) -> ByteRange | None:
    """The part that `Range` asks for of `size` bytes; None to send all of them.

    Several ranges, another unit and what is malformed are ignored, as RFC 9110 section 14.2 allows. A fault with status
    416 if the one range has no byte of the file.
    """
    match = _ONE_RANGE.fullmatch(header) if header is not None else None
    if match is None or not (match[1] or match[2]):
        return None
    first, last = _position(match[1], size), _position(match[2], size)
    if first is None:
        if size == 0 and match[2].strip("0"):
            return None  # the last bytes of nothing are all of it
        length = min(last or 0, size)
        found = ByteRange(size - length, length)
    elif last is not None and _reversed(match[1], match[2]):
        return None
    else:
        end = size - 1 if last is None else min(last, size - 1)
        found = ByteRange(first, end - first + 1)
    if found.length <= 0:
        raise HttpFault(416, f"The file has {size} bytes.", headers={"Content-Range": f"bytes */{size}"}, size=size)
    return found


def _position(digits: str, size: int) -> int | None:
    """The number, or `size` for one that is beyond it: a long run of digits is never converted."""
    if not digits:
        return None
    digits = digits.lstrip("0")
    return size if len(digits) > len(str(size)) else min(int(digits or "0"), size)


def _reversed(first: str, last: str) -> bool:
    first, last = first.lstrip("0"), last.lstrip("0")
    return (len(first), first) > (len(last), last)


def parse_etags(header: str) -> list[tuple[bool, str]] | None:
    """The entity tags of a list as (weak, value); None for `*`. A fault with status 400 for anything else."""
    if header.strip() == "*":
        return None
    tags = []
    position = 0
    while position < len(header):
        tag = _ENTITY_TAG.match(header, position)
        gap = _LIST_GAP.match(header, tag.end() if tag else position)
        if gap is None or (tag is None and gap.end() == position):
            raise HttpFault(400, 'An entity tag is written "...", several with commas between them.')
        if tag is not None:
            tags.append((tag[1] is not None, tag[2]))
        position = gap.end()
    return tags


def not_modified(if_none_match: str | None, etag: str) -> bool:
    """Whether the caller has the bytes with this `etag` (without quotes) already. The comparison is weak."""
    if if_none_match is None:
        return False
    tags = parse_etags(if_none_match)
    return tags is None or any(value == etag for _, value in tags)


def matches(if_match: str | None, etag: str) -> bool:
    """Whether `If-Match` holds for `etag` (without quotes). The comparison is strong."""
    if if_match is None:
        return True
    tags = parse_etags(if_match)
    return tags is None or (False, etag) in tags


def range_applies(if_range: str | None, etag: str) -> bool:
    """Whether `Range` counts. A date never matches: there is no Last-Modified, and times do not identify bytes."""
    return if_range is None or if_range.strip() == f'"{etag}"'


def parse_repr_digest(header: str) -> str:
    """The sha256 in hex of `sha-256=:base64:`, maybe among other algorithms; else a fault with status 400."""
    members: dict[str, str] = {}
    for member in header.split(","):
        match = _DIGEST_MEMBER.fullmatch(member.strip())
        if match is None or match[1] in members:
            raise HttpFault(400, "Repr-Digest is written sha-256=:<base64>:")
        members[match[1]] = match[2]
    try:
        digest = base64.b64decode(members["sha-256"], validate=True)
    except KeyError:
        raise HttpFault(400, "Repr-Digest has no sha-256, the only algorithm that is checked.") from None
    except binascii.Error:
        digest = b""
    if len(digest) != _SHA256_BYTES:
        raise HttpFault(400, "The sha-256 of Repr-Digest is not the base64 of 32 bytes.")
    return digest.hex()


def repr_digest(sha256: str) -> str:
    """The value of Repr-Digest for a sha256 in hex."""
    return f"sha-256=:{base64.b64encode(bytes.fromhex(sha256)).decode()}:"


def content_disposition(path: str) -> str:
    """An attachment with the last part of `path` as its name; in ASCII, and in full if that is not the same."""
    name = path.rpartition("/")[2]
    plain = "".join(letter if _PLAIN_NAME.fullmatch(letter) else "_" for letter in name)
    value = f'attachment; filename="{plain}"'
    return value if plain == name else f"{value}; filename*=UTF-8''{quote(name, safe='')}"
