"""The monitor on a real Kafka: every outcome once across crashes, alarms, promotions, rollbacks."""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewPartitions

from models.baselines import Reference, history
from models.bundle import Bundle
from models.drift import Calibration
from models.features import F
from models.input_drift import InputReference
from models.scoring import loss
from models.targets import Target, labels
from schemas.codecs import BarColumns, encode_bars, encode_predictions
from schemas.messages import Degradation, Lifecycle, Outcome, Role, Slot
from schemas.topics import BARS, DEAD_LETTER, DEGRADATION, LIFECYCLE, OUTCOMES, PREDICTIONS
from tests.workers.builders import MINUTE_MS, SPEC, make_bars, make_bundle, rows_of
from workers import lifecycle
from workers.bundles import store_bundle
from workers.config import HttpSettings, MonitorSettings, Settings
from workers.errors import TopicMismatch
from workers.kafka import make_publisher, read_topic
from workers.monitor import Monitor
from workers.service import Service
from workers.store import Registry

pytestmark = pytest.mark.kafka

TARGET = Target(kind="volatility", horizon=5)
CALM = Calibration(
    low=-50.0,
    high=50.0,
    mean=0.0,
    sd=1.0,
    correlation=1.0,
    threshold=8.0,
    arl0_bars=1_000,
    block_bars=50,
    n=1_000,
)


def make_judged_bundle(seed: int, calibration: Calibration | None = CALM) -> Bundle:
    bundle = make_bundle(seed, targets=(TARGET,))
    config = bundle.config.model_copy(update={"calibrations": (calibration,)})
    return replace(bundle, config=config)


@pytest.fixture
def judged(fresh_topics: Settings) -> Settings:
    monitor = fresh_topics.monitor.model_copy(
        update={"cool_down_bars": 40, "probation_bars": 200, "snapshot_every_s": 0.2, "idle_s": 0.2}
    )
    url = f"sqlite:///{fresh_topics.store}.db"
    return fresh_topics.model_copy(update={"monitor": monitor, "database_url": url})


def send(settings: Settings, topic: str, keys: list[str], values: list[bytes]) -> None:
    with make_publisher(settings, "test") as publisher:
        for key, value in zip(keys, values, strict=True):
            publisher.produce(topic, key.encode(), value)


def send_bars(settings: Settings, bars: BarColumns) -> None:
    send(settings, BARS, bars.symbols, encode_bars(bars))


def send_predictions(
    settings: Settings, bars: BarColumns, bundle: Bundle, role: Role, values: np.ndarray
) -> None:
    encoded = encode_predictions(
        bars.symbols,
        bars.ts,
        values,
        None,
        target=TARGET.name,
        horizon=TARGET.horizon,
        interval_ms=MINUTE_MS,
        bundle=bundle.version,
        role=role,
    )
    send(settings, PREDICTIONS, bars.symbols, encoded)


def truth(bars: BarColumns) -> np.ndarray:
    """What a forecaster would say that knows the bars to come; the last ones are guessed."""
    out = np.empty(len(bars))
    for symbol in set(bars.symbols):
        own = np.array([s == symbol for s in bars.symbols])
        found = labels((TARGET,), SPEC, bars.ts[own], bars.ohlcv[own])[:, 0]
        out[own] = np.where(np.isnan(found), -14.0, found)
    return out


def has_more_than(settings: Settings, n: int) -> bool:
    return len(outcomes_of(settings)) > n


