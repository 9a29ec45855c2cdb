"""Torn write or damage: the judgement over the rest of the active file after its last good line."""

from __future__ import annotations

from worker.journal.format import checks, stored_batch, stored_crc

_SECTOR_BYTES = 512


def judge(rest: bytes, *, offset: int, sequence: int, crc: int) -> str | None:
    """None if `rest` is what a write that was cut short leaves, so that nobody was promised it; else why it is damage.

    `rest` begins at `offset` of the file with the first line that does not check, which should have `sequence`; `crc`
    is that of the line before.
    """
    lines = rest.split(b"\n")
    unfinished = lines.pop()
    seed: int | None = crc
    for line in (line + b"\n" for line in lines):
        if seed is not None and checks(line, seed):
            batch = stored_batch(line)
            if batch is not None and batch > sequence:
                return f"a later batch, from sequence {batch} on, proves that the line had been durable"
        seed = stored_crc(line)
    if _has_lost_sector(rest, offset):
        return None
    if not unfinished:
        return "all of the last write is there, and no sector of it is missing"
    # A cut never ends in one byte too many: here a newline turned into something else.
    if seed is not None and checks(unfinished[:-1] + b"\n", seed):
        return "the newline at the end of the last line is another byte"
    return None


def _has_lost_sector(rest: bytes, offset: int) -> bool:
    """Whether a piece of `rest` that lies in one sector of the file is all NUL, as a sector never written reads."""
    start = 0
    end = _SECTOR_BYTES - offset % _SECTOR_BYTES
    while start < len(rest):
        if not rest[start:end].strip(b"\0"):
            return True
        start, end = end, end + _SECTOR_BYTES
    return False
