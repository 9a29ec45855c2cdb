"""TLS to a real broker: whom the worker and the client trust, how they log in, and certificates that change."""

from __future__ import annotations

import asyncio
import itertools
import json
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from deploy.local import RabbitMQ
from tests.amqp import CountingObserver, EffectDispatcher, calling, eventually
from tests.certificates import Authority, Identity
from tests.process import Processes
from tests.secured_broker import SecuredBroker, secured_broker
from worker.broker_url import with_tls
from worker.client.amqp_caller import AmqpCaller
from worker.client.caller import Unreachable
from worker.client.client import ModelManagerClient
from worker.client.hints import hints
from worker.transport import link, topology
from worker.transport.amqp import AmqpTransport
from worker.transport.connections import LinkLostError, close_connection, open_connection
from worker.transport.definitions import VHOST
from worker.transport.link import Broker

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")

# The broker's alert says so; but it resets the connection behind it, which may overtake the alert.
WITHOUT_CERTIFICATE = r"certificate required|does it ask for a client certificate\?"


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def broker(
    authority: Authority, broker_in: Callable[[Path], RabbitMQ], tmp_path_factory: pytest.TempPathFactory
) -> SecuredBroker:
    return secured_broker(tmp_path_factory.mktemp("tls-broker"), broker_in, authority=authority)


@pytest.fixture(scope="module")
def orchestrator(authority: Authority) -> Identity:
    return authority.issue("/CN=orchestrator", "orchestrator")


@pytest.fixture
def worker(authority: Authority) -> Identity:
    return authority.issue("/O=first/CN=worker-rack-1", "worker")


def trusting(url: str, authority: Authority, identity: Identity | None = None) -> str:
    if identity is None:
        return with_tls(url, ca_file=authority.certificate)
    return with_tls(url, ca_file=authority.certificate, certificate_file=identity.certificate, key_file=identity.key)


# --- trust and login ---


async def test_a_worker_and_its_callers_log_in_with_certificates(
    broker: SecuredBroker, authority: Authority, orchestrator: Identity, worker: Identity, tmp_path: Path
) -> None:
    settings = {
        "rack": "rack-1",
        "amqp.url": broker.tls_url("worker-rack-1"),
        "amqp.caFile": str(authority.certificate),
        "amqp.certificateFile": str(worker.certificate),
        "amqp.keyFile": str(worker.key),
        "amqp.provision": False,
    }
    url = trusting(broker.tls_url("orchestrator"), authority, orchestrator)
    processes = Processes(tmp_path)
    try:
        service = processes.start("worker", settings=settings)
        await asyncio.to_thread(service.until_ready)
        async with ModelManagerClient(AmqpCaller(url, "rack-1"), timeout_s=20) as client:
            await client.store_model("acme/tls", {"type": "custom"}, model_data="AAEC")
            assert (await client.get_model("acme/tls"))["modelData"] == "AAEC"
            found = await connections(broker)
        assert {(one["user"], one["auth_mechanism"], one["ssl"]) for one in found} == {
            ("worker-rack-1", "EXTERNAL", True),
            ("orchestrator", "EXTERNAL", True),
        }
        assert await asyncio.to_thread(service.stop) == 0
    finally:
        await asyncio.to_thread(processes.__exit__, None, None, None)


async def connections(broker: SecuredBroker) -> list[dict[str, Any]]:
    columns = ("user", "auth_mechanism", "ssl", "peer_cert_subject")
    text = await asyncio.to_thread(broker.server.ctl, "list_connections", *columns, "--formatter", "json")
    return list(json.loads(text))


async def test_a_password_works_over_tls(broker: SecuredBroker, authority: Authority, orchestrator: Identity) -> None:
    login = f"inference:{broker.passwords['inference']}"
    connection = await open_connection(trusting(broker.tls_url(login), authority, orchestrator), "test")
    try:
        found = await connections(broker)
    finally:
        await close_connection(connection)
    assert [(one["user"], one["auth_mechanism"], one["ssl"]) for one in found] == [("inference", "PLAIN", True)]


async def test_a_broker_of_another_authority_is_not_trusted(
    broker: SecuredBroker, orchestrator: Identity, tmp_path: Path
) -> None:
    stranger = Authority(tmp_path, "stranger")
    url = trusting(broker.tls_url("orchestrator"), stranger, orchestrator)
    with pytest.raises(LinkLostError, match=r"^the broker's certificate is not trusted: "):
        await open_connection(url, "test")
    async with ModelManagerClient(AmqpCaller(url, "rack-1"), timeout_s=20) as client:
        with pytest.raises(Unreachable, match="The broker's certificate is not trusted: "):
            await client.ping()


async def test_a_broker_of_another_name_is_not_trusted(
    broker: SecuredBroker, authority: Authority, orchestrator: Identity
) -> None:
    url = trusting(broker.tls_url("orchestrator", host="localhost"), authority, orchestrator)
    with pytest.raises(LinkLostError, match="not trusted: Hostname mismatch"):
        await open_connection(url, "test")


async def test_without_a_certificate_nobody_gets_in(broker: SecuredBroker, authority: Authority) -> None:
    login = f"inference:{broker.passwords['inference']}"
    url = trusting(broker.tls_url(login), authority)
    with pytest.raises(LinkLostError, match=WITHOUT_CERTIFICATE):
        await open_connection(url, "test")
    with pytest.raises(Unreachable, match=WITHOUT_CERTIFICATE):
        await hints(url, "rack-2").__aenter__()


