"""What the fault suite counts: how often something was broken on purpose, and what became of it.

A pytest plugin (see conftest.py): tests take the fixture ``ledger`` and add to it; the table is printed at the end of
the run, and written as JSON to the path that ``--ledger`` names. ``--all-faults`` runs the whole suite (``make
test-faults``); without it the tests take a sample, which is part of ``make test``.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest


@dataclass
class Row:
    injected: int = 0
    survived: int = 0
    "came back to the same bits, or ended in a clean error where that is the promise"
    silently_wrong: int = 0
    "gave data that nobody had published, without a word"
    lost_bytes: int = 0
    "of what readers had been shown before"
    longest_seconds: float = 0.0
    "of a recovery"


class Ledger:
    """Counts by class of fault, for longvid and, under the same name, for plain zarr append."""

    def __init__(self) -> None:
        self.rows: dict[str, dict[str, Row]] = {}

    def add(
        self,
        fault: str,
        *,
        survived: bool,
        silently_wrong: bool = False,
        lost_bytes: int = 0,
        seconds: float = 0.0,
        who: str = "longvid",
    ) -> None:
        row = self.rows.setdefault(fault, {}).setdefault(who, Row())
        row.injected += 1
        row.survived += bool(survived)  # of numpy's they are not ready for JSON
        row.silently_wrong += bool(silently_wrong)
        row.lost_bytes += int(lost_bytes)
        row.longest_seconds = max(row.longest_seconds, seconds)

    def table(self) -> list[str]:
        head = ("fault", "who", "injected", "survived", "silently wrong", "bytes lost", "longest recovery")
        body = [
            (fault, who, row.injected, row.survived, row.silently_wrong, row.lost_bytes, f"{row.longest_seconds:.2f} s")
            for fault, kinds in self.rows.items()
            for who, row in kinds.items()
        ]
        return [f"{a:<34} {b:<12} {c:>9} {d:>9} {e:>15} {f:>11} {g:>17}" for a, b, c, d, e, f, g in (head, *body)]


_LEDGER = pytest.StashKey[Ledger]()


def pytest_addoption(parser):
    group = parser.getgroup("faults")
    group.addoption("--all-faults", action="store_true", help="every fault, not a sample")
    group.addoption("--ledger", metavar="FILE", help="write the table of faults as JSON")


def pytest_configure(config):
    config.stash[_LEDGER] = Ledger()


@pytest.fixture
def ledger(request) -> Ledger:
    return request.config.stash[_LEDGER]


@pytest.fixture
def all_faults(request) -> bool:
    """Whether to inject every fault, not a sample."""
    return request.config.getoption("--all-faults")


def pytest_terminal_summary(terminalreporter, config):
    ledger = config.stash[_LEDGER]
    if ledger.rows:
        terminalreporter.section("faults")
        for line in ledger.table():
            terminalreporter.write_line(line)
    if config.getoption("--ledger"):
        rows = {fault: {who: asdict(row) for who, row in kinds.items()} for fault, kinds in ledger.rows.items()}
        Path(config.getoption("--ledger")).write_text(json.dumps(rows, indent=2) + "\n")
