"""The boot: what refuses it at once, with the reason on stderr, and what it waits for, alive and saying why."""

from __future__ import annotations

import asyncio
import shutil
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
from yarl import URL

from deploy.local import ObjectStore
from schemas.errors import EXIT_CONFIG_INVALID
from tests.amqp import delete_queues
from tests.process import Processes, Service, active_segment, free_port, s3_environment

UNAVAILABLE = 7
REFUSED_WITHIN_S = 30.0


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    with Processes(tmp_path) as started:
        yield started


def refusal(service: Service, status: int) -> str:
    """The reason with which the boot was refused."""
    assert service.status(REFUSED_WITHIN_S) == status, service.log
    [refused] = service.events("boot_refused")
    assert refused["exit_code"] == status
    return str(refused["reason"])


# --- refused ---


def test_an_older_copy_of_the_registry_is_refused_and_leaves_the_archive_of_its_successor_as_it_is(
    processes: Processes,
) -> None:
    registry, archive = processes.folder / "data/registry", processes.folder / "data/models/journal"
    service = processes.start().until_ready()
    assert service.put("first", b"first").status == 201
    assert service.stop() == 0
    shutil.copytree(registry, processes.folder / "copy")
    service = processes.start(settings={"archive.periodSeconds": 0.1}).until_ready()
    assert service.put("second", b"second").status == 201
    stored = service.get("/api/stats")["registry"]["sequence"]
    service.until(lambda: service.get("/api/stats")["registry"]["archivedSequence"] >= stored, "archived")
    service.kill()
    shutil.rmtree(registry)
    shutil.copytree(processes.folder / "copy", registry)

    def archived() -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in archive.rglob("*") if path.is_file()}

    before = archived()
    assert "older copy" in refusal(processes.start(), EXIT_CONFIG_INVALID)
    assert archived() == before


@pytest.mark.parametrize(
    ("config", "key", "reason"),
    [
        ('{"nonsense": 1}', "nonsense", "no such setting"),
        ('{"http": {"prot": 1}}', "http.prot", "no such setting"),
        ('{"registry": {"path": 5}}', "registry.path", "valid string"),
        ('{"maxModelSize": "100 parsecs"}', "maxModelSize", "MiB"),
        ('{"limits": {"jobs": 0}}', "limits.jobs", "greater than or equal to 1"),
    ],
)
def test_an_unusable_config_file_is_refused_with_the_key_and_the_file(
    processes: Processes, config: str, key: str, reason: str
) -> None:
    file = processes.folder / "common.json"
    file.write_text(config)
    service = processes.start("serve", environment={"MODEL_MANAGER_CONFIG": str(file)})
    assert service.status(REFUSED_WITHIN_S) == EXIT_CONFIG_INVALID
    assert f"error: configuration: {key} ({file}): " in service.log
    assert reason in service.log


def test_an_unusable_environment_variable_is_refused_with_its_name(processes: Processes) -> None:
    service = processes.start("serve", settings={"storage.backend": "tape"})
    assert service.status(REFUSED_WITHIN_S) == EXIT_CONFIG_INVALID
    assert "storage.backend (environment MODEL_MANAGER_STORAGE__BACKEND): " in service.log


def test_an_unknown_environment_variable_is_only_warned_about(processes: Processes) -> None:
    service = processes.start("serve", environment={"MODEL_MANAGER_SERVICE_PORT": "80"}).until_ready()
    [warning] = service.events("setting_ignored")
    assert "MODEL_MANAGER_SERVICE_PORT" in warning["reason"]
    assert service.stop() == 0


def test_an_address_for_everyone_is_refused_without_a_token(processes: Processes) -> None:
    service = processes.start("serve", settings={"http.host": "0.0.0.0"})
    assert service.status(REFUSED_WITHIN_S) == EXIT_CONFIG_INVALID
    assert "http.host (environment MODEL_MANAGER_HTTP__HOST): " in service.log
    assert "http.tokenFile" in service.log


