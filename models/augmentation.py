"""Altered copies of training bars and training chunks; nothing here touches what is not trained on.

Bars are altered before features and labels are computed, so the labels are those of the altered
bars by construction. Chunks are altered only where the new label is known exactly.
Shapes: B streams, L steps, F features, K targets.
"""

from collections.abc import Iterator, Sequence
from typing import Annotated, Final, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from models.dataset import Chunk, History, history_of
from models.features import FEATURE_NAMES, FeatureSpec
from models.scaling import CLIP, Scaler
from models.targets import Target

Deviation = Annotated[float, Field(ge=0, le=2)]
Share = Annotated[float, Field(ge=0, lt=1)]

LOG_VARIANCES: Final = np.array(
    [
        name.startswith(("log_rv_", "log_gk_", "log_calm_", "log_mean_", "expected_", "yesterday_"))
        for name in FEATURE_NAMES
    ]
)
"""bool[F]: features that shift by 2 log c when every return is multiplied by c; the rest stay."""


class BarAugmentation(BaseModel):
    """How to alter a copy of the bars; each 0 (or 1 for `keep`) leaves that part alone."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    scale: Deviation = 0.0
    """Every log return is multiplied by one c per symbol, log c normal with this deviation."""
    warp: Deviation = 0.0
    """The same with a c that changes smoothly over time (magnitude warping, Um et al. 2017)."""
    warp_bars: Annotated[int, Field(ge=2)] = 390
    """Bars between the knots of the warp."""
    jitter: Share = 0.0
    """Share of bars that vanish: the next bar opens where they did and holds their range and volume."""
    keep: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of each symbol's bars in one random slice (window slicing, Le Guennec et al. 2016)."""


def altered_history(
    history: History,
    before_ts: int,
    config: BarAugmentation,
    seed: Sequence[int],
    spec: FeatureSpec,
    targets: Sequence[Target],
) -> History:
    """An altered copy of the bars before `before_ts` (the end of training), features and labels anew.

    Later bars are not looked at.
    """
    known = history.ts < before_ts
    ts, ohlcv = alter(history.ts[known], history.ohlcv[known], config, np.random.default_rng(seed))
    return history_of(f"{history.symbol}~{seed[0]}", ts, ohlcv, spec, targets)


