"""Several racks in one process that call each other without a broker: at the seam of `worker.replication.peers`."""

from __future__ import annotations

import asyncio
import base64
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from schemas.errors import ModelManagerError
from schemas.hints import Hint, head_hint
from tests.rack import LocalRack
from worker.announcer import Announcer
from worker.client.client import ModelManagerClient
from worker.replication.download import PullObserver
from worker.replication.follower import Follower
from worker.replication.replication import Replication
from worker.storage.memory import MemoryStore


class Network:
    """Between the racks. `away` are those that cannot be reached; a call or a transfer asks `break_next` first."""

    def __init__(self) -> None:
        self.racks: dict[str, LocalRack] = {}
        self.away: set[str] = set()
        self.calls: list[tuple[str, str]] = []
        self.fetched: list[tuple[str, int]] = []
        self.cut_after: list[int] = []
        """Each of the next transfers breaks after so many bytes."""
        self.lies: dict[str, Callable[[dict[str, Any]], Any]] = {}
        """What becomes of the replies to a method on their way; it may raise."""
        self.broken: set[str] = set()
        """Methods that no rack can answer."""
        self.lost_hints = 0
        """So many of the next hints reach nobody."""
        self._ears: dict[str, asyncio.Queue[Hint]] = {}

    def check(self, name: str) -> LocalRack:
        if name in self.away or name not in self.racks:
            raise ModelManagerError("ERR_SHUTTING_DOWN", f"{name} is away.")
        return self.racks[name]

    def tell(self, hint: Hint) -> None:
        if self.lost_hints:
            self.lost_hints -= 1
            return
        for ear in self._ears.values():
            ear.put_nowait(hint)

    @asynccontextmanager
    async def hear(self, name: str) -> AsyncIterator[AsyncIterator[Hint]]:
        ear = self._ears[name] = asyncio.Queue()

        async def heard() -> AsyncIterator[Hint]:
            while True:
                yield await ear.get()

        try:
            yield heard()
        finally:
            del self._ears[name]


def _as_it_is(reply: dict[str, Any]) -> dict[str, Any]:
    return reply


class _Caller:
    """A `worker.client.caller.Caller` of one rack, without a transport and its retries."""

    def __init__(self, network: Network, me: str, name: str) -> None:
        self._network, self._me, self._name = network, me, name

    async def call(
        self, method: str, params: Mapping[str, Any], *, timeout_s: float, idempotency_key: str | None = None
    ) -> dict[str, Any]:
        await asyncio.sleep(0)
        self._network.check(self._me)
        rack = self._network.check(self._name)
        self._network.calls.append((self._name, method))
        if method in self._network.broken:
            raise ModelManagerError("ERR_INTERNAL")
        reply: dict[str, Any] = await rack.call(method, dict(params))
        self._network.check(self._name)
        return self._network.lies.get(method, _as_it_is)(reply)

    def headers_for(self, url: str) -> dict[str, str]:
        return {}

    async def close(self) -> None:
        return


class NetworkPeers:
    """The other racks for the one named `me`."""

    def __init__(self, network: Network, me: str) -> None:
        self._network, self._me = network, me

    def rack(self, name: str) -> ModelManagerClient:
        return ModelManagerClient(_Caller(self._network, self._me, name))

    async def read(self, url: str, start: int) -> AsyncGenerator[bytes]:
        parts = urlsplit(url)
        rack = self._network.check(str(parts.hostname))
        model, _, rest = parts.path.removeprefix("/api/models/").partition("/versions/")
        version, _, path = rest.partition("/files/")
        file = await rack.service.open_file(model, unquote(version), unquote(path))
        entry = rack.registry.catalog.find(model, unquote(version))
        assert entry is not None
        key = next(stored["key"] for stored in entry.files if stored["path"] == file.path)
        self._network.fetched.append((str(parts.hostname), start))
        cut = self._network.cut_after.pop(0) if self._network.cut_after else None
        async with contextlib.aclosing(rack.store.read(key, start)) as chunks:  # type: ignore[type-var]
            async for chunk in chunks:
                self._network.check(str(parts.hostname))
                if cut is not None and len(chunk) > cut:
                    yield chunk[:cut]
                    raise ModelManagerError("ERR_STORAGE_UNAVAILABLE", "The transfer was cut.")
                yield chunk

    async def close(self) -> None:
        return


