"""The search: it finds, it prunes, it goes on where it was cut."""

from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.trial import TrialState

from models import tuning
from models.network import CausalNetwork
from models.network_config import NetworkConfig
from models.scaling import Scaler
from models.training import Diverged, Progress, TrainingConfig, train
from models.tuning import Choice, Range, Space, Tuned, tune
from models.window_network import CLOCK, WindowNetwork
from tests.models.networks import VOLATILITY
from tests.models.test_training import F, Synthetic, make_objective, remembered

optuna.logging.set_verbosity(optuna.logging.WARNING)

SPACE = Space(
    network={"window": Choice(options=(1, 6)), "dropout": Range(low=0.0, high=0.2)},
    training={"learning_rate": Range(low=1e-6, high=3e-2, log=True)},
)


def search(directory: Path, trials: int, space: Space = SPACE) -> Tuned:
    chunks, validation = Synthetic(remembered), Synthetic(remembered, seed=1)
    network = NetworkConfig(
        n_features=F, n_outputs=1, hidden=8, layers=1, heads=2, attention_size=8, gate=False
    )
    return tune(
        network,
        TrainingConfig(epochs=3),
        chunks,
        validation,
        make_objective(chunks, VOLATILITY),
        storage=directory / "search.db",
        trials=trials,
        space=space,
    )


def study_in(directory: Path) -> optuna.Study:
    return optuna.load_study(study_name="search", storage=f"sqlite:///{directory / 'search.db'}")


def test_the_best_trial_is_returned_as_configurations(tmp_path: Path) -> None:
    tuned = search(tmp_path, 6)
    study = study_in(tmp_path)
    assert tuned.loss == min(t.value for t in study.trials if t.value is not None)
    assert tuned.network.window == study.best_params["network.window"]
    assert tuned.network.hidden == 8
    assert tuned.training.learning_rate == study.best_params["training.learning_rate"]
    assert tuned.trials == 6


def test_a_second_call_goes_on_and_a_third_has_nothing_to_do(tmp_path: Path) -> None:
    search(tmp_path, 2)
    first = [t.params for t in study_in(tmp_path).trials]
    search(tmp_path, 4)
    both = [t.params for t in study_in(tmp_path).trials]
    assert both[:2] == first
    assert len({str(p) for p in both}) == 4
    search(tmp_path, 4)
    assert len(study_in(tmp_path).trials) == 4


def test_a_trial_that_was_killed_is_tried_again(tmp_path: Path) -> None:
    search(tmp_path, 1)
    killed = study_in(tmp_path).ask(
        {"network.window": optuna.distributions.CategoricalDistribution((1, 6))}
    )
    search(tmp_path, 2)
    trials = study_in(tmp_path).trials
    assert trials[killed.number].state == TrialState.FAIL
    assert trials[-1].state == TrialState.COMPLETE
    assert trials[-1].params["network.window"] == killed.params["network.window"]


def test_a_trial_that_is_behind_is_pruned() -> None:
    epochs: list[int] = []

    class Trial:
        def report(self, loss: float, epoch: int) -> None:
            epochs.append(epoch)

        def should_prune(self) -> bool:
            return len(epochs) == 2

    watcher = tuning._Pruner(Trial())  # type: ignore[arg-type]
    chunks = Synthetic(remembered)
    objective = make_objective(chunks, VOLATILITY)
    module = CausalNetwork(NetworkConfig(n_features=F, n_outputs=1, hidden=8, layers=1))
    with pytest.raises(optuna.TrialPruned):
        train(module, chunks, chunks, objective, TrainingConfig(epochs=9), None, [watcher])
    assert epochs == [1, 2]


def test_a_trial_that_diverges_does_not_end_the_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []

    def sometimes(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 1:
            raise Diverged("the loss is nan")
        return train(*args)

    monkeypatch.setattr("models.tuning.train", sometimes)
    assert search(tmp_path, 2).trials == 2
    assert study_in(tmp_path).trials[0].state == TrialState.PRUNED


def test_pictures_of_the_search_are_saved(tmp_path: Path) -> None:
    search(tmp_path, 3)
    for name in ("tuning_history.png", "tuning_options.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_cross_attention_reads_the_clock_by_the_scaler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scaler = Scaler("standard", np.full(CLOCK + 1, 3.0), np.full(CLOCK + 1, 2.0))
    clocks: list[list[float]] = []

    def trained(network: WindowNetwork, *_: Any) -> Progress:
        clocks.append(network.clock.tolist())
        return Progress(best_loss=1.0)

    monkeypatch.setattr("models.tuning.train", trained)
    chunks = Synthetic(remembered)
    config = NetworkConfig(
        n_features=F, n_outputs=1, mode="window", attention="cross", slower=3, hidden=8
    )
    tune(
        config,
        TrainingConfig(),
        chunks,
        chunks,
        make_objective(chunks, VOLATILITY),
        storage=tmp_path / "search.db",
        trials=1,
        space=Space(network={"dropout": Range(low=0.0, high=0.2)}, training={}),
        scaler=scaler,
    )
    assert clocks == [[3.0, 2.0]]


def test_an_option_that_does_not_exist_is_an_error(tmp_path: Path) -> None:
    space = Space(network={"colour": Choice(options=("red",))}, training={})
    with pytest.raises(ValueError, match="colour"):
        search(tmp_path, 1, space)
