"""The fault matrix: what a replica's promises are worth while its world breaks, on a real Kafka.

After each fault: no prediction is lost, none is there twice (exactly-once), all are those of an
undisturbed run by the same bundles at the same bars.
"""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewPartitions

from schemas.messages import Prediction, Share, bucket_of
from schemas.topics import ATTENTION, BARS, OUTCOMES, PREDICTIONS
from tests.workers.builders import MINUTE_MS, make_bars, make_bundle
from tests.workers.faults.replicas import Replicas
from tests.workers.faults.rig import (
    ALONE,
    CHAMPION,
    LIVE,
    NEXT,
    SWAP_TS,
    SWAPPED,
    SYMBOLS,
    assert_as_undisturbed,
    bars,
    drained,
    for_faults,
    with_section,
)
from tests.workers.faults.steps import Fault, JumpingClock
from tests.workers.streams import (
    WARM_AT,
    Change,
    appoint,
    assert_exactly_once,
    assert_nothing_lost,
    compared,
    send,
    wait_until,
)
from workers.config import Settings
from workers.fleet import free_port
from workers.kafka import read_topic
from workers.proof import read_predictions

pytestmark = [pytest.mark.kafka, pytest.mark.timeout(300)]


@pytest.fixture
def replicas(fresh_topics: Settings, tmp_path: Path) -> Iterator[Replicas]:
    with Replicas(for_faults(fresh_topics), tmp_path / "logs") as replicas:
        appoint(replicas.settings, "champion", CHAMPION, 0)
        yield replicas


# ---- killed at every step ----

KILLED_AT = [
    ("after the poll", (3, 9)),
    ("after the model", (3, 9)),
    ("half produced", (100, 350)),
    ("after produce", (3, 9)),
    ("before the commit", (6, 20)),
    ("after the commit", (3, 9)),
    ("in a snapshot", (1, 2)),
]


@pytest.mark.parametrize(("step", "times"), KILLED_AT, ids=[step for step, _ in KILLED_AT])
def test_a_kill_anywhere_in_the_cycle_loses_and_doubles_nothing(
    replicas: Replicas, step: str, times: tuple[int, ...]
) -> None:
    send(replicas.settings, bars(0, WARM_AT + LIVE))
    for nth in times:
        replicas.start("one", Fault(step, nth))
        assert replicas.ended("one") == -signal.SIGKILL
    replicas.start("one")
    assert_as_undisturbed(replicas)


@pytest.mark.parametrize("step", ["in a restore", "in a swap", "in a rebuild", "after the commit"])
def test_a_kill_in_the_middle_of_a_swap_leaves_every_bar_with_its_own_bundle(
    replicas: Replicas, step: str
) -> None:
    send(replicas.settings, bars(0, WARM_AT + 40))
    replicas.start("one")
    drained(replicas)
    assert replicas.stop() == {"one": 0}
    appoint(replicas.settings, "champion", NEXT, SWAP_TS)
    send(replicas.settings, bars(WARM_AT + 40, WARM_AT + LIVE))
    replicas.start("one", Fault(step, 2))
    assert replicas.ended("one") == -signal.SIGKILL
    replicas.start("one")
    assert_as_undisturbed(replicas, SWAPPED)


def test_a_replica_that_catches_up_waits_for_the_bundle_of_an_effective_time(
    replicas: Replicas,
) -> None:
    replicas.start("one", Fault("opening a bundle", 2, "pause"))
    replicas.wait_for("one", "restored")
    appoint(replicas.settings, "champion", NEXT, SWAP_TS)
    replicas.wait_for("one", "fault: pause")
    send(replicas.settings, bars(0, WARM_AT + LIVE))
    assert_as_undisturbed(replicas, SWAPPED)


@pytest.mark.parametrize(
    ("step", "kills"),
    [("after produce", (3, 2)), ("delivered, not committed", (1, 1)), ("after the commit", (3, 2))],
)
def test_at_least_once_repeats_what_was_under_way_and_loses_nothing(
    replicas: Replicas, step: str, kills: tuple[int, int]
) -> None:
    settings = with_section(replicas.settings, "kafka", delivery="at_least_once")
    send(settings, bars(0, WARM_AT))
    replicas.start("one", settings=settings)
    drained(replicas)
    assert replicas.stop() == {"one": 0}
    send(settings, bars(WARM_AT, WARM_AT + LIVE))  # each of these has predictions to repeat
    for nth in kills:
        replicas.start("one", Fault(step, nth), settings=settings)
        assert replicas.ended("one") == -signal.SIGKILL
    replicas.start("one", settings=settings)
    drained(replicas)
    assert replicas.stop() == {"one": 0}
    comparison = compared(settings, [CHAMPION], ALONE)
    assert_nothing_lost(comparison)
    if step == "delivered, not committed":
        assert comparison.duplicated


