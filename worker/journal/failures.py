"""The three ways a journal refuses that stop a boot or the process, so none is an error on the wire; and the full disk,
which is one."""

from __future__ import annotations

from schemas.errors import ModelManagerError


class JournalDamaged(Exception):
    """Bytes that had been durable are not as they were written. Nothing was changed or cut.

    `path` is the file's name inside the journal's folder, `offset` the byte where the first bad line starts,
    `sequence` the one that line should have.
    """

    def __init__(self, path: str, *, offset: int, sequence: int, reason: str) -> None:
        self.path = path
        self.offset = offset
        self.sequence = sequence
        self.reason = reason
        super().__init__(
            f"{path} is damaged at byte {offset}, sequence {sequence}: {reason}. Nothing was changed. Put back a"
            " backup, or `model-manager rebuild` from the archive; without either, `model-manager journal repair` tells"
            " what is lost and, with --accept-loss, goes on without it."
        )


class JournalLocked(Exception):
    """Another process owns this journal. `holder` is what it wrote into LOCK: information only."""

    def __init__(self, holder: str) -> None:
        self.holder = holder
        super().__init__(f"another process owns this journal: {holder or 'it left no name in LOCK'}")


class JournalFailed(Exception):
    """The journal stopped: whether the last records are durable is unknown, and nothing is acknowledged any more.

    Only a new boot finds out; the process should end with a non-zero exit code.
    """


def disk_full() -> ModelManagerError:
    """Nothing was appended, and growth will not be until there is room."""
    return ModelManagerError("ERR_STORAGE_FULL", "The registry's disk is full: only deletes are taken.")
