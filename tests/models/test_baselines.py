"""The frozen references give the same numbers live and in history, and follow the gap rules."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from models.baselines import (
    CORRECTED,
    HALF_LIVES_BARS,
    Reference,
    Variances,
    fit_reference,
    history,
)
from models.features import DUPLICATE, LATE, OK, RESET, FeatureSpec
from models.targets import Target

MINUTE_MS = 60_000
SPEC = FeatureSpec(interval_ms=MINUTE_MS, max_fill=3)

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def closes(n: int, seed: int = 0, sd: float = 1e-3) -> Floats:
    return np.asarray(100 * np.exp(np.cumsum(np.random.default_rng(seed).normal(0, sd, n))))


def minutes(n: int) -> Ints:
    return np.arange(n, dtype=np.int64) * MINUTE_MS


def feed(variances: Variances, ts: list[int], close: list[float]) -> list[int]:
    slots = np.zeros(len(ts), np.int64)
    return [int(status) for status in variances.update(slots, np.array(ts), np.array(close))]


def test_it_is_the_weighted_mean_of_past_squared_returns() -> None:
    close, ts = closes(200), minutes(200)
    log_variances = history(SPEC, ts, close)
    squared = np.diff(np.log(close)) ** 2
    for column, half_life in enumerate(HALF_LIVES_BARS):
        weights = 2.0 ** (-np.arange(199)[::-1] / half_life)
        expected = np.log(np.average(squared, weights=weights))
        assert log_variances[-1, column] == pytest.approx(expected, abs=1e-5)


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 2), st.sampled_from([1, 1, 2, 4, 5, 600])), max_size=60),
    st.integers(0, 60),
)
def test_a_stream_of_many_symbols_equals_their_histories(
    bars: list[tuple[int, int]], cut: int
) -> None:
    slots = np.array([slot for slot, _ in bars], np.int64)
    ts = np.cumsum([step * MINUTE_MS for _, step in bars], dtype=np.int64)
    close = closes(len(bars))
    stream = Variances(SPEC, depth=64)
    stream.grow(3)
    for part in (slice(None, cut), slice(cut, None)):
        stream.update(slots[part], ts[part], close[part])
    for slot in range(3):
        own = slots == slot
        np.testing.assert_array_equal(
            stream.at(slots[own], ts[own]), history(SPEC, ts[own], close[own])
        )


def test_nothing_is_known_before_the_first_return() -> None:
    assert np.isnan(history(SPEC, minutes(1), closes(1))).all()


def test_a_later_bar_changes_nothing_that_was_said() -> None:
    close = closes(50)
    changed = close.copy()
    changed[30:] *= 3
    said, again = (history(SPEC, minutes(50), c) for c in (close, changed))
    np.testing.assert_array_equal(said[:30], again[:30])


def test_absent_bars_count_as_zero_returns_and_a_session_break_not_at_all() -> None:
    filled = history(SPEC, minutes(5), np.array([100.0, 101.0, 101.0, 101.0, 102.0]))
    gap = history(SPEC, minutes(5)[[0, 1, 4]], np.array([100.0, 101.0, 102.0]))
    np.testing.assert_array_equal(gap[-1], filled[-1])
    night = np.array([0, MINUTE_MS, 600 * MINUTE_MS])
    over_night = history(SPEC, night, np.array([100.0, 101.0, 150.0]))
    np.testing.assert_array_equal(over_night[2], over_night[1])


def test_a_long_silence_starts_anew() -> None:
    ts = np.array([0, MINUTE_MS, MINUTE_MS + SPEC.reset_after_ms + 1])
    assert np.isnan(history(SPEC, ts, closes(3))[2]).all()


def test_repeated_late_and_corrected_bars_are_told_apart_and_change_nothing() -> None:
    variances = Variances(SPEC, depth=8, capacity=1)
    assert feed(variances, [0, MINUTE_MS], [100.0, 101.0]) == [RESET, OK]
    before = variances.at(np.array([0]), np.array([MINUTE_MS]))
    statuses = feed(variances, [MINUTE_MS, MINUTE_MS, 0], [101.0, 105.0, 100.0])
    assert statuses == [DUPLICATE, CORRECTED, LATE]
    np.testing.assert_array_equal(variances.at(np.array([0]), np.array([MINUTE_MS])), before)


def test_only_the_last_bars_can_be_looked_up() -> None:
    variances = Variances(SPEC, depth=4, capacity=1)
    feed(variances, minutes(10).tolist(), closes(10).tolist())
    known = np.isfinite(variances.at(np.zeros(10, np.int64), minutes(10))[:, 0])
    assert known.tolist() == [False] * 6 + [True] * 4
    assert np.isnan(variances.at(np.array([0]), np.array([MINUTE_MS * 8 + 1]))).all()


def test_exported_state_goes_on_in_other_slots() -> None:
    one, other = Variances(SPEC, depth=8, capacity=1), Variances(SPEC, depth=8, capacity=5)
    ts, close = minutes(20), closes(20)
    feed(one, ts[:10].tolist(), close[:10].tolist())
    other.load(np.array([3]), one.export(np.array([0])))
    feed(one, ts[10:].tolist(), close[10:].tolist())
    other.update(np.full(10, 3), ts[10:], close[10:])
    np.testing.assert_array_equal(
        one.at(np.zeros(8, np.int64), ts[-8:]), other.at(np.full(8, 3), ts[-8:])
    )
    other.reset(np.array([3]))
    assert np.isnan(other.at(np.array([3]), ts[-1:])).all()


def test_a_price_that_never_moves_has_a_finite_log_variance() -> None:
    assert np.isfinite(history(SPEC, minutes(5), np.full(5, 7.0))[1:]).all()


def test_the_half_life_that_made_the_data_is_chosen() -> None:
    rng = np.random.default_rng(0)
    ts, log_variances, labels = minutes(5_000), [], []
    for seed in range(3):
        close = closes(5_000, seed)
        past = history(SPEC, ts, close)
        truth = past[:, HALF_LIVES_BARS.index(32)] + rng.normal(0, 0.05, 5_000)
        truth[:10] = np.nan
        log_variances.append(past)
        labels.append(truth)
    volatility = Target(kind="volatility", horizon=1)
    pairs = list(zip(log_variances, labels, strict=True))
    assert fit_reference(volatility, pairs).half_life_bars == 32


def test_direction_is_held_against_the_base_rate_and_return_against_zero() -> None:
    past = np.zeros((4, len(HALF_LIVES_BARS)))
    up = Target(kind="direction", horizon=1)
    reference = fit_reference(up, [(past, np.array([1.0, 1.0, 0.0, np.nan]))])
    assert reference.forecast(up, past) == pytest.approx([2 / 3] * 4)
    three = Target(kind="direction", horizon=1, classes=3)
    assert fit_reference(three, [(past, np.array([2.0, 1.0, 0.0, 1.0]))]).base_rate == 0.25
    returns = Target(kind="return", horizon=1)
    assert Reference().forecast(returns, past).tolist() == [0.0] * 4


def test_no_label_at_all_is_refused() -> None:
    nothing = [(np.zeros((2, len(HALF_LIVES_BARS))), np.full(2, np.nan))]
    with pytest.raises(ValueError, match="no training label"):
        fit_reference(Target(kind="volatility", horizon=1), nothing)