# ---- stopped, frozen, doubled, scaled ----


def test_a_replica_that_is_asked_to_stop_finishes_and_its_successor_goes_on(
    replicas: Replicas,
) -> None:
    send(replicas.settings, bars(0, WARM_AT + LIVE))
    for nth in (2, 6):
        replicas.start("one", Fault("after produce", nth, "pause"))
        replicas.wait_for("one", "fault")
        assert replicas.stop() == {"one": 0}
        replicas.log_file("one").unlink()
    replicas.start("one")
    assert_as_undisturbed(replicas)


def test_a_zombie_that_wakes_after_its_session_is_fenced(replicas: Replicas) -> None:
    send(replicas.settings, bars(0, WARM_AT + 80))
    replicas.start("zombie", Fault("before the commit", 20, "freeze"))
    wait_until(lambda: replicas.frozen("zombie"), lambda: None)
    replicas.start("heir")
    drained(replicas)
    replicas.send("zombie", signal.SIGCONT)
    send(replicas.settings, bars(WARM_AT + 80, WARM_AT + LIVE))
    assert_as_undisturbed(replicas)


def test_of_two_replicas_of_one_name_the_first_is_fenced_and_exits(replicas: Replicas) -> None:
    send(replicas.settings, bars(0, WARM_AT + 80))
    replicas.start("first", Fault("before the commit", 20, "pause"), slot="same")
    replicas.wait_for("first", "fault")
    replicas.start("second", slot="same")
    send(replicas.settings, bars(WARM_AT + 80, WARM_AT + LIVE))
    assert replicas.ended("first") == 1
    assert "Fenced" in replicas.log("first")
    assert_as_undisturbed(replicas)


def test_a_rebalance_while_a_batch_is_open_loses_and_doubles_nothing(replicas: Replicas) -> None:
    send(replicas.settings, bars(0, WARM_AT + LIVE))
    replicas.start("one", Fault("after produce", 10, "pause"))
    replicas.wait_for("one", "fault")
    replicas.start("two")
    replicas.wait_for("two", "restored")
    assert_as_undisturbed(replicas)


def test_scaling_from_one_to_four_to_two_loses_and_doubles_nothing(replicas: Replicas) -> None:
    settings = replicas.settings
    replicas.start("a")
    send(settings, bars(0, WARM_AT + 20))
    drained(replicas)
    for name in ("b", "c", "d"):
        replicas.start(name)
    appoint(settings, "champion", NEXT, SWAP_TS)
    for name in ("a", "b", "c", "d"):
        replicas.wait_for(name, NEXT.version)
    send(settings, bars(WARM_AT + 20, WARM_AT + 110))
    replicas.kill("c")
    replicas.kill("a")
    send(settings, bars(WARM_AT + 110, WARM_AT + LIVE))
    assert_as_undisturbed(replicas, SWAPPED)


# ---- what is around a replica ----


def test_a_full_disk_costs_snapshots_and_nothing_else(replicas: Replicas) -> None:
    send(replicas.settings, bars(0, WARM_AT + LIVE))
    full = Fault("in a snapshot", 1, "disk full")
    replicas.start("one", full, Fault("after the commit", 25))
    assert replicas.ended("one") == -signal.SIGKILL
    assert "No space left on device" in replicas.log("one")
    assert not list(Path(replicas.settings.store).glob("snapshots/**/*.snapshot*"))
    replicas.start("one", full)
    assert_as_undisturbed(replicas)


def test_a_replica_needs_no_database(replicas: Replicas) -> None:
    gone = {"database_url": f"postgresql+psycopg://nobody@127.0.0.1:{free_port()}/none"}
    replicas.start("one", settings=replicas.settings.model_copy(update=gone))
    send(replicas.settings, bars(0, WARM_AT + LIVE))
    assert_as_undisturbed(replicas)


def test_bundles_and_snapshots_on_s3_carry_a_replica_over_a_kill(
    replicas: Replicas, s3_url: str, tmp_path: Path
) -> None:
    settings = replicas.settings = replicas.settings.model_copy(update={"store": s3_url})
    appoint(settings, "champion", CHAMPION, 0)
    send(settings, bars(0, WARM_AT + 80))
    replicas.start("one")
    drained(replicas)
    assert replicas.stop() == {"one": 0}
    send(settings, bars(WARM_AT + 80, WARM_AT + LIVE))
    replicas.start("one", Fault("after produce", 2))
    assert replicas.ended("one") == -signal.SIGKILL
    assert "replay_from=0" not in replicas.log("one").rpartition("started")[2]
    replicas.start("one")
    assert_as_undisturbed(replicas)


