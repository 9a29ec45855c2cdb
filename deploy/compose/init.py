"""Once before the other containers: makes the bucket and its users, and writes what RabbitMQ loads at boot.

It may be repeated. The object store's administrator is known here and to the store, to no rack.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import boto3
from botocore.exceptions import ClientError

DEFINITIONS = Path("/var/lib/wrk-model-manager/definitions.json")
PASSWORDS = "/run/passwords"
KEYS = "/run/secrets/s3-{rack}"


def main(racks: list[str]) -> None:
    bucket = os.environ["MODEL_MANAGER_STORAGE__S3__BUCKET"]
    make_bucket(bucket, os.environ["MODEL_MANAGER_STORAGE__S3__ENDPOINT_URL"])
    print(f"the bucket {bucket} is there")
    for rack in racks:
        subprocess.run([sys.executable, "/s3/users.py", "add", KEYS.format(rack=rack), "--rack", rack], check=True)
    write_definitions(racks)
    print(f"the definitions for {', '.join(racks)} are written")


def make_bucket(bucket: str, endpoint_url: str) -> None:
    try:
        boto3.client("s3", endpoint_url=endpoint_url).create_bucket(Bucket=bucket)
    except ClientError as error:
        if error.response["Error"]["Code"] not in ("BucketAlreadyOwnedByYou", "BucketAlreadyExists"):
            raise


def write_definitions(racks: list[str]) -> None:
    """The topology and the users with hashes of their passwords; replaced as a whole, as a broker may be reading."""
    named = [argument for rack in racks for argument in ("--rack", rack)]
    command = ["model-manager", "topology", "definitions", *named, "--passwords", PASSWORDS]
    document = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
    new = DEFINITIONS.with_suffix(".new")
    new.write_bytes(document)
    # The broker runs as another user.
    DEFINITIONS.parent.chmod(0o755)
    new.chmod(0o444)
    new.replace(DEFINITIONS)


if __name__ == "__main__":
    main(sys.argv[1:])
