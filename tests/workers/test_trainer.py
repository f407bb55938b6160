"""The trainer answers an event once, by its rules, and never dies of a training that fails."""

import asyncio
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from models.bundle import Bundle
from models.dataset import OHLCV
from models.pipeline import fine_tune
from models.runtimes import with_golden
from models.targets import Target
from schemas.codecs import BarColumns, encode, encode_bars
from schemas.messages import Degradation, Lifecycle, Policy, Slot, TrainingRun, Trigger
from schemas.topics import BARS, DEGRADATION
from tests.models.test_ensemble import config_of, spoilt
from tests.models.test_ensemble import fit as fit_ensemble
from tests.models.test_ensemble import make_bars as simulated
from tests.workers.builders import MINUTE_MS, make_bars, make_bundle
from workers import lifecycle
from workers.bundles import open_bundle, store_bundle
from workers.config import Settings, TrainerSettings
from workers.kafka import make_publisher
from workers.retraining import Job, Progress, Result, _choose, asked_for, recent_bars, retrain
from workers.service import Service
from workers.store import Registry
from workers.trainer import Runner, Tell, Trainer, _serve, reason_against, request

TARGET = Target(kind="volatility", horizon=5)
PATIENCE_S = 400
"""The child imports torch and compiles its kernels, on a machine that may be busy."""

pytestmark = pytest.mark.timeout(600)


def make_degradation(
    bundle: str = "v1", ts: int = 10_000 * MINUTE_MS, **changes: Any
) -> Degradation:
    fields: dict[str, Any] = {
        "id": f"d{ts}",
        "bundle": bundle,
        "target": TARGET.name,
        "detector": "cusum",
        "statistic": 9.0,
        "threshold": 8.0,
        "arl0": 1_000.0,
        "since_ts": ts - MINUTE_MS,
        "ts": ts,
        "symbols": ["A"],
        "excess_loss": 1.0,
        "issued_at": 0,
    }
    return Degradation.model_validate({**fields, **changes})


def make_record(slot: Slot, bundle: str | None) -> Lifecycle:
    return Lifecycle(
        slot=slot,
        bundle=bundle,
        uri=bundle and "somewhere",
        sha256=bundle and "0",
        effective_ts=0,
        reason="",
        actor="",
        issued_at=0,
    )


def make_run(parent: str = "v1", **changes: Any) -> TrainingRun:
    ts = 10_000 * MINUTE_MS
    fields: dict[str, Any] = {
        "id": "r1",
        "trigger": "alarm",
        "actor": "monitor",
        "reason": "alarm",
        "ts": ts,
        "since_ts": ts - MINUTE_MS,
        "parent": parent,
        "symbols": ["A"],
        "requested_at": 0,
    }
    return TrainingRun.model_validate({**fields, **changes})


NOW_MS = 1_700_000_000_000


def past(minute: int, **changes: Any) -> TrainingRun:
    ts = minute * MINUTE_MS
    fields: dict[str, Any] = {"status": "succeeded", "since_ts": ts}
    fields |= {"started_at": NOW_MS - 1_000, "seconds": 50.0}
    return make_run(id=f"at{minute}", ts=ts, **(fields | changes))


@pytest.mark.parametrize(
    ("asked", "is_full", "others", "reason"),
    [
        ({}, False, [], None),
        ({}, True, [], "still being compared"),
        ({"trigger": "command"}, True, [], "still being compared"),
        ({"attempts": 1}, True, [], None),
        ({}, False, [past(9_700)], "cool-down"),
        ({"trigger": "command"}, False, [past(9_700)], None),
        ({"new_bars": 89}, False, [], "too few to learn from"),
        ({"new_bars": 90}, False, [], None),
        ({}, False, [past(9_700, since_ts=9_999 * MINUTE_MS)], None),
        ({}, False, [past(9_700, since_ts=9_999 * MINUTE_MS, parent="v0")], "cool-down"),
        ({"attempts": 1}, False, [past(9_700)], None),
        ({"attempts": 3}, False, [], "died in 3 attempts"),
        ({}, False, [past(9_700, status="skipped")], None),
        ({}, False, [past(9_600)], None),
        ({}, False, [past(i) for i in range(3)], "3 retrains in a day"),
        ({}, False, [past(i, started_at=1) for i in range(3)], None),
        ({"trigger": "schedule"}, False, [past(1, seconds=200.0)], "200 s of training in a day"),
    ],
)
def test_a_run_is_begun_unless_a_rule_speaks_against_it(
    asked: dict[str, Any],
    is_full: bool,
    others: list[TrainingRun],
    reason: str | None,
) -> None:
    found = reason_against(
        make_run(**asked),
        TrainerSettings(cool_down_bars=390, max_retrains_per_day=3, max_seconds_per_day=200),
        interval_ms=MINUTE_MS,
        is_full=is_full,
        others={run.id: run for run in others},
        now_ms=NOW_MS,
    )
    assert found == reason if reason is None else reason in (found or "")


