"""The join as one would write it down: dictionaries, and the labels of the offline pipeline.

And how tests feed one: two logs, merged at will.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from hypothesis import strategies as st

from models.features import FeatureSpec
from models.targets import Target, labels
from schemas.codecs import BarColumns, PredictionColumns
from tests.workers.builders import rows_of
from workers.joining import Ints, Join, Outcomes

Key = tuple[str, int, str, str, str, str]
"""symbol, ts, target, bundle, role, arm."""


def joined_of(
    spec: FeatureSpec,
    targets: Sequence[Target],
    bars: BarColumns,
    predictions: PredictionColumns,
) -> dict[Key, tuple[float, float]]:
    """(value, label) of every prediction whose label is known and defined once all bars are read."""
    known: dict[tuple[str, int, str], float] = {}
    for symbol in set(bars.symbols):
        own = [i for i, name in enumerate(bars.symbols) if name == symbol]
        found = labels(targets, spec, bars.ts[own], bars.ohlcv[own])
        for k, target in enumerate(targets):
            for i, ts in enumerate(bars.ts[own].tolist()):
                if found[i, k] == found[i, k]:
                    known[symbol, ts, target.name] = float(found[i, k])
    joined: dict[Key, tuple[float, float]] = {}
    for symbol, ts, name, value, bundle, role, arm in zip(*vars(predictions).values(), strict=True):
        if (symbol, ts, name) in known:
            joined.setdefault(
                (symbol, ts, name, bundle, role, arm), (value, known[symbol, ts, name])
            )
    return joined


def columns_of(rows: Sequence[tuple[Any, ...]]) -> PredictionColumns:
    symbols, ts, targets, values, bundles, roles, arms = (
        [row[i] for row in rows] for i in range(7)
    )
    return PredictionColumns(symbols, ts, targets, values, bundles, roles, arms)


def some_of(predictions: PredictionColumns, rows: slice) -> PredictionColumns:
    return PredictionColumns(*(column[rows] for column in vars(predictions).values()))


def take(join: Join, step: BarColumns | PredictionColumns, live: bool = True) -> Outcomes:
    return take_from(join, step, np.zeros(len(step), np.int64), live)


def take_from(
    join: Join, step: BarColumns | PredictionColumns, partitions: Ints, live: bool = True
) -> Outcomes:
    flags = np.full(len(step), live)
    if isinstance(step, BarColumns):
        return join.take_bars(step, partitions, flags)
    return join.take_predictions(step, partitions, flags)


@st.composite
def merged(
    draw: st.DrawFn, bars: BarColumns, predictions: PredictionColumns, most: int
) -> list[BarColumns | PredictionColumns]:
    """Both logs, each in its order, cut into at most `most` rows and merged at will."""
    steps: list[BarColumns | PredictionColumns] = []
    b = p = 0
    while b < len(bars) or p < len(predictions):
        n = draw(st.integers(1, most))
        if p == len(predictions) or (b < len(bars) and draw(st.booleans())):
            steps.append(rows_of(bars, slice(b, b + n)))
            b += n
        else:
            steps.append(some_of(predictions, slice(p, p + n)))
            p += n
    return steps
