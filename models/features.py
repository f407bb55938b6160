"""Features of one symbol from its OHLCV bars: one O(1) kernel for the live stream and for history.

Shapes: n bars, S symbol slots, F features, W windows, H half-lives, B time-of-day buckets.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Annotated, Final, Self
from zoneinfo import ZoneInfo

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from models.feature_kernel import (
    AHEAD,
    DAY_MS,
    DUPLICATE,
    HALF_LIVES,
    HOUR_MS,
    LATE,
    MAX_RETURN,
    OK,
    RESET,
    RETURN2_UNIT,
    RING,
    STATE,
    TALLIED,
    VARIANCE_FLOOR,
    WARM_UP_BARS,
    WEEK_MS,
    WINDOWS,
    clock_and_decays,
    market_steps,
    run,
    steps_between,
)
from models.scaling import RollingScaler
from models.sessions import session_closes
from models.slots import Slots, bars_in_order

__all__ = [
    "AHEAD",
    "CLOCK_NAMES",
    "DAY_MS",
    "DUPLICATE",
    "FEATURES",
    "FEATURE_NAMES",
    "HALF_LIVES",
    "HOUR_MS",
    "LATE",
    "MAX_RETURN",
    "OK",
    "RESET",
    "RETURN2_UNIT",
    "RING",
    "STATE",
    "TALLIED",
    "VARIANCE_FLOOR",
    "WARM_UP_BARS",
    "WEEK_MS",
    "WINDOWS",
    "F",
    "Feature",
    "FeatureSpec",
    "Features",
    "history",
    "market_steps",
    "steps_between",
    "utc_offsets",
]


class FeatureSpec(BaseModel):
    """What the kernel must know of a market.

    Up to `max_fill` absent bars are filled: price forward, zero return, zero volume. A longer
    silence is a session break: state goes on, and the return across it is left to the gap features.
    After `reset_after_ms` without a bar the symbol starts anew. A jump by a factor of 1.8 or more
    from a close to the next open is taken for a split: a session break whose return is unknown.
    `timezone` is the exchange's.

    `calendar` names an exchange of the package exchange_calendars, or a week of
    `models.sessions.WEEKS`: then every session close is a
    break, however short, and daily bars are counted in sessions. `rolling_half_life` (bars) gives
    features in deviations from the symbol's own past (`models.scaling.RollingScaler`).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    interval_ms: Annotated[int, Field(gt=0, le=WEEK_MS)]
    timezone: str = "UTC"
    max_fill: Annotated[int, Field(ge=0, le=10_000)] = 12
    reset_after_ms: Annotated[int, Field(gt=0)] = 10 * DAY_MS
    calendar: str | None = None
    rolling_half_life: Annotated[float, Field(ge=2)] | None = None

    @property
    def closes(self) -> NDArray[np.int64]:
        """Session closes of the calendar, epoch ms; empty without one."""
        return session_closes(self.calendar, with_breaks=self.interval_ms < DAY_MS)

    @model_validator(mode="after")
    def _calendar_is_known(self) -> Self:
        self.closes  # noqa: B018 - raises where it is not
        return self

    @field_validator("timezone")
    @classmethod
    def _is_known(cls, name: str) -> str:
        try:
            ZoneInfo(name)
        except (KeyError, OSError, ValueError) as error:
            raise ValueError(f"no such time zone: {name!r}") from error
        return name


@dataclass(frozen=True)
class Feature:
    name: str
    formula: str
    source: str


