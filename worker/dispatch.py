"""From a method's name and bytes to its reply: the one way in for every transport.

Parses, admits (two bounded lanes, so that lookups never wait behind writes), keeps the deadline, answers repeats,
renders errors, counts and logs. Handlers return or raise; nobody else renders an error. Who only waits, for a change, a
job or an earlier try, takes no place from those who work.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Protocol

import structlog
from pydantic import ValidationError

from schemas.deadline import deadline as deadline_of_request
from schemas.errors import ModelManagerError
from schemas.journal import Idempotency
from schemas.model import Wire
from schemas.rpc import METHODS, Method
from schemas.wire import canonical, parse_object
from worker.context import Context
from worker.registry import Registry
from worker.service.service import ModelService
from worker.unrecorded import UnrecordedAnswers

_log = structlog.get_logger()

_PROBLEMS_SHOWN = 10
_PLACE_CHARACTERS = 64
_WAITING_PER_PLACE = 4
_WAITING_REQUESTS = 1000
_UNRECORDED_BYTES = 16 * 1024 * 1024


class RequestObserver(Protocol):
    """Told of every request."""

    def request_started(self, method: str) -> None: ...

    def request_ended(self, method: str, code: str, seconds: float) -> None: ...

    def request_repeated(self) -> None: ...


# None, or, when the process was absent for long, what tells whether it still is the owner.
Vouch = Callable[[], Awaitable[None] | None]


class Lane:
    """A bounded number of places with a bounded waiting room; beyond that, ERR_OVERLOADED."""

    def __init__(self, name: str, places: int) -> None:
        self._name = name
        self._places = asyncio.Semaphore(places)
        self._inside_max = places * (1 + _WAITING_PER_PLACE)
        self._inside = 0
        self._recent_s = 0.05  # what a request took lately, for the advice when to come back

    async def enter(self) -> None:
        """Take a place, or wait for one; `leave` gives it back."""
        if self._inside >= self._inside_max:
            raise ModelManagerError("ERR_OVERLOADED", retryAfterMs=max(50, int(self._recent_s * 1000)), lane=self._name)
        self._inside += 1
        try:
            await self._places.acquire()
        except BaseException:
            self._inside -= 1
            raise

    def leave(self, seconds: float | None) -> None:
        """Give the place back; `seconds` is what the request took, None if it failed."""
        if seconds is not None:
            self._recent_s += 0.1 * (seconds - self._recent_s)
        self._places.release()
        self._inside -= 1


class _Admission:
    """A place in a lane until a deadline, which the work can ask for; past it the work is ERR_DEADLINE_EXCEEDED.

    A class, and not generators within each other: a lookup is short enough to feel them.
    """

    __slots__ = ("_deadline", "_lane", "_started", "_timeout", "_token")

    def __init__(self, lane: Lane, deadline: float | None) -> None:
        self._lane = lane
        self._deadline = deadline

    async def __aenter__(self) -> None:
        remaining = None
        if self._deadline is not None:
            remaining = self._deadline - time.monotonic()
            if remaining <= 0:
                raise ModelManagerError("ERR_DEADLINE_EXCEEDED")
        self._token = deadline_of_request.set(self._deadline)
        self._timeout = asyncio.timeout(remaining)
        await self._timeout.__aenter__()
        try:
            await self._lane.enter()
        except BaseException as error:
            await self._end(type(error), error, error.__traceback__)
            raise
        self._started = time.monotonic()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lane.leave(time.monotonic() - self._started if error is None else None)
        await self._end(kind, error, trace)

    async def _end(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            await self._timeout.__aexit__(kind, error, trace)
        except TimeoutError:
            raise ModelManagerError("ERR_DEADLINE_EXCEEDED") from None
        finally:
            deadline_of_request.reset(self._token)
        if isinstance(error, TimeoutError):
            raise ModelManagerError("ERR_DEADLINE_EXCEEDED") from None


@dataclass(slots=True)
class _Running:
    """A request that is being handled, for repeats that arrive meanwhile. `outcome` is None if its time was over."""

    request_hash: str
    outcome: asyncio.Future[dict[str, Any] | None]


class Dispatcher:
    """Requests are refused before the registry is open, and writes while `draining`."""

    def __init__(
        self,
        service: ModelService,
        registry: Registry,
        observe: RequestObserver,
        *,
        lookups: int,
        writes: int,
        transfers: int,
    ) -> None:
        self._service = service
        self._registry = registry
        self._observe = observe
        self._lanes = {"lookup": Lane("lookup", lookups), "write": Lane("write", writes)}
        self._waiting = Lane("waiting", _WAITING_REQUESTS)
        self._transfers = Lane("transfer", transfers)
        self._running: dict[str, _Running] = {}
        self._unrecorded = UnrecordedAnswers(_UNRECORDED_BYTES)
        self.draining = False
        self.vouch: Vouch | None = None

    async def answer(self, method: str, body: bytes, context: Context) -> dict[str, Any]:
        """The reply body for a request's bytes. Never raises but CancelledError."""
        try:
            return await self._call(method, body, context)
        except ModelManagerError as error:
            return error.body()

    async def call(self, method: str, params: dict[str, Any], context: Context) -> dict[str, Any]:
        """The reply body for parsed JSON params; raises ModelManagerError and nothing else."""
        return await self._call(method, params, context)

    async def _call(self, method: str, body: bytes | dict[str, Any], context: Context) -> dict[str, Any]:
        known = METHODS.get(method)
        with self._observed("unknown" if known is None else method, context):
            if known is None:
                raise ModelManagerError("ERR_UNKNOWN_METHOD", f"There is no method {method[:64]!r}.")
            params = parse_params(known, parse_object(body) if isinstance(body, bytes) else body)
            if not known.effect or context.idempotency_key is None:
                reply = await self._run(known, _patient(params, context), context)
            else:
                reply = await self._once(known, params, context)
            await self._vouched(known)
            return reply

    async def _vouched(self, method: Method) -> None:
        """Raises ModelManagerError when this process may have lost the storage: then nothing is acknowledged."""
        if method.acknowledges and self.vouch is not None and (doubt := self.vouch()) is not None:
            await doubt

    @contextlib.asynccontextmanager
    async def admit(self, method: str, context: Context) -> AsyncIterator[None]:
        """For streams that do not go through `call`: the same deadline, counting and errors.

        A stream that stores takes as long as its sender likes, so it has a lane of its own.
        """
        known = METHODS[method]
        lane = self._transfers if known.lane == "write" else self._lanes["lookup"]
        with self._observed(method, context):
            async with self._admission(known, context, lane):
                yield
            await self._vouched(known)

    @contextlib.contextmanager
    def _observed(self, method: str, context: Context) -> Iterator[None]:
        started = time.monotonic()
        code = "ERR_CANCELLED"
        self._observe.request_started(method)
        try:
            yield
            code = "ok"
        except ModelManagerError as error:
            code = error.code
            raise
        except asyncio.CancelledError:
            raise
        except Exception as error:
            code = "ERR_INTERNAL"
            _log.exception("request_failed", op=method, correlation_id=context.correlation_id)
            raise ModelManagerError("ERR_INTERNAL") from error
        finally:
            seconds = time.monotonic() - started
            self._observe.request_ended(method, code, seconds)
            _log.debug("request", op=method, code=code, ms=round(seconds * 1000, 2), transport=context.transport)

    def _admission(self, method: Method, context: Context, lane: Lane) -> _Admission:
        """A place for a request; raises what it is refused with."""
        if self.draining and method.lane == "write":
            raise ModelManagerError("ERR_SHUTTING_DOWN")
        if not self._registry.opened:
            raise ModelManagerError("ERR_STORAGE_UNAVAILABLE", "The worker is starting: its registry is not open yet.")
        if method.lane == "write" and not method.frees:
            self._registry.check_room()
        return _Admission(lane, context.deadline)

    async def _run(self, method: Method, params: Wire, context: Context) -> dict[str, Any]:
        waits = getattr(params, "wait_ms", 0) > 0
        # A job begins as any write does, and is waited for afterwards.
        lane = self._waiting if waits and not method.job else self._lanes[method.lane]
        async with self._admission(method, context, lane):
            reply: dict[str, Any] = await self._service.handlers[method.name](params, context)
        if not method.job:
            return reply
        if not waits:  # or a job that has begun would be refused for those who wait
            return await self._service.outcome(reply["jobId"], params)
        async with _Admission(self._waiting, context.deadline):
            return await self._service.outcome(reply["jobId"], params)

    # --- repeats ---

    async def _once(self, method: Method, params: Wire, context: Context) -> dict[str, Any]:
        """Run a request that has an idempotency key: one effect, one answer, however often it comes."""
        idempotency = _idempotency(method, params, context)
        key = idempotency["key"]
        params = _patient(params, context)
        while (running := self._running.get(key)) is not None:
            reply = await self._attach(running, idempotency["hash"], context)
            if reply is not None:
                return reply
        running = self._running[key] = _Running(idempotency["hash"], asyncio.get_running_loop().create_future())
        try:
            reply = await self._repeated(method, params, idempotency, context)
            if reply is None:
                reply = await self._run(method, params, replace(context, idempotency=idempotency))
                if not self._registry.knows(idempotency):
                    self._unrecorded.put(idempotency, reply)
            running.outcome.set_result(reply)
            return reply
        except ModelManagerError as error:
            if error.code != "ERR_DEADLINE_EXCEEDED":  # a repeat may have more time
                running.outcome.set_exception(error)
                running.outcome.exception()  # looked at: nobody may be attached
            raise
        finally:
            del self._running[key]
            if not running.outcome.done():
                running.outcome.set_result(None)

    async def _attach(self, running: _Running, request_hash: str, context: Context) -> dict[str, Any] | None:
        if running.request_hash != request_hash:
            raise ModelManagerError("ERR_CONFLICT", "This idempotency key is in use for another request.")
        self._observe.request_repeated()
        async with _Admission(self._waiting, context.deadline):
            return await asyncio.shield(running.outcome)

    async def _repeated(
        self, method: Method, params: Wire, idempotency: Idempotency, context: Context
    ) -> dict[str, Any] | None:
        """The answer to a request that had its effect, or none, already; None if it is to be run."""
        reply = self._unrecorded.get(idempotency)
        if reply is not None:
            self._observe.request_repeated()
            return reply
        if not self._registry.opened or not self._registry.knows(idempotency):
            return None
        async with _Admission(self._waiting, context.deadline):
            entry = await self._registry.recorded(idempotency)
            if entry is None:
                return None
            self._observe.request_repeated()
            return await self._service.repeat(method.name, entry, params)


