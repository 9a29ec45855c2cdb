"""The AMQP 0-9-1 frames of the way of a request: deliveries, confirms and returns in, replies and settlements out.

Everything else (the handshake, declarations, hints, dead letters) is left to pamqp. A frame is its type (1 byte), its
channel (2), the length of its payload (4), the payload and 0xCE. A content is a method frame, a header frame with the
size of the body and the properties, and body frames until that size is reached.

Decoding judges the framing strictly and the properties leniently (see `amqp_decoding`): what breaks the framing is a
`BadFrameError`, after which a connection can only be closed; properties that cannot be read are the message's fault.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

from aiormq.exceptions import AMQPError
from pamqp import decode, encode
from pamqp.commands import Basic

from worker.transport.amqp_decoding import UnreadableTable

METHOD, HEADER, BODY, HEARTBEAT = 1, 2, 3, 8
HEARTBEAT_FRAME = b"\x08\x00\x00\x00\x00\x00\x00\xce"
FRAME_OVERHEAD = 8
# The largest message that RabbitMQ takes; a frame is no larger, even where the broker has no frame_max.
MAX_FRAME_BYTES = 128 * 1024 * 1024

DELIVER, RETURN = b"\x00\x3c\x00\x3c", b"\x00\x3c\x00\x32"
CHANNEL_CLOSE, CHANNEL_CLOSE_OK = b"\x00\x14\x00\x28", b"\x00\x14\x00\x29"
ACK, NACK = b"\x00\x3c\x00\x50", b"\x00\x3c\x00\x78"

_FRAME_HEAD = struct.Struct(">BHI")
_DELIVERY = struct.Struct(">QB")
_SETTLEMENT = struct.Struct(">BHI4sQBB")
_PROPERTIES = tuple((Basic.Properties.flags[name], name) for name in Basic.Properties.attributes())
_DECODERS = {name: Basic.Properties.amqp_type(name) for _, name in _PROPERTIES}

# Of a reply: type and content encoding never change, so the flags are one of four words.
_REPLY_HEAD = struct.Struct(">HHQH")
_CONTENT_TYPE = b"\x10application/json"
_TRANSIENT = b"\x01"
_REPLY_FLAGS = 0x8000 | 0x1000 | 0x0080  # content_type, delivery_mode, message_id
_HEADERS_FLAG, _CORRELATION_FLAG = 0x2000, 0x0400


class BadFrameError(AMQPError):
    """The bytes are not what AMQP 0-9-1 allows here; the message says why."""


@dataclass(frozen=True, slots=True)
class Deliver:
    """The method frame of a delivery."""

    consumer_tag: str
    delivery_tag: int
    redelivered: bool
    exchange: str
    routing_key: str


class FrameSplitter:
    """Cuts a stream of bytes into frames, however they arrive."""

    def __init__(self) -> None:
        self._rest = bytearray()
        self._needed = 0

    def feed(self, data: bytes) -> list[tuple[int, int, bytes]]:
        """Type, channel and payload of each frame that `data` completes. BadFrameError: there is no way on."""
        if self._rest:
            self._rest += data
            if len(self._rest) < self._needed:
                return []
            data = bytes(self._rest)
            self._rest.clear()
        frames = []
        at, size = 0, len(data)
        self._needed = _FRAME_HEAD.size
        while size - at >= _FRAME_HEAD.size:
            kind, channel, length = _FRAME_HEAD.unpack_from(data, at)
            if kind > HEARTBEAT or length > MAX_FRAME_BYTES:
                raise BadFrameError(f"a frame of type {kind} and {length} bytes")
            end = at + 7 + length
            if end >= size:
                self._needed = length + FRAME_OVERHEAD
                break
            if data[end] != 0xCE:
                raise BadFrameError("a frame without its end")
            frames.append((kind, channel, data[at + 7 : end]))
            at = end + 1
        if at < size:
            self._rest += data[at:]
        return frames


def frame(kind: int, channel: int, payload: bytes) -> bytes:
    """One whole frame."""
    return b"%b%b\xce" % (_FRAME_HEAD.pack(kind, channel, len(payload)), payload)


# --- in ---


def decode_deliver(payload: bytes) -> Deliver:
    """The payload of a basic.deliver, with its four bytes of class and method."""
    try:
        tag_end = 5 + payload[4]
        delivery_tag, redelivered = _DELIVERY.unpack_from(payload, tag_end)
        exchange_end = tag_end + 10 + payload[tag_end + 9]
        key_end = exchange_end + 1 + payload[exchange_end]
        if key_end != len(payload):
            raise BadFrameError("a basic.deliver of a wrong length")
        return Deliver(
            payload[5:tag_end].decode("utf-8", "surrogateescape"),
            delivery_tag,
            bool(redelivered & 1),
            payload[tag_end + 10 : exchange_end].decode("utf-8", "surrogateescape"),
            payload[exchange_end + 1 : key_end].decode("utf-8", "surrogateescape"),
        )
    except (IndexError, struct.error):
        raise BadFrameError("a basic.deliver that is cut off") from None


def decode_confirm(payload: bytes) -> tuple[int, bool]:
    """The tag of a basic.ack or basic.nack, and whether it is for all up to it."""
    if len(payload) != 13:
        raise BadFrameError("a confirm of a wrong length")
    return int.from_bytes(payload[4:12], "big"), bool(payload[12] & 1)


def decode_header(payload: bytes) -> tuple[int, Basic.Properties]:
    """The size of the body and the properties; an `UnreadableTable` as headers marks properties nobody can read."""
    if len(payload) < 14 or payload[:2] != b"\x00\x3c":
        raise BadFrameError("a content header that is cut off, or of another class")
    properties = Basic.Properties()
    try:
        _read_properties(payload, properties)
    except (ValueError, IndexError, struct.error):
        properties.headers = UnreadableTable()
    return int.from_bytes(payload[4:12], "big"), properties


def _read_properties(payload: bytes, properties: Basic.Properties) -> None:
    flags = int.from_bytes(payload[12:14], "big")
    if flags & 1:
        raise ValueError("there are no properties beyond the fifteenth")
    at = 14
    for flag, name in _PROPERTIES:
        if not flags & flag:
            continue
        kind = _DECODERS[name]
        if kind == "shortstr":
            end = at + 1 + payload[at]
            if end > len(payload):
                raise ValueError("a short string beyond the end")
            setattr(properties, name, payload[at + 1 : end].decode("utf-8", "surrogateescape"))
            at = end
        else:
            consumed, value = decode.METHODS[kind](payload[at:])
            setattr(properties, name, value)
            at += consumed


# --- out ---


def encode_ack(channel: int, delivery_tag: int, *, multiple: bool = False) -> bytes:
    return _SETTLEMENT.pack(METHOD, channel, 13, ACK, delivery_tag, multiple, 0xCE)


def encode_nack(channel: int, delivery_tag: int, *, requeue: bool) -> bytes:
    return _SETTLEMENT.pack(METHOD, channel, 13, NACK, delivery_tag, 2 * requeue, 0xCE)


def encode_reply(
    channel: int,
    routing_key: str,
    body: bytes,
    *,
    message_id: str,
    correlation_id: str,
    headers: dict[str, Any] | None,
    mandatory: bool,
    frame_max: int,
) -> bytes:
    """The frames of a transient JSON message to the queue `routing_key`; `frame_max` bounds a frame, 0 does not."""
    key = _short_string(routing_key)
    flags = _REPLY_FLAGS
    table = correlation = b""
    if headers:
        flags |= _HEADERS_FLAG
        table = encode.field_table(headers)
    if correlation_id:
        flags |= _CORRELATION_FLAG
        correlation = _short_string(correlation_id)
    parts = (
        b"\x00\x3c\x00\x28\x00\x00\x00" + key + (b"\x01" if mandatory else b"\x00"),
        _REPLY_HEAD.pack(60, 0, len(body), flags)
        + b"%b%b%b%b%b" % (_CONTENT_TYPE, table, _TRANSIENT, correlation, _short_string(message_id)),
    )
    frames = [frame(METHOD, channel, parts[0]), frame(HEADER, channel, parts[1])]
    most = frame_max - FRAME_OVERHEAD if frame_max else len(body)
    frames += [frame(BODY, channel, body[at : at + most]) for at in range(0, len(body), most or 1)]
    return b"".join(frames)


def _short_string(text: str) -> bytes:
    encoded = text.encode("utf-8", "surrogateescape")
    if len(encoded) > 255:
        raise ValueError("a short string holds at most 255 bytes")
    return b"%c%b" % (len(encoded), encoded)
