"""What happens to bars that are not as they should be, rule by rule, and how it is counted.

A duplicate, late, gap, session break, symbol that appears or vanishes, price split: each on the
engine, and all of them once through the worker, whose counters are read.
"""

import time

import numpy as np
import pytest
from numpy.typing import NDArray

from models.features import DAY_MS, DUPLICATE, HOUR_MS, LATE, WARM_UP_BARS
from schemas.codecs import BarColumns, encode_bars
from schemas.topics import BARS as BARS_TOPIC
from tests.workers.builders import (
    MINUTE_MS,
    SPEC,
    WARM_UP,
    make_bars,
    make_bundle,
    make_engine,
    rows_of,
)
from workers.bench.stage import Patience, Replica, appoint
from workers.config import Settings
from workers.engine import Engine, Processed
from workers.kafka import make_publisher

BUNDLE = make_bundle(seed=1)
WARM_AT = WARM_UP_BARS + WARM_UP - 1
N = WARM_AT + 60
BARS = make_bars(["A"], N)
WHERE = WARM_AT + 20
"""The bar at which something is not as it should be."""
NOTHING = {"filled": 0, "break": 0, "jump": 0}


def said(
    engine: Engine, bars: BarColumns
) -> tuple[Processed, NDArray[np.int64], NDArray[np.float64]]:
    """The fate of the bars, the times that have a forecast, and its values."""
    processed = engine.process(bars, np.zeros(len(bars), np.int64))
    if not processed.forecasts:
        return processed, np.zeros(0, np.int64), np.zeros((0, 2))
    (forecast,) = processed.forecasts
    return processed, bars.ts[forecast.rows], forecast.values


def later(bars: BarColumns, first: int, by_ms: int) -> BarColumns:
    """The bars from the `first` on come `by_ms` later."""
    return BarColumns(bars.symbols, bars.ts + by_ms * (np.arange(len(bars)) >= first), bars.ohlcv)


_, TIMES, VALUES = said(make_engine(BUNDLE), BARS)


@pytest.mark.parametrize(("row", "fate"), [(WHERE - 1, DUPLICATE), (WHERE - 9, LATE)])
def test_duplicate_and_late_bars_are_counted_and_change_nothing(row: int, fate: int) -> None:
    rows = np.r_[0:WHERE, row, WHERE:N]
    engine = make_engine(BUNDLE)
    processed, times, values = said(engine, rows_of(BARS, rows))
    assert processed.status[WHERE] == fate
    np.testing.assert_array_equal(times, TIMES)
    np.testing.assert_allclose(values, VALUES, atol=1e-5)
    assert engine.take_tally() == NOTHING


def test_a_gap_is_filled_up_to_a_limit_and_the_symbol_speaks_on() -> None:
    engine = make_engine(BUNDLE)
    missing = SPEC.max_fill
    _, times, _ = said(engine, rows_of(BARS, np.r_[0:WHERE, WHERE + missing : N]))
    assert len(times) == len(TIMES) - missing
    assert engine.take_tally() == NOTHING | {"filled": missing}


@pytest.mark.parametrize("silence_ms", [(SPEC.max_fill + 1) * MINUTE_MS, 17 * HOUR_MS])
def test_a_longer_silence_is_a_session_break_and_the_symbol_speaks_on(silence_ms: int) -> None:
    engine = make_engine(BUNDLE)
    _, times, _ = said(engine, later(BARS, WHERE, silence_ms))
    assert len(times) == len(TIMES)
    assert engine.take_tally() == NOTHING | {"break": 1}


def test_after_a_very_long_silence_the_symbol_is_new_and_warms_up_in_silence() -> None:
    engine = make_engine(BUNDLE)
    long = make_bars(["A"], 2 * WARM_AT + 30)
    processed, times, values = said(engine, later(long, WARM_AT + 10, 11 * DAY_MS))
    assert np.flatnonzero(processed.status).tolist() == [0, WARM_AT + 10]
    assert len(times) == 10 + 20
    assert engine.take_tally() == NOTHING
    alone = later(rows_of(long, slice(WARM_AT + 10, None)), 0, 11 * DAY_MS)
    np.testing.assert_allclose(values[10:], said(make_engine(BUNDLE), alone)[2], atol=1e-5)


