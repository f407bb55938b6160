import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from models.scaling import CLIP, Kind, Scaler

KINDS: tuple[Kind, ...] = ("standard", "robust", "minmax")


def rows(n: int = 400, seed: int = 0) -> Any:
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(n, 5)) * [1, 10, 1e-3, 1e4, 1] + [0, -12, 3, 1e4, 7]).astype("f4")


def test_standard_gives_mean_0_and_deviation_1() -> None:
    y = Scaler.fit(rows()).transform(rows())
    assert np.allclose(y.mean(axis=0), 0, atol=1e-3)
    assert np.allclose(y.std(axis=0), 1, atol=1e-3)


def test_minmax_puts_the_training_range_on_minus_1_to_1() -> None:
    y = Scaler.fit(rows(), "minmax").transform(rows())
    assert np.allclose(y.min(axis=0), -1, atol=1e-3)
    assert np.allclose(y.max(axis=0), 1, atol=1e-3)


def test_robust_is_not_moved_by_a_few_wild_rows() -> None:
    x = rows(1000)
    wild = x.copy()
    wild[:5] = 1e6
    a, b = Scaler.fit(x, "robust"), Scaler.fit(wild, "robust")
    assert np.allclose(a.transform(x), b.transform(x), atol=0.1)
    assert np.allclose(a.transform(x).std(axis=0), 1, atol=0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_column_without_spread_becomes_zero(kind: Kind) -> None:
    x = rows()
    x[:, 2] = 0.1
    assert not Scaler.fit(x, kind).transform(x)[:, 2].any()


def test_robust_falls_back_to_the_deviation_where_half_the_rows_are_equal() -> None:
    x = np.zeros((100, 1), dtype=np.float32)
    x[::10] = 1
    y = Scaler.fit(x, "robust").transform(x)
    assert np.isfinite(y).all()
    assert 0 < y.max() < CLIP


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=30, deadline=None)
@given(x=arrays(np.float32, (7, 3), elements=st.floats(-(2.0**60), 2.0**60, width=32)))
def test_the_result_is_finite_clipped_float32_whatever_the_rows(kind: Kind, x: Any) -> None:
    kept = x.copy()
    y = Scaler.fit(x, kind).transform(x * np.float32(3))
    assert y.dtype == np.float32
    assert np.isfinite(y).all()
    assert np.abs(y).max() <= CLIP
    np.testing.assert_array_equal(x, kept)


@pytest.mark.parametrize("kind", KINDS)
def test_json_gives_the_same_scaler_back_bit_for_bit(kind: Kind) -> None:
    scaler = Scaler.fit(rows(), kind)
    again = Scaler.from_json(scaler.to_json())
    assert again.to_json() == scaler.to_json()
    np.testing.assert_array_equal(again.transform(rows()), scaler.transform(rows()))


def test_a_batch_is_scaled_as_its_rows_one_by_one_in_any_shape() -> None:
    x, scaler = rows(), Scaler.fit(rows())
    whole = scaler.transform(x)
    np.testing.assert_array_equal(whole, np.concatenate([scaler.transform(r[None]) for r in x]))
    np.testing.assert_array_equal(
        scaler.transform(x.reshape(20, 20, 5)).reshape(whole.shape), whole
    )


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "magic"},
        {"scale": [1.0]},
        {"scale": [1.0, 0.0, 1.0, 1.0, 1.0]},
        {"scale": [1.0, -1.0, 1.0, 1.0, 1.0]},
        {"centre": [float("nan")] * 5},
        {"centre": ["a"] * 5},
        {"centre": None},
        {"scale": {"a": 1}},
    ],
)
def test_json_of_no_scaler_is_refused(change: dict[str, Any]) -> None:
    content = json.loads(Scaler.fit(rows()).to_json())
    with pytest.raises(ValueError):  # noqa: PT011 - many reasons, one type
        Scaler.from_json(json.dumps(content | change))


@pytest.mark.parametrize("text", ["", "[]", "{}", "3", '"standard"'])
def test_text_that_is_no_scaler_is_refused(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - many reasons, one type
        Scaler.from_json(text)


def test_fitting_on_nothing_or_on_nan_is_refused() -> None:
    with pytest.raises(ValueError, match="no rows"):
        Scaler.fit(rows()[:0])
    x = rows()
    x[3, 3] = np.nan
    with pytest.raises(ValueError, match="finite"):
        Scaler.fit(x)
