"""Scale features for the network: fitted on training rows only, or causally as the bars come."""

import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, Literal, Self, get_args

import numpy as np
from numba import njit
from numpy.typing import NDArray

from models.slots import Slots

Kind = Literal["standard", "robust", "minmax"]

CLIP: Final = 6.0
"""In units of the scale: what lies further out says no more than that it is far out."""
_NORMAL_IQR: Final = 1.3489795003921634


@dataclass(frozen=True, eq=False)
class Scaler:
    """Kept as JSON in the bundle: (x - centre) / scale, clipped to +-CLIP.

    - standard: mean and standard deviation.
    - robust: median and interquartile range, as standard deviations of a normal; the standard
      deviation where half the rows are equal.
    - minmax: the training range becomes -1..1.

    A column without spread becomes 0 on the training rows.
    """

    kind: Kind
    centre: NDArray[np.float64]
    scale: NDArray[np.float64]

    @classmethod
    def fit(cls, x: NDArray[np.floating[Any]], kind: Kind = "standard") -> Self:
        """Fit on training rows x [n, F]; raises ValueError for none, or if one is not finite."""
        if len(x) == 0:
            raise ValueError("no rows to fit a scaler on")
        if kind not in get_args(Kind):
            raise ValueError(f"no such scaler: {kind!r}; one of {', '.join(get_args(Kind))}")
        columns = [_fit_column(column.astype(np.float64), kind) for column in x.T]
        centre, scale = np.array(columns).T
        if not np.isfinite(centre).all() or not np.isfinite(scale).all():
            raise ValueError("rows to fit a scaler on must be finite")
        return cls(kind, centre, scale)

    def transform(self, x: NDArray[np.floating[Any]]) -> NDArray[np.float32]:
        """Scaled x [..., F]; x itself is left alone."""
        centre, factor = self._float32
        y: NDArray[np.float32] = np.subtract(x, centre, dtype=np.float32)
        y *= factor
        np.clip(y, -CLIP, CLIP, out=y)
        return y

    def to_json(self) -> str:
        return json.dumps(
            {"kind": self.kind, "centre": self.centre.tolist(), "scale": self.scale.tolist()}
        )

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Raises ValueError for anything that `to_json` would not have written."""
        content = json.loads(text)
        if not isinstance(content, dict) or content.get("kind") not in get_args(Kind):
            raise ValueError("no scaler")
        try:
            centre, scale = (np.array(content[k], dtype=np.float64) for k in ("centre", "scale"))
        except (KeyError, TypeError) as error:
            raise ValueError("a scaler needs centre and scale, both numbers") from error
        if centre.ndim != 1 or centre.shape != scale.shape:
            raise ValueError("centre and scale differ in shape")
        if not np.isfinite(centre).all() or not np.isfinite(scale).all() or (scale <= 0).any():
            raise ValueError("centre must be finite, scale finite and positive")
        return cls(content["kind"], centre, scale)

    @cached_property
    def _float32(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        return self.centre.astype(np.float32), (1 / self.scale).astype(np.float32)


def _fit_column(x: NDArray[np.float64], kind: Kind) -> tuple[float, float]:
    mean, sd = float(x.mean()), float(x.std())
    if _is_rounding(sd, mean):
        return mean, 1.0
    if kind == "standard":
        return mean, sd
    if kind == "minmax":
        low, high = float(x.min()), float(x.max())
        return (low + high) / 2, (high - low) / 2
    low, median, high = (float(q) for q in np.quantile(x, (0.25, 0.5, 0.75)))
    spread = (high - low) / _NORMAL_IQR
    return median, sd if _is_rounding(spread, median) else spread


def _is_rounding(spread: float, level: float) -> bool:
    """No more than float32 makes of a constant."""
    return spread <= 1e-7 * max(abs(level), 1.0)


class RollingScaler(Slots):
    """(x - mean) / sd of each symbol's own past, exponentially weighted, this bar included.

    Nothing is fitted, so nothing can leak; in exchange the level of a symbol is lost, and with it
    what sets it apart from others. Used by `Features` where `FeatureSpec.rolling_half_life` is set.
    """

    def __init__(self, half_life: float, n_features: int, capacity: int = 0) -> None:
        layout = [
            ("last_ts", "i8"),
            ("bars_seen", "i8"),
            ("weight", "f8"),
            ("mean", "f8", (n_features,)),
            ("variance", "f8", (n_features,)),
        ]
        super().__init__(np.dtype(layout, align=True), capacity)
        self._decay = 2.0 ** (-1 / half_life)

    def update(
        self, slots: NDArray[np.int64], status: NDArray[np.int8], x: NDArray[np.float32]
    ) -> None:
        """Scale the rows of x f32[n, F] in place, in order; `status` as from the feature kernel.

        0 goes on, 1 starts the symbol anew, and rows of any other stay as they are.
        """
        _roll(self._state, slots, status, x, self._decay)


@njit(cache=True)
def _roll(state, slots, status, x, decay):  # type: ignore[no-untyped-def]
    for i in range(slots.size):
        if status[i] > 1:
            continue
        s = state[slots[i]]
        if status[i] == 1:
            s.bars_seen, s.weight = 0, 0.0
            s.mean[:] = 0.0
            s.variance[:] = 0.0
        s.bars_seen += 1
        s.weight = 1 + decay * (s.weight - 1)
        rate = (1 - decay) / s.weight
        for j in range(x.shape[1]):
            away = x[i, j] - s.mean[j]
            s.mean[j] += rate * away
            s.variance[j] += rate * (away * (x[i, j] - s.mean[j]) - s.variance[j])
            sd = np.sqrt(s.variance[j])
            y = (x[i, j] - s.mean[j]) / sd if sd > 1e-7 * max(abs(s.mean[j]), 1.0) else 0.0
            x[i, j] = min(max(y, -CLIP), CLIP)
