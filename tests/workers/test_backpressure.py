"""A broker that answers nothing for a while holds a replica back, fills no memory, and costs no bar."""

import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from models.targets import Target
from schemas.topics import PREDICTIONS
from tests.workers.builders import make_bundle
from workers.bench.fixtures import Market, WarmState, silent_minutes
from workers.bench.stage import Patience, Replica, appoint, lay_snapshots, send
from workers.config import Settings
from workers.kafka import create_topics, make_publisher, read_topic
from workers.local_kafka import LocalKafka

SYMBOLS, WARM_UP_MINUTES, MINUTES = 200, 20, 120
FROZEN_S = 4.0
UNFENCED = {"broker.session.timeout.ms": 30_000}
"""Else the controller takes the only broker there is out of the cluster, which is another test's matter."""
MAY_GROW_MB = 96
"""The client's queues: 32 MB of bars that were fetched, one batch of signals, and room to breathe."""


@pytest.mark.kafka
def test_a_frozen_broker_bounds_memory_and_the_replica_goes_on_after_it(tmp_path: Path) -> None:
    bundle = make_bundle(targets=(Target(kind="volatility", horizon=5),))
    with LocalKafka(properties=UNFENCED) as kafka:
        settings = Settings(
            bootstrap_servers=kafka.bootstrap_servers, store=str(tmp_path / "store"), replica="one"
        )
        create_topics(settings)
        market = Market(SYMBOLS, settings.kafka.partitions, silent_minutes(bundle))
        lay_snapshots(settings, WarmState.of(market, bundle))
        appoint(settings, "champion", bundle)
        total = SYMBOLS * MINUTES
        with (
            Replica(settings) as replica,
            make_publisher(settings, "test") as publisher,
            ExitStack() as silence,
        ):
            for minute in range(WARM_UP_MINUTES):
                send(publisher, market, minute)
            publisher.commit({})
            wait_for(replica, SYMBOLS * WARM_UP_MINUTES)
            before_mb = most_mb = resident_mb(replica)
            with replica.frozen():  # so that all bars wait when the broker falls silent
                for minute in range(WARM_UP_MINUTES, MINUTES):
                    send(publisher, market, minute)
                publisher.commit({})
                silence.enter_context(kafka.frozen())
            until = time.monotonic() + FROZEN_S
            while time.monotonic() < until:
                most_mb = max(most_mb, resident_mb(replica))
                time.sleep(0.1)
            assert replica.predictions() < total
            silence.close()
            wait_for(replica, total)
            time.sleep(0.5)  # the last transaction
            after_mb = resident_mb(replica)
        assert max(most_mb, after_mb) < before_mb + MAY_GROW_MB
        keys = {(m.key(), m.value()) for m in read_topic(settings, PREDICTIONS)}
        assert len(keys) == total


def wait_for(replica: Replica, predictions: float) -> None:
    patience = Patience(replica, f"{predictions:.0f} predictions")
    while replica.predictions() < predictions and patience.lasts():
        time.sleep(0.02)


def resident_mb(replica: Replica) -> float:
    return replica.metrics()["process_resident_memory_bytes"] / 2**20
