"""The formats that are known, the checks each has, and what their findings mean for a store.

A code that begins with `unsafe-` says that loading the file may run code, and turns into ERR_UNSAFE_MODEL; all other
errors turn into ERR_INVALID_MODEL_DATA.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from schemas.errors import ModelManagerError
from schemas.findings import Finding, Severity
from worker.validation.archives import DIRECTORY_BYTES_MAX, DirectoryTooLargeError
from worker.validation.pickles import is_text_name, pickle_within
from worker.validation.safetensors import check_safetensors
from worker.validation.sniffing import Content, sniff
from worker.validation.source import Hook, Source, read_ends

FILE_FINDINGS_MAX = 20
FINDINGS_MAX = 200
# A file takes a few seconds at the very most, and all of the largest models there are hardly more.
BUDGET_S = 30.0
UNSAFE = "unsafe-"

HOOKS: Mapping[str, Hook] = {
    "safetensors": check_safetensors,
}

_KNOWN = frozenset(
    {"safetensors", "gguf", "ggml", "hdf5", "numpy", "pickle", "joblib", "pmml", "custom"}
    | {"pytorch", "torchscript", "executorch", "tensorflow", "tflite", "keras", "jax", "flax", "mlx"}
    | {"onnx", "openvino", "coreml", "tensorrt", "paddle", "mxnet", "ncnn", "mnn", "caffe"}
    | {"sklearn", "xgboost", "lightgbm", "catboost"}
)

# Only these are sure to be recognised, so only these can be missed.
_CERTAIN = frozenset({"safetensors", "gguf", "hdf5"})

# What a file is by its name, and the contents that may bear it.
_CLAIMS: Mapping[str, tuple[str, ...]] = {
    ".safetensors": ("safetensors",),
    ".gguf": ("gguf",),
    ".onnx": ("onnx",),
    ".h5": ("hdf5",),
    ".hdf5": ("hdf5",),
    ".tflite": ("tflite",),
    ".npy": ("numpy",),
    ".npz": ("zip",),
    ".keras": ("zip", "hdf5"),
    ".zip": ("zip",),
}
# Under these names everybody expects data alone, whatever the policy on pickles.
_NEVER_PICKLE = frozenset({"safetensors", "gguf", "onnx", "hdf5", "tflite"})


def known_formats() -> frozenset[str]:
    """Every model type with a meaning of its own, and `custom` for a format of one's own, which is only sniffed."""
    return _KNOWN


def examine(
    model_type: str,
    files: Sequence[tuple[str, Source]],
    *,
    allow_pickle: bool,
    hooks: Mapping[str, Hook] = HOOKS,
    stopped: Callable[[], bool] = lambda: False,
    budget_s: float = BUDGET_S,
) -> list[Finding]:
    """What is to be said about the files of a version, errors first, at most 20 a file and 200 in all.

    The same bytes are looked into once for each suffix, and told of under the first such path. After `budget_s` seconds
    of a processor the rest is left out, which is an error; once `stopped`, nobody wants to know.

    Blocking: runs in a worker thread. It raises nothing but what a source raises as retryable: that says nothing about
    the model, so it must not end as a finding against it.
    """
    findings: list[Finding] = []
    answered = False
    seen: set[tuple[Source, str]] = set()
    began = time.thread_time()
    for path, source in files:
        look_alike = (source, PurePosixPath(path).suffix.lower())
        if look_alike in seen:
            continue
        seen.add(look_alike)
        if stopped():
            return []
        if time.thread_time() - began > budget_s:
            message = f"To look into the files takes more than {budget_s:g} seconds of a processor."
            return _bounded([*findings, Finding("error", "too-costly", message)], FINDINGS_MAX)
        claim = _claim(path, model_type, alone=len(files) == 1)
        look = _Look(path, model_type, claim, source, allow_pickle, hooks)
        found, content = look.findings()
        findings += _bounded(found, FILE_FINDINGS_MAX)
        answered = answered or model_type in (*claim, *(content.formats if content else ()))
    if model_type in _CERTAIN and not answered:
        findings.append(Finding("error", "format-absent", f"No file of this version is {model_type}."))
    return _bounded(findings, FINDINGS_MAX)


