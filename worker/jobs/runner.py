"""Jobs: long work that is accepted at once, recorded, and outlives the request and the process.

Begin and end are records; a job that has no end at boot is started again, so the body of a job must be able to find its
effect already there.

A body ends with its commit. Until then a cancelled job has no effect; from then on it is no more cancelled, but waited
for: an effect whose job says "cancelled" would be one that nobody expects.
"""

from __future__ import annotations

import asyncio
import contextvars
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Set
from typing import Any

import structlog

from schemas.errors import ERRORS, ModelManagerError
from schemas.ids import new_ulid
from schemas.journal import JobBeginRecord
from schemas.rpc import JobStatus
from worker.catalog.entries import JobEntry
from worker.context import Context
from worker.journal import Entry, check_record
from worker.registry import Change, Registry

_log = structlog.get_logger()

Progress = Callable[[str, int], None]
Commit = Callable[[], Awaitable[dict[str, Any]]]
# The long part of a job, which can be cut anywhere; it returns the short one, which has the effect and the result.
Body = Callable[[dict[str, Any], Progress], Awaitable[Commit]]

_LAST_PROGRESS_KEPT = 1000
_OPEN_MOST = 1000
_WAITING_MOST = 64
_COME_BACK_MS = 5000


class Jobs:
    """Runs the bodies, at most `places` at once; those of `patient` methods, which mostly wait, take none of these."""

    def __init__(
        self, registry: Registry, bodies: dict[str, Body], *, places: int, patient: Set[str] = frozenset()
    ) -> None:
        self._registry = registry
        self._bodies = bodies
        working, waiting = asyncio.Semaphore(places), asyncio.Semaphore(_WAITING_MOST)
        self._places = {method: waiting if method in patient else working for method in bodies}
        self._open: Counter[asyncio.Semaphore] = Counter()
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._committing: set[str] = set()  # and those that record their end
        self._cancelled: set[str] = set()
        self._progress: dict[str, dict[str, int]] = {}
        self._last_progress: dict[str, dict[str, int]] = {}  # of jobs that ended, for those who ask just then
        # A job logs as the worker does, and has no deadline: that of the request it came with is the request's alone.
        self._context = contextvars.copy_context()
        self._stopped = False
        registry.listen(self._on_entry)

    async def begin(self, method: str, params: dict[str, Any], context: Context) -> str:
        """Record a job and start it; its id. `params` are the request's, as JSON. ERR_OVERLOADED if too many wait."""
        if (count := self._open[self._places[method]]) >= _OPEN_MOST:
            raise ModelManagerError("ERR_OVERLOADED", f"{count} such jobs are open.", retryAfterMs=_COME_BACK_MS)
        job_id = new_ulid()
        record: JobBeginRecord = {
            "job": job_id,
            "method": method,
            "params": params,
            "created": time.time_ns() // 1_000_000,
        }
        if context.idempotency is not None:
            record["idem"] = context.idempotency
        await self._registry.transact(job_id, lambda: Change("job.begin", record))
        return job_id

    def _on_entry(self, entry: Entry) -> None:
        """Start what was recorded, also when nobody waits for it any more."""
        if entry.op == "job.begin" and not self._stopped:
            self._start(self._entry(entry.record["job"]))

    def resume(self) -> int:
        """Start the jobs again that an earlier process left without an end; how many."""
        left = [job for job in self._registry.catalog.jobs.values() if not job.ended]
        for job in left:
            self._start(job)
        return len(left)

    async def result(self, job_id: str, wait_s: float) -> dict[str, Any]:
        """The job's reply if it is there within `wait_s`, else `{jobId, state}`; its error is raised."""
        await self._wait(job_id, wait_s)
        job = self._entry(job_id)
        if job.state == "succeeded":
            return await self._result(job)
        if job.state in ("failed", "cancelled"):
            raise _error_of(job)
        return {"success": True, "jobId": job_id, "state": self._state(job)}

    async def status(self, job_id: str, wait_s: float = 0) -> JobStatus:
        await self._wait(job_id, wait_s)
        job = self._entry(job_id)
        status: JobStatus = {
            "success": True,
            "jobId": job.id,
            "method": job.method,
            "state": self._state(job),
            "progress": self._progress.get(job_id) or self._last_progress.get(job_id, {}),
        }
        if job.state == "succeeded":
            status["result"] = await self._result(job)
        if job.error is not None:
            status["error"] = job.error
        return status

    async def cancel(self, job_id: str) -> JobStatus:
        """End a job, if it has not come to its commit; else it succeeds or fails as if nobody had asked."""
        self._entry(job_id)
        await asyncio.sleep(0)  # a task that has not begun to run could not record its end
        task = self._tasks.get(job_id)
        if task is not None:
            if job_id not in self._committing | self._cancelled:
                self._cancelled.add(job_id)
                task.cancel()
            await asyncio.wait([task])
        return await self.status(job_id)

    def may_be_tried_again(self, job_id: str) -> bool:
        """Whether the job failed of something that passes."""
        job = self._entry(job_id)
        return job.state == "failed" and _error_of(job).retryable

    async def stop(self) -> None:
        """Stop the bodies without recording an end: the next process starts them again."""
        self._stopped = True
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    def counts(self) -> dict[str, int]:
        """How many jobs are in each state."""
        counts: dict[str, int] = {}
        for job in self._registry.catalog.jobs.values():
            state = self._state(job)
            counts[state] = counts.get(state, 0) + 1
        return counts

    def _entry(self, job_id: str) -> JobEntry:
        job = self._registry.catalog.jobs.get(job_id)
        if job is None:
            raise ModelManagerError("ERR_NOT_FOUND", "There is no such job.", jobId=job_id)
        return job

    async def _result(self, job: JobEntry) -> dict[str, Any]:
        try:
            result: dict[str, Any] = (await self._registry.record(job.sequences[-1]))["result"]
        except KeyError:
            raise ModelManagerError("ERR_NOT_FOUND", "The job is over for long.", jobId=job.id) from None
        return result

    def _state(self, job: JobEntry) -> Any:
        return "running" if job.id in self._progress and not job.ended else job.state

    async def _wait(self, job_id: str, wait_s: float) -> None:
        task = self._tasks.get(job_id)
        if task is not None and wait_s > 0:
            await asyncio.wait([task], timeout=wait_s)

    def _start(self, job: JobEntry) -> None:
        task = asyncio.create_task(self._run(job), name=f"job {job.method} {job.id}", context=self._context.copy())
        self._tasks[job.id] = task
        self._open[self._places[job.method]] += 1
        task.add_done_callback(lambda _: self._forget(job.id, job.method))

    def _forget(self, job_id: str, method: str) -> None:
        self._tasks.pop(job_id, None)
        self._open[self._places[method]] -= 1
        self._committing.discard(job_id)
        self._cancelled.discard(job_id)

    async def _run(self, job: JobEntry) -> None:
        try:
            async with self._places[job.method]:
                progress = self._progress[job.id] = {}
                commit = await self._bodies[job.method](job.params, progress.__setitem__)
                self._committing.add(job.id)
                result = await commit()
            end: dict[str, Any] = {"job": job.id, "state": "succeeded", "result": result}
            check_record("job.end", end)  # an end that no line holds would never be one
        except asyncio.CancelledError:
            if job.id not in self._cancelled:
                raise
            error = ModelManagerError("ERR_CONFLICT", "The job was cancelled.")
            end = {"job": job.id, "state": "cancelled", "error": error.body()["error"]}
        except ModelManagerError as error:
            end = {"job": job.id, "state": "failed", "error": error.body()["error"]}
        except Exception:  # noqa: BLE001 - a job ends with a record whatever its body does
            _log.exception("job_failed", job=job.id, method=job.method)
            end = {"job": job.id, "state": "failed", "error": ModelManagerError("ERR_INTERNAL").body()["error"]}
        self._committing.add(job.id)
        try:
            await self._end(end)
        except ModelManagerError as error:
            _log.error("job_end_not_recorded", job=job.id, code=error.code)  # it is started again at the next boot

    async def _end(self, end: dict[str, Any]) -> None:
        await self._registry.transact(end["job"], lambda: Change("job.end", end))
        self._last_progress[end["job"]] = self._progress.pop(end["job"], {})
        if len(self._last_progress) > _LAST_PROGRESS_KEPT:
            del self._last_progress[next(iter(self._last_progress))]


def _error_of(job: JobEntry) -> ModelManagerError:
    error = job.error or {}
    code = error.get("code", "ERR_INTERNAL")
    details = {**error.get("details", {}), "jobId": job.id}
    return ModelManagerError(code if code in ERRORS else "ERR_INTERNAL", error.get("message", ""), **details)
