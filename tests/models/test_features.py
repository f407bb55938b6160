from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pydantic import ValidationError

from models.features import (
    DAY_MS,
    DUPLICATE,
    FEATURE_NAMES,
    FEATURES,
    LATE,
    OK,
    RESET,
    RING,
    WARM_UP_BARS,
    WINDOWS,
    F,
    Features,
    FeatureSpec,
    history,
    utc_offsets,
)
from tests.models.builders import MINUTE_MS, Bars, make_bars
from tests.models.naive_features import naive_features

NEW_YORK = FeatureSpec(interval_ms=5 * MINUTE_MS, timezone="America/New_York")


def column(x: NDArray[np.float32], name: str) -> NDArray[np.float32]:
    return x[:, FEATURE_NAMES.index(name)]


def interleaved(
    symbols: int, n: int, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """Bars of several symbols, each in its own order, mixed at random."""
    rng = np.random.default_rng(seed)
    slots = rng.permutation(np.repeat(np.arange(symbols), n))
    ts, ohlcv = np.zeros(len(slots), np.int64), np.zeros((len(slots), 5))
    for slot in range(symbols):
        rows = slots == slot
        ts[rows], ohlcv[rows] = make_bars(n, seed=seed + slot)
    return slots, ts, ohlcv


def test_there_are_at_least_fifty_features_with_unique_names_a_formula_and_a_source() -> None:
    assert F == len(FEATURES) >= 50
    assert len(set(FEATURE_NAMES)) == F
    assert all(feature.formula and feature.source for feature in FEATURES)


@pytest.mark.parametrize("interval_minutes", [1, 5, 60])
def test_every_feature_agrees_with_its_formula_recomputed_from_scratch(
    interval_minutes: int,
) -> None:
    spec = NEW_YORK.model_copy(update={"interval_ms": interval_minutes * MINUTE_MS})
    ts, ohlcv = make_bars(
        700,
        interval_ms=spec.interval_ms,
        session_bars=min(78, 390 // interval_minutes) if interval_minutes > 1 else 150,
    )
    x, status = history(spec, ts, ohlcv)
    assert status.tolist() == [RESET] + [OK] * (len(ts) - 1)
    expected = naive_features(spec, ts, ohlcv)
    assert set(expected) == set(FEATURE_NAMES)
    for name in FEATURE_NAMES:
        np.testing.assert_allclose(
            column(x, name), expected[name], rtol=2e-6, atol=3e-6, err_msg=name
        )


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), data=st.data())
def test_any_split_into_batches_gives_the_features_of_history(seed: int, data: Any) -> None:
    slots, ts, ohlcv = interleaved(symbols=3, n=200, seed=seed)
    cuts = data.draw(st.lists(st.integers(0, len(slots)), max_size=12).map(sorted))
    stream = Features(NEW_YORK, capacity=3)
    edges = [0, *cuts, len(slots)]
    x = np.concatenate(
        [stream.update(slots[a:b], ts[a:b], ohlcv[a:b])[0] for a, b in pairwise(edges)]
    )
    for slot in range(3):
        rows = slots == slot
        np.testing.assert_array_equal(x[rows], history(NEW_YORK, ts[rows], ohlcv[rows])[0])


@settings(max_examples=30, deadline=None)
@given(t=st.integers(0, 598), seed=st.integers(0, 100))
def test_no_bar_after_t_changes_a_feature_at_t(t: int, seed: int) -> None:
    ts, ohlcv = make_bars(600, seed=seed)
    changed = ohlcv.copy()
    rng = np.random.default_rng(seed)
    changed[t + 1 :] *= np.exp(rng.normal(0, 3, (599 - t, 1)))
    moved = ts.copy()
    moved[t + 1 :] += rng.integers(1, 50) * NEW_YORK.interval_ms
    x, _ = history(NEW_YORK, ts, ohlcv)
    y, _ = history(NEW_YORK, moved, changed)
    np.testing.assert_array_equal(x[: t + 1], y[: t + 1])


@settings(max_examples=20, deadline=None)
@given(cut=st.integers(0, 400), seed=st.integers(0, 100))
def test_export_and_load_in_the_middle_change_nothing(cut: int, seed: int) -> None:
    slots, ts, ohlcv = interleaved(symbols=2, n=200, seed=seed)
    whole = Features(NEW_YORK, capacity=2)
    x, _ = whole.update(slots, ts, ohlcv)
    first = Features(NEW_YORK, capacity=2)
    first.update(slots[:cut], ts[:cut], ohlcv[:cut])
    second = Features(NEW_YORK, capacity=5)
    second.load(np.array([4, 2]), first.export(np.array([0, 1])))
    y, _ = second.update(np.array([4, 2])[slots[cut:]], ts[cut:], ohlcv[cut:])
    np.testing.assert_array_equal(y, x[cut:])


