"""An S3-compatible object store on this machine."""

from __future__ import annotations

import http.client
import os
import secrets
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

from testcontainers.core.wait_strategies import LogMessageWaitStrategy

from deploy.local.console import say
from deploy.local.container import Container, require_image
from deploy.local.identity import recall, recall_ports
from deploy.local.minio import minio
from deploy.local.process import Process
from deploy.local.server import Given, Server, Source, Unavailable, choose, wait_until_ready

URL_VARIABLE = "MODEL_MANAGER_STORAGE__S3__ENDPOINT_URL"
IMAGE_VARIABLE = "OBJECT_STORE_IMAGE"
REGION = "us-east-1"
# Good once it knows its buckets and its users, and can write.
HEALTH = "/minio/health/cluster"
READY_S = 60.0
GIVEN_READY_S = 10.0
STOP_S = 20.0


@dataclass(frozen=True)
class ObjectStore:
    """A store with path-style addresses. `why` tells in one line where it comes from.

    `stop` and `kill` leave it to be started again with the same address and data; of a store that the environment
    gave, they raise `Unavailable`.
    """

    endpoint_url: str
    access_key: str
    secret_key: str
    region: str
    why: str
    source: Source
    server: Server

    def start(self) -> None:
        """Returns when the store says that it can serve; a given one, when it answers at all. Raises `NotStarted`."""
        self.server.start()
        given = self.source is Source.GIVEN
        wait_until_ready(
            self.server,
            "the object store",
            lambda: answers(self.endpoint_url, any_status=given),
            timeout_s=GIVEN_READY_S if given else READY_S,
        )

    def stop(self) -> None:
        self.server.stop()

    def kill(self) -> None:
        self.server.kill()

    def close(self) -> None:
        self.server.close()

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def object_store(folder: Path, *, keep: bool = False, source: Source = Source.AUTO) -> ObjectStore:
    """A store whose data lie in or belong to `folder`, not started yet; says on stderr which one it is.

    `keep`: the data of a container outlive it (those of a native store lie in `folder` anyway). Raises `Unavailable`
    if none can be had, or none from `source`.
    """
    store = choose(
        source,
        variable=URL_VARIABLE,
        given=given,
        in_container=partial(in_container, folder, keep=keep),
        native=partial(native, folder),
    )
    say(store.why)
    return store


def given(url: str) -> ObjectStore:
    try:
        access_key, secret_key = os.environ["AWS_ACCESS_KEY_ID"], os.environ["AWS_SECRET_ACCESS_KEY"]
    except KeyError as missing:
        raise Unavailable(f"{URL_VARIABLE} is set but {missing.args[0]} is not", "set both keys") from None
    region = os.environ.get("AWS_REGION", REGION)
    address = urlsplit(url).netloc
    why = f"object store at {address}, from {URL_VARIABLE}"
    return ObjectStore(url, access_key, secret_key, region, why, Source.GIVEN, Given(address))


def in_container(folder: Path, *, keep: bool) -> ObjectStore:
    image = os.environ.get(IMAGE_VARIABLE)
    if not image:
        raise Unavailable(
            f"{IMAGE_VARIABLE} is not set, and MinIO publishes no image any more",
            f"set {IMAGE_VARIABLE} to an image with the MinIO interface",
        )
    require_image(image)
    env = credentials(folder)
    port = recall_ports(folder / "ports.json", "s3")["s3"]
    server = Container(
        image,
        folder=folder,
        port=9000,
        host_port=port,
        # Not its strategy for HTTP, which looks for the port on a bridge where we publish it on loopback only.
        ready=LogMessageWaitStrategy("API: http"),
        command="server /data",
        env=env,
        data="/data" if keep else None,
    )
    return started_here(env, port, f"object store in a container of {image}", Source.DOCKER, server)


def native(folder: Path, no_docker: str) -> ObjectStore:
    program = minio()
    env = credentials(folder)
    folder = folder.resolve()
    (folder / "data").mkdir(parents=True, exist_ok=True)
    ports = recall_ports(folder / "ports.json", "s3", "console")
    server = Process(
        [
            str(program),
            "server",
            str(folder / "data"),
            "--address",
            f"127.0.0.1:{ports['s3']}",
            "--console-address",
            f"127.0.0.1:{ports['console']}",
        ],
        env={**env, "HOME": str(folder), "PATH": os.defpath, "MINIO_BROWSER": "off", "MINIO_UPDATE": "off"},
        folder=folder,
        log=folder / "minio.log",
        stop_s=STOP_S,
    )
    return started_here(env, ports["s3"], f"MinIO as a process of our own{no_docker}", Source.NATIVE, server)


def credentials(folder: Path) -> dict[str, str]:
    fresh = {"MINIO_ROOT_USER": f"local-{secrets.token_hex(4)}", "MINIO_ROOT_PASSWORD": secrets.token_hex(16)}
    return recall(folder / "credentials.json", fresh)


def started_here(env: dict[str, str], port: int, why: str, source: Source, server: Server) -> ObjectStore:
    access_key, secret_key = env["MINIO_ROOT_USER"], env["MINIO_ROOT_PASSWORD"]
    return ObjectStore(
        f"http://127.0.0.1:{port}", access_key, secret_key, REGION, f"{why}, port {port}", source, server
    )


def answers(url: str, *, any_status: bool) -> bool:
    """Whether the store's health probe is fine; with `any_status`, whether something speaks HTTP there."""
    parts = urlsplit(url)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = kind(parts.hostname or "127.0.0.1", parts.port, timeout=2)
    try:
        connection.request("GET", HEALTH)
        return any_status or connection.getresponse().status == http.client.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
