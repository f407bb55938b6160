import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.dataset import (
    COLUMNS,
    NEVER,
    BarsRejected,
    Chunks,
    History,
    Windows,
    histories,
    histories_on_disk,
    infer_interval_ms,
    load_bars,
    training_rows,
)
from models.features import DAY_MS, WARM_UP_BARS, F, FeatureSpec, history
from models.scaling import Scaler
from models.splits import Span, time_split
from models.targets import Target, labels
from tests.models.builders import MINUTE_MS, make_frame

SPEC = FeatureSpec(interval_ms=5 * MINUTE_MS, timezone="America/New_York")
TARGETS = (Target(kind="volatility", horizon=12), Target(kind="direction", horizon=6))
REAL = Path(__file__).parents[3] / "shared" / "data" / "etf_5m.parquet"
ALWAYS = Span(0, NEVER)


@pytest.fixture(scope="module")
def three() -> list[History]:
    frame = make_frame(symbols=3, n=1500)
    late = (frame["symbol"] == "S1") & (frame["ts"] > frame["ts"].median())
    frame.loc[late, "ts"] += 15 * DAY_MS  # a reset in the middle of S1
    return histories(load_bars(frame), SPEC, TARGETS)


@pytest.fixture(scope="module")
def scaler(three: list[History]) -> Scaler:
    return Scaler.fit(training_rows(three, ALWAYS))


def test_bars_are_read_from_parquet_sorted_by_symbol_and_time(tmp_path: Path) -> None:
    frame = make_frame(n=50)
    frame.assign(other=1).to_parquet(tmp_path / "bars.parquet")
    bars = load_bars(tmp_path / "bars.parquet")
    assert tuple(bars.columns) == COLUMNS
    assert bars[["symbol", "ts"]].apply(tuple, axis=1).is_monotonic_increasing
    assert len(bars) == 150


def test_datetimes_become_epoch_milliseconds() -> None:
    frame = make_frame(n=20)
    expected = load_bars(frame)
    for dtype in ("datetime64[ns, UTC]", "datetime64[us, UTC]", "datetime64[s, UTC]"):
        stamps = pd.to_datetime(frame["ts"], unit="ms", utc=True).astype(dtype)
        pd.testing.assert_frame_equal(load_bars(frame.assign(ts=stamps)), expected)
        local = stamps.dt.tz_convert("America/New_York")
        pd.testing.assert_frame_equal(load_bars(frame.assign(ts=local)), expected)


def test_of_two_bars_at_one_time_the_first_stays_as_in_the_stream() -> None:
    frame = make_frame(n=20)
    doubled = pd.concat([frame, frame.assign(volume=7.0)])
    bars = load_bars(doubled)
    pd.testing.assert_frame_equal(bars, load_bars(frame))
    assert bars.attrs == {"rejected": 0, "duplicates": 60}


def test_a_few_impossible_bars_are_dropped_and_counted() -> None:
    frame = make_frame(n=200)
    frame.loc[3, "high"] = 1.0
    frame.loc[9, "close"] = np.nan
    frame.loc[11, "volume"] = -1.0
    bars = load_bars(frame)
    assert len(bars) == 597
    assert bars.attrs["rejected"] == 3


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: f.drop(columns=["volume"]), "no column volume"),
        (lambda f: f[:0], "no bars"),
        (lambda f: f.assign(close=0.0), "are impossible"),
        (lambda f: f.assign(low=f["high"] * 2), "are impossible"),
        (lambda f: f.assign(open="dear"), "column open is not numbers"),
        (lambda f: f.assign(ts=f["ts"] * 1000), "nanoseconds"),
        (lambda f: f.assign(ts=f["ts"] // 1000), "seconds"),
        (lambda f: f.assign(ts=f["ts"] / 7), "whole epoch milliseconds"),
        (lambda f: f.assign(ts=f["ts"].astype(str)), "whole epoch milliseconds"),
        (lambda f: f.assign(ts=-f["ts"]), "before 1970"),
        (lambda f: f.assign(ts=pd.to_datetime(f["ts"], unit="ms").where(f.index > 1)), "2 of 150"),
        (lambda f: f.assign(symbol=f["symbol"].where(f["symbol"] != "S1", None)), "no symbol"),
    ],
)
def test_what_is_not_bars_is_refused_with_a_reason(damage: Any, message: str) -> None:
    with pytest.raises(BarsRejected, match=message):
        load_bars(damage(make_frame(n=50)))


