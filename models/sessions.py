"""Session calendars of exchanges, by the optional package exchange_calendars.

Where a calendar is named, a night is known to be a night, whatever the bar interval; without one, a
silence longer than `FeatureSpec.max_fill` bars is taken for it.
"""

import warnings
from functools import lru_cache
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import pandas as pd
    from exchange_calendars import ExchangeCalendar

EARLIEST: Final = "1990-01-01"
NONE: Final = np.empty(0, dtype=np.int64)
WEEKS: Final = {"weekdays": (1, 2, 3, 4, 5), "sunday_to_thursday": (0, 1, 2, 3, 4)}
"""Calendars of UTC days alone, Sunday 0, for daily bars of a market whose holidays are not known.
Bars with the stamp of a local midnight east of Greenwich, or of a New York evening, are the second."""
_DAY_MS: Final = 86_400_000
_LAST_DAY: Final = 47_500  # in the year 2100


class CalendarUnavailable(ValueError):
    """No such calendar, or the package that knows it is not installed."""


@lru_cache(maxsize=64)
def session_closes(name: str | None, with_breaks: bool) -> NDArray[np.int64]:
    """Closing times i64[m], epoch ms, ascending, of every session from 1990 to about a year ahead.

    A close at which the next session opens (a market around the clock) is none. `with_breaks` adds
    the start of lunch breaks. Empty for None. Raises CalendarUnavailable.
    """
    if name is None:
        return NONE
    if name in WEEKS:
        days = np.arange(_LAST_DAY)
        return np.asarray((days[np.isin(weekday(days), WEEKS[name])] + 1) * _DAY_MS - 1)
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", DeprecationWarning
        )  # of pandas, about the package's own code
        calendar = _calendar(name)
    opens, closes = (_epoch_ms(x) for x in (calendar.opens, calendar.closes))
    found = closes[:-1][closes[:-1] < opens[1:]]
    if with_breaks:
        found = np.concatenate([found, _epoch_ms(calendar.break_starts.dropna())])
    return np.sort(found)


def weekday(days: NDArray[np.int64]) -> NDArray[np.int64]:
    """Of days since 1970, a Thursday; Sunday is 0."""
    return (days + 4) % 7


def _calendar(name: str) -> "ExchangeCalendar":
    try:
        from exchange_calendars import errors, get_calendar
    except ImportError as error:
        raise CalendarUnavailable(
            "session calendars need: pip install 'gpt-trader-stream[calendars]'"
        ) from error
    try:
        return get_calendar(name, start=EARLIEST)
    except errors.InvalidCalendarName as error:
        raise CalendarUnavailable(f"no such calendar: {name!r}") from error
    except ValueError:  # some are known only from a later day on
        return get_calendar(name, start=get_calendar(name).bound_min())


def _epoch_ms(stamps: "pd.Series[pd.Timestamp]") -> NDArray[np.int64]:
    return np.asarray(stamps.dt.as_unit("ms").astype("int64"), dtype=np.int64)
