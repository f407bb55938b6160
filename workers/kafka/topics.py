"""Creating and checking the topics."""

import time
from collections.abc import Mapping

from confluent_kafka import KafkaError, KafkaException
from confluent_kafka.admin import AdminClient
from confluent_kafka.admin._config import ConfigResource
from confluent_kafka.admin._resource import ResourceType
from confluent_kafka.cimpl import NewTopic

from schemas.topics import BARS, DEAD_LETTER, DEGRADATION, LIFECYCLE, TOPICS, TRAINING, Topic
from workers.config import Settings
from workers.errors import BrokerUnavailable, TopicMismatch
from workers.kafka.client import (
    ADMIN_TIMEOUT_S,
    DEAD_LETTER_MARGIN_BYTES,
    MAX_MESSAGE_BYTES,
    client_config,
    patiently,
)

YEAR_MS = 365 * 24 * 3_600_000


def create_topics(settings: Settings) -> list[str]:
    """Create what is missing, and return its names; existing topics stay as they are.

    Raises TopicMismatch where an existing one does not fit.
    """
    admin = AdminClient(client_config(settings))
    counts = _partition_counts(admin)
    shared = counts.get(BARS, settings.kafka.partitions)
    missing = [
        NewTopic(
            topic.name,
            num_partitions=shared if topic.co_partitioned else 1,
            replication_factor=settings.kafka.replication_factor,
            config=_config_of(topic),
        )
        for topic in TOPICS
        if topic.name not in counts
    ]
    for name, future in (admin.create_topics(missing) if missing else {}).items():
        try:
            future.result(ADMIN_TIMEOUT_S)
        except KafkaException as error:
            if error.args[0].code() != KafkaError.TOPIC_ALREADY_EXISTS:
                raise TopicMismatch(f"{name} was not created: {error.args[0].str()}") from error
    _await_leaders(admin)
    check_topics(settings)
    return [topic.topic for topic in missing]


def check_topics(settings: Settings) -> None:
    """Raise TopicMismatch, with what to do about it, unless every topic is there and fits."""
    admin = AdminClient(client_config(settings))
    counts = _partition_counts(admin)
    if problems := mismatches(counts, _configs(admin, counts)):
        raise TopicMismatch("; ".join(problems))


def mismatches(counts: Mapping[str, int], configs: Mapping[str, Mapping[str, str]]) -> list[str]:
    """What is wrong with existing topics, by their partition counts and configurations."""
    problems = []
    for topic in TOPICS:
        if topic.name not in counts:
            problems.append(f"topic {topic.name} is missing: run `gpt-trader-stream topics create`")
            continue
        count, wanted = counts[topic.name], counts.get(BARS) if topic.co_partitioned else 1
        if topic.co_partitioned and wanted is not None and count != wanted:
            problems.append(
                f"topic {topic.name} has {count} partitions and {BARS} has {wanted}: they must be "
                f"equal, or a symbol's bars and signals part ways. Add partitions to the smaller one "
                f"while no worker runs, or delete {topic.name} and run `gpt-trader-stream topics create`"
            )
        policy = configs.get(topic.name, {}).get("cleanup.policy", topic.cleanup_policy)
        if policy != topic.cleanup_policy:
            problems.append(
                f"topic {topic.name} has cleanup.policy={policy}: set it to {topic.cleanup_policy}"
            )
        if topic.cleanup_policy == "compact" and count != 1:
            problems.append(
                f"topic {topic.name} has {count} partitions: its changes need one order, so delete it "
                "and run `gpt-trader-stream topics create`"
            )
    takes, arrives = (
        int(configs.get(name, {}).get("max.message.bytes", 0)) for name in (DEAD_LETTER, BARS)
    )
    if takes < arrives:
        problems.append(
            f"topic {DEAD_LETTER} takes {takes} bytes a message and {BARS} {arrives}: raise "
            f"max.message.bytes of {DEAD_LETTER}, or a large bad message cannot be set aside"
        )
    return problems


def _config_of(topic: Topic) -> dict[str, str]:
    config: dict[str, str] = {"cleanup.policy": topic.cleanup_policy}
    if topic.name == BARS:
        config["max.message.bytes"] = str(MAX_MESSAGE_BYTES)
    if topic.name in (LIFECYCLE, TRAINING, DEGRADATION):
        # The registry and the trainer's memory are put together from these again.
        kept = "retention.ms" if topic.cleanup_policy == "delete" else "min.compaction.lag.ms"
        config[kept] = str(YEAR_MS)
    if topic.name in (TRAINING, DEGRADATION):
        # The trainer's client reads lz4 only with another library; here a few events a day arrive.
        config["compression.type"] = "uncompressed"
    if topic.name == DEAD_LETTER:
        config["max.message.bytes"] = str(MAX_MESSAGE_BYTES + DEAD_LETTER_MARGIN_BYTES)
    return config


def _partition_counts(admin: AdminClient) -> dict[str, int]:
    metadata = patiently(lambda: admin.list_topics(timeout=5), ADMIN_TIMEOUT_S)
    return {name: len(topic.partitions) for name, topic in metadata.topics.items()}


def _configs(admin: AdminClient, names: Mapping[str, int]) -> dict[str, dict[str, str]]:
    ours = [ConfigResource(ResourceType.TOPIC, t.name) for t in TOPICS if t.name in names]
    if not ours:
        return {}
    futures = admin.describe_configs(ours)
    return {
        resource.name: {
            entry.name: entry.value for entry in future.result(ADMIN_TIMEOUT_S).values()
        }
        for resource, future in futures.items()
    }


def _await_leaders(admin: AdminClient) -> None:
    names = {topic.name for topic in TOPICS}
    deadline = time.monotonic() + ADMIN_TIMEOUT_S
    while time.monotonic() < deadline:
        topics = patiently(lambda: admin.list_topics(timeout=5), ADMIN_TIMEOUT_S).topics
        if names <= topics.keys() and all(
            partition.leader >= 0
            for name in names
            for partition in topics[name].partitions.values()
        ):
            return
        time.sleep(0.05)
    raise BrokerUnavailable("the topics that were created have no leader")
