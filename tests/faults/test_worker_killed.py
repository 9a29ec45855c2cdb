"""SIGKILL at any moment: what was acknowledged is all there, what was not is not seen, and the next process goes on."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import os
import random
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from deploy.local import ObjectStore
from schemas.errors import ModelManagerError
from schemas.ids import digest_of
from tests.process import REAL_MODEL, Processes, Service, active_segment, s3_environment, wait_until
from worker.client.client import ModelManagerClient
from worker.client.http_caller import HttpCaller

if TYPE_CHECKING:
    from types_boto3_s3 import S3Client

CALLERS = 8
ROUNDS = 10
FILE_BYTES = 40_000_000
PART_SEEN_BYTES = 10_000_000


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    with Processes(tmp_path) as started:
        yield started


# --- in the middle of a push ---


@dataclass(frozen=True)
class DiskBlobs:
    """The bytes in the folder of the disk backend, as a bystander sees them."""

    folder: Path

    def keys(self) -> set[str]:
        return {f"blobs/{path.name}" for path in (self.folder / "blobs").rglob("*") if path.is_file()}

    def unfinished_bytes(self, known: set[str]) -> int:
        """How much of a push that goes on is there."""
        total = 0
        for key in self.keys() - known:
            with suppress(FileNotFoundError):
                total += next((self.folder / "blobs").rglob(key.removeprefix("blobs/"))).stat().st_size
        return total


@dataclass(frozen=True)
class S3Blobs:
    """The bytes in the bucket, as a bystander sees them."""

    client: S3Client
    bucket: str
    prefix: str

    def keys(self) -> set[str]:
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=f"{self.prefix}/blobs/")
        found = [entry["Key"] for page in pages for entry in page.get("Contents", [])]
        return {key.removeprefix(f"{self.prefix}/") for key in found}

    def unfinished_bytes(self, known: set[str]) -> int:
        """How much of a push that goes on is there."""
        uploads = self.client.list_multipart_uploads(Bucket=self.bucket).get("Uploads", [])
        return sum(self._bytes_of(upload["Key"], upload["UploadId"]) for upload in uploads)

    def _bytes_of(self, key: str, upload_id: str) -> int:
        parts = self.client.list_parts(Bucket=self.bucket, Key=key, UploadId=upload_id).get("Parts", [])
        return sum(part["Size"] for part in parts)


@dataclass(frozen=True)
class Rack:
    """A rack that is started, killed and started again, and the client commands pointed at it."""

    processes: Processes
    blobs: DiskBlobs | S3Blobs
    settings: dict[str, object]
    secrets: dict[str, str] = field(default_factory=dict)

    @property
    def over_amqp(self) -> bool:
        return "amqp.url" in self.settings

    def start(self) -> Service:
        service = self.processes.start(
            "worker" if self.over_amqp else "serve", settings=self.settings, environment=self.secrets
        )
        return service.until_ready()

    def address(self, service: Service) -> dict[str, str]:
        if not self.over_amqp:
            return {"MODEL_MANAGER_URL": service.url}
        return {
            "MODEL_MANAGER_AMQP__URL": str(self.settings["amqp.url"]),
            "MODEL_MANAGER_RACK": str(self.settings["rack"]),
        }

    def run(self, service: Service, *words: str | Path) -> Any:
        return self.processes.run(*words, **self.address(service))

    def journal_ends_with(self, text: bytes, since: int) -> bool:
        """Whether `text` stands in the journal behind byte `since`."""
        return text in self.journal()[since:]

    def journal(self) -> bytes:
        return active_segment(self.processes.folder / "data/registry").read_bytes()


@pytest.fixture
def disk_rack(processes: Processes) -> Rack:
    return Rack(processes, DiskBlobs(processes.folder / "data/models"), {"http.port": free_port()})
