"""The whole loop, every worker a process of its own, on a real Kafka and a real PostgreSQL.

A break in the bars, an alarm, a retrain whose trainer is killed, shadow, promotion; a second break the
other way; a bad challenger refused; a bad bundle promoted by force, and its parent back. The database
is gone from before the first alarm until the retrain is over, and the monitor is killed meanwhile.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import pytest
import sqlalchemy as sa

from models.bundle import Bundle
from models.pipeline import Recipe, fit_bundle, shift_level
from models.simulation import Scenario, Simulator
from models.targets import Target
from models.training import TrainingConfig
from schemas.codecs import BarColumns, encode_bars
from schemas.messages import Lifecycle, Outcome, Slot, TrainingRun
from schemas.topics import BARS, LIFECYCLE, OUTCOMES, TRAINING
from tests.workers.test_monitor import CALM
from workers import lifecycle
from workers.bundles import bundle_uri, open_bundle, store_bundle
from workers.config import Settings
from workers.fleet import Fleet
from workers.kafka import Tail, make_publisher, read_topic
from workers.offline import to_columns
from workers.store import Registry, open_engine
from workers.trainer import row_of

pytestmark = [pytest.mark.kafka, pytest.mark.postgres, pytest.mark.timeout(900)]

MINUTE_MS = 60_000
START_TS = 1_500_000_000_000
TARGET = Target(kind="volatility", horizon=5)
WITHIN_S = 240
BAD_PRINT = 0.01
"""Of the price, to each side."""
BARS_AT_ONCE = 20
WARM_BARS = 460
"""Then every symbol has forecasts."""
RECIPE = Recipe(
    network={"hidden": 8, "layers": 1, "window": 8, "heads": 2, "attention_size": 8},
    training=TrainingConfig(epochs=2),
    burn_in=16,
    length=32,
)


def simulated(n: int, seed: int) -> pd.DataFrame:
    ts = START_TS + np.arange(n, dtype=np.int64) * MINUTE_MS
    return Simulator(Scenario(symbols=4, session_bars=n), seed).run(ts).frame()


def make_champion() -> Bundle:
    """Trained on healthy bars; its alarm is set by hand, to be deaf to all but a real break."""
    bundle = fit_bundle(simulated(2_000, seed=0), (TARGET,), recipe=RECIPE, device="cpu")
    calibrated = (CALM.model_copy(update={"mean": 0.2, "slack": 0.8, "threshold": 12.0}),)
    config = bundle.config.model_copy(update={"calibrations": calibrated})
    return replace(bundle, config=config)


class Market:
    """Feeds simulated bars in event-time order, and waits for the workers to judge them."""

    def __init__(self, settings: Settings, fleet: Fleet) -> None:
        self._settings, self._fleet = settings, fleet
        self._frame = simulated(9_000, seed=1)
        self._fed = 0
        self._outcomes = Tail(settings, OUTCOMES)
        self._lifecycle = Tail(settings, LIFECYCLE)
        self._training = Tail(settings, TRAINING)
        self.bars: Literal["whole", "narrow", "wide"] = "whole"
        """Narrow: opens, highs and lows are lost, there is only the close. Wide: by bad prints."""
        self.slots: dict[Slot, Lifecycle] = {}
        self.runs: dict[str, TrainingRun] = {}
        self.feed(WARM_BARS)
        self._judged_ts = self._newest_ts

    def feed(self, n: int = BARS_AT_ONCE) -> None:
        rows = self._frame.iloc[4 * self._fed : 4 * (self._fed + n)].copy()
        if self.bars == "narrow":
            for column in ("open", "high", "low"):
                rows[column] = rows["close"]
        elif self.bars == "wide":
            rows["high"] *= 1 + BAD_PRINT
            rows["low"] *= 1 - BAD_PRINT
        self._fed += n
        columns: BarColumns = to_columns(rows)
        with make_publisher(self._settings, "market") as publisher:
            for symbol, value in zip(columns.symbols, encode_bars(columns), strict=True):
                publisher.produce(BARS, symbol.encode(), value)

    def until(self, what: str, done: Callable[[], bool], *, feeding: bool = True) -> None:
        deadline = time.monotonic() + WITHIN_S
        while not done():
            assert time.monotonic() < deadline, f"not within {WITHIN_S} s: {what}"
            self._fleet.check()
            if feeding and self._newest_ts - self._judged_ts < 60 * MINUTE_MS:
                self.feed()
            self.look()

    def feed_on(self, n: int) -> None:
        until = self._fed + n
        self.until(f"{n} more bars", lambda: self._fed >= until)

    def look(self) -> None:
        for message in self._outcomes.poll(timeout_ms=50):
            outcome = Outcome.model_validate_json(message.value() or b"")
            self._judged_ts = max(self._judged_ts, outcome.ts)
        for message in self._lifecycle.poll():
            record = Lifecycle.model_validate_json(message.value() or b"")
            self.slots[record.slot] = record
        for message in self._training.poll():
            run = TrainingRun.model_validate_json(message.value() or b"")
            self.runs[run.id] = run

    def close(self) -> None:
        for tail in (self._outcomes, self._lifecycle, self._training):
            tail.close()

    @property
    def _newest_ts(self) -> int:
        return START_TS + self._fed * MINUTE_MS

    def champion_is(self, bundle: str) -> bool:
        return "champion" in self.slots and self.slots["champion"].bundle == bundle

    @property
    def challenger(self) -> str | None:
        return self.slots["challenger"].bundle if "challenger" in self.slots else None


@contextmanager
def no_database(postgres_server: str, url: str) -> Iterator[None]:
    """Nobody gets in, and who is in is thrown out."""
    name = sa.make_url(url).database
    engine = open_engine(postgres_server).execution_options(isolation_level="AUTOCOMMIT")

    def say(statement: str) -> None:
        with engine.connect() as connection:
            connection.execute(sa.text(statement))

    say(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
    say(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'")
    try:
        yield
    finally:
        say(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")
        engine.dispose()


def test_the_loop_heals_itself_twice_refuses_the_bad_and_leaves_every_step_in_the_audit(
    fresh_topics: Settings, postgres_url: str, postgres_server: str, tmp_path: Path
) -> None:
    environment = {
        "KAFKA_BOOTSTRAP_SERVERS": fresh_topics.bootstrap_servers,
        "DATABASE_URL": postgres_url,
        "GPT_TRADER_STORE": fresh_topics.store,
        "GPT_TRADER_DEVICE": "cpu",
        "GPT_TRADER_INFERENCE__GROUP": fresh_topics.inference.group,
        "GPT_TRADER_MONITOR__GROUP": fresh_topics.monitor.group,
        "GPT_TRADER_MONITOR__COOL_DOWN_BARS": "50",
        "GPT_TRADER_MONITOR__PROBATION_BARS": "150",
        "GPT_TRADER_MONITOR__MAX_CHALLENGERS": "1",  # else an alarm that goes on brings a rival
        "GPT_TRADER_TRAINER__GROUP": f"trainer-{fresh_topics.replica}",
        "GPT_TRADER_TRAINER__COOL_DOWN_BARS": "10",
        "GPT_TRADER_TRAINER__POLICY": "fine_tune",
        "GPT_TRADER_TRAINER__FINE_TUNE_EPOCHS": "40",
        "GPT_TRADER_TRAINER__HISTORY_BARS": "800",
        "GPT_TRADER_TRAINER__RUNS": str(tmp_path / "runs"),
    }
    monitoring = fresh_topics.monitor.model_copy(
        update={"probation_bars": 150, "max_challengers": 1}
    )
    settings = fresh_topics.model_copy(
        update={"database_url": postgres_url, "monitor": monitoring, "device": "cpu"}
    )
    registry = Registry(postgres_url)
    registry.create()
    first = make_champion()
    store_bundle(settings, first)
    lifecycle.promote(settings, first.version, "the first", "anna", at_once=True)
    with Fleet(environment, tmp_path / "logs") as fleet:
        market = Market(settings, fleet)
        try:
            for worker in ("inference", "monitor"):
                fleet.start(worker, worker)
            market.feed_on(100)

            market.bars = "narrow"
            with no_database(postgres_server, postgres_url):
                market.feed_on(400)  # the alarm comes early on; nobody is there to answer
                fleet.kill("monitor")
                fleet.start("monitor", "monitor")
                fleet.start("trainer", "trainer")
                market.until(
                    "a training in the middle",
                    lambda: any(run.epochs_done >= 3 for run in market.runs.values()),
                    feeding=False,
                )
                fleet.kill("trainer")
                assert market.challenger is None
                fleet.start("trainer", "trainer")
                market.until("a challenger", lambda: market.challenger is not None, feeding=False)
                second = str(market.challenger)
                market.until("its promotion", lambda: market.champion_is(second))
            market.until("an empty slot", lambda: market.challenger is None, feeding=False)

            market.feed_on(160)  # its probation ends
            fleet.kill("trainer")  # it comes back when there is something to learn from
            market.bars = "wide"
            market.feed_on(400)
            fleet.start("trainer", "trainer")
            market.until("another", lambda: market.challenger is not None)
            third = str(market.challenger)
            market.until("its promotion", lambda: market.champion_is(third))
            market.until("an empty slot", lambda: market.challenger is None, feeding=False)

            bad = shift_level(
                open_bundle(settings, third).bundle, simulated(600, seed=2), TARGET, -2.0
            )
            uri = store_bundle(settings, bad)
            record = lifecycle.fill(
                "challenger", bad, uri, effective_ts=0, reason="by hand", actor="anna", parent=third
            )
            lifecycle.publish(settings, [record])
            market.until("the bad challenger", lambda: market.challenger == bad.version)
            market.until("its refusal", lambda: market.challenger is None)
            assert market.champion_is(third)

            lifecycle.promote(settings, bad.version, "by force", "anna")
            market.until("the bad champion", lambda: market.champion_is(bad.version))
            market.until("its rollback", lambda: market.champion_is(third))

            def is_audited() -> bool:
                slots = [r for r in registry.history() if r.slot in ("champion", "challenger")]
                return len(slots) == len(list(read_topic(settings, LIFECYCLE)))

            assert fleet.stop("trainer") == {"trainer": 0}  # nobody has anything more to say
            market.until("the audit of every step", is_audited, feeding=False)
        finally:
            market.close()
        assert set(fleet.stop().values()) == {0}

    told = [
        (row.actor, row.slot, row.to_bundle, row.evidence.get("status"))
        for row in registry.history()
    ]
    for steps in (
        [
            ("anna", "champion", first.version, None),
            ("monitor", "champion", second, None),
            ("monitor", "champion", third, None),
            ("anna", "champion", bad.version, None),
            ("monitor", "champion", third, None),
        ],
        [
            ("trainer", "challenger", second, None),
            ("monitor", "challenger", None, None),
            ("trainer", "challenger", third, None),
            ("monitor", "challenger", None, None),
            ("anna", "challenger", bad.version, None),
            ("monitor", "challenger", None, None),
        ],
    ):
        slot = steps[0][1]
        assert [entry for entry in told if entry[1] == slot][: len(steps)] == steps
    for status, bundle in (("running", None), ("succeeded", second), ("succeeded", third)):
        assert ("monitor", "training", bundle, status) in told
    alarmed = {row.from_bundle for row in registry.history("alarm")}
    assert {first.version, second, bad.version} <= alarmed
    assert registry.verify() == []

    [resumed] = [run for run in registry.runs(status="succeeded") if run.bundle == second]
    assert resumed.attempts == 2
    [run] = [run for run in market.runs.values() if run.bundle == second]
    assert row_of(run) == resumed, "what the topic says is in the registry, outage or not"
    for version in (first.version, second, third, bad.version):
        assert registry.bundle(version) is not None, bundle_uri(settings, version)
    registry.close()
