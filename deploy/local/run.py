"""The body of `make run`: RabbitMQ, an object store and one worker, with data that stay in `data/local`.

The worker's environment is written to `data/local/env`, so that client commands, and a worker started by hand, need
nothing but `. data/local/env`. Ends with status 0 on Ctrl-C or SIGTERM, worker first; a worker that ends by itself is
reported, and the services stay.
"""

from __future__ import annotations

import argparse
import fcntl
import http.client
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType

import boto3
from botocore.exceptions import ClientError

from deploy.local import NotStarted, ObjectStore, RabbitMQ, Unavailable, object_store, rabbitmq
from deploy.local.console import say, working
from deploy.local.identity import is_free, keep, recall_ports
from deploy.local.process import Process

BUCKET = "models"
HTTP_PORT = 8002
PROGRAM = Path(".venv/bin/model-manager")
WORKER_READY_S = 60.0
WORKER_STOP_S = 35.0
POLL_S = 0.2
EXIT_UNAVAILABLE = 7
EXIT_IN_USE = 4

# Set by the file of addresses that we write: what it exports is ours, not an address that the user gave.
OWN_ENVIRONMENT = "LOCAL_SERVICES_FOLDER"


def main() -> int:
    parser = argparse.ArgumentParser(prog="make run", description=__doc__.partition("\n")[0])
    parser.add_argument("--storage", choices=("s3", "disk"), default="s3")
    parser.add_argument("--rack", default="rack-1")
    arguments = parser.parse_args()
    folder = Path("data/local" if arguments.rack == "rack-1" else f"data/local-{arguments.rack}")
    folder.mkdir(parents=True, exist_ok=True)
    stop = threading.Event()
    end_on_signals(stop)
    forget_own_environment(folder)
    try:
        with alone_in(folder), ExitStack() as services:
            return run(folder, arguments.rack, arguments.storage, services, stop)
    except BlockingIOError:
        say(f"another `make run` uses {folder}; end it first")
        return EXIT_IN_USE
    except Unavailable as error:
        say(f"no RabbitMQ: {error.reason}. What to do: {error.what_to_do}.")
        say("Without a broker the service runs as well, over HTTP alone: make serve")
        return EXIT_UNAVAILABLE
    except NotStarted as error:
        say(str(error))
        return EXIT_UNAVAILABLE


def run(folder: Path, rack: str, storage: str, services: ExitStack, stop: threading.Event) -> int:
    broker = rabbitmq(folder / "rabbitmq", keep=True)
    services.callback(broker.close)
    store = store_or_disk(folder, services) if storage == "s3" else None
    with working("starting RabbitMQ"):
        broker.start()
    env = environment(folder, rack, broker, store)
    write_environment(folder / "env", env)
    worker = Process(
        [str(PROGRAM.absolute()), "worker", "--rack", rack],
        env={**os.environ, **env},
        folder=Path.cwd(),
        log=folder / "worker.log",
        stop_s=WORKER_STOP_S,
    )
    services.callback(worker.close)
    worker.start()
    with working("starting the worker"):
        ready = wait_until_ready(worker, int(env["MODEL_MANAGER_HTTP__PORT"]), stop)
    if ready:
        say(summary(folder, rack, env, broker, store))
    elif worker.exit_code() is None and not stop.is_set():
        say(f"the worker is not ready after {WORKER_READY_S:.0f} s; it goes on trying, see {folder / 'worker.log'}")
    watch(worker, folder, rack, stop)
    say("ending the worker, then the services")
    worker.stop()
    broker_and_store_stop(broker, store)
    return 0


def store_or_disk(folder: Path, services: ExitStack) -> ObjectStore | None:
    """A running store with its bucket; None, said loudly, where none can be had."""
    try:
        store = object_store(folder / "object-store", keep=True)
        services.callback(store.close)
        with working("starting the object store"):
            store.start()
        create_bucket(store)
    except (Unavailable, NotStarted) as error:
        say(f"NO OBJECT STORE: {error}")
        say("GOING ON WITH DISK STORAGE: models go to a folder, not to S3")
        return None
    return store


def create_bucket(store: ObjectStore) -> None:
    client = boto3.client(
        "s3",
        endpoint_url=store.endpoint_url,
        aws_access_key_id=store.access_key,
        aws_secret_access_key=store.secret_key,
        region_name=store.region,
    )
    try:
        client.create_bucket(Bucket=BUCKET)
    except ClientError as error:
        if error.response["Error"]["Code"] not in ("BucketAlreadyOwnedByYou", "BucketAlreadyExists"):
            raise NotStarted(f"the bucket {BUCKET} cannot be made: {error}") from error


