"""The simulations behind the alarm's and the promotion's figures do what they say they simulate."""

import numpy as np
import pytest
from scipy.optimize import brentq  # type: ignore[import-untyped]

from models.baselines import HALF_LIVES_BARS, history
from models.comparison import Rule
from models.drift import Calibration
from models.scoring import loss
from models.simulation import Simulator
from models.targets import Target, labels
from workers.bench import monitor_arl, promotion

RULE = Rule(alpha=0.05, max_bars=3_000)


def test_a_far_better_challenger_is_promoted_and_its_mirror_refused_before_the_end() -> None:
    rng = np.random.default_rng(0)
    better = promotion.compare(RULE, rng, 1.0, 0.2, symbols=20)
    worse = promotion.compare(RULE, rng, 0.2, 1.0, symbols=20)
    assert (better.verdict, worse.verdict) == ("promote", "refuse")
    assert max(better.bars, worse.bars) < RULE.max_bars


def test_the_error_that_is_solved_for_has_the_loss_that_was_asked_for() -> None:
    rng = np.random.default_rng(1)
    target = promotion.TARGET
    known = promotion._loss_of_knowing(rng)
    y = promotion.realised(rng, 20_000, 4)
    base, less = (
        loss(target, promotion._sd_for(known, f) * promotion.errors(rng, *y.shape), y)
        for f in (1.0, 0.8)
    )
    assert less.mean() / base.mean() == pytest.approx(0.8, abs=0.06)


def test_the_perfect_champion_forecasts_the_mean_of_what_comes() -> None:
    r2, variance = monitor_arl._market(0, 30_000, 20)
    said = monitor_arl.expected_log_variance(variance, np.ones(20), 5)[:-5]
    y = monitor_arl.log_realised(r2, 5)[: len(said)]
    assert np.exp(y - said[: len(y)]).mean() == pytest.approx(1.0, abs=0.03)


def test_the_simulated_variances_are_what_the_product_keeps_of_the_same_bars() -> None:
    bars = Simulator(monitor_arl.STATIONARY, 0).run(60_000 * np.arange(3_000))
    spec, close = monitor_arl.SPEC, np.ascontiguousarray(bars.ohlcv[:, 0, 3])
    r2 = np.append(0.0, np.diff(np.log(close)) ** 2)[:, None]
    decays = np.exp2(-1.0 / np.array(HALF_LIVES_BARS))
    quick = monitor_arl._log_variances(r2, decays)[2_900:, 0, :3]
    assert quick == pytest.approx(history(spec, bars.ts, close)[2_900:, :3], abs=1e-5)
    target = Target(kind="volatility", horizon=5)
    y = labels((target,), spec, bars.ts, bars.ohlcv[:, 0])[:-5, 0]
    assert monitor_arl.log_realised(r2, 5)[:, 0] == pytest.approx(y, abs=1e-6)


HORIZON = 5


def make_watched(calm: float) -> monitor_arl.Watched:
    """What is watched is `calm` at every bar; both forecasters know the variance, which is 1."""
    calibration = Calibration(
        mean=0.0, sd=1.0, correlation=1.0, threshold=3.5, arl0_bars=10, block_bars=1, n=10
    )
    n = monitor_arl.BEFORE_BARS + monitor_arl.LONGEST_BARS + HORIZON
    watched = np.full((n, 1), calm)
    return monitor_arl.Watched(calibration, watched, np.ones((n, 1)), np.zeros((n, 1, 2)))


def test_alarms_are_counted_over_the_bars_that_were_watched() -> None:
    # 0.75 a bar: an alarm at every fifth bar that is looked at, then twenty bars of none.
    assert monitor_arl.measured_arl0([make_watched(1.0)], quiet=20) == pytest.approx(5.0)


def test_a_delay_counts_from_the_first_biased_forecast() -> None:
    # exp(b) - 1 - b = 2.5 is lost by a forecast that is biased: 0.5 more with each of five bars.
    bias = float(np.exp(brentq(lambda b: np.exp(b) - 1 - b - 2.5, 0, 3) / 2))
    # 0.25, 1.0, 2.25, 4.0: what is above the slack adds up beyond 3.5 at the fourth.
    assert monitor_arl.delay_bars([make_watched(0.0)], bias, HORIZON) == 4.0
