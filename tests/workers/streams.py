"""Bars onto the topics of a real Kafka, and what came out of them against an undisturbed run."""

import time
from collections.abc import Callable, Sequence
from contextlib import closing

from models.bundle import Bundle
from models.features import WARM_UP_BARS
from schemas.codecs import BarColumns, encode, encode_bars
from schemas.messages import Share, Slot
from schemas.topics import BARS, LIFECYCLE
from tests.workers.builders import WARM_UP
from workers import lifecycle
from workers.bundles import store_bundle
from workers.config import Settings
from workers.kafka import GroupLag, group_offsets, make_publisher
from workers.proof import Comparison, compare, read_bars, read_predictions, undisturbed
from workers.schedule import Schedule

PATIENCE_S = 240.0
READABLE_WITHIN_S = 15.0
WARM_AT = WARM_UP_BARS + WARM_UP - 1
"""The first bar of a symbol, counted from 0, that the bundles of `builders` forecast from."""

Change = tuple[Slot, str | None, int] | tuple[Slot, str | None, int, Share]
"""A slot, the bundle that has it, the bar time from which on, and an arm's share."""


def appoint(
    settings: Settings,
    slot: Slot,
    bundle: Bundle | None,
    effective_ts: int,
    share: Share | None = None,
) -> None:
    if bundle is None:
        record = lifecycle.clear(slot, effective_ts=effective_ts, reason="test", actor="test")
    else:
        uri = store_bundle(settings, bundle)
        record = lifecycle.fill(
            slot,
            bundle,
            uri,
            effective_ts=effective_ts,
            reason="test",
            actor="test",
            share=share,
        )
    with make_publisher(settings, "test") as publisher:
        publisher.produce(LIFECYCLE, slot.encode(), encode(record))


def send(settings: Settings, bars: BarColumns) -> None:
    with make_publisher(settings, "test") as publisher:
        for symbol, value in zip(bars.symbols, encode_bars(bars), strict=True):
            publisher.produce(BARS, symbol.encode(), value)


def wait_until(true: Callable[[], bool], check: Callable[[], None]) -> None:
    """Until it is true; `check` raises where it never will be."""
    deadline = time.monotonic() + PATIENCE_S
    while not true():
        check()
        assert time.monotonic() < deadline, "nothing happened for too long"
        time.sleep(0.05)


def wait_until_done(settings: Settings, check: Callable[[], None]) -> None:
    """Until the group has committed everything that is on the topic."""
    group = settings.inference.group
    wait_until(
        lambda: any(offset for offset, _ in group_offsets(settings, group, BARS).values()), check
    )
    with closing(GroupLag(settings, BARS, [group])) as lag:
        wait_until(lambda: lag() == 0, check)


def compared(
    settings: Settings, bundles: Sequence[Bundle], changes: Sequence[Change]
) -> Comparison:
    """What the topics hold against one undisturbed run with the same changes of role."""
    log = read_bars(settings)
    schedules = {}
    for partition in set(log.partitions.tolist()):
        schedules[partition] = Schedule()
        for change in changes:
            schedules[partition].give(*change)
    truth = undisturbed(log, schedules, list(bundles), log.bars.symbols[0])
    deadline = time.monotonic() + READABLE_WITHIN_S
    while True:  # a commit returns before its markers, which let readers pass, are written
        comparison = compare(truth.predictions, read_predictions(settings))
        if not comparison.lost or time.monotonic() > deadline:
            return comparison
        time.sleep(0.2)


def assert_exactly_once(comparison: Comparison) -> None:
    assert_nothing_lost(comparison)
    assert comparison.duplicated == 0


def assert_nothing_lost(comparison: Comparison) -> None:
    """Every prediction is there, its value and role as undisturbed; repetitions may be."""
    assert comparison.expected > 0
    assert (comparison.lost, comparison.unexpected, comparison.wrong_role) == (0, 0, 0)
    assert comparison.max_abs_difference <= 1e-5
