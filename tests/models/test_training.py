"""Training: it learns what is there, refuses what is not finite, and goes on where it was cut."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from tensorboard.backend.event_processing import event_accumulator

from models.dataset import Chunk
from models.losses import LossConfig, Objective
from models.network import CausalNetwork, Network
from models.network_config import NetworkConfig
from models.schedules import ScheduleConfig
from models.targets import Target
from models.training import (
    OPTIMISERS,
    Diverged,
    Epoch,
    TrainingConfig,
    evaluate,
    label_statistics,
    start_linear,
    train,
)
from models.watchers import ProgressBar, TensorBoard
from tests.models.networks import DIRECTION, DIRECTION_3, RETURN, VOLATILITY

F, LAG = 5, 3

Truth = Callable[[NDArray[np.float32]], NDArray[np.float32]]


class Synthetic:
    """Chunks of seeded noise x and labels that `truth` makes of x[B, all steps, F]."""

    def __init__(self, truth: Truth, seed: int = 0, streams: int = 8, chunks: int = 6, L: int = 16):
        rng = np.random.default_rng(seed)
        x = rng.normal(size=(streams, chunks * L, F)).astype(np.float32)
        self.x, self.y = np.split(x, chunks, 1), np.split(truth(x), chunks, 1)
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.x)

    def __iter__(self) -> Iterator[Chunk]:
        for k, (x, y) in enumerate(zip(self.x, self.y, strict=True)):
            weight = np.ones(x.shape[:2], np.float32)
            if k == 0:
                weight[:, :LAG] = 0.0
            yield Chunk(x, y, weight, carry=k > 0)
        self.epoch += 1


def linear(x: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.asarray(-10 + x[..., :1] - 0.5 * x[..., 1:2], np.float32)


def remembered(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """What was LAG steps ago, which no linear model of the newest bar can know."""
    return np.roll(x[..., :1], LAG, axis=1)


def make_objective(chunks: Synthetic, *targets: Target, **config: Any) -> Objective:
    statistics = label_statistics(chunks, targets)
    return Objective(
        targets, statistics.scaling, statistics.frequencies, LossConfig.model_validate(config)
    )


def new_network(seed: int = 0, outputs: int = 1, **config: Any) -> CausalNetwork:
    torch.manual_seed(seed)
    small: dict[str, Any] = {
        "hidden": 16,
        "layers": 1,
        "window": 6,
        "heads": 2,
        "attention_size": 8,
    }
    return CausalNetwork(NetworkConfig(n_features=F, n_outputs=outputs, **{**small, **config}))


def run(
    network: CausalNetwork, truth: Truth = remembered, checkpoint: Path | None = None, **config: Any
) -> Any:
    chunks, validation = Synthetic(truth), Synthetic(truth, seed=1)
    objective = make_objective(chunks, VOLATILITY)
    options = {"epochs": 4, "patience": 99, **config}
    return train(network, chunks, validation, objective, TrainingConfig(**options), checkpoint)


def weights_of(network: CausalNetwork) -> dict[str, torch.Tensor]:
    return {name: t.clone() for name, t in network.state_dict().items()}


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_it_learns_what_only_memory_can_know(cell: str) -> None:
    progress = run(new_network(cell=cell, dropout=0.0), epochs=25, learning_rate=3e-2)
    assert progress.best_loss < 0.2


@pytest.mark.parametrize("optimiser", OPTIMISERS)
@pytest.mark.parametrize("kind", ["constant", "cosine", "one_cycle"])
def test_every_optimiser_makes_the_loss_smaller(optimiser: Any, kind: Any) -> None:
    rate = 0.05 if optimiser == "sgd" else 5e-3
    progress = run(
        new_network(dropout=0.0),
        linear,
        optimiser=optimiser,
        learning_rate=rate,
        schedule=ScheduleConfig(kind=kind),
    )
    assert progress.epochs[-1].train_loss < 0.8 * progress.epochs[0].train_loss


def test_the_linear_start_is_the_linear_model() -> None:
    chunks = Synthetic(linear)
    objective = make_objective(chunks, VOLATILITY)
    network = new_network()
    start_linear(network, chunks, objective, ridge=1e-6)
    assert evaluate(network, Synthetic(linear, seed=1), objective) < 1e-6


@pytest.mark.parametrize(("target", "classes"), [(DIRECTION, 2), (DIRECTION_3, 3)])
def test_the_linear_start_of_a_direction_beats_the_base_rate(target: Target, classes: int) -> None:
    def direction(x: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.digitize(x[..., :1], [-0.5, 0.5][: classes - 1]).astype(np.float32)

    chunks = Synthetic(direction)
    objective = make_objective(chunks, target)
    network = new_network(outputs=target.n_outputs)
    start_linear(network, chunks, objective)
    frequencies = np.array(objective.frequencies[0])
    entropy = -(frequencies * np.log(frequencies)).sum()
    assert evaluate(network, Synthetic(direction, seed=1), objective) < 0.8 * entropy


def test_label_statistics_come_from_the_counted_steps() -> None:
    def labels(x: NDArray[np.float32]) -> NDArray[np.float32]:
        y = np.concatenate([7 + 2 * x[..., :1], (x[..., 1:2] > 1).astype(np.float32)], -1)
        y[:, :LAG] = 1e6  # not counted
        return np.asarray(y, np.float32)

    statistics = label_statistics(Synthetic(labels, chunks=60), (RETURN, DIRECTION))
    assert statistics.scaling[0].mean == pytest.approx(7, abs=0.1)
    assert statistics.scaling[0].sd == pytest.approx(2, abs=0.1)
    assert statistics.scaling[1].mean == 0
    assert statistics.frequencies[0] == ()
    assert statistics.frequencies[1] == pytest.approx((0.841, 0.159), abs=0.02)


def test_the_best_weights_are_kept_not_the_last() -> None:
    chunks, validation = Synthetic(remembered), Synthetic(remembered, seed=1)
    objective = make_objective(chunks, VOLATILITY, volatility="mse")
    network = new_network()
    config = TrainingConfig(epochs=12, learning_rate=0.5, patience=99)
    progress = train(network, chunks, validation, objective, config)
    losses = [e.validation_loss for e in progress.epochs]
    assert min(losses) < losses[-1]
    assert evaluate(network, validation, objective) == pytest.approx(progress.best_loss, rel=1e-6)


def test_training_never_ends_worse_than_it_began() -> None:
    network = new_network()
    chunks = Synthetic(linear)
    objective = make_objective(chunks, VOLATILITY)
    start_linear(network, chunks, objective, ridge=1e-9)
    before = weights_of(network)
    progress = train(
        network, chunks, chunks, objective, TrainingConfig(learning_rate=0.1, epochs=2)
    )
    assert progress.best_epoch == 0
    assert_equal(before, weights_of(network))


def test_it_stops_when_nothing_gets_better() -> None:
    progress = run(new_network(), learning_rate=1e-12, epochs=50, patience=3)
    assert 3 <= len(progress.epochs) < 50
    assert progress.stale == 3


def test_the_same_seed_gives_the_same_weights_and_another_others() -> None:
    networks = [new_network() for _ in range(3)]
    for network, seed in zip(networks, (1, 1, 2), strict=True):
        run(network, seed=seed, epochs=2)
    assert_equal(weights_of(networks[0]), weights_of(networks[1]))
    assert not torch.equal(networks[0].head.weight, networks[2].head.weight)


def test_training_leaves_the_random_numbers_of_others_alone() -> None:
    network = new_network()
    torch.manual_seed(7)
    want = torch.rand(1)
    torch.manual_seed(7)
    run(network, epochs=1)
    assert torch.equal(torch.rand(1), want)


@pytest.mark.parametrize("optimiser", OPTIMISERS)
@pytest.mark.parametrize("cut_after", [1, 3])
def test_a_resumed_run_ends_with_the_very_weights_of_an_unbroken_one(
    tmp_path: Path, optimiser: Any, cut_after: int
) -> None:
    unbroken, cut, resumed = new_network(), new_network(), new_network(seed=9)
    options: dict[str, Any] = {
        "optimiser": optimiser,
        "accumulate": 4,
        "schedule": ScheduleConfig(kind="plateau", patience=1),
    }
    want = run(unbroken, **options)

    class Killed(Exception):
        pass

    class Killer:
        def chunk(self, done: int, total: int, loss: float) -> None:
            if done == cut_after * 6 + 3:
                raise Killed

        def epoch(self, epoch: Epoch, network: Network, sample: torch.Tensor) -> None: ...

    chunks, validation = Synthetic(remembered), Synthetic(remembered, seed=1)
    objective = make_objective(chunks, VOLATILITY)
    config = TrainingConfig(epochs=4, patience=99, **options)
    with pytest.raises(Killed):
        train(cut, chunks, validation, objective, config, tmp_path / "run", [Killer()])
    got = run(resumed, checkpoint=tmp_path / "run", **options)
    assert_equal(weights_of(unbroken), weights_of(resumed))
    assert [replace(e, seconds=0) for e in got.epochs] == [
        replace(e, seconds=0) for e in want.epochs
    ]


def test_a_finished_run_is_not_run_again(tmp_path: Path) -> None:
    one, again = new_network(), new_network(seed=9)
    run(one, checkpoint=tmp_path / "run")
    before = (tmp_path / "run").stat().st_mtime_ns
    run(again, checkpoint=tmp_path / "run")
    assert (tmp_path / "run").stat().st_mtime_ns == before
    assert_equal(weights_of(one), weights_of(again))


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    run(new_network(), checkpoint=tmp_path / "run")
    with pytest.raises(ValueError, match="another configuration"):
        run(new_network(), checkpoint=tmp_path / "run", learning_rate=1e-5)
    with pytest.raises(ValueError, match="another configuration"):
        run(new_network(hidden=8), checkpoint=tmp_path / "run")


def test_a_checkpoint_is_tensors_and_text(tmp_path: Path) -> None:
    run(new_network(), checkpoint=tmp_path / "run")
    assert [p.name for p in tmp_path.iterdir()] == ["run"]
    with safe_open(tmp_path / "run", "np") as file:
        assert set(file.metadata()) == {"progress", "run"}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_label_that_is_not_finite_stops_training_before_it_reaches_the_weights(
    bad: float,
) -> None:
    chunks, validation = Synthetic(remembered), Synthetic(remembered, seed=1)
    objective = make_objective(validation, VOLATILITY)
    chunks.y[3][0, 5] = bad
    network = new_network()
    with pytest.raises(Diverged, match="epoch 1, chunk 4"):
        train(network, chunks, validation, objective, TrainingConfig(epochs=2))
    assert all(torch.isfinite(p).all() for p in network.parameters())


def test_gradients_that_are_not_finite_stop_training_before_they_reach_the_weights() -> None:
    network = new_network()
    network.head.weight.register_hook(lambda g: g * math.inf)  # type: ignore[no-untyped-call]
    before = weights_of(network)
    with pytest.raises(Diverged, match="gradient"):
        run(network)
    assert_equal(before, weights_of(network))


def test_a_network_that_comes_in_broken_is_refused() -> None:
    network = new_network()
    torch.nn.init.constant_(network.head.bias, math.nan)
    with pytest.raises(Diverged, match="after epoch 0"):
        run(network)


def test_accumulated_chunks_make_one_step() -> None:
    class Counter:
        chunks = 0

        def chunk(self, done: int, total: int, loss: float) -> None:
            self.chunks += 1

        def epoch(self, epoch: Epoch, network: Network, sample: torch.Tensor) -> None: ...

    chunks = Synthetic(remembered)
    objective = make_objective(chunks, VOLATILITY)
    counter = Counter()
    config = TrainingConfig(epochs=3, accumulate=4)
    progress = train(new_network(), chunks, chunks, objective, config, watchers=[counter])
    assert counter.chunks == 18
    assert progress.steps == 6  # of 6 chunks an epoch: 4, then the 2 that are left


def test_fine_tuning_of_heads_leaves_the_rest() -> None:
    network = new_network()
    before = weights_of(network)
    run(network, only_heads=True, learning_rate=1e-2)
    moved = {n for n, t in network.state_dict().items() if not torch.equal(t, before[n])}
    assert moved == {"head.weight", "head.bias", "skip.weight"}
    assert all(p.requires_grad for p in network.parameters())


def test_half_precision_is_refused_where_it_does_not_pay() -> None:
    with pytest.raises(ValueError, match="float32"):
        run(new_network(), precision="bfloat16")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_it_learns_on_a_gpu(precision: str) -> None:
    network = new_network(dropout=0.0).cuda()
    progress = run(network, epochs=40, learning_rate=2e-2, precision=precision)
    assert progress.best_loss < 0.2
    assert network.head.weight.dtype == torch.float32


def test_watchers_draw_a_bar_and_write_tensorboard_files(tmp_path: Path) -> None:
    assert TensorBoard.is_available()
    board = TensorBoard(tmp_path)
    chunks = Synthetic(remembered)
    objective = make_objective(chunks, VOLATILITY)
    with ProgressBar() as bar:
        train(
            new_network(), chunks, chunks, objective, TrainingConfig(epochs=2), None, [bar, board]
        )
    board.close()
    read = event_accumulator.EventAccumulator(str(tmp_path), {"histograms": 0}).Reload()
    assert {"loss/chunk", "loss/train", "loss/validation", "learning_rate", "gradient_norm"} <= set(
        read.Tags()["scalars"]
    )
    assert len(read.Scalars("learning_rate")) == 2
    (first, _) = read.Histograms("attention/weight")
    assert 0 <= first.histogram_value.min < first.histogram_value.max <= 1
    assert len(read.Histograms("attention/effective_length_bars")) == 2