def _features() -> tuple[Feature, ...]:
    """In the order in which the kernel writes them."""
    corsi = "Corsi 2009, HAR"
    gk = "Garman, Klass 1980"
    bns = "Barndorff-Nielsen, Shephard 2004"
    semi = "Barndorff-Nielsen, Kinnebrock, Shephard 2010"
    amaya = "Amaya, Christoffersen, Jacobs, Vasquez 2015"
    moskowitz = "Moskowitz, Ooi, Pedersen 2012"
    taylor = "Taylor, Xu 1997; Andersen, Bollerslev 1997"
    bjz = "Boudoukh, Richardson, Smith 1994"
    rows: list[tuple[str, str, str]] = []
    add = rows.append
    for w in WINDOWS:
        add((f"log_rv_{w}", f"log(mean of r^2 over {w} bars)", corsi))
    for h in HALF_LIVES:
        add((f"log_gk_hl{h}", f"log(ewm_{h}(g)), g = Garman-Klass + (ln open/prev close)^2", gk))
    for h in HALF_LIVES[1:5]:
        add((f"log_calm_hl{h}", f"log(ewm_{h}(g / season of its bucket))", taylor))
    add(
        (
            "parkinson_ratio_hl20",
            "log(ewm_20(ln(high/low)^2 / 4 ln 2) / ewm_20(r^2))",
            "Parkinson 1980",
        )
    )
    add(
        (
            "rogers_satchell_ratio_hl20",
            "log(ewm_20(Rogers-Satchell) / ewm_20(g))",
            "Rogers, Satchell 1991",
        )
    )
    add(("return_1", "r / s, s^2 = ewm_78(g)", "RiskMetrics 1996"))
    add(("abs_return_1", "|r| / s", "RiskMetrics 1996"))
    add(("log_range_1", "log(g / s^2 + 0.02)", gk))
    for h in (20, 78):
        add((f"jump_share_hl{h}", f"1 - ewm_{h}(pi/2 |r r-|) / ewm_{h}(r^2)", bns))
    for h in (6, 20, 78):
        add((f"downside_share_hl{h}", f"ewm_{h}(r^2 where r < 0) / ewm_{h}(r^2)", semi))
    add(("skewness_hl78", "ewm_78(r^3) / ewm_78(r^2)^1.5, within -5..5", amaya))
    add(("log_kurtosis_hl78", "log(ewm_78(r^4) / ewm_78(r^2)^2)", amaya))
    for h in (6, 20, 78):
        add((f"autocorrelation_hl{h}", f"ewm_{h}(r r-) / ewm_{h}(r^2)", bjz))
    for h in (20, 78):
        add(
            (
                f"vol_of_vol_hl{h}",
                f"standard deviation by ewm_{h} of log(g + s^2/50)",
                "Corsi, Mittnik, Pigorsch, Pigorsch 2008",
            )
        )
    for h in (6, 78, 390):
        add((f"log_mean_hl{h}", f"ewm_{h}(log(g + s^2/50))", corsi))
    for h in HALF_LIVES[:5]:
        add(
            (f"trend_hl{h}", f"ewm_{h}(r) / sqrt(ewm_{h}(r^2)), scaled to unit variance", moskowitz)
        )
    for h in (6, 20):
        add((f"rsi_hl{h}", f"ewm_{h}(r) / ewm_{h}(|r|), in -1..1", "Wilder 1978"))
    add(
        (
            "stochastic_14",
            "(close - lowest low) / (highest high - lowest low), 14 bars",
            "Lane 1984",
        )
    )
    for fast, slow in ((6, 20), (20, 78)):
        add(
            (
                f"macd_{fast}_{slow}",
                f"(ewm_{fast} - ewm_{slow} of the gap-free log price) / (s sqrt {slow})",
                "Appel 1979",
            )
        )
    add(("volume_1", "ln v - ewm_78(ln v) over traded bars; -5 where v = 0", "Karpoff 1987"))
    add(("volume_6_78", "ewm_6(ln v) - ewm_78(ln v)", "Karpoff 1987"))
    add(("volume_20_390", "ewm_20(ln v) - ewm_390(ln v)", "Karpoff 1987"))
    add(("volume_season_1", "volume_1 - its mean in this bucket", taylor))
    for h in (20, 78):
        add(
            (
                f"money_flow_hl{h}",
                f"ewm_{h}(v (2 close - high - low) / (high - low)) / ewm_{h}(v)",
                "Chaikin 1982",
            )
        )
    add(
        (
            "season_now",
            "log(season of this bucket), season = EW mean by day of g / ewm_390(g)",
            taylor,
        )
    )
    for n in AHEAD:
        add(
            (f"expected_{n}", f"log(ewm_78(g / season) * mean season of the next {n} bars)", taylor)
        )
    for n in AHEAD[1:]:
        add((f"yesterday_{n}", f"log(mean g of the next {n} bars' buckets, a day before)", taylor))
    for harmonic in (1, 2):
        add(
            (
                f"day_sin_{harmonic}",
                f"sin(2 pi {harmonic} local time of day)",
                "Andersen, Bollerslev 1997",
            )
        )
        add(
            (
                f"day_cos_{harmonic}",
                f"cos(2 pi {harmonic} local time of day)",
                "Andersen, Bollerslev 1997",
            )
        )
    add(("week_sin", "sin(2 pi local time of week)", "French 1980"))
    add(("week_cos", "cos(2 pi local time of week)", "French 1980"))
    add(
        (
            "bars_since_open",
            "log(1 + bars since session break or local midnight)",
            "Admati, Pfleiderer 1988",
        )
    )
    add(("session_return", "sum of r since the open / (s sqrt bars)", "Gao, Han, Li, Zhou 2018"))
    add(("session_position", "place of close in the session's range, 0..1", "George, Hwang 2004"))
    add(("time_since_last", "log(intervals since the bar before)", "Engle, Russell 1998, ACD"))
    add(
        (
            "gap_return",
            "last break's ln(open / prev close) / (s sqrt 78)",
            "Lou, Polk, Skouras 2019",
        )
    )
    add(("gap_size", "log(1 + |last break's return| / s)", "Lou, Polk, Skouras 2019"))
    add(("log_gap_variance", "log(1 + ewm_10(break return^2) / ewm_390(g))", "Hansen, Lunde 2005"))
    add(("closed_time", "log(1 + hours the last break lasted)", "French, Roll 1986"))
    add(("absent_share_hl78", "share of absent bars by ewm_78", "Lesmond, Ogden, Trzcinka 1999"))
    add(
        (
            "zero_return_share_hl20",
            "share of bars with r = 0 by ewm_20",
            "Lesmond, Ogden, Trzcinka 1999",
        )
    )
    add(
        (
            "zero_volume_share_hl78",
            "share of bars without volume by ewm_78",
            "Lesmond, Ogden, Trzcinka 1999",
        )
    )
    return tuple(Feature(*row) for row in rows)


