"""A caller that costs next to nothing, so that what answers is measured and not what asks.

One process, one blocking socket, one reply address. Requests are frames made once, with the correlation id put in;
of the replies only what is needed is read. Whoever answers gets the same requests, by the same exchange.
"""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self
from urllib.parse import unquote, urlsplit

import orjson
import pamqp.frame
from pamqp.body import ContentBody
from pamqp.commands import Basic, Channel, Connection, Queue
from pamqp.header import ContentHeader

from worker.transport.topology import RPC_EXCHANGE

DIRECT = "amq.rabbitmq.reply-to"
_ID = b"bench-%08d"
_ID_BYTES = len(_ID % 0)
_RECEIVE_BYTES = 256 * 1024
_TIMEOUT_S = 30.0
_METHOD, _HEADER, _BODY = 1, 2, 3
_DELIVER = b"\x00\x3c\x00\x3c"


class CallFailed(Exception):
    """A request was not answered with success."""


@dataclass(frozen=True, slots=True)
class Load:
    """What a closed loop has measured; `latencies` in seconds, one for each reply."""

    seconds: float
    latencies: list[float] = field(repr=False)

    @property
    def per_second(self) -> float:
        return len(self.latencies) / self.seconds


class RpcCaller:
    """Calls `method` of `rack` with the same `params` again and again. Replies come to its own queue, or directly."""

    def __init__(self, url: str, rack: str, method: str, params: dict[str, Any], *, direct: bool = False) -> None:
        parts = urlsplit(url)
        self._socket = socket.create_connection((parts.hostname or "127.0.0.1", parts.port or 5672), _TIMEOUT_S)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._buffer = b""
        self._id = b""  # of the reply under way, with the bytes that are there and the number that is to come
        self._body = b""
        self._left = 0
        self._started: dict[bytes, float] = {}
        self._number = 0
        login = f"\0{unquote(parts.username or 'guest')}\0{unquote(parts.password or 'guest')}"
        reply_to = self._open(login, unquote(parts.path[1:]) or "/", direct)
        self._template = _request(rack, method, params, reply_to)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()

    def call(self) -> dict[str, Any]:
        """One request and its reply. Raises CallFailed unless it is a success."""
        self._send()
        bodies: list[bytes] = []
        while not bodies:
            self._receive(lambda _, body: bodies.append(body))
        reply: dict[str, Any] = orjson.loads(bodies[0])
        if reply.get("success") is not True:
            raise CallFailed(f"{reply}")
        return reply

    def closed_loop(self, in_flight: int, *, seconds: float) -> Load:
        """Keep `in_flight` requests on their way; a new one follows each reply."""
        size = len(orjson.dumps(self.call()))
        latencies: list[float] = []
        end = time.perf_counter() + seconds

        def answered(started: float, body: bytes) -> None:
            now = time.perf_counter()
            if len(body) < size:  # an error's body; a reply that is spaced otherwise is longer
                raise CallFailed(body[:500].decode())
            if now < end:
                latencies.append(now - started)
                self._send()

        for _ in range(in_flight):
            self._send()
        while self._started:
            self._receive(answered)
        return Load(seconds, latencies)

    def paced(self, every_s: float, until: Callable[[], bool]) -> Load:
        """One request at a time, at most one every `every_s`, until told to stop."""
        latencies: list[float] = []
        began = time.perf_counter()
        while not until():
            started = time.perf_counter()
            self.call()
            ended = time.perf_counter()
            latencies.append(ended - started)
            time.sleep(max(0.0, started + every_s - ended))
        return Load(time.perf_counter() - began, latencies)

    # --- frames ---

    def _send(self) -> None:
        self._number += 1
        correlation_id = _ID % self._number
        self._started[correlation_id] = time.perf_counter()
        self._socket.sendall(self._template.replace(_ID % 0, correlation_id))

    def _receive(self, answered: Callable[[float, bytes], None]) -> None:
        """Take what has come; tell of each whole reply."""
        received = self._socket.recv(_RECEIVE_BYTES)
        if not received:
            raise CallFailed("the broker closed the connection")
        data = self._buffer + received
        at = 0
        while len(data) - at >= 8:
            kind, _, size = struct.unpack_from(">BHI", data, at)
            if len(data) - at < size + 8:
                break
            payload = data[at + 7 : at + 7 + size]
            if kind == _HEADER:
                found = payload.index(b"bench-")
                self._id = payload[found : found + _ID_BYTES]
                self._left = struct.unpack_from(">Q", payload, 4)[0]
                self._body = b""
            elif kind == _BODY:
                self._body += payload
                self._left -= size
                if self._left == 0:
                    answered(self._started.pop(self._id), self._body)
            elif kind == _METHOD and payload[:4] != _DELIVER:
                raise CallFailed(f"the broker says {pamqp.frame.unmarshal(data[at : at + size + 8])[2]}")
            at += size + 8
        self._buffer = data[at:]

    def _ask(self, frame: Any, channel: int = 1) -> Any:
        self._socket.sendall(pamqp.frame.marshal(frame, channel))
        return self._answer()

    def _answer(self) -> Any:
        data = b""
        while True:
            data += self._socket.recv(_RECEIVE_BYTES)
            if len(data) >= 7 and len(data) >= struct.unpack_from(">BHI", data)[2] + 8:
                return pamqp.frame.unmarshal(data)[2]

    def _open(self, login: str, vhost: str, direct: bool) -> str:
        """Open the connection; the address for replies."""
        self._socket.sendall(b"AMQP\x00\x00\x09\x01")
        self._answer()
        tune = self._ask(Connection.StartOk({}, "PLAIN", login, "en_US"), 0)
        self._socket.sendall(pamqp.frame.marshal(Connection.TuneOk(tune.channel_max, tune.frame_max, 0), 0))
        self._ask(Connection.Open(vhost), 0)
        self._ask(Channel.Open())
        queue = DIRECT if direct else self._ask(Queue.Declare(queue="", exclusive=True, auto_delete=True)).queue
        self._ask(Basic.Consume(queue=queue, no_ack=True))
        return str(queue)


def _request(rack: str, method: str, params: dict[str, Any], reply_to: str) -> bytes:
    """The frames of one request, with the properties that our client gives a lookup."""
    body = orjson.dumps(params)
    properties = Basic.Properties(
        content_type="application/json",
        message_type=method,
        reply_to=reply_to,
        correlation_id=(_ID % 0).decode(),
        message_id=(_ID % 0).decode(),
        expiration="30000",
        delivery_mode=1,
    )
    frames = (
        Basic.Publish(exchange=RPC_EXCHANGE, routing_key=f"{rack}.{method}"),
        ContentHeader(0, len(body), properties),
        ContentBody(body),
    )
    return b"".join(pamqp.frame.marshal(frame, 1) for frame in frames)
