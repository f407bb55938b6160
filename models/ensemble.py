"""An ensemble bundle: a network, boosted trees and a line on the same inputs, weighed by what they were worth.

Weights come from forecasts out of the members' samples whose labels have matured: when it is made,
by walking forward within the training part; when it is fine-tuned, on the bars that came since. Then
the network learns on; trees and line stay. `reweigh` renews the weights alone. Needs the extra `ensemble`.

Shapes: n bars of all symbols, M members, K targets, F features.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Final, NamedTuple, Unpack, get_args

import numpy as np
import pandas as pd
import xgboost
from numpy.typing import NDArray

from models import pipeline
from models.blending import (
    MEMBERS,
    MIN_PERIODS,
    SHRINKING,
    EnsembleConfig,
    Weighting,
    weigh,
)
from models.bundle import Bundle
from models.dataset import History, histories, load_bars
from models.evidence import bar_times, golden_inputs, provenance_of, variance_bias
from models.features import FeatureSpec
from models.pipeline import FitOptions, Fitting
from models.runtimes import sequence_member, with_golden
from models.runtimes.ensemble import others
from models.scaling import Scaler
from models.scoring import Floats, loss
from models.splits import Fold, Span, time_split, walk_forward
from models.targets import Target

FOLDS: Final = 2
"""Out-of-fold forecasts are made of the second half of the training part, in so many steps."""
MAX_TREE_ROWS: Final = 1_000_000
ROUNDS: Final = 600
PATIENCE_ROUNDS: Final = 30
BOOSTING: Final[Mapping[str, Any]] = {
    "eta": 0.1,
    "max_depth": 6,
    "min_child_weight": 20,
    "subsample": 0.8,
    "colsample_bytree": 0.8,
    "tree_method": "hist",
}


def fit_ensemble(
    bars: pd.DataFrame,
    targets: Sequence[Target],
    *,
    weighting: Weighting = "equal",
    spec: FeatureSpec | None = None,
    recipe: pipeline.Recipe | None = None,
    parent: str | None = None,
    **options: Unpack[FitOptions],
) -> Bundle:
    """As `models.pipeline.fit_bundle`; the network is fitted `FOLDS` times more, for the weights.

    Metrics hold the out-of-fold losses of every member and of every way to weigh them. There is no
    checkpoint of so many fits: `checkpoint` is refused with ValueError.
    """
    how = Fitting(recipe or pipeline.Recipe(), parent, **options)
    if how.checkpoint is not None:
        raise ValueError("an ensemble is fitted several times over: it has no checkpoint")
    recipe, bars = how.recipe, load_bars(bars)
    spec = spec or recipe.spec_for(bars)
    past = histories(bars, spec, targets, how.advance)
    fold = recipe.fold(bar_times(past), spec)
    inner = walk_forward(
        np.concatenate([h.ts[fold.train.rows(h.ts)] for h in past]),
        FOLDS,
        validation=recipe.validation,
        embargo_ms=recipe.embargo_bars * spec.interval_ms,
    )
    parts = []
    for part in inner:
        bundle = _members(past, part, spec, targets, weighting, how)
        level = _levels(bundle, past, part.validation, how.device)
        parts.append(_said(bundle, past, part.test, how.device) + level)
    out_of_fold = np.concatenate(parts)
    labels = np.concatenate([h.y for h in past] * len(inner))
    ts = np.concatenate([h.ts for h in past] * len(inner))

    bundle = _members(past, fold, spec, targets, weighting, how)
    shares, evidence = _shares(targets, weighting, out_of_fold, labels, ts)
    bundle = _leveled(_weighed(bundle, shares), past, fold.validation, how.device)
    bundle = replace(bundle, metrics={**bundle.metrics, **evidence})
    return pipeline.with_evidence(bundle, past, fold.test, how.device, recipe)


def fine_tune(parent: Bundle, bars: pd.DataFrame, how: Fitting) -> Bundle:
    """A child whose network has learnt from recent bars, with weights by what they showed of the parent.

    Only bars that the parent was not made of count for the weights, and only where they hold
    `MIN_PERIODS` of each target.
    """
    config, ensemble = parent.config, _config(parent)
    past = histories(load_bars(bars), config.features, config.targets, how.advance)
    times = bar_times(past)
    shares, evidence = _renewed(parent, past, ensemble.weighting, how.device)
    network = pipeline.fine_tune(
        sequence_member(parent),
        bars,
        recipe=how.recipe,
        watchers=how.watchers,
        checkpoint=how.checkpoint,
        device=how.device,
    )
    child = replace(
        parent,
        weights={**parent.weights, **_named("sequence", network.weights)},
        provenance=network.provenance.model_copy(update={"parent": parent.version}),
        metrics={**network.metrics, **evidence},
    )
    newest = how.recipe.validation
    recent = time_split(times, (1 - newest, newest, 0.0)).validation
    child = _leveled(_weighed(child, shares), past, recent, how.device)
    return pipeline.with_evidence(child, past, recent, how.device)


def reweigh(parent: Bundle, bars: pd.DataFrame, device: str = "auto") -> Bundle:
    """A child with the parent's members and level, weighed by what they showed on bars it was not made of.

    By the parent's own way to weigh where that shrinks towards equal, else by `shrunk`. A target
    without `MIN_PERIODS` matured periods keeps its weights; raises ValueError where none has them.
    """
    config, ensemble = parent.config, _config(parent)
    past = histories(load_bars(bars), config.features, config.targets)
    way = ensemble.weighting if ensemble.weighting in SHRINKING else "shrunk"
    shares, evidence = _renewed(parent, past, way, device)
    if np.array_equal(shares, ensemble.weights):
        raise ValueError(f"no target has {MIN_PERIODS} matured periods since its weights were made")
    child = replace(
        parent,
        provenance=provenance_of(past, parent.provenance.seed, parent.version),
        metrics=evidence,
        golden={},
    )
    times = bar_times(past)
    everything = Span(int(times.min()), int(times.max()) + 1)
    return with_golden(_weighed(child, shares, way), golden_inputs(past, everything))


def gain(bundle: Bundle, past: Sequence[History], span: Span, target: Target) -> float:
    """What `shrunk` weights would have won over the present ones in the span, at best: they saw it.

    Mean loss of the target; 0 where fewer than `MIN_PERIODS` of its periods have matured.
    """
    config, k = bundle.config, bundle.config.targets.index(target)
    said = _said(bundle, past, span, "cpu") + np.array(config.variance_bias)
    labels, present = np.concatenate([h.y for h in past]), np.array(_config(bundle).weights)
    shares, _ = renewed(config.targets, "shrunk", present, said, labels, bar_times(past))
    known = np.isfinite(said[:, :, k]).all(axis=1) & np.isfinite(labels[:, k])
    before, after = (
        loss(target, said[known, :, k] @ row[k], labels[known, k]) for row in (present, shares)
    )
    return float(np.mean(before - after)) if known.any() else 0.0


def forecast(bundle: Bundle, past: Sequence[History], span: Span, device: str) -> list[Floats]:
    """As `models.pipeline.forecast`."""
    said = _said(bundle, past, span, device)
    values = np.einsum("km,nmk->nk", np.array(_config(bundle).weights), said)
    values += np.array(bundle.config.variance_bias)
    return np.split(values, np.cumsum([len(h.ts) for h in past])[:-1])


def _config(bundle: Bundle) -> EnsembleConfig:
    assert isinstance(bundle.config.network, EnsembleConfig)
    return bundle.config.network


# ---- members ----


def _members(
    past: Sequence[History],
    fold: Fold,
    spec: FeatureSpec,
    targets: Sequence[Target],
    weighting: Weighting,
    how: Fitting,
) -> Bundle:
    """All members, fitted on the fold's training part and stopped by its validation part."""
    network = pipeline.fit_network(past, fold, spec, targets, how)
    line = pipeline.fit_line(past, fold.train, spec, targets, how.recipe)
    trees = _trees(past, fold, network, how.recipe.training.seed)
    config = EnsembleConfig(
        sequence=network.config.sequence,
        weighting=weighting,
        weights=((1 / len(MEMBERS),) * len(MEMBERS),) * len(targets),
    )
    return replace(
        network,
        config=network.config.model_copy(update={"network": config}),
        weights=_named("sequence", network.weights)
        | _named("trees", {str(k): tree for k, tree in enumerate(trees)})
        | _named("linear", line),
    )


