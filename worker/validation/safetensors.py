"""The header of a safetensors file, checked without reading a byte of any tensor.

The file is a little-endian u64 (the header's length), a JSON object (name to type, shape and offsets, and perhaps
`__metadata__`, strings to strings), and the tensors' bytes, without a gap. All that the `safetensors` library refuses
is refused here, and some that it lets through: tensor names that occur twice, white space before the header, objects
within an entry, entries above 4096 characters, metadata of `null` or of more than 10,000 keys.

A header can be hostile: a few MiB of `[[],[],...` would take twenty times that as Python objects. So it is read an
entry at a time, each of bounded length, and only names and offsets are kept.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from schemas.findings import Finding
from worker.validation.source import Source, read_exactly

# The library's own limit is 100 MB, which would take seconds and hundreds of MB to check. An entry has about 100 bytes,
# so this is room for more than 100,000 tensors in one file. It also leaves the upper five bytes of the length at zero,
# and so a pickle hardly any room to pass as a header.
HEADER_BYTES_MAX = 16 * 1024 * 1024
METADATA_KEYS_MAX = 10_000
FINDINGS_MAX = 20

DTYPE_BITS = {
    "F4": 4,
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8"), 8),
    **dict.fromkeys(("F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}

_LENGTH_BYTES = 8
_ENTRY_CHARS_MAX = 4096
_PLACE_CHARS_MAX = 120
_U64_MAX = 2**64 - 1
_FIELDS = frozenset({"dtype", "shape", "data_offsets"})
_SPACE = re.compile(r"[ \t\n\r]*")
_PLAIN_STRING = re.compile(r'"([^"\\\x00-\x1f]*)"')


def check_safetensors(path: str, source: Source) -> Iterator[Finding]:
    """What is wrong with a safetensors file, at most 20 findings; reads the header alone, at most 16 MiB."""
    for count, problem in enumerate(_problems(source), start=1):
        yield Finding("error", problem.code, problem.message, path, problem.place[:_PLACE_CHARS_MAX])
        if count == FINDINGS_MAX:
            return


@dataclass(frozen=True, slots=True)
class _Problem:
    code: str
    message: str
    place: str = ""


class _MalformedError(Exception):
    """From here on the header cannot be read."""

    def __init__(self, message: str, place: str = "", code: str = "header-malformed") -> None:
        super().__init__(message)
        self.problem = _Problem(code, message, place)


def _problems(source: Source) -> Iterator[_Problem]:
    size = source.size
    if size < _LENGTH_BYTES:
        yield _Problem("header-cut", f"The file has {size} bytes, too few for the length of a header.")
        return
    length = int.from_bytes(read_exactly(source, 0, _LENGTH_BYTES), "little")
    data_bytes = size - _LENGTH_BYTES - length
    if length == 0:
        yield _Problem("header-empty", "The header has no bytes.")
    elif length > HEADER_BYTES_MAX:
        yield _Problem("header-too-large", f"The header would have {length} bytes, the limit is {HEADER_BYTES_MAX}.")
    elif data_bytes < 0:
        yield _Problem("header-cut", f"The header would have {length} bytes, {size - _LENGTH_BYTES} follow.")
    else:
        try:
            yield from _header_problems(_text(source, length), data_bytes)
        except _MalformedError as error:
            yield error.problem


def _text(source: Source, length: int) -> str:
    try:
        text = read_exactly(source, _LENGTH_BYTES, length).decode()
    except UnicodeDecodeError as error:
        raise _MalformedError(f"The header is not UTF-8 at its byte {error.start}.") from None
    if not text.startswith("{"):
        raise _MalformedError("The header does not begin with '{'.")
    return text


def _header_problems(text: str, data_bytes: int) -> Iterator[_Problem]:
    cursor = _Cursor(text)
    tensors = _Tensors(data_bytes)
    for name in cursor.members():
        if name in tensors.names:
            yield _Problem("duplicate-name", "The name occurs twice.", name)
        tensors.names.add(name)
        if name == "__metadata__":
            _pass_metadata(cursor)
        elif problem := tensors.add(name, cursor.entry(name)):
            yield problem
    if cursor.peek():
        raise _MalformedError("Something follows the header's closing brace.")
    yield from tensors.coverage()


def _pass_metadata(cursor: _Cursor) -> None:
    """Move past `__metadata__`; its strings may be large, so none is kept."""
    if cursor.peek() != "{":
        raise _MalformedError("The metadata is not an object.", "__metadata__", "metadata-invalid")
    for count, key in enumerate(cursor.members()):
        if count == METADATA_KEYS_MAX:
            raise _MalformedError(f"The metadata has more than {count} keys.", "__metadata__", "metadata-invalid")
        if cursor.peek() != '"':
            raise _MalformedError("A metadata value is not a string.", f"__metadata__.{key}", "metadata-invalid")
        cursor.string()


def _whole(text: str) -> int:
    """An integer as the library reads one, without a sign (it refuses -0), or else -1."""
    return int(text) if text.isdigit() else -1


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError("a field occurs twice")
    return fields


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


_JSON = json.JSONDecoder(object_pairs_hook=_distinct, parse_int=_whole, parse_constant=_no_constant)


class _Cursor:
    """A place in the header's text, moved on a token at a time; raises _MalformedError."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._position = 0

    def peek(self) -> str:
        """The next character that is not white space; empty at the end."""
        if space := _SPACE.match(self._text, self._position):
            self._position = space.end()
        return self._text[self._position : self._position + 1]

    def members(self) -> Iterator[str]:
        """The names in an object. Whoever iterates moves past each value before asking for the next name."""
        self._take("{")
        if self.peek() != "}":
            yield self._name()
            while self.peek() == ",":
                self._take(",")
                yield self._name()
        self._take("}")

    def string(self) -> str:
        """Move past a string and return it."""
        if self.peek() != '"':
            raise _MalformedError(f"A string is missing at character {self._position}.")
        if plain := _PLAIN_STRING.match(self._text, self._position):
            self._position = plain.end()
            return plain[1]
        try:
            value, self._position = _JSON.raw_decode(self._text, self._position)
            value.encode()
        except ValueError:
            raise _MalformedError(f"The string at character {self._position} is not valid.") from None
        return str(value)

    def entry(self, name: str) -> dict[str, Any]:
        """Move past a tensor's entry, an object of bounded length with no object inside, and return it."""
        start = self._position
        end = self._text.find("}", start, start + _ENTRY_CHARS_MAX) + 1
        if self.peek() != "{" or not end:
            raise _MalformedError(f"The entry is not a plain object of at most {_ENTRY_CHARS_MAX} characters.", name)
        try:
            value: dict[str, Any] = _JSON.decode(self._text[start:end])
        except (ValueError, RecursionError):
            raise _MalformedError("The entry is not valid JSON.", name) from None
        self._position = end
        return value

    def _name(self) -> str:
        name = self.string()
        self._take(":")
        self.peek()
        return name

    def _take(self, expected: str) -> None:
        if self.peek() != expected:
            raise _MalformedError(f"{expected!r} is missing at character {self._position}.")
        self._position += 1


