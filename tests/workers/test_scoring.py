"""What the judge goes by is the same however the topics are read, and what the calibration went by."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models import baselines
from models.bundle import Bundle
from models.running_loss import running_losses
from models.targets import Target
from schemas.codecs import BarColumns, PredictionColumns
from tests.workers.builders import MINUTE_MS, make_bars, make_bundle
from tests.workers.joins import columns_of, merged, some_of, take
from workers.joining import Holder, Join
from workers.scoring import FORGOTTEN_AFTER_MS, Scorer
from workers.verdicts import Rows

TARGET, OTHER = Target(kind="volatility", horizon=3), Target(kind="return", horizon=2)
BUNDLES = {
    bundle.version: bundle
    for bundle in (make_bundle(seed, targets=(TARGET, OTHER)) for seed in (0, 1))
}
FIRST, SECOND = BUNDLES
HOLDERS = (Holder(FIRST, "champion"), Holder(SECOND, "challenger"), Holder(SECOND, "champion", "b"))
SPEC = BUNDLES[FIRST].config.features
SYMBOLS = ["A", "B", "C"]
N_BARS = 14
BARS = make_bars(SYMBOLS, N_BARS)

Found = dict[tuple[str, int, Holder], tuple[float, float]]


def value_of(holder: Holder, symbol: str, ts: int) -> float:
    return -14.0 + HOLDERS.index(holder) / 3 + SYMBOLS.index(symbol) / 5 + ts / MINUTE_MS % 5 / 10


PREDICTIONS = columns_of(
    [
        (symbol, ts, target.name, value_of(holder, symbol, ts), *holder)
        for holder in HOLDERS
        for target in (TARGET, OTHER)
        for symbol, ts in zip(BARS.symbols, BARS.ts.tolist(), strict=True)
    ]
)


def make_scorer(bundles: dict[str, Bundle] = BUNDLES) -> tuple[Join, Scorer]:
    join = Join(SPEC, (TARGET, OTHER), running=TARGET)
    return join, Scorer(join, TARGET, bundles.get)


def found_in(join: Join, rows: Rows) -> Found:
    keys = [
        (join.symbols[row["symbol"]][1], int(row["ts"]), join.holders[row["holder"]])
        for row in rows
    ]
    assert len(set(keys)) == len(keys)
    return dict(zip(keys, zip(rows["loss"], rows["reference_loss"], strict=True), strict=True))


def offline() -> Found:
    found: Found = {}
    for symbol in SYMBOLS:
        own = [i for i, name in enumerate(BARS.symbols) if name == symbol]
        ts, ohlcv = BARS.ts[own], BARS.ohlcv[own]
        variances = baselines.history(SPEC, ts, ohlcv[:, 3])
        for holder in HOLDERS:
            reference = BUNDLES[holder.bundle].config.references[0].forecast(TARGET, variances)
            said = np.array([value_of(holder, symbol, each) for each in ts.tolist()])
            losses = running_losses(TARGET, SPEC, ts, ohlcv, np.stack([said, reference], axis=1))
            for each, pair in zip(ts.tolist(), losses.tolist(), strict=True):
                if np.isfinite(pair).all():
                    found[symbol, each, holder] = (pair[0], pair[1])
    return found


def running(join: Join, scorer: Scorer, step: BarColumns | PredictionColumns) -> Found:
    outcomes = take(join, step)
    return found_in(join, scorer.running(outcomes[outcomes["target"] == 2]))


@settings(deadline=None, max_examples=40)
@given(merged(BARS, PREDICTIONS, most=60), st.data())
def test_any_interleaving_and_a_restart_anywhere_give_what_the_offline_pipeline_gives(
    steps: list[BarColumns | PredictionColumns], data: st.DataObject
) -> None:
    restart_at = data.draw(st.integers(0, len(steps)))
    join, scorer = make_scorer()
    found: Found = {}
    for i, step in enumerate(steps):
        if i == restart_at:
            joined, scored = join.export(0), scorer.export(0)
            join, scorer = make_scorer()
            take(join, make_bars(["Z"], 1))  # another slot for everybody
            join.load(0, *joined)
            scorer.load(0, *scored)
        new = running(join, scorer, step)
        assert not found.keys() & new.keys()
        found |= new
    expected = offline()
    assert len(expected) > 3 * 3 * (N_BARS - 6)
    assert found.keys() == expected.keys()
    for key, pair in expected.items():
        assert found[key] == pytest.approx(pair)


def test_what_is_scored_bar_by_bar_is_not_counted_or_published_twice() -> None:
    join, plain = make_scorer()[0], Join(SPEC, (TARGET, OTHER))
    found = []
    for one in (join, plain):
        outcomes = np.concatenate([take(one, PREDICTIONS), take(one, BARS)])
        found.append(outcomes[outcomes["target"] < 2])
        assert one.dropped == {}
    for name in found[0].dtype.names or ():
        np.testing.assert_array_equal(found[0][name], found[1][name])


def test_a_bundle_that_cannot_be_read_has_no_running_loss() -> None:
    join, scorer = make_scorer({FIRST: BUNDLES[FIRST]})
    take(join, PREDICTIONS)
    assert {holder for _, _, holder in running(join, scorer, BARS)} == {HOLDERS[0]}


def test_a_dropped_partition_begins_anew() -> None:
    join, scorer = make_scorer()
    take(join, PREDICTIONS)
    assert running(join, scorer, BARS)
    scorer.drop(0)
    join.drop(0)
    take(join, some_of(PREDICTIONS, slice(0, len(BARS))))
    first = min(ts for _, ts, _ in running(join, scorer, BARS))
    assert first == min(ts for _, ts, _ in offline())
    assert len(scorer.export(0)[1]["names"]) == len(SYMBOLS)


def test_who_has_long_said_nothing_is_not_kept() -> None:
    join, scorer = make_scorer()
    take(join, PREDICTIONS)
    running(join, scorer, BARS)
    late = make_bars(SYMBOLS, 6, start_ts=2 * FORGOTTEN_AFTER_MS)
    rows = [
        (symbol, ts, TARGET.name, -14.0, *HOLDERS[0])
        for symbol, ts in zip(late.symbols, late.ts.tolist(), strict=True)
    ]
    take(join, columns_of(rows))
    running(join, scorer, late)
    _, meta = scorer.export(0)
    assert {tuple(holder) for holder in meta["holders"]} == {tuple(HOLDERS[0])}


def test_a_target_whose_loss_does_not_run_up_is_judged_when_it_matures() -> None:
    join = Join(SPEC, (TARGET, OTHER))
    scorer = Scorer(join, OTHER, BUNDLES.get)
    take(join, PREDICTIONS)
    outcomes = take(join, BARS)
    rows = scorer.matured(outcomes, *scorer.losses(outcomes))
    assert len(rows) == int((outcomes["target"] == 1).sum()) > 0
    assert (rows["matured_ts"] > rows["ts"]).all()
    assert set(rows["partition"]) == {0}
