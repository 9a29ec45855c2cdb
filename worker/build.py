"""Parts that are made of the settings alone."""

from __future__ import annotations

from botocore.exceptions import ProfileNotFound

from worker.policy import Policy
from worker.settings import Settings, SettingsError
from worker.storage.blobstore import UNOBSERVED, BlobStore, StoreObserver
from worker.storage.disk import DiskStore
from worker.storage.retrying import RetryingStore
from worker.storage.s3 import S3Store
from worker.validation.registry import known_formats


def build_store(settings: Settings, observe: StoreObserver = UNOBSERVED) -> BlobStore:
    """The blob store of the settings, with retries around it."""
    timeout = settings.timeouts.storage
    if settings.storage.backend == "disk":
        return RetryingStore(DiskStore(settings.storage.path, observe=observe), observe=observe)
    s3 = settings.storage.s3
    try:
        store = S3Store(
            endpoint_url=s3.endpoint_url,
            bucket=s3.bucket or "",
            prefix=settings.rack if s3.prefix is None else s3.prefix,
            region=s3.region,
            public_endpoint_url=s3.public_endpoint_url,
            clean_up_profile=s3.clean_up_profile,
            timeout_s=timeout,
            observe=observe,
        )
    except ProfileNotFound:
        raise SettingsError(
            [f"storage.s3.cleanUpProfile: there is no profile {s3.clean_up_profile} in the AWS configuration"]
        ) from None
    return RetryingStore(store, observe=observe)


def build_policy(settings: Settings) -> Policy:
    formats = known_formats() if settings.supported_formats is None else frozenset(settings.supported_formats)
    return Policy(
        rack=settings.rack,
        formats=formats,
        max_model_size=settings.max_model_size,
        max_inline_size=settings.max_inline_size,
        allow_pickle=settings.allow_pickle,
        check_formats=settings.model_validation_enabled,
        check_checksums=settings.checksum_validation,
        peers=settings.replication.peers,
        replication_factor=settings.replication_factor,
        undo_s=settings.limits.undo_seconds,
        upload_s=settings.limits.upload_seconds,
        url_s=settings.limits.url_seconds,
    )