@pytest.fixture
def served(fresh_topics: Settings) -> Settings:
    """A champion of which 1,400 bars of A and B are on the log."""
    trainer = TrainerSettings(
        group=f"trainer-{fresh_topics.replica}",
        history_bars=1_300,
        policy="fine_tune",
        runs=f"{fresh_topics.store}-runs",
    )
    url = f"sqlite:///{fresh_topics.store}.db"
    settings = fresh_topics.model_copy(
        update={"trainer": trainer, "database_url": url, "device": "cpu"}
    )
    bars = make_bars(["A", "B"], 1_400)
    with make_publisher(settings, "test") as publisher:
        for symbol, value in zip(bars.symbols, encode_bars(bars), strict=True):
            publisher.produce(BARS, symbol.encode(), value)
    return settings


def put_champion(settings: Settings) -> Bundle:
    bundle = make_bundle(targets=(TARGET,))
    store_bundle(settings, bundle)
    lifecycle.promote(settings, bundle.version, "first", "test", at_once=True)
    return bundle


@pytest.mark.kafka
def test_recent_bars_are_the_last_ones_of_the_wanted_symbols(served: Settings) -> None:
    frame = recent_bars(served, ["A"], 100)
    assert frame["symbol"].unique().tolist() == ["A"]
    assert frame["ts"].tolist() == (np.arange(1_300, 1_400) * MINUTE_MS).tolist()


@pytest.mark.kafka
def test_bars_of_a_file_go_before_those_of_the_log(served: Settings, tmp_path: Path) -> None:
    older = make_bars(["A", "Z"], 60, start_ts=-50 * MINUTE_MS)
    frame = pd.DataFrame(older.ohlcv, columns=["open", "high", "low", "close", "volume"])
    frame.insert(0, "symbol", older.symbols)
    frame.insert(1, "ts", older.ts)
    frame.to_parquet(tmp_path / "history.parquet")
    trainer = served.trainer.model_copy(update={"history": str(tmp_path / "history.parquet")})
    bars = recent_bars(served.model_copy(update={"trainer": trainer}), ["A"], 5_000)
    assert bars["ts"].tolist() == (np.arange(-50, 1_400) * MINUTE_MS).tolist()
    assert recent_bars(served, [], 5_000)["symbol"].unique().tolist() == ["A", "B"]


@pytest.mark.kafka
def test_a_retrain_puts_a_child_of_the_champion_into_the_challengers_slot(served: Settings) -> None:
    parent = put_champion(served)
    heard: list[Progress] = []
    result = retrain(Job(settings=served, run=make_run(parent.version)), heard.append)
    assert result.error is None
    assert result.bars == 1_300
    assert [progress.epochs_done for progress in heard] == [0, 1, 2, 3]
    record = lifecycle.current(served)["challenger"]
    assert (record.bundle, record.parent, record.actor) == (
        result.bundle,
        parent.version,
        "trainer",
    )
    assert record.effective_ts == (1_399 + served.trainer.lead_bars) * MINUTE_MS
    assert {"excess_loss", "level_share", "run"} <= record.evidence.keys()
    assert not Path(served.trainer.runs, "r1").exists()


@pytest.mark.kafka
@pytest.mark.parametrize("policy", ["bias", "full"])
def test_the_other_remedies_make_challengers_that_can_be_served(
    served: Settings, policy: Policy
) -> None:
    parent = put_champion(served)
    quick = served.model_copy(
        update={"trainer": served.trainer.model_copy(update={"full_epochs": 1})}
    )
    result = retrain(Job(settings=quick, run=make_run(parent.version, policy=policy)))
    assert result.error is None
    child = open_bundle(served, str(result.bundle)).bundle
    assert child.provenance.parent == parent.version
    assert child.config.warm_up_bars == parent.config.warm_up_bars
    moved = any((child.weights[name] != parent.weights[name]).any() for name in parent.weights)
    assert moved == (policy == "full")
    assert child.config.variance_bias != parent.config.variance_bias


