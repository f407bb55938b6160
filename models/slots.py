"""State of many symbols as one record array, addressed by slot."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray


def bars_in_order(
    slots: NDArray[np.int64], ts: NDArray[np.int64], ohlcv: NDArray[np.float64]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """The arrays as the compiled kernels take them: C-contiguous, of exactly these types."""
    return (
        np.ascontiguousarray(slots, dtype=np.int64),
        np.ascontiguousarray(ts, dtype=np.int64),
        np.ascontiguousarray(ohlcv, dtype=np.float64),
    )


class Slots:
    """An all-zero record is a symbol that has seen no bar."""

    def __init__(self, layout: np.dtype[np.void], capacity: int = 0) -> None:
        self._state: NDArray[np.void] = np.zeros(capacity, dtype=layout)

    @property
    def capacity(self) -> int:
        return len(self._state)

    @property
    def bars_seen(self) -> NDArray[np.int64]:
        """i64[S], bars since the last reset."""
        return self._state["bars_seen"]

    @property
    def last_ts(self) -> NDArray[np.int64]:
        """i64[S], time of the newest bar; 0 where `bars_seen` is 0."""
        return self._state["last_ts"]

    def grow(self, capacity: int) -> None:
        """Make room for at least so many slots; state is kept, arrays handed out before go stale."""
        if capacity > self.capacity:
            state = np.zeros(capacity, dtype=self._state.dtype)
            state[: self.capacity] = self._state
            self._state = state

    def reset(self, slots: NDArray[np.int64]) -> None:
        self._state[slots] = np.zeros((), dtype=self._state.dtype)

    def export(self, slots: NDArray[np.int64]) -> dict[str, NDArray[np.generic]]:
        """Copies of every state array, rows in the order of `slots`."""
        rows = self._state[slots]
        return {name: np.ascontiguousarray(rows[name]) for name in rows.dtype.names or ()}

    def load(self, slots: NDArray[np.int64], arrays: Mapping[str, NDArray[np.generic]]) -> None:
        """Put back what `export` gave; ValueError if it is of another layout, and nothing changes."""
        rows = np.zeros(len(slots), dtype=self._state.dtype)
        for name in rows.dtype.names or ():
            array, field = arrays.get(name), rows[name]
            if array is None or array.dtype != field.dtype or array.shape != field.shape:
                raise ValueError(f"state {name!r} is missing or of another layout")
            field[...] = array
        self._state[slots] = rows
