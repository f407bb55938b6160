"""What a forecast costs as it runs up: a bar settles its share of every forecast that reaches over it.

A forecast v of the log variance of the next h steps costs QLIKE, exp(y - v) - (y - v) - 1 (Patton
2011, J. Econometrics 160), with exp(y) the mean of r_1^2 .. r_h^2. But for what is the same for all
forecasters that is linear in each r^2, so it is a sum over the steps, of

    (r_k^2 exp(-v) + v) / h,

and a step's share is known at its close, not h steps after the forecast. The running loss of a bar is
what it adds to all forecasts that reach over it, a mean over them. Two forecasters' running losses
differ over many bars by as much as their QLIKE does; but the difference is there h bars earlier, and
given the past the only news in it is the bar's own return: labels overlap, these do not.
"""

from math import exp

import numpy as np
from numba import njit
from numpy.typing import NDArray

from models.features import FeatureSpec, market_steps
from models.slots import Slots
from models.targets import Labels, Target

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

MOST_SURPRISE = 10.0
"""A squared return counts for at most so many times what the reference expected: 3.2 standard
deviations. Beyond it are false prints, and jumps that would drown the rest. It is the same for whoever is
compared, so that nobody who forecasts too little is spared by it, as by a limit on differences."""


def runs_up(target: Target) -> bool:
    """Whether its loss is a sum over steps."""
    return target.kind == "volatility"


def pair_bars(target: Target) -> int:
    """Bar times in a pair of `models.comparison`: a horizon of them where no label has to mature."""
    return target.horizon if runs_up(target) else 1


class RunningLosses(Slots):
    """Of many series (one forecaster, one symbol), by slot, bar by bar."""

    def __init__(self, target: Target, spec: FeatureSpec, capacity: int = 0) -> None:
        self._horizon = target.horizon
        self._clock = np.array([spec.interval_ms, spec.max_fill])
        self._closes = spec.closes
        ring = 2 * target.horizon + 8  # a session's close and the next one's open are the same step
        layout = np.dtype(
            [
                ("last_ts", "i8"),
                ("bars_seen", "i8"),
                ("step", "i8"),
                ("ring_step", "i8", (ring,)),
                ("ring_value", "f8", (ring, 2)),
                ("ring_precision", "f8", (ring, 2)),
            ],
            align=True,
        )
        super().__init__(layout, capacity)

    def update(self, slots: Ints, ts: Ints, next_ts: Ints, r2: Floats, said: Floats) -> Floats:
        """Losses f64[n, 2] of the forecaster and of its reference, at the close of bars `next_ts`.

        `said` f64[n, 2]: what both forecast at the close of bars `ts`, the ones before; `r2`: squared
        return from there. A slot's rows come in the order of their bars. NaN where no step has passed
        (a session has opened), and until there was a forecast of every bar for a whole horizon.
        """
        losses = np.full((len(slots), 2), np.nan)
        clock, closes, h = self._clock, self._closes, self._horizon
        _run(self._state, slots, ts, next_ts, r2, said, clock, closes, h, losses)
        return losses


def running_losses(
    target: Target, spec: FeatureSpec, ts: Ints, ohlcv: Floats, said: Floats
) -> Floats:
    """F64[n, 2] of one symbol's bars in time order, in the rows of the bars that they are known at.

    `said` f64[n, 2] by forecaster and reference, NaN where there is no forecast.
    """
    found = np.full((len(ts), 2), np.nan)
    one = np.zeros(len(ts), np.int64)
    steps = Labels((), spec, capacity=1, next_steps=1).update(one, ts, ohlcv)
    before = np.searchsorted(ts, steps.ts)
    forecast = np.isfinite(said[before]).all(axis=1)
    before, steps_ts, next_ts = before[forecast], steps.ts[forecast], steps.matured_ts[forecast]
    losses = RunningLosses(target, spec, capacity=1).update(
        one[: len(before)], steps_ts, next_ts, steps.label[forecast], said[before]
    )
    found[np.searchsorted(ts, next_ts)] = losses
    return found


@njit(cache=True)
def _run(state, slots, ts, next_ts, r2, said, clock, closes, horizon, losses):  # type: ignore[no-untyped-def]
    for i in range(slots.size):
        s = state[slots[i]]
        if s.bars_seen > 0 and ts[i] < s.last_ts:
            continue
        if ts[i] > s.last_ts:  # a bar without a forecast
            s.bars_seen, s.step = 0, 0
        room = s.ring_step.size
        place = s.bars_seen % room
        s.ring_step[place] = s.step
        for k in range(2):
            s.ring_value[place, k] = said[i, k]
            s.ring_precision[place, k] = exp(-said[i, k])
        s.bars_seen += 1
        begun = s.step
        steps = market_steps(ts[i], next_ts[i], clock[0], clock[1], closes)
        s.step += steps
        s.last_ts = next_ts[i]
        if steps == 0 or s.step < horizon:
            continue
        reaching, level, expected = 0, np.zeros(2), np.zeros(2)
        whole = 0
        for back in range(min(s.bars_seen, room)):
            place = (s.bars_seen - 1 - back) % room
            end = s.ring_step[place] + horizon
            if end <= begun:
                break
            reaching += 1
            for k in range(2):
                level[k] += min(end - begun, steps) * s.ring_value[place, k]
            if end >= s.step:  # the return is that of the last of the steps
                whole += 1
                for k in range(2):
                    expected[k] += s.ring_precision[place, k]
        return2 = r2[i]
        if whole and return2 * expected[1] > MOST_SURPRISE * whole:
            return2 = MOST_SURPRISE * whole / expected[1]
        for k in range(2):
            losses[i, k] = (return2 * expected[k] + level[k]) / reaching
