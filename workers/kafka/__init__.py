"""The only package that talks to Kafka; by what one does: read, publish, set aside, look after topics."""

from workers.kafka.client import MAX_MESSAGE_BYTES, MAX_METADATA_BYTES, Message, Offsets, Partition
from workers.kafka.dead_letters import DeadLetters
from workers.kafka.publishing import AtLeastOnce, ExactlyOnce, Publisher, make_publisher
from workers.kafka.reading import (
    Backlog,
    GroupConsumer,
    GroupLag,
    Tail,
    committed,
    ends,
    group_offsets,
    is_waiting,
    make_consumer,
    newest_values,
    poll_batch,
    read_topic,
    seek,
)
from workers.kafka.topics import check_topics, create_topics, mismatches

__all__ = [
    "MAX_MESSAGE_BYTES",
    "MAX_METADATA_BYTES",
    "AtLeastOnce",
    "Backlog",
    "DeadLetters",
    "ExactlyOnce",
    "GroupConsumer",
    "GroupLag",
    "Message",
    "Offsets",
    "Partition",
    "Publisher",
    "Tail",
    "check_topics",
    "committed",
    "create_topics",
    "ends",
    "group_offsets",
    "is_waiting",
    "make_consumer",
    "make_publisher",
    "mismatches",
    "newest_values",
    "poll_batch",
    "read_topic",
    "seek",
]
