"""The manifests of Kubernetes say what the worker, its image and its alerts say; one rack differs from another by its
overlay only."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml

from deploy.checks.__main__ import conforms, kustomizations
from deploy.checks.programs import installed
from deploy.checks.rules import GENERATED, prometheus_rule
from tests.process import Processes, free_port
from worker import __version__
from worker.settings import Loaded, load_settings
from worker.transport.http_access import OPEN_PATHS

DEPLOY = Path(__file__).parents[2] / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
DOCKERFILE = (DEPLOY / "Dockerfile").read_text()
RACKS = sorted(folder.name for folder in (KUBERNETES / "overlays").iterdir())
SECRETS = {
    "amqp-url": "amqp://worker:secret@127.0.0.1:1/",
    "http-token": "token",
    "aws-credentials": "[default]\n[clean-up]\naws_access_key_id = clean-up\naws_secret_access_key = secret\n",
}

with_kustomize = pytest.mark.skipif(
    installed("kustomize") is None or installed("kubeconform") is None,
    reason="kustomize and kubeconform are not here (`make lint-deploy` builds them): the manifests were NOT BUILT",
)


def document(path: str) -> Any:
    return yaml.safe_load((KUBERNETES / path).read_text())


STATEFUL_SET = document("base/stateful-set.yaml")["spec"]
POD = STATEFUL_SET["template"]["spec"]
[WORKER] = POD["containers"]
MOUNTS = {mount["name"]: mount["mountPath"] for mount in WORKER["volumeMounts"]}


@dataclass(frozen=True)
class Pod:
    """A rack's pod on this machine: what the manifests put into its files and its environment."""

    environment: dict[str, str]

    @property
    def loaded(self) -> Loaded:
        return load_settings(environment=self.environment)


def pod_of(rack: str, folder: Path) -> Pod:
    """The pod of an overlay, with its mounts below `folder`."""
    secrets = folder / "secrets"
    secrets.mkdir()
    for name, text in SECRETS.items():
        (secrets / name).touch(mode=0o440)
        (secrets / name).write_text(text)
    common = (KUBERNETES / "base/common.json").read_text()
    (folder / "common.json").write_text(common.replace(MOUNTS["credentials"], str(secrets)))
    [rack_settings] = document(f"overlays/{rack}/kustomization.yaml")["configMapGenerator"]
    environment = dict(literal.split("=", 1) for literal in rack_settings["literals"])
    for variable in WORKER["env"]:
        value = variable["value"].replace(MOUNTS["credentials"], str(secrets)).replace(MOUNTS["settings"], str(folder))
        environment[variable["name"]] = value
    return Pod(environment)


@pytest.fixture(params=RACKS)
def pod(request: pytest.FixtureRequest, tmp_path: Path) -> Pod:
    return pod_of(request.param, tmp_path)


def test_there_is_an_overlay_for_each_rack_that_has_settings() -> None:
    assert sorted(path.stem for path in (DEPLOY.parent / "config/racks").glob("*.json")) == RACKS


def test_the_worker_takes_the_settings_of_a_pod(pod: Pod) -> None:
    loaded = pod.loaded
    assert loaded.warnings == ()
    assert loaded.settings.rack in RACKS
    assert set(loaded.settings.replication.peers) == set(RACKS) - {loaded.settings.rack}
    assert loaded.settings.http.public_url == f"http://model-manager-{loaded.settings.rack}.model-manager:8002"
    assert (loaded.token, loaded.amqp_url) == (SECRETS["http-token"], SECRETS["amqp-url"])
    assert not loaded.settings.amqp.provision  # its login, from the definitions, may not
    assert loaded.settings.storage.s3.clean_up_profile == "clean-up"  # nor may its first pair of keys remove anything


def test_what_the_worker_keeps_lies_on_its_volume(pod: Pod) -> None:
    [claim] = STATEFUL_SET["volumeClaimTemplates"]
    data = Path(MOUNTS[claim["metadata"]["name"]])
    assert pod.loaded.settings.registry.path.parent == data
    assert pod.loaded.settings.storage.path.parent == data
    assert f"VOLUME {data}\n" in DOCKERFILE


def test_every_secret_is_a_file_that_not_everyone_can_read() -> None:
    text = (KUBERNETES / "base/common.json").read_text() + json.dumps(WORKER["env"])
    assert set(re.findall(rf'"{MOUNTS["credentials"]}/([^"]+)"', text)) == set(SECRETS)
    [volume] = [each for each in POD["volumes"] if each["name"] == "credentials"]
    assert volume["secret"]["defaultMode"] & 0o007 == 0
    for rack in RACKS:
        overlay = (KUBERNETES / f"overlays/{rack}/kustomization.yaml").read_text()
        assert set(re.findall(r"--from-file=(\S+)", overlay)) == set(SECRETS)