def test_load_refuses_state_of_another_layout_and_keeps_its_own() -> None:
    ts, ohlcv = make_bars(50)
    stream = Features(NEW_YORK, capacity=1)
    stream.update(np.zeros(50, np.int64), ts, ohlcv)
    arrays = stream.export(np.array([0]))
    for damage in ({"ewm": arrays["ewm"][:, :-1]}, {"step": arrays["step"].astype(np.int32)}):
        with pytest.raises(ValueError, match="another layout"):
            stream.load(np.array([0]), arrays | damage)
    assert stream.bars_seen.tolist() == [50]


def test_grow_keeps_state_and_reset_forgets_it() -> None:
    ts, ohlcv = make_bars(300)
    stream = Features(NEW_YORK, capacity=1)
    zeros = np.zeros(100, np.int64)
    stream.update(zeros, ts[:100], ohlcv[:100])
    stream.grow(7)
    assert stream.capacity == 7
    x, _ = stream.update(zeros, ts[100:200], ohlcv[100:200])
    np.testing.assert_array_equal(x, history(NEW_YORK, ts[:200], ohlcv[:200])[0][100:])
    stream.reset(np.array([0]))
    y, status = stream.update(zeros, ts[200:], ohlcv[200:])
    assert status[0] == RESET
    np.testing.assert_array_equal(y, history(NEW_YORK, ts[200:], ohlcv[200:])[0])


def test_duplicate_and_late_bars_leave_the_state_untouched() -> None:
    ts, ohlcv = make_bars(100)
    stream = Features(NEW_YORK, capacity=1)
    stream.update(np.zeros(100, np.int64), ts, ohlcv)
    before = stream.export(np.array([0]))
    x, status = stream.update(np.zeros(2, np.int64), ts[[99, 50]], ohlcv[[0, 1]])
    assert status.tolist() == [DUPLICATE, LATE]
    assert not x.any()
    after = stream.export(np.array([0]))
    for name, array in before.items():
        np.testing.assert_array_equal(array, after[name], err_msg=name)


def test_after_a_long_silence_a_symbol_starts_as_if_new() -> None:
    ts, ohlcv = make_bars(400)
    ts[200:] += 11 * DAY_MS
    x, status = history(NEW_YORK, ts, ohlcv)
    assert np.flatnonzero(status == RESET).tolist() == [0, 200]
    np.testing.assert_array_equal(x[200:], history(NEW_YORK, ts[200:], ohlcv[200:])[0])


def spiked(place: int, factor: float) -> tuple[Bars, Bars]:
    ts, ohlcv = make_bars(3000, session_bars=None, missing=0.0)
    bad = ohlcv.copy()
    bad[place, 1] *= factor
    bad[place, 3] *= factor
    return (ts, ohlcv), (ts, bad)


def test_a_huge_spike_leaves_no_trace_in_a_window_once_it_has_left() -> None:
    (ts, clean), (_, bad) = spiked(500, 1000.0)
    x, _ = history(NEW_YORK, ts, clean)
    y, _ = history(NEW_YORK, ts, bad)
    for window in (3, 6, 12, 24, 48, 78, 156, 390):
        name = f"log_rv_{window}"
        assert column(y, name)[500] > column(x, name)[500] + 3
        after = slice(501 + window, None)  # the return back from the spike is at 501
        np.testing.assert_array_equal(column(x, name)[after], column(y, name)[after], name)


def test_windows_do_not_drift_over_many_turns_of_the_ring() -> None:
    ts, ohlcv = make_bars(20 * RING, session_bars=None, missing=0.1)
    x, _ = history(NEW_YORK, ts, ohlcv)
    tail = slice(-450, None)
    r = np.diff(np.log(ohlcv[tail, 3]))
    steps = np.diff(ts[tail]) // NEW_YORK.interval_ms
    inside = np.cumsum(steps[::-1])[::-1] - steps < 390
    expected = np.log((r[inside] ** 2).sum() / 390 + 1e-12)
    assert column(x, "log_rv_390")[-1] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    "ohlcv",
    [
        np.tile([5.0, 5.0, 5.0, 5.0, 0.0], (900, 1)),
        np.tile([1e-300, 1e300, 1e-300, 1e300, 1e308], (900, 1)),
        np.geomspace(1e-300, 1e300, 900)[:, None] * np.array([1.0, 1.0, 1.0, 1.0, 1e-7]),
        np.where(np.arange(900)[:, None] % 2, 1e250, 1e-250) * np.ones(5),
    ],
    ids=["constant", "whole range", "explosion", "alternating"],
)
def test_features_are_finite_and_modest_whatever_the_prices(ohlcv: NDArray[np.float64]) -> None:
    ts = 1_600_000_000_000 + np.arange(900) * NEW_YORK.interval_ms
    x, _ = history(NEW_YORK, ts, ohlcv)
    assert np.isfinite(x).all()
    assert np.abs(x).max() < 100


