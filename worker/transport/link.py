"""One connection to the broker that is kept up for ever, and goes over to a new one when its credentials change."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from worker.broker_url import NO_ADDRESS
from worker.settings import SettingsError
from worker.transport.connections import BrokerConnection, LinkLostError, close_connection, open_connection

RETRY_FIRST_S = 0.2
RETRY_LONGEST_S = 5.0
HEALTHY_AFTER_S = 2.0
# For what was begun on a connection that is given up: longer than any confirm is waited for, then than any request.
LINGER_LEAST_S = 12.0
LINGER_POLL_S = 0.5
LINGER_POLLS = 100

log = logging.getLogger(__name__)

Session = Callable[[BrokerConnection], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Broker:
    """Where the broker is: `address` is asked anew for each connection, and depends on what lies in `files`."""

    address: Callable[[], str]
    files: tuple[Path, ...] = ()

    @classmethod
    def at(cls, url: str) -> Self:
        """One whose address never changes."""
        return cls(lambda: url)

    async def connect(self, name: str) -> BrokerConnection:
        """A connection shown as `name` at the broker. LinkLostError: there is none."""
        try:
            url = await asyncio.to_thread(self.address)
        except SettingsError:
            raise LinkLostError("the file with the broker's address cannot be read") from None
        except ValueError:
            raise LinkLostError(NO_ADDRESS) from None
        return await open_connection(url, name)


def retry_delays() -> Iterator[float]:
    """Seconds between attempts: doubling from `RETRY_FIRST_S` to `RETRY_LONGEST_S`, with jitter, without end."""
    delay = RETRY_FIRST_S
    while True:
        yield delay * random.uniform(0.5, 1.0)
        delay = min(delay * 2, RETRY_LONGEST_S)


class Link:
    """One connection that is made again whenever it is lost.

    `session` runs on each connection and should return or raise LinkLostError once it is of no more use, or is retired.
    `changed` is called after every change of `up` or `reason`.
    """

    def __init__(self, *, broker: Broker, name: str, session: Session, changed: Callable[[], None]) -> None:
        self._broker = broker
        self._name = name
        self._session = session
        self._changed = changed
        self._connection: BrokerConnection | None = None
        self._successor: BrokerConnection | None = None
        self._taken = asyncio.Event()
        self._lingering: set[asyncio.Task[None]] = set()
        self.up = False
        self.reason = "not connected yet"
        self.connections = 0
        """Connections made so far, those that took over from a living one not counted."""

    async def run(self) -> None:
        """Connect, run the session, and again, until cancelled."""
        try:
            await self._keep_up()
        finally:
            for task in self._lingering:
                task.cancel()
            await asyncio.gather(*self._lingering, return_exceptions=True)
            if self._successor is not None:
                await close_connection(self._successor)

    async def renew(self) -> None:
        """Go over to a connection made now; return when it is in use.

        What was begun on the old one ends on it. LinkLostError: there is none to be had, and the old one stays in use.
        """
        if not self.up:
            return  # the next attempt uses what there is by then
        successor = await self._broker.connect(self._name)
        if self._connection is None:  # lost meanwhile
            await close_connection(successor)
            return
        self._successor = successor
        self._taken.clear()
        self._connection.retire()
        await self._taken.wait()

    async def _keep_up(self) -> None:
        delays = retry_delays()
        while True:
            started = time.monotonic()
            try:
                await self._use(await self._next())
            except LinkLostError as error:
                self._set(up=False, reason=str(error))
            except Exception as error:
                # Not foreseen; but a worker without this connection is dead, and a new one may well work.
                log.exception("The session on a connection failed")
                self._set(up=False, reason=type(error).__name__)
            if self._successor is not None:
                continue
            if time.monotonic() - started > HEALTHY_AFTER_S:
                delays = retry_delays()
            await asyncio.sleep(next(delays))

    async def _next(self) -> BrokerConnection:
        """The connection that stands ready, else a new one."""
        successor, self._successor = self._successor, None
        if successor is not None:
            return successor
        connection = await self._broker.connect(self._name)
        self.connections += 1
        return connection

    async def _use(self, connection: BrokerConnection) -> None:
        self._connection = connection
        self._taken.set()
        try:
            self._set(up=True, reason="")
            await self._session(connection)
        finally:
            self._connection = None
            if connection.retired and connection.is_opened:
                task = asyncio.create_task(self._linger(connection))
                self._lingering.add(task)
                task.add_done_callback(self._lingering.discard)
            else:
                self._set(up=False, reason=self.reason or "the connection was lost")
                await close_connection(connection)

    async def _linger(self, connection: BrokerConnection) -> None:
        """Close it when all that was begun on it has ended; what takes too long, the broker delivers again."""
        try:
            await asyncio.sleep(LINGER_LEAST_S)
            for _ in range(LINGER_POLLS):
                if not connection.tap.busy:
                    return
                await asyncio.sleep(LINGER_POLL_S)
            log.warning("A connection that was renewed is closed with requests in work on it")
        finally:
            await close_connection(connection)

    def _set(self, *, up: bool, reason: str) -> None:
        self.up, self.reason = up, reason
        self._changed()
