"""The judge: the same verdicts however partitions interleave and wherever it was restarted."""

import json
from collections.abc import Sequence
from functools import partial
from itertools import chain
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.drift import Calibration
from schemas.messages import Arm, Lifecycle, Role, Slot
from tests.workers.builders import MINUTE_MS
from workers.config import MonitorSettings
from workers.joining import Holder
from workers.verdicts import ROW, Decision, Judge
from workers.watch import Alarm

CALM = Calibration(
    low=-9.0,
    high=9.0,
    mean=0.0,
    sd=1.0,
    correlation=1.0,
    threshold=6.0,
    arl0_bars=1_000,
    block_bars=10,
    n=1_000,
)
SETTINGS = MonitorSettings(cool_down_bars=20, max_shadow_bars=150, probation_bars=50)

Row = tuple[int, str, int, int, str, Role, tuple[float, float]]


def make_record(
    slot: Slot,
    bundle: str | None,
    effective_ts: int = 0,
    parent: str | None = None,
    probation: int = 0,
) -> Lifecycle:
    return Lifecycle(
        slot=slot,
        bundle=bundle,
        uri=bundle and "somewhere",
        sha256=bundle and "0",
        parent=parent,
        effective_ts=effective_ts,
        reason="",
        evidence={"probation_bars": probation},
        actor="",
        issued_at=0,
    )


class NamedJudge(Judge):
    """Takes outcomes by their names."""

    def __init__(self, monitor: MonitorSettings = SETTINGS) -> None:
        self.names: list[tuple[int, str]] = []
        self.known: list[Holder] = []
        super().__init__(monitor, MINUTE_MS, self.names, self.known)

    def symbol(self, partition: int, name: str) -> int:
        return _place(self.names, (partition, name))

    def holder(self, bundle: str, role: Role, arm: Arm = "a") -> int:
        return _place(self.known, Holder(bundle, role, arm))

    def take(self, rows: Sequence[Row]) -> None:
        self.add(
            np.array(
                [
                    (ts, matured_ts, p, self.symbol(p, name), self.holder(bundle, role), *losses)
                    for p, name, ts, matured_ts, bundle, role, losses in rows
                ],
                ROW,
            )
        )


def _place(known: list[Any], wanted: Any) -> int:
    if wanted not in known:
        known.append(wanted)
    return int(known.index(wanted))


def make_judge(
    champion: Lifecycle | None = None,
    challenger: str | None = None,
    monitor: MonitorSettings = SETTINGS,
    calibration: Calibration = CALM,
) -> NamedJudge:
    judge = NamedJudge(monitor)
    judge.follow(champion or make_record("champion", "v1"), calibration)
    if challenger is not None:
        judge.follow(make_record("challenger", challenger), None)
    return judge


def make_rows(
    losses: Sequence[float],
    role: Role = "champion",
    bundle: str = "v1",
    symbols: Sequence[tuple[int, str]] = ((0, "A"), (1, "B")),
    start: int = 0,
) -> list[Row]:
    """One outcome of each symbol and bar time; the reference loses nothing."""
    return [
        (partition, symbol, ts * MINUTE_MS, (ts + 5) * MINUTE_MS, bundle, role, (loss, 0.0))
        for ts, loss in enumerate(losses, start)
        for partition, symbol in symbols
    ]


def verdicts_on(judge: NamedJudge, rows: Sequence[Row], batch: int = 7) -> list[Alarm | Decision]:
    found: list[Alarm | Decision] = []
    for i in range(0, len(rows), batch):
        judge.take(rows[i : i + batch])
        found += judge.verdicts()
    return found


QUIET = [0.0] * 40
BAD = [1.5] * 40


