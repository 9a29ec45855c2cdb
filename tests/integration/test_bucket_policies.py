"""Who may do what in the bucket: the shipped policies on a real store, a worker on them, and what each one refuses."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import boto3
import pytest
from botocore.config import Config
from botocore.exceptions import ClientError

from deploy.local import ObjectStore
from tests.process import Processes, wait_until
from worker.client.client import ModelManagerClient
from worker.client.http_caller import HttpCaller

if TYPE_CHECKING:
    from types_boto3_s3 import S3Client
    from types_boto3_sts.type_defs import CredentialsTypeDef

SHIPPED = Path(__file__).parents[2] / "deploy/s3"
MIB = 1024 * 1024
MULTIPART_BYTES = 17 * MIB  # over the size of a part


@pytest.fixture
def credentials(object_store: ObjectStore, s3_bucket: str) -> Callable[[str], CredentialsTypeDef]:
    """Temporary ones that can do what a shipped policy allows, in the test's own bucket, and nothing else."""
    sts = boto3.client(
        "sts",
        endpoint_url=object_store.endpoint_url,
        aws_access_key_id=object_store.access_key,
        aws_secret_access_key=object_store.secret_key,
        region_name=object_store.region,
    )

    def assume(role: str) -> CredentialsTypeDef:
        policy = (SHIPPED / f"{role}.json").read_text().replace(":::models", f":::{s3_bucket}")
        assumed = sts.assume_role(
            RoleArn=f"arn:aws:iam::000000000000:role/{role}", RoleSessionName=role, Policy=policy, DurationSeconds=900
        )
        return assumed["Credentials"]

    return assume


@pytest.fixture
def client_as(
    object_store: ObjectStore, credentials: Callable[[str], CredentialsTypeDef]
) -> Iterator[Callable[[str], S3Client]]:
    made: list[S3Client] = []

    def connect(role: str) -> S3Client:
        found = credentials(role)
        made.append(
            boto3.client(
                "s3",
                endpoint_url=object_store.endpoint_url,
                aws_access_key_id=found["AccessKeyId"],
                aws_secret_access_key=found["SecretAccessKey"],
                aws_session_token=found["SessionToken"],
                region_name=object_store.region,
                config=Config(signature_version="s3v4", s3={"addressing_style": "path"}),
            )
        )
        return made[-1]

    yield connect
    for client in made:
        client.close()


def is_refused(call: Callable[[], object]) -> bool:
    try:
        call()
    except ClientError as error:
        assert error.response["Error"]["Code"] in ("AccessDenied", "403"), error
        return True
    return False


# --- the worker ---


@pytest.fixture
def profiles(credentials: Callable[[str], CredentialsTypeDef], tmp_path: Path) -> Path:
    """A file of AWS profiles: the worker's as the default, the clean-up's, and the reader's."""
    text = ""
    for profile, role in (("default", "worker"), ("clean-up", "clean-up"), ("reader", "reader")):
        found = credentials(role)
        text += f"[{profile}]\naws_access_key_id={found['AccessKeyId']}\n"
        text += f"aws_secret_access_key={found['SecretAccessKey']}\naws_session_token={found['SessionToken']}\n"
    (tmp_path / "credentials").write_text(text)
    return tmp_path / "credentials"


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

    wait_until(lambda: not keys("rack-1/blobs/"), "the bytes are removed")
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
