"""An ensemble is a bundle like any other: it survives the disk, is served, retrained and refused when damaged."""

import json
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pandas as pd
import pytest
import torch
from numpy.typing import NDArray

from models import ensemble
from models.blending import (
    MEMBERS,
    SHRINKAGE,
    SHRINKING,
    EnsembleConfig,
    Weighting,
    of_member,
)
from models.bundle import Bundle, BundleRejected, load, save
from models.dataset import histories, load_bars
from models.features import F, FeatureSpec
from models.pipeline import FINE_TUNING, Recipe, fine_tune, forecast, score
from models.remedy import WEIGHTS_SHARE, choose, recent_excess
from models.replay import replay
from models.runtimes import open_runtime, sequence_member
from models.runtimes.ensemble import others
from models.scoring import Floats
from models.simulation import Scenario, Simulator
from models.splits import Span
from models.targets import Target
from models.training import TrainingConfig
from workers.engine import Engine
from workers.offline import engine_for, predict

Ints = NDArray[np.int64]

MINUTE_MS = 60_000
START_TS = 1_500_000_000_000
SPEC = FeatureSpec(interval_ms=MINUTE_MS)
TARGETS = (
    Target(kind="volatility", horizon=10),
    Target(kind="direction", horizon=5),
    Target(kind="direction", horizon=5, classes=3),
)
RECIPE = Recipe(
    network={"hidden": 8, "layers": 1, "window": 8, "heads": 2, "attention_size": 8},
    training=TrainingConfig(epochs=1),
    burn_in=16,
    length=32,
    batch=8,
    arl0_bars=200,
)
ALWAYS = Span(0, 10**15)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def make_bars(n: int, symbols: int = 2, seed: int = 0, start: int = 0) -> pd.DataFrame:
    ts = START_TS + np.arange(start, start + n, dtype=np.int64) * MINUTE_MS
    return Simulator(Scenario(symbols=symbols, session_bars=start + n), seed).run(ts).frame()


@pytest.fixture(scope="module")
def blended() -> Bundle:
    return fit(make_bars(2_600))


def fit(bars: pd.DataFrame) -> Bundle:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ensemble, "ROUNDS", 20)
        return ensemble.fit_ensemble(
            bars, TARGETS, weighting="shrunk", spec=SPEC, recipe=RECIPE, device="cpu"
        )


def config_of(bundle: Bundle) -> EnsembleConfig:
    assert isinstance(bundle.config.network, EnsembleConfig)
    return bundle.config.network


def test_it_survives_the_disk_and_meets_its_golden_outputs(blended: Bundle, tmp_path: Path) -> None:
    again = load(save(blended, tmp_path))
    assert again.version == blended.version
    assert again.config == blended.config
    open_runtime(again, device="cpu")
    assert "boosted trees" in (tmp_path / blended.version / "model_card.md").read_text()


def test_its_losses_are_those_of_the_newest_tenth_that_nothing_was_fitted_on(
    blended: Bundle,
) -> None:
    past = histories(load_bars(make_bars(2_600)), SPEC, TARGETS)
    newest = RECIPE.fold(np.concatenate([h.ts for h in past]), SPEC).test
    scored = score(blended, past, forecast(blended, past, newest))
    losses = np.nanmean(np.concatenate([s.losses for s in scored]), axis=0)
    for target, loss in zip(TARGETS, losses, strict=True):
        assert blended.metrics[f"{target.name}/loss"] == pytest.approx(loss)


def test_it_says_the_weighed_mean_of_its_members(blended: Bundle) -> None:
    past = histories(load_bars(make_bars(600, symbols=1, seed=5)), SPEC, TARGETS)
    whole = replay(open_runtime(blended, device="cpu"), past)[0]
    network = replay(open_member(blended), past)[0]
    rows = np.flatnonzero(np.isfinite(whole).all(axis=1))
    assert len(rows) > 100
    said = [network[rows], *(blended.values(o)[0] for o in others(blended)(past[0].x[rows]))]
    want = sum(np.array(config_of(blended).weights)[:, m] * values for m, values in enumerate(said))
    np.testing.assert_allclose(whole[rows], want, atol=1e-6)
    assert all(np.abs(whole[rows] - values).max() > 1e-4 for values in said)


