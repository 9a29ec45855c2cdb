"""The bytes of one file from one rack, as one stream, whatever connections break."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator
from contextlib import aclosing

from schemas.errors import ModelManagerError
from worker.replication.peers import Given, Peers, Told, locate
from worker.replication.schedule import Trial

_BROKEN_MOST = 5  # times in a row that a transfer breaks without a byte in between


class PullObserver:
    """What pulling tells for metrics. Does nothing; override what is of interest."""

    def pulled(self, rack: str, error: str | None) -> None:
        """A pull ended, or one try of it failed with a code; `rack` is the origin."""

    def received(self, rack: str, count: int) -> None:
        """Bytes came from a rack."""


class Download:
    """The bytes of one file from one rack, as one stream, whatever connections break."""

    def __init__(self, peers: Peers, rack: str, told: Told, file: Given, trial: Trial, observe: PullObserver) -> None:
        self._peers = peers
        self._rack = rack
        self._told = told
        self._file = file
        self._trial = trial
        self._observe = observe
        self.failure: ModelManagerError | None = None

    async def chunks(self) -> AsyncGenerator[bytes]:
        """From the first byte to the last. Each connection goes on where the one before it broke, at a new address."""
        try:
            async for chunk in self._chunks():
                yield chunk
        except ModelManagerError as error:
            self.failure = error
            raise

    async def _chunks(self) -> AsyncGenerator[bytes]:
        offset, broken, url = 0, 0, self._file.url
        self._trial.received[self._file.sha256] = 0
        while offset < self._file.size:
            try:
                async with aclosing(self._peers.read(url, offset)) as chunks:
                    async for chunk in chunks:
                        offset, broken = offset + len(chunk), 0
                        self._trial.received[self._file.sha256] = offset
                        self._observe.received(self._rack, len(chunk))
                        yield chunk
                if offset < self._file.size:
                    raise ModelManagerError("ERR_STORAGE_UNAVAILABLE", "The transfer ended too early.")
            except ModelManagerError as error:
                broken += 1
                if not error.retryable or broken >= _BROKEN_MOST:
                    raise
                await asyncio.sleep(random.uniform(0, 0.1 * 2**broken))
                url = await self._new_url()

    async def _new_url(self) -> str:
        for file in await locate(self._peers, self._rack, self._told):
            if (file.path, file.checksum) == (self._file.path, self._file.checksum):
                return file.url
        raise ModelManagerError("ERR_CHECKSUM_MISMATCH", f"{self._rack} has other bytes under that name by now.")
