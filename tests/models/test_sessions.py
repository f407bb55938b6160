import sys

import numpy as np
import pandas as pd
import pytest
from pydantic import ValidationError

from models.features import DAY_MS, FEATURE_NAMES, FeatureSpec, history, market_steps
from models.sessions import CalendarUnavailable, session_closes
from models.targets import Target, labels
from tests.models.builders import MINUTE_MS, make_bars

pytest.importorskip("exchange_calendars")
HOUR_MS = 60 * MINUTE_MS


def new_york(text: str) -> int:
    return int(pd.Timestamp(text, tz="America/New_York").timestamp() * 1000)


def steps(before: str, after: str, interval_ms: int, max_fill: int = 12) -> int:
    closes = session_closes("XNYS", interval_ms < DAY_MS)
    return market_steps(new_york(before), new_york(after), interval_ms, max_fill, closes)


def test_closes_follow_daylight_saving_and_early_closes() -> None:
    closes = session_closes("XNYS", True)
    assert new_york("2020-07-06 16:00") in closes
    assert new_york("2020-12-07 16:00") in closes
    assert new_york("2020-11-27 13:00") in closes  # the day after Thanksgiving
    assert new_york("2020-11-27 16:00") not in closes
    assert (np.diff(closes) > 0).all()


@pytest.mark.parametrize(
    ("before", "after", "interval_ms", "expected"),
    [
        ("2020-07-06 11:30", "2020-07-06 13:30", HOUR_MS, 2),
        ("2020-07-06 13:30", "2020-07-07 09:30", 4 * HOUR_MS, 0),  # 5 intervals, yet a night
        ("2020-07-06 15:55", "2020-07-06 16:00", 5 * MINUTE_MS, 1),  # some feeds print the close
        ("2020-07-06 16:00", "2020-07-07 09:30", 5 * MINUTE_MS, 0),
        ("2020-07-06 10:00", "2020-07-06 12:00", 5 * MINUTE_MS, 0),  # silence inside a session
        ("2020-07-02 00:00", "2020-07-06 00:00", DAY_MS, 1),  # over the 4th and a weekend
        ("2020-07-06 00:00", "2020-07-09 00:00", DAY_MS, 3),
        ("2020-07-06 00:00", "2020-07-31 00:00", DAY_MS, 0),
        ("2020-07-06 00:00", "2020-07-13 00:00", 7 * DAY_MS, 1),
    ],
)
def test_steps_on_a_calendar(before: str, after: str, interval_ms: int, expected: int) -> None:
    assert steps(before, after, interval_ms) == expected


def test_a_market_around_the_clock_never_closes() -> None:
    assert len(session_closes("24/7", True)) == 0
    assert len(session_closes(None, True)) == 0


def test_lunch_is_a_break_for_bars_within_the_day_only() -> None:
    noon = int(pd.Timestamp("2020-07-06 12:00", tz="Asia/Hong_Kong").timestamp() * 1000)
    assert noon in session_closes("XHKG", True)
    assert noon not in session_closes("XHKG", False)


def test_beyond_the_calendar_long_silences_are_breaks_as_without_one() -> None:
    closes = session_closes("XNYS", True)
    far = int(closes[-1]) + 400 * DAY_MS
    assert market_steps(far, far + 3 * HOUR_MS, HOUR_MS, 12, closes) == 3
    assert market_steps(far, far + 20 * HOUR_MS, HOUR_MS, 12, closes) == 0


def test_for_minute_bars_the_calendar_agrees_with_the_silence_rule() -> None:
    plain = FeatureSpec(interval_ms=5 * MINUTE_MS, timezone="America/New_York")
    known = plain.model_copy(update={"calendar": "XNYS"})
    ts, ohlcv = make_bars(78 * 8, start=new_york("2020-03-09 09:30"), missing=0.0)
    weekday = pd.to_datetime(ts, unit="ms").day_of_week < 5
    ts, ohlcv = ts[weekday], ohlcv[weekday]
    np.testing.assert_array_equal(history(plain, ts, ohlcv)[0], history(known, ts, ohlcv)[0])


def test_with_four_hour_bars_only_the_calendar_keeps_the_night_out_of_the_volatility() -> None:
    days = pd.bdate_range("2020-03-02", periods=200, tz="America/New_York")
    ts = np.concatenate([(days + pd.Timedelta(hours=h)).as_unit("ms").asi8 for h in (9.5, 13.5)])
    ts.sort()
    _, ohlcv = make_bars(len(ts), session_bars=None)
    ohlcv[::2, :4] = ohlcv[::2, :4] * 1.5 ** np.arange(1, 201)[:, None]
    ohlcv[1::2, :4] = ohlcv[1::2, :4] * 1.5 ** np.arange(1, 201)[:, None]  # each night up by half
    plain = FeatureSpec(interval_ms=4 * HOUR_MS, timezone="America/New_York")
    known = FeatureSpec(interval_ms=4 * HOUR_MS, timezone="America/New_York", calendar="XNYS")
    column = FEATURE_NAMES.index("log_rv_24")
    level = [history(spec, ts, ohlcv)[0][100:, column].mean() for spec in (plain, known)]
    assert level[0] > level[1] + 3
    target = [Target(kind="volatility", horizon=6)]
    label = [np.nanmean(labels(target, spec, ts, ohlcv)) for spec in (plain, known)]
    assert label[0] > label[1] + 3


def test_an_unknown_calendar_is_refused_with_the_spec() -> None:
    with pytest.raises(ValidationError, match="no such calendar"):
        FeatureSpec(interval_ms=HOUR_MS, calendar="MARS")


def test_without_the_package_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "exchange_calendars", None)
    with pytest.raises(CalendarUnavailable, match=r"gpt-trader-stream\[calendars\]"):
        session_closes.__wrapped__("XNYS", True)
