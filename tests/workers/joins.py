"""The join as one would write it down: dictionaries, and the labels of the offline pipeline."""

from collections.abc import Sequence

from models.features import FeatureSpec
from models.targets import Target, labels
from schemas.codecs import BarColumns, PredictionColumns

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
