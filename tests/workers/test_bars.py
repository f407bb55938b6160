from datetime import date
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.simulation import Scenario
from workers import bars
from workers.errors import BarsUnavailable

COLUMNS = ["symbol", "ts", "open", "high", "low", "close", "volume"]


def make_bars(**columns: object) -> pd.DataFrame:
    plain = {
        "symbol": "SPY",
        "ts": 0,
        "open": 100.0,
        "high": 100.1,
        "low": 99.9,
        "close": 100.0,
        "volume": 1.0,
    }
    return pd.DataFrame([plain | columns])


@pytest.fixture(scope="module")
def spy() -> pd.DataFrame:
    return bars.spy()


def at(frame: pd.DataFrame, new_york: str) -> pd.Series:
    ts = int(pd.Timestamp(new_york, tz="America/New_York").timestamp() * 1_000)
    return frame[frame["ts"] == ts].iloc[0]


def test_spy_has_every_bar_of_three_years_in_order(spy: pd.DataFrame) -> None:
    assert list(spy) == COLUMNS
    assert len(spy) == 293_707
    assert spy["ts"].is_monotonic_increasing
    assert spy["ts"].is_unique
    assert spy["ts"].dtype == np.int64


@pytest.mark.parametrize(
    ("utc", "close"), [("2017-01-03T14:30", 224.95), ("2017-07-05T13:30", None)]
)
def test_a_session_opens_at_half_past_nine_in_new_york_in_winter_and_in_summer(
    spy: pd.DataFrame, utc: str, close: float | None
) -> None:
    row = spy[spy["ts"] == int(pd.Timestamp(utc, tz="UTC").timestamp() * 1_000)]
    assert len(row) == 1
    assert close is None or row["close"].iloc[0] == close


def test_every_repaired_bar_is_a_possible_bar(spy: pd.DataFrame) -> None:
    assert (spy["low"] <= spy[["open", "close"]].min(axis=1)).all()
    assert (spy["high"] >= spy[["open", "close"]].max(axis=1)).all()


@pytest.mark.parametrize("when", ["2017-05-17 12:47", "2017-09-07 13:49", "2019-09-11 16:00"])
def test_the_three_false_closes_are_undone(spy: pd.DataFrame, when: str) -> None:
    bar = at(spy, when)
    assert abs(bar["close"] / bar["open"] - 1) < 0.003
    assert bar["low"] <= bar["close"] <= bar["high"]


def test_a_spike_in_the_range_is_cut_and_the_close_stays(spy: pd.DataFrame) -> None:
    bar = at(spy, "2017-12-20 12:10")
    assert bar["close"] == 267.17
    assert bar["low"] == pytest.approx(267.15 * (1 - bars.WICK_LIMIT))


def test_only_the_asked_sessions_are_read() -> None:
    frame = bars.spy(date(2018, 2, 5), date(2018, 2, 6))
    assert len(frame) == 2 * 391
    days = pd.to_datetime(frame["ts"], unit="ms", utc=True).dt.tz_convert(bars.NEW_YORK).dt.date
    assert sorted(days.unique()) == [date(2018, 2, 5), date(2018, 2, 6)]


@pytest.mark.parametrize(
    ("source", "sessions"),
    [
        ("spy:2018-02-05", 1),
        ("spy:2018-02", 19),
        ("spy:2018-02-05..2018-02-06", 2),
        ("spy:2019-12-30..", 2),
    ],
)
def test_a_source_may_name_a_part_of_the_bars(source: str, sessions: int) -> None:
    assert len(bars.read(source)) == 391 * sessions


@pytest.mark.parametrize("source", ["spy:2031", "spy:February", "nowhere.parquet", "", "spx"])
def test_a_source_without_bars_is_an_error_that_names_it(source: str) -> None:
    with pytest.raises(BarsUnavailable, match=source.partition(":")[2] or repr(source)):
        bars.read(source)


@given(
    prices=st.lists(st.floats(1, 1_000), min_size=4, max_size=4),
)
@settings(deadline=None, max_examples=50)
def test_repair_makes_any_bar_possible_and_a_second_repair_changes_nothing(
    prices: list[float],
) -> None:
    open_, close, *ends = prices
    frame = make_bars(open=open_, close=close, low=min(ends), high=max(ends))
    once = bars.repair(frame)
    row = once.iloc[0]
    assert row["low"] <= min(row["open"], row["close"])
    assert max(row["open"], row["close"]) <= row["high"]
    pd.testing.assert_frame_equal(bars.repair(once), once)


def test_repair_looks_at_one_bar_at_a_time(spy: pd.DataFrame) -> None:
    part = spy.sample(200, random_state=1)
    pd.testing.assert_frame_equal(bars.repair(part), part)
    wild = pd.concat([make_bars(close=120.0), make_bars(low=50.0)], ignore_index=True)
    alone = pd.concat([bars.repair(wild.iloc[[i]]) for i in range(2)])
    pd.testing.assert_frame_equal(bars.repair(wild), alone)


def test_a_missing_package_is_an_error_that_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bars, "find_spec", lambda name: None)
    with pytest.raises(BarsUnavailable, match=r"pip install .*demo"):
        bars.spy()


def test_sources_merge_in_event_time_order_then_by_symbol() -> None:
    a = pd.concat([make_bars(symbol="B", ts=1), make_bars(symbol="B", ts=3)])
    b = pd.concat([make_bars(symbol="A", ts=1), make_bars(symbol="A", ts=2)])
    merged = bars.by_time(a, b)
    assert list(zip(merged["ts"], merged["symbol"], strict=True)) == [
        (1, "A"),
        (1, "B"),
        (2, "A"),
        (3, "B"),
    ]


def test_simulated_symbols_trade_at_the_given_times_only() -> None:
    ts = bars.first_minutes(bars.spy(date(2018, 2, 5), date(2018, 2, 6))["ts"], 10)
    frame = bars.simulated(Scenario(symbols=3), ts, seed=1)
    assert len(frame) == 2 * 10 * 3
    assert set(frame["ts"]) == set(ts)
    assert frame["symbol"].str.startswith("SIM").all()


def test_a_parquet_file_is_read_in_event_time_order(tmp_path: Path) -> None:
    frame = pd.concat(
        [make_bars(symbol=s, ts=60_000 * t) for s in ("A", "B") for t in range(3)],
        ignore_index=True,
    )
    frame.to_parquet(tmp_path / "bars.parquet")
    read = bars.from_parquet(tmp_path / "bars.parquet")
    assert read["ts"].is_monotonic_increasing
    assert list(read["symbol"]) == ["A", "B"] * 3


def test_a_file_of_another_kind_is_refused_with_the_reason(tmp_path: Path) -> None:
    path = tmp_path / "bars.csv"
    make_bars().to_csv(path)
    with pytest.raises(BarsUnavailable, match="no parquet file"):
        bars.read(str(path))
