"""The inference worker as its own process on a real Kafka: killed, disturbed, fed with rubbish."""

import json
import re
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path

import pandas as pd
import pytest

from schemas.codecs import BarColumns, encode_bars
from schemas.topics import ATTENTION, BARS, DEAD_LETTER
from tests.workers.builders import MINUTE_MS, make_bars, make_bundle, rows_of
from tests.workers.streams import (
    WARM_AT,
    appoint,
    assert_exactly_once,
    compared,
    send,
    wait_until,
    wait_until_done,
)
from workers.bundles import store_bundle
from workers.config import Settings
from workers.fleet import Fleet
from workers.kafka import make_publisher, read_topic
from workers.proof import read_predictions

pytestmark = [pytest.mark.kafka, pytest.mark.timeout(600)]

SYMBOLS = [f"S{i}" for i in range(12)]


@pytest.fixture
def fleet(fresh_topics: Settings, tmp_path: Path) -> Iterator[Fleet]:
    with Fleet(environment(fresh_topics), tmp_path / "logs") as fleet:
        yield fleet


def environment(settings: Settings) -> Mapping[str, str]:
    return {
        "KAFKA_BOOTSTRAP_SERVERS": settings.bootstrap_servers,
        "DATABASE_URL": f"sqlite:///{settings.store}/registry.db",
        "GPT_TRADER_STORE": settings.store,
        "GPT_TRADER_INFERENCE__GROUP": settings.inference.group,
        "GPT_TRADER_INFERENCE__SNAPSHOT_EVERY_S": "1",
        "GPT_TRADER_INFERENCE__MAX_BATCH": "64",  # batches overlap, and a swap is carried over
        "GPT_TRADER_KAFKA__SESSION_TIMEOUT_MS": "6000",
        "GPT_TRADER_HTTP__HOST": "127.0.0.1",
    }


def start(fleet: Fleet, replica: str) -> None:
    fleet.start(replica, "inference", "--replica", replica)


def all_have_heard(fleet: Fleet, slot: str, effective_ts: int) -> bool:
    """Whether both replicas have written the change into the schedules of their partitions."""
    change = re.compile(rf"event=swap .*role={slot} .*effective_ts={effective_ts}\b")
    return all(change.search(fleet.log_file(name).read_text()) for name in ("one", "two"))


def test_kills_and_a_swap_under_load_lose_double_and_change_nothing(
    fleet: Fleet, fresh_topics: Settings
) -> None:
    settings = fresh_topics
    champion, challenger = make_bundle(seed=1), make_bundle(seed=2)
    n = WARM_AT + 400
    bars = make_bars(SYMBOLS, n)
    shadow_ts, promote_ts = MINUTE_MS * (WARM_AT + 100), MINUTE_MS * (WARM_AT + 200)

    def part(first: int, last: int) -> BarColumns:
        return rows_of(bars, slice(first * len(SYMBOLS), last * len(SYMBOLS)))

    appoint(settings, "champion", champion, 0)
    start(fleet, "one")
    start(fleet, "two")
    send(settings, part(0, WARM_AT + 50))
    wait_until_done(settings, fleet.check)
    appoint(settings, "challenger", challenger, shadow_ts)
    wait_until(lambda: all_have_heard(fleet, "challenger", shadow_ts), fleet.check)
    send(settings, part(WARM_AT + 50, WARM_AT + 150))
    fleet.kill("one")
    start(fleet, "one")
    wait_until_done(settings, fleet.check)
    appoint(settings, "champion", challenger, promote_ts)
    appoint(settings, "challenger", None, promote_ts)
    wait_until(lambda: all_have_heard(fleet, "challenger", promote_ts), fleet.check)
    for first in range(WARM_AT + 150, n, 125):
        send(settings, part(first, first + 125))
        fleet.kill("two")
        start(fleet, "two")
    wait_until_done(settings, fleet.check)
    statuses = fleet.stop()
    assert set(statuses.values()) <= {0, -signal.SIGTERM}  # the latter while it was still importing

    comparison = compared(
        settings,
        [champion, challenger],
        [
            ("champion", champion.version, 0),
            ("challenger", challenger.version, shadow_ts),
            ("champion", challenger.version, promote_ts),
            ("challenger", None, promote_ts),
        ],
    )
    assert_exactly_once(comparison)
    assert comparison.expected == 2 * len(SYMBOLS) * (n - WARM_AT + 100)
    summaries = [json.loads(m.value() or b"") for m in read_topic(settings, ATTENTION)]
    assert len(summaries) == comparison.expected / 2
    assert {s["prediction_id"] for s in summaries} <= {*read_predictions(settings)["id"]}


