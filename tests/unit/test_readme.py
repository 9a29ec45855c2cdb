"""The README stays true: every setting, code, method, metric and command in it exists, and none is missing."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from schemas.errors import ERRORS
from schemas.hints import HINT_TYPES
from schemas.ids import MAX_FILES, MAX_METADATA_BYTES, MAX_TAGS
from schemas.model import MAX_WAIT_MS
from schemas.rpc import METHODS
from schemas.wire import MAX_BODY_BYTES, MAX_DEPTH
from worker.cli import app
from worker.metrics import Metrics
from worker.settings import known_keys
from worker.transport import topology
from worker.transport.replies import MAX_REPLY_BYTES

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("key", [path for path, _ in known_keys()])
def test_every_setting_is_explained(key: str) -> None:
    assert f"`{key}`" in README


def test_every_setting_in_the_table_exists() -> None:
    table = README.partition("## Configuration")[2].partition("## Operations")[0]
    first_cells = re.findall(r"^\| (`[^|]*) \|", table, re.MULTILINE)
    named = {key for cell in first_cells for key in re.findall(r"`([^`]+)`", cell)}
    assert named == {path for path, _ in known_keys()}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_explained(method: str) -> None:
    assert f"`{method}`" in README


def test_the_error_table_is_the_table_of_the_code() -> None:
    rows = re.findall(r"^\| `(ERR_[A-Z_]+)` \| (.*?) \| (\d+) \| (\d+) \| (yes)? *\|$", README, re.MULTILINE)
    assert rows == [
        (kind.code, kind.sentence, str(kind.http_status), str(kind.exit_code), "yes" if kind.retryable else "")
        for kind in ERRORS.values()
    ]


@pytest.mark.parametrize("hint", HINT_TYPES)
def test_every_hint_is_named(hint: str) -> None:
    assert f"`{hint}`" in README or f"`.{hint.rpartition('.')[2]}`" in README


def test_every_metric_is_listed_and_every_listed_metric_exists() -> None:
    text = Metrics("rack-1").render()[1].decode()
    exported = set(re.findall(r"^# TYPE (model_manager_\w+) ", text, re.MULTILINE))
    listed = {f"model_manager_{name}" for name in re.findall(r"^\| `model_manager_(\w+)` \|", README, re.MULTILINE)}
    assert listed == exported


def test_every_command_exists() -> None:
    commands = set(re.findall(r"(?<![-/])model-manager ((?:config|topology|dead|journal) \w+|[a-z]+)\b", README))
    for command in sorted(commands):
        shown = CliRunner().invoke(app, [*command.split(), "--help"])
        assert shown.exit_code == 0, command


def test_every_make_target_exists() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"`?\bmake ([a-z-]+)", README)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_every_link_leads_somewhere() -> None:
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / link).exists(), link


def test_the_orchestrator_is_the_program_that_the_tests_run() -> None:
    program = (ROOT / "tests/callers/orchestrator.py").read_text()
    shown = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert [text for text in shown if text not in program] == []
    assert any("ModelManagerClient" in text for text in shown)


def test_the_limits_on_the_wire_are_those_of_the_code() -> None:
    section = README.partition("### On the wire")[2].partition("### Methods")[0].replace("\n", " ")
    for limit in (
        f"at most {MAX_BODY_BYTES // 1_000_000} MB, {MAX_DEPTH} levels",
        f"{MAX_METADATA_BYTES // 1024} KiB and {MAX_TAGS} tags",
        f"{MAX_FILES:,} files",
        f"`waitMs` {MAX_WAIT_MS:,}",
        f"A reply has at most {MAX_REPLY_BYTES // 1_000_000} MB",
        f"{topology.MAX_REQUESTS:,} requests or {topology.MAX_REQUEST_BYTES // 1_000_000} MB",
        f"for {topology.DEAD_LETTER_TTL_MS // 86_400_000} days",
    ):
        assert limit in section, limit
    assert topology.DELIVERY_LIMIT == 20, "as the section says"
    assert all(f"`{name}`" in section for name in (topology.RPC_EXCHANGE, topology.dead_letter_queue("<rack>")))


def test_the_callers_are_as_short_as_is_said() -> None:
    files = [*(ROOT / "tests/callers/node").glob("*.mjs"), *(ROOT / "tests/callers/go").glob("*.go")]
    assert files
    assert {file.name: lines for file in files if (lines := len(file.read_text().splitlines())) >= 100} == {}