@pytest.mark.parametrize("source", [None, np.zeros((3, 7)), [1, 2]])
def test_what_is_no_table_is_refused(source: Any) -> None:
    with pytest.raises(BarsRejected, match="a DataFrame or a parquet file"):
        load_bars(source)


def test_the_interval_is_the_most_frequent_distance_within_a_symbol() -> None:
    assert infer_interval_ms(load_bars(make_frame(n=200))) == 5 * MINUTE_MS
    with pytest.raises(BarsRejected, match="interval is unknown"):
        infer_interval_ms(load_bars(make_frame(symbols=2, n=1)))


def test_a_history_holds_features_and_labels_of_each_bar(three: list[History]) -> None:
    assert [h.symbol for h in three] == ["S0", "S1", "S2"]
    for h in three:
        np.testing.assert_array_equal(h.x, history(SPEC, h.ts, h.ohlcv)[0])
        np.testing.assert_array_equal(h.y, labels(TARGETS, SPEC, h.ts, h.ohlcv))
        undefined = np.isnan(h.y).any(axis=1)
        np.testing.assert_array_equal(h.known_ts == NEVER, undefined)
        assert (h.known_ts[~undefined] >= h.ts[~undefined] + 12 * SPEC.interval_ms).all()


def test_bars_since_a_reset_count_from_one(three: list[History]) -> None:
    assert three[0].since_reset.tolist() == list(range(1, 1501))
    jumps = np.flatnonzero(np.diff(three[1].since_reset) != 1) + 1
    assert len(jumps) == 1
    assert three[1].since_reset[jumps[0]] == 1


def test_progress_hears_of_every_bar() -> None:
    told: list[int] = []
    histories(load_bars(make_frame(n=100)), SPEC, TARGETS, told.append)
    assert told == [100, 100, 100]


def collect(chunks: Chunks) -> dict[tuple[float, ...], int]:
    """How often each label counted, by its bar's features: these name the bar."""
    seen: dict[tuple[float, ...], int] = {}
    for chunk in chunks:
        for x, weight in zip(chunk.x.reshape(-1, chunk.x.shape[2]), chunk.weight.flat, strict=True):
            if weight:
                seen[tuple(x)] = seen.get(tuple(x), 0) + 1
    return seen


@settings(max_examples=8, deadline=None)
@given(
    batch=st.integers(1, 9),
    length=st.integers(1, 100),
    burn_in=st.integers(0, 60),
    chunks_per_stream=st.integers(1, 6),
    shuffle=st.booleans(),
)
def test_every_warm_row_counts_exactly_once_an_epoch(
    three: list[History],
    scaler: Scaler,
    batch: int,
    length: int,
    burn_in: int,
    chunks_per_stream: int,
    shuffle: bool,
) -> None:
    if burn_in >= length * chunks_per_stream:
        return
    chunks = Chunks(
        three, ALWAYS, scaler, batch, length, burn_in, chunks_per_stream, shuffle=shuffle
    )
    expected = [
        (h.since_reset >= WARM_UP_BARS + burn_in) & np.isfinite(h.y).all(axis=1) for h in three
    ]
    for _ in range(2):
        n = counted = 0
        for chunk in chunks:
            n, counted = n + 1, counted + int(chunk.weight.sum())
            assert chunk.x.shape[0] <= batch
            assert chunk.x.shape[1] == length
            assert np.isfinite(chunk.x).all()
            assert np.isfinite(chunk.y).all()
            assert not chunk.y[chunk.weight == 0].any()
        assert n == len(chunks)
        assert counted == chunks.counted == sum(int(e.sum()) for e in expected)
    rows = collect(chunks)
    assert set(rows.values()) == {1}
    wanted = np.concatenate(
        [scaler.transform(h.x[e]) for h, e in zip(three, expected, strict=True)]
    )
    assert rows.keys() == set(map(tuple, wanted))


def test_a_lane_runs_through_consecutive_bars_of_one_symbol_while_it_is_carried(
    three: list[History], scaler: Scaler
) -> None:
    place = {
        tuple(x): (i, j)
        for i, h in enumerate(three)
        for j, x in enumerate(scaler.transform(h.x))
        if h.is_warm[j]
    }
    before: list[Any] = []
    for chunk in Chunks(three, ALWAYS, scaler, batch=4, length=32, burn_in=16, chunks_per_stream=5):
        if not chunk.carry:
            before = [None] * len(chunk.x)
        for lane, steps in enumerate(chunk.x):
            for x in steps:
                here = place.get(tuple(x))
                if before[lane] is not None and here is not None:
                    symbol, row = before[lane]
                    assert here == (symbol, row + 1)
                    assert three[symbol].since_reset[row + 1] > 1
                before[lane] = here


