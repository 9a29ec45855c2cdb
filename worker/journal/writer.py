"""Group commit: one thread takes all that waits and makes it durable as a batch."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any

import msgspec

from schemas.errors import ModelManagerError
from worker.journal.appender import Appender
from worker.journal.failures import JournalFailed, disk_full
from worker.journal.format import Entry

BATCH_LINES = 512
BATCH_BYTES = 1024 * 1024
IDLE_SECONDS = 1.0


class Pending(msgspec.Struct, eq=False):
    """A record on its way; `since` is when it was handed over (perf_counter). `settled` is called on the loop once its
    outcome is known, whether anybody waits for `acknowledged` or not."""

    op: str
    record: dict[str, Any]
    payload: bytes
    since: float
    acknowledged: asyncio.Future[Entry]
    settled: Callable[[], None] | None = None


@dataclass(slots=True, eq=False)
class Errand:
    """Something else that is done on the thread, between two batches; `done` gets what it returns or raises."""

    work: Callable[[Appender], Any]
    done: Future[Any]

    def is_wanted(self) -> bool:
        """Whether anybody still waits for it; from then on `done` cannot be cancelled any more. Called once."""
        return self.done.set_running_or_notify_cancel()


class Outcome(msgspec.Struct, frozen=True, eq=False):
    """What became of a batch: its entries, or the error that all of it gets. `head` is the last durable line."""

    batch: list[Pending]
    entries: list[Entry]
    head: int
    error: Exception | None = None


class Writer:
    """The thread. `report` is called on it: once for each batch, after lines of the journal's own, and at a failure,
    which is its last report; what was handed over and not reported then comes back from `abandon`.
    """

    def __init__(
        self,
        appender: Appender,
        report: Callable[[Outcome], None],
        frees: Callable[[str, dict[str, Any]], bool],
    ) -> None:
        self._appender = appender
        self._report = report
        self._frees = frees
        self._queue: SimpleQueue[Pending | Errand | None] = SimpleQueue()
        # What has been taken and not reported.
        self._batch: list[Pending] = []
        # A daemon, so that a program that ends without closing its journal ends: what was acknowledged is durable.
        self._thread = threading.Thread(target=self._run, name="journal-writer", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def submit(self, pending: Pending) -> None:
        self._queue.put(pending)

    def run(self, work: Callable[[Appender], Any]) -> Future[Any]:
        """Do this once what was submitted before is done. If the journal stops, JournalFailed."""
        errand = Errand(work, Future())
        self._queue.put(errand)
        return errand.done

    def stop(self) -> None:
        """Finish what was submitted before, write a mark and end. Does not wait."""
        self._queue.put(None)

    def join(self) -> None:
        self._thread.join()

    def abandon(self, failure: str) -> list[Pending]:
        """Write nothing more, because of `failure`, and give back what has not been taken yet."""
        self._appender.failure = self._appender.failure or failure
        left: list[Pending] = []
        while True:
            try:
                pending = self._queue.get_nowait()
            except Empty:
                return left
            if isinstance(pending, Errand):
                if pending.is_wanted():
                    pending.done.set_exception(JournalFailed(failure))
            elif pending is not None:
                left.append(pending)

    def _run(self) -> None:
        try:
            self._work()
        except JournalFailed as error:
            self._report(Outcome(self._batch, [], self._appender.sequence, error))
        except BaseException as error:
            self._appender.failure = f"the writer died: {error!r}"
            self._report(Outcome(self._batch, [], self._appender.sequence, JournalFailed(self._appender.failure)))
            raise

    def _work(self) -> None:
        self._appender.prepare()
        self._appender.reserve.provide()
        self._rotate()
        stopping = False
        while not stopping:
            self._batch, errand, stopping = self._take()
            idle = not self._batch and errand is None
            self._appender.reserve.look()
            if self._batch:
                self._commit()
                self._batch = []
                self._rotate()
            if errand is not None:
                self._do(errand)
            if (idle or stopping) and self._appender.mark():
                self._report(Outcome([], [], self._appender.sequence))

    def _do(self, errand: Errand) -> None:
        if not errand.is_wanted():
            return
        try:
            result = errand.work(self._appender)
        except ModelManagerError as error:
            errand.done.set_exception(error)
        except BaseException as error:
            errand.done.set_exception(error)
            raise
        else:
            self._report(Outcome([], [], self._appender.sequence))
            errand.done.set_result(result)

    def _take(self) -> tuple[list[Pending], Errand | None, bool]:
        """What waits, up to a full batch; an errand to do after it; whether to stop then. Nothing if a second went by
        without any."""
        batch: list[Pending] = []
        size = 0
        try:
            waits_for_room = self._appender.reserve.full_since is not None
            item = self._queue.get(timeout=IDLE_SECONDS if self._appender.unproven or waits_for_room else None)
        except Empty:
            return batch, None, False
        waiting = min(self._queue.qsize(), BATCH_LINES - 1)
        while isinstance(item, Pending):
            batch.append(item)
            size += len(item.payload)
            if size >= BATCH_BYTES or not waiting:
                return batch, None, False
            try:
                item = self._queue.get_nowait()
            except Empty:  # `abandon` was faster
                return batch, None, False
            waiting -= 1
        return batch, item, item is None

    def _commit(self) -> None:
        """Without room, of what was taken only what frees some, with the help of the reserve."""
        full = self._appender.reserve.full_since is not None
        if full:
            self._refuse_growth()
        batch = self._batch
        if not batch:
            return
        try:
            first, time_ms = self._appender.append([pending.payload for pending in batch], at_any_cost=full)
        except ModelManagerError as error:
            if self._appender.reserve.full_since is not None and not full:
                self._commit()
            else:
                self._report(Outcome(batch, [], self._appender.sequence, error))
            return
        entries = [
            Entry(sequence, time_ms, pending.op, pending.record) for sequence, pending in enumerate(batch, first)
        ]
        self._report(Outcome(batch, entries, self._appender.sequence))
        self._appender.sum_up_if_due()

    def _refuse_growth(self) -> None:
        growth = [pending for pending in self._batch if not self._frees(pending.op, pending.record)]
        self._batch = [pending for pending in self._batch if self._frees(pending.op, pending.record)]
        if growth:
            self._report(Outcome(growth, [], self._appender.sequence, disk_full()))

    def _rotate(self) -> None:
        if self._appender.rotate_if_due():
            self._report(Outcome([], [], self._appender.sequence))
