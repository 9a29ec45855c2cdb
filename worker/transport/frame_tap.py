"""Under aiormq's streams: takes out the frames of channels that are ours, and writes theirs.

aiormq reads a frame with three awaits, hands it from task to task through queues and makes tasks and futures for each
message, which costs several times what a request costs us. So it keeps the connection (handshake, heartbeats, closing)
and its own channels; frames of a channel that was taken go straight from the socket to that channel, and what is
written on such channels in one turn of the event loop goes out in one write.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

from worker.stall import ABSENT_TURN_S, clock
from worker.transport.amqp_codec import HEARTBEAT_FRAME, BadFrameError, FrameSplitter, frame

# aiormq takes a connection for dead on which it has seen no frame for a minute.
_SIGN_OF_LIFE_S = 5.0


class Taker(Protocol):
    """A channel whose frames are taken out."""

    def taken(self, kind: int, payload: bytes) -> None:
        """A frame has come. BadFrameError ends the connection."""

    def lost(self, reason: BaseException | None) -> None:
        """The connection is gone; nothing more comes."""

    @property
    def busy(self) -> bool:
        """Something that was begun has not ended."""


class FrameTap(asyncio.StreamReaderProtocol):
    """The protocol below the reader and the writer of one connection.

    `dropped`: the connection ended before something could be written that was sent. `absent`: it was ended because the
    process stood still between the two, so what was about to be said may not hold any more.
    """

    def __init__(self, reader: asyncio.StreamReader, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(reader, loop=loop)
        self._reader = reader
        self._event_loop = loop
        self._splitter = FrameSplitter()
        self._takers: dict[int, Taker] = {}
        self._failed = self._gone = False
        self.dropped = self.absent = False
        self._sign_of_life = 0.0
        self._pending: list[bytes] = []
        self._before_flush: list[Callable[[], None]] = []
        self._scheduled = False
        self._turn_began = 0.0
        self._transport: asyncio.Transport
        self.writer: asyncio.StreamWriter

    def attach(self, transport: asyncio.Transport) -> asyncio.StreamWriter:
        """Once connected: the writer, which is shared with aiormq."""
        self._transport = transport
        self.writer = asyncio.StreamWriter(transport, self, self._reader, self._event_loop)
        return self.writer

    # --- in ---

    def take(self, channel: int, taker: Taker) -> None:
        """From now on the frames of this channel go to `taker` and not to aiormq."""
        if self._gone:
            taker.lost(None)
        else:
            self._takers[channel] = taker

    def release(self, channel: int) -> None:
        """The channel is closed; its number is free."""
        self._takers.pop(channel, None)

    def is_taken(self, channel: int) -> bool:
        return channel in self._takers

    def pause(self) -> None:
        """Read nothing for now, not even heartbeats, which aiormq bears for a minute; the broker keeps what is to come.

        Frames that were read already still come.
        """
        self._transport.pause_reading()

    def resume(self) -> None:
        """Read again."""
        self._transport.resume_reading()

    def data_received(self, data: bytes) -> None:
        if self._failed:
            return
        passed = []
        took = False
        try:
            for kind, channel, payload in self._splitter.feed(data):
                taker = self._takers.get(channel)
                if taker is None:
                    passed.append(frame(kind, channel, payload))
                else:
                    took = True
                    taker.taken(kind, payload)
        except BadFrameError as error:
            self._failed = True
            self._reader.set_exception(error)
            return
        if took and self._event_loop.time() - self._sign_of_life > _SIGN_OF_LIFE_S:
            self._sign_of_life = self._event_loop.time()
            passed.append(HEARTBEAT_FRAME)
        if passed:
            super().data_received(b"".join(passed))

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._gone = True
        takers = list(self._takers.values())
        self._takers.clear()
        self._drop_pending()
        for taker in takers:
            taker.lost(exc or self._reader.exception())

    # --- out ---

    def send(self, frames: bytes) -> None:
        """Write whole frames, with whatever else is sent in this turn of the event loop."""
        self._pending.append(frames)
        self._schedule()

    def before_flush(self, write: Callable[[], None]) -> None:
        """Have `write` called once, at the end of this turn, to send what it has gathered."""
        self._before_flush.append(write)
        self._schedule()

    def flush(self) -> None:
        """Write what was sent so far, now."""
        if self._scheduled and clock() - self._turn_began > ABSENT_TURN_S:
            self.absent = True
            self._transport.abort()
        self._scheduled = False
        for write in self._before_flush:
            write()
        self._before_flush.clear()
        if self._pending:
            if self.absent or self.writer.is_closing():
                self._drop_pending()
            else:
                self.writer.write(b"".join(self._pending))
                self._pending.clear()

    def _drop_pending(self) -> None:
        self.dropped = self.dropped or bool(self._pending)
        self._pending.clear()

    @property
    def busy(self) -> bool:
        """Something that was begun on a channel of ours has not ended."""
        return any(taker.busy for taker in self._takers.values())

    @property
    def congested(self) -> bool:
        """More has been written than the socket takes for now."""
        transport = self.writer.transport
        return transport.get_write_buffer_size() > transport.get_write_buffer_limits()[1]

    def _schedule(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            self._turn_began = clock()
            self._event_loop.call_soon(self.flush)
