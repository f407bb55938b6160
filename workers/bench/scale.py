"""What a bar costs, and what a symbol takes of memory, with more and more symbols; engine only."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from workers.bench.fixtures import (
    Market,
    Tell,
    WarmState,
    default_bundle,
    new_engine,
    quietly,
    silent_minutes,
)
from workers.config import InferenceSettings
from workers.engine import Engine

PARTITION_SYMBOLS = 1_000
"""Symbols of one partition, at most: a batch then holds bars of about as many partitions as live."""
FREE_SHARE = 0.8
"""Of the memory that is available, what a row may take: beyond it the machine would swap."""
GROWTH = 3
"""An engine that grows holds its old arrays and new ones of twice their size for a moment."""


def run(
    symbols: Sequence[int] = (100, 1_000, 10_000, 100_000),
    bars: int = 100_000,
    window: int = 30,
    runtime: str = "auto",
    tell: Tell = quietly,
) -> dict[str, Any]:
    """µs a bar in batches as large as the worker takes them, one bar of each symbol a batch at most.

    `bytes_per_symbol` counts the state that a snapshot of the symbol holds;
    `resident_bytes_per_symbol` what the process grew by, spare capacity included. What would
    not fit into memory is not run but named in `skipped`.
    """
    torch.set_num_threads(1)
    bundle = default_bundle(window)
    tell("warming up", 0.0)
    state = WarmState.of(Market(max(symbols), 1, silent_minutes(bundle)), bundle)
    rows: list[dict[str, Any]] = []
    skipped: dict[str, str] = {}
    for done, count in enumerate(symbols):
        tell(f"{count:,} symbols", done / len(symbols))
        each = _state_bytes(state)
        if count * each * GROWTH > FREE_SHARE * _available_bytes():
            skipped[str(count)] = f"{count * each / 2**30:.1f} GiB of state"
            continue
        before = _resident_bytes()
        engine = new_engine(bundle, runtime)
        for first in range(0, count, PARTITION_SYMBOLS):
            numbers = range(first, min(first + PARTITION_SYMBOLS, count))
            engine.load(first // PARTITION_SYMBOLS, *state.given_to(numbers))
        batch = min(count, InferenceSettings().max_batch)
        rows.append(
            {
                "symbols": count,
                "us_per_bar": round(_us_per_bar(engine, state.market, count, batch, bars), 2),
                "bytes_per_symbol": each,
                "resident_bytes_per_symbol": round((_resident_bytes() - before) / count),
                "batch": batch,
            }
        )
        del engine
    return {"rows": rows, "bars": bars, "window": window, "skipped": skipped}


def _us_per_bar(engine: Engine, market: Market, symbols: int, batch: int, bars: int) -> float:
    """Time in `Engine.process` over whole batches, round after round over the symbols."""
    took_s, taken, turn = 0.0, 0, 0
    batches_a_minute = symbols // batch
    unmeasured = max(bars // 10, batch)
    while taken < unmeasured + bars:
        minute, place = divmod(turn, batches_a_minute)
        numbers = np.arange(place * batch, (place + 1) * batch)
        columns = market.bars(minute, numbers)
        started = time.perf_counter()
        processed = engine.process(columns, numbers // PARTITION_SYMBOLS)
        took_s += (time.perf_counter() - started) * (taken >= unmeasured)
        if sum(len(forecast.rows) for forecast in processed.forecasts) != batch:
            raise ValueError("a warm symbol has no forecast: nothing was measured")
        taken, turn = taken + batch, turn + 1
    return 1e6 * took_s / (batch * -(-bars // batch))


def _state_bytes(state: WarmState) -> int:
    rows = len(state.meta["symbols"])
    return sum(array.nbytes for array in state.arrays.values()) // rows


def _resident_bytes() -> int:
    return _kilobytes("/proc/self/status", "VmRSS") * 1_024


def _available_bytes() -> int:
    return _kilobytes("/proc/meminfo", "MemAvailable") * 1_024


def _kilobytes(file: str, field: str) -> int:
    lines = Path(file).read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))
