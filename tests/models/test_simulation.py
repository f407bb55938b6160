import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pydantic import ValidationError

from models.simulation import Break, Scenario, SimulatedBars, Simulator, session_pattern

MINUTE = 60_000
DAY = 86_400_000
OPEN = 1_514_903_400_000


def sessions(days: int, bars: int = 390) -> NDArray[np.int64]:
    return (OPEN + DAY * np.arange(days)[:, None] + MINUTE * np.arange(bars)).ravel()


def run(scenario: Scenario, ts: NDArray[np.int64], seed: int = 7) -> SimulatedBars:
    return Simulator(scenario, seed).run(ts)


def bar_returns(bars: SimulatedBars) -> NDArray[np.float64]:
    return np.asarray(np.log(bars.ohlcv[..., 3] / bars.ohlcv[..., 0]))


@given(cut=st.integers(0, 1_400), seed=st.integers(0, 2**32))
@settings(max_examples=5, deadline=None)
def test_the_bars_are_the_same_in_however_many_calls_they_are_asked_for(
    cut: int, seed: int
) -> None:
    scenario = Scenario(symbols=3, breaks=(Break(at_ts=OPEN + DAY, variance_factor=4),))
    ts = sessions(3)
    whole = run(scenario, ts, seed)
    simulator = Simulator(scenario, seed)
    cut = min(cut, len(ts))
    first, second = simulator.run(ts[:cut]), simulator.run(ts[cut:])
    np.testing.assert_array_equal(whole.ohlcv, np.concatenate([first.ohlcv, second.ohlcv]))
    np.testing.assert_array_equal(whole.variance, np.concatenate([first.variance, second.variance]))


def test_another_seed_gives_other_bars() -> None:
    scenario, ts = Scenario(symbols=2), sessions(1)
    assert not np.array_equal(run(scenario, ts, 1).ohlcv, run(scenario, ts, 2).ohlcv)


@pytest.mark.parametrize("annual_volatility", [0.001, 0.15, 20.0])
def test_every_bar_is_possible_however_wild_the_market(annual_volatility: float) -> None:
    bars = run(Scenario(symbols=20, annual_volatility=annual_volatility), sessions(2))
    open_, high, low, close, volume = np.moveaxis(bars.ohlcv, -1, 0)
    assert np.isfinite(bars.ohlcv).all()
    assert (low > 0).all()
    assert (low <= np.minimum(open_, close)).all()
    assert (high >= np.maximum(open_, close)).all()
    assert (volume >= 0).all()


def test_returns_have_the_variance_that_is_told_and_fat_tails() -> None:
    bars = run(Scenario(symbols=100, annual_volatility=0.5), sessions(5))
    z = bar_returns(bars) / np.sqrt(bars.variance)
    assert np.mean(z**2) == pytest.approx(1, abs=0.03)
    assert abs(np.mean(z)) < 0.01
    assert np.mean(np.abs(z) > 4) > 10 * 6.3e-5, "a normal return is beyond 4 sd 6.3 times in 1e5"


def test_the_told_variance_is_garch_around_the_asked_level() -> None:
    scenario = Scenario(symbols=200, annual_volatility=0.2)
    variance = run(scenario, sessions(5)).variance
    annual = np.sqrt(np.median(variance.mean(axis=0)) * 252 * 390)
    assert annual == pytest.approx(0.2, rel=0.15)
    pattern = session_pattern(390)
    h = variance.reshape(5, 390, 200) / pattern[:, None]
    logs = np.log(h.reshape(-1, 200))
    logs -= logs.mean(axis=0)
    persistence = (logs[30:] * logs[:-30]).mean() / (logs**2).mean()
    assert 0.5 < persistence < 0.95


def test_the_open_is_wilder_than_noon_and_the_pattern_has_mean_one() -> None:
    pattern = session_pattern(390)
    assert pattern.mean() == pytest.approx(1)
    assert pattern[0] > 3 * pattern[195]
    assert pattern[-1] > pattern[195]


def test_symbols_move_together_as_much_as_asked() -> None:
    bars = run(Scenario(symbols=40, correlation=0.5, annual_volatility=1.0), sessions(3))
    signs = np.sign(bar_returns(bars))
    concordance = (signs.T @ signs / len(signs))[np.triu_indices(40, 1)].mean()
    assert concordance == pytest.approx(2 / np.pi * np.arcsin(0.5), abs=0.04)


def test_a_break_multiplies_the_variance_from_its_bar_on_and_not_before() -> None:
    at = OPEN + DAY
    calm = run(Scenario(symbols=20), sessions(3))
    broken = run(Scenario(symbols=20, breaks=(Break(at_ts=at, variance_factor=9),)), sessions(3))
    before = calm.ts < at
    np.testing.assert_array_equal(calm.ohlcv[before], broken.ohlcv[before])
    ratio = broken.variance[~before] / calm.variance[~before]
    np.testing.assert_allclose(ratio, 9, rtol=1e-2)


def test_a_break_may_turn_the_session_upside_down_without_moving_its_mean() -> None:
    turned = Break(at_ts=OPEN + DAY, pattern_power=-1)
    variance = run(Scenario(symbols=50, breaks=(turned,)), sessions(2)).variance.mean(axis=1)
    before, after = variance[:390], variance[390:]
    assert before[0] > 3 * before[195]
    assert after[195] > 3 * after[0]
    calm = run(Scenario(symbols=50), sessions(2)).variance.mean(axis=1)[390:]
    h = after / (1 / session_pattern(390) / np.mean(1 / session_pattern(390)))
    assert np.median(h / (calm / session_pattern(390))) == pytest.approx(1, abs=0.1)


def test_symbols_may_be_numbered_from_anywhere() -> None:
    assert Scenario(symbols=2, first=901).names == ["SIM0901", "SIM0902"]


def test_the_night_moves_prices_and_a_missing_minute_does_not() -> None:
    ts = np.delete(sessions(2), 100)
    bars = run(Scenario(symbols=100), ts)
    jump = np.log(bars.ohlcv[1:, :, 0] / bars.ohlcv[:-1, :, 3])
    quiet = np.delete(np.arange(len(jump)), 388)
    assert np.abs(jump[388]).mean() > 1e-4
    assert (jump[quiet] == 0).all()


def test_symbols_are_labelled_as_simulated_and_the_frame_is_in_event_time_order() -> None:
    frame = run(Scenario(symbols=3), sessions(1, bars=2)).frame()
    assert frame["symbol"].tolist() == ["SIM0001", "SIM0002", "SIM0003"] * 2
    assert frame["ts"].is_monotonic_increasing
    assert list(frame) == ["symbol", "ts", "open", "high", "low", "close", "volume"]


def test_no_times_give_no_bars() -> None:
    assert len(run(Scenario(symbols=2), np.array([], dtype=np.int64)).frame()) == 0


def test_times_that_do_not_ascend_are_refused_also_between_calls() -> None:
    simulator = Simulator(Scenario(), 1)
    simulator.run(np.array([OPEN, OPEN + MINUTE]))
    for ts in ([OPEN + MINUTE], [OPEN + 3 * MINUTE, OPEN + 2 * MINUTE]):
        with pytest.raises(ValueError, match="ascend"):
            simulator.run(np.array(ts))


def test_a_market_without_a_long_run_level_is_refused() -> None:
    with pytest.raises(ValidationError, match="alpha \\+ beta"):
        Scenario(alpha=0.2, beta=0.8)
