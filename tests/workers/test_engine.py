import math
from collections.abc import Iterable
from itertools import repeat

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from models.bundle import BundleRejected
from models.features import WARM_UP_BARS, history
from models.runtimes import open_runtime
from schemas.codecs import BarColumns
from tests.workers.builders import (
    MINUTE_MS,
    SPEC,
    WARM_UP,
    make_bars,
    make_bundle,
    make_engine,
    rows_of,
)
from workers.engine import Engine, _rounds

BUNDLE = make_bundle(seed=1)
OTHER = make_bundle(seed=2)
SYMBOLS = ["A", "B", "C"]
N = WARM_UP_BARS + WARM_UP + 30
BARS = make_bars(SYMBOLS, N)
WARM_AT = WARM_UP_BARS + WARM_UP - 1
"""The first bar of a symbol, counted from 0, that has a forecast."""

Said = dict[tuple[str, int, str, str], tuple[float, ...]]


def run(engine: Engine, bars: BarColumns, sizes: Iterable[int] = ()) -> Said:
    """Every forecast value by (symbol, ts, bundle, role), bars given in batches of `sizes`.

    What the engine does not take leads the next batch.
    """
    said: Said = {}
    start = 0
    turns = iter(sizes)
    while start < len(bars):
        batch = rows_of(bars, slice(start, start + next(turns, len(bars))))
        processed = engine.process(batch, partitions_of(batch))
        assert len(processed.status) > 0
        start += len(processed.status)
        for forecast in processed.forecasts:
            for row, values in zip(forecast.rows, forecast.values, strict=True):
                key = (
                    batch.symbols[row],
                    int(batch.ts[row]),
                    forecast.bundle.version,
                    forecast.role,
                )
                assert key not in said
                said[key] = tuple(values)
    return said


def partitions_of(bars: BarColumns) -> NDArray[np.int64]:
    return np.array([ord(symbol) % 2 for symbol in bars.symbols], np.int64)


def agree(left: Said, right: Said) -> bool:
    return left.keys() == right.keys() and all(
        np.allclose(left[key], right[key], atol=1e-5, rtol=1e-5) for key in left
    )


def engine_of(*bundles: object, **options: float) -> Engine:
    return make_engine(*(bundles or (BUNDLE,)), partitions=2, **options)  # type: ignore[arg-type]


ONE_BY_ONE = run(engine_of(), BARS, [1] * len(BARS))


def test_a_symbol_speaks_from_its_first_warm_bar_on_and_then_on_every_bar() -> None:
    expected = {
        (symbol, MINUTE_MS * i, BUNDLE.version, "champion")
        for symbol in SYMBOLS
        for i in range(WARM_AT, N)
    }
    assert ONE_BY_ONE.keys() == expected


@settings(max_examples=15, deadline=None)
@given(sizes=st.lists(st.integers(1, 400), max_size=12))
def test_batching_changes_nothing(sizes: list[int]) -> None:
    assert agree(run(engine_of(), BARS, sizes), ONE_BY_ONE)


def test_room_made_beforehand_is_enough_for_the_partitions_that_come() -> None:
    first, second = engine_of(), engine_of()
    run(first, BARS)
    second.make_room(len(SYMBOLS))
    capacity = second.capacity
    second.make_room(len(SYMBOLS))
    for partition in (0, 1):
        second.load(partition, *first.export(partition))
    assert second.capacity == capacity
    assert sorted(second.symbols(0) + second.symbols(1)) == sorted(SYMBOLS)


@settings(max_examples=10, deadline=None)
@given(cut=st.integers(0, len(BARS)), seed=st.integers(0, 9))
def test_exported_state_goes_on_elsewhere_as_if_nothing_had_happened(cut: int, seed: int) -> None:
    first, second = engine_of(), engine_of()
    run(second, make_bars(["Z", "A"], 3, seed), [])  # slots are taken in another order
    before = run(first, rows_of(BARS, slice(0, cut)), [])
    for partition in (0, 1):
        second.load(partition, *first.export(partition))
    after = run(second, rows_of(BARS, slice(cut, None)), [7, 100])
    assert agree(before | after, ONE_BY_ONE)


def test_repeated_and_late_bars_change_nothing_and_have_no_forecast() -> None:
    rng = np.random.default_rng(0)
    rows: list[int] = []
    for row in range(len(BARS)):
        rows.append(row)
        if row and rng.random() < 0.3:
            rows.append(int(rng.integers(max(0, row - 40), row + 1)))
    noisy = rows_of(BARS, np.array(rows, np.intp))
    assert agree(run(engine_of(), noisy, [50] * 20), ONE_BY_ONE)


def test_the_future_changes_nothing_in_the_past() -> None:
    cut = 3 * (WARM_AT + 10)
    ohlcv = BARS.ohlcv.copy()
    ohlcv[cut:] *= 3
    said = run(engine_of(), BarColumns(BARS.symbols, BARS.ts, ohlcv), [cut])
    horizon_ts = int(BARS.ts[cut - 1])
    past = {key: value for key, value in said.items() if key[1] <= horizon_ts}
    assert past
    assert past == {
        key: value for key, value in run(engine_of(), BARS, [cut]).items() if key[1] <= horizon_ts
    }


def swapped(
    sizes: Iterable[int],
    swap_bar: int,
    promote_bar: int | None,
    rebuilt_rows: float = math.inf,
) -> tuple[Said, Engine]:
    engine = engine_of(BUNDLE, OTHER, rebuilt_rows=rebuilt_rows)
    for schedule in engine.schedules.values():
        schedule.give("challenger", OTHER.version, MINUTE_MS * swap_bar)
        if promote_bar is not None:
            schedule.give("champion", OTHER.version, MINUTE_MS * promote_bar)
            schedule.give("challenger", None, MINUTE_MS * promote_bar)
    return run(engine, BARS, sizes), engine


