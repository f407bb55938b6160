"""Learning rates as a function of the step: nothing to save, so a resumed run is exact."""

import math
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

ScheduleKind = Literal["constant", "cosine", "exponential", "step", "one_cycle", "plateau"]


class ScheduleConfig(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: ScheduleKind = "cosine"
    warm_up: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Share of all steps in which the rate rises to its peak."""
    floor: Annotated[float, Field(gt=0, le=1)] = 0.02
    """Share of the peak that the rate ends at, or does not go below."""
    factor: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Each drop of `step` and `plateau`."""
    drops: Annotated[int, Field(ge=1)] = 4
    """Of `step`, evenly spaced."""
    patience: Annotated[int, Field(ge=1)] = 2
    """Epochs without gain before `plateau` drops."""


def rate_at(config: ScheduleConfig, step: int, total: int, plateaus: int = 0) -> float:
    """The share of the peak learning rate at `step` of `total`, in (0, 1].

    `plateaus` counts how often the validation loss stood still for `patience` epochs.
    A one-cycle (Smith & Topin 2018) with a warm-up of 0.3 is PyTorch's.
    """
    warm_up = round(config.warm_up * total)
    if step < warm_up:
        risen = (step + 1) / warm_up
        return _cosine(1 / 25, 1.0, risen) if config.kind == "one_cycle" else risen
    done = min((step - warm_up) / max(total - warm_up, 1), 1.0)
    floor = config.floor
    if config.kind == "cosine":
        return _cosine(1.0, floor, done)
    if config.kind == "one_cycle":
        return _cosine(1.0, floor / 100, done)
    if config.kind == "exponential":
        return float(floor**done)
    if config.kind == "step":
        return max(floor, config.factor ** int(done * (config.drops + 1)))
    if config.kind == "plateau":
        return max(floor, config.factor**plateaus)
    return 1.0


def _cosine(start: float, end: float, done: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * done)) / 2
