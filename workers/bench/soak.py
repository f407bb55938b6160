"""Whether a replica's memory stays where it is: half its highest rate, for a long time."""

import time
from statistics import median
from typing import Any

from workers.bench.fixtures import (
    Market,
    Tell,
    WarmState,
    default_bundle,
    quietly,
    silent_minutes,
)
from workers.bench.stage import Patience, Replica, appoint, lay_snapshots, send
from workers.config import Settings
from workers.kafka import Publisher, make_publisher

BROKER = {
    "log.retention.bytes": 256 * 2**20,
    "log.segment.bytes": 64 * 2**20,
    "log.retention.check.interval.ms": 5_000,
}
"""The broker of a long soak forgets: half an hour at full size would fill the disk."""
WARM_UP_SHARE = 0.2
WARM_UP_S = 60.0
"""What comes before the first look at memory: at most so long, and at most so large a share."""
LOOK_EVERY_S = 0.5
SHARE_OF_MAXIMUM = 0.5


def run(
    settings: Settings,
    minutes: float = 30.0,
    symbols: int = 500,
    probe_minutes: int = 600,
    window: int = 30,
    tell: Tell = quietly,
) -> dict[str, Any]:
    """Resident memory after the warm-up and at the end, each the median of a tenth of the looks.

    The highest rate is measured first, on a backlog of `probe_minutes` bars of each symbol.
    """
    bundle = default_bundle(window)
    tell("warming up the symbols", 0.0)
    market = Market(symbols, settings.kafka.partitions, silent_minutes(bundle))
    lay_snapshots(settings, WarmState.of(market, bundle))
    appoint(settings, "champion", bundle)
    with make_publisher(settings, "bench") as publisher:
        tell("sending a backlog, to find the highest rate", 0.0)
        for minute in range(probe_minutes):
            send(publisher, market, minute)
        publisher.commit({})
        with Replica(settings) as replica:
            rate = SHARE_OF_MAXIMUM * _highest_rate(replica, symbols * probe_minutes)
            sent, looks = _soak(replica, publisher, market, probe_minutes, rate, 60 * minutes, tell)
            patience = Patience(replica, "the last predictions")
            while replica.predictions() < symbols * probe_minutes + sent:
                patience.lasts()
                time.sleep(0.1)
    tenth = max(len(looks) // 10, 1)
    return {
        "minutes": minutes,
        "rate": round(rate),
        "rss_mb_start": round(median(rss for rss, _ in looks[:tenth]), 1),
        "rss_mb_end": round(median(rss for rss, _ in looks[-tenth:]), 1),
        "rss_mb_most": round(max(rss for rss, _ in looks), 1),
        "most_lag": round(max(lag for _, lag in looks)),
        "bars": sent,
        "symbols": symbols,
        "window": window,
    }


def _highest_rate(replica: Replica, backlog: int) -> float:
    """Predictions a second between a tenth and nine tenths of a backlog."""
    patience, looks = Patience(replica, "the backlog's predictions"), []
    while (made := replica.predictions()) < backlog and patience.lasts():
        looks.append((time.perf_counter(), made))
        time.sleep(0.05)
    steady = [look for look in looks if 0.1 * backlog <= look[1] <= 0.9 * backlog]
    if len({made for _, made in steady}) < 2:
        raise ValueError("too few predictions to measure a rate: ask for more probe minutes")
    (from_s, first), (to_s, last) = steady[0], steady[-1]
    return (last - first) / (to_s - from_s)


def _soak(
    replica: Replica,
    publisher: Publisher,
    market: Market,
    first_minute: int,
    rate: float,
    seconds: float,
    tell: Tell,
) -> tuple[int, list[tuple[float, float]]]:
    """Send at `rate`; how many bars, and (resident MB, lag) at every look after the warm-up."""
    looks: list[tuple[float, float]] = []
    warm_after_s = min(WARM_UP_SHARE * seconds, WARM_UP_S)
    started, sent, look_at = time.perf_counter(), 0, warm_after_s
    while (elapsed := time.perf_counter() - started) < seconds:
        if elapsed * rate >= sent:
            send(publisher, market, first_minute + sent // market.symbols)
            sent += market.symbols
        else:
            time.sleep(0.001)
        if elapsed >= look_at:
            look_at += LOOK_EVERY_S
            replica.check()
            metrics = replica.metrics()
            lag = sum(v for k, v in metrics.items() if k.startswith("gpt_trader_lag_messages{"))
            looks.append((metrics["process_resident_memory_bytes"] / 2**20, lag))
            tell(f"{rate:,.0f} bars a second, {looks[-1][0]:,.0f} MB", elapsed / seconds)
    publisher.commit({})
    return sent, looks
