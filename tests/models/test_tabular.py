"""What trains and serves where torch is absent, from bars to the engine."""

import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.neural_network import MLPClassifier, MLPRegressor

from models.bundle import Bundle, load, save
from models.dataset import histories, load_bars
from models.features import FeatureSpec
from models.runtimes import open_runtime
from models.simulation import Scenario, Simulator
from models.splits import Span
from models.tabular import TabularConfig, outputs_of
from models.tabular_training import TabularRecipe, _fitted, fit_tabular, forecast, tune_tabular
from models.targets import Target
from tests.models.networks import DIRECTION, DIRECTION_3, RETURN, VOLATILITY

MINUTE_MS = 60_000
START_TS = 1_500_000_000_000
SPEC = FeatureSpec(interval_ms=MINUTE_MS)
TARGETS = (VOLATILITY, DIRECTION, RETURN)
ALL_TIME = Span(0, 10**15)


def make_bars(n: int, symbols: int = 2, seed: int = 0) -> pd.DataFrame:
    ts = START_TS + np.arange(n, dtype=np.int64) * MINUTE_MS
    return Simulator(Scenario(symbols=symbols, session_bars=n), seed).run(ts).frame()


@pytest.fixture(scope="module")
def fitted() -> Bundle:
    recipe = TabularRecipe(window=3, hidden=(4,), epochs=2, arl0_bars=200)
    return fit_tabular(make_bars(2_500), TARGETS, spec=SPEC, recipe=recipe)


@pytest.mark.parametrize("hidden", [(), (5,), (5, 4)])
@pytest.mark.parametrize("target", [VOLATILITY, DIRECTION, DIRECTION_3])
def test_the_arrays_say_what_scikit_learn_says(target: Target, hidden: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 2, 4)).astype(np.float32)
    flat = x.reshape(300, 8)
    y = flat[:, 0] + rng.normal(0, 0.1, 300)
    if target.kind == "direction":
        y = np.digitize(y, [-0.5, 0.5][: target.classes - 1]).astype(np.float64)
    recipe = TabularRecipe(hidden=hidden, epochs=3)
    config = TabularConfig(n_features=4, window=2, hidden=hidden, outputs=(target.n_outputs,))
    weights: dict[str, NDArray[Any]] = {}
    for i, (weight, bias) in enumerate(_fitted(flat, y, target, recipe)):
        weights |= {f"0.{i}.weight": np.asarray(weight), f"0.{i}.bias": np.asarray(bias)}
    assert config.takes(weights)
    outputs = outputs_of(config, weights, x)
    options = {"hidden_layer_sizes": hidden, "alpha": 1e-2, "max_iter": 3, "batch_size": 256}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        if target.kind == "direction":
            model = (
                MLPClassifier(**options, random_state=0)
                if hidden
                else LogisticRegression(C=1 / 3.0, max_iter=500)
            )
            p = model.fit(flat, y).predict_proba(flat)
            said = (
                np.concatenate([np.zeros((300, 1)), outputs], 1) if target.classes == 2 else outputs
            )
            shares = np.exp(said) / np.exp(said).sum(axis=1, keepdims=True)
            np.testing.assert_allclose(shares, p, atol=1e-5)
        else:
            model = MLPRegressor(**options, random_state=0) if hidden else Ridge(alpha=3.0)
            np.testing.assert_allclose(outputs[:, 0], model.fit(flat, y).predict(flat), atol=1e-5)


def test_it_survives_the_disk_and_serves_what_it_forecast(fitted: Bundle, tmp_path: Path) -> None:
    again = load(save(fitted, tmp_path))
    assert again.version == fitted.version
    runtime = open_runtime(again)
    runtime.grow(1)
    [past] = histories(load_bars(make_bars(700, symbols=1, seed=5)), SPEC, TARGETS)
    [values] = forecast(fitted, [past], ALL_TIME)
    slot = np.zeros(1, np.int64)
    warm = np.flatnonzero(past.is_warm)
    streamed = np.array([runtime.step(slot, past.x[[i]]).values[0] for i in warm])
    known = np.isfinite(values[warm]).all(axis=1)
    assert known.sum() > 200
    np.testing.assert_allclose(values[warm][known], streamed[known], atol=1e-5)


