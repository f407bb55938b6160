"""What runs where torch is absent: a line or a small perceptron for each target, as plain arrays.

Shapes: n rows, T bars of the window, F features, O outputs.
"""

from collections.abc import Mapping
from itertools import pairwise
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

Floats = NDArray[np.float32]
Weights = Mapping[str, NDArray[Any]]


class TabularConfig(BaseModel):
    """One estimator for each target over the features of the last `window` bars, laid side by side."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    family: Literal["tabular"] = "tabular"
    n_features: int = Field(ge=1, le=4096)
    outputs: tuple[Annotated[int, Field(ge=1, le=64)], ...] = Field(min_length=1)
    """Of each target."""
    window: int = Field(default=1, ge=1, le=256)
    hidden: tuple[Annotated[int, Field(ge=1, le=4096)], ...] = ()
    """Widths of the layers of rectified units; none: linear."""

    @property
    def n_outputs(self) -> int:
        return sum(self.outputs)

    def takes(self, weights: Weights) -> bool:
        """Whether these are its weights, by name and shape."""
        return {name: a.shape for name, a in weights.items()} == weight_shapes(self)

    def summary(self) -> str:
        what = f"perceptron of {' x '.join(map(str, self.hidden))}" if self.hidden else "line"
        return f"a {what} for each target over the last {self.window} step(s)"


def weight_shapes(config: TabularConfig) -> dict[str, tuple[int, ...]]:
    """`k.i.weight` and `k.i.bias` of layer i of target k's estimator."""
    shapes: dict[str, tuple[int, ...]] = {}
    for k, outputs in enumerate(config.outputs):
        sizes = [config.window * config.n_features, *config.hidden, outputs]
        for i, (into, out) in enumerate(pairwise(sizes)):
            shapes |= {f"{k}.{i}.weight": (into, out), f"{k}.{i}.bias": (out,)}
    return shapes


def outputs_of(config: TabularConfig, weights: Weights, x: Floats) -> Floats:
    """x[n, T, F] scaled, newest bar last -> outputs[n, O]."""
    said = []
    for k in range(len(config.outputs)):
        y = last_hidden(config, weights, k, x)
        last = len(config.hidden)
        said.append(y @ weights[f"{k}.{last}.weight"] + weights[f"{k}.{last}.bias"])
    return np.concatenate(said, axis=1)


def last_hidden(config: TabularConfig, weights: Weights, k: int, x: Floats) -> Floats:
    """What the last layer of target k's estimator is given, [n, units]."""
    y = x.reshape(len(x), config.window * config.n_features)
    for i in range(len(config.hidden)):
        y = np.maximum(y @ weights[f"{k}.{i}.weight"] + weights[f"{k}.{i}.bias"], 0)
    return y
