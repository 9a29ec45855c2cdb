"""`topology check` on a broker of its own, with its management: when it calls a topology good, and what it refuses."""

from __future__ import annotations

import asyncio
import base64
import json
import subprocess
import sys
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiormq
import pytest
from aiormq.exceptions import ChannelAccessRefused

from deploy.local import RabbitMQ
from tests.amqp import broker_version, calling, delete_queues, eventually, serving
from tests.process import free_port, nobodys_environment
from worker.transport import topology
from worker.transport.dead_letter_probe import probe
from worker.transport.dead_letters import dead_letters
from worker.transport.permissions import judge
from worker.transport.topology import dead_letter_queue, provision, request_queue

VHOST = "models"


@dataclass(frozen=True)
class ManagedBroker:
    server: RabbitMQ
    management_url: str

    @contextmanager
    def user(
        self, name: str, *, write: str, calls: str | None = None, configure: str = "^model-manager-"
    ) -> Iterator[str]:
        """The address for a user who is gone afterwards."""
        self.put(f"users/{name}", password=name, tags="")
        self.put(f"permissions/{VHOST}/{name}", configure=configure, write=write, read=".*")
        if calls is not None:
            self.put(f"topic-permissions/{VHOST}/{name}", exchange=topology.RPC_EXCHANGE, write=calls, read="^$")
        try:
            yield self.server.url.replace("guest:guest", f"{name}:{name}") + VHOST
        finally:
            self.send("DELETE", f"users/{name}")

    def put(self, what: str, **values: str | bool) -> None:
        self.send("PUT", what, values)

    def send(self, verb: str, what: str, body: dict[str, str | bool] | None = None) -> Any:
        """One request to the management, as its administrator; the JSON of the answer."""
        login = base64.b64encode(b"guest:guest").decode()
        headers = {"Authorization": f"Basic {login}", "Content-Type": "application/json"}
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.management_url}api/{what}", data, headers, method=verb)
        with urllib.request.urlopen(request, timeout=20) as answer:
            return json.loads(answer.read() or b"null")


@pytest.fixture(scope="module")
def broker(broker_in: Callable[[Path], RabbitMQ], tmp_path_factory: pytest.TempPathFactory) -> ManagedBroker:
    folder, port = tmp_path_factory.mktemp("managed-broker"), free_port()
    (folder / "enabled_plugins").write_text("[rabbitmq_management].\n")
    (folder / "rabbitmq.conf").write_text(f"management.tcp.ip = 127.0.0.1\nmanagement.tcp.port = {port}\n")
    managed = ManagedBroker(broker_in(folder), f"http://127.0.0.1:{port}/")
    managed.put(f"vhosts/{VHOST}")
    managed.put(f"permissions/{VHOST}/guest", configure=".*", write=".*", read=".*")
    # Before its permissions: RabbitMQ 4.3 refuses those of an exchange that is not there.
    managed.put(f"exchanges/{VHOST}/{topology.RPC_EXCHANGE}", type="topic", durable=True)
    managed.put(f"topic-permissions/{VHOST}/guest", exchange=topology.RPC_EXCHANGE, write=".*", read=".*")
    return managed


@pytest.fixture
async def url(broker: ManagedBroker, rack: str) -> AsyncIterator[str]:
    """The broker with the rack's topology, as its administrator."""
    address = broker.server.url + VHOST
    async with aiormq.connect(address) as connection:
        assert await provision(connection, rack) == []
    yield address
    await delete_queues(address, rack)


@dataclass(frozen=True)
class Checked:
    status: int
    document: dict[str, Any]
    remarks: str

    @property
    def problems(self) -> list[tuple[str, str]]:
        return [(problem["kind"], problem["name"]) for problem in self.document["problems"]]


async def check(url: str, rack: str, *words: str) -> Checked:
    command = [sys.executable, "-m", "worker", "topology", "check", "--rack", rack, "--amqp-url", url, "-o", "json"]

    def run() -> Checked:
        ran = subprocess.run([*command, *words], capture_output=True, text=True, env=nobodys_environment(), timeout=60)
        return Checked(ran.returncode, json.loads(ran.stdout), ran.stderr)

    return await asyncio.to_thread(run)


async def test_a_topology_is_good_only_when_permissions_were_looked_at(
    broker: ManagedBroker, url: str, rack: str
) -> None:
    good = await check(url, rack, "--management-url", broker.management_url)
    assert (good.status, good.problems, good.document["unchecked"], good.remarks) == (0, [], [], "")
    half = await check(url, rack)
    assert half.status == 0
    assert "NOT CHECKED: who may call what" in half.remarks
    assert len(half.document["unchecked"]) == 1


async def test_a_user_without_a_topic_permission_may_call_everything_and_is_refused(
    broker: ManagedBroker, url: str, rack: str
) -> None:
    rpc_only, ping_only = "^model-manager\\.rpc$", "\\.ping$"
    with (
        broker.user("eve", write=rpc_only) as eve_url,
        broker.user("bob", write=rpc_only, calls=ping_only) as bob_url,
        broker.user("carol", write="^(model-manager\\.rpc|amq\\.default)$", calls=ping_only) as carol_url,
    ):
        async with calling(eve_url, rack) as eve:
            await eve.publish("deleteModel")
        async with calling(bob_url, rack) as bob:
            with pytest.raises(ChannelAccessRefused):
                await bob.publish("deleteModel")
        async with calling(carol_url, rack) as carol:
            await carol.publish("deleteModel", exchange="", key=request_queue(rack))
        checked = await check(url, rack, "--management-url", broker.management_url)
    assert checked.status == 1
    assert checked.problems == [("open", "user carol"), ("open", "user eve")]
    carol_reason, eve_reason = (problem["reason"] for problem in checked.document["problems"])
    assert "default exchange" in carol_reason
    assert "without a topic permission" in eve_reason