@pytest.fixture(scope="module")
def blended() -> Bundle:
    """All of its members weigh the same, and one of them has gone wrong since."""
    bundle = fit_ensemble(simulated(2_600))
    return with_golden(spoilt(bundle), bundle.golden["x"])


@pytest.fixture
def weighed(fresh_topics: Settings, blended: Bundle) -> Settings:
    """An ensemble is the champion, and bars that it was not made of are on the log."""
    store_bundle(fresh_topics, blended)
    lifecycle.promote(fresh_topics, blended.version, "first", "test", at_once=True)
    later = simulated(1_300, start=2_600)
    bars = BarColumns(
        later["symbol"].tolist(), later["ts"].to_numpy(), later[OHLCV].to_numpy(np.float64)
    )
    with make_publisher(fresh_topics, "test") as publisher:
        for symbol, value in zip(bars.symbols, encode_bars(bars), strict=True):
            publisher.produce(BARS, symbol.encode(), value)
    runs = fresh_topics.trainer.model_copy(update={"runs": f"{fresh_topics.store}-runs"})
    url = f"sqlite:///{fresh_topics.store}.db"
    return fresh_topics.model_copy(update={"trainer": runs, "database_url": url, "device": "cpu"})


@pytest.mark.kafka
@pytest.mark.parametrize("trigger", ["alarm", "schedule", "command"])
def test_an_ensemble_is_answered_with_new_weights_alone_in_a_slot_of_their_own(
    weighed: Settings, blended: Bundle, trigger: Trigger
) -> None:
    newest_ts = lifecycle.newest_bar_ts(weighed)
    since_ts = newest_ts - 700 * MINUTE_MS if trigger == "alarm" else newest_ts
    policy: Policy | None = None if trigger == "alarm" else "weights"
    asked: dict[str, Any] = {
        "trigger": trigger,
        "ts": newest_ts,
        "since_ts": since_ts,
        "symbols": [],
    }
    run = make_run(blended.version, policy=policy, **asked)
    heard: list[Progress] = []
    result = retrain(Job(settings=weighed, run=run, tried=["bias"]), heard.append)
    assert result.error is None
    assert [(said.policy, said.epochs) for said in heard] == [("weights", 0)]
    slots = lifecycle.current(weighed)
    assert set(slots) == {"champion", "weights"}
    record = slots["weights"]
    assert (record.bundle, record.parent) == (result.bundle, blended.version)
    assert record.reason.startswith(f"weights after {trigger}")
    child = open_bundle(weighed, str(result.bundle)).bundle
    assert child.provenance.parent == blended.version
    assert all((child.weights[name] == a).all() for name, a in blended.weights.items())
    assert config_of(child).weights[0][2] < 0.25 < config_of(blended).weights[0][2]


@pytest.mark.kafka
def test_while_weights_are_being_compared_another_remedy_is_taken_or_none(
    weighed: Settings, blended: Bundle
) -> None:
    lifecycle.publish(weighed, [make_record("weights", "v9")])
    newest_ts = lifecycle.newest_bar_ts(weighed)
    bars = recent_bars(weighed, [], 1_300)
    run = make_run(blended.version, ts=newest_ts, since_ts=newest_ts - 700 * MINUTE_MS)
    choice = _choose(Job(settings=weighed, run=run, tried=["bias"]), blended, bars)
    assert float(choice.evidence["weights_share"]) > 0.5
    assert choice.policy == "fine_tune"
    runner, jobs = answering(Result(bundle="v2", bars=7))
    alarm = make_degradation(blended.version, ts=newest_ts)
    configured = weighed.trainer.model_copy(update={"policy": "weights"})
    life(weighed.model_copy(update={"trainer": configured}), runner, alarm)
    assert jobs == []
    [skipped] = Registry(weighed.database_url).runs()
    assert "still being compared" in str(skipped.error)


@pytest.mark.parametrize(("policy", "found"), [("weights", "fine_tune"), ("bias", "bias")])
def test_a_champion_that_is_no_ensemble_is_fine_tuned_where_weights_are_asked_for(
    policy: Policy, found: Policy
) -> None:
    bundle, trainer = make_bundle(targets=(TARGET,)), TrainerSettings(policy=policy)
    assert asked_for(make_run(policy=policy), bundle, Settings()) == found
    assert asked_for(make_run(), bundle, Settings(trainer=trainer)) == found
    assert asked_for(make_run(), bundle, Settings()) is None


