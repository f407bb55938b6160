"""From a table of bars to a bundle that can be served: fit it, fine-tune it, calibrate its monitor.

Shapes: n bars of a symbol, F features, K targets, O outputs, B pieces, L steps.
"""

import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from json import loads
from pathlib import Path
from typing import Annotated, Any, Final, NamedTuple, TypedDict, Unpack

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from models import tabular_training
from models.augmentation import (
    SHIFTED_LEVELS,
    Augmentation,
    AugmentedChunks,
    ChunkAugmentation,
    altered_history,
)
from models.blending import EnsembleConfig
from models.bundle import Bundle, BundleConfig
from models.dataset import (
    Chunks,
    History,
    head_of,
    histories,
    histories_on_disk,
    load_bars,
    training_rows,
)
from models.evidence import (
    bar_times,
    calibrations_of,
    fit_references,
    golden_inputs,
    metrics_of,
    provenance_of,
    too_short,
    variance_bias,
    watched,
)
from models.evidence import score as score
from models.features import WARM_UP_BARS, F, FeatureSpec
from models.losses import LossConfig, Objective
from models.network import Network
from models.network_config import NetworkConfig, burn_in_steps, warm_up_bars
from models.panel import infer_spec
from models.replay import with_inputs
from models.runtimes import with_golden
from models.runtimes.torch import load_network, weights_of
from models.scaling import Kind, Scaler
from models.schedules import ScheduleConfig
from models.scoring import Floats
from models.splits import Fold, Span, time_split
from models.tabular import TabularConfig
from models.targets import Target
from models.training import (
    ChunkSource,
    TrainingConfig,
    Watcher,
    label_statistics,
    start_linear,
    train,
)
from models.window_network import build_network

PIECE_BARS = 1024
"""History is forecast in pieces of so many bars side by side, each after a burn-in."""
PIECES_AT_ONCE = 64

Count = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(gt=0, lt=1)]


REGULARISED: Final[Mapping[str, Any]] = {"dropout": 0.3, "input_dropout": 0.1}
"""On SPY 2017-2018 the network without it is best after one epoch, and worse than with it."""


