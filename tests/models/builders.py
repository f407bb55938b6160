"""Bars for tests: random but seeded, with the shapes that real ones have."""

import numpy as np
import pandas as pd
from numpy.typing import NDArray

MINUTE_MS = 60_000
MONDAY_OPEN = 1_583_764_200_000
"""Monday 2020-03-09 10:30 in New York, the day after its clocks went forward."""

Bars = tuple[NDArray[np.int64], NDArray[np.float64]]


def make_bars(
    n: int = 600,
    seed: int = 0,
    interval_ms: int = 5 * MINUTE_MS,
    start: int = MONDAY_OPEN,
    session_bars: int | None = 78,
    missing: float = 0.05,
    volatility: float = 0.002,
    price: float = 100.0,
    volume: float = 1000.0,
) -> Bars:
    """One symbol's ts i64[n] and ohlcv f64[n, 5]: clustered volatility, a busy open, fat tails.

    With `session_bars` each day has so many bars and then a night; `missing` is the share of bars
    that are absent, one in ten of those inside a longer hole.
    """
    rng = np.random.default_rng(seed)
    per_day = max(1, 24 * 60 * MINUTE_MS // interval_ms)
    grid = np.arange(2 * n + 200)
    place = grid % (session_bars or per_day)
    if session_bars is not None:
        grid = grid // session_bars * max(per_day, session_bars) + place
    hole = np.convolve(rng.random(len(grid)) < missing / 10, np.ones(5))[: len(grid)] > 0
    kept = np.flatnonzero((rng.random(len(grid)) >= missing / 2) & ~hole)[:n]
    level = np.exp(np.cumsum(rng.normal(0, 0.05, n)) * 0.97) * (1 + 2 * np.exp(-place[kept] / 6))
    sd = volatility * np.clip(level, 0.1, 10)
    close = price * np.exp(np.cumsum(rng.standard_t(4, n) * sd / 1.4))
    open_ = np.concatenate([[price], close[:-1]]) * np.exp(rng.normal(0, 0.2, n) * sd)
    high = np.maximum(open_, close) * np.exp(np.abs(rng.normal(0, 0.5, n)) * sd)
    low = np.minimum(open_, close) * np.exp(-np.abs(rng.normal(0, 0.5, n)) * sd)
    traded = np.round(volume * np.exp(rng.normal(0, 0.7, n)) * level, 2)
    quiet = rng.random(n) < 0.03
    close[quiet] = open_[quiet]
    high, low = np.maximum(high, close), np.minimum(low, close)
    traded[rng.random(n) < 0.02] = 0.0
    ts = start + grid[kept] * interval_ms
    return ts.astype(np.int64), np.stack([open_, high, low, close, traded], axis=1)


def make_frame(symbols: int = 3, n: int = 600, seed: int = 0, **options: float) -> pd.DataFrame:
    """Bars of several symbols as a table, by time."""
    parts = []
    for i in range(symbols):
        ts, ohlcv = make_bars(n, seed=seed + i, **options)  # type: ignore[arg-type]
        part = pd.DataFrame(ohlcv, columns=["open", "high", "low", "close", "volume"])
        part.insert(0, "symbol", f"S{i}")
        part.insert(1, "ts", ts)
        parts.append(part)
    return pd.concat(parts).sort_values(["ts", "symbol"], ignore_index=True)
