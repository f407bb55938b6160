"""A/B tests and several challengers: every bar has one forecast to act on, every rival its evidence."""

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from models.features import WARM_UP_BARS
from models.runtimes import open_runtime
from schemas.messages import BUCKETS, CHALLENGERS, SLOTS, Lifecycle, Share, Slot, bucket_of
from tests.workers.builders import MINUTE_MS, WARM_UP, make_bars, make_bundle, make_engine, rows_of
from tests.workers.test_verdicts import (
    CALM,
    SETTINGS,
    NamedJudge,
    Row,
    make_judge,
    make_record,
    make_rows,
    verdicts_on,
)
from workers.arms import draw
from workers.config import Settings
from workers.engine import Engine
from workers.errors import BundleUnavailable
from workers.lifecycle import free_slot
from workers.schedule import KEPT, Schedule
from workers.verdicts import GRACE_BARS, ROW, Decision, challenger_slots, level_of

SYMBOLS = [f"S{i}" for i in range(8)]
WARM_AT = WARM_UP_BARS + WARM_UP - 1
N = WARM_AT + 20
BARS = make_bars(SYMBOLS, N)
CHAMPION, B, C = make_bundle(seed=1), make_bundle(seed=2), make_bundle(seed=3)
FROM, UNTIL = WARM_AT + 5, WARM_AT + 15
PINNED = [7355, 4419, 4947]
"""Buckets of a salt and three symbols: another hash would move symbols between arms."""
HALF, REST = Share(salt="x", first=0, end=5_000), Share(salt="x", first=5_000, end=7_500)

Said = dict[tuple[str, int], set[tuple[str, str, str]]]
"""(bundle, role, arm) of everything said of a symbol's bar."""


def arm_record(version: str, share: Share) -> Lifecycle:
    record = make_record("champion", version).model_dump()
    return Lifecycle.model_validate({**record, "slot": "arm-b", "share": share.model_dump()})


def make_tested() -> Engine:
    engine = make_engine(CHAMPION, B, C)
    schedule = engine.schedules[0]
    schedule.give("arm-b", B.version, FROM * MINUTE_MS, HALF)
    schedule.give("arm-c", C.version, FROM * MINUTE_MS, REST)
    schedule.give("arm-b", None, UNTIL * MINUTE_MS)
    return engine


def run(engine: Engine, first: int, last: int, batch: int) -> Said:
    said: Said = defaultdict(set)
    while first < last:
        bars = rows_of(BARS, slice(first, min(first + batch, last)))
        processed = engine.process(bars, np.zeros(len(bars), np.int64))
        first += len(processed.status)
        for forecast in processed.forecasts:
            for row in forecast.rows.tolist():
                what = (forecast.bundle.version, forecast.role, forecast.arm)
                said[bars.symbols[row], int(bars.ts[row])].add(what)
    return said


def expected() -> Said:
    found: Said = {}
    for i in range(WARM_AT, N):
        for symbol in SYMBOLS:
            bucket = bucket_of("x", symbol)
            theirs = None
            if bucket < 5_000 and FROM <= i < UNTIL:
                theirs = (B.version, "champion", "b")
            elif 5_000 <= bucket < 7_500 and i >= FROM:
                theirs = (C.version, "champion", "c")
            ours = (CHAMPION.version, "control" if theirs else "champion", "a")
            found[symbol, i * MINUTE_MS] = {ours, theirs} if theirs else {ours}
    return found


@settings(max_examples=10, deadline=None)
@given(batch=st.integers(1, 300), cut=st.integers(0, len(BARS)))
def test_every_bar_has_the_same_arm_however_it_is_cut_and_restored(batch: int, cut: int) -> None:
    first, second = make_tested(), make_engine(CHAMPION, B, C)
    said = run(first, 0, cut, batch)
    second.load(0, *first.export(0))
    said |= run(second, cut, len(BARS), batch)
    assert said == expected()


def test_the_champion_speaks_for_an_arm_that_is_not_warm() -> None:
    engine = make_engine(CHAMPION)
    late = replace(B, config=B.config.model_copy(update={"warm_up_bars": WARM_UP + 4}))
    engine.add(open_runtime(late))
    share = Share(salt="x", first=0, end=BUCKETS)
    engine.schedules[0].give("arm-b", late.version, 0, share)
    said = run(engine, 0, len(BARS), 50)
    for (_, ts), what in said.items():
        assert sum(role == "champion" for _, role, _ in what) == 1
        assert ("b" in {arm for *_, arm in what}) == (ts >= (WARM_AT + 4) * MINUTE_MS)


def test_a_bucket_never_moves_and_a_share_is_what_it_says() -> None:
    assert [bucket_of("x", s) for s in ("SPY", "AAPL")] == [
        bucket_of("x", s) for s in ("SPY", "AAPL")
    ]
    names = [f"SYMBOL{i}" for i in range(20_000)]
    for salt in ("one", "another"):
        share = np.mean([bucket_of(salt, name) < 2_000 for name in names])
        assert share == pytest.approx(0.2, abs=0.012)  # four standard deviations
    both = np.mean([max(bucket_of("one", n), bucket_of("another", n)) < 2_000 for n in names])
    assert both == pytest.approx(0.04, abs=0.006)


def test_a_full_schedule_survives_json_and_fits_commit_metadata() -> None:
    schedule = Schedule(newest_ts=2**41)
    for slot in SLOTS:
        for i in range(KEPT + 1):
            share = Share(salt="f" * 16, first=9_998, end=9_999) if "arm" in slot else None
            schedule.give(slot, f"{i:016x}", 2**41 + i, share)
    assert Schedule.from_json(schedule.to_json()) == schedule
    assert len(schedule.to_json()) < 4_096