def test_it_beats_its_reference_and_has_a_monitor(fitted: Bundle) -> None:
    recipe = TabularRecipe(arl0_bars=200)
    line = fit_tabular(make_bars(6_000), TARGETS, spec=SPEC, recipe=recipe)
    assert line.metrics["volatility_5/loss"] < line.metrics["volatility_5/reference_loss"]
    assert all(calibration is not None for calibration in fitted.config.calibrations)
    assert fitted.config.warm_up_bars == 3
    assert fitted.inputs is not None
    assert fitted.inputs.hidden is None


def test_the_same_bars_and_seed_give_the_same_bundle(fitted: Bundle) -> None:
    recipe = TabularRecipe(window=3, hidden=(4,), epochs=2, arl0_bars=200)
    again = fit_tabular(make_bars(2_500), TARGETS, spec=SPEC, recipe=recipe)
    assert again.version == fitted.version


def test_nothing_after_a_bar_changes_what_is_said_at_it(fitted: Bundle) -> None:
    bars = make_bars(700, symbols=1, seed=5)
    [before] = forecast(fitted, histories(load_bars(bars), SPEC, TARGETS), ALL_TIME)
    bars.loc[600:, ["open", "high", "low", "close"]] *= 2
    [after] = forecast(fitted, histories(load_bars(bars), SPEC, TARGETS), ALL_TIME)
    known = np.isfinite(before[:600]).all(axis=1) & np.isfinite(after[:600]).all(axis=1)
    assert known.sum() > 100
    np.testing.assert_array_equal(before[:600][known], after[:600][known])


def test_a_child_learns_a_shift_and_keeps_what_is_frozen(fitted: Bundle) -> None:
    """The parent is spoilt in its last layer alone; recent bars mend most of it."""
    weights = dict(fitted.weights)
    weights["0.1.weight"] = weights["0.1.weight"] * np.float32(0.2)
    spoilt = replace(fitted, weights=weights)
    bars = make_bars(2_000, seed=3)
    child = tune_tabular(spoilt, bars)
    assert child.provenance.parent == spoilt.version
    np.testing.assert_array_equal(child.weights["0.0.weight"], fitted.weights["0.0.weight"])
    assert child.config.calibrations == fitted.config.calibrations
    past = histories(load_bars(make_bars(2_000, seed=4)), SPEC, TARGETS)
    labels = np.concatenate([h.y for h in past])[:, 0]

    def spread(bundle: Bundle) -> float:
        values = np.concatenate(forecast(bundle, past, ALL_TIME))[:, 0]
        return float(np.nanstd(labels - values))

    sound, before, after = spread(fitted), spread(spoilt), spread(child)
    assert after - sound < 0.5 * (before - sound)
    open_runtime(child)


def test_too_few_bars_say_what_is_needed() -> None:
    with pytest.raises(ValueError, match=r"too few bars|too short"):
        fit_tabular(make_bars(100), TARGETS, spec=SPEC)


WITHOUT_TORCH = """
import sys
from importlib.machinery import PathFinder
from pathlib import Path

class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        absent = name.partition(".")[0] in ("torch", "onnx", "onnxruntime", "tensorflow")
        return None if absent else super().find_spec(name, path, target)

sys.meta_path = [Without if f is PathFinder else f for f in sys.meta_path]

import numpy as np
from models.bundle import load, save
from models.simulation import Scenario, Simulator
from models.tabular_training import TabularRecipe, fit_tabular
from models.targets import Target
from workers.offline import predict

ts = 1_500_000_000_000 + 60_000 * np.arange(1_500)
bars = Simulator(Scenario(symbols=2, session_bars=1_500), 0).run(ts).frame()
bundle = fit_tabular(bars, [Target(kind="volatility", horizon=5)], recipe=TabularRecipe(window=2))
said = predict(load(save(bundle, Path(sys.argv[1]))), bars)
assert len(said) > 1_000 and np.isfinite(said["value"]).all(), said
assert "torch" not in sys.modules
"""


def test_it_trains_saves_loads_and_serves_where_torch_is_absent(tmp_path: Path) -> None:
    child = [sys.executable, "-W", "error", "-c", WITHOUT_TORCH, str(tmp_path)]
    subprocess.run(child, check=True, timeout=120, cwd=Path(__file__).parents[2])
