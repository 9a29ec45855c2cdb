"""`make lint-deploy`: what lies in `deploy/`, checked with the tools of each field.

A line for each check. The exit status is 1 if one finds something; a tool that cannot be had is no failure, but is told
again at the end.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from deploy.checks.programs import hadolint, of_go, of_machine
from deploy.local.server import Unavailable

DEPLOY = Path(__file__).parents[1]
UNIT = DEPLOY / "systemd/wrk-model-manager@.service"
INSTALLED = "/opt/wrk-model-manager/bin/model-manager"
SCHEMAS = DEPLOY / "kubernetes/schemas/{{.ResourceKind}}.json"
CHECK_S = 120


@dataclass(frozen=True, slots=True)
class Check:
    """A check by its name; `run` gives the exit status and what was said."""

    name: str
    run: Callable[[], tuple[int, str]]


def main() -> int:
    failed, missing = [], []
    for check in checks():
        try:
            status, said = check.run()
        except Unavailable as error:
            missing.append(f"NOT CHECKED: {check.name}: {error}")
            continue
        print(f"{'BAD' if status else 'ok '} {check.name}", flush=True)
        if status:
            failed.append(check.name)
            print(said, flush=True)
    for line in missing:
        print(line, flush=True)
    return 1 if failed else 0


def checks() -> Iterator[Check]:
    for words in (("check", "config", "prometheus.yml"), ("test", "rules", "rules_test.yml")):
        yield Check(f"promtool {' '.join(words)}", partial(prometheus, *words))
    for folder in kustomizations():
        yield Check(f"kubeconform {folder.relative_to(DEPLOY)}", partial(conforms, folder))
    yield Check(f"systemd-analyze verify {UNIT.name}", unit_is_good)
    for dockerfile in sorted(DEPLOY.rglob("*Dockerfile")):
        yield Check(f"hadolint {dockerfile.relative_to(DEPLOY)}", partial(image_is_good, dockerfile))


def kustomizations() -> list[Path]:
    """The folders that are applied, each by itself."""
    folder = DEPLOY / "kubernetes"
    return [folder / "cluster", folder / "monitoring", *sorted((folder / "overlays").iterdir())]


def prometheus(*words: str) -> tuple[int, str]:
    return ran([of_machine("promtool", "prometheus"), *words], folder=DEPLOY / "prometheus")


def conforms(folder: Path) -> tuple[int, str]:
    """Whether what is built in `folder` is what the schemas of its kinds ask for."""
    status, manifests = ran([of_go("kustomize"), "build", folder])
    if status:
        return status, manifests
    return ran([of_go("kubeconform"), "-strict", "-summary", "-schema-location", SCHEMAS, "-"], given=manifests)


def unit_is_good() -> tuple[int, str]:
    """What systemd says of the unit of a rack, with a program that is there; a good one leaves it nothing to say."""
    program = of_machine("systemd-analyze", "systemd")
    with tempfile.TemporaryDirectory() as folder:
        unit = Path(folder) / UNIT.name.replace("@", "@rack-1")
        unit.write_text(UNIT.read_text().replace(INSTALLED, "/bin/true"))
        status, said = ran([program, "verify", unit])
    return status or int(bool(said)), said


def image_is_good(dockerfile: Path) -> tuple[int, str]:
    return ran([hadolint(), "--no-color", "--config", DEPLOY / "hadolint.yaml", dockerfile])


def ran(command: Sequence[str | Path], *, folder: Path = DEPLOY, given: str = "") -> tuple[int, str]:
    done = subprocess.run(
        command,
        cwd=folder,
        input=given,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=CHECK_S,
    )
    return done.returncode, done.stdout


if __name__ == "__main__":
    sys.exit(main())
