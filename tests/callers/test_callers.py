"""Callers in Node and Go, written from the documents alone: they keep the contract against a real worker."""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.amqp import eventually, serving
from tests.process import Processes
from tests.wire import wire

pytestmark = pytest.mark.broker


class Program:
    """A caller that runs: calls go to its stdin, answers come from its stdout."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._numbers = itertools.count(1)
        self._waiters: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self.answered: list[int] = []
        self.hints: list[dict[str, Any]] = []

    async def read(self) -> None:
        assert self._process.stdout is not None
        async for line in self._process.stdout:
            answer = json.loads(line)
            if "hint" in answer:
                self.hints.append(answer["hint"])
            else:
                self.answered.append(answer["id"])
                self._waiters.pop(answer["id"]).set_result(answer)

    def begin(
        self, method: str, params: dict[str, Any] | None = None, **options: Any
    ) -> asyncio.Future[dict[str, Any]]:
        number = next(self._numbers)
        answer = self._waiters[number] = asyncio.get_running_loop().create_future()
        assert self._process.stdin is not None
        request = {"id": number, "method": method, "params": params or {}, "timeoutMs": 30_000, **options}
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        return answer

    async def reply(self, method: str, params: dict[str, Any] | None = None, **options: Any) -> dict[str, Any]:
        answer = await asyncio.wait_for(self.begin(method, params, **options), 40)
        assert "error" not in answer, answer
        return dict(answer["reply"])

    async def error(self, method: str, params: dict[str, Any] | None = None, **options: Any) -> dict[str, Any]:
        answer = await asyncio.wait_for(self.begin(method, params, **options), 40)
        assert "reply" not in answer, answer
        return dict(answer["error"])

    async def end(self) -> int:
        """Close its stdin; the exit status."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        return await asyncio.wait_for(self._process.wait(), 20)


@asynccontextmanager
async def running(command: list[str], url: str, rack: str) -> AsyncIterator[Program]:
    process = await asyncio.create_subprocess_exec(
        *command, url, rack, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, limit=8 * 1024**2
    )
    program = Program(process)
    reading = asyncio.create_task(program.read())
    try:
        yield program
        assert await program.end() == 0
        await reading
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        reading.cancel()


@pytest.fixture(params=["node", "go"])
def caller(request: pytest.FixtureRequest) -> list[str]:
    """The command of a caller, up to its arguments."""
    command: list[str] = request.getfixturevalue(f"{request.param}_caller")
    return command


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    with Processes(tmp_path) as started:
        yield started


async def test_it_stores_and_looks_up_at_a_real_worker_and_hears_of_the_change(
    caller: list[str], processes: Processes, amqp_url: str, rack: str
) -> None:
    service = processes.start("worker", settings={"amqp.url": amqp_url, "rack": rack})
    await asyncio.to_thread(service.until_ready)
    model = {"modelId": "acme/net", "metadata": {"type": "custom"}, "modelData": base64.b64encode(b"bytes").decode()}
    async with running(caller, amqp_url, rack) as program:
        assert (await program.reply("ping"))["rack"] == rack
        stored = await program.reply("storeModel", model, key="deploy-7")
        assert stored["created"]
        assert await program.reply("storeModel", model, key="deploy-7") == stored, "a repeat gets the same answer"
        assert (await program.error("storeModel", {**model, "modelId": "other"}, key="deploy-7"))[
            "code"
        ] == "ERR_CONFLICT"
        assert (await program.reply("getModel", {"modelId": "acme/net"}))["modelData"] == model["modelData"]
        missing = await program.error("getModel", {"modelId": "acme/none"})
        assert (missing["code"], missing["retryable"]) == ("ERR_MODEL_NOT_FOUND", False)
        assert (await program.error("dance"))["code"] == "ERR_UNKNOWN_METHOD"
        about = [hint for hint in program.hints if hint["source"] == f"/racks/{rack}"]
        await eventually(
            lambda: [hint for hint in program.hints if hint["subject"] == "acme/net"], f"a hint, not {about}"
        )
        head = int(program.hints[-1]["rackseq"])
        assert (await program.reply("getChanges", {"epoch": 1, "after": 0}))["head"] == head
    assert await asyncio.to_thread(service.stop) == 0


async def test_many_calls_in_flight_get_their_own_answers_in_any_order(
    caller: list[str], amqp_url: str, rack: str
) -> None:
    async with serving(amqp_url, rack) as served, running(caller, amqp_url, rack) as program:
        last = program.begin("slow", key="last")
        await eventually(lambda: served.dispatcher.started["slow"] == 1)
        replies = await asyncio.gather(*(program.reply("echo", {"n": n}) for n in range(100)))
        assert [reply["params"]["n"] for reply in replies] == list(range(100))
        served.dispatcher.released.set()
        assert (await last)["reply"]["effects"] == 1
        assert program.answered[-1] == 1, "the first call was answered last"


async def test_calls_outlive_a_cut_connection_with_one_effect_each(caller: list[str], amqp_url: str, rack: str) -> None:
    async with (
        serving(amqp_url, rack) as served,
        wire(amqp_url) as between,
        running(caller, between.url, rack) as program,
    ):
        calls = [program.begin("slow") for _ in range(20)]
        await eventually(lambda: served.dispatcher.started["slow"] >= 20, "all calls to arrive")
        between.cut()
        await eventually(lambda: served.dispatcher.started["slow"] >= 40, "all calls to arrive again")
        served.dispatcher.released.set()
        assert [(await call)["reply"]["effects"] for call in calls] == [1] * 20
        assert len(served.dispatcher.effects) == 20


async def test_no_answer_in_time_and_no_such_rack_are_told(caller: list[str], amqp_url: str, rack: str) -> None:
    async with serving(amqp_url, rack) as served, running(caller, amqp_url, rack) as program:
        late = await program.error("slow", timeoutMs=500, key="K")
        assert (late["code"], late["retryable"]) == ("ERR_DEADLINE_EXCEEDED", True)
        context = served.dispatcher.contexts[-1]
        assert context.deadline is not None
        assert context.deadline < time.monotonic() + 0.5, "the worker was told of the deadline"
        served.dispatcher.released.set()
        assert (await program.reply("echo", {"n": 1}))["params"] == {"n": 1}, "the late answer goes to nobody"
    async with serving(amqp_url, rack), running(caller, amqp_url, "no-such-rack") as program:
        started = time.monotonic()
        assert (await program.error("ping"))["code"] == "ERR_NOT_FOUND"
        assert time.monotonic() - started < 10
