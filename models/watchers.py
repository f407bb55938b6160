"""Ready-made watchers of a training run: a progress bar, and TensorBoard where it is installed."""

import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from models.network import Network
from models.training import Epoch


class ProgressBar:
    """One line on the terminal; a context manager."""

    def __init__(self, description: str = "training") -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("epoch {task.fields[epoch]}, validation loss {task.fields[loss]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self._progress = Progress(*columns)
        self._task = self._progress.add_task(description, epoch=0, loss="-")

    def __enter__(self) -> "ProgressBar":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def chunk(self, done: int, total: int, loss: float) -> None:
        self._progress.update(self._task, completed=done, total=total)

    def epoch(self, epoch: Epoch, network: Network, sample: Tensor) -> None:
        self._progress.update(self._task, epoch=epoch.number, loss=f"{epoch.validation_loss:.5f}")


class TensorBoard:
    """Losses, learning rate, gradient norm, and where attention looks, one point an epoch."""

    def __init__(self, directory: Path) -> None:
        """Raises ModuleNotFoundError where TensorBoard is not installed; see `is_available`."""
        # TensorBoard would load TensorFlow where it finds it, whose LLVM and numba's end the process.
        sys.modules.setdefault("tensorboard.compat.notf", ModuleType("tensorboard.compat.notf"))
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(directory))

    @staticmethod
    def is_available() -> bool:
        return find_spec("tensorboard") is not None

    def chunk(self, done: int, total: int, loss: float) -> None:
        self._writer.add_scalar("loss/chunk", loss, done)

    def epoch(self, epoch: Epoch, network: Network, sample: Tensor) -> None:
        scalars = {
            "loss/train": epoch.train_loss,
            "loss/validation": epoch.validation_loss,
            "learning_rate": epoch.learning_rate,
            "gradient_norm": epoch.gradient_norm,
        }
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, epoch.number)
        if network.attention is not None:
            table = network.attention.lag_bias.table.detach()
            for head, bias in enumerate(table):
                self._writer.add_histogram(f"attention/lag_bias/{head}", bias, epoch.number)
            weights = _weights(network, sample)
            self._writer.add_histogram("attention/weight", weights, epoch.number)
            lengths = torch.exp(torch.special.entr(weights).sum(-1))
            self._writer.add_histogram("attention/effective_length_bars", lengths, epoch.number)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


@torch.inference_mode()
def _weights(network: Network, sample: Tensor) -> Tensor:
    """Of the newest steps [n, T], which see a full window if the sample is as long."""
    weights: Tensor = network(sample, need_weights=True)[1]
    return weights[:, weights.shape[1] // 2 :].flatten(0, 1)
