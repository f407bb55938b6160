"""Search for network and training options with Optuna: pruned, resumable, every trial kept and drawn.

Needs the extra `tuning`. Trials are judged by the validation part; what was chosen by it must be
reported on bars that come later.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import optuna
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.trial import FrozenTrial, Trial, TrialState
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from models.losses import Objective
from models.network import Network
from models.network_config import NetworkConfig
from models.scaling import Scaler
from models.training import ChunkSource, Diverged, Epoch, TrainingConfig, start_linear, train
from models.window_network import build_network


class Range(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    low: float
    high: float
    log: bool = False

    def suggest(self, trial: Trial, name: str) -> float:
        return trial.suggest_float(name, self.low, self.high, log=self.log)


class Choice(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    options: Annotated[tuple[str | int | float | bool, ...], Field(min_length=1)]

    def suggest(self, trial: Trial, name: str) -> Any:
        return trial.suggest_categorical(name, self.options)


class Space(BaseModel):
    """What is searched: fields of `NetworkConfig` and of `TrainingConfig`; the others stay."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    network: Mapping[str, Range | Choice] = {
        "hidden": Choice(options=(32, 64, 128)),
        "layers": Choice(options=(1, 2)),
        "window": Choice(options=(10, 30, 78)),
        "dropout": Range(low=0.0, high=0.5),
        "input_dropout": Range(low=0.0, high=0.3),
    }
    training: Mapping[str, Range | Choice] = {
        "learning_rate": Range(low=1e-4, high=5e-3, log=True),
        "weight_decay": Range(low=1e-4, high=1e-1, log=True),
    }


class Tuned(NamedTuple):
    network: NetworkConfig
    training: TrainingConfig
    loss: float
    trials: int
    """How many were tried, pruned ones included: what a claim of skill must be discounted for."""


def tune(
    network: NetworkConfig,
    training: TrainingConfig,
    chunks: ChunkSource,
    validation: ChunkSource,
    objective: Objective,
    *,
    storage: Path,
    trials: int = 30,
    space: Space | None = None,
    scaler: Scaler | None = None,
) -> Tuned:
    """Try until the study in the SQLite file `storage` has `trials` finished trials; the best of them.

    A second call goes on where the first one ended or was killed; one process at a time. Pictures
    of the search are drawn beside the file. `scaler` is that of the inputs: by it cross-attention
    reads the clock. A trial whose validation loss is behind the median of
    the others at the same epoch is pruned; one that diverges counts as pruned.
    """
    space = space or Space()
    storage.parent.mkdir(parents=True, exist_ok=True)
    study = optuna.create_study(
        study_name=storage.stem,
        storage=f"sqlite:///{storage}",
        load_if_exists=True,
        pruner=optuna.pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=1),
    )
    _take_up_what_was_cut(study)
    study.sampler = optuna.samplers.TPESampler(seed=training.seed + len(study.trials))

    def one(trial: Trial) -> float:
        tried_network, tried_training = _suggested(trial, network, training, space)
        torch.manual_seed(training.seed)
        module = build_network(tried_network, scaler)
        start_linear(module, chunks, objective)
        try:
            watchers = [_Pruner(trial)]
            return train(
                module, chunks, validation, objective, tried_training, None, watchers
            ).best_loss
        except Diverged as error:
            raise optuna.TrialPruned(str(error)) from error

    left = trials - len(_finished(study))
    if left > 0:
        study.optimize(one, n_trials=left)
    draw(study, storage.parent)
    best = study.best_trial
    chosen = _suggested(_fixed(best), network, training, space)
    return Tuned(*chosen, loss=study.best_value, trials=len(_finished(study)))


class _Pruner:
    """A watcher that tells the study of every epoch, and ends a trial that is behind."""

    def __init__(self, trial: Trial) -> None:
        self._trial = trial

    def chunk(self, done: int, total: int, loss: float) -> None: ...

    def epoch(self, epoch: Epoch, network: Network, sample: Tensor) -> None:
        self._trial.report(epoch.validation_loss, epoch.number)
        if self._trial.should_prune():
            raise optuna.TrialPruned


