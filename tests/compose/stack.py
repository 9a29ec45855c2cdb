"""deploy/compose.yaml as a project of its own: on free ports, with secrets and volumes that nobody else has."""

from __future__ import annotations

import base64
import json
import os
import secrets
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from tests.process import free_port

DEPLOY = Path(__file__).parents[2] / "deploy"
PORTS = (
    *("RABBITMQ_PORT", "RABBITMQ_MANAGEMENT_PORT", "OBJECT_STORE_PORT"),
    *("PROMETHEUS_PORT", "GRAFANA_PORT", "RACK_1_PORT", "RACK_2_PORT"),
)
RACKS = ("rack-1", "rack-2")
SERVICES = ("object-store", "rabbitmq", *RACKS, "prometheus")
"""What always runs, and what Prometheus watches."""
GRAFANA = "grafana"
DEADLINE_S = 240.0
POLL_S = 0.5

# Hears every rack's hints as a listener of rack-2, from a container beside it.
LISTENER = """
import asyncio, json, pathlib
from worker.client.hints import hints

async def main():
    async with hints(pathlib.Path("/run/secrets/amqp-listener").read_text().strip(), "rack-2") as heard:
        print("listening", flush=True)
        async for hint in heard:
            print(json.dumps(hint), flush=True)

asyncio.run(main())
"""


class Broken(Exception):
    """Something is not as compose.yaml promises it."""


@dataclass(frozen=True)
class Stack:
    """The containers of one project; `compose` is how the command is called here."""

    compose: tuple[str, ...]
    project: str
    environment: dict[str, str]

    @classmethod
    def make(cls, folder: Path) -> Stack:
        """Secrets in `folder`, ports that are free now; nothing is started."""
        ports = {name: str(free_port()) for name in PORTS}
        environment = os.environ | ports | {"SECRETS": str(folder), "SECRETS_GID": str(os.getgid())}
        if "GRAFANA_IMAGE" in environment:
            environment["COMPOSE_PROFILES"] = GRAFANA
        two = subprocess.run(["docker", "compose", "version"], capture_output=True, check=False).returncode == 0
        compose = ("docker", "compose") if two else ("docker-compose",)
        stack = cls(compose, f"model-manager-{secrets.token_hex(4)}", environment)
        stack.make_secrets()
        return stack

    @property
    def services(self) -> tuple[str, ...]:
        """What runs all the time here: Grafana too where the environment names its image."""
        return (*SERVICES, GRAFANA) if "COMPOSE_PROFILES" in self.environment else SERVICES

    @property
    def secrets_folder(self) -> Path:
        return Path(self.environment["SECRETS"])

    def make_secrets(self) -> None:
        """Those that are missing."""
        subprocess.run([DEPLOY / "compose/secrets.sh", self.secrets_folder], check=True, stdout=subprocess.DEVNULL)

    @property
    def store_url(self) -> str:
        return f"http://127.0.0.1:{self.environment['OBJECT_STORE_PORT']}"

    def command(self, *arguments: str) -> list[str]:
        return [*self.compose, "--project-name", self.project, "--file", str(DEPLOY / "compose.yaml"), *arguments]

    def run(self, *arguments: str) -> str:
        """What a command of Compose prints. Raises `Broken` with the end of its output."""
        done = subprocess.run(
            self.command(*arguments), env=self.environment, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise Broken(f"compose {' '.join(arguments[:3])}: {(done.stdout + done.stderr)[-1500:]}")
        return done.stdout

    def client(self, *arguments: str, options: tuple[str, ...] = ()) -> str:
        """What the service `client` prints: `model-manager` with these arguments, or the entry point in `options`."""
        return self.run("run", "--rm", "-T", *options, "client", *arguments)

    @contextmanager
    def listening(self) -> Iterator[Iterator[dict[str, Any]]]:
        """The hints from here on, each as its JSON."""
        command = self.command("run", "--rm", "-T", "--entrypoint", "python", "client", "-c", LISTENER)
        with subprocess.Popen(
            command, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as listener:
            assert listener.stdout is not None
            try:
                if not any(line.strip() == "listening" for line in listener.stdout):
                    raise Broken(f"nobody listens: {listener.stderr.read()[-1500:] if listener.stderr else ''}")
                yield (json.loads(line) for line in listener.stdout)
            finally:
                listener.terminate()

    def states(self) -> dict[str, str]:
        """Docker's word on each service's container."""
        label = "com.docker.compose"
        form = f'{{{{.Label "{label}.service"}}}}={{{{.Status}}}}'
        told = docker("ps", "--all", "--filter", f"label={label}.project={self.project}", "--format", form)
        return dict(line.split("=", 1) for line in told.splitlines())

    def until_healthy(self) -> None:
        def healthy() -> bool:
            states = self.states()
            return all("(healthy)" in states.get(service, "") for service in self.services)

        until(healthy, lambda: f"not healthy: {self.states()}")

    def container(self, service: str) -> str:
        filters = (f"label=com.docker.compose.project={self.project}", f"label=com.docker.compose.service={service}")
        return docker("ps", "--all", "--quiet", *(word for each in filters for word in ("--filter", each))).split()[0]

    def send(self, rack: str, verb: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
        """Status and body of an answer of a rack's HTTP service; status 0 where there is none."""
        token = (self.secrets_folder / "http-token").read_text().strip()
        headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/octet-stream"}
        port = self.environment[f"{rack.upper().replace('-', '_')}_PORT"]
        request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", body, headers, method=verb)
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()
        except OSError as error:
            return 0, str(error).encode()

    def prometheus(self, path: str, **parameters: str) -> Any:
        """The data of an answer of Prometheus' API."""
        query = "&".join(f"{name}={quote(value)}" for name, value in parameters.items())
        url = f"http://127.0.0.1:{self.environment['PROMETHEUS_PORT']}/api/v1/{path}?{query}"
        with urllib.request.urlopen(url, timeout=30) as answer:
            return json.load(answer)["data"]

    def grafana(self, path: str, body: Any = None) -> Any:
        """An answer of Grafana's API to its administrator."""
        password = (self.secrets_folder / "grafana-password").read_text().strip()
        login = base64.b64encode(f"admin:{password}".encode()).decode()
        headers = {"Authorization": f"Basic {login}", "Content-Type": "application/json"}
        url = f"http://127.0.0.1:{self.environment['GRAFANA_PORT']}/api/{path}"
        data = None if body is None else json.dumps(body).encode()
        with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=30) as answer:
            return json.load(answer)


def docker(*arguments: str) -> str:
    done = subprocess.run(["docker", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise Broken(f"docker {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


def until(condition: Callable[[], bool], tell: Callable[[], str]) -> None:
    """Returns when it is so. Raises `Broken` with what `tell` says after four minutes."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        if time.monotonic() > deadline:
            raise Broken(tell())
        time.sleep(POLL_S)
