"""Makes and removes the users of an object store with MinIO's interface, by the policies beside this file.

    python deploy/s3/users.py add FILE --rack rack-1    a user for each pair of keys in a file of AWS credentials
    python deploy/s3/users.py remove FILE               and away with them

The pair of the profile `default` may do what worker.json says, any other what the file of its profile's name says, in
the named bucket and below the rack's prefix. Both commands may be repeated. The store is the worker's, at
MODEL_MANAGER_STORAGE__S3__ENDPOINT_URL; its administrator is whoever the standard AWS chain finds.
"""

from __future__ import annotations

import argparse
import configparser
import io
import json
import os
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import boto3
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.exceptions import BotoCoreError
from botocore.httpsession import URLLib3Session

POLICIES = Path(__file__).parent
ENDPOINT_VARIABLE = "MODEL_MANAGER_STORAGE__S3__ENDPOINT_URL"
REGION = "us-east-1"
TIMEOUT_S = 30
OK = 200
GONE = 404


class Refused(Exception):
    """It was not done; the message is for the person at the keyboard."""


@dataclass(frozen=True)
class User:
    """A pair of keys, and the name of the policy that it is for."""

    access_key: str
    secret_key: str
    role: str


def main() -> int:
    parser = argparse.ArgumentParser(prog="users.py", description=__doc__.partition("\n")[0])
    parser.add_argument("do", choices=("add", "remove"))
    parser.add_argument("file", type=Path, help="AWS credentials: a profile for each user")
    parser.add_argument("--rack", default=os.environ.get("MODEL_MANAGER_RACK", "rack-1"))
    parser.add_argument("--bucket", default=os.environ.get("MODEL_MANAGER_STORAGE__S3__BUCKET", "models"))
    arguments = parser.parse_args()
    if ENDPOINT_VARIABLE not in os.environ:
        parser.error(f"{ENDPOINT_VARIABLE} is not set")
    try:
        users = users_in(arguments.file)
        if arguments.do == "add":
            add(users, arguments.bucket, arguments.rack)
        else:
            remove(users)
    except (Refused, OSError, BotoCoreError) as error:
        print(error, file=sys.stderr)
        return 1
    done = {"add": "may use the store", "remove": "is gone"}[arguments.do]
    for user in users:
        print(f"{user.access_key} ({user.role}) {done}")
    return 0


def users_in(file: Path) -> list[User]:
    profiles = configparser.RawConfigParser()
    try:
        profiles.read_string(file.read_text())
        return [
            User(
                profiles.get(name, "aws_access_key_id"),
                profiles.get(name, "aws_secret_access_key"),
                "worker" if name == "default" else name,
            )
            for name in profiles.sections()
        ]
    except configparser.Error:
        # Its message may hold a line of the file, and so a key.
        raise Refused(f"{file.name} is no file of AWS credentials with both keys in each profile") from None


def add(users: list[User], bucket: str, rack: str) -> None:
    """Users and policies in one request; those that are there already become what is told here.

    It holds the secret keys as they are: over HTTP, whoever reads the network has them. That takes no library for the
    store's own encryption.
    """
    names = {user.role: f"{bucket}-{rack}-{user.role}" for user in users}
    documents = {
        "policies": {name: policy(role, bucket, rack) for role, name in names.items()},
        "users": {user.access_key: {"secretKey": user.secret_key, "status": "enabled"} for user in users},
        "user_mappings": {user.access_key: {"policy": names[user.role]} for user in users},
    }
    body = io.BytesIO()
    with zipfile.ZipFile(body, "w") as archive:
        for name, document in documents.items():
            archive.writestr(f"iam-assets/{name}.json", json.dumps(document))
    result = json.loads(ask("PUT", "import-iam-v2", body.getvalue()))
    if failed := {kind: which for kind, which in result["failed"].items() if which}:
        raise Refused(f"the store did not take all: {failed}")


def policy(role: str, bucket: str, rack: str) -> object:
    file = POLICIES / f"{role}.json"
    if not file.is_file():
        raise Refused(f"there is no policy for the profile {role}")
    return json.loads(file.read_text().replace(":::models", f":::{bucket}").replace("/rack-1/", f"/{rack}/"))


def remove(users: list[User]) -> None:
    """From here on the store refuses their keys. The policies stay, for the pairs of keys that come after them."""
    for user in users:
        ask("DELETE", f"remove-user?accessKey={quote(user.access_key, safe='')}", accepted=(OK, GONE))


def ask(verb: str, path: str, body: bytes = b"", *, accepted: tuple[int, ...] = (OK,)) -> bytes:
    """What MinIO's admin interface answers, its administrator having signed. Raises `Refused` for any other status."""
    session = boto3.Session()
    administrator = session.get_credentials()
    if administrator is None:
        raise Refused("there is no administrator: AWS_SHARED_CREDENTIALS_FILE names no file of credentials")
    request = AWSRequest(verb, f"{os.environ[ENDPOINT_VARIABLE].rstrip('/')}/minio/admin/v3/{path}", data=body)
    S3SigV4Auth(administrator, "s3", session.region_name or REGION).add_auth(request)
    # It takes the file of an authority, too; the annotation does not know.
    trusted: Any = os.environ.get("AWS_CA_BUNDLE", True)
    answer = URLLib3Session(verify=trusted, timeout=TIMEOUT_S).send(request.prepare())
    if answer.status_code not in accepted:
        raise Refused(f"the store answers {answer.status_code} to {path.partition('?')[0]}: {answer.text.strip()}")
    return answer.content


if __name__ == "__main__":
    sys.exit(main())