def test_rubbish_goes_to_the_dead_letters_and_harms_nothing(
    fleet: Fleet, fresh_topics: Settings
) -> None:
    settings = fresh_topics
    bundle = make_bundle(seed=1)
    appoint(settings, "champion", bundle, 0)
    good = make_bars(["S0", "S1"], WARM_AT + 50)
    valid = json.loads(encode_bars(rows_of(good, slice(0, 1)))[0])
    rubbish: list[bytes | None] = [
        None,
        b"",
        b"not json",
        b"\xff\xfe\x00",
        b"[" * 100_000,
        b"x" * 5_000_000,
        json.dumps({k: v for k, v in valid.items() if k != "close"}).encode(),
        json.dumps(valid | {"close": "1.0"}).encode(),
        json.dumps(valid | {"close": float("nan")}).encode(),
        json.dumps(valid | {"high": valid["low"] / 2}).encode(),
        json.dumps(valid | {"volume": -1.0}).encode(),
        json.dumps(valid | {"schema_version": 99}).encode(),
        json.dumps(valid | {"ts": 10**17}).encode(),
        json.dumps(valid | {"ts": -1}).encode(),
        json.dumps(valid | {"symbol": ""}).encode(),
    ]
    coordinates = set()
    with make_publisher(settings, "test") as publisher:
        for i, (symbol, value) in enumerate(zip(good.symbols, encode_bars(good), strict=True)):
            publisher.produce(BARS, symbol.encode(), value)
            if i % 20 == 0 and i // 20 < len(rubbish):
                publisher.produce(BARS, symbol.encode(), rubbish[i // 20])
    start(fleet, "one")
    wait_until_done(settings, fleet.check)
    assert set(fleet.stop().values()) == {0}

    letters = list(read_topic(settings, DEAD_LETTER))
    assert len(letters) == len(rubbish)
    by_place = {(m.partition(), m.offset()): m.value() for m in read_topic(settings, BARS)}
    for letter in letters:
        headers = {k: v.decode() for k, v in letter.headers() or [] if v is not None}
        assert headers["reason"]
        assert headers["topic"] == BARS
        place = int(headers["partition"]), int(headers["offset"])
        coordinates.add(place)
        original = by_place[place]
        assert letter.value() == original or len(original or b"") > 1_000_000
    assert len(coordinates) == len(rubbish)
    comparison = compared(settings, [bundle], [("champion", bundle.version, 0)])
    assert_exactly_once(comparison)
    assert comparison.expected == 2 * 2 * 50


def test_a_damaged_challenger_is_refused_and_the_champion_goes_on(
    fleet: Fleet, fresh_topics: Settings
) -> None:
    settings = fresh_topics
    champion, challenger = make_bundle(seed=1), make_bundle(seed=2)
    bars = make_bars(["S0"], WARM_AT + 40)
    appoint(settings, "champion", champion, 0)
    appoint(settings, "challenger", challenger, 0)
    weights = Path(store_bundle(settings, challenger)) / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(content)

    start(fleet, "one")
    send(settings, bars)
    wait_until_done(settings, fleet.check)
    assert fleet.stop() == {"one": 0}

    assert "bundle_rejected" in fleet.log_file("one").read_text()
    assert_exactly_once(compared(settings, [champion], [("champion", champion.version, 0)]))


def test_bars_sent_twice_or_late_are_not_predicted_twice(
    fleet: Fleet, fresh_topics: Settings
) -> None:
    settings = fresh_topics
    bundle = make_bundle(seed=1)
    bars = make_bars(["S0", "S1"], WARM_AT + 30)
    appoint(settings, "champion", bundle, 0)
    start(fleet, "one")
    send(settings, bars)
    send(settings, rows_of(bars, slice(-40, None)))
    send(settings, rows_of(bars, slice(0, 10)))
    wait_until_done(settings, fleet.check)
    assert fleet.stop() == {"one": 0}

    predictions: pd.DataFrame = read_predictions(settings)
    assert len(predictions) == predictions["id"].nunique() == 2 * 2 * 30
    assert_exactly_once(compared(settings, [bundle], [("champion", bundle.version, 0)]))
