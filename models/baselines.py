"""Frozen simple references: what a champion must beat to be worth its keep.

Volatility is held against an exponentially weighted variance of past returns, direction against
the base rate of the training data, return against zero. A bundle stores which half-life and which
base rate; the variances of all half-lives are kept per symbol, so a new bundle's reference is warm.
"""

from collections.abc import Iterable
from math import log
from typing import Annotated

import numpy as np
from numba import njit
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from models.features import DUPLICATE, LATE, OK, RESET, VARIANCE_FLOOR, FeatureSpec, market_steps
from models.scoring import Floats, loss
from models.slots import Slots
from models.targets import Target

HALF_LIVES_BARS = (8, 16, 32, 64, 128, 256)
CORRECTED = 4
"""Status beside those of `models.features`: repeats the newest time with another close; not applied."""

Ints = NDArray[np.int64]

_DECAYS = np.exp2(-1.0 / np.array(HALF_LIVES_BARS))


class Reference(BaseModel):
    """The frozen opponent of one target; only the field of its kind is used."""

    model_config = ConfigDict(frozen=True)

    half_life_bars: int = 64
    base_rate: Annotated[float, Field(ge=0, le=1)] = 0.5

    def forecast(self, target: Target, log_variances: Floats) -> Floats:
        """f64[n] in the target's unit, from `Variances.at` (f64[n, len(HALF_LIVES_BARS)])."""
        if target.kind == "volatility":
            return log_variances[:, HALF_LIVES_BARS.index(self.half_life_bars)]
        constant = self.base_rate if target.kind == "direction" else 0.0
        return np.full(len(log_variances), constant)


def fit_reference(target: Target, series: Iterable[tuple[Floats, Floats]]) -> Reference:
    """The best reference on training data.

    `series` holds per symbol (log variances f64[n, H] of `history`, labels f64[n]); a NaN label
    is no training row. The half-life minimises mean QLIKE; ties go to the shorter one.
    """
    parts = [(v[np.isfinite(y)], y[np.isfinite(y)]) for v, y in series]
    variances = np.concatenate([v for v, _ in parts])
    labels = np.concatenate([y for _, y in parts])
    if not len(labels):
        raise ValueError("no training label to fit a reference on")
    if target.kind == "volatility":
        losses = np.nanmean(loss(target, variances, labels[:, None]), axis=0)
        return Reference(half_life_bars=HALF_LIVES_BARS[int(np.argmin(losses))])
    if target.kind == "direction":
        return Reference(base_rate=float(np.mean(labels == target.classes - 1)))
    return Reference()


class Variances(Slots):
    """Streaming log variances of many symbols, one per half-life, O(1) a bar.

    The last `depth` bars of each slot stay readable, so that a forecast can be looked up
    when its label matures. Gaps follow the feature spec: filled bars count as zero returns,
    the return across a session break is left out, a long silence starts anew.
    """

    def __init__(self, spec: FeatureSpec, depth: int, capacity: int = 0) -> None:
        self._clock = np.array([spec.interval_ms, spec.max_fill, spec.reset_after_ms])
        self._closes = spec.closes
        h = len(HALF_LIVES_BARS)
        layout = np.dtype(
            [
                ("last_ts", "i8"),
                ("bars_seen", "i8"),
                ("steps", "i8"),
                ("close", "f8"),
                ("sums", "f8", (h,)),
                ("ring_ts", "i8", (depth,)),
                ("ring", "f4", (depth, h)),
            ],
            align=True,
        )
        super().__init__(layout, capacity)

    def update(self, slots: Ints, ts: Ints, close: Floats) -> NDArray[np.int8]:
        """Apply bars in the order given (a slot may occur more than once); i8[n] status."""
        status = np.empty(len(slots), np.int8)
        clock, closes = self._clock, self._closes
        _update(self._state, slots, ts, np.ascontiguousarray(close), clock, closes, _DECAYS, status)
        return status

    def at(self, slots: Ints, ts: Ints) -> Floats:
        """f64[n, H]: log variance per bar as known at the close of bar `ts`; NaN where unknown."""
        out = np.full((len(slots), len(HALF_LIVES_BARS)), np.nan)
        _look_up(self._state, slots, ts, out)
        return out


def history(spec: FeatureSpec, ts: Ints, close: Floats) -> Floats:
    """f64[n, H] of one symbol's bars (ascending `ts`): what `Variances` gives bar by bar."""
    variances = Variances(spec, depth=max(len(ts), 1), capacity=1)
    slots = np.zeros(len(ts), np.int64)
    variances.update(slots, ts, close)
    return variances.at(slots, ts)


@njit(cache=True)
def _update(state, slots, ts, close, clock, closes, decays, status):  # type: ignore[no-untyped-def]
    for i in range(slots.size):
        s = state[slots[i]]
        elapsed = ts[i] - s.last_ts
        if s.bars_seen == 0 or elapsed > clock[2]:
            status[i] = RESET
            s.bars_seen = s.steps = 0
            s.sums[:] = 0.0
        elif elapsed < 0:
            status[i] = LATE
            continue
        elif elapsed == 0:
            status[i] = DUPLICATE if close[i] == s.close else CORRECTED
            continue
        else:
            status[i] = OK
            passed = market_steps(s.last_ts, ts[i], clock[0], clock[1], closes)
            if passed > 0:
                s.steps += passed
                squared = log(close[i] / s.close) ** 2
                for j in range(decays.size):
                    s.sums[j] = decays[j] ** passed * s.sums[j] + (1.0 - decays[j]) * squared
        s.last_ts, s.close = ts[i], close[i]
        place = s.bars_seen % s.ring_ts.size
        s.bars_seen += 1
        s.ring_ts[place] = ts[i]
        for j in range(decays.size):
            # Divided by the weights so far: unbiased from the first return on (Kingma & Ba 2015, 3).
            if s.steps == 0:
                s.ring[place, j] = np.nan
            else:
                variance = s.sums[j] / (1.0 - decays[j] ** s.steps)
                s.ring[place, j] = log(max(variance, VARIANCE_FLOOR))


@njit(cache=True)
def _look_up(state, slots, ts, out):  # type: ignore[no-untyped-def]
    for i in range(slots.size):
        s = state[slots[i]]
        depth = s.ring_ts.size
        low, high = max(s.bars_seen - depth, 0), s.bars_seen
        while low < high:
            middle = (low + high) // 2
            if s.ring_ts[middle % depth] < ts[i]:
                low = middle + 1
            else:
                high = middle
        if low < s.bars_seen and s.ring_ts[low % depth] == ts[i]:
            out[i] = s.ring[low % depth]
