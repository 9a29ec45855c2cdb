"""The services that `make run` and these tests start: where they come from, and that nothing of them is left behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import aiormq
import boto3
import psutil
import pytest

from deploy import local
from deploy.local import ObjectStore, RabbitMQ, Source, Unavailable
from deploy.local.broker import answers
from deploy.local.identity import recall, recall_ports
from deploy.local.process import Process
from deploy.local.run import forget_own_environment, write_environment

ROOT = Path(__file__).parents[2]
DEADLINE_S = 60.0

# A daemon as they come: forked twice, in a session and a group of its own, ignoring polite signals.
DAEMON = """
import os, signal, sys, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        open(sys.argv[1], "w").write(str(os.getpid()))
        time.sleep(3600)
    os._exit(0)
os.wait()
while not os.path.exists(sys.argv[1]) or not os.path.getsize(sys.argv[1]):
    time.sleep(0.01)
time.sleep(float(sys.argv[2]))
sys.exit(3)
"""


@pytest.fixture
def own_broker(rabbitmq: RabbitMQ, tmp_path: Path) -> Iterator[RabbitMQ]:
    """A broker for one test; it needs what the one of the session needs."""
    if rabbitmq.source is not Source.NATIVE:
        pytest.skip(f"the broker here is no process of ours: {rabbitmq.why}")
    with local.rabbitmq(tmp_path / "rabbitmq", source=Source.NATIVE) as own:
        yield own


@pytest.fixture
def own_store(object_store: ObjectStore, tmp_path: Path) -> Iterator[ObjectStore]:
    if object_store.source is not Source.NATIVE:
        pytest.skip(f"the object store here is no process of ours: {object_store.why}")
    with local.object_store(tmp_path / "object-store", source=Source.NATIVE) as own:
        yield own


@pytest.mark.parametrize("way", ["stop", "kill"])
async def test_a_broker_that_ended_comes_back_at_the_same_address_with_its_queues(
    own_broker: RabbitMQ, way: str
) -> None:
    async with aiormq.connect(own_broker.url) as connection:
        channel = await connection.channel()
        await channel.queue_declare("kept", durable=True)

    getattr(own_broker, way)()
    assert not answers(own_broker.url)
    own_broker.start()

    async with aiormq.connect(own_broker.url) as connection:
        channel = await connection.channel()
        if way == "stop":  # a kill may come before the broker has written down what it has just declared
            await channel.queue_declare("kept", passive=True)


def test_rabbitmqctl_reaches_the_broker_and_tells_its_failures(own_broker: RabbitMQ) -> None:
    own_broker.ctl("add_vhost", "other")
    assert "other" in own_broker.ctl("list_vhosts", "--quiet").split()
    with pytest.raises(RuntimeError, match="list_vhosts --no-such-option"):
        own_broker.ctl("list_vhosts", "--no-such-option")


@pytest.mark.parametrize("way", ["stop", "kill"])
def test_an_object_store_that_ended_comes_back_at_the_same_address_with_its_objects(
    own_store: ObjectStore, way: str
) -> None:
    client = boto3.client(
        "s3",
        endpoint_url=own_store.endpoint_url,
        aws_access_key_id=own_store.access_key,
        aws_secret_access_key=own_store.secret_key,
        region_name=own_store.region,
    )
    client.create_bucket(Bucket="kept")
    client.put_object(Bucket="kept", Key="object", Body=b"bytes")

    getattr(own_store, way)()
    own_store.start()

    assert client.get_object(Bucket="kept", Key="object")["Body"].read() == b"bytes"


def test_services_listen_on_loopback_only(own_broker: RabbitMQ, own_store: ObjectStore, tmp_path: Path) -> None:
    listening = {
        connection.laddr.ip
        for process in processes_of(tmp_path)
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert listening
    assert listening <= {"127.0.0.1", "::1"}


def test_a_killed_parent_leaves_nothing_of_its_services(
    rabbitmq: RabbitMQ, object_store: ObjectStore, tmp_path: Path
) -> None:
    if {rabbitmq.source, object_store.source} != {Source.NATIVE}:
        pytest.skip("the services here are no processes of ours")
    program = (
        "import sys, time; from pathlib import Path; from deploy.local import *\n"
        "folder = Path(sys.argv[1]); services = rabbitmq(folder / 'r', source=Source.NATIVE), "
        "object_store(folder / 's', source=Source.NATIVE)\n"
        "for service in services: service.start()\n"
        "print('ready', flush=True); time.sleep(3600)"
    )
    with subprocess.Popen([sys.executable, "-c", program, tmp_path], cwd=ROOT, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"ready\n"
        names = {process.name() for process in processes_of(tmp_path)}
        assert {"beam.smp", "epmd"} <= names
        parent.kill()
    wait_until_none_of(tmp_path)


def test_what_leaves_its_session_ends_with_its_process(tmp_path: Path) -> None:
    process = daemon(tmp_path, seconds=3600)
    process.start()
    wait_until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text() != "")
    left = int((tmp_path / "pid").read_text())
    assert psutil.pid_exists(left)
    process.kill()
    assert not psutil.pid_exists(left)


def test_what_a_process_leaves_behind_ends_when_it_ends_by_itself(tmp_path: Path) -> None:
    process = daemon(tmp_path, seconds=0)
    process.start()
    wait_until(lambda: process.exit_code() is not None)
    assert process.exit_code() == 3
    assert not psutil.pid_exists(int((tmp_path / "pid").read_text()))


def test_stopping_a_process_lets_it_end_in_order(tmp_path: Path) -> None:
    process = shell(tmp_path, "trap 'echo in order; exit 0' TERM; echo started; while :; do sleep 0.05; done")
    process.start()
    wait_until(lambda: "started" in process.tail())
    process.stop()
    assert process.tail().splitlines() == ["started", "in order"]
    assert process.exit_code() == 0


def test_a_process_that_fails_tells_its_status_and_the_end_of_its_log(tmp_path: Path) -> None:
    process = shell(tmp_path, "echo the port is taken >&2; exit 70")
    process.start()
    wait_until(lambda: process.exit_code() is not None)
    assert process.failure() == "exit status 70\nthe port is taken"


def test_a_process_that_a_signal_ended_says_which(tmp_path: Path) -> None:
    process = shell(tmp_path, "kill -KILL $$")
    process.start()
    wait_until(lambda: process.exit_code() is not None)
    assert process.exit_code() == 128 + signal.SIGKILL


def test_a_service_keeps_its_ports_while_they_are_free(tmp_path: Path) -> None:
    file = tmp_path / "ports.json"
    first = recall_ports(file, "one", "two")
    assert len(set(first.values())) == 2
    assert recall_ports(file, "one", "two") == first
    with socket.create_server(("127.0.0.1", first["one"])):
        assert recall_ports(file, "one", "two") != first


def test_what_a_service_remembers_is_for_its_owner_only(tmp_path: Path) -> None:
    file = tmp_path / "new" / "credentials.json"
    assert recall(file, {"key": "first"}) == {"key": "first"}
    assert recall(file, {"key": "second"}) == {"key": "first"}
    assert file.stat().st_mode & 0o777 == 0o600


def test_a_disk_that_is_full_leaves_the_identity_as_it_was(tmp_path: Path) -> None:
    file = tmp_path / "identity.json"
    recall(file, {"key": "first"})
    program = (
        "import pathlib, resource, sys; from deploy.local.identity import recall\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (8, 8))\n"
        "recall(pathlib.Path(sys.argv[1]), {'key': 'second', 'other': 'new'})\n"
    )
    done = subprocess.run([sys.executable, "-c", program, file], cwd=ROOT, capture_output=True, text=True)
    assert "File too large" in done.stderr
    assert recall(file, {"key": "third"}) == {"key": "first"}
    assert file.stat().st_mode & 0o777 == 0o600


def test_an_address_in_the_environment_is_used_as_it_is_and_never_ended(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MODEL_MANAGER_AMQP__URL", "amqp://me:secret@broker.example:5673/v")
    given = local.rabbitmq(tmp_path)
    assert (given.url, given.source) == ("amqp://me:secret@broker.example:5673/v", Source.GIVEN)
    assert "secret" not in given.why
    for end in (given.stop, given.kill):
        with pytest.raises(Unavailable):
            end()

    monkeypatch.setenv("MODEL_MANAGER_STORAGE__S3__ENDPOINT_URL", "https://store.example")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID", raising=False)
    with pytest.raises(Unavailable, match="AWS_ACCESS_KEY_ID"):
        local.object_store(tmp_path)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "me")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    store = local.object_store(tmp_path)
    assert (store.endpoint_url, store.access_key, store.secret_key) == ("https://store.example", "me", "secret")


def test_the_file_of_addresses_survives_a_shell_and_is_not_taken_for_the_users_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    env = {"LOCAL_SERVICES_FOLDER": str(tmp_path), "MODEL_MANAGER_AMQP__URL": "amqp://a:it's $HOME@127.0.0.1/"}
    write_environment(tmp_path / "env", env)
    told = subprocess.run(
        ["sh", "-c", '. "$1/env" && printf %s "$MODEL_MANAGER_AMQP__URL"', "sh", tmp_path],
        capture_output=True,
        text=True,
    )
    assert told.stdout == env["MODEL_MANAGER_AMQP__URL"]
    assert (tmp_path / "env").stat().st_mode & 0o777 == 0o600

    for name, value in env.items():
        monkeypatch.setenv(name, value)
    forget_own_environment(tmp_path / "another")
    assert "MODEL_MANAGER_AMQP__URL" in os.environ
    forget_own_environment(tmp_path)
    assert "MODEL_MANAGER_AMQP__URL" not in os.environ


def test_make_run_outlives_its_worker_keeps_its_data_and_ends_in_order(rabbitmq: RabbitMQ, tmp_path: Path) -> None:
    if rabbitmq.source is not Source.NATIVE:
        pytest.skip(f"the broker here is no process of ours: {rabbitmq.why}")
    (tmp_path / ".venv").symlink_to(ROOT / ".venv")
    with make_run(tmp_path) as run:
        assert said(run, "ready", "the worker ended").startswith("local: ready")
        client(tmp_path, "push", "data/local/env", "kept", "--type", "custom", "--quiet")
        worker_of(run).kill()
        assert "exit status 137" in said(run, "the worker ended")
        assert "model-manager worker --rack rack-1" in said(run, ".venv/bin/model-manager worker")
        assert answers((tmp_path / "data/local/env").read_text().partition("AMQP__URL=")[2].split()[0])
        run.send_signal(signal.SIGINT)
        assert run.wait(DEADLINE_S) == 0
    wait_until_none_of(tmp_path)

    with make_run(tmp_path) as run:
        assert said(run, "ready", "the worker ended").startswith("local: ready")
        assert "kept" in client(tmp_path, "ls")
        run.send_signal(signal.SIGTERM)
        assert run.wait(DEADLINE_S) == 0
    wait_until_none_of(tmp_path)


def client(folder: Path, *arguments: str) -> str:
    """Runs a client command as a person would, in a shell that read the file of addresses."""
    script = '. data/local/env && .venv/bin/model-manager "$@"'
    command = ["sh", "-c", script, "sh", *arguments]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout


@contextmanager
def make_run(folder: Path) -> Iterator[subprocess.Popen[str]]:
    env = {name: value for name, value in os.environ.items() if not name.startswith(("MODEL_MANAGER_", "LOCAL_"))}
    with subprocess.Popen(
        [sys.executable, "-m", "deploy.local.run", "--storage", "disk"],
        cwd=folder,
        env={**env, "PYTHONPATH": str(ROOT), "DOCKER_HOST": "unix:///nonexistent"},
        stderr=subprocess.PIPE,
        text=True,
    ) as run:
        try:
            yield run
        finally:
            run.kill()


def said(run: subprocess.Popen[str], *beginnings: str) -> str:
    """The next line that tells one of these."""
    assert run.stderr is not None
    return next(line for line in run.stderr if any(beginning in line for beginning in beginnings))


def worker_of(run: subprocess.Popen[str]) -> psutil.Process:
    return next(child for child in psutil.Process(run.pid).children(recursive=True) if "--rack" in child.cmdline())


@pytest.mark.parametrize("way", ["stop", "kill"])
async def test_a_broker_in_a_container_comes_back_with_its_queues(docker_image: str, tmp_path: Path, way: str) -> None:
    with local.rabbitmq(tmp_path, source=Source.DOCKER) as container:
        async with aiormq.connect(container.url) as connection:
            channel = await connection.channel()
            await channel.queue_declare("kept", durable=True)
        getattr(container, way)()
        assert not answers(container.url)
        container.start()
        queues = container.ctl("list_queues", "--quiet", "name")
        assert "kept" in queues or way == "kill"  # as above: it may come too early


def daemon(folder: Path, *, seconds: float) -> Process:
    command = [sys.executable, "-c", DAEMON, str(folder / "pid"), str(seconds)]
    return Process(command, env=dict(os.environ), folder=folder, log=folder / "log", stop_s=10)


def shell(folder: Path, script: str) -> Process:
    return Process(["sh", "-c", script], env=dict(os.environ), folder=folder, log=folder / "log", stop_s=10)


def processes_of(folder: Path) -> list[psutil.Process]:
    """Those of a service in `folder`: it stands in their environment or command."""
    found = []
    for process in psutil.process_iter():
        try:
            if any(str(folder) in text for text in (*process.cmdline(), *process.environ().values())):
                found.append(process)
        except psutil.Error:
            continue
    return found


def wait_until_none_of(folder: Path) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while left := processes_of(folder):
        assert time.monotonic() < deadline, left
        time.sleep(0.02)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
