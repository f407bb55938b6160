"""From a table of bars to training examples. Shapes: n bars, F features, K targets, B streams, L steps."""

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import dataset as parquet

from models.features import RESET, WARM_UP_BARS, F, FeatureSpec, history
from models.scaling import Scaler
from models.splits import Span
from models.targets import Labels, Target
from schemas.messages import EARLIEST_TS, LATEST_TS

COLUMNS: Final = ("symbol", "ts", "open", "high", "low", "close", "volume")
OHLCV: Final = list(COLUMNS[2:])
MAX_REJECTED: Final = 0.01
"""Share of impossible bars above which a file is refused: then it means something else."""
MAX_SCALER_ROWS: Final = 500_000
NEVER: Final = np.iinfo(np.int64).max


class BarsRejected(ValueError):
    """The table is not bars; the message says what is wrong, and where."""


def load_bars(source: str | Path | pd.DataFrame) -> pd.DataFrame:
    """Bars sorted by symbol and ts, of the columns COLUMNS; other columns are dropped.

    `ts` is epoch ms UTC of the bar's open (a datetime column is converted, UTC where it has no
    zone). Impossible bars are dropped as the stream would dead-letter them, and of two bars of one
    symbol and ts the first stays; `frame.attrs` counts both (`rejected`, `duplicates`).
    Raises BarsRejected where columns are missing, ts is no epoch ms, or too many bars are impossible.
    """
    if not isinstance(source, str | Path | pd.DataFrame):
        raise BarsRejected(f"bars are a DataFrame or a parquet file, not {type(source).__name__}")
    frame = source if isinstance(source, pd.DataFrame) else pd.read_parquet(source)
    missing = [name for name in COLUMNS if name not in frame.columns]
    if missing:
        raise BarsRejected(
            f"no column {', '.join(missing)}; there are {', '.join(map(str, frame))}"
        )
    if frame.empty:
        raise BarsRejected("no bars")
    if nameless := int(frame["symbol"].isna().sum()):
        raise BarsRejected(f"{nameless} of {len(frame)} bars have no symbol")
    bars = pd.DataFrame({"symbol": frame["symbol"].astype(str), "ts": epoch_ms(frame["ts"])})
    for name in OHLCV:
        try:
            bars[name] = frame[name].astype(np.float64)
        except (TypeError, ValueError) as error:
            raise BarsRejected(f"column {name} is not numbers: {error}") from error
    possible = _is_possible(bars)
    rejected = int((~possible).sum())
    if rejected > MAX_REJECTED * len(bars):
        first = bars[~possible].iloc[0].to_dict()
        raise BarsRejected(f"{rejected} of {len(bars)} bars are impossible, the first is {first}")
    bars = bars[possible].drop_duplicates(["symbol", "ts"])
    duplicates = len(frame) - rejected - len(bars)
    bars = bars.sort_values(["symbol", "ts"], kind="stable", ignore_index=True)
    bars.attrs = {"rejected": rejected, "duplicates": duplicates}
    return bars


def epoch_ms(ts: "pd.Series[int]") -> NDArray[np.int64]:
    """Times or epoch ms as epoch ms UTC. Raises BarsRejected."""
    if absent := int(ts.isna().sum()):
        raise BarsRejected(f"{absent} of {len(ts)} bars have no ts")
    if pd.api.types.is_datetime64_any_dtype(ts):
        utc = pd.to_datetime(ts, utc=True).astype("datetime64[ms, UTC]")
        return np.asarray(utc.astype("int64"), dtype=np.int64)
    if not pd.api.types.is_integer_dtype(ts):
        raise BarsRejected(
            f"ts must be whole epoch milliseconds or datetimes, not {ts.dtype}: pandas.to_datetime "
            "makes datetimes of text"
        )
    values = np.asarray(ts, dtype=np.int64)
    if values.min() < EARLIEST_TS:
        raise BarsRejected(f"ts {values.min()} is before 1970: epoch milliseconds are not negative")
    if values.max() > LATEST_TS:
        raise BarsRejected(f"ts {values.max()} is not epoch milliseconds: micro- or nanoseconds?")
    if 10**8 < values.max() < 10**10:
        raise BarsRejected(f"ts {values.max()} is not epoch milliseconds: seconds?")
    return values


def _is_possible(bars: pd.DataFrame) -> NDArray[np.bool_]:
    ohlcv = bars[OHLCV].to_numpy(np.float64)
    open_, high, low, close, volume = ohlcv.T
    return np.asarray(
        np.isfinite(ohlcv).all(axis=1)
        & (ohlcv[:, :4] > 0).all(axis=1)
        & (volume >= 0)
        & (low <= np.minimum(open_, close))
        & (high >= np.maximum(open_, close))
    )