@settings(max_examples=15, deadline=None)
@given(
    interval_ms=st.sampled_from([1000, 60_000, 420_000, 900_000, 3_600_000, DAY_MS, 7 * DAY_MS]),
    timezone=st.sampled_from(["UTC", "America/New_York", "Asia/Kolkata", "Australia/Lord_Howe"]),
    max_fill=st.sampled_from([0, 1, 12, 500]),
    session_bars=st.sampled_from([None, 7, 78]),
)
def test_any_bar_interval_and_market_gives_finite_features(
    interval_ms: int, timezone: str, max_fill: int, session_bars: int | None
) -> None:
    spec = FeatureSpec(
        interval_ms=interval_ms,
        timezone=timezone,
        max_fill=max_fill,
        reset_after_ms=max(10 * DAY_MS, 20 * interval_ms),
    )
    ts, ohlcv = make_bars(700, interval_ms=interval_ms, session_bars=session_bars)
    x, status = history(spec, ts, ohlcv)
    assert np.isfinite(x).all()
    assert (status[1:] == OK).all()
    assert np.abs(x).max() < 50


def test_prices_and_volumes_in_another_unit_give_the_same_features() -> None:
    ts, ohlcv = make_bars(1000)
    x, _ = history(NEW_YORK, ts, ohlcv)
    y, _ = history(NEW_YORK, ts, ohlcv * [1e3, 1e3, 1e3, 1e3, 1e-4])
    np.testing.assert_allclose(x, y, atol=2e-4)


@pytest.mark.parametrize("factor", [40.0, 1 / 40])
def test_relative_volume_returns_to_normal_after_a_40x_change_of_scale(factor: float) -> None:
    ts, ohlcv = make_bars(3000)
    changed = ohlcv.copy()
    changed[1000:, 4] *= factor
    x, _ = history(NEW_YORK, ts, ohlcv)
    y, _ = history(NEW_YORK, ts, changed)
    volumes = [i for i, n in enumerate(FEATURE_NAMES) if n.startswith(("volume", "money"))]
    assert np.abs(x - y)[:, volumes].max() < 6
    assert np.abs(x - y)[1000 + 78 * 5 :, volumes[0]].max() < 0.15
    others = np.setdiff1d(np.arange(F), volumes)
    np.testing.assert_array_equal(x[:, others], y[:, others])


def test_the_season_learns_a_busy_open_and_expects_it_the_evening_before() -> None:
    ts, ohlcv = make_bars(78 * 60, missing=0.0)
    x = pd.DataFrame(history(NEW_YORK, ts, ohlcv)[0], columns=FEATURE_NAMES)
    place = np.arange(len(ts)) % 78
    settled = np.arange(len(ts)) > 78 * 30
    season = x["season_now"][settled].groupby(place[settled]).mean()
    assert season[0] > season[20:].mean() + 1
    last_bar, midday = settled & (place == 77), settled & (place == 40)
    ahead = x["expected_6"] - x["log_calm_hl78"]
    assert ahead[last_bar].mean() > ahead[midday].mean() + 0.5


def test_a_split_overnight_is_a_gap_and_no_volatility() -> None:
    ts, ohlcv = make_bars(78 * 10, missing=0.0)
    halved = ohlcv.copy()
    halved[78 * 8 :, :4] /= 2
    x, _ = history(NEW_YORK, ts, ohlcv)
    y, _ = history(NEW_YORK, ts, halved)
    apart = np.abs(x - y).max(axis=0) > 1e-3
    assert {FEATURE_NAMES[i] for i in np.flatnonzero(apart)} == {
        "gap_return",
        "gap_size",
        "log_gap_variance",
        "stochastic_14",
    }


@settings(max_examples=50, deadline=None)
@given(
    ts=st.integers(0, 4_102_444_000_000),
    zone=st.sampled_from(
        ["UTC", "America/New_York", "Europe/London", "Africa/Casablanca", "Australia/Lord_Howe"]
    ),
)
def test_the_offset_table_agrees_with_the_time_zone(ts: int, zone: str) -> None:
    table = utc_offsets(zone)
    found = table[np.searchsorted(table[:, 0], ts, side="right") - 1, 1]
    offset = pd.Timestamp(ts, unit="ms", tz=zone).utcoffset()
    assert offset is not None
    assert found == offset.total_seconds() * 1000


def test_arrays_of_any_memory_layout_give_the_same_and_are_not_changed() -> None:
    ts, ohlcv = make_bars(100)
    strided = np.asfortranarray(np.repeat(ohlcv, 2, axis=0))[::2]
    kept = strided.copy()
    x, _ = history(NEW_YORK, np.repeat(ts, 2)[::2], strided)
    np.testing.assert_array_equal(x, history(NEW_YORK, ts, ohlcv)[0])
    np.testing.assert_array_equal(strided, kept)