class ReplicatingRack(LocalRack):
    """A rack that follows the others."""

    def __init__(self, network: Network, name: str, folder: Path, store: MemoryStore, **changed: Any) -> None:
        super().__init__(folder, store=store, rack=name, url_host=name, **changed)
        self.name = name
        self._network = network
        self.replication: Replication | None = None
        self._task: asyncio.Task[None] | None = None

    def open(self) -> ReplicatingRack:
        super().open()
        Announcer(self.name, self.registry, self._network.tell)
        self.replication = Replication(
            self.registry,
            self.store,
            self.policy,
            self.cache,
            NetworkPeers(self._network, self.name),
            hear=lambda: self._network.hear(self.name),
            refuse=self.service.refuse_stored,
            places=2,
            observe=PullObserver(),
        )
        self.service.reading.pull_state = self.replication.puller.state_of
        self._network.racks[self.name] = self
        return self

    def start(self) -> None:
        assert self.replication is not None
        self._task = asyncio.create_task(self.replication.run())

    def following(self) -> list[Follower]:
        return [] if self.replication is None else list(self.replication.followers.values())

    def check(self) -> None:
        """Raises what ended its replication, if anything has."""
        if self._task is not None and self._task.done():
            self._task.result()

    async def stop_replicating(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def close(self) -> None:
        self._network.racks.pop(self.name, None)
        await self.stop_replicating()
        await super().close()


async def until(condition: Any, *, timeout_s: float = 20.0) -> None:
    """Wait until `condition()` is true."""
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.005)


# --- what tests ask of them ---


# Starts a rack by its name, again on what it left.
Start = Callable[..., Awaitable[ReplicatingRack]]


def copy_of(rack: ReplicatingRack, model: str = "m", version: str = "1") -> Any:
    """The version here, with its bytes, as soon as it is complete."""
    entry = rack.registry.catalog.find(model, version)
    if entry is None or rack.registry.catalog.replicas.pull_of(model, version) is not None:
        return None
    return entry


def here(rack: ReplicatingRack, model: str = "m", version: str = "1") -> Callable[[], bool]:
    return lambda: copy_of(rack, model, version) is not None


def is_level(rack: ReplicatingRack, origin: ReplicatingRack) -> Callable[[], bool]:
    """Whether all that the origin has recorded until now is taken in, and all bytes are here."""
    head = origin.registry.journal.head

    def level() -> bool:
        assert rack.replication is not None
        follower = rack.replication.followers.get(origin.name)
        return follower is not None and follower.after >= head and not +rack.registry.catalog.replicas.awaited

    return level


async def pair(start: Start) -> tuple[ReplicatingRack, ReplicatingRack]:
    return (
        await start("rack-1", peers=("rack-2",), replication_factor=2),
        await start("rack-2", peers=("rack-1",), replication_factor=1),
    )


async def content(rack: ReplicatingRack, model: str = "m", version: str = "1") -> bytes:
    reply = await rack.call("getModel", {"modelId": model, "version": version})
    return base64.b64decode(reply["modelData"])


async def rot(rack: ReplicatingRack, data: bytes, model: str = "m", version: str = "1", *, found: bool = False) -> None:
    """Spoil the bytes behind the rack's back; `found`: and have it look."""
    entry = rack.registry.catalog.find(model, version)
    assert entry is not None and isinstance(rack.store, MemoryStore)
    for file in entry.files:
        rack.store.blobs[file["key"]] = data
    if found:
        report = await rack.call("validateModel", {"modelId": model, "version": version, "waitMs": 5000})
        assert report["isValid"] is False


def replication(rack: ReplicatingRack) -> Replication:
    assert rack.replication is not None
    return rack.replication


def tell_heads(network: Network, *racks: ReplicatingRack) -> None:
    for rack in racks:
        journal = rack.registry.journal
        network.tell(head_hint(rack=rack.name, epoch=journal.epoch, head=journal.head, time_ms=0))
