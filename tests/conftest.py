"""Real services for the tests that ask for them, started once a session and ended with it.

A test that uses `amqp_url`, `rabbitmq` or `broker_in` is marked `broker`, one that uses `s3_bucket`, `s3_client` or
`object_store` is marked `s3`. Where a service cannot be had, its tests are skipped with the reason; with `CI=true` they
fail. The end of the report tells which service came from where. `LOCAL_SERVICES` (`auto`, `given`, `docker`, `native`)
restricts where from.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import boto3
import hypothesis
import pytest
from botocore.config import Config

from deploy.local import NotStarted, ObjectStore, RabbitMQ, Source, Unavailable, object_store, rabbitmq
from deploy.local.broker import IMAGE, IMAGE_VARIABLE
from deploy.local.container import build_worker_image, ping, require_image

if TYPE_CHECKING:
    from _pytest.capture import CaptureManager
    from types_boto3_s3 import S3Client

# How long an example takes says more about the machine than about the program.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")

SOURCE = Source(os.environ.get("LOCAL_SERVICES", Source.AUTO))
IN_CI = os.environ.get("CI", "").lower() in ("1", "true", "yes")
_NOT_ASKED = "not asked for by the tests that were selected"
LANES = pytest.StashKey[dict[str, str]]()
MARKS = {
    "broker": {"rabbitmq", "amqp_url", "broker_in"},
    "s3": {"object_store", "s3_client", "s3_bucket"},
    "docker": {"docker_image", "worker_image"},
}

Service = TypeVar("Service", RabbitMQ, ObjectStore)


def pytest_configure(config: pytest.Config) -> None:
    config.stash[LANES] = dict.fromkeys(MARKS, _NOT_ASKED)


def pytest_sessionstart() -> None:
    if SOURCE is Source.DOCKER:
        try:
            ping()
        except Unavailable as error:
            pytest.exit(f"NO TESTS RUN: {error}", returncode=7)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for mark, fixtures in MARKS.items():
            if fixtures & set(getattr(item, "fixturenames", ())):
                item.add_marker(mark)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker of pytest-xdist has services of its own, and tells the session that reports of them."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["lanes"] = session.config.stash[LANES]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    lanes = node.config.stash[LANES]
    for lane, story in getattr(node, "workeroutput", {}).get("lanes", {}).items():
        if story != _NOT_ASKED and not lanes[lane].startswith("did NOT"):
            lanes[lane] = story


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    terminalreporter.section("services")
    for lane, story in config.stash[LANES].items():
        terminalreporter.line(f"{lane:7}{story}")


def provide(config: pytest.Config, lane: str, get: Callable[[], Service]) -> Iterator[Service]:
    """Starts a service for the session and ends it. Skips, or in CI fails, the tests where it cannot be had."""
    try:
        with aloud(config):
            service = get()
            service.__enter__()
    except (Unavailable, NotStarted) as error:
        config.stash[LANES][lane] = f"did NOT run: {error}"
        if IN_CI:
            pytest.fail(f"{lane}: {error}", pytrace=False)
        pytest.skip(f"{lane}: {error}")
    config.stash[LANES][lane] = f"ran: {service.why}"
    yield service
    service.close()


def aloud(config: pytest.Config) -> AbstractContextManager[None]:
    """Lets what an installation or a build says reach the terminal while it goes on, instead of the captured output."""
    capture: CaptureManager | None = config.pluginmanager.getplugin("capturemanager")
    return capture.global_and_fixture_disabled() if capture else nullcontext()


@pytest.fixture(autouse=True)
def no_reserve_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """The folders of the last runs are kept, and each journal holds 32 MiB of the disk."""
    yield
    folder = getattr(request.node, "funcargs", {}).get("tmp_path")
    for reserve in folder.rglob("RESERVE") if folder is not None else ():
        reserve.unlink(missing_ok=True)


@pytest.fixture(scope="session", name="rabbitmq")
def rabbitmq_fixture(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RabbitMQ]:
    """The broker of the session. A test that ends it starts it again."""
    folder = tmp_path_factory.mktemp("rabbitmq")
    yield from provide(pytestconfig, "broker", lambda: rabbitmq(folder, source=SOURCE))


@pytest.fixture(scope="module")
def broker_in(pytestconfig: pytest.Config) -> Iterator[Callable[[Path], RabbitMQ]]:
    """Starts a broker of the test's own, with the `rabbitmq.conf` that is in the folder; ends it with the module."""

    def start(folder: Path) -> RabbitMQ:
        if SOURCE not in (Source.AUTO, Source.NATIVE):
            pytest.skip(f"broker: one with a configuration of its own is none from {SOURCE}")
        provided = contextmanager(provide)(pytestconfig, "broker", lambda: rabbitmq(folder, source=Source.NATIVE))
        return started.enter_context(provided)

    with ExitStack() as started:
        yield start