class Recipe(BaseModel):
    """How a bundle is made, apart from bars and targets."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    features: dict[str, Any] = {}
    """Fields of `FeatureSpec`; bar length and time zone are found out where they are not given."""
    network: dict[str, Any] = {}
    """Fields of `NetworkConfig`, over `REGULARISED`; inputs and outputs follow from features and targets."""
    training: TrainingConfig = TrainingConfig(
        epochs=12, learning_rate=1e-3, patience=4, schedule=ScheduleConfig(kind="constant")
    )
    """By default the rate does not depend on how long training may last, nor do the weights."""
    loss: LossConfig = LossConfig()
    augmentation: Augmentation = Augmentation(chunks=SHIFTED_LEVELS)
    scaler: Kind = "standard"
    validation: Share = 0.2
    """Share of the bar times, the newest. Epochs and variance bias are chosen on its first half; on its
    second, which nothing was fitted on, losses are measured and the monitor is calibrated."""
    embargo_bars: Annotated[int, Field(ge=0)] = 0
    """Bars between training and validation that are in neither, beside those purged for their label."""
    batch: Count = 32
    length: Count = 64
    burn_in: Count = 64
    chunks_per_stream: Count = 16
    arl0_bars: Count = 20_000
    """Declared bar times between two false alarms of the monitor."""

    def spec_for(self, bars: pd.DataFrame) -> FeatureSpec:
        """Raises ValidationError, CalendarUnavailable."""
        found = infer_spec(bars).model_dump()
        if self.features.get("calendar"):
            del found["max_fill"]  # the calendar knows what is closed: the rest is absent
        return FeatureSpec.model_validate({**found, **self.features})

    def fold(self, ts: NDArray[np.int64], spec: FeatureSpec) -> Fold:
        half = self.validation / 2
        return time_split(
            ts, (1 - self.validation, half, half), self.embargo_bars * spec.interval_ms
        )


def read_recipe(path: Path) -> Recipe:
    """Of TOML or JSON. Raises ValueError where it is neither, or no recipe."""
    text = path.read_text(encoding="utf-8")
    return Recipe.model_validate(tomllib.loads(text) if path.suffix == ".toml" else loads(text))


FINE_TUNING = Recipe(
    training=TrainingConfig(
        epochs=3, learning_rate=3e-4, patience=3, schedule=ScheduleConfig(kind="constant")
    ),
    validation=0.25,
    batch=16,
)
"""A few careful epochs. Its `validation` is trained on too: after a break the newest bars are what
there is to learn, and whether it was worth it is decided in shadow, on bars that nobody has seen."""


class FitOptions(TypedDict, total=False):
    """What every way to make a bundle can be told by keyword, beside bars, targets and recipe."""

    watchers: Sequence[Watcher]
    advance: Callable[[int], None]
    """Told of the bars whose features are done."""
    checkpoint: Path | None
    """As in `models.training.train`."""
    device: str


@dataclass(frozen=True)
class Fitting:
    """How a bundle is made, as the parts of the work hand it on; see `FitOptions`."""

    recipe: Recipe
    parent: str | None = None
    """The version it is to replace, for the record only."""
    watchers: Sequence[Watcher] = ()
    advance: Callable[[int], None] = lambda n: None
    checkpoint: Path | None = None
    device: str = "auto"


def fit_bundle(
    bars: pd.DataFrame,
    targets: Sequence[Target],
    *,
    spec: FeatureSpec | None = None,
    recipe: Recipe | None = None,
    parent: str | None = None,
    **options: Unpack[FitOptions],
) -> Bundle:
    """Train a bundle from nothing: scaler, linear start, network, references, monitor.

    `bars` as `load_bars` takes them; `parent` is the version it is to replace. Raises BarsRejected,
    also where there are too few, and Diverged.
    """
    how = Fitting(recipe or Recipe(), parent, **options)
    _network_config(targets, how.recipe)  # what is wrong with it is said before features are made
    bars = load_bars(bars)
    spec = spec or how.recipe.spec_for(bars)
    return fit_histories(histories(bars, spec, targets, how.advance), spec, targets, how)


def fit_file(
    path: Path,
    targets: Sequence[Target],
    scratch: Path,
    *,
    recipe: Recipe | None = None,
    **options: Unpack[FitOptions],
) -> Bundle:
    """`fit_bundle` from parquet larger than memory; the features lie in `scratch` meanwhile."""
    how = Fitting(recipe or Recipe(), **options)
    spec = how.recipe.spec_for(head_of(path))
    past = list(histories_on_disk(path, spec, targets, scratch, how.advance))
    return fit_histories(past, spec, targets, how)


def fit_histories(
    past: Sequence[History], spec: FeatureSpec, targets: Sequence[Target], how: Fitting
) -> Bundle:
    """`fit_bundle` from histories, which may lie on disk (`models.dataset.histories_on_disk`)."""
    fold = how.recipe.fold(bar_times(past), spec)
    bundle = fit_network(past, fold, spec, targets, how)
    return with_evidence(bundle, past, fold.test, how.device, how.recipe)


def fit_network(
    past: Sequence[History],
    fold: Fold,
    spec: FeatureSpec,
    targets: Sequence[Target],
    how: Fitting,
) -> Bundle:
    """Trained on one span and chosen by the next; `with_evidence` makes it fit to be served."""
    recipe = how.recipe
    start = _start(past, fold.train, spec, targets, recipe)
    bundle = Bundle(
        config=BundleConfig(
            features=spec,
            targets=tuple(targets),
            network=start.network.config,
            label_scaling=start.objective.scaling,
            variance_bias=(0.0,) * len(targets),
            warm_up_bars=warm_up_bars(start.network.config, recipe.burn_in),
            references=fit_references(past, spec, targets, fold.train),
            calibrations=(None,) * len(targets),
        ),
        weights=weights_of(start.network),
        scaler=start.scaler,
        provenance=provenance_of(past, recipe.training.seed, how.parent),
    )
    return _trained(bundle, start, past, fold.validation, how)


def fit_line(
    past: Sequence[History],
    span: Span,
    spec: FeatureSpec,
    targets: Sequence[Target],
    recipe: Recipe,
) -> dict[str, NDArray[np.float32]]:
    """What a network starts as: `weight` f32[F, O] and `bias` f32[O] on scaled features."""
    recipe = recipe.model_copy(update={"network": {**recipe.network, "skip": True}})
    network = _start(past, span, spec, targets, recipe).network
    assert network.skip is not None
    weight = np.ascontiguousarray(network.skip.weight.numpy(force=True).T)
    return {"weight": weight, "bias": network.head.bias.numpy(force=True)}


def with_evidence(
    bundle: Bundle,
    past: Sequence[History],
    span: Span,
    device: str,
    calibrated_by: Recipe | None = None,
) -> Bundle:
    """With losses and golden outputs from the span, with inputs from all bars; and, where a recipe
    is given, alarms.
    """
    targets = bundle.config.targets
    values = forecast(bundle, past, span, device)
    scored = score(bundle, past, values)
    if recipe := calibrated_by:
        seed, arl0_bars = recipe.training.seed, recipe.arl0_bars
        differences = watched(bundle, past, values, scored)
        alarms = calibrations_of(past, targets, differences, arl0_bars, seed)
        config = bundle.config.model_copy(update={"calibrations": alarms})
        bundle = replace(bundle, config=config)
    bundle = replace(bundle, metrics={**bundle.metrics, **metrics_of(targets, scored)})
    return with_inputs(with_golden(bundle, golden_inputs(past, span)), past)


def search(
    bars: pd.DataFrame,
    targets: Sequence[Target],
    storage: Path,
    *,
    recipe: Recipe | None = None,
    trials: int = 30,
    advance: Callable[[int], None] = lambda n: None,
) -> Recipe:
    """The recipe with the network and training options that `models.tuning` found to do best.

    Needs the extra `tuning`. A second call with the same `storage` goes on. What was chosen by the
    validation part must be reported on bars that come later. Raises as `fit_bundle`.
    """
    from models.tuning import tune

    recipe = recipe or Recipe()
    bars = load_bars(bars)
    spec = recipe.spec_for(bars)
    past = histories(bars, spec, targets, advance)
    fold = recipe.fold(bar_times(past), spec)
    start = _start(past, fold.train, spec, targets, recipe)
    config = start.network.config
    found = tune(
        config,
        recipe.training,
        start.chunks,
        _chunks(past, fold.validation, start.scaler, recipe, config, shuffle=False),
        start.objective,
        storage=storage,
        trials=trials,
        scaler=start.scaler,
    )
    network = found.network.model_dump(exclude={"family", "n_features", "n_outputs"})
    return recipe.model_copy(update={"network": network, "training": found.training})


def fine_tune(
    parent: Bundle,
    bars: pd.DataFrame,
    *,
    recipe: Recipe = FINE_TUNING,
    **options: Unpack[FitOptions],
) -> Bundle:
    """A child of `parent` that has learnt from recent `bars`, all of them.

    Scaler, label scaling, references and the monitor's calibration stay as they are; weights and
    variance bias move. Raises as `fit_bundle`.
    """
    how, config = Fitting(recipe, parent.version, **options), parent.config
    if isinstance(config.network, TabularConfig):
        return tabular_training.tune_tabular(parent, bars)
    if isinstance(config.network, EnsembleConfig):
        from models import ensemble

        return ensemble.fine_tune(parent, bars, how)
    past = histories(load_bars(bars), config.features, config.targets, how.advance)
    times = bar_times(past)
    everything = Span(int(times.min()), int(times.max()) + 1)
    recent = time_split(times, (1 - recipe.validation, recipe.validation, 0.0)).validation
    chunks = _chunks(past, everything, parent.scaler, recipe, config.sequence)
    if not chunks.counted:
        raise too_short(past)
    frequencies = label_statistics(chunks, config.targets).frequencies
    objective = Objective(config.targets, config.label_scaling, frequencies, recipe.loss)
    network = load_network(parent).requires_grad_(True)
    child = replace(
        parent,
        config=config.model_copy(update={"variance_bias": (0.0,) * len(config.targets)}),
        provenance=provenance_of(past, recipe.training.seed, parent.version),
        golden={},
    )
    child = _trained(child, _Start(network, parent.scaler, chunks, objective), past, recent, how)
    return with_evidence(child, past, recent, how.device)


def fit_anew(
    parent: Bundle,
    bars: pd.DataFrame,
    *,
    recipe: Recipe | None = None,
    **options: Unpack[FitOptions],
) -> Bundle:
    """A bundle of the parent's shape (features, targets, network, warm-up), trained from nothing.

    It can run beside its parent. The declared run length between false alarms is the parent's.
    Raises as `fit_bundle`.
    """
    config = parent.config
    network = config.network
    if isinstance(network, TabularConfig):  # its weights are fitted, not trained further
        return tabular_training.tune_tabular(parent, bars)
    weighting = None
    if isinstance(network, EnsembleConfig):
        weighting, network = network.weighting, network.sequence
    sizes = {"n_features", "n_outputs"}
    declared = [c.arl0_bars for c in config.calibrations if c is not None]
    recipe = (recipe or Recipe()).model_copy(
        update={
            "network": network.model_dump(exclude=sizes),
            "burn_in": config.warm_up_bars - config.window,
            "scaler": parent.scaler.kind,
        }
        | ({"arl0_bars": declared[0]} if declared else {})
    )
    if weighting is not None:
        from models import ensemble

        return ensemble.fit_ensemble(
            bars,
            config.targets,
            weighting=weighting,
            spec=config.features,
            recipe=recipe,
            parent=parent.version,
            **options,
        )
    return fit_bundle(
        bars,
        config.targets,
        spec=config.features,
        recipe=recipe,
        parent=parent.version,
        **options,
    )


def shift_level(parent: Bundle, bars: pd.DataFrame, target: Target, shift: float) -> Bundle:
    """A child of `parent` that says `shift` more of one target, and is the same otherwise.

    `bars` give its golden outputs and its data span. Raises ValueError for a direction, whose
    probabilities have no level, BarsRejected where there are too few bars.
    """
    config = parent.config
    if target.kind == "direction":
        raise ValueError("a direction has no level to shift")
    past = histories(load_bars(bars), config.features, config.targets)
    if not any(h.is_warm.any() for h in past):
        raise too_short(past)
    bias = tuple(
        b + shift if t == target else b
        for b, t in zip(config.variance_bias, config.targets, strict=True)
    )
    child = replace(
        parent,
        config=config.model_copy(update={"variance_bias": bias}),
        provenance=provenance_of(past, parent.provenance.seed, parent.version),
        metrics={f"{target.name}/shift": shift},
        golden={},
    )
    times = bar_times(past)
    return with_golden(child, golden_inputs(past, Span(int(times.min()), int(times.max()) + 1)))


def forecast(
    bundle: Bundle, past: Sequence[History], span: Span, device: str = "cpu"
) -> list[Floats]:
    """Values f64[n, K] of every symbol's rows; NaN but for warm rows of the span with a label in it."""
    if isinstance(bundle.config.network, TabularConfig):
        return tabular_training.forecast(bundle, past, span)
    if isinstance(bundle.config.network, EnsembleConfig):
        from models import ensemble

        return ensemble.forecast(bundle, past, span, device)
    network = load_network(bundle).to(_device(device))
    burn_in = bundle.config.warm_up_bars
    values = [np.full(h.y.shape, np.nan) for h in past]
    todo = sorted(pieces(past, span, burn_in), key=lambda p: p.start - p.stop)
    for i in range(0, len(todo), PIECES_AT_ONCE):
        some = todo[i : i + PIECES_AT_ONCE]
        outputs = _outputs(network, bundle.scaler, past, some)
        for b, piece in enumerate(some):
            said, _ = bundle.values(
                outputs[b, piece.first - piece.start : piece.stop - piece.start]
            )
            values[piece.history][piece.first : piece.stop] = said
    for h, v in zip(past, values, strict=True):
        v[~(span.purged_rows(h.ts, h.known_ts) & h.is_warm)] = np.nan
    return values


