"""How a method and its parameters become an HTTP request, and an answer a reply or an error."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from schemas.errors import ERRORS, ModelManagerError
from schemas.routes import ROUTES
from schemas.rpc import METHODS
from worker.client.amqp_caller import AmqpCaller
from worker.client.caller import Caller, error_of
from worker.client.client import ModelManagerClient
from worker.client.http_caller import HttpCaller, route_for, with_version


@pytest.mark.parametrize(
    ("method", "params", "verb", "path"),
    [
        ("listModels", {"limit": 5}, "GET", "/api/models"),
        ("getModelMetadata", {"modelId": "m"}, "GET", "/api/models/{model}"),
        ("getModelMetadata", {"modelId": "m", "version": "1"}, "GET", "/api/models/{model}/versions/{version}"),
        ("deleteModel", {"modelId": "m", "purge": True}, "DELETE", "/api/models/{model}"),
        ("deleteModel", {"modelId": "m", "version": "1"}, "DELETE", "/api/models/{model}/versions/{version}"),
        ("getUpload", {"uploadId": "u"}, "GET", "/api/uploads/{upload}"),
        ("getUpload", {"uploadId": "u", "path": "p", "parts": []}, "POST", "/api/uploads/{upload}/parts"),
        ("setAlias", {"modelId": "m", "alias": "a", "version": "1"}, "PUT", "/api/models/{model}/aliases/{alias}"),
    ],
)
def test_the_route_carries_all_parameters(method: str, params: dict[str, Any], verb: str, path: str) -> None:
    route = route_for(method, params)
    assert (route.verb, route.path) == (verb, path)


def test_every_method_but_get_model_has_a_route() -> None:
    assert {route.method for route in ROUTES} == METHODS.keys() - {"getModel"}


@pytest.mark.parametrize(
    ("method", "version"), [("validateModel", "latest"), ("getModelMetadata", "latest"), ("deleteModel", None)]
)
def test_a_version_left_out_means_what_the_contract_says(method: str, version: str | None) -> None:
    assert with_version(method, {"modelId": "m"}).get("version") == version
    assert with_version(method, {"modelId": "m", "version": "1"})["version"] == "1"


def test_a_parameter_that_only_a_path_can_carry_must_be_there() -> None:
    with pytest.raises(ModelManagerError, match="alias"):
        route_for("setAlias", {"modelId": "m", "version": "1"})


@pytest.mark.parametrize(
    "url", ["", "127.0.0.1:8002", "ftp://host/", "http://", "http://h:99999", "http://[::1", "http://h\n"]
)
def test_an_address_that_is_not_http_is_refused(url: str) -> None:
    with pytest.raises(ModelManagerError, match="The address "):
        HttpCaller(url)


@pytest.mark.parametrize("caller", [HttpCaller("http://127.0.0.1:1"), AmqpCaller("amqp://127.0.0.1:1", "rack-1")])
async def test_what_would_not_arrive_as_it_is_is_refused_before_anything_is_sent(
    caller: Caller, tmp_path: Path
) -> None:
    async with ModelManagerClient(caller, timeout_s=1) as client:
        for value in (math.nan, math.inf, 10**26, "\ud800", {1}):
            with pytest.raises(ModelManagerError) as caught:
                await client.update_model_metadata("m", {"loss": value, "gone": None})
            assert caught.value.code == "ERR_INVALID_METADATA"
            with pytest.raises(ModelManagerError) as caught:
                await client.search_models({"loss": value})
            assert caught.value.code == "ERR_INVALID_REQUEST"
        with pytest.raises(ModelManagerError, match="ERR_INVALID_REQUEST"):
            await client.get_model_metadata("\ud800")
        with pytest.raises(ModelManagerError, match="ERR_INVALID_METADATA"):
            await client.push(tmp_path / "not looked at", "m", "1", metadata={"loss": math.nan})


@pytest.mark.parametrize("code", sorted(ERRORS))
def test_an_error_survives_the_way_from_worker_to_caller(code: str) -> None:
    sent = ModelManagerError(code, "why", place=1)
    sent.details["message"] = "details may have any names"
    received = error_of(sent.body())
    assert (received.code, received.message, received.details) == (code, "why", sent.details)
    assert received.retryable == sent.retryable


@pytest.mark.parametrize(
    "body", [{}, {"error": None}, {"error": {"code": 7}}, {"error": {"code": "ERR_OF_THE_FUTURE"}}]
)
def test_an_error_of_an_unknown_kind_is_internal(body: dict[str, Any]) -> None:
    assert error_of(body).code == "ERR_INTERNAL"