async def test_a_certificate_for_nobody_we_know_is_no_login(broker: SecuredBroker, authority: Authority) -> None:
    nobody = authority.issue("/CN=nobody", "nobody")
    with pytest.raises(LinkLostError, match="the broker refused the login"):
        await open_connection(trusting(broker.tls_url("nobody"), authority, nobody), "test")


# --- certificates that change ---


class Served:
    """The transport of rack-1 with its certificate, and callers that never rest."""

    def __init__(self, broker: SecuredBroker, authority: Authority, identity: Identity) -> None:
        self.dispatcher, self.observer = EffectDispatcher(), CountingObserver()
        url = trusting(broker.tls_url("worker-rack-1"), authority, identity)
        self.transport = AmqpTransport(
            broker=Broker(lambda: url, (identity.certificate, identity.key)),
            rack="rack-1",
            provision=False,
            dispatcher=self.dispatcher,
            observer=self.observer,
        )
        self.caller = AmqpCaller(broker.url("orchestrator"), "rack-1")
        self.replies: list[dict[str, Any]] = []
        self._keys = itertools.count()
        self._resting = False

    async def call_on(self) -> None:
        while not self._resting:
            key = f"key-{next(self._keys)}"
            self.replies.append(await self.caller.call("count", {}, timeout_s=20, idempotency_key=key))

    async def until_answered(self, more: int) -> None:
        wanted = len(self.replies) + more
        await eventually(lambda: len(self.replies) >= wanted, f"{more} more replies")

    def rest(self) -> None:
        self._resting = True


@asynccontextmanager
async def serving(broker: SecuredBroker, authority: Authority, identity: Identity) -> AsyncIterator[Served]:
    served = Served(broker, authority, identity)
    await served.transport.start()
    try:
        await eventually(lambda: served.transport.status.consuming, "consuming")
        async with asyncio.TaskGroup() as callers:
            for _ in range(8):
                callers.create_task(served.call_on())
            try:
                await served.until_answered(100)
                yield served
            finally:
                served.rest()
    finally:
        await served.caller.close()
        await served.transport.close()


async def organisations(broker: SecuredBroker) -> list[str]:
    """Of the certificates on the worker's connections."""
    found = await connections(broker)
    return sorted(
        "second" if "second" in one["peer_cert_subject"] else "first" for one in found if one["user"] == "worker-rack-1"
    )


async def until_organisations(broker: SecuredBroker, *wanted: str) -> None:
    async with asyncio.timeout(30):
        while (found := await organisations(broker)) != sorted(wanted):
            assert len(found) <= 4


async def test_a_new_certificate_is_used_without_a_restart_and_without_a_request_lost_or_repeated(
    broker: SecuredBroker, authority: Authority, worker: Identity, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link, "LINGER_LEAST_S", 3.0)
    async with serving(broker, authority, worker) as served, calling(broker.url("orchestrator"), "rack-1") as patient:
        await patient.publish("slow", message_id="begun before")  # by a caller that does not send it again
        await eventually(lambda: served.dispatcher.started["slow"] == 1, "the slow request to begin")
        assert await organisations(broker) == ["first", "first"]
        authority.issue("/O=second/CN=worker-rack-1", "worker")
        await until_organisations(broker, "first", "second", "second")  # the slow request is still on its connection
        await served.until_answered(100)
        assert served.transport.status.connected
        served.dispatcher.released.set()
        await eventually(lambda: patient.replies, "the reply to what was begun before")
        assert patient.replies[0].body["effects"] == 1
        await until_organisations(broker, "second", "second")
        await served.until_answered(100)
    assert {reply["effects"] for reply in served.replies} == {1}
    assert set(served.dispatcher.effects.values()) == {1}
    # Each request came once; one that the broker had on the way when a consumer ended is marked as a redelivery.
    assert served.dispatcher.started == {"slow": 1, "count": len(served.replies)}
    unwanted = {"requeued", "ack_lost", "reconnected", "reply_unroutable"}
    assert not unwanted & served.observer.counts.keys()
    assert served.caller.late_replies == 0
    async with asyncio.timeout(20):
        while await left_in_queue(broker):  # the broker counts now and then
            pass


async def left_in_queue(broker: SecuredBroker) -> int:
    columns = ("-p", VHOST, "name", "messages")
    text = await asyncio.to_thread(broker.server.ctl, "list_queues", *columns, "--formatter", "json")
    return int({one["name"]: one["messages"] for one in json.loads(text)}[topology.request_queue("rack-1")])


async def test_a_certificate_that_does_not_work_changes_nothing_until_it_does(
    broker: SecuredBroker,
    authority: Authority,
    worker: Identity,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with serving(broker, authority, worker) as served:
        stranger = Authority(tmp_path, "stranger").issue("/O=second/CN=worker-rack-1", "worker")
        shutil.copyfile(stranger.certificate, worker.certificate)
        await eventually(lambda: "do not work" in caplog.text, "a warning for a certificate that is not the key's")
        caplog.clear()
        shutil.copyfile(stranger.key, worker.key)
        await eventually(lambda: "do not work" in caplog.text, "a warning for a certificate of a stranger")
        await served.until_answered(100)
        assert await organisations(broker) == ["first", "first"]
        authority.issue("/O=second/CN=worker-rack-1", "worker")
        async with asyncio.timeout(30):
            while (await organisations(broker)).count("second") < 2:
                await served.until_answered(10)
    assert served.dispatcher.started["count"] == len(served.replies)
