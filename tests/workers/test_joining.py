"""Every prediction meets its label once, however the two topics are read and wherever one restarts."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.features import FeatureSpec
from models.targets import Target, labels
from schemas.codecs import BarColumns, PredictionColumns
from tests.workers.builders import MINUTE_MS, make_bars, rows_of
from tests.workers.joins import Key, columns_of, joined_of, merged, take, take_from
from workers import joining
from workers.joining import Holder, Join, Outcomes

SPEC = FeatureSpec(interval_ms=MINUTE_MS)
TARGETS = (Target(kind="volatility", horizon=3), Target(kind="return", horizon=2))
SYMBOLS = ["A", "B", "C"]
N_BARS = 14


def make_predictions(
    bars: BarColumns, holders: Sequence[Holder] = (Holder("v1", "champion"),)
) -> PredictionColumns:
    """For each bar in order, one row for each role and target, as the inference worker writes them."""
    rows = [
        (symbol, ts, target.name, float(i), *holder)
        for holder in holders
        for target in TARGETS
        for i, (symbol, ts) in enumerate(zip(bars.symbols, bars.ts.tolist(), strict=True))
    ]
    return columns_of(rows)


def keys(join: Join, outcomes: Outcomes) -> list[Key]:
    """What the outcomes are of, as the reference join names it."""
    return [
        (
            join.symbols[o["slot"]][1],
            int(o["ts"]),
            TARGETS[o["target"]].name,
            *join.holders[o["holder"]],
        )
        for o in outcomes
    ]


ROLES = (Holder("v1", "champion"), Holder("v2", "challenger"), Holder("v2", "champion", "b"))


def interleavings() -> st.SearchStrategy[list[BarColumns | PredictionColumns]]:
    bars = make_bars(SYMBOLS, N_BARS)
    return merged(bars, make_predictions(bars, ROLES), most=40)


@settings(deadline=None, max_examples=40)
@given(interleavings())
def test_any_interleaving_gives_what_dictionaries_would_join(
    steps: list[BarColumns | PredictionColumns],
) -> None:
    join = Join(SPEC, TARGETS)
    found: dict[Key, tuple[float, float]] = {}
    for step in steps:
        outcomes = take(join, step)
        assert not found.keys() & set(keys(join, outcomes))
        values = zip(outcomes["value"].tolist(), outcomes["label"].tolist(), strict=True)
        found |= dict(zip(keys(join, outcomes), values, strict=True))
    bars = make_bars(SYMBOLS, N_BARS)
    expected = joined_of(SPEC, TARGETS, bars, make_predictions(bars, ROLES))
    assert len(expected) == (N_BARS - 3 + N_BARS - 2) * len(SYMBOLS) * len(ROLES)
    assert found.keys() == expected.keys()
    for key, pair in expected.items():
        assert found[key] == pytest.approx(pair)
    assert join.waiting() == (3 + 2) * len(SYMBOLS) * len(ROLES)


@settings(deadline=None, max_examples=30)
@given(interleavings(), st.data())
def test_a_restart_from_any_snapshot_neither_loses_nor_doubles(
    steps: list[BarColumns | PredictionColumns], data: st.DataObject
) -> None:
    """Published before the crash, plus published after a silent replay in another order: each once."""
    snapshot_at = data.draw(st.integers(0, len(steps)))
    committed_at = data.draw(st.integers(snapshot_at, len(steps)))
    first = Join(SPEC, TARGETS)
    published = []
    state: tuple[dict[str, Any], dict[str, Any]] | None = None
    for i, step in enumerate(steps[:committed_at]):
        if i == snapshot_at:
            state = first.export(0)
        published += keys(first, take(first, step))
    if snapshot_at == committed_at:
        state = first.export(0)
    assert state is not None

    second = Join(SPEC, TARGETS)
    second.load(0, *state)
    replayed = steps[snapshot_at:committed_at]
    bars_first = sorted(replayed, key=lambda step: isinstance(step, PredictionColumns))
    for step in bars_first:
        assert not take(second, step, live=False)["live"].any()
    for step in steps[committed_at:]:
        outcomes = take(second, step)
        assert outcomes["live"].all()
        published += keys(second, outcomes)
    undisturbed = Join(SPEC, TARGETS)
    expected = [key for step in steps for key in keys(undisturbed, take(undisturbed, step))]
    assert sorted(published) == sorted(expected)


def test_one_live_message_of_two_makes_news_of_an_outcome() -> None:
    bars = make_bars(["A"], 5)
    for prediction_live in (False, True):
        join = Join(SPEC, TARGETS)
        take(join, make_predictions(rows_of(bars, slice(0, 1))), live=prediction_live)
        outcomes = take(join, bars, live=not prediction_live)
        assert outcomes["live"].tolist() == [True, True]


def test_labels_are_those_of_the_offline_pipeline_and_references_those_of_the_bar() -> None:
    bars = make_bars(["A"], N_BARS, seed=3)
    join = Join(SPEC, TARGETS)
    take(join, make_predictions(bars))
    outcomes = take(join, bars)
    offline = labels(TARGETS, SPEC, bars.ts, bars.ohlcv)
    for ts, target, label in outcomes[["ts", "target", "label"]].tolist():
        assert label == pytest.approx(offline[ts // MINUTE_MS, target])
    assert np.isnan(outcomes["log_variances"][outcomes["ts"] == 0]).all()
    assert np.isfinite(outcomes["log_variances"][outcomes["ts"] > 0]).all()


def test_a_repeated_prediction_is_joined_once() -> None:
    bars = make_bars(["A"], 6)
    predictions = make_predictions(bars)
    join = Join(SPEC, TARGETS)
    take(join, predictions)
    take(join, predictions)
    assert len(take(join, bars)) == 3 + 4
    assert len(take(join, predictions)) == 0
    assert join.dropped["repeated"] > 0


def test_a_prediction_whose_label_is_undefined_is_given_up() -> None:
    bars = make_bars(["A"], 8)
    bars.ohlcv[:5] = 100.0  # nothing moves: no log variance
    join = Join(SPEC, TARGETS)
    take(join, make_predictions(bars))
    outcomes = take(join, bars)
    volatile = outcomes["ts"][outcomes["target"] == 0]
    assert volatile.tolist() == [2 * MINUTE_MS, 3 * MINUTE_MS, 4 * MINUTE_MS]
    assert join.dropped["unlabelled"] == 2


def test_an_unknown_target_is_counted() -> None:
    join = Join(SPEC, TARGETS)
    take(join, columns_of([("A", 0, "skew_9", 0.0, "v1", "champion", "a")]))
    assert join.dropped == {"unknown_target": 1}
    assert join.waiting() == 0


def test_late_repeated_and_corrected_bars_are_counted_and_change_no_outcome() -> None:
    bars = make_bars(["A"], 8)
    disturbed = rows_of(bars, np.array([0, 1, 1, 0, 2, 2, 3, 4, 5, 6, 7]))
    disturbed.ohlcv[5] *= 1.5
    join, calm = Join(SPEC, TARGETS), Join(SPEC, TARGETS)
    for one in (join, calm):
        take(one, make_predictions(bars))
    np.testing.assert_equal(take(join, disturbed).tolist(), take(calm, bars).tolist())
    assert join.dropped == {"duplicate": 1, "late": 1, "corrected": 1}


def test_the_same_symbol_in_two_partitions_is_two_symbols_and_one_can_go() -> None:
    bars = make_bars(["A", "A"], 8)
    partitions = np.array([0, 1] * 8)
    twice = BarColumns(bars.symbols, bars.ts, bars.ohlcv)
    join = Join(SPEC, TARGETS)
    take_from(
        join, columns_of([("A", 0, "return_2", 0.0, "v1", "champion", "a")] * 2), np.array([0, 1])
    )
    outcomes = take_from(join, twice, partitions)
    assert [join.symbols[slot] for slot in outcomes["slot"]] == [(0, "A"), (1, "A")]
    join.drop(0)
    take_from(
        join,
        columns_of([("A", 9 * MINUTE_MS, "return_2", 0.0, "v1", "champion", "a")]),
        np.array([1]),
    )
    assert join.waiting() == 1


def test_slots_of_a_dropped_partition_start_anew() -> None:
    join = Join(SPEC, TARGETS)
    bars = make_bars(["A"], 8)
    take(join, bars)
    join.drop(0)
    take(join, make_predictions(rows_of(bars, slice(0, 1))))
    assert len(take(join, rows_of(bars, slice(0, 4)))) == 2


def test_labels_are_forgotten_once_predictions_have_passed_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(joining, "STRAGGLERS", 10)
    join = Join(SPEC, TARGETS)
    bars = make_bars(["A"], 60)
    take(join, bars)
    assert len(join.export(0)[0]["kept/label"]) == 57 + 58
    for i in range(60):
        take(join, make_predictions(rows_of(bars, slice(i, i + 1))))
    assert len(join.export(0)[0]["kept/label"]) < 25


def test_a_snapshot_of_other_targets_does_not_fit() -> None:
    join = Join(SPEC, TARGETS)
    meta = join.export(0)[1]
    assert join.fits(meta)
    assert not Join(SPEC, TARGETS[:1]).fits(meta)
    assert not Join(FeatureSpec(interval_ms=2 * MINUTE_MS), TARGETS).fits(meta)


def test_a_long_backlog_in_one_batch_has_the_references_of_each_bar() -> None:
    bars = make_bars(["A", "B"], 500)
    at_once, one_by_one = Join(SPEC, TARGETS), Join(SPEC, TARGETS)
    for join in (at_once, one_by_one):
        take(join, make_predictions(bars))
    whole = take(at_once, bars)
    parts = [take(one_by_one, rows_of(bars, slice(i, i + 2))) for i in range(0, 1000, 2)]

    def in_order(*several: Outcomes) -> Outcomes:
        return np.sort(np.concatenate(several), order=["slot", "target", "ts"])

    np.testing.assert_equal(in_order(whole).tolist(), in_order(*parts).tolist())