def test_a_wall_clock_that_leaps_changes_nothing(replicas: Replicas) -> None:
    send(replicas.settings, bars(0, WARM_AT + LIVE))
    replicas.start("one", JumpingClock(), Fault("after the commit", 25))
    assert replicas.ended("one") == -signal.SIGKILL
    replicas.start("one", JumpingClock(seed=1))
    assert_as_undisturbed(replicas)


def test_a_partition_that_was_added_stops_the_worker_with_a_word_and_moved_symbols_warm_up_anew(
    replicas: Replicas,
) -> None:
    send(replicas.settings, bars(0, WARM_AT + 20))
    replicas.start("one")
    drained(replicas)
    widen(replicas.settings, BARS)
    assert replicas.ended("one") == 1
    problem = f"{PREDICTIONS} has 4 partitions and {BARS} has 6"
    assert problem in replicas.log("one")
    replicas.start("again")
    assert replicas.ended("again") == 1

    widen(replicas.settings, PREDICTIONS, ATTENTION, OUTCOMES)
    more = make_bars(SYMBOLS, WARM_AT + 40, seed=9, start_ts=MINUTE_MS * (WARM_AT + 20))
    send(replicas.settings, more)
    replicas.start("one")
    assert_as_undisturbed(replicas)
    said = read_predictions(replicas.settings).groupby("symbol")["ts"].nunique()
    assert said.to_dict() == {
        symbol: 20 + 40 + (0 if symbol in MOVED else WARM_AT) for symbol in SYMBOLS
    }


MOVED = {"S1", "S4", "S5", "S7"}
"""Whose keys go elsewhere among six partitions than among four."""


def widen(settings: Settings, *topics: str) -> None:
    admin = AdminClient({"bootstrap.servers": settings.bootstrap_servers})
    for future in admin.create_partitions([NewPartitions(topic, 6) for topic in topics]).values():
        future.result(15)


# ---- arms and several challengers ----


def test_arms_and_two_challengers_stay_where_they_are_across_a_kill(replicas: Replicas) -> None:
    second, third = make_bundle(seed=3), make_bundle(seed=4)
    share = Share(salt="x", first=0, end=5_000)
    until_ts = SWAP_TS + 40 * MINUTE_MS
    changes: list[Change] = [
        *ALONE,
        ("challenger", second.version, SWAP_TS),
        ("challenger-2", third.version, SWAP_TS),
        ("arm-b", NEXT.version, SWAP_TS, share),
        ("arm-b", None, until_ts),
    ]
    settings = replicas.settings
    send(settings, bars(0, WARM_AT + 40))
    for name in ("one", "two"):
        replicas.start(name)
    drained(replicas)
    appoint(settings, "challenger", second, SWAP_TS)
    appoint(settings, "challenger-2", third, SWAP_TS)
    appoint(settings, "arm-b", NEXT, SWAP_TS, share)
    assert set(replicas.stop().values()) == {0}
    for name in ("one", "two"):
        replicas.log_file(name).unlink()
    replicas.start("one", Fault("half produced", 600))
    replicas.start("two")
    for name in ("one", "two"):  # else the first has all done before the second is there
        replicas.wait_for(name, "restored")
    send(settings, bars(WARM_AT + 40, WARM_AT + 100))
    assert replicas.ended("one") == -signal.SIGKILL
    replicas.start("one")
    drained(replicas)
    assert set(replicas.stop().values()) == {0}
    appoint(settings, "arm-b", None, until_ts)
    for name in ("one", "two"):
        replicas.start(name)
    send(settings, bars(WARM_AT + 100, WARM_AT + LIVE))
    drained(replicas)
    assert set(replicas.stop().values()) == {0}
    assert_exactly_once(compared(settings, [CHAMPION, NEXT, second, third], changes))
    acted_on: dict[tuple[str, int, str], list[str]] = {}
    for message in read_topic(settings, PREDICTIONS):
        said = Prediction.model_validate_json(message.value() or b"")
        if said.role == "champion":
            acted_on.setdefault((said.symbol, said.ts, said.target), []).append(said.arm)
    assert {arm for (arm,) in acted_on.values()} == {"a", "b"}
    for (symbol, ts, _), arms in acted_on.items():
        is_tested = bucket_of("x", symbol) < share.end and SWAP_TS <= ts < until_ts
        assert arms == ["b" if is_tested else "a"]
