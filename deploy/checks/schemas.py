"""JSON Schemas of the kinds in `kubernetes/`: `python -m deploy.checks.schemas` writes `kubernetes/schemas` anew.

They are derived from what the API server and the Prometheus operator publish themselves, in their Go modules:
closed, so that a misspelt field is refused as the server refuses it, and without the descriptions. Needs Go.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deploy.local.golang import go_of_machine

SCHEMAS = Path(__file__).parents[1] / "kubernetes/schemas"

KUBERNETES = "k8s.io/kubernetes@v1.34.4"
OPERATOR = "github.com/prometheus-operator/prometheus-operator@v0.85.0"
KINDS = {
    "ConfigMap": "io.k8s.api.core.v1.ConfigMap",
    "Namespace": "io.k8s.api.core.v1.Namespace",
    "NetworkPolicy": "io.k8s.api.networking.v1.NetworkPolicy",
    "PodDisruptionBudget": "io.k8s.api.policy.v1.PodDisruptionBudget",
    "Service": "io.k8s.api.core.v1.Service",
    "StatefulSet": "io.k8s.api.apps.v1.StatefulSet",
}
CUSTOM_KINDS = {"PrometheusRule": "prometheusrules-crd.json", "ServiceMonitor": "servicemonitors-crd.json"}

_REFERENCE = "#/definitions/"
_EITHER = {"anyOf": [{"type": "integer"}, {"type": "string"}]}
_KEPT = ("type", "enum", "required", "pattern", "minimum", "maximum", "minLength", "maxLength", "minItems", "maxItems")


def main() -> int:
    go = go_of_machine()
    if go is None:
        print("Go is not installed", file=sys.stderr)
        return 1
    kubernetes, operator = (module(go, name) for name in (KUBERNETES, OPERATOR))
    published = json.loads((kubernetes / "api/openapi-spec/swagger.json").read_text())["definitions"]
    SCHEMAS.mkdir(exist_ok=True)
    for kind, name in KINDS.items():
        write(kind, built_in(kind, name, published))
    for kind, file in CUSTOM_KINDS.items():
        write(kind, custom(kind, json.loads((operator / "jsonnet/prometheus-operator" / file).read_text())))
    return 0


def module(go: Path, name: str) -> Path:
    """The folder of a Go module, downloaded unless it is there."""
    told = subprocess.run([go, "mod", "download", "-json", name], cwd="/", capture_output=True, check=True)
    return Path(json.loads(told.stdout)["Dir"])


def write(kind: str, schema: dict[str, Any]) -> None:
    text = json.dumps({"$schema": "http://json-schema.org/draft-07/schema#", **schema}, indent=1, sort_keys=True)
    (SCHEMAS / f"{kind.lower()}.json").write_text(text + "\n")


def built_in(kind: str, name: str, published: dict[str, Any]) -> dict[str, Any]:
    """The schema of a kind of Kubernetes, with the definitions it leads to."""
    definitions: dict[str, Any] = {}
    missing = {name}
    while missing:
        each = missing.pop()
        # A quantity may be a number, whatever the document says.
        definitions[each] = _EITHER if each.endswith(".Quantity") else closed(published[each])
        missing |= {found for found in references(definitions[each]) if found not in definitions}
    schema: dict[str, Any] = definitions.pop(name)
    [names] = published[name]["x-kubernetes-group-version-kind"]
    api_version = "/".join(filter(None, (names["group"], names["version"])))
    return {**named(schema, kind, api_version), "definitions": definitions}


def custom(kind: str, definition: dict[str, Any]) -> dict[str, Any]:
    """The schema of a kind that the Prometheus operator adds."""
    [version] = definition["spec"]["versions"]
    schema = closed(version["schema"]["openAPIV3Schema"])
    return named(schema, kind, f"{definition['spec']['group']}/{version['name']}")


def named(schema: dict[str, Any], kind: str, api_version: str) -> dict[str, Any]:
    own = {"kind": {"const": kind}, "apiVersion": {"const": api_version}}
    return {**schema, "properties": schema["properties"] | own, "required": ["apiVersion", "kind", "metadata"]}


def closed(schema: dict[str, Any]) -> dict[str, Any]:
    """A published schema without what explains it; an object with named members has no others."""
    if schema.get("format") == "int-or-string" or schema.get("x-kubernetes-int-or-string"):
        return _EITHER
    if "$ref" in schema:
        return {"$ref": schema["$ref"]}
    kept: dict[str, Any] = {word: schema[word] for word in _KEPT if word in schema}
    if "properties" in schema:
        kept["properties"] = {name: closed(inner) for name, inner in schema["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            kept["additionalProperties"] = False
    if "items" in schema:
        kept["items"] = closed(schema["items"])
    if isinstance(schema.get("additionalProperties"), dict):
        kept["additionalProperties"] = closed(schema["additionalProperties"])
    return kept


def references(schema: Any) -> Iterator[str]:
    """The names of the definitions that a schema refers to."""
    if isinstance(schema, dict):
        if isinstance(schema.get("$ref"), str):
            yield schema["$ref"].removeprefix(_REFERENCE)
        for inner in schema.values():
            yield from references(inner)
    elif isinstance(schema, list):
        for inner in schema:
            yield from references(inner)


if __name__ == "__main__":
    sys.exit(main())