def _named(member: str, weights: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    return {f"{member}/{name}": array for name, array in weights.items()}


def _trees(
    past: Sequence[History], fold: Fold, network: Bundle, seed: int
) -> list[NDArray[np.uint8]]:
    """XGBoost's JSON of each target, on scaled features and the network's standardised labels."""
    grown = []
    for k, target in enumerate(network.config.targets):
        fit, valid = (
            _rows(past, span, network.scaler, k) for span in (fold.train, fold.validation)
        )
        scaling = network.config.label_scaling[k]
        train = xgboost.QuantileDMatrix(fit.x, (fit.y - scaling.mean) / scaling.sd, nthread=1)
        judge = xgboost.QuantileDMatrix(
            valid.x, (valid.y - scaling.mean) / scaling.sd, ref=train, nthread=1
        )
        booster = xgboost.train(
            {**BOOSTING, **_objective(target), "seed": seed, "nthread": 1},
            train,
            ROUNDS,
            evals=[(judge, "validation")],
            early_stopping_rounds=PATIENCE_ROUNDS,
            verbose_eval=False,
        )
        best = booster[: booster.best_iteration + 1]
        best.set_attr(best_iteration=None, best_score=None)
        grown.append(np.frombuffer(bytes(best.save_raw("json")), np.uint8))
    return grown


def _objective(target: Target) -> dict[str, Any]:
    if target.kind != "direction":
        return {"objective": "reg:squarederror"}
    if target.n_outputs == 1:
        return {"objective": "binary:logistic"}
    return {"objective": "multi:softprob", "num_class": target.classes}


class _Rows(NamedTuple):
    x: NDArray[np.float32]
    """[n, F] scaled"""
    y: Floats
    """[n]"""


def _rows(past: Sequence[History], span: Span, scaler: Scaler, k: int) -> _Rows:
    """Scaled features and labels of target k, of warm rows whose labels were known in the span."""
    usable = [
        np.flatnonzero(span.purged_rows(h.ts, h.known_ts) & h.is_warm & np.isfinite(h.y[:, k]))
        for h in past
    ]
    every = -(-sum(map(len, usable)) // MAX_TREE_ROWS) or 1
    pairs = [
        (h.x[rows[::every]], h.y[rows[::every], k]) for h, rows in zip(past, usable, strict=True)
    ]
    x, y = (np.concatenate(column) for column in zip(*pairs, strict=True))
    return _Rows(scaler.transform(x), y)


def _said(bundle: Bundle, past: Sequence[History], span: Span, device: str) -> Floats:
    """What the members say f64[n, M, K], without a level; NaN as in `models.pipeline.forecast`."""
    flat = bundle.config.model_copy(update={"variance_bias": (0.0,) * len(bundle.config.targets)})
    bundle = replace(bundle, config=flat)
    by_network = pipeline.forecast(sequence_member(bundle), past, span, device)
    outputs_of = others(bundle)
    parts = []
    for h, values in zip(past, by_network, strict=True):
        said = np.full((len(h.ts), len(MEMBERS), values.shape[1]), np.nan)
        said[:, 0] = values
        rows = np.flatnonzero(np.isfinite(values).all(axis=1))
        if len(rows):
            for m, outputs in enumerate(outputs_of(np.ascontiguousarray(h.x[rows])), start=1):
                said[rows, m] = bundle.values(outputs)[0]
        parts.append(said)
    return np.concatenate(parts)


# ---- weights and levels ----


def renewed(
    targets: Sequence[Target],
    weighting: Weighting,
    present: Floats,
    said: Floats,
    labels: Floats,
    ts: NDArray[np.int64],
) -> tuple[Floats, dict[str, float]]:
    """Shares f64[K, M] by what the members said f64[n, M, K], and the losses that go with them.

    Labels f64[n, K] are NaN where they are not known: such rows count for nothing. A target keeps
    its `present` shares where the others do not hold `MIN_PERIODS` of it.
    """
    said = np.where(np.isfinite(labels)[:, None, :], said, np.nan)
    shares, evidence = _shares(targets, weighting, said, labels, ts)
    enough = [[_periods(said[:, :, k], ts, t) >= MIN_PERIODS] for k, t in enumerate(targets)]
    return np.where(enough, shares, present), evidence


def _renewed(
    parent: Bundle, past: Sequence[History], weighting: Weighting, device: str
) -> tuple[Floats, dict[str, float]]:
    """By the bars that the parent was not made of."""
    config, times = parent.config, bar_times(past)
    unseen = Span(parent.provenance.to_ts + 1, int(times.max()) + 1)
    said = _said(parent, past, unseen, device) + np.array(config.variance_bias)
    labels, present = np.concatenate([h.y for h in past]), np.array(_config(parent).weights)
    return renewed(config.targets, weighting, present, said, labels, times)


def _shares(
    targets: Sequence[Target],
    weighting: Weighting,
    said: Floats,
    labels: Floats,
    ts: NDArray[np.int64],
) -> tuple[Floats, dict[str, float]]:
    """Shares f64[K, M], and the losses that they and the other ways would have had."""
    shares, evidence = [], {}
    for k, target in enumerate(targets):
        known = np.isfinite(said[:, :, k]).all(axis=1) & np.isfinite(labels[:, k])
        values, y = said[known, :, k], labels[known, k]
        losses = np.stack([loss(target, v, y) for v in values.T], axis=1)
        truth = y if target.kind != "direction" else (y == target.classes - 1).astype(np.float64)
        periods = _periods(said[known, :, k], ts[known], target)
        judge = partial(loss, target, label=y) if target.kind == "volatility" else None
        ways = {
            way: weigh(way, losses, values, truth, periods, judge) for way in get_args(Weighting)
        }
        shares.append(ways[weighting])
        if known.any():
            for m, member in enumerate(MEMBERS):
                evidence[f"{target.name}/out_of_sample/{member}"] = float(losses[:, m].mean())
            for way, share in ways.items():
                blended = loss(target, values @ share, y)
                evidence[f"{target.name}/out_of_sample/{way}"] = float(blended.mean())
    return np.stack(shares), evidence


def _periods(values: Floats, ts: NDArray[np.int64], target: Target) -> float:
    """Horizons that fit into the bar times at which there are values f64[n, M]."""
    return len(np.unique(ts[np.isfinite(values).all(axis=1)])) / target.horizon


def _levels(bundle: Bundle, past: Sequence[History], span: Span, device: str) -> Floats:
    """Variance bias f64[M, K] of each member by itself, from what it said of the span."""
    said, bounds = _said(bundle, past, span, device), np.cumsum([len(h.ts) for h in past])[:-1]
    return np.array(
        [
            variance_bias(bundle.config.targets, past, np.split(said[:, m], bounds))
            for m in range(len(MEMBERS))
        ]
    )


def _weighed(bundle: Bundle, shares: Floats, weighting: Weighting | None = None) -> Bundle:
    rows = tuple(tuple(float(s) for s in row / row.sum()) for row in shares)
    config = _config(bundle)
    how = {"weights": rows, "weighting": weighting or config.weighting}
    network = EnsembleConfig.model_validate({**config.model_dump(), **how})
    return replace(bundle, config=bundle.config.model_copy(update={"network": network}))


def _leveled(bundle: Bundle, past: Sequence[History], span: Span, device: str) -> Bundle:
    """With the variance bias that the blend needs on the span."""
    zero = (0.0,) * len(bundle.config.targets)
    flat = replace(bundle, config=bundle.config.model_copy(update={"variance_bias": zero}))
    bias = variance_bias(bundle.config.targets, past, forecast(flat, past, span, device))
    return replace(bundle, config=bundle.config.model_copy(update={"variance_bias": bias}))
