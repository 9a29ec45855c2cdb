"""The systemd unit is one that systemd takes, and that leaves the worker little to do harm with."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from schemas.errors import EXIT_CONFIG_INVALID
from worker.settings import load_settings

SHIPPED = Path(__file__).parents[2] / "deploy/systemd/wrk-model-manager@.service"
INSTALLED = "/opt/wrk-model-manager/bin/model-manager"

pytestmark = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")


@pytest.fixture
def unit(tmp_path: Path) -> Path:
    """The unit for a rack, with a program that is there."""
    unit = tmp_path / "wrk-model-manager@rack-1.service"
    text = SHIPPED.read_text()
    assert text.count(INSTALLED) == 1
    unit.write_text(text.replace(INSTALLED, str(Path(sys.executable).with_name("model-manager"))))
    return unit


def test_the_settings_of_the_unit_are_those_of_its_rack_with_the_credential_it_loads(tmp_path: Path) -> None:
    text = SHIPPED.read_text()
    [credential] = re.findall(r"^LoadCredential=([^:]+):", text, re.MULTILINE)
    (tmp_path / credential).touch(mode=0o400)
    (tmp_path / credential).write_text("amqp://worker-rack-2:secret@broker/model-manager")
    (tmp_path / "common.json").write_text("{}")
    expanded = text.replace("/etc/wrk-model-manager", "%d").replace("%d", str(tmp_path)).replace("%i", "rack-2")
    environment = dict(line.split("=", 1) for line in re.findall(r"^Environment=(.*)$", expanded, re.MULTILINE))
    loaded = load_settings(environment=environment)
    assert loaded.warnings == ()
    assert loaded.settings.rack == "rack-2"
    assert loaded.amqp_url == (tmp_path / credential).read_text()
    assert [path.parts[-2] for path in (loaded.settings.registry.path, loaded.settings.storage.path)] == ["rack-2"] * 2


def test_the_unit_gives_the_worker_its_times_and_does_not_try_what_cannot_work_again() -> None:
    told = dict(re.findall(r"^(\w+)=(\d+)$", SHIPPED.read_text(), re.MULTILINE))
    timeouts = load_settings(environment={}).settings.timeouts
    assert int(told["TimeoutStopSec"]) > timeouts.drain
    assert int(told["WatchdogSec"]) > timeouts.loop_stall
    assert int(told["RestartPreventExitStatus"]) == EXIT_CONFIG_INVALID


def analyze(*words: str | Path) -> str:
    ran = subprocess.run(["systemd-analyze", *words], capture_output=True, text=True, timeout=60, check=True)
    return ran.stdout + ran.stderr


def test_systemd_finds_nothing_wrong_with_the_unit(unit: Path) -> None:
    assert analyze("verify", unit) == ""


def test_the_unit_is_exposed_to_little(unit: Path) -> None:
    report = analyze("security", "--offline=true", "--no-pager", unit)
    found = re.search(r"Overall exposure level for \S+: ([0-9.]+)", report)
    assert found is not None, report
    assert float(found[1]) < 2.0
