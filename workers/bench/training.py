"""Training time, peak memory and validation loss on two years of SPY minutes."""

import gc
import os
import resource
import time
from collections.abc import Callable
from typing import Any

import torch

from models.features import F
from models.network import Network
from models.pipeline import Recipe, fit_bundle
from models.schedules import ScheduleConfig
from models.targets import Target
from models.training import Epoch, TrainingConfig
from workers import bars as sources

TARGET = Target(kind="volatility", horizon=30)
LONG = TrainingConfig(
    epochs=30, learning_rate=5e-4, patience=30, schedule=ScheduleConfig(kind="cosine")
)
"""What one would do with time to spare: every epoch of a slow descent, and the best of them."""


class _Losses:
    """A watcher that keeps every epoch's loss on the validation part."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say

    def chunk(self, done: int, total: int, loss: float) -> None: ...

    def epoch(self, epoch: Epoch, network: Network, sample: torch.Tensor) -> None:
        self._say(f"epoch {epoch.number}: {epoch.validation_loss:.5f}, {epoch.seconds:.1f} s")


def run(
    bars: str = "spy:2017..2018",
    long: bool = False,
    threads: int = 0,
    seed: int = 0,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Fit a bundle as `train` does: features, labels, scaler, network, references, monitor.

    `seconds`, `cpu_seconds` (of all threads: what other work on the machine changes less) and
    `peak_rss_mb` are of all of this and of nothing else: reading the file is before, and memory
    counts from what the process held then. `validation_loss` is QLIKE on the first half of the newest
    fifth, by which the epoch is chosen. `long` trains as `LONG` says.
    """
    frame = sources.read(bars)
    recipe = Recipe()
    training = LONG if long else recipe.training
    recipe = recipe.model_copy(update={"training": training.model_copy(update={"seed": seed})})
    threads = threads or len(os.sched_getaffinity(0))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    gc.collect()
    held = _resident_mb()
    started, burnt = time.perf_counter(), time.process_time()
    try:
        bundle = fit_bundle(frame, [TARGET], recipe=recipe, watchers=[_Losses(say)], device="cpu")
    finally:
        torch.set_num_threads(before)
    return {
        "seconds": round(time.perf_counter() - started, 1),
        "cpu_seconds": round(time.process_time() - burnt, 1),
        "epochs": bundle.metrics["epochs"],
        "peak_rss_mb": round(_peak_mb() - held),
        "bars": len(frame),
        "features": F,
        "validation_loss": round(bundle.metrics["objective"], 5),
        "best_epoch": bundle.metrics["best_epoch"],
        "qlike": round(bundle.metrics[f"{TARGET.name}/loss"], 4),
        "reference_qlike": round(bundle.metrics[f"{TARGET.name}/reference_loss"], 4),
        "threads": threads,
        "long": long,
    }


def _resident_mb() -> float:
    with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123 - no file on a disk
        return int(file.read().split()[1]) * resource.getpagesize() / 1e6


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
