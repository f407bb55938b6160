"""Absent bars in a table, made visible and, offline, filled.

The stream needs none of this: the feature kernel fills forward as it goes (`FeatureSpec.max_fill`).
Whatever looks ahead is for cleaning inputs offline, and refuses to be part of a `FeatureSpec`.
"""

from itertools import pairwise
from typing import Annotated, Final, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from models.dataset import OHLCV
from models.features import FeatureSpec, market_steps

_LOOKS_AHEAD: Final = ("backward", "linear")


class LooksAhead(ValueError):
    """A filling rule that needs later bars was asked to serve the stream."""


class Filling(BaseModel):
    """How up to `limit` absent bars in a row get their price; longer holes stay holes.

    forward: the close before. backward: the open after. linear: between these two, in the log.
    none: the hole is marked and stays empty (NaN). Volume is zero in all of them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: Literal["forward", "backward", "linear", "none"] = "forward"
    limit: Annotated[int, Field(ge=0)] = 12

    def for_stream(self, spec: FeatureSpec) -> FeatureSpec:
        """The spec whose kernel fills by this rule; raises LooksAhead if no stream can."""
        if self.method in _LOOKS_AHEAD:
            raise LooksAhead(
                f"{self.method} filling looks ahead: it cleans tables offline; a stream has "
                "'forward' (with a limit) or 'none'"
            )
        limit = 0 if self.method == "none" else self.limit
        return spec.model_copy(update={"max_fill": limit})


def with_absent(bars: pd.DataFrame, spec: FeatureSpec, filling: Filling) -> pd.DataFrame:
    """Bars of `load_bars` with a row for each absent bar that the rule reaches.

    Adds `absent` (bool) and `since_last_ms` (time since the real bar before; 0 at a symbol's
    first). Silences over the limit, and on a calendar every night, get no rows.
    """
    parts = [
        _symbol(str(symbol), rows, spec, filling)
        for symbol, rows in bars.groupby("symbol", sort=True)
    ]
    return pd.concat(parts, ignore_index=True)


def _symbol(symbol: str, rows: pd.DataFrame, spec: FeatureSpec, filling: Filling) -> pd.DataFrame:
    ts, ohlcv = rows["ts"].to_numpy(np.int64), rows[OHLCV].to_numpy(np.float64)
    closes = spec.closes
    steps = [market_steps(a, b, spec.interval_ms, filling.limit, closes) for a, b in pairwise(ts)]
    count = np.array([max(n, 1) for n in steps] + [1])
    real = np.repeat(np.arange(len(ts)), count)
    lag = np.arange(len(real)) - np.repeat(np.cumsum(count) - count, count)
    absent = lag > 0
    filled = ohlcv[real]
    filled[absent] = _fill(ohlcv, real[absent], lag[absent], count, filling)
    all_ts = ts[real] + lag * spec.interval_ms
    frame = pd.DataFrame(filled, columns=OHLCV)
    frame.insert(0, "symbol", symbol)
    frame.insert(1, "ts", all_ts)
    frame["absent"] = absent
    before = np.where(absent, real, np.maximum(real - 1, 0))
    frame["since_last_ms"] = np.where(real + lag == 0, 0, all_ts - ts[before])
    return frame


def _fill(
    ohlcv: NDArray[np.float64],
    real: NDArray[np.intp],
    lag: NDArray[np.int64],
    count: NDArray[np.int64],
    filling: Filling,
) -> NDArray[np.float64]:
    """Rows [m, 5] for the bars `lag` intervals after the real ones."""
    rows = np.zeros((len(real), 5))
    if len(real) == 0:
        return rows
    before, after = ohlcv[real, 3], ohlcv[np.minimum(real + 1, len(ohlcv) - 1), 0]
    weight = lag / count[real]
    price = {
        "forward": before,
        "backward": after,
        "linear": np.exp((1 - weight) * np.log(before) + weight * np.log(after)),
        "none": np.full(len(real), np.nan),
    }[filling.method]
    rows[:, :4] = price[:, None]
    return rows
