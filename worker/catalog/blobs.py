"""Which blobs the catalog needs, and under which key the bytes with some digest lie.

What a boot finds is kept as sorted hashes, 24 bytes a file; what changes afterwards in dicts beside them. A hash leads
to the row of a version, whose record tells for certain.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any, Protocol

import numpy as np

from schemas.journal import Blob, StoredFile
from worker.catalog.extracts import Hashes, key_hashes, sha_hashes
from worker.catalog.parted import PartedDict
from worker.catalog.table import NO_ROW

_NOT_HELD = (0, "", 0, NO_ROW)
_FEW_FILES = 4  # up to which each is looked up by itself
_ROWS_READ = 8  # for one key: where so many versions have bytes that are wrong, they are stored anew


class Known(Protocol):
    """What the index asks of the catalog about a row."""

    # Whether the version is there, deleted or not.
    def has_row(self, row: int) -> bool: ...

    # The files of the version; read from its record.
    def files_of(self, row: int) -> Sequence[StoredFile]: ...


class BlobIndex:
    """Uses of storage keys. A blob nobody needs any more is told once, in `take_unneeded`."""

    def __init__(self, known: Known) -> None:
        self.bytes = 0
        self._count = 0
        self._known = known
        # While a journal is replayed: the files of each row, in columns.
        self._sizes = array("Q")
        self._rows = array("I")
        # After `settle`: the same, sorted by hash.
        self._by_sha = _Hashes()
        self._by_key = _Hashes()
        self._settled_sizes = np.empty(0, np.uint64)  # in the order of `_by_key`
        self._settled_rows = 0
        # Since then, and what uploads and pulls need.
        # key -> uses; sha256 and size once the bytes are there; the row that used it first, if one did
        self._held = PartedDict[tuple[int, str, int, int]]()
        self._later_rows: dict[str, list[int]] = {}  # key -> the rows that used it after that
        self._keys_of = PartedDict[tuple[str, ...]]()
        self._unneeded: set[str] = set()
        # By row: what `note` was told last.
        self.wrong: dict[int, Sequence[str]] = {}
        self.moved: dict[int, Sequence[Blob]] = {}
        self._distrusted: Counter[str] = Counter()  # keys, by how many rows say that they are wrong

    def __len__(self) -> int:
        return self._count

    # --- asking ---

    def needs(self, key: str) -> bool:
        return key in self._held or self._settled_uses(key)

    def key_of(self, sha256: str) -> str | None:
        """The key of a stored, verified blob with these bytes, a late one of several; of none that is known to be
        wrong."""
        for key in reversed(self._keys_of.get(sha256, ())):
            if self.trusts(key):
                return key
        rows = reversed(self._by_sha.rows_of(int(sha_hashes([sha256])[0])))
        for row in islice((row for row in rows if self._known.has_row(row)), _ROWS_READ):
            for file in self._known.files_of(row):
                if file["sha256"] == sha256 and self.trusts(file["key"]):
                    return file["key"]
        return None

    def trusts(self, key: str) -> bool:
        """Whether nobody has found that the blob is gone, or not what was stored."""
        return key not in self._distrusted

    def is_shared(self, key: str) -> bool:
        """Whether more than one version may have the blob."""
        return self._held.get(key, _NOT_HELD)[0] + len(self._settled_rows_of(key)) > 1

    def rows_of(self, key: str) -> list[int]:
        """The rows of the versions that may have the blob, none that has it missing: some had it, or are alike."""
        rows = {*self._settled_rows_of(key), self._held.get(key, _NOT_HELD)[3], *self._later_rows.get(key, ())}
        return sorted(row for row in rows if row != NO_ROW and self._known.has_row(row))

    def take_unneeded(self) -> set[str]:
        """The keys that lost their last use since the last call."""
        unneeded, self._unneeded = self._unneeded, set()
        return unneeded

    def _settled_uses(self, key: str) -> bool:
        return any(self._known.has_row(row) for row in self._settled_rows_of(key))

    def _settled_rows_of(self, key: str) -> list[int]:
        return self._by_key.rows_of(int(key_hashes([key])[0])) if len(self._by_key.hashes) else []

    def _settled_among(self, keys: Sequence[str]) -> set[str]:
        """Those of the keys that `_settled_uses` is true of."""
        hashes = self._by_key.hashes
        if not len(hashes):
            return set()
        wanted = key_hashes(keys)
        places = np.minimum(np.searchsorted(hashes, wanted), len(hashes) - 1)
        return {keys[at] for at in np.flatnonzero(hashes[places] == wanted).tolist() if self._settled_uses(keys[at])}

    # --- folding a replay ---

    def replay(self, first: int, counts: bytes, sizes: bytes, shas: bytes, keys: bytes) -> None:
        """Versions were stored with as many files as `counts` says of each, in the rows from `first` on, and the files
        have these sizes and hashes; before `settle`."""
        self._by_sha.gather(shas)
        self._by_key.gather(keys)
        self._sizes.frombytes(sizes)
        files = np.frombuffer(counts, np.uint32)
        rows = np.arange(first, first + len(files), dtype=np.uint32)
        self._rows.frombytes(np.repeat(rows, files).tobytes())

    def settle(self, present: np.ndarray[Any, np.dtype[np.bool_]]) -> None:
        """The replay is over, and these rows are there: from now on `use`, `hold`, `release` and `forget` count."""
        rows = np.frombuffer(self._rows.tobytes(), np.uint32)
        sizes = np.frombuffer(self._sizes.tobytes(), np.uint64)
        self._rows, self._sizes = array("I"), array("Q")
        self._by_sha.sort(rows)
        order = self._by_key.sort(rows)
        self._settled_sizes = np.concatenate([self._settled_sizes, sizes])[order]
        self._settled_rows = len(present)
        kept = present[self._by_key.rows]
        _, first = np.unique(self._by_key.hashes[kept], return_index=True)
        self._count = len(first)
        self.bytes = int(self._settled_sizes[kept][first].sum())
        for key, (_, sha256, size, _) in self._held.items():  # what completed uploads and pulls brought
            if sha256 and not self._settled_uses(key):
                self._count += 1
                self.bytes += size
        self._unneeded.clear()

    def dumped(self) -> dict[str, Any]:
        """What `settle` made, in parts."""
        return {
            "sha": self._by_sha.hashes,
            "shaRow": self._by_sha.rows,
            "key": self._by_key.hashes,
            "keyRow": self._by_key.rows,
            "keySize": self._settled_sizes,
        }

    def load(self, parts: dict[str, memoryview]) -> None:
        """Take what `dumped` gave, into an empty index, before `settle`."""
        self._by_sha.load(parts["sha"], parts["shaRow"])
        self._by_key.load(parts["key"], parts["keyRow"])
        self._settled_sizes = np.frombuffer(parts["keySize"], np.uint64)

    # --- folding what comes after ---

    def note(self, row: int, wrong: Sequence[str], moved: Sequence[Blob]) -> None:
        """What the last `update` says of a version's bytes, in place of what another one said before. It needs those
        that moved beside the ones it was stored with, which stay as long as it does."""
        wrong_before, moved_before = self.wrong.pop(row, ()), self.moved.pop(row, ())
        if wrong:
            self.wrong[row] = wrong
            self._distrusted.update(wrong)
        if moved:
            self.moved[row] = moved
            self.use(moved, row)
        for key in wrong_before:
            self._distrusted[key] -= 1
            if not self._distrusted[key]:
                del self._distrusted[key]
        self.release(blob["key"] for blob in moved_before)

    def use(self, files: Sequence[Blob] | Sequence[StoredFile], row: int = NO_ROW) -> None:
        """Count a use of each file's blob, whose bytes are there and verified: by a version, or by an upload."""
        held_with, keys_with, unneeded = self._held.part, self._keys_of.part, self._unneeded
        settled = self._settled_among([file["key"] for file in files]) if len(files) > _FEW_FILES else None
        for file in files:
            key, sha256, size = file["key"], file["sha256"], file["size"]
            held, keys_of = held_with(key), keys_with(sha256)
            uses, known, _, first = held.get(key, _NOT_HELD)
            if not known and not (self._settled_uses(key) if settled is None else key in settled):
                self._count += 1
                self.bytes += size
            if first == NO_ROW:
                first = row
            elif row not in (NO_ROW, first):
                later = self._later_rows.setdefault(key, [])
                if not later or later[-1] != row:
                    later.append(row)
            held[key] = (uses + 1, sha256, size, first)
            others = keys_of.get(sha256, ())
            if key not in others:
                keys_of[sha256] = (*others, key)
            unneeded.discard(key)

    def hold(self, keys: Sequence[str]) -> None:
        """Count a use of each key, whether its bytes are there or still to come."""
        for key in keys:
            held = self._held.part(key)
            uses, sha256, size, first = held.get(key, _NOT_HELD)
            held[key] = (uses + 1, sha256, size, first)
        self._unneeded.difference_update(keys)

    def release(self, keys: Iterable[str]) -> None:
        """Take back a use of each key that `use` or `hold` counted."""
        for key in keys:
            held = self._held.part(key)
            uses, sha256, size, first = held.pop(key)
            if uses > 1:
                held[key] = (uses - 1, sha256, size, first)
                continue
            self._later_rows.pop(key, None)
            keys_of = self._keys_of.part(sha256)
            others = tuple(other for other in keys_of.pop(sha256, ()) if other != key)
            if others:
                keys_of[sha256] = others
            if not self._settled_uses(key):
                if sha256:
                    self._drop(key, size)
                else:
                    self._unneeded.add(key)

    def forget(self, row: int, files: Sequence[StoredFile]) -> None:
        """The version in `row`, which is gone by now, needs its files no more."""
        if row >= self._settled_rows:
            self.release(file["key"] for file in files)
            return
        for key, size in {file["key"]: file["size"] for file in files}.items():
            if self._settled_uses(key):
                continue
            if key not in self._held:
                self._drop(key, size)
            elif not self._held.part(key)[key][1]:  # it stays for an upload, which counts it when it is completed
                self._count -= 1
                self.bytes -= size

    def _drop(self, key: str, size: int) -> None:
        self._unneeded.add(key)
        self._count -= 1
        self.bytes -= size


