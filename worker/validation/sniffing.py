"""What a file is by its bytes, whatever its name says.

A file has at most one leading format, the one that begins at its first byte. A zip archive is found by its end and HDF5
may begin later, so a file of another format can hold either as well: those are embedded.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from worker.validation.archives import has_zip_directory
from worker.validation.source import Ends, Source

# The largest safetensors header that any reader accepts. Ours are held to less, but a header above our own limit is
# still recognised here, so that the finding can say what is wrong.
_SAFETENSORS_HEADER_MAX = 100_000_000

_HDF5 = b"\x89HDF\r\n\x1a\n"
_MAGIC = (
    ("gguf", 0, b"GGUF"),
    ("hdf5", 0, _HDF5),
    ("numpy", 0, b"\x93NUMPY"),
    ("tflite", 4, b"TFL3"),
    ("zip", 0, b"PK\x03\x04"),
    ("zip", 0, b"PK\x05\x06"),
)

# Fields of ONNX's ModelProto with the wire type each has: 0 is a varint, 2 has a length.
_ONNX_FIELDS = {1: 0, 2: 2, 3: 2, 4: 2, 5: 0, 6: 2, 7: 2, 8: 2, 14: 2, 20: 2, 25: 2, 26: 2}
_ONNX_IR_VERSION, _ONNX_GRAPH = 1, 7
_ONNX_FIELDS_WALKED = 64


@dataclass(frozen=True, slots=True)
class Content:
    """The formats found in a file; `leading` is None for text and for whatever else is not known here."""

    leading: str | None
    embedded: tuple[str, ...] = ()

    @property
    def formats(self) -> tuple[str, ...]:
        """All of them, the leading one first."""
        return self.embedded if self.leading is None else (self.leading, *self.embedded)


def sniff(ends: Ends, source: Source) -> Content:
    """The formats that a file's bytes show."""
    leading = _leading(ends)
    embedded = []
    if leading != "zip" and has_zip_directory(ends, source):
        embedded.append("zip")
    if leading != "hdf5" and _has_late_hdf5(ends.head):
        embedded.append("hdf5")
    return Content(leading, tuple(embedded))


def _leading(ends: Ends) -> str | None:
    for name, offset, magic in _MAGIC:
        if ends.head.startswith(magic, offset):
            return name
    if 0 < int.from_bytes(ends.head[:8], "little") <= _SAFETENSORS_HEADER_MAX and ends.head[8:9] == b"{":
        return "safetensors"
    return "onnx" if _is_onnx(ends) else None


def _has_late_hdf5(head: bytes) -> bool:
    """HDF5 allows a block of the user's own before it; then it begins at 512 bytes or twice, four times... that."""
    offset = 512
    while offset < len(head):
        if head.startswith(_HDF5, offset):
            return True
        offset *= 2
    return False


def _is_onnx(ends: Ends) -> bool:
    """Protobuf has no magic: walk the top-level fields until both the version and the graph were seen."""
    seen = set()
    for number, wire_type, value, end in _protobuf_fields(ends.head):
        if _ONNX_FIELDS.get(number) != wire_type or end > ends.size:
            return False
        if number == _ONNX_IR_VERSION and not 0 < value < 100:
            return False
        seen.add(number)
        if {_ONNX_IR_VERSION, _ONNX_GRAPH} <= seen:
            return True
    return False


def _protobuf_fields(head: bytes) -> Iterator[tuple[int, int, int, int]]:
    """(number, wire type, value or length, offset after the field) of the fields that begin in `head`."""
    position = 0
    for _ in range(_ONNX_FIELDS_WALKED):
        if (tag := _varint(head, position)) is None or (value := _varint(head, tag[1])) is None:
            return
        number, wire_type = tag[0] >> 3, tag[0] & 7
        position = value[1] + (value[0] if wire_type == 2 else 0)
        yield number, wire_type, value[0], position


def _varint(data: bytes, position: int) -> tuple[int, int] | None:
    """(value, offset after it), or None where none ends within ten bytes."""
    value = 0
    for index, byte in enumerate(data[position : position + 10]):
        value |= (byte & 0x7F) << (7 * index)
        if byte < 0x80:
            return value, position + index + 1
    return None
