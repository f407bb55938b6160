"""Every family of bundles through the engine that serves the stream: champion, challenger, snapshot."""

from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest

from models.bundle import Bundle
from models.features import WARM_UP_BARS, Features
from models.runtimes import open_runtime
from schemas.codecs import BarColumns
from tests.models.networks import make_bundle, make_tabular_bundle
from tests.workers.builders import MINUTE_MS, SPEC, make_bars, make_engine, rows_of
from workers.engine import Engine
from workers.offline import predict

FAMILIES: dict[str, Callable[[int], Bundle]] = {
    "carried": lambda seed: make_bundle(seed),
    "window": lambda seed: make_bundle(seed, mode="window", bidirectional=True, attention="self"),
    "slower": lambda seed: make_bundle(seed, mode="window", attention="cross", slower=2),
    "tabular": lambda seed: make_tabular_bundle(seed),
}
SYMBOLS = ["A", "B"]
N = WARM_UP_BARS + 40
BARS = make_bars(SYMBOLS, N)

Said = dict[tuple[str, int, str, str], tuple[float, ...]]


def run(engine: Engine, bars: BarColumns) -> Said:
    """Values by symbol, bar time, bundle and role."""
    processed = engine.process(bars, np.zeros(len(bars), np.int64))
    return {
        (bars.symbols[row], int(bars.ts[row]), forecast.bundle.version, forecast.role): tuple(value)
        for forecast in processed.forecasts
        for row, value in zip(forecast.rows, forecast.values, strict=True)
    }


@pytest.mark.parametrize("family", FAMILIES)
class TestEveryFamily:
    def test_it_says_what_its_runtime_says_bar_by_bar(self, family: str) -> None:
        bundle = FAMILIES[family](1)
        said = run(make_engine(bundle), BARS)
        runtime, features = open_runtime(bundle), Features(SPEC, 1)
        runtime.grow(1)
        slot = np.zeros(1, np.int64)
        own = rows_of(BARS, np.arange(0, len(BARS), 2))
        x, _ = features.update(np.zeros(N, np.int64), own.ts, own.ohlcv)
        for i in range(WARM_UP_BARS, N):
            values = runtime.step(slot, x[[i]]).values[0]
            key = ("A", int(own.ts[i]), bundle.version, "champion")
            assert (key in said) == (i - WARM_UP_BARS + 1 >= bundle.config.warm_up_bars)
            if key in said:
                np.testing.assert_allclose(said[key], values, atol=1e-5)

    def test_a_challenger_that_joins_late_beside_any_champion_is_ready_at_once(
        self, family: str
    ) -> None:
        champion, challenger = make_bundle(7), FAMILIES[family](2)
        alone = run(make_engine(challenger), BARS)
        engine = make_engine(champion, challenger)
        half = 2 * (WARM_UP_BARS + 25)
        run(engine, rows_of(BARS, slice(0, half)))
        joined_ts = MINUTE_MS * (WARM_UP_BARS + 25)
        engine.schedules[0].give("challenger", challenger.version, joined_ts)
        said = run(engine, rows_of(BARS, slice(half, None)))
        assert {key[3] for key in said} == {"champion", "challenger"}
        shadow = {key: value for key, value in said.items() if key[3] == "challenger"}
        assert len(shadow) == len(BARS) - half
        if family == "carried":  # it starts from zero: only a window forgets exactly
            return
        for (symbol, ts, version, _), value in shadow.items():
            known = alone[symbol, ts, version, "champion"]
            np.testing.assert_allclose(value, known, atol=1e-5)

    def test_a_snapshot_goes_on_in_another_engine(self, family: str) -> None:
        bundle = FAMILIES[family](3)
        whole = run(make_engine(bundle), BARS)
        one, other = make_engine(bundle), make_engine(bundle)
        half = len(BARS) - 20
        run(one, rows_of(BARS, slice(0, half)))
        other.load(0, *one.export(0))
        rest = run(other, rows_of(BARS, slice(half, None)))
        assert len(rest) == 20
        for key, value in rest.items():
            np.testing.assert_allclose(value, whole[key], atol=1e-5)

    def test_predict_takes_it(self, family: str) -> None:
        frame = pd.DataFrame(BARS.ohlcv, columns=["open", "high", "low", "close", "volume"])
        frame.insert(0, "symbol", BARS.symbols)
        frame.insert(1, "ts", BARS.ts)
        said = predict(FAMILIES[family](4), frame, device="cpu")
        assert len(said) == 2 * 2 * (N - WARM_UP_BARS - 11)
        assert np.isfinite(said["value"]).all()
