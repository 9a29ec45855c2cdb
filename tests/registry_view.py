"""A registry's state, to be compared with that of another one."""

from __future__ import annotations

import dataclasses
from hashlib import sha256
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from worker.catalog.table import DISPUTED
from worker.journal import base_name
from worker.registry import Registry
from worker.upkeep.compaction_child import compact


def view(registry: Registry) -> dict[str, Any]:
    """All that the catalog says."""
    catalog = registry.catalog
    versions: dict[str, Any] = {}
    for name in sorted({model for row, model in enumerate(catalog.table.model) if catalog.has_row(row)}):
        model = catalog.model(name)
        assert model is not None
        found = [catalog.entry(catalog.table.find(name, version), wait=True) for version in model.versions]
        entries = [replace(entry, _description=None) for entry in found]  # which is made when it is asked for
        versions[name] = ([(entry, catalog.aliases_of(entry)) for entry in entries], dict(model.aliases))
    known = [entry for entries, _ in versions.values() for entry, _ in entries]
    keys = {file["key"] for entry in known for file in (*entry.files, *entry.moved)} | {
        key for entry in known for key in entry.wrong
    }
    keys |= {file["key"] for _, file, _ in catalog.replicas.brought()}
    blobs = {key: (catalog.blobs.needs(key), catalog.blobs.trusts(key)) for key in keys}
    return {
        "versions": versions,
        "totals": dataclasses.replace(catalog.totals),
        "blobs": (len(catalog.blobs), catalog.blobs.bytes, blobs),
        "keys": {n: catalog.blobs.key_of(sha256(bytes([n])).hexdigest()) is not None for n in range(4)},
        "jobs": {job.id: job.state for job in catalog.jobs.values()},
        "types": {name: count for name, count in catalog.table.type_counts().items() if count},
        "pulls": sorted((pull.model, pull.version, pull.origin, pull.sequence) for pull in catalog.replicas.pulls()),
        "brought": sorted(
            (pull.model, pull.version, file["key"], sequence) for pull, file, sequence in catalog.replicas.brought()
        ),
        "awaited": +catalog.replicas.awaited,
        "cursors": dict(catalog.replicas.cursors),
        "copies": {
            rack: names
            for rack, rows in catalog.replicas.rows.items()
            if (
                names := [
                    (catalog.table.model[row], catalog.table.version[row]) for row in rows if catalog.has_row(row)
                ]
            )
        },
        "disputed": [catalog.table.version[row] for row in catalog.table.rows_with(DISPUTED)],
        "requests": sorted(key for key, *_ in catalog.requests.dumped()),
    }


async def view_after_boot(folder: Path) -> dict[str, Any]:
    """What a boot from the folder knows."""
    registry = Registry(folder)
    registry.open()
    try:
        return view(registry)
    finally:
        await registry.close()


async def compact_here(registry: Registry) -> None:
    """A compaction without its process."""
    journal = registry.journal
    manifest = await journal.rotate()
    if manifest.sealed:
        await journal.adopt(compact(journal.folder, base_name(manifest.generation + 1)))
