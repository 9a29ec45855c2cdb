"""The procedures of the operations guide, carried out as they stand in deploy/README.md.

Commands are run as they are written, and a real worker is stopped and started where the text says so.
"""

from __future__ import annotations

import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from botocore.exceptions import ClientError

from deploy.checks.__main__ import conforms
from deploy.checks.programs import installed
from deploy.local import ObjectStore
from tests.amqp import delete_queues
from tests.process import Processes, Service, environment_of, free_port, nobodys_environment
from tests.store_users import client_of, credentials_file, run_users, trespasses

if TYPE_CHECKING:
    from types_boto3_s3 import S3Client

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "deploy/README.md").read_text().partition("## The operations guide")[2].partition("\n## ")[0]
STEP = re.compile(r"```sh\n(.*?)```|\b(Stop|Start) the worker\.", re.DOTALL)
MODELS = ("minilm", "other")


def procedure(title: str, part: str = "") -> list[str]:
    """The steps of a procedure: commands, `Stop` and `Start`. With `part`, of the part that begins with these words."""
    [text] = re.findall(rf"^### {title}\n(.*?)(?=^### |\Z)", GUIDE, re.DOTALL | re.MULTILINE)
    if part:
        [text] = re.findall(rf"^\*\*{part}\*\*(.*?)(?=^\*\*|\Z)", text, re.DOTALL | re.MULTILINE)
    steps = [commands or word for commands, word in STEP.findall(text)]
    assert steps
    return steps


