"""What the benchmarks run on: the default network, simulated bars, and symbols that are warm already."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from models.baselines import Reference
from models.bundle import Bundle, BundleConfig, LabelScaling, Provenance
from models.features import WARM_UP_BARS, F, FeatureSpec, history
from models.network import CausalNetwork
from models.network_config import NetworkConfig
from models.runtimes import open_runtime, with_golden
from models.runtimes.torch import weights_of
from models.scaling import Scaler
from models.simulation import Scenario, SimulatedBars, Simulator
from models.targets import Target
from schemas.codecs import BarColumns, encode_bars
from workers.engine import Engine
from workers.schedule import Schedule

MINUTE_MS = 60_000
FIRST_TS = 1_514_903_400_000
BURN_IN = 30
PATHS = 64
"""Different price paths; where there are more symbols, several share one."""
PATH_MINUTES = 256
"""Minutes of a path after the warm-up; then it is walked back, and forth again."""

Tell = Callable[[str, float], None]
"""What a benchmark is doing, and which share of it is done."""


def quietly(what: str, share: float) -> None:
    """For callers that show nothing."""


def default_bundle(window: int = 30, seed: int = 1) -> Bundle:
    """The default network with fresh weights: as fast as a trained one, and made in a moment."""
    spec = FeatureSpec(interval_ms=MINUTE_MS)
    bars = simulated_bars(symbols=1, minutes=WARM_UP_BARS + 600, seed=seed)
    x, _ = history(spec, bars.ts, np.ascontiguousarray(bars.ohlcv[:, 0]))
    x = x[WARM_UP_BARS:]
    torch.manual_seed(seed)
    target = Target(kind="volatility", horizon=30)
    network = NetworkConfig(n_features=F, n_outputs=target.n_outputs, window=window)
    bundle = Bundle(
        config=BundleConfig(
            features=spec,
            targets=(target,),
            network=network,
            label_scaling=(LabelScaling(mean=-16.0),),
            variance_bias=(0.0,),
            warm_up_bars=BURN_IN + window,
            references=(Reference(),),
            calibrations=(None,),
        ),
        weights=weights_of(CausalNetwork(network).eval()),
        scaler=Scaler.fit(x),
        provenance=Provenance(seed=seed, from_ts=0, to_ts=1, bars=len(x), symbols=1),
    )
    return with_golden(bundle, x[None, :40])


def simulated_bars(symbols: int, minutes: int, seed: int = 1) -> SimulatedBars:
    """So many minutes of one long session."""
    ts: NDArray[np.int64] = FIRST_TS + MINUTE_MS * np.arange(minutes)
    return Simulator(Scenario(symbols=symbols, session_bars=minutes), seed).run(ts)


def silent_minutes(bundle: Bundle) -> int:
    """Bars of a new symbol before the one with its first prediction."""
    return WARM_UP_BARS + bundle.config.warm_up_bars - 1


@dataclass(frozen=True)
class Market:
    """Symbols whose bars go on for ever, minute by minute; each lives in a partition by its number."""

    symbols: int
    partitions: int
    warm_up_minutes: int
    """Minutes before the first that a benchmark sends; `WarmState` has seen them."""
    seed: int = 1
    _paths: NDArray[np.float64] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        bars = simulated_bars(PATHS, self.warm_up_minutes + PATH_MINUTES, self.seed)
        object.__setattr__(self, "_paths", bars.ohlcv)

    def bars(self, minute: int, numbers: Sequence[int] | NDArray[np.intp]) -> BarColumns:
        """Bars of these symbols in one minute, counted from the first after the warm-up."""
        there = len(self._paths) - self.warm_up_minutes - 1
        place = minute if minute < 0 else there - abs(there - minute % (2 * there))
        ohlcv = self._paths[self.warm_up_minutes + place, np.asarray(numbers) % PATHS]
        return BarColumns([name(i) for i in numbers], np.full(len(numbers), ts_of(minute)), ohlcv)

    def messages(self, minute: int, numbers: Sequence[int]) -> Iterable[tuple[bytes, bytes, int]]:
        """Key, value and partition of each of these symbols' bars in one minute."""
        bars = self.bars(minute, numbers)
        for number, symbol, value in zip(numbers, bars.symbols, encode_bars(bars), strict=True):
            yield symbol.encode(), value, number % self.partitions

    def of_partition(self, partition: int) -> range:
        """The numbers of a partition's symbols."""
        return range(partition, self.symbols, self.partitions)


def name(number: int) -> str:
    return f"SIM{number:06d}"


def number_of(symbol: str) -> int:
    return int(symbol[3:])


def ts_of(minute: int) -> int:
    return FIRST_TS + MINUTE_MS * minute


def minute_of(ts: int) -> int:
    return (ts - FIRST_TS) // MINUTE_MS


@dataclass(frozen=True)
class WarmState:
    """An engine's state after the warm-up of every path, ready to be given to any number of symbols."""

    market: Market
    arrays: dict[str, NDArray[Any]]
    meta: dict[str, Any]

    @classmethod
    def of(cls, market: Market, bundle: Bundle) -> "WarmState":
        engine = new_engine(bundle)
        engine.schedules[0] = Schedule()
        engine.schedules[0].give("champion", bundle.version, 0)
        for minute in range(-market.warm_up_minutes, 0):
            engine.process(market.bars(minute, range(PATHS)), np.zeros(PATHS, np.int64))
        return cls(market, *engine.export(0))

    def given_to(self, numbers: Sequence[int]) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        """As `Engine.export` gives it, for a partition that holds these symbols."""
        rows = np.asarray(numbers, np.intp) % PATHS
        return (
            {key: array[rows] for key, array in self.arrays.items()},
            self.meta | {"symbols": [name(i) for i in numbers]},
        )


def new_engine(bundle: Bundle, runtime: str = "auto", device: str = "auto") -> Engine:
    """An engine as the inference worker makes it, with `bundle` loaded."""
    config = bundle.config
    engine = Engine(config.features, remembered_bars=config.remembered_bars)
    engine.add(open_runtime(bundle, runtime, device))
    return engine
