"""The level of log variance forecasts: set by the validation part, then led by what has matured since.

Shapes: n rows, N bars of the panel.
"""

from typing import Final

import numpy as np
from numba import njit

from models.features import DAY_MS
from models.forecasters import expected_variance
from models.losses import MAX_LOG_RATIO
from models.panel import Floats, Ints, Panel

PRIOR_PERIODS: Final = 50
"""Horizons of a symbol's matured errors that count as much as the level of the validation part."""


def levels(panel: Panel, values: Floats, rows: Ints) -> tuple[float, float]:
    """What to add to log variances so that they are logs of the mean, and means of the log.

    From what was said of the validation part, for every model alike.
    """
    if panel.target.kind != "volatility":
        return 0.0, 0.0
    return expected_variance(values, panel.y[rows]), float((panel.y[rows] - values).mean())


def led(panel: Panel, values: Floats, rows: Ints, half_life_days: float) -> tuple[Floats, Floats]:
    """What to add to the levelled forecasts f64[n] of `rows`, by their own errors so far.

    Each symbol's by itself: the mean of exp(error), and of error, over labels of `rows` that were
    known at the close of the bar, weighed by age and drawn to no correction. Rows in any order.
    """
    if panel.target.kind != "volatility" or not half_life_days:
        return np.zeros(len(rows)), np.zeros(len(rows))
    order = np.argsort(rows)
    ordered = rows[order]
    error = np.minimum(panel.y[rows] - values, MAX_LOG_RATIO)[order]
    prior = float(PRIOR_PERIODS * panel.target.horizon)
    known = (panel.symbol[ordered], panel.ts[ordered], panel.known_ts[ordered])
    of_mean, of_log = np.empty(len(rows)), np.empty(len(rows))
    half_life_ms = half_life_days * DAY_MS
    of_mean[order] = np.log1p(_matured_means(*known, np.expm1(error), half_life_ms, prior))
    of_log[order] = _matured_means(*known, error, half_life_ms, prior)
    return of_mean, of_log


@njit(cache=True)
def _matured_means(symbol, ts, known_ts, error, half_life_ms, prior):  # type: ignore[no-untyped-def]
    """Rows by symbol and time, so that labels of a symbol become known in their order."""
    out = np.zeros(ts.size)
    total, weight, at, next_known = 0.0, 0.0, 0, 0
    for i in range(ts.size):
        if i == 0 or symbol[i] != symbol[i - 1]:
            total, weight, at, next_known = 0.0, 0.0, ts[i], i
        while next_known < i and known_ts[next_known] <= ts[i]:
            decay = 2.0 ** ((at - known_ts[next_known]) / half_life_ms)
            total = total * decay + error[next_known]
            weight = weight * decay + 1.0
            at = known_ts[next_known]
            next_known += 1
        decay = 2.0 ** ((at - ts[i]) / half_life_ms)
        out[i] = total * decay / (weight * decay + prior)
    return out
