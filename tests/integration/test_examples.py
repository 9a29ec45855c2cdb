"""The story that the documents tell, played over RabbitMQ to a worker that knows nothing yet.

Each example is the request that is sent and the reply that comes, member by member and value by value. Only what no
document could know differs: `WORKERS_OWN`, and the ids that it gives.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from jsonschema import Draft202012Validator

from schemas.examples import STORY, Example
from schemas.journal_examples import LABELS, RACK
from schemas.json_schemas import reply_schema
from schemas.rpc import METHODS
from tests.process import Processes
from worker.client.amqp_caller import AmqpCaller

GIVEN_BY_THE_WORKER = ("uploadId", "jobId")
# What differs from run to run, by its member's name: times, keys and addresses, the room on the disk, the archive.
WORKERS_OWN = frozenset(
    {
        "createdAt",
        "registryId",
        "modelCreatedAt",
        "deletedAt",
        "restorableUntil",
        "expiresAt",
        "time",
        "storageKey",
        "url",
        "freeBytes",
        "archivedSequence",
        "archiveLagSeconds",
    }
    | {"totalBytes"}
)


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    with Processes(tmp_path) as started:
        yield started


async def test_every_example_can_be_played_and_gets_a_reply_with_the_members_it_shows(
    processes: Processes, amqp_url: str, rack: str
) -> None:
    assert {example.method for example in STORY} == set(METHODS)
    service = processes.start("worker", settings={"amqp.url": amqp_url, "rack": rack})
    await asyncio.to_thread(service.until_ready)
    names = {RACK: rack}
    caller = AmqpCaller(amqp_url, rack)
    try:
        for example in STORY:
            reply = await caller.call(example.method, renamed(example.params, names), timeout_s=60)
            learn(example.reply, reply, names)
            check(example, reply, renamed(example.reply, names))
            if example.method == "getUpload":
                await bring_labels(reply)
    finally:
        await caller.close()
    assert await asyncio.to_thread(service.stop) == 0


def renamed(value: Any, names: dict[str, str]) -> Any:
    """The same request or reply with the names and ids of this worker, also inside of longer texts."""
    if isinstance(value, dict):
        return {member: renamed(inner, names) for member, inner in value.items()}
    if isinstance(value, list):
        return [renamed(inner, names) for inner in value]
    if isinstance(value, str):
        for shown, real in names.items():
            value = value.replace(shown, real)
    return value


def learn(shown: dict[str, Any], reply: dict[str, Any], names: dict[str, str]) -> None:
    """Remember which id of this worker stands for which one of the story."""
    for member in GIVEN_BY_THE_WORKER:
        if member in shown:
            assert names.setdefault(shown[member], reply[member]) == reply[member]


def check(example: Example, reply: dict[str, Any], shown: dict[str, Any]) -> None:
    where = f"{example.method}, {example.title!r}"
    for problem in Draft202012Validator(reply_schema(METHODS[example.method])).iter_errors(reply):
        raise AssertionError(f"{where}: {problem.json_path}: {problem.message}")
    assert determined(reply) == determined(shown), where


def determined(value: Any) -> Any:
    """The same value, with the kind of each member in place of what the worker alone could know."""
    if isinstance(value, list):
        return [determined(inner) for inner in value]
    if not isinstance(value, dict):
        return value
    return {
        member: type(inner).__name__ if member in WORKERS_OWN else determined(inner) for member, inner in value.items()
    }


async def bring_labels(upload: dict[str, Any]) -> None:
    """Put the one file that is missing to its address."""
    [missing] = [file for file in upload["files"] if not file["present"]]
    async with aiohttp.ClientSession() as session, session.put(missing["url"], data=LABELS) as answer:
        assert answer.status in (200, 201), await answer.text()
