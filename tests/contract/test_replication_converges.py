"""Racks converge: after any history of changes, partitions, lost hints, crashes, compactions and restored registries,
each rack holds exactly what its peers' versions that name it are."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from schemas.errors import ModelManagerError
from schemas.hints import head_hint
from tests.racks import Network, ReplicatingRack, until
from tests.registry_view import compact_here
from worker.catalog import retention
from worker.journal import Until
from worker.replication import puller, schedule
from worker.storage.memory import MemoryStore
from worker.upkeep.restore import restore

NAMES = ("rack-1", "rack-2", "rack-3")
MODELS = (*(f"{name}-{model}" for name in NAMES for model in ("a", "b")), "common")


@dataclass(frozen=True)
class Step:
    kind: str
    rack: str
    model: str
    version: str
    number: int


STEPS = st.lists(
    st.builds(
        Step,
        st.sampled_from(
            ["store"] * 6
            + ["update", "delete", "delete all", "purge", "restore", "alias", "alias", "no alias", "replicate", "rot"]
            + ["away", "back", "back", "deaf", "cut", "wait", "wait", "crash", "compact", "copy", "go back"]
        ),
        st.sampled_from(NAMES),
        st.sampled_from(["a", "b", "c"]),
        st.sampled_from(["1", "2", "3"]),
        st.integers(0, 3),
    ),
    min_size=8,
    max_size=40,
)


def model_of(step: Step) -> str:
    """What racks store is named after them, but for one model that several may store."""
    return "common" if step.model == "c" else f"{step.rack}-{step.model}"


class World:
    """Three racks that replicate to each other."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.network = Network()
        self.stores = {name: MemoryStore() for name in NAMES}
        self.epochs = dict.fromkeys(NAMES, 1)

    @property
    def racks(self) -> dict[str, ReplicatingRack]:
        return self.network.racks  # type: ignore[return-value]

    def start(self, name: str) -> None:
        peers = tuple(peer for peer in NAMES if peer != name)
        rack = ReplicatingRack(
            self.network, name, self.folder / name, self.stores[name], peers=peers, replication_factor=2
        )
        rack.open().start()

    async def close(self) -> None:
        for rack in list(self.racks.values()):
            await rack.close()

    async def take(self, step: Step) -> None:
        rack = self.racks[step.rack]
        version: dict[str, Any] = {"modelId": model_of(step), "version": step.version}
        alias = {"modelId": version["modelId"], "alias": f"alias-{step.number}"}
        calls: dict[str, tuple[str, dict[str, Any]]] = {
            "update": ("updateModelMetadata", {**version, "metadata": {"note": step.number, "tags": ["x"]}}),
            "delete": ("deleteModel", version),
            "delete all": ("deleteModel", {"modelId": version["modelId"]}),
            "purge": ("deleteModel", {**version, "purge": True}),
            "restore": ("restoreModel", version),
            "alias": ("setAlias", {**alias, "version": step.version}),
            "no alias": ("deleteAlias", alias),
            "replicate": ("replicateModel", {**version, "peers": [NAMES[step.number % 3]], "waitMs": 0}),
        }
        match step.kind:
            case "store":
                await rack.store_bytes(version["modelId"], step.version, bytes([step.number]) * 100)
            case "rot":  # of whatever the rack holds: its own, or copies
                for key in list(self.stores[step.rack].blobs)[: step.number]:
                    self.stores[step.rack].blobs[key] = b"rotten"
                for model in MODELS:
                    if rack.registry.catalog.find(model, step.version) is not None:
                        named = {"modelId": model, "version": step.version, "waitMs": 5000}
                        await rack.call("validateModel", named)
            case "away" | "back" | "deaf" | "cut":
                self._disturb(step)
            case "wait":
                await asyncio.sleep(0.01)
            case "crash" | "copy" | "go back":
                await self._restart(step)
            case "compact":
                await compact_here(rack.registry)
            case kind:
                await rack.call(*calls[kind])

    def _disturb(self, step: Step) -> None:
        match step.kind:
            case "away":
                self.network.away.add(step.rack)
            case "back":
                self.network.away.discard(step.rack)
            case "deaf":
                self.network.lost_hints += step.number
            case "cut":
                self.network.cut_after += [step.number * 10] * step.number

    async def _restart(self, step: Step) -> None:
        """End the rack and start it again: with its registry, or with one that was copied before."""
        await self.racks[step.rack].close()
        registry, copy = self.folder / step.rack / "registry", self.folder / step.rack / "copy"
        if step.kind == "copy":
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(registry, copy, ignore=shutil.ignore_patterns("RESERVE"))
        elif step.kind == "go back" and copy.exists():
            shutil.rmtree(registry)
            self.epochs[step.rack] += 1
            epoch = self.epochs[step.rack]
            restore(copy, registry, epoch=epoch, until=Until(), progress=lambda step, done, total: None)
        self.start(step.rack)

    async def heal(self) -> None:
        """End all disturbance, mend what has gone bad at its origin, and tell the heads, as it is done each minute."""
        self.network.away.clear()
        self.network.cut_after.clear()
        self.network.lost_hints = 0
        for rack in self.racks.values():
            for model, version in told_by(rack):
                with suppress(ModelManagerError):  # a copy may be deleted just now
                    await rack.call("validateModel", {"modelId": model, "version": version, "waitMs": 5000})
            for (model, version), told in told_by(rack).items():
                for number in range(4 if told["origin"] == rack.name else 0):
                    try:
                        await rack.store_bytes(model, version, bytes([number]) * 100)
                    except ModelManagerError as error:
                        assert error.code == "ERR_MODEL_ALREADY_EXISTS"
        for name, rack in self.racks.items():
            journal = rack.registry.journal
            self.network.tell(head_hint(rack=name, epoch=journal.epoch, head=journal.head, time_ms=0))
            if self.racks_own_common():
                for follower in rack.following():  # which versions were refused is not remembered over a crash
                    follower.compare()

    def racks_own_common(self) -> list[str]:
        """The racks that have stored the model that each may store."""
        owners = [(rack, rack.registry.catalog.newest("common")) for rack in self.racks.values()]
        return [rack.name for rack, newest in owners if newest is not None and newest.replica_of is None]

    def differences(self) -> list[str]:
        """What is still missing or wrong, if anything."""
        found: list[str] = []
        told = {name: told_by(rack) for name, rack in self.racks.items()}
        for name, rack in self.racks.items():
            rack.check()
            owned = {model for (model, _), each in told[name].items() if each["origin"] == name}
            if name in self.racks_own_common():
                owned.add("common")  # its deleted versions may be restored
            expected = self._named(name, told, owned)
            held = {key: each for key, each in told[name].items() if each["origin"] != name}
            if held != expected:
                found.append(f"{name}: {held} is not {expected}")
            if +rack.registry.catalog.replicas.awaited:
                found.append(f"{name} awaits {[pull.version for pull in rack.registry.catalog.replicas.pulls()]}")
            found += self._disputes(name, told)
        return found

    def _named(self, name: str, told: Told, owned: set[str]) -> dict[tuple[str, str], dict[str, Any]]:
        """What the rack should hold: of a model that several racks stored, the versions of the first one."""
        named: dict[str, dict[tuple[str, str], dict[tuple[str, str], dict[str, Any]]]] = {}
        for origin in NAMES:
            for (model, version), each in told[origin].items():
                if each["origin"] == origin != name and name in each["replicas"] and model not in owned:
                    claims = named.setdefault(model, {})
                    claims.setdefault((each["modelCreatedAt"], origin), {})[model, version] = each
        expected = {key: each for claims in named.values() for key, each in claims[min(claims)].items()}
        return {key: {**each, "state": "available"} for key, each in expected.items()}

    def _disputes(self, name: str, told: Told) -> list[str]:
        """Own versions that are marked and should not be, or the other way round."""
        claims = {
            each["modelCreatedAt"]: origin
            for origin in NAMES
            for (model, _), each in sorted(told[origin].items())
            if model == "common" and each["origin"] == origin
        }
        first = claims[min(claims)] if claims else None
        return [
            f"{name}: {key} is {each['state']}, {first} was first"
            for key, each in told[name].items()
            if each["origin"] == name and (each["state"] == "conflict") != (key[0] == "common" and first != name)
        ]


