"""The alerts ask for metrics that exist, and each has its tests and its section in the runbook."""

from __future__ import annotations

import re
from pathlib import Path

from worker.metrics import Metrics

DEPLOY = Path(__file__).parents[2] / "deploy"
RULES = (DEPLOY / "prometheus/rules.yml").read_text()
ALERTS = re.findall(r"- alert: (\w+)", RULES)


def test_every_metric_in_the_rules_exists_with_its_labels() -> None:
    text = Metrics("rack-1").render()[1].decode()
    exported = set(re.findall(r"^# TYPE (\w+) ", text, re.MULTILINE))
    exported |= {f"{name}_{part}" for name in exported for part in ("bucket", "count", "sum")}
    asked = set(re.findall(r"\bmodel_manager_\w+", RULES))
    assert asked
    assert asked <= exported


def test_every_alert_is_tested_and_has_its_section_in_the_runbook() -> None:
    tested = re.findall(r"- name: (\w+)", (DEPLOY / "prometheus/rules_test.yml").read_text())
    sections = re.findall(r"^## (ModelManager\w+)$", (DEPLOY / "README.md").read_text(), re.MULTILINE)
    linked = re.findall(r"runbook_url: deploy/README.md#(\w+)", RULES)
    assert sorted(tested) == sorted(ALERTS) == sorted(sections)
    assert linked == [alert.lower() for alert in ALERTS]