def test_an_alarm_names_since_when_how_much_and_whom() -> None:
    (alarm, *_) = verdicts_on(make_judge(), make_rows(QUIET + BAD))
    assert isinstance(alarm, Alarm)
    assert alarm.since_ts == 40 * MINUTE_MS
    assert alarm.ts == 44 * MINUTE_MS
    assert alarm.statistic > alarm.threshold == 6.0
    assert alarm.excess_loss == pytest.approx(1.5)
    assert set(alarm.symbols) == {"A", "B"}
    assert alarm.roll_back_to is None


def test_an_alarm_whose_time_has_come_is_raised_again_below_the_threshold_if_things_get_worse() -> (
    None
):
    monitor = SETTINGS.model_copy(update={"repeat_bars": 30, "cool_down_bars": 100})
    for after, said in ((0.3, [0, 1]), (0.0, [0])):
        losses = [*QUIET, *[1.5] * 6, *[after] * 50]
        alarms = verdicts_on(make_judge(monitor=monitor), make_rows(losses))
        assert [alarm.repeats for alarm in alarms if isinstance(alarm, Alarm)] == said
        for alarm in alarms:
            assert isinstance(alarm, Alarm)
            assert alarm.statistic > alarm.threshold, "the highest since it is open"


def test_an_alarm_is_raised_once_until_it_is_over_and_again_at_twice_as_many_bars() -> None:
    monitor = SETTINGS.model_copy(update={"repeat_bars": 50})
    said = verdicts_on(make_judge(monitor=monitor), make_rows([1.5] * 250))
    lasting = [alarm for alarm in said if isinstance(alarm, Alarm)]
    assert [alarm.repeats for alarm in lasting] == [0, 1, 2, 3]
    assert {alarm.since_ts for alarm in lasting} == {0}
    first, *again = [alarm.bars for alarm in lasting]
    assert first == lasting[0].ts // MINUTE_MS + 1
    for n, due in zip(again, (50, 2 * again[0], 2 * again[1]), strict=True):
        assert due <= n < due + 10
    over = verdicts_on(make_judge(monitor=monitor), make_rows(BAD[:10] + QUIET + BAD[:20]))
    assert [a.repeats for a in over if isinstance(a, Alarm)] == [0, 0]


@pytest.mark.parametrize(("gain", "refused"), [(-0.3, ["challenger"]), (0.3, [])])
def test_where_an_alarm_lasts_a_challenger_that_is_not_ahead_makes_room(
    gain: float, refused: list[str]
) -> None:
    monitor = SETTINGS.model_copy(update={"repeat_bars": 30})
    judge = make_judge(challenger="v2", monitor=monitor)
    noise = np.random.default_rng(0).normal(0, 1.5, 45)
    theirs = (1.5 - gain + noise - noise.mean()).tolist()
    rows = make_rows([1.5] * 45) + make_rows(theirs, "challenger", "v2")
    said = verdicts_on(judge, sorted(rows, key=lambda row: row[2]))
    first = next(v for v in said if isinstance(v, Decision) or v.repeats)
    assert [v.slot for v in said if isinstance(v, Decision)] == refused
    assert isinstance(first, Decision) == bool(refused), "before the alarm that it makes room for"


def test_an_alarm_names_the_symbols_that_are_worse_by_themselves_and_how_bad_they_are() -> None:
    symbols = [(i % 2, f"S{i:02d}") for i in range(20)]
    rng = np.random.default_rng(0)
    rows = []
    for row in make_rows([0.0] * 200, symbols=symbols):
        bad = 3.0 if row[1] in ("S03", "S04") and row[2] >= 100 * MINUTE_MS else 0.0
        rows.append((*row[:6], (rng.normal(0, 0.5) + bad, 0.0)))
    calm = CALM.model_copy(update={"correlation": 0.3, "symbol_scale": 0.8})
    (alarm, *_) = verdicts_on(make_judge(calibration=calm), rows, batch=40)
    assert isinstance(alarm, Alarm)
    assert set(alarm.symbols) == {"S03", "S04"}
    assert all(2.5 < excess < 3.5 for excess in alarm.symbols.values())


