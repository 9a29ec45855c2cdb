"""Diagnostics: one JSON object a line on stderr, or a readable form on a terminal. Secrets never reach a line."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import MutableMapping
from typing import Any, Literal

import orjson
import structlog

_SECRETS = re.compile(
    r"(?P<before>amqps?://[^:/@\s]*:|X-Amz-(?:Signature|Credential|Security-Token)=|signature=|Bearer )[^@&\s\"]+",
    re.IGNORECASE,
)


def _redact(_: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    for name, value in event.items():
        if isinstance(value, str):
            event[name] = _SECRETS.sub(r"\g<before>***", value)
    return event


def configure_logs(level: str, form: Literal["auto", "json", "console"], rack: str) -> None:
    """Set up structlog and the standard library's logging, which the libraries use, to the same lines on stderr."""
    console = form == "console" or (form == "auto" and sys.stderr.isatty())
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True, key="ts"),
        structlog.processors.format_exc_info,
        _redact,
    ]
    render: Any = (
        structlog.dev.ConsoleRenderer()
        if console
        else structlog.processors.JSONRenderer(serializer=lambda event, **_: orjson.dumps(event, default=str).decode())
    )
    threshold = logging.getLevelNamesMapping()[level.upper()]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.make_filtering_bound_logger(threshold),
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, render],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(threshold)
    for chatty in ("aio_pika", "aiormq", "botocore", "boto3", "urllib3", "aiohttp.access", "asyncio"):
        logging.getLogger(chatty).setLevel(max(threshold, logging.WARNING))
    structlog.contextvars.bind_contextvars(rack=rack)
