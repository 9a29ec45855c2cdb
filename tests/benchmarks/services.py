"""The real services that are measured: a broker, an object store, and workers as processes of their own."""

from __future__ import annotations

import asyncio
import os
import shlex
import sys
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import boto3
import psutil
from botocore.exceptions import ClientError

from deploy.local import ObjectStore, RabbitMQ, Source, object_store, rabbitmq
from deploy.local.identity import recall_ports
from deploy.local.process import Process
from deploy.local.server import wait_until_ready
from tests.amqp import delete_queues

BUCKET = "model-manager-bench"
_PROGRAM = Path(sys.executable).with_name("model-manager")
_NICENESS = 19
_READY_S = 60.0
_STOP_S = 40.0


@dataclass(frozen=True)
class Worker:
    """A running worker process. `pid` is its own, not that of the watchdog above it."""

    rack: str
    pid: int
    url: str

    def cpu_seconds(self) -> float:
        return cpu_seconds(psutil.Process(self.pid))


def cpu_seconds(process: psutil.Process) -> float:
    """User and system time of one process so far."""
    spent = process.cpu_times()
    return float(spent.user + spent.system)


class Services:
    """Started when first asked for, ended together. Asking raises Unavailable or NotStarted."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._running = ExitStack()

    def close(self) -> None:
        self._running.close()

    @cached_property
    def broker(self) -> RabbitMQ:
        return self._running.enter_context(rabbitmq(self.folder / "rabbitmq"))

    @cached_property
    def object_store(self) -> ObjectStore:
        store = self._running.enter_context(object_store(self.folder / "object-store"))
        try:
            s3_client(store).create_bucket(Bucket=BUCKET)
        except ClientError as error:
            if error.response["Error"]["Code"] not in ("BucketAlreadyOwnedByYou", "BucketAlreadyExists"):
                raise
        # Stores that are measured inside this process find their credentials where a worker does.
        os.environ |= {"AWS_ACCESS_KEY_ID": store.access_key, "AWS_SECRET_ACCESS_KEY": store.secret_key}
        return store

    def broker_cpu_seconds(self) -> float | None:
        """Processor time of the broker so far; None for one that is no process of ours."""
        if self.broker.source is not Source.NATIVE:
            return None
        nodes = [process for process in psutil.Process().children(recursive=True) if process.name() == "beam.smp"]
        return cpu_seconds(nodes[0]) if nodes else None

    @contextmanager
    def process(self, name: str, command: list[str], env: Mapping[str, str] | None = None) -> Iterator[Process]:
        """A process of ours, its output in `<name>.log`."""
        process = Process(
            command,
            env={**os.environ, **(env or {})},
            folder=self.folder,
            log=self.folder / f"{name}.log",
            stop_s=_STOP_S,
        )
        process.start()
        try:
            yield process
        finally:
            process.stop()

    @contextmanager
    def worker(self, rack: str, *, s3: bool = False) -> Iterator[Worker]:
        """A queue worker that is ready; its folder, `<rack>/registry` in it, may hold a journal already."""
        env = {"MODEL_MANAGER_AMQP__URL": self.broker.url}
        if s3:
            env |= s3_environment(self.object_store)
        try:
            with self._started("worker", rack, env) as worker:
                yield worker
        finally:
            asyncio.run(delete_queues(self.broker.url, rack))

    @contextmanager
    def worker_and_neighbour(self, rack: str, *, s3: bool) -> Iterator[tuple[Worker, Worker]]:
        """A queue worker, and beside it a standalone service at nice 19, with storage of its own of the same kind.

        Both are in one session. Linux may share processors among sessions first (autogroup): then niceness means
        nothing between processes of two, and what is in a session of its own gets a share more.
        """
        neighbour = f"{rack}-neighbour"
        env = {"MODEL_MANAGER_AMQP__URL": self.broker.url, **(s3_environment(self.object_store) if s3 else {})}
        own, others = self._settings_of(rack), self._settings_of(neighbour)
        nicely = ["nice", "-n", str(_NICENESS), "env", *(f"{name}={value}" for name, value in others.items())]
        commands = [*nicely, str(_PROGRAM), "serve", "--rack", neighbour], [str(_PROGRAM), "worker", "--rack", rack]
        both = f"{shlex.join(commands[0])} & exec {shlex.join(commands[1])}"
        try:
            with self.process(rack, ["/bin/sh", "-c", both], {**env, **own}) as process:
                workers = []
                for name, settings in ((rack, own), (neighbour, others)):
                    url = _url_in(settings)
                    wait_until_ready(process, f"worker {name}", lambda url=url: _is_ready(url), timeout_s=_READY_S)
                    workers.append(Worker(name, pid_of(name), url))
                yield workers[0], workers[1]
        finally:
            asyncio.run(delete_queues(self.broker.url, rack))

    def drop_blobs(self, rack: str, *, s3: bool) -> None:
        """Free the bytes of all models of a rack, behind its back."""
        if not s3:
            for path in (self.folder / rack / "models" / "blobs").iterdir():
                path.unlink()
            return
        client = s3_client(self.object_store)
        for found in client.list_objects_v2(Bucket=BUCKET, Prefix=f"{rack}/blobs/").get("Contents", []):
            client.delete_object(Bucket=BUCKET, Key=found["Key"])

    @contextmanager
    def standalone(self, rack: str) -> Iterator[Worker]:
        """The HTTP service without a broker, on disk."""
        with self._started("serve", rack, {}) as worker:
            yield worker

    @contextmanager
    def _started(self, command: str, rack: str, env: Mapping[str, str]) -> Iterator[Worker]:
        own = self._settings_of(rack)
        url = _url_in(own)
        with self.process(rack, [str(_PROGRAM), command, "--rack", rack], {**own, **env}) as process:
            wait_until_ready(process, f"worker {rack}", lambda: _is_ready(url), timeout_s=_READY_S)
            yield Worker(rack, pid_of(rack), url)

    def _settings_of(self, rack: str) -> dict[str, str]:
        """Where a rack listens and keeps what it has, as its environment says it."""
        folder = self.folder / rack
        folder.mkdir(exist_ok=True)
        return {
            "MODEL_MANAGER_HTTP__PORT": str(recall_ports(folder / "ports.json", "http")["http"]),
            "MODEL_MANAGER_REGISTRY__PATH": str(folder / "registry"),
            "MODEL_MANAGER_STORAGE__PATH": str(folder / "models"),
        }


def s3_client(store: ObjectStore) -> Any:
    return boto3.client(
        "s3",
        endpoint_url=store.endpoint_url,
        aws_access_key_id=store.access_key,
        aws_secret_access_key=store.secret_key,
        region_name=store.region,
    )


def s3_environment(store: ObjectStore) -> dict[str, str]:
    """What a process of ours needs to keep its blobs in the store."""
    return {
        "MODEL_MANAGER_STORAGE__BACKEND": "s3",
        "MODEL_MANAGER_STORAGE__S3__ENDPOINT_URL": store.endpoint_url,
        "MODEL_MANAGER_STORAGE__S3__BUCKET": BUCKET,
        "MODEL_MANAGER_STORAGE__S3__REGION": store.region,
        "AWS_ACCESS_KEY_ID": store.access_key,
        "AWS_SECRET_ACCESS_KEY": store.secret_key,
        "AWS_REGION": store.region,
    }


def _url_in(settings: Mapping[str, str]) -> str:
    return f"http://127.0.0.1:{settings['MODEL_MANAGER_HTTP__PORT']}"


def _is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/readyz", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def pid_of(argument: str) -> int:
    """The process below this one that was given `argument`."""
    found = [process for process in psutil.Process().children(recursive=True) if argument in process.cmdline()]
    return int(found[0].pid)
