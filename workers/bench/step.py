"""What one bar costs alone: a batch of one through the engine, features included, in each runtime."""

import time
from typing import Any

import numpy as np
import torch

from models.bundle import BundleRejected
from models.runtimes import RUNTIMES
from workers.bench.fixtures import (
    Market,
    Tell,
    WarmState,
    default_bundle,
    new_engine,
    quietly,
    silent_minutes,
)
from workers.engine import Engine

SYMBOLS = 500
"""They take turns, so that each step finds its state as cold as a live one does."""


def run(steps: int = 5_000, window: int = 30, tell: Tell = quietly) -> dict[str, Any]:
    """Times of `Engine.process` with one bar, in µs; `skipped` says why a runtime cannot run here."""
    torch.set_num_threads(1)
    bundle = default_bundle(window)
    tell("warming up", 0.0)
    market = Market(SYMBOLS, 1, silent_minutes(bundle))
    state = WarmState.of(market, bundle)
    rows: list[dict[str, Any]] = []
    skipped: dict[str, str] = {}
    for done, (runtime, device) in enumerate(devices := _runtimes()):
        tell(f"{runtime} on {device}", done / len(devices))
        try:
            engine = new_engine(bundle, runtime, device)
        except (ValueError, BundleRejected) as error:
            skipped[runtime] = str(error)
            continue
        engine.load(0, *state.given_to(range(SYMBOLS)))
        took_us = _times_us(engine, market, steps)
        p50_us, p99_us = np.percentile(took_us, [50, 99]).round(1).tolist()
        rows.append({"runtime": runtime, "device": device, "p50_us": p50_us, "p99_us": p99_us})
    return {"rows": rows, "steps": steps, "window": window, "skipped": skipped}


def _runtimes() -> list[tuple[str, str]]:
    on_cpu = [(name, "cpu") for name in RUNTIMES]
    return on_cpu + ([("torch", "cuda")] if torch.cuda.is_available() else [])


def _times_us(engine: Engine, market: Market, steps: int) -> list[float]:
    partition = np.zeros(1, np.int64)
    times_us, unmeasured = [], max(steps // 10, 10)
    for step in range(unmeasured + steps):
        bar = market.bars(step // SYMBOLS, [step % SYMBOLS])
        started = time.perf_counter()
        processed = engine.process(bar, partition)
        times_us.append(1e6 * (time.perf_counter() - started))
        if not processed.forecasts:
            raise ValueError("a warm symbol has no forecast: nothing was measured")
    return times_us[unmeasured:]
