import contextlib
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import pytest
from confluent_kafka import KafkaError, KafkaException, TopicPartition
from confluent_kafka import Message as ClientMessage
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewPartitions, NewTopic
from hypothesis import given
from hypothesis import strategies as st

from schemas.topics import BARS, DEAD_LETTER, LIFECYCLE, PREDICTIONS, TOPICS
from tests.conftest import MakeTopic
from workers.config import DeadLetterSettings, KafkaSettings, Settings
from workers.errors import (
    BrokerUnavailable,
    Fenced,
    TooManyDeadLetters,
    TopicMismatch,
    TransactionAborted,
)
from workers.kafka import (
    MAX_MESSAGE_BYTES,
    MAX_METADATA_BYTES,
    AtLeastOnce,
    DeadLetters,
    ExactlyOnce,
    GroupConsumer,
    GroupLag,
    Message,
    Offsets,
    Publisher,
    Tail,
    check_topics,
    committed,
    create_topics,
    ends,
    is_waiting,
    make_consumer,
    make_publisher,
    mismatches,
    newest_values,
    poll_batch,
    read_topic,
    seek,
)
from workers.kafka.publishing import _Aside
from workers.local_kafka import LocalKafka

real = pytest.mark.kafka

MARKED_WITHIN_S = 3.0
"""Until then the markers are there, or the transaction is one that stays open."""


def with_kafka(settings: Settings, **changes: Any) -> Settings:
    return settings.model_copy(
        update={"kafka": KafkaSettings.model_validate(settings.kafka.model_dump() | changes)}
    )


def as_replica(settings: Settings, replica: str) -> Settings:
    return settings.model_copy(update={"replica": replica})


def fill(settings: Settings, topic: str, values: Sequence[bytes], partition: int = 0) -> None:
    with make_publisher(settings, "filler") as publisher:
        for value in values:
            publisher.produce(topic, b"key", value, partition=partition)


def numbered(count: int, start: int = 0) -> list[bytes]:
    return [str(i).encode() for i in range(start, start + count)]


def take(consumer: GroupConsumer, count: int, seconds: float = 30) -> list[Message]:
    got: list[Message] = []
    deadline = time.monotonic() + seconds
    while len(got) < count:
        assert time.monotonic() < deadline, f"{len(got)} of {count} messages came"
        got += poll_batch(consumer, count - len(got), 100)
    return got


def poll_until(
    condition: Callable[[], object], *consumers: GroupConsumer, seconds: float = 30
) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        for consumer in consumers:
            poll_batch(consumer, 100, 20)


def values(settings: Settings, topic: str, **how: Any) -> list[bytes | None]:
    """What can be read; waits for the markers of a commit, which returns before they are written."""
    deadline = time.monotonic() + MARKED_WITHIN_S
    while is_open(settings, topic) and time.monotonic() < deadline:
        time.sleep(0.02)
    return [m.value() for m in read_topic(settings, topic, **how)]


def is_open(settings: Settings, topic: str) -> bool:
    """Whether some transaction has messages in a partition and no marker after them yet."""
    with (
        Tail(settings, topic) as committed_only,
        Tail(settings, topic, read_committed=False) as everything,
    ):
        return committed_only.ends != everything.ends


def after(topic: str, offset: int, metadata: str = "", partition: int = 0) -> Offsets:
    return {(topic, partition): (offset, metadata)}


@pytest.fixture
def consumers() -> Iterator[Callable[..., GroupConsumer]]:
    made: list[GroupConsumer] = []

    def make(*args: Any, **kwargs: Any) -> GroupConsumer:
        made.append(make_consumer(*args, **kwargs))
        return made[-1]

    yield make
    for consumer in made:
        consumer.close()


# ---- reading ----


@real
def test_waiting_messages_come_at_once_and_not_after_the_timeout(
    kafka_settings: Settings, make_topic: MakeTopic, consumers: Callable[..., GroupConsumer]
) -> None:
    topic = make_topic()
    fill(kafka_settings, topic, numbered(6))
    consumer = consumers(kafka_settings, "at-once-" + topic, [topic])
    take(consumer, 1)
    started = time.monotonic()
    got: list[Message] = []
    while len(got) < 5:
        got += poll_batch(consumer, 1_000, 5_000)
    assert time.monotonic() - started < 2.5
    assert [m.value() for m in got] == numbered(5, start=1)


@real
def test_an_assignment_starts_where_the_worker_says_else_where_it_was_committed(
    kafka_settings: Settings, make_topic: MakeTopic, consumers: Callable[..., GroupConsumer]
) -> None:
    topic = make_topic(partitions=3)
    for partition in range(3):
        fill(kafka_settings, topic, numbered(10, start=10 * partition), partition)
    first = make_consumer(kafka_settings, "starts-" + topic, [topic])
    take(first, 30)
    AtLeastOnce(kafka_settings, first).commit({(topic, 1): (4, ""), (topic, 2): (9, "")})
    first.close()

    asked: list[list[int]] = []

    def on_assign(partitions: list[int]) -> Mapping[int, int]:
        asked.append(partitions)
        return {2: 7}

    second = consumers(kafka_settings, "starts-" + topic, [topic], on_assign=on_assign)
    got = take(second, 10 + 6 + 3)
    assert asked == [[0, 1, 2]]
    assert sorted(int(m.value() or b"") for m in got) == [*range(10), *range(14, 20), 27, 28, 29]


