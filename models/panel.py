"""Bars of many symbols in one flat table with features and one label, and its parts by time.

Shapes: N bars of all symbols, symbol after symbol, each in time order; S symbols; F features.
"""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cached_property
from typing import Any, Final, Literal, cast

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from models.dataset import BarsRejected, History, infer_interval_ms, symbol_history
from models.features import DAY_MS, WARM_UP_BARS, WEEK_MS, F, FeatureSpec, utc_offsets
from models.sessions import WEEKS, weekday
from models.splits import Fold, walk_forward
from models.targets import Target

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

MEMORY_LIMIT_BYTES: Final = 1 << 30
"""A larger feature table lies in a temporary file that the system pages."""
MIN_LABELS: Final = {"training": 500, "validation": 50, "out-of-sample": 50}
ZONES: Final = (
    "UTC",
    "America/New_York",
    "America/Chicago",
    "Europe/London",
    "Europe/Berlin",
    "Asia/Tokyo",
    "Asia/Hong_Kong",
    "Australia/Sydney",
)
_RARE: Final = 0.02
"""Share of days up to which an hour or weekday that has bars is a closed one all the same."""
_MIN_DAYS: Final = 20
_OPENING_BUCKET_MS: Final = 900_000
_DAY_BUCKET_MS: Final = 300_000


class TooShort(BarsRejected):
    """The bars do not reach for what was asked; the message says which part and by how much."""


