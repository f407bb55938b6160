"""Small networks and bundles with random weights, so that every weight matters to what they say."""

from typing import Any, Literal, get_args, get_origin

import numpy as np
import torch
from pydantic import ValidationError

from models.baselines import Reference
from models.bundle import Arrays, Bundle, BundleConfig, LabelScaling, ModelConfig, Provenance
from models.features import F, FeatureSpec
from models.input_drift import InputReference
from models.network import CausalNetwork, Network
from models.network_config import Mode, NetworkConfig
from models.runtimes import with_golden
from models.runtimes.torch import weights_of
from models.scaling import Scaler
from models.tabular import TabularConfig
from models.tabular import weight_shapes as tabular_shapes
from models.targets import Target
from models.window_network import WindowNetwork, build_network

VOLATILITY = Target(kind="volatility", horizon=5)
RETURN = Target(kind="return", horizon=5)
DIRECTION = Target(kind="direction", horizon=3)
DIRECTION_3 = Target(kind="direction", horizon=3, classes=3)


SMALL: dict[str, Any] = {
    "n_features": 5,
    "n_outputs": 2,
    "hidden": 8,
    "layers": 2,
    "window": 4,
    "heads": 2,
    "attention_size": 8,
}


def make_network(seed: int = 0, **config: Any) -> CausalNetwork:
    """5 features, 2 outputs and a window of 4 unless told otherwise; in evaluation mode."""
    network = make_any_network(seed, **config)
    assert isinstance(network, CausalNetwork)
    return network


def make_window_network(seed: int = 0, **config: Any) -> WindowNetwork:
    """As `make_network`, in window mode and with all features."""
    network = make_any_network(seed, **{"mode": "window", "n_features": F, **config})
    assert isinstance(network, WindowNetwork)
    return network


def make_any_network(seed: int = 0, **config: Any) -> Network:
    torch.manual_seed(seed)
    network = build_network(NetworkConfig(**{**SMALL, **config}))
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return network.eval()


def variations() -> list[dict[str, Any]]:
    """Each mode with each choice that a field of NetworkConfig offers, where they go together."""
    choices: list[tuple[str, Any]] = [("layers", 1), ("layers", 4), ("heads", 1), ("window", 1)]
    for name, field in NetworkConfig.model_fields.items():
        if name in ("mode", "family"):
            continue
        if get_origin(field.annotation) is Literal:
            choices += [(name, value) for value in get_args(field.annotation)]
        elif field.annotation is bool:
            choices += [(name, value) for value in (True, False)]
    found = []
    for mode in get_args(Mode):
        base = {**SMALL, "n_features": F, "slower": 2}
        for name, value in choices:
            try:
                NetworkConfig(**{**base, "mode": mode, name: value})
            except ValidationError:
                continue
            found.append({"mode": mode, "slower": 2, name: value})
    return found


def make_bundle(
    seed: int = 0, targets: tuple[Target, ...] = (VOLATILITY, DIRECTION), **network: Any
) -> Bundle:
    outputs = sum(target.n_outputs for target in targets)
    module = make_any_network(seed, n_features=F, n_outputs=outputs, **network)
    return _bundle_of(module.config, weights_of(module), targets, seed)


def make_tabular_bundle(
    seed: int = 0, targets: tuple[Target, ...] = (VOLATILITY, DIRECTION), **config: Any
) -> Bundle:
    """A perceptron over a window of 4 unless told otherwise."""
    small = {"n_features": F, "outputs": [t.n_outputs for t in targets], "window": 4, "hidden": [3]}
    tabular = TabularConfig.model_validate({**small, **config})
    rng = np.random.default_rng(seed)
    weights = {
        name: rng.normal(0, 0.1, shape).astype(np.float32)
        for name, shape in tabular_shapes(tabular).items()
    }
    return _bundle_of(tabular, weights, targets, seed)


def _bundle_of(
    model: ModelConfig, weights: Arrays, targets: tuple[Target, ...], seed: int
) -> Bundle:
    x = np.random.default_rng(seed).normal(1.0, 3.0, (3, 9, F)).astype(np.float32)
    bundle = Bundle(
        config=BundleConfig(
            features=FeatureSpec(interval_ms=60_000),
            targets=targets,
            network=model,
            label_scaling=tuple(
                LabelScaling() if t.kind == "direction" else LabelScaling(mean=-2.0, sd=0.5)
                for t in targets
            ),
            variance_bias=tuple(0.125 if t.kind == "volatility" else 0.0 for t in targets),
            warm_up_bars=12,
            references=tuple(Reference() for _ in targets),
            calibrations=tuple(None for _ in targets),
        ),
        weights=weights,
        scaler=Scaler.fit(x.reshape(-1, F)),
        provenance=Provenance(seed=seed, from_ts=0, to_ts=86_400_000, bars=27, symbols=3),
        metrics={"qlike": 0.25, "by_month": {"2020-01": 0.3}},
        inputs=InputReference.fit(x.reshape(-1, F), x[:, 0, :4]),
    )
    return with_golden(bundle, x)