class Killed(BaseException):
    pass


@pytest.mark.kafka
def test_a_retrain_that_was_cut_off_ends_in_the_bundle_that_it_would_have_made(
    served: Settings,
) -> None:
    parent = put_champion(served)
    job = Job(settings=served, run=make_run(parent.version))

    def die(progress: Progress) -> None:
        if progress.epochs_done == 2:
            raise Killed

    with pytest.raises(Killed):
        retrain(job, die)
    kept = pd.read_parquet(Path(served.trainer.runs, "r1", "bars.parquet"))
    whole = fine_tune(parent, kept, device="cpu")
    later = make_bars(["A"], 50, seed=1, start_ts=1_400 * MINUTE_MS)
    with make_publisher(served, "test") as publisher:
        for value in encode_bars(later):
            publisher.produce(BARS, b"A", value)
    heard: list[Progress] = []
    result = retrain(job, heard.append)
    assert [progress.epochs_done for progress in heard] == [0, 2, 3], "one was kept"
    assert result.bundle == whole.version
    retrain(job)
    challengers = [r for r in lifecycle.records(served) if r.slot == "challenger"]
    assert len(challengers) == 1, "a run fills the slot once, however often it is repeated"


@pytest.mark.kafka
@pytest.mark.parametrize(
    ("bundle", "symbols", "error"),
    [("gone", ["A"], "no longer the champion"), (None, ["Z"], "no bars of Z")],
)
def test_a_retrain_that_cannot_be_says_why(
    served: Settings, bundle: str | None, symbols: list[str], error: str
) -> None:
    parent = put_champion(served)
    run = make_run(bundle or parent.version, symbols=symbols)
    result = retrain(Job(settings=served, run=run))
    assert error in str(result.error)
    assert "challenger" not in lifecycle.current(served)


@contextmanager
def training(settings: Settings) -> Iterator[Service]:
    service = Service("trainer", settings.http)
    thread = threading.Thread(target=lambda: asyncio.run(_serve(settings, service)))
    thread.start()
    try:
        yield service
    finally:
        service.stop()
        thread.join(60)
        assert not thread.is_alive()


def wait_for_success(settings: Settings) -> None:
    deadline = time.monotonic() + PATIENCE_S
    registry = Registry(settings.database_url)
    registry.create()
    while not registry.runs(status="succeeded"):
        assert time.monotonic() < deadline, "no challenger came"
        time.sleep(0.2)


@pytest.mark.kafka
def test_the_app_answers_alarms_and_people_from_kafka_in_a_child_process(served: Settings) -> None:
    parent = put_champion(served)
    with make_publisher(served, "test") as publisher:
        publisher.produce(DEGRADATION, b"x", b"rubbish")
        other = make_degradation("somebody else")
        publisher.produce(DEGRADATION, other.bundle.encode(), encode(other))
    with training(served):
        asked = request(served, "new exchange hours", "anna")
        wait_for_success(served)
    registry = Registry(served.database_url)
    [run] = registry.runs(status="succeeded")
    assert (run.id, run.parent, run.actor) == (asked.id, parent.version, "anna")
    challenger = lifecycle.current(served)["challenger"]
    assert run.bundle == challenger.bundle
    assert challenger.reason == "fine_tune after command: new exchange hours"
    [skipped] = registry.runs(status="skipped")
    assert "no longer the champion" in str(skipped.error)
    assert registry.bundle(str(run.bundle)) is not None
    told = [(row.actor, row.evidence["status"]) for row in registry.history("training")]
    assert sorted(told) == [("anna", "running"), ("anna", "succeeded"), ("monitor", "skipped")]
    assert registry.verify() == []


def life(settings: Settings, runner: Runner, *alarms: Degradation) -> None:
    """A trainer that remembers, takes up what is unfinished, and answers these alarms."""

    async def live() -> None:
        trainer = Trainer(settings, Service("trainer", settings.http), runner)
        try:
            await trainer.remember()
            await trainer.resume()
            for alarm in alarms:
                await trainer.answer_alarm(encode(alarm))
        finally:
            trainer.close()

    asyncio.run(live())


def answering(*results: Result) -> tuple[Runner, list[Job]]:
    """A runner that gives these results, and the jobs that it was given."""
    left, jobs = list(results), []

    async def runner(job: Job, tell: Tell) -> Result:
        jobs.append(job)
        await tell(Progress(policy="bias", evidence={}, epochs_done=1, epochs=3))
        return left.pop(0)

    return runner, jobs