@dataclass(frozen=True, eq=False)
class Panel:
    spec: FeatureSpec
    target: Target
    histories: tuple[History, ...]
    """Their features are views of `x`."""
    bounds: Ints
    """[S + 1]: rows of symbol i are bounds[i]:bounds[i + 1]."""
    x: NDArray[np.float32]
    """[N, F], unscaled."""

    @cached_property
    def ts(self) -> Ints:
        return np.concatenate([h.ts for h in self.histories])

    @cached_property
    def y(self) -> Floats:
        """[N], NaN where there is no label."""
        return np.concatenate([h.y[:, 0] for h in self.histories])

    @cached_property
    def known_ts(self) -> Ints:
        return np.concatenate([h.known_ts for h in self.histories])

    @cached_property
    def usable(self) -> NDArray[np.bool_]:
        """[N], features are complete and there is a label."""
        return np.concatenate([h.is_warm for h in self.histories]) & np.isfinite(self.y)

    @cached_property
    def symbol(self) -> Ints:
        """[N] index of each row's symbol."""
        return np.repeat(np.arange(len(self.histories)), np.diff(self.bounds))

    @cached_property
    def bars_per_day(self) -> float:
        """Of the symbol with the most bars, on days on which it has any."""
        ts = max((h.ts for h in self.histories), key=len)
        return len(ts) / len(np.unique(ts // DAY_MS))

    def time_of_day(self, rows: Ints) -> Ints:
        """[n] bucket of local time: of the day, or of the week for bars of a day and longer."""
        local = _local(self.ts[rows], self.spec.timezone)
        if self.spec.interval_ms >= DAY_MS:
            return local % WEEK_MS // DAY_MS
        return local % DAY_MS // max(self.spec.interval_ms, _DAY_BUCKET_MS)


@dataclass(frozen=True, eq=False)
class Part:
    """One step of the walk: what is learnt from, and what is then forecast; rows in ascending order.

    Each row of `fit` and `valid` had its label before the next span starts: what overlaps is purged.
    """

    fold: Fold
    fit: Ints
    valid: Ints
    test: Ints

    @property
    def train(self) -> Ints:
        return np.sort(np.concatenate([self.fit, self.valid]))


def build(
    bars: pd.DataFrame,
    spec: FeatureSpec,
    target: Target,
    advance: Callable[[int], None] = lambda n: None,
) -> Panel:
    """From bars as `load_bars` gives them; `advance` is told of the bars done.

    Features beyond `MEMORY_LIMIT_BYTES` are kept in a temporary file.
    """
    x = _table(len(bars))
    made, bounds = [], [0]
    for symbol, rows in bars.groupby("symbol", sort=True):
        one = symbol_history(str(symbol), rows, spec, [target])
        view = x[bounds[-1] : bounds[-1] + len(rows)]
        view[:] = one.x
        made.append(replace(one, x=view))
        bounds.append(bounds[-1] + len(rows))
        advance(len(rows))
    return Panel(spec, target, tuple(made), np.array(bounds), x)


def walk(
    panel: Panel,
    out_of_sample: float,
    refits: int,
    validation: float = 0.15,
    history: Literal["expanding", "rolling"] = "expanding",
) -> list[Part]:
    """The last `out_of_sample` of the distinct bar times in `refits` parts of equal length.

    Before each, everything earlier is training (expanding), or as much of it as before the first
    part (rolling); the last `validation` of it serves early stopping and the like. Raises TooShort.
    """
    if not panel.usable.any():
        longest = int(np.diff(panel.bounds).max(initial=0))
        raise TooShort(
            f"no bar can be used: features need {WARM_UP_BARS} bars of a symbol and labels "
            f"{panel.target.horizon} more; the longest symbol has {longest} bars"
        )
    times = np.unique(panel.ts)
    folds = walk_forward(times, refits, 1 - out_of_sample, validation, history)
    return [_part(panel, fold) for fold in folds]


def infer_spec(bars: pd.DataFrame, timezone: str = "auto") -> FeatureSpec:
    """Bar length and time zone of a market that is only known from its bars.

    `auto` takes the zone in which trading days start most regularly: daylight saving time gives
    it away. Markets without a daily break, and daily bars, are in UTC. When the market is closed,
    no bar is absent: see `_breaks`.
    """
    interval_ms = infer_interval_ms(bars)
    times = np.unique(bars["ts"].to_numpy(np.int64))
    if timezone == "auto":
        timezone = _zone(times, interval_ms)
    return FeatureSpec(
        interval_ms=interval_ms,
        timezone=timezone,
        reset_after_ms=max(10 * DAY_MS, 5 * interval_ms),
        **_breaks(times, interval_ms, timezone),
    )


def day(ts: int) -> str:
    return datetime.fromtimestamp(ts / 1000, UTC).strftime("%Y-%m-%d")


def _part(panel: Panel, fold: Fold) -> Part:
    def rows(where: NDArray[np.bool_]) -> Ints:
        return np.flatnonzero(panel.usable & where)

    part = Part(
        fold,
        fit=rows(fold.train.purged_rows(panel.ts, panel.known_ts)),
        valid=rows(fold.validation.purged_rows(panel.ts, panel.known_ts)),
        test=rows(fold.test.rows(panel.ts)),
    )
    found = (part.fit, part.valid, part.test)
    for (name, least), labelled in zip(MIN_LABELS.items(), found, strict=True):
        if len(labelled) < least:
            raise TooShort(
                f"the {name} part before {day(fold.test.to_ts)} has {len(labelled)} labelled bars "
                f"after the warm-up of {WARM_UP_BARS} bars a symbol; it needs {least}. There are "
                f"{len(panel.ts):,} bars of {len(panel.histories)} symbol(s): give a longer file, "
                "a shorter horizon or fewer refits"
            )
    return part


def _table(n: int) -> NDArray[np.float32]:
    if n * F * 4 <= MEMORY_LIMIT_BYTES:
        return np.empty((n, F), np.float32)
    with tempfile.TemporaryFile() as file:  # the mapping keeps it alive
        return cast(NDArray[np.float32], np.memmap(file, np.float32, "w+", shape=(n, F)))


def _local(ts: Ints, timezone: str) -> Ints:
    table = utc_offsets(timezone)
    return np.asarray(ts + table[np.searchsorted(table[:, 0], ts, side="right") - 1, 1])


def _zone(times: Ints, interval_ms: int) -> str:
    breaks = np.flatnonzero(np.diff(times) > max(3 * interval_ms, DAY_MS // 8)) + 1
    days = (times[-1] - times[0]) / DAY_MS
    if interval_ms >= DAY_MS or len(breaks) < max(20, days / 4):
        return "UTC"

    def irregularity(zone: str) -> float:
        opened = _local(times[breaks], zone) % DAY_MS // _OPENING_BUCKET_MS
        share = np.unique(opened, return_counts=True)[1] / len(opened)
        return round(float(-(share * np.log(share)).sum()), 3)

    return min(ZONES, key=irregularity)


def _breaks(times: Ints, interval_ms: int, timezone: str) -> dict[str, Any]:
    """What a spec must say so that no closed hour is filled with bars that did not move.

    Daily bars without a week's end are counted in weekdays, and a holiday is a break. Within the
    day, hours without a bar of any symbol are one: fewer absent bars than that are filled.
    """
    if interval_ms == DAY_MS:
        on = np.bincount(weekday(times // DAY_MS), minlength=7)
        for calendar, week in WEEKS.items():
            if on.sum() - on[list(week)].sum() <= _RARE * len(times):
                return {"calendar": calendar, "max_fill": 0}
        return {}
    local = _local(times, timezone)
    days = len(np.unique(local // DAY_MS))
    share = np.bincount(local % DAY_MS // interval_ms) / days
    open_ = np.flatnonzero(share > _RARE)
    is_known = interval_ms < DAY_MS and days >= _MIN_DAYS and len(open_)
    if not is_known or np.median(share[open_]) < 0.5:
        return {}
    around = np.append(open_, open_[0] + -(-DAY_MS // interval_ms))
    closed = np.diff(around) - 1
    usual = int(FeatureSpec.model_fields["max_fill"].default)
    return {"max_fill": min(usual, int(closed[closed > 0].min(initial=usual + 1)) - 1)}


def rows_by_symbol(panel: Panel, rows: Ints) -> Sequence[tuple[int, Ints]]:
    """(symbol index, its rows counted from its first bar) for the symbols that `rows` touch."""
    owner = panel.symbol[rows]
    starts = np.flatnonzero(np.diff(owner, prepend=-1))
    return [
        (int(owner[start]), part - panel.bounds[owner[start]])
        for start, part in zip(starts, np.split(rows, starts[1:]), strict=True)
    ]
