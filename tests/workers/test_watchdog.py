"""Partitions that stand still are found, named, and let go again; those that merely rest are not."""

import logging
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import MakeTopic
from workers.config import HttpSettings, Settings
from workers.kafka import GroupConsumer, make_consumer, make_publisher, poll_batch
from workers.service import Service
from workers.watchdog import Stalls, Watchdog

AFTER_S = 10.0
A, B = ("bars", 0), ("bars", 1)


def stalls(waiting: bool | None = True) -> Stalls:
    return Stalls(AFTER_S, lambda place, position: waiting)


def looks(watched: Stalls, *seen: tuple[float, int, int]) -> list[bool]:
    """Whether partition A is stalled at each (time, position, end)."""
    return [A in watched.update({A: position}, {A: end}, now) for now, position, end in seen]


def test_a_partition_stalls_when_messages_wait_and_it_stands_still_long_enough() -> None:
    seen = [(float(t), 5, 9) for t in range(0, 14, 2)]
    assert looks(stalls(), *seen) == [False] * 5 + [True] * 2


def test_a_partition_at_its_end_may_rest_for_ever_and_a_message_starts_the_count() -> None:
    watched = stalls()
    assert not any(looks(watched, *[(float(t), 9, 9) for t in range(0, 100, 4)]))
    assert looks(watched, (100, 9, 10), (104, 9, 10), (106, 9, 10)) == [False, False, True]


def test_a_partition_that_moves_however_slowly_is_not_stalled() -> None:
    assert not any(looks(stalls(), *[(float(t), t // 8, 1_000) for t in range(0, 100, 4)]))


def test_it_is_let_go_as_soon_as_it_moves() -> None:
    seen = [(float(t), 5, 9) for t in range(0, 16, 4)] + [(16.0, 6, 9), (20.0, 6, 9)]
    assert looks(stalls(), *seen) == [False, False, False, True, False, False]


def test_time_in_which_nobody_looked_does_not_count() -> None:
    assert looks(stalls(), (0, 5, 9), (4, 5, 9), (60, 5, 9), (64, 5, 9)) == [False] * 4


def test_an_end_that_is_only_markers_is_no_stall_until_more_comes_behind_it() -> None:
    watched = stalls(waiting=False)
    assert not any(looks(watched, *[(float(t), 9, 10) for t in range(0, 60, 4)]))
    watched._is_waiting = lambda place, position: True
    assert not any(looks(watched, *[(float(t), 9, 10) for t in range(60, 100, 4)]))
    after = looks(watched, *[(float(t), 9, 12) for t in range(100, 116, 4)])
    assert after == [False, False, True, True]


def test_where_nobody_answers_nothing_is_called_stalled_and_it_is_asked_again_soon() -> None:
    watched, asked = stalls(), []
    watched._is_waiting = lambda place, position: asked.append(place)
    assert not any(looks(watched, *[(float(t), 5, 9) for t in range(0, 21, 1)]))
    assert 3 <= len(asked) <= 5


def test_an_end_that_was_once_heard_of_is_remembered() -> None:
    watched = stalls()
    watched.update({A: 5}, {A: 9}, 0)
    for now in (4, 8):
        assert not watched.update({A: 5}, {}, now)
    assert watched.update({A: 5}, {}, 12) == {A: 12}
    assert watched.still == [A]


def test_a_partition_that_was_given_up_is_forgotten() -> None:
    watched = stalls()
    looks(watched, (0, 5, 9), (4, 5, 9), (8, 5, 9))
    assert not watched.update({B: 0}, {}, 12)
    assert looks(watched, (13, 5, 9)) == [False]


@given(steps=st.lists(st.tuples(st.integers(1, 5), st.booleans(), st.integers(0, 3)), max_size=60))
def test_stalled_is_what_has_had_messages_and_has_not_moved_since(
    steps: list[tuple[int, bool, int]],
) -> None:
    watched, now, position, end, waited_from = stalls(), 0, 0, 0, 0
    watched.update({A: 0}, {A: 0}, 0.0)
    for pause, moves, more in steps:
        now, end = now + pause, end + more
        moved = moves and position < end
        position += moved
        if moved or position == end:
            waited_from = now
        stalled = A in watched.update({A: position}, {A: end}, now)
        assert stalled == (position < end and not moved and now - waited_from >= AFTER_S)


@pytest.mark.kafka
def test_a_paused_partition_is_named_in_log_metrics_and_healthz_until_it_moves(
    kafka_settings: Settings, make_topic: MakeTopic, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    topic, now = make_topic(partitions=2), 0.0
    service = Service("test", HttpSettings(stalled_after_s=AFTER_S), clock=lambda: now)
    consumer = make_consumer(kafka_settings, "watched-" + topic, [topic])
    positions: dict[tuple[str, int], int] = {(topic, 0): 0, (topic, 1): 0}
    watchdog = Watchdog(consumer, kafka_settings, service, lambda: now)

    def look(seconds: float) -> None:
        nonlocal now
        for _ in range(round(seconds / 2)):
            now += 2
            service.progress()
            watchdog.look(positions)

    def fill() -> None:
        with make_publisher(kafka_settings, "test") as publisher:
            for partition in (0, 1):
                publisher.produce(topic, None, b"x", partition=partition)

    fill()
    read_until(consumer, positions, lambda: set(positions.values()) == {1})
    (paused,) = (place for place in consumer.assignment() if place.partition == 0)
    consumer.pause([paused])
    fill()
    read_until(consumer, positions, lambda: positions[topic, 1] == 2)
    look(8)
    assert service.health()[0] == 200
    look(14)
    status, body = service.health()
    assert (status, body["stalled_partitions"]) == (503, [f"{topic}[0]"])
    assert body["status"] == "stalled"
    gauge = service.metrics.registry.get_sample_value
    assert gauge("gpt_trader_stalled_partitions") == 1
    assert gauge("gpt_trader_lag_messages", {"topic": topic, "partition": "0"}) == 1
    assert [record.getMessage() for record in caplog.records].count("partition_stalled") == 1

    consumer.resume([paused])
    read_until(consumer, positions, lambda: positions[topic, 0] == 2)
    look(2)
    assert service.health()[0] == 200
    assert gauge("gpt_trader_stalled_partitions") == 0
    assert "partition_moves_again" in caplog.text
    consumer.close()


def read_until(
    consumer: GroupConsumer, positions: dict[tuple[str, int], int], done: Callable[[], bool]
) -> None:
    while not done():  # pytest's timeout ends it
        for message in poll_batch(consumer, 100, 100):
            positions[message.topic(), message.partition()] = message.offset() + 1
