"""A server in a Docker container, by the generic container of testcontainers, whose reaper ends it when we die."""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from testcontainers.core.config import testcontainers_config
from testcontainers.core.container import DockerContainer
from testcontainers.core.docker_client import DockerClient
from testcontainers.core.waiting_utils import WaitStrategy

from deploy.local.console import say, working
from deploy.local.server import NotStarted, Unavailable

DAEMON_ANSWERS_S = 10
STOP_S = 30
_ROOT = Path(__file__).parents[2]
LOG_LINES = 15


def docker_errors() -> tuple[type[Exception], ...]:
    """What the Docker client raises: its own errors, and those of the HTTP library below it."""
    from docker.errors import DockerException  # type: ignore[import-untyped,unused-ignore]
    from requests.exceptions import RequestException  # type: ignore[import-untyped,unused-ignore]

    return (DockerException, RequestException, OSError)


def ping() -> Any:
    """The client of a daemon that answers. Raises `Unavailable` if none does."""
    try:
        client: Any = DockerClient(timeout=DAEMON_ANSWERS_S).client
        client.ping()
    except docker_errors() as error:
        raise Unavailable("no Docker daemon answers", "start one, or set DOCKER_HOST") from error
    return client


def require_image(image: str) -> None:
    """Returns when a daemon answers and has the image, pulled if it has to be. Raises `Unavailable` otherwise."""
    client = ping()
    find_or_pull(client, image)
    reaper = testcontainers_config.ryuk_image
    if testcontainers_config.ryuk_disabled:
        return
    try:
        find_or_pull(client, reaper)
    except Unavailable as error:
        testcontainers_config.ryuk_disabled = True
        say(f"{error.reason}: if this run is killed, its containers stay, until `docker rm` ends them")


def find_or_pull(client: Any, image: str) -> None:
    try:
        if client.images.list(name=image):
            return
        with working(f"pulling the image {image}"):
            DockerClient().client.images.pull(image)  # which takes longer than `client` waits
    except docker_errors() as error:
        raise Unavailable(f"the image {image} cannot be pulled", "name another one, or pull it by hand") from error


def build_worker_image(tag: str, *, base: str | None = None) -> str:
    """Builds the worker's image as deploy/Dockerfile says; the tag. Raises `Unavailable` if that fails."""
    arguments = [] if base is None else ["--build-arg", f"BASE={base}"]
    command = ["docker", "build", "--network", "host", "--file", "deploy/Dockerfile", "--tag", tag, *arguments, "."]
    with working("building the worker's image"):
        try:
            built = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=False)
        except OSError as error:
            raise Unavailable(f"docker build: {error.strerror}", "install Docker's client") from error
    if built.returncode:
        raise Unavailable(f"the worker's image cannot be built: {built.stderr.strip()[-300:]}", "name a WORKER_IMAGE")
    return tag


class Container:
    """Implements `Server`. Its port is published on the loopback interface only.

    Its first start waits until it is `ready`.

    With `data`, a folder inside the container, its data lie in a named volume that outlives it and belongs to `folder`.
    """

    def __init__(
        self,
        image: str,
        *,
        folder: Path,
        port: int,
        host_port: int,
        ready: WaitStrategy,
        command: str | None = None,
        env: Mapping[str, str] | None = None,
        data: str | None = None,
    ) -> None:
        # The host name is part of where RabbitMQ keeps its data.
        self._container: Any = DockerContainer(image, command=command, env=dict(env or {}), hostname="model-manager")
        # The Docker client takes an address beside the port; the annotation does not know.
        self._container.ports[f"{port}/tcp"] = cast(Any, ("127.0.0.1", host_port))
        if data is not None:
            name = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:12]
            self._container.with_volume_mapping(f"model-manager-{name}", data, "rw")
        self._container.waiting_for(ready)
        self._created = False

    def start(self) -> None:
        if self._created:
            self._container.get_wrapped_container().start()
        else:
            self._created = True
            try:
                self._container.start()
            except Exception as error:  # the client's own, those of the HTTP library below it, and of the wait
                if not isinstance(error, (TimeoutError, RuntimeError, *docker_errors())):
                    raise
                raise NotStarted(f"a container of {self._container.image}: {error}") from error

    def stop(self) -> None:
        if self._created:
            self._container.get_wrapped_container().stop(timeout=STOP_S)

    def kill(self) -> None:
        if self._created and self.failure() is None:
            self._container.get_wrapped_container().kill()
            self._container.get_wrapped_container().wait()

    def close(self) -> None:
        if self._created:
            self._created = False
            self._container.stop()

    def failure(self) -> str | None:
        container = self._container.get_wrapped_container()
        container.reload()
        if container.status in ("created", "running", "restarting"):
            return None
        return f"the container is {container.status}\n{container.logs(tail=LOG_LINES).decode(errors='replace')}"

    def run(self, command: Sequence[str]) -> tuple[int, str]:
        """Runs a command inside it; its exit status and output."""
        code, output = self._container.get_wrapped_container().exec_run(list(command))
        return code, output.decode(errors="replace")
