"""Storing to an object store and fetching from it, verified, beside boto3's own transfers at their defaults."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Iterator

from tests.benchmarks.bench import Bench
from tests.benchmarks.bytes_of_models import per_second, put, random_file, sha256_alone
from tests.benchmarks.rounds import best_of
from tests.benchmarks.services import BUCKET, s3_client
from tests.benchmarks.table import Table, Target, mebibytes, times
from worker.storage.s3 import S3Store

STORE = Target(0.9, 1.0)
FETCH = Target(3, 5)
_MIB = 1024 * 1024
_PREFIX = "bench-s3"


def measure(bench: Bench) -> Iterator[Table]:
    endpoint = bench.services.object_store
    size = int(bench.pick(512, 256)) * _MIB
    source = random_file(bench.folder / "s3-source", size)
    sha256 = sha256_alone(source)
    client = s3_client(endpoint)

    def with_store(work: Callable[[S3Store], Awaitable[object]]) -> float:
        async def run() -> None:
            await work(store)
            await store.close()

        store = S3Store(endpoint_url=endpoint.endpoint_url, bucket=BUCKET, prefix=_PREFIX, region=endpoint.region)
        return per_second(size, lambda: asyncio.run(run()))

    best = best_of(
        bench.rounds,
        {
            "boto3": lambda: per_second(size, lambda: client.upload_file(str(source), BUCKET, f"{_PREFIX}/boto3")),
            "undeclared": lambda: with_store(lambda store: put(store, source)),
            "declared": lambda: with_store(lambda store: put(store, source, sha256=sha256)),
        },
        lambda rate: rate,
    )
    table = Table(f"Store {mebibytes(size)} MiB to S3, MiB/s", ["what", "MiB/s", "x boto3"])
    table.add("boto3.upload_file", mebibytes(best["boto3"]))
    for name, what in (
        ("declared", "S3Store.put, digest declared"),
        ("undeclared", "S3Store.put, digest found on the way"),
    ):
        ratio = best[name] / best["boto3"]
        table.add(what, mebibytes(best[name]), times(ratio), value=ratio, target=STORE)
    yield table

    async def kept() -> str:
        store = S3Store(endpoint_url=endpoint.endpoint_url, bucket=BUCKET, prefix=_PREFIX, region=endpoint.region)
        blob = await put(store, source, sha256=sha256)
        await store.close()
        return blob.key.removeprefix(f"{_PREFIX}/")

    key = asyncio.run(kept())
    target = bench.folder / "s3-target"
    best = best_of(
        bench.rounds,
        {
            "boto3": lambda: per_second(size, lambda: client.download_file(BUCKET, f"{_PREFIX}/{key}", str(target))),
            "hash": lambda: with_store(lambda store: store.hash(key)),
            "read": lambda: with_store(lambda store: _read_verified(store, key, sha256)),
        },
        lambda rate: rate,
    )
    table = Table(f"Fetch {mebibytes(size)} MiB from S3, MiB/s", ["what", "MiB/s", "x boto3"])
    table.add("boto3.download_file", mebibytes(best["boto3"]))
    for name, what in (("hash", "S3Store.hash"), ("read", "S3Store.read with sha256")):
        ratio = best[name] / best["boto3"]
        table.add(what, mebibytes(best[name]), times(ratio), value=ratio, target=FETCH)
    yield table


async def _read_verified(store: S3Store, key: str, sha256: str) -> None:
    digest = hashlib.sha256()
    async for chunk in store.read(key):
        await asyncio.to_thread(digest.update, chunk)
    if digest.hexdigest() != sha256:
        raise AssertionError("the bytes that were read are not those that were stored")