@contextmanager
def monitoring(settings: Settings) -> Iterator[Callable[[Callable[[], bool]], None]]:
    """A monitor of its own thread's making; the function given cycles until a condition holds."""
    service = Service("monitor", settings.http)
    monitor = Monitor(settings, service)
    assert monitor.wait_for_champion()

    def until(done: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 60
        while not done():
            assert time.monotonic() < deadline, "the monitor did not get there"
            for _ in range(5):
                monitor.cycle()

    try:
        yield until
    finally:
        monitor.close()


def scored(n_bars: int) -> int:
    """Of one symbol: the last ones have no label, the first one no reference to be held against."""
    return n_bars - TARGET.horizon - 1


def outcomes_of(settings: Settings) -> list[Outcome]:
    return [Outcome.model_validate_json(m.value() or b"") for m in read_topic(settings, OUTCOMES)]


def alarms_of(settings: Settings) -> list[Degradation]:
    return [
        Degradation.model_validate_json(m.value() or b"") for m in read_topic(settings, DEGRADATION)
    ]


def records_of(settings: Settings) -> list[Lifecycle]:
    return [
        Lifecycle.model_validate_json(m.value() or b"") for m in read_topic(settings, LIFECYCLE)
    ]


def put_champion(settings: Settings, bundle: Bundle) -> None:
    store_bundle(settings, bundle)
    lifecycle.promote(settings, bundle.version, "first", "test", at_once=True)


def put_challenger(settings: Settings, bundle: Bundle, slot: Slot = "challenger") -> None:
    uri = store_bundle(settings, bundle)
    record = lifecycle.fill(slot, bundle, uri, effective_ts=0, reason="test", actor="test")
    lifecycle.publish(settings, [record])


def test_outcomes_are_published_once_across_crashes_and_scored_as_offline(judged: Settings) -> None:
    bundle = make_judged_bundle(0)
    put_champion(judged, bundle)
    bars = make_bars(["A", "B", "C", "D", "E"], 60)
    values = np.random.default_rng(0).normal(-14, 1, len(bars))
    expected = 5 * scored(60)
    for part in np.array_split(np.arange(len(bars)), 3):
        some = rows_of(bars, part)
        send_predictions(judged, some, bundle, "champion", values[part])
        before = len(outcomes_of(judged))
        with monitoring(judged) as until:  # predictions first, then bars: another order each time
            send_bars(judged, some)
            until(partial(has_more_than, judged, before))
    with monitoring(judged) as until:
        until(lambda: len(outcomes_of(judged)) >= expected)
    found = outcomes_of(judged)
    assert len({o.prediction_id for o in found}) == len(found) == expected
    own = [i for i, s in enumerate(bars.symbols) if s == "A"]
    label = labels((TARGET,), SPEC, bars.ts[own], bars.ohlcv[own])
    past = history(SPEC, bars.ts[own], bars.ohlcv[own, 3])
    said = Reference().forecast(TARGET, past)
    for outcome in (o for o in found if o.symbol == "A" and o.ts > 0):
        at = outcome.ts // MINUTE_MS
        assert outcome.label == pytest.approx(label[at, 0])
        assert outcome.value == pytest.approx(values[own[at]])
        assert outcome.reference_loss == pytest.approx(
            float(loss(TARGET, said[[at]], label[at])[0]), rel=1e-4
        )


def test_a_champion_that_goes_wrong_raises_one_alarm_that_names_since_when(
    judged: Settings,
) -> None:
    bundle = make_judged_bundle(0)
    put_champion(judged, bundle)
    bars = make_bars(["A", "B"], 120)
    values = truth(bars)
    values[bars.ts >= 60 * MINUTE_MS] -= 1.5
    send_predictions(judged, bars, bundle, "champion", values)
    send_bars(judged, bars)
    with monitoring(judged) as until:
        until(lambda: len(outcomes_of(judged)) == 2 * scored(120))
        until(lambda: len(alarms_of(judged)) >= 1)
    alarm, *_ = alarms_of(judged)
    assert alarm.bundle == bundle.version
    assert 61 <= alarm.since_ts // MINUTE_MS <= 64
    assert alarm.ts >= alarm.since_ts
    assert set(alarm.symbols) == {"A", "B"}
    assert alarm.excess_loss > 0.5
    registry = Registry(judged.database_url)
    assert [row.id for row in registry.degradations()][-1:] == [alarm.id]


def make_bundle_of_other_inputs() -> Bundle:
    """Whatever bars it is shown, its inputs were of another kind."""
    rng = np.random.default_rng(0)
    seen = InputReference.fit(rng.normal(50, 1, (500, F)), rng.normal(9, 0.1, (500, 8)))
    return replace(make_judged_bundle(0), inputs=seen)


def test_an_alarm_is_said_again_with_how_far_the_inputs_have_drifted(judged: Settings) -> None:
    bundle = make_bundle_of_other_inputs()
    put_champion(judged, bundle)
    bars = make_bars(["A", "B"], 600)
    values = truth(bars)
    values[bars.ts >= 500 * MINUTE_MS] -= 1.5
    send_predictions(judged, bars, bundle, "champion", values)
    send_bars(judged, bars)
    with monitoring(judged) as until:
        until(lambda: any(alarm.inputs is not None for alarm in alarms_of(judged)))
        until(lambda: len(outcomes_of(judged)) == 2 * scored(600))
    first, again = (alarm for alarm in alarms_of(judged) if alarm.id == alarms_of(judged)[0].id)
    assert first.inputs is None
    assert first == again.model_copy(update={"inputs": None})
    drift = again.inputs
    assert drift is not None
    assert drift.symbols == ["A", "B"]
    assert drift.rows >= 200
    assert len(drift.psi) == len(drift.ks) == 5
    assert max(drift.psi.values()) == next(iter(drift.psi.values())) > 1
    assert drift.embedding is not None
    assert drift.embedding > 1
    row = next(r for r in Registry(judged.database_url).degradations() if r.id == again.id)
    assert row.inputs == drift.model_dump()


def test_inputs_that_have_drifted_far_raise_nothing_while_losses_are_good(
    judged: Settings,
) -> None:
    bundle = make_bundle_of_other_inputs()
    put_champion(judged, bundle)
    bars = make_bars(["A", "B"], 600)
    send_predictions(judged, bars, bundle, "champion", truth(bars))
    send_bars(judged, bars)
    service = Service("monitor", judged.http)
    monitor = Monitor(judged, service)
    assert monitor.wait_for_champion()
    gauge = partial(service.metrics.registry.get_sample_value, labels={"bundle": bundle.version})
    while gauge("gpt_trader_input_psi") is None:  # pytest's timeout ends it
        monitor.cycle()
    while len(outcomes_of(judged)) < 2 * scored(600):
        monitor.cycle()
    for name, least in (("psi", 1), ("ks", 0.9), ("embedding_distance", 1)):
        assert (gauge(f"gpt_trader_input_{name}") or 0) > least
    assert alarms_of(judged) == []
    assert records_of(judged)[-1].actor == "test"
    monitor.close()


def test_the_bars_of_late_come_back_with_the_snapshot(judged: Settings) -> None:
    put_champion(judged, make_judged_bundle(0))
    send_bars(judged, make_bars(["A", "B", "C"], 500))
    held = []
    for _ in range(2):
        monitor = Monitor(judged, Service("monitor", judged.http))
        assert monitor.wait_for_champion()
        while sum(map(len, monitor._recent.get().values())) != 1_500:
            monitor.cycle()
        held.append(monitor._recent.get())
        monitor.close()
    assert held[0] == held[1]


@pytest.mark.parametrize("slot", ["challenger", "weights"])
def test_a_better_challenger_is_promoted_and_comes_back_down_when_it_fails(
    judged: Settings, slot: Slot
) -> None:
    old, new = make_judged_bundle(1), make_judged_bundle(2)
    put_champion(judged, old)
    put_challenger(judged, new, slot)
    n = 700
    bars = make_bars(["A", "B"], n)
    good = truth(bars) + np.random.default_rng(0).normal(0, 0.2, len(bars))
    send_predictions(judged, bars, old, "champion", good + 1.0)
    send_predictions(judged, bars, new, "challenger", good)
    send_bars(judged, bars)
    with monitoring(judged) as until:
        until(lambda: any(r.actor == "monitor" for r in records_of(judged)))
        promoted = next(r for r in records_of(judged) if r.actor == "monitor")
        assert (promoted.slot, promoted.bundle, promoted.parent) == (
            "champion",
            new.version,
            old.version,
        )
        assert float(promoted.evidence["e_better"]) >= 1 / judged.monitor.alpha
        assert promoted.effective_ts > bars.ts.max()
        until(lambda: lifecycle.current(judged)[slot].bundle is None)
        later = make_bars(["A", "B"], 150, seed=5, start_ts=promoted.effective_ts)
        send_predictions(judged, later, new, "champion", truth(later) - 2.5)
        send_bars(judged, later)
        audit = Registry(judged.database_url)
        until(lambda: len(audit.history("champion")) == 3)
    back = lifecycle.current(judged)["champion"]
    assert back.actor == "monitor"
    assert [row.to_bundle for row in audit.history("champion")] == [
        old.version,
        new.version,
        old.version,
    ]
    assert audit.verify() == []


@pytest.mark.parametrize("slot", ["challenger", "weights"])
def test_a_worse_challenger_is_refused(judged: Settings, slot: Slot) -> None:
    old, new = make_judged_bundle(1), make_judged_bundle(2)
    put_champion(judged, old)
    put_challenger(judged, new, slot)
    bars = make_bars(["A", "B"], 400)
    good = truth(bars) + np.random.default_rng(0).normal(0, 0.2, len(bars))
    send_predictions(judged, bars, old, "champion", good)
    send_predictions(judged, bars, new, "challenger", good + 1.0)
    send_bars(judged, bars)
    with monitoring(judged) as until:
        until(lambda: lifecycle.current(judged)[slot].bundle is None)
    assert lifecycle.current(judged)["champion"].bundle == old.version
    assert "no better" in lifecycle.current(judged)[slot].reason


def test_only_watched_symbols_decide(judged: Settings) -> None:
    bundle = make_judged_bundle(0)
    put_champion(judged, bundle)
    watching = judged.monitor.model_copy(update={"watch": ("A",)})
    settings = judged.model_copy(update={"monitor": watching})
    bars = make_bars(["A", "B"], 100)
    values = truth(bars)
    values[np.array(bars.symbols) == "B"] -= 4
    send_predictions(settings, bars, bundle, "champion", values)
    send_bars(settings, bars)
    with monitoring(settings) as until:
        until(lambda: len(outcomes_of(settings)) == 2 * scored(100))
    assert alarms_of(settings) == []


def test_rubbish_predictions_are_set_aside_and_the_rest_goes_on(judged: Settings) -> None:
    bundle = make_judged_bundle(0)
    put_champion(judged, bundle)
    bars = make_bars(["A"], 20)
    send(judged, PREDICTIONS, ["A"] * 3, [b"", b"{}", b'{"symbol": "A", "ts": -5}'])
    send_predictions(judged, bars, bundle, "champion", truth(bars))
    send_bars(judged, bars)
    with monitoring(judged) as until:
        until(lambda: len(outcomes_of(judged)) == scored(20))
    assert sum(1 for _ in read_topic(judged, DEAD_LETTER)) == 3


def test_a_partition_that_does_not_move_is_named_and_its_lag_shown(judged: Settings) -> None:
    bundle, bars, now = make_judged_bundle(0), make_bars(["A", "B", "C", "D", "E"], 30), 0.0
    put_champion(judged, bundle)
    settings = judged.model_copy(update={"http": HttpSettings(stalled_after_s=20)})
    service = Service("monitor", settings.http, clock=lambda: now)
    monitor = Monitor(settings, service, clock=lambda: now)
    assert monitor.wait_for_champion()
    gauge = service.metrics.registry.get_sample_value

    def cycle_until(done: Callable[[], bool]) -> None:
        nonlocal now
        while not done():  # pytest's timeout ends it
            now += 2
            monitor.cycle()
            service.progress()

    send_bars(judged, bars)
    consumed = "gpt_trader_messages_consumed_total"
    cycle_until(lambda: gauge(consumed, {"topic": BARS}) == len(bars))
    frozen = [at.partition for at in monitor._consumer.assignment() if at.topic == BARS]
    monitor._consumer.pause(monitor._consumer.assignment())
    send_bars(judged, make_bars(bars.symbols[:5], 30, start_ts=30 * MINUTE_MS))
    cycle_until(lambda: service.health()[0] == 503)
    stalled = str(service.health()[1]["stalled_partitions"])
    assert any(f"{BARS}[{partition}]" in stalled for partition in frozen)
    assert PREDICTIONS not in stalled
    assert gauge("gpt_trader_lag_messages", {"topic": PREDICTIONS, "partition": "0"}) == 0
    monitor._consumer.resume(monitor._consumer.assignment())
    cycle_until(lambda: service.health()[0] == 200)
    monitor.close()


def test_a_partition_that_was_added_stops_it_at_the_next_assignment(judged: Settings) -> None:
    put_champion(judged, make_judged_bundle(0))
    monitor = Monitor(judged, Service("monitor", judged.http))
    assert monitor.wait_for_champion()
    admin = AdminClient({"bootstrap.servers": judged.bootstrap_servers})
    admin.create_partitions([NewPartitions(BARS, 6)])[BARS].result(15)
    cycles = iter(monitor.cycle, "never")  # pytest's timeout ends them
    with pytest.raises(TopicMismatch, match=f"{PREDICTIONS} has 4 partitions and {BARS} has 6"):
        deque(cycles, maxlen=0)
    monitor.close()


def test_it_waits_for_a_champion_and_stops_when_asked(judged: Settings) -> None:
    service = Service("monitor", judged.http)
    monitor = Monitor(judged, service)
    threading.Timer(0.3, service.stop).start()
    assert not monitor.wait_for_champion()
    monitor.close()


def test_settings_have_sane_defaults() -> None:
    assert MonitorSettings().watch == ()
