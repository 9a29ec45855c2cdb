"""Who may do what on the broker: a fresh one with the definitions, a real worker behind it, each role before it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiormq
import pytest
from aiormq.abc import AbstractChannel
from aiormq.exceptions import AMQPError, ChannelAccessRefused, ChannelPreconditionFailed
from pamqp.commands import Basic

from deploy.local import RabbitMQ
from schemas.errors import ModelManagerError
from schemas.rpc import METHODS
from tests.amqp import calling
from tests.process import Processes, Service
from tests.secured_broker import SHIPPED, SecuredBroker, run_topology, secured_broker
from worker.client.amqp_caller import AmqpCaller
from worker.client.client import ModelManagerClient
from worker.client.hints import hints
from worker.transport import topology
from worker.transport.definitions import VHOST
from worker.transport.roles import LOOKUPS, REPLICATION, UPLOADS

CALLERS: dict[str, set[str]] = {
    "orchestrator": set(METHODS),
    "inference": set(LOOKUPS),
    "uploader": set(UPLOADS),
    "operator": set(METHODS),
    "worker-rack-2": set(REPLICATION),
}
OUTSIDERS = ("listener", "monitoring")
METADATA = {"type": "custom"}


@pytest.fixture(scope="module")
def broker(broker_in: Callable[[Path], RabbitMQ], tmp_path_factory: pytest.TempPathFactory) -> SecuredBroker:
    return secured_broker(tmp_path_factory.mktemp("secured-broker"), broker_in)


@pytest.fixture(scope="module")
def worker(broker: SecuredBroker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """The worker of rack-1, as its own user; rack-2 has none."""
    with Processes(tmp_path_factory.mktemp("worker")) as processes:
        settings = {"rack": "rack-1", "amqp.url": broker.url("worker-rack-1"), "amqp.provision": False}
        service = processes.start("worker", settings=settings).until_ready()
        yield service
        assert service.stop() == 0


@asynccontextmanager
async def client_of(broker: SecuredBroker, user: str) -> AsyncIterator[ModelManagerClient]:
    async with ModelManagerClient(AmqpCaller(broker.url(user), "rack-1"), timeout_s=20) as client:
        yield client


@asynccontextmanager
async def channel_of(broker: SecuredBroker, user: str) -> AsyncIterator[AbstractChannel]:
    async with aiormq.connect(broker.url(user)) as connection:
        yield await connection.channel()


async def is_refused(broker: SecuredBroker, user: str, act: Callable[[AbstractChannel], Any]) -> bool:
    """Whether the broker refuses that to the user, on a channel of its own."""
    try:
        async with channel_of(broker, user) as channel:
            await act(channel)
    except ChannelAccessRefused:
        return True
    return False


async def ignored(message: object) -> None: ...


# --- what is loaded ---


def test_a_fresh_broker_has_the_users_of_the_definitions_and_no_other(broker: SecuredBroker) -> None:
    found = json.loads(broker.server.ctl("list_users", "--formatter", "json"))
    assert {user["user"] for user in found} == broker.passwords.keys()


async def test_a_fresh_broker_has_the_topology_of_both_racks(broker: SecuredBroker) -> None:
    async with aiormq.connect(broker.url("operator")) as connection:
        for rack in ("rack-1", "rack-2"):
            assert await topology.check(connection, rack) == []


async def test_passwords_change_with_the_definitions_and_without_any_nobody_logs_in(broker: SecuredBroker) -> None:
    assert await logs_in(broker.url("inference"))
    broker.server.ctl("import_definitions", str(SHIPPED / "definitions.json"))
    try:
        for user in broker.passwords:
            for password in (broker.passwords[user], "", user):
                assert not await logs_in(broker.url(user, password)), user
    finally:
        broker.server.ctl("import_definitions", str(broker.definitions))
    assert await logs_in(broker.url("inference"))


async def logs_in(url: str) -> bool:
    try:
        await (await aiormq.connect(url)).close()
    except AMQPError:
        return False
    return True


# --- callers ---


@pytest.mark.parametrize("user", CALLERS)
async def test_a_caller_may_call_its_methods_and_no_others(broker: SecuredBroker, worker: Service, user: str) -> None:
    refused = set()
    async with client_of(broker, user) as client:
        for method in METHODS:
            try:
                await client.call(method, modelId="no model", jobId="no job", uploadId="no upload")
            except ModelManagerError as error:
                if error.code == "ERR_FORBIDDEN":
                    refused.add(method)
    assert refused == METHODS.keys() - CALLERS[user]


async def test_a_login_for_one_method_is_refused_for_another(broker: SecuredBroker, worker: Service) -> None:
    ctl, password = broker.server.ctl, "only-for-this-test"
    ctl("add_user", "reader", password)
    ctl("set_permissions", "-p", VHOST, "reader", "^amq\\.gen-.+$", "^model-manager\\.rpc$", "^amq\\.gen-.+$")
    ctl("set_topic_permissions", "-p", VHOST, "reader", topology.RPC_EXCHANGE, "^[a-z0-9-]+\\.getModel$", "^$")
    async with client_of(broker, "orchestrator") as owner:
        await owner.store_model("acme/read", METADATA, model_data="AAEC")
    async with ModelManagerClient(AmqpCaller(broker.url("reader", password), "rack-1"), timeout_s=20) as client:
        assert (await client.get_model("acme/read"))["modelData"] == "AAEC"
        for forbidden in (client.delete_model("acme/read"), client.get_model_metadata("acme/read")):
            with pytest.raises(ModelManagerError) as caught:
                await forbidden
            assert caught.value.code == "ERR_FORBIDDEN"
        assert (await client.get_model("acme/read"))["modelData"] == "AAEC", "it is still there, and so is the caller"


async def test_an_orchestrator_stores_names_checks_and_deletes(broker: SecuredBroker, worker: Service) -> None:
    async with client_of(broker, "orchestrator") as client:
        stored = await client.store_model("acme/made", METADATA, model_data="AAEC")
        await client.set_alias("acme/made", "stable", stored["version"])
        assert (await client.outcome(await client.validate_model("acme/made", "stable", wait_ms=0)))["isValid"]
        assert (await client.delete_model("acme/made"))["versions"] == [stored["version"]]


async def test_an_uploader_pushes_and_an_inference_worker_pulls(
    broker: SecuredBroker, worker: Service, tmp_path: Path
) -> None:
    weights = tmp_path / "weights.bin"
    weights.write_bytes(b"weights" * 1000)
    async with client_of(broker, "uploader") as client:
        await client.push(weights, "acme/pushed", "1.0.0", metadata=METADATA)
    async with client_of(broker, "inference") as client:
        await client.pull("acme/pushed", destination=tmp_path / "there")
        assert (tmp_path / "there").read_bytes() == weights.read_bytes()


@pytest.mark.parametrize("user", ["orchestrator", "inference", "uploader"])
async def test_replies_reach_a_caller_directly_and_on_queues_of_its_own(
    broker: SecuredBroker, worker: Service, user: str
) -> None:
    async with calling(broker.url(user), "rack-1") as caller:
        assert (await caller.call("ping", user_id=user)).body["success"]
        for name in ("", f"model-manager.reply.{user}.1"):
            declared = await caller.channel.queue_declare(name, durable=True, exclusive=not name)
            assert declared.queue is not None
            await caller.consume(declared.queue)
            assert (await caller.call("ping", reply_to=declared.queue)).body["success"]
        await caller.channel.queue_delete(f"model-manager.reply.{user}.1")


async def test_a_caller_has_no_part_in_the_queues_of_others(broker: SecuredBroker) -> None:
    others = ("model-manager.reply.orchestrator.1", "model-manager-rack-1", "model-manager-rack-1.dead", "mine")
    for name in others:
        assert await is_refused(broker, "inference", lambda c, q=name: c.queue_declare(q, durable=True))
        assert await is_refused(broker, "inference", lambda c, q=name: c.basic_get(q))
        assert await is_refused(broker, "inference", lambda c, q=name: c.queue_delete(q))
        assert await is_refused(
            broker, "inference", lambda c, q=name: c.basic_publish(b"{}", exchange="", routing_key=q)
        )


async def test_a_caller_cannot_listen_to_the_requests_of_others(broker: SecuredBroker) -> None:
    async def bind(channel: AbstractChannel) -> None:
        queue = (await channel.queue_declare(exclusive=True)).queue
        await channel.queue_bind(queue or "", topology.RPC_EXCHANGE, "#")

    assert await is_refused(broker, "orchestrator", bind)


# --- the name of the caller ---


async def test_a_caller_cannot_give_another_name_than_its_own(broker: SecuredBroker, worker: Service) -> None:
    async with calling(broker.url("inference"), "rack-1") as caller:
        assert (await caller.call("ping", user_id="inference")).body["success"]
        with pytest.raises(ChannelPreconditionFailed, match="user_id"):
            await caller.publish("ping", user_id="orchestrator")


async def test_the_worker_tells_callers_apart_by_their_login(broker: SecuredBroker, worker: Service) -> None:
    async def store(user: str, data: str) -> None:
        async with client_of(broker, user) as client:
            await client.store_model(f"acme/by-{user}", METADATA, model_data=data, idempotency_key="the same key")

    await store("orchestrator", "AAEC")
    await store("uploader", "AAEC")
    with pytest.raises(ModelManagerError, match="ERR_CONFLICT"):
        await store("uploader", "AwQF")


# --- workers ---


async def test_a_worker_serves_its_own_rack_and_cannot_take_what_is_anothers(
    broker: SecuredBroker, worker: Service
) -> None:
    for queue in (topology.request_queue("rack-2"), topology.dead_letter_queue("rack-2")):
        assert await is_refused(broker, "worker-rack-1", lambda c, q=queue: c.basic_consume(q, ignored))
        assert await is_refused(broker, "worker-rack-1", lambda c, q=queue: c.basic_get(q))
        assert await is_refused(broker, "worker-rack-1", lambda c, q=queue: c.queue_purge(q))
    assert not await is_refused(broker, "worker-rack-2", lambda c: c.basic_consume("model-manager-rack-2", ignored))


def test_a_worker_started_for_the_rack_of_another_gets_no_request(broker: SecuredBroker, tmp_path: Path) -> None:
    settings = {"rack": "rack-2", "amqp.url": broker.url("worker-rack-1"), "amqp.provision": False}
    with Processes(tmp_path) as processes:
        service = processes.start("worker", settings=settings)
        service.until(lambda: "refused" in str(service.checks().get("broker")), "refused by the broker")
        assert not service.ready
    assert asyncio.run(_consumers(broker, topology.request_queue("rack-2"))) == 0


def test_a_worker_takes_a_new_password_from_its_file_without_a_restart(broker: SecuredBroker, tmp_path: Path) -> None:
    address = tmp_path / "address"
    address.touch(0o600)
    address.write_text(broker.url("worker-rack-2"))
    settings = {"rack": "rack-2", "amqp.urlFile": str(address), "amqp.provision": False}
    with Processes(tmp_path) as processes:
        service = processes.start("worker", settings=settings).until_ready()
        try:
            address.write_text(broker.url("worker-rack-2", "a-wrong-password"))
            service.until(lambda: "do not work" in service.log, "a warning, and the old connections stay in use")
            address.write_text(broker.url("worker-rack-2", "the-new-password").partition("@")[0])  # half written
            service.until(lambda: "is not an AMQP URL" in service.log, "a warning for half an address")
            assert "the-new" not in service.log
            assert service.ready
            address.write_text(broker.url("worker-rack-2", "the-new-password"))
            service.until(lambda: service.log.count("do not work") == 3, "a warning for what the broker does not know")
            broker.server.ctl("change_password", "worker-rack-2", "the-new-password")
            service.until(lambda: "use its new credentials" in service.log, "the new password is in use")
            assert service.ready
            service.until(
                lambda: asyncio.run(_consumers(broker, "model-manager-rack-2")) == 1, "consuming on a new connection"
            )
            assert service.stop() == 0
        finally:
            broker.server.ctl("import_definitions", str(broker.definitions))


async def _consumers(broker: SecuredBroker, queue: str) -> int | None:
    async with channel_of(broker, "operator") as channel:
        return (await channel.queue_declare(queue, passive=True)).consumer_count


async def test_a_worker_can_neither_change_other_racks_nor_the_topology(broker: SecuredBroker) -> None:
    user, queue = "worker-rack-1", topology.request_queue("rack-1")
    publish = {"exchange": topology.RPC_EXCHANGE, "routing_key": "rack-2.storeModel"}
    assert await is_refused(broker, user, lambda c: c.basic_publish(b"{}", **publish))
    assert await is_refused(broker, user, lambda c: c.queue_delete(queue))
    assert await is_refused(broker, user, lambda c: c.queue_unbind(queue, topology.RPC_EXCHANGE, "rack-1.*"))
    assert await is_refused(broker, user, lambda c: c.exchange_delete(topology.HINT_EXCHANGE))


def test_a_worker_holds_copies_of_other_racks_with_the_rights_it_has(
    broker: SecuredBroker, worker: Service, tmp_path: Path
) -> None:
    async def replicate() -> Any:
        async with client_of(broker, "orchestrator") as client:
            await client.store_model("acme/copied", METADATA, model_data="AAEC")
            return await client.outcome(await client.replicate_model("acme/copied", peers=["rack-2"]))

    settings = {"rack": "rack-2", "amqp.url": broker.url("worker-rack-2"), "amqp.provision": False}
    with Processes(tmp_path) as processes:
        other = processes.start("worker", settings=settings).until_ready()
        report = asyncio.run(replicate())
        assert (report["successfulReplications"], report["failedReplications"]) == (1, 0)
        content = other.send("GET", "/api/models/acme/copied/versions/1.0.0/content")
        assert content.body == bytes([0, 1, 2])
        assert other.stop() == 0


# --- the others ---


async def test_a_listener_hears_hints_and_can_do_nothing_else(broker: SecuredBroker, worker: Service) -> None:
    async with hints(broker.url("listener"), "rack-2") as heard, client_of(broker, "orchestrator") as client:
        await client.store_model("acme/heard", METADATA, model_data="AAEC")
        async with asyncio.timeout(20):
            assert [hint["subject"] async for hint in _first(heard, "model-manager.version.stored")] == ["acme/heard"]
    for exchange in (topology.RPC_EXCHANGE, topology.HINT_EXCHANGE, topology.DEAD_EXCHANGE, ""):
        publish = {"exchange": exchange, "routing_key": "rack-1.ping"}
        assert await is_refused(broker, "listener", lambda c, p=publish: c.basic_publish(b"{}", **p))
    for queue in (topology.request_queue("rack-1"), topology.dead_letter_queue("rack-1")):
        assert await is_refused(broker, "listener", lambda c, q=queue: c.basic_get(q))
    assert await is_refused(broker, "listener", _bind_to_requests)


async def _first(heard: AsyncIterator[Any], kind: str) -> AsyncIterator[Any]:
    async for hint in heard:
        if hint["type"] == kind:
            yield hint
            return


async def _bind_to_requests(channel: AbstractChannel) -> None:
    queue = topology.new_hint_queue("rack-2")
    await channel.queue_declare(queue, exclusive=True)
    await channel.queue_bind(queue, topology.RPC_EXCHANGE, "#")


def test_an_operator_checks_and_repairs_the_topology(broker: SecuredBroker) -> None:
    flags = ("--rack", "rack-2", "--amqp-url", broker.url("operator"))
    assert run_topology("check", *flags) == "the topology of rack-2 is good, as far as it was checked\n"
    asyncio.run(_delete(broker, topology.request_queue("rack-2")))
    assert run_topology("check", *flags, status=1) == "missing: model-manager-rack-2\n"
    assert run_topology("provision", *flags) == "the topology of rack-2 is good\n"
    assert run_topology("check", *flags) == "the topology of rack-2 is good, as far as it was checked\n"


async def _delete(broker: SecuredBroker, queue: str) -> None:
    async with channel_of(broker, "operator") as channel:
        await channel.queue_delete(queue)


async def test_an_operator_takes_a_dead_letter_and_sends_it_again_in_the_name_of_its_sender(
    broker: SecuredBroker, worker: Service
) -> None:
    async with calling(broker.url("orchestrator"), "rack-1") as caller:
        await caller.publish("getModel", {"modelId": "acme/none"}, reply_to=None, user_id="orchestrator")
    async with calling(broker.url("operator"), "rack-1") as operator:
        letter = await operator.dead_letter()
        assert (letter.header.properties.headers or {})["x-error-code"] == "ERR_MODEL_NOT_FOUND"
        again = await operator.call("getModel", letter.body, user_id="orchestrator")
        assert again.code == "ERR_MODEL_NOT_FOUND"


@pytest.mark.parametrize("user", OUTSIDERS)
async def test_who_is_no_caller_cannot_call(broker: SecuredBroker, user: str) -> None:
    async def publish(channel: AbstractChannel) -> None:
        properties = Basic.Properties(reply_to="amq.rabbitmq.reply-to")
        await channel.basic_consume("amq.rabbitmq.reply-to", ignored, no_ack=True)
        await channel.basic_publish(
            b"{}", exchange=topology.RPC_EXCHANGE, routing_key="rack-1.ping", properties=properties
        )

    assert await is_refused(broker, user, publish)


async def test_monitoring_has_access_to_no_object(broker: SecuredBroker) -> None:
    for queue in (topology.request_queue("rack-1"), topology.dead_letter_queue("rack-1")):
        assert await is_refused(broker, "monitoring", lambda c, q=queue: c.basic_get(q))
        assert await is_refused(broker, "monitoring", lambda c, q=queue: c.queue_declare(q, durable=True))
    for exchange in (topology.HINT_EXCHANGE, topology.DEAD_EXCHANGE, ""):
        publish = {"exchange": exchange, "routing_key": "rack-1"}
        assert await is_refused(broker, "monitoring", lambda c, p=publish: c.basic_publish(b"{}", **p))