def _suggested(
    trial: Any, network: NetworkConfig, training: TrainingConfig, space: Space
) -> tuple[NetworkConfig, TrainingConfig]:
    tried = [
        {name: searched.suggest(trial, f"{part}.{name}") for name, searched in fields.items()}
        for part, fields in (("network", space.network), ("training", space.training))
    ]
    return (
        NetworkConfig.model_validate({**network.model_dump(), **tried[0]}),
        TrainingConfig.model_validate({**training.model_dump(), **tried[1]}),
    )


def _fixed(trial: FrozenTrial) -> optuna.trial.FixedTrial:
    return optuna.trial.FixedTrial(trial.params)


def _finished(study: optuna.Study) -> list[FrozenTrial]:
    return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))


def _take_up_what_was_cut(study: optuna.Study) -> None:
    """A trial that was running when its process was killed is tried again first."""
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        study.tell(trial.number, state=TrialState.FAIL)
        study.enqueue_trial(trial.params)


BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#999999"  # Okabe & Ito: told apart by the colour-blind
PANELS_A_ROW = 4


def draw(study: optuna.Study, directory: Path) -> list[Path]:
    """`tuning_history.png` and `tuning_options.png`: losses by trial, and by each option."""
    done = [t for t in _finished(study) if t.state == TrialState.COMPLETE]
    pruned = [t for t in _finished(study) if t.state == TrialState.PRUNED and t.value is not None]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.scatter(
        [t.number for t in pruned], _losses(pruned), c=GREY, marker="x", label="pruned (last epoch)"
    )
    axes.scatter([t.number for t in done], _losses(done), c=BLUE, label="finished")
    best = np.minimum.accumulate(_losses(done))
    axes.step([t.number for t in done], best, where="post", color=ORANGE, label="best so far")
    since = study.trials[-1].number - study.best_trial.number
    axes.set(
        title=f"Does more search still help? {since} trials since the best",
        xlabel="trial",
        ylabel="validation loss",
    )
    axes.legend()
    history = directory / "tuning_history.png"
    figure.savefig(history, dpi=120)

    names = sorted(study.best_params)
    rows = -(-len(names) // PANELS_A_ROW)
    figure = Figure(figsize=(11, 3 * rows + 0.4), layout="constrained")
    panels = figure.subplots(rows, PANELS_A_ROW, sharey=True, squeeze=False)
    for panel, name in zip(panels.flat, names, strict=False):
        _by_option(panel, study, name, done)
    for panel in panels.flat[len(names) :]:
        panel.set_visible(False)
    for row in panels:
        row[0].set_ylabel("validation loss")
    figure.suptitle("Which options matter: loss of each finished trial (orange: the best)")
    options = directory / "tuning_options.png"
    figure.savefig(options, dpi=120)
    return [history, options]


def _by_option(axes: Axes, study: optuna.Study, name: str, done: Sequence[FrozenTrial]) -> None:
    searched, place = study.best_trial.distributions[name], dict[Any, int]()
    if isinstance(searched, CategoricalDistribution):
        found = sorted(searched.choices, key=lambda choice: (isinstance(choice, str), choice))
        place = {choice: i for i, choice in enumerate(found)}
        axes.set_xticks(range(len(found)), [str(choice) for choice in found])
        axes.set_xlim(-0.5, len(found) - 0.5)
    elif isinstance(searched, FloatDistribution) and searched.log:
        axes.set_xscale("log")
    for trials, colour, marker in ((done, BLUE, "o"), ([study.best_trial], ORANGE, "D")):
        at = [place.get(t.params[name], t.params[name]) for t in trials]
        axes.scatter(at, _losses(trials), c=colour, marker=marker)
    axes.set_xlabel(name.split(".")[-1].replace("_", " "))


def _losses(trials: Sequence[FrozenTrial]) -> list[float]:
    return [t.value for t in trials if t.value is not None]
