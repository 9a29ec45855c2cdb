"""`make dry-run`: a real API server, with nothing behind it but etcd, is shown all of `kubernetes/`.

Both are built with Go once, which takes some minutes and 180 MB of the cache. The server validates, sets defaults and
admits as in a cluster, with unknown fields refused, and keeps nothing (`dryRun=All`); the namespace and the kinds of
the Prometheus operator are applied for real, since the rest needs them. What a rack's StatefulSet makes of its template
is then shown to it as a pod, which the namespace's level of pod security must let in.
"""

from __future__ import annotations

import json
import re
import secrets
import ssl
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from deploy.checks.__main__ import kustomizations, ran
from deploy.checks.cluster_programs import etcd, kube_apiserver
from deploy.checks.programs import of_go, of_machine
from deploy.checks.schemas import CUSTOM_KINDS, OPERATOR, module
from deploy.local.console import say, working
from deploy.local.golang import go_of_machine
from deploy.local.identity import recall_ports
from deploy.local.process import Process
from deploy.local.server import NotStarted, Unavailable

NAMESPACE = "model-manager"
READY_S = 90.0
ASK_S = 30.0
POLL_S = 0.2
PATHS = {
    "ConfigMap": "/api/v1/namespaces/{namespace}/configmaps",
    "CustomResourceDefinition": "/apis/apiextensions.k8s.io/v1/customresourcedefinitions",
    "Namespace": "/api/v1/namespaces",
    "NetworkPolicy": "/apis/networking.k8s.io/v1/namespaces/{namespace}/networkpolicies",
    "Pod": "/api/v1/namespaces/{namespace}/pods",
    "PodDisruptionBudget": "/apis/policy/v1/namespaces/{namespace}/poddisruptionbudgets",
    "PrometheusRule": "/apis/monitoring.coreos.com/v1/namespaces/{namespace}/prometheusrules",
    "Service": "/api/v1/namespaces/{namespace}/services",
    "ServiceAccount": "/api/v1/namespaces/{namespace}/serviceaccounts",
    "ServiceMonitor": "/apis/monitoring.coreos.com/v1/namespaces/{namespace}/servicemonitors",
    "StatefulSet": "/apis/apps/v1/namespaces/{namespace}/statefulsets",
}


class Refused(Exception):
    """The API server does not take an object; str() says why."""