def open_member(bundle: Bundle):  # type: ignore[no-untyped-def]
    from models.runtimes import with_golden

    return open_runtime(with_golden(sequence_member(bundle), bundle.golden["x"]), device="cpu")


def test_probabilities_sum_to_one_and_the_value_is_that_of_the_rise(blended: Bundle) -> None:
    runtime = open_runtime(blended, device="cpu")
    runtime.grow(4)
    x = np.random.default_rng(0).normal(size=(4, F)).astype(np.float32)
    step = runtime.step(np.arange(4), x)
    assert set(step.probabilities) == {1, 2}
    for k, p in step.probabilities.items():
        np.testing.assert_allclose(p.sum(axis=1), 1)
        np.testing.assert_array_equal(step.values[:, k], p[:, -1])


def test_forecasts_over_history_are_those_of_the_stream(blended: Bundle) -> None:
    past = histories(load_bars(make_bars(700, symbols=2, seed=6)), SPEC, TARGETS)
    values = forecast(blended, past, ALWAYS)
    streamed = replay(open_runtime(blended, device="cpu"), past)
    for a, b in zip(values, streamed, strict=True):
        known = np.isfinite(a) & np.isfinite(b)
        assert known.sum() > 300
        np.testing.assert_allclose(a[known], b[known], atol=1e-4)


def test_predict_and_the_engine_serve_it_like_any_other_bundle(blended: Bundle) -> None:
    bars = make_bars(500, seed=7).sort_values(["ts", "symbol"], ignore_index=True)
    said = predict(blended, bars, device="cpu")
    assert set(said["target"]) == {t.name for t in TARGETS}
    assert len(said) > 300
    assert np.isfinite(said["value"]).all()
    engine: Engine = engine_for([sequence_of(blended), blended], device="cpu")
    assert set(engine.bundles) == {sequence_of(blended).version, blended.version}


def sequence_of(bundle: Bundle) -> Bundle:
    from models.runtimes import with_golden

    return with_golden(sequence_member(bundle), bundle.golden["x"])


def test_weights_follow_what_every_member_lost_out_of_sample_and_the_metrics_say_it(
    blended: Bundle,
) -> None:
    lost = {
        way: blended.metrics[f"volatility_10/out_of_sample/{way}"]
        for way in (*MEMBERS, "equal", "shrunk", "stacked", "bayesian")
    }
    order = sorted(range(len(MEMBERS)), key=lambda m: lost[MEMBERS[m]])
    weights = config_of(blended).weights[0]
    assert sorted(range(len(MEMBERS)), key=lambda m: -weights[m]) == order
    assert lost["shrunk"] < lost["equal"] < max(lost[member] for member in MEMBERS)
    assert blended.metrics["volatility_10/loss"] > 0


def test_nothing_after_the_training_part_reaches_the_weights_trees_or_line(blended: Bundle) -> None:
    bars = make_bars(2_600)
    late = bars["ts"] >= START_TS + 2_080 * MINUTE_MS
    bars.loc[late, ["open", "high", "low", "close"]] *= 3
    other = fit(bars)
    assert config_of(other).weights == config_of(blended).weights
    mine, theirs = (of_member(b.weights, "linear") for b in (blended, other))
    np.testing.assert_array_equal(mine["weight"], theirs["weight"])


def test_a_child_has_a_new_network_the_old_trees_and_weights_by_what_the_parent_showed(
    blended: Bundle,
) -> None:
    child = fine_tune(blended, make_bars(1_500, start=2_600), recipe=FINE_TUNING, device="cpu")
    assert child.provenance.parent == blended.version
    assert config_of(child).weighting == "shrunk"
    assert config_of(child).weights != config_of(blended).weights
    for member, moved in (("sequence", True), ("trees", False), ("linear", False)):
        pairs = zip(
            of_member(child.weights, member).values(),
            of_member(blended.weights, member).values(),
            strict=True,
        )
        assert any((a != b).any() for a, b in pairs) is moved
    open_runtime(child, device="cpu")


def test_weights_stay_where_no_bar_is_out_of_the_sample(blended: Bundle) -> None:
    child = fine_tune(blended, make_bars(1_500), recipe=FINE_TUNING, device="cpu")
    np.testing.assert_allclose(config_of(child).weights, config_of(blended).weights)