@pytest.mark.parametrize("silence_ms", [0, 17 * HOUR_MS], ids=["within a session", "overnight"])
@pytest.mark.parametrize("factor", [0.5, 2.0, 0.1, 10.0])
def test_a_split_is_a_break_whose_return_is_no_return(factor: float, silence_ms: int) -> None:
    ohlcv = BARS.ohlcv.copy()
    ohlcv[WHERE:, :4] *= factor
    split = later(BarColumns(BARS.symbols, BARS.ts, ohlcv), WHERE, silence_ms)
    engine = make_engine(BUNDLE)
    _, times, values = said(engine, split)
    assert len(times) == len(TIMES)
    assert engine.take_tally() == NOTHING | {"break": 1, "jump": 1}
    assert np.isfinite(
        values
    ).all()  # of which features it leaves alone: tests/models/test_features.py


def test_a_symbol_that_appears_warms_up_in_silence_and_disturbs_nobody() -> None:
    engine = make_engine(BUNDLE)
    newcomer = make_bars(["B"], WARM_AT + 5, seed=2, start_ts=10 * MINUTE_MS)
    both = BarColumns(
        BARS.symbols + newcomer.symbols,
        np.r_[BARS.ts, newcomer.ts],
        np.concatenate([BARS.ohlcv, newcomer.ohlcv]),
    )
    _, times, values = said(engine, rows_of(both, np.argsort(both.ts, kind="stable")))
    assert engine.symbols(0) == ["A", "B"]
    assert len(times) == len(TIMES) + 5
    for value in VALUES:
        assert np.isclose(values, value, atol=1e-5).all(axis=1).any()


def test_a_symbol_that_vanishes_is_counted_as_silent_and_keeps_its_state() -> None:
    engine = make_engine(BUNDLE)
    said(engine, BARS)
    assert engine.silent(0) == 0
    other = later(make_bars(["B"], 3), 0, int(BARS.ts[-1]) + SPEC.reset_after_ms)
    said(engine, other)
    assert (engine.silent(0), engine.symbols(0)) == (1, ["A", "B"])


@pytest.mark.kafka
def test_the_worker_counts_each_rule(fresh_topics: Settings) -> None:
    settings = fresh_topics
    appoint(settings, "champion", BUNDLE)
    ohlcv = BARS.ohlcv.copy()
    ohlcv[WHERE:, :4] /= 2
    bars = later(BarColumns(BARS.symbols, BARS.ts, ohlcv), WHERE, 17 * HOUR_MS)
    rows = np.r_[0:10, 12:WHERE, WHERE - 1, WHERE - 5, WHERE:N]
    vanished = make_bars(["Z"], 1)
    newest = later(make_bars(["B"], 1), 0, 15 * DAY_MS)
    with make_publisher(settings, "test") as publisher:
        for part in (vanished, rows_of(bars, rows), newest):
            for symbol, value in zip(part.symbols, encode_bars(part), strict=True):
                publisher.produce(BARS_TOPIC, symbol.encode(), value, partition=0)
    with Replica(settings) as replica:
        patience = Patience(replica, "the counters")
        while replica.metrics().get("gpt_trader_symbols_silent", 0) < 2 and patience.lasts():
            time.sleep(0.05)
        metrics = replica.metrics()
    counted = {
        "bars_total": {"duplicate": 1, "late": 1, "reset": 3, "ok": N - WARM_AT - 2},
        "gaps_total": {"filled": 2, "break": 1, "jump": 1},
    }
    assert metrics["gpt_trader_symbols"] == 3
    for name, label in (("bars_total", "status"), ("gaps_total", "kind")):
        for kind, count in counted[name].items():
            assert metrics[f'gpt_trader_{name}{{{label}="{kind}"}}'] == count, (name, kind)