def refusal(findings: Iterable[Finding]) -> ModelManagerError | None:
    """The error that a store gets for its findings, with at most 20 of them in `details`; None if none is an error."""
    worst = _bounded(findings, FILE_FINDINGS_MAX)
    if not worst or worst[0].severity != "error":
        return None
    first = worst[0]
    code = "ERR_UNSAFE_MODEL" if first.code.startswith(UNSAFE) else "ERR_INVALID_MODEL_DATA"
    message = f"{first.path}: {first.message}" if first.path else first.message
    return ModelManagerError(code, message, findings=[each.as_dict() for each in worst])


def _claim(path: str, model_type: str, *, alone: bool) -> tuple[str, ...]:
    """The contents of which a file should have one, by its name or as the only file of its version; empty for any."""
    by_name = _CLAIMS.get(PurePosixPath(path).suffix.lower(), ())
    return by_name or ((model_type,) if alone and model_type in _CERTAIN else ())


def _bounded(findings: Iterable[Finding], limit: int) -> list[Finding]:
    """The `limit` worst findings, worst first, so that no bound hides what a store is refused for."""
    return sorted(findings, key=_rank)[:limit]


def _rank(finding: Finding) -> tuple[int, bool]:
    return ("error", "warning", "info").index(finding.severity), not finding.code.startswith(UNSAFE)


@dataclass(frozen=True, slots=True)
class _Look:
    """One file under examination."""

    path: str
    model_type: str
    claim: tuple[str, ...]
    source: Source
    allow_pickle: bool
    hooks: Mapping[str, Hook]

    def findings(self) -> tuple[list[Finding], Content | None]:
        """What there is to say, and what the file is; None where it could not be read."""
        content = None
        found: list[Finding] = []
        try:
            ends = read_ends(self.source)
            content = sniff(ends, self.source)
            reason = pickle_within(self.path, self.model_type, ends, content, self.source)
            if reason is not None:
                found.append(self._pickle(reason))
        except DirectoryTooLargeError:
            found.append(self._error("archive-too-large", f"has a directory of more than {DIRECTORY_BYTES_MAX} bytes"))
        except Exception as failure:  # noqa: BLE001 - a source may fail in any way, and none may end the worker
            found.append(self._failed(failure))
        if content is not None and not any(each.code == "unsafe-disguise" for each in found):
            found += self._checked(content)
            found += self._mismatch(content, found)
        return found, content

    def _checked(self, content: Content) -> list[Finding]:
        """What the hooks say: those of what the file is, or of what it should be where that is not known."""
        found: list[Finding] = []
        for name in content.formats or self.claim:
            if hook := self.hooks.get(name):
                try:
                    # This keeps what a hook has found before it fails.
                    found.extend(hook(self.path, self.source))
                except Exception as failure:  # noqa: BLE001 - as above, for a hook
                    found.append(self._failed(failure))
        return found

    def _mismatch(self, content: Content, found: Sequence[Finding]) -> list[Finding]:
        formats = content.formats
        if len(formats) > 1:
            return [self._error("content-mismatch", f"is {' and '.join(formats)} at once")]
        if not self.claim or set(self.claim) & set(formats):
            return []
        if formats:
            return [self._error("content-mismatch", f"should be {' or '.join(self.claim)} and is {formats[0]}")]
        # ONNX has no magic, and what a hook has reported tells more than that the content is unknown.
        if "onnx" in self.claim or any(each.severity == "error" for each in found):
            return []
        return [self._error("content-mismatch", f"should be {' or '.join(self.claim)} and is something else")]

    def _pickle(self, reason: str) -> Finding:
        if set(self.claim) & _NEVER_PICKLE or is_text_name(self.path):
            return self._error("unsafe-disguise", f"{reason}, under the name of something else")
        severity: Severity = "warning" if self.allow_pickle else "error"
        return Finding(severity, "unsafe-pickle", f"The file {reason}; loading it can run code.", self.path)

    def _error(self, code: str, clause: str) -> Finding:
        return Finding("error", code, f"The file {clause}.", self.path)

    def _failed(self, failure: Exception) -> Finding:
        if isinstance(failure, ModelManagerError) and failure.retryable:
            raise failure
        return self._error("hook-failed", f"could not be checked ({type(failure).__name__})")
