"""The same few symbols are remembered whatever the order, and held against what a bundle was made of."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.bundle import Bundle
from models.dataset import histories, load_bars
from models.features import CLOCK_NAMES, FEATURE_NAMES, WARM_UP_BARS
from models.input_drift import InputReference
from models.replay import with_inputs
from schemas.codecs import BarColumns
from tests.workers.builders import MINUTE_MS, make_bars, make_bundle, rows_of
from workers.inputs import KEPT_BARS, LEAST_ROWS, MEASURED_BARS, SYMBOLS_EACH, RecentBars, _frame
from workers.inputs import drift_of as measured

SYMBOLS = [f"S{i}" for i in range(12)]


def partitions_of(bars: BarColumns) -> np.ndarray:
    return np.array([int(symbol[1:]) % 2 for symbol in bars.symbols])


def remembering(bars: BarColumns, *, batch: int = 100, watch: tuple[str, ...] = ()) -> RecentBars:
    recent = RecentBars(watch)
    for at in range(0, len(bars), batch):
        some = rows_of(bars, slice(at, at + batch))
        recent.update(some, partitions_of(some))
    return recent


@given(st.permutations(SYMBOLS), st.integers(1, 60))
def test_the_same_symbols_are_remembered_whoever_comes_first(order: list[str], batch: int) -> None:
    bars = make_bars(order, 3)
    chosen = set(remembering(make_bars(SYMBOLS, 3)).get())
    assert set(remembering(bars, batch=batch).get()) == chosen
    assert [sum(int(s[1:]) % 2 == p for s in chosen) for p in (0, 1)] == [SYMBOLS_EACH] * 2


def test_the_newest_bars_are_kept_and_late_ones_passed_over() -> None:
    bars = make_bars(["S0"], KEPT_BARS + 50)
    recent = remembering(bars)
    late = rows_of(bars, slice(7, 9))
    recent.update(late, partitions_of(late))
    [rows] = recent.get().values()
    assert [row[0] for row in rows] == bars.ts[50:].tolist()
    np.testing.assert_array_equal([row[1:] for row in rows], bars.ohlcv[50:])


def test_only_watched_symbols_are_remembered_where_some_are() -> None:
    assert set(remembering(make_bars(SYMBOLS, 3), watch=("S3", "S8")).get()) == {"S3", "S8"}


def test_a_partition_goes_and_comes_back_as_it_was() -> None:
    recent = remembering(make_bars(SYMBOLS, 40))
    before, exported = recent.get(), recent.export(1)
    recent.drop(1)
    assert {int(symbol[1:]) % 2 for symbol in recent.get()} == {0}
    recent.load(1, *exported)
    assert recent.get() == before
    watching = RecentBars(("S3",))
    watching.load(1, *exported)
    assert set(watching.get()) <= {"S3"}
    empty = RecentBars()
    empty.load(0, *RecentBars().export(0))
    assert empty.get() == {}


def test_there_is_enough_once_there_are_warm_bars() -> None:
    per_symbol = WARM_UP_BARS - 1 + LEAST_ROWS // 2
    assert remembering(make_bars(["S0", "S1"], per_symbol)).is_enough
    assert not remembering(make_bars(["S0", "S1"], per_symbol - 1)).is_enough


def made_of(bars: BarColumns) -> Bundle:
    bundle = make_bundle()
    past = histories(
        load_bars(_frame(remembering(bars).get())), bundle.config.features, bundle.config.targets
    )
    return with_inputs(bundle, past)


BARS = make_bars(["S0", "S1", "S2", "S3"], 1_100, seed=1)


@pytest.fixture(scope="module")
def calm() -> Bundle:
    return made_of(make_bars(["S0", "S1", "S2", "S3"], 1_100))


def wilder(bars: BarColumns, power: float) -> BarColumns:
    prices = bars.ohlcv[:, :4] ** power
    return BarColumns(bars.symbols, bars.ts, np.column_stack([prices, bars.ohlcv[:, 4]]))


def test_wilder_bars_are_further_and_the_worst_features_are_named_first(calm: Bundle) -> None:
    near = measured(calm, remembering(BARS).get())
    far = measured(calm, remembering(wilder(BARS, 4)).get())
    assert near is not None
    assert far is not None
    assert (near.rows, near.ts) == (4 * MEASURED_BARS, 1_099 * MINUTE_MS)
    assert near.symbols == ["S0", "S1", "S2", "S3"]
    for worst, least in ((far.psi, 3.0), (far.ks, 0.8)):
        assert set(worst) < set(FEATURE_NAMES) - set(CLOCK_NAMES)
        assert list(worst.values()) == sorted(worst.values(), reverse=True)
        assert min(worst.values()) > least
    assert next(iter(near.psi.values())) < next(iter(far.psi.values()))
    assert near.embedding is not None
    assert far.embedding is not None
    assert near.embedding < far.embedding
    assert measured(calm, remembering(BARS).get()) == near, "it is the same each time"


def test_what_the_clock_alone_moves_is_never_named(calm: Bundle) -> None:
    assert set(CLOCK_NAMES) < set(FEATURE_NAMES)
    assert calm.inputs is not None
    moved = dict(vars(calm.inputs))
    moved["edges"] = moved["edges"].copy()
    moved["edges"][[FEATURE_NAMES.index(name) for name in CLOCK_NAMES]] -= 9
    found = measured(replace(calm, inputs=InputReference(**moved)), remembering(BARS).get())
    assert found == measured(calm, remembering(BARS).get())


def test_nothing_is_said_where_nothing_can_be(calm: Bundle) -> None:
    bars = make_bars(["S0"], WARM_UP_BARS + LEAST_ROWS)
    recent = remembering(bars).get()
    assert measured(calm, recent) is not None
    assert measured(replace(calm, inputs=None), recent) is None
    assert measured(calm, {}) is None
    assert measured(calm, {"S0": recent["S0"][:WARM_UP_BARS]}) is None