class _Hashes:
    """Hashes of texts and the rows they lead to, sorted once all are gathered."""

    def __init__(self) -> None:
        self._gathered = array("Q")
        self.hashes: Hashes = np.empty(0, np.uint64)
        self.rows: np.ndarray[Any, np.dtype[np.uint32]] = np.empty(0, np.uint32)

    def gather(self, hashes: bytes) -> None:
        self._gathered.frombytes(hashes)

    def load(self, hashes: memoryview, rows: memoryview) -> None:
        self.hashes, self.rows = np.frombuffer(hashes, np.uint64), np.frombuffer(rows, np.uint32)

    def sort(self, rows: np.ndarray[Any, np.dtype[np.uint32]]) -> np.ndarray[Any, Any]:
        """Sort in what was gathered, each with its row: the places it all had before, old ones first."""
        settled = len(self.hashes)
        hashes = np.concatenate([self.hashes, np.frombuffer(self._gathered.tobytes(), np.uint64)])
        self._gathered = array("Q")
        # Where most is sorted already, a merge sort only merges.
        order = np.argsort(hashes, kind="stable" if settled else None)
        self.hashes, self.rows = hashes[order], np.concatenate([self.rows, rows])[order]
        return order

    def rows_of(self, value: int) -> list[int]:
        """Ascending."""
        wanted = np.uint64(value)
        start = np.searchsorted(self.hashes, wanted, "left")
        end = np.searchsorted(self.hashes, wanted, "right")
        rows: list[int] = np.sort(self.rows[start:end]).tolist()
        return rows
