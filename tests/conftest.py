"""The real Kafka of the suite: one for all tests, which keep apart by names of their own."""

import os
import shutil
import subprocess
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import hypothesis
import pytest
import torch
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic

from schemas.topics import TOPICS
from workers.config import InferenceSettings, KafkaSettings, MonitorSettings, Settings
from workers.errors import BrokerUnavailable
from workers.kafka import create_topics
from workers.local_kafka import LocalKafka

torch.set_num_threads(1)  # two threads that wait for each other on a busy machine are 100x slower

# Two slow cores shared with a broker: how long an example takes says nothing.
hypothesis.settings.register_profile(
    "suite", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("suite")

MakeTopic = Callable[..., str]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest file first: nobody waits for it in the end."""
    items.sort(key=lambda item: item.path.name != "test_quality_loop.py")


@pytest.fixture(scope="session")
def kafka() -> Iterator[str]:
    """Bootstrap servers of a real Kafka: a given one, one in Docker, or a child process."""
    if given := os.environ.get("KAFKA_BOOTSTRAP_SERVERS"):
        yield given
        return
    try:
        broker = _in_docker() if _docker_runs() else _as_child()
        with broker as servers:
            yield servers
    except (BrokerUnavailable, ImportError) as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"no Kafka can be had here: {error}")


@pytest.fixture
def kafka_settings(kafka: str, tmp_path: Path) -> Settings:
    """Settings on that Kafka, with groups and a store that no other test uses."""
    name = uuid.uuid4().hex[:8]
    return Settings(
        bootstrap_servers=kafka,
        store=str(tmp_path / "store"),
        replica=name,
        inference=InferenceSettings(group=f"inference-{name}"),
        monitor=MonitorSettings(group=f"monitor-{name}"),
        kafka=KafkaSettings(broker_timeout_ms=30_000),
    )


@pytest.fixture
def make_topic(kafka: str) -> MakeTopic:
    """Creates a topic with a name of its own: `make_topic(partitions=1)`."""
    admin = AdminClient({"bootstrap.servers": kafka})

    def make(partitions: int = 1, **config: str) -> str:
        name = f"test-{uuid.uuid4().hex[:12]}"
        settings = {key.replace("_", "."): value for key, value in config.items()}
        topic = NewTopic(name, num_partitions=partitions, config=settings)
        admin.create_topics([topic])[name].result(15)
        return name

    return make


@pytest.fixture
def fresh_topics(kafka_settings: Settings) -> Settings:
    """All topics of the system, empty; for tests of whole workers."""
    delete_topics(kafka_settings)
    create_topics(kafka_settings)
    return kafka_settings


def delete_topics(settings: Settings) -> None:
    admin = AdminClient({"bootstrap.servers": settings.bootstrap_servers})
    names = {topic.name for topic in TOPICS}
    there = names & admin.list_topics(timeout=15).topics.keys()
    for future in admin.delete_topics(sorted(there)).values() if there else ():
        future.result(15)
    while names & admin.list_topics(timeout=15).topics.keys():
        pass


def _docker_runs() -> bool:
    docker = shutil.which("docker")
    return (
        docker is not None and not subprocess.run([docker, "info"], capture_output=True).returncode
    )


@contextmanager
def _in_docker() -> Iterator[str]:
    from testcontainers.kafka import KafkaContainer

    with KafkaContainer().with_kraft() as container:
        yield container.get_bootstrap_server()


@contextmanager
def _as_child() -> Iterator[str]:
    with LocalKafka() as broker:
        yield broker.bootstrap_servers
