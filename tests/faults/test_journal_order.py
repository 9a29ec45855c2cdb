"""Files whose lines all check, but that no journal has written: a boot names the place, and changes nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.faults.test_journal_damage import active_file, assert_refused, filled
from worker.journal import Files, blocks
from worker.journal.format import encode, make_line, stored_crc
from worker.journal.manifest import read_manifest
from worker.journal.segment import Digest

SEAL = b'"op":"seal","rec":{}'


def follow(file: Path, *payloads: bytes) -> tuple[int, int]:
    """Write lines behind those of a file, chained as they should be: offset and sequence of the last one."""
    lines = file.read_bytes().splitlines(keepends=True)
    crc = stored_crc(lines[-1]) or 0
    sequence = int(lines[-1].split(b'"seq":')[1].split(b",")[0])
    for payload in payloads:
        sequence += 1
        line, crc = make_line(sequence, sequence, 0, payload, crc)
        lines.append(line)
    file.write_bytes(b"".join(lines))
    return sum(map(len, lines[:-1])), sequence


def sealed_as_it_is(folder: Path, file: Path) -> None:
    """Let MANIFEST say of a sealed file what it holds now."""
    manifest = read_manifest(Files(), folder)
    with file.open("rb") as stream:
        now = Digest.of(stream).sealed(file.name)
    others = tuple(now if sealed.name == file.name else sealed for sealed in manifest.sealed)
    replace(manifest, sealed=others).publish(Files(), folder)


@pytest.fixture(params=["one block", "a block a line"], autouse=True)
def _blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "a block a line":
        monkeypatch.setattr(blocks, "_BLOCK_LINES", 1)
        monkeypatch.setattr(blocks, "_BLOCK_BYTES", 1)


def test_a_line_behind_the_seal_of_the_active_file(tmp_path: Path) -> None:
    filled(tmp_path, [3])
    offset, sequence = follow(active_file(tmp_path), SEAL, encode("put", {}))
    refused = assert_refused(tmp_path)
    assert (refused.offset, refused.sequence, refused.reason) == (offset, sequence, "a line follows the seal")


def test_a_line_behind_the_seal_of_a_sealed_file(tmp_path: Path) -> None:
    filled(tmp_path, [3, 3], segment_bytes=1)
    sealed = min(tmp_path.glob("seg-*.jsonl"))
    offset, sequence = follow(sealed, encode("put", {}))
    sealed_as_it_is(tmp_path, sealed)
    refused = assert_refused(tmp_path)
    assert (refused.path, refused.offset, refused.sequence) == (sealed.name, offset, sequence)
    assert refused.reason == "a line follows the seal"


@pytest.mark.parametrize("first", [encode("put", {}), b'"op":"open","rec":{"previous":{"name":"x","crc":"0"}}'])
def test_a_first_line_that_does_not_follow_the_file_before(tmp_path: Path, first: bytes) -> None:
    filled(tmp_path, [])
    active_file(tmp_path).write_bytes(make_line(1, 1, 0, first, 0)[0])
    refused = assert_refused(tmp_path)
    assert (refused.offset, refused.reason) == (0, "the first line does not follow the file before")
