"""Does the alarm keep its word? False alarms against the declared rate, and the delay of true ones.

Markets are simulated (GARCH with fat tails), so that nothing changes in them unless it is made to;
champions are perfect (they know the process, not the future) or trained. A champion is calibrated on
bars before those on which it is watched, as in life. How often one of them alarms depends on the
error of its calibration's mean, so there are many of each kind: series are made and watched by
compiled loops.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from models.baselines import HALF_LIVES_BARS, fit_reference
from models.dataset import histories, load_bars
from models.drift import Calibration, alarms_in, calibrate
from models.evidence import score, watched
from models.features import FeatureSpec
from models.pipeline import Recipe, fit_bundle, forecast
from models.running_loss import RunningLosses
from models.simulation import Break, Scenario, Simulator
from models.splits import Span
from models.targets import Target
from models.training import TrainingConfig
from workers.config import MonitorSettings

Floats = NDArray[np.float64]

ARL0_BARS = 5_000
OVER_BARS = MonitorSettings().cool_down_bars
"""An alarm is over, and the next one is another, after so many bars. Storms last: whoever starts a
detector anew while the storm goes on that has just set it off counts one alarm many times."""
HORIZONS = (1, 5, 30)
SESSION_BARS, DAY_MS, MINUTE_MS = 390, 86_400_000, 60_000
FIRST_TS = 1_514_903_400_000
SPEC = FeatureSpec(interval_ms=MINUTE_MS)
MARKETS, POOLS, POOLED_SYMBOLS = 60, 20, 12
CALIBRATED_BARS, WATCHED_BARS, WARMING_BARS = 20_000, 100_000, 2_000
"""Of each market; before them, bars on which it comes to its long-run state."""
TRAINED_BARS, LIVES, LIFE_BARS = 24_000, 10, 60_000
"""A trained champion, and how often it is calibrated and watched, each time on another market."""
STATIONARY = Scenario(breaks=(Break(at_ts=0, pattern_power=0.0),), correlation=0.0)
"""Without the session pattern, which comes back every day and is not stationary."""
CORRELATION = 0.3
"""Of pooled symbols."""
BIASES = (1.5, 1.2)
"""Volatility forecast so many times too low."""
ONSETS, BEFORE_BARS, LONGEST_BARS = 12, 1_000, 2_000
"""Beginnings of a bias tried in each series, bars watched before each, and after it at most."""
SMALL = Recipe(
    network={"hidden": 32, "layers": 1, "window": 30},
    training=TrainingConfig(epochs=3, patience=3),
    arl0_bars=ARL0_BARS,
)


@dataclass(frozen=True)
class Watched:
    """One champion: its calibration, and the differences f64[n, symbols] on which it is watched."""

    calibration: Calibration
    differences: Floats
    r2: Floats
    said: Floats
    """Squared returns f64[n, symbols], and what champion and reference said f64[n, symbols, 2] at the
    close of these bars; empty where no bias is tried."""


def run(seeds: int = 2, *, say: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """`measured_arl0`: bars watched per alarm, over all champions of a row.

    Beside it what two causes make of it: `mean_known` with the calibration's mean replaced by that
    of all champions' bars (what is left is the threshold's own error), and `restarted_at_once` where
    an alarm is over two horizons later.
    """
    rows: list[dict[str, Any]] = []
    delays: list[dict[str, Any]] = []

    def show(symbols: int, forecaster: str, horizon: int, watched: Sequence[Watched]) -> None:
        what = {"stream": f"GARCH t5, {symbols} symbol(s), {horizon} bars ahead"}
        rows.append({**what, "forecaster": forecaster, **measured(watched, horizon)})
        if watched[0].said.size:
            biases = {f"{b}x": delay_bars(watched, b, horizon) for b in BIASES}
            delays.append({**what, **biases})

    for symbols, n in ((1, MARKETS), (POOLED_SYMBOLS, POOLS)):
        for horizon in HORIZONS:
            say(f"{n} perfect champions, {symbols} symbol(s), {horizon} bars ahead")
            show(symbols, "perfect", horizon, [perfect(s, symbols, horizon) for s in range(n)])
    for seed in range(seeds):
        say(f"training champion {seed + 1} of {seeds}")
    trained = [life for seed in range(seeds) for life in _trained(seed, HORIZONS[-1])]
    if trained:
        show(1, "trained", HORIZONS[-1], trained)
    return {
        "rows": rows,
        "delay_bars_1_5x": float(np.median([row["1.5x"] for row in delays])),
        "delay_bars_1_2x": float(np.median([row["1.2x"] for row in delays])),
        "delays": delays,
    }


def measured(watched: Sequence[Watched], horizon: int) -> dict[str, Any]:
    mean = float(np.mean([np.nanmean(w.differences) for w in watched]))
    informed = [
        replace(w, calibration=w.calibration.model_copy(update={"mean": mean})) for w in watched
    ]
    alarms, bars = _counts(watched, OVER_BARS)
    rates = np.array([alarms, bars], float)
    rng = np.random.default_rng(0)
    again = rng.integers(0, len(watched), (1_000, len(watched)))
    spread = np.std(rates[1][again].sum(axis=1) / np.maximum(rates[0][again].sum(axis=1), 1))
    return {
        "declared_arl0": ARL0_BARS,
        "measured_arl0": round(sum(bars) / max(sum(alarms), 1)),
        "standard_error": round(float(spread)),
        "mean_known": round(measured_arl0(informed, OVER_BARS)),
        "restarted_at_once": round(measured_arl0(watched, 2 * horizon)),
        "champions": len(watched),
        "alarms": sum(alarms),
    }


def measured_arl0(watched: Sequence[Watched], quiet: int) -> float:
    """Bars watched per alarm; after each alarm the detector starts anew `quiet` bars later."""
    alarms, bars = _counts(watched, quiet)
    return sum(bars) / max(sum(alarms), 1)


def _counts(watched: Sequence[Watched], quiet: int) -> tuple[list[int], list[int]]:
    """Alarms and bars watched of each champion."""
    alarms, bars = [], []
    for champion in watched:
        z = pooled_of(champion.calibration, champion.differences)
        found = _alarms(champion, z, quiet)
        alarms.append(len(found))
        bars.append(len(z) - int(np.minimum(quiet, len(z) - 1 - found).sum()))
    return alarms, bars


def _alarms(champion: Watched, z: Floats, quiet: int) -> NDArray[np.int64]:
    calibration = champion.calibration
    return alarms_in("cusum", z, calibration.threshold, calibration.slack, quiet)


def delay_bars(watched: Sequence[Watched], bias: float, horizon: int) -> float:
    """Median bars from the first biased forecast to the alarm, where there was none just before."""
    delays = []
    for champion in watched:
        last = len(champion.said) - LONGEST_BARS
        for onset in np.linspace(BEFORE_BARS + horizon, last, ONSETS).astype(int).tolist():
            some = slice(onset - BEFORE_BARS - horizon, onset + LONGEST_BARS)
            said = champion.said[some].copy()
            said[BEFORE_BARS + horizon :, :, 0] -= 2 * np.log(bias)
            z = pooled_of(champion.calibration, differences(horizon, champion.r2[some], said))
            first = (*_alarms(champion, z, len(z)).tolist(), len(z))[0]
            if first > BEFORE_BARS:  # the first `horizon` bars have no difference
                delays.append(min(first - BEFORE_BARS, LONGEST_BARS))
    return float(np.median(delays))


def pooled_of(calibration: Calibration, differences: Floats) -> Floats:
    """The series that the monitor watches, f64[n], from differences f64[n, symbols]."""
    present = np.isfinite(differences)
    differences = differences[present.any(axis=1)]
    n = np.isfinite(differences).sum(axis=1)
    return calibration.pool(np.nanmean(calibration.standardise(differences), axis=1), n)


def perfect(seed: int, symbols: int, horizon: int) -> Watched:
    """Who forecasts the expected variance itself, in a market of its own."""
    target = Target(kind="volatility", horizon=horizon)
    n = CALIBRATED_BARS + (WATCHED_BARS if symbols == 1 else WATCHED_BARS // 2)
    r2, variance = _market(seed, n + WARMING_BARS + horizon, symbols)
    past = _log_variances(r2, np.exp2(-1.0 / np.array(HALF_LIVES_BARS)))
    y = log_realised(r2, horizon)
    said = expected_log_variance(variance, np.ones(symbols), horizon)
    at = slice(WARMING_BARS, WARMING_BARS + n)
    past, y, said = past[at], y[at], said[at]
    known = [(past[:CALIBRATED_BARS, s], y[:CALIBRATED_BARS, s]) for s in range(symbols)]
    reference = fit_reference(target, known)
    flat = reference.forecast(target, past.reshape(-1, past.shape[2])).reshape(y.shape)
    both = np.stack([said, flat], axis=2)
    r2 = r2[at]
    watched = differences(horizon, r2, both)
    calibration = calibrate(
        watched[:CALIBRATED_BARS], horizon, ARL0_BARS, seed=0, pair_bars=horizon
    )
    some = slice(CALIBRATED_BARS, CALIBRATED_BARS + 30_000)
    return Watched(calibration, watched[CALIBRATED_BARS:], r2[some], both[some])


def differences(horizon: int, r2: Floats, said: Floats) -> Floats:
    """Running losses of champion less reference f64[n, S], NaN in the first rows; as `running`."""
    losses = running(horizon, r2, said)
    return np.asarray(losses[:, :, 0] - losses[:, :, 1])


def running(horizon: int, r2: Floats, said: Floats) -> Floats:
    """Running losses f64[n, S, 2] of a forecaster and the reference, NaN in the first rows.

    r2 f64[n, S] is each bar's squared return, said f64[n, S, 2] what both say at its close.
    """
    n, symbols = r2.shape
    losses = RunningLosses(Target(kind="volatility", horizon=horizon), SPEC, symbols)
    ts = FIRST_TS + MINUTE_MS * np.repeat(np.arange(n - 1), symbols)
    slots = np.tile(np.arange(symbols), n - 1)
    before, r2 = said[:-1].reshape(-1, 2), np.ascontiguousarray(r2[1:]).ravel()
    found = np.full((n, symbols, 2), np.nan)
    found[1:] = losses.update(slots, ts, ts + MINUTE_MS, r2, np.ascontiguousarray(before)).reshape(
        n - 1, symbols, 2
    )
    return found


def log_realised(r2: Floats, horizon: int) -> Floats:
    """Labels f64[n - horizon, S]: log of the mean of the next `horizon` squared returns."""
    sums = np.cumsum(np.vstack([np.zeros((1, r2.shape[1])), r2]), axis=0)
    return np.asarray(np.log(np.maximum((sums[horizon:] - sums[:-horizon])[1:], 1e-300) / horizon))


def expected_log_variance(variance: Floats, long_run: Floats, horizon: int) -> Floats:
    """Log of the mean variance of the next `horizon` bars given all before them, f64[n, S].

    `variance` f64[n, S] is that of each bar given all before it.
    E[h(t+k)] = long run + (alpha + beta)^(k-1) (h(t+1) - long run) (Bollerslev 1986).
    """
    following = np.append(variance[1:], variance[-1:], axis=0)
    fading = float(np.mean((STATIONARY.alpha + STATIONARY.beta) ** np.arange(horizon)))
    return np.asarray(np.log(long_run + fading * (following - long_run)))


def _market(seed: int, n: int, symbols: int) -> tuple[Floats, Floats]:
    """Squared returns and their variance before each bar f64[n, symbols], 1 in the long run.

    As `models.simulation` makes them: each symbol has its own tails, the Gaussian part is shared.
    """
    rng = np.random.default_rng((seed, symbols))
    nu, rho = STATIONARY.degrees_of_freedom, CORRELATION if symbols > 1 else 0.0
    shocks = np.sqrt(1 - rho) * rng.standard_normal((n, symbols))
    shocks += np.sqrt(rho) * rng.standard_normal((n, 1))
    shocks *= np.sqrt((nu - 2) / (2 * rng.standard_gamma(nu / 2, (n, symbols))))
    r2, variance = _garch(shocks * shocks, STATIONARY.alpha, STATIONARY.beta)
    return r2, variance


@njit(cache=True)
def _garch(squares, alpha, beta):  # type: ignore[no-untyped-def]
    variance = np.empty_like(squares)
    for s in range(squares.shape[1]):
        v = 1.0
        for t in range(len(squares)):
            variance[t, s] = v
            squares[t, s] *= v
            v = 1.0 - alpha - beta + alpha * squares[t, s] + beta * v
    return squares, variance


@njit(cache=True)
def _log_variances(r2, decays):  # type: ignore[no-untyped-def]
    """As `models.baselines.Variances` gives them once it is warm, f64[n, S, half-lives]."""
    out = np.empty((*r2.shape, len(decays)))
    held = np.ones((r2.shape[1], len(decays)))
    for t in range(len(r2)):
        for s in range(r2.shape[1]):
            for j in range(len(decays)):
                held[s, j] = decays[j] * held[s, j] + (1.0 - decays[j]) * r2[t, s]
                out[t, s, j] = np.log(held[s, j])
    return out


def _trained(seed: int, horizon: int) -> list[Watched]:
    """One champion that has learnt, and lives of it in markets that it has not seen."""
    target = Target(kind="volatility", horizon=horizon)
    known = _simulated(TRAINED_BARS, 4, 1_000 + seed)
    bundle = fit_bundle(known, (target,), spec=SPEC, recipe=SMALL, device="cpu")
    past = histories(load_bars(_simulated(LIFE_BARS, LIVES, 2_000 + seed)), SPEC, (target,))
    span = Span(int(past[0].ts[0]), int(past[0].ts[-1]) + 1)
    lives = []
    values = forecast(bundle, past, span)
    for each in watched(bundle, past, values, score(bundle, past, values)):
        own = each[np.isfinite(each[:, 0])]
        calibration = calibrate(
            own[:CALIBRATED_BARS], horizon, ARL0_BARS, seed=0, pair_bars=horizon
        )
        none = np.zeros((0, 1))
        lives.append(Watched(calibration, own[CALIBRATED_BARS:], none, none))
    return lives


def _simulated(n: int, symbols: int, seed: int) -> Any:
    days = np.arange(-(-n // SESSION_BARS))
    ts = (days[:, None] * DAY_MS + np.arange(SESSION_BARS) * MINUTE_MS).ravel()[:n] + FIRST_TS
    return Simulator(STATIONARY.model_copy(update={"symbols": symbols}), seed).run(ts).frame()
