"""The versions as columns: a row each, some 65 bytes, and no Python object of its own.

Rows are numbered in the order the versions were stored and are never used again. All else about a version is in its
records, which are read when they are asked for.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from hashlib import sha256
from itertools import islice
from typing import Any

import numpy as np

from worker.catalog.extracts import Run
from worker.catalog.parted import PART_MASK, PartedDict

NO_ROW = 0xFFFF_FFFF
QUARANTINED, DELETED, FORGOTTEN, REPLICA, DISPUTED = 1, 2, 4, 8, 16
_HIDDEN = DELETED | FORGOTTEN
_MIX = 0x1E37_79B9_7F4A_7C15
_WALKED = 16  # versions of one model that are compared one by one


class VersionTable:
    """One thread writes, on which all but the copies for other threads are taken."""

    def __init__(self) -> None:
        self.model: list[str] = []
        self.version: list[str] = []
        self.type = array("H")
        self.state = bytearray()
        self.size = array("Q")
        self.created = array("Q")
        self.stored = array("Q")
        """Sequence of the `store` record."""
        self.updated = array("Q")
        """Sequence of the last `update` record; 0 if there is none."""
        self.older = array("I")
        """The row of the model's version stored before; NO_ROW if it is the first."""
        self.newer = array("I")
        """The row of the model's version stored next; NO_ROW if it is the newest."""
        self.type_names: list[str] = []
        self._type_codes: dict[str, int] = {}
        self._newest = PartedDict[int]()  # by the model's id in lower case: ids are unique ignoring case
        self._version_names: dict[str, str] = {}  # one string object for each name
        self._by_name: dict[str, dict[str, int]] = {}  # of models with more than `_WALKED` versions
        self._seen: dict[str, int] = {}  # how many versions are visible; of models where that was asked
        self._loaded = 0

    def __len__(self) -> int:
        """Without rows that are being added, as another thread may see them: this column is the last."""
        return len(self.updated)

    @property
    def models(self) -> int:
        """How many models there are, deleted ones included."""
        return len(self._newest)

    def newest(self, model: str) -> int:
        """The row stored last of the model with this id in any case; NO_ROW if there is none."""
        return self._newest.get(model.lower(), NO_ROW)

    def rows(self, model: str) -> Iterator[int]:
        """The rows of the model with this id in any case, newest first."""
        row, older = self.newest(model), self.older
        while row != NO_ROW:
            yield row
            row = older[row]

    def find(self, model: str, version: str) -> int:
        """The row of that version, deleted ones included; NO_ROW if there is none."""
        row = self._newest.get(model.lower(), NO_ROW)
        if row == NO_ROW or self.model[row] != model:
            return NO_ROW
        for _ in range(_WALKED):
            if self.version[row] == version:
                return row
            row = self.older[row]
            if row == NO_ROW:
                return NO_ROW
        key = model.lower()
        names = self._by_name.get(key)
        if names is None:
            names = self._by_name[key] = {self.version[row]: row for row in sorted(self.rows(model))}
        return names.get(version, NO_ROW)

    def hide(self, row: int) -> bool:
        """Delete the version, which is visible: whether its model has no visible one left."""
        key = self.model[row].lower()
        left = self._seen[key] = self._count_seen(key) - 1
        self.state[row] |= DELETED
        return not left

    def show(self, row: int) -> bool:
        """Take the delete back: whether its model had no visible version."""
        first = self._see_another(self.model[row].lower())
        self.state[row] &= ~DELETED
        return first

    def count_visible(self, model: str) -> int:
        """How many versions of the model with this id in any case are visible."""
        key = model.lower()
        self._seen[key] = count = self._count_seen(key)
        return count

    def _count_seen(self, key: str) -> int:
        count = self._seen.get(key)
        if count is None:
            state = self.state
            count = sum(not state[row] & _HIDDEN for row in self.rows(key))
        return count

    def _see_another(self, key: str) -> bool:
        """One more version of the model is about to be visible: whether it is the only one."""
        before = self._count_seen(key)
        self._seen[key] = before + 1
        return not before

    def append(self, model: str, version: str, kind: str, size: int, created: int, sequence: int) -> bool:
        """A row for a version, the newest of its model, stored at `sequence`: whether the model had no visible one."""
        row, key = len(self.model), model.lower()
        if key == model:
            key = model
        newest = self._newest.part(key)
        before = newest.get(key, NO_ROW)
        seen = before == NO_ROW
        if not seen:
            model = self.model[before]  # one string object for all versions
            self.newer[before] = row
            if key in self._seen or self.state[before] & DELETED:
                seen = self._see_another(key)
        if key in self._by_name:
            self._by_name[key][version] = row
        self.newer.append(NO_ROW)
        self.state.append(0)
        self.model.append(model)
        self.older.append(before)
        newest[key] = row
        self.version.append(self._version_names.setdefault(version, version))
        code = self._type_codes.get(kind)
        self.type.append(self._code_of(kind) if code is None else code)
        self.size.append(size)
        self.created.append(created)
        self.stored.append(sequence)
        self.updated.append(0)
        return seen

    def extend(self, run: Run) -> int:
        """As `append` for each record, in fewer steps: how many models are seen now that had no visible version."""
        names = run.models
        first, count = len(self.model), len(names)
        parts, model, older, newer = self._newest.parts, self.model, self.older, self.newer
        state, counted = self.state, self._seen
        keys = _lowered(names)
        newer.extend([NO_ROW] * count)
        state.extend(bytes(count))
        seen = 0
        for row, name, key in zip(range(first, first + count), names, keys, strict=True):
            newest = parts[hash(key) & PART_MASK]  # as `part`, without a call
            before = newest.get(key, NO_ROW)
            if before == NO_ROW:
                seen += 1
                model.append(name)
            else:
                model.append(model[before])  # one string object for all versions
                newer[before] = row
                if key in counted or state[before] & DELETED:
                    seen += self._see_another(key)
            older.append(before)
            newest[key] = row
        labels = run.versions.spread([self._version_names.setdefault(label, label) for label in run.versions.texts])
        if self._by_name:
            for row, key, label in zip(range(first, first + count), keys, labels, strict=True):
                if key in self._by_name:
                    self._by_name[key][label] = row
        self.version += labels
        self.type.extend(run.types.spread([self._code_of(kind) for kind in run.types.texts]))
        self.size.frombytes(run.sizes)
        self.created.frombytes(run.created)
        self.stored.frombytes(run.sequences)
        self.updated.extend(bytes(count))
        return seen

    def _code_of(self, kind: str) -> int:
        code = self._type_codes.get(kind)
        if code is None:
            code = self._type_codes[kind] = len(self.type_names)
            self.type_names.append(kind)
        return code

    def forget(self, row: int) -> None:
        """The version, a deleted one, is gone for good. Its columns stay, for orders that still have the row."""
        key = self.model[row].lower()
        older, newer = self.older[row], self.newer[row]
        if older != NO_ROW:
            self.newer[older] = newer
        if newer != NO_ROW:
            self.older[newer] = older
        elif older != NO_ROW:
            self._newest.part(key)[key] = older
        else:
            for by_model in (self._newest.part(key), self._by_name, self._seen):
                by_model.pop(key, None)
        names = self._by_name.get(key)
        if names is not None and names.get(self.version[row]) == row:
            del names[self.version[row]]
        self.state[row] |= FORGOTTEN

    def stored_again(self) -> list[int]:
        """The rows that are there although their version was stored once more later; none that were loaded."""
        first, count = self._loaded, len(self) - self._loaded
        models = np.fromiter(map(hash, islice(self.model, first, None)), np.int64, count)
        names = models * _MIX ^ np.fromiter(map(hash, islice(self.version, first, None)), np.int64, count)
        ordered = np.sort(names)
        repeated = ordered[1:][ordered[1:] == ordered[:-1]]
        if not len(repeated):
            return []
        rows = (np.flatnonzero(np.isin(names, repeated)) + first).tolist()
        last = {(self.model[row], self.version[row]): row for row in rows}
        there = [row for row in rows if not self.state[row] & FORGOTTEN]
        return [row for row in there if last[self.model[row], self.version[row]] != row]

    def fingerprint(self) -> str:
        """A digest of what the rows that are there say: the same for the same versions stored in the same order."""
        there = (np.frombuffer(bytes(self.state), np.uint8) & FORGOTTEN) == 0
        digest = sha256()
        for column in (self.stored, self.updated, self.size, self.created):
            digest.update(np.frombuffer(column.tobytes(), np.uint64)[there].tobytes())
        digest.update(np.frombuffer(bytes(self.state), np.uint8)[there].tobytes())
        for row in np.flatnonzero(there).tolist():
            digest.update(f"{self.model[row]}:{self.version[row]}\n".encode())
        return digest.hexdigest()

    # --- columns for numpy: copies, since an array cannot grow while it is looked at ---

    def visible(self) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Which rows are neither deleted nor forgotten."""
        visible: np.ndarray[Any, np.dtype[np.bool_]] = np.frombuffer(bytes(self.state), np.uint8) & _HIDDEN == 0
        return visible

    def count_visible_of(self, rows: array[int]) -> int:
        """How many of these rows are visible."""
        return int(np.count_nonzero(self.visible()[np.frombuffer(rows.tobytes(), np.uint32)]))

    def rows_with(self, state: int) -> list[int]:
        """The rows that are there, deleted or not, and have all of these bits."""
        states = np.frombuffer(bytes(self.state), np.uint8)
        rows: list[int] = np.flatnonzero(states & (state | FORGOTTEN) == state).tolist()
        return rows

    def column(self, name: str) -> np.ndarray[Any, Any]:
        """A copy of `type`, `size` or `created`."""
        values: array[int] = getattr(self, name)
        return np.frombuffer(values.tobytes(), values.typecode)

    def type_code(self, kind: str) -> int | None:
        return self._type_codes.get(kind)

    def type_counts(self) -> dict[str, int]:
        """How many visible versions there are of each type."""
        counts = np.bincount(self.column("type")[self.visible()], minlength=len(self.type_names))
        return {name: int(count) for name, count in zip(self.type_names, counts, strict=True)}

    # --- the index of a base ---

    def dumped(self) -> dict[str, Any]:
        """All of it, in parts."""
        names = list(self._version_names)
        codes = {name: code for code, name in enumerate(names)}
        firsts = list(dict.fromkeys(self.model))
        places = {model: place for place, model in enumerate(firsts)}
        return {
            "types": "\n".join(self.type_names).encode(),
            "models": "\n".join(firsts).encode(),
            "model": array("I", [places[model] for model in self.model]),
            "names": "\n".join(names).encode(),
            "version": array("I", [codes[version] for version in self.version]),
            "type": self.type,
            "state": self.state,
            "size": self.size,
            "created": self.created,
            "stored": self.stored,
            "updated": self.updated,
            "older": self.older,
        }

    def load(self, parts: dict[str, memoryview]) -> None:
        """Take what `dumped` gave, into an empty table."""
        self.type_names = _lines(parts["types"])
        self._type_codes = {name: code for code, name in enumerate(self.type_names)}
        models = _lines(parts["models"])
        places = array("I", parts["model"].tobytes())
        self.model = [models[place] for place in places]
        names = _lines(parts["names"])
        self._version_names = {name: name for name in names}
        self.version = [names[code] for code in array("I", parts["version"].tobytes())]
        self.state = bytearray(parts["state"])
        self._loaded = len(self)
        for column in ("type", "size", "created", "stored", "updated", "older"):
            getattr(self, column).frombytes(parts[column])
        kept = np.flatnonzero((np.frombuffer(bytes(self.state), np.uint8) & FORGOTTEN) == 0)
        newer = np.full(len(self) + 1, NO_ROW, np.uint32)  # one more, for those that have none before them
        before = np.frombuffer(self.older, np.uint32)[kept]
        newer[np.minimum(before, len(self))] = kept
        self.newer = array("I", newer[:-1].tobytes())
        newest = np.zeros(len(models), np.int64)  # one more than the row, so that 0 is none
        np.maximum.at(newest, np.frombuffer(places, np.uint32)[kept], kept + 1)
        for model, row in zip(models, newest.tolist(), strict=True):
            if row:
                key = model if model.islower() else model.lower()
                self._newest.part(key)[key] = row - 1


def _lowered(names: list[str]) -> list[str]:
    """Each name in lower case: the very same string where it is so already."""
    together = "\n".join(names)
    if together == together.lower():
        return names
    return [name if name == lowered else lowered for name in names for lowered in (name.lower(),)]


def _lines(part: memoryview) -> list[str]:
    text = str(part, "utf-8")
    return text.split("\n") if text else []
