"""Bytes over HTTP by blocking sockets: a sender and a receiver that are no bottleneck."""

from __future__ import annotations

import socket
from pathlib import Path
from urllib.parse import urlsplit

BLOCK_BYTES = 1024 * 1024
_TIMEOUT_S = 300.0


class TransferFailed(Exception):
    """The answer was no success."""


def put_file(url: str, source: Path) -> bytes:
    """PUT a file by sendfile; the body of the answer."""
    with source.open("rb") as file, _connect(url) as connection:
        size = source.stat().st_size
        headers = f"Content-Length: {size}\r\nContent-Type: application/octet-stream\r\n"
        connection.sendall(_head("PUT", url, headers))
        connection.sendfile(file)
        _, body = _answer_head(connection)
        while received := connection.recv(BLOCK_BYTES):
            body += received
        return body


def get_and_drop(url: str) -> int:
    """GET and forget; how many bytes the body had."""
    with _connect(url) as connection:
        connection.sendall(_head("GET", url))
        length, body = _answer_head(connection)
        seen = len(body)
        block = bytearray(BLOCK_BYTES)
        while received := connection.recv_into(block):
            seen += received
        if seen != length:
            raise TransferFailed(f"{seen} of {length} bytes came")
        return seen


def _connect(url: str) -> socket.socket:
    parts = urlsplit(url)
    return socket.create_connection((parts.hostname or "127.0.0.1", parts.port or 80), _TIMEOUT_S)


def _head(verb: str, url: str, headers: str = "") -> bytes:
    parts = urlsplit(url)
    target = f"{parts.path}?{parts.query}" if parts.query else parts.path
    return f"{verb} {target} HTTP/1.1\r\nHost: {parts.netloc}\r\nConnection: close\r\n{headers}\r\n".encode()


def _answer_head(connection: socket.socket) -> tuple[int, bytes]:
    """The answer's Content-Length, and what has come of its body. Raises TransferFailed for an error."""
    data = b""
    while b"\r\n\r\n" not in data:
        received = connection.recv(BLOCK_BYTES)
        if not received:
            raise TransferFailed(f"the connection was closed after {data[:200]!r}")
        data += received
    head, _, body = data.partition(b"\r\n\r\n")
    lines = head.decode("latin-1").split("\r\n")
    if not lines[0].split(" ")[1].startswith("2"):
        raise TransferFailed(f"{lines[0]} {body[:500].decode(errors='replace')}")
    lengths = [line.partition(":")[2] for line in lines if line.lower().startswith("content-length:")]
    return int(lengths[0]) if lengths else 0, body
