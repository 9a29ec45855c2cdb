"""wrk-model-manager: a rack-aware worker that owns an AI-model catalog."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("wrk-model-manager")
except PackageNotFoundError:  # run from a checkout that was not installed
    __version__ = "0.0.0"