def test_another_detector_is_used_where_the_bundle_is_calibrated_for_it() -> None:
    monitor = SETTINGS.model_copy(update={"detector": "shiryaev_roberts"})
    (alarm, *_) = verdicts_on(make_judge(monitor=monitor), make_rows(QUIET + BAD))
    assert isinstance(alarm, Alarm)
    assert alarm.detector == "cusum"
    calm = CALM.model_copy(update={"thresholds": {"shiryaev_roberts": 5.0}})
    judge = make_judge(monitor=monitor, calibration=calm)
    (alarm, *_) = verdicts_on(judge, make_rows(QUIET + BAD))
    assert isinstance(alarm, Alarm)
    assert (alarm.detector, alarm.threshold) == ("shiryaev_roberts", 5.0)


def test_on_probation_the_alarm_is_stricter_comes_once_and_asks_for_the_parent() -> None:
    promoted = make_record("champion", "v2", parent="v1", probation=50)
    alarms = verdicts_on(make_judge(promoted), make_rows([1.5] * 80, bundle="v2"))
    assert [alarm.roll_back_to for alarm in alarms if isinstance(alarm, Alarm)] == ["v1"]
    assert isinstance(alarms[0], Alarm)
    assert alarms[0].threshold == 3.0


def test_after_probation_the_parent_stays_away() -> None:
    promoted = make_record("champion", "v2", parent="v1", probation=50)
    (alarm, *_) = verdicts_on(make_judge(promoted), make_rows([0.0] * 60 + BAD, bundle="v2"))
    assert isinstance(alarm, Alarm)
    assert alarm.roll_back_to is None


def test_a_better_challenger_is_promoted_a_worse_one_refused_each_once() -> None:
    rng = np.random.default_rng(0)
    for gain, verdict in ((0.8, "promote"), (-0.8, "refuse")):
        judge = make_judge(
            challenger="v2", monitor=SETTINGS.model_copy(update={"max_shadow_bars": 9999})
        )
        noise = rng.normal(0, 0.3, 1_200)
        rows = make_rows((noise - gain).tolist(), "challenger", "v2") + make_rows([0.0] * 1_200)
        rows.sort(key=lambda row: row[2])
        (decision,) = [v for v in verdicts_on(judge, rows) if isinstance(v, Decision)]
        assert (decision.rival, decision.evidence.verdict) == ("v2", verdict)


def test_a_challenger_without_evidence_is_refused_in_the_end() -> None:
    judge = make_judge(challenger="v2")
    rows = make_rows([0.0] * 200, "challenger", "v2") + make_rows([0.0] * 200)
    rows.sort(key=lambda row: row[2])
    (decision,) = verdicts_on(judge, rows)
    assert isinstance(decision, Decision)
    assert decision.evidence.bars == SETTINGS.max_shadow_bars


def test_only_the_holders_of_the_slots_are_weighed_and_only_from_their_time_on() -> None:
    judge = make_judge(make_record("champion", "v1", effective_ts=50 * MINUTE_MS))
    assert verdicts_on(judge, make_rows([9.0] * 40)) == []
    assert verdicts_on(judge, make_rows([9.0] * 40, bundle="v0", start=60)) == []
    assert verdicts_on(judge, make_rows(BAD, start=100)) != []


def test_a_symbol_that_is_not_watched_has_no_say() -> None:
    judge = make_judge(monitor=SETTINGS.model_copy(update={"watch": ("A",)}))
    rows = make_rows(QUIET, symbols=[(0, "A")]) + make_rows([9.0] * 40, symbols=[(1, "B")])
    assert verdicts_on(judge, sorted(rows, key=lambda row: row[2])) == []