def test_a_taken_port_is_refused(processes: Processes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        service = processes.start("serve", settings={"http.port": port})
        assert f"cannot listen on 127.0.0.1:{port}" in refusal(service, EXIT_CONFIG_INVALID)


def test_a_missing_bucket_is_refused(processes: Processes, object_store: ObjectStore) -> None:
    service = processes.start(
        "serve",
        settings={
            "storage.backend": "s3",
            "storage.s3.endpointUrl": object_store.endpoint_url,
            "storage.s3.region": object_store.region,
            "storage.s3.bucket": "nobody-made-this-one",
        },
        environment=s3_environment(object_store.access_key, object_store.secret_key),
    )
    assert "nobody-made-this-one" in refusal(service, UNAVAILABLE)


def test_the_storage_of_another_registry_is_refused_until_it_is_taken_over(processes: Processes) -> None:
    first = processes.start("serve", settings={"registry.path": "first"}).until_ready()
    assert first.stop() == 0

    second = processes.start("serve", settings={"registry.path": "second"})
    reason = refusal(second, EXIT_CONFIG_INVALID)
    assert "belongs to registry" in reason
    assert "--take-over" in reason

    taken = processes.start("serve", "--take-over", settings={"registry.path": "second"}).until_ready()
    assert taken.stop() == 0
    again = processes.start("serve", settings={"registry.path": "first"})
    assert "belongs to registry" in refusal(again, EXIT_CONFIG_INVALID)


# --- the journal ---


def acknowledged(service: Service, count: int) -> list[str]:
    """Store `count` models; their names."""
    names = [f"kept-{number}" for number in range(count)]
    for name in names:
        assert service.put(name, name.encode()).status == 201
    return names


def listed(service: Service) -> list[str]:
    return sorted(entry["modelId"] for entry in service.get("/api/models")["models"])


def test_a_journal_damaged_in_the_middle_is_refused_with_file_and_offset(processes: Processes) -> None:
    service = processes.start("serve").until_ready()
    acknowledged(service, 3)
    assert service.stop() == 0
    segment = active_segment(processes.folder / "data/registry")
    content = bytearray(segment.read_bytes())
    line = content.index(b'"kept-1"')
    start = content.rindex(b"\n", 0, line) + 1
    content[line + 2] ^= 1
    segment.write_bytes(content)

    reason = refusal(processes.start("serve"), EXIT_CONFIG_INVALID)
    assert segment.name in reason
    assert str(start) in reason
    assert segment.read_bytes() == content, "nothing is repaired behind the operator's back"


@pytest.mark.parametrize("tear", ["the last bytes are missing", "half a line was written"])
def test_a_torn_journal_tail_boots_with_all_that_was_acknowledged(processes: Processes, tear: str) -> None:
    # A torn line was never durable, so it is in no archive; the one that is torn here by hand would be.
    alone = {"archive.enabled": False}
    service = processes.start("serve", settings=alone).until_ready()
    names = acknowledged(service, 3)
    assert service.stop() == 0
    segment = active_segment(processes.folder / "data/registry")
    content = segment.read_bytes()
    last = content.splitlines(keepends=True)[-1]
    assert b'"op":"mark"' in last, "so the line that is torn was promised to nobody"
    segment.write_bytes(content[:-7] if tear == "the last bytes are missing" else content + last[: len(last) // 2])

    again = processes.start("serve", settings=alone).until_ready()
    assert listed(again) == names
    assert again.put("another", b"more").status == 201
    assert list(segment.parent.glob("*.torn"))
    assert again.stop() == 0


# --- waits ---


def test_a_second_process_stands_by_until_the_first_is_killed(processes: Processes) -> None:
    first = processes.start("serve").until_ready()
    names = acknowledged(first, 3)
    second = processes.start("serve")
    second.until(
        lambda: second.checks().get("registry") == {"ok": False, "reason": "another process holds the registry's lock"},
        "waiting for the lock",
    )
    assert second.send("GET", "/livez").status == 200
    assert second.send("GET", "/readyz").status == 503
    assert second.send("GET", "/api/models").status == 503
    assert second.events("waiting_for_lock")
    assert first.ready

    first.kill()
    second.until_ready(within_s=5)
    assert listed(second) == names
    assert second.put("another", b"more").status == 201
    assert second.stop() == 0


def test_a_second_process_on_the_same_port_takes_over_as_well(processes: Processes) -> None:
    first = processes.start("serve").until_ready()
    second = processes.start("serve", settings=first.settings)
    second.until(lambda: second.events("waiting_for_lock"), "waiting for the lock")
    first.kill()
    second.until_ready(within_s=5)
    assert second.stop() == 0


def test_a_process_that_stands_by_ends_when_it_is_told_to(processes: Processes) -> None:
    processes.start("serve").until_ready()
    second = processes.start("serve")
    second.until(lambda: second.events("waiting_for_lock"), "waiting for the lock")
    assert second.stop() == 0


async def test_without_the_broker_it_says_why_and_still_answers_over_http(
    processes: Processes, amqp_url: str, rack: str
) -> None:
    port = free_port()
    away = URL(amqp_url).with_host("127.0.0.1").with_port(port)
    service = processes.start("worker", settings={"amqp.url": str(away), "rack": rack})
    service.until(lambda: service.events("worker_started"), "started")

    assert service.send("GET", "/livez").status == 200
    assert service.send("GET", "/readyz").status == 503
    checks = service.checks()
    assert [name for name, check in checks.items() if not check["ok"]] == ["broker"]
    assert checks["broker"]["reason"]
    assert service.put("meanwhile", b"bytes").status == 201
    assert listed(service) == ["meanwhile"]

    async with leading_to(amqp_url, port):
        await asyncio.to_thread(service.until_ready)
        checks = await asyncio.to_thread(service.checks)
        assert checks["broker"]["ok"] is True
        assert await asyncio.to_thread(service.stop) == 0
    await delete_queues(amqp_url, rack)


@asynccontextmanager
async def leading_to(amqp_url: str, port: int) -> AsyncIterator[None]:
    """As long as it is open, `port` of this host leads to the broker."""
    broker = URL(amqp_url)

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(65_536):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection(broker.host, broker.port)
        await asyncio.gather(carry(reader, back), carry(there, writer))

    async with await asyncio.start_server(connect, "127.0.0.1", port):
        yield