def test_labels_stand_beside_the_bar_they_follow(three: list[History], scaler: Scaler) -> None:
    label = {
        tuple(x): y
        for h in three
        for x, y in zip(scaler.transform(h.x), h.y.astype(np.float32), strict=True)
    }
    for chunk in Chunks(three, ALWAYS, scaler, length=50):
        for b, step in zip(*np.nonzero(chunk.weight), strict=True):
            np.testing.assert_array_equal(chunk.y[b, step], label[tuple(chunk.x[b, step])])


def test_no_row_counts_whose_label_was_not_known_in_the_span(
    three: list[History], scaler: Scaler
) -> None:
    fold = time_split(np.concatenate([h.ts for h in three]))
    counted = collect(Chunks(three, fold.train, scaler))
    wanted = [h.known_ts < fold.train.to_ts for h in three]
    allowed = np.concatenate([scaler.transform(h.x[w]) for h, w in zip(three, wanted, strict=True)])
    assert counted.keys() <= set(map(tuple, allowed))
    assert len(counted) > 500


def test_corrupting_bars_after_the_span_changes_no_chunk(scaler: Scaler) -> None:
    frame = make_frame(symbols=2, n=1200)
    cut = int(frame["ts"].quantile(0.7))
    broken = frame.copy()
    broken.loc[broken["ts"] >= cut, ["open", "high", "low", "close"]] *= 3
    chunks = [
        list(Chunks(histories(load_bars(f), SPEC, TARGETS), Span(0, cut), scaler))
        for f in (frame, broken)
    ]
    for a, b in zip(*chunks, strict=True):
        np.testing.assert_array_equal(a.x, b.x)
        np.testing.assert_array_equal(a.y, b.y)
        np.testing.assert_array_equal(a.weight, b.weight)


def test_epochs_differ_and_the_same_seed_repeats_them(three: list[History], scaler: Scaler) -> None:
    def first(chunks: Chunks) -> Any:
        return next(iter(chunks)).x

    options: dict[str, Any] = {"batch": 3, "length": 20, "chunks_per_stream": 4, "shuffle": True}
    a, b = (Chunks(three, ALWAYS, scaler, **options, seed=1) for _ in range(2))
    np.testing.assert_array_equal(first(a), first(b))
    assert not np.array_equal(first(Chunks(three, ALWAYS, scaler, **options, seed=2)), first(b))
    b.epoch = 0
    np.testing.assert_array_equal(first(Chunks(three, ALWAYS, scaler, **options, seed=1)), first(b))
    c = Chunks(three, ALWAYS, scaler, **options, seed=1)
    epochs = [first(c), first(c)]
    assert not np.array_equal(*epochs)


def test_a_burn_in_as_long_as_the_stream_is_refused(three: list[History], scaler: Scaler) -> None:
    with pytest.raises(ValueError, match="burn-in"):
        Chunks(three, ALWAYS, scaler, length=8, burn_in=16, chunks_per_stream=2)


@pytest.mark.skipif(not REAL.exists(), reason="the real bars are not beside this checkout")
def test_real_bars_give_finite_features_and_labels() -> None:
    bars = load_bars(REAL)
    bars = bars[bars["symbol"].isin(["AMUU", "SQQQ"])]
    for h in histories(bars, SPEC, TARGETS):
        assert np.isfinite(h.x).all()
        assert np.abs(h.x[h.is_warm]).max() < 50
        assert np.isfinite(h.y[h.is_warm]).mean() > 0.9


