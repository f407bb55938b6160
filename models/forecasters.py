"""The rivals of the network: every model that a sceptic would ask for, behind `fit` and `predict`.

All forecast a log variance per bar, a log return, or the probability of a rise, and fitting sees the
training part alone. Whether a log variance is the mean of the log or the log of the mean differs by
model; whoever compares them sets the level of all alike. Shapes: n rows, N bars, F features.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from math import exp, log
from typing import Any, Final, Protocol, cast

import numpy as np
from numba import njit
from numpy.typing import NDArray

from models import baselines
from models.dataset import History
from models.features import DAY_MS, FEATURE_NAMES, WINDOWS, FeatureSpec, market_steps
from models.panel import Floats, Ints, Panel, Part, rows_by_symbol
from models.scaling import Scaler
from models.scoring import loss

CHUNK_ROWS: Final = 16_384
MAX_TREE_ROWS: Final = 2_000_000
"""Trees are grown on every k-th training row above it: labels overlap, so little is lost."""
RIDGES: Final = (1e-6, 1e-4, 1e-3, 1e-2, 1e-1)
"""Penalty per row on standardised columns; the validation part chooses."""
_NEWTON_STEPS: Final = 8


class Forecaster(Protocol):
    @property
    def name(self) -> str: ...

    def fit(self, panel: Panel, part: Part) -> None: ...

    def finish(self, panel: Panel, part: Part) -> None:
        """Learn from the validation part too, where `fit` only chose by it; its choices stand."""

    def predict(self, panel: Panel, rows: Ints) -> Floats:
        """f64[n] for rows in ascending order, from what was known at the close of each bar."""
        ...


class Finished:
    """`fit` has learnt from all that there is before the test rows."""

    def finish(self, panel: Panel, part: Part) -> None:
        pass


def expected_variance(log_forecast: Floats, log_realised: Floats) -> float:
    """What to add to a forecast of log variance so that its exponential is the expected variance.

    log E exp(residual): Duan 1983, J. Am. Stat. Assoc. 78. It is s^2/2 where residuals are normal;
    those of realised variance over few bars are skewed to the left, and s^2/2 is too much.
    """
    residual = log_realised - log_forecast
    top = float(residual.max())
    return top + log(float(np.exp(residual - top).mean()))


# ---- from the symbol's own returns ----


class LastValue(Finished):
    """Variance of the last `horizon` steps; never below the floor."""

    name = "last_value"

    def fit(self, panel: Panel, part: Part) -> None:
        self._floor = _floor(panel, part)

    def predict(self, panel: Panel, rows: Ints) -> Floats:
        values = _by_symbol(panel, rows, lambda h: _trailing_variance(h, panel))
        return np.maximum(values, self._floor)


class Ewma(Finished):
    """Exponentially weighted variance; the half-life with the least QLIKE on the training part."""

    name = "ewma"

    def fit(self, panel: Panel, part: Part) -> None:
        series = (
            (self._history(panel, panel.histories[i])[rows], panel.histories[i].y[rows, 0])
            for i, rows in rows_by_symbol(panel, part.train)
        )
        self._reference = baselines.fit_reference(panel.target, series)
        self._floor = _floor(panel, part)

    def predict(self, panel: Panel, rows: Ints) -> Floats:
        def one(history: History) -> Floats:
            return self._reference.forecast(panel.target, self._history(panel, history))

        return np.maximum(_by_symbol(panel, rows, one), self._floor)

    @staticmethod
    def _history(panel: Panel, history: History) -> Floats:
        return baselines.history(panel.spec, history.ts, history.ohlcv[:, 3])


class Garch(Finished):
    """GARCH(1,1) of each symbol's returns within sessions, by Gaussian quasi-likelihood.

    Bollerslev 1986. A symbol with fewer than `MIN_RETURNS` training returns, or whose fit fails, has
    the median parameters of the others and a level of its own returns up to then. Never below the floor.
    """

    name = "garch"
    MIN_RETURNS: Final = 500
    TYPICAL: Final = (0.05, 0.93)

    def fit(self, panel: Panel, part: Part) -> None:
        end_ts = part.fold.test.from_ts
        self._own: dict[str, tuple[float, float, float]] = {}
        for history in panel.histories:
            r = _returns(history, panel.spec)[0][history.ts < end_ts]
            fitted = fit_garch(r[np.isfinite(r)], self.MIN_RETURNS)
            if fitted is not None:
                self._own[history.symbol] = fitted
        shapes = [(alpha, beta) for _, alpha, beta in self._own.values()] or [self.TYPICAL]
        self._shape = tuple(np.median(np.array(shapes), axis=0))
        self._floor = _floor(panel, part)

    def predict(self, panel: Panel, rows: Ints) -> Floats:
        def one(history: History) -> Floats:
            r, _ = _returns(history, panel.spec)
            alpha, beta = self._shape
            level, alpha, beta = self._own.get(history.symbol, (-1.0, alpha, beta))
            return cast(Floats, _garch_forecasts(r, level, alpha, beta, panel.target.horizon))

        return np.maximum(_by_symbol(panel, rows, one), self._floor)


def fit_garch(returns: Floats, at_least: int) -> tuple[float, float, float] | None:
    """(unconditional variance, alpha, beta) of finite returns; None where there is no honest fit."""
    from scipy import optimize  # type: ignore[import-untyped]

    moved = returns[np.isfinite(returns)]
    scale = float(moved.std()) if len(moved) else 0.0
    if len(moved) < at_least or scale <= 0:
        return None
    squares = np.clip(moved / scale, -30, 30) ** 2

    def parameters(free: Floats) -> tuple[float, float, float]:
        persistence = 1 / (1 + exp(-min(max(free[1], -12.0), 12.0)))
        share = 1 / (1 + exp(-min(max(free[2], -12.0), 12.0)))
        return exp(min(max(free[0], -8.0), 8.0)), persistence * share, persistence * (1 - share)

    found = optimize.minimize(
        lambda free: _garch_loss(squares, *parameters(free)),
        np.array([0.0, 4.0, -2.5]),
        method="Nelder-Mead",
        options={"xatol": 1e-3, "fatol": 1e-7, "maxiter": 400},
    )
    level, alpha, beta = parameters(found.x)
    return (level * scale**2, alpha, beta) if np.isfinite(found.fun) else None


# ---- regressions ----


class Regression(Finished):
    """Ridge on standardised columns of the feature table; logistic for a direction.

    `time_of_day` adds a dummy for every bucket of the day. A volatility is regressed in logs.
    """

    def __init__(self, name: str, columns: Sequence[str], time_of_day: bool = False) -> None:
        self.name = name
        self._columns = np.array([FEATURE_NAMES.index(column) for column in columns])
        self._time_of_day = time_of_day

    def fit(self, panel: Panel, part: Part) -> None:
        every = -(-len(part.train) // MAX_TREE_ROWS)
        self._scaler = Scaler.fit(panel.x[part.train[::every]][:, self._columns])
        self._buckets = np.unique(panel.time_of_day(part.train)) if self._time_of_day else None
        if panel.target.kind == "direction":
            self._weights = self._logistic(panel, part.train)
            return
        fit, valid = (self._moments(panel, rows) for rows in (part.fit, part.valid))
        ridge = min(RIDGES, key=lambda r: valid.squared_error(fit.solve(r)))
        self._weights = (fit + valid).solve(ridge)

    def predict(self, panel: Panel, rows: Ints) -> Floats:
        parts = [design @ self._weights for _, design in self._designs(panel, rows)]
        values = np.concatenate(parts) if parts else np.empty(0)
        return _sigmoid(values) if panel.target.kind == "direction" else values

    def _designs(self, panel: Panel, rows: Ints) -> Iterator[tuple[Ints, Floats]]:
        for start in range(0, len(rows), CHUNK_ROWS):
            taken = rows[start : start + CHUNK_ROWS]
            columns: list[NDArray[Any]] = [self._scaler.transform(panel.x[taken][:, self._columns])]
            if self._buckets is not None:
                bucket = panel.time_of_day(taken)
                columns.append(bucket[:, None] == self._buckets[None, 1:])
            columns.append(np.ones((len(taken), 1)))
            yield taken, np.hstack(columns).astype(np.float64)

    def _moments(self, panel: Panel, rows: Ints) -> "_Moments":
        total = _Moments(0.0, 0.0, 0.0, 0)
        for taken, design in self._designs(panel, rows):
            total += _Moments.of(design, panel.y[taken])
        return total

    def _logistic(self, panel: Panel, rows: Ints, ridge: float = 1e-4) -> Floats:
        weights: Floats | float = 0.0
        for _ in range(_NEWTON_STEPS):
            curvature: Any = 0.0
            slope: Any = 0.0
            for taken, design in self._designs(panel, rows):
                weights = np.zeros(design.shape[1]) if isinstance(weights, float) else weights
                p = _sigmoid(design @ weights)
                curvature += (design * (p * (1 - p))[:, None]).T @ design
                slope += design.T @ (panel.y[taken] - p)
            penalty = ridge * len(rows) * np.append(np.ones(len(slope) - 1), 0.0)
            step = np.linalg.solve(curvature + np.diag(penalty), slope - penalty * weights)
            weights = weights + step
        return np.asarray(weights)


class _Moments:
    """What least squares needs to know of rows, in memory that does not grow with them."""

    def __init__(self, xx: Any, xy: Any, yy: float, n: int) -> None:
        self.xx, self.xy, self.yy, self.n = xx, xy, yy, n

    @classmethod
    def of(cls, design: Floats, y: Floats) -> "_Moments":
        return cls(design.T @ design, design.T @ y, float(y @ y), len(y))

    def __add__(self, other: "_Moments") -> "_Moments":
        return _Moments(
            self.xx + other.xx, self.xy + other.xy, self.yy + other.yy, self.n + other.n
        )

    def solve(self, ridge: float) -> Floats:
        """The last column, the constant, is not penalised."""
        penalty = np.append(np.full(len(self.xy) - 1, ridge * self.n), 1e-9 * self.n)
        return np.asarray(np.linalg.solve(self.xx + np.diag(penalty), self.xy))

    def squared_error(self, weights: Floats) -> float:
        return float(self.yy - 2 * weights @ self.xy + weights @ self.xx @ weights)


def har(panel: Panel) -> Regression:
    """Corsi 2009 in logs: variance over the horizon, a day and a week (a day, a week and a month
    for daily bars), by the windows of the feature table nearest to them.
    """
    per_day = panel.bars_per_day
    daily = panel.spec.interval_ms >= DAY_MS
    scales = (1, 5, 22) if daily else (panel.target.horizon, per_day, 5 * per_day)
    windows = sorted({min(WINDOWS, key=lambda w: abs(log(w / scale))) for scale in scales})
    return Regression("har", [f"log_rv_{window}" for window in windows])


def har_time_of_day() -> Regression:
    """Variance over all windows and a dummy for each time of day."""
    return Regression("har_tod", [f"log_rv_{w}" for w in WINDOWS], time_of_day=True)


def har_extended() -> Regression:
    """The extended HAR: every input that the network has, and a dummy for each time of day."""
    return Regression("har_extended", FEATURE_NAMES, time_of_day=True)


def linear() -> Regression:
    return Regression("linear", FEATURE_NAMES)


# ---- boosted trees ----


class Trees:
    """XGBoost on the network's inputs, stopped early on the validation part.

    For a volatility two objectives are fitted, squared error of the log and gamma deviance (which
    is twice QLIKE), and the one with the lower validation QLIKE is kept.
    """

    name = "xgboost"

    def __init__(self, rounds: int = 1500, threads: int = 0, seed: int = 0) -> None:
        self.rounds, self.seed = rounds, seed
        self._booster: Any = None
        self._rounds = 0
        self.threads = threads or len(os.sched_getaffinity(0))

    def fit(self, panel: Panel, part: Part) -> None:
        fit, rows = self._matrix(panel, part.fit)
        valid, _ = self._matrix(panel, part.valid, fit)
        self._centre = float(panel.y[rows].mean()) if panel.target.kind == "volatility" else 0.0
        grown = []
        for objective in _OBJECTIVES[panel.target.kind]:
            self._grow(panel, objective, (fit, rows), self.rounds, (valid, part.valid))
            said = self._validation_loss(panel, part.valid)
            grown.append((said, objective, self._rounds, self._booster))
        _, self.objective, self._rounds, self._booster = min(grown, key=lambda each: each[0])

    def finish(self, panel: Panel, part: Part) -> None:
        """Grown anew on all rows, with the objective and as many rounds as were best."""
        self._grow(panel, self.objective, self._matrix(panel, part.train), self._rounds)

    def _matrix(self, panel: Panel, rows: Ints, like: Any = None) -> tuple[Any, Ints]:
        import xgboost

        rows = rows[:: -(-len(rows) // MAX_TREE_ROWS)]
        return xgboost.QuantileDMatrix(panel.x[rows], nthread=self.threads, ref=like), rows

    def _grow(
        self,
        panel: Panel,
        objective: str,
        data: tuple[Any, Ints],
        rounds: int,
        judge: tuple[Any, Ints] | None = None,
    ) -> None:
        import xgboost

        for matrix, rows in (data, judge) if judge else (data,):
            y = panel.y[rows] - self._centre
            matrix.set_label(np.exp(y) if objective == _GAMMA else y)
        self.objective, self._rounds = objective, rounds
        leaf = min(_LEAF_PERIODS * panel.target.horizon, len(data[1]) / 100)
        self._booster = xgboost.train(
            _TREES
            | {"objective": objective, "min_child_weight": leaf}
            | {"seed": self.seed, "nthread": self.threads},
            data[0],
            rounds,
            evals=[(judge[0], "validation")] if judge else [],
            early_stopping_rounds=_PATIENCE_ROUNDS if judge else None,
            verbose_eval=False,
        )
        if judge:
            self._rounds = self._booster.best_iteration + 1

    def predict(self, panel: Panel, rows: Ints) -> Floats:
        span = (0, self._rounds)
        parts = [
            self._booster.inplace_predict(panel.x[rows[at : at + CHUNK_ROWS]], iteration_range=span)
            for at in range(0, len(rows), CHUNK_ROWS)
        ]
        values = np.concatenate(parts).astype(np.float64) if parts else np.empty(0)
        if self.objective == _GAMMA:
            values = np.log(np.maximum(values, 1e-12))
        return values + self._centre

    def _validation_loss(self, panel: Panel, rows: Ints) -> float:
        values, y = self.predict(panel, rows), panel.y[rows]
        if panel.target.kind == "volatility":
            values = values + expected_variance(values, y)
        return float(loss(panel.target, values, y).mean())


_GAMMA: Final = "reg:gamma"
_PATIENCE_ROUNDS: Final = 50
_LEAF_PERIODS: Final = 20
"""Horizons in a leaf at least: so many of its labels do not overlap."""
_TREES: Final = {
    "eta": 0.03,
    "max_depth": 5,
    "subsample": 0.5,
    "colsample_bynode": 0.3,
    "tree_method": "hist",
}
_OBJECTIVES: Final = {
    "volatility": ("reg:squarederror", _GAMMA),
    "return": ("reg:squarederror",),
    "direction": ("binary:logistic",),
}


# ---- what a return or a direction is held against ----


class Majority(Finished):
    """The base rate of the training part: always the more frequent class."""

    name = "majority"

    def fit(self, panel: Panel, part: Part) -> None:
        self._rate = float(panel.y[part.train].mean())

    def predict(self, panel: Panel, rows: Ints) -> Floats:
        return np.full(len(rows), self._rate)


class OppositeOfLastBar(Finished):
    """A fall after a rise and a rise after a fall, as likely as that was on the training part.

    Where falls are likelier after either, its probabilities say what the majority says: whether
    the rule itself is right is told by `right`.
    """

    name = "opposite_of_last_bar"

    def fit(self, panel: Panel, part: Part) -> None:
        last = self._last(panel, part.train)
        rose = panel.y[part.train]
        base = float(rose.mean())
        self._rates = {
            s: float(rose[last == s].mean()) if (last == s).any() else base for s in (-1, 0, 1)
        }

    def predict(self, panel: Panel, rows: Ints) -> Floats:
        last = self._last(panel, rows)
        return np.select([last == s for s in self._rates], list(self._rates.values()))

    @classmethod
    def right(cls, panel: Panel, rows: Ints, values: Floats) -> NDArray[np.bool_]:
        """[n] whether the opposite of the last bar came; `values` decide where that did not move."""
        last = cls._last(panel, rows)
        says = np.where(last == 0, values > 0.5, last < 0)
        return np.asarray(says == (panel.y[rows] > 0.5))

    @staticmethod
    def _last(panel: Panel, rows: Ints) -> Floats:
        """Of its return; 0 too for a bar that opens a session."""
        return np.sign(np.nan_to_num(_by_symbol(panel, rows, lambda h: _returns(h, panel.spec)[0])))


class Zero(Finished):
    name = "zero"

    def fit(self, panel: Panel, part: Part) -> None:
        pass

    def predict(self, panel: Panel, rows: Ints) -> Floats:
        return np.zeros(len(rows))


def rivals(panel: Panel, rounds: int = 1500, threads: int = 0) -> list[Forecaster]:
    """All that are fitted for the panel's target, the network's own line excepted."""
    trees = Trees(rounds, threads)
    if panel.target.kind == "volatility":
        regressions = [har(panel), har_time_of_day(), har_extended(), linear()]
        return [LastValue(), Ewma(), Garch(), *regressions, trees]
    if panel.target.kind == "direction":
        return [Majority(), OppositeOfLastBar(), linear(), trees]
    return [Zero(), linear(), trees]


def _floor(panel: Panel, part: Part) -> float:
    """1 % of the training labels are below it; a price that has not moved forecasts no less."""
    return float(np.quantile(panel.y[part.train], 0.01))


def _by_symbol(panel: Panel, rows: Ints, values: Callable[[History], Floats]) -> Floats:
    parts = [values(panel.histories[i])[own] for i, own in rows_by_symbol(panel, rows)]
    return np.concatenate(parts) if parts else np.empty(0)


def _returns(history: History, spec: FeatureSpec) -> tuple[Floats, Ints]:
    """Log return on the bar before, NaN over breaks and resets; and steps since it (0 over those)."""
    steps: Ints = _steps(history.ts, spec.interval_ms, spec.max_fill, spec.closes)
    steps[history.since_reset == 1] = 0
    r = np.diff(np.log(history.ohlcv[:, 3]), prepend=np.nan)
    return np.where(steps > 0, r, np.nan), steps


def _trailing_variance(history: History, panel: Panel) -> Floats:
    r, steps = _returns(history, panel.spec)
    total = np.append(0.0, np.cumsum(np.nan_to_num(r) ** 2))
    step = np.cumsum(steps)
    start = np.searchsorted(step, step - panel.target.horizon, side="right")
    mean = np.maximum(total[1:] - total[start], 0.0) / panel.target.horizon
    return np.asarray(np.log(np.maximum(mean, 1e-300)))


def _sigmoid(z: Floats) -> Floats:
    return np.asarray(1 / (1 + np.exp(-np.clip(z, -40, 40))))


@njit(cache=True)
def _steps(ts, interval_ms, max_fill, closes):  # type: ignore[no-untyped-def]
    steps = np.zeros(ts.size, np.int64)
    for i in range(1, ts.size):
        steps[i] = market_steps(ts[i - 1], ts[i], interval_ms, max_fill, closes)
    return steps


@njit(cache=True)
def _garch_loss(squares, level, alpha, beta):  # type: ignore[no-untyped-def]
    variance, total = 1.0, 0.0
    for square in squares:
        total += np.log(variance) + square / variance
        variance = level * (1 - alpha - beta) + alpha * square + beta * variance
    return total / squares.size


@njit(cache=True)
def _garch_forecasts(r, level, alpha, beta, horizon):  # type: ignore[no-untyped-def]
    """Log of the mean variance of the next `horizon` steps after each bar.

    A negative level: the mean square of the returns so far.
    """
    out = np.empty(r.size)
    persistence = min(alpha + beta, 0.99999)
    fade = (1 - persistence**horizon) / (horizon * (1 - persistence))
    variance, total, n = max(level, 0.0), 0.0, 0
    for i in range(r.size):
        if not np.isnan(r[i]):
            total += r[i] * r[i]
            n += 1
            here = level if level > 0 else total / n
            variance = variance if variance > 0 else here
            variance = here * (1 - persistence) + alpha * r[i] * r[i] + beta * variance
        here = level if level > 0 else total / max(n, 1)
        out[i] = np.log(max(here + (variance - here) * fade, 1e-14))
    return out
