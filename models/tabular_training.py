"""From bars to a bundle with scikit-learn alone: what trains where torch is absent.

Shapes: n rows, T bars of the window, F features, K targets, O outputs.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Annotated, Any, Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from models.bundle import Bundle, BundleConfig, LabelScaling
from models.dataset import History, histories, load_bars, training_rows
from models.evidence import (
    bar_times,
    calibrations_of,
    fit_references,
    golden_inputs,
    label_scaling,
    metrics_of,
    provenance_of,
    score,
    too_short,
    variance_bias,
    watched,
)
from models.features import WARM_UP_BARS, F, FeatureSpec
from models.panel import infer_spec
from models.replay import with_inputs
from models.runtimes import with_golden
from models.scaling import Kind, Scaler
from models.scoring import Floats
from models.splits import Span, time_split
from models.tabular import TabularConfig, last_hidden, outputs_of
from models.targets import Target

ROWS_AT_ONCE: Final = 8_192
PARENT_WEIGHT: Final = 0.1
"""Of the parent's last layer when it learns from recent bars: a share of the number of rows."""


class TabularRecipe(BaseModel):
    """How a tabular bundle is made, apart from bars and targets."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    window: Annotated[int, Field(ge=1, le=256)] = 1
    hidden: tuple[int, ...] = ()
    penalty: Annotated[float, Field(gt=0)] = 1e-2
    """On squared weights, for each row."""
    epochs: Annotated[int, Field(ge=1)] = 10
    """Of a perceptron."""
    seed: int = 0
    scaler: Kind = "standard"
    validation: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Share of the bar times, the newest, by which the level is set and the monitor is calibrated."""
    max_rows: Annotated[int, Field(ge=1)] = 300_000
    """Above it every k-th row is learnt from."""
    arl0_bars: Annotated[int, Field(gt=0)] = 20_000


def fit_tabular(
    bars: pd.DataFrame,
    targets: Sequence[Target],
    *,
    spec: FeatureSpec | None = None,
    recipe: TabularRecipe | None = None,
    parent: str | None = None,
    advance: Callable[[int], None] = lambda n: None,
) -> Bundle:
    """As `models.pipeline.fit_bundle`, with scikit-learn in place of torch.

    Raises BarsRejected, also where there are too few; ValueError where a class never occurs.
    """
    recipe = recipe or TabularRecipe()
    bars = load_bars(bars)
    spec = spec or infer_spec(bars)
    past = histories(bars, spec, targets, advance)
    fold = time_split(bar_times(past), (1 - recipe.validation, recipe.validation, 0.0))
    rows = training_rows(past, fold.train)
    if not len(rows):
        raise too_short(past)
    scaler = Scaler.fit(rows, recipe.scaler)
    x, y = _examples(past, fold.train, scaler, recipe.window, recipe.max_rows)
    scaling = tuple(label_scaling(y[:, k], target) for k, target in enumerate(targets))
    network = TabularConfig(
        n_features=F,
        outputs=tuple(target.n_outputs for target in targets),
        window=recipe.window,
        hidden=recipe.hidden,
    )
    weights: dict[str, NDArray[Any]] = {}
    for k, target in enumerate(targets):
        labels = (y[:, k] - scaling[k].mean) / scaling[k].sd
        for i, (weight, bias) in enumerate(_fitted(x.reshape(len(x), -1), labels, target, recipe)):
            weights[f"{k}.{i}.weight"] = np.ascontiguousarray(weight, np.float32)
            weights[f"{k}.{i}.bias"] = np.ascontiguousarray(bias, np.float32)
    bundle = Bundle(
        config=BundleConfig(
            features=spec,
            targets=tuple(targets),
            network=network,
            label_scaling=scaling,
            variance_bias=(0.0,) * len(targets),
            warm_up_bars=recipe.window,
            references=fit_references(past, spec, targets, fold.train),
            calibrations=(None,) * len(targets),
        ),
        weights=weights,
        scaler=scaler,
        provenance=provenance_of(past, recipe.seed, parent),
    )
    bundle = _levelled(bundle, past, fold.validation)
    values = forecast(bundle, past, fold.validation)
    scored = score(bundle, past, values)
    differences = watched(bundle, past, values, scored)
    calibrations = calibrations_of(past, targets, differences, recipe.arl0_bars, recipe.seed)
    config = bundle.config.model_copy(update={"calibrations": calibrations})
    bundle = replace(bundle, config=config, metrics=metrics_of(targets, scored))
    return with_inputs(with_golden(bundle, golden_inputs(past, fold.validation)), past)


