"""From a bar to its prediction, readable under read_committed: at a steady rate, and at a minute's close."""

import json
import time
from typing import Any

import numpy as np

from schemas.topics import BARS, PREDICTIONS
from workers.bench.fixtures import (
    Market,
    Tell,
    WarmState,
    default_bundle,
    minute_of,
    number_of,
    quietly,
    silent_minutes,
)
from workers.bench.stage import (
    Patience,
    Replica,
    appoint,
    lay_snapshots,
    send,
    tail_from_end,
    with_sections,
)
from workers.config import Settings
from workers.kafka import Publisher, Tail, make_publisher

UNMEASURED_S = 1.0
"""The first bars of a replica find cold caches."""


def run(
    settings: Settings,
    rate: int = 1_000,
    seconds: float = 20.0,
    symbols: int = 500,
    minute_close_symbols: int = 10_000,
    closes: int = 5,
    window: int = 30,
    tell: Tell = quietly,
) -> dict[str, Any]:
    """Percentiles in ms for both delivery modes, and the time that a minute's close takes.

    The clock of a bar starts when this process hands it to its producer (`linger.ms` 0), so the
    way to the broker is counted too; it ends when this process has read the prediction. The clock
    of a minute's close starts when a replica that was stopped (SIGSTOP), while all bars of the
    minute arrived at the broker, is let go; it ends when the last prediction has been read.
    """
    bundle = default_bundle(window)
    tell("warming up the symbols", 0.0)
    market = Market(
        max(symbols, minute_close_symbols), settings.kafka.partitions, silent_minutes(bundle)
    )
    lay_snapshots(settings, WarmState.of(market, bundle))
    appoint(settings, "champion", bundle)
    result: dict[str, Any] = {"rate": rate}
    minute = 0
    for share, mode in ((0.2, "at_least_once"), (0.5, "exactly_once")):
        tell(f"{mode}: starting a replica", share)
        of_mode = with_sections(settings, kafka={"delivery": mode})
        with Replica(of_mode) as replica, _publisher(settings) as publisher:
            replica.wait_until_live()
            tell(f"{mode}: {rate} bars a second for {seconds:.0f} s", share + 0.05)
            bench = _Bench(settings, market, replica, publisher)
            took_ms = bench.latencies_ms(minute, rate, seconds, symbols)
            minute += len(took_ms) // symbols + 1
            result[mode] = _percentiles(took_ms[round(UNMEASURED_S * rate) :])
            if mode == "exactly_once":
                tell(f"{closes} minute closes of {minute_close_symbols:,} symbols", 0.8)
                took = [
                    bench.minute_close_ms(minute + i, minute_close_symbols) for i in range(closes)
                ]
    return result | {
        "minute_close_symbols": minute_close_symbols,
        "minute_close_ms": round(float(np.median(took)), 1),
        "minute_close_worst_ms": round(max(took), 1),
        "minute_closes": closes,
        "symbols": symbols,
        "seconds": seconds,
        "window": window,
        "clock": "from the produce call to the prediction read; minute close from SIGCONT",
    }


class _Bench:
    def __init__(
        self, settings: Settings, market: Market, replica: Replica, publisher: Publisher
    ) -> None:
        self._settings = settings
        self._market = market
        self._replica = replica
        self._publisher = publisher

    def latencies_ms(
        self, first_minute: int, rate: int, seconds: float, symbols: int
    ) -> list[float]:
        """Of each bar in the order of sending; producing waits for nothing, so no bar is let off."""
        total = round(rate * (seconds + UNMEASURED_S))
        minutes = -(-total // symbols)
        bars = [
            bar
            for minute in range(first_minute, first_minute + minutes)
            for bar in self._market.messages(minute, range(symbols))
        ]
        sent_at, got_at = np.zeros(total), np.zeros(total)
        sent = got = 0
        patience = Patience(self._replica, "predictions")
        with tail_from_end(self._settings, PREDICTIONS) as tail:
            _is_reading(tail)
            started = time.perf_counter()
            while got < total:
                due = min(int((time.perf_counter() - started) * rate) + 1, total)
                for key, value, partition in bars[sent:due]:
                    sent_at[sent] = time.perf_counter()
                    self._publisher.produce(BARS, key, value, partition=partition)
                    sent += 1
                for message in tail.poll(1_000, timeout_ms=1):
                    now = time.perf_counter()
                    said = json.loads(message.value() or b"")
                    place = minute_of(said["ts"]) - first_minute
                    got_at[place * symbols + number_of(said["symbol"])] = now
                    got += 1
                if got < total:
                    patience.lasts()
        return list(1e3 * (got_at - sent_at))

    def minute_close_ms(self, minute: int, symbols: int) -> float:
        patience = Patience(self._replica, "a minute's predictions")
        with tail_from_end(self._settings, PREDICTIONS) as tail:
            _is_reading(tail)
            with self._replica.frozen(), make_publisher(self._settings, "bench") as publisher:
                send(publisher, self._market, minute, range(symbols))
                publisher.commit({})
            started, got = time.perf_counter(), 0
            while got < symbols:
                got += len(tail.poll(10_000, timeout_ms=100))
                patience.lasts()
            return 1e3 * (time.perf_counter() - started)


def _publisher(settings: Settings) -> Publisher:
    return make_publisher(with_sections(settings, kafka={"linger_ms": 0}), "bench")


def _is_reading(tail: Tail) -> None:
    """Let the client connect and fetch before anything is timed."""
    tail.poll(1, timeout_ms=500)


def _percentiles(took_ms: list[float]) -> dict[str, float]:
    p50, p99, p999 = np.percentile(took_ms, [50, 99, 99.9]).round(2).tolist()
    return {"p50_ms": p50, "p99_ms": p99, "p999_ms": p999}
