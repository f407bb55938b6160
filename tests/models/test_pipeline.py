"""From bars to a bundle that serves: the same seed the same bundle, a child that keeps what is frozen."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from models.baselines import HALF_LIVES_BARS
from models.bundle import Bundle, load, save
from models.dataset import BarsRejected, histories, load_bars
from models.features import FeatureSpec
from models.input_drift import InputDrift, measure
from models.pipeline import FINE_TUNING, Recipe, fine_tune, fit_anew, fit_bundle, forecast, score
from models.replay import inputs_of
from models.runtimes import open_runtime
from models.simulation import Scenario, Simulator
from models.splits import Span
from models.targets import Target
from models.training import TrainingConfig

MINUTE_MS = 60_000
START_TS = 1_500_000_000_000
SPEC = FeatureSpec(interval_ms=MINUTE_MS)
TARGETS = (Target(kind="volatility", horizon=10), Target(kind="direction", horizon=5))
RECIPE = Recipe(
    network={"hidden": 8, "layers": 1, "window": 8, "heads": 2, "attention_size": 8},
    training=TrainingConfig(epochs=1),
    burn_in=16,
    length=32,
    arl0_bars=200,
)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def make_bars(n: int, symbols: int = 2, seed: int = 0) -> pd.DataFrame:
    scenario = Scenario(symbols=symbols, session_bars=n)
    return (
        Simulator(scenario, seed).run(START_TS + np.arange(n, dtype=np.int64) * MINUTE_MS).frame()
    )


@pytest.fixture(scope="module")
def fitted() -> Bundle:
    return fit_bundle(make_bars(3_000), TARGETS, spec=SPEC, recipe=RECIPE, device="cpu")


def test_a_bundle_survives_the_disk_and_meets_its_golden_outputs(
    fitted: Bundle, tmp_path: Path
) -> None:
    again = load(save(fitted, tmp_path))
    assert again.version == fitted.version
    open_runtime(again, device="cpu")


def test_it_holds_all_that_serving_and_judging_need(fitted: Bundle) -> None:
    config = fitted.config
    assert config.warm_up_bars == RECIPE.burn_in + 8
    assert config.variance_bias[0] != 0
    assert config.variance_bias[1] == 0
    assert config.references[0].half_life_bars in HALF_LIVES_BARS
    assert 0.3 < config.references[1].base_rate < 0.7
    for calibration in config.calibrations:
        assert calibration is not None
        assert calibration.arl0_bars == 200
    assert 0 < fitted.metrics["volatility_10/loss"] < 2  # of bars on which nothing was fitted
    assert fitted.provenance.bars == 6_000
    assert fitted.inputs is not None
    assert fitted.inputs.hidden is not None
    assert fitted.inputs.hidden.mean.shape == (8,)


def test_it_knows_what_its_own_inputs_looked_like_and_finds_wilder_ones_far(
    fitted: Bundle,
) -> None:
    def drift_of(bars: pd.DataFrame, newest: int | None = None) -> InputDrift:
        past = histories(load_bars(bars), SPEC, TARGETS)
        assert fitted.inputs is not None
        return measure(fitted.inputs, *inputs_of(fitted, past, newest))

    bars = make_bars(3_000)
    own = drift_of(bars)
    assert own.embedding is not None
    assert max(own.psi.max(), own.ks.max()) < 1e-6
    assert own.embedding < 0.02
    wild = make_bars(3_000)
    wild[["open", "high", "low", "close"]] **= 4  # every return is four times as large
    recent, wilder = drift_of(bars, 390), drift_of(wild, 390)
    assert wilder.psi.max() > max(recent.psi.max(), 3.0)
    assert recent.embedding is not None
    assert wilder.embedding is not None
    assert wilder.embedding > recent.embedding


def test_the_same_bars_and_seed_give_the_same_bundle(fitted: Bundle) -> None:
    again = fit_bundle(make_bars(3_000), TARGETS, spec=SPEC, recipe=RECIPE, device="cpu")
    assert again.version == fitted.version


def test_forecasts_over_history_are_those_of_the_stream(fitted: Bundle) -> None:
    bars = load_bars(make_bars(700, symbols=1, seed=5))
    past = histories(bars, SPEC, TARGETS)
    values = forecast(fitted, past, Span(0, 10**15))[0]
    runtime = open_runtime(fitted, device="cpu")
    runtime.grow(1)
    slot = np.zeros(1, np.int64)
    warm = np.flatnonzero(past[0].is_warm)
    streamed = np.array([runtime.step(slot, past[0].x[[i]]).values[0] for i in warm])
    known = np.isfinite(values[warm])
    assert known.sum() > 200
    np.testing.assert_allclose(values[warm][known], streamed[known], atol=1e-4)


@pytest.mark.parametrize("options", [{"bidirectional": True}, {"attention": "cross", "slower": 4}])
def test_a_window_network_is_trained_and_tuned_on_what_it_is_served(
    options: dict[str, Any],
) -> None:
    network = {**RECIPE.network, **options, "mode": "window"}
    recipe = RECIPE.model_copy(update={"network": network})
    parent = fit_bundle(make_bars(1_500), TARGETS, spec=SPEC, recipe=recipe, device="cpu")
    assert parent.config.warm_up_bars == 8
    child = fine_tune(parent, make_bars(1_000, seed=3), device="cpu")
    [past] = histories(load_bars(make_bars(600, symbols=1, seed=5)), SPEC, TARGETS)
    for bundle in (parent, child):
        assert bundle.inputs is not None
        assert bundle.inputs.hidden is None
        [values] = forecast(bundle, [past], Span(0, 10**15))
        runtime = open_runtime(bundle, device="cpu")
        runtime.grow(1)
        warm = np.flatnonzero(past.is_warm)
        slot = np.zeros(1, np.int64)
        streamed = np.array([runtime.step(slot, past.x[[i]]).values[0] for i in warm])
        known = np.isfinite(values[warm]).all(axis=1)
        assert known.sum() > 100
        np.testing.assert_allclose(values[warm][known], streamed[known], atol=1e-4)
    if "clock" in parent.weights:
        np.testing.assert_array_equal(child.weights["clock"], parent.weights["clock"])
        assert parent.weights["clock"][1] != 1


def test_the_variance_bias_makes_the_mean_of_the_variance_right(fitted: Bundle) -> None:
    past = histories(load_bars(make_bars(3_000)), SPEC, TARGETS)
    span = Span(START_TS + 2_400 * MINUTE_MS, START_TS + 2_700 * MINUTE_MS)  # where it was fitted
    values = np.concatenate(forecast(fitted, past, span))[:, 0]
    labels = np.concatenate([h.y[:, 0] for h in past])
    assert np.nanmean(np.exp(labels - values)) == pytest.approx(1, abs=0.05)


def test_nothing_after_the_training_part_reaches_scaler_and_reference(fitted: Bundle) -> None:
    bars = make_bars(3_000)
    late = bars["ts"] >= START_TS + 2_400 * MINUTE_MS
    bars.loc[late, ["open", "high", "low", "close"]] *= 3
    bars.loc[late, "volume"] *= 40
    other = fit_bundle(bars, TARGETS, spec=SPEC, recipe=RECIPE, device="cpu")
    np.testing.assert_array_equal(other.scaler.centre, fitted.scaler.centre)
    assert other.config.references == fitted.config.references
    assert other.config.label_scaling == fitted.config.label_scaling


def test_a_child_moves_its_weights_and_keeps_what_is_frozen(fitted: Bundle) -> None:
    child = fine_tune(fitted, make_bars(2_000, seed=3), device="cpu")
    assert child.provenance.parent == fitted.version
    assert child.version != fitted.version
    assert any((child.weights[name] != fitted.weights[name]).any() for name in fitted.weights)
    np.testing.assert_array_equal(child.scaler.centre, fitted.scaler.centre)
    frozen = ("references", "calibrations", "label_scaling", "warm_up_bars", "features", "network")
    for name in frozen:
        assert getattr(child.config, name) == getattr(fitted.config, name)
    assert fitted.inputs is not None
    assert child.inputs is not None
    assert (child.inputs.edges != fitted.inputs.edges).any(), "it was made of other bars"
    open_runtime(child, device="cpu")


def test_fine_tuning_recovers_from_a_change_of_regime(fitted: Bundle) -> None:
    """After the break the tails are others, so the parent's variances are off by a factor."""
    bars = make_bars(4_000, seed=7)
    for column in ("open", "high", "low"):
        bars[column] = bars["close"]  # ranges vanish: what the parent reads from them is wrong now
    early = bars[bars["ts"] < START_TS + 3_000 * MINUTE_MS]
    child = fine_tune(fitted, early, recipe=FINE_TUNING, device="cpu")
    past = histories(load_bars(bars), SPEC, TARGETS)
    after = Span(START_TS + 3_000 * MINUTE_MS, 10**15)

    def mean_loss(bundle: Bundle) -> float:
        scored = score(bundle, past, forecast(bundle, past, after))
        return float(np.nanmean(np.concatenate([s.losses[:, 0] for s in scored])))

    assert mean_loss(child) < 0.8 * mean_loss(fitted)


