"""Bars that lie in a table through the engine of the stream: offline predictions are online ones."""

from collections.abc import Callable, Iterator

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from models.bundle import Bundle
from models.runtimes import open_runtime, set_threads
from schemas.codecs import BarColumns
from schemas.messages import prediction_id
from workers.engine import Engine, Forecast, Processed
from workers.schedule import Schedule

BATCH_BARS = 4_096

PREDICTION_COLUMNS = (
    "id",
    "symbol",
    "ts",
    "horizon_ts",
    "target",
    "horizon",
    "value",
    "bundle",
    "role",
)


def predict(
    bundle: Bundle,
    bars: pd.DataFrame,
    device: str = "auto",
    runtime: str = "auto",
    *,
    advance: Callable[[int], None] = lambda n: None,
) -> pd.DataFrame:
    """What `bundle` would have said about `bars` as champion from the first of them on.

    `bars` are in event-time order, as `workers.bars` gives them; `advance` is told how many more
    of them are done. One row for each bar and target with the columns `PREDICTION_COLUMNS`, in
    the order of the bars. Bars on which a symbol was still warming up have none.
    """
    engine = engine_for([bundle], device=device, runtime=runtime)
    engine.schedules[0] = Schedule()
    engine.schedules[0].give("champion", bundle.version, 0)
    columns = to_columns(bars)
    parts = []
    for batch, processed in replay(engine, columns, np.zeros(len(columns), np.int64)):
        parts += [prediction_frame(forecast, batch) for forecast in processed.forecasts]
        advance(len(batch))
    if not parts:
        return pd.DataFrame(columns=list(PREDICTION_COLUMNS))
    return pd.concat(parts, ignore_index=True)


def engine_for(
    bundles: list[Bundle], *, attention_top: int = 5, device: str = "auto", runtime: str = "auto"
) -> Engine:
    """An engine with these bundles loaded, the first of them being the one that shapes it.

    Sets one thread, as in the inference worker: rounds of few symbols gain nothing from
    more, and lose much where cores are busy.
    """
    first = bundles[0].config
    engine = Engine(first.features, first.remembered_bars, attention_top)
    for bundle in bundles:
        engine.add(open_runtime(bundle, runtime, device))
    set_threads(1)
    return engine


def replay(
    engine: Engine, bars: BarColumns, partitions: NDArray[np.int64], batch_bars: int = BATCH_BARS
) -> Iterator[tuple[BarColumns, Processed]]:
    """Process n bars in batches; partitions i64[n]."""
    for start in range(0, len(bars), batch_bars):
        rows = slice(start, start + batch_bars)
        batch = BarColumns(bars.symbols[rows], bars.ts[rows], bars.ohlcv[rows])
        yield batch, engine.process(batch, partitions[rows])


def prediction_frame(forecast: Forecast, bars: BarColumns) -> pd.DataFrame:
    """The predictions of one forecast as a table: one row for each of its bars and targets."""
    config, version = forecast.bundle.config, forecast.bundle.version
    symbols = [bars.symbols[row] for row in forecast.rows]
    ts = bars.ts[forecast.rows]
    frames = [
        pd.DataFrame(
            {
                "id": [
                    prediction_id(symbol, at, target.name, version)
                    for symbol, at in zip(symbols, ts.tolist(), strict=True)
                ],
                "symbol": symbols,
                "ts": ts,
                "horizon_ts": ts + target.horizon * config.features.interval_ms,
                "target": target.name,
                "horizon": target.horizon,
                "value": forecast.values[:, k],
                "bundle": version,
                "role": forecast.role,
            }
        )
        for k, target in enumerate(config.targets)
    ]
    return pd.concat(frames, ignore_index=True)


def to_columns(bars: pd.DataFrame) -> BarColumns:
    return BarColumns(
        bars["symbol"].tolist(),
        bars["ts"].to_numpy(np.int64),
        bars[["open", "high", "low", "close", "volume"]].to_numpy(np.float64),
    )