@pytest.mark.kafka
def test_a_failed_training_is_reported_and_the_next_alarm_takes_the_next_remedy(
    served: Settings,
) -> None:
    parent = put_champion(served)
    runner, jobs = answering(Result(error="Diverged: the loss is nan"), Result(bundle="v2", bars=7))
    first = make_degradation(parent.version)
    soon = make_degradation(parent.version, ts=first.ts + MINUTE_MS)
    later = make_degradation(parent.version, ts=first.ts + 400 * MINUTE_MS)
    life(served, runner, first, first, soon, later)
    life(served, runner, later)  # a new life knows what was answered
    assert [job.tried for job in jobs] == [[], ["bias"]]
    runs = Registry(served.database_url).runs()
    assert {run.id: run.status for run in runs} == {
        first.id: "failed",
        soon.id: "skipped",
        later.id: "succeeded",
    }


@pytest.mark.kafka
def test_a_trainer_without_a_database_keeps_its_rules_and_the_registry_catches_up(
    served: Settings,
) -> None:
    parent = put_champion(served)
    gone = served.model_copy(update={"database_url": "postgresql://nobody@127.0.0.1:1/none"})
    runner, jobs = answering(Result(bundle="v2", bars=7))
    first = make_degradation(parent.version)
    life(gone, runner, first)
    life(gone, runner, make_degradation(parent.version, ts=first.ts + MINUTE_MS))
    assert len(jobs) == 1, "the cool-down holds without a database"
    life(served, runner)
    registry = Registry(served.database_url)
    assert {run.status for run in registry.runs()} == {"succeeded", "skipped"}
    statuses = [row.evidence["status"] for row in registry.history("training")]
    assert statuses == ["running", "succeeded", "skipped"]


@pytest.mark.kafka
def test_a_run_that_a_dead_trainer_left_is_taken_up_again(served: Settings) -> None:
    parent = put_champion(served)
    alarm = make_degradation(parent.version)

    async def die(job: Job, tell: Tell) -> Result:
        raise Killed

    with pytest.raises(Killed):
        life(served, die, alarm)
    runner, jobs = answering(Result(bundle="v2", bars=7))
    life(served, runner, alarm)
    [job] = jobs
    assert (job.run.id, job.run.attempts) == (alarm.id, 2)
    [run] = Registry(served.database_url).runs()
    assert (run.status, run.attempts) == ("succeeded", 2)


@pytest.mark.kafka
def test_the_schedule_asks_when_the_champion_has_not_seen_new_bars_for_so_long(
    served: Settings,
) -> None:
    parent = put_champion(served)
    daily = served.trainer.model_copy(update={"retrain_every_days": 1.0})
    settings = served.model_copy(update={"trainer": daily})
    runner, jobs = answering(Result(bundle="v2", bars=7), Result(bundle="v3", bars=7))

    async def look() -> None:
        trainer = Trainer(settings, Service("trainer", settings.http), runner)
        await trainer.remember()
        await trainer.answer_schedule()
        trainer.close()

    asyncio.run(look())
    assert jobs == [], "1,400 minutes are no day"
    with make_publisher(settings, "test") as publisher:
        for value in encode_bars(make_bars(["A"], 50, start_ts=1_400 * MINUTE_MS)):
            publisher.produce(BARS, b"A", value)
    for _ in range(2):
        asyncio.run(look())
    [job] = jobs
    assert (job.run.trigger, job.run.parent) == ("schedule", parent.version)


@pytest.mark.kafka
def test_a_child_that_takes_too_long_is_stopped(served: Settings) -> None:
    parent = put_champion(served)
    impatient = served.trainer.model_copy(update={"time_limit_s": 0.2})
    settings = served.model_copy(update={"trainer": impatient})

    async def live() -> None:
        trainer = Trainer(settings, Service("trainer", settings.http))
        await trainer.remember()
        await trainer.answer_alarm(encode(make_degradation(parent.version)))
        trainer.close()

    asyncio.run(live())
    run = Registry(settings.database_url).runs()[0]
    assert (run.status, run.error) == ("failed", "stopped after 0.2 s")


def test_a_training_process_dies_with_its_trainer() -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", "from workers import retraining as r; r._die_with_parent()"],
        stdin=subprocess.PIPE,
    )
    assert child.stdin is not None
    child.stdin.close()
    assert child.wait(60) == 1
