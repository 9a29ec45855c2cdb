"""The AsyncAPI 3.1 document of the worker on RabbitMQ: an operation for each method with its errors, and the hints.

It is written from the worker's side: requests are received, hints are sent. The standard has no place for AMQP
properties, so they are the headers with names in camelCase (`replyTo` is the property `reply_to`).
"""

from __future__ import annotations

from typing import Any

from schemas.examples import examples_of
from schemas.hints import CONTENT_TYPE, HINT_TYPES, Hint
from schemas.ids import MAX_INTEGER, RACK_PATTERN
from schemas.journal_examples import HINT_EXAMPLES
from schemas.json_schemas import CONTRACT, Components, ErrorBody, Schema, json_schema, reply_schema
from schemas.method_errors import errors_of
from schemas.rpc import METHODS, Method

RPC_EXCHANGE = "model-manager.rpc"
HINTS_EXCHANGE = "model-manager.hints"
BINDING_VERSION = "0.3.0"

_TEXT = {"type": "string"}
_CORRELATION = "The caller's own; the reply has the same."


def asyncapi_document() -> Schema:
    """The whole document."""
    components = Components()
    components.add("ErrorBody", json_schema(ErrorBody))
    messages = {"hint": _hint(components)}
    channels: Schema = {"hints": _hints_channel()}
    operations: Schema = {"sendHint": _hint_operation()}
    for method in METHODS.values():
        messages[f"{method.name}Request"] = _request(method, components)
        messages[f"{method.name}Reply"] = _reply(method, components)
        messages[f"{method.name}Error"] = _error(method)
        channels[method.name] = _request_channel(method)
        operations[method.name] = _operation(method)
    channels["replies"] = _replies_channel()
    return {
        "asyncapi": "3.1.0",
        "id": f"urn:model-manager:asyncapi:{CONTRACT}",
        "info": {
            "title": "Model manager",
            "version": CONTRACT,
            "description": "The AI-model catalog of one rack, over RabbitMQ.",
            "license": {"name": "Apache 2.0", "url": "https://www.apache.org/licenses/LICENSE-2.0"},
        },
        "defaultContentType": "application/json",
        "servers": {
            "broker": {
                "host": "127.0.0.1:5672",
                "protocol": "amqp",
                "protocolVersion": "0.9.1",
                "description": "RabbitMQ, shared by all racks.",
                "security": [{"$ref": "#/components/securitySchemes/user"}],
            }
        },
        "channels": channels,
        "operations": operations,
        "components": {
            "correlationIds": {"request": {"location": "$message.header#/correlationId", "description": _CORRELATION}},
            "messages": messages,
            "schemas": _as_draft_07(
                {**components.schemas, "RequestHeaders": _REQUEST_HEADERS, "ReplyHeaders": _REPLY_HEADERS}
            ),
            "securitySchemes": {"user": {"type": "userPassword", "description": "A user of the broker."}},
        },
    }


def _reference(section: str, *parts: str) -> Schema:
    return {"$ref": "/".join(("#", section, *parts))}


def _as_draft_07(value: Any) -> Any:
    """The standard's own schema language is a superset of draft 07, which has another word for one keyword."""
    if isinstance(value, dict):
        return {
            "dependencies" if key == "dependentRequired" else key: _as_draft_07(member) for key, member in value.items()
        }
    return [_as_draft_07(member) for member in value] if isinstance(value, list) else value


# --- headers ---------------------------------------------------------------------------------------------------------

_REQUEST_HEADERS: Schema = {
    "type": "object",
    "properties": {
        "replyTo": {
            **_TEXT,
            "pattern": r"^(amq\.rabbitmq\.reply-to(\..+)?|amq\.gen-.+|model-manager\.reply\..+)$",
            "description": "The queue for the reply; without one the request is executed and not answered.",
        },
        "correlationId": {**_TEXT, "description": _CORRELATION},
        "messageId": {**_TEXT, "description": "The idempotency key, unless `x-idempotency-key` is there."},
        "contentEncoding": {"not": {}, "description": "Refused."},
        "contentType": {"const": "application/json"},
        "expiration": {**_TEXT, "pattern": r"^\d+$", "description": "Milliseconds until the broker drops the request."},
        "userId": {**_TEXT, "description": "The broker's user, whom the broker checks; idempotency keys are his own."},
        "type": {**_TEXT, "description": "The method, for a message that was put on the queue by its name."},
        "x-deadline": {
            "type": "integer",
            "minimum": 0,
            "maximum": MAX_INTEGER,
            "description": "Unix milliseconds after which the caller does not wait any more.",
        },
        "x-idempotency-key": {
            **_TEXT,
            "minLength": 1,
            "description": "Names the request among its caller's: a repeat gets the same answer and changes nothing.",
        },
        "traceparent": {**_TEXT, "description": "W3C Trace Context; the reply has the same."},
    },
}
_REPLY_HEADERS: Schema = {
    "type": "object",
    "properties": {
        "correlationId": {**_TEXT, "description": "That of the request, byte for byte."},
        "contentType": {"const": "application/json"},
        "traceparent": {**_TEXT, "description": "That of the request, if it had one."},
    },
}


