"""The feed against a real Kafka where it sends, and without one where it only reckons."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.simulation import Scenario, Simulator
from schemas.codecs import decode_bars
from schemas.topics import BARS
from workers import feed as module
from workers.config import KafkaSettings, Settings
from workers.feed import Limits, due_s, feed, not_yet_fed
from workers.kafka import create_topics, read_topic
from workers.local_kafka import LocalKafka

MINUTE = 60_000
HOUR = 60 * MINUTE


def make_bars(minutes: int, symbols: int = 3) -> pd.DataFrame:
    ts = 1_514_903_400_000 + MINUTE * np.arange(minutes, dtype=np.int64)
    return Simulator(Scenario(symbols=symbols), seed=1).run(ts).frame()


# ---- pace ----


def test_without_a_speed_every_bar_may_go_at_once() -> None:
    assert due_s(np.array([0, MINUTE, HOUR]), None).tolist() == [0, 0, 0]


def test_speed_60_is_an_hour_a_minute() -> None:
    due = due_s(MINUTE * np.arange(61), 60)
    assert due[-1] == pytest.approx(60)
    np.testing.assert_allclose(np.diff(due), 1)


def test_bars_of_one_time_go_together_and_a_night_passes_in_a_moment() -> None:
    ts = np.array([0, 0, MINUTE, MINUTE, 2 * MINUTE, 18 * HOUR, 18 * HOUR + MINUTE])
    due = due_s(ts, 1)
    assert due[0] == due[1]
    assert due[2] == due[3] == 60
    assert due[5] - due[4] == 60 * module.SILENCE_INTERVALS


@given(st.lists(st.integers(0, 10**9), max_size=50).map(sorted), st.floats(0.01, 1e6) | st.none())
def test_due_times_never_go_back_and_begin_at_once(ts: list[int], speed: float | None) -> None:
    due = due_s(np.array(ts, np.int64), speed)
    assert len(due) == len(ts)
    assert np.isfinite(due).all()
    assert (np.diff(due) >= 0).all()
    assert not len(due) or due[0] == 0


# ---- the loop, on a clock and a lag of our own ----


@dataclass
class World:
    """A clock that only sleeping moves, and what was sent at which of its times."""

    now: float = 0.0
    lags: list[int] = field(default_factory=list)
    sent: list[float] = field(default_factory=list)
    closed: bool = False

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds > 0, "a busy loop"
        self.now += seconds

    def __call__(self, *_: object) -> int:
        return self.lags.pop(0) if self.lags else 0

    def close(self) -> None:
        self.closed = True


class Recorder:
    def __init__(self, world: World) -> None:
        self.world = world

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def produce(self, topic: str, key: bytes, value: bytes) -> None:
        self.world.sent.append(self.world.now)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    world = World()
    monkeypatch.setattr(module, "make_publisher", lambda *_: Recorder(world))
    monkeypatch.setattr(module, "GroupLag", lambda *_: world)
    return world


def run(
    bars: pd.DataFrame, world: World, limits: Limits, running: Callable[[], bool] = lambda: True
) -> module.Fed:
    return feed(bars, Settings(), limits, running=running, clock=world.clock, sleep=world.sleep)


def test_paced_bars_go_when_they_are_due(world: World) -> None:
    fed = run(make_bars(10, symbols=1), world, Limits(speed=60))
    np.testing.assert_allclose(world.sent, np.arange(10), atol=0.11)
    assert fed.bars == 10
    assert world.closed


def test_the_feed_waits_while_workers_lag_and_does_not_hurry_afterwards(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHECK_EVERY_BARS", 5)
    world.lags = [0] + [99] * 100
    fed = run(make_bars(20, symbols=1), world, Limits(speed=60, max_lag=50))
    assert fed.waited_s == pytest.approx(5)
    gaps = np.diff(world.sent)
    assert sorted(gaps)[-1] == pytest.approx(6, abs=0.2)
    assert sorted(gaps)[0] > 0.8


def test_a_feed_that_is_told_to_stop_leaves_also_while_it_waits(world: World) -> None:
    world.lags = [99] * 10_000
    fed = run(make_bars(2_000), world, Limits(max_lag=1), running=lambda: world.now < 3)
    assert 0 < fed.bars < 6_000
    assert world.now == pytest.approx(3, abs=0.2)


def test_no_bars_are_no_trouble(world: World) -> None:
    assert run(make_bars(5).iloc[:0], world, Limits(speed=1)).bars == 0


# ---- on a real Kafka ----


@pytest.fixture(scope="module")
def settings() -> Iterator[Settings]:
    with LocalKafka() as kafka:
        settings = Settings(
            bootstrap_servers=kafka.bootstrap_servers, kafka=KafkaSettings(partitions=3)
        )
        create_topics(settings)
        yield settings


@pytest.mark.kafka
def test_every_bar_arrives_once_in_its_order_and_a_symbol_has_one_partition(
    settings: Settings,
) -> None:
    bars = make_bars(200, symbols=20)
    told: list[int] = []
    fed = feed(bars, settings, advance=told.append)
    assert fed.bars == sum(told) == 4_000
    messages = list(read_topic(settings, BARS))
    columns, _, rejected = decode_bars([message.value() for message in messages])
    assert not rejected
    arrived = pd.DataFrame({"symbol": columns.symbols, "ts": columns.ts})
    arrived["partition"] = [message.partition() for message in messages]
    assert [message.key() for message in messages] == [s.encode() for s in columns.symbols]
    assert not arrived.duplicated(["symbol", "ts"]).any()
    assert arrived.groupby("symbol")["partition"].nunique().eq(1).all()
    assert arrived["partition"].nunique() == 3
    assert arrived.groupby("partition")["ts"].apply(lambda ts: ts.is_monotonic_increasing).all()
    sent = bars.set_index(["symbol", "ts"]).sort_index()
    arrived[["open", "high", "low", "close", "volume"]] = columns.ohlcv
    got = arrived.drop(columns="partition").set_index(["symbol", "ts"]).sort_index()
    pd.testing.assert_frame_equal(got, sent)

    rest = not_yet_fed(make_bars(300, symbols=20), settings)
    assert len(rest) == 101 * 20, "the newest minute may be sent again, nothing may be left out"
