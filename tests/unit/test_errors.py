"""The error that every layer raises."""

from __future__ import annotations

import asyncio
import pickle
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest

from schemas.errors import ModelManagerError
from worker.client.caller import Unreachable
from worker.client.transfer import TransferError
from worker.transport.http_replies import HttpFault

ERRORS = [
    ModelManagerError("ERR_CONFLICT"),
    ModelManagerError("ERR_CONFLICT", "It is at revision 3.", revision=3, code="its own"),
    HttpFault(416, "No such range.", headers={"Content-Range": "bytes */1"}, size=1),
    Unreachable("Nobody is there.", passing=True),
    TransferError("ERR_CHECKSUM_MISMATCH", "A part is wrong.", again=True, part=7),
]


def failing(error: ModelManagerError) -> None:
    raise error


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_an_error_is_the_same_after_it_was_pickled(error: ModelManagerError) -> None:
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert (str(again), again.args, vars(again)) == (str(error), error.args, vars(error))
    assert again.body() == error.body()


async def test_an_error_of_another_process_is_raised_here() -> None:
    error = TransferError("ERR_CHECKSUM_MISMATCH", "A part is wrong.", again=True, part=7)
    with (
        ProcessPoolExecutor(1, mp_context=get_context("spawn")) as processes,
        pytest.raises(TransferError, match="A part is wrong") as raised,
    ):
        await asyncio.get_running_loop().run_in_executor(processes, failing, error)
    assert (raised.value.details, raised.value.again) == ({"part": 7}, True)