@real
def test_co_partitioned_topics_start_each_at_its_own_offset(
    kafka_settings: Settings, make_topic: MakeTopic, consumers: Callable[..., GroupConsumer]
) -> None:
    one, two = make_topic(), make_topic()
    fill(kafka_settings, one, numbered(5))
    fill(kafka_settings, two, numbered(5, start=5))
    starts = {(one, 0): 4, (two, 0): 3}
    consumer = consumers(
        kafka_settings, "two-" + one, [one, two], on_assign=lambda partitions: starts
    )
    assert sorted(m.value() or b"" for m in take(consumer, 3)) == [b"4", b"8", b"9"]


@real
def test_a_second_member_takes_over_half_and_the_first_hears_of_it(
    kafka_settings: Settings, make_topic: MakeTopic, consumers: Callable[..., GroupConsumer]
) -> None:
    topic = make_topic(partitions=4)
    heard: list[tuple[str, list[int]]] = []

    def member(name: str) -> GroupConsumer:
        return consumers(
            as_replica(kafka_settings, f"{kafka_settings.replica}-{name}"),
            "group-" + topic,
            [topic],
            on_assign=lambda p: heard.append((f"{name} assigned", p)),
            on_revoke=lambda p, lost: heard.append((f"{name} {'lost' if lost else 'revoked'}", p)),
        )

    one = member("one")
    poll_until(lambda: heard, one)
    two = member("two")
    poll_until(lambda: len(heard) >= 4, one, two)
    assert heard[:2] == [("one assigned", [0, 1, 2, 3]), ("one revoked", [0, 1, 2, 3])]
    assert sorted(p for _, ps in heard[2:4] for p in ps) == [0, 1, 2, 3]
    assert len(heard[2][1]) == 2


@real
def test_a_restarted_replica_has_its_partitions_back_before_the_session_times_out(
    kafka_settings: Settings, make_topic: MakeTopic, consumers: Callable[..., GroupConsumer]
) -> None:
    topic = make_topic()
    fill(kafka_settings, topic, numbered(3))
    crashed = consumers(kafka_settings, "back-" + topic, [topic])
    take(crashed, 1)
    started = time.monotonic()
    successor = consumers(kafka_settings, "back-" + topic, [topic])
    take(successor, 3)
    assert time.monotonic() - started < kafka_settings.kafka.session_timeout_ms / 1_000
    with pytest.raises(Fenced, match="another member has our name"):
        poll_until(lambda: False, crashed)


@real
def test_seek_rewinds_an_assigned_partition(
    kafka_settings: Settings, make_topic: MakeTopic, consumers: Callable[..., GroupConsumer]
) -> None:
    topic = make_topic()
    fill(kafka_settings, topic, numbered(5))
    consumer = consumers(kafka_settings, "seek-" + topic, [topic])
    take(consumer, 4)
    seek(consumer, topic, 0, 2)
    assert [m.value() for m in take(consumer, 3)] == [b"2", b"3", b"4"]


