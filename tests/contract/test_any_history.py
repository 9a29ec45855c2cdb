"""Any sequence of operations, cut anywhere, replays to exactly what it was: before and after compactions."""

from __future__ import annotations

import asyncio
import hashlib
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from schemas.errors import ModelManagerError
from tests.rack import LocalRack
from tests.registry_view import compact_here, view, view_after_boot
from worker.registry import Change
from worker.replication.mirror import Mirror
from worker.replication.peers import Gone, Told
from worker.storage.memory import MemoryStore

if TYPE_CHECKING:
    from schemas.journal import StoredFile


@dataclass(frozen=True)
class Operation:
    kind: str
    model: str
    version: str
    number: int


OPERATIONS = st.lists(
    st.builds(
        Operation,
        st.sampled_from(
            ["store"] * 5
            + ["update", "delete", "delete all", "purge", "restore", "alias", "no alias", "upload", "abort"]
            + ["replicate", "validate", "rot", "rot", "store again", "store again", "rotate", "compact"]
            + ["told"] * 4
            + ["brought", "brought", "refused"]
            + ["arrives", "arrives", "gone", "purged there", "spoiled", "follow"]
        ),
        st.sampled_from(["a", "b", "org/c"]),
        st.sampled_from(["1", "2", "3"]),
        st.integers(0, 3),
    ),
    min_size=5,
    max_size=40,
)


@dataclass(frozen=True)
class Milestone:
    """The state when the file `segment` had this size."""

    segment: str
    size: int
    state: dict[str, Any]


