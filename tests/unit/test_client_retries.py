"""How a call is tried again: with the same key, after what is retryable, inside its time."""

from __future__ import annotations

import asyncio
import inspect
import re
import time
from itertools import pairwise
from typing import Any

import pytest

from schemas.errors import ModelManagerError
from schemas.rpc import METHODS
from worker.client.caller import Unreachable, until_answered
from worker.client.client import ModelManagerClient
from worker.client.http_caller import HttpCaller

RENAMED = {("listModels", "type"): "model_type"}


class Attempts:
    """Fails as often as there are errors, then succeeds."""

    def __init__(self, *errors: ModelManagerError) -> None:
        self._errors = list(errors)
        self.keys: list[str | None] = []
        self.left_s: list[float] = []

    async def __call__(self, left_s: float, key: str | None) -> dict[str, Any]:
        self.keys.append(key)
        self.left_s.append(left_s)
        if self._errors:
            raise self._errors.pop(0)
        return {"success": True}


async def test_a_change_is_tried_again_with_the_same_key_and_less_time() -> None:
    attempts = Attempts(ModelManagerError("ERR_STORAGE_UNAVAILABLE"), Unreachable("lost", passing=True))
    await until_answered("storeModel", attempts, timeout_s=10, key=None)
    assert attempts.keys[0] is not None
    assert attempts.keys == [attempts.keys[0]] * 3
    assert 10 >= attempts.left_s[0] > attempts.left_s[1] > attempts.left_s[2]


async def test_two_changes_have_two_keys_and_a_lookup_has_none() -> None:
    attempts = Attempts()
    for method in ("storeModel", "storeModel", "getModel"):
        await until_answered(method, attempts, timeout_s=10, key=None)
    first, second, lookup = attempts.keys
    assert first and second and first != second
    assert lookup is None


@pytest.mark.parametrize(
    "error", [ModelManagerError("ERR_CONFLICT"), ModelManagerError("ERR_INTERNAL"), Unreachable("never reached")]
)
async def test_what_another_attempt_cannot_mend_is_told_at_once(error: ModelManagerError) -> None:
    attempts = Attempts(error)
    with pytest.raises(ModelManagerError) as caught:
        await until_answered("storeModel", attempts, timeout_s=10, key="K")
    assert caught.value is error
    assert attempts.keys == ["K"]


async def test_the_worker_says_when_to_come_back() -> None:
    attempts = Attempts(ModelManagerError("ERR_OVERLOADED", retryAfterMs=300))
    started = time.monotonic()
    await until_answered("ping", attempts, timeout_s=10, key=None)
    assert time.monotonic() - started >= 0.3


async def test_a_pause_that_would_pass_the_deadline_is_not_taken() -> None:
    attempts = Attempts(ModelManagerError("ERR_OVERLOADED", retryAfterMs=5000))
    started = time.monotonic()
    with pytest.raises(ModelManagerError, match="ERR_OVERLOADED"):
        await until_answered("ping", attempts, timeout_s=1, key=None)
    assert time.monotonic() - started < 1


@pytest.mark.parametrize("cut_after", [b"", b"HTTP/1.1 201 Created\r\nContent-Length: 99\r\n\r\n{"])
async def test_a_first_call_whose_connection_is_cut_is_tried_again_with_the_same_key(cut_after: bytes) -> None:
    keys: list[bytes] = []

    async def cut_once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        keys.append(re.findall(rb"Idempotency-Key: (\S+)", head)[0])
        answer = b'HTTP/1.1 200 OK\r\nContent-Length: 16\r\n\r\n{"success":true}'
        writer.write(cut_after if len(keys) == 1 else answer)
        writer.close()

    async with await asyncio.start_server(cut_once, "127.0.0.1", 0) as server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with ModelManagerClient(HttpCaller(url), timeout_s=10) as client:
            assert (await client.restore_model("m"))["success"] is True
    assert len(keys) == 2
    assert keys[0] == keys[1]


async def test_where_nobody_listens_is_told_at_once() -> None:
    async with ModelManagerClient(HttpCaller("http://127.0.0.1:1"), timeout_s=60) as client:
        with pytest.raises(Unreachable, match="no worker at that address"):
            await client.ping()


@pytest.mark.parametrize("method", METHODS.values(), ids=lambda method: method.name)
def test_every_method_is_there_with_all_its_parameters_and_says_what_it_does(method: Any) -> None:
    function = getattr(ModelManagerClient, snake(method.name))
    assert inspect.getdoc(function)
    wanted = {RENAMED.get((method.name, name), name) for name in method.params.model_fields}
    if method.effect:
        wanted.add("idempotency_key")
    assert set(inspect.signature(function).parameters) - {"self"} == wanted


def snake(name: str) -> str:
    return "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in name)


class Busy:
    """A rack that lets nobody wait: it answers at once, with nothing the first times."""

    def __init__(self, *replies: dict[str, Any]) -> None:
        self._replies = list(replies)
        self.asked_at: list[float] = []

    async def call(self, method: str, params: dict[str, Any], **_: Any) -> dict[str, Any]:
        self.asked_at.append(time.monotonic())
        return self._replies.pop(0)

    @property
    def pauses_s(self) -> list[float]:
        return [later - earlier for earlier, later in pairwise(self.asked_at)]


async def test_a_rack_that_does_not_let_wait_for_a_job_is_not_asked_at_once_again() -> None:
    running = {"success": True, "state": "running", "progress": {}}
    busy = Busy(running, running, {**running, "state": "succeeded", "result": {"n": 1}})
    client = ModelManagerClient(busy, timeout_s=0.4)  # type: ignore[arg-type]
    assert await client.outcome({"jobId": "J"}) == {"n": 1}
    assert min(busy.pauses_s) >= 0.19


async def test_a_rack_that_does_not_let_wait_for_a_change_is_not_asked_at_once_again() -> None:
    busy = Busy({"changes": [], "next": 1}, {"changes": [{"n": 2}], "next": 2}, {"changes": [{"n": 3}], "next": 3})
    client = ModelManagerClient(busy, timeout_s=0.4)  # type: ignore[arg-type]
    changes = client.follow(1, 1)
    assert [await anext(changes), await anext(changes)] == [{"n": 2}, {"n": 3}]
    first, second = busy.pauses_s
    assert first >= 0.19 > second, "where there are changes, there may be more"
