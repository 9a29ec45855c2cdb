"""The body of the job validateModel, and what a verdict on bytes means for versions."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import orjson
import structlog

from schemas.findings import Finding
from schemas.ids import digest_of
from schemas.journal import StoredFile
from schemas.model import version_digest
from schemas.rpc import ValidatedFile, ValidateReply
from worker.cache import ModelCache
from worker.catalog.entries import VersionEntry
from worker.catalog.updates import update_record
from worker.jobs.runner import Commit
from worker.policy import Policy
from worker.registry import Change, Registry
from worker.service.examining import Examining
from worker.storage.blobstore import BlobMissing, BlobStore

_log = structlog.get_logger()

Progress = Callable[[str, int], None]

# The reply is recorded in one line of the journal, which has 1 MiB; findings take what is left at the most.
_LISTED_BYTES = 800 * 1024


class Checking:
    """Reads stored bytes back, and records what is found."""

    def __init__(
        self, registry: Registry, store: BlobStore, policy: Policy, cache: ModelCache, examining: Examining
    ) -> None:
        self._registry = registry
        self._store = store
        self._policy = policy
        self._cache = cache
        self._examining = examining

    async def validate(self, params: dict[str, Any], progress: Progress) -> Commit:
        """Read every file back, compare size and sha256, run the format hooks; wrong bytes quarantine the version."""
        catalog = self._registry.catalog
        entry = await self._registry.look(lambda: catalog.resolve(params["modelId"], params["version"]))
        progress("totalBytes", entry.size)
        files: list[ValidatedFile] = []
        findings: list[Finding] = []
        done = 0
        for file in entry.files:
            checked, finding = await self._check(file, partial(_advance, progress, done))
            done += file["size"]
            progress("bytes", done)
            files.append(checked)
            findings += finding
        wrong = {file["key"] for file, checked in zip(entry.files, files, strict=True) if not checked["isValid"]}
        right = {file["key"] for file in entry.files} - wrong
        if not wrong:
            findings += await self._examining.findings(entry.type, self._examining.stored(entry.files))
        reply = ValidateReply(
            success=True,
            modelId=entry.model,
            version=entry.version,
            isValid=not wrong and not any(finding.severity == "error" for finding in findings),
            expectedChecksum=digest_of(entry.checksum),
            actualChecksum=self._actual(entry, files),
            files=_listed(files),
            findings=[cast(Any, finding.as_dict()) for finding in findings[:100]],
        )
        if len(reply["files"]) < len(files):
            reply["omittedFiles"] = len(files) - len(reply["files"])

        async def commit() -> dict[str, Any]:
            await self.judge(entry, right, wrong)
            return cast(dict[str, Any], reply)

        return commit

    async def _check(self, file: StoredFile, progress: Callable[[int], None]) -> tuple[ValidatedFile, list[Finding]]:
        expected = digest_of(file["sha256"])
        checked: ValidatedFile = {
            "path": file["path"],
            "expectedChecksum": expected,
            "actualChecksum": None,
            "isValid": False,
        }
        try:
            if not self._policy.check_checksums:
                right_size = (await self._store.stat(file["key"])).size == file["size"]
                # What was read and found wrong once is not right for its size.
                checked["isValid"] = right_size and self._registry.catalog.blobs.trusts(file["key"])
                problem = "checksum-mismatch" if right_size else "size-mismatch"
            else:
                stored = await self._store.hash(file["key"], progress)
                checked["actualChecksum"] = digest_of(stored.sha256)
                checked["isValid"] = (stored.size, stored.sha256) == (file["size"], file["sha256"])
                problem = "checksum-mismatch"
        except BlobMissing:
            problem = "bytes-missing"
        if checked["isValid"]:
            return checked, []
        message = "The stored bytes are not the ones that were stored under this name."
        return checked, [Finding("error", problem, message, path=file["path"])]

    def _actual(self, entry: VersionEntry, files: list[ValidatedFile]) -> str | None:
        actual = [file["actualChecksum"] for file in files]
        if any(checksum is None for checksum in actual):
            return None
        if len(files) == 1:
            return actual[0]
        sizes = {file["path"]: file["size"] for file in entry.files}
        manifest = [(f["path"], sizes[f["path"]], str(f["actualChecksum"]).removeprefix("sha256:")) for f in files]
        return digest_of(version_digest(manifest))

    async def is_sound(self, file: StoredFile) -> bool:
        """Whether its stored bytes, read back, are the right ones. ModelManagerError if the store is away."""
        checked, _ = await self._check(file, lambda _: None)
        return checked["isValid"]

    async def judge(self, entry: VersionEntry, right: set[str], wrong: set[str]) -> None:
        """Record what was found of these blobs: for the version, for those that were found bad for one of them, and for
        all that share what is wrong."""
        if not self._policy.check_checksums:
            right = set()  # the right size alone proves nothing
        catalog, itself = self._registry.catalog, (entry.model, entry.version)
        judged = {itself}
        for last in (False, True):  # a store that was on its way to the disk at first is there once ours is
            others = {*catalog.doubting(right), *catalog.having(wrong)} - judged
            judged |= others
            for model, version in others:
                await self._record_state(model, version, right, wrong)
            if not last:  # behind the others, so that what is cut off in between is done again
                await self._record_state(*itself, right, wrong)

    async def _record_state(self, model: str, version: str, right: set[str], wrong: set[str]) -> None:
        """Quarantine the version if one of its blobs is wrong, by this verdict or an earlier one; else lift it.

        A verdict is about blobs: what has others by now, under the same name, is not concerned.
        """

        def decide() -> Change | None:
            current = self._registry.catalog.find(model, version)
            if current is None:
                return None
            keys = {file["key"] for file in current.files}
            known = (set(current.wrong) - right) | (wrong & keys)
            quarantined = bool(known & keys) or (current.quarantined and not keys <= right)
            if (quarantined, known) == (current.quarantined, set(current.wrong)):
                return None
            state = "quarantined" if quarantined else "available"
            return Change("update", update_record(self._registry.catalog, current, state=state, wrong=sorted(known)))

        changed = await self._registry.transact(model.lower(), decide)
        if changed is not None and changed.record["state"] == "quarantined":
            self._cache.forget(model, version)
            _log.error("model_quarantined", model=model, version=version)


def _listed(files: list[ValidatedFile]) -> list[ValidatedFile]:
    """As many of them as fit into a reply: all, or those first that are not valid."""
    sizes = [len(orjson.dumps(file)) + 1 for file in files]
    if sum(sizes) <= _LISTED_BYTES:
        return files
    listed: list[ValidatedFile] = []
    room = _LISTED_BYTES
    for size, file in sorted(zip(sizes, files, strict=True), key=lambda sized: sized[1]["isValid"]):
        room -= size
        if room < 0:
            break
        listed.append(file)
    return listed


def _advance(progress: Progress, before: int, seen: int) -> None:
    progress("bytes", before + seen)