class _Start(NamedTuple):
    """What training begins with, all of it from the training part alone, or a parent's."""

    network: Network
    scaler: Scaler
    chunks: ChunkSource
    objective: Objective


def _start(
    past: Sequence[History],
    span: Span,
    spec: FeatureSpec,
    targets: Sequence[Target],
    recipe: Recipe,
) -> _Start:
    rows = training_rows(past, span)
    if not len(rows):
        raise too_short(past)
    scaler = Scaler.fit(rows, recipe.scaler)
    seed, alters = recipe.training.seed, recipe.augmentation
    copies = [
        altered_history(h, span.to_ts, alters.bars, (seed, copy, i), spec, targets)
        for copy in range(alters.copies)
        for i, h in enumerate(past)
    ]
    config = _network_config(targets, recipe)
    chunks: ChunkSource = _chunks([*past, *copies], span, scaler, recipe, config)
    if not len(chunks):
        raise too_short(past)
    if alters.chunks != ChunkAugmentation():
        chunks = AugmentedChunks(chunks, alters.chunks, scaler, targets, seed)
    statistics = label_statistics(chunks, targets)
    objective = Objective(targets, statistics.scaling, statistics.frequencies, recipe.loss)
    network = _new_network(config, scaler, recipe)
    start_linear(network, chunks, objective)
    return _Start(network, scaler, chunks, objective)


