"""What every fault is tried on: few symbols, a small champion and its successor, many small batches."""

from typing import Any

from schemas.codecs import BarColumns
from tests.workers.builders import MINUTE_MS, make_bars, make_bundle, rows_of
from tests.workers.faults.replicas import Replicas
from tests.workers.streams import (
    WARM_AT,
    Change,
    assert_exactly_once,
    compared,
    wait_until_done,
)
from workers.config import Settings

SYMBOLS = ["S0", "S1", "S2", "S4", "S5", "S7"]
"""Their keys go to all four partitions; of six, S1 and S5 to a new one, S4 and S7 to another old one."""
LIVE = 160
"""Bars of each symbol that are predicted from."""
SWAP_TS = MINUTE_MS * (WARM_AT + 80)
BARS_OF_ALL = make_bars(SYMBOLS, WARM_AT + LIVE)
CHAMPION, NEXT = make_bundle(seed=1), make_bundle(seed=2)
ALONE: list[Change] = [("champion", CHAMPION.version, 0)]
SWAPPED: list[Change] = [*ALONE, ("champion", NEXT.version, SWAP_TS)]


def with_section(settings: Settings, section: str, **changes: Any) -> Settings:
    changed = getattr(settings, section).model_copy(update=changes)
    return settings.model_copy(update={section: changed})


def for_faults(settings: Settings) -> Settings:
    """Many small batches, snapshots all the time, and nobody is waited for long."""
    settings = with_section(settings, "inference", snapshot_every_s=0.05, max_batch=100)
    settings = with_section(settings, "http", host="127.0.0.1")
    return with_section(settings, "kafka", session_timeout_ms=6_000, transaction_timeout_ms=5_000)


def bars(first: int, last: int) -> BarColumns:
    return rows_of(BARS_OF_ALL, slice(first * len(SYMBOLS), last * len(SYMBOLS)))


def drained(replicas: Replicas) -> None:
    """Everything is committed; replicas that gave up meanwhile are started again, as they should be."""
    wait_until_done(replicas.settings, replicas.revive)


def assert_as_undisturbed(replicas: Replicas, changes: list[Change] = ALONE) -> None:
    drained(replicas)
    assert set(replicas.stop().values()) == {0}
    assert_exactly_once(compared(replicas.settings, [CHAMPION, NEXT], changes))
