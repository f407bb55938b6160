"""Whether one forecast is better than another, and whether it means what it says.

Shapes: n forecasts, T distinct times.
"""

from dataclasses import asdict, dataclass
from math import ceil, sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats  # type: ignore[import-untyped]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class DieboldMariano:
    """Of a loss difference `loss - rival's loss`: a negative mean says the first is better."""

    mean: float
    statistic: float
    p_value: float
    """Two-sided."""
    lags: int
    times: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def by_time(ts: Ints, differences: Floats) -> Floats:
    """f64[T]: differences summed over the symbols of a time, over the mean number of symbols.

    Symbols move together, so a time is one observation, however many symbols it has; its weight
    keeps the mean of the series equal to the mean over all n. Times are in ascending order.
    """
    _, place = np.unique(ts, return_inverse=True)
    totals = np.bincount(place, weights=differences)
    return np.asarray(totals * (len(totals) / max(len(differences), 1)))


def diebold_mariano(differences: Floats, horizon: int) -> DieboldMariano:
    """Test of a mean difference of zero for one series in time order.

    Diebold & Mariano 1995 with the long-run variance of Newey & West 1987 (Bartlett weights),
    corrected for small samples as Harvey, Leybourne & Newbold 1997 say. At least `horizon` lags:
    overlapping labels make neighbours dependent; and 1.3 sqrt(T) of them (Lazarus, Lewis, Stock &
    Watson 2018), as losses of volatile days cluster. Too short a series gives a p-value of 1.
    """
    T = len(differences)
    mean = float(differences.mean()) if T else 0.0
    lags = min(max(horizon, ceil(1.3 * sqrt(T))), max(T - 1, 0))
    variance = long_run_variance(differences, lags) / T if T else 0.0
    correction = (T + 1 - 2 * horizon + horizon * (horizon - 1) / T) / T if T else 0.0
    if variance <= 0 or correction <= 0 or T < 2:
        return DieboldMariano(mean, 0.0, 1.0, lags, T)
    statistic = mean / sqrt(variance) * sqrt(correction)
    return DieboldMariano(mean, statistic, float(2 * stats.t.sf(abs(statistic), T - 1)), lags, T)


def long_run_variance(series: Floats, lags: int) -> float:
    """Newey & West 1987: sum of autocovariances with Bartlett weights, never negative."""
    centred = series - series.mean()
    T = len(centred)
    total = float(centred @ centred)
    for lag in range(1, min(lags, T - 1) + 1):
        total += 2 * (1 - lag / (lags + 1)) * float(centred[lag:] @ centred[:-lag])
    return total / T


def rank_correlation(forecast: Floats, realised: Floats) -> float:
    """Spearman's: the information coefficient; 0 where either never changes."""
    if len(forecast) < 2 or np.ptp(forecast) == 0 or np.ptp(realised) == 0:
        return 0.0
    return float(np.corrcoef(stats.rankdata(forecast), stats.rankdata(realised))[0, 1])


@dataclass(frozen=True)
class Bin:
    forecast: float
    realised: float
    n: int


def reliability(forecast: Floats, realised: Floats, bins: int = 10) -> tuple[Bin, ...]:
    """Mean forecast and mean outcome in `bins` groups of equal size, ordered by forecast.

    In natural units: probabilities against outcomes 0 and 1, or variances against variances.
    """
    order = np.argsort(forecast, kind="stable")
    return tuple(
        Bin(float(forecast[rows].mean()), float(realised[rows].mean()), len(rows))
        for rows in np.array_split(order, min(bins, len(order)))
        if len(rows)
    )


def calibration_error(table: tuple[Bin, ...]) -> float:
    """Mean |realised - forecast| over the bins, weighted by their size (for probabilities)."""
    n = sum(b.n for b in table)
    return sum(b.n * abs(b.realised - b.forecast) for b in table) / max(n, 1)


@dataclass(frozen=True)
class MincerZarnowitz:
    """realised = intercept + slope * forecast; 0 and 1 for an unbiased one."""

    intercept: float
    slope: float
    r2: float


def mincer_zarnowitz(forecast: Floats, realised: Floats) -> MincerZarnowitz:
    """Mincer & Zarnowitz 1969, here on logs of variance: a slope below 1 says it swings too far."""
    if len(forecast) < 2 or np.ptp(forecast) == 0:
        return MincerZarnowitz(float(realised.mean()) if len(realised) else 0.0, 0.0, 0.0)
    covariance = np.cov(forecast, realised)
    slope = float(covariance[0, 1] / covariance[0, 0])
    intercept = float(realised.mean() - slope * forecast.mean())
    spread = float(covariance[1, 1])
    r2 = float(covariance[0, 1] ** 2 / (covariance[0, 0] * spread)) if spread > 0 else 0.0
    return MincerZarnowitz(intercept, slope, r2)
