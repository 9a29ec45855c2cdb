"""The systemd unit is one that systemd takes, and that leaves the worker little to do harm with."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

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
