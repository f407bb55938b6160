"""A runtime over bars that lie in a table: what the stream would say, its state carried throughout.

Shapes: n bars of a symbol, S symbols, K targets.
"""

from collections.abc import Sequence

import numpy as np

from models.dataset import History
from models.features import WARM_UP_BARS
from models.runtimes import Runtime
from models.scoring import Floats


def replay(runtime: Runtime, past: Sequence[History]) -> list[Floats]:
    """Values f64[n, K] of each symbol's bars; NaN while a symbol warms up.

    Slots 0..S-1 of the runtime are started anew.
    """
    S, config = len(past), runtime.bundle.config
    runtime.grow(S)
    runtime.reset(np.arange(S))
    values = [np.full((len(h.ts), len(config.targets)), np.nan) for h in past]
    since_reset = np.zeros((S, max((len(h.ts) for h in past), default=0)), np.int64)
    for slot, h in enumerate(past):
        since_reset[slot, : len(h.ts)] = h.since_reset
    for row, bars in enumerate(since_reset.T):
        if (anew := np.flatnonzero(bars == 1)).size:
            runtime.reset(anew)
        slots = np.flatnonzero(bars > WARM_UP_BARS)
        if not slots.size:
            continue
        step = runtime.step(slots, np.stack([past[slot].x[row] for slot in slots.tolist()]))
        for i in np.flatnonzero(runtime.steps_seen[slots] >= config.warm_up_bars):
            values[slots[i]][row] = step.values[i]
    return values
