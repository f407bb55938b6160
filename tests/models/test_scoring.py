"""Each loss is least where the forecast is right, in the units in which it is published."""

import numpy as np
import pytest

from models.scoring import loss
from models.targets import Target

VOLATILITY = Target(kind="volatility", horizon=5)


def test_qlike_is_zero_at_the_truth_and_dearer_for_too_little_variance_than_for_too_much() -> None:
    label = np.log(np.array([1e-6, 1e-6, 1e-6]))
    right, too_low, too_high = loss(VOLATILITY, label + np.log([1.0, 0.5, 2.0]), label)
    assert right == 0
    assert too_low > too_high > 0


def test_qlike_is_least_in_the_mean_at_the_mean_of_the_variance_not_of_its_log() -> None:
    label = np.random.default_rng(0).normal(0, 1, 200_000)
    candidates = np.linspace(0.3, 0.7, 5)
    means = [loss(VOLATILITY, np.full(len(label), c), label).mean() for c in candidates]
    assert candidates[int(np.argmin(means))] == pytest.approx(0.5)


@pytest.mark.parametrize(("classes", "labels", "rises"), [(2, [0, 1], [0, 1]), (3, [1, 2], [0, 1])])
def test_direction_is_scored_as_the_probability_of_a_rise(
    classes: int, labels: list[float], rises: list[float]
) -> None:
    target = Target.model_validate({"kind": "direction", "horizon": 5, "classes": classes})
    value = np.array([0.7, 0.7])
    expected = (value - np.array(rises)) ** 2
    np.testing.assert_allclose(loss(target, value, np.array(labels)), expected)


@pytest.mark.parametrize("kind", ["volatility", "return", "direction"])
def test_an_undefined_label_has_no_loss(kind: str) -> None:
    target = Target.model_validate({"kind": kind, "horizon": 5})
    assert np.isnan(loss(target, np.array([0.5]), np.array([np.nan])))[0]
