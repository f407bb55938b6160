"""Reading: members of consumer groups, readers without a group, lag."""

import contextlib
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, Self, cast

from confluent_kafka import (
    OFFSET_BEGINNING,
    OFFSET_STORED,
    Consumer,
    KafkaError,
    KafkaException,
    TopicPartition,
)

from workers.config import Settings
from workers.errors import BrokerUnavailable, TopicMismatch
from workers.kafka.client import (
    ADMIN_TIMEOUT_S,
    SLICE_S,
    Message,
    Partition,
    client_config,
    log_error,
    patiently,
    raise_unless_passing,
)

CLOSE_TIMEOUT_S = 5.0
PROBE_S = 2.0
ANSWERED_WITHIN_S = 5.0


class WatchedConsumer(Consumer):
    """Knows what no message can say: fenced, or for how long no broker has answered."""

    def __init__(self, config: dict[str, Any], down_limit_s: float) -> None:
        super().__init__(config | {"error_cb": self._on_error})
        self._config = config
        self._fatal: KafkaError | None = None
        self._down_since: float | None = None
        self.down_limit_s = down_limit_s

    def check(self) -> None:
        """Raise Fenced, or BrokerUnavailable after the limit."""
        if self._fatal is not None:
            raise_unless_passing(self._fatal)
        if (since := self._down_since) is None:
            return
        try:
            self.list_topics(timeout=SLICE_S)
            self._down_since = None
        except KafkaException as error:
            down_s = time.monotonic() - since
            if down_s > self.down_limit_s:
                raise BrokerUnavailable(f"no broker for {down_s:.0f} s: {error}") from error

    def stranger(self) -> Consumer:
        """A client of its own with the same configuration, that is no member of the group."""
        left_out = ("group.instance.id", "on_commit")
        return Consumer({name: v for name, v in self._config.items() if name not in left_out})

    def _on_error(self, error: KafkaError) -> None:
        if error.fatal() or error.code() == KafkaError._FATAL:
            self._fatal = error
        if error.code() == KafkaError._ALL_BROKERS_DOWN and self._down_since is None:
            self._down_since = time.monotonic()
        log_error(error)


class GroupConsumer(WatchedConsumer):
    """A member of a consumer group; `make_consumer` makes it."""

    def __init__(self, config: dict[str, Any], down_limit_s: float) -> None:
        super().__init__(config | {"on_commit": self._on_commit}, down_limit_s)
        self.rebalances = 0
        self.closing = False
        self.ends: dict[Partition, int] = {}
        """Where the end of a partition was last met; the position is at it or past it."""
        self.membership: object | None = None
        """Of the newest assignment: what is committed under it after the next one is refused."""
        self.commit_error: KafkaError | None = None

    def close(self) -> None:
        """Hand the partitions back, then leave; no assignment is taken on any more.

        The client's own close hangs for ever when an assignment has just arrived.
        """
        self.closing = True
        deadline = time.monotonic() + CLOSE_TIMEOUT_S
        with contextlib.suppress(KafkaException):
            self.unsubscribe()
            while self.assignment() and time.monotonic() < deadline:
                self.poll(SLICE_S)
            self.poll(0)
        super().close()

    def _on_commit(self, error: KafkaError | None, _: list[TopicPartition]) -> None:
        if error is not None and error.code() != KafkaError._NO_OFFSET:
            self.commit_error = error


Starts = Mapping[int, int] | Mapping[Partition, int]


