"""A forecast that is wrong in level is put right by a constant; one that is wrong in shape is not."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from models.blending import MIN_PERIODS
from models.features import WARM_UP_BARS
from models.remedy import LEAST_BARS, OLDER_SHARE, Excess, best_shift, choose, excess, lesson
from models.scoring import loss
from models.targets import Target
from schemas.messages import Policy
from tests.workers.builders import make_bundle

VOLATILITY, RETURN = Target(kind="volatility", horizon=5), Target(kind="return", horizon=5)
DIRECTION = Target(kind="direction", horizon=5)
USUAL, MINUTE_MS = -0.2, 60_000

errors = arrays(np.float64, st.integers(2, 40), elements=st.floats(-3, 3))


@given(errors, st.floats(-2, 2).filter(lambda x: abs(x) > 1e-3))
@pytest.mark.parametrize("target", [VOLATILITY, RETURN], ids=lambda t: t.kind)
def test_no_other_constant_has_a_smaller_loss(
    target: Target, error: np.ndarray, other: float
) -> None:
    said = np.zeros(len(error))
    shift = best_shift(target, said, error)
    best, worse = loss(target, said + shift, error), loss(target, said + shift + other, error)
    assert best.mean() < worse.mean()


def make_forecasts(level: float, noise: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Forecasts, labels, and losses of a reference that was 0.2 worse than the forecasts while well."""
    rng = np.random.default_rng(0)
    labels = rng.normal(-16, 1, 4_000)
    usual_error = rng.normal(0, 0.3, 4_000)
    said = labels + usual_error + level + rng.normal(0, noise, 4_000)
    return said, labels, loss(VOLATILITY, labels + usual_error, labels) - USUAL


def test_a_level_is_all_of_the_excess_that_it_caused() -> None:
    found = excess(VOLATILITY, *make_forecasts(level=0.8, noise=0.0), USUAL)
    assert found.shift == pytest.approx(-0.8, abs=0.06)
    assert found.level_share == pytest.approx(1.0, abs=0.15)
    assert choose(found, set()) == "bias"


def test_a_shape_is_not_put_right_by_a_constant() -> None:
    found = excess(VOLATILITY, *make_forecasts(level=0.0, noise=0.8), USUAL)
    assert found.total > 0.2
    assert found.level_share < 0.6
    assert choose(found, set()) == "fine_tune"


def test_a_direction_has_no_level() -> None:
    assert best_shift(DIRECTION, np.array([0.2, 0.4]), np.array([1.0, 1.0])) == 0.0


@pytest.mark.parametrize(
    ("total", "level", "tried", "new_bars", "policy"),
    [
        (1.0, 0.9, set(), None, "bias"),
        (1.0, 0.9, {"bias"}, None, "fine_tune"),
        (1.0, 0.9, {"bias", "fine_tune"}, None, "full"),
        (1.0, 0.9, {"bias", "fine_tune", "full"}, None, "full"),
        (1.0, 0.5, set(), None, "fine_tune"),
        (1.0, 0.5, {"fine_tune"}, None, "full"),
        (-0.1, 0.05, set(), None, "fine_tune"),
        (1.0, 0.9, set(), 98, "bias"),
        (1.0, 0.9, {"bias"}, 196, "fine_tune"),
        (1.0, 0.9, {"bias", "fine_tune"}, 392, "fine_tune"),
        (1.0, 0.9, {"bias", "fine_tune"}, 1_950, "full"),
        (1.0, 0.5, {"fine_tune"}, 1_949, "fine_tune"),
    ],
)
def test_the_cheapest_remedy_that_can_help_has_enough_bars_and_was_not_tried_is_taken(
    total: float, level: float, tried: set[Policy], new_bars: int | None, policy: Policy
) -> None:
    assert choose(Excess(total, level, 0.1, 100), tried, new_bars) == policy


@pytest.mark.parametrize(
    ("level", "weights", "tried", "policy"),
    [
        (0.9, 0.9, set(), "bias"),
        (0.9, 0.9, {"bias"}, "weights"),
        (0.9, 0.4, {"bias"}, "fine_tune"),
        (0.5, 0.5, set(), "weights"),
        (0.5, 0.5, {"weights"}, "fine_tune"),
        (0.5, 0.4, set(), "fine_tune"),
        (0.9, 0.9, {"bias", "weights", "fine_tune", "full"}, "full"),
    ],
)
def test_other_weights_are_tried_where_they_take_away_half_of_the_excess(
    level: float, weights: float, tried: set[Policy], policy: Policy
) -> None:
    assert choose(Excess(1.0, level, 0.1, 100, weights), tried) == policy
    assert choose(Excess(-1.0, level, 0.1, 100, weights), set()) == "fine_tune"


def make_bars(n: int) -> pd.DataFrame:
    one = pd.DataFrame({"ts": MINUTE_MS * np.arange(n)})
    return pd.concat([one.assign(symbol=name) for name in "AB"], ignore_index=True)


@pytest.mark.parametrize("new", [LEAST_BARS, 200])
def test_a_fine_tune_learns_from_the_new_bars_and_not_many_times_as_many_old_ones(new: int) -> None:
    bundle, since_ts = make_bundle(targets=(VOLATILITY,)), (5_000 - new) * MINUTE_MS
    bars, recipe = lesson("fine_tune", bundle, make_bars(5_000), since_ts, epochs=3)
    warming = WARM_UP_BARS + bundle.config.warm_up_bars
    for _, own in bars.groupby("symbol"):
        assert (own["ts"] >= since_ts).sum() == new
        assert (own["ts"] < since_ts).sum() == warming + OLDER_SHARE * new
    assert recipe.training.epochs > 3
    assert round(recipe.validation * len(bars) / 2) == new, "what is new says when to stop"


def test_weights_go_by_the_new_bars_alone() -> None:
    bundle, new = make_bundle(targets=(VOLATILITY,)), (MIN_PERIODS + 1) * VOLATILITY.horizon
    every = make_bars(5_000)
    bars, _ = lesson("weights", bundle, every, (5_000 - new) * MINUTE_MS, epochs=3)
    assert len(bars) == 2 * (WARM_UP_BARS + bundle.config.warm_up_bars + new)
    for other in (new - 1, 4_900):
        bars, _ = lesson("weights", bundle, every, (5_000 - other) * MINUTE_MS, epochs=3)
        assert bars is every


@pytest.mark.parametrize(
    ("policy", "new"),
    [("full", 200), ("fine_tune", 0), ("fine_tune", LEAST_BARS - 1), ("fine_tune", 4_000)],
)
def test_all_bars_are_learnt_from_where_no_part_of_them_is_special(
    policy: Policy, new: int
) -> None:
    bundle, every = make_bundle(targets=(VOLATILITY,)), make_bars(5_000)
    bars, recipe = lesson(policy, bundle, every, (5_000 - new) * MINUTE_MS, epochs=3)
    assert bars is every
    assert recipe.training.epochs == 3
