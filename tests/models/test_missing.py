from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.dataset import load_bars
from models.features import FEATURE_NAMES, WINDOWS, FeatureSpec, history
from models.missing import Filling, LooksAhead, with_absent
from tests.models.builders import MINUTE_MS, make_frame

SPEC = FeatureSpec(interval_ms=MINUTE_MS)
METHODS: list[Any] = ["forward", "backward", "linear", "none"]


def holed() -> pd.DataFrame:
    """Bars at minutes 0, 1, 4 and 100 that open at 10, 11, 14, 20 and close one above."""
    opens = np.array([10.0, 11.0, 14.0, 20.0])
    return load_bars(
        pd.DataFrame(
            {
                "symbol": "A",
                "ts": np.array([0, 1, 4, 100]) * MINUTE_MS,
                "open": opens,
                "high": opens + 2,
                "low": opens - 1,
                "close": opens + 1,
                "volume": 5.0,
            }
        )
    )


@pytest.mark.parametrize(
    ("method", "prices"),
    [
        ("forward", [12.0, 12.0]),
        ("backward", [14.0, 14.0]),
        ("linear", [12 * (14 / 12) ** (1 / 3), 12 * (14 / 12) ** (2 / 3)]),
        ("none", [np.nan, np.nan]),
    ],
)
def test_a_short_hole_gets_rows_with_a_mask_and_a_price_by_the_rule(
    method: Any, prices: list[float]
) -> None:
    filled = with_absent(holed(), SPEC, Filling(method=method, limit=5))
    assert (filled["ts"] // MINUTE_MS).tolist() == [0, 1, 2, 3, 4, 100]
    assert filled["absent"].tolist() == [False, False, True, True, False, False]
    assert (filled["since_last_ms"] // MINUTE_MS).tolist() == [0, 1, 1, 2, 3, 96]
    for name in ("open", "high", "low", "close"):
        np.testing.assert_allclose(filled.loc[filled["absent"], name], prices)
    assert filled["volume"].tolist() == [5, 5, 0, 0, 5, 5]
    pd.testing.assert_frame_equal(
        filled.loc[~filled["absent"], list(holed())].reset_index(drop=True), holed()
    )


@pytest.mark.parametrize("method", METHODS)
def test_a_hole_over_the_limit_stays_a_hole(method: Any) -> None:
    filled = with_absent(holed(), SPEC, Filling(method=method, limit=1))
    assert not filled["absent"].any()
    assert len(filled) == 4


@pytest.mark.parametrize("method", ["backward", "linear"])
def test_rules_that_look_ahead_refuse_to_serve_the_stream(method: Any) -> None:
    with pytest.raises(LooksAhead, match="looks ahead"):
        Filling(method=method).for_stream(SPEC)


def test_causal_rules_become_the_limit_of_the_kernel() -> None:
    assert Filling(method="forward", limit=7).for_stream(SPEC).max_fill == 7
    assert Filling(method="none", limit=7).for_stream(SPEC).max_fill == 0


@settings(max_examples=20, deadline=None)
@given(t=st.integers(0, 298), method=st.sampled_from(["forward", "none"]), seed=st.integers(0, 99))
def test_causal_rules_give_rows_up_to_t_that_no_later_bar_changes(
    t: int, method: Any, seed: int
) -> None:
    bars = load_bars(make_frame(symbols=1, n=300, seed=seed))
    spec = FeatureSpec(interval_ms=5 * MINUTE_MS)
    changed = bars.copy()
    changed.loc[t + 1 :, ["open", "high", "low", "close"]] *= 5
    a, b = (
        with_absent(f, spec, Filling(method=method)).query("ts <= @limit")
        for f, limit in ((bars, bars["ts"][t]), (changed, bars["ts"][t]))
    )
    pd.testing.assert_frame_equal(a, b)


@pytest.mark.parametrize("method", METHODS)
def test_symbols_do_not_mix(method: Any) -> None:
    bars = load_bars(make_frame(symbols=3, n=200))
    spec = FeatureSpec(interval_ms=5 * MINUTE_MS)
    whole = with_absent(bars, spec, Filling(method=method))
    for symbol, rows in whole.groupby("symbol"):
        alone = with_absent(bars[bars["symbol"] == symbol], spec, Filling(method=method))
        pd.testing.assert_frame_equal(rows.reset_index(drop=True), alone)
    assert whole["absent"].sum() > 0


def test_the_kernel_fills_as_the_table_does() -> None:
    bars = load_bars(make_frame(symbols=1, n=600))
    spec = FeatureSpec(interval_ms=5 * MINUTE_MS)
    filled = with_absent(bars, spec, Filling(method="forward", limit=spec.max_fill))
    columns = ["open", "high", "low", "close", "volume"]
    x, _ = history(spec, bars["ts"].to_numpy(), bars[columns].to_numpy())
    z, _ = history(spec, filled["ts"].to_numpy(), filled[columns].to_numpy())
    z = z[~filled["absent"].to_numpy()]
    names = [f"log_rv_{w}" for w in WINDOWS] + ["log_gk_hl78", "trend_hl20", "macd_6_20"]
    for name in names:
        i = FEATURE_NAMES.index(name)
        np.testing.assert_allclose(x[:, i], z[:, i], rtol=1e-5, atol=1e-5)
