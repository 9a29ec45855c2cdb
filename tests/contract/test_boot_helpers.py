"""A boot on several processors: whatever the helpers do, it is the boot that it would be without them."""

from __future__ import annotations

import asyncio
import select
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks.records import store_record
from tests.registry_view import compact_here, view, view_after_boot
from worker.catalog import snapshot
from worker.catalog.extracts import Extract
from worker.journal import Help, JournalDamaged, helpers, portions
from worker.registry import CatalogReplay, Change, Registry

# As a helper says that it is there.
HELLO = "import sys; out = sys.stdout.buffer; out.write(bytes(4)); out.flush(); "
# `Made([], failed=True)`.
FAILED = rb"b'\0\0\0\3\x92\x90\xc3'".decode()


class Ready(helpers._Helper):
    """A helper that is waited for, so that a small journal is not over before it comes."""

    asks = 0

    def __init__(self, command: Any) -> None:
        super().__init__(command)
        output = select.poll()
        output.register(self.output, select.POLLIN)
        assert output.poll(30_000)

    def ask(self, number: int, chunk: Any) -> None:
        super().ask(number, chunk)
        Ready.asks += 1


async def filled(folder: Path) -> None:
    """A journal of three files, with records of many kinds between the `store` records."""
    registry = Registry(folder)
    registry.open()
    registry.start()
    for number in range(120):
        record: dict[str, Any] = {**store_record(number), "idem": {"key": f"caller\n{number}", "hash": "h"}}
        model, version = record["model"], record["version"]
        if number % 3 == 0:
            del record["idem"]
        if number // 4 % 5 == 4:
            record |= {"origin": "rack-2", "replicaOf": "rack-2"}
        await registry.transact(model, partial(Change, "store", record))
        after = {
            7: ("alias", {"alias": "best", "version": version, "previous": None}),
            8: ("delete", {"versions": [version], "whole": False, "replicas": [], "deleted": 1}),
            9: ("delete", {"versions": [version], "whole": False, "replicas": [], "deleted": 1, "until": 2}),
        }.get(number % 10)
        if after is not None:
            op, members = after
            await registry.transact(model, partial(Change, op, {"model": model, **members}))
        if number in (40, 80):
            await registry.journal.rotate()
    await registry.close()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    asyncio.run(filled(tmp_path / "registry"))
    monkeypatch.setattr(portions, "_CHUNK_BYTES", 1500)
    monkeypatch.setattr(helpers.os, "sched_getaffinity", lambda _: range(3))
    monkeypatch.setattr(Ready, "asks", 0)
    return tmp_path / "registry"


@pytest.fixture
def helped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(helpers, "HELPED_BYTES", 0)
    monkeypatch.setattr(helpers, "_Helper", Ready)