ROLLING = NEW_YORK.model_copy(update={"rolling_half_life": 100.0})


def test_rolling_features_are_deviations_from_the_symbols_own_past() -> None:
    ts, ohlcv = make_bars(700)
    ts[600:] += 20 * DAY_MS
    raw, _ = history(NEW_YORK, ts, ohlcv)
    x, _ = history(ROLLING, ts, ohlcv)
    for rows in (slice(0, 600), slice(600, 700)):  # a reset lies between
        past = pd.DataFrame(raw[rows].astype(float)).ewm(halflife=100)
        sd = past.std(bias=True).to_numpy()
        with np.errstate(invalid="ignore", divide="ignore"):
            expected = np.clip((raw[rows] - past.mean()) / sd, -6, 6)
        live = sd > 1e-3
        np.testing.assert_allclose(x[rows][live], expected.to_numpy()[live], atol=1e-3)
    assert np.isfinite(x).all()


def test_rolling_features_survive_batches_export_and_bad_bars() -> None:
    slots, ts, ohlcv = interleaved(symbols=3, n=120, seed=3)
    first, second = Features(ROLLING, capacity=3), Features(ROLLING)
    first.update(slots[:200], ts[:200], ohlcv[:200])
    assert not first.update(slots[199:200], ts[199:200], ohlcv[199:200] * 2)[0].any()
    second.grow(3)
    second.load(np.arange(3), first.export(np.arange(3)))
    x = np.concatenate(
        [
            second.update(slots[i : i + 1], ts[i : i + 1], ohlcv[i : i + 1])[0]
            for i in range(200, 360)
        ]
    )
    for slot in range(3):
        rows = slots == slot
        whole, _ = history(ROLLING, ts[rows], ohlcv[rows])
        np.testing.assert_array_equal(x[rows[200:]], whole[rows[:200].sum() :])
    second.reset(np.arange(3))
    assert not any(a.any() for a in second.export(np.arange(3)).values())


@pytest.mark.parametrize(
    "wrong",
    [{"interval_ms": 0}, {"timezone": "Mars/Base"}, {"max_fill": -1}, {"unknown": 1}],
)
def test_a_spec_that_makes_no_sense_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        FeatureSpec(**({"interval_ms": 60_000} | wrong))


def test_windows_are_full_after_the_warm_up() -> None:
    assert WARM_UP_BARS >= 390
    assert RING > WARM_UP_BARS


def test_a_split_within_a_session_is_a_break_and_no_volatility_either() -> None:
    ts, ohlcv = make_bars(2_000, session_bars=None, missing=0.0)
    halved = ohlcv.copy()
    halved[1_000:, :4] /= 2
    x, _ = history(NEW_YORK, ts, ohlcv)
    y, _ = history(NEW_YORK, ts, halved)
    variances = [i for i, n in enumerate(FEATURE_NAMES) if n.startswith(("log_rv", "log_gk"))]
    assert np.abs(x - y)[:, variances].max() < 0.5
    assert np.abs(x - y)[1_000 + 390 :, variances[: len(WINDOWS)]].max() == 0
    assert column(y, "gap_return")[1_000] == 0.0
    assert column(y, "bars_since_open")[1_000] == pytest.approx(np.log(2))


@pytest.mark.parametrize("factor", [0.5, 2.0, 3.0, 0.1])
def test_a_split_leaves_nothing_in_the_variance_of_gaps(factor: float) -> None:
    ts, ohlcv = make_bars(78 * 10, missing=0.0)
    split = ohlcv.copy()
    split[78 * 8 :, :4] *= factor
    x, _ = history(NEW_YORK, ts, ohlcv)
    y, _ = history(NEW_YORK, ts, split)
    gaps = column(y, "log_gap_variance") - column(x, "log_gap_variance")
    assert np.abs(gaps).max() < 1.0


def test_what_lies_between_bars_is_counted_once() -> None:
    ts, ohlcv = make_bars(78 * 4, missing=0.0)
    ohlcv[78 * 2 :, :4] /= 2
    keep = np.ones(len(ts), bool)
    keep[[10, 11, 200]] = False
    stream = Features(NEW_YORK, capacity=1)
    rows = np.flatnonzero(keep)
    stream.update(np.zeros(len(rows), np.int64), ts[rows], ohlcv[rows])
    assert stream.take_tally() == {"filled": 3, "break": 3, "jump": 1}
    stream.update(np.zeros(2, np.int64), ts[[5, -1]], ohlcv[[5, -1]])  # late, and a duplicate
    assert stream.take_tally() == {"filled": 0, "break": 0, "jump": 0}