def test_user_port_and_image_are_those_of_the_dockerfile(pod: Pod) -> None:
    security = POD["securityContext"]
    assert f"USER {security['runAsUser']}:{security['runAsGroup']}\n" in DOCKERFILE
    assert security["fsGroup"] == security["runAsGroup"]
    [port] = WORKER["ports"]
    assert f"EXPOSE {port['containerPort']}\n" in DOCKERFILE
    assert pod.loaded.settings.http.port == port["containerPort"]
    [image] = document("base/kustomization.yaml")["images"]
    assert (image["name"], image["newTag"]) == (WORKER["image"], __version__)


def test_the_pod_has_no_rights_that_it_does_not_need() -> None:
    assert WORKER["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert POD["securityContext"]["runAsNonRoot"] is True
    assert POD["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert POD["automountServiceAccountToken"] is False


def test_the_pod_reaches_names_broker_and_store_and_is_reached_by_http_only(pod: Pod) -> None:
    policy = document("base/network-policy.yaml")["spec"]
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    assert {port["port"] for rule in policy["ingress"] for port in rule["ports"]} == {WORKER["ports"][0]["name"]}
    assert all(peer["podSelector"]["matchExpressions"] for rule in policy["ingress"] for peer in rule["from"])
    names, broker, store = ({port["port"] for port in rule["ports"]} for rule in policy["egress"])
    assert names == {53}
    assert broker == {5671, 5672}  # amqps, amqp
    assert urlsplit(str(pod.loaded.settings.storage.s3.endpoint_url)).port in store


def test_memory_is_what_was_asked_for_so_that_a_full_node_does_not_end_it() -> None:
    assert WORKER["resources"]["limits"]["memory"] == WORKER["resources"]["requests"]["memory"]


def test_one_process_writes_and_is_given_the_time_that_it_needs(pod: Pod) -> None:
    timeouts = pod.loaded.settings.timeouts
    assert STATEFUL_SET["replicas"] == 1
    assert POD["terminationGracePeriodSeconds"] > timeouts.drain
    liveness = WORKER["livenessProbe"]
    assert liveness["periodSeconds"] * liveness["failureThreshold"] > timeouts.loop_stall


def test_probes_and_monitor_ask_for_what_is_open_to_all() -> None:
    paths = {name: WORKER[name]["httpGet"]["path"] for name in ("startupProbe", "livenessProbe", "readinessProbe")}
    assert paths == {"startupProbe": "/livez", "livenessProbe": "/livez", "readinessProbe": "/readyz"}
    [endpoint] = document("monitoring/service-monitor.yaml")["spec"]["endpoints"]
    assert {*paths.values(), endpoint["path"]} <= OPEN_PATHS


def test_a_pod_whose_broker_and_store_are_away_is_alive_and_not_ready(tmp_path: Path) -> None:
    environment = pod_of(RACKS[0], tmp_path).environment
    settings = {"http.port": free_port(), "registry.path": str(tmp_path / "registry")}
    with Processes(tmp_path) as processes:
        worker = processes.start("worker", settings=settings, environment=environment)
        worker.until(lambda: "waiting_for_storage" in worker.log, "it looks for the store")
        assert worker.send("GET", WORKER["livenessProbe"]["httpGet"]["path"]).status == 200
        assert worker.send("GET", WORKER["readinessProbe"]["httpGet"]["path"]).status == 503
        worker.process.terminate()
        assert worker.status(POD["terminationGracePeriodSeconds"]) == 0


def test_the_alerts_are_those_of_prometheus() -> None:
    assert GENERATED.read_text() == prometheus_rule()
    rules = yaml.safe_load((DEPLOY / "prometheus/rules.yml").read_text())
    assert document("monitoring/rules.yaml")["spec"] == rules


def test_racks_differ_by_nothing_but_their_names() -> None:
    one, other = ((KUBERNETES / f"overlays/{rack}/kustomization.yaml").read_text() for rack in ("rack-1", "rack-2"))
    assert one.replace("rack-1", "?").replace("rack-2", "rack-1").replace("?", "rack-2") == other


# --- built ---


def built(folder: Path) -> dict[str, list[Any]]:
    """The objects that are built in `folder`, by kind."""
    kustomize = installed("kustomize")
    assert kustomize is not None
    text = subprocess.run([kustomize, "build", folder], capture_output=True, text=True, check=True, timeout=60).stdout
    objects: dict[str, list[Any]] = {}
    for each in yaml.safe_load_all(text):
        objects.setdefault(each["kind"], []).append(each)
    return objects


def selects(selector: dict[str, str], labels: dict[str, str]) -> bool:
    return bool(selector) and selector.items() <= labels.items()


@pytest.fixture
def copy(tmp_path: Path) -> Iterator[Path]:
    """The manifests, to be spoiled or added to."""
    folder = tmp_path / "kubernetes"
    shutil.copytree(KUBERNETES, folder)
    yield folder


@with_kustomize
@pytest.mark.parametrize("folder", kustomizations(), ids=lambda folder: folder.name)
def test_every_object_is_what_the_schema_of_its_kind_asks_for(folder: Path) -> None:
    status, said = conforms(folder)
    assert (status, "Skipped: 0" in said) == (0, True), said


@with_kustomize
def test_a_misspelt_field_is_found(copy: Path) -> None:
    file = copy / "base/stateful-set.yaml"
    file.write_text(file.read_text().replace("readOnlyRootFilesystem", "readonlyRootFilesystem"))
    status, said = conforms(copy / "overlays/rack-1")
    assert status != 0
    assert "readonlyRootFilesystem" in said


@with_kustomize
@pytest.mark.parametrize("rack", RACKS)
def test_whatever_selects_finds_the_rack_and_no_other(rack: str) -> None:
    objects = built(KUBERNETES / "overlays" / rack)
    [stateful_set], [service], [policy] = (objects[kind] for kind in ("StatefulSet", "Service", "NetworkPolicy"))
    labels = stateful_set["spec"]["template"]["metadata"]["labels"]
    assert labels["app.kubernetes.io/instance"] == rack
    for selector in (
        stateful_set["spec"]["selector"]["matchLabels"],
        service["spec"]["selector"],
        policy["spec"]["podSelector"]["matchLabels"],
    ):
        assert selects(selector, labels)
        assert not selects(selector, labels | {"app.kubernetes.io/instance": "another"})
    assert stateful_set["spec"]["serviceName"] == service["metadata"]["name"]
    [budget] = built(KUBERNETES / "cluster")["PodDisruptionBudget"]
    [monitor] = built(KUBERNETES / "monitoring")["ServiceMonitor"]
    assert selects(budget["spec"]["selector"]["matchLabels"], labels)
    assert selects(monitor["spec"]["selector"]["matchLabels"], service["metadata"]["labels"])
    assert monitor["spec"]["endpoints"][0]["port"] in {port["name"] for port in service["spec"]["ports"]}
    job = service["metadata"]["labels"][monitor["spec"]["jobLabel"]]
    assert f'up{{job="{job}"}}' in (DEPLOY / "prometheus/rules.yml").read_text()


@with_kustomize
@pytest.mark.parametrize("rack", RACKS)
def test_whatever_a_pod_mounts_is_made_with_it_but_for_its_secret(rack: str) -> None:
    objects = built(KUBERNETES / "overlays" / rack)
    pod = objects["StatefulSet"][0]["spec"]["template"]["spec"]
    made = {config["metadata"]["name"] for config in objects["ConfigMap"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    [environment] = pod["containers"][0]["envFrom"]
    assert {volumes["settings"]["configMap"]["name"], environment["configMapRef"]["name"]} == made
    assert volumes["credentials"]["secret"]["secretName"] == f"model-manager-{rack}"


def with_component(name: str, copy: Path) -> Any:
    """The specification of a rack's StatefulSet with a component in its overlay, and its container."""
    overlay = copy / "overlays/rack-1"
    with (overlay / "kustomization.yaml").open("a") as file:
        file.write(f"components: [../../components/{name}]\n")
    status, said = conforms(overlay)
    assert status == 0, said
    [stateful_set] = built(overlay)["StatefulSet"]
    return stateful_set["spec"]


@with_kustomize
def test_a_stopped_rack_has_its_volumes_and_settings_and_no_worker(copy: Path) -> None:
    [container] = with_component("stopped", copy)["template"]["spec"]["containers"]
    assert container["volumeMounts"] == WORKER["volumeMounts"]
    assert container["env"] == WORKER["env"]
    assert container["securityContext"] == WORKER["securityContext"]
    assert not {"args", "startupProbe", "livenessProbe", "readinessProbe"} & set(container)
    with subprocess.Popen(container["command"]) as process:
        process.terminate()
        assert process.wait(10) in (0, -15)


@with_kustomize
def test_models_can_lie_on_a_disk(copy: Path) -> None:
    spec = with_component("disk", copy)
    [container] = spec["template"]["spec"]["containers"]
    claims = [claim["metadata"]["name"] for claim in spec["volumeClaimTemplates"]]
    assert claims == ["data", "models"]
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts["models"] == json.loads((copy / "base/common.json").read_text())["storage"]["path"]
    assert {"name": "MODEL_MANAGER_STORAGE__BACKEND", "value": "disk"} in container["env"]