def _trained(
    bundle: Bundle, start: _Start, past: Sequence[History], chosen_by: Span, how: Fitting
) -> Bundle:
    """Train the network, then put its weights and its variance bias into the bundle."""
    network, recipe = start.network, how.recipe
    validation = _chunks(past, chosen_by, start.scaler, recipe, network.config, shuffle=False)
    if not validation.counted:
        raise too_short(past)
    network.to(_device(how.device))
    progress = train(
        network,
        start.chunks,
        validation,
        start.objective,
        recipe.training,
        how.checkpoint,
        how.watchers,
    )
    bundle = replace(bundle, weights=weights_of(network))
    said = forecast(bundle, past, chosen_by, how.device)
    bias = variance_bias(bundle.config.targets, past, said)
    config = bundle.config.model_copy(update={"variance_bias": bias})
    metrics = {
        "epochs": len(progress.epochs),
        "best_epoch": progress.best_epoch,
        "objective": progress.best_loss,
    }
    return replace(bundle, config=config, metrics=metrics)


class Piece(NamedTuple):
    history: int
    start: int
    first: int
    """The first row whose forecast counts; those before it are the burn-in."""
    stop: int


def pieces(past: Sequence[History], span: Span, burn_in: int) -> Iterator[Piece]:
    """All warm rows of the span in runs without a reset, each after at most `burn_in` rows."""
    for i, h in enumerate(past):
        warm = np.flatnonzero(h.is_warm & span.rows(h.ts))
        # A new run begins with a row whose predecessor is not in it; a reset always leaves a hole.
        for run in np.split(warm, np.flatnonzero(np.diff(warm) > 1) + 1):
            for first in range(int(run[0]), int(run[-1]) + 1, PIECE_BARS) if len(run) else ():
                oldest = first - (int(h.since_reset[first]) - WARM_UP_BARS)
                stop = min(first + PIECE_BARS, int(run[-1]) + 1)
                yield Piece(i, max(first - burn_in, oldest), first, stop)


