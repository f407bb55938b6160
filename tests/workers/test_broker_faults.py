"""The fault matrix, second half: brokers that crash and connections that fail.

They get a Kafka of their own. A replica may give up with an error and be started again, as by an
orchestrator; nothing is lost or doubled by that either.
"""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import delete_topics
from tests.workers.faults.proxy import Proxy
from tests.workers.faults.replicas import Replicas
from tests.workers.faults.rig import (
    CHAMPION,
    LIVE,
    assert_as_undisturbed,
    bars,
    drained,
    for_faults,
    with_section,
)
from tests.workers.faults.steps import PAUSE_S, Fault
from tests.workers.streams import WARM_AT, appoint, send
from workers.config import Settings
from workers.kafka import create_topics
from workers.local_kafka import LocalKafka

pytestmark = [pytest.mark.kafka, pytest.mark.timeout(300)]

OPEN = Fault("after produce", 12, "pause")
"""A batch is open for so long that something can be done to it."""
GONE_S = 8.0
"""Longer than session and transaction last."""


@pytest.fixture(scope="module")
def proxy() -> Iterator[Proxy]:
    with Proxy() as proxy:
        yield proxy


@pytest.fixture(scope="module")
def broker(proxy: Proxy) -> Iterator[LocalKafka]:
    with LocalKafka(proxy_port=proxy.port) as broker:
        proxy.target = broker.proxied_port
        yield broker


def begin(settings: Settings, until: int = WARM_AT + LIVE) -> None:
    """Fresh topics with a champion, and bars to work on."""
    delete_topics(settings)
    create_topics(settings)
    appoint(settings, "champion", CHAMPION, 0)
    send(settings, bars(0, until))


@pytest.fixture
def replicas(broker: LocalKafka, proxy: Proxy, tmp_path: Path) -> Iterator[Replicas]:
    """Replicas, the first of which has its batch open for a moment."""
    settings = settings_of(broker, tmp_path)
    begin(settings)
    proxy.mend()
    with Replicas(settings, tmp_path / "logs") as replicas:
        yield replicas


def settings_of(broker: LocalKafka, path: Path) -> Settings:
    settings = Settings(
        bootstrap_servers=broker.bootstrap_servers,
        store=str(path / "store"),
        database_url=f"sqlite:///{path}/registry.db",
    )
    # After a broker's restart the client may hang for twice the transaction's timeout.
    return with_section(for_faults(settings), "kafka", transaction_timeout_ms=3_000)


def through(proxy: Proxy, settings: Settings) -> Settings:
    return settings.model_copy(update={"bootstrap_servers": f"127.0.0.1:{proxy.port}"})


def test_a_broker_that_crashes_under_an_open_batch_and_is_gone_for_a_while(
    replicas: Replicas, broker: LocalKafka
) -> None:
    replicas.start("one", OPEN)
    replicas.wait_for("one", "fault")
    broker.stop_broker(kill=True)
    time.sleep(GONE_S)
    broker.start_broker()
    assert_as_undisturbed(replicas)


def test_a_broker_that_is_restarted_in_order(replicas: Replicas, broker: LocalKafka) -> None:
    replicas.start("one", OPEN)
    replicas.wait_for("one", "fault")
    broker.stop_broker()
    broker.start_broker()
    assert_as_undisturbed(replicas)


def test_a_slow_connection(replicas: Replicas, proxy: Proxy) -> None:
    proxy.delay_s = 0.02
    replicas.start("one", settings=through(proxy, replicas.settings))
    drained(replicas)
    proxy.delay_s = 0.0
    assert_as_undisturbed(replicas)


def test_a_connection_that_is_cut_under_an_open_batch(replicas: Replicas, proxy: Proxy) -> None:
    replicas.start("one", OPEN, settings=through(proxy, replicas.settings))
    replicas.wait_for("one", "fault")
    proxy.cut()
    time.sleep(PAUSE_S)
    proxy.mend()
    assert_as_undisturbed(replicas)


def test_a_connection_that_is_open_and_dead_while_another_replica_takes_over(
    replicas: Replicas, proxy: Proxy
) -> None:
    replicas.start("one", OPEN, settings=through(proxy, replicas.settings))
    replicas.wait_for("one", "fault")
    proxy.hold()
    replicas.start("two")
    drained(replicas)
    proxy.mend()
    assert_as_undisturbed(replicas)


def test_of_three_brokers_one_is_lost_under_an_open_batch_and_two_are_enough(
    tmp_path: Path,
) -> None:
    with LocalKafka(brokers=3) as brokers:
        settings = with_section(settings_of(brokers, tmp_path), "kafka", replication_factor=3)
        begin(settings, WARM_AT + 60)
        with Replicas(settings, tmp_path / "logs") as replicas:
            replicas.start("one", OPEN)
            replicas.wait_for("one", "fault")
            brokers.stop_broker(1, kill=True)
            drained(replicas)
            brokers.start_broker(1)
            send(settings, bars(WARM_AT + 60, WARM_AT + LIVE))
            assert_as_undisturbed(replicas)
