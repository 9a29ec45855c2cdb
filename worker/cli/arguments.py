"""What people type, parsed: model references, `key=json`, and the type a file's name tells."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from schemas.errors import ModelManagerError
from schemas.wire import parse_value

# By the ending of a file's name; of several files the largest that has one decides.
_TYPES = {
    ".safetensors": "safetensors",
    ".gguf": "gguf",
    ".ggml": "ggml",
    ".onnx": "onnx",
    ".pt": "pytorch",
    ".pth": "pytorch",
    ".ckpt": "pytorch",
    ".pb": "tensorflow",
    ".tflite": "tflite",
    ".keras": "keras",
    ".h5": "hdf5",
    ".hdf5": "hdf5",
    ".npy": "numpy",
    ".npz": "numpy",
    ".msgpack": "flax",
    ".mlmodel": "coreml",
    ".engine": "tensorrt",
    ".pdmodel": "paddle",
    ".pmml": "pmml",
    ".joblib": "joblib",
    ".pkl": "pickle",
    ".pickle": "pickle",
    ".cbm": "catboost",
}


def reference_of(text: str) -> tuple[str, str | None]:
    """`MODEL[:VERSION]` as (model id, version or alias or None); ERR_INVALID_REQUEST says what is wrong with it."""
    from schemas.ids import check_model_id, check_version_ref, split_reference

    model_id, reference = split_reference(text)
    try:
        check_model_id(model_id)
    except ValueError as error:
        raise ModelManagerError("ERR_INVALID_REQUEST", f"The model id {model_id!r} {error}.") from None
    try:
        return model_id, None if reference is None else check_version_ref(reference)
    except ValueError as error:
        raise ModelManagerError("ERR_INVALID_REQUEST", f"The version {reference!r} {error}.") from None


def assignments(words: Sequence[str]) -> dict[str, Any]:
    """`key=json` words as an object. What is not JSON is text: `note=hello` needs no quotes.

    ERR_INVALID_REQUEST for what only some take for JSON, such as NaN: whether a number was meant is not to be guessed.
    """
    values: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not key or not equals:
            raise ModelManagerError("ERR_INVALID_REQUEST", f"{word!r} is not KEY=JSON.")
        try:
            values[key] = parse_value(text)
        except (ValueError, RecursionError) as error:
            if _may_be_json(text):
                raise ModelManagerError(
                    "ERR_INVALID_REQUEST", f"{key}: {error}.", hint=f"if it is text, put it in quotes: {key}='\"...\"'"
                ) from None
            values[key] = text
    return values


def _may_be_json(text: str) -> bool:
    """Whether a decoder that is less strict takes it."""
    try:
        json.loads(text)
    except json.JSONDecodeError:
        return False
    except (ValueError, RecursionError):
        return True
    return True


def json_value(value: Any) -> str:
    """A value of metadata as a person reads it: text as it is, all else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def criteria_of(
    *, model_type: str | None, tags: Sequence[str] | None, text: str | None, equals: Mapping[str, Any]
) -> dict[str, Any]:
    """The criteria of a search, from its options."""
    given = {"type": model_type, "tags": list(tags or ()) or None, "text": text}
    return {**equals, **{name: value for name, value in given.items() if value is not None}}


def guess_type(path: Path) -> str:
    """The model type that the name of the file tells, or that of the largest telling file below the folder."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    telling = [file for file in files if file.suffix.lower() in _TYPES]
    if not telling:
        raise ModelManagerError(
            "ERR_INVALID_REQUEST", "No file name tells the type of this model.", hint="name it with --type"
        )
    largest = max(telling, key=lambda file: file.stat().st_size)
    return _TYPES[largest.suffix.lower()]
