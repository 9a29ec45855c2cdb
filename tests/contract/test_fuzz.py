"""Whatever comes in, the answer is a success or an error of the table, and never that the worker failed."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from schemas.method_errors import errors_of
from schemas.rpc import METHODS
from tests.bad_inputs import seed
from tests.rack import LocalRack
from worker.context import Context

Answer = Callable[[str, bytes], dict[str, Any]]

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
    | st.sampled_from(
        ["net", "gone", "1.0.0", "prod", "latest", "custom", "QUJD", "sha256:" + "0" * 64, "a.bin", "-size"]
    )
)
MEMBERS = ("path", "data", "size", "sha256", "number", "type", "version", "tags", "text", "createdAt", "min", "from")
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(MEMBERS) | st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)


@pytest.fixture
def answer(tmp_path: Path) -> Iterator[Answer]:
    """Answers one request on a rack that stays open over all examples of a test."""
    with asyncio.Runner() as runner:

        async def opened() -> LocalRack:
            rack = LocalRack(tmp_path).open()
            await seed(rack)
            return rack

        def run(work: Awaitable[Any]) -> Any:
            async def waited() -> Any:
                return await work

            return runner.run(waited())

        rack = run(opened())
        yield lambda method, body: run(rack.dispatcher.answer(method, body, Context()))
        run(rack.close())


def fuzzed(examples: int) -> settings:
    return settings(max_examples=examples, suppress_health_check=[HealthCheck.function_scoped_fixture])


def check(method: str, reply: dict[str, Any]) -> None:
    """The documents tell of each error of each method."""
    if reply["success"] is not True:
        assert reply["error"]["code"] in errors_of(method)
        assert reply["error"]["code"] != "ERR_INTERNAL"
    json.dumps(reply).encode()


def params_of(method: str) -> st.SearchStrategy[dict[str, Any]]:
    """Arbitrary values under the method's own names: all that are required, some of the others."""
    fields = METHODS[method].params.model_fields.values()
    names = {str(field.alias): field.is_required() for field in fields}
    model = {"modelId": st.just("net") | VALUES} if "modelId" in names else {}
    wait = {"waitMs": st.just(0) | VALUES} if "waitMs" in names else {}
    required = {name: VALUES for name, needed in names.items() if needed}
    optional = {name: VALUES for name, needed in names.items() if not needed and name != "waitMs"}
    return st.fixed_dictionaries(required | model | wait, optional=optional)


@pytest.mark.parametrize("method", METHODS)
def test_any_value_in_any_param_gets_an_answer_of_the_table(answer: Answer, method: str) -> None:
    @fuzzed(60)
    @given(params=params_of(method))
    def holds(params: dict[str, Any]) -> None:
        check(method, answer(method, json.dumps(params).encode()))

    holds()


@pytest.mark.parametrize("method", ["searchModels", "updateModelMetadata", "storeModel"])
def test_any_free_object_gets_an_answer_of_the_table(answer: Answer, method: str) -> None:
    """`metadata` and `criteria` take members of any name, so that arbitrary values reach the code behind the checks."""

    @fuzzed(150)
    @given(free=st.dictionaries(st.sampled_from(MEMBERS) | st.text(max_size=5), VALUES, max_size=5))
    def holds(free: dict[str, Any]) -> None:
        params = {
            "searchModels": {"criteria": free},
            "updateModelMetadata": {"modelId": "net", "metadata": free},
            "storeModel": {"modelId": "net", "metadata": {**free, "type": "custom"}, "modelData": "QUJD"},
        }
        check(method, answer(method, json.dumps(params[method]).encode()))

    holds()


@pytest.mark.parametrize("method", ["storeModel", "searchModels", "ping"])
def test_any_bytes_as_body_get_an_answer_of_the_table(answer: Answer, method: str) -> None:
    @fuzzed(150)
    @given(body=st.binary(max_size=200) | VALUES.map(lambda value: json.dumps(value).encode()))
    def holds(body: bytes) -> None:
        check(method, answer(method, body))

    holds()


def test_any_text_as_method_is_unknown(answer: Answer) -> None:
    @fuzzed(100)
    @given(method=st.text().filter(lambda name: name not in METHODS))
    def holds(method: str) -> None:
        assert answer(method, b"{}")["error"]["code"] == "ERR_UNKNOWN_METHOD"

    holds()


@pytest.mark.parametrize("method", ["listModels", "searchModels"])
def test_any_cursor_gets_an_answer_of_the_table(answer: Answer, method: str) -> None:
    @fuzzed(150)
    @given(cursor=st.text(st.characters(exclude_categories=["Cs"]), min_size=1) | st.from_regex(r"[A-Za-z0-9_-]{1,60}"))
    def holds(cursor: str) -> None:
        assert answer(method, json.dumps({"cursor": cursor}).encode())["error"]["code"] == "ERR_INVALID_REQUEST"

    holds()