FEATURES: Final = _features()
"""r: log return on the bar before (on the own open after a session break); ewm_h: exponentially
weighted mean with half-life h bars, absent bars as zeros, unbiased from the first bar on."""
FEATURE_NAMES: Final = tuple(feature.name for feature in FEATURES)
F: Final = len(FEATURES)
CLOCK_NAMES: Final = (
    *("day_sin_1", "day_cos_1", "day_sin_2", "day_cos_2", "week_sin", "week_cos"),
    *("bars_since_open", "closed_time"),
)
"""Features that the clock alone moves."""


class Features(Slots):
    """Feature state of many symbols, addressed by slot."""

    def __init__(self, spec: FeatureSpec, capacity: int = 0) -> None:
        super().__init__(STATE, capacity)
        self.spec = spec
        self._tally = np.zeros(len(TALLIED), np.int64)
        self._market = (
            *clock_and_decays(spec.interval_ms, spec.max_fill, spec.reset_after_ms),
            utc_offsets(spec.timezone),
            spec.closes,
        )
        self._rolling = (
            RollingScaler(spec.rolling_half_life, F, capacity) if spec.rolling_half_life else None
        )

    def update(
        self, slots: NDArray[np.int64], ts: NDArray[np.int64], ohlcv: NDArray[np.float64]
    ) -> tuple[NDArray[np.float32], NDArray[np.int8]]:
        """Take bars in the order given; a slot may occur more than once.

        slots i64[n], ts i64[n] epoch ms UTC, ohlcv f64[n, 5] -> features f32[n, F], status i8[n].
        DUPLICATE and LATE bars leave the state alone and have a row of zeros.
        """
        n = len(slots)
        x = np.empty((n, F), dtype=np.float32)
        status = np.empty(n, dtype=np.int8)
        slots, ts, ohlcv = bars_in_order(slots, ts, ohlcv)
        run(self._state, slots, ts, ohlcv, *self._market, x, status, self._tally)
        if self._rolling:
            self._rolling.update(slots, status, x)
        return x, status

    def take_tally(self) -> dict[str, int]:
        """What lay between bars since the last call: absent bars filled, session breaks, jumps."""
        taken = dict(zip(TALLIED, self._tally.tolist(), strict=True))
        self._tally[:] = 0
        return taken

    def grow(self, capacity: int) -> None:
        super().grow(capacity)
        if self._rolling:
            self._rolling.grow(capacity)

    def reset(self, slots: NDArray[np.int64]) -> None:
        super().reset(slots)
        if self._rolling:
            self._rolling.reset(slots)

    def export(self, slots: NDArray[np.int64]) -> dict[str, NDArray[np.generic]]:
        arrays = super().export(slots)
        if self._rolling:
            arrays |= {f"rolling_{k}": v for k, v in self._rolling.export(slots).items()}
        return arrays

    def load(self, slots: NDArray[np.int64], arrays: Mapping[str, NDArray[np.generic]]) -> None:
        if self._rolling:
            mine = {k.removeprefix("rolling_"): v for k, v in arrays.items() if "rolling_" in k}
            self._rolling.load(slots, mine)
        super().load(slots, arrays)


def history(
    spec: FeatureSpec, ts: NDArray[np.int64], ohlcv: NDArray[np.float64]
) -> tuple[NDArray[np.float32], NDArray[np.int8]]:
    """Features f32[n, F] and status i8[n] of one symbol's bars in time order."""
    slots = np.zeros(len(ts), dtype=np.int64)
    return Features(spec, capacity=1).update(slots, ts, ohlcv)


@lru_cache(maxsize=64)
def utc_offsets(timezone: str) -> NDArray[np.int64]:
    """Table i64[m, 2]: from epoch ms [i, 0] on, local time is UTC + [i, 1] ms; 1970 to 2100."""
    zone = ZoneInfo(timezone)

    def offset_ms(second: int) -> int:
        offset = datetime.fromtimestamp(second, UTC).astimezone(zone).utcoffset()
        return int((offset or timedelta()).total_seconds() * 1000)

    week = 7 * 86_400
    rows = [(-(2**62), offset_ms(0))]
    for start in range(0, 4_102_444_800, week):
        if offset_ms(start + week) == rows[-1][1]:
            continue
        before, after = start, start + week
        while after - before > 1:
            middle = (before + after) // 2
            if offset_ms(middle) == rows[-1][1]:
                before = middle
            else:
                after = middle
        rows.append((after * 1000, offset_ms(after)))
    return np.array(rows, dtype=np.int64)