@torch.inference_mode()
def _outputs(
    network: Network, scaler: Scaler, past: Sequence[History], pieces: Sequence[Piece]
) -> NDArray[np.float32]:
    """Outputs [B, L, O] of pieces from zero state; zeros follow the end of the shorter ones."""
    longest = max(piece.stop - piece.start for piece in pieces)
    x = np.zeros((len(pieces), longest, F), np.float32)
    for b, piece in enumerate(pieces):
        rows = slice(piece.start, piece.stop)
        x[b, : piece.stop - piece.start] = scaler.transform(past[piece.history].x[rows])
    device = next(network.parameters()).device
    state, parts = None, []
    for at in range(0, longest, 128):
        outputs, _, state = network(torch.from_numpy(x[:, at : at + 128]).to(device), state)
        parts.append(outputs.numpy(force=True))
    return np.concatenate(parts, axis=1)


def _chunks(
    past: Sequence[History],
    span: Span,
    scaler: Scaler,
    recipe: Recipe,
    network: NetworkConfig,
    *,
    shuffle: bool = True,
) -> Chunks:
    return Chunks(
        past,
        span,
        scaler,
        batch=recipe.batch,
        length=recipe.length,
        burn_in=burn_in_steps(network, recipe.burn_in),
        chunks_per_stream=recipe.chunks_per_stream,
        shuffle=shuffle,
        seed=recipe.training.seed,
    )


def _network_config(targets: Sequence[Target], recipe: Recipe) -> NetworkConfig:
    sizes: Mapping[str, int] = {"n_features": F, "n_outputs": sum(t.n_outputs for t in targets)}
    return NetworkConfig.model_validate({**REGULARISED, **recipe.network, **sizes})


def _new_network(config: NetworkConfig, scaler: Scaler, recipe: Recipe) -> Network:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.training.seed)
        return build_network(config, scaler)


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)