# ---- other weights ----

N = 2_000


def make_said(errors: tuple[float, ...] = (1.0, 0.2, 0.2)) -> tuple[Floats, Floats, Ints]:
    """Three members that miss a volatility's labels by so much: said f64[n, M, 1], labels, ts."""
    rng = np.random.default_rng(0)
    labels = rng.normal(-14, 1, (N, 1))
    said = labels[:, None, :] + rng.normal(size=(N, 3, 1)) * np.array(errors)[:, None]
    return said, labels, MINUTE_MS * np.arange(N)


EQUAL = np.full((1, 3), 1 / 3)


@pytest.mark.parametrize("way", SHRINKING)
@pytest.mark.parametrize("worst", [0, 1, 2])
def test_weights_move_from_the_worst_member_and_at_most_half_of_the_way(
    way: Weighting, worst: int
) -> None:
    errors = [0.2, 0.2, 0.2]
    errors[worst] = 1.5
    [shares], evidence = ensemble.renewed(TARGETS[:1], way, EQUAL, *make_said(tuple(errors)))
    assert shares.sum() == pytest.approx(1)
    assert np.argmin(shares) == worst
    assert (1 - SHRINKAGE) / 3 <= shares[worst] < 0.25
    name = f"volatility_10/out_of_sample/{way}"
    assert evidence[name] < evidence["volatility_10/out_of_sample/equal"]


def test_what_has_not_matured_moves_no_weight() -> None:
    said, labels, ts = make_said()
    labels[1_000:] = np.nan
    want, told = ensemble.renewed(TARGETS[:1], "shrunk", EQUAL, said, labels, ts)
    said[1_000:, 0], said[1_000:, 1] = 7.0, -90.0
    found, again = ensemble.renewed(TARGETS[:1], "shrunk", EQUAL, said, labels, ts)
    np.testing.assert_array_equal(found, want)
    assert again == told
    nothing = np.full_like(labels, np.nan)
    found, told = ensemble.renewed(TARGETS[:1], "shrunk", EQUAL, said, nothing, ts)
    np.testing.assert_array_equal(found, EQUAL)
    assert told == {}


@pytest.mark.parametrize(("n", "moves"), [(299, False), (300, True)])
def test_weights_stay_until_enough_periods_have_matured(n: int, moves: bool) -> None:
    said, labels, ts = make_said()
    labels[n:] = np.nan
    found, _ = ensemble.renewed(TARGETS[:1], "shrunk", EQUAL, said, labels, ts)
    assert bool((found != EQUAL).any()) is moves


def spoilt(bundle: Bundle, weighting: Weighting = "equal", factor: float = -1.0) -> Bundle:
    """All members weigh the same, and the line has gone wrong: it says less where it said more."""
    equal = {"weights": ((1 / 3,) * 3,) * len(TARGETS), "weighting": weighting}
    config = bundle.config.model_copy(
        update={"network": config_of(bundle).model_copy(update=equal)}
    )
    wrong = {"linear/weight": np.float32(factor) * bundle.weights["linear/weight"]}
    return replace(bundle, config=config, weights={**bundle.weights, **wrong})


@pytest.mark.parametrize("weighting", get_args(Weighting))
def test_a_child_of_other_weights_has_the_same_members_and_leaves_the_wrong_one(
    blended: Bundle, weighting: Weighting, tmp_path: Path
) -> None:
    parent = spoilt(blended, weighting)
    child = ensemble.reweigh(parent, make_bars(1_500, start=2_600), device="cpu")
    assert child.provenance.parent == parent.version
    assert child.weights == parent.weights
    assert child.config.variance_bias == parent.config.variance_bias
    assert child.inputs is parent.inputs
    assert config_of(child).weighting == (weighting if weighting in SHRINKING else "shrunk")
    assert (1 - SHRINKAGE) / 3 <= config_of(child).weights[0][2] < 0.25
    open_runtime(load(save(child, tmp_path)), device="cpu")


