"""What the README says of the journal's files: `jq`, `grep` and `tail -f` work on them, beside a running worker."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.process import Processes, Service, wait_until

README = (Path(__file__).parents[2] / "README.md").read_text()

pytestmark = pytest.mark.skipif(
    shutil.which("jq") is None, reason="jq is not installed: its README lines were NOT TRIED"
)


def documented(tool: str) -> str:
    """The README's command line that begins with `tool`, without what is said of it."""
    [line] = re.findall(rf"^({tool} .*?) +# .*$", README, re.MULTILINE)
    return str(line)


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    with Processes(tmp_path) as processes:
        service = processes.start("serve").until_ready()
        for model in ("minilm", "other"):
            assert service.put(model, model.encode()).status == 201
        yield service
        assert service.stop() == 0


def output(service: Service, command: str) -> list[str]:
    done = subprocess.run(["bash", "-ec", command], cwd=service.folder, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout.splitlines()


def test_jq_finds_what_was_stored(service: Service) -> None:
    assert output(service, documented("jq -c")) == ['"minilm"', '"other"']


def test_grep_finds_what_happened_to_a_model(service: Service) -> None:
    assert service.send("DELETE", "/api/models/minilm").status == 200
    lines = output(service, documented("grep"))
    assert [re.findall(r'"op":"(\w+)"', line) for line in lines] == [["store"], ["delete"]]


def test_tail_shows_what_happens_now(service: Service, tmp_path: Path) -> None:
    seen = tmp_path / "seen"
    with seen.open("wb") as target:
        tail = subprocess.Popen(
            ["bash", "-c", documented("tail -f").replace("jq .", "jq --unbuffered -c .rec.model")],
            cwd=service.folder,
            stdout=target,
            start_new_session=True,
        )
    try:
        wait_until(lambda: b"other" in seen.read_bytes(), "the lines that were there", 10)
        assert service.put("newest", b"newest").status == 201
        wait_until(lambda: b'"newest"' in seen.read_bytes(), "the line of a store", 10)
    finally:
        os.killpg(tail.pid, signal.SIGKILL)
        tail.wait()