def _idempotency(method: Method, params: Wire, context: Context) -> Idempotency:
    request = [method.name, params.model_dump(mode="json", by_alias=True, exclude_unset=True)]
    key = f"{context.caller}\0{context.idempotency_key}".encode()
    return {
        "key": hashlib.sha256(key).hexdigest()[:32],
        "hash": hashlib.sha256(canonical(request)).hexdigest(),
    }


def _patient(params: Wire, context: Context) -> Wire:
    """The parameters, without a `waitMs` if the request may not wait. Its hash is that of what it asked for."""
    if context.may_wait or not hasattr(params, "wait_ms"):
        return params
    return params.model_copy(update={"wait_ms": 0})


def parse_params(method: Method, params: dict[str, Any]) -> Wire:
    """The parameters, checked; the error's code tells which part of the request is wrong."""
    try:
        return method.params.model_validate(params)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_context=False, include_input=False)
        shown = [
            {"path": _place(problem["loc"]), "message": _reason(problem["msg"])}
            for problem in problems[:_PROBLEMS_SHOWN]
        ]
        first = shown[0]
        message = f"{first['path']}: {first['message']}" if first["path"] else first["message"]
        raise ModelManagerError(_code(problems[0]["loc"]), message, errors=shown) from None


def _place(parts: tuple[int | str, ...]) -> str:
    return ".".join(str(part)[:_PLACE_CHARACTERS] for part in parts)  # an unknown field is as long as its sender likes


def _reason(message: str) -> str:
    return message.removeprefix("Value error, ")[:300]


def _code(place: tuple[int | str, ...]) -> str:
    match place:
        case ("metadata", *_):
            return "ERR_INVALID_METADATA"
        case ("modelData", *_) | ("files", _, "data", *_):
            return "ERR_INVALID_MODEL_DATA"
        case _:
            return "ERR_INVALID_REQUEST"
