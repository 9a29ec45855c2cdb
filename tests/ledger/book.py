"""The ledger: what each caller asked for and what came of it, and whether the rack's journal and catalog say the same.

An effect is found in the journal by the idempotency key of its request, which our own client sends, or else by a mark
in its content, which no two requests share.
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from worker.journal import Entry

EFFECTS = ("store", "update", "alias", "delete", "restore")


@dataclass(slots=True)
class Asked:
    """One request. `effect`: it should leave one line in the journal, found by `trace`.

    `outcome` is `ok`, an error's code, or `lost` for a plain caller whose connection went; more than one is a broken
    promise. `open`: nobody can know whether it took effect.
    """

    caller: str
    method: str
    trace: str
    effect: bool
    begun: float
    ended: float = 0.0
    outcome: str = ""
    open: bool = False
    reply: dict[str, Any] = field(default_factory=dict)


def key_trace(user: str, key: str) -> str:
    """Where the journal names a request of this user that had this idempotency key."""
    return hashlib.sha256(f"{user}\0{key}".encode()).hexdigest()[:32]


def content_trace(op: str, record: dict[str, Any]) -> str:
    """What only one request can have caused."""
    match op:
        case "store":
            return f"store {record['model']} {record['version']}"
        case "update":
            return f"update {record['metadata'].get('mark')}"
        case _:
            return f"{op} {record['model']} {record.get('alias')}"


class Ledger:
    """Written by the callers while they run; judged at the end."""

    def __init__(self) -> None:
        self.requests: list[Asked] = []
        self.broken: list[str] = []
        self.finished = 0
        self.successes: list[float] = []

    def ask(self, caller: str, method: str, trace: str, *, effect: bool) -> Asked:
        asked = Asked(caller, method, trace, effect, time.monotonic())
        self.requests.append(asked)
        return asked

    def settle(self, asked: Asked, outcome: str, *, open_: bool = False, reply: dict[str, Any] | None = None) -> None:
        """The final outcome of a request."""
        if asked.outcome:
            self.broken.append(f"{asked.method} of {asked.caller} ended twice: {asked.outcome}, then {outcome}")
        asked.outcome, asked.open, asked.ended = outcome, open_, time.monotonic()
        asked.reply = reply or {}
        self.finished += 1
        if outcome == "ok":
            self.successes.append(asked.ended)

    def outcomes(self) -> Counter[str]:
        return Counter(asked.outcome for asked in self.requests)

    def longest_gap(self, begun: float, ended: float) -> float:
        """The longest time without a success between two moments, in seconds."""
        moments = [begun, *(moment for moment in self.successes if begun < moment < ended), ended]
        return max(after - before for before, after in pairwise(moments))

    # --- the judgement ---

    def check(self, journal: Iterable[Entry], catalog: dict[tuple[str, str], dict[str, Any]]) -> Counter[str]:
        """Compare all three; what is wrong goes to `broken`. The effects by how they were answered."""
        entries = [entry for entry in journal if entry.op in EFFECTS]
        lines = self._lines(entries)
        counts = self._check_requests(lines)
        self._say(lines.keys() - {asked.trace for asked in self.requests}, "an effect is there that nobody asked for")
        folded = fold(entries, self.broken)
        self._say(folded.keys() ^ catalog.keys(), "journal and catalog have not the same versions")
        differing = [key for key in folded.keys() & catalog.keys() if folded[key] != catalog[key]]
        self._say(differing, "a version is not as the journal has it")
        return counts

    def _lines(self, entries: list[Entry]) -> dict[str, list[Entry]]:
        asked = {request.trace for request in self.requests}
        lines: dict[str, list[Entry]] = defaultdict(list)
        for entry in entries:
            key = entry.record.get("idem", {}).get("key", "")
            lines[key if key in asked else content_trace(entry.op, entry.record)].append(entry)
        return lines

    def _check_requests(self, lines: dict[str, list[Entry]]) -> Counter[str]:
        counts: Counter[str] = Counter()
        for asked in self.requests:
            if not asked.outcome:
                self.broken.append(f"{asked.method} of {asked.caller} has no outcome")
            found = lines.get(asked.trace, [])
            if len(found) > 1:
                self.broken.append(f"{asked.method} of {asked.caller} happened {len(found)} times")
            if not asked.effect:
                continue
            there = "there" if found else "not there"
            kind = "acknowledged" if asked.outcome == "ok" else "open" if asked.open else "refused"
            counts[f"{kind}, {there}"] += 1
            if kind == "acknowledged" and not found:
                self.broken.append(f"{asked.method} of {asked.caller} was acknowledged and is lost")
            if kind == "refused" and found:
                self.broken.append(f"{asked.method} of {asked.caller} was refused ({asked.outcome}) and is there")
            if kind == "acknowledged" and found:
                self._check_reply(asked, found[0])
        return counts

    def _check_reply(self, asked: Asked, entry: Entry) -> None:
        """The acknowledgement says what the record says."""
        record, reply = entry.record, asked.reply
        wrong = [
            name for name in ("revision", "previous", "versions") if name in record and record[name] != reply[name]
        ]
        if record["model"] != reply["modelId"] or wrong:
            self.broken.append(f"{asked.method} of {asked.caller} was acknowledged with another's answer: {wrong}")

    def _say(self, items: Iterable[object], what: str) -> None:
        listed = sorted(map(str, items))
        if listed:
            self.broken.append(f"{what}: {len(listed)}, {listed[0]} among them")


def fold(entries: list[Entry], broken: list[str]) -> dict[tuple[str, str], dict[str, Any]]:
    """What the catalog must show, from the journal's lines alone: each version that is not deleted.

    A line that does not follow from those before it, such as a revision that is no step, is `broken`.
    """
    versions: dict[tuple[str, str], dict[str, Any]] = {}
    deleted: set[tuple[str, str]] = set()
    aliases: dict[tuple[str, str], str | None] = {}
    take: dict[str, Callable[[dict[str, Any]], None]] = {}

    def store(record: dict[str, Any]) -> None:
        key = record["model"], record["version"]
        if key in versions:
            broken.append(f"{key} was stored twice")
        versions[key] = {"mark": record["metadata"].get("mark"), "revision": 1}

    def update(record: dict[str, Any]) -> None:
        key = record["model"], record["version"]
        if record["revision"] != versions[key]["revision"] + 1:
            broken.append(f"{key} went from revision {versions[key]['revision']} to {record['revision']}")
        versions[key] = {"mark": record["metadata"].get("mark"), "revision": record["revision"]}

    def alias(record: dict[str, Any]) -> None:
        key = record["model"], record["alias"]
        if aliases.get(key) != record["previous"]:
            broken.append(f"alias {key} was {aliases.get(key)} and not {record['previous']}")
        aliases[key] = record["version"]

    def delete(record: dict[str, Any]) -> None:
        deleted.update((record["model"], version) for version in record["versions"])

    def restore(record: dict[str, Any]) -> None:
        deleted.difference_update((record["model"], version) for version in record["versions"])

    take |= {"store": store, "update": update, "alias": alias, "delete": delete, "restore": restore}
    for entry in entries:
        take[entry.op](entry.record)
    shown: dict[tuple[str, str], dict[str, Any]] = {}
    for key, state in versions.items():
        if key not in deleted:
            names = sorted(name for (model, name), version in aliases.items() if (model, version) == key)
            shown[key] = {**state, "aliases": names}
    return shown
