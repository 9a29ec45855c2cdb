"""The fold: records in, indexes out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from schemas.errors import ModelManagerError
from schemas.ids import LATEST
from schemas.wire import timestamp
from worker.catalog.blobs import BlobIndex
from worker.catalog.entries import JobEntry, ModelEntry, UploadEntry, VersionEntry
from worker.catalog.order import SortedKeys

_KEPT_JOBS = 10_000
_KEPT_UPLOADS = 10_000


@dataclass(slots=True)
class Totals:
    """Running sums over what is not deleted; a model counts while it has such a version."""

    models: int = 0
    versions: int = 0
    bytes: int = 0


class Catalog:
    """The registry's state after the records applied so far. Reads never change it."""

    def __init__(self) -> None:
        self.totals = Totals()
        self.models: dict[str, ModelEntry] = {}  # by the id in lower case: ids are unique ignoring case
        self.uploads: dict[str, UploadEntry] = {}
        self.jobs: dict[str, JobEntry] = {}
        self._orders = {"modelId": SortedKeys()}
        self.by_type: defaultdict[str, set[tuple[str, str]]] = defaultdict(set)
        self.by_tag: defaultdict[str, set[tuple[str, str]]] = defaultdict(set)
        self.deleted: dict[tuple[str, str], VersionEntry] = {}
        self.blobs = BlobIndex()  # needed by versions, deleted ones inside their undo window included, and by uploads
        self._apply = {
            "store": self._store,
            "update": self._update,
            "delete": self._delete,
            "restore": self._restore,
            "purge": self._purge,
            "alias": self._alias,
            "upload.begin": self._upload_begin,
            "upload.end": self._upload_end,
            "job.begin": self._job_begin,
            "job.end": self._job_end,
        }

    # --- reading ---

    def model(self, model_id: str) -> ModelEntry | None:
        """The model with exactly this id."""
        entry = self.models.get(model_id.lower())
        return entry if entry is not None and entry.id == model_id else None

    def case_twin(self, model_id: str) -> str | None:
        """The id of a model that differs from `model_id` in case only."""
        entry = self.models.get(model_id.lower())
        return entry.id if entry is not None and entry.id != model_id else None

    def find(self, model_id: str, version: str) -> VersionEntry | None:
        """That very version, deleted ones included; no alias."""
        model = self.model(model_id)
        return None if model is None else model.versions.get(version)

    def resolve(self, model_id: str, reference: str) -> VersionEntry:
        """The version that a version, an alias or `latest` means; ERR_MODEL_NOT_FOUND, also for a deleted one."""
        model = self.model(model_id)
        if model is None:
            raise ModelManagerError("ERR_MODEL_NOT_FOUND", f"There is no model {model_id}.", modelId=model_id)
        named = model.aliases.get(reference, reference)
        entry = model.latest() if reference == LATEST else model.versions.get(named)
        if entry is None:
            raise ModelManagerError(
                "ERR_MODEL_NOT_FOUND",
                f"{model_id} has no version or alias {reference}.",
                modelId=model_id,
                version=reference,
            )
        if entry.deleted_at is not None:
            details = {"modelId": model_id, "version": entry.version, "deletedAt": timestamp(entry.deleted_at)}
            if entry.restorable_until is not None:
                details["restorableUntil"] = timestamp(entry.restorable_until)
            raise ModelManagerError("ERR_MODEL_NOT_FOUND", f"{model_id}:{entry.version} is deleted.", **details)
        return entry

    def entry(self, key: tuple[str, str]) -> VersionEntry | None:
        """The live version under a (model, version) key of the orders."""
        entry = self.find(*key)
        return None if entry is None or entry.deleted_at is not None else entry

    def order(self, sort: str) -> SortedKeys:
        """The live versions' `sort_key`s, in order. Orders other than by id are made when they are first asked for."""
        order = self._orders.get(sort)
        if order is None:
            order = self._orders[sort] = SortedKeys()
            for key in self._orders["modelId"].walk():
                entry = self.entry(key)
                if entry is not None:
                    order.add(sort_key(entry, sort))
        return order

    def aliases_of(self, entry: VersionEntry) -> list[str]:
        model = self.model(entry.model)
        return [] if model is None else model.aliases_of(entry.version)

    # --- folding ---

    def apply(self, op: str, record: Any, sequence: int) -> None:
        """Fold one record. One that does not fit what came before raises KeyError, which stops the boot."""
        self._apply[op](record, sequence)

    def _store(self, record: Any, sequence: int) -> None:
        entry = VersionEntry(
            model=record["model"],
            version=record["version"],
            type=record["type"],
            files=tuple(record["files"]),
            metadata=record["metadata"],
            checksum=record["checksum"],
            size=record["size"],
            created=record["created"],
            origin=record["origin"],
            replicas=tuple(record["replicas"]),
            sequence=sequence,
        )
        model = self.models.setdefault(entry.model.lower(), ModelEntry(entry.model))
        model.versions[entry.version] = entry
        self.blobs.use(entry.files)
        self._show(entry)
        upload = self.uploads.get(record.get("upload", ""))
        if upload is not None:
            self.blobs.release(upload.keys)
            upload.state = "stored"

    def _update(self, record: Any, sequence: int) -> None:
        entry = self.models[record["model"].lower()].versions[record["version"]]
        self._hide_tags(entry)
        entry.metadata = record["metadata"]
        entry.replicas = tuple(record["replicas"])
        entry.revision = record["revision"]
        entry.quarantined = record["state"] == "quarantined"
        self._show_tags(entry)

    def _delete(self, record: Any, sequence: int) -> None:
        model = self.models[record["model"].lower()]
        for version in record["versions"]:
            entry = model.versions[version]
            if entry.deleted_at is None:
                self._hide(entry)
            entry.deleted_at = record["deleted"]
            entry.restorable_until = record.get("until")
            self.deleted[(entry.model, version)] = entry
        if "until" not in record:
            self._forget(model, record["versions"])

    def _restore(self, record: Any, sequence: int) -> None:
        model = self.models[record["model"].lower()]
        for version in record["versions"]:
            entry = model.versions[version]
            entry.deleted_at = entry.restorable_until = None
            self.deleted.pop((entry.model, version), None)
            self._show(entry)

    def _purge(self, record: Any, sequence: int) -> None:
        self._forget(self.models[record["model"].lower()], record["versions"])

    def _forget(self, model: ModelEntry, versions: list[str]) -> None:
        for version in versions:
            entry = model.versions.pop(version)
            self.deleted.pop((entry.model, version), None)
            self.blobs.release(file["key"] for file in entry.files)
            for alias in model.aliases_of(version):
                del model.aliases[alias]
        if not model.versions:
            self.models.pop(model.id.lower(), None)

    def _alias(self, record: Any, sequence: int) -> None:
        aliases = self.models[record["model"].lower()].aliases
        if record["version"] is None:
            aliases.pop(record["alias"], None)
        else:
            aliases[record["alias"]] = record["version"]

    def _upload_begin(self, record: Any, sequence: int) -> None:
        upload = UploadEntry(
            record["upload"], record["model"], record["version"], tuple(record["files"]), record["expires"]
        )
        self.uploads[upload.id] = upload
        self.blobs.hold(upload.keys)
        _keep(self.uploads, _KEPT_UPLOADS, lambda entry: entry.state not in ("open", "completed"))

    def _upload_end(self, record: Any, sequence: int) -> None:
        upload = self.uploads[record["upload"]]
        before = upload.keys
        upload.state = record["state"]
        upload.stored_files = tuple(record.get("files", ()))
        self.blobs.use(upload.stored_files)
        self.blobs.release(before)

    def _job_begin(self, record: Any, sequence: int) -> None:
        self.jobs[record["job"]] = JobEntry(record["job"], record["method"], record["params"], record["created"])
        _keep(self.jobs, _KEPT_JOBS, lambda entry: entry.ended)

    def _job_end(self, record: Any, sequence: int) -> None:
        job = self.jobs[record["job"]]
        job.state = record["state"]
        job.result = record.get("result")
        job.error = record.get("error")

    # --- indexes ---

    def _show(self, entry: VersionEntry) -> None:
        for sort, order in self._orders.items():
            order.add(sort_key(entry, sort))
        self.by_type[entry.type].add((entry.model, entry.version))
        self._show_tags(entry)
        model = self.models[entry.model.lower()]
        model.live += 1
        self.totals.models += model.live == 1
        self.totals.versions += 1
        self.totals.bytes += entry.size

    def _hide(self, entry: VersionEntry) -> None:
        for sort, order in self._orders.items():
            order.discard(sort_key(entry, sort))
        self.by_type[entry.type].discard((entry.model, entry.version))
        self._hide_tags(entry)
        model = self.models[entry.model.lower()]
        model.live -= 1
        self.totals.models -= model.live == 0
        self.totals.versions -= 1
        self.totals.bytes -= entry.size

    def _show_tags(self, entry: VersionEntry) -> None:
        for tag in entry.metadata.get("tags", ()):
            self.by_tag[tag].add((entry.model, entry.version))

    def _hide_tags(self, entry: VersionEntry) -> None:
        for tag in entry.metadata.get("tags", ()):
            keys = self.by_tag[tag]
            keys.discard((entry.model, entry.version))
            if not keys:
                del self.by_tag[tag]


def sort_key(entry: VersionEntry, sort: str) -> tuple[Any, ...]:
    """A tuple that ends in (model, version) and orders as `sort` says, with ties by id and version either way."""
    match sort:
        case "size":
            return (entry.size, entry.model, entry.version)
        case "-size":
            return (-entry.size, entry.model, entry.version)
        case "createdAt":
            return (entry.created, entry.model, entry.version)
        case "-createdAt":
            return (-entry.created, entry.model, entry.version)
        case _:
            return (entry.model, entry.version)


def _keep(entries: dict[str, Any], most: int, is_over: Callable[[Any], bool]) -> None:
    """Drop the oldest entry that is over, while there are more than `most`."""
    if len(entries) > most:
        oldest = next((key for key, entry in entries.items() if is_over(entry)), None)
        if oldest is not None:
            del entries[oldest]