@settings(max_examples=15, deadline=None)
@given(length=st.integers(1, 120), stride=st.integers(1, 9), batch=st.integers(1, 400))
def test_windows_are_consecutive_bars_of_one_symbol_with_the_label_of_the_last(
    three: list[History], scaler: Scaler, length: int, stride: int, batch: int
) -> None:
    by_symbol = {h.symbol: h for h in three}
    windows = Windows(three, ALWAYS, scaler, length, stride, batch)
    ends: dict[str, list[int]] = {h.symbol: [] for h in three}
    n = 0
    for window in windows:
        n += 1
        assert window.x.shape[1] == length
        for i in range(0, len(window.ts), 37):
            h = by_symbol[window.symbol[i]]
            row = int(np.searchsorted(h.ts, window.ts[i]))
            assert h.since_reset[row - length + 1] == h.since_reset[row] - length + 1
            expected = scaler.transform(h.x[row - length + 1 : row + 1])
            np.testing.assert_array_equal(window.x[i], expected)
            np.testing.assert_array_equal(window.y[i], h.y[row].astype(np.float32))
            assert h.known_ts[row] > window.ts[i]
        for symbol, ts in zip(window.symbol, window.ts, strict=True):
            ends[symbol].append(int(ts))
    assert n == len(windows)
    assert windows.counted == sum(map(len, ends.values()))
    for h in three:
        full = h.since_reset >= WARM_UP_BARS + length - 1
        known = np.isfinite(h.y).all(axis=1)
        assert ends[h.symbol] == h.ts[full & known][::stride].tolist()


def test_windows_in_random_order_are_the_same_windows(three: list[History], scaler: Scaler) -> None:
    windows = Windows(three, ALWAYS, scaler, length=10, stride=3)
    ordered = np.concatenate([w.ts for w in windows])
    shuffled = np.concatenate([w.ts for w in windows.batches(np.random.default_rng(0))])
    assert ordered.tolist() != shuffled.tolist()
    assert sorted(ordered) == sorted(shuffled)


def test_windows_of_a_span_have_labels_known_in_it_and_may_begin_before_it(
    three: list[History], scaler: Scaler
) -> None:
    fold = time_split(np.concatenate([h.ts for h in three]))
    known = {(h.symbol, t): k for h in three for t, k in zip(h.ts, h.known_ts, strict=True)}
    for window in Windows(three, fold.validation, scaler, length=50):
        assert window.ts.min() >= fold.validation.from_ts
        for symbol, ts in zip(window.symbol, window.ts, strict=True):
            assert known[symbol, ts] < fold.validation.to_ts


def test_histories_on_disk_are_those_in_memory_whatever_the_names_and_the_order(
    tmp_path: Path,
) -> None:
    frame = make_frame(symbols=3, n=600)
    frame["symbol"] = frame["symbol"].map({"S0": "BRK/B", "S1": "EUR USD", "S2": "a=b%2F"})
    (tmp_path / "bars").mkdir()
    for i, part in enumerate(np.array_split(np.arange(len(frame)), 3)):
        frame.iloc[part].to_parquet(tmp_path / "bars" / f"{i}.parquet")
    told: list[int] = []
    on_disk = {
        h.symbol: h
        for h in histories_on_disk(
            tmp_path / "bars", SPEC, TARGETS, tmp_path / "cache", told.append
        )
    }
    assert sum(told) == len(frame)
    in_memory = histories(load_bars(frame), SPEC, TARGETS)
    assert on_disk.keys() == {h.symbol for h in in_memory}
    for h in in_memory:
        other = on_disk[h.symbol]
        for name in ("ts", "ohlcv", "x", "status", "y", "known_ts"):
            assert isinstance(getattr(other, name).base, np.memmap)
            np.testing.assert_array_equal(getattr(h, name), getattr(other, name))
    disk = [on_disk[h.symbol] for h in in_memory]
    scaler = Scaler.fit(training_rows(in_memory, ALWAYS))
    for a, b in zip(Chunks(in_memory, ALWAYS, scaler), Chunks(disk, ALWAYS, scaler), strict=True):
        np.testing.assert_array_equal(a.x, b.x)


def test_histories_on_disk_hold_one_symbol_in_memory_at_a_time(tmp_path: Path) -> None:
    make_frame(symbols=20, n=2000).to_parquet(tmp_path / "bars.parquet")

    def peak(histories_of: Any) -> int:
        tracemalloc.start()
        kept = [h.x for h in histories_of]
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert len(kept) == 20
        return size

    disk = peak(histories_on_disk(tmp_path / "bars.parquet", SPEC, TARGETS, tmp_path / "cache"))
    assert disk < 20 * 2000 * F * 4 / 2  # of what the features take


def test_a_file_without_the_columns_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    make_frame(n=20).drop(columns="close").to_parquet(tmp_path / "bars.parquet")
    with pytest.raises(BarsRejected, match="no column close"):
        list(histories_on_disk(tmp_path / "bars.parquet", SPEC, TARGETS, tmp_path / "cache"))
    assert not (tmp_path / "cache").exists()