def infer_interval_ms(bars: pd.DataFrame) -> int:
    """The most frequent distance between two bars of one symbol."""
    distance = bars.groupby("symbol")["ts"].diff().dropna()
    if distance.empty:
        raise BarsRejected("no symbol has two bars: the bar interval is unknown")
    return int(distance.mode().iloc[0])


@dataclass(frozen=True, eq=False)
class History:
    """Everything about one symbol, one row a bar in time order."""

    symbol: str
    ts: NDArray[np.int64]
    ohlcv: NDArray[np.float64]
    x: NDArray[np.float32]
    """[n, F] unscaled"""
    status: NDArray[np.int8]
    y: NDArray[np.float64]
    """[n, K], NaN where undefined"""
    known_ts: NDArray[np.int64]
    """[n] the bar that made the last of the labels known; NEVER where one is undefined"""

    @cached_property
    def since_reset(self) -> NDArray[np.int64]:
        """[n] bars since the last reset, the resetting bar included: 1, 2, ..."""
        row = np.arange(len(self.ts))
        return row - np.maximum.accumulate(np.where(self.status == RESET, row, 0)) + 1

    @property
    def is_warm(self) -> NDArray[np.bool_]:
        """[n] features are complete."""
        return self.since_reset >= WARM_UP_BARS


def histories(
    bars: pd.DataFrame,
    spec: FeatureSpec,
    targets: Sequence[Target],
    progress: Callable[[int], None] | None = None,
) -> list[History]:
    """One History for each symbol of `load_bars`; `progress` is told the bars done, by symbol."""
    made = []
    for symbol, rows in bars.groupby("symbol", sort=True):
        made.append(symbol_history(str(symbol), rows, spec, targets))
        if progress:
            progress(len(rows))
    return made


def head_of(path: str | Path, rows: int = 200_000) -> pd.DataFrame:
    """The first bars of parquet files (one, or a folder of them), as `load_bars` gives them."""
    return load_bars(parquet.dataset(path, format="parquet").head(rows).to_pandas())


def histories_on_disk(
    path: str | Path,
    spec: FeatureSpec,
    targets: Sequence[Target],
    folder: Path,
    progress: Callable[[int], None] | None = None,
) -> Iterator[History]:
    """Histories of parquet files (one, or a folder of them) larger than memory, one after another.

    The bars are parted by symbol in one pass, and what a history holds is memory-mapped from
    `folder`: resident are one symbol's bars, what is reckoned of a history later (some bytes a bar)
    and the pages in use. The files must outlive the histories.
    """
    bars = parquet.dataset(path, format="parquet")
    missing = [name for name in COLUMNS if name not in bars.schema.names]
    if missing:
        raise BarsRejected(f"no column {', '.join(missing)}")
    shutil.rmtree(folder / "bars", ignore_errors=True)
    (folder / "bars").mkdir(parents=True)
    batches, written = _named_for_folders(bars), 0
    while some := list(islice(batches, 16)):  # left to itself, a writer queues millions of rows
        parquet.write_dataset(
            some,
            folder / "bars",
            basename_template=f"{written:06d}-{{i}}.arrow",
            schema=pa.schema([bars.schema.field(name) for name in COLUMNS[1:]] + [_FOLDER]),
            format="feather",  # a parquet writer holds megabytes for each symbol
            partitioning=[_FOLDER.name],
            max_partitions=1 << 16,
            existing_data_behavior="overwrite_or_ignore",
        )
        written += 1
    for i, part in enumerate(sorted((folder / "bars").iterdir())):
        symbol = bytes.fromhex(part.name[1:]).decode()
        bars = parquet.dataset(part, format="feather")
        rows = load_bars(bars.to_table().to_pandas().assign(symbol=symbol))
        made = symbol_history(symbol, rows, spec, targets)
        mapped: dict[str, Any] = {"x": _mapped(folder / f"features-{i}.npy", made.x)}
        for name in ("ts", "ohlcv", "status", "y", "known_ts"):
            mapped[name] = _mapped(folder / f"{name}-{i}.npy", getattr(made, name))
        yield replace(made, **mapped)
        if progress:
            progress(len(rows))


def _mapped(file: Path, values: NDArray[Any]) -> NDArray[Any]:
    np.save(file, values)
    return np.asarray(np.load(file, mmap_mode="r"))


_FOLDER: Final = pa.field("folder", pa.string())


