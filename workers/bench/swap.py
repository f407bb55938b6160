"""What a hot swap does to a replica under full load: the times of its cycles, and what is missing."""

import time
from datetime import datetime
from itertools import pairwise
from typing import Any

import msgspec
import numpy as np

from schemas.topics import PREDICTIONS
from workers.bench.fixtures import (
    Market,
    Tell,
    WarmState,
    default_bundle,
    quietly,
    silent_minutes,
)
from workers.bench.stage import Patience, Replica, appoint, lay_snapshots, send
from workers.config import Settings
from workers.kafka import make_publisher, read_topic

SHADOW_FROM, PROMOTE_AT = 0.3, 0.6
"""Shares of the bars after which the challenger is named, and then promoted."""
MARGIN = 0.1
"""Share of the cycles left out at each end: start and drain are not full load."""


class _Said(msgspec.Struct):
    symbol: str
    ts: int
    role: str
    bundle: str


def run(
    settings: Settings,
    symbols: int = 500,
    minutes: int = 1_000,
    window: int = 30,
    shadow: bool = True,
    tell: Tell = quietly,
) -> dict[str, Any]:
    """Cycle times while a challenger is loaded, joins, runs in shadow, and becomes the champion.

    All bars are at the broker before the replica starts. A cycle's time is that from the end of
    one cycle with messages to the end of the next, whatever the replica did between. Without
    `shadow` the new bundle becomes the champion at once, as `models promote --at-once` does it.
    """
    champion, successor = default_bundle(window, seed=1), default_bundle(window, seed=2)
    tell("warming up the symbols", 0.0)
    market = Market(symbols, settings.kafka.partitions, silent_minutes(champion))
    lay_snapshots(settings, WarmState.of(market, champion))
    appoint(settings, "champion", champion)
    tell(f"sending {symbols} x {minutes} bars", 0.1)
    with make_publisher(settings, "bench") as publisher:
        for minute in range(minutes):
            send(publisher, market, minute)
    total = symbols * minutes
    with Replica(settings, "--log-level", "DEBUG") as replica:
        if shadow:
            _wait(replica, SHADOW_FROM * total, tell, total)
            appoint(settings, "challenger", successor)
        _wait(replica, PROMOTE_AT * total, tell, total)
        appoint(settings, "champion", successor)
        if shadow:
            appoint(settings, "challenger", None)
        _wait(replica, total, tell, total)
        time.sleep(0.5)  # the last transaction
        cycles_ms = _cycles_ms(replica.log_lines())
    said = [
        msgspec.json.decode(message.value() or b"", type=_Said)
        for message in read_topic(settings, PREDICTIONS)
    ]
    acted_on = {(each.symbol, each.ts): each.bundle for each in said if each.role == "champion"}
    median, worst = float(np.median(cycles_ms)), float(max(cycles_ms))
    return {
        "median_cycle_ms": round(median, 1),
        "max_cycle_ms": round(worst, 1),
        "max_over_median": round(worst / median, 2),
        "missing": total - len(acted_on),
        "cycles": len(cycles_ms),
        "symbols": symbols,
        "shadow": shadow,
        "by_champion": list(acted_on.values()).count(champion.version),
        "by_successor": list(acted_on.values()).count(successor.version),
        "in_shadow": sum(each.role == "challenger" for each in said),
        "window": window,
    }


def _wait(replica: Replica, predictions: float, tell: Tell, total: int) -> None:
    """Until the champion has made so many predictions."""
    patience = Patience(replica, f"{predictions:.0f} predictions")
    while (made := replica.predictions()) < predictions and patience.lasts():
        tell("one replica under full load, and a hot swap", 0.2 + 0.7 * made / total)
        time.sleep(0.05)


def _cycles_ms(lines: list[str]) -> list[float]:
    ends = [
        datetime.strptime(line.split()[0], "at=%Y-%m-%dT%H:%M:%S.%fZ")
        for line in lines
        if " event=cycle " in line
    ]
    edge = max(round(MARGIN * len(ends)), 1)
    seconds = [(b - a).total_seconds() for a, b in pairwise(ends)]
    if len(seconds) <= 2 * edge:
        raise ValueError("too few cycles: ask for more minutes")
    return [1e3 * each for each in seconds[edge:-edge]]
