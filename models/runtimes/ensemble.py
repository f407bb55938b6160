"""An ensemble: the network in a runtime of its own, beside it trees by XGBoost and a line by numpy."""

import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import xgboost
from numpy.typing import NDArray

from models.blending import EnsembleConfig, of_member
from models.bundle import Bundle, BundleRejected
from models.runtimes import Runtime, Slots, Step, sequence_member


class EnsembleRuntime:
    def __init__(self, bundle: Bundle, build: Callable[[Bundle], Runtime]) -> None:
        """`build` opens the network. Raises BundleRejected if weights do not fit their members."""
        config = bundle.config.network
        if not isinstance(config, EnsembleConfig) or not config.takes(bundle.weights):
            raise BundleRejected(f"{bundle.version}: weights do not fit the ensemble")
        self.bundle = bundle
        self._network = build(sequence_member(bundle))
        self._others = others(bundle)
        self._shares = np.array(config.weights)

    @property
    def steps_seen(self) -> NDArray[np.int64]:
        return self._network.steps_seen

    def step(self, slots: Slots, x: NDArray[np.float32]) -> Step:
        said = self._network.step(slots, x)
        values, probabilities = blend(
            self._shares,
            [(said.values, said.probabilities)]
            + [self.bundle.values(outputs) for outputs in self._others(x)],
        )
        return Step(values, probabilities, said.weights)

    def rebuild(self, slots: Slots, x: NDArray[np.float32], lengths: Slots) -> None:
        self._network.rebuild(slots, x, lengths)

    def reset(self, slots: Slots) -> None:
        self._network.reset(slots)

    def grow(self, capacity: int) -> None:
        self._network.grow(capacity)

    def export(self, slots: Slots) -> dict[str, NDArray[Any]]:
        return self._network.export(slots)

    def load(self, slots: Slots, state: Mapping[str, NDArray[Any]]) -> None:
        self._network.load(slots, state)


Said = tuple[NDArray[np.float64], Mapping[int, NDArray[np.float64]]]
"""Values f64[n, K], and probabilities f64[n, classes] by target index."""


def blend(shares: NDArray[np.float64], members: list[Said]) -> Said:
    """The mean by shares f64[K, M]: of log variances, of returns, of probabilities."""
    values = np.einsum("km,mnk->nk", shares, np.stack([values for values, _ in members]))
    probabilities = {
        k: np.asarray(sum(share * p[k] for share, (_, p) in zip(shares[k], members, strict=True)))
        for k in members[0][1]
    }
    return values, probabilities


def others(bundle: Bundle) -> Callable[[NDArray[np.float32]], list[NDArray[np.float64]]]:
    """Trees and line: x f32[n, F] unscaled -> the outputs f64[n, O] of each, in MEMBERS' order.

    Raises BundleRejected where XGBoost does not take the trees.
    """
    config = bundle.config
    boosters = [
        _booster(bundle, raw, target.n_outputs)
        for (_, raw), target in zip(
            sorted(of_member(bundle.weights, "trees").items(), key=lambda item: int(item[0])),
            config.targets,
            strict=True,
        )
    ]
    line = of_member(bundle.weights, "linear")

    def outputs(x: NDArray[np.float32]) -> list[NDArray[np.float64]]:
        scaled = bundle.scaler.transform(x)
        grown = [
            np.asarray(booster.inplace_predict(scaled, predict_type="margin")).reshape(len(x), -1)
            for booster in boosters
        ]
        return [
            np.concatenate(grown, axis=1).astype(np.float64),
            (scaled @ line["weight"] + line["bias"]).astype(np.float64),
        ]

    return outputs


def _booster(bundle: Bundle, raw: NDArray[np.uint8], n_outputs: int) -> xgboost.Booster:
    booster = xgboost.Booster({"nthread": 1})
    n_features = bundle.config.network.n_features
    try:
        _check_trees(json.loads(raw.tobytes()), n_features)
        booster.load_model(bytearray(raw.tobytes()))
        said = booster.inplace_predict(np.zeros((1, n_features), np.float32), predict_type="margin")
    except (xgboost.core.XGBoostError, ValueError, KeyError, TypeError) as error:
        raise BundleRejected(f"{bundle.version}: its trees are none: {error!r}") from error
    if np.size(said) != n_outputs:
        raise BundleRejected(
            f"{bundle.version}: trees with {np.size(said)} outputs, not {n_outputs}"
        )
    return booster


def _check_trees(model: Any, n_features: int) -> None:
    """XGBoost's parser ends the process, or reads beyond an array, where a model is malformed."""
    for tree in model["learner"]["gradient_booster"]["model"]["trees"]:
        left, right, feature = (
            np.array(tree[name], np.int64)
            for name in ("left_children", "right_children", "split_indices")
        )
        nodes = len(left)
        per_node = ("split_conditions", "default_left", "base_weights", "parents", "sum_hessian")
        lengths = {len(right), len(feature), *(len(tree[name]) for name in per_node)}
        if lengths != {nodes} or int(tree["tree_param"]["num_nodes"]) != nodes or not nodes:
            raise ValueError("a tree's arrays differ in length")
        leaf = left == -1
        inner = np.concatenate([left[~leaf], right[~leaf]])
        if (right[leaf] != -1).any() or (inner <= 0).any() or (inner >= nodes).any():
            raise ValueError("a tree's child is outside it")
        if (feature < 0).any() or (feature >= n_features).any():
            raise ValueError("a tree splits by a feature that there is not")
