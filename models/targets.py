"""Targets and their labels: what happens after a bar, known once the horizon has passed.

The horizon is counted in steps of one bar interval. Absent bars up to `FeatureSpec.max_fill` count
as steps with zero return. A longer silence (a night) is no step: its return is in no volatility
label, though a `return` label spans it. Shapes: n bars, S slots, K targets, m matured labels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import log, sqrt
from typing import Annotated, Final, Literal, Self

import numpy as np
from numba import njit
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

from models.features import MAX_RETURN, RETURN2_UNIT, FeatureSpec, market_steps
from models.slots import Slots, bars_in_order

_VOLATILITY: Final = 0
_RETURN: Final = 1
_DIRECTION: Final = 2
_NEXT_STEP: Final = 3
_KINDS: Final = {"volatility": _VOLATILITY, "return": _RETURN, "direction": _DIRECTION}
_DECAY: Final = 2.0 ** (-1 / 78)


class Target(BaseModel):
    """What is forecast at the close of bar t, over the next `horizon` steps (1..h).

    - `volatility`: log of the mean of r_1^2 .. r_h^2, r close-to-close log returns.
    - `return`: log(close_h / close_t).
    - `direction`: 1.0 if that return is above 0, else 0.0. With three classes 2.0 above the dead
      band, 0.0 below its mirror image, 1.0 between; the band is `dead_band` * s * sqrt(h), with s^2
      the exponentially weighted mean of r^2 up to t, half-life 78 bars.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["volatility", "return", "direction"]
    horizon: Annotated[int, Field(ge=1, le=4096)]
    classes: Literal[2, 3] = 2
    dead_band: Annotated[float, Field(gt=0)] = 0.5

    @model_validator(mode="after")
    def _classes_only_of_direction(self) -> Self:
        if self.classes == 3 and self.kind != "direction":
            raise ValueError("only a direction has three classes")
        return self

    @property
    def name(self) -> str:
        return f"{self.kind}_{self.horizon}" + ("_3" if self.classes == 3 else "")

    @property
    def n_outputs(self) -> int:
        """Width of the network's head: one logit for two classes, three for three."""
        return self.classes if self.classes == 3 else 1


@dataclass(frozen=True)
class Matured:
    """m labels that became known, in the order in which they did."""

    slot: NDArray[np.int64]
    ts: NDArray[np.int64]
    """Of the bar at whose close the forecast was made."""
    target: NDArray[np.int64]
    label: NDArray[np.float64]
    matured_ts: NDArray[np.int64]
    """Of the bar that made it known."""

    def __len__(self) -> int:
        return len(self.slot)


class Labels(Slots):
    """Labels of many symbols as their bars arrive, by slot: the streaming twin of `labels`.

    Labels of one slot and target come in the order of their `ts`; one that is passed over will
    never come: it was undefined, or a reset or a full ring (as many session breaks as the horizon
    has steps, and 64) dropped it.
    """

    def __init__(
        self,
        targets: Sequence[Target],
        spec: FeatureSpec,
        capacity: int = 0,
        *,
        next_steps: int = 0,
    ) -> None:
        """`next_steps`: so many more series after those of the targets, each of them the squared
        return to the next bar, known with it; 0 where that opens a session.
        """
        self.targets = tuple(targets)
        more = [_NEXT_STEP] * next_steps
        self._horizon = np.array([t.horizon for t in self.targets] + [1] * next_steps, np.int64)
        self._kind = np.array([_KINDS[t.kind] for t in self.targets] + more, np.int64)
        bands = [t.dead_band if t.classes == 3 else np.nan for t in self.targets]
        self._band = np.array(bands + [np.nan] * next_steps)
        self._clock = np.array([spec.interval_ms, spec.max_fill, spec.reset_after_ms])
        self._closes = spec.closes
        self._ring = 2 * int(self._horizon.max(initial=1)) + 64
        super().__init__(_layout(len(self._kind), self._ring), capacity)

    def update(
        self, slots: NDArray[np.int64], ts: NDArray[np.int64], ohlcv: NDArray[np.float64]
    ) -> Matured:
        """Take bars in the order given, as `Features.update`; duplicate and late ones do nothing."""
        slots, ts, ohlcv = bars_in_order(slots, ts, ohlcv)
        done, parts = 0, []
        room = len(self._kind) * (self._ring + 2 * len(slots))
        while done < len(slots):
            found = np.empty((room, 4), dtype=np.int64)
            label = np.empty(room, dtype=np.float64)
            done, m = _run(
                self._state,
                done,
                slots,
                ts,
                ohlcv,
                self._clock,
                self._closes,
                self._horizon,
                self._kind,
                self._band,
                found,
                label,
            )
            parts.append((found[:m], label[:m]))
        found = np.concatenate([f for f, _ in parts]) if parts else np.empty((0, 4), np.int64)
        label = np.concatenate([y for _, y in parts]) if parts else np.empty(0)
        return Matured(found[:, 0], found[:, 1], found[:, 2], label, found[:, 3])


