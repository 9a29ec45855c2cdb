"""Hints: CloudEvents 1.0 in structured JSON, built from journal records.

A hint says "something changed" and may be lost. Its `rackseq` (the record's sequence, as a decimal string) lets a
listener see a gap, and then ask `getChanges`, which answers the same objects.
"""

from __future__ import annotations

from typing import Any

from typing_extensions import TypedDict

from schemas.ids import digest_of
from schemas.wire import timestamp

CONTENT_TYPE = "application/cloudevents+json"
HINT_TYPES = (
    "model-manager.version.stored",
    "model-manager.version.updated",
    "model-manager.version.deleted",
    "model-manager.version.restored",
    "model-manager.alias.changed",
    "model-manager.head",
)


class Hint(TypedDict):
    """`id` is `<rack>:<epoch>:<sequence>`: the same change always has the same id."""

    specversion: str
    id: str
    type: str
    source: str
    subject: str
    time: str
    datacontenttype: str
    rackseq: str
    rackepoch: str
    data: dict[str, Any]


def _hint(kind: str, subject: str, data: dict[str, Any], *, rack: str, epoch: int, sequence: int, time_ms: int) -> Hint:
    return {
        "specversion": "1.0",
        "id": f"{rack}:{epoch}:{sequence}",
        "type": f"model-manager.{kind}",
        "source": f"/racks/{rack}",
        "subject": subject,
        "time": timestamp(time_ms),
        "datacontenttype": "application/json",
        "rackseq": str(sequence),
        "rackepoch": str(epoch),
        "data": data,
    }


def head_hint(*, rack: str, epoch: int, head: int, time_ms: int) -> Hint:
    """The regular hint that tells how far the journal is."""
    hint = _hint("head", rack, {"head": head}, rack=rack, epoch=epoch, sequence=head, time_ms=time_ms)
    hint["id"] += f":head:{time_ms}"  # a head may be told many times; each is an event of its own
    return hint


def hint_of(op: str, record: dict[str, Any], *, rack: str, epoch: int, sequence: int, time_ms: int) -> Hint | None:
    """The hint that announces a journal record; None for one that changes nothing another rack could see: of a copy its
    own rack tells."""
    if "replicaOf" in record:
        return None
    match op:
        case "store":
            kind, data = "version.stored", _version_data(record)
        case "update":
            kind, data = "version.updated", {**_version_data(record), "revision": record["revision"]}
            disputed = "conflict" in record and record["state"] == "available"
            data["state"] = "conflict" if disputed else record["state"]
        case "delete" | "restore":
            kind = "version.deleted" if op == "delete" else "version.restored"
            data = {"replicas": record["replicas"]}
            if "until" in record:
                data["restorableUntil"] = timestamp(record["until"])
            if record["whole"]:
                data["versions"] = record["versions"]
            else:
                data["version"] = record["versions"][0]
        case "alias":
            kind = "alias.changed"
            data = {member: record[member] for member in ("alias", "version", "previous")}
        case _:
            return None
    return _hint(kind, record["model"], data, rack=rack, epoch=epoch, sequence=sequence, time_ms=time_ms)


def _version_data(record: dict[str, Any]) -> dict[str, Any]:
    return {
        "version": record["version"],
        "digest": digest_of(record["checksum"]),
        "size": record["size"],
        "replicas": record["replicas"],
    }
