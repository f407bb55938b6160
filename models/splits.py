"""Splits of time: what is trained on, chosen by, and reported, in this order and never mixed.

A row is one bar; its label is known at `known_ts`. A row is trained on only if its label was known
before the span's end: so nothing of a later span is in it, however long the horizon (purge).
An embargo keeps a further distance between spans.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Span:
    """Bar times from `from_ts` on, before `to_ts`."""

    from_ts: int
    to_ts: int

    def rows(self, ts: NDArray[np.int64]) -> NDArray[np.bool_]:
        return (ts >= self.from_ts) & (ts < self.to_ts)

    def purged_rows(self, ts: NDArray[np.int64], known_ts: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Rows whose label lies in the span too."""
        return self.rows(ts) & (known_ts < self.to_ts)


@dataclass(frozen=True)
class Fold:
    train: Span
    validation: Span
    test: Span


def time_split(
    ts: NDArray[np.int64],
    fractions: tuple[float, float, float] = (0.6, 0.2, 0.2),
    embargo_ms: int = 0,
) -> Fold:
    """Cut the pooled bar times so that each span holds its fraction of them.

    A fraction of 0 gives an empty span. Raises ValueError unless the fractions sum to 1.
    """
    if min(fractions) < 0 or abs(sum(fractions) - 1) > 1e-9:
        raise ValueError(f"fractions must be at least 0 and sum to 1, not {fractions}")
    return _fold(_cuts(ts, (0.0, fractions[0], fractions[0] + fractions[1], 1.0)), embargo_ms)


def walk_forward(
    ts: NDArray[np.int64],
    folds: int,
    first_test: float = 0.5,
    validation: float = 0.2,
    kind: Literal["expanding", "rolling"] = "expanding",
    embargo_ms: int = 0,
) -> list[Fold]:
    """Folds whose test spans follow each other from fraction `first_test` of the bars to the end.

    Before each lies its own history, of which the last part `validation` is for choosing.
    An expanding history starts at the first bar, a rolling one keeps its length.
    """
    if folds < 1 or not 0 < first_test < 1 or not 0 <= validation < 1:
        raise ValueError("folds >= 1, 0 < first_test < 1 and 0 <= validation < 1")
    edges = [first_test + (1 - first_test) * i / folds for i in range(folds + 1)]
    made = []
    for end, to in pairwise(edges):
        start = end - first_test if kind == "rolling" else 0.0
        chosen_by = end - validation * (end - start)
        made.append(_fold(_cuts(ts, (start, chosen_by, end, to)), embargo_ms))
    return made


def _cuts(ts: NDArray[np.int64], fractions: Sequence[float]) -> list[int]:
    if len(ts) == 0:
        raise ValueError("no bars to split")
    ordered = np.sort(ts)
    n = len(ordered)
    return [
        int(ordered[-1]) + 1 if f >= 1 - 1e-9 else int(ordered[min(round(f * n), n - 1)])
        for f in fractions
    ]


def _fold(cuts: Sequence[int], embargo_ms: int) -> Fold:
    start, validation, test, end = cuts
    return Fold(
        Span(start, max(start, validation - embargo_ms)),
        Span(validation, max(validation, test - embargo_ms)),
        Span(test, end),
    )
