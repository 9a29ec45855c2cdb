"""A rack without transports: real journal, real disk store, real service and dispatcher, in one folder."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from worker.cache import ModelCache
from worker.context import Context
from worker.dispatch import Dispatcher
from worker.metrics import Metrics
from worker.policy import Policy
from worker.readiness import Readiness
from worker.registry import Registry
from worker.service.service import ModelService
from worker.storage.blobstore import BlobStore
from worker.storage.disk import DiskStore
from worker.upkeep.clean_up import CleanUp
from worker.validation.registry import known_formats


def policy(**changed: Any) -> Policy:
    values: dict[str, Any] = {
        "rack": "rack-1",
        "formats": known_formats(),
        "max_model_size": 10**9,
        "max_inline_size": 10**6,
        "allow_pickle": False,
        "check_formats": True,
        "check_checksums": True,
        "peers": ("rack-2", "rack-3"),
        "replication_factor": 2,
        "undo_s": 3600.0,
        "upload_s": 3600.0,
        "url_s": 900,
    }
    return Policy(**{**values, **changed})


class LocalRack:
    """Open it, `call` methods on it, close it, open it again: the same folder is the same rack."""

    def __init__(
        self, folder: Path, *, store: BlobStore | None = None, url_host: str = "127.0.0.1", **changed: Any
    ) -> None:
        self.folder = folder
        self.policy = policy(**changed)
        self.store: BlobStore = store or DiskStore(folder / "models")
        self.registry = Registry(folder / "registry")
        self.readiness = Readiness()
        self.cache = ModelCache(16, 1_000_000)
        self.service = ModelService(
            self.registry,
            self.store,
            self.policy,
            self.cache,
            self.readiness,
            get_url=lambda path, seconds: f"http://{url_host}:1{path}",
            put_url=lambda path, seconds: f"http://{url_host}:1{path}",
            job_places=2,
        )
        self.clean_up = CleanUp(self.registry, self.store, self.service.uploads, period_s=0.05)
        self.metrics = Metrics("rack-1")
        self.dispatcher = Dispatcher(self.service, self.registry, self.metrics, lookups=64, writes=16, transfers=16)

    def open(self) -> LocalRack:
        self.registry.open()
        self.registry.start()
        self.service.jobs.resume()
        self.readiness.set("registry", True)
        return self

    async def close(self) -> None:
        await self.service.stop()
        await self.registry.close()
        await self.store.close()

    async def call(self, method: str, params: dict[str, Any], *, key: str | None = None, caller: str = "") -> Any:
        return await self.dispatcher.call(method, params, Context(caller=caller, idempotency_key=key))

    async def store_bytes(
        self, model: str, version: str, data: bytes, *, key: str | None = None, **metadata: Any
    ) -> Any:
        params = {
            "modelId": model,
            "metadata": {"type": "custom", "version": version, **metadata},
            "modelData": base64.b64encode(data).decode(),
        }
        return await self.call("storeModel", params, key=key)
