"""A file that a loader may unpickle is found, in every wrapping, and never loaded."""

from __future__ import annotations

import bz2
import collections
import gzip
import io
import lzma
import pickle
import random
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from worker.validation.pickles import decode
from worker.validation.registry import examine
from worker.validation.source import HEAD_BYTES, BytesSource

PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)


class Trap:
    """Touches a file if anything unpickles it."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (Path(self.path),)


def codes(path: str, data: bytes, *, model_type: str = "custom", allow_pickle: bool = False) -> list[str]:
    findings = examine(model_type, [(path, BytesSource(data))], allow_pickle=allow_pickle)
    return [f"{finding.severity} {finding.code}" for finding in findings]


def zipped(*members: tuple[str, bytes], compression: int = zipfile.ZIP_STORED, comment: bytes = b"") -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        archive.comment = comment
        for name, data in members:
            archive.writestr(name, data)
    return buffer.getvalue()


def torch_archive(name: str = "archive/data.pkl") -> bytes:
    return zipped((name, pickle.dumps({"w": 1}, 2)), ("archive/data/0", bytes(4000)), ("archive/version", b"3\n"))


PICKLE = ["error unsafe-pickle"]
DISGUISE = ["error unsafe-disguise"]


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("path", ["m.pkl", "pytorch_model.bin", "m.ckpt", "m.joblib", "deep/m.npy", "m.odd"])
@pytest.mark.parametrize("value", ["plain", "ordered", "trap"])
def test_a_pickle_of_any_protocol_is_found_and_not_loaded(protocol: int, path: str, value: str, tmp_path: Path) -> None:
    trap = tmp_path / "sprung"
    values = {"plain": {"a": [1, 2.5, None]}, "ordered": collections.OrderedDict(a=1), "trap": Trap(str(trap))}
    assert PICKLE[0] in codes(path, pickle.dumps(values[value], protocol))
    assert not trap.exists()


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("path", ["m.safetensors", "m.gguf", "m.onnx", "m.h5", "m.tflite"])
def test_a_pickle_under_another_formats_name_is_refused_even_where_pickles_are_allowed(
    protocol: int, path: str
) -> None:
    data = pickle.dumps(collections.OrderedDict(a=1), protocol)
    assert codes(path, data, allow_pickle=True) == DISGUISE


@pytest.mark.parametrize("protocol", range(2, 6))
@pytest.mark.parametrize("path", ["config.json", "README.md", "vocab.txt", "sub/a.JSONL"])
def test_a_pickle_under_a_texts_name_is_refused_even_where_pickles_are_allowed(protocol: int, path: str) -> None:
    assert codes(path, pickle.dumps({"a": 1}, protocol), allow_pickle=True) == DISGUISE


def test_a_pickle_under_a_name_that_says_nothing_follows_the_policy() -> None:
    assert codes("model", pickle.dumps([1])) == codes("model", torch_archive()) == PICKLE
    assert codes("model", pickle.dumps([1]), allow_pickle=True) == ["warning unsafe-pickle"]


def test_the_only_file_of_a_safetensors_version_may_not_be_a_pickle_whatever_its_name() -> None:
    assert codes("model.bin", pickle.dumps([1]), model_type="safetensors", allow_pickle=True) == DISGUISE


def test_where_pickles_are_allowed_one_is_a_warning() -> None:
    assert codes("m.pkl", pickle.dumps([1]), allow_pickle=True) == ["warning unsafe-pickle"]


@pytest.mark.parametrize("padding", [HEAD_BYTES, 3 * HEAD_BYTES])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_pickle_that_is_longer_than_the_look_is_found(padding: int, protocol: int) -> None:
    assert codes("m.bin", pickle.dumps(["x" * padding, Trap("never")], protocol)) == PICKLE
    assert codes("m.bin", pickle.dumps([b"x" * padding, Trap("never")], protocol)) == PICKLE


def test_a_pickle_that_breaks_after_its_call_is_found() -> None:
    whole = pickle.dumps(Trap("never"), 2)
    assert codes("m.dat", whole[:-1] + b"\x00broken") == PICKLE
    assert codes("m.dat", pickle.dumps(Trap("never"), 0)[:-1] + b"\x00broken") == PICKLE


@pytest.mark.parametrize("prefix", [b"\x80\x02I0x1\n0", b"\x80\x04L0x1L\n0", b"I0x1\n0", b"F1e5\n0"])
def test_a_number_that_only_unpicklers_can_read_does_not_end_the_look(prefix: bytes) -> None:
    harmless = b"cbuiltins\nlen\n(]tR."
    assert pickle.loads(prefix + harmless) == 0
    assert codes("m.bin", prefix + harmless) == PICKLE


def test_a_pickle_without_its_protocol_byte_is_found() -> None:
    framed = pickle.dumps(Trap("never"), 4)
    assert codes("m.bin", framed[11:]) == PICKLE


def test_a_pickle_made_of_thousands_of_idle_opcodes_is_found() -> None:
    assert codes("m.bin", b"\x80\x02" + b"N0" * 20_000 + b"cos\ngetpid\n(tR.") == PICKLE
    assert codes("m.bin", b"N0" * 20_000 + b"cos\ngetpid\n(tR.") == PICKLE


def test_several_pickles_in_a_row_are_found() -> None:
    legacy = b"".join(pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {"a": 1}))
    assert codes("legacy.bin", legacy + bytes(1000)) == PICKLE
    assert codes("legacy.bin", b"I1\n.I2\n." + pickle.dumps(Trap("never"), 0) + bytes(1000)) == PICKLE


@pytest.mark.parametrize("name", ["archive/data.pkl", "data.pkl", "a/b/DATA.PKL", "archive/constants.Pickle"])
@pytest.mark.parametrize("path", ["model.pt", "pytorch_model.bin", "model.zip", "model.odd"])
def test_a_pytorch_archive_is_found_by_what_it_lists(name: str, path: str) -> None:
    assert codes(path, torch_archive(name), model_type="pytorch") == PICKLE


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("comment", [b"", b"c" * 65_535, b"PK\x05\x06" + bytes(40)])
def test_no_compression_or_comment_hides_an_archives_pickle(compression: int, comment: bytes) -> None:
    large = random.Random(1).randbytes(200_000)
    data = zipped(("w", large), ("a/data.pkl", b"."), compression=compression, comment=comment)
    assert codes("m.pt", data) == PICKLE


def test_broken_checksums_and_flags_hide_no_pickle_in_an_archive() -> None:
    data = bytearray(torch_archive())
    entry = data.index(b"PK\x01\x02")
    data[entry + 8 : entry + 10] = b"\xff\xff"
    data[entry + 16 : entry + 20] = b"\x00\x00\x00\x00"
    data[14:18] = b"\x00\x00\x00\x00"
    assert codes("m.pt", bytes(data)) == PICKLE


def test_an_archive_with_a_directory_in_the_long_form_is_read() -> None:
    """A zip64 end: the 32-bit fields say nothing, the record before them has the numbers."""
    data = torch_archive()
    end = data.rindex(b"PK\x05\x06")
    entries, length, offset = struct.unpack_from("<HII", data, end + 10)
    record = struct.pack("<4sQHHIIQQQQ", b"PK\x06\x06", 44, 45, 45, 0, 0, entries, entries, length, offset)
    locator = struct.pack("<4sIQI", b"PK\x06\x07", 0, end, 1)
    last = data[end : end + 8] + b"\xff\xff\xff\xff" + b"\xff" * 8 + b"\x00\x00"
    long_form = data[:end] + record + locator + last
    assert "archive/data.pkl" in zipfile.ZipFile(io.BytesIO(long_form)).namelist()
    assert codes("m.pt", long_form) == PICKLE
    prefixed = b"GGUF" + bytes(96) + long_form
    assert "archive/data.pkl" in zipfile.ZipFile(io.BytesIO(prefixed)).namelist()
    assert PICKLE[0] in codes("m.pt", prefixed)


def test_an_archive_without_pickles_is_fine() -> None:
    assert codes("m.zip", zipped(("weights", bytes(100)), ("config.json", b"{}"))) == []


@pytest.mark.parametrize(
    "compress", [zlib.compress, gzip.compress, bz2.compress, lzma.compress], ids=lambda c: c.__module__
)
@pytest.mark.parametrize("path", ["m.joblib", "m.pkl", "m.gz", "m.odd"])
def test_a_compressed_pickle_is_found(compress: object, path: str) -> None:
    assert callable(compress)
    assert codes(path, compress(pickle.dumps(list(range(5000)), 3))) == PICKLE


@pytest.mark.parametrize(
    "compress", [zlib.compress, gzip.compress, bz2.compress, lzma.compress], ids=lambda c: c.__module__
)
def test_other_compressed_data_is_fine(compress: object) -> None:
    assert callable(compress)
    assert codes("corpus.gz", compress(b"once upon a time " * 1000)) == []


def test_a_compressed_bomb_is_not_unpacked() -> None:
    assert codes("m.gz", gzip.compress(bytes(200_000_000), compresslevel=1)) == []


def saved(array: object) -> bytes:
    buffer = io.BytesIO()
    numpy.save(buffer, numpy.asarray(array))
    return buffer.getvalue()


@pytest.mark.parametrize("dtype", ["O", [("a", "i4"), ("b", "O")], [("a", [("b", "O")], (2,))]])
def test_a_numpy_file_with_objects_is_a_pickle(dtype: object) -> None:
    assert codes("m.npy", saved(numpy.zeros(2, dtype=dtype))) == PICKLE  # type: ignore[call-overload]


@pytest.mark.parametrize("dtype", ["f4", ">i8", "U5", "M8[ns]", [("O", "f4"), ("s", "S3", (2, 2))]])
def test_a_numpy_file_of_plain_numbers_is_fine(dtype: object) -> None:
    assert codes("m.npy", saved(numpy.zeros(2, dtype=dtype))) == []  # type: ignore[call-overload]


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2])
@pytest.mark.parametrize("name", ["arr_0.npy", "arr_0", "deep/ARR.NPY"])
def test_an_array_of_objects_is_found_in_an_archive_of_arrays(compression: int, name: str) -> None:
    objects = saved(numpy.zeros(2, dtype=object))
    members = (("first.npy", saved(numpy.zeros(200))), (name, objects))
    assert codes("m.npz", zipped(*members, compression=compression)) == PICKLE
    assert codes("m.npz", b"in front" + zipped(*members, compression=compression))[:1] == PICKLE


def test_an_array_of_objects_is_found_behind_blocks_of_nothing() -> None:
    squeeze = zlib.compressobj(wbits=-15)
    nothing = b"".join(squeeze.flush(zlib.Z_FULL_FLUSH) or b"\x00\x00\x00\xff\xff" for _ in range(4000))
    data = nothing + squeeze.compress(saved(numpy.zeros(2, dtype=object))) + squeeze.flush()
    archive = bytearray(zipped(("a.npy", data)))
    for header, method in ((b"PK\x03\x04", 8), (b"PK\x01\x02", 10)):
        at = archive.index(header) + method
        archive[at : at + 2] = b"\x08\x00"
    assert codes("m.npz", bytes(archive)) == PICKLE


def test_an_archive_of_plain_arrays_is_fine() -> None:
    for save in (numpy.savez, numpy.savez_compressed):
        buffer = io.BytesIO()
        save(buffer, w=numpy.zeros((300, 300)), b=numpy.zeros(3, "i4"), s=numpy.array(["a", "b"]))
        assert codes("m.npz", buffer.getvalue()) == []
        assert codes("m.npz", buffer.getvalue(), model_type="numpy") == []


def tarred(kind: int) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=kind) as archive:
        for name in ("storages", "tensors", "pickle"):
            data = pickle.dumps({"w": 1}, 2)
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_what_the_oldest_loader_of_torch_unpickles_is_found(kind: int, old: bool) -> None:
    data = bytearray(tarred(kind))
    if old:  # before there was a magic
        data[257:265] = bytes(8)
        data[148:156] = b" " * 8
        data[148:156] = b"%06o\0 " % sum(data[:512])
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as archive:
            assert archive.getnames() == ["storages", "tensors", "pickle"]
    for path in ("pytorch_model.bin", "model.tar", "model"):
        assert codes(path, bytes(data), model_type="pytorch") == PICKLE
    assert codes("pytorch_model.bin", bytes(data)) == PICKLE
    assert codes("dataset.tar", bytes(data)) == []


def test_a_numpy_header_that_cannot_be_read_counts_as_objects() -> None:
    array = bytearray(saved(numpy.zeros(2)))
    escaped = saved(numpy.zeros(2)).replace(b"'<f8', ", b"'|\\x4f',")
    assert codes("m.npy", escaped) == PICKLE
    assert codes("m.npy", bytes(array).replace(b"'descr'", b"'d'+'sc'")) == PICKLE
    assert codes("m.npy", b"\x93NUMPY\x01\x00\xff\xff{") == PICKLE


@pytest.mark.parametrize("path", ["m.pkl", "m.pt"])
def test_a_file_named_as_a_pickle_counts_unless_it_is_known_to_be_something_else(path: str) -> None:
    assert codes(path, b"hello") == PICKLE
    assert codes(path, b"") == []
    assert codes(path, b"GGUF\x03\x00\x00\x00" + bytes(100)) == []


TEXTS = {
    "vocab.txt": b"cat\ndog\nbird\n",
    "merges.txt": b"cos\nsystem\n(S'x'\ntR.",
    "vocab": b"cat\ndog\n",
    "README.md": b"# A model\n\nWith `GGUF` and PK in it.\n",
    "config.json": b'{"model_type": "bert"}',
    "model.py": b"import os\n",
    "lightgbm.model": b"tree\nversion=v4\nnum_class=1\n",
    "words.dat": b"catalogue of things\nwhich are not\n",
    "empty.bin": b"",
}


@pytest.mark.parametrize("path", TEXTS)
def test_a_text_is_not_taken_for_a_pickle(path: str) -> None:
    assert codes(path, TEXTS[path]) == []


@pytest.mark.filterwarnings("ignore:invalid escape sequence")
@given(st.integers(0, 2**32))
def test_raw_weights_are_not_taken_for_a_pickle(seed: int) -> None:
    weights = numpy.random.default_rng(seed).standard_normal(20_000).astype("f4").tobytes()
    for model_type in ("openvino", "custom"):
        assert codes("model.bin", weights, model_type=model_type) == []


@pytest.mark.filterwarnings("ignore:invalid escape sequence")
@pytest.mark.parametrize("seed", range(256))
def test_raw_weights_may_begin_with_any_byte(seed: int) -> None:
    weights = bytes([seed]) + random.Random(seed).randbytes(100_000)
    assert codes("model.bin", weights, model_type="openvino") == []


def test_one_string_longer_than_the_look_counts_unless_a_bin_is_raw_weights() -> None:
    data = b"X" + (70_000).to_bytes(4, "little") + b"x" * 80_000
    assert codes("model.bin", data, model_type="pytorch") == PICKLE
    assert codes("model.bin", data, model_type="openvino") == []


def test_a_header_length_that_looks_like_opcodes_makes_no_pickle() -> None:
    """The length begins with PROTO 4 and FRAME, and the tensor's name goes on with NONE and STOP."""
    header = b'{"aN.":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'.ljust(0x950480)
    assert codes("m.safetensors", len(header).to_bytes(8, "little") + header + b"x") == []


@pytest.mark.filterwarnings("ignore:invalid escape sequence")
@given(st.binary(max_size=400), st.integers(0, 10**9))
@settings(max_examples=500)
def test_decoding_never_fails_and_never_looks_at_more_than_it_should(data: bytes, beyond: int) -> None:
    trace = decode(data, beyond)
    assert trace.opcodes <= 4096 and (trace.stop is None or trace.stop <= len(data))


@given(st.sampled_from(PROTOCOLS), st.data())
def test_any_pickle_of_plain_values_is_found(protocol: int, data: st.DataObject) -> None:
    plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary()
    value = data.draw(st.recursive(plain, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)))
    assert codes("m.bin", pickle.dumps(value, protocol)) == PICKLE
