"""The two services: the queue worker and the standalone HTTP service."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import Annotated, Any

import typer

Rack = Annotated[str | None, typer.Option("--rack", help="The rack this worker owns.")]
HttpHost = Annotated[str | None, typer.Option("--http-host", help="Address HTTP listens on.")]
HttpPort = Annotated[int | None, typer.Option("--http-port", min=0, max=65_535, help="Port HTTP listens on.")]
TokenFile = Annotated[Path | None, typer.Option("--token-file", help="File with the bearer token HTTP asks for.")]
AmqpUrl = Annotated[str | None, typer.Option("--amqp-url", help="The broker.")]
Backend = Annotated[str | None, typer.Option("--storage-backend", help="disk or s3.")]
StoragePath = Annotated[Path | None, typer.Option("--storage-path", help="Folder of the disk backend.")]
RegistryPath = Annotated[Path | None, typer.Option("--registry-path", help="Folder of the journal.")]
LogLevel = Annotated[str | None, typer.Option("--log-level", help="debug, info, warning or error.")]
LogFormat = Annotated[str | None, typer.Option("--log-format", help="auto, json or console.")]
TakeOver = Annotated[
    bool, typer.Option("--take-over", help="Take the storage prefix from the registry that owned it until now.")
]


def add_to(app: typer.Typer) -> None:
    app.command("worker", rich_help_panel="Services")(worker)
    app.command("serve", rich_help_panel="Services")(serve)


def worker(
    rack: Rack = None,
    amqp_url: AmqpUrl = None,
    http_host: HttpHost = None,
    http_port: HttpPort = None,
    token_file: TokenFile = None,
    storage_backend: Backend = None,
    storage_path: StoragePath = None,
    registry_path: RegistryPath = None,
    log_level: LogLevel = None,
    log_format: LogFormat = None,
    take_over: TakeOver = False,
) -> None:
    """Run a rack's queue worker, with HTTP beside it. Every setting has a key; the flags are the common ones."""
    flags = _flags(
        rack, http_host, http_port, token_file, storage_backend, storage_path, registry_path, log_level, log_format
    )
    _run(flags | {"amqp.url": amqp_url}, broker=True, take_over=take_over)


def serve(
    rack: Rack = None,
    http_host: HttpHost = None,
    http_port: HttpPort = None,
    token_file: TokenFile = None,
    storage_backend: Backend = None,
    storage_path: StoragePath = None,
    registry_path: RegistryPath = None,
    log_level: LogLevel = None,
    log_format: LogFormat = None,
    take_over: TakeOver = False,
) -> None:
    """Run the standalone HTTP service, without a broker."""
    flags = _flags(
        rack, http_host, http_port, token_file, storage_backend, storage_path, registry_path, log_level, log_format
    )
    _run(flags, broker=False, take_over=take_over)


def _flags(
    rack: str | None,
    http_host: str | None,
    http_port: int | None,
    token_file: Path | None,
    storage_backend: str | None,
    storage_path: Path | None,
    registry_path: Path | None,
    log_level: str | None,
    log_format: str | None,
) -> dict[str, Any]:
    """The flags by the key of their setting; a flag that is not given is None."""
    return {
        "rack": rack,
        "http.host": http_host,
        "http.port": http_port,
        "http.tokenFile": _text(token_file),
        "storage.backend": storage_backend,
        "storage.path": _text(storage_path),
        "registry.path": _text(registry_path),
        "log.level": log_level,
        "log.format": log_format,
    }


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _run(flags: dict[str, Any], *, broker: bool, take_over: bool) -> None:
    from worker.settings import load_settings

    loaded = load_settings(flags)

    async def until_stopped() -> int:
        from worker.app import run

        return await run(loaded, _stop_on_signals(), broker=broker, take_over=take_over)

    raise typer.Exit(asyncio.run(until_stopped()))


def _stop_on_signals() -> asyncio.Event:
    """An event that SIGTERM or SIGINT sets; the second one ends the process at once."""
    stop = asyncio.Event()

    def on_signal(number: int) -> None:
        if stop.is_set():
            os._exit(128 + number)
        stop.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)
    return stop