class Life:
    """Operations on a rack, with a milestone after each record; and a copy of its folder before each compaction."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.copies: list[Path] = []
        self.milestones: list[Milestone] = []
        self.store = MemoryStore()
        self._uploads: list[str] = []

    async def play(self, operations: list[Operation]) -> None:
        rack = LocalRack(self.folder, store=self.store).open()
        try:
            self._note(rack)
            rack.registry.listen(lambda entry: self._note(rack))
            for operation in operations:
                try:
                    await self._do(rack, operation)
                except ModelManagerError as error:
                    assert error.code != "ERR_INTERNAL"
        finally:
            await rack.close()
        self.copies.append(self.folder / "registry")

    def _note(self, rack: LocalRack) -> None:
        durable = rack.registry.journal.durable
        self.milestones.append(Milestone(durable.manifest.active, durable.active_bytes, view(rack.registry)))

    async def _do(self, rack: LocalRack, operation: Operation) -> None:
        version = {"modelId": operation.model, "version": operation.version}
        alias = {"modelId": operation.model, "alias": f"alias-{operation.number}"}
        calls: dict[str, tuple[str, dict[str, Any]]] = {
            "update": ("updateModelMetadata", {**version, "metadata": {"note": operation.number, "tags": ["x"]}}),
            "delete": ("deleteModel", version),
            "delete all": ("deleteModel", {"modelId": operation.model}),
            "purge": ("deleteModel", {**version, "purge": True}),
            "restore": ("restoreModel", version),
            "alias": ("setAlias", {**alias, "version": operation.version}),
            "no alias": ("deleteAlias", alias),
            "replicate": ("replicateModel", {**version, "peers": ["rack-3"], "waitMs": 5000}),
            "validate": ("validateModel", {**version, "waitMs": 5000}),
        }
        if operation.kind in calls:
            # One in four is a request that repeats itself.
            key = str(operation) if operation.number == 3 else None
            await rack.call(*calls[operation.kind], key=key)
        elif operation.kind == "store":
            await rack.store_bytes(operation.model, operation.version, bytes([operation.number]), tags=["y"])
        elif operation.kind == "rot":
            for key in self._right_blobs(rack, operation):
                self.store.blobs[key] = b"rotten"
            await rack.call("validateModel", {**version, "waitMs": 5000})
        elif operation.kind == "store again":
            for data in self._right_blobs(rack, operation).values():
                await rack.store_bytes(operation.model, operation.version, data)
        elif operation.kind == "upload":
            files = [{"path": "f", "size": 1, "sha256": f"sha256:{operation.number:064x}"}]
            begun = await rack.call("createUpload", {**version, "files": files})
            self._uploads.append(begun["uploadId"])
        elif operation.kind == "abort" and self._uploads:
            await rack.call("abortUpload", {"uploadId": self._uploads.pop()})
        elif operation.kind in ("told", "brought", "refused", "arrives", "gone", "purged there", "spoiled", "follow"):
            await self._replicate(rack, operation)
        elif operation.kind == "rotate":
            await rack.registry.journal.rotate()
        elif operation.kind == "compact":
            copy = self.folder / f"copy-{len(self.copies)}"
            shutil.copytree(self.folder / "registry", copy, ignore=shutil.ignore_patterns("RESERVE"))
            self.copies.append(copy)
            await compact_here(rack.registry)

    async def _replicate(self, rack: LocalRack, operation: Operation) -> None:
        """What replication records of a model of rack-2: under a name of its own, or one that this rack may have."""
        mirror = Mirror(rack.registry, rack.policy, rack.cache)
        model = operation.model if operation.number == 3 else f"copy-{operation.model}"
        version, data = operation.version, bytes([operation.number])
        pull = rack.registry.catalog.replicas.pull_of(model, version)
        match operation.kind:
            case "told":
                await mirror.match(self._told(model, version, operation.number))
            case "brought" if pull is not None:
                key = rack.store.new_key()
                self.store.blobs[key] = data
                await mirror.bring(pull, {"size": 1, "sha256": hashlib.sha256(data).hexdigest(), "key": key})
            case "refused" if pull is not None:
                await mirror.bring(pull, None)
            case "arrives" if pull is not None:
                key = rack.store.new_key()
                self.store.blobs[key] = data
                file = {
                    "path": "f",
                    "size": 1,
                    "sha256": hashlib.sha256(data).hexdigest(),
                    "mediaType": "x",
                    "key": key,
                }
                told = self._told(model, version, operation.number)
                await mirror.arrive(pull, told, [cast("StoredFile", file)])
                await mirror.match(told)
                await mirror.end(pull)
            case "gone" | "purged there":
                await mirror.drop("rack-2", model, version, Gone(purged=operation.kind == "purged there"))
            case "spoiled":
                await mirror.settle("rack-2", operation.model)
                for key in self._right_blobs(rack, Operation("rot", model, version, 0)):
                    self.store.blobs[key] = b"rotten"
                await rack.call("validateModel", {"modelId": model, "version": version, "waitMs": 5000})
            case "follow":
                record = {"origin": "rack-2", "registry": "x", "epoch": 1, "after": operation.number}
                await rack.registry.transact("follow rack-2", lambda: Change("follow", record))

    def _told(self, model: str, version: str, number: int) -> Told:
        """A version as rack-2 may tell it: stored before or after what is here, with another number other bytes."""
        return Told.of(
            {
                "modelId": model,
                "version": version,
                "checksum": f"sha256:{hashlib.sha256(bytes([number])).hexdigest()}",
                "size": 1,
                "createdAt": "2026-01-01T00:00:00.000Z" if number % 2 else "2199-01-01T00:00:00.000Z",
                "modelCreatedAt": "2026-01-01T00:00:00.000Z" if number % 2 else "2199-01-01T00:00:00.000Z",
                "revision": number + 1,
                "aliases": [f"alias-{number}"],
                "origin": "rack-2",
                "replicas": ["rack-1"],
                "metadata": {"type": "custom", "version": version, "tags": ["y"]},
            }
        )

    def _right_blobs(self, rack: LocalRack, operation: Operation) -> dict[str, bytes]:
        """What the store should hold of the version, by key."""
        found = rack.registry.catalog.find(operation.model, operation.version)
        contents = {hashlib.sha256(data).hexdigest(): data for data in (bytes([n]) for n in range(4))}
        return {} if found is None else {file["key"]: contents[file["sha256"]] for file in found.files}

    def expected(self, segment: str, cut: int) -> dict[str, Any]:
        """The last state that was reached before that byte of the segment was written."""
        reached = [each for each in self.milestones if (each.segment, each.size) <= (segment, cut)]
        return reached[-1].state


def cut_at(folder: Path, fraction: float, target: Path) -> tuple[str, int]:
    """A copy whose last segment ends somewhere behind its first line: where."""
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns("RESERVE"))
    segment = max(target.glob("seg-*.jsonl"))
    data = segment.read_bytes()
    first = data.index(b"\n") + 1
    cut = first + round(fraction * (len(data) - first))
    segment.write_bytes(data[:cut])
    return segment.name, cut


@settings(max_examples=100, suppress_health_check=list(HealthCheck))
@given(OPERATIONS, st.lists(st.floats(0, 1), min_size=3, max_size=3))
def test_what_a_cut_leaves_is_exactly_a_state_that_was(operations: list[Operation], cuts: list[float]) -> None:
    with tempfile.TemporaryDirectory() as name:
        life = Life(Path(name))
        asyncio.run(life.play(operations))
        for number, folder in enumerate(life.copies):
            for fraction in (*cuts, 1.0):
                target = Path(name) / f"cut-{number}-{fraction}"
                if target.exists():
                    continue
                segment, cut = cut_at(folder, fraction, target)
                assert asyncio.run(view_after_boot(target)) == life.expected(segment, cut)