@dataclass
class Rack:
    """A worker with a registry and models, in a folder that the commands of an operator work in."""

    folder: Path
    processes: Processes
    settings: dict[str, object]
    worker: Service
    environment: dict[str, str]

    @property
    def registry(self) -> Path:
        return Path(str(self.settings["registry.path"]))

    @property
    def models(self) -> Path:
        return Path(str(self.settings["storage.path"]))

    def stop(self) -> None:
        assert self.worker.stop() == 0

    def start(self) -> None:
        self.worker = self.processes.start("worker", settings=self.settings, environment=self.environment).until_ready()

    def carry_out(self, steps: list[str]) -> str:
        """Do what is written; what the commands said."""
        said = ""
        for step in steps:
            if step in ("Stop", "Start"):
                {"Stop": self.stop, "Start": self.start}[step]()
            else:
                said += self.run(step)
        return said

    def run(self, commands: str) -> str:
        env = nobodys_environment() | environment_of(self.settings) | self.environment
        env["BACKUP"] = str(self.folder / "backup")
        env["PATH"] = f"{self.folder / 'bin'}:{env['PATH']}"
        done = subprocess.run(
            ["bash", "-e", "-o", "pipefail", "-c", commands],
            cwd=self.folder,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, f"{commands}\n{done.stdout}"
        return done.stdout

    def listed(self) -> dict[str, str]:
        """The state of each model that the rack has."""
        return {entry["modelId"]: entry["state"] for entry in self.worker.get("/api/models")["models"]}

    def content(self, model: str) -> bytes:
        return self.worker.send("GET", f"/api/models/{model}/versions/1.0.0/content").body


@contextmanager
def running(folder: Path, settings: dict[str, object], environment: dict[str, str]) -> Iterator[Rack]:
    """A rack that has stored `MODELS`, whose bytes are their names, with the programs of an installation."""
    (folder / "backup").mkdir()
    (folder / "bin").mkdir()
    for name, arguments in (("model-manager", "-m worker"), ("python", "")):
        program = folder / "bin" / name
        program.write_text(f'#!/bin/sh\nexec {sys.executable} {arguments} "$@"\n')
        program.chmod(0o755)
    settings = {"http.port": free_port(), "registry.path": str(folder / "registry"), **settings}
    with Processes(folder) as processes:
        worker = processes.start("worker", settings=settings, environment=environment).until_ready()
        for model in MODELS:
            assert worker.put(model, model.encode()).status == 201
        yield Rack(folder, processes, settings, worker, environment)


@pytest.fixture
def there(tmp_path: Path, amqp_url: str, rack: str) -> Iterator[Rack]:
    """With its models on disk."""
    settings: dict[str, object] = {"rack": rack, "amqp.url": amqp_url, "storage.path": str(tmp_path / "models")}
    with running(tmp_path, settings, {}) as started:
        yield started


def intact(rack: Rack) -> None:
    assert rack.listed() == dict.fromkeys(MODELS, "available")
    assert {model: rack.content(model) for model in MODELS} == {model: model.encode() for model in MODELS}


def test_a_backup_brings_back_a_rack_that_lost_registry_and_models(there: Rack) -> None:
    there.carry_out(procedure("Backup"))
    assert there.worker.put("later", b"later").status == 201
    steps = procedure("Restore")
    assert there.carry_out(steps).count(" ok ") == 3
    intact(there)
    assert there.worker.put("afterwards", b"afterwards").status == 201


def test_an_upgrade_goes_by_with_a_backup_and_a_restart(there: Rack) -> None:
    said = there.carry_out(procedure("Upgrade"))
    assert "the settings are usable" in said
    assert (there.folder / "backup/before-upgrade").is_dir()
    intact(there)


def test_a_registry_that_is_gone_is_made_of_the_archive(there: Rack) -> None:
    first, *rest = procedure("Losing a disk", "That of the registry")
    assert first == "Stop"
    there.stop()
    shutil.rmtree(there.registry)
    there.carry_out(rest)
    intact(there)


def test_models_that_are_gone_come_back_or_are_named(there: Rack) -> None:
    there.carry_out(procedure("Backup"))
    assert there.worker.put("later", b"later").status == 201
    first, *rest = procedure("Losing a disk", r"That of the models\.")
    assert first == "Stop"
    there.stop()
    shutil.rmtree(there.models)
    assert "LOST later:1.0.0\n" in there.carry_out(rest)
    assert there.listed() == {**dict.fromkeys(MODELS, "available"), "later": "quarantined"}
    assert [there.content(model) for model in MODELS] == [model.encode() for model in MODELS]


async def test_a_broker_that_lost_its_data_has_its_topology_again(there: Rack, amqp_url: str, rack: str) -> None:
    there.stop()
    await delete_queues(amqp_url, rack)
    there.settings["amqp.provision"] = False
    there.worker = there.processes.start("worker", settings=there.settings)
    there.worker.until(lambda: not there.worker.checks().get("broker", {"ok": True})["ok"], "it misses its queue")
    assert there.carry_out(procedure("Losing the broker")).count(f"the topology of {rack} is good") == 2
    there.worker.until_ready()


def test_a_new_token_is_asked_for_after_the_restart(there: Rack) -> None:
    token = there.folder / "token"
    token.touch(mode=0o600)
    token.write_text("the first one\n")
    there.settings["http.tokenFile"] = str(token)
    there.stop()
    there.start()
    there.carry_out(procedure("Rotating credentials", "The token of HTTP"))
    assert len(token.read_text().strip()) == 64
    assert there.worker.send("GET", "/api/models").status == 401
    shown = there.run(f"model-manager ls --url {there.worker.url} --token-file {token}")
    assert all(model in shown for model in MODELS)


def test_the_keys_of_the_object_store_are_exchanged(
    object_store: ObjectStore, s3_bucket: str, s3_client: S3Client, amqp_url: str, rack: str, tmp_path: Path
) -> None:
    keys = credentials_file(tmp_path / "keys", rack, "worker", "clean-up")
    assert run_users(object_store, "add", keys, "--rack", rack, "--bucket", s3_bucket)[0] == 0
    first = client_of(keys, "worker", object_store.endpoint_url)
    administrator = tmp_path / "administrator"
    administrator.write_text(
        f"[default]\naws_access_key_id = {object_store.access_key}\naws_secret_access_key = {object_store.secret_key}\n"
    )
    (tmp_path / "deploy").symlink_to(ROOT / "deploy")
    settings: dict[str, object] = {
        "rack": rack,
        "amqp.url": amqp_url,
        "storage.backend": "s3",
        "storage.s3.endpointUrl": object_store.endpoint_url,
        "storage.s3.bucket": s3_bucket,
        "storage.s3.cleanUpProfile": "clean-up",
    }
    environment = {"AWS_SHARED_CREDENTIALS_FILE": str(keys), "ADMINISTRATOR": str(administrator)}
    with running(tmp_path, settings, environment) as there:
        said = there.carry_out(procedure("Rotating credentials", "The keys of the object store"))
        assert [line.partition(")")[2] for line in said.splitlines()] == [" may use the store"] * 2 + [" is gone"] * 2
        with pytest.raises(ClientError, match="InvalidAccessKeyId"):
            first.list_objects_v2(Bucket=s3_bucket)
        intact(there)
        assert there.worker.put("afterwards", b"afterwards").status == 201
        there.stop()
    assert [path.name for path in tmp_path.glob("keys*")] == ["keys"]
    assert stat.S_IMODE(keys.stat().st_mode) == 0o600
    s3_client.put_object(Bucket=s3_bucket, Key="another/owner.json", Body=b"{}")
    assert trespasses(keys, object_store.endpoint_url, s3_bucket, rack, "another") == []
    run_users(object_store, "remove", keys)
    first.close()


def test_the_commands_need_nothing_that_the_image_of_the_worker_does_not_have() -> None:
    """They are run in its pod, where nobody can install anything; `aws` and `rabbitmqctl` belong to others' hosts."""
    blocks = "".join(re.findall(r"```sh\n(.*?)```", GUIDE, re.DOTALL))
    assert not set(re.findall(r"[\w.-]+", blocks)) & {"jq", "curl", "wget", "ps", "pgrep", "vi", "less", "ssh", "rsync"}


def test_a_rack_is_added(there: Rack, amqp_url: str) -> None:
    name = f"{there.settings['rack']}-3"
    provision, overlay, look = (step.replace("rack-3", name) for step in procedure("Adding a rack"))
    shutil.copytree(ROOT / "deploy/kubernetes", there.folder / "deploy/kubernetes")
    assert f"the topology of {name} is good" in there.run(provision)
    there.stop()
    there.settings |= {
        "rack": name,
        "registry.path": str(there.folder / "new"),
        "storage.path": str(there.folder / "n"),
    }
    there.start()
    assert there.run(look).count(" ok ") == 3
    there.run(overlay)
    folder = there.folder / "deploy/kubernetes/overlays" / name
    assert "rack-1" not in (folder / "kustomization.yaml").read_text()
    if installed("kustomize") and installed("kubeconform"):
        status, said = conforms(folder)
        assert status == 0, said