@given(st.floats(0.01, 0.6), st.floats(0.01, 0.6))
def test_two_arms_never_share_a_symbol(first: float, second: float) -> None:
    slot, share = draw({}, first, "salt")
    held: dict[Slot, Lifecycle] = {slot: arm_record("v2", share)}
    try:
        other, beside = draw(held, second, "another")
    except BundleUnavailable:
        assert first + second > 0.999
        return
    assert (other, beside.salt, beside.first) == ("arm-c", "salt", share.end)
    with pytest.raises(BundleUnavailable, match="taken"):
        draw({**held, other: arm_record("v3", beside)}, 0.01, "salt")


def test_a_new_challenger_takes_a_free_slot_until_none_is() -> None:
    held: dict[Slot, Lifecycle] = {}
    for expected_slot in ("challenger", "challenger-2", "challenger-3", None):
        found = free_slot(held, Settings())
        assert found == expected_slot
        if found is not None:
            held[found] = make_record(found, found)
    assert free_slot(held, Settings(), "fine_tune") is None
    assert free_slot(held, Settings(), "weights") == "weights"
    assert free_slot({"weights": make_record("weights", "v9")}, Settings(), "weights") is None


# ---- the judge ----

LONG = SETTINGS.model_copy(update={"max_shadow_bars": 9_999})


@given(max_challengers=st.integers(1, 4))
def test_the_slots_share_the_declared_rate_of_false_promotions(max_challengers: int) -> None:
    monitor = LONG.model_copy(update={"max_challengers": max_challengers})
    levels = [level_of(monitor, slot) for slot in challenger_slots(monitor)]
    assert sum(levels) == pytest.approx(monitor.alpha)
    assert levels == sorted(levels, reverse=True)


def test_of_two_that_win_only_one_is_promoted_over_the_same_champion() -> None:
    judge = make_judge(challenger="v2", monitor=LONG)
    judge.follow(make_record("challenger-2", "v3"), None)
    rng = np.random.default_rng(0)
    rows = make_rows([0.0] * 900)
    for version in ("v2", "v3"):
        rows += make_rows((rng.normal(0, 0.2, 900) - 0.8).tolist(), "challenger", version)
    rows.sort(key=lambda row: row[2])
    (decision,) = [v for v in verdicts_on(judge, rows) if isinstance(v, Decision)]
    assert decision.evidence.verdict == "promote"
    assert decision.evidence.e_better >= 1 / level_of(LONG, decision.slot)
    judge.follow(make_record("champion", decision.rival, 900 * MINUTE_MS), CALM)
    judge.follow(make_record(decision.slot, None), None)
    assert [each.bars for *_, each in judge.evidence.values()] == [0]  # against the new one, anew


def test_an_arm_is_ended_where_it_is_worse_and_never_promoted_by_itself() -> None:
    for loss, ended in ((0.8, True), (-0.8, False)):
        judge = make_judge(monitor=LONG)
        judge.follow(arm_record("v2", HALF), None)
        noise = np.random.default_rng(0).normal(0, 0.3, 600)
        control = make_rows([0.0] * 600, "control", symbols=[(0, "A")])
        beside = make_rows([0.0] * 600, symbols=[(1, "B")])
        rows = sorted(control + beside, key=lambda row: row[2])
        arm = make_rows((noise + loss).tolist(), "champion", "v2", symbols=[(0, "A")])
        found = []
        for i in range(0, 600, 7):
            judge.take(rows[2 * i : 2 * i + 14])
            judge.add(of_arm(judge, arm[i : i + 7]))
            found += [v for v in judge.verdicts() if isinstance(v, Decision)]
        assert [(v.slot, v.evidence.verdict) for v in found] == (
            [("arm-b", "refuse")] if ended else []
        )


def of_arm(judge: NamedJudge, rows: Sequence[Row]) -> NDArray[np.void]:
    holder = judge.holder("v2", "champion", "b")
    return np.array(
        [
            (ts, matured, p, judge.symbol(p, name), holder, *losses)
            for p, name, ts, matured, _, _, losses in rows
        ],
        ROW,
    )


@pytest.mark.parametrize("cut", [1, 50, 120])
def test_a_pair_that_a_poll_cuts_apart_is_not_lost(cut: int) -> None:
    judge = make_judge(challenger="v2", monitor=LONG)
    noise = np.random.default_rng(0).normal(0, 0.3, 240).tolist()
    ours, theirs = make_rows([0.0] * 240), make_rows(noise, "challenger", "v2")
    for first in range(0, 480, 240):  # two transactions, of which each is read in two polls
        block, other = ours[first : first + 240], theirs[first : first + 240]
        judge.take(block + other[:cut])
        list(judge.verdicts())
        judge.take(other[cut:])
        list(judge.verdicts(whole=(0, 1)))
    ((_, _, evidence),) = judge.evidence.values()
    assert judge.dropped["late"] == 0
    assert evidence.bars == 240 - 1 - GRACE_BARS


def test_the_state_of_every_rival_fits_into_the_metadata_of_an_offset() -> None:
    judge = make_judge(challenger="0" * 16, monitor=LONG)
    names = [f"{i}" * 16 for i in range(len(CHALLENGERS))]
    rows = make_rows([0.3] * 60)
    for slot, name in zip(CHALLENGERS, names, strict=True):
        judge.follow(make_record(slot, name), None)
        rows += make_rows(np.random.default_rng(0).normal(0, 1, 60).tolist(), "challenger", name)
    verdicts_on(judge, sorted(rows, key=lambda row: row[2]), batch=600)
    assert len(json.dumps(judge.to_json())) < 4_096