async def test_a_helped_boot_knows_what_one_without_help_knows(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = await view_after_boot(folder)
    assert len(alone["versions"]) > 20
    assert alone["copies"]["rack-2"]
    monkeypatch.setattr(helpers, "HELPED_BYTES", 0)
    monkeypatch.setattr(helpers, "_Helper", Ready)
    assert await view_after_boot(folder) == alone
    assert Ready.asks > 20


@pytest.mark.parametrize("index", ["gone", "of another program", "damaged"])
@pytest.mark.usefixtures("helped")
async def test_a_base_that_has_no_use_of_its_index_is_helped(
    folder: Path, index: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = Registry(folder)
    registry.open()
    registry.start()
    await compact_here(registry)
    await registry.close()
    alone = await view_after_boot(folder)
    (path,) = folder.glob("base-*.idx")
    if index == "gone":
        path.unlink()
    elif index == "damaged":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        monkeypatch.setattr(snapshot, "VERSION", snapshot.VERSION + 1)
    before = Ready.asks
    assert await view_after_boot(folder) == alone
    assert Ready.asks > before + 5


def test_what_is_no_line_is_not_read_chunk_by_chunk(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each would be read to its end."""
    active = max(folder.glob("seg-*.jsonl"))
    size = active.stat().st_size
    with active.open("ab") as file:
        file.write(bytes(200 * portions._CHUNK_BYTES))
    read = []
    extracted = helpers.extracted

    def noted(stream: Any, chunk: Any, *rest: Any) -> Any:
        read.append(chunk)
        return extracted(stream, chunk, *rest)

    monkeypatch.setattr(helpers, "extracted", noted)
    asyncio.run(view_after_boot(folder))
    assert [chunk for chunk in read if chunk.name == active.name and chunk.start > size] == []


async def test_a_small_boot_is_not_helped(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(helpers, "_Helper", Ready)
    await view_after_boot(folder)
    assert Ready.asks == 0


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(["/bin/false"], id="ends at once"),
        pytest.param(["/does/not/exist"], id="cannot be started"),
        pytest.param([sys.executable, "-c", HELLO + "sys.stdin.readline()"], id="ends when it is asked"),
        pytest.param([sys.executable, "-c", HELLO + "import time; time.sleep(60)"], id="hangs"),
        pytest.param([sys.executable, "-c", HELLO + "sys.stdin.close()"], id="cannot be asked"),
        pytest.param(
            [sys.executable, "-c", HELLO + "sys.stdin.readline(); out.write(b'\\0\\0\\0\\2no')"], id="answers rubbish"
        ),
        pytest.param(
            [sys.executable, "-c", HELLO + "sys.stdin.readline(); out.write(b'\\0\\0\\1\\0cut')"], id="is cut short"
        ),
        pytest.param(
            [
                *(sys.executable, "-c"),
                HELLO + "import time; sys.stdin.readline(); out.write(b'\\0\\0\\1\\0cut'); out.flush(); time.sleep(60)",
            ],
            id="hangs in an answer",
        ),
        pytest.param(
            [
                sys.executable,
                "-c",
                HELLO + "[(out.write(b'\\0\\0\\0\\3\\x92\\x90\\xc3'), out.flush()) for _ in sys.stdin]",
            ],
            id="fails each time",
        ),
    ],
)
@pytest.mark.usefixtures("helped")
async def test_what_a_helper_does_not_make_is_made_without_it(
    folder: Path, command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(helpers, "_PATIENCE_MS", 200)
    monkeypatch.setattr(CatalogReplay, "help", None)
    alone = await view_after_boot(folder)
    monkeypatch.setattr(CatalogReplay, "help", Help(command, Extract))
    assert await view_after_boot(folder) == alone


@pytest.mark.usefixtures("helped")
async def test_a_helper_that_is_killed_is_done_without(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killed = []

    class Killed(Ready):
        def ask(self, number: int, chunk: Any) -> None:
            super().ask(number, chunk)
            if number > 20 and not killed:
                self._process.kill()
                killed.append(number)

    monkeypatch.setattr(helpers, "_Helper", Killed)
    found = await view_after_boot(folder)
    monkeypatch.setattr(CatalogReplay, "help", None)
    assert killed
    assert await view_after_boot(folder) == found


@pytest.mark.usefixtures("helped")
async def test_with_helpers_a_line_that_does_not_check_is_found_where_it_is(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    active = max(folder.glob("seg-*.jsonl"))
    whole = active.read_bytes()
    lines = whole.splitlines(keepends=True)
    for number in (1, len(lines) // 2, len(lines) - 3):
        at = sum(map(len, lines[:number])) + 30
        refused = []
        for help_ in (CatalogReplay.help, None):
            active.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
            with monkeypatch.context() as patch, pytest.raises(JournalDamaged) as error:
                patch.setattr(CatalogReplay, "help", help_)
                Registry(folder).open()
            refused.append(str(error.value))
        assert refused[0] == refused[1]
        assert Ready.asks
    # A torn write is cut at the same place.
    kept = len(b"".join(lines[:-1]))
    for help_ in (CatalogReplay.help, None):
        active.write_bytes(whole[: kept + 9])
        monkeypatch.setattr(CatalogReplay, "help", help_)
        registry = Registry(folder)
        registry.open()
        assert view(registry)
        await registry.close()
        assert active.read_bytes()[:kept] == whole[:kept]


def test_a_helper_ends_with_the_process_that_it_helps(tmp_path: Path) -> None:
    assert CatalogReplay.help is not None
    helper = subprocess.Popen(
        [*CatalogReplay.help.command, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert helper.stdout is not None
    assert helper.stdout.read(4) == bytes(4)
    assert helper.communicate(timeout=30) == (b"", None)
    assert helper.returncode == 0
