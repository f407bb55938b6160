"""What training minimises: one loss for each target, on labels in their own units.

Shapes: B streams, L steps, K targets, O outputs, C classes.
"""

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn import functional

from models.bundle import LabelScaling
from models.targets import Target

RegressionLoss = Literal["mse", "huber", "qlike", "pinball"]
ClassLoss = Literal["cross_entropy", "focal"]

MAX_LOG_RATIO = 6.0
"""QLIKE goes on as a straight line where the log variance is underestimated by more: exp() would let
a single bar decide the weights."""


class LossConfig(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    volatility: RegressionLoss = "qlike"
    """Squared errors of the log ask for the mean log; what is judged is the mean variance."""
    returns: Literal["mse", "huber", "pinball"] = "huber"
    direction: ClassLoss = "cross_entropy"
    huber_delta: Annotated[float, Field(gt=0)] = 1.0
    """In standard deviations of the label."""
    quantile: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Of the pinball loss."""
    focal_gamma: Annotated[float, Field(ge=0)] = 2.0
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    balance_classes: bool = False
    """Weigh each class by the inverse of its frequency in the training labels."""


class Objective(nn.Module):
    """The mean over targets of their losses; a step counts as much as its weight."""

    def __init__(
        self,
        targets: Sequence[Target],
        scaling: Sequence[LabelScaling],
        frequencies: Sequence[Sequence[float]],
        config: LossConfig | None = None,
    ) -> None:
        """`frequencies` of classes 0, 1, ... by target in the training labels; empty for the others."""
        super().__init__()
        self.targets, self.scaling = tuple(targets), tuple(scaling)
        self.frequencies = tuple(tuple(f) for f in frequencies)
        self.config = config or LossConfig()

    def forward(self, outputs: Tensor, y: Tensor, weight: Tensor) -> Tensor:
        """outputs[B, L, O], y[B, L, K], weight[B, L] -> scalar; zero where nothing has weight."""
        total = sum((loss * weight).sum() for loss in self.each(outputs, y))
        return torch.as_tensor(total) / (len(self.targets) * weight.sum().clamp_min(1e-12))

    def each(self, outputs: Tensor, y: Tensor) -> list[Tensor]:
        """The loss of every step, [B, L] for each target."""
        columns = torch.split(outputs, [target.n_outputs for target in self.targets], -1)
        return [
            self._class_loss(k, out, y[..., k])
            if target.kind == "direction"
            else self._regression_loss(k, out[..., 0], y[..., k])
            for k, (target, out) in enumerate(zip(self.targets, columns, strict=True))
        ]

    def _regression_loss(self, k: int, out: Tensor, y: Tensor) -> Tensor:
        config, scaling = self.config, self.scaling[k]
        kind = config.volatility if self.targets[k].kind == "volatility" else config.returns
        error = (y - scaling.mean) / scaling.sd - out
        if kind == "mse":
            return error.square()
        if kind == "huber":
            return functional.huber_loss(
                error, torch.zeros_like(error), reduction="none", delta=config.huber_delta
            )
        if kind == "pinball":
            return torch.maximum(config.quantile * error, (config.quantile - 1) * error)
        return _qlike(error * scaling.sd)

    def _class_loss(self, k: int, out: Tensor, y: Tensor) -> Tensor:
        config = self.config
        if self.targets[k].n_outputs == 1:
            out = torch.cat([torch.zeros_like(out), out], -1)
        C = out.shape[-1]
        truth = functional.one_hot(y.long(), C).to(out.dtype)
        truth = truth * (1 - config.label_smoothing) + config.label_smoothing / C
        log_p = torch.log_softmax(out, -1)
        if config.direction == "focal":  # Lin et al. 2017
            log_p = (1 - log_p.exp()).pow(config.focal_gamma) * log_p
        if config.balance_classes:
            frequency = torch.tensor(self.frequencies[k], device=out.device, dtype=out.dtype)
            truth = truth / (C * frequency.clamp_min(1e-6))
        return -(truth * log_p).sum(-1)


def _qlike(error: Tensor) -> Tensor:
    """exp(e) - e - 1 of e = log(realised / forecast variance)."""
    bounded = error.clamp(max=MAX_LOG_RATIO)
    slope = torch.exp(torch.tensor(MAX_LOG_RATIO)) - 1
    return torch.exp(bounded) - bounded - 1 + slope * (error - bounded)
