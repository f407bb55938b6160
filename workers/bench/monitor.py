"""Outcomes per second of the monitor on a real Kafka: predictions and bars in, outcomes out."""

import re
import tempfile
import time
import urllib.request
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from models.bundle import Bundle
from models.drift import Calibration
from schemas.codecs import BarColumns, encode_bars, encode_predictions
from schemas.topics import BARS, OUTCOMES, PREDICTIONS
from workers import lifecycle
from workers.bench.fixtures import default_bundle, simulated_bars
from workers.bundles import store_bundle
from workers.config import Settings
from workers.fleet import Fleet, free_port
from workers.kafka import create_topics, make_publisher, read_topic
from workers.local_kafka import LocalKafka

MARGIN = 0.1
"""Share of the outcomes left out at each end: start and drain are not the steady state."""


def run(
    symbols: int = 500,
    bars_per_symbol: int = 1_200,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Put all bars and predictions on the broker, then let one monitor work through them.

    The rate is that of the monitor's own counter between two looks at its /metrics; that every
    expected outcome is readable under read_committed, once, is counted afterwards.
    """
    bundle = _judged_bundle()
    (target,) = bundle.config.targets
    # The first bar has no reference to be held against, the last ones have no label.
    expected = symbols * (bars_per_symbol - target.horizon - 1)
    with tempfile.TemporaryDirectory(prefix="bench-") as directory, LocalKafka() as kafka:
        settings = Settings(
            bootstrap_servers=kafka.bootstrap_servers,
            store=f"{directory}/store",
            database_url=f"sqlite:///{directory}/registry.db",
        )
        create_topics(settings)
        store_bundle(settings, bundle)
        lifecycle.promote(settings, bundle.version, "benchmark", "bench", at_once=True)
        say(f"sending {symbols} x {bars_per_symbol} bars and predictions")
        _send(settings, bundle, symbols, bars_per_symbol)
        say("measuring one monitor")
        environment = {
            "KAFKA_BOOTSTRAP_SERVERS": kafka.bootstrap_servers,
            "DATABASE_URL": settings.database_url,
            "GPT_TRADER_STORE": settings.store,
            "GPT_TRADER_REPLICA": "bench",
        }
        with Fleet(environment, Path(directory) / "logs") as fleet:
            port = free_port()
            fleet.start("monitor", "monitor", "--port", str(port))
            samples = _watch(port, fleet, expected)
        published = {(m.partition(), m.offset()) for m in read_topic(settings, OUTCOMES)}
    within = [s for s in samples if MARGIN <= s.outcomes / expected <= 1 - MARGIN]
    if len(within) < 2:
        raise ValueError("too few outcomes to measure a rate: ask for more bars per symbol")
    first, last = within[0], within[-1]
    n = last.outcomes - first.outcomes
    return {
        "outcomes_per_s": round(n / (last.at - first.at)),
        "cpu_seconds_per_million": round(1e6 * (last.cpu_s - first.cpu_s) / n, 1),
        "symbols": symbols,
        "delivery": settings.kafka.delivery,
        "measured_outcomes": round(n),
        "expected": expected,
        "published": len(published),
    }


def _judged_bundle() -> Bundle:
    bundle = default_bundle()
    calm = Calibration(
        low=-5.0,
        high=5.0,
        mean=0.0,
        sd=1.0,
        correlation=0.3,
        threshold=1e6,  # the alarm is weighed and never raised
        arl0_bars=20_000,
        block_bars=300,
        n=20_000,
    )
    return replace(bundle, config=bundle.config.model_copy(update={"calibrations": (calm,)}))


def _send(settings: Settings, bundle: Bundle, symbols: int, minutes: int) -> None:
    bars = simulated_bars(symbols, minutes)
    (target,) = bundle.config.targets
    names, rng = bars.names, np.random.default_rng(0)
    with make_publisher(settings, "bench") as publisher:
        for t in range(minutes):
            ts = np.full(symbols, bars.ts[t])
            row = encode_bars(BarColumns(names, ts, bars.ohlcv[t]))
            values = np.log(bars.variance[t]) + rng.normal(0, 0.3, symbols)
            said = encode_predictions(
                names,
                ts,
                values,
                None,
                target=target.name,
                horizon=target.horizon,
                interval_ms=bundle.config.features.interval_ms,
                bundle=bundle.version,
                role="champion",
            )
            for name, bar, prediction in zip(names, row, said, strict=True):
                publisher.produce(BARS, name.encode(), bar)
                publisher.produce(PREDICTIONS, name.encode(), prediction)


class _Sample(NamedTuple):
    at: float
    outcomes: float
    cpu_s: float


def _watch(port: int, fleet: Fleet, expected: int) -> list[_Sample]:
    """Look at the monitor's /metrics until it has made every expected outcome."""
    samples: list[_Sample] = []
    while not samples or samples[-1].outcomes < expected:
        fleet.check()
        time.sleep(0.1)
        try:
            samples.append(_sample(port))
        except OSError:  # it is still starting
            continue
    return samples


def _sample(port: int) -> _Sample:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    return _Sample(
        time.perf_counter(),
        _sum_of("gpt_trader_outcomes_total", text),
        _sum_of("process_cpu_seconds_total", text),
    )


def _sum_of(metric: str, text: str) -> float:
    found = re.findall(rf"^{metric}(?:{{[^}}]*}})? (\S+)$", text, re.MULTILINE)
    return sum(map(float, found))
