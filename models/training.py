"""Train a network on chunks: seeded, checked before every step, best weights kept, resumable.

    chunk -> forward with the carried state -> loss -> finite? -> gradients -> clip -> finite? -> step
          -> running mean of the weights
    epoch -> validation loss of the mean -> best so far? keep it -> stale for too long? stop -> checkpoint

Shapes: B streams, L steps, F features, K targets, O outputs.
"""

import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from models.bundle import LabelScaling
from models.dataset import Chunk
from models.evidence import label_scaling
from models.losses import Objective
from models.network import Network, State
from models.schedules import ScheduleConfig, rate_at
from models.targets import Target
from models.window_network import WindowState

OPTIMISERS: dict[str, type[torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
    "sgd": torch.optim.SGD,
    "rmsprop": torch.optim.RMSprop,
}


class TrainingConfig(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    epochs: Annotated[int, Field(ge=1)] = 20
    optimiser: Literal["adamw", "adam", "sgd", "rmsprop"] = "adamw"
    learning_rate: Annotated[float, Field(gt=0)] = 2e-3
    weight_decay: Annotated[float, Field(ge=0)] = 1e-2
    schedule: ScheduleConfig = ScheduleConfig()
    clip_norm: Annotated[float, Field(gt=0)] = 1.0
    average: Annotated[float, Field(ge=0)] = 0.5
    """Half-life, in epochs, of the running mean of the weights (Polyak & Juditsky 1992): the mean is
    what is judged and kept. 0 judges the weights themselves."""
    accumulate: Annotated[int, Field(ge=1)] = 1
    """Chunks for one step of the optimiser."""
    patience: Annotated[int, Field(ge=1)] = 5
    """Epochs without a better validation loss before training stops."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the products; weights stay float32. bfloat16 pays on CUDA, and is refused on a CPU."""
    only_heads: bool = False
    """Fine-tune the skip and the head and leave the rest as it is."""
    seed: int = 0


class ChunkSource(Protocol):
    """`models.dataset.Chunks`: the same `epoch` gives the same chunks."""

    epoch: int

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Chunk]: ...


@dataclass(frozen=True)
class Epoch:
    number: int
    train_loss: float
    validation_loss: float
    learning_rate: float
    gradient_norm: float
    """Mean before clipping."""
    seconds: float


@dataclass
class Progress:
    """Where a run stands; with the tensors of a checkpoint it is all that a resumed run needs."""

    epochs: list[Epoch] = field(default_factory=list)
    steps: int = 0
    best_loss: float = math.inf
    best_epoch: int = 0
    """0 is the network as it came."""
    stale: int = 0
    plateaus: int = 0


class Watcher(Protocol):
    """Told how training goes; the ready-made ones are in `models.watchers`."""

    def chunk(self, done: int, total: int, loss: float) -> None:
        """`done` of `total` chunks of the longest possible run."""

    def epoch(self, epoch: Epoch, network: Network, sample: Tensor) -> None:
        """`network` is the one that was judged; sample[B, L, F] are inputs of the validation part."""


class TrainingRefused(ValueError):
    """It cannot be trained like this; the message says what is in the way, and what to do."""


class Diverged(Exception):
    """Loss or gradients were not finite; the weights are those before the step that would use them."""


def train(
    network: Network,
    chunks: ChunkSource,
    validation: ChunkSource,
    objective: Objective,
    config: TrainingConfig,
    checkpoint: Path | None = None,
    watchers: Sequence[Watcher] = (),
) -> Progress:
    """Train in place; the network ends with the averaged weights that had the best validation loss.

    With `checkpoint`, the file is written after every epoch, and a run that finds it goes on from
    there to the very weights of a run that was never interrupted (same machine, same threads).
    The weights that came in count as epoch 0, so training never ends worse than it began.
    Raises TrainingRefused, Diverged.
    """
    device = next(network.parameters()).device
    with torch.random.fork_rng(_cuda_indices(device)):
        torch.manual_seed(config.seed)
        run = _Run(network, objective, config, len(chunks))
        if checkpoint is not None and checkpoint.exists():
            run.restore(checkpoint)
        else:
            run.keep_best(0, evaluate(run.mean, validation, objective, config.precision))
        sample = torch.from_numpy(next(iter(validation)).x).to(device)
        while run.goes_on():
            started = time.perf_counter()
            train_loss, gradient_norm = run.one_epoch(chunks, watchers)
            epoch = Epoch(
                number=len(run.progress.epochs) + 1,
                train_loss=train_loss,
                validation_loss=evaluate(run.mean, validation, objective, config.precision),
                learning_rate=run.learning_rate,
                gradient_norm=gradient_norm,
                seconds=time.perf_counter() - started,
            )
            run.progress.epochs.append(epoch)
            run.keep_best(epoch.number, epoch.validation_loss)
            for watcher in watchers:
                watcher.epoch(epoch, run.mean, sample)
            if checkpoint is not None:
                run.save(checkpoint)
        network.load_state_dict(run.best)
        network.eval().requires_grad_(True)
        return run.progress


@torch.inference_mode()
def evaluate(
    network: Network,
    chunks: ChunkSource,
    objective: Objective,
    precision: Literal["float32", "bfloat16"] = "float32",
) -> float:
    """The mean loss over all counted steps; NaN where there are none."""
    device = next(network.parameters()).device
    network.eval()
    chunks.epoch = 0
    state, total, count = None, 0.0, 0.0
    for chunk in chunks:
        x, y, weight = _on(device, chunk)
        with _autocast(device, precision):
            outputs, _, state = network(x, state if chunk.carry else None)
        weights = float(chunk.weight.sum())
        total += weights * float(objective(outputs.float(), y, weight))
        count += weights
    return total / count if count else math.nan


class _Run:
    def __init__(
        self, network: Network, objective: Objective, config: TrainingConfig, chunks: int
    ) -> None:
        self.network, self.objective, self.config = network, objective, config
        self.device = next(network.parameters()).device
        self.chunks_per_epoch = chunks
        self.steps_per_epoch = math.ceil(chunks / config.accumulate)
        self.total_steps = config.epochs * self.steps_per_epoch
        self.progress = Progress()
        self.best: dict[str, Tensor] = {}
        self.mean = deepcopy(network).requires_grad_(False)
        network.requires_grad_(not config.only_heads)
        for part in (network.head, network.skip) if config.only_heads else ():
            if part is not None:
                part.requires_grad_(True)
        self.parameters = [p for p in network.parameters() if p.requires_grad]
        self.optimiser = _optimiser(network, config)

    @property
    def learning_rate(self) -> float:
        progress, schedule = self.progress, self.config.schedule
        share = rate_at(schedule, progress.steps, self.total_steps, progress.plateaus)
        return self.config.learning_rate * share

    def goes_on(self) -> bool:
        progress, config = self.progress, self.config
        return len(progress.epochs) < config.epochs and progress.stale < config.patience

    def one_epoch(self, chunks: ChunkSource, watchers: Sequence[Watcher]) -> tuple[float, float]:
        """Mean loss of the counted steps and mean gradient norm."""
        self.network.train()
        number = len(self.progress.epochs)
        chunks.epoch = number
        state: State | WindowState | None = None
        total, count, norms = 0.0, 0.0, []
        for i, chunk in enumerate(chunks):
            x, y, weight = _on(self.device, chunk)
            with _autocast(self.device, self.config.precision):
                outputs, _, state = self.network(x, state if chunk.carry else None)
            state = state.detach()
            weights = float(chunk.weight.sum())
            value = 0.0
            if weights:
                loss = self.objective(outputs.float(), y, weight)
                value = float(loss.detach())
                if not math.isfinite(value):
                    raise Diverged(f"the loss is {value} in epoch {number + 1}, chunk {i + 1}")
                (loss / self.config.accumulate).backward()
                total, count = total + weights * value, count + weights
            if (i + 1) % self.config.accumulate == 0 or i + 1 == self.chunks_per_epoch:
                norms.append(self.step())
            for watcher in watchers:
                watcher.chunk(
                    number * self.chunks_per_epoch + i + 1,
                    self.config.epochs * self.chunks_per_epoch,
                    value,
                )
        return total / max(count, 1.0), float(np.mean(norms)) if norms else 0.0

    def step(self) -> float:
        """One step of the optimiser; the gradients' norm before clipping."""
        norm = float(nn.utils.clip_grad_norm_(self.parameters, self.config.clip_norm))
        if not math.isfinite(norm):
            raise Diverged(f"the gradient norm is {norm} at step {self.progress.steps + 1}")
        for group in self.optimiser.param_groups:
            group["lr"] = self.learning_rate
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.progress.steps += 1
        self.move_mean()
        return norm

    @torch.no_grad()
    def move_mean(self) -> None:
        """Sooner at first, so that the mean does not remember where training began."""
        steps, half_life = self.progress.steps, self.config.average * self.steps_per_epoch
        kept = min(2 ** (-1 / half_life), steps / (steps + 9)) if half_life else 0.0
        for mean, new in zip(self.mean.parameters(), self.network.parameters(), strict=True):
            mean.lerp_(new, 1 - kept)

    def keep_best(self, epoch: int, loss: float) -> None:
        if not math.isfinite(loss):
            raise Diverged(f"the validation loss is {loss} after epoch {epoch}")
        progress = self.progress
        if loss < progress.best_loss:
            progress.best_loss, progress.best_epoch, progress.stale = loss, epoch, 0
            self.best = {name: t.detach().clone() for name, t in self.mean.state_dict().items()}
            return
        progress.stale += 1
        if progress.stale % self.config.schedule.patience == 0:
            progress.plateaus += 1

    # A checkpoint is one safetensors file, so that nothing of it can run; its header holds the rest.

    def save(self, path: Path) -> None:
        tensors = {f"network/{name}": t for name, t in self.network.state_dict().items()}
        tensors |= {f"mean/{name}": t for name, t in self.mean.state_dict().items()}
        tensors |= {f"best/{name}": t for name, t in self.best.items()}
        for i, state in self.optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser/{i}/{name}": torch.as_tensor(v) for name, v in state.items()}
        tensors["random/cpu"] = torch.get_rng_state()
        if self.device.type == "cuda":
            tensors["random/cuda"] = torch.cuda.get_rng_state(self.device)
        header = {"progress": json.dumps(asdict(self.progress)), "run": self.identity()}
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_suffix(".part")
        save_file({name: t.detach().contiguous() for name, t in tensors.items()}, aside, header)
        with aside.open("rb") as file:
            os.fsync(file.fileno())
        aside.replace(path)

    def restore(self, path: Path) -> None:
        """Raises TrainingRefused if the checkpoint is of another run."""
        with safe_open(path, "pt", device=str(self.device)) as file:
            header = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if header.get("run") != self.identity():
            raise TrainingRefused(
                f"{path} is a checkpoint of another configuration: name another file, or remove it"
            )
        saved = json.loads(header["progress"])
        self.progress = Progress(**{**saved, "epochs": [Epoch(**e) for e in saved["epochs"]]})
        parts: dict[str, dict[str, Any]] = {"optimiser": {}}
        for name, tensor in tensors.items():
            part, _, rest = name.partition("/")
            parts.setdefault(part, {})[rest] = tensor
        self.network.load_state_dict(parts["network"])
        self.mean.load_state_dict(parts["mean"])
        self.best = parts["best"]
        states: dict[int, dict[str, Tensor]] = {}
        for name, tensor in parts["optimiser"].items():
            i, _, key = name.partition("/")
            states.setdefault(int(i), {})[key] = tensor
        groups = self.optimiser.state_dict()["param_groups"]
        self.optimiser.load_state_dict({"state": states, "param_groups": groups})
        torch.set_rng_state(parts["random"]["cpu"].cpu())
        if "cuda" in parts["random"]:
            torch.cuda.set_rng_state(parts["random"]["cuda"].cpu(), self.device)

    def identity(self) -> str:
        """What must be the same for a checkpoint to go on."""
        return json.dumps(
            {
                "network": self.network.config.model_dump(mode="json"),
                "training": self.config.model_dump(mode="json"),
                "objective": self.objective.config.model_dump(mode="json"),
                "labels": [scaling.model_dump() for scaling in self.objective.scaling],
                "targets": [target.model_dump(mode="json") for target in self.objective.targets],
                "chunks": self.chunks_per_epoch,
            },
            sort_keys=True,
        )


def _optimiser(network: Network, config: TrainingConfig) -> torch.optim.Optimizer:
    """Weight decay on matrices only, and not on the skip: it is a fitted linear model."""
    trained = [(n, p) for n, p in network.named_parameters() if p.requires_grad]
    decays = [p for n, p in trained if p.ndim > 1 and "skip" not in n and "lag_bias" not in n]
    keeps = [p for _, p in trained if not any(p is other for other in decays)]
    groups = [
        {"params": decays, "weight_decay": config.weight_decay},
        {"params": keeps, "weight_decay": 0.0},
    ]
    options: dict[str, Any] = {"lr": config.learning_rate}
    if config.optimiser == "sgd":
        options |= {"momentum": 0.9, "nesterov": True}
    return OPTIMISERS[config.optimiser]([g for g in groups if g["params"]], **options)


# Before training: the scale of the labels, and the linear model that the network starts as.


@dataclass(frozen=True)
class LabelStatistics:
    scaling: tuple[LabelScaling, ...]
    frequencies: tuple[tuple[float, ...], ...]
    """Of the classes of each direction; empty for other targets."""


def label_statistics(chunks: ChunkSource, targets: Sequence[Target]) -> LabelStatistics:
    """From the counted steps of the training part only. Raises ValueError where there are none."""
    y = np.concatenate([chunk.y[chunk.weight > 0] for chunk in chunks]).astype(np.float64)
    if not len(y):
        raise ValueError("no step of the training part counts: too few bars, or no label is known")
    scaling: list[LabelScaling] = []
    frequencies: list[tuple[float, ...]] = []
    for k, target in enumerate(targets):
        scaling.append(label_scaling(y[:, k], target))
        frequencies.append(())
        if target.kind == "direction":
            counts = np.bincount(y[:, k].astype(np.int64), minlength=target.classes)
            frequencies[k] = tuple((counts / counts.sum()).tolist())
    return LabelStatistics(tuple(scaling), tuple(frequencies))


def start_linear(
    network: Network, chunks: ChunkSource, objective: Objective, ridge: float = 1e-3
) -> None:
    """Set skip and head bias to the ridge regression on the training part.

    For a direction it is one Newton step of the logistic regression from the base rate. The network
    must be as it was made: head silent, gate open. `ridge` is a share of the number of rows.
    """
    if network.skip is None:
        return
    F = network.config.n_features
    products, responses = np.zeros((F + 1, F + 1)), np.zeros((F + 1, network.config.n_outputs))
    rows = 0
    bases, _ = _working_responses(objective, np.zeros((1, len(objective.targets))))
    for chunk in chunks:
        counted = chunk.weight > 0
        x = np.concatenate([chunk.x[counted], np.ones((int(counted.sum()), 1), np.float32)], 1)
        x = x.astype(np.float64)
        _, response = _working_responses(objective, chunk.y[counted].astype(np.float64))
        products += x.T @ x
        responses += x.T @ response
        rows += len(x)
    penalty = np.diag([ridge * rows] * F + [1e-9 * rows])
    solution = np.linalg.solve(products + penalty, responses)
    with torch.no_grad():
        network.skip.weight.copy_(torch.from_numpy(solution[:F].T))
        network.head.bias.copy_(torch.from_numpy(solution[F] + bases))


def _working_responses(
    objective: Objective, y: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Offsets [O] and the responses [n, O] whose regression, added to them, is the linear model."""
    offsets, responses = [], []
    for k, target in enumerate(objective.targets):
        scaling = objective.scaling[k]
        if target.kind != "direction":
            offsets.append(0.0)
            responses.append((y[:, k] - scaling.mean) / scaling.sd)
            continue
        classes = range(target.classes) if target.n_outputs > 1 else (1,)
        for c in classes:
            p = min(max(objective.frequencies[k][c], 1e-3), 1 - 1e-3)
            offsets.append(math.log(p) if target.n_outputs > 1 else math.log(p / (1 - p)))
            responses.append(((y[:, k] == c) - p) / (p * (1 - p)))
    return np.array(offsets), np.stack(responses, 1)


def _on(device: torch.device, chunk: Chunk) -> tuple[Tensor, Tensor, Tensor]:
    x, y, weight = (torch.from_numpy(a).to(device) for a in chunk[:3])
    return x, y, weight


def _autocast(device: torch.device, precision: str) -> Any:
    if precision == "float32":
        return nullcontext()
    if device.type == "cpu":
        raise TrainingRefused("precision bfloat16 is for CUDA devices; on a CPU train in float32")
    return torch.autocast(device.type, torch.bfloat16)


def _cuda_indices(device: torch.device) -> list[int]:
    return [device.index or 0] if device.type == "cuda" else []
