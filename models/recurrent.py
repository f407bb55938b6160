"""The product's own network as one more forecaster: several seeds on carried chunks, and their mean.

Shapes: n rows, B pieces side by side, L steps, F features.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from models.augmentation import SHIFTED_LEVELS, AugmentedChunks, ChunkAugmentation
from models.dataset import Chunks, History
from models.features import WARM_UP_BARS, F
from models.losses import LossConfig, Objective
from models.network import Network
from models.network_config import NetworkConfig, burn_in_steps
from models.panel import Floats, Ints, Panel, Part, rows_by_symbol
from models.scaling import Scaler
from models.schedules import ScheduleConfig
from models.splits import Span
from models.training import (
    ChunkSource,
    Progress,
    TrainingConfig,
    Watcher,
    evaluate,
    label_statistics,
    start_linear,
    train,
)
from models.window_network import build_network

PIECE_ROWS: Final = 1024
"""Rows are forecast in pieces side by side; each starts from zero a burn-in before its first row."""
PIECES: Final = 64
MAX_SCALER_ROWS: Final = 500_000
RIDGES: Final = {
    "volatility": (1e-3,),
    "return": (1e-2, 1.0, 1e2),
    "direction": (1e-2, 1.0, 1e2),
}
"""Penalties of the linear start; the validation part chooses where there is little to learn."""


class Options(BaseModel):
    """How the networks of an evaluation are made and trained, the same for all of them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    network: dict[str, Any] = {"hidden": 64, "layers": 1, "window": 78, "dropout": 0.2}
    """Fields of `NetworkConfig` other than n_features and n_outputs."""
    training: TrainingConfig = TrainingConfig(epochs=8, patience=3, learning_rate=1e-3)
    refresh: TrainingConfig = TrainingConfig(
        epochs=1, learning_rate=5e-4, schedule=ScheduleConfig(warm_up=0.1)
    )
    """For the later parts of a walk, where training goes on with the new bars; and after each, to
    learn from the validation part too."""
    rows: int = 1_600_000
    """Of all epochs together: a longer history has fewer epochs, but at least two."""
    loss: LossConfig = LossConfig()
    augmentation: ChunkAugmentation = SHIFTED_LEVELS
    """Of training chunks where a volatility is learnt."""
    batch: int = 16
    length: int = 64
    burn_in: int = 128
    chunks_per_stream: int = 16

    def first(self, rows: int) -> TrainingConfig:
        epochs = min(self.training.epochs, max(2, self.rows // rows))
        return self.training.model_copy(update={"epochs": epochs})

    def network_config(self, n_outputs: int, changes: Mapping[str, Any]) -> NetworkConfig:
        sizes = {"n_features": F, "n_outputs": n_outputs}
        return NetworkConfig.model_validate({**self.network, **changes, **sizes})


FAST: Final = Options(
    network={"hidden": 16, "layers": 1, "window": 30},
    training=TrainingConfig(epochs=2, patience=2),
    refresh=TrainingConfig(epochs=1),
    rows=300_000,
)


@dataclass(frozen=True, eq=False)
class Trained:
    network: Network
    scaler: Scaler
    objective: Objective
    progress: Progress


class Recurrent:
    """LSTM or GRU networks of several seeds; `predict` is the mean of their forecasts."""

    def __init__(
        self,
        name: str,
        options: Options,
        changes: Mapping[str, Any],
        seeds: Sequence[int],
        watch: Callable[[int], Sequence[Watcher]] = lambda seed: (),
        device: str = "cpu",
        hidden: Sequence[int] = (),
    ) -> None:
        """`changes` to the network of `options`; `hidden` features are zero throughout."""
        self.hidden = list(hidden)
        self.name, self.options, self.changes = name, options, changes
        self.seeds, self.device, self.watch = tuple(seeds), device, watch
        self.trained: dict[int, Trained] = {}

    def fit(self, panel: Panel, part: Part) -> None:
        for seed in self.seeds:
            self.fit_seed(panel, part, seed)

    def fit_seed(self, panel: Panel, part: Part, seed: int) -> None:
        """From nothing; where the seed was fitted before, on from there with its scaler frozen."""
        before = self.trained.get(seed)
        every = -(-len(part.fit) // MAX_SCALER_ROWS)
        scaler = before.scaler if before else self._scaler(panel.x[part.fit[::every]])
        chunks = self._chunks(panel, part.fold.train, scaler, seed)
        validation = self._chunks(panel, part.fold.validation, scaler, None)
        if before:
            network, objective, config = before.network, before.objective, self.options.refresh
        else:
            network, objective = self._start(panel, scaler, chunks, validation, seed)
            config = self.options.first(len(part.fit))
        progress = train(
            network,
            self._altered(panel, chunks, scaler, seed),
            validation,
            objective,
            config.model_copy(update={"seed": seed}),
            watchers=self.watch(seed),
        )
        self.trained[seed] = Trained(network, scaler, objective, progress)

    def finish(self, panel: Panel, part: Part) -> None:
        for seed in self.seeds:
            self.finish_seed(panel, part, seed)

    def finish_seed(self, panel: Panel, part: Part, seed: int) -> None:
        """The newest bars are in the validation part: as `models.pipeline.fine_tune`, learn it too."""
        one = self.trained[seed]
        span = Span(part.fold.train.from_ts, part.fold.validation.to_ts)
        chunks = self._chunks(panel, span, one.scaler, seed)
        train(
            one.network,
            self._altered(panel, chunks, one.scaler, seed),
            self._chunks(panel, part.fold.validation, one.scaler, None),
            one.objective,
            self.options.refresh.model_copy(update={"seed": seed}),
            watchers=self.watch(seed),
        )

    def predict(self, panel: Panel, rows: Ints) -> Floats:
        return np.asarray(np.mean([self.predict_seed(panel, rows, s) for s in self.seeds], axis=0))

    def predict_seed(self, panel: Panel, rows: Ints, seed: int) -> Floats:
        one = self.trained[seed]
        config = one.network.config
        burn_in = burn_in_steps(config, self.options.burn_in + config.window)
        raw = raw_outputs(one.network, one.scaler, panel, rows, burn_in)
        if panel.target.kind == "direction":
            return np.asarray(1 / (1 + np.exp(-raw)))
        return one.objective.scaling[0].mean + one.objective.scaling[0].sd * raw

    def _scaler(self, x: NDArray[np.float32]) -> Scaler:
        scaler = Scaler.fit(x)
        scale = scaler.scale.copy()
        scale[self.hidden] = np.inf
        return replace(scaler, scale=scale)

    def _start(
        self, panel: Panel, scaler: Scaler, chunks: Chunks, validation: Chunks, seed: int
    ) -> tuple[Network, Objective]:
        statistics = label_statistics(chunks, [panel.target])
        objective = Objective(
            [panel.target], statistics.scaling, statistics.frequencies, self.options.loss
        )
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            network = build_network(self._config(panel), scaler)

        def start(ridge: float) -> float:
            start_linear(network, chunks, objective, ridge)
            return evaluate(network, validation, objective)

        ridges = RIDGES[panel.target.kind]
        start(ridges[0] if len(ridges) == 1 else min(ridges, key=start))
        return network.to(self.device), objective

    def _config(self, panel: Panel) -> NetworkConfig:
        return self.options.network_config(panel.target.n_outputs, self.changes)

    def _altered(self, panel: Panel, chunks: Chunks, scaler: Scaler, seed: int) -> ChunkSource:
        if panel.target.kind != "volatility":
            return chunks
        return AugmentedChunks(chunks, self.options.augmentation, scaler, [panel.target], seed)

    def _chunks(self, panel: Panel, span: Span, scaler: Scaler, seed: int | None) -> Chunks:
        options = self.options
        return Chunks(
            panel.histories,
            span,
            scaler,
            batch=options.batch,
            length=options.length,
            burn_in=burn_in_steps(self._config(panel), options.burn_in),
            chunks_per_stream=options.chunks_per_stream,
            shuffle=seed is not None,
            seed=seed or 0,
        )


@dataclass(frozen=True)
class _Piece:
    history: History
    start: int
    rows: Ints
    """To be forecast, counted from `start`."""
    into: slice


@torch.inference_mode()
def raw_outputs(
    network: Network,
    scaler: Scaler,
    panel: Panel,
    rows: Ints,
    burn_in: int,
    piece_rows: int = PIECE_ROWS,
) -> Floats:
    """First output f64[n] of the network for rows in ascending order, its state carried through."""
    network.eval()
    out = np.empty(len(rows))
    pieces = sorted(_pieces(panel, rows, burn_in, piece_rows), key=lambda p: -p.rows[-1])
    for first in range(0, len(pieces), PIECES):
        group = pieces[first : first + PIECES]
        lengths = [int(piece.rows[-1]) + 1 for piece in group]
        x = np.zeros((len(group), lengths[0], F), np.float32)
        for b, piece in enumerate(group):
            x[b, : lengths[b]] = scaler.transform(
                piece.history.x[piece.start : piece.start + lengths[b]]
            )
        y = _outputs(network, x)
        for b, piece in enumerate(group):
            out[piece.into] = y[b, piece.rows]
    return out


def _outputs(network: Network, x: NDArray[np.float32], L: int = 256) -> Floats:
    device = next(network.parameters()).device
    state, parts = None, []
    for at in range(0, x.shape[1], L):
        chunk = torch.from_numpy(x[:, at : at + L]).to(device)
        y, _, state = network(chunk, state)
        parts.append(y[..., 0].float().cpu().numpy())
    return np.concatenate(parts, axis=1).astype(np.float64)


def _pieces(panel: Panel, rows: Ints, burn_in: int, piece_rows: int) -> Iterator[_Piece]:
    done = 0
    for index, own in rows_by_symbol(panel, rows):
        history = panel.histories[index]
        run_start = own - history.since_reset[own] + 1
        cut = (own - own[0]) // piece_rows
        changes = np.flatnonzero((np.diff(run_start) != 0) | (np.diff(cut) != 0)) + 1
        for taken in np.split(own, changes):
            warm = int(taken[0] - history.since_reset[taken[0]] + WARM_UP_BARS)
            start = max(warm, int(taken[0]) - burn_in)
            yield _Piece(history, start, taken - start, slice(done, done + len(taken)))
            done += len(taken)
