"""Predictions per second of one replica on a real Kafka, beside what its model alone can do."""

import re
import time
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from models.bundle import Bundle
from models.runtimes import open_runtime, runtimes_of, set_threads
from models.runtimes.products import Precision
from schemas.topics import PREDICTIONS
from workers.bench.fixtures import Market, Tell, WarmState, default_bundle, quietly, silent_minutes
from workers.bench.stage import (
    Patience,
    Replica,
    appoint,
    lay_snapshots,
    own_kafka,
    send,
    tail_from_end,
    with_sections,
)
from workers.config import Settings
from workers.kafka import make_publisher

Delivery = Literal["exactly_once", "at_least_once"]
DELIVERIES: tuple[Delivery, ...] = get_args(Delivery)

MODEL_ONLY_S = 3.0
MARGIN = 0.1
"""Share of the predictions left out at each end: start and drain are not the steady state."""


def run(
    symbols: int = 500,
    bars_per_symbol: int = 400,
    deliveries: Sequence[Delivery] = ("exactly_once",),
    runtimes: Sequence[str] = ("auto",),
    windows: Sequence[int] = (30,),
    attention_every: int = 1,
    precision: Precision = "float32",
    tell: Tell = quietly,
) -> list[dict[str, Any]]:
    """Put all bars on the broker, then let one replica after another work through them.

    The rate is that of the replica's own counter between two looks at its /metrics; that every
    expected prediction is readable under read_committed is counted afterwards.
    """
    rows: list[dict[str, Any]] = []
    for window in windows:
        bundle = default_bundle(window)
        with own_kafka() as settings:
            market = Market(symbols, settings.kafka.partitions, silent_minutes(bundle))
            state = WarmState.of(market, bundle)
            appoint(settings, "champion", bundle)
            with make_publisher(settings, "bench") as publisher:
                for minute in range(bars_per_symbol):
                    send(publisher, market, minute)
            for runtime in runtimes:
                for delivery in deliveries:
                    tell(f"T={window}, {runtime}, {delivery}", len(rows) / 100)
                    mine = with_sections(
                        settings.model_copy(update={"runtime": runtime}),
                        kafka={"delivery": delivery},
                        inference={
                            "group": f"{runtime}-{delivery}",
                            "attention_every": attention_every,
                            "precision": precision,
                        },
                    )
                    lay_snapshots(mine, state)
                    rows.append(_row(mine, bundle, symbols, symbols * bars_per_symbol))
    return rows


def every_runtime() -> tuple[str, ...]:
    """Those that can run the default network."""
    return runtimes_of(default_bundle().config.network)


def _row(settings: Settings, bundle: Bundle, symbols: int, expected: int) -> dict[str, Any]:
    with tail_from_end(settings, PREDICTIONS) as tail:
        with Replica(settings) as replica:
            samples = _watch(replica, expected)
        published = 0
        while messages := tail.poll(10_000, timeout_ms=500):
            published += len(messages)
    alone = model_only_per_s(bundle, settings, symbols)
    first, last = _steady(samples, expected)
    n = last.predictions - first.predictions
    rate = n / (last.at - first.at)
    return {
        "predictions_per_s": round(rate),
        "model_only_per_s": round(alone),
        "share_of_model_only": round(rate / alone, 3),
        "delivery": settings.kafka.delivery,
        "runtime": settings.runtime,
        "precision": settings.inference.precision,
        "symbols": symbols,
        "window": bundle.config.window,
        "attention_every": settings.inference.attention_every,
        "batch_p50": last.batch_p50,
        "cpu_seconds_per_million": round(1e6 * (last.cpu_s - first.cpu_s) / n, 1),
        "measured_predictions": round(n),
        "expected": expected,
        "published": published,
    }


def model_only_per_s(bundle: Bundle, settings: Settings, symbols: int) -> float:
    """Carried steps of the same runtime on `symbols` rows at once, nothing around them."""
    precision = settings.inference.precision
    runtime = open_runtime(bundle, settings.runtime, settings.device, precision)
    set_threads(settings.inference.torch_threads)
    runtime.grow(symbols)
    slots = np.arange(symbols)
    x = np.random.default_rng(1).normal(size=(symbols, bundle.config.network.n_features))
    rows = x.astype(np.float32)
    for _ in range(bundle.config.window):
        runtime.step(slots, rows)
    steps, started = 0, time.perf_counter()
    while time.perf_counter() - started < MODEL_ONLY_S:
        runtime.step(slots, rows)
        steps += 1
    return steps * symbols / (time.perf_counter() - started)


class Sample(NamedTuple):
    at: float
    predictions: float
    cpu_s: float
    batch_p50: int


def _watch(replica: Replica, expected: int) -> list[Sample]:
    """Look at the replica's /metrics until it has made every expected prediction."""
    samples: list[Sample] = []
    patience = Patience(replica, f"{expected} predictions")
    while (not samples or samples[-1].predictions < expected) and patience.lasts():
        time.sleep(0.1)
        if values := replica.metrics():
            samples.append(_sample(values))
    return samples


_BATCH_BUCKET = re.compile(r'gpt_trader_batch_bars_bucket\{le="(.+)"\}')


def _sample(values: dict[str, float]) -> Sample:
    buckets = [
        (float(found[1]), count)
        for name, count in values.items()
        if (found := _BATCH_BUCKET.fullmatch(name))
    ]
    total = buckets[-1][1] if buckets else 0.0
    p50 = next((bound for bound, count in buckets if total and count >= total / 2), 0.0)
    return Sample(
        time.perf_counter(),
        sum(v for name, v in values.items() if name.startswith("gpt_trader_predictions_total")),
        values["process_cpu_seconds_total"],
        int(p50),
    )


def _steady(samples: list[Sample], expected: int) -> tuple[Sample, Sample]:
    within = [s for s in samples if MARGIN <= s.predictions / expected <= 1 - MARGIN]
    if len({s.predictions for s in within}) < 2:
        raise ValueError("too few predictions to measure a rate: ask for more bars per symbol")
    return within[0], within[-1]
