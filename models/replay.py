"""A runtime over bars that lie in a table: what the stream would say, and the inputs it saw.

Shapes: n bars of a symbol, S symbols, K targets, F features, H hidden size.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from models.blending import EnsembleConfig
from models.bundle import Bundle
from models.dataset import History
from models.features import WARM_UP_BARS, F
from models.input_drift import InputReference
from models.network_config import NetworkConfig
from models.runtimes import Runtime, open_runtime
from models.scoring import Floats

MOST_ROWS: Final = 20_000
"""Features of so many bars make a reference of inputs, or are held against one."""
MOST_STATES: Final = 1_000
"""Hidden states; each costs a warm-up."""
STATES_AT_ONCE: Final = 256


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


class Inputs(NamedTuple):
    x: NDArray[np.float32]
    """[n, F] unscaled"""
    hidden: NDArray[np.float32] | None
    """[m, H] of the last layer after the bundle's warm-up; None where it carries no state, or m < 2"""


def with_inputs(bundle: Bundle, past: Sequence[History]) -> Bundle:
    """With a reference of what the bars that it was made of looked like."""
    return replace(bundle, inputs=InputReference.fit(*inputs_of(bundle, past)))


def inputs_of(
    bundle: Bundle, past: Sequence[History], newest: int | None = None, states: int = MOST_STATES
) -> Inputs:
    """Features and hidden states of warm bars, of the `newest` of each symbol or of all.

    Evenly chosen where there are more than `MOST_ROWS` of them and so many `states`.
    """
    parts = [h.x[rows] for h, rows in _chosen(past, WARM_UP_BARS, newest, MOST_ROWS)]
    return Inputs(
        np.concatenate([np.zeros((0, F), np.float32), *parts]),
        _hidden(bundle, past, newest, states),
    )


def _hidden(
    bundle: Bundle, past: Sequence[History], newest: int | None, most: int
) -> NDArray[np.float32] | None:
    network, L = bundle.config.network, max(bundle.config.warm_up_bars, 1)
    if isinstance(network, EnsembleConfig):
        network = network.sequence
    if not isinstance(network, NetworkConfig) or network.mode != "carried":
        return None
    places = [
        (h, row)
        for h, rows in _chosen(past, WARM_UP_BARS + L - 1, newest, most)
        for row in rows.tolist()
    ]
    if len(places) < 2:
        return None
    runtime = open_runtime(bundle, device="cpu")
    runtime.grow(min(STATES_AT_ONCE, len(places)))
    states: list[NDArray[np.float32]] = []
    for at in range(0, len(places), STATES_AT_ONCE):
        x = np.stack([h.x[row - L + 1 : row + 1] for h, row in places[at : at + STATES_AT_ONCE]])
        slots = np.arange(len(x))
        runtime.rebuild(slots, x, np.full(len(x), L))
        states.append(runtime.export(slots)["h"][:, -1])
    return np.concatenate(states)


def _chosen(
    past: Sequence[History], since_reset: int, newest: int | None, most: int
) -> Iterator[tuple[History, NDArray[Any]]]:
    """Rows of each symbol at least so many bars after a reset, every k-th of them."""
    able = [
        rows if newest is None else rows[-newest:]
        for rows in (np.flatnonzero(h.since_reset >= since_reset) for h in past)
    ]
    every = -(-sum(map(len, able)) // most) or 1
    for h, rows in zip(past, able, strict=True):
        yield h, rows[::every]
