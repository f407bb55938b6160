"""What every client shares: its configuration, and which errors pass and which do not."""

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeVar

from confluent_kafka import KafkaError, KafkaException

from workers.config import Settings
from workers.errors import BrokerUnavailable, Fenced, TopicMismatch
from workers.logs import event

log = logging.getLogger(__name__)

T = TypeVar("T")
Partition = tuple[str, int]
Offsets = Mapping[Partition, tuple[int, str]]
"""(topic, partition) -> (next offset to read, metadata that is committed with it)."""
Headers = list[tuple[str, str | bytes | None]]

SLICE_S = 0.1
"""Longest call into the client: signal handlers run between two calls."""
ADMIN_TIMEOUT_S = 15.0
MAX_MESSAGE_BYTES = 8 * 1024 * 1024
DEAD_LETTER_MARGIN_BYTES = 64 * 1024
"""For the headers that a dead letter has beyond the original."""
MAX_METADATA_BYTES = 4_095
"""Below Kafka's default of `offset.metadata.max.bytes`, which itself is refused."""


class Message(Protocol):
    """A message as it was read: no error, and with its coordinates."""

    def topic(self) -> str: ...
    def partition(self) -> int: ...
    def offset(self) -> int: ...
    def key(self) -> bytes | None: ...
    def value(self) -> bytes | None: ...
    def headers(self) -> list[tuple[str, bytes]] | None: ...
    def timestamp(self) -> tuple[int, int]: ...


def client_config(settings: Settings) -> dict[str, Any]:
    return {
        "bootstrap.servers": settings.bootstrap_servers,
        "client.id": f"gpt-trader-stream-{settings.replica}",
        "logger": logging.getLogger("workers.kafka.client"),
        "retry.backoff.ms": settings.kafka.retry_backoff_ms,
        "reconnect.backoff.ms": 50,
        "reconnect.backoff.max.ms": 1_000,
    }


FENCES = {
    KafkaError._FENCED,
    KafkaError.PRODUCER_FENCED,
    KafkaError.INVALID_PRODUCER_EPOCH,
    KafkaError.FENCED_INSTANCE_ID,
}
PASSING = {
    KafkaError._TIMED_OUT,
    KafkaError._TRANSPORT,
    KafkaError._DESTROY_BROKER,  # the one that was asked has left the cluster
    KafkaError._ALL_BROKERS_DOWN,
    KafkaError._UNKNOWN_PARTITION,  # of a client whose metadata is being fetched anew
    KafkaError._WAIT_COORD,
    KafkaError.COORDINATOR_LOAD_IN_PROGRESS,
    KafkaError.COORDINATOR_NOT_AVAILABLE,
    KafkaError.NOT_COORDINATOR,
    KafkaError.UNSTABLE_OFFSET_COMMIT,
    KafkaError.LEADER_NOT_AVAILABLE,
    KafkaError.NOT_LEADER_FOR_PARTITION,
    KafkaError.REQUEST_TIMED_OUT,
}
REFUSED = {KafkaError.MSG_SIZE_TOO_LARGE, KafkaError._INVALID_ARG, KafkaError._UNKNOWN_TOPIC}
"""The message is wrong, not the producer's state."""
PURGED = {KafkaError._PURGE_QUEUE, KafkaError._PURGE_INFLIGHT}


def is_fence(error: KafkaError) -> bool:
    return error.code() in FENCES


def is_passing(error: KafkaError) -> bool:
    """Worth another try of the same call."""
    if error.fatal() or error.txn_requires_abort():
        return False
    return error.retriable() or error.code() in PASSING


def patiently(call: Callable[[], T], timeout_s: float) -> T:
    """Repeat a call while its errors are passing ones. Raises BrokerUnavailable after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            return call()
        except KafkaException as error:
            if not is_passing(error.args[0]):
                raise
            if time.monotonic() > deadline:
                raise BrokerUnavailable(f"no answer for {timeout_s:.0f} s: {error}") from error
        time.sleep(0.005)


def raise_unless_passing(error: KafkaError) -> None:
    """What a consumer hears between messages: most of it passes, and the client sees to it."""
    reason = f"{error.name()}: {error.str()}"
    if is_fence(error) or error.fatal() or error.code() == KafkaError._FATAL:
        raise Fenced(f"another member has our name in the group: {reason}")
    if error.code() in (KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError.TOPIC_AUTHORIZATION_FAILED):
        raise TopicMismatch(reason)
    log_error(error)


def log_error(error: KafkaError) -> None:
    event(log, "kafka_error", code=error.name(), reason=error.str())
