"""Inputs of late: the newest bars of a few symbols, and how far they are from what a bundle was made of."""

import hashlib
import logging
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from models.bundle import Bundle, BundleRejected
from models.dataset import OHLCV, histories, load_bars
from models.features import CLOCK_NAMES, FEATURE_NAMES, WARM_UP_BARS
from models.input_drift import measure, worst
from models.replay import inputs_of
from schemas.codecs import BarColumns
from schemas.messages import InputDrift
from workers.logs import event

log = logging.getLogger(__name__)

SYMBOLS_EACH: Final = 4
"""Of each partition: features are alike enough from symbol to symbol, and time is short."""
MEASURED_BARS: Final = 390
"""Of each symbol, the newest: a session of minutes."""
MEASURED_STATES: Final = 500
"""Hidden states of all symbols: a second or two of one core with the default network."""
KEPT_BARS: Final = 1_200
"""Of each symbol: those, what warms up the features, and as much again for the network."""
LEAST_ROWS: Final = 100
"""Warm bars of all symbols below which nothing is said."""
NAMED: Final = 5
"""Features, the worst."""
TOLD: Final = [i for i, name in enumerate(FEATURE_NAMES) if name not in CLOCK_NAMES]
"""A session of clock readings is always far from a year of them, and that says nothing."""

Row = tuple[float, ...]
"""ts, open, high, low, close, volume"""


class RecentBars:
    """The newest bars of a few symbols of each partition, always the same ones: drawn by a hash.

    Where symbols are watched, of these alone.
    """

    def __init__(self, watch: Collection[str] = ()) -> None:
        self._watch = frozenset(watch)
        self._partition_of: dict[str, int] = {}
        self._rings: dict[str, deque[Row]] = {}

    def update(self, bars: BarColumns, partitions: NDArray[np.int64]) -> None:
        """Bars in the order of their partition; one not newer than its symbol's newest is passed over."""
        self._meet(dict(zip(bars.symbols, partitions.tolist(), strict=True)))
        rings = self._rings
        for i, symbol in enumerate(bars.symbols):
            if (ring := rings.get(symbol)) is not None:
                ts = int(bars.ts[i])
                if not ring or ts > ring[-1][0]:
                    ring.append((ts, *bars.ohlcv[i].tolist()))

    def get(self) -> dict[str, list[Row]]:
        """A copy, for another thread."""
        return {symbol: list(ring) for symbol, ring in self._rings.items()}

    @property
    def is_enough(self) -> bool:
        """Whether there is something to measure."""
        warm = (len(ring) - WARM_UP_BARS + 1 for ring in self._rings.values())
        return sum(max(bars, 0) for bars in warm) >= LEAST_ROWS

    def drop(self, partition: int) -> None:
        self._partition_of = {s: p for s, p in self._partition_of.items() if p != partition}
        self._choose()

    def export(self, partition: int) -> tuple[dict[str, NDArray[Any]], list[str]]:
        """What `load` takes: bars f64[n, 6] and the number of them of each symbol, and their names."""
        own = [s for s in self._rings if self._partition_of[s] == partition]
        rows = [row for symbol in own for row in self._rings[symbol]]
        lengths = np.array([len(self._rings[symbol]) for symbol in own], np.int64)
        return {"rows": np.array(rows, np.float64).reshape(-1, 6), "lengths": lengths}, own

    def load(
        self, partition: int, arrays: Mapping[str, NDArray[Any]], symbols: Sequence[str]
    ) -> None:
        self.drop(partition)
        self._meet(dict.fromkeys(symbols, partition))
        parts = np.split(arrays["rows"], np.cumsum(arrays["lengths"])[:-1])
        for symbol, rows in zip(symbols, parts, strict=False):
            if symbol in self._rings:  # others may be watched now
                self._rings[symbol].extend(map(tuple, rows.tolist()))

    def _meet(self, partitions: Mapping[str, int]) -> None:
        if not partitions.keys() <= self._partition_of.keys():
            self._partition_of |= partitions
            self._choose()

    def _choose(self) -> None:
        self._rings = {
            symbol: self._rings.get(symbol, deque(maxlen=KEPT_BARS)) for symbol in self._chosen()
        }

    def _chosen(self) -> Iterator[str]:
        by_partition: dict[int, list[str]] = {}
        for symbol, partition in self._partition_of.items():
            if not self._watch or symbol in self._watch:
                by_partition.setdefault(partition, []).append(symbol)
        for own in by_partition.values():
            yield from sorted(own, key=_rank)[:SYMBOLS_EACH]


@lru_cache(maxsize=1 << 18)
def _rank(symbol: str) -> bytes:
    return hashlib.blake2b(symbol.encode(), digest_size=8).digest()


def drift_of(bundle: Bundle, recent: Mapping[str, Sequence[Row]]) -> InputDrift | None:
    """What `RecentBars` holds against what the bundle was made of; takes seconds.

    None where the bundle does not know that, where there are too few bars, or where they cannot be
    measured: it is told, and nothing else depends on it.
    """
    config = bundle.config
    if bundle.inputs is None:
        return None
    try:
        past = histories(load_bars(_frame(recent)), config.features, config.targets)
        with threadpool_limits(1, user_api="blas"):  # the other cores are the monitor's
            inputs = inputs_of(bundle, past, MEASURED_BARS, MEASURED_STATES)
        if len(inputs.x) < LEAST_ROWS:
            return None
        found = measure(bundle.inputs, *inputs)
    except (ArithmeticError, BundleRejected, ValueError) as error:
        event(log, "inputs_not_measured", bundle=bundle.version, reason=error)
        return None
    names = [FEATURE_NAMES[i] for i in TOLD]
    return InputDrift(
        ts=max(int(h.ts[-1]) for h in past),
        symbols=[h.symbol for h in past],
        rows=len(inputs.x),
        psi=worst(found.psi[TOLD], names, NAMED),
        ks=worst(found.ks[TOLD], names, NAMED),
        embedding=found.embedding,
    )


def _frame(recent: Mapping[str, Sequence[Row]]) -> pd.DataFrame:
    rows = np.array([row for rows in recent.values() for row in rows], np.float64)
    frame = pd.DataFrame(rows.reshape(-1, 6), columns=["ts", *OHLCV])
    symbols = [symbol for symbol, rows in recent.items() for _ in rows]
    return frame.astype({"ts": np.int64}).assign(symbol=symbols)