def _named_for_folders(bars: parquet.Dataset) -> Iterator[pa.RecordBatch]:
    """Batches with the symbol as a name that is safe in any file system."""
    lazily = parquet.ParquetFragmentScanOptions(pre_buffer=False)  # or it keeps what it has read
    for batch in bars.to_batches(
        columns=list(COLUMNS),
        batch_size=1 << 16,
        batch_readahead=2,
        fragment_scan_options=lazily,
    ):
        if batch["symbol"].null_count:
            raise BarsRejected("there are bars without a symbol")
        names = [f"s{str(symbol).encode().hex()}" for symbol in batch["symbol"].to_pylist()]
        yield batch.drop_columns("symbol").append_column(_FOLDER, pa.array(names, pa.string()))


def symbol_history(
    symbol: str, rows: pd.DataFrame, spec: FeatureSpec, targets: Sequence[Target]
) -> History:
    ts = rows["ts"].to_numpy(np.int64)
    ohlcv = np.ascontiguousarray(rows[OHLCV].to_numpy(np.float64))
    return history_of(symbol, ts, ohlcv, spec, targets)


def history_of(
    symbol: str,
    ts: NDArray[np.int64],
    ohlcv: NDArray[np.float64],
    spec: FeatureSpec,
    targets: Sequence[Target],
) -> History:
    x, status = history(spec, ts, ohlcv)
    y = np.full((len(ts), len(targets)), np.nan)
    known_ts = np.full((len(ts), len(targets)), NEVER)
    matured = Labels(targets, spec, capacity=1).update(np.zeros(len(ts), np.int64), ts, ohlcv)
    row = np.searchsorted(ts, matured.ts)
    y[row, matured.target] = matured.label
    known_ts[row, matured.target] = matured.matured_ts
    return History(symbol, ts, ohlcv, x, status, y, known_ts.max(axis=1, initial=0))


