"""How the members of an ensemble are weighed: equally, or by matured losses out of their sample.

Shapes: n rows, M members, K targets, F features, O outputs.
"""

from collections.abc import Callable, Mapping
from itertools import combinations
from typing import Annotated, Any, Final, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

from models.network_config import NetworkConfig
from models.scoring import Floats

Weighting = Literal["equal", "shrunk", "stacked", "bayesian"]
MEMBERS: Final = ("sequence", "trees", "linear")
SHRINKAGE: Final = 0.5
"""Of `shrunk` and `stacked` towards equal weights, which are hard to beat (Stock & Watson 2004)."""
MIN_PERIODS: Final = 30
"""Matured periods (of one horizon each) below which a retrain leaves the weights as they are."""
SHRINKING: Final[tuple[Weighting, ...]] = ("shrunk", "stacked")

Weight = Annotated[float, Field(ge=0, le=1)]


class EnsembleConfig(BaseModel):
    """A network, boosted trees and a line; what they say is averaged in the targets' own units."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    family: Literal["ensemble"] = "ensemble"
    sequence: NetworkConfig
    weighting: Weighting = "equal"
    """How `weights` came about, and how a retrain renews them."""
    weights: tuple[tuple[Weight, ...], ...]
    """By target, of MEMBERS; each sums to 1."""

    @model_validator(mode="after")
    def _weights_are_shares(self) -> "EnsembleConfig":
        for row in self.weights:
            if len(row) != len(MEMBERS) or abs(sum(row) - 1) > 1e-6:
                raise ValueError(f"weights {row} are not {len(MEMBERS)} shares of 1")
        return self

    @property
    def n_features(self) -> int:
        return self.sequence.n_features

    @property
    def n_outputs(self) -> int:
        return self.sequence.n_outputs

    @property
    def window(self) -> int:
        return self.sequence.window

    def takes(self, weights: Mapping[str, NDArray[Any]]) -> bool:
        """`sequence/...` of the network, `linear/...`, and `trees/k` of each target: XGBoost's JSON."""
        parts = {member: of_member(weights, member) for member in MEMBERS}
        trees, line = parts["trees"], parts["linear"]
        return (
            sum(map(len, parts.values())) == len(weights)
            and self.sequence.takes(parts["sequence"])
            and {name: a.shape for name, a in line.items()}
            == {"weight": (self.n_features, self.n_outputs), "bias": (self.n_outputs,)}
            and set(trees) == {str(k) for k in range(len(self.weights))}
            and all(a.dtype == np.uint8 and a.ndim == 1 for a in trees.values())
        )

    def summary(self) -> str:
        shares = "; ".join(", ".join(f"{w:.2f}" for w in row) for row in self.weights)
        return (
            f"an ensemble of {self.sequence.summary()}, boosted trees and a line, weighed {shares} "
            f"({self.weighting})"
        )


def of_member(weights: Mapping[str, NDArray[Any]], member: str) -> dict[str, NDArray[Any]]:
    prefix = f"{member}/"
    return {name.removeprefix(prefix): a for name, a in weights.items() if name.startswith(prefix)}


def weigh(
    weighting: Weighting,
    losses: Floats,
    values: Floats,
    labels: Floats,
    periods: float,
    judge: Callable[[Floats], Floats] | None = None,
) -> Floats:
    """Shares f64[M] of 1 from what the members said out of their sample, and what then happened.

    losses and values f64[n, M], labels f64[n], all finite; `periods` is how many independent ones
    are in the n rows. `judge` gives the losses f64[n] of blended values where they are not squared
    errors.
    """
    M = losses.shape[1]
    equal = np.full(M, 1 / M)
    if weighting == "equal" or not len(labels):
        return equal
    if weighting == "bayesian":
        return bayesian(losses, periods)
    if weighting == "shrunk":
        own = by_performance(losses)
    else:
        own = stacked(values, labels) if judge is None else judged(values, judge)
    return SHRINKAGE * equal + (1 - SHRINKAGE) * own


def by_performance(losses: Floats) -> Floats:
    """Inverse mean losses: Bates & Granger 1969, without the correlations."""
    inverse = 1 / np.maximum(losses.mean(axis=0), 1e-12)
    return np.asarray(inverse / inverse.sum())


def stacked(values: Floats, labels: Floats) -> Floats:
    """Shares with the least squared error of the blend: Breiman 1996, exactly, by trying each subset."""
    M = values.shape[1]
    errors = values - labels[:, None]
    products = errors.T @ errors / len(errors)
    least, weights = np.inf, np.full(M, 1 / M)
    for size in range(1, M + 1):
        for members in map(list, combinations(range(M), size)):
            some = products[np.ix_(members, members)]
            ridge = 1e-9 * (np.trace(some) / size or 1.0) * np.eye(size)
            share = np.linalg.solve(some + ridge, np.ones(size))
            share /= share.sum()
            error = float(share @ some @ share)
            if (share >= 0).all() and error < least:
                least, weights = error, np.zeros(M)
                weights[members] = share
    return weights


def judged(values: Floats, judge: Callable[[Floats], Floats]) -> Floats:
    """As `stacked` for another loss, which is to be convex in what is said, as QLIKE is in logs."""
    from scipy.optimize import minimize  # type: ignore[import-untyped]

    M = values.shape[1]
    found = minimize(
        lambda shares: float(judge(values @ shares).mean()),
        np.full(M, 1 / M),
        method="SLSQP",
        bounds=[(0.0, 1.0)] * M,
        constraints={"type": "eq", "fun": lambda shares: shares.sum() - 1},
    )
    shares = np.clip(found.x, 0.0, None)
    return np.asarray(shares / shares.sum())


def bayesian(losses: Floats, periods: float) -> Floats:
    """Posterior probabilities of the members, equal before, by quasi-likelihood.

    Half the deviance of each period in units of the dispersion, which is the best member's mean
    (McCullagh & Nelder 1989, 9): QLIKE is half a gamma deviance, a squared error a normal one. Bars
    overlap, so `periods` counts what does not.
    """
    mean = losses.mean(axis=0)
    log_weights = -0.5 * periods * mean / max(float(mean.min()), 1e-12)
    weights = np.exp(log_weights - log_weights.max())
    return np.asarray(weights / weights.sum())
