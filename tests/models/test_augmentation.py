from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from models.augmentation import (
    LOG_VARIANCES,
    AugmentedChunks,
    BarAugmentation,
    ChunkAugmentation,
    alter,
    altered_history,
)
from models.dataset import NEVER, OHLCV, Chunks, History, histories, load_bars, training_rows
from models.features import FEATURE_NAMES, WARM_UP_BARS, FeatureSpec, history
from models.scaling import Scaler
from models.splits import Span
from models.targets import Target, labels
from tests.models.builders import MINUTE_MS, make_bars, make_frame

SPEC = FeatureSpec(interval_ms=5 * MINUTE_MS, timezone="America/New_York")
TARGETS = (
    Target(kind="volatility", horizon=12),
    Target(kind="return", horizon=12),
    Target(kind="direction", horizon=6),
)
ALWAYS = Span(0, NEVER)


def rng() -> np.random.Generator:
    return np.random.default_rng(7)


@pytest.fixture(scope="module")
def two() -> list[History]:
    return histories(load_bars(make_frame(symbols=2, n=1000)), SPEC, TARGETS)


@pytest.fixture(scope="module")
def scaler(two: list[History]) -> Scaler:
    return Scaler.fit(training_rows(two, ALWAYS))


@settings(max_examples=30, deadline=None)
@given(
    scale=st.floats(0, 1),
    warp=st.floats(0, 1),
    jitter=st.floats(0, 0.5),
    keep=st.floats(0.1, 1),
    seed=st.integers(0, 999),
)
def test_altered_bars_are_possible_bars_in_time_order(
    scale: float, warp: float, jitter: float, keep: float, seed: int
) -> None:
    (one,) = histories(load_bars(make_frame(symbols=1, n=150, seed=seed)), SPEC, TARGETS)
    config = BarAugmentation(scale=scale, warp=warp, warp_bars=20, jitter=jitter, keep=keep)
    before = one.ohlcv.copy()
    made, again = (altered_history(one, NEVER, config, (3, seed), SPEC, TARGETS) for _ in range(2))
    frame = pd.DataFrame(made.ohlcv, columns=OHLCV).assign(symbol=made.symbol, ts=made.ts)
    assert load_bars(frame).attrs == {"rejected": 0, "duplicates": 0}
    assert made.symbol == "S0~3"
    assert np.isin(made.ts, one.ts).all()
    np.testing.assert_array_equal(made.x, again.x)
    np.testing.assert_array_equal(one.ohlcv, before)


def test_nothing_switched_on_leaves_the_bars_as_they_are() -> None:
    ts, ohlcv = make_bars(200)
    same_ts, same = alter(ts, ohlcv, BarAugmentation(), rng())
    np.testing.assert_array_equal(same_ts, ts)
    np.testing.assert_allclose(same, ohlcv, rtol=1e-9)


def test_only_bars_before_the_end_of_training_are_altered_or_even_seen() -> None:
    frame = make_frame(symbols=1, n=300)
    cut = int(frame["ts"].median())
    later = frame.copy()
    later.loc[later["ts"] >= cut, ["open", "high", "low", "close"]] *= 9
    config = BarAugmentation(scale=0.5, warp=0.5, jitter=0.2, keep=0.7)
    a, b = (
        altered_history(histories(f, SPEC, TARGETS)[0], cut, config, (1,), SPEC, TARGETS)
        for f in (frame, later)
    )
    for mine, other in ((a.ts, b.ts), (a.x, b.x), (a.y, b.y)):
        np.testing.assert_array_equal(mine, other)
    assert a.ts.max() < cut
    assert (a.known_ts[np.isfinite(a.y).all(axis=1)] < cut).all()


def test_scaled_returns_shift_the_log_variance_by_twice_the_log_and_scale_the_return() -> None:
    ts, ohlcv = make_bars(800)
    _, scaled = alter(ts, ohlcv, BarAugmentation(scale=0.7), rng())
    moved = np.log(scaled[1:, 3] / scaled[:-1, 3]), np.log(ohlcv[1:, 3] / ohlcv[:-1, 3])
    c = np.median(moved[0][moved[1] != 0] / moved[1][moved[1] != 0])
    assert abs(np.log(c)) > 0.1
    y, z = (labels(TARGETS, SPEC, ts, o) for o in (ohlcv, scaled))
    np.testing.assert_allclose(z[:, 0], y[:, 0] + 2 * np.log(c), atol=1e-5)
    np.testing.assert_allclose(z[:, 1], y[:, 1] * c, atol=1e-9)
    np.testing.assert_array_equal(z[:, 2], y[:, 2])


def test_a_warp_changes_the_scale_slowly() -> None:
    ts, ohlcv = make_bars(2000, missing=0.0)
    _, warped = alter(ts, ohlcv, BarAugmentation(warp=0.5, warp_bars=400), rng())
    y, z = (labels(TARGETS[:1], SPEC, ts, o)[:-12, 0] for o in (ohlcv, warped))
    shift = (z - y)[np.isfinite(y)]
    assert shift.std() > 0.2
    assert np.abs(np.diff(shift)).max() < 0.1


