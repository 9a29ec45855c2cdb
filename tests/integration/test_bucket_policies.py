"""Who may do what in the bucket: the shipped policies on a real store, a worker on them, and what each one refuses."""

from __future__ import annotations

import json
import secrets
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from botocore.exceptions import ClientError

from deploy.local import ObjectStore
from deploy.s3.users import users_in
from tests.process import Processes, wait_until
from tests.store_users import DEPLOY, client_of, credentials_file, is_refused, run_users, trespasses
from worker.client.client import ModelManagerClient
from worker.client.http_caller import HttpCaller

if TYPE_CHECKING:
    from types_boto3_s3 import S3Client

MIB = 1024 * 1024
MULTIPART_BYTES = 17 * MIB  # over the size of a part


@pytest.fixture
def profiles(object_store: ObjectStore, s3_bucket: str, tmp_path: Path) -> Iterator[Path]:
    """A file of AWS profiles in the test's own bucket: the worker's as the default, the clean-up's and the reader's."""
    file = credentials_file(tmp_path / "credentials", secrets.token_hex(4), "worker", "clean-up", "reader")
    status, said = run_users(object_store, "add", file, "--bucket", s3_bucket)
    assert status == 0, said
    yield file
    run_users(object_store, "remove", file)


@pytest.fixture
def client_as(object_store: ObjectStore, profiles: Path) -> Iterator[Callable[[str], S3Client]]:
    made: list[S3Client] = []

    def connect(role: str) -> S3Client:
        made.append(client_of(profiles, role, object_store.endpoint_url))
        return made[-1]

    yield connect
    for client in made:
        client.close()


# --- the worker ---


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    with Processes(tmp_path) as started:
        yield started


@pytest.fixture
def settings(object_store: ObjectStore, s3_bucket: str) -> dict[str, object]:
    return {
        "storage.backend": "s3",
        "storage.s3.endpointUrl": object_store.endpoint_url,
        "storage.s3.bucket": s3_bucket,
        "storage.s3.cleanUpProfile": "clean-up",
        "archive.periodSeconds": 0.2,
        "limits.cleanUpSeconds": 0.2,
    }