def tune_tabular(parent: Bundle, bars: pd.DataFrame, recipe: TabularRecipe | None = None) -> Bundle:
    """A child whose last layers have learnt from recent `bars`, drawn to the parent's by a penalty.

    All else stays, but for the variance bias. Raises BarsRejected where there are too few bars.
    """
    recipe = recipe or TabularRecipe(validation=0.25)
    config, network = parent.config, parent.config.network
    assert isinstance(network, TabularConfig)
    past = histories(load_bars(bars), config.features, config.targets)
    times = bar_times(past)
    everything = Span(int(times.min()), int(times.max()) + 1)
    recent = time_split(times, (1 - recipe.validation, recipe.validation, 0.0)).validation
    x, y = _examples(past, everything, parent.scaler, network.window, recipe.max_rows)
    said = outputs_of(network, parent.weights, x)
    weights, last, column = dict(parent.weights), len(network.hidden), 0
    for k, target in enumerate(config.targets):
        own = said[:, column : column + target.n_outputs].astype(np.float64)
        column += target.n_outputs
        residual = _residual(own, y[:, k], target, config.label_scaling[k])
        given = last_hidden(network, parent.weights, k, x).astype(np.float64)
        given = np.concatenate([given, np.ones((len(given), 1))], 1)
        products = given.T @ given + PARENT_WEIGHT * len(given) * np.eye(given.shape[1])
        change = np.linalg.solve(products, given.T @ residual).astype(np.float32)
        weights[f"{k}.{last}.weight"] = weights[f"{k}.{last}.weight"] + change[:-1]
        weights[f"{k}.{last}.bias"] = weights[f"{k}.{last}.bias"] + change[-1]
    child = replace(
        parent,
        config=config.model_copy(update={"variance_bias": (0.0,) * len(config.targets)}),
        weights=weights,
        provenance=provenance_of(past, recipe.seed, parent.version),
        golden={},
    )
    child = _levelled(child, past, recent)
    scored = score(child, past, forecast(child, past, recent))
    child = replace(child, metrics=metrics_of(config.targets, scored))
    return with_inputs(with_golden(child, golden_inputs(past, recent)), past)


def forecast(bundle: Bundle, past: Sequence[History], span: Span) -> list[Floats]:
    """As `models.pipeline.forecast`: values f64[n, K] of the rows of the span, NaN elsewhere."""
    network = bundle.config.network
    assert isinstance(network, TabularConfig)
    found = []
    for h in past:
        values = np.full(h.y.shape, np.nan)
        rows = np.flatnonzero(_full(h, network.window) & span.purged_rows(h.ts, h.known_ts))
        for at in range(0, len(rows), ROWS_AT_ONCE):
            some = rows[at : at + ROWS_AT_ONCE]
            x = _windows(h, some, bundle.scaler, network.window)
            values[some], _ = bundle.values(outputs_of(network, bundle.weights, x))
        found.append(values)
    return found


def _examples(
    past: Sequence[History], span: Span, scaler: Scaler, T: int, max_rows: int
) -> tuple[NDArray[np.float32], Floats]:
    """x[n, T, F] scaled and y[n, K] of the rows whose labels were known in the span."""
    rows = [
        np.flatnonzero(
            _full(h, T) & span.purged_rows(h.ts, h.known_ts) & np.isfinite(h.y).all(axis=1)
        )
        for h in past
    ]
    every = max(1, -(-sum(map(len, rows)) // max_rows))
    chosen = [(h, own[::every]) for h, own in zip(past, rows, strict=True) if len(own)]
    if not chosen:
        raise too_short(past)
    x = np.concatenate([_windows(h, own, scaler, T) for h, own in chosen])
    return x, np.concatenate([h.y[own] for h, own in chosen])


def _full(h: History, T: int) -> NDArray[np.bool_]:
    return h.since_reset >= WARM_UP_BARS + T - 1


def _windows(h: History, rows: NDArray[np.intp], scaler: Scaler, T: int) -> NDArray[np.float32]:
    return scaler.transform(h.x[rows[:, None] + np.arange(1 - T, 1)])


def _levelled(bundle: Bundle, past: Sequence[History], span: Span) -> Bundle:
    bias = variance_bias(bundle.config.targets, past, forecast(bundle, past, span))
    return replace(bundle, config=bundle.config.model_copy(update={"variance_bias": bias}))


def _fitted(
    x: NDArray[np.float32], y: Floats, target: Target, recipe: TabularRecipe
) -> list[tuple[NDArray[Any], NDArray[Any]]]:
    """Weight [inputs, outputs] and bias [outputs] of each layer."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression, Ridge
    from sklearn.neural_network import MLPClassifier, MLPRegressor

    classes = target.kind == "direction"
    if classes and len(np.unique(y)) < target.classes:
        raise ValueError(f"{target.name}: a class never occurs in the training part")
    if recipe.hidden:
        options = {
            "hidden_layer_sizes": recipe.hidden,
            "alpha": recipe.penalty,
            "max_iter": recipe.epochs,
            "batch_size": min(256, len(x)),
            "random_state": recipe.seed,
        }
        network = MLPClassifier(**options) if classes else MLPRegressor(**options)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # so many epochs, no more
            network.fit(x, y)
        return list(zip(network.coefs_, network.intercepts_, strict=True))
    strength = recipe.penalty * len(x)
    line = LogisticRegression(C=1 / strength, max_iter=500) if classes else Ridge(alpha=strength)
    line.fit(x, y)
    weight = np.atleast_2d(line.coef_).T
    return [(weight, np.broadcast_to(line.intercept_, weight.shape[1:]))]


def _residual(outputs: Floats, y: Floats, target: Target, scaling: LabelScaling) -> Floats:
    """What is left to learn, [n, O]: of a direction as one Newton step of the logistic regression."""
    if target.kind != "direction":
        return ((y - scaling.mean) / scaling.sd)[:, None] - outputs
    if target.n_outputs == 1:
        p, truth = 1 / (1 + np.exp(-outputs)), (y == 1)[:, None]
    else:
        exp = np.exp(outputs - outputs.max(axis=1, keepdims=True))
        p, truth = exp / exp.sum(axis=1, keepdims=True), y[:, None] == np.arange(target.classes)
    return np.asarray((truth - p) / np.maximum(p * (1 - p), 0.05))