@dataclass(slots=True)
class _Tensors:
    """What is kept of the entries: the names, to see duplicates, and where each tensor lies."""

    data_bytes: int
    names: set[str] = field(default_factory=set)
    spans: list[tuple[int, int, str]] = field(default_factory=list)
    sound: bool = True

    def add(self, name: str, entry: dict[str, Any]) -> _Problem | None:
        """Take an entry in, or say what is wrong with it."""
        if problem := self._problem(entry):
            self.sound = False
            return _Problem(*problem, name)
        start, end = entry["data_offsets"]
        self.spans.append((start, end, name))
        return None

    def _problem(self, entry: dict[str, Any]) -> tuple[str, str] | None:
        if missing := _FIELDS - entry.keys():
            return "entry-incomplete", f"The entry has no {min(missing)}."
        bits = _bits(entry["dtype"])
        if bits is None:
            return "unknown-dtype", f"The dtype {str(entry['dtype'])[:40]!r} is not known."
        shape, offsets = entry["shape"], entry["data_offsets"]
        if not _is_sizes(shape):
            return "shape-invalid", "The shape is not a list of whole numbers."
        if not _is_sizes(offsets) or len(offsets) != 2:
            return "offsets-invalid", "The offsets are not two whole numbers."
        if (size_bits := _product_bits(shape, bits)) is None:
            return "shape-overflow", "The shape has more elements than 64 bits can count."
        start, end = offsets
        if end < start:
            return "offsets-reversed", f"The tensor ends at {end}, before it begins at {start}."
        if end > self.data_bytes:
            return "offsets-outside", f"The tensor ends at {end}, the data at {self.data_bytes}."
        if size_bits != (end - start) * 8:
            needed = (size_bits + 7) // 8
            return "size-mismatch", f"The tensor needs {needed} bytes and has {end - start}."
        return None

    def coverage(self) -> Iterator[_Problem]:
        """Where tensors overlap, and bytes that belong to none."""
        # With an entry left out, its bytes would look like a gap.
        if not self.sound:
            return
        self.spans.sort()
        covered = 0
        for start, end, name in self.spans:
            if start < covered:
                yield _Problem("offsets-overlap", f"The tensor begins at {start}, within another.", name)
            elif start > covered:
                yield _Problem("offsets-gap", f"No tensor has the bytes from {covered} to {start}.", name)
            covered = max(covered, end)
        if covered < self.data_bytes:
            yield _Problem("trailing-bytes", f"The tensors end at {covered}, the data at {self.data_bytes}.")


def _bits(dtype: object) -> int | None:
    return DTYPE_BITS.get(dtype) if isinstance(dtype, str) else None


def _is_sizes(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item <= _U64_MAX for item in value)


def _product_bits(shape: list[int], bits: int) -> int | None:
    """The tensor's size in bits, or None where a step of the product, in the order given, is above 64 bits."""
    product = 1
    for factor in (*shape, bits):
        product *= factor
        if product > _U64_MAX:
            return None
    return product