@settings(deadline=None, max_examples=25)
@given(st.randoms(use_true_random=False), st.integers(1, 60))
def test_verdicts_do_not_depend_on_how_partitions_interleave(random: Random, batch: int) -> None:
    rng = np.random.default_rng(3)
    losses = (rng.normal(0, 0.3, 40).tolist()) + (rng.normal(1.2, 0.3, 40).tolist())
    by_partition = [make_rows(losses, symbols=[(p, s)]) for p, s in ((0, "A"), (1, "B"), (2, "C"))]
    expected = verdicts_on(make_judge(), sorted(chain(*by_partition), key=lambda row: row[2]))
    queues, merged = [list(rows) for rows in by_partition], []
    while any(queues):
        queue = random.choice([q for q in queues if q])
        n = random.randint(1, 120)  # whole partitions at a time, too
        merged += queue[:n]
        del queue[:n]
    judge = make_judge()
    judge.load("", (0, 1, 2))
    judge.follow(make_record("champion", "v1"), CALM)
    assert verdicts_on(judge, merged, batch) == expected


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 160), st.integers(0, 160))
def test_a_restart_at_any_row_changes_no_verdict(cut: int, snapshot: int) -> None:
    """State is committed at `cut`; pooled rows come from an older snapshot and a replay."""
    snapshot, cut = sorted((snapshot, cut))
    rng = np.random.default_rng(4)
    champion = make_rows((rng.normal(0, 0.5, 40).tolist()) + (rng.normal(1.5, 0.5, 40).tolist()))
    shadow = make_rows(rng.normal(0, 0.5, 80).tolist(), "challenger", "v2")
    rows = sorted(champion + shadow, key=lambda row: row[2])
    expected = verdicts_on(make_judge(challenger="v2"), rows, batch=1)

    first = make_judge(challenger="v2")
    found = verdicts_on(first, rows[:snapshot], batch=1)
    exported = {p: first.export(p) for p in (0, 1)}
    found += verdicts_on(first, rows[snapshot:cut], batch=1)
    second = NamedJudge()
    second.load(first.to_json(), (0, 1))
    second.follow(make_record("champion", "v1"), CALM)
    second.follow(make_record("challenger", "v2"), None)
    for partition, (arrays, meta) in exported.items():
        meta = json.loads(json.dumps(meta))
        second.load_partition(
            partition, arrays, meta, partial(second.symbol, partition), second.holder
        )
    if cut > snapshot:
        second.take(rows[snapshot:cut])
    found += verdicts_on(second, rows[cut:], batch=1)
    assert found == expected


def test_its_state_fits_into_the_metadata_of_an_offset() -> None:
    symbols = [(0, f"{i:064d}") for i in range(300)]
    judge = make_judge(challenger="f" * 16)
    rows = make_rows([0.6] * 8, symbols=symbols) + make_rows(
        [0.3] * 8, "challenger", "f" * 16, symbols
    )
    verdicts_on(judge, sorted(rows, key=lambda row: row[2]), batch=600)
    assert len(judge.to_json()) < 3_000


def test_a_partition_is_waited_for_unless_it_is_idle_and_others_than_watched_symbols_count() -> (
    None
):
    watching = SETTINGS.model_copy(update={"watch": ("A",)})
    judge = NamedJudge(watching)
    judge.load("", (0, 1, 2))
    judge.follow(make_record("champion", "v1"), CALM)
    assert verdicts_on(judge, make_rows(QUIET + BAD, symbols=[(0, "A")])) == []
    assert list(judge.verdicts(idle={2})) == []
    assert verdicts_on(judge, make_rows(QUIET, symbols=[(1, "B")])) == []
    assert list(judge.verdicts(idle={2})) == []
    (alarm, *_) = judge.verdicts(idle={1, 2})
    assert isinstance(alarm, Alarm)
    assert alarm.since_ts == 40 * MINUTE_MS


def test_where_every_partition_is_idle_nobody_is_waited_for() -> None:
    judge = NamedJudge()
    judge.load("", (0, 1))
    judge.follow(make_record("champion", "v1"), CALM)
    assert verdicts_on(judge, make_rows(BAD, symbols=[(0, "A")])) == []
    assert list(judge.verdicts(idle={0, 1})) != []
