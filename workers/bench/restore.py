"""How long a killed replica is missed: from SIGKILL to the first live prediction of its successor."""

import time
from datetime import UTC, datetime
from itertools import count
from typing import Any

import msgspec

from schemas.topics import PREDICTIONS
from workers.bench.fixtures import (
    Market,
    Tell,
    WarmState,
    default_bundle,
    minute_of,
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
from workers.kafka import make_publisher

EVENTS = ("started", "waiting_for_champion", "restored")
"""Lines of the replica's log by which the time is divided; the last one of each counts."""
LIVE_EVERY_S = 0.01


class _Said(msgspec.Struct):
    ts: int


def run(
    settings: Settings,
    symbols: int = 10_000,
    replayed_bars: int = 5_000,
    window: int = 30,
    tell: Tell = quietly,
) -> dict[str, Any]:
    """Seconds from the kill to a prediction, readable under read_committed, of a bar sent after it.

    The start of the process and its imports count. The newest snapshots are `replayed_bars` old:
    10,000 symbols with minute bars send about as many between two of them.
    """
    bundle = default_bundle(window)
    tell("warming up the symbols", 0.0)
    market = Market(symbols, settings.kafka.partitions, silent_minutes(bundle))
    settings = with_sections(settings, inference={"snapshot_every_s": 3_600.0})
    lay_snapshots(settings, WarmState.of(market, bundle))
    appoint(settings, "champion", bundle)
    with Replica(settings) as replica, make_publisher(settings, "bench") as publisher:
        tell("the first replica", 0.4)
        replica.wait_until_live()
        minutes = max(replayed_bars // symbols, 1)
        of_minute = range(min(symbols, replayed_bars))
        for minute in range(minutes):
            send(publisher, market, minute, of_minute)
        publisher.commit({})
        patience = Patience(replica, "the first replica's predictions")
        while replica.predictions() < minutes * len(of_minute):
            patience.lasts()
            time.sleep(0.05)
        time.sleep(0.5)  # the last batch is committed
        with tail_from_end(settings, PREDICTIONS) as tail:
            tail.poll(1, timeout_ms=500)
            lines_before = len(replica.log_lines())
            tell("killed; waiting for its successor", 0.7)
            killed_at, wall = time.perf_counter(), time.time()
            replica.kill()
            replica.start()
            patience = Patience(replica, "the successor's first live prediction")
            live = count()
            while patience.lasts():
                more, number = divmod(next(live), symbols)
                send(publisher, market, minutes + more, range(number, number + 1))
                messages = tail.poll(100, timeout_ms=round(1e3 * LIVE_EVERY_S))
                if any(
                    minute_of(msgspec.json.decode(m.value() or b"", type=_Said).ts) >= minutes
                    for m in messages
                ):
                    break
            seconds = time.perf_counter() - killed_at
        phases = _phases(replica.log_lines()[lines_before:], wall)
    return {
        "symbols": symbols,
        "seconds_to_first_live_prediction": round(seconds, 2),
        "replayed_bars": minutes * len(of_minute),
        "phases_s": phases | {"first_live_prediction": round(seconds, 2)},
        "window": window,
    }


def _phases(lines: list[str], since: float) -> dict[str, float]:
    """When the successor's log says what, in seconds since `since`."""
    found = {}
    for line in lines:
        fields = dict(part.split("=", 1) for part in line.split() if "=" in part)
        if (event := fields.get("event")) in EVENTS:
            at = datetime.strptime(fields["at"], "%Y-%m-%dT%H:%M:%S.%fZ").replace(tzinfo=UTC)
            found[event] = round(at.timestamp() - since, 2)
    return found
