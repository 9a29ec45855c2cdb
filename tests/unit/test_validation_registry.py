"""What is said of a version: each file by its name and its bytes, the version by its type, and how a store ends."""

from __future__ import annotations

import io
import pickle
import struct
import time
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from schemas.errors import ModelManagerError
from schemas.findings import Finding
from worker.validation.registry import FILE_FINDINGS_MAX, FINDINGS_MAX, examine, known_formats, refusal
from worker.validation.sniffing import sniff
from worker.validation.source import BytesSource, Source, read_ends

SAFETENSORS = safetensors.numpy.save({"w": numpy.zeros(30_000, "f4")})
GGUF = b"GGUF\x03\x00\x00\x00" + bytes(200_000)
HDF5 = b"\x89HDF\r\n\x1a\n" + bytes(3000)
TFLITE = b"\x1c\x00\x00\x00TFL3" + bytes(3000)
# ir_version 8, producer_name "test", a graph of 3 bytes, one opset of version 17.
ONNX = b"\x08\x08\x12\x04test\x3a\x03\x12\x01g\x42\x02\x10\x11"
NUMPY = b"\x93NUMPY\x01\x00\x28\x00{'descr': '<f4', 'fortran_order': False}" + bytes(8)


def zipped(*names: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in names:
            archive.writestr(name, b"content")
    return buffer.getvalue()


ZIP = zipped("weights", "config.json")
CONTENTS = {"safetensors": SAFETENSORS, "gguf": GGUF, "hdf5": HDF5, "tflite": TFLITE, "onnx": ONNX, "zip": ZIP}
SUFFIXES = {
    "safetensors": "safetensors",
    "gguf": "gguf",
    "h5": "hdf5",
    "tflite": "tflite",
    "onnx": "onnx",
    "zip": "zip",
}
TEXT = b"only words, no model\n" * 20


def examined(model_type: str, /, **files: bytes) -> list[str]:
    """Codes for a version whose file names have `__` in place of their dot."""
    named = [(name.replace("__", "."), BytesSource(data)) for name, data in files.items()]
    return [finding.code for finding in examine(model_type, named, allow_pickle=False)]


def formats(data: bytes) -> tuple[str, ...]:
    source = BytesSource(data)
    return sniff(read_ends(source), source).formats


@pytest.mark.parametrize("name", CONTENTS)
def test_a_format_is_recognised_by_its_bytes(name: str) -> None:
    assert formats(CONTENTS[name]) == (name,)


@pytest.mark.parametrize("data", [b"", b"\x08", b"\x08\x08", b"GGU", TEXT, b"\x08\x08\x3a\xff\xff\xff\x7f", bytes(100)])
def test_bytes_of_no_format_are_not_recognised(data: bytes) -> None:
    assert formats(data) == ()


def test_hdf5_is_recognised_behind_a_block_of_its_users() -> None:
    assert formats(bytes(2048) + HDF5) == ("hdf5",)
    assert formats(bytes(2049) + HDF5) == ()


@given(st.binary(max_size=300))
def test_sniffing_takes_any_bytes(data: bytes) -> None:
    assert len(formats(data)) <= 3


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("content", CONTENTS)
def test_a_file_should_be_what_its_name_says(suffix: str, content: str) -> None:
    codes = examined("custom", **{f"model__{suffix}": CONTENTS[content]})
    assert codes == ([] if SUFFIXES[suffix] == content else ["content-mismatch"])


@pytest.mark.parametrize("suffix", ["gguf", "h5", "tflite", "npy", "npz", "keras", "zip"])
def test_a_file_of_no_known_content_may_not_bear_a_formats_name(suffix: str) -> None:
    assert examined("custom", **{f"model__{suffix}": TEXT}) == ["content-mismatch"]


def test_a_text_named_safetensors_is_told_why_it_is_none() -> None:
    assert examined("custom", model__safetensors=TEXT) == ["header-too-large"]


def test_onnx_has_no_magic_so_unknown_content_is_left_to_its_own_check() -> None:
    assert examined("onnx", model__onnx=TEXT) == []


@pytest.mark.parametrize("model_type", ["safetensors", "gguf", "hdf5"])
@pytest.mark.parametrize("content", ["safetensors", "gguf", "hdf5", "zip"])
def test_the_only_file_should_be_of_the_type_whatever_its_name(model_type: str, content: str) -> None:
    codes = examined(model_type, model__bin=CONTENTS[content])
    assert codes == ([] if model_type == content else ["content-mismatch"])


@pytest.mark.parametrize("model_type", ["safetensors", "gguf", "hdf5"])
def test_a_version_should_have_a_file_of_its_type(model_type: str) -> None:
    side = {"README__md": TEXT, "config__json": b"{}"}
    assert examined(model_type, **side) == ["format-absent"]
    assert examined(model_type, **side, model__bin=CONTENTS[model_type]) == []


def test_side_files_are_fine_in_a_version_of_any_type() -> None:
    side = {
        "README__md": TEXT,
        "config__json": b"not json",
        "vocab__txt": b"cat\ndog\n",
        "__gitattributes": b"* text\n",
    }
    for model_type in known_formats() - {"safetensors", "gguf", "hdf5"}:
        assert examined(model_type, **side) == []


def test_every_known_format_is_a_valid_type_and_custom_is_one() -> None:
    assert {"onnx", "pytorch", "tensorflow", "safetensors", "gguf", "custom"} <= known_formats()
    assert all(name.replace("-", "").isalnum() and name == name.lower() for name in known_formats())


@pytest.mark.parametrize("front", ["gguf", "safetensors", "hdf5", "tflite"])
def test_a_file_of_two_formats_is_refused(front: str) -> None:
    joined = CONTENTS[front] + ZIP
    assert zipfile.is_zipfile(io.BytesIO(joined))
    assert "content-mismatch" in examined("custom", model__odd=joined)


def test_a_gguf_with_a_pytorch_archive_behind_it_is_unsafe_under_either_name() -> None:
    joined = GGUF + zipped("archive/data.pkl")
    assert examined("custom", model__gguf=joined) == ["unsafe-disguise"]
    assert examined("custom", model__pt=joined) == ["unsafe-pickle", "content-mismatch"]


@dataclass(frozen=True)
class Failing:
    """A source whose size or whose reads are not to be believed."""

    size: int
    answer: bytes | Exception

    def read_at(self, offset: int, length: int) -> bytes:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@pytest.mark.parametrize("size", [-1, 7, 100, 10**6, 2**63, 2**70])
@pytest.mark.parametrize("answer", [b"", b"{", b"x" * 50, bytes(70_000), OSError("/secret/path"), MemoryError()])
def test_a_source_that_lies_or_fails_is_a_finding(size: int, answer: bytes | Exception) -> None:
    (finding,) = examine("custom", [("model.safetensors", Failing(size, answer))], allow_pickle=True)
    assert (finding.severity, finding.code) == ("error", "hook-failed")
    assert "secret" not in finding.message


def test_storage_that_cannot_be_reached_says_nothing_about_the_model() -> None:
    away = Failing(10, ModelManagerError("ERR_STORAGE_UNAVAILABLE"))
    with pytest.raises(ModelManagerError, match="ERR_STORAGE_UNAVAILABLE"):
        examine("custom", [("m.bin", away)], allow_pickle=False)


def warn_then_fail(path: str, source: Source) -> Iterator[Finding]:
    yield Finding("warning", "odd", "Odd.", path)
    raise KeyError("/secret/path")


def test_a_hook_that_fails_is_a_finding_beside_what_it_found() -> None:
    found = examine("gguf", [("m.gguf", BytesSource(GGUF))], allow_pickle=False, hooks={"gguf": warn_then_fail})
    assert [(each.severity, each.code, each.path) for each in found] == [
        ("error", "hook-failed", "m.gguf"),
        ("warning", "odd", "m.gguf"),
    ]
    assert "KeyError" in found[0].message and "secret" not in found[0].message


def warn_often(path: str, source: Source) -> Iterable[Finding]:
    return [*(Finding("warning", "odd", "Odd.", path) for _ in range(100)), Finding("error", "bad", "Bad.", path)]


def test_no_bound_on_findings_hides_an_error() -> None:
    files = [(f"{i}.gguf", BytesSource(GGUF + bytes([i]))) for i in range(30)]
    one = examine("gguf", files[:1], allow_pickle=False, hooks={"gguf": warn_often})
    assert len(one) == FILE_FINDINGS_MAX and one[0].code == "bad"
    files.append(("last.pkl", BytesSource(pickle.dumps([1]))))
    found = examine("gguf", files, allow_pickle=False, hooks={"gguf": warn_often})
    assert len(found) == FINDINGS_MAX
    assert [each.code for each in found[:31]] == ["unsafe-pickle"] + ["bad"] * 30


def counting_hook(looks: list[str]) -> dict[str, Any]:
    def count(path: str, source: Source) -> list[Finding]:
        looks.append(path)
        return []

    return {"gguf": count}


def test_the_same_bytes_are_looked_into_once_for_each_suffix() -> None:
    looks: list[str] = []
    paths = [*(f"{i}.gguf" for i in range(100)), "a.odd", "b.ODD", "c"]
    files = [(path, BytesSource(bytes(GGUF))) for path in paths]
    assert examine("gguf", files, allow_pickle=False, hooks=counting_hook(looks)) == []
    assert looks == ["0.gguf", "a.odd", "c"]


def test_what_takes_too_long_to_look_into_is_an_error() -> None:
    looks: list[str] = []

    def slow(path: str, source: Source) -> list[Finding]:
        looks.append(path)
        end = time.thread_time() + 1
        while time.thread_time() < end:
            pass
        return []

    files = [(f"{i}.gguf", BytesSource(GGUF + bytes([i]))) for i in range(100)]
    found = examine("gguf", files, allow_pickle=False, hooks={"gguf": slow}, budget_s=0.9)
    assert [each.code for each in found] == ["too-costly"]
    assert len(looks) == 1
    error = refusal(found)
    assert error is not None and error.code == "ERR_INVALID_MODEL_DATA"


def test_a_look_that_nobody_waits_for_any_more_ends_with_the_file_it_is_at() -> None:
    looks: list[str] = []
    files = [(f"{i}.gguf", BytesSource(GGUF + bytes([i]))) for i in range(100)]
    examine("gguf", files, allow_pickle=False, hooks=counting_hook(looks), stopped=lambda: len(looks) == 3)
    assert len(looks) == 3


def test_nothing_or_warnings_alone_refuse_nothing() -> None:
    assert refusal([]) is None
    assert refusal([Finding("warning", "unsafe-pickle", "A pickle.", "m.pkl"), Finding("info", "x", "X.")]) is None


def test_an_error_refuses_the_data_and_an_unsafe_one_the_model() -> None:
    bad, unsafe = (
        Finding("error", "offsets-gap", "A gap.", "m", "w"),
        Finding("error", "unsafe-pickle", "A pickle.", "p"),
    )
    invalid = refusal([Finding("warning", "odd", "Odd."), bad])
    assert invalid is not None and invalid.code == "ERR_INVALID_MODEL_DATA" and invalid.message == "m: A gap."
    assert invalid.details["findings"][0] == bad.as_dict()
    both = refusal([bad, unsafe])
    assert both is not None and both.code == "ERR_UNSAFE_MODEL" and both.message == "p: A pickle."


def test_a_refusal_has_at_most_twenty_findings() -> None:
    error = refusal(Finding("error", "bad", "Bad.", str(i)) for i in range(100))
    assert error is not None and len(error.details["findings"]) == 20


def test_a_zip_directory_above_the_limit_is_refused_without_being_read() -> None:
    names = [f"{i:0200d}" for i in range(40_000)]
    codes = examined("custom", model__zip=zipped(*names))
    assert codes == ["archive-too-large"]


def test_directories_within_each_other_count_together() -> None:
    directory = b"".join(
        b"PK\x01\x02" + bytes(24) + struct.pack("<3H", 1, 0, 0) + bytes(12) + b"a" for _ in range(60_000)
    )
    ends = [struct.pack("<4s8x2I2x", b"PK\x05\x06", len(directory) - 47 * k, 47 * k) for k in range(8)]
    assert examined("custom", w__dat=directory + b"".join(ends)) == ["archive-too-large"]