def labels(
    targets: Sequence[Target],
    spec: FeatureSpec,
    ts: NDArray[np.int64],
    ohlcv: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Labels f64[n, K] of one symbol's bars in time order.

    NaN where undefined: the horizon reaches past the end or over a reset, the bar is a duplicate or
    late, or (volatility) no price moved.
    """
    y = np.full((len(ts), len(targets)), np.nan)
    matured = Labels(targets, spec, capacity=1).update(np.zeros(len(ts), np.int64), ts, ohlcv)
    newest_before = np.maximum.accumulate(np.concatenate([[-1], ts[:-1]])) if len(ts) else ts
    taken = np.flatnonzero(ts > newest_before)
    y[taken[np.searchsorted(ts[taken], matured.ts)], matured.target] = matured.label
    return y


def _layout(n_targets: int, ring: int) -> np.dtype[np.void]:
    return np.dtype(
        [
            ("last_ts", "i8"),
            ("bars_seen", "i8"),
            ("step", "i8"),
            ("sum_r2", "i8"),
            ("log_close", "f8"),
            ("variance", "f8"),
            ("weight", "f8"),
            ("next", "i8", (n_targets,)),
            ("ring_ts", "i8", (ring,)),
            ("ring_step", "i8", (ring,)),
            ("ring_sum_r2", "i8", (ring,)),
            ("ring_log_close", "f8", (ring,)),
            ("ring_sd", "f8", (ring,)),
        ],
        align=True,
    )


@njit(cache=True)
def _run(state, start, slots, ts, ohlcv, clock, closes, horizon, kind, band, found, label):  # type: ignore[no-untyped-def]
    """Go on until the bars end or the next one might find no room; returns (bars done, labels)."""
    m = 0
    for i in range(start, slots.size):
        s = state[slots[i]]
        if m + horizon.size * s.ring_ts.size > label.size:
            return i, m
        is_reset = s.bars_seen == 0 or ts[i] - s.last_ts > clock[2]
        if not is_reset and ts[i] <= s.last_ts:
            continue
        log_close = log(ohlcv[i, 3])
        if is_reset:
            s.bars_seen, s.step, s.sum_r2, s.variance, s.weight = 0, 0, 0, 0.0, 0.0
            s.next[:] = 0
            s.log_close = log_close
        steps = 0 if is_reset else market_steps(s.last_ts, ts[i], clock[0], clock[1], closes)
        r = min(max(log_close - s.log_close, -MAX_RETURN), MAX_RETURN) if steps > 0 else 0.0
        step, sum_r2 = s.step + steps, s.sum_r2 + np.int64(r * r / RETURN2_UNIT + 0.5)
        for k in range(horizon.size):
            while s.next[k] < s.bars_seen:
                place = s.next[k] % s.ring_ts.size
                end = s.ring_step[place] + horizon[k]
                if end > step and kind[k] != _NEXT_STEP:
                    break
                end_sum, end_close = (sum_r2, log_close) if end == step else (s.sum_r2, s.log_close)
                moved = end_close - s.ring_log_close[place]
                if kind[k] == _NEXT_STEP:
                    value = r * r
                elif kind[k] == _VOLATILITY:
                    total = end_sum - s.ring_sum_r2[place]
                    value = log(total * RETURN2_UNIT / horizon[k]) if total > 0 else np.nan
                elif kind[k] == _RETURN:
                    value = moved
                elif np.isnan(band[k]):
                    value = 1.0 if moved > 0 else 0.0
                else:
                    limit = band[k] * s.ring_sd[place] * sqrt(horizon[k])
                    value = 2.0 if moved > limit else 0.0 if moved < -limit else 1.0
                if not np.isnan(value):
                    found[m, 0], found[m, 1] = slots[i], s.ring_ts[place]
                    found[m, 2], found[m, 3] = k, ts[i]
                    label[m] = value
                    m += 1
                s.next[k] += 1
        if steps > 0:
            s.variance = _DECAY**steps * s.variance + (1 - _DECAY) * r * r
            s.weight = 1 + _DECAY**steps * (s.weight - 1)
        place = s.bars_seen % s.ring_ts.size
        s.ring_ts[place], s.ring_step[place], s.ring_sum_r2[place] = ts[i], step, sum_r2
        s.ring_log_close[place] = log_close
        s.ring_sd[place] = sqrt(s.variance / s.weight) if s.weight > 0 else 0.0
        s.bars_seen += 1
        for k in range(horizon.size):
            s.next[k] = max(s.next[k], s.bars_seen - s.ring_ts.size)
        s.last_ts, s.step, s.sum_r2, s.log_close = ts[i], step, sum_r2, log_close
    return slots.size, m