# --- messages --------------------------------------------------------------------------------------------------------


def _message(name: str, payload: Schema, headers: str, examples: list[Schema]) -> Schema:
    return {
        "name": name,
        "contentType": "application/json",
        "headers": _reference("components", "schemas", headers),
        "payload": payload,
        "correlationId": _reference("components", "correlationIds", "request"),
        **({"examples": examples} if examples else {}),
    }


def _request(method: Method, components: Components) -> Schema:
    payload = components.add(f"{method.name}Params", json_schema(method.params))
    examples = [{"name": example.title, "payload": example.params} for example in examples_of(method.name)]
    message = _message(method.name, payload, "RequestHeaders", examples)
    message["bindings"] = {"amqp": {"messageType": method.name, "bindingVersion": BINDING_VERSION}}
    return {**message, "title": f"{method.name}: request", "summary": method.summary}


def _reply(method: Method, components: Components) -> Schema:
    payload = components.add(f"{method.name}Reply", reply_schema(method))
    examples = [{"name": example.title, "payload": example.reply} for example in examples_of(method.name)]
    return {**_message(f"{method.name}.reply", payload, "ReplyHeaders", examples), "title": f"{method.name}: reply"}


def _error(method: Method) -> Schema:
    one_of = {"properties": {"error": {"properties": {"code": {"enum": list(errors_of(method.name))}}}}}
    payload = {"allOf": [_reference("components", "schemas", "ErrorBody"), one_of]}
    message = _message(f"{method.name}.error", payload, "ReplyHeaders", [])
    return {**message, "title": f"{method.name}: error", "summary": "To be tried again if `retryable`."}


def _hint(components: Components) -> Schema:
    return {
        "name": "hint",
        "title": "Something has changed",
        "summary": "A CloudEvent, which may be lost: ask `getChanges` when `rackseq` is beyond the cursor.",
        "contentType": CONTENT_TYPE,
        "payload": components.add("Hint", json_schema(Hint)),
        "examples": [{"name": hint["id"], "summary": hint["type"], "payload": hint} for hint in HINT_EXAMPLES],
    }


# --- channels --------------------------------------------------------------------------------------------------------


def _exchange(name: str, kind: str) -> Schema:
    exchange = {"name": name, "type": kind, "durable": True, "autoDelete": False, "vhost": "/"}
    return {"amqp": {"is": "routingKey", "exchange": exchange, "bindingVersion": BINDING_VERSION}}


def _request_channel(method: Method) -> Schema:
    return {
        "address": f"{{rack}}.{method.name}",
        "description": f"The routing key on the topic exchange `{RPC_EXCHANGE}`, to the queue `model-manager-<rack>`.",
        "parameters": {"rack": {"description": f"The rack that is asked: `{RACK_PATTERN}`.", "examples": ["rack-1"]}},
        "messages": {"request": _reference("components", "messages", f"{method.name}Request")},
        "bindings": _exchange(RPC_EXCHANGE, "topic"),
    }


def _replies_channel() -> Schema:
    messages = {
        f"{name}{part}": _reference("components", "messages", f"{name}{part}")
        for name in METHODS
        for part in ("Reply", "Error")
    }
    return {
        "address": None,
        "description": "The caller's own queue, by the default exchange.",
        "messages": messages,
    }


def _hints_channel() -> Schema:
    return {
        "address": "",
        "description": f"The fanout exchange `{HINTS_EXCHANGE}`; a listener binds a queue of its own to it.",
        "messages": {"hint": _reference("components", "messages", "hint")},
        "bindings": _exchange(HINTS_EXCHANGE, "fanout"),
    }


# --- operations ------------------------------------------------------------------------------------------------------


def _operation(method: Method) -> Schema:
    return {
        "action": "receive",
        "summary": method.summary,
        "channel": _reference("channels", method.name),
        "messages": [_reference("channels", method.name, "messages", "request")],
        "bindings": {"amqp": {"ack": True, "bindingVersion": BINDING_VERSION}},
        "reply": {
            "address": {"location": "$message.header#/replyTo", "description": "The property `reply_to`."},
            "channel": _reference("channels", "replies"),
            "messages": [
                _reference("channels", "replies", "messages", f"{method.name}Reply"),
                _reference("channels", "replies", "messages", f"{method.name}Error"),
            ],
        },
    }


def _hint_operation() -> Schema:
    return {
        "action": "send",
        "summary": f"Tell of a change ({len(HINT_TYPES)} kinds), or each minute how far the journal is.",
        "channel": _reference("channels", "hints"),
        "messages": [_reference("channels", "hints", "messages", "hint")],
        "bindings": {"amqp": {"mandatory": False, "bindingVersion": BINDING_VERSION}},
    }
