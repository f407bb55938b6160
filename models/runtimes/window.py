"""The state of what sees the last T bars and nothing else: a ring of scaled rows for each slot.

Shapes: n slots, R rows of a rebuild, T window, F features, O outputs.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.bundle import Bundle
from models.runtimes import Slots, Step

Floats = NDArray[np.float32]
Bools = NDArray[np.bool_]

Model = Callable[[Floats, Bools], tuple[Floats, Floats]]
"""x[n, T, F] scaled, newest row last, zero where seen[n, T] is False (before the slot's reset)
-> outputs[n, O] and weights[n, T] by lag."""


class WindowRuntime:
    def __init__(self, bundle: Bundle, model: Model) -> None:
        self.bundle = bundle
        self.steps_seen = np.zeros(0, np.int64)
        self._model = model
        network = bundle.config.network
        self._rows = np.zeros((0, network.window, network.n_features), np.float32)

    def step(self, slots: Slots, x: Floats) -> Step:
        T = self._rows.shape[1]
        self._rows[slots, self.steps_seen[slots] % T] = self.bundle.scaler.transform(x)
        self.steps_seen[slots] += 1
        outputs, weights = self._model(*self._windows(slots))
        return Step(*self.bundle.values(outputs), weights)

    def rebuild(self, slots: Slots, x: Floats, lengths: Slots) -> None:
        T, R = self._rows.shape[1], x.shape[1]
        self.reset(slots)
        self.steps_seen[slots] = lengths
        for row in range(max(R - T, 0), R):
            there = np.flatnonzero(lengths >= R - row)
            place = (lengths[there] - R + row) % T
            self._rows[slots[there], place] = self.bundle.scaler.transform(x[there, row])

    def reset(self, slots: Slots) -> None:
        self._rows[slots] = 0.0
        self.steps_seen[slots] = 0

    def grow(self, capacity: int) -> None:
        more = capacity - len(self.steps_seen)
        if more > 0:
            self.steps_seen = np.concatenate([self.steps_seen, np.zeros(more, np.int64)])
            new = np.zeros((more, *self._rows.shape[1:]), np.float32)
            self._rows = np.concatenate([self._rows, new])

    def export(self, slots: Slots) -> dict[str, NDArray[Any]]:
        return {"rows": self._rows[slots], "steps": self.steps_seen[slots]}

    def load(self, slots: Slots, state: Mapping[str, NDArray[Any]]) -> None:
        self._rows[slots] = state["rows"]
        self.steps_seen[slots] = state["steps"]

    def _windows(self, slots: Slots) -> tuple[Floats, Bools]:
        T = self._rows.shape[1]
        steps = self.steps_seen[slots, None]
        places = (steps + np.arange(T)) % T
        return self._rows[slots[:, None], places], np.arange(T, 0, -1) <= steps