def test_bars_that_made_the_parent_or_are_too_few_give_no_other_weights(blended: Bundle) -> None:
    for bars in (make_bars(1_500), make_bars(450, start=2_600)):
        with pytest.raises(ValueError, match="matured periods"):
            ensemble.reweigh(blended, bars, device="cpu")


def test_other_weights_are_the_remedy_where_one_member_has_gone_wrong(blended: Bundle) -> None:
    bars, target = make_bars(1_500, start=2_600), TARGETS[0]
    since_ts = START_TS + 3_100 * MINUTE_MS
    found = recent_excess(spoilt(blended), bars, target, since_ts)
    assert found.weights_share > WEIGHTS_SHARE
    assert choose(found, set()) == "weights"
    well = recent_excess(blended, bars, target, since_ts)
    assert well.weights < 0.1 * found.weights
    least = recent_excess(blended, bars, target, int(bars["ts"].max()))
    assert least.weights == 0, "too few periods to go by"


# ---- damage ----


def edited(raw: NDArray[np.uint8], name: str, start: list[int]) -> NDArray[np.uint8]:
    """The model with the first entries of an array of its first tree replaced, or all if by none."""
    model = json.loads(raw.tobytes())
    tree = model["learner"]["gradient_booster"]["model"]["trees"][0]
    tree[name] = [*start, *tree[name][len(start) :]] if start else []
    return np.frombuffer(json.dumps(model).encode(), np.uint8)


def damaged(bundle: Bundle, name: str, array: object) -> Bundle:
    return replace(bundle, weights={**bundle.weights, name: np.asarray(array)})


@pytest.mark.parametrize(
    "change",
    [
        lambda tree: tree[: len(tree) // 2],
        lambda tree: np.zeros(0, np.uint8),
        lambda tree: np.frombuffer(b"not a model at all", np.uint8),
        lambda tree: np.roll(tree, 7),
        lambda tree: np.frombuffer(b"{}", np.uint8),
        lambda tree: edited(tree, "left_children", [10**6]),
        lambda tree: edited(tree, "split_indices", [F]),
        lambda tree: edited(tree, "split_conditions", []),
    ],
)
def test_trees_that_are_none_are_refused_though_their_hash_is_right(
    blended: Bundle, tmp_path: Path, change: object
) -> None:
    assert callable(change)
    broken = damaged(blended, "trees/0", change(blended.weights["trees/0"]))
    with pytest.raises(BundleRejected):
        open_runtime(load(save(broken, tmp_path)), device="cpu")


def test_trees_of_another_target_are_refused(blended: Bundle) -> None:
    with pytest.raises(BundleRejected, match="outputs"):
        open_runtime(damaged(blended, "trees/0", blended.weights["trees/2"]), device="cpu")
    with pytest.raises(BundleRejected, match="golden"):
        open_runtime(damaged(blended, "trees/0", blended.weights["trees/1"]), device="cpu")


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("linear/bias", np.zeros(2, np.float32)),
        ("linear/more", np.zeros(2, np.float32)),
        ("trees/9", np.zeros(2, np.uint8)),
        ("trees/0", np.zeros(20, np.float32)),
        ("sequence/head.bias", np.zeros(1, np.float32)),
        ("strange", np.zeros(1, np.float32)),
    ],
)
def test_arrays_that_are_not_its_own_are_refused(
    blended: Bundle, tmp_path: Path, name: str, array: object
) -> None:
    with pytest.raises(BundleRejected):
        load(save(damaged(blended, name, array), tmp_path))


def test_another_line_is_refused_by_the_golden_values(blended: Bundle) -> None:
    other = blended.weights["linear/bias"] + np.float32(0.1)
    with pytest.raises(BundleRejected, match="golden"):
        open_runtime(damaged(blended, "linear/bias", other), device="cpu")


@pytest.mark.parametrize("weights", [(0.5, 0.5, 0.5), (1.5, -0.5, 0.0), (0.5, 0.5), (1.0,)])
def test_weights_that_are_no_shares_are_refused(
    blended: Bundle, weights: tuple[float, ...]
) -> None:
    rows = (weights,) * len(TARGETS)
    with pytest.raises(ValueError, match=r"shares|less than|greater than"):
        EnsembleConfig.model_validate({**config_of(blended).model_dump(), "weights": rows})
