"""The feed: streams a table of bars in event-time order into `market.bars`."""

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from schemas.codecs import BarColumns, decode_bars, encode_bars
from schemas.topics import BARS
from workers.config import Settings
from workers.kafka import GroupLag, make_publisher, newest_values
from workers.logs import event
from workers.offline import to_columns

log = logging.getLogger(__name__)

BLOCK_BARS = 500
CHECK_EVERY_BARS = 2_000
"""The lag of the groups is looked up after so many bars: one request to the broker each time."""
SILENCE_INTERVALS = 30
"""A night or a holiday lasts as long as so many bars, when bars are paced."""


@dataclass(frozen=True)
class Limits:
    """How fast bars may go: `speed` in event seconds per second, None as fast as they are taken.

    The feed waits while a group of `groups` is more than `max_lag` bars behind. A group that has
    not committed anything yet is not waited for.
    """

    speed: float | None = None
    max_lag: int = 20_000
    groups: Sequence[str] = ("inference", "monitor")


@dataclass(frozen=True)
class Fed:
    bars: int
    seconds: float
    waited_s: float
    """Of these seconds, how many the feed waited for lagging groups."""


def feed(
    bars: pd.DataFrame,
    settings: Settings,
    limits: Limits = Limits(),
    *,
    running: Callable[[], bool] = lambda: True,
    advance: Callable[[int], None] = lambda n: None,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], object] = time.sleep,
) -> Fed:
    """Stream `bars`, which are in event-time order, until the last one or until not `running`.

    Every bar that was sent is on the topic when it returns. `advance` is told how many more have
    gone. Raises BrokerUnavailable.
    """
    columns = to_columns(bars)
    due = due_s(columns.ts, limits.speed)
    started, held_s, sent, checked = clock(), 0.0, 0, 0
    with (
        make_publisher(settings, "feed") as publisher,
        closing(GroupLag(settings, BARS, limits.groups)) as lag,
    ):
        while sent < len(columns) and running():
            if sent - checked >= CHECK_EVERY_BARS:
                checked = sent
                held_s += _wait_for(lag, limits.max_lag, running, clock, sleep)
            elapsed = clock() - started - held_s
            ready = int(np.searchsorted(due, elapsed, side="right"))
            if ready <= sent:
                sleep(min(due[sent] - elapsed, 0.1))
                continue
            rows = slice(sent, min(ready, sent + BLOCK_BARS))
            block = BarColumns(columns.symbols[rows], columns.ts[rows], columns.ohlcv[rows])
            for symbol, value in zip(block.symbols, encode_bars(block), strict=True):
                publisher.produce(BARS, symbol.encode(), value)
            sent += len(block)
            advance(len(block))
    fed = Fed(sent, clock() - started, held_s)
    event(log, "fed", bars=fed.bars, seconds=round(fed.seconds, 1), waited_s=round(fed.waited_s, 1))
    return fed


def not_yet_fed(bars: pd.DataFrame, settings: Settings) -> pd.DataFrame:
    """The bars that a feed of `bars` has yet to send: those from the newest on `market.bars`.

    The partitions of an interrupted feed end at different times; it goes on from the earliest of
    them. What is sent again by that is a duplicate or late, which workers count and pass over.
    """
    newest, _, _ = decode_bars(newest_values(settings, BARS))
    return bars if not len(newest) else bars[bars["ts"] >= newest.ts.min()]


def due_s(ts: NDArray[np.int64], speed: float | None) -> NDArray[np.float64]:
    """When each bar may go, in seconds after the first: i64[n] ascending to f64[n]."""
    if speed is None or len(ts) == 0:
        return np.zeros(len(ts))
    steps = np.diff(ts, prepend=ts[0])
    forward = steps[steps > 0]
    interval = np.median(forward) if len(forward) else 0
    return np.asarray(np.cumsum(np.minimum(steps, SILENCE_INTERVALS * interval)) / 1_000 / speed)


def _wait_for(
    lag: Callable[[], int],
    max_lag: int,
    running: Callable[[], bool],
    clock: Callable[[], float],
    sleep: Callable[[float], object],
) -> float:
    """Wait until the workers are within `max_lag`; the seconds that it took."""
    started = clock()
    while running() and lag() > max_lag:
        sleep(0.05)
    return clock() - started
