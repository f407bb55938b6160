"""Running losses are QLIKE in instalments: the same sum, known bar by bar."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from models.features import FeatureSpec
from models.running_loss import MOST_SURPRISE, RunningLosses, running_losses
from models.scoring import loss
from models.targets import Labels, Target, labels
from tests.models.builders import MINUTE_MS

SPEC = FeatureSpec(interval_ms=MINUTE_MS, max_fill=3)
HORIZON = 5
TARGET = Target(kind="volatility", horizon=HORIZON)

Floats = NDArray[np.float64]


def ohlcv_of(returns: Floats) -> Floats:
    close = 100 * np.exp(np.cumsum(returns))
    return np.stack([close, close, close, close, np.ones_like(close)], axis=1)


def make(seed: int, gaps: NDArray[np.int64]) -> tuple[NDArray[np.int64], Floats, Floats]:
    """Bar times so many minutes apart, prices, and what two forecasters say."""
    rng = np.random.default_rng(seed)
    ts = MINUTE_MS * (1_000_000 + np.cumsum(gaps))
    said = np.log(1e-6) + rng.normal(0, 0.5, (len(ts), 2))
    return ts, ohlcv_of(rng.normal(0, 1e-3, len(ts))), said


def naive(ts: NDArray[np.int64], ohlcv: Floats, said: Floats) -> Floats:
    """Share by share: of each forecast, over each of its steps."""
    r = np.diff(np.log(ohlcv[:, 3]), prepend=np.nan)
    steps = np.round(np.diff(ts, prepend=ts[0]) / MINUTE_MS).astype(int)
    broken = steps > SPEC.max_fill + 1
    steps[broken] = 0
    at = np.cumsum(steps)
    found = np.full((len(ts), 2), np.nan)
    for i in range(1, len(ts)):
        have = range(i)
        if steps[i] == 0 or at[i] - at[0] < HORIZON:
            continue
        live = [j for j in have if at[j] + HORIZON > at[i - 1]]
        whole = [j for j in live if at[j] + HORIZON >= at[i]]
        r2 = r[i] ** 2
        if whole:
            r2 = min(r2, MOST_SURPRISE / np.mean(np.exp(-said[whole, 1])))
        for k in range(2):
            shares = sum(min(at[j] + HORIZON - at[i - 1], steps[i]) * said[j, k] for j in live)
            found[i, k] = (r2 * np.exp(-said[whole, k]).sum() + shares) / len(live)
    return found


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 999),
    st.lists(st.sampled_from([1, 1, 1, 2, 4, 300]), min_size=2, max_size=60),
)
def test_it_is_the_mean_share_of_all_forecasts_that_reach_over_the_bar(
    seed: int, gaps: list[int]
) -> None:
    ts, ohlcv, said = make(seed, np.array(gaps))
    np.testing.assert_allclose(
        running_losses(TARGET, SPEC, ts, ohlcv, said), naive(ts, ohlcv, said), rtol=1e-9
    )


def test_over_many_bars_two_forecasters_differ_by_as_much_as_their_qlike_does() -> None:
    """To the last digit, where both say the same at the ends."""
    ts, _, said = make(0, np.ones(400, int))
    ohlcv = ohlcv_of(np.random.default_rng(0).choice([-1e-3, 1e-3], 400))  # none is cut
    said[:50, 0], said[-50:, 0] = said[:50, 1], said[-50:, 1]
    running = running_losses(TARGET, SPEC, ts, ohlcv, said)
    y = labels((TARGET,), SPEC, ts, ohlcv)[:, 0]
    matured = loss(TARGET, said[:, 0], y) - loss(TARGET, said[:, 1], y)
    assert abs(np.nansum(matured)) > 0.1
    assert np.nansum(running[:, 0] - running[:, 1]) == pytest.approx(np.nansum(matured))


def test_a_forecast_that_is_made_later_changes_nothing_before() -> None:
    ts, ohlcv, said = make(1, np.ones(60, int))
    before = running_losses(TARGET, SPEC, ts, ohlcv, said)
    said[40:], ohlcv[41:] = 7.0, 3.0
    after = running_losses(TARGET, SPEC, ts, ohlcv, said)
    assert np.array_equal(before[:41], after[:41], equal_nan=True)
    assert not np.array_equal(before[41:], after[41:])


def test_a_false_print_counts_for_a_bounded_surprise_whoever_is_scored() -> None:
    ts, ohlcv, said = make(2, np.ones(30, int))
    said[:] = np.log(1e-6)
    said[:, 0] -= 2 * np.log(1.5)
    ohlcv[20:, 3] *= 2.0
    running = running_losses(TARGET, SPEC, ts, ohlcv, said)
    assert running[20, 1] - said[0, 1] == pytest.approx(MOST_SURPRISE)
    assert running[20, 0] - said[0, 0] == pytest.approx(MOST_SURPRISE * 1.5**2)


def test_nothing_is_said_before_there_were_forecasts_for_a_whole_horizon() -> None:
    ts, ohlcv, said = make(3, np.ones(30, int))
    said[:8] = np.nan
    assert np.flatnonzero(
        np.isfinite(running_losses(TARGET, SPEC, ts, ohlcv, said)[:, 0])
    ).tolist() == list(range(8 + HORIZON, 30))


def test_after_a_bar_without_a_forecast_it_begins_anew() -> None:
    ts, ohlcv, said = make(4, np.ones(60, int))
    said[20] = np.nan
    running = running_losses(TARGET, SPEC, ts, ohlcv, said)[:, 0]
    assert np.isfinite(running[HORIZON:21]).all()
    assert np.isnan(running[21 : 21 + HORIZON]).all()
    assert np.isfinite(running[21 + HORIZON :]).all()


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 99), st.integers(0, 39))
def test_it_goes_on_from_an_export_in_another_slot(seed: int, cut: int) -> None:
    ts, ohlcv, said = make(seed, np.ones(40, int))
    whole = running_losses(TARGET, SPEC, ts, ohlcv, said)
    steps = Labels((), SPEC, capacity=1, next_steps=1).update(np.zeros(40, int), ts, ohlcv)
    first, second = RunningLosses(TARGET, SPEC, 1), RunningLosses(TARGET, SPEC, 3)
    found = []
    for losses, slot, rows in ((first, 0, slice(0, cut)), (second, 2, slice(cut, None))):
        if rows.start:
            second.load(np.array([2]), first.export(np.array([0])))
        own = np.full(len(steps.ts[rows]), slot)
        columns = steps.ts[rows], steps.matured_ts[rows], steps.label[rows]
        found.append(losses.update(own, *columns, said[:-1][rows]))
    np.testing.assert_array_equal(np.concatenate(found), whole[1:])
