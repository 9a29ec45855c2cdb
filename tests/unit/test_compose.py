"""deploy/compose.yaml without a Docker daemon: its secrets, its settings, and what its containers may not do."""

from __future__ import annotations

import json
import shutil
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.local.object_store import HEALTH
from worker.settings import load_settings

DEPLOY = Path(__file__).parents[2] / "deploy"
COMPOSE: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
SERVICES: dict[str, Any] = COMPOSE["services"]
RACKS = ("rack-1", "rack-2")


@pytest.fixture
def secrets(tmp_path: Path) -> Path:
    make_secrets(tmp_path / "secrets")
    return tmp_path / "secrets"


def make_secrets(folder: Path) -> None:
    subprocess.run([DEPLOY / "compose/secrets.sh", folder], check=True, capture_output=True)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_every_secret_is_made_and_none_is_left_over(secrets: Path) -> None:
    declared = {secret["file"].rpartition("/")[2] for secret in COMPOSE["secrets"].values()}
    assert declared == {path.name for path in secrets.iterdir() if path.is_file()}
    mounted = {name for service in SERVICES.values() for name in service.get("secrets", ())}
    assert mounted == set(COMPOSE["secrets"])


def test_secrets_are_for_owner_and_group_and_differ(secrets: Path) -> None:
    passwords = [path.read_text() for path in (secrets / "broker").iterdir()]
    assert len(set(passwords)) == len(passwords)
    for path in secrets.rglob("*"):
        assert not stat.S_IMODE(path.stat().st_mode) & stat.S_IRWXO, path


def test_secrets_that_are_there_are_kept_and_one_that_is_gone_is_made_anew(secrets: Path) -> None:
    before = contents(secrets)
    (secrets / "http-token").unlink()
    make_secrets(secrets)
    after = contents(secrets)
    assert after.pop("http-token") != before.pop("http-token")
    assert after == before


@pytest.mark.parametrize("rack", RACKS)
def test_the_settings_of_a_rack_are_settings_of_the_worker(rack: str, secrets: Path) -> None:
    environment = SERVICES[rack]["environment"]
    loaded = load_settings(
        environment={name: value.replace("/run/secrets", str(secrets)) for name, value in environment.items()}
    )
    assert not loaded.warnings
    assert loaded.settings.rack == rack
    assert loaded.settings.replication.peers == tuple(other for other in RACKS if other != rack)
    assert not loaded.settings.amqp.provision
    assert loaded.settings.storage.s3.bucket == SERVICES["init"]["environment"]["MODEL_MANAGER_STORAGE__S3__BUCKET"]
    address = (secrets / f"amqp-{rack}").read_text().strip()
    password = (secrets / f"broker/worker-{rack}").read_text().strip()
    assert address == f"amqp://worker-{rack}:{password}@rabbitmq:5672/model-manager"


@pytest.mark.parametrize("rack", RACKS)
def test_a_rack_has_keys_of_its_own_for_the_store_and_the_administrator_s_stay_with_init(rack: str) -> None:
    assert set(SERVICES[rack]["secrets"]) == {f"amqp-{rack}", f"s3-{rack}", "http-token"}
    environment = SERVICES[rack]["environment"]
    assert environment["AWS_SHARED_CREDENTIALS_FILE"] == f"/run/secrets/s3-{rack}"
    assert environment["MODEL_MANAGER_STORAGE__S3__CLEAN_UP_PROFILE"] == "clean-up"
    known = {name for name, service in SERVICES.items() if "s3-administrator" in service.get("secrets", ())}
    assert known == {"init"}
    assert SERVICES[rack]["depends_on"]["init"] == {"condition": "service_completed_successfully"}


@pytest.mark.parametrize("service", ["init", *RACKS, "client"])
def test_what_runs_our_image_has_no_rights(service: str) -> None:
    told = SERVICES[service]
    assert told["read_only"] is True
    assert told["cap_drop"] == ["ALL"]
    assert told["security_opt"] == ["no-new-privileges:true"]
    assert "privileged" not in told
    assert "user" not in told  # the image's, which is nobody in particular


def test_every_port_is_published_on_loopback_only() -> None:
    ports = [port for service in SERVICES.values() for port in service.get("ports", ())]
    assert ports
    assert all(port.startswith("127.0.0.1:${") for port in ports)


def test_what_containers_are_given_of_the_host_they_cannot_change() -> None:
    mounts = [volume for service in SERVICES.values() for volume in service.get("volumes", ())]
    of_host = [mount for mount in mounts if mount.startswith((".", "/", "$"))]
    assert of_host
    assert all(mount.endswith(":ro") for mount in of_host)
    assert "definitions:/definitions:ro" in SERVICES["rabbitmq"]["volumes"]


@pytest.mark.parametrize("service", ["init", *RACKS, "rabbitmq"])
def test_nothing_starts_before_what_it_needs_is_there(service: str) -> None:
    for needed, told in SERVICES[service]["depends_on"].items():
        condition = "service_completed_successfully" if needed == "init" else "service_healthy"
        assert told == {"condition": condition}, needed
        assert needed == "init" or "healthcheck" in SERVICES[needed]
    assert service not in RACKS or set(SERVICES[service]["depends_on"]) == {"init", "rabbitmq", "object-store"}


def test_the_store_is_healthy_once_it_knows_its_users() -> None:
    assert SERVICES["object-store"]["healthcheck"]["test"][-1].endswith(HEALTH)


@pytest.mark.parametrize("rack", RACKS)
def test_a_rack_is_given_the_time_to_end_in_order(rack: str) -> None:
    drain = load_settings(environment={}).settings.timeouts.drain
    assert int(SERVICES[rack]["stop_grace_period"].removesuffix("s")) > drain


def test_every_service_that_stays_tells_its_health_or_has_an_image_that_does() -> None:
    staying = {name for name, service in SERVICES.items() if "restart" in service}
    assert staying == set(SERVICES) - {"init", "client"}
    assert {name for name in staying if "healthcheck" not in SERVICES[name]} == set(RACKS)


def test_prometheus_watches_every_rack_with_the_rules_that_are_shipped(tmp_path: Path) -> None:
    watched = yaml.safe_load((DEPLOY / "compose/prometheus.yml").read_text())
    jobs = {job["job_name"]: job["static_configs"][0]["targets"] for job in watched["scrape_configs"]}
    assert jobs["model-manager"] == [f"{rack}:8002" for rack in RACKS]
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed; `apt-get install prometheus` brings it")
    shutil.copy(DEPLOY / "compose/prometheus.yml", tmp_path)
    shutil.copy(DEPLOY / "prometheus/rules.yml", tmp_path)
    checked = subprocess.run([promtool, "check", "config", tmp_path / "prometheus.yml"], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_grafana_is_given_the_dashboard_and_a_source_of_its_kind() -> None:
    provisioning = DEPLOY / "grafana/provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources/prometheus.yaml").read_text())["datasources"]
    (provider,) = yaml.safe_load((provisioning / "dashboards/model-manager.yaml").read_text())["providers"]
    dashboard = json.loads((DEPLOY / "grafana/model-manager.json").read_text())
    assert {each["query"] for each in dashboard["templating"]["list"] if each["type"] == "datasource"} == {
        source["type"]
    }
    assert source["url"] == "http://prometheus:9090"
    assert any(
        volume.endswith(f":{provider['options']['path']}/model-manager.json:ro")
        for volume in SERVICES["grafana"]["volumes"]
    )