async def test_a_worker_on_its_policies_takes_gives_removes_and_archives(
    processes: Processes,
    settings: dict[str, object],
    profiles: Path,
    s3_bucket: str,
    s3_client: S3Client,
    tmp_path: Path,
) -> None:
    service = processes.start(settings=settings, environment={"AWS_SHARED_CREDENTIALS_FILE": str(profiles)})
    service.until_ready()
    weights = tmp_path / "weights.bin"
    weights.write_bytes(b"0123456789abcdef" * (MULTIPART_BYTES // 16))
    async with ModelManagerClient(HttpCaller(service.url), timeout_s=30) as client:
        await client.push(weights, "acme/pushed", "1.0.0", metadata={"type": "custom"})
        assert service.put("streamed", weights.read_bytes()[:-1]).status == 201
        assert service.put("small", b"small").status == 201
        await client.pull("acme/pushed", destination=tmp_path / "pulled")
        assert (tmp_path / "pulled").read_bytes() == weights.read_bytes()
        assert (await client.outcome(await client.validate_model("streamed")))["isValid"]
        for model in ("acme/pushed", "streamed", "small"):
            await client.delete_model(model, purge=True)

    def keys(prefix: str) -> list[str]:
        listed = s3_client.list_objects_v2(Bucket=s3_bucket, Prefix=prefix)
        return [entry["Key"] for entry in listed.get("Contents", [])]

    s3_client.create_multipart_upload(Bucket=s3_bucket, Key="rack-1/blobs/left-by-a-crash")
    wait_until(lambda: not keys("rack-1/blobs/"), "the bytes are removed")
    wait_until(lambda: "Uploads" not in s3_client.list_multipart_uploads(Bucket=s3_bucket), "the parts are dropped")
    wait_until(lambda: keys("rack-1/journal/"), "the journal is archived")
    assert service.stop() == 0
    assert "refuses this worker" not in service.log


def test_a_worker_on_the_reader_s_policy_does_not_boot(
    processes: Processes, settings: dict[str, object], profiles: Path
) -> None:
    environment = {"AWS_SHARED_CREDENTIALS_FILE": str(profiles), "AWS_PROFILE": "reader"}
    service = processes.start(settings=settings, environment=environment)
    service.until(lambda: "refuses this worker" in str(service.checks().get("storage")), "refused by the store")
    assert not service.ready


def test_a_profile_that_does_not_exist_is_told_at_boot(processes: Processes, settings: dict[str, object]) -> None:
    service = processes.start(settings={**settings, "storage.s3.cleanUpProfile": "nobody"})
    assert service.status() == 8
    assert "storage.s3.cleanUpProfile: there is no profile nobody" in service.log


# --- what is refused ---


@pytest.fixture
def bucket(s3_bucket: str, s3_client: S3Client) -> str:
    for key in ("rack-1/blobs/a", "rack-1/journal/1/a", "rack-1/owner.json", "rack-2/blobs/a", "rack-2/owner.json"):
        s3_client.put_object(Bucket=s3_bucket, Key=key, Body=b"bytes")
    return s3_bucket


def test_a_worker_writes_its_own_rack_and_removes_nothing(bucket: str, client_as: Callable[[str], S3Client]) -> None:
    worker = client_as("worker")
    for key in ("rack-1/blobs/a", "rack-1/journal/1/a", "rack-1/owner.json"):
        assert worker.get_object(Bucket=bucket, Key=key)["Body"].read() == b"bytes"
        worker.put_object(Bucket=bucket, Key=key, Body=b"again")
        assert is_refused(lambda k=key: worker.delete_object(Bucket=bucket, Key=k))
    for key in ("rack-2/blobs/a", "rack-2/owner.json", "rack-1/elsewhere", "elsewhere"):
        assert is_refused(lambda k=key: worker.get_object(Bucket=bucket, Key=k))
        assert is_refused(lambda k=key: worker.put_object(Bucket=bucket, Key=k, Body=b""))
        assert is_refused(lambda k=key: worker.create_multipart_upload(Bucket=bucket, Key=k))
    assert is_refused(lambda: worker.delete_bucket(Bucket=bucket))
    assert is_refused(lambda: worker.put_bucket_policy(Bucket=bucket, Policy=json.dumps({"Version": "2012-10-17"})))


def test_the_clean_up_removes_blobs_and_archive_of_its_rack_and_can_do_nothing_else(
    bucket: str, client_as: Callable[[str], S3Client]
) -> None:
    clean_up = client_as("clean-up")
    for key in ("rack-1/owner.json", "rack-2/blobs/a", "rack-2/owner.json"):
        assert is_refused(lambda k=key: clean_up.delete_object(Bucket=bucket, Key=k))
    for key in ("rack-1/blobs/a", "rack-1/journal/1/a"):
        assert is_refused(lambda k=key: clean_up.get_object(Bucket=bucket, Key=k))
        assert is_refused(lambda k=key: clean_up.put_object(Bucket=bucket, Key=k, Body=b""))
        clean_up.delete_object(Bucket=bucket, Key=key)
    assert is_refused(lambda: clean_up.list_objects_v2(Bucket=bucket))


def test_a_reader_gets_blobs_of_every_rack_and_writes_nothing(
    bucket: str, client_as: Callable[[str], S3Client]
) -> None:
    reader = client_as("reader")
    for key in ("rack-1/blobs/a", "rack-2/blobs/a"):
        assert reader.get_object(Bucket=bucket, Key=key)["Body"].read() == b"bytes"
        assert is_refused(lambda k=key: reader.put_object(Bucket=bucket, Key=k, Body=b""))
        assert is_refused(lambda k=key: reader.create_multipart_upload(Bucket=bucket, Key=k))
        assert is_refused(lambda k=key: reader.delete_object(Bucket=bucket, Key=k))
    for key in ("rack-1/journal/1/a", "rack-1/owner.json"):
        assert is_refused(lambda k=key: reader.get_object(Bucket=bucket, Key=k))
    assert is_refused(lambda: reader.list_objects_v2(Bucket=bucket))


# --- the users ---


def test_the_keys_that_compose_gives_a_rack_are_for_that_rack(
    object_store: ObjectStore, s3_bucket: str, s3_client: S3Client, tmp_path: Path
) -> None:
    subprocess.run([DEPLOY / "compose/secrets.sh", tmp_path], check=True, capture_output=True)
    racks = {"rack-1": "rack-2", "rack-2": "rack-1"}
    for rack in racks:
        status, said = run_users(object_store, "add", tmp_path / f"s3-{rack}", "--rack", rack, "--bucket", s3_bucket)
        assert status == 0, said
        s3_client.put_object(Bucket=s3_bucket, Key=f"{rack}/owner.json", Body=b"{}")
    for rack, other in racks.items():
        assert trespasses(tmp_path / f"s3-{rack}", object_store.endpoint_url, s3_bucket, rack, other) == []
    for rack in racks:
        run_users(object_store, "remove", tmp_path / f"s3-{rack}")


def test_a_second_pair_of_keys_works_beside_the_first_until_that_is_removed(
    object_store: ObjectStore, bucket: str, profiles: Path, tmp_path: Path
) -> None:
    second = credentials_file(tmp_path / "second", secrets.token_hex(4), "worker", "clean-up")
    for _ in range(2):
        assert run_users(object_store, "add", second, "--bucket", bucket)[0] == 0
    old, new = (client_of(file, "worker", object_store.endpoint_url) for file in (profiles, second))
    for client in (old, new):
        client.put_object(Bucket=bucket, Key="rack-1/blobs/a", Body=b"")
    for _ in range(2):
        assert run_users(object_store, "remove", profiles)[0] == 0
    with pytest.raises(ClientError, match="InvalidAccessKeyId"):
        old.put_object(Bucket=bucket, Key="rack-1/blobs/a", Body=b"")
    new.put_object(Bucket=bucket, Key="rack-1/blobs/a", Body=b"")
    run_users(object_store, "remove", second)
    old.close()
    new.close()


def test_only_the_administrator_makes_users(object_store: ObjectStore, profiles: Path, tmp_path: Path) -> None:
    mine = credentials_file(tmp_path / "mine", secrets.token_hex(4), "worker")
    for user in users_in(profiles):
        for do in ("add", "remove"):
            status, said = run_users(object_store, do, mine, administrator=user)
            assert (status, "AccessDenied" in said) == (1, True), said


def test_users_that_the_store_does_not_take_are_told(object_store: ObjectStore, tmp_path: Path) -> None:
    short = tmp_path / "short"
    short.write_text("[default]\naws_access_key_id = worker\naws_secret_access_key = short\n")
    unknown = credentials_file(tmp_path / "unknown", secrets.token_hex(4), "visitor")
    half = tmp_path / "half"
    half.write_text("[default]\naws_access_key_id = worker\n")
    broken = tmp_path / "broken"
    broken.write_text("aws_secret_access_key = the-secret\n")
    for file in (half, broken):
        told = f"{file.name} is no file of AWS credentials with both keys in each profile\n"
        assert run_users(object_store, "add", file) == (1, told)
    status, said = run_users(object_store, "add", short)
    assert (status, said.startswith("the store did not take all: ")) == (1, True)
    assert run_users(object_store, "add", unknown) == (1, "there is no policy for the profile visitor\n")
