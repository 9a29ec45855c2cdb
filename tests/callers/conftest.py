"""The callers as programs. Where a language is missing its tests are skipped, and the reason is told."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from deploy.local import Unavailable
from tests.callers.programs import NoToolchain, go_program, node_program

IN_CI = os.environ.get("CI", "").lower() in ("1", "true", "yes")


@pytest.fixture(scope="session")
def node_caller(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("node")
    return [*_set_up(lambda: node_program("node", folder)), str(folder / "main.mjs")]


@pytest.fixture(scope="session")
def go_caller() -> list[str]:
    return _set_up(lambda: go_program("go"))


@pytest.fixture(scope="session")
def asyncapi_parser(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The command that reads an AsyncAPI document with the parser of the standard."""
    folder: Path = tmp_path_factory.mktemp("asyncapi")
    return [*_set_up(lambda: node_program("asyncapi", folder)), str(folder / "validate.mjs")]


def _set_up(get: Callable[[], list[str]]) -> list[str]:
    try:
        return get()
    except Unavailable as error:
        if IN_CI and not isinstance(error, NoToolchain):
            pytest.fail(str(error), pytrace=False)
        pytest.skip(f"callers: {error}")
