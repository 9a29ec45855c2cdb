"""The object store as one of its users sees it: clients with a profile's keys, and whether they are refused."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import boto3
from botocore.config import Config
from botocore.exceptions import ClientError

from deploy.s3.users import User, users_in

if TYPE_CHECKING:
    from types_boto3_s3 import S3Client

    from deploy.local import ObjectStore

DEPLOY = Path(__file__).parents[1] / "deploy"
PROGRAM = DEPLOY / "s3/users.py"
REFUSALS = ("AccessDenied", "403", "InvalidAccessKeyId")


def credentials_file(path: Path, mark: str, *roles: str) -> Path:
    """A file of AWS credentials with a pair of keys for each role, the worker's as the default."""
    text = ""
    for role in roles:
        profile = "default" if role == "worker" else role
        text += f"[{profile}]\naws_access_key_id = {role}-{mark}\naws_secret_access_key = secret-{role}-{mark}\n"
    path.write_text(text)
    return path


def run_users(store: ObjectStore, *arguments: str | Path, administrator: User | None = None) -> tuple[int, str]:
    """`deploy/s3/users.py`, for the store's own administrator or another one: its exit status and what it said."""
    keys = administrator or User(store.access_key, store.secret_key, "")
    env = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "MODEL_MANAGER_"))}
    env |= {
        "MODEL_MANAGER_STORAGE__S3__ENDPOINT_URL": store.endpoint_url,
        "AWS_ACCESS_KEY_ID": keys.access_key,
        "AWS_SECRET_ACCESS_KEY": keys.secret_key,
    }
    done = subprocess.run(
        [sys.executable, PROGRAM, *arguments], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    return done.returncode, done.stdout


def client_of(credentials: Path, role: str, endpoint_url: str) -> S3Client:
    """A client with the keys that the file has for this role."""
    [user] = [user for user in users_in(credentials) if user.role == role]
    return boto3.client(
        "s3",
        endpoint_url=endpoint_url,
        aws_access_key_id=user.access_key,
        aws_secret_access_key=user.secret_key,
        region_name="us-east-1",
        config=Config(signature_version="s3v4", s3={"addressing_style": "path"}),
    )


def is_refused(call: Callable[[], object]) -> bool:
    try:
        call()
    except ClientError as error:
        assert error.response["Error"]["Code"] in REFUSALS, error
        return True
    return False


def trespasses(credentials: Path, endpoint_url: str, bucket: str, rack: str, other: str) -> list[str]:
    """What the keys in a rack's file may do and should not; nothing, if the policies are what they should be.

    The other rack's `owner.json` has to be there.
    """
    worker, clean_up = (client_of(credentials, role, endpoint_url) for role in ("worker", "clean-up"))
    blob, others_blob, owner, others_owner = (
        {"Bucket": bucket, "Key": f"{whose}/{key}"}
        for key in ("blobs/trespass", "owner.json")
        for whose in (rack, other)
    )
    try:
        worker.put_object(**blob, Body=b"bytes")
        attempts: dict[str, Callable[[], object]] = {
            "the worker removes a blob": lambda: worker.delete_object(**blob),
            "the worker reads what is another rack's": lambda: worker.get_object(**others_owner),
            "the worker writes what is another rack's": lambda: worker.put_object(**others_blob, Body=b""),
            "the worker makes a bucket": lambda: worker.create_bucket(Bucket=f"{bucket}-trespass"),
            "the clean-up reads a blob": lambda: clean_up.get_object(**blob),
            "the clean-up writes a blob": lambda: clean_up.put_object(**blob, Body=b""),
            "the clean-up removes the owner": lambda: clean_up.delete_object(**owner),
            "the clean-up removes what is another rack's": lambda: clean_up.delete_object(**others_blob),
            "the clean-up lists": lambda: clean_up.list_objects_v2(Bucket=bucket),
        }
        done = [what for what, attempt in attempts.items() if not is_refused(attempt)]
        clean_up.delete_object(**blob)
        return done
    finally:
        worker.close()
        clean_up.close()