@pytest.mark.parametrize("n", [100, 420])
def test_too_few_bars_say_what_is_needed(fitted: Bundle, n: int) -> None:
    with pytest.raises(BarsRejected, match="too few bars"):
        fit_bundle(make_bars(n), TARGETS, spec=SPEC, recipe=RECIPE, device="cpu")
    with pytest.raises(BarsRejected, match="too few bars"):
        fine_tune(fitted, make_bars(n), device="cpu")


def test_bars_of_which_no_chunk_counts_are_too_few() -> None:
    recipe = RECIPE.model_copy(update={"burn_in": 200})
    with pytest.raises(BarsRejected, match="too few bars"):
        fit_bundle(make_bars(550), TARGETS, spec=SPEC, recipe=recipe, device="cpu")


def test_prices_that_never_move_are_refused_with_the_reason() -> None:
    still = make_bars(1_200)
    still[["open", "high", "low", "close"]] = 50.0
    volatility = Target(kind="volatility", horizon=5)
    with pytest.raises(BarsRejected, match="prices must move"):
        fit_bundle(still, [volatility], spec=SPEC, recipe=RECIPE, device="cpu")


def test_a_network_that_is_fitted_anew_keeps_its_dropout(fitted: Bundle) -> None:
    network = fitted.config.sequence.model_copy(update={"dropout": 0.1, "input_dropout": 0.0})
    parent = replace(fitted, config=fitted.config.model_copy(update={"network": network}))
    anew = fit_anew(parent, make_bars(1_200), recipe=RECIPE, device="cpu")
    assert anew.config.sequence == network
