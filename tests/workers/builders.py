"""Small real things for tests: bars, a bundle with random weights, an engine that runs it."""

import math

import numpy as np
from numpy.typing import NDArray

from models.baselines import Reference
from models.bundle import Bundle, BundleConfig, LabelScaling, Provenance
from models.features import F, FeatureSpec
from models.network import CausalNetwork
from models.network_config import NetworkConfig
from models.runtimes import open_runtime, with_golden
from models.runtimes.torch import weights_of
from models.scaling import Scaler
from models.targets import Target
from schemas.codecs import BarColumns
from workers.engine import Engine
from workers.schedule import Schedule

MINUTE_MS = 60_000
SPEC = FeatureSpec(interval_ms=MINUTE_MS)
WARM_UP = 12


def make_bundle(seed: int = 0, window: int = 8, targets: tuple[Target, ...] = ()) -> Bundle:
    """A bundle of a tiny network whose every weight is random, so that all of it matters."""
    import torch

    targets = targets or (Target(kind="volatility", horizon=5), Target(kind="direction", horizon=3))
    network = NetworkConfig(
        n_features=F,
        n_outputs=sum(target.n_outputs for target in targets),
        hidden=8,
        layers=2,
        window=window,
        heads=2,
        attention_size=8,
    )
    torch.manual_seed(seed)
    module = CausalNetwork(network).eval()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(4, 20, F)).astype(np.float32)
    bundle = Bundle(
        config=BundleConfig(
            features=SPEC,
            targets=targets,
            network=network,
            label_scaling=tuple(LabelScaling() for _ in targets),
            variance_bias=tuple(0.0 for _ in targets),
            warm_up_bars=WARM_UP,
            references=tuple(Reference() for _ in targets),
            calibrations=tuple(None for _ in targets),
        ),
        weights=weights_of(module),
        scaler=Scaler.fit(x.reshape(-1, F)),
        provenance=Provenance(seed=seed, from_ts=0, to_ts=1, bars=1, symbols=1),
    )
    return with_golden(bundle, x)


def make_bars(symbols: list[str], n: int, seed: int = 0, start_ts: int = 0) -> BarColumns:
    """n bars of each symbol, interleaved in time."""
    rng = np.random.default_rng(seed)
    S = len(symbols)
    close = 100 * np.exp(np.cumsum(rng.normal(0, 1e-3, (n, S)), axis=0))
    open_ = close * np.exp(rng.normal(0, 3e-4, (n, S)))
    high = np.maximum(open_, close) * np.exp(np.abs(rng.normal(0, 3e-4, (n, S))))
    low = np.minimum(open_, close) * np.exp(-np.abs(rng.normal(0, 3e-4, (n, S))))
    volume = rng.integers(0, 1000, (n, S)).astype(float)
    ohlcv: NDArray[np.float64] = np.stack([open_, high, low, close, volume], axis=-1)
    ts = np.repeat(start_ts + MINUTE_MS * np.arange(n), S)
    return BarColumns(symbols * n, ts.astype(np.int64), ohlcv.reshape(-1, 5))


def rows_of(bars: BarColumns, rows: NDArray[np.intp] | slice) -> BarColumns:
    symbols = np.array(bars.symbols, dtype=object)[rows].tolist()
    return BarColumns(symbols, bars.ts[rows], bars.ohlcv[rows])


def make_engine(*bundles: Bundle, partitions: int = 1, rebuilt_rows: float = math.inf) -> Engine:
    """An engine in which the first bundle is the champion of every partition from the start."""
    config = bundles[0].config
    engine = Engine(
        config.features,
        remembered_bars=config.remembered_bars,
        rebuilt_rows=rebuilt_rows,
    )
    for bundle in bundles:
        engine.add(open_runtime(bundle))
    for partition in range(partitions):
        engine.schedules[partition] = Schedule()
        engine.schedules[partition].give("champion", bundles[0].version, 0)
    return engine
