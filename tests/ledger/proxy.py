"""A TCP proxy that does to connections what networks do to them."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections import Counter
from types import TracebackType
from typing import Literal, Self
from urllib.parse import urlsplit, urlunsplit

CHUNK = 65_536
_RESET = struct.pack("ii", 1, 0)


class Tunnel:
    """One connection through the proxy: two pumps, each of which can be held up."""

    def __init__(self, proxy: Proxy, near: asyncio.StreamWriter, far: asyncio.StreamWriter) -> None:
        self._proxy = proxy
        self.near, self.far = near, far
        self.silent = False

    async def pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Pass on all there is to read, until either side ends or the tunnel is silent."""
        with contextlib.suppress(OSError):
            while data := await reader.read(CHUNK if self._proxy.bytes_per_s is None else 1024):
                await self._proxy.flowing.wait()
                if self._proxy.bytes_per_s is not None:
                    await asyncio.sleep(len(data) / self._proxy.bytes_per_s)
                if self.silent:
                    continue
                self._proxy.counts["bytes"] += len(data)
                writer.write(data)
                await writer.drain()
        if not self.silent:
            writer.close()


def _end(writer: asyncio.StreamWriter, *, reset: bool) -> None:
    """Close a side in an orderly way, or with a reset."""
    if not reset:
        writer.close()
        return
    with contextlib.suppress(OSError):
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    writer.transport.abort()


class Proxy:
    """Listens on loopback and passes on to the broker at `url`. `counts` tells to how many what was done."""

    def __init__(self, url: str) -> None:
        self._target = urlsplit(url)
        self._server: asyncio.Server
        self._tunnels: set[Tunnel] = set()
        self._silent: set[Tunnel] = set()
        self.flowing = asyncio.Event()
        self.flowing.set()
        self.bytes_per_s: float | None = None
        self.refusing = False
        self.counts: Counter[str] = Counter()

    @property
    def url(self) -> str:
        """The broker's address, by way of the proxy."""
        port = self._server.sockets[0].getsockname()[1]
        login = f"{self._target.username}:{self._target.password}@" if self._target.username else ""
        return urlunsplit(self._target._replace(netloc=f"{login}127.0.0.1:{port}"))

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.close()
        for tunnel in [*self._tunnels, *self._silent]:
            _end(tunnel.near, reset=True)
            _end(tunnel.far, reset=True)

    # --- what is done to all that are connected ---

    def cut(self) -> None:
        """Both sides see an orderly end, in the middle of whatever it is."""
        self._end_all("cut", reset=False)

    def reset(self) -> None:
        """Both sides see a reset."""
        self._end_all("reset", reset=True)

    def half_open(self, dead: Literal["near", "far"]) -> None:
        """The side that is `dead` sees a reset; to the other one the connection stands, and nobody is there.

        The broker is `far`.
        """
        for tunnel in list(self._tunnels):
            tunnel.silent = True
            _end(tunnel.near if dead == "near" else tunnel.far, reset=True)
            self._tunnels.discard(tunnel)
            self._silent.add(tunnel)
            self.counts["half-opened"] += 1

    async def freeze(self, seconds: float) -> None:
        """Nothing passes for a time, and nothing is lost."""
        self.counts["frozen"] += len(self._tunnels)
        self.flowing.clear()
        try:
            await asyncio.sleep(seconds)
        finally:
            self.flowing.set()

    async def slow(self, seconds: float, *, bytes_per_s: float) -> None:
        """Little passes for a time."""
        self.counts["slowed"] += len(self._tunnels)
        self.bytes_per_s = bytes_per_s
        try:
            await asyncio.sleep(seconds)
        finally:
            self.bytes_per_s = None

    def _end_all(self, what: str, *, reset: bool) -> None:
        for tunnel in list(self._tunnels):
            _end(tunnel.near, reset=reset)
            _end(tunnel.far, reset=reset)
            self.counts[what] += 1

    # --- a connection ---

    async def _serve(self, reader: asyncio.StreamReader, near: asyncio.StreamWriter) -> None:
        if self.refusing:
            near.transport.abort()
            return
        try:
            far_reader, far = await asyncio.open_connection(self._target.hostname, self._target.port or 5672)
        except OSError:
            near.transport.abort()
            return
        tunnel = Tunnel(self, near, far)
        self._tunnels.add(tunnel)
        self.counts["connections"] += 1
        try:
            await asyncio.gather(tunnel.pump(reader, far), tunnel.pump(far_reader, near))
        finally:
            self._tunnels.discard(tunnel)