class ApiServer:
    """etcd and an API server in `folder`, for as long as the `with` block runs."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._ports = recall_ports(folder / "ports.json", "etcd", "peer", "api")
        self._token = secrets.token_hex(16)
        self._running = ExitStack()

    def __enter__(self) -> ApiServer:
        with working("starting etcd and the API server"):
            self._start("etcd", self._etcd_command())
            self._start("api", self._api_command())
            self._until(lambda: self._ask("GET", PATHS["Namespace"] + "/default"), "the API server is not ready")
        return self

    def __exit__(self, *_: object) -> None:
        self._running.close()

    def apply(self, kind: str, name: str, manifest: str, *, keep: bool = False) -> dict[str, Any]:
        """The object as the server would keep it, or with `keep` does. Raises `Refused`."""
        place = PATHS[kind].format(namespace=NAMESPACE)
        how = "fieldManager=dry-run&fieldValidation=Strict&force=true" + ("" if keep else "&dryRun=All")
        return self._ask("PATCH", f"{place}/{name}?{how}", "application/apply-patch+yaml", manifest.encode())

    def create(self, kind: str, document: dict[str, Any], *, keep: bool = False) -> dict[str, Any]:
        """As `apply`, for an object that is not there yet."""
        how = "fieldValidation=Strict" + ("" if keep else "&dryRun=All")
        place = PATHS[kind].format(namespace=NAMESPACE)
        return self._ask("POST", f"{place}?{how}", "application/json", json.dumps(document).encode())

    def until_served(self, kind: str) -> None:
        """Return once the server knows a kind that it was taught."""
        self._until(lambda: self._ask("GET", PATHS[kind].format(namespace=NAMESPACE)), f"{kind} is not served")

    def _ask(self, verb: str, path: str, kind: str = "application/json", body: bytes | None = None) -> dict[str, Any]:
        headers = {"Authorization": f"Bearer {self._token}", "Content-Type": kind}
        url = f"https://127.0.0.1:{self._ports['api']}{path}"
        # Its certificate is its own, made at its start, and not kept from anyone on this machine.
        context = ssl.create_default_context(cafile=self._folder / "certificates/apiserver.crt")
        context.check_hostname = False
        try:
            request = urllib.request.Request(url, body, headers, method=verb)
            with urllib.request.urlopen(request, timeout=ASK_S, context=context) as answer:
                return dict(json.loads(answer.read()))
        except urllib.error.HTTPError as error:
            with error:
                said = error.read()
            # A path that is not served yet is answered in plain text.
            told = json.loads(said)["message"] if said.startswith(b"{") else said.decode()
            raise Refused(str(told)) from None

    def _until(self, ask: Callable[[], object], otherwise: str) -> None:
        deadline = time.monotonic() + READY_S
        while True:
            try:
                ask()
            except (OSError, Refused) as error:
                if time.monotonic() > deadline:
                    raise NotStarted(f"{otherwise} after {READY_S:.0f} s: {error}") from None
                time.sleep(POLL_S)
            else:
                return

    def _start(self, name: str, command: list[str]) -> None:
        log = self._folder / f"{name}.log"
        process = Process(command, env={}, folder=self._folder, log=log, stop_s=10)
        self._running.callback(process.close)
        process.start()

    def _etcd_command(self) -> list[str]:
        client, peer = (f"http://127.0.0.1:{self._ports[name]}" for name in ("etcd", "peer"))
        return [
            str(etcd()),
            f"--data-dir={self._folder / 'etcd'}",
            f"--listen-client-urls={client}",
            f"--advertise-client-urls={client}",
            f"--listen-peer-urls={peer}",
            f"--initial-advertise-peer-urls={peer}",
            f"--initial-cluster=default={peer}",
            "--unsafe-no-fsync",
        ]

    def _api_command(self) -> list[str]:
        key, tokens = self._folder / "accounts.key", self._folder / "tokens.csv"
        openssl = of_machine("openssl", "openssl")
        subprocess.run([openssl, "genrsa", "-out", key, "2048"], check=True, capture_output=True)
        tokens.write_text(f'{self._token},admin,admin,"system:masters"\n')
        return [
            str(kube_apiserver()),
            f"--etcd-servers=http://127.0.0.1:{self._ports['etcd']}",
            "--bind-address=127.0.0.1",
            f"--secure-port={self._ports['api']}",
            f"--cert-dir={self._folder / 'certificates'}",
            f"--token-auth-file={tokens}",
            "--authorization-mode=RBAC",
            "--service-cluster-ip-range=10.0.0.0/24",
            "--service-account-issuer=https://kubernetes.default.svc",
            f"--service-account-key-file={key}",
            f"--service-account-signing-key-file={key}",
        ]


def main() -> int:
    try:
        with tempfile.TemporaryDirectory() as folder, ApiServer(Path(folder)) as server:
            return show_all(server)
    except (Unavailable, NotStarted) as error:
        say(str(error))
        return 7


def show_all(server: ApiServer) -> int:
    """Show the server every object; a line for each, and the exit status."""
    prepare(server)
    refused = 0
    for folder in kustomizations():
        for kind, name, manifest in built(folder):
            try:
                taken = server.apply(kind, name, manifest)
                if kind == "StatefulSet":
                    server.create("Pod", pod_of(taken))
            except Refused as error:
                refused += 1
                print(f"BAD {folder.name}: {kind} {name}: {error}")
            else:
                print(f"ok  {folder.name}: {kind} {name}" + (" and its pod" if kind == "StatefulSet" else ""))
    return 1 if refused else 0


def prepare(server: ApiServer) -> None:
    """What the rest needs to be there: the namespace, its service account, and the operator's kinds."""
    for kind, name, manifest in built(kustomizations()[0]):
        if kind == "Namespace":
            server.apply(kind, name, manifest, keep=True)
    server.create("ServiceAccount", {"metadata": {"name": "default"}}, keep=True)
    go = go_of_machine()
    if go is None:
        raise Unavailable("there is no Go on this machine", "install Go 1.24 or later")
    for file in CUSTOM_KINDS.values():
        definition = (module(go, OPERATOR) / "jsonnet/prometheus-operator" / file).read_text()
        name = json.loads(definition)["metadata"]["name"]
        server.apply("CustomResourceDefinition", name, definition, keep=True)
        server.until_served(json.loads(definition)["spec"]["names"]["kind"])


def built(folder: Path) -> list[tuple[str, str, str]]:
    """Kind, name and text of each object that is built in `folder`."""
    status, text = ran([of_go("kustomize"), "build", folder])
    if status:
        raise NotStarted(text)
    return [
        (found(r"^kind: (.*)$", each), found(r"^metadata:(?:\n  .*)*?\n  name: (.*)$", each), each)
        for each in text.split("\n---\n")
    ]


def found(pattern: str, text: str) -> str:
    match = re.search(pattern, text, re.MULTILINE)
    assert match is not None, text
    return match[1]


def pod_of(stateful_set: dict[str, Any]) -> dict[str, Any]:
    """The pod that a StatefulSet makes of its template, with its volumes."""
    template, name = stateful_set["spec"]["template"], stateful_set["metadata"]["name"]
    claims = [each["metadata"]["name"] for each in stateful_set["spec"]["volumeClaimTemplates"]]
    volumes = [{"name": each, "persistentVolumeClaim": {"claimName": f"{each}-{name}-0"}} for each in claims]
    spec = {**template["spec"], "volumes": template["spec"]["volumes"] + volumes}
    return {"metadata": {"name": f"{name}-0", "labels": template["metadata"]["labels"]}, "spec": spec}


if __name__ == "__main__":
    sys.exit(main())