def training_rows(histories: Sequence[History], span: Span) -> NDArray[np.float32]:
    """Features [n, F] of warm rows in the span: what a scaler may see.

    Every k-th of them where there are more than `MAX_SCALER_ROWS`.
    """
    rows = [np.flatnonzero(h.is_warm & span.rows(h.ts)) for h in histories]
    every = -(-sum(map(len, rows)) // MAX_SCALER_ROWS) or 1
    return np.concatenate([h.x[r[::every]] for h, r in zip(histories, rows, strict=True)])


class Window(NamedTuple):
    """A batch of overlapping sequences, each with the label that starts after its last bar."""

    x: NDArray[np.float32]
    """[B, T, F] scaled"""
    y: NDArray[np.float32]
    """[B, K]"""
    symbol: list[str]
    ts: NDArray[np.int64]
    """[B] of the last bar"""


class Windows:
    """Every `stride`-th sequence of T consecutive warm bars of one symbol, for models without a state.

    None reaches over a reset or from one symbol into another, and each label was known in the span.
    The bars before the last one may lie before the span.
    """

    def __init__(
        self,
        histories: Sequence[History],
        span: Span,
        scaler: Scaler,
        length: int,
        stride: int = 1,
        batch: int = 256,
    ) -> None:
        self._histories, self._scaler, self._length, self._batch = histories, scaler, length, batch
        ends = []
        for i, h in enumerate(histories):
            full = h.since_reset >= WARM_UP_BARS + length - 1
            known = span.purged_rows(h.ts, h.known_ts) & np.isfinite(h.y).all(axis=1)
            last = np.flatnonzero(full & known)[::stride]
            ends.append(np.stack([np.full(len(last), i), last], axis=1))
        self._ends: NDArray[np.int64] = np.concatenate(ends)

    @property
    def counted(self) -> int:
        return len(self._ends)

    def __len__(self) -> int:
        return -(-len(self._ends) // self._batch)

    def __iter__(self) -> Iterator[Window]:
        return self.batches()

    def batches(self, rng: np.random.Generator | None = None) -> Iterator[Window]:
        """All sequences once, by symbol and time, or in random order."""
        ends = self._ends if rng is None else rng.permutation(self._ends)
        for i in range(0, len(ends), self._batch):
            chosen = [(self._histories[j], row) for j, row in ends[i : i + self._batch]]
            rows = np.stack([h.x[row - self._length + 1 : row + 1] for h, row in chosen])
            yield Window(
                self._scaler.transform(rows),
                np.array([h.y[row] for h, row in chosen], dtype=np.float32),
                [h.symbol for h, _ in chosen],
                np.array([h.ts[row] for h, row in chosen]),
            )


class Chunk(NamedTuple):
    x: NDArray[np.float32]
    """[B, L, F] scaled"""
    y: NDArray[np.float32]
    """[B, L, K]; 0 where weight is 0"""
    weight: NDArray[np.float32]
    """[B, L] 1 where the step counts, 0 in burn-in, padding and where a label is undefined"""
    carry: bool
    """The state after the chunk before goes on; else it starts from zero."""


class _Stream(NamedTuple):
    history: int
    start: int
    first_counted: int
    stop: int


class Chunks:
    """Chunks of B parallel streams: each epoch every row of the span counts exactly once.

    Warm rows between two resets form a run; a run is cut into streams of `chunks_per_stream`
    chunks of `length` steps. A stream begins with `burn_in` rows of what came before, which do not
    count (nor do the first `burn_in` warm rows of a run). So no reset is inside a stream, and no
    symbol's state reaches another's. Only rows whose labels were known in the span count.
    With `shuffle` the order changes by `seed` and `epoch`, which counts the iterations begun.
    """

    def __init__(
        self,
        histories: Sequence[History],
        span: Span,
        scaler: Scaler,
        batch: int = 64,
        length: int = 64,
        burn_in: int = 64,
        chunks_per_stream: int = 16,
        shuffle: bool = False,
        seed: int = 0,
    ) -> None:
        steps = length * chunks_per_stream
        if burn_in >= steps:
            raise ValueError(f"a burn-in of {burn_in} leaves nothing of streams of {steps} steps")
        self._histories, self._scaler = histories, scaler
        self._batch, self._length, self._shuffle, self._seed = batch, length, shuffle, seed
        self._counts = [
            span.purged_rows(h.ts, h.known_ts) & np.isfinite(h.y).all(axis=1) for h in histories
        ]
        self._streams = [
            stream
            for i, h in enumerate(histories)
            for stream in _streams(i, h, span, steps, burn_in)
            if self._counts[i][stream.first_counted : stream.stop].any()
        ]
        self._n_chunks = np.array(
            [-(-(s.stop - s.start) // length) for s in self._streams], dtype=np.int64
        )
        self.epoch = 0

    @property
    def counted(self) -> int:
        """Rows with weight 1 in one epoch."""
        return sum(
            int(self._counts[s.history][s.first_counted : s.stop].sum()) for s in self._streams
        )

    def __len__(self) -> int:
        longest_first = -np.sort(-self._n_chunks)
        return int(longest_first[:: self._batch].sum())

    def __iter__(self) -> Iterator[Chunk]:
        rng = np.random.default_rng((self._seed, self.epoch))
        self.epoch += 1
        for group in self._groups(rng if self._shuffle else None):
            for k in range(int(self._n_chunks[group].max())):
                yield self._chunk([self._streams[i] for i in group], k)

    def _groups(self, rng: np.random.Generator | None) -> list[NDArray[np.intp]]:
        """Streams of like length together, so that little is padding."""
        order = (
            np.arange(len(self._streams)) if rng is None else rng.permutation(len(self._streams))
        )
        order = order[np.argsort(-self._n_chunks[order], kind="stable")]
        groups = [order[i : i + self._batch] for i in range(0, len(order), self._batch)]
        return groups if rng is None else [groups[i] for i in rng.permutation(len(groups))]

    def _chunk(self, group: Sequence[_Stream], k: int) -> Chunk:
        B, L, K = len(group), self._length, self._histories[0].y.shape[1]
        x = np.zeros((B, L, F), dtype=np.float32)
        y = np.zeros((B, L, K), dtype=np.float32)
        weight = np.zeros((B, L), dtype=np.float32)
        for b, stream in enumerate(group):
            first = stream.start + k * L
            rows = np.arange(first, min(first + L, stream.stop))
            if len(rows) == 0:
                continue
            h = self._histories[stream.history]
            counts = self._counts[stream.history][rows] & (rows >= stream.first_counted)
            x[b, : len(rows)] = self._scaler.transform(h.x[rows])
            y[b, : len(rows)][counts] = h.y[rows[counts]]
            weight[b, : len(rows)] = counts
        return Chunk(x, y, weight, carry=k > 0)


def _streams(index: int, h: History, span: Span, steps: int, burn_in: int) -> Iterator[_Stream]:
    wanted = np.flatnonzero(h.is_warm & span.rows(h.ts))
    if len(wanted) == 0:
        return
    first_of_run = np.arange(len(h.ts)) - h.since_reset + 1
    for run in np.split(wanted, np.flatnonzero(np.diff(first_of_run[wanted])) + 1):
        warm_from = int(first_of_run[run[0]]) + WARM_UP_BARS - 1
        first, stop = max(int(run[0]), warm_from + burn_in), int(run[-1]) + 1
        while first < stop:
            start = first - burn_in
            yield _Stream(index, start, first, min(start + steps, stop))
            first = start + steps
