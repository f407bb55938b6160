"""The front door: scikit-learn's habits, and the bundle that the workers serve."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.utils import estimator_checks

from models.bundle import save
from models.dataset import OHLCV
from models.estimator import BarForecaster
from models.pipeline import Recipe, shift_level
from models.simulation import Scenario, Simulator
from models.targets import Target
from tests.workers.builders import make_bundle
from workers.offline import predict

MINUTE_MS = 60_000
START_TS = 1_500_000_000_000
RECIPE = Recipe(
    network={"heads": 2, "attention_size": 8}, burn_in=16, length=32, batch=4, arl0_bars=200
)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def make_bars(n: int, symbols: int = 2, seed: int = 0) -> pd.DataFrame:
    ts = START_TS + np.arange(n, dtype=np.int64) * MINUTE_MS
    return Simulator(Scenario(symbols=symbols, session_bars=n), seed).run(ts).frame()


def small(**options: Any) -> BarForecaster:
    given: dict[str, Any] = {
        "window": 8,
        "hidden": 8,
        "layers": 1,
        "epochs": 1,
        "recipe": RECIPE,
        "horizon": 5,
    }
    return BarForecaster(**given | options)


@pytest.fixture(scope="module")
def fitted() -> BarForecaster:
    return small(target=["volatility", "direction"]).fit(make_bars(1_200))


@pytest.mark.parametrize(
    "check",
    [
        estimator_checks.check_parameters_default_constructible,
        estimator_checks.check_get_params_invariance,
        estimator_checks.check_set_params,
        estimator_checks.check_no_attributes_set_in_init,
        estimator_checks.check_estimator_repr,
        estimator_checks.check_estimator_cloneable,
        estimator_checks.check_do_not_raise_errors_in_init_or_set_params,
        estimator_checks.check_valid_tag_types,
        estimator_checks.check_estimator_tags_renamed,
    ],
)
def test_it_passes_scikit_learns_own_checks_of_parameters(check: object) -> None:
    assert callable(check)
    check("BarForecaster", BarForecaster())


def test_fitting_changes_no_parameter_and_a_clone_is_not_fitted(fitted: BarForecaster) -> None:
    copy = clone(fitted)
    assert copy.get_params() == fitted.get_params()
    assert set(vars(fitted)) - set(vars(copy)) == {"bundle_"}
    with pytest.raises(NotFittedError):
        copy.predict(make_bars(10))


def test_options_go_before_the_recipe_and_reach_the_bundle(fitted: BarForecaster) -> None:
    network = fitted.bundle_.config.sequence
    assert (network.window, network.hidden, network.layers, network.heads) == (8, 8, 1, 2)
    assert [t.name for t in fitted.bundle_.config.targets] == ["volatility_5", "direction_5"]
    with pytest.raises(ValueError, match="learning_rate"):
        small(learning_rate=-1).fit(make_bars(1_200))


def test_what_it_saves_the_workers_serve_with_the_very_same_values(
    fitted: BarForecaster, tmp_path: Path
) -> None:
    path = fitted.save(tmp_path)
    opened = BarForecaster.load(path)
    bars = make_bars(500, seed=3).sort_values(["ts", "symbol"], ignore_index=True)
    mine = opened.predict(bars)
    served = predict(opened.bundle_, bars)
    for k, target in enumerate(opened.bundle_.config.targets):
        theirs = served[served["target"] == target.name]
        joined = bars.assign(mine=mine[:, k]).merge(theirs, on=["symbol", "ts"], how="left")
        assert joined["value"].notna().sum() > 100
        np.testing.assert_allclose(joined["mine"], joined["value"], rtol=0, atol=1e-6)
    np.testing.assert_array_equal(mine, fitted.predict(bars))


def test_forecasts_follow_the_rows_whatever_their_order_and_refuse_what_the_stream_refuses(
    fitted: BarForecaster,
) -> None:
    bars = make_bars(500, seed=4)
    whole = fitted.predict(bars)
    order = np.random.default_rng(0).permutation(len(bars))
    np.testing.assert_allclose(fitted.predict(bars.iloc[order]), whole[order], atol=1e-6)
    broken = bars.copy()
    last = len(broken) - 1
    broken.loc[last, OHLCV] = np.nan
    said = fitted.predict(broken)
    assert np.isnan(said[last]).all()
    np.testing.assert_allclose(said[:last], whole[:last], atol=1e-6)
    assert bars.equals(make_bars(500, seed=4))


def test_of_one_target_the_forecasts_are_one_column(tmp_path: Path) -> None:
    bundle = make_bundle(targets=(Target(kind="volatility", horizon=5),))
    opened = BarForecaster.load(save(bundle, tmp_path))
    assert opened.get_params()["target"] == "volatility"
    bars = make_bars(450)
    said = opened.predict(bars)
    assert said.shape == (len(bars),)
    assert np.isfinite(said).sum() > 50


def test_the_skill_is_below_one_and_falls_with_a_wrong_level(fitted: BarForecaster) -> None:
    later = make_bars(900, seed=8)
    skill = fitted.score(later)
    assert skill < 1
    target = fitted.bundle_.config.targets[0]
    for far_off in (-20.0, 20.0):
        worse = clone(fitted)
        worse.bundle_ = shift_level(fitted.bundle_, later, target, far_off)
        assert worse.score(later) < skill


def test_a_partial_fit_makes_a_child(fitted: BarForecaster) -> None:
    child = clone(fitted)
    child.bundle_ = fitted.bundle_
    child.partial_fit(make_bars(900, seed=5))
    assert child.bundle_.provenance.parent == fitted.bundle_.version


def test_a_loaded_one_that_is_cloned_and_fitted_has_the_same_network(
    fitted: BarForecaster, tmp_path: Path
) -> None:
    loaded = BarForecaster.load(fitted.save(tmp_path))
    again = clone(loaded).set_params(epochs=1).fit(make_bars(1_200))
    assert again.bundle_.config.network == fitted.bundle_.config.network


def test_a_recipe_may_be_a_mapping_and_a_wrong_weighting_is_refused_at_once() -> None:
    assert small(recipe=RECIPE.model_dump())._recipe() == small()._recipe()
    with pytest.raises(ValueError, match=r"is none of .*shrunk"):
        small(ensemble="best").fit(make_bars(1_200))
