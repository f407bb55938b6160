"""The proof must see every kind of harm: that it calls a sound run sound is the smaller half."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.workers.builders import make_bars, make_bundle
from workers import proof
from workers.offline import PREDICTION_COLUMNS, engine_for, prediction_frame, replay
from workers.schedule import Schedule


def make_predictions(n: int = 10, name: str = "p") -> pd.DataFrame:
    return pd.DataFrame(
        {"id": [f"{name}{i}" for i in range(n)], "value": np.arange(n) / 7, "role": "champion"}
    )


def test_a_sound_run_is_sound_in_whatever_order_it_was_read() -> None:
    expected = make_predictions()
    found = proof.compare(expected, expected.sample(frac=1, random_state=1))
    assert found == proof.Comparison(10, 10, 10, 0, 0, 0, 0.0, 0)


@given(
    lost=st.sets(st.integers(0, 9)),
    doubled=st.lists(st.integers(0, 9), max_size=5),
    strangers=st.integers(0, 3),
)
@settings(deadline=None, max_examples=50)
def test_every_lost_doubled_or_strange_prediction_is_counted(
    lost: set[int], doubled: list[int], strangers: int
) -> None:
    expected = make_predictions()
    doubled = [i for i in doubled if i not in lost]
    strange = make_predictions(strangers, "x")
    published = pd.concat(
        [expected.drop(index=list(lost)), expected.iloc[doubled], strange], ignore_index=True
    )
    found = proof.compare(expected, published)
    assert (found.lost, found.duplicated, found.unexpected) == (len(lost), len(doubled), strangers)
    assert found.published == len(published)


def test_a_value_that_moved_and_a_role_that_is_wrong_are_seen() -> None:
    expected = make_predictions()
    moved = np.where(np.arange(10) == 3, 2e-3, 0.0)
    published = expected.assign(
        value=expected["value"] + moved, role=["champion"] * 4 + ["challenger"] + ["champion"] * 5
    )
    found = proof.compare(expected, published)
    assert found.max_abs_difference == pytest.approx(2e-3)
    assert found.wrong_role == 1


def test_an_empty_topic_loses_everything() -> None:
    found = proof.compare(make_predictions(), make_predictions(0))
    assert (found.lost, found.distinct) == (10, 0)


def test_the_undisturbed_run_follows_the_schedule_of_each_partition() -> None:
    first, second = make_bundle(1), make_bundle(2)
    bars = make_bars(["A", "B"], 450)
    partitions = np.tile([0, 1], 450).astype(np.int64)
    swap_ts = int(bars.ts[2 * 430])
    schedules = {0: Schedule(), 1: Schedule()}
    for schedule in schedules.values():
        schedule.give("champion", first.version, 0)
    schedules[0].give("challenger", second.version, swap_ts - 5 * 60_000)
    schedules[0].give("champion", second.version, swap_ts)
    schedules[0].give("challenger", None, swap_ts)
    log = proof.BarsLog(bars, partitions, np.zeros(len(bars), np.int64))
    run = proof.undisturbed(log, schedules, [first, second], "A")

    said = run.predictions
    a, b = said[said["symbol"] == "A"], said[said["symbol"] == "B"]
    champion = a[a["role"] == "champion"]
    assert set(champion[champion["ts"] < swap_ts]["bundle"]) == {first.version}
    assert set(champion[champion["ts"] >= swap_ts]["bundle"]) == {second.version}
    assert set(a[a["role"] == "challenger"]["bundle"]) == {second.version}
    assert set(b["bundle"]) == {first.version}
    assert said["id"].is_unique
    assert run.attention.shape == (champion["ts"].nunique(), 8)
    np.testing.assert_allclose(run.attention.sum(axis=1), 1, atol=1e-5)


def test_offline_predictions_do_not_depend_on_the_batches() -> None:
    bundle = make_bundle()
    bars = make_bars(["A", "B", "C"], 420)
    frames = []
    for batch_bars in (4_096, 37):
        engine = engine_for([bundle])
        engine.schedules[0] = Schedule()
        engine.schedules[0].give("champion", bundle.version, 0)
        parts = [
            prediction_frame(forecast, batch)
            for batch, processed in replay(engine, bars, np.zeros(len(bars), np.int64), batch_bars)
            for forecast in processed.forecasts
        ]
        frames.append(pd.concat(parts).sort_values("id", ignore_index=True))
    assert tuple(frames[0]) == PREDICTION_COLUMNS
    pd.testing.assert_frame_equal(frames[0], frames[1], rtol=1e-5, atol=1e-6)


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 50)), max_size=40),
)
@settings(deadline=None)
def test_partitions_go_side_by_side_and_each_keeps_its_order(rows: list[tuple[int, int]]) -> None:
    partitions = np.array([p for p, _ in rows], np.int64)
    ts = np.array([t for _, t in rows], np.int64)
    order = proof.side_by_side(partitions, ts)
    assert sorted(order.tolist()) == list(range(len(rows)))
    for partition in set(partitions.tolist()):
        here = [i for i in order.tolist() if partitions[i] == partition]
        assert here == sorted(here)


def test_ordered_partitions_merge_by_time() -> None:
    partitions = np.array([0, 0, 0, 1, 1, 1])
    ts = np.array([1, 3, 5, 1, 2, 6])
    order = proof.side_by_side(partitions, ts)
    assert ts[order].tolist() == [1, 1, 2, 3, 5, 6]