SWAPPED = swapped(repeat(1), WARM_AT + 5, WARM_AT + 15)[0]


@pytest.mark.parametrize("batch", [3, 64, 2000])
def test_a_challenger_joins_at_its_bar_time_and_a_promotion_leaves_no_gap(batch: int) -> None:
    join, promote = WARM_AT + 5, WARM_AT + 15
    said, _ = swapped(repeat(batch), join, promote)

    def times(bundle: str, role: str) -> list[int]:
        return sorted({ts // MINUTE_MS for _, ts, b, r in said if (b, r) == (bundle, role)})

    assert times(BUNDLE.version, "champion") == list(range(WARM_AT, promote))
    assert times(OTHER.version, "challenger") == list(range(join, promote))
    assert times(OTHER.version, "champion") == list(range(promote, N))
    assert len(said) == 3 * (N - WARM_AT + promote - join)
    assert agree(said, SWAPPED)


def test_a_new_bundle_starts_from_zero_over_the_remembered_bars() -> None:
    join = WARM_AT + 8
    said, engine = swapped(repeat(3), join, None)
    for symbol in SYMBOLS:
        mine = rows_of(BARS, np.flatnonzero(np.array(BARS.symbols) == symbol))
        x, _ = history(SPEC, mine.ts, mine.ohlcv)
        runtime = open_runtime(OTHER)
        runtime.grow(1)
        runtime.reset(np.array([0]))
        for bar in range(join - engine.remembered_bars, N):
            (values,) = runtime.step(np.array([0]), x[bar : bar + 1]).values
            if bar >= join:
                key = symbol, MINUTE_MS * bar, OTHER.version, "challenger"
                np.testing.assert_allclose(said[key], values, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 300), min_size=5, max_size=40),
    rebuilt_rows=st.sampled_from([0, 5, 13, 40, math.inf]),
)
def test_however_batches_are_cut_a_swap_says_the_same(
    sizes: list[int], rebuilt_rows: float
) -> None:
    head = 3 * (WARM_AT - 2)
    said, _ = swapped([head, *sizes], WARM_AT + 5, WARM_AT + 15, rebuilt_rows)
    assert said.keys() == SWAPPED.keys()
    for key, values in said.items():
        np.testing.assert_allclose(values, SWAPPED[key], atol=1e-6, rtol=1e-6)


def test_no_more_bars_are_taken_than_lead_to_so_much_rebuilding() -> None:
    symbols = [*"ABCDEFGHIJ"]
    bars = make_bars(symbols, WARM_AT + 10)
    now = len(symbols) * WARM_AT
    engine = engine_of(BUNDLE, OTHER, rebuilt_rows=4 * WARM_UP)
    run(engine, rows_of(bars, slice(0, now)))
    for schedule in engine.schedules.values():
        schedule.give("challenger", OTHER.version, int(bars.ts[now]))
    rest = rows_of(bars, slice(now, None))
    taken = []
    while len(rest):
        status, _ = engine.process(rest, partitions_of(rest))
        taken.append(len(status))
        rest = rows_of(rest, slice(len(status), None))
    assert taken == [4, 4, len(bars) - now - 8]


def test_a_bundle_in_both_roles_speaks_once_as_the_champion() -> None:
    engine = engine_of()
    for schedule in engine.schedules.values():
        schedule.give("challenger", BUNDLE.version, 0)
    assert agree(run(engine, BARS), ONE_BY_ONE)


def test_attention_names_the_bars_it_fell_on() -> None:
    engine = engine_of()
    processed = engine.process(BARS, partitions_of(BARS))
    (forecast,) = processed.forecasts
    attention = forecast.attention
    own_ts = BARS.ts[forecast.rows]
    np.testing.assert_array_equal(attention.ts, own_ts[:, None] - MINUTE_MS * attention.lags)
    assert (np.diff(attention.weights, axis=1) <= 0).all()
    assert (attention.entropy <= np.log(BUNDLE.config.window) + 1e-5).all()


def test_a_dropped_partition_forgets_and_its_slots_are_used_again() -> None:
    engine = engine_of()
    run(engine, BARS)
    capacity = engine.capacity
    for _ in range(3):
        schedule = engine.schedules[0]
        engine.drop(0)
        assert engine.symbols(0) == []
        engine.schedules[0] = schedule
        again = run(engine, rows_of(BARS, np.flatnonzero(partitions_of(BARS) == 0)))
        if engine.capacity != capacity:
            break
    assert engine.capacity == capacity
    assert agree(again, {key: v for key, v in ONE_BY_ONE.items() if key[0] == "B"})


def test_a_bundle_that_looks_further_back_than_is_remembered_is_refused() -> None:
    with pytest.raises(BundleRejected, match="attends to 99 bars"):
        engine_of().add(open_runtime(make_bundle(window=99)))


@given(slots=st.lists(st.integers(0, 5), max_size=30))
def test_rounds_keep_each_slots_order_and_lose_nothing(slots: list[int]) -> None:
    array = np.array(slots, np.int64)
    rounds = list(_rounds(array, np.arange(len(array))))
    assert sorted(int(row) for rows in rounds for row in rows) == list(range(len(slots)))
    for rows in rounds:
        assert len(set(array[rows])) == len(rows)
    for slot in set(slots):
        order = [int(row) for rows in rounds for row in rows if array[row] == slot]
        assert order == sorted(order)
