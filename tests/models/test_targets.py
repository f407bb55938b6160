from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pydantic import ValidationError

from models.features import DAY_MS, FeatureSpec
from models.targets import Labels, Target, labels
from tests.models.builders import MINUTE_MS, make_bars

SPEC = FeatureSpec(interval_ms=5 * MINUTE_MS, timezone="America/New_York")
TARGETS = (
    Target(kind="volatility", horizon=12),
    Target(kind="volatility", horizon=1),
    Target(kind="return", horizon=12),
    Target(kind="direction", horizon=6),
    Target(kind="direction", horizon=30, classes=3),
)


def closes(*values: float) -> NDArray[np.float64]:
    close = np.array(values, dtype=np.float64)
    return np.stack([close, close, close, close, np.ones_like(close)], axis=1)


def minutes(*values: float) -> NDArray[np.int64]:
    return np.array(values, dtype=np.int64) * MINUTE_MS


def naive_labels(
    target: Target, spec: FeatureSpec, ts: NDArray[np.int64], ohlcv: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Walk forward from each bar, step by step, over the filled bars."""
    log_close = np.log(ohlcv[:, 3])
    steps = np.round(np.diff(ts) / spec.interval_ms).astype(int)
    steps[steps > spec.max_fill + 1] = 0
    r = np.where(steps > 0, np.diff(log_close), 0.0)
    sd = np.zeros(len(ts))
    decay = 0.5 ** (1 / 78)
    variance = weight = 0.0
    for i in range(1, len(ts)):
        if ts[i] - ts[i - 1] > spec.reset_after_ms:
            variance = weight = 0.0
        for step in range(steps[i - 1]):
            r2 = r[i - 1] ** 2 if step == steps[i - 1] - 1 else 0.0
            variance, weight = decay * variance + r2, decay * weight + 1
        sd[i] = np.sqrt(variance / weight) if weight else 0.0
    y = np.full(len(ts), np.nan)
    for i in range(len(ts)):
        left, total, j = target.horizon, 0.0, i
        while left > 0 and j + 1 < len(ts) and ts[j + 1] - ts[j] <= spec.reset_after_ms:
            if steps[j] <= left:
                total += r[j] ** 2
                left, j = left - steps[j], j + 1
            else:
                left = 0
        if left > 0:
            continue
        moved = log_close[j] - log_close[i]
        if target.kind == "volatility":
            y[i] = np.log(total / target.horizon) if total > 0 else np.nan
        elif target.kind == "return":
            y[i] = moved
        elif target.classes == 2:
            y[i] = moved > 0
        else:
            band = target.dead_band * sd[i] * np.sqrt(target.horizon)
            y[i] = 1 + (moved > band) - (moved < -band)
    return y


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.name)
@pytest.mark.parametrize("session_bars", [None, 78, 4])
def test_labels_agree_with_a_walk_over_the_steps(target: Target, session_bars: int | None) -> None:
    spec = SPEC.model_copy(update={"max_fill": 3})
    ts, ohlcv = make_bars(900, session_bars=session_bars, missing=0.2)
    ts[500:] += 20 * DAY_MS
    y = labels([target], spec, ts, ohlcv)[:, 0]
    np.testing.assert_allclose(y, naive_labels(target, spec, ts, ohlcv), rtol=1e-6, atol=1e-12)
    assert np.isfinite(y).mean() > 0.8


def test_a_volatility_label_is_the_log_of_the_mean_squared_return_after_the_bar() -> None:
    spec = FeatureSpec(interval_ms=MINUTE_MS)
    prices = [100.0, 101.0, 100.0, 102.0, 102.0]
    y = labels(
        [Target(kind="volatility", horizon=2)], spec, minutes(0, 1, 2, 3, 4), closes(*prices)
    )
    r = np.diff(np.log(prices))
    expected = np.log([(r[0] ** 2 + r[1] ** 2) / 2, (r[1] ** 2 + r[2] ** 2) / 2, r[2] ** 2 / 2])
    np.testing.assert_allclose(y[:3, 0], expected, rtol=1e-9)
    assert np.isnan(y[3:]).all()


def test_absent_bars_are_steps_without_a_return() -> None:
    spec = FeatureSpec(interval_ms=MINUTE_MS, max_fill=5)
    ohlcv = closes(100, 101, 103)
    targets = [Target(kind="volatility", horizon=2), Target(kind="return", horizon=2)]
    y = labels(targets, spec, minutes(0, 1, 4), ohlcv)
    assert y[0, 0] == pytest.approx(np.log(np.log(1.01) ** 2 / 2))
    assert y[0, 1] == pytest.approx(np.log(1.01))  # the second step is a filled bar
    assert np.isnan(y[1, 0])  # two filled bars: no price moved
    assert y[1, 1] == 0.0


def test_a_night_is_no_step_and_its_return_no_volatility_but_part_of_the_return() -> None:
    spec = FeatureSpec(interval_ms=MINUTE_MS, max_fill=5)
    ohlcv = closes(100, 101, 150, 151)
    targets = [Target(kind="volatility", horizon=2), Target(kind="return", horizon=2)]
    y = labels(targets, spec, minutes(0, 1, 600, 601), ohlcv)
    expected = (np.log(1.01) ** 2 + np.log(151 / 150) ** 2) / 2
    assert y[0, 0] == pytest.approx(np.log(expected))
    assert y[0, 1] == pytest.approx(np.log(1.51))


def test_a_label_is_undefined_over_a_reset() -> None:
    ts = minutes(0, 1, 2, 3) + np.array([0, 0, 11, 11]) * DAY_MS
    spec = FeatureSpec(interval_ms=MINUTE_MS)
    y = labels([Target(kind="return", horizon=1)], spec, ts, closes(100, 101, 102, 103))
    assert np.isnan(y[:, 0]).tolist() == [False, True, False, True]


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), data=st.data())
def test_labels_that_mature_in_the_stream_are_those_of_history(seed: int, data: Any) -> None:
    rng = np.random.default_rng(seed)
    slots = rng.permutation(np.repeat(np.arange(3), 150))
    ts, ohlcv = np.zeros(450, np.int64), np.zeros((450, 5))
    for slot in range(3):
        ts[slots == slot], ohlcv[slots == slot] = make_bars(150, seed=seed + slot, missing=0.2)
    stream = Labels(TARGETS, SPEC, capacity=3)
    cuts = data.draw(st.lists(st.integers(0, 450), max_size=8).map(sorted))
    found = []
    for a, b in pairwise([0, *cuts, 450]):
        matured = stream.update(slots[a:b], ts[a:b], ohlcv[a:b])
        found += list(zip(matured.slot, matured.ts, matured.target, matured.label, strict=True))
        assert (matured.matured_ts > matured.ts).all()
        assert np.isin(matured.matured_ts, ts[a:b]).all()
        if data.draw(st.booleans()):
            other = Labels(TARGETS, SPEC, capacity=3)
            other.load(np.arange(3), stream.export(np.arange(3)))
            stream = other
    expected = []
    for slot in range(3):
        rows = slots == slot
        y = labels(TARGETS, SPEC, ts[rows], ohlcv[rows])
        for i, k in zip(*np.nonzero(np.isfinite(y)), strict=True):
            expected.append((slot, ts[rows][i], k, y[i, k]))
    assert sorted(found) == sorted(expected)


@settings(max_examples=25, deadline=None)
@given(t=st.integers(1, 298), seed=st.integers(0, 50))
def test_a_label_looks_only_forward_and_only_over_its_horizon(t: int, seed: int) -> None:
    ts, ohlcv = make_bars(300, seed=seed, session_bars=None, missing=0.0)
    y = labels(TARGETS[:3], SPEC, ts, ohlcv)
    past = ohlcv.copy()
    past[:t, 3] *= 1.5
    np.testing.assert_array_equal(labels(TARGETS[:3], SPEC, ts, past)[t:], y[t:])
    future = ohlcv.copy()
    future[t + 13 :, 3] *= 1.5
    np.testing.assert_array_equal(labels(TARGETS[:3], SPEC, ts, future)[: t + 1], y[: t + 1])


def test_duplicate_and_late_bars_mature_nothing_and_have_no_label() -> None:
    ts, ohlcv = make_bars(200)
    y = labels(TARGETS, SPEC, ts, ohlcv)
    again = np.concatenate([ts[:100], ts[50:100], ts[100:]])
    z = labels(TARGETS, SPEC, again, np.concatenate([ohlcv[:100], ohlcv[50:100] * 2, ohlcv[100:]]))
    assert np.isnan(z[100:150]).all()
    np.testing.assert_array_equal(np.delete(z, np.s_[100:150], axis=0), y)


def test_forecasts_that_wait_for_ever_are_dropped_and_the_rest_goes_on() -> None:
    lonely = np.arange(1000) * DAY_MS  # each bar after a break: no step is ever taken
    target = [Target(kind="volatility", horizon=3)]
    ts, ohlcv = make_bars(100, start=int(lonely[-1]) + DAY_MS, missing=0.0)
    prices = np.concatenate([np.tile(ohlcv[0], (1000, 1)), ohlcv])
    y = labels(target, SPEC, np.concatenate([lonely, ts]), prices)
    assert np.isnan(y[:900]).all()
    np.testing.assert_array_equal(y[1000:], labels(target, SPEC, ts, ohlcv))


def test_many_labels_mature_at_once_even_where_they_exceed_the_first_buffer() -> None:
    targets = [Target(kind="return", horizon=h) for h in range(1, 40)]
    ts, ohlcv = make_bars(5000, missing=0.1)
    matured = Labels(targets, SPEC, capacity=1).update(np.zeros(5000, np.int64), ts, ohlcv)
    y = labels(targets, SPEC, ts, ohlcv)
    assert len(matured) == np.isfinite(y).sum() > 190_000


def test_no_bars_give_no_labels() -> None:
    none = np.empty(0, np.int64), np.empty((0, 5))
    assert labels(TARGETS, SPEC, *none).shape == (0, 5)
    assert len(Labels(TARGETS, SPEC, capacity=1).update(none[0], *none)) == 0


def test_a_target_is_named_by_kind_horizon_and_classes() -> None:
    assert [t.name for t in TARGETS] == [
        "volatility_12",
        "volatility_1",
        "return_12",
        "direction_6",
        "direction_30_3",
    ]
    assert [t.n_outputs for t in TARGETS] == [1, 1, 1, 1, 3]


@pytest.mark.parametrize(
    "wrong",
    [
        {"kind": "price", "horizon": 1},
        {"kind": "return", "horizon": 0},
        {"kind": "return", "horizon": 1, "classes": 3},
        {"kind": "direction", "horizon": 1, "classes": 4},
    ],
)
def test_a_target_that_makes_no_sense_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Target(**wrong)
