"""Publishing in both delivery modes; they differ here and nowhere else."""

import contextlib
import threading
import time
from collections.abc import Callable
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
    client_config,
    is_fence,
    log_error,
    patiently,
)
from workers.kafka.reading import GroupConsumer

POLL_EVERY = 256
"""Messages between two looks at delivery reports."""
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

    def commit(self, offsets: Offsets) -> None:
        """Everything produced so far is delivered, and the input's offsets are moved, when it returns.

        Raises TransactionAborted (rewind to the committed offsets, restore, go on), Fenced, or
        BrokerUnavailable.
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
    """What both modes share: an idempotent producer, and the order of begin, produce and commit."""

    def __init__(self, settings: Settings, config: dict[str, Any]) -> None:
        self._deadline_s = settings.kafka.broker_timeout_ms / 1_000
        self._config = (
            client_config(settings)
            | {
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
            | config
        )
        self._delivery_error: KafkaError | None = None
        self._begun = False
        self._until_poll = POLL_EVERY
        self._producer = self._open()
        self._usable = True

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
        self._until_poll -= 1
        if not self._until_poll:
            self._until_poll = POLL_EVERY
            self._producer.poll(0)

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
        finally:
            self.close()

    def _begin(self) -> None:
        if not self._usable:
            self._producer = self._open()
            self._usable = True
        self._delivery_error = None
        self._begun = True

    def _finish(self, places: list[TopicPartition]) -> None:
        raise NotImplementedError

    def _fail(self, cause: KafkaException) -> NoReturn:
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError

    def _open(self) -> Producer:
        return Producer(self._config)

    def _discard(self) -> None:
        """Give up a producer that can do nothing more; the next message opens another."""
        self._producer.purge(blocking=False)
        self._usable = False

    def _let_go(self) -> None:
        """Close the producer; one that was given up would only repeat its error."""
        if self._usable:
            with contextlib.suppress(KafkaException):
                self._producer.close()

    def _on_delivery(self, error: KafkaError | None, _: object) -> None:
        # What an abort purges from the queue is no failure.
        if error is not None and error.code() not in PURGED and self._delivery_error is None:
            self._delivery_error = error


class ExactlyOnce(_Publisher):
    """One Kafka transaction from the first message to `commit`, with the consumer's offsets in it.

    The transactional id belongs to the replica, so that its successor ends what it left open.
    """

    def __init__(self, settings: Settings, worker: str, consumer: GroupConsumer | None) -> None:
        self._consumer = consumer
        self._timeout_s = settings.kafka.transaction_timeout_ms / 1_000
        self._began_at = 0.0
        self._aborts = 0
        super().__init__(
            settings,
            {
                "transactional.id": f"{worker}-{settings.replica}",
                "transaction.timeout.ms": settings.kafka.transaction_timeout_ms,
            },
        )

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
            self._begun = self._usable = False
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

    def _open(self) -> Producer:
        producer = super()._open()
        self._aside = _Aside()
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

    Offsets are committed asynchronously and in order; an error is raised by the next `commit`, and
    `GroupConsumer.close` waits for the last.
    """

    def __init__(self, settings: Settings, consumer: GroupConsumer | None) -> None:
        self._consumer = consumer
        super().__init__(settings, {"message.timeout.ms": settings.kafka.broker_timeout_ms})

    def abort(self) -> None:
        self._producer.purge(in_flight=False)
        self._producer.flush(SLICE_S)
        self._begun = False

    def close(self) -> None:
        self.abort()
        self._let_go()

    def _finish(self, places: list[TopicPartition]) -> None:
        while self._producer.flush(SLICE_S) and self._delivery_error is None:
            pass
        if self._delivery_error is not None:
            self._fail(KafkaException(self._delivery_error))
        if self._consumer is None:
            return
        if self._consumer.commit_error is not None:
            error, self._consumer.commit_error = self._consumer.commit_error, None
            self._fail(KafkaException(error))
        if places:
            self._consumer.commit(offsets=places, asynchronous=True)

    def _fail(self, cause: KafkaException) -> NoReturn:
        self.abort()
        if cause.args[0].fatal():
            self._discard()
        raise TransactionAborted(f"{cause.args[0].name()}: {cause.args[0].str()}") from cause
