"""RabbitMQ on this machine."""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

from testcontainers.core.wait_strategies import LogMessageWaitStrategy

from deploy.local import native_broker
from deploy.local.console import say
from deploy.local.container import Container, require_image
from deploy.local.identity import recall, recall_ports
from deploy.local.server import Given, Server, Source, Unavailable, choose, wait_until_ready

URL_VARIABLE = "MODEL_MANAGER_AMQP__URL"
IMAGE_VARIABLE = "RABBITMQ_IMAGE"
IMAGE = "rabbitmq:4-management"
READY_S = 120.0
GIVEN_READY_S = 10.0
PROTOCOL_HEADER = b"AMQP\x00\x00\x09\x01"
# Frame type 1 (method) on channel 0, its size, then class 10 and method 10: connection.start.
START_LENGTH = 11


@dataclass(frozen=True)
class RabbitMQ:
    """A broker with one vhost, `/`. `why` tells in one line where it comes from.

    `stop` and `kill` leave it to be started again with the same url and data; of a broker that the environment gave,
    they raise `Unavailable`, and so does `ctl`.
    """

    url: str
    why: str
    source: Source
    server: Server
    control: Callable[[Sequence[str]], str]

    def start(self) -> None:
        """Returns when the broker answers an AMQP handshake. Raises `NotStarted`."""
        self.server.start()
        timeout_s = GIVEN_READY_S if self.source is Source.GIVEN else READY_S
        wait_until_ready(self.server, "RabbitMQ", lambda: answers(self.url), timeout_s=timeout_s)

    def stop(self) -> None:
        self.server.stop()

    def kill(self) -> None:
        self.server.kill()

    def close(self) -> None:
        self.server.close()

    def ctl(self, *arguments: str) -> str:
        """What `rabbitmqctl` prints. Raises `RuntimeError` with its message if it fails."""
        return self.control(arguments)

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


def rabbitmq(folder: Path, *, allow_install: bool = True, keep: bool = False, source: Source = Source.AUTO) -> RabbitMQ:
    """A broker whose data lie in or belong to `folder`, not started yet; says on stderr which one it is.

    `keep`: the data of a container outlive it (those of a native broker lie in `folder` anyway). `allow_install`: a
    missing Debian package may be installed. Raises `Unavailable` if none can be had, or none from `source`.
    The environment's `RABBITMQ_SUITE` asks for a native one.
    """
    if source is Source.AUTO and os.environ.get(native_broker.SUITE_VARIABLE):
        source = Source.NATIVE
    broker = choose(
        source,
        variable=URL_VARIABLE,
        given=given,
        in_container=partial(in_container, folder, keep=keep),
        native=partial(native, folder, allow_install=allow_install),
    )
    say(broker.why)
    return broker


def given(url: str) -> RabbitMQ:
    address = f"{urlsplit(url).hostname}:{urlsplit(url).port or 5672}"

    def no_control(arguments: Sequence[str]) -> str:
        raise Unavailable(
            f"rabbitmqctl does not reach {address}", f"unset {URL_VARIABLE} to have a broker started here"
        )

    return RabbitMQ(url, f"RabbitMQ at {address}, from {URL_VARIABLE}", Source.GIVEN, Given(address), no_control)


def in_container(folder: Path, *, keep: bool) -> RabbitMQ:
    image = os.environ.get(IMAGE_VARIABLE) or IMAGE
    require_image(image)
    port = recall_ports(folder / "ports.json", "amqp")["amqp"]
    server = Container(
        image,
        folder=folder,
        port=5672,
        host_port=port,
        ready=LogMessageWaitStrategy("Server startup complete"),
        data="/var/lib/rabbitmq" if keep else None,
    )

    def control(arguments: Sequence[str]) -> str:
        code, output = server.run(["rabbitmqctl", *arguments])
        if code:
            raise RuntimeError(output)
        return output

    why = f"RabbitMQ in a container of {image}, port {port}"
    return RabbitMQ(f"amqp://guest:guest@127.0.0.1:{port}/", why, Source.DOCKER, server, control)


def native(folder: Path, no_docker: str, *, allow_install: bool) -> RabbitMQ:
    programs = native_broker.programs(allow_install=allow_install)
    node = recall(folder / "node.json", {"name": f"model-manager-{secrets.token_hex(4)}@localhost"})["name"]
    ports = recall_ports(folder / "ports.json", "amqp", "distribution", "epmd")
    server, control = native_broker.server(programs, folder, node, ports)
    why = f"{programs.name} as a process of our own{no_docker}, port {ports['amqp']}"
    return RabbitMQ(f"amqp://guest:guest@127.0.0.1:{ports['amqp']}/", why, Source.NATIVE, server, control)


def answers(url: str) -> bool:
    """Whether a broker answers our protocol header; for `amqps`, whether something accepts the connection."""
    parts = urlsplit(url)
    port = parts.port or (5671 if parts.scheme == "amqps" else 5672)
    try:
        with socket.create_connection((parts.hostname or "127.0.0.1", port), timeout=2) as connection:
            if parts.scheme == "amqps":
                return True
            connection.sendall(PROTOCOL_HEADER)
            reply = b""
            while len(reply) < START_LENGTH and (more := connection.recv(4096)):
                reply += more
    except OSError:
        return False
    return reply[:3] == b"\x01\x00\x00" and reply[7:11] == b"\x00\x0a\x00\x0a"
