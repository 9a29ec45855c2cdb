"""The alerts as a PrometheusRule: `python -m deploy.checks.rules` writes `kubernetes/monitoring/rules.yaml`."""

from __future__ import annotations

from pathlib import Path
from textwrap import indent

DEPLOY = Path(__file__).parents[1]
GENERATED = DEPLOY / "kubernetes/monitoring/rules.yaml"

_HEAD = """\
# Made of deploy/prometheus/rules.yml by `make schemas`.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: model-manager
spec:
"""


def prometheus_rule() -> str:
    """The alerts of `prometheus/rules.yml`, unchanged, under the head that the Prometheus operator wants."""
    return _HEAD + indent((DEPLOY / "prometheus/rules.yml").read_text(), "  ")


if __name__ == "__main__":
    GENERATED.write_text(prometheus_rule())