@real
def test_what_the_own_client_does_not_answer_another_one_is_asked(
    kafka_settings: Settings,
    make_topic: MakeTopic,
    consumers: Callable[..., GroupConsumer],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    topic = make_topic()
    fill(kafka_settings, topic, numbered(2))
    consumer = consumers(kafka_settings, "mute-" + topic, [topic])
    take(consumer, 2)
    with ExactlyOnce(kafka_settings, "w", consumer) as publisher:
        publisher.commit(after(topic, 2, "about it"))

    def mute(*_: object, **__: object) -> None:
        raise KafkaException(KafkaError(KafkaError._TIMED_OUT))

    monkeypatch.setattr(consumer, "committed", mute)
    assert committed(consumer, topic, [0]) == {0: (2, "about it")}


def test_what_was_polled_before_a_rebalance_is_dropped() -> None:
    class Rebalancing:
        def __init__(self) -> None:
            self.rebalances = 0
            self.ends: dict[tuple[str, int], int] = {}

        def poll(self, timeout: float) -> ClientMessage:
            return ClientMessage("bars", 0, 5, value=b"of a partition that goes")

        def consume(self, count: int, timeout: float) -> list[ClientMessage]:
            self.rebalances += 1
            return [ClientMessage("bars", 1, 8, value=b"of a partition that came")]

    got = poll_batch(cast(GroupConsumer, Rebalancing()), 10, 100)
    assert [m.value() for m in got] == [b"of a partition that came"]


@real
def test_the_end_of_a_partition_is_heard_by_fetching_or_by_asking(
    kafka_settings: Settings, make_topic: MakeTopic, consumers: Callable[..., GroupConsumer]
) -> None:
    topic = make_topic()
    fill(kafka_settings, topic, numbered(10))
    consumer = consumers(kafka_settings, "ends-" + topic, [topic])
    take(consumer, 10)
    assert ends(consumer) == {(topic, 0): 10}
    consumer.pause(consumer.assignment())
    fill(kafka_settings, topic, numbered(5))
    assert ends(consumer) == {(topic, 0): 10}
    assert ends(consumer, asked=[(topic, 0)]) == {(topic, 0): 15}


@real
def test_whether_a_message_waits_is_told_by_reading_and_not_by_offsets(
    kafka_settings: Settings, make_topic: MakeTopic
) -> None:
    topic = make_topic()
    with ExactlyOnce(kafka_settings, "writer", None) as publisher:
        publisher.produce(topic, None, b"followed by a marker")
    assert is_waiting(kafka_settings, topic, 0, 0) is True
    assert is_waiting(kafka_settings, topic, 0, 1) is False
    nowhere = kafka_settings.model_copy(update={"bootstrap_servers": "127.0.0.1:9"})
    assert is_waiting(nowhere, topic, 0, 0) is None


@real
def test_the_lag_of_a_group_is_seen_from_outside_once_it_has_committed(
    kafka_settings: Settings, make_topic: MakeTopic, consumers: Callable[..., GroupConsumer]
) -> None:
    topic = make_topic(partitions=2)
    fill(kafka_settings, topic, numbered(10), partition=0)
    fill(kafka_settings, topic, numbered(4), partition=1)
    group = "seen-" + topic
    seen = GroupLag(kafka_settings, topic, [group])
    assert seen() == 0
    consumer = consumers(kafka_settings, group, [topic])
    take(consumer, 14)
    ExactlyOnce(kafka_settings, "w", consumer).commit(after(topic, 3))
    poll_until(lambda: seen() == 7 + 4)  # a commit returns before its markers are written
    seen.close()


@real
def test_the_lag_of_a_group_does_not_wait_for_a_transaction_that_a_dead_member_left_open(
    kafka_settings: Settings, make_topic: MakeTopic, consumers: Callable[..., GroupConsumer]
) -> None:
    topic = make_topic()
    fill(kafka_settings, topic, numbered(10))
    group = "open-" + topic
    consumer = consumers(kafka_settings, group, [topic])
    take(consumer, 10)
    publisher = ExactlyOnce(kafka_settings, "w", consumer)
    publisher.commit(after(topic, 3))
    publisher._begin()
    publisher._producer.send_offsets_to_transaction(
        [TopicPartition(topic, 0, 8)], consumer.consumer_group_metadata(), 10
    )
    started = time.monotonic()
    with contextlib.closing(GroupLag(kafka_settings, topic, [group])) as lag_of_group:
        assert lag_of_group() == 7
    assert time.monotonic() - started < kafka_settings.kafka.transaction_timeout_ms / 2_000
    publisher.abort()


@real
def test_a_reader_ends_at_the_last_message_though_control_records_follow_it(
    kafka_settings: Settings, make_topic: MakeTopic, consumers: Callable[..., GroupConsumer]
) -> None:
    topic = make_topic()
    publisher = ExactlyOnce(kafka_settings, "w", consumers(kafka_settings, "g-" + topic, [topic]))
    for value in numbered(2):
        publisher.produce(topic, None, value)
        publisher.commit({})
    publisher.produce(topic, None, b"never seen")
    publisher._producer.flush(5)
    publisher.abort()
    assert values(kafka_settings, topic) == [b"0", b"1"]
    assert values(kafka_settings, topic, from_offsets={0: 2}) == [b"1"]
    assert values(kafka_settings, topic, from_offsets={0: 3}) == []
    assert b"never seen" in values(kafka_settings, topic, read_committed=False)


@real
def test_a_reader_does_not_wait_for_a_transaction_that_is_open(
    kafka_settings: Settings, make_topic: MakeTopic, consumers: Callable[..., GroupConsumer]
) -> None:
    topic = make_topic()
    publisher = ExactlyOnce(kafka_settings, "w", consumers(kafka_settings, "g-" + topic, [topic]))
    publisher.produce(topic, None, b"done")
    publisher.commit({})
    publisher.produce(topic, None, b"open")
    publisher._producer.flush(5)
    started = time.monotonic()
    assert values(kafka_settings, topic) == [b"done"]
    assert time.monotonic() - started < 8
    publisher.abort()


@real
def test_a_topic_without_messages_is_read_at_once_and_a_missing_one_is_named(
    kafka_settings: Settings, make_topic: MakeTopic
) -> None:
    assert values(kafka_settings, make_topic(partitions=3)) == []
    with pytest.raises(TopicMismatch, match=r"no-such-topic.*topics create"):
        list(read_topic(kafka_settings, "no-such-topic"))


@real
def test_a_tail_catches_up_and_then_follows(
    kafka_settings: Settings, make_topic: MakeTopic
) -> None:
    topic = make_topic(partitions=2)
    fill(kafka_settings, topic, numbered(3), partition=1)
    with Tail(kafka_settings, topic) as tail:
        got: list[Message] = []
        while not tail.caught_up:
            got += tail.poll(timeout_ms=100)
        assert [m.value() for m in got] == numbered(3)
        fill(kafka_settings, topic, [b"later"], partition=0)
        deadline = time.monotonic() + 15
        while not (later := tail.poll(timeout_ms=100)):
            assert time.monotonic() < deadline
        assert [m.value() for m in later] == [b"later"]
        assert tail.caught_up


@real
def test_the_newest_values_are_the_last_of_each_partition(
    kafka_settings: Settings, make_topic: MakeTopic
) -> None:
    topic = make_topic(partitions=3)
    fill(kafka_settings, topic, numbered(5), partition=0)
    fill(kafka_settings, topic, [b"only"], partition=2)
    assert sorted(newest_values(kafka_settings, topic)) == [b"4", b"only"]
    assert sorted(newest_values(kafka_settings, topic, 2)) == [b"3", b"4", b"only"]


# ---- publishing ----


@real
@pytest.mark.parametrize("mode", ["exactly_once", "at_least_once"])
def test_messages_offsets_and_metadata_are_there_after_a_commit(
    kafka_settings: Settings,
    make_topic: MakeTopic,
    consumers: Callable[..., GroupConsumer],
    mode: str,
) -> None:
    source, sink = make_topic(partitions=2), make_topic()
    fill(kafka_settings, source, numbered(4))
    settings, group = with_kafka(kafka_settings, delivery=mode), "copy-" + source
    consumer = make_consumer(settings, group, [source])
    publisher = make_publisher(settings, "copier", consumer)
    assert isinstance(publisher, ExactlyOnce if mode == "exactly_once" else AtLeastOnce)
    for message in take(consumer, 4):
        publisher.produce(sink, message.key(), message.value(), [("n", b"1"), ("none", None)])
    metadata = '{"champion": [["abc", 1514764800000]], "é": "\\u00e9"}'
    publisher.commit(after(source, 4, metadata))
    assert values(settings, sink) == numbered(4)
    assert next(read_topic(settings, sink)).headers() == [("n", b"1"), ("none", None)]
    publisher.close()
    consumer.close()

    successor = consumers(settings, group, [source])
    assert committed(successor, source, [0, 1]) == {0: (4, metadata), 1: (0, "")}
    fill(settings, source, [b"new"])
    assert [m.value() for m in take(successor, 1)] == [b"new"]


@real
def test_an_aborted_transaction_leaves_neither_messages_nor_offsets(
    kafka_settings: Settings, make_topic: MakeTopic, consumers: Callable[..., GroupConsumer]
) -> None:
    source, sink = make_topic(), make_topic()
    fill(kafka_settings, source, numbered(4))
    consumer = consumers(kafka_settings, "abort-" + source, [source])
    publisher = ExactlyOnce(kafka_settings, "w", consumer)
    take(consumer, 4)
    publisher.produce(sink, None, b"before")
    publisher.commit(after(source, 1, "first"))
    for _ in range(600):
        publisher.produce(sink, None, b"given up")
    publisher.abort()
    assert committed(consumer, source, [0]) == {0: (1, "first")}
    publisher.produce(sink, None, b"after")
    publisher.commit(after(source, 2, "second"))
    assert values(kafka_settings, sink) == [b"before", b"after"]
    assert committed(consumer, source, [0]) == {0: (2, "second")}


@real
def test_a_transaction_may_be_given_up_and_closed_while_the_one_before_is_being_marked(
    kafka_settings: Settings, make_topic: MakeTopic
) -> None:
    sink, good = make_topic(partitions=8), []
    for turn in range(20):
        publisher = ExactlyOnce(kafka_settings, "w", None)
        good += [b"%d of turn %d" % (n, turn) for n in range(8)]
        for partition in range(8):
            publisher.produce(sink, None, good[partition - 8], partition=partition)
        publisher.commit({})
        for partition in range(8):
            publisher.produce(sink, None, b"given up", partition=partition)
        time.sleep(0.0005 * turn)
        publisher.close()
        publisher.close()
    found = values(kafka_settings, sink)
    assert (len(found), set(found)) == (len(good), set(good))


@real
def test_offsets_alone_can_be_committed_and_nothing_at_all_too(
    kafka_settings: Settings, make_topic: MakeTopic, consumers: Callable[..., GroupConsumer]
) -> None:
    source = make_topic()
    fill(kafka_settings, source, numbered(2))
    consumer = consumers(kafka_settings, "alone-" + source, [source])
    take(consumer, 2)
    publisher = ExactlyOnce(kafka_settings, "w", consumer)
    publisher.commit({})
    publisher.commit(after(source, 2))
    publisher.abort()
    assert committed(consumer, source, [0]) == {0: (2, "")}


@real
def test_a_zombie_is_fenced_by_its_successor_and_its_messages_are_never_seen(
    kafka_settings: Settings, make_topic: MakeTopic, consumers: Callable[..., GroupConsumer]
) -> None:
    source, sink = make_topic(), make_topic()
    fill(kafka_settings, source, numbered(2))
    group = "zombie-" + source
    zombie_consumer = consumers(kafka_settings, group, [source])
    zombie = ExactlyOnce(kafka_settings, "w", zombie_consumer)
    take(zombie_consumer, 2)
    zombie.produce(sink, None, b"of the zombie")
    zombie._producer.flush(5)

    consumer = consumers(kafka_settings, group, [source])
    successor = ExactlyOnce(kafka_settings, "w", consumer)
    take(consumer, 2)
    successor.produce(sink, None, b"of the successor")
    successor.commit(after(source, 2))

    with pytest.raises(Fenced):
        zombie.commit(after(source, 2))
    zombie.close()
    assert values(kafka_settings, sink) == [b"of the successor"]


@real
def test_a_member_that_was_replaced_cannot_commit_offsets(
    kafka_settings: Settings, make_topic: MakeTopic, consumers: Callable[..., GroupConsumer]
) -> None:
    source, sink = make_topic(), make_topic()
    fill(kafka_settings, source, numbered(2))
    group = "replaced-" + source
    old_consumer = consumers(kafka_settings, group, [source])
    old = ExactlyOnce(kafka_settings, "another worker", old_consumer)
    take(old_consumer, 2)
    old.produce(sink, None, b"too late")
    take(consumers(kafka_settings, group, [source]), 2)
    with pytest.raises(TransactionAborted, match="FENCED_INSTANCE_ID"):
        old.commit(after(source, 2))
    assert values(kafka_settings, sink) == []
    with pytest.raises(Fenced):
        poll_until(lambda: False, old_consumer)


@real
def test_a_transaction_that_outlives_its_timeout_is_aborted_and_the_next_one_works(
    kafka_settings: Settings, make_topic: MakeTopic, consumers: Callable[..., GroupConsumer]
) -> None:
    source, sink = make_topic(), make_topic()
    fill(kafka_settings, source, numbered(2))
    settings = with_kafka(kafka_settings, transaction_timeout_ms=1_000)
    consumer = consumers(settings, "slow-" + source, [source])
    take(consumer, 2)
    publisher = ExactlyOnce(settings, "w", consumer)
    publisher.produce(sink, None, b"too slow")
    publisher._producer.flush(5)
    assert is_open(settings, sink)
    poll_until(lambda: not is_open(settings, sink))  # looked for by the broker now and then
    with pytest.raises(TransactionAborted):
        publisher.commit(after(source, 1))
    publisher.produce(sink, None, b"in time")
    publisher.commit(after(source, 2))
    assert values(settings, sink) == [b"in time"]
    assert committed(consumer, source, [0]) == {0: (2, "")}


@real
def test_at_least_once_says_at_the_next_commit_that_offsets_were_refused(
    kafka_settings: Settings, make_topic: MakeTopic, consumers: Callable[..., GroupConsumer]
) -> None:
    source, sink = make_topic(), make_topic()
    fill(kafka_settings, source, numbered(2))
    group = "refused-" + source
    old = consumers(kafka_settings, group, [source])
    take(old, 2)
    take(consumers(kafka_settings, group, [source]), 2)
    publisher = AtLeastOnce(kafka_settings, old)
    publisher.produce(sink, None, b"delivered")
    publisher.commit(after(source, 2))
    publisher.flush()
    with pytest.raises(Fenced):
        poll_until(lambda: False, old)
    assert old.commit_error is not None
    publisher.produce(sink, None, b"again")
    with pytest.raises(TransactionAborted, match="FENCED"):
        publisher.commit(after(source, 2))
    assert values(kafka_settings, sink)[0] == b"delivered"


@real
def test_at_least_once_waits_for_nothing_and_moves_no_offset_before_all_is_delivered(
    kafka_settings: Settings, make_topic: MakeTopic, consumers: Callable[..., GroupConsumer]
) -> None:
    source, sink = make_topic(), make_topic()
    fill(kafka_settings, source, numbered(2))
    settings = with_kafka(kafka_settings, delivery="at_least_once", linger_ms=20_000)
    consumer = consumers(settings, "patient-" + source, [source])
    take(consumer, 2)
    publisher = AtLeastOnce(settings, consumer)
    publisher._flush_at = math.inf
    publisher.produce(sink, None, b"still on the way")
    publisher.commit(after(source, 1))
    time.sleep(0.2)
    assert (values(settings, sink), committed(consumer, source, [0])) == ([], {0: (0, "")})
    publisher.flush()
    assert values(settings, sink) == [b"still on the way"]
    poll_until(lambda: committed(consumer, source, [0]) == {0: (1, "")}, consumer)


@real
def test_a_full_queue_holds_the_worker_back_and_loses_nothing(
    kafka_settings: Settings, make_topic: MakeTopic
) -> None:
    topic, count = make_topic(), 3_000
    publisher = AtLeastOnce(kafka_settings, None)
    publisher._configs[0]["queue.buffering.max.messages"] = 100
    publisher._discard()
    with publisher:
        for value in numbered(count):
            publisher.produce(topic, None, value)
    assert values(kafka_settings, topic) == numbered(count)


@real
def test_a_block_that_raises_publishes_nothing_more(
    kafka_settings: Settings, make_topic: MakeTopic, consumers: Callable[..., GroupConsumer]
) -> None:
    topic = make_topic()
    consumer = consumers(kafka_settings, "block-" + topic, [topic])
    with (
        contextlib.suppress(ZeroDivisionError),
        make_publisher(kafka_settings, "w", consumer) as publisher,
    ):
        publisher.produce(topic, None, b"half of it")
        raise ZeroDivisionError
    assert values(kafka_settings, topic) == []


@real
def test_a_key_goes_to_the_partition_that_java_clients_choose(
    kafka_settings: Settings, make_topic: MakeTopic
) -> None:
    # Kafka's own test vectors of murmur2 (org.apache.kafka.common.utils.UtilsTest), 31 bits, mod 7.
    vectors = {b"21": -973932308, b"foobar": -790332482, b"a-little-bit-long-string": -985981536}
    topic = make_topic(partitions=7)
    with make_publisher(kafka_settings, "w") as publisher:
        for key in vectors:
            publisher.produce(topic, key, b"")
    chosen = {m.key(): m.partition() for m in read_topic(kafka_settings, topic)}
    assert chosen == {key: (hash_ & 0x7FFFFFFF) % 7 for key, hash_ in vectors.items()}


def test_without_a_broker_every_part_gives_up_at_its_deadline() -> None:
    settings = Settings(
        bootstrap_servers="127.0.0.1:9", kafka=KafkaSettings(broker_timeout_ms=1_500)
    )
    consumer = make_consumer(settings, "g", ["t"])
    with pytest.raises(BrokerUnavailable, match="no broker for"):
        poll_until(lambda: False, consumer)
    with pytest.raises(BrokerUnavailable):
        ExactlyOnce(settings, "w", consumer)
    with pytest.raises(TransactionAborted), make_publisher(settings, "w") as publisher:
        publisher.produce("t", b"k", b"v")
    consumer.close()


@real
def test_metadata_that_the_broker_would_refuse_is_an_error_and_not_an_endless_abort(
    kafka_settings: Settings, make_topic: MakeTopic, consumers: Callable[..., GroupConsumer]
) -> None:
    source = make_topic()
    fill(kafka_settings, source, numbered(1))
    consumer = consumers(kafka_settings, "long-" + source, [source])
    take(consumer, 1)
    publisher = ExactlyOnce(kafka_settings, "w", consumer)
    publisher.commit(after(source, 1, "x" * MAX_METADATA_BYTES))
    with pytest.raises(ValueError, match="longer than 4095 bytes"):
        publisher.commit(after(source, 1, "é" * 2_049))
    assert committed(consumer, source, [0]) == {0: (1, "x" * MAX_METADATA_BYTES)}


@real
def test_an_assignment_that_arrives_while_closing_does_not_hang_the_worker(
    kafka_settings: Settings, make_topic: MakeTopic
) -> None:
    topic = make_topic(partitions=4)
    members = [
        make_consumer(as_replica(kafka_settings, f"closing-{i}"), "closing-" + topic, [topic])
        for i in range(3)
    ]
    poll_until(lambda: all(member.assignment() for member in members), *members)
    for member in members:
        member.close()


def test_a_call_that_never_returns_is_left_behind() -> None:
    aside, never = _Aside(), threading.Event()
    done: list[int] = []
    aside.run(lambda: done.append(1), 10)
    with pytest.raises(ZeroDivisionError):
        aside.run(lambda: 1 / 0, 10)
    with pytest.raises(TimeoutError):
        aside.run(never.wait, 0.01)
    assert done == [1]
    never.set()


@real
def test_a_reader_without_a_group_gives_up_when_the_broker_stays_away() -> None:
    with LocalKafka() as broker:
        settings = Settings(
            bootstrap_servers=broker.bootstrap_servers,
            kafka=KafkaSettings(broker_timeout_ms=1_500),
        )
        admin = AdminClient({"bootstrap.servers": broker.bootstrap_servers})
        admin.create_topics([NewTopic("records", 1)])["records"].result(15)
        with Tail(settings, "records") as tail:
            broker.stop_broker(kill=True)

            def keep_reading() -> None:
                deadline = time.monotonic() + 60
                while time.monotonic() < deadline:
                    tail.poll(timeout_ms=50)

            with pytest.raises(BrokerUnavailable, match="no broker for"):
                keep_reading()


@real
def test_a_broker_that_crashes_and_comes_back_loses_and_doubles_nothing() -> None:
    with LocalKafka() as broker:
        settings = Settings(bootstrap_servers=broker.bootstrap_servers, replica="crash")
        admin = AdminClient({"bootstrap.servers": broker.bootstrap_servers})
        for future in admin.create_topics([NewTopic(n, 1) for n in ("in", "eo", "alo")]).values():
            future.result(15)
        fill(settings, "in", numbered(60))

        def opened(topic: str, mode: str) -> tuple[GroupConsumer, Publisher]:
            as_mode = with_kafka(settings, delivery=mode)
            consumer = make_consumer(as_mode, topic, ["in"])
            return consumer, make_publisher(as_mode, topic, consumer)

        modes = {"eo": "exactly_once", "alo": "at_least_once"}
        copies = {topic: opened(topic, mode) for topic, mode in modes.items()}

        def copy(topic: str, disturb: Callable[[], object] = lambda: None) -> int:
            consumer, publisher = copies[topic]
            try:
                messages = poll_batch(consumer, 10, 100)
                for message in messages:
                    publisher.produce(topic, None, message.value())
                if messages:
                    disturb()
                    try:
                        publisher.commit(after("in", messages[-1].offset() + 1))
                        publisher.flush()
                    except TransactionAborted:
                        seek(consumer, "in", 0, committed(consumer, "in", [0])[0][0])
                return committed(consumer, "in", [0])[0][0]
            except (
                Fenced
            ):  # a join that was repeated over the crash fences itself: exit, start again
                publisher.close()
                consumer.close()
                copies[topic] = opened(topic, modes[topic])
                return 0

        poll_until(lambda: copy("eo") >= 20 and copy("alo") >= 20, seconds=60)
        back = threading.Thread(target=broker.start_broker)

        def crash() -> None:
            if broker._processes and not back.ident:
                broker.stop_broker(kill=True)
                back.start()

        poll_until(lambda: copy("eo", crash) >= 60 and copy("alo") >= 60, seconds=120)
        back.join()
        assert values(settings, "eo") == numbered(60)
        assert set(values(settings, "alo")) == set(numbered(60))
        for consumer, publisher in copies.values():
            publisher.close()
            consumer.close()


# ---- topics ----


@real
def test_topics_are_created_once_co_partitioned_and_with_their_policies(
    fresh_topics: Settings,
) -> None:
    assert create_topics(fresh_topics) == []
    check_topics(fresh_topics)
    admin = AdminClient({"bootstrap.servers": fresh_topics.bootstrap_servers})
    found = admin.list_topics(timeout=15).topics
    assert {t.name: len(found[t.name].partitions) for t in TOPICS} == {
        t.name: fresh_topics.kafka.partitions if t.co_partitioned else 1 for t in TOPICS
    }


@real
def test_topics_follow_the_bars_that_are_there_and_a_wrong_one_is_named(
    fresh_topics: Settings,
) -> None:
    admin = AdminClient({"bootstrap.servers": fresh_topics.bootstrap_servers})
    admin.create_partitions([NewPartitions(BARS, 6)])[BARS].result(15)
    poll_until(lambda: len(admin.list_topics(timeout=15).topics[BARS].partitions) == 6)
    with pytest.raises(TopicMismatch, match=f"{PREDICTIONS} has 4 partitions and {BARS} has 6"):
        create_topics(fresh_topics)
    others = [t.name for t in TOPICS if t.co_partitioned and t.name != BARS]
    for future in admin.delete_topics(others).values():
        future.result(15)
    with pytest.raises(TopicMismatch, match=f"{PREDICTIONS} is missing.*topics create"):
        poll_until(lambda: check_topics(fresh_topics))
    poll_until(lambda: set(others).isdisjoint(admin.list_topics(timeout=15).topics))
    assert create_topics(fresh_topics) == others
    check_topics(fresh_topics)


def good_counts() -> dict[str, int]:
    return {t.name: 4 if t.co_partitioned else 1 for t in TOPICS}


def good_configs() -> dict[str, dict[str, str]]:
    return {
        t.name: {"cleanup.policy": t.cleanup_policy, "max.message.bytes": "1000"} for t in TOPICS
    }


def test_topics_that_fit_have_no_mismatch() -> None:
    assert mismatches(good_counts(), good_configs()) == []
    assert mismatches(good_counts() | {"somebody else's": 9}, good_configs()) == []


@pytest.mark.parametrize("topic", [t.name for t in TOPICS])
def test_each_topic_is_missed(topic: str) -> None:
    counts = good_counts()
    del counts[topic]
    (problem,) = mismatches(counts, good_configs())
    assert problem == f"topic {topic} is missing: run `gpt-trader-stream topics create`"


def test_a_lifecycle_topic_must_be_one_compacted_partition() -> None:
    configs = good_configs()
    configs[LIFECYCLE]["cleanup.policy"] = "delete"
    problems = mismatches(good_counts() | {LIFECYCLE: 3}, configs)
    assert [("policy" in p, "3 partitions" in p) for p in problems] == [
        (True, False),
        (False, True),
    ]


def test_dead_letters_must_take_whatever_bars_can_bring() -> None:
    configs = good_configs()
    configs[BARS]["max.message.bytes"] = "2000"
    (problem,) = mismatches(good_counts(), configs)
    assert DEAD_LETTER in problem
    assert "max.message.bytes" in problem


# ---- dead letters ----


class Sink:
    """A publisher that keeps what it is given."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, bytes | None, bytes | None, Any]] = []

    def produce(
        self, topic: str, key: bytes | None, value: bytes | None, headers: Any = None, p: int = -1
    ) -> None:
        self.sent.append((topic, key, value, headers))


def dead_letters(**limits: Any) -> tuple[DeadLetters, Sink]:
    sink = Sink()
    return DeadLetters(cast(Publisher, sink), DeadLetterSettings(**limits)), sink


def bad(offset: int = 0, value: bytes | None = b"{", partition: int = 0, **more: Any) -> Message:
    return cast(Message, ClientMessage(BARS, partition, offset, value=value, **more))


def test_a_dead_letter_keeps_the_original_and_says_where_it_was_and_why() -> None:
    letters, sink = dead_letters()
    letters.send(
        bad(7, b"\xff{", 3, key=b"SPY", headers=[("trace", b"\x00"), ("x", None)]), "ts: é"
    )
    ((topic, key, value, headers),) = sink.sent
    assert (topic, key, value) == (DEAD_LETTER, b"SPY", b"\xff{")
    assert dict(headers) == {
        "topic": b"market.bars",
        "partition": b"3",
        "offset": b"7",
        "error": b"InvalidMessage",
        "reason": "ts: é".encode(),
        "header.trace": b"\x00",
        "header.x": b"",
    }


@pytest.mark.parametrize("reason", ["lone surrogate \ud800", "x" * 10_000_000, ""])
def test_whatever_the_reason_holds_it_fits_in_a_header(reason: str) -> None:
    letters, sink = dead_letters()
    letters.send(bad(), reason)
    assert len(dict(sink.sent[0][3])["reason"]) <= 1_000


def test_a_dead_letter_that_would_not_fit_is_cut_and_says_so() -> None:
    letters, sink = dead_letters()
    letters.send(bad(0, b"x" * MAX_MESSAGE_BYTES), "fits")
    letters.send(bad(1, b"x" * MAX_MESSAGE_BYTES, key=b"k"), "does not")
    many = [("", b"")] * (MAX_MESSAGE_BYTES // 5)
    letters.send(bad(2, b"", headers=many), "headers only")
    assert [dict(headers).get("truncated") for *_, headers in sink.sent] == [
        None,
        str(MAX_MESSAGE_BYTES).encode(),
        b"0",
    ]


@real
@pytest.mark.parametrize("size", [5_000_000, MAX_MESSAGE_BYTES - 200])
def test_megabytes_of_rubbish_pass_through_the_broker_to_the_dead_letters(
    fresh_topics: Settings, size: int
) -> None:
    rubbish = bytes(range(256)) * (size // 256)
    fill(fresh_topics, BARS, [rubbish])
    (message,) = read_topic(fresh_topics, BARS)
    with make_publisher(fresh_topics, "w") as publisher:
        DeadLetters(publisher, fresh_topics.dead_letter).send(message, "rubbish")
    (letter,) = read_topic(fresh_topics, DEAD_LETTER)
    assert (letter.key(), letter.value()) == (b"key", rubbish)


def test_a_run_of_dead_letters_stops_the_worker_before_the_one_too_many() -> None:
    letters, sink = dead_letters(max_consecutive=3)
    for offset in (0, 1, 2, 4, 5, 6):
        letters.send(bad(offset), "r")
    letters.send(bad(7, partition=1), "another partition")
    with pytest.raises(TooManyDeadLetters, match=r"market.bars\[0\].*offset 7"):
        letters.send(bad(7), "r")
    assert len(sink.sent) == 7


def test_a_share_of_dead_letters_stops_the_worker_once_the_window_is_full() -> None:
    letters, _ = dead_letters(max_ratio=0.5, window=100)
    for batch in range(9):
        for i in range(6):
            letters.send(bad(1_000 * batch + 2 * i), "r")
        letters.passed(4)
    for i in range(6):
        letters.send(bad(90_000 + 2 * i), "r")
    with pytest.raises(TooManyDeadLetters, match=r"60 of the last 100 .* limit 50%"):
        letters.passed(4)


@given(
    batches=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), max_size=60),
    window=st.integers(1, 100),
    ratio=st.floats(0.05, 1),
)
def test_the_share_is_that_of_the_newest_batches_that_fill_the_window(
    batches: list[tuple[int, int]], window: int, ratio: float
) -> None:
    letters, _ = dead_letters(max_ratio=ratio, window=window, max_consecutive=1)
    offset = 0
    for n, (good, wrong) in enumerate(batches):
        for _ in range(wrong):
            letters.send(bad(offset := offset + 2), "r")
        recent = batches[: n + 1]
        while len(recent) > 1 and sum(map(sum, recent[1:])) >= window:
            recent = recent[1:]
        total, total_bad = sum(map(sum, recent)), sum(b for _, b in recent)
        if total >= window and total_bad > ratio * total:
            with pytest.raises(TooManyDeadLetters):
                letters.passed(good)
            return
        letters.passed(good)