def test_a_bar_that_vanishes_leaves_its_range_and_volume_to_the_next() -> None:
    ts, ohlcv = make_bars(500, missing=0.0)
    kept_ts, kept = alter(ts, ohlcv, BarAugmentation(jitter=0.3), rng())
    assert 300 < len(kept_ts) < 400
    assert kept[:, 4].sum() == pytest.approx(ohlcv[:, 4].sum())
    assert kept[:, 1].max() == pytest.approx(ohlcv[:, 1].max())
    np.testing.assert_allclose(kept[:, 3], ohlcv[np.isin(ts, kept_ts), 3], rtol=1e-9)


def test_a_slice_is_a_run_of_consecutive_bars() -> None:
    ts, ohlcv = make_bars(500)
    cut_ts, _ = alter(ts, ohlcv, BarAugmentation(keep=0.4), rng())
    start = np.searchsorted(ts, cut_ts[0])
    np.testing.assert_array_equal(cut_ts, ts[start : start + 200])


def test_features_shift_with_the_level_as_the_chunk_augmentation_says() -> None:
    ts, ohlcv = make_bars(1200)
    _, scaled = alter(ts, ohlcv, BarAugmentation(scale=0.5), rng())
    x, z = (history(SPEC, ts, o)[0][WARM_UP_BARS:] for o in (ohlcv, scaled))
    shift = (z - x)[:, FEATURE_NAMES.index("log_rv_390")].mean()
    assert abs(shift) > 0.1
    expected = np.broadcast_to(np.where(LOG_VARIANCES, shift, 0.0), x.shape)
    # Floors (zero returns, zero ranges) make small differences.
    assert np.quantile(np.abs(z - x - expected), 0.99) < 0.02


def augmented(two: list[History], scaler: Scaler, **options: Any) -> tuple[Chunks, AugmentedChunks]:
    chunks = Chunks(two, ALWAYS, scaler, batch=4, length=32, burn_in=16, chunks_per_stream=4)
    return chunks, AugmentedChunks(chunks, ChunkAugmentation(**options), scaler, TARGETS)


def test_a_level_shift_is_one_constant_for_a_whole_stream(
    two: list[History], scaler: Scaler
) -> None:
    chunks, altered = augmented(two, scaler, level=0.3)
    shifts: list[float] = []
    volatile = FEATURE_NAMES.index("log_gk_hl20")
    constant: Any = None
    for plain, chunk in zip(list(chunks), altered, strict=True):
        counts = plain.weight > 0
        change = (chunk.y - plain.y)[..., 0]
        shift = np.array(
            [change[b][counts[b]].mean() if counts[b].any() else np.nan for b in range(len(counts))]
        )
        assert np.nanmax(np.abs(np.where(counts, change - shift[:, None], 0))) < 1e-4
        inside = (np.abs(plain.x) < 4).all(axis=2) & counts & (np.abs(chunk.x) < 6).all(axis=2)
        moved = (chunk.x - plain.x)[..., volatile] * scaler.scale[volatile] - shift[:, None]
        assert np.abs(moved[inside]).max(initial=0) < 1e-3
        np.testing.assert_allclose(
            chunk.y[..., 1][counts],
            (plain.y[..., 1] * np.exp(shift / 2)[:, None])[counts],
            rtol=1e-3,
            atol=1e-7,
        )
        np.testing.assert_array_equal(chunk.y[..., 2], plain.y[..., 2])
        if plain.carry:
            both = ~np.isnan(constant) & ~np.isnan(shift)
            np.testing.assert_allclose(shift[both], constant[both], atol=1e-4)
            constant = np.where(np.isnan(constant), shift, constant)
        else:
            constant = shift
        shifts += shift.tolist()
    assert np.nanstd(shifts) > 0.2


def test_noise_and_stale_steps_change_inputs_and_never_labels(
    two: list[History], scaler: Scaler
) -> None:
    chunks, altered = augmented(two, scaler, noise=0.1, stale=0.2)
    for plain, chunk in zip(list(chunks), altered, strict=True):
        np.testing.assert_array_equal(plain.y, chunk.y)
        np.testing.assert_array_equal(plain.weight, chunk.weight)
        assert plain.carry == chunk.carry
        assert not np.array_equal(plain.x, chunk.x)


def test_a_stale_step_shows_the_step_before_it_and_nothing_later(
    two: list[History], scaler: Scaler
) -> None:
    chunks, altered = augmented(two, scaler, stale=0.5)
    late = 0
    before: Any = None
    for plain, chunk in zip(list(chunks), altered, strict=True):
        previous = plain.x[:, :1] if not plain.carry else before[:, None]
        shifted = np.concatenate([previous, plain.x[:, :-1]], axis=1)
        is_own = (chunk.x == plain.x).all(axis=2)
        is_late = (chunk.x == shifted).all(axis=2)
        assert (is_own | is_late).all()
        late += int((~is_own).sum())
        before = plain.x[:, -1]
    assert late > 100


def test_epochs_differ_and_the_same_epoch_repeats_itself(
    two: list[History], scaler: Scaler
) -> None:
    _, altered = augmented(two, scaler, noise=0.1)
    assert len(altered) > 0
    first, second = (np.concatenate([c.x.ravel() for c in altered]) for _ in range(2))
    assert not np.array_equal(first, second)
    altered.epoch = 0
    np.testing.assert_array_equal(first, np.concatenate([c.x.ravel() for c in altered]))
    assert altered.epoch == 1


@pytest.mark.parametrize("wrong", [{"scale": -1}, {"jitter": 1.0}, {"keep": 0.0}, {"rotate": 1}])
def test_an_augmentation_that_makes_no_sense_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        BarAugmentation(**wrong)
