"""Each loss against its formula, and what any loss must be."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from models import scoring
from models.bundle import LabelScaling
from models.losses import LossConfig, Objective
from models.targets import Target
from tests.models.networks import DIRECTION, DIRECTION_3, RETURN, VOLATILITY

SCALING = LabelScaling(mean=-2.0, sd=0.5)


def make_objective(
    target: Target, frequencies: tuple[float, ...] = (), **config: object
) -> Objective:
    scaling = LabelScaling() if target.kind == "direction" else SCALING
    return Objective([target], [scaling], [frequencies], LossConfig.model_validate(config))


def of_one(objective: Objective, outputs: list[float], label: float) -> float:
    """The loss of a single step."""
    return float(objective(torch.tensor([[outputs]]), torch.tensor([[[label]]]), torch.ones(1, 1)))


@pytest.mark.parametrize(
    ("config", "error", "expected"),
    [
        ({"volatility": "mse"}, 3.0, 9.0),
        ({"volatility": "huber", "huber_delta": 1.0}, 3.0, 2.5),
        ({"volatility": "huber", "huber_delta": 1.0}, -0.5, 0.125),
        ({"volatility": "pinball", "quantile": 0.9}, 2.0, 1.8),
        ({"volatility": "pinball", "quantile": 0.9}, -2.0, 0.2),
        ({"volatility": "qlike"}, 2.0, math.e - 2.0),
    ],
)
def test_regression_losses_are_their_formulas_on_standardised_labels(
    config: dict[str, Any], error: float, expected: float
) -> None:
    said = 0.7
    label = SCALING.mean + SCALING.sd * (said + error)
    assert of_one(make_objective(VOLATILITY, **config), [said], label) == pytest.approx(expected)


@given(value=st.floats(-20, 5), label=st.floats(-20, 5))
def test_qlike_is_the_loss_that_forecasts_are_judged_by(value: float, label: float) -> None:
    if label - value > 6:
        return
    said = (value - SCALING.mean) / SCALING.sd
    judged = scoring.loss(VOLATILITY, np.array([value]), np.array([label]))[0]
    trained = of_one(make_objective(VOLATILITY, volatility="qlike"), [said], label)
    assert trained == pytest.approx(judged, rel=1e-3, abs=1e-4)


def test_qlike_of_an_absurd_label_is_finite_and_so_is_its_gradient() -> None:
    out = torch.zeros(1, 1, 1, requires_grad=True)
    objective = make_objective(VOLATILITY, volatility="qlike")
    objective(out, torch.full((1, 1, 1), 500.0), torch.ones(1, 1)).backward()
    assert out.grad is not None
    assert torch.isfinite(out.grad).all()


@pytest.mark.parametrize("label", [0.0, 1.0])
def test_cross_entropy_of_one_logit_is_the_binary_one(label: float) -> None:
    want = torch.nn.functional.binary_cross_entropy_with_logits(
        torch.tensor(0.3), torch.tensor(label)
    )
    assert of_one(make_objective(DIRECTION), [0.3], label) == pytest.approx(float(want))


@pytest.mark.parametrize("label", [0, 1, 2])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_cross_entropy_of_three_logits_is_pytorchs(label: int, smoothing: float) -> None:
    logits = [0.3, -1.0, 0.5]
    want = torch.nn.functional.cross_entropy(
        torch.tensor([logits]), torch.tensor([label]), label_smoothing=smoothing
    )
    objective = make_objective(DIRECTION_3, label_smoothing=smoothing)
    assert of_one(objective, logits, label) == pytest.approx(float(want))


def test_focal_loss_forgives_what_is_already_right() -> None:
    plain, focal = make_objective(DIRECTION), make_objective(DIRECTION, direction="focal")
    p = 1 / (1 + math.exp(-3.0))
    assert of_one(focal, [3.0], 1.0) == pytest.approx(
        (1 - p) ** 2 * of_one(plain, [3.0], 1.0), 1e-4
    )
    gamma_0 = make_objective(DIRECTION, direction="focal", focal_gamma=0)
    assert of_one(gamma_0, [3.0], 1.0) == pytest.approx(of_one(plain, [3.0], 1.0))


def test_balanced_classes_weigh_as_much_as_each_other() -> None:
    frequencies = (0.9, 0.1)
    plain = make_objective(DIRECTION)
    balanced = make_objective(DIRECTION, frequencies, balance_classes=True)
    for label, frequency in enumerate(frequencies):
        weight = of_one(balanced, [0.4], label) / of_one(plain, [0.4], label)
        assert weight * frequency == pytest.approx(0.5)


ALL = [VOLATILITY, RETURN, DIRECTION, DIRECTION_3]


def everything() -> tuple[Objective, Tensor, Tensor]:
    objective = Objective(
        ALL,
        [SCALING, SCALING, LabelScaling(), LabelScaling()],
        [(), (), (0.5, 0.5), (0.3, 0.4, 0.3)],
    )
    generator = torch.Generator().manual_seed(0)
    y = torch.stack(
        [
            torch.randn(3, 4, generator=generator),
            torch.randn(3, 4, generator=generator),
            torch.randint(2, (3, 4), generator=generator).float(),
            torch.randint(3, (3, 4), generator=generator).float(),
        ],
        -1,
    )
    return objective, torch.randn(3, 4, 6, generator=generator), y


def test_steps_without_weight_do_not_count() -> None:
    objective, outputs, y = everything()
    weight = torch.ones(3, 4)
    weight[1], weight[:, 2] = 0.0, 0.0
    kept = weight > 0
    alone = objective(outputs[kept][None], y[kept][None], torch.ones(1, int(kept.sum())))
    torch.testing.assert_close(objective(outputs, y, weight), alone)
    assert objective(outputs, y, torch.zeros(3, 4)) == 0


def test_the_objective_is_the_mean_of_its_targets() -> None:
    objective, outputs, y = everything()
    each = [loss.mean() for loss in objective.each(outputs, y)]
    torch.testing.assert_close(objective(outputs, y, torch.ones(3, 4)), torch.stack(each).mean())


def test_every_output_has_a_gradient() -> None:
    objective, outputs, y = everything()
    outputs.requires_grad_()
    objective(outputs, y, torch.ones(3, 4)).backward()
    assert outputs.grad is not None
    assert (outputs.grad.abs().sum((0, 1)) > 0).all()