def alter(
    ts: NDArray[np.int64],
    ohlcv: NDArray[np.float64],
    config: BarAugmentation,
    rng: np.random.Generator,
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """One symbol's altered bars, as new arrays."""
    if not len(ts):
        return ts.copy(), ohlcv.copy()
    length = max(1, round(config.keep * len(ts)))
    start = int(rng.integers(len(ts) - length + 1))
    ts, ohlcv = ts[start : start + length].copy(), ohlcv[start : start + length].copy()
    ts, ohlcv = _drop(ts, ohlcv, rng.random(length) < config.jitter)
    knots = np.arange(0, len(ts) + config.warp_bars, config.warp_bars)
    warp = np.interp(np.arange(len(ts)), knots, rng.normal(0, config.warp, len(knots)))
    c = np.exp(rng.normal(0, config.scale) + warp)
    return ts, _stretch(ohlcv, c)


def _drop(
    ts: NDArray[np.int64], ohlcv: NDArray[np.float64], gone: NDArray[np.bool_]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    gone = gone.copy()
    gone[-1] = False
    first = np.flatnonzero(np.concatenate([[True], ~gone[:-1]]))
    open_, high, low, _, volume = ohlcv.T
    merged = [
        open_[first],
        np.maximum.reduceat(high, first),
        np.minimum.reduceat(low, first),
        ohlcv[~gone, 3],
        np.add.reduceat(volume, first),
    ]
    return ts[~gone], np.stack(merged, axis=1)


def _stretch(ohlcv: NDArray[np.float64], c: NDArray[np.float64]) -> NDArray[np.float64]:
    """Multiply the log distance of each bar's prices from the close before by c."""
    log_price = np.log(ohlcv[:, :4])
    before = np.concatenate([log_price[:1, 0], log_price[:-1, 3]])
    distance = (log_price - before[:, None]) * c[:, None]
    path = before[0] + np.concatenate([[0.0], np.cumsum(distance[:-1, 3])])
    return np.concatenate([np.exp(path[:, None] + distance), ohlcv[:, 4:]], axis=1)


class ChunkAugmentation(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    noise: Deviation = 0.0
    """Deviation of the normal noise on every scaled feature; labels stay."""
    stale: Share = 0.0
    """Share of steps that show the features of the step before (a late feed); labels stay."""
    level: Deviation = 0.0
    """As `BarAugmentation.scale`, one c for each stream, without computing features anew:
    log variances shift by 2 log c, in features and labels; return labels are multiplied by c."""


SHIFTED_LEVELS: Final = ChunkAugmentation(level=0.5)
"""What is trained on unless told otherwise: how variance will move says more than how high a symbol's
was when it was learnt, and new symbols and regimes have other levels."""


class Augmentation(BaseModel):
    """All that may be altered, as a recipe names it; by default nothing is."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    copies: Annotated[int, Field(ge=0, le=100)] = 0
    """Altered copies of the training bars, each by `bars` and with random numbers of its own."""
    bars: BarAugmentation = BarAugmentation()
    chunks: ChunkAugmentation = ChunkAugmentation()


class ChunkSource(Protocol):
    epoch: int

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Chunk]: ...


class AugmentedChunks:
    """Training chunks, altered afresh each epoch; the same seed and epoch give the same chunks."""

    def __init__(
        self,
        chunks: ChunkSource,
        config: ChunkAugmentation,
        scaler: Scaler,
        targets: Sequence[Target],
        seed: int = 0,
    ) -> None:
        self._chunks, self._config, self._seed = chunks, config, seed
        self._shift = np.where(LOG_VARIANCES, 2 / scaler.scale, 0.0).astype(np.float32)
        self._volatility = np.array([t.kind == "volatility" for t in targets])
        self._return = np.array([t.kind == "return" for t in targets])

    @property
    def epoch(self) -> int:
        return self._chunks.epoch

    @epoch.setter
    def epoch(self, epoch: int) -> None:
        self._chunks.epoch = epoch

    def __len__(self) -> int:
        return len(self._chunks)

    def __iter__(self) -> Iterator[Chunk]:
        rng = np.random.default_rng((self._seed, self._chunks.epoch))
        log_c = np.zeros(0, dtype=np.float32)
        newest = np.zeros((0, 0), dtype=np.float32)
        for chunk in self._chunks:
            if not chunk.carry:
                log_c = rng.normal(0, self._config.level, len(chunk.x)).astype(np.float32)
                newest = chunk.x[:, 0]
            shown = self._late(chunk.x, newest, rng)
            newest = chunk.x[:, -1]
            shown = shown + log_c[:, None, None] * self._shift
            if self._config.noise:
                shown += self._config.noise * rng.standard_normal(shown.shape, dtype=np.float32)
            yield chunk._replace(
                x=np.clip(shown, -CLIP, CLIP), y=self._labels(chunk, log_c[:, None, None])
            )

    def _late(
        self, x: NDArray[np.float32], newest: NDArray[np.float32], rng: np.random.Generator
    ) -> NDArray[np.float32]:
        before = np.concatenate([newest[:, None], x[:, :-1]], axis=1)
        late = rng.random(x.shape[:2]) < self._config.stale
        return np.asarray(np.where(late[..., None], before, x))

    def _labels(self, chunk: Chunk, log_c: NDArray[np.float32]) -> NDArray[np.float32]:
        y = chunk.y + 2 * log_c * self._volatility
        y = np.where(self._return, y * np.exp(log_c), y)
        return np.asarray(y * (chunk.weight[..., None] > 0), dtype=np.float32)
