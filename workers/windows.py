"""Mean losses by bundle, role, target and day, kept open until the day is over."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.features import DAY_MS
from schemas.tables import WindowRow

SETTLED_AFTER_MS = DAY_MS // 2
"""After midnight UTC: then the last labels of the day have matured."""

Floats = NDArray[np.float64]
_Key = tuple[str, str, str, int]


class Windows:
    def __init__(self) -> None:
        self._open: dict[_Key, list[float]] = {}
        self._newest_ts = 0

    def add(
        self,
        bundle: str,
        role: str,
        target: str,
        ts: NDArray[np.int64],
        losses: Floats,
        reference_losses: Floats,
    ) -> None:
        """Count outcomes of one bundle, role and target."""
        days, place = np.unique(ts // DAY_MS, return_inverse=True)
        n = np.bincount(place)
        sums = (np.bincount(place, losses), np.bincount(place, reference_losses))
        for i, day in enumerate(days.tolist()):
            held = self._open.setdefault((bundle, role, target, day), [0, 0.0, 0.0])
            held[0] += int(n[i])
            held[1] += float(sums[0][i])
            held[2] += float(sums[1][i])
        self._newest_ts = max(self._newest_ts, int(ts.max(initial=0)))

    def close(self) -> Iterator[WindowRow]:
        """The windows of days that are over; they are forgotten here."""
        for key in list(self._open):
            bundle, role, target, day = key
            to_ts = (day + 1) * DAY_MS
            if self._newest_ts < to_ts + SETTLED_AFTER_MS:
                continue
            n, loss, reference_loss = self._open.pop(key)
            yield WindowRow(
                bundle=bundle,
                role=role,
                target=target,
                from_ts=day * DAY_MS,
                to_ts=to_ts,
                n=int(n),
                mean_loss=loss / n,
                mean_reference_loss=reference_loss / n,
            )

    def export(self) -> list[list[Any]]:
        """As JSON values, for `load`."""
        return [[*key, *held] for key, held in self._open.items()]

    def load(self, rows: list[list[Any]]) -> None:
        self._open = {(b, r, t, day): [n, x, y] for b, r, t, day, n, x, y in rows}
        self._newest_ts = max((day * DAY_MS for *_, day in self._open), default=0)
