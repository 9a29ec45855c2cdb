"""A large body on its way in: threads take it from the socket, so that the event loop never sees its bytes.

On the loop every 256 KiB would be received, parsed, buffered and joined, one body after the other: with eight at once
that was half of the loop's time, and a lookup waited behind it. Here the loop only waits until a piece lies in the
socket; a thread takes the piece as a whole, without the interpreter's lock.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncGenerator

from worker.threads import processor_threads
from worker.transport.http_replies import HttpFault

PIECE_BYTES = 1024 * 1024
# At least so much, or all that is left, must come within the idle timeout.
LEAST_BYTES = 256 * 1024


class Intake:
    """A body of which `begun` has come, and the other `left` bytes come by a socket that nobody else reads from.

    The socket does not block. It is closed at the end of `pieces`, so it should be a duplicate.
    """

    def __init__(self, begun: bytes, left: int, sock: socket.socket, *, idle_s: float) -> None:
        self._begun = begun
        self._left = left
        self._socket = sock
        self._idle_s = idle_s

    async def pieces(self) -> AsyncGenerator[bytes, None]:
        """The bytes in order. A fault if they stop coming (408) or break off (400)."""
        reading: asyncio.Future[bytes | None] | None = None
        try:
            if self._begun:
                yield self._begun
            while self._left:
                wanted = min(PIECE_BYTES, self._left)
                in_time = await self._has(wanted)
                reading = asyncio.get_running_loop().run_in_executor(processor_threads(), self._take, wanted)
                # Shielded: a thread cannot be cancelled, and what it reads from must not be closed under it.
                piece = await asyncio.shield(reading)
                if piece == b"":
                    raise lost()
                if not in_time and len(piece or b"") < min(LEAST_BYTES, wanted):
                    raise late()
                if piece is not None:
                    self._left -= len(piece)
                    yield piece
        except OSError as error:
            raise lost() from error
        finally:
            if reading is None or reading.done():
                self._close()
            else:
                reading.add_done_callback(self._close_after)

    async def _has(self, count: int) -> bool:
        """Wait until the socket has so many bytes, or has no room for them, or has ended; False when it is too late."""
        loop = asyncio.get_running_loop()
        ready = asyncio.Event()
        descriptor = self._socket.fileno()  # selectors would describe a socket each time, for an error nobody sees
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, count)
        loop.add_reader(descriptor, ready.set)
        try:
            async with asyncio.timeout(self._idle_s):
                await ready.wait()
        except TimeoutError:
            return False
        finally:
            loop.remove_reader(descriptor)
        return True

    def _take(self, count: int) -> bytes | None:
        """What is there, up to `count`: nothing at the end of the stream, None if there is nothing yet."""
        try:
            return self._socket.recv(count)
        except BlockingIOError:
            return None

    def _close_after(self, reading: asyncio.Future[bytes | None]) -> None:
        if not reading.cancelled():
            reading.exception()  # looked at: nobody waits any more
        self._close()

    def _close(self) -> None:
        with contextlib.suppress(OSError):  # where a connection that was reset takes no options
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)
        self._socket.close()


def late() -> HttpFault:
    return HttpFault(408, "The body did not come in time.")


def lost() -> HttpFault:
    return HttpFault(400, "The connection was lost before the end of the body.")
