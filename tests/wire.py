"""A TCP connection to the broker in between, which a test can cut."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Wire:
    """Copies between its connections and those it makes to the broker."""

    def __init__(self, url: str) -> None:
        login, _, address = url.removeprefix("amqp://").rpartition("@")
        host, _, rest = address.partition(":")
        self._broker = (host, int(rest.partition("/")[0]))
        self._writers: list[asyncio.StreamWriter] = []
        self.login = login
        self.accepted = 0
        self.leads_on = asyncio.Event()  # cleared, new connections are taken and lead nowhere
        self.leads_on.set()
        self.url = ""

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        self._writers.append(writer)
        await self.leads_on.wait()
        try:
            far_reader, far_writer = await asyncio.open_connection(*self._broker)
        except OSError:
            writer.transport.abort()
            return
        self._writers.append(far_writer)
        await asyncio.gather(self._copy(reader, far_writer), self._copy(far_reader, writer))

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65_536):
                writer.write(data)
                await writer.drain()
        except OSError:
            pass
        finally:
            writer.close()

    def cut(self) -> None:
        """End every connection at once, without a word."""
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()

    def cut_for_good(self) -> None:
        """End every connection, and make no new one."""
        self._broker = ("127.0.0.1", 1)
        self.cut()


@asynccontextmanager
async def wire(url: str) -> AsyncIterator[Wire]:
    between = Wire(url)
    server = await asyncio.start_server(between.accept, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    between.url = f"amqp://{between.login}@127.0.0.1:{port}/"
    try:
        yield between
    finally:
        between.cut()
        server.close()
