"""Proof that nothing was lost, doubled or changed: what the topics hold against an undisturbed run."""

from collections.abc import Mapping
from dataclasses import dataclass

import msgspec
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from models.bundle import Bundle
from schemas.codecs import BarColumns, decode_bars
from schemas.topics import BARS, OUTCOMES, PREDICTIONS
from workers.config import Settings
from workers.kafka import read_topic
from workers.offline import engine_for, prediction_frame, replay
from workers.schedule import Schedule


@dataclass(frozen=True)
class BarsLog:
    """The good bars of `market.bars`: each partition's in its order, the partitions side by side in
    event time; `created_ms` is wall time.
    """

    bars: BarColumns
    partitions: NDArray[np.int64]
    created_ms: NDArray[np.int64]


@dataclass(frozen=True)
class Comparison:
    expected: int
    published: int
    distinct: int
    lost: int
    """Expected, and on no topic."""
    duplicated: int
    """Messages beyond the first with the same id."""
    unexpected: int
    """On the topic, though the undisturbed run says nothing of the kind."""
    max_abs_difference: float
    """Of the values of those that both have."""
    wrong_role: int


def compare(expected: pd.DataFrame, published: pd.DataFrame) -> Comparison:
    """Both with the columns id, value, role."""
    first = published.drop_duplicates("id").set_index("id")
    wanted = expected.set_index("id")
    if not wanted.index.is_unique:
        raise ValueError("the undisturbed run itself has an id twice")
    both = wanted.merge(first, left_index=True, right_index=True, suffixes=("_expected", ""))
    difference = (both["value"] - both["value_expected"]).abs()
    return Comparison(
        expected=len(wanted),
        published=len(published),
        distinct=len(first),
        lost=len(wanted) - len(both),
        duplicated=len(published) - len(first),
        unexpected=len(first) - len(both),
        max_abs_difference=float(difference.max()) if len(both) else 0.0,
        wrong_role=int((both["role"] != both["role_expected"]).sum()),
    )


@dataclass(frozen=True)
class Undisturbed:
    predictions: pd.DataFrame
    """Columns of `workers.offline`."""
    attention_ts: NDArray[np.int64]
    attention: NDArray[np.float32]
    """f32[n, T] by lag, of the champion's forecasts for one symbol at `attention_ts` i64[n]."""


def undisturbed(
    log: BarsLog,
    schedules: Mapping[int, Schedule],
    bundles: list[Bundle],
    symbol: str,
    device: str = "cpu",
) -> Undisturbed:
    """Run the engine once over all bars, with the roles that `schedules` give in each partition."""
    window = max(bundle.config.window for bundle in bundles)
    engine = engine_for(bundles, attention_top=window, device=device)
    engine.schedules.update(schedules)
    frames, times, weights = [], [], []
    for batch, processed in replay(engine, log.bars, log.partitions):
        for forecast in processed.forecasts:
            frames.append(prediction_frame(forecast, batch))
            if forecast.role == "champion":
                here = [i for i, row in enumerate(forecast.rows) if batch.symbols[row] == symbol]
                by_lag = np.zeros((len(here), window), np.float32)
                lags, heavy = forecast.attention.lags[here], forecast.attention.weights[here]
                np.put_along_axis(by_lag, lags, heavy, axis=1)
                times.append(batch.ts[forecast.rows[here]])
                weights.append(by_lag)
    return Undisturbed(
        pd.concat(frames, ignore_index=True), np.concatenate(times), np.concatenate(weights)
    )


def read_bars(settings: Settings) -> BarsLog:
    messages = list(read_topic(settings, BARS))
    bars, places, _ = decode_bars([message.value() for message in messages])
    partitions = np.array([messages[place].partition() for place in places], np.int64)
    created_ms = np.array([messages[place].timestamp()[1] for place in places], np.int64)
    order = side_by_side(partitions, bars.ts)
    symbols = [bars.symbols[row] for row in order]
    columns = BarColumns(symbols, bars.ts[order], bars.ohlcv[order])
    return BarsLog(columns, partitions[order], created_ms[order])


def side_by_side(partitions: NDArray[np.int64], ts: NDArray[np.int64]) -> NDArray[np.intp]:
    """An order in which partitions advance in event time together and each keeps its own order.

    A batch then holds many symbols, not many bars of few: far fewer rounds in the engine.
    """
    newest = np.empty_like(ts)
    for partition in np.unique(partitions):
        here = partitions == partition
        newest[here] = np.maximum.accumulate(ts[here])
    return np.argsort(newest, kind="stable")


class _Prediction(msgspec.Struct):
    id: str
    symbol: str
    ts: int
    target: str
    value: float
    bundle: str
    role: str


class _Outcome(msgspec.Struct):
    symbol: str
    ts: int
    matured_ts: int
    target: str
    bundle: str
    role: str
    value: float
    label: float
    loss: float
    reference_loss: float


def read_predictions(settings: Settings) -> pd.DataFrame:
    """All of `signals.predictions`, with `created_ms`, the wall time at which each was sent."""
    return _read(settings, PREDICTIONS, _Prediction)


def read_outcomes(settings: Settings) -> pd.DataFrame:
    return _read(settings, OUTCOMES, _Outcome)


def _read(settings: Settings, topic: str, kind: type[msgspec.Struct]) -> pd.DataFrame:
    decode = msgspec.json.Decoder(kind).decode
    rows = [
        (*msgspec.structs.astuple(decode(message.value() or b"")), message.timestamp()[1])
        for message in read_topic(settings, topic)
    ]
    return pd.DataFrame(rows, columns=[*kind.__struct_fields__, "created_ms"])
