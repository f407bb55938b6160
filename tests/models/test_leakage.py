"""What a leak would change: the pipeline from bars to forecasts, with a linear model in the middle."""

from typing import NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray

from models.dataset import NEVER, Chunks, History, histories, load_bars, training_rows
from models.features import DUPLICATE, Features, FeatureSpec
from models.scaling import Scaler
from models.splits import Fold, Span, time_split
from models.targets import Labels, Target
from tests.models.builders import MINUTE_MS, make_frame

SPEC = FeatureSpec(interval_ms=5 * MINUTE_MS, timezone="America/New_York")
TARGETS = (Target(kind="volatility", horizon=6),)
Rows = tuple[NDArray[np.float32], NDArray[np.float64]]


class Fitted(NamedTuple):
    scaler: Scaler
    weights: NDArray[np.float64]

    def predict(self, x: NDArray[np.float32]) -> NDArray[np.float64]:
        scaled = self.scaler.transform(x).astype(np.float64)
        return np.asarray(scaled @ self.weights[:-1] + self.weights[-1])


@pytest.fixture(scope="module")
def bars() -> list[History]:
    return histories(load_bars(make_frame(symbols=4, n=3000)), SPEC, TARGETS)


@pytest.fixture(scope="module")
def fold(bars: list[History]) -> Fold:
    return time_split(np.concatenate([h.ts for h in bars]), (0.7, 0.0, 0.3))


def rows_of(bars: list[History], span: Span) -> Rows:
    chosen = [h.is_warm & span.purged_rows(h.ts, h.known_ts) for h in bars]
    x = np.concatenate([h.x[c] for h, c in zip(bars, chosen, strict=True)])
    y = np.concatenate([h.y[c, 0] for h, c in zip(bars, chosen, strict=True)])
    return x, y


def fit(bars: list[History], rows: Rows, span: Span) -> Fitted:
    scaler = Scaler.fit(training_rows(bars, span))
    x, y = rows
    design = np.c_[scaler.transform(x).astype(np.float64), np.ones(len(x))]
    ridge = np.eye(design.shape[1])
    return Fitted(scaler, np.linalg.solve(design.T @ design + ridge, design.T @ y))


def skill(model: Fitted, rows: Rows) -> float:
    x, y = rows
    return float(1 - np.mean((y - model.predict(x)) ** 2) / np.var(y))


def test_there_is_skill_to_lose(bars: list[History], fold: Fold) -> None:
    model = fit(bars, rows_of(bars, fold.train), fold.train)
    assert skill(model, rows_of(bars, fold.test)) > 0.3


def test_permuted_targets_leave_no_skill(bars: list[History], fold: Fold) -> None:
    x, y = rows_of(bars, fold.train)
    shuffled = np.random.default_rng(0).permutation(y)
    model = fit(bars, (x, shuffled), fold.train)
    assert skill(model, rows_of(bars, fold.test)) < 0.02


def test_labels_of_another_time_change_the_skill(bars: list[History], fold: Fold) -> None:
    def shifted(h: History, by: int) -> History:
        y = np.roll(h.y, by, axis=0)
        return h.__class__(h.symbol, h.ts, h.ohlcv, h.x, h.status, y, h.known_ts)

    def skill_of(by: int) -> float:
        moved = [shifted(h, by) for h in bars]
        (x, y), (late_x, late_y) = rows_of(moved, fold.train), rows_of(moved, fold.test)
        fine, late = np.isfinite(y), np.isfinite(late_y)
        model = fit(bars, (x[fine], y[fine]), fold.train)
        return skill(model, (late_x[late], late_y[late]))

    honest = skill_of(0)
    assert skill_of(-300) < honest - 0.1  # labels from far ahead
    assert skill_of(6) > honest + 0.05  # labels the features have seen: what a leak looks like


def test_nothing_after_the_training_span_reaches_the_model_or_its_forecasts(fold: Fold) -> None:
    frame = make_frame(symbols=4, n=3000)
    broken = frame.copy()
    late = broken["ts"] >= fold.train.to_ts
    rng = np.random.default_rng(1)
    broken.loc[late, ["open", "high", "low", "close"]] *= np.exp(rng.normal(0, 1, (late.sum(), 1)))
    broken.loc[late, "volume"] *= 40
    found = []
    for table in (frame, broken):
        made = histories(load_bars(table), SPEC, TARGETS)
        model = fit(made, rows_of(made, fold.train), fold.train)
        x = np.concatenate([h.x[fold.train.rows(h.ts)] for h in made])
        found.append((model.weights, model.scaler.to_json(), model.predict(x)))
    np.testing.assert_array_equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]
    np.testing.assert_array_equal(found[0][2], found[1][2])


def test_training_chunks_hold_no_label_that_overlaps_the_test_span(
    bars: list[History], fold: Fold
) -> None:
    """Each label's horizon of 6 steps ends before the cut, per symbol."""
    scaler = Scaler.fit(training_rows(bars, fold.train))
    counted = Chunks(bars, fold.train, scaler, burn_in=0).counted
    for h in bars:
        rows = np.flatnonzero(fold.train.purged_rows(h.ts, h.known_ts))
        end = np.searchsorted(h.ts, fold.train.to_ts)
        assert rows.max() <= end - 2
        assert h.known_ts[rows].max() < fold.train.to_ts
    assert counted == len(rows_of(bars, fold.train)[0])


def test_the_stream_scores_what_history_scores(bars: list[History], fold: Fold) -> None:
    """Bars arrive mixed, in batches, some twice; each matured label meets its forecast."""
    model = fit(bars, rows_of(bars, fold.train), fold.train)
    table = load_bars(make_frame(symbols=4, n=3000)).sort_values("ts", kind="stable")
    table = table.iloc[np.sort(np.r_[np.arange(len(table)), np.arange(0, len(table), 50)])]
    slots = table["symbol"].str[1:].to_numpy(dtype=np.int64)
    ts = table["ts"].to_numpy(dtype=np.int64)
    ohlcv = table[["open", "high", "low", "close", "volume"]].to_numpy()
    features, labels = Features(SPEC, capacity=4), Labels(TARGETS, SPEC, capacity=4)
    forecast: dict[tuple[int, int], float] = {}
    errors: dict[tuple[int, int], float] = {}
    for start in range(0, len(ts), 97):
        batch = slice(start, start + 97)
        x, status = features.update(slots[batch], ts[batch], ohlcv[batch])
        fresh = status < DUPLICATE
        keys = zip(slots[batch][fresh].tolist(), ts[batch][fresh].tolist(), strict=True)
        forecast |= dict(zip(keys, model.predict(x[fresh]).tolist(), strict=True))
        matured = labels.update(slots[batch], ts[batch], ohlcv[batch])
        for slot, at, label in zip(matured.slot, matured.ts, matured.label, strict=True):
            errors[int(slot), int(at)] = float(label) - forecast[int(slot), int(at)]
    whole = {}
    for slot, h in enumerate(bars):
        error = h.y[:, 0] - model.predict(h.x)
        for i in np.flatnonzero(np.isfinite(error) & (h.known_ts < NEVER)):
            whole[slot, int(h.ts[i])] = float(error[i])
    assert errors.keys() == whole.keys()
    np.testing.assert_allclose([errors[k] for k in whole], list(whole.values()), rtol=0, atol=1e-9)
