"""The front door: bars in a table, forecasts out, by scikit-learn's habits.

What it fits is the bundle that the workers serve. Needs the package scikit-learn.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, get_args

import numpy as np
import pandas as pd
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_is_fitted

from models.blending import EnsembleConfig, Weighting
from models.bundle import load, save
from models.dataset import epoch_ms, histories, load_bars
from models.network_config import NetworkConfig
from models.pipeline import Recipe, fine_tune, fit_bundle, score
from models.replay import replay
from models.runtimes import open_runtime
from models.scoring import Floats
from models.targets import Target
from models.training import TrainingConfig

if TYPE_CHECKING:
    from models.explain import Explanation

Kind = Literal["volatility", "direction", "return"]


class BarForecaster(BaseEstimator):  # type: ignore[misc] # scikit-learn has no types
    """Forecasts from a table with the columns symbol, ts, open, high, low, close, volume.

    `target` is one kind or several, each over the next `horizon` bars; the labels come from the
    bars themselves, so there is no y. `window`, `hidden`, `layers`, `epochs`, `learning_rate` and
    `seed` go before what `recipe` says, which holds every other option. `ensemble` names how
    network, boosted trees and a line are weighed (`models.blending`); without it there is no blend.
    """

    def __init__(
        self,
        target: Kind | Sequence[Kind] = "volatility",
        horizon: int = 30,
        *,
        window: int | None = None,
        hidden: int | None = None,
        layers: int | None = None,
        epochs: int | None = None,
        learning_rate: float | None = None,
        seed: int | None = None,
        ensemble: Weighting | None = None,
        recipe: Recipe | None = None,
        device: str = "auto",
    ) -> None:
        self.target = target
        self.horizon = horizon
        self.window = window
        self.hidden = hidden
        self.layers = layers
        self.epochs = epochs
        self.learning_rate = learning_rate
        self.seed = seed
        self.ensemble = ensemble
        self.recipe = recipe
        self.device = device

    def fit(self, X: pd.DataFrame, y: None = None) -> Self:
        """Train a bundle from nothing. Raises as `models.pipeline.fit_bundle`."""
        kinds = [self.target] if isinstance(self.target, str) else self.target
        targets = [Target(kind=kind, horizon=self.horizon) for kind in kinds]
        recipe, device = self._recipe(), self.device
        if self.ensemble:
            if self.ensemble not in get_args(Weighting):
                raise ValueError(f"ensemble={self.ensemble!r} is none of {get_args(Weighting)}")
            from models.ensemble import fit_ensemble

            self.bundle_ = fit_ensemble(
                X, targets, weighting=self.ensemble, recipe=recipe, device=device
            )
        else:
            self.bundle_ = fit_bundle(X, targets, recipe=recipe, device=device)
        return self

    def partial_fit(self, X: pd.DataFrame, y: None = None) -> Self:
        """Learn from recent bars by a few careful epochs; the scaler stays as it is."""
        check_is_fitted(self)
        self.bundle_ = fine_tune(self.bundle_, X, device=self.device)
        return self

    def predict(self, X: pd.DataFrame) -> Floats:
        """What the workers would say at the close of each bar: f64[n], of several targets [n, K].

        In the order of the rows; NaN where a symbol warms up and for bars that the stream refuses.
        The log of the expected variance per bar, the log return, or the probability of a rise.
        """
        check_is_fitted(self)
        config = self.bundle_.config
        bars = load_bars(X)
        past = histories(bars, config.features, ())
        said = np.concatenate(replay(open_runtime(self.bundle_, device=self.device), past))
        names = [target.name for target in config.targets]
        known = bars[["symbol", "ts"]].assign(**dict(zip(names, said.T, strict=True)))
        rows = pd.DataFrame({"symbol": X["symbol"].astype(str), "ts": epoch_ms(X["ts"])})
        values = rows.merge(known, on=["symbol", "ts"], how="left")[names].to_numpy(np.float64)
        return values[:, 0] if isinstance(self.target, str) else values

    def score(self, X: pd.DataFrame, y: None = None) -> float:
        """Skill against the bundle's frozen references: 1 - loss / their loss, mean of the targets."""
        check_is_fitted(self)
        config = self.bundle_.config
        past = histories(load_bars(X), config.features, config.targets)
        values = replay(open_runtime(self.bundle_, device=self.device), past)
        scored = score(self.bundle_, past, values)
        loss, reference = (
            np.nanmean(np.concatenate(columns), axis=0)
            for columns in ([s.losses for s in scored], [s.reference_losses for s in scored])
        )
        return float(np.mean(1 - loss / reference))

    def explain(self, X: pd.DataFrame) -> "Explanation":
        """Where the network looks on these bars, and whether it matters: see `models.explain`."""
        from models.explain import explain

        check_is_fitted(self)
        return explain([self.bundle_], X)

    def save(self, directory: str | Path) -> Path:
        """Write the bundle into `directory`, under its version; the path to serve it from."""
        check_is_fitted(self)
        return save(self.bundle_, Path(directory))

    @classmethod
    def load(cls, path: str | Path, device: str = "auto") -> Self:
        """Of a bundle, whoever made it; refused (BundleRejected) if a byte of it is wrong.

        Fitted anew it has the same network and weighting; all else is as by default.
        """
        bundle = load(Path(path))
        targets, network = bundle.config.targets, bundle.config.network
        weighting = recipe = None
        if isinstance(network, EnsembleConfig):
            weighting, network = network.weighting, network.sequence
        if isinstance(network, NetworkConfig):
            recipe = Recipe(network=network.model_dump(exclude={"n_features", "n_outputs"}))
        kinds = [target.kind for target in targets]
        made = cls(
            kinds[0] if len(kinds) == 1 else kinds,
            horizon=targets[0].horizon,
            seed=bundle.provenance.seed,
            ensemble=weighting,
            recipe=recipe,
            device=device,
        )
        made.bundle_ = bundle
        return made

    def _recipe(self) -> Recipe:
        recipe = Recipe.model_validate(self.recipe or {})
        network = _given(window=self.window, hidden=self.hidden, layers=self.layers)
        training = _given(epochs=self.epochs, learning_rate=self.learning_rate, seed=self.seed)
        return recipe.model_copy(
            update={
                "network": recipe.network | network,
                "training": TrainingConfig.model_validate(
                    {**recipe.training.model_dump(), **training}
                ),
            }
        )


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}
