"""The other racks as replication calls them: over the broker by the client, and their bytes over HTTP."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable

import aiohttp

from schemas.errors import ModelManagerError
from worker.client.amqp_caller import AmqpCaller
from worker.client.client import ModelManagerClient
from worker.client.transfer import CHUNK_BYTES, TransferError, check, exact, transfer_session

_TIMEOUT_S = 20.0


class ClientPeers:
    """Calls all racks over one connection. `url` gives the broker's address, which may change."""

    def __init__(self, url: Callable[[], str], me: str) -> None:
        self._caller = AmqpCaller(url, me)
        self._session: aiohttp.ClientSession | None = None

    def rack(self, name: str) -> ModelManagerClient:
        return ModelManagerClient(self._caller.of(name), timeout_s=_TIMEOUT_S)

    async def read(self, url: str, start: int) -> AsyncGenerator[bytes]:
        """See `Peers.read`. Memory: a chunk of 1 MiB."""
        if self._session is None:
            self._session = transfer_session()
        headers = {"Range": f"bytes={start}-"} if start else {}
        try:
            async with self._session.get(exact(url), headers=headers, allow_redirects=False) as response:
                await check(response)
                if start and not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
                    raise ModelManagerError("ERR_INTERNAL", "The storage of the rack sent another range.")
                async for chunk in response.content.iter_chunked(CHUNK_BYTES):
                    yield chunk
        except TransferError as error:
            if error.again:  # also an address that has expired: with a new one it may go on
                raise ModelManagerError("ERR_STORAGE_UNAVAILABLE", error.message) from error
            raise
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            text = f"The transfer was interrupted ({type(error).__name__})."
            raise ModelManagerError("ERR_STORAGE_UNAVAILABLE", text) from error

    async def close(self) -> None:
        """What is asked from then on ends with an error."""
        await self._caller.close()
        if self._session is not None:
            await self._session.close()