Told = dict[str, dict[tuple[str, str], dict[str, Any]]]  # by rack, and by model and version


def told_by(rack: ReplicatingRack) -> dict[tuple[str, str], dict[str, Any]]:
    """What the rack tells of the visible versions, but for where it keeps them."""
    catalog = rack.registry.catalog
    told = {}
    for model in MODELS:
        for version in ("1", "2", "3"):
            entry = catalog.find(model, version)
            if entry is None or entry.deleted_at is not None:
                continue
            reply: dict[str, Any] = {**entry.described(catalog.aliases_of(entry))}
            reply["files"] = [{**file, "storageKey": ""} for file in reply["files"]]
            told[model, version] = reply
    return told


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Deletes are forgotten at once, so that compaction ends the feed for who is behind; and pauses are short."""
    monkeypatch.setattr(retention, "TOMBSTONE_MS", 0)
    for name in ("_PASSING", "_REFUSED"):
        monkeypatch.setattr(schedule, name, (0.01, 0.01))
    monkeypatch.setattr(puller, "_RECORDED_BYTES", 1)


@settings(max_examples=40, suppress_health_check=list(HealthCheck))
@given(STEPS)
def test_racks_converge(steps: list[Step]) -> None:
    async def live() -> None:
        with tempfile.TemporaryDirectory() as folder:
            world = World(Path(folder))
            for name in NAMES:
                world.start(name)
            try:
                for step in steps:
                    try:
                        await world.take(step)
                    except ModelManagerError as error:
                        assert error.code != "ERR_INTERNAL"
                await world.heal()
                try:
                    await until(lambda: not world.differences(), timeout_s=10)
                except TimeoutError:
                    raise AssertionError("\n".join(world.differences())) from None
            finally:
                await world.close()

    asyncio.run(live())
