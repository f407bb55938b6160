"""Publishing in both delivery modes; they differ here and nowhere else."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterable
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Any, NoReturn, Protocol, Self

from confluent_kafka import KafkaError, KafkaException, Producer, TopicPartition

from schemas.topics import PARTITIONER
from workers.config import Settings
from workers.errors import BrokerUnavailable, Fenced, TransactionAborted
from workers.kafka.client import (
    DEAD_LETTER_MARGIN_BYTES,
    MAX_MESSAGE_BYTES,
    MAX_METADATA_BYTES,
    PURGED,
    REFUSED,
    SLICE_S,
    Headers,
    Offsets,
    Partition,
    client_config,
    is_fence,
    log_error,
    patiently,
)
from workers.kafka.reading import GroupConsumer

POLL_EVERY = 256
"""Messages between two looks at delivery reports."""
TURNS = 2
"""Transactional producers of a worker; a third gains nothing."""
FLUSH_EVERY_S = 0.1
"""How long, at least once, offsets may be behind what was delivered: what a crash repeats."""
MAX_ABORTS = 20
"""Transactions that may fail in a row: what fails so often does not pass."""


class Publisher(Protocol):
    """Sends messages, and moves the input's offsets with them: the one place where delivery differs."""

    def produce(
        self,
        topic: str,
        key: bytes | None,
        value: bytes | None,
        headers: Headers | None = None,
        partition: int = -1,
    ) -> None:
        """Queue one message; waits while the queue is full. `partition` -1 is chosen by the key."""

    def produce_all(
        self,
        topic: str,
        keys: Iterable[bytes],
        values: Iterable[bytes],
        partitions: Iterable[int],
    ) -> None:
        """As `produce`, of many messages, at a third of the cost."""

    def commit(self, offsets: Offsets) -> None:
        """What was produced goes out, and then the input's offsets move; exactly once, both have when
        it returns, and at least once they have after `flush`.

        Raises TransactionAborted (rewind to the committed offsets, restore, go on), Fenced, or
        BrokerUnavailable.
        """

    def flush(self) -> None:
        """All that was committed is delivered, and its offsets have moved, when it returns; raises as
        `commit`.
        """

    def abort(self) -> None:
        """Forget what was produced since the last commit, as far as the delivery mode can."""

    def close(self) -> None:
        """Abort what is open, flush, let go."""

    def __enter__(self) -> Self: ...
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Commit what was produced (abort, where the block raised), then close."""


def make_publisher(
    settings: Settings, worker: str, consumer: GroupConsumer | None = None
) -> Publisher:
    """The publisher of the configured delivery mode; without input to commit, at-least-once."""
    if consumer is not None and settings.kafka.delivery == "exactly_once":
        return ExactlyOnce(settings, worker, consumer)
    return AtLeastOnce(settings, consumer)


class _Publisher:
    """What both modes share: idempotent producers, and the order of begin, produce and commit."""

    def __init__(self, settings: Settings, *configs: dict[str, Any]) -> None:
        """A producer for each of `configs`; they take turns, commit by commit."""
        self._deadline_s = settings.kafka.broker_timeout_ms / 1_000
        common = client_config(settings) | {
            "enable.idempotence": True,
            "partitioner": PARTITIONER,
            "linger.ms": settings.kafka.linger_ms,
            "compression.type": "lz4",
            "message.max.bytes": MAX_MESSAGE_BYTES + DEAD_LETTER_MARGIN_BYTES,
            "queue.buffering.max.messages": 200_000,
            "queue.buffering.max.kbytes": 131_072,
            "delivery.report.only.error": True,
            "on_delivery": self._on_delivery,
            "error_cb": log_error,
        }
        self._delivery_error: KafkaError | None = None
        self._begun = False
        self._until_poll = POLL_EVERY
        self._turn = 0
        self._configs = [common | config for config in configs]
        self._producers: list[Producer | None] = [self._open(config) for config in self._configs]

    @property
    def _producer(self) -> Producer:
        """The one whose turn it is; another in its place if it was given up."""
        producer = self._producers[self._turn]
        if producer is None:
            producer = self._producers[self._turn] = self._open(self._configs[self._turn])
        return producer

    def produce(
        self,
        topic: str,
        key: bytes | None,
        value: bytes | None,
        headers: Headers | None = None,
        partition: int = -1,
    ) -> None:
        if not self._begun:
            self._begin()
        self._queue(topic, key, value, headers, partition)
        self._until_poll -= 1
        if not self._until_poll:
            self._until_poll = POLL_EVERY
            self._producer.poll(0)

    def produce_all(
        self,
        topic: str,
        keys: Iterable[bytes],
        values: Iterable[bytes],
        partitions: Iterable[int],
    ) -> None:
        if not self._begun:
            self._begin()
        produce = self._producer.produce
        for key, value, partition in zip(keys, values, partitions, strict=True):
            try:
                produce(topic, value, key, partition)
            except (BufferError, KafkaException):
                self._queue(topic, key, value, None, partition)
        self._producer.poll(0)

    def _queue(
        self,
        topic: str,
        key: bytes | None,
        value: bytes | None,
        headers: Headers | None,
        partition: int,
    ) -> None:
        try:
            while True:
                try:
                    self._producer.produce(topic, value, key, partition, headers=headers)
                    break
                except BufferError:
                    self._producer.poll(0.01)
        except KafkaException as error:
            if error.args[0].code() in REFUSED:
                raise
            self._fail(error)

    def commit(self, offsets: Offsets) -> None:
        if not self._begun:
            if not offsets:
                return
            self._begin()
        for place, (_, metadata) in offsets.items():
            if len(metadata.encode()) > MAX_METADATA_BYTES:
                raise ValueError(f"metadata of {place} is longer than {MAX_METADATA_BYTES} bytes")
        places = [TopicPartition(t, p, o, metadata) for (t, p), (o, metadata) in offsets.items()]
        self._finish(places)
        self._begun = False
        self._turn = (self._turn + 1) % len(self._producers)

    def flush(self) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self.commit({})
                self.flush()
        finally:
            self.close()

    def _begin(self) -> None:
        self._begun = True

    def _finish(self, places: list[TopicPartition]) -> None:
        raise NotImplementedError

    def _fail(self, cause: KafkaException) -> NoReturn:
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError

    def _open(self, config: dict[str, Any]) -> Producer:
        return Producer(config)

    def _discard(self) -> None:
        """Give up a producer that can do nothing more; the next message opens another."""
        self._producer.purge(blocking=False)
        self._producers[self._turn] = None

    def _let_go(self) -> None:
        """Close the producers; one that was given up would only repeat its error."""
        for turn, producer in enumerate(self._producers):
            if producer is not None:
                with contextlib.suppress(KafkaException):
                    producer.close()
            self._producers[turn] = None

    def _on_delivery(self, error: KafkaError | None, _: object) -> None:
        # What an abort purges from the queue is no failure.
        if error is not None and error.code() not in PURGED and self._delivery_error is None:
            self._delivery_error = error


class ExactlyOnce(_Publisher):
    """One Kafka transaction from the first message to `commit`, with the consumer's offsets in it.

    The transactional ids belong to the replica, so that its successor ends what it left open. There are
    two, in turn: the broker lets the next transaction of one id wait until the markers of its last
    one are written (p99 of a small transaction 31 ms with one, 21 ms with two).
    """

    def __init__(self, settings: Settings, worker: str, consumer: GroupConsumer | None) -> None:
        self._consumer = consumer
        self._timeout_s = settings.kafka.transaction_timeout_ms / 1_000
        self._began_at = 0.0
        self._aborts = 0
        self._aside = _Aside()
        timeout = {"transaction.timeout.ms": settings.kafka.transaction_timeout_ms}
        ids = [f"{worker}-{settings.replica}-{turn}" for turn in range(TURNS)]
        super().__init__(settings, *({"transactional.id": id_} | timeout for id_ in ids))

    def abort(self) -> None:
        if self._begun:
            self._abort_transaction()

    def close(self) -> None:
        with contextlib.suppress(BrokerUnavailable, Fenced):
            self.abort()
        self._let_go()

    def _begin(self) -> None:
        super()._begin()
        self._began_at = time.monotonic()
        try:
            self._producer.begin_transaction()
        except KafkaException as error:
            self._fail(error)

    def _finish(self, places: list[TopicPartition]) -> None:
        producer, consumer = self._producer, self._consumer
        try:
            if places:
                assert consumer is not None, "offsets belong to a consumer"
                group = consumer.membership or consumer.consumer_group_metadata()
                self._aside.run(
                    lambda: producer.send_offsets_to_transaction(places, group, self._timeout_s),
                    2 * self._timeout_s,
                )
            self._until_done(producer.commit_transaction, self._timeout_s)
        except KafkaException as error:
            self._fail(error)
        except (TimeoutError, BrokerUnavailable) as error:
            # After a broker's restart the client may hang whatever the timeout (librdkafka #5456),
            # or never find the coordinator again. The next producer of our transactional id ends
            # what this one leaves behind, one way or the other; the committed offsets say which.
            self._begun = False
            self._producers[self._turn] = None
            self._aside = _Aside()
            self._give_up(f"not committed within its timeout: {error}", error)
        self._aborts = 0

    def _fail(self, cause: KafkaException) -> NoReturn:
        self._abort_transaction()
        self._give_up(f"{cause.args[0].name()}: {cause.args[0].str()}", cause)

    def _give_up(self, reason: str, cause: Exception) -> NoReturn:
        self._aborts += 1
        if self._aborts > MAX_ABORTS:
            raise BrokerUnavailable(f"{MAX_ABORTS} transactions in a row failed: {reason}")
        raise TransactionAborted(reason) from cause

    def _abort_transaction(self) -> None:
        self._begun = False
        try:
            self._until_done(self._producer.abort_transaction, self._timeout_s)
        except BrokerUnavailable:
            self._discard()  # the next producer aborts it, if the broker has not done so yet
        except KafkaException as error:
            # Also where it had hardly begun, while the markers of the one before were being
            # written: the client ends what the broker has not heard of (librdkafka #4849).
            self._discard()
            # A transaction that outlived its timeout was ended by the broker: the same error, but
            # nobody else has our id.
            expired = time.monotonic() - self._began_at >= self._timeout_s
            if is_fence(error.args[0]) and not expired:
                raise Fenced(f"another producer has our transactional id: {error}") from error

    def _open(self, config: dict[str, Any]) -> Producer:
        producer = super()._open(config)
        try:
            self._until_done(producer.init_transactions, self._deadline_s)
        except KafkaException as error:
            raise BrokerUnavailable(f"no transactions can be begun: {error}") from error
        return producer

    def _until_done(self, call: Callable[[float], object], timeout_s: float) -> None:
        """Call in slices: what timed out goes on in the client, and calling again resumes it."""
        patiently(lambda: call(SLICE_S), timeout_s)


class _Aside:
    """Makes calls in a thread of its own, so that one which never returns can be left behind."""

    def __init__(self) -> None:
        self._calls: SimpleQueue[Callable[[], object]] = SimpleQueue()
        self._errors: SimpleQueue[Exception | None] = SimpleQueue()
        threading.Thread(target=self._work, name="transactions", daemon=True).start()

    def run(self, call: Callable[[], object], timeout_s: float) -> None:
        """Raises what the call raises, or TimeoutError: then this one is of no more use."""
        self._calls.put(call)
        try:
            error = self._errors.get(timeout=timeout_s)
        except Empty:
            raise TimeoutError(f"no return within {timeout_s} s") from None
        if error is not None:
            raise error

    def _work(self) -> None:
        while True:
            try:
                self._calls.get()()
                self._errors.put(None)
            except Exception as error:  # raised again in `run`
                self._errors.put(error)


class AtLeastOnce(_Publisher):
    """Delivered before the offsets move; a crash between the two repeats what was delivered.

    Where there is input, `commit` does not wait for the broker: the offsets move once all before them
    is delivered, which is seen at every commit and awaited every `FLUSH_EVERY_S`. They are committed
    asynchronously and in order; an error of either is raised by the next `commit` or `flush`, and
    `GroupConsumer.close` waits for the last.
    """

    def __init__(self, settings: Settings, consumer: GroupConsumer | None) -> None:
        self._consumer = consumer
        self._due: dict[Partition, TopicPartition] = {}
        self._flush_at = 0.0
        super().__init__(settings, {"message.timeout.ms": settings.kafka.broker_timeout_ms})

    def flush(self) -> None:
        producer = self._producers[0]
        while producer is not None and producer.flush(SLICE_S) and not self._delivery_error:
            pass
        self._raise_what_failed()
        self._flush_at = time.monotonic() + FLUSH_EVERY_S
        if self._due:
            assert self._consumer is not None, "offsets belong to a consumer"
            self._consumer.commit(offsets=list(self._due.values()), asynchronous=True)
            self._due.clear()

    def abort(self) -> None:
        self._due.clear()
        if (producer := self._producers[0]) is not None:
            producer.purge(in_flight=False)
            producer.flush(SLICE_S)
        self._begun = False
        self._delivery_error = None

    def close(self) -> None:
        self.abort()
        self._let_go()

    def _finish(self, places: list[TopicPartition]) -> None:
        self._due |= {(place.topic, place.partition): place for place in places}
        self._producer.poll(0)
        is_due = not len(self._producer) or time.monotonic() >= self._flush_at
        if self._consumer is None or is_due:
            self.flush()
        else:
            self._raise_what_failed()

    def _raise_what_failed(self) -> None:
        if self._delivery_error is not None:
            self._fail(KafkaException(self._delivery_error))
        if self._consumer is not None and self._consumer.commit_error is not None:
            error, self._consumer.commit_error = self._consumer.commit_error, None
            self._fail(KafkaException(error))

    def _fail(self, cause: KafkaException) -> NoReturn:
        self.abort()
        if cause.args[0].fatal():
            self._discard()
        raise TransactionAborted(f"{cause.args[0].name()}: {cause.args[0].str()}") from cause