@pytest.fixture
def amqp_url(rabbitmq: RabbitMQ) -> str:
    """All tests share one vhost: what they make there is named after their own `rack`."""
    return rabbitmq.url


@pytest.fixture
def rack() -> str:
    """The name of a rack that nobody else has."""
    return f"r-{secrets.token_hex(4)}"


@pytest.fixture(scope="session", name="object_store")
def object_store_fixture(
    pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ObjectStore]:
    """The S3 store of the session. A test that ends it starts it again."""
    folder = tmp_path_factory.mktemp("object-store")
    yield from provide(pytestconfig, "s3", lambda: object_store(folder, source=SOURCE))


@pytest.fixture(scope="session")
def s3_client(object_store: ObjectStore) -> S3Client:
    """A client with the keys of the store, for what a test wants to see or to spoil behind the service's back."""
    return connect(object_store)


@pytest.fixture
def s3_bucket(s3_client: S3Client) -> Iterator[str]:
    """The name of a new, empty bucket, which is removed afterwards with all that is in it."""
    bucket = f"test-{secrets.token_hex(8)}"
    s3_client.create_bucket(Bucket=bucket)
    yield bucket
    for page in s3_client.get_paginator("list_objects_v2").paginate(Bucket=bucket):
        for entry in page.get("Contents", []):
            s3_client.delete_object(Bucket=bucket, Key=entry["Key"])
    s3_client.delete_bucket(Bucket=bucket)


@pytest.fixture(scope="session")
def docker_image(pytestconfig: pytest.Config) -> str:
    """The image of a broker that a Docker daemon here has. Its absence is never a failure: it is a lane of its own."""
    image = os.environ.get(IMAGE_VARIABLE) or IMAGE
    try:
        require_image(image)
    except Unavailable as error:
        pytestconfig.stash[LANES]["docker"] = f"did NOT run: {error}"
        pytest.skip(f"docker: {error}")
    pytestconfig.stash[LANES]["docker"] = f"ran: {image}"
    return image


@pytest.fixture(scope="session")
def worker_image(pytestconfig: pytest.Config) -> str:
    """The worker's image: WORKER_IMAGE, or one that is built here, on the base WORKER_BASE_IMAGE if that is set."""
    image = os.environ.get("WORKER_IMAGE")
    try:
        if image is None:
            ping()
            image = build_worker_image("wrk-model-manager:test", base=os.environ.get("WORKER_BASE_IMAGE"))
        require_image(image)
    except Unavailable as error:
        pytestconfig.stash[LANES]["docker"] = f"did NOT run: {error}"
        pytest.skip(f"docker: {error}")
    pytestconfig.stash[LANES]["docker"] = f"ran: {image}"
    return image


def connect(store: ObjectStore) -> S3Client:
    return boto3.client(
        "s3",
        endpoint_url=store.endpoint_url,
        aws_access_key_id=store.access_key,
        aws_secret_access_key=store.secret_key,
        region_name=store.region,
        config=Config(signature_version="s3v4", s3={"addressing_style": "path"}),
    )
