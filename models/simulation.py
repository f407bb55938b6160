"""Simulated bars: GARCH(1,1) returns with fat tails, a session pattern, and breaks where asked for.

A market without secrets: the variance behind every bar is known, so a forecaster, an alarm or a
load test can be measured against the truth. Symbols are named SIM0001, SIM0002, ... so that no
one takes them for real ones.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Self

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

MINUTES_PER_YEAR = 252 * 390
SUBSTEPS = 8
"""Steps of the path inside a bar, from which its high and low are taken."""
_BLOCK_BARS = 512

Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, lt=1)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Break(_Frozen):
    """What changes from the bar at `at_ts` on.

    The long-run variance is multiplied by `variance_factor`; the session pattern becomes the
    original one to the power `pattern_power` (mean 1 as ever): 0 is a flat session, -1 one that is
    quiet where it was wild.
    """

    at_ts: int
    variance_factor: Positive = 1.0
    pattern_power: float = 1.0


class Scenario(_Frozen):
    """What kind of market is simulated.

    The variance of a one-minute log return is pattern(minute of the session) * h, where
    h' = long_run * (1 - alpha - beta) + alpha * e**2 + beta * h (Bollerslev 1986) and e is the
    return without the pattern, Student t with `degrees_of_freedom`. `correlation` is that of
    the Gaussian part of any two symbols' returns; each has its own tails. The night between
    sessions moves prices by `overnight_share` of a day's variance.
    """

    symbols: Annotated[int, Field(ge=1, le=9_999)] = 1
    first: Annotated[int, Field(ge=1, le=9_999)] = 1
    """Number of the first symbol: 901 begins with SIM0901."""
    interval_ms: Annotated[int, Field(gt=0)] = 60_000
    session_bars: Annotated[int, Field(gt=0)] = 390
    annual_volatility: Positive = 0.15
    """Of the median symbol; symbols differ by +-40 % (one standard deviation of the logarithm)."""
    alpha: Share = 0.06
    beta: Share = 0.93
    degrees_of_freedom: Annotated[float, Field(gt=2)] = 5.0
    correlation: Share = 0.3
    overnight_share: Share = 0.25
    breaks: tuple[Break, ...] = ()

    @model_validator(mode="after")
    def _is_stationary(self) -> Self:
        if self.alpha + self.beta >= 1:
            raise ValueError("alpha + beta must be below 1, or the variance has no long-run level")
        return self

    @property
    def names(self) -> list[str]:
        return [f"SIM{i:04d}" for i in range(self.first, self.first + self.symbols)]


@dataclass(frozen=True)
class SimulatedBars:
    """N bar times of S symbols: `ts` i64[N], `ohlcv` f64[N, S, 5], and the truth behind them.

    `variance` f64[N, S] is the variance of each bar's log return given everything before it.
    """

    names: list[str]
    ts: NDArray[np.int64]
    ohlcv: NDArray[np.float64]
    variance: NDArray[np.float64]

    def frame(self) -> pd.DataFrame:
        """One row per bar (symbol, ts, open, high, low, close, volume), by time, then by symbol."""
        n, s = self.variance.shape
        columns = dict(
            zip(
                ("open", "high", "low", "close", "volume"), self.ohlcv.reshape(-1, 5).T, strict=True
            )
        )
        return pd.DataFrame({"symbol": self.names * n, "ts": np.repeat(self.ts, s), **columns})


class Simulator:
    """Simulates a scenario onwards: `run` may be called again and again with later times.

    The same scenario and seed give the same bars, in however many calls they are asked for.
    """

    def __init__(self, scenario: Scenario, seed: int) -> None:
        self.scenario = scenario
        setup, *draws = np.random.default_rng(seed).spawn(6)
        self._path, self._market, self._tail, self._night, self._trade = draws
        s = scenario.symbols
        bar_variance = (
            scenario.annual_volatility**2 / MINUTES_PER_YEAR * scenario.interval_ms / 60_000
        )
        self._long_run = bar_variance * np.exp(2 * 0.4 * setup.standard_normal(s))
        self._h = self._long_run.copy()
        self._close = np.exp(setup.uniform(np.log(20), np.log(400), s))
        self._base_volume = np.exp(setup.uniform(np.log(1e4), np.log(4e5), s))
        self._pattern = session_pattern(scenario.session_bars)
        self._breaks = sorted(scenario.breaks, key=lambda b: b.at_ts)
        self._last_ts: int | None = None
        self._bar_of_session = 0

    def run(self, ts: NDArray[np.int64]) -> SimulatedBars:
        """Bars of every symbol at the times `ts` i64[N], ascending and after those of earlier calls.

        A step longer than an hour and longer than twelve intervals begins a new session.
        """
        if len(ts) and (np.any(np.diff(ts) <= 0) or (self._last_ts or -1) >= ts[0]):
            raise ValueError("bar times must ascend")
        parts = list(self._blocks(ts))
        shape = (0, self.scenario.symbols)
        ohlcv = np.concatenate([p[0] for p in parts]) if parts else np.empty((*shape, 5))
        variance = np.concatenate([p[1] for p in parts]) if parts else np.empty(shape)
        return SimulatedBars(self.scenario.names, ts, ohlcv, variance)

    def _blocks(
        self, ts: NDArray[np.int64]
    ) -> Iterator[tuple[NDArray[np.float64], NDArray[np.float64]]]:
        for start in range(0, len(ts), _BLOCK_BARS):
            yield self._block(ts[start : start + _BLOCK_BARS])

    def _block(self, ts: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        scenario, n, s = self.scenario, len(ts), self.scenario.symbols
        shape = (n, s, SUBSTEPS)
        own = self._path.standard_normal(shape)
        market = self._market.standard_normal((n, 1, SUBSTEPS))
        rho, nu = scenario.correlation, scenario.degrees_of_freedom
        steps = (np.sqrt(1 - rho) * own + np.sqrt(rho) * market) / np.sqrt(SUBSTEPS)
        # A Student t is a normal over a chi: one chi per bar keeps the path inside it Gaussian.
        tail = np.sqrt((nu - 2) / (2 * self._tail.standard_gamma(nu / 2, (n, s))))
        shocks = steps.sum(axis=2) * tail
        night = self._night.standard_normal((n, s))
        trade = np.exp(0.5 * self._trade.standard_normal((n, s)))

        ohlcv, variance = np.empty((n, s, 5)), np.empty((n, s))
        for i in range(n):
            opens_session = self._enter(int(ts[i]))
            level = self._pattern[min(self._bar_of_session, scenario.session_bars - 1)]
            variance[i] = level * self._h
            open_ = self._close
            if opens_session:
                day = scenario.overnight_share * scenario.session_bars * self._long_run
                open_ = open_ * np.exp(np.sqrt(day) * night[i])
            scale = (np.sqrt(variance[i]) * tail[i])[:, None]
            path = open_[:, None] * np.exp(np.cumsum(steps[i] * scale, axis=1))
            self._close = path[:, -1]
            ohlcv[i, :, 0], ohlcv[i, :, 3] = open_, self._close
            ohlcv[i, :, 1] = np.maximum(open_, path.max(axis=1))
            ohlcv[i, :, 2] = np.minimum(open_, path.min(axis=1))
            ohlcv[i, :, 4] = (
                self._base_volume * np.sqrt(level * self._h / self._long_run) * trade[i]
            )
            e2 = self._h * shocks[i] ** 2
            omega = self._long_run * (1 - scenario.alpha - scenario.beta)
            self._h = omega + scenario.alpha * e2 + scenario.beta * self._h
        return _as_quoted(ohlcv), variance

    def _enter(self, ts: int) -> bool:
        """Move to the bar at `ts`: whether it opens a session; breaks that are due take effect."""
        while self._breaks and self._breaks[0].at_ts <= ts:
            due = self._breaks.pop(0)
            self._long_run = self._long_run * due.variance_factor
            self._h = self._h * due.variance_factor
            raised = session_pattern(self.scenario.session_bars) ** due.pattern_power
            self._pattern = raised / raised.mean()
        gap = ts - self._last_ts if self._last_ts is not None else 0
        opens = gap > max(3_600_000, 12 * self.scenario.interval_ms)
        if opens or self._last_ts is None:
            self._bar_of_session = 0
        else:
            self._bar_of_session += gap // self.scenario.interval_ms
        self._last_ts = ts
        return opens


def session_pattern(bars: int) -> NDArray[np.float64]:
    """Variance of each bar of a session over the session's mean: high at the open, lower at the close."""
    x = (np.arange(bars) + 0.5) / bars
    shape = 0.6 + 3.0 * np.exp(-x / 0.08) + 1.0 * np.exp(-(1 - x) / 0.06)
    return np.asarray(shape / shape.mean())


def _as_quoted(ohlcv: NDArray[np.float64]) -> NDArray[np.float64]:
    """Prices to a hundredth of a cent, whole volumes: rounding keeps low <= open, close <= high."""
    ohlcv[..., :4] = np.maximum(np.round(ohlcv[..., :4], 4), 1e-4)
    ohlcv[..., 4] = np.round(ohlcv[..., 4])
    return ohlcv