def make_consumer(
    settings: Settings,
    group: str,
    topics: Sequence[str],
    *,
    on_assign: Callable[[list[int]], Starts | None] | None = None,
    on_revoke: Callable[[list[int], bool], None] | None = None,
    watch_ends: bool = False,
) -> GroupConsumer:
    """A read_committed group member that commits nothing by itself.

    Topics of one group are co-partitioned, so the callbacks get partition numbers; they run inside
    `poll_batch`. `on_assign` may return where to start: by partition, or by (topic, partition) where
    there are several topics; what it leaves out starts at the committed offset, or at the beginning.
    `on_revoke(partitions, lost)` must be quick; where `lost`, the partitions are somebody else's already
    and nothing may be committed. With `watch_ends` the consumer keeps its `ends`.

    Static membership under the replica's name: a restarted replica gets its partitions back at
    once, and a second one of the same name fences the first.
    """
    consumer = GroupConsumer(
        client_config(settings)
        | {
            "group.id": group,
            "group.instance.id": f"{group}-{settings.replica}",
            "session.timeout.ms": settings.kafka.session_timeout_ms,
            "heartbeat.interval.ms": min(3_000, settings.kafka.session_timeout_ms // 3),
            "partition.assignment.strategy": "range",
            "enable.auto.commit": False,
            "enable.auto.offset.store": False,
            "auto.offset.reset": "earliest",
            "isolation.level": "read_committed",
            "enable.partition.eof": watch_ends,
            "topic.metadata.refresh.interval.ms": 10_000,  # until then nobody reads an added partition
        }
        | _FETCH,
        settings.kafka.broker_timeout_ms / 1_000,
    )

    def assigned(_: Consumer, partitions: list[TopicPartition]) -> None:
        consumer.rebalances += 1
        consumer.ends.clear()
        if consumer.closing:
            consumer.unassign()
            return
        starts: Mapping[Any, int] = (on_assign(_numbers(partitions)) if on_assign else None) or {}
        for p in partitions:
            p.offset = starts.get((p.topic, p.partition), starts.get(p.partition, OFFSET_STORED))
        consumer.assign(partitions)
        consumer.membership = consumer.consumer_group_metadata()

    def revoked(_: Consumer, partitions: list[TopicPartition], lost: bool = False) -> None:
        consumer.rebalances += 1
        if on_revoke:
            on_revoke(_numbers(partitions), lost)

    consumer.subscribe(
        list(topics),
        on_assign=assigned,
        on_revoke=revoked,
        on_lost=lambda c, partitions: revoked(c, partitions, lost=True),
    )
    return consumer


_FETCH = {
    "fetch.queue.backoff.ms": 10,  # the default of 1 s stalls a partition whose queue is full
    "fetch.wait.max.ms": 100,
    "queued.min.messages": 20_000,
    "queued.max.messages.kbytes": 32_768,
    "max.partition.fetch.bytes": 262_144,  # small, so that a backlog arrives from all partitions
}


def _numbers(partitions: Sequence[TopicPartition]) -> list[int]:
    return sorted({p.partition for p in partitions})


def poll_batch(consumer: GroupConsumer, max_messages: int, timeout_ms: int) -> list[Message]:
    """What has arrived, at most `max_messages`; waits up to `timeout_ms` for the first.

    Runs the rebalance callbacks. Raises Fenced, TopicMismatch, BrokerUnavailable.
    """
    first = consumer.poll(timeout_ms / 1_000)
    if first is None:
        consumer.check()
        return []
    rebalances = consumer.rebalances
    messages = [first]
    if max_messages > 1:
        rest = consumer.consume(max_messages - 1, 0)
        if consumer.rebalances != rebalances:
            messages = []  # `first` may be of a partition that has gone, or that starts anew
        messages += rest
    return _without_errors(messages, consumer.ends)


class Backlog:
    """Messages that have been read and wait, each partition's in their order.

    The client hands out a long backlog in chunks of one partition after the other, and so few keys
    many times over; a batch does best with each key once, and its answers best in few partitions.
    """

    def __init__(self) -> None:
        self._waiting: dict[int, list[Message]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def add(self, messages: Iterable[Message]) -> None:
        for message in messages:
            self._waiting.setdefault(message.partition(), []).append(message)

    def take(self, most: int) -> list[Message]:
        """At most so many: of one partition after the other while no key comes twice, else of all alike."""
        overflows = len(self) > most
        waiting, self._waiting = self._waiting, {}
        longest = max(waiting.values(), key=len, default=[])[:most]
        alike = overflows and len({message.key() for message in longest}) < len(longest)
        if alike:  # what one leaves of its share goes to those that have more
            waiting = dict(sorted(waiting.items(), key=lambda held: len(held[1])))
        taken: list[Message] = []
        rests: dict[int, list[Message]] = {}
        for left, (partition, held) in zip(
            range(len(waiting), 0, -1), waiting.items(), strict=True
        ):
            room = most - len(taken)
            share = -(-room // left) if alike else room
            taken += held[:share]
            (rests if share else self._waiting)[partition] = held[share:]
        self._waiting |= rests  # whose turn it was comes last the next time
        return taken

    def give_back(self, messages: Iterable[Message]) -> None:
        """The last of what was taken last: they come first again."""
        since, self._waiting = self._waiting, {}
        self.add(messages)
        for partition, waiting in since.items():
            self._waiting.setdefault(partition, []).extend(waiting)

    def clear(self) -> None:
        self._waiting.clear()


def _without_errors(
    messages: Sequence[Any], ends: dict[Partition, int] | None = None
) -> list[Message]:
    good = []
    for message in messages:
        if (error := message.error()) is None:
            good.append(cast(Message, message))
        elif error.code() != KafkaError._PARTITION_EOF:
            raise_unless_passing(error)
        elif ends is not None:
            ends[message.topic(), message.partition()] = message.offset()
    return good


def committed(
    consumer: Consumer, topic: str, partitions: Sequence[int]
) -> dict[int, tuple[int, str]]:
    """The group's next offset and its metadata, by partition; (0, "") where nothing is committed.

    Blocks while a transaction that holds the answer is open. Raises BrokerUnavailable, for a worker's
    own consumer when it would give up anyway.
    """
    patience_s = consumer.down_limit_s if isinstance(consumer, WatchedConsumer) else ADMIN_TIMEOUT_S
    wanted = [TopicPartition(topic, partition) for partition in partitions]
    asked = consumer

    def ask() -> list[TopicPartition]:
        nonlocal asked
        try:
            found = asked.committed(wanted, timeout=ANSWERED_WITHIN_S)
        except KafkaException:
            # A client that has lost its coordinator may never find it again (librdkafka #5511).
            if isinstance(consumer, WatchedConsumer) and asked is consumer:
                asked = consumer.stranger()
            raise
        for place in found:
            if place.error is not None:
                raise KafkaException(place.error)
        return found

    try:
        found = patiently(ask, patience_s)
    finally:
        if asked is not consumer:
            asked.close()
    return {p.partition: (max(p.offset, 0), p.metadata or "") for p in found}


def seek(consumer: GroupConsumer, topic: str, partition: int, offset: int) -> None:
    """Read an assigned partition from `offset` on."""
    consumer.ends.pop((topic, partition), None)
    place = TopicPartition(topic, partition, offset)
    patiently(lambda: consumer.seek(place), ADMIN_TIMEOUT_S)


def ends(consumer: Consumer, asked: Collection[Partition] = ()) -> dict[Partition, int]:
    """The end of each assigned partition, as the client last heard it; the unknown are left out.

    A client hears nothing of a partition that it does not fetch: about those in `asked` the broker
    is asked, within `PROBE_S` each.
    """
    found = {}
    for place in consumer.assignment():
        cached = (place.topic, place.partition) not in asked
        with contextlib.suppress(KafkaException):
            marks = consumer.get_watermark_offsets(place, timeout=PROBE_S, cached=cached)
            if marks is not None and marks[1] >= 0:
                found[place.topic, place.partition] = marks[1]
    return found


def is_waiting(settings: Settings, topic: str, partition: int, position: int) -> bool | None:
    """Whether a reader of its own finds a committed message at `position` or after it.

    Blocks for up to `PROBE_S`; None where no answer comes in that time.
    """
    probe = Consumer(
        client_config(settings)
        | {
            "group.id": f"probe-{uuid.uuid4()}",
            "enable.auto.commit": False,
            "enable.partition.eof": True,
            "isolation.level": "read_committed",
        }
    )
    try:
        probe.assign([TopicPartition(topic, partition, position)])
        found = probe.poll(PROBE_S)
        if found is None or (error := found.error()) is None:
            return None if found is None else True
        return False if error.code() == KafkaError._PARTITION_EOF else None
    finally:
        probe.close()


class Tail:
    """Reads all partitions of a topic from the beginning, or from `from_offsets`, without a group."""

    def __init__(
        self,
        settings: Settings,
        topic: str,
        *,
        from_offsets: Mapping[int, int] | None = None,
        read_committed: bool = True,
    ) -> None:
        self._consumer = WatchedConsumer(
            client_config(settings)
            | {
                "group.id": f"reader-{uuid.uuid4()}",
                "enable.auto.commit": False,
                "auto.offset.reset": "earliest",
                "enable.partition.eof": True,
                "isolation.level": "read_committed" if read_committed else "read_uncommitted",
            }
            | _FETCH,
            settings.kafka.broker_timeout_ms / 1_000,
        )
        starts = from_offsets or {}
        places = [
            TopicPartition(topic, p, starts.get(p, OFFSET_BEGINNING))
            for p in _partitions(self._consumer, topic)
        ]
        self.ends = {p.partition: _end(self._consumer, topic, p.partition) for p in places}
        """The end of each partition when reading began; 0 where it was empty."""
        self._behind = {p.partition for p in places if self.ends[p.partition] > max(p.offset, 0)}
        self._consumer.assign(places)

    @property
    def caught_up(self) -> bool:
        """Everything that was there at the start has been read."""
        return not self._behind

    def poll(self, max_messages: int = 1_000, timeout_ms: int = 0) -> list[Message]:
        """What has arrived; waits up to `timeout_ms` for the first.

        Raises BrokerUnavailable when no broker has answered for too long.
        """
        first = self._consumer.poll(timeout_ms / 1_000)
        if first is None:
            self._consumer.check()
            return []
        got = [first, *self._consumer.consume(max_messages - 1, 0)]
        for message in got:
            self._note(message)
        return _without_errors(got)

    def close(self) -> None:
        self._consumer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _note(self, message: Any) -> None:
        # The last offsets may be control records or aborted, which nobody ever sees: the client's
        # end-of-partition event counts too.
        partition, error = message.partition(), message.error()
        if partition in self._behind and (
            message.offset() + 1 >= self.ends[partition]
            if error is None
            else error.code() == KafkaError._PARTITION_EOF
        ):
            self._behind.discard(partition)


def _partitions(consumer: Consumer, topic: str) -> list[int]:
    metadata = patiently(lambda: consumer.list_topics(topic, timeout=5), ADMIN_TIMEOUT_S)
    found = metadata.topics[topic]
    if found.error is not None:
        raise TopicMismatch(f"{topic}: {found.error.str()}; run `gpt-trader-stream topics create`")
    return sorted(found.partitions)


def _end(consumer: Consumer, topic: str, partition: int) -> int:
    """The offset after the last message that a reader may see; 0 where there is nothing to read."""
    place = TopicPartition(topic, partition)
    low, high = patiently(lambda: consumer.get_watermark_offsets(place, timeout=5), ADMIN_TIMEOUT_S)
    return 0 if low == high else int(high)


def read_topic(
    settings: Settings,
    topic: str,
    *,
    from_offsets: Mapping[int, int] | None = None,
    read_committed: bool = True,
) -> Iterator[Message]:
    """Every message up to the end as it was at the call; partitions interleave, each in order.

    The end is that for a reader of committed messages: what a transaction brought counts some
    milliseconds after its commit has returned, when the broker has written its markers.
    """
    with Tail(settings, topic, from_offsets=from_offsets, read_committed=read_committed) as tail:
        heard = time.monotonic()
        while not tail.caught_up:
            messages = tail.poll(10_000, timeout_ms=100)
            yield from (m for m in messages if m.offset() < tail.ends[m.partition()])
            if messages:
                heard = time.monotonic()
            elif time.monotonic() - heard > settings.kafka.broker_timeout_ms / 1_000:
                raise BrokerUnavailable(f"{topic}: nothing arrives, and its end is not reached")


def newest_values(settings: Settings, topic: str, per_partition: int = 1) -> list[bytes]:
    """The last values of each partition, older ones first; for resuming a producer."""
    with Tail(settings, topic) as tail:
        starts = {p: max(end - per_partition, 0) for p, end in tail.ends.items()}
    values = [m.value() for m in read_topic(settings, topic, from_offsets=starts)]
    return [value for value in values if value is not None]


def group_offsets(settings: Settings, group: str, topic: str) -> dict[int, tuple[int, str]]:
    """What a group has committed, by partition, seen from outside it; as `committed`."""
    member = Consumer(client_config(settings) | {"group.id": group, "enable.auto.commit": False})
    try:
        metadata = patiently(lambda: member.list_topics(topic, timeout=5), ADMIN_TIMEOUT_S)
        return committed(member, topic, sorted(metadata.topics[topic].partitions))
    finally:
        member.close()


class GroupLag:
    """How far consumer groups are behind the end of a topic, seen from outside them."""

    def __init__(self, settings: Settings, topic: str, groups: Sequence[str]) -> None:
        self._topic = topic
        self._members = [
            Consumer(
                client_config(settings)
                | {
                    "group.id": group,
                    "enable.auto.commit": False,
                    # Otherwise the answer waits for the transaction that a killed member left open.
                    "isolation.level": "read_uncommitted",
                }
            )
            for group in groups
        ]

    def __call__(self) -> int:
        """Messages that the slowest group has yet to commit; a group without commits counts as 0."""
        return max((self._behind(member) for member in self._members), default=0)

    def _behind(self, member: Consumer) -> int:
        partitions = _partitions(member, self._topic)
        offsets = committed(member, self._topic, partitions)
        if not any(offset for offset, _ in offsets.values()):
            return 0
        ends = {p: _end(member, self._topic, p) for p in partitions}
        return sum(max(ends[p] - offset, 0) for p, (offset, _) in offsets.items())

    def close(self) -> None:
        for member in self._members:
            member.close()