async def test_permissions_that_went_with_their_exchange_are_missed_when_it_is_made_again(
    broker: ManagedBroker, url: str, rack: str
) -> None:
    """From RabbitMQ 4.3 on they go with it."""
    with broker.user("frank", write="^model-manager\\.rpc$", calls="\\.ping$"):
        broker.send("DELETE", f"exchanges/{VHOST}/{topology.RPC_EXCHANGE}")
        async with aiormq.connect(url) as connection:
            assert await provision(connection, rack) == []
            lost = broker_version(connection) >= (4, 3)
        checked = await check(url, rack, "--management-url", broker.management_url)
    broker.put(f"topic-permissions/{VHOST}/guest", exchange=topology.RPC_EXCHANGE, write=".*", read=".*")
    assert checked.problems == ([("open", "user frank"), ("open", "user guest")] if lost else [])


async def test_a_login_that_may_not_see_permissions_checks_nothing_and_says_so(
    broker: ManagedBroker, url: str, rack: str
) -> None:
    with broker.user("dan", write="^model-manager", calls=".*") as dan_url:
        management = broker.management_url.replace("//", "//dan:dan@")
        for address, reason in ((management, "administrators only"), (f"http://127.0.0.1:{free_port()}", "be asked")):
            checked = await check(url, rack, "--management-url", address)
            assert (checked.status, checked.problems) == (1, [("unverified", "who may call what")])
            assert reason in checked.document["problems"][0]["reason"]
        # Of the objects he sees as much as an administrator: the probe needs no default exchange.
        assert await probe(dan_url, rack) is None


async def test_a_probe_finds_the_way_beside_a_worker_and_touches_nothing_else(url: str, rack: str) -> None:
    async with serving(url, rack, delete=False) as served, calling(url, rack) as caller:
        for number in range(5):
            await caller.publish("fail", b'{"n":%d}' % number, reply_to=None, message_id=f"m-{number}")
        await caller.until_depth(dead_letter_queue(rack), 5)
        await caller.publish("slow", headers={"x-idempotency-key": "k"})
        for _ in range(3):
            assert await probe(url, rack) is None
        served.dispatcher.released.set()
        await eventually(lambda: len(caller.replies) == 1, "the reply to slow")  # `call` takes whatever comes
        assert (await caller.call("echo")).body["success"]
        assert served.dispatcher.started == {"fail": 5, "slow": 1, "echo": 1}
        async with dead_letters(url, rack) as letters:
            assert [letter.message_id async for letter in letters.read()] == [f"m-{number}" for number in range(5)]


async def test_a_way_that_leads_nowhere_is_told_and_leaves_no_probe_behind(
    broker: ManagedBroker, url: str, rack: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with aiormq.connect(url) as connection:
        channel = await connection.channel()
        await channel.queue_unbind(dead_letter_queue(rack), topology.DEAD_EXCHANGE, rack)
        with monkeypatch.context() as patched:
            patched.setattr("worker.transport.dead_letter_probe.ARRIVAL_S", 2.0)
            problem = await probe(url, rack)
            assert problem is not None
            assert (problem.kind, problem.name) == ("broken", "the way of dead letters")
        assert (await check(url, rack, "--no-probe")).problems == []
        await channel.queue_bind(dead_letter_queue(rack), topology.DEAD_EXCHANGE, rack)
        assert await probe(url, rack) is None
        assert (await channel.queue_declare(dead_letter_queue(rack), passive=True)).message_count == 0
    queues = [queue["name"] for queue in broker.send("GET", f"queues/{VHOST}")]
    assert sorted(queues) == sorted((request_queue(rack), dead_letter_queue(rack)))


async def test_a_login_that_may_not_send_a_probe_says_so(broker: ManagedBroker, url: str, rack: str) -> None:
    with broker.user("reader", write="^$", configure="^$") as reader_url:
        checked = await check(
            reader_url, rack, "--management-url", broker.management_url.replace("//", "//guest:guest@")
        )
    assert checked.status == 1
    assert ("unverified", "the way of dead letters") in checked.problems


@pytest.mark.parametrize(
    ("write", "calls", "good"),
    [
        ("^$", None, True),
        ("", None, True),
        ("^model-manager\\.rpc$", "^rack-1\\.ping$", True),
        ("rpc", None, False),
        (".*", None, False),
        (".*", "^[a-z0-9-]+\\.(ping|getModel)$", False),
        (".*", ".*", True),
        ("^(amq\\.default|model-manager\\.hints)$", None, True),  # a worker
        ("(?<broken", None, False),
    ],
)
def test_permissions_are_read_as_the_broker_reads_them(write: str, calls: str | None, good: bool) -> None:
    topics = [] if calls is None else [{"user": "u", "exchange": topology.RPC_EXCHANGE, "write": calls}]
    elsewhere = [{"user": "u", "exchange": "another", "write": ".*"}]
    assert (judge([{"user": "u", "write": write}], topics + elsewhere) == []) is good
