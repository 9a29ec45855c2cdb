"""The Grafana dashboard asks for metrics that exist; `test_prometheus.py` sees what a worker gives for each of them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from worker.metrics import Metrics

DASHBOARD = json.loads((Path(__file__).parents[2] / "deploy/grafana/model-manager.json").read_text())


def expressions() -> Iterator[str]:
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", []):
            yield str(target["expr"])


def test_every_metric_of_the_dashboard_exists() -> None:
    text = Metrics("rack-1").render()[1].decode()
    exported = set(re.findall(r"^# TYPE (\w+) ", text, re.MULTILINE))
    exported |= {f"{name}_{part}" for name in exported for part in ("bucket", "count", "sum")}
    asked = {name for each in expressions() for name in re.findall(r"\b(?:model_manager|process)_\w+", each)}
    assert len(asked) > 30
    assert asked <= exported


def test_no_two_panels_have_one_id_and_none_lies_over_another() -> None:
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(ids) == len(set(ids))
    places = {
        (x, y)
        for panel in DASHBOARD["panels"]
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    }
    assert len(places) == sum(panel["gridPos"]["w"] * panel["gridPos"]["h"] for panel in DASHBOARD["panels"])


@pytest.mark.parametrize("expression", sorted(set(expressions())))
def test_the_expression_chooses_the_rack(expression: str) -> None:
    assert 'model_manager_rack_info{rack=~"$rack"}' in expression