def environment(folder: Path, rack: str, broker: RabbitMQ, store: ObjectStore | None) -> dict[str, str]:
    """What the worker and the client commands read. A store chooses the backend, and each backend has a registry."""
    backend = "s3" if store else "disk"
    here = folder.absolute()
    port = HTTP_PORT if is_free(HTTP_PORT) else recall_ports(folder / "ports.json", "http")["http"]
    env = {
        OWN_ENVIRONMENT: str(here),
        "MODEL_MANAGER_RACK": rack,
        "MODEL_MANAGER_AMQP__URL": broker.url,
        "MODEL_MANAGER_HTTP__PORT": str(port),
        "MODEL_MANAGER_REGISTRY__PATH": str(here / f"registry-{backend}"),
        "MODEL_MANAGER_STORAGE__BACKEND": backend,
        "MODEL_MANAGER_STORAGE__PATH": str(here / "models"),
    }
    if store:
        env |= {
            "MODEL_MANAGER_STORAGE__S3__ENDPOINT_URL": store.endpoint_url,
            "MODEL_MANAGER_STORAGE__S3__BUCKET": BUCKET,
            "MODEL_MANAGER_STORAGE__S3__REGION": store.region,
            "AWS_ACCESS_KEY_ID": store.access_key,
            "AWS_SECRET_ACCESS_KEY": store.secret_key,
            "AWS_REGION": store.region,
        }
    return env


def write_environment(file: Path, env: dict[str, str]) -> None:
    """It holds the keys of the store."""
    keep(file, "".join(f"export {name}={shlex.quote(value)}\n" for name, value in env.items()))


def forget_own_environment(folder: Path) -> None:
    """In a shell that read our file of addresses, `make run` still starts its own services."""
    if os.environ.get(OWN_ENVIRONMENT) != str(folder.absolute()):
        return
    for line in (folder / "env").read_text().splitlines():
        os.environ.pop(line.removeprefix("export ").partition("=")[0], None)


def wait_until_ready(worker: Process, port: int, stop: threading.Event) -> bool:
    deadline = time.monotonic() + WORKER_READY_S
    while time.monotonic() < deadline and worker.exit_code() is None and not stop.wait(POLL_S):
        if is_ready(port):
            return True
    return False


def is_ready(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/readyz")
        return connection.getresponse().status == http.client.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def watch(worker: Process, folder: Path, rack: str, stop: threading.Event) -> None:
    """Returns on a signal. A worker that ends before is reported once."""
    while not stop.wait(POLL_S):
        if worker.exit_code() is not None:
            say(f"the worker ended: {worker.failure()}")
            say("the services go on until Ctrl-C; to start the worker again, by hand:")
            say(f"  . {folder / 'env'} && {PROGRAM} worker --rack {rack}")
            stop.wait()


def summary(folder: Path, rack: str, env: dict[str, str], broker: RabbitMQ, store: ObjectStore | None) -> str:
    storage = f"{store.why}, bucket {BUCKET}" if store else f"disk, {folder / 'models'}"
    return f"""ready

  rack     {rack}, http://127.0.0.1:{env["MODEL_MANAGER_HTTP__PORT"]}, log in {folder / "worker.log"}
  broker   {broker.why}
  storage  {storage}
  data     {folder}, kept until `make clean`

  In another terminal:
    . {folder / "env"}
    {PROGRAM} push README.md my-model --type custom
    {PROGRAM} ls
    {PROGRAM} pull my-model /tmp/my-model

  Ctrl-C ends all of it."""


def broker_and_store_stop(broker: RabbitMQ, store: ObjectStore | None) -> None:
    for service in (broker, store):
        if service is not None and service.source != "given":
            service.stop()


def end_on_signals(stop: threading.Event) -> None:
    """The first signal ends things in order; a second one ends us at once, and the watchdogs end the rest."""

    def first(number: int, _frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        stop.set()

    signal.signal(signal.SIGINT, first)
    signal.signal(signal.SIGTERM, first)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Raises `BlockingIOError` if another run holds the folder."""
    with (folder / "LOCK").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


if __name__ == "__main__":
    sys.exit(main())
