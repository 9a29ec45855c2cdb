"""Names and their grammar: racks, models, versions, aliases, file paths, digests, ULIDs.

Every name that reaches a storage key, a file or a routing key is parsed here first. The patterns are ASCII only, so
look-alikes, bidirectional controls and Unicode twins cannot occur.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable
from typing import Annotated
from unicodedata import normalize

from pydantic import AfterValidator, StringConstraints

LATEST = "latest"
DEFAULT_VERSION = "1.0.0"
MAX_FILES = 2000
MAX_ALIASES = 1000  # of a model
MAX_PATH_BYTES = 512
MAX_INTEGER = 2**53 - 1
MAX_METADATA_BYTES = 64 * 1024
MAX_TAGS = 64

_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
MODEL_ID_PATTERN = rf"^(?:{_NAME}/)?{_NAME}$"
LABEL_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._+-]{0,63}$"
RACK_PATTERN = r"^[a-z0-9][a-z0-9-]{0,31}$"
TYPE_PATTERN = r"^[a-z0-9][a-z0-9_-]{0,31}$"
DIGEST_PATTERN = r"^sha256:[0-9a-f]{64}$"
ULID_PATTERN = r"^[0-7][0-9A-HJKMNP-TV-Z]{25}$"

# Second parts that an HTTP route uses itself, so that `/api/models/<name>/versions` stays unambiguous.
RESERVED_SECOND_PARTS = frozenset({"versions", "aliases", "search", "restore"})

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\\]")
_model_id, _label = re.compile(MODEL_ID_PATTERN), re.compile(LABEL_PATTERN)


def check_model_id(value: str) -> str:
    """Return `value` if it is `name` or `org/name`; raise ValueError that says why not."""
    if not _model_id.fullmatch(value):
        raise ValueError("must be [org/]name, each part 1 to 96 of A-Z a-z 0-9 . _ -, starting with a letter or digit")
    if ".." in value or "--" in value:
        raise ValueError("must not contain '..' or '--'")
    second = value.partition("/")[2]
    if second in RESERVED_SECOND_PARTS:
        raise ValueError(f"{second!r} is reserved")
    return value


def check_version(value: str) -> str:
    """Return `value` if it may name a version or an alias to be set; `latest` may not."""
    if not _label.fullmatch(value):
        raise ValueError("must be 1 to 64 of A-Z a-z 0-9 . _ + -, starting with a letter or digit")
    if value.lower() == LATEST:
        raise ValueError("'latest' is reserved: it always means the version stored last")
    return value


def check_version_ref(value: str) -> str:
    """Return `value` if it may refer to a version: a version, an alias, or `latest`."""
    return value if value == LATEST else check_version(value)


def check_path(value: str) -> str:
    """Return `value` if it is a safe relative file path of a version."""
    try:
        encoded = value.encode()
    except UnicodeEncodeError:
        raise ValueError("must be valid Unicode") from None
    if not 0 < len(encoded) <= MAX_PATH_BYTES:
        raise ValueError(f"must be 1 to {MAX_PATH_BYTES} bytes of UTF-8")
    if _CONTROL.search(value):
        raise ValueError("must not contain a backslash or control character")
    if any(part in ("", ".", "..") for part in value.split("/")):
        raise ValueError("must be relative, without empty, '.' or '..' parts")
    return value


def check_paths(paths: Iterable[str]) -> None:
    """Raise ValueError unless the paths can lie side by side in one folder, on any file system."""
    seen: set[str] = set()
    folders: set[str] = set()
    for path in paths:
        folded = _folded(path)
        if folded in seen:
            raise ValueError(f"{path!r} occurs twice, ignoring case and Unicode form")
        seen.add(folded)
        parts = folded.split("/")
        folders.update("/".join(parts[:i]) for i in range(1, len(parts)))
    if both := sorted(seen & folders):
        raise ValueError(f"{both[0]!r} is both a file and a folder")


def _folded(path: str) -> str:
    """The same for paths that some file system takes for one: those of macOS ignore case and composition."""
    return normalize("NFC", normalize("NFD", path).casefold())


ModelId = Annotated[str, StringConstraints(max_length=193), AfterValidator(check_model_id)]
Version = Annotated[str, StringConstraints(max_length=64), AfterValidator(check_version)]
VersionRef = Annotated[str, StringConstraints(max_length=64), AfterValidator(check_version_ref)]
Alias = Version
FilePath = Annotated[str, AfterValidator(check_path)]
Rack = Annotated[str, StringConstraints(pattern=RACK_PATTERN)]
ModelType = Annotated[str, StringConstraints(pattern=TYPE_PATTERN)]
Digest = Annotated[str, StringConstraints(pattern=DIGEST_PATTERN)]
Ulid = Annotated[str, StringConstraints(pattern=ULID_PATTERN)]

_CROCKFORD = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"


def new_ulid() -> str:
    """A new ULID: 48 bits of milliseconds, 80 random bits, 26 characters of Crockford's base 32."""
    value = (time.time_ns() // 1_000_000) << 80 | int.from_bytes(os.urandom(10))
    return "".join(_CROCKFORD[(value >> shift) & 31] for shift in range(125, -1, -5))


def digest_of(sha256_hex: str) -> str:
    """The wire form of a sha256."""
    return f"sha256:{sha256_hex}"


def hex_of(digest: str) -> str:
    """The 64 hex digits of a digest in wire form."""
    return digest.removeprefix("sha256:")


def split_reference(reference: str) -> tuple[str, str | None]:
    """`MODEL[:VERSION]` as people write it, as (model id, version or None)."""
    model_id, _, version = reference.partition(":")
    return model_id, version or None
