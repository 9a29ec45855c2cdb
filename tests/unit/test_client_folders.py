"""Which files of a folder are pushed, and which folders cannot be a version."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from schemas.errors import ModelManagerError
from worker.client.push import local_files


def test_all_files_are_pushed_sorted_by_path(tmp_path: Path) -> None:
    for name in ("b.bin", "a/z.bin", ".gitattributes", "a/b/c.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    files = local_files(tmp_path)
    assert [file.path for file in files] == [".gitattributes", "a/b/c.txt", "a/z.bin", "b.bin"]
    assert all(file.size == len(file.path) for file in files)


def test_one_file_is_pushed_under_its_name(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"1234")
    [file] = local_files(tmp_path / "model.onnx")
    assert (file.path, file.size) == ("model.onnx", 4)


def test_a_link_to_a_file_counts_as_that_file(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(b"1234")
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot/model.bin").symlink_to("../blob")
    [file] = local_files(tmp_path / "snapshot")
    assert (file.path, file.size) == ("model.bin", 4)


def refused(folder: Path) -> str:
    with pytest.raises(ModelManagerError) as caught:
        local_files(folder)
    assert caught.value.code == "ERR_INVALID_REQUEST"
    return caught.value.message


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    assert "no file" in refused(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    assert "not a regular file" in refused(tmp_path)
    (tmp_path / "pipe").unlink()
    (tmp_path / "dangling").symlink_to("nowhere")
    assert "cannot be read" in refused(tmp_path)
    (tmp_path / "dangling").unlink()
    (tmp_path / "loop").symlink_to(tmp_path)
    assert "link to a folder" in refused(tmp_path)


@pytest.mark.parametrize("name", [b"back\\slash", b"not-\xff-utf8", b"line\nfeed"])
def test_a_name_that_no_version_can_have_is_refused(tmp_path: Path, name: bytes) -> None:
    (tmp_path / os.fsdecode(name)).write_bytes(b"x")
    assert "cannot be the path" in refused(tmp_path)


def test_names_that_differ_in_case_only_are_refused(tmp_path: Path) -> None:
    (tmp_path / "Model.bin").write_bytes(b"x")
    (tmp_path / "model.bin").write_bytes(b"x")
    assert "ignoring case" in refused(tmp_path)
