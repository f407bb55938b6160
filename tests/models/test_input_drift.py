"""Inputs are far from their reference when they have moved, and only then; it says which ones."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from models.input_drift import (
    QUANTILES,
    Gaussian,
    InputReference,
    frechet,
    gaussian,
    measure,
    worst,
)

F, H = 3, 4
NAMES = ("range", "volume", "hour")

samples = arrays(np.float32, st.integers(1, 60), elements=st.integers(-4, 4).map(float))


def draw(n: int = 4_000, seed: int = 0, shift: float = 0.0, scale: float = 1.0) -> np.ndarray:
    """The first column moves; the others do not."""
    x = np.random.default_rng(seed).standard_t(4, (n, F))
    x[:, 0] = shift + scale * x[:, 0]
    return x


def states(n: int = 2_000, seed: int = 0, shift: float = 0.0, scale: float = 1.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    mixed = rng.normal(size=(n, H)) @ np.random.default_rng(9).normal(size=(H, H))
    return np.asarray(scale * mixed + shift)


REFERENCE = InputReference.fit(draw(), states())


def test_fresh_rows_of_the_same_kind_are_near() -> None:
    found = measure(REFERENCE, draw(seed=1), states(seed=1))
    assert found.psi.max() < 0.02
    assert found.ks.max() < 0.05
    assert found.embedding is not None
    assert found.embedding < 0.1


def test_its_own_rows_are_at_no_distance() -> None:
    found = measure(REFERENCE, draw(), states())
    assert found.psi.max() == pytest.approx(0, abs=1e-6)
    assert found.ks.max() == pytest.approx(0, abs=1e-6)
    assert found.embedding == pytest.approx(0, abs=1e-2)


@pytest.mark.parametrize("change", [{"shift": 2.0}, {"shift": -2.0}, {"scale": 4.0}])
def test_the_feature_that_moved_is_far_and_named_and_the_others_are_not(
    change: dict[str, Any],
) -> None:
    found = measure(REFERENCE, draw(seed=1, **change), states(seed=1, **change))
    assert found.psi[0] > 0.5
    assert found.ks[0] > 0.25
    assert max(found.psi[1:].max(), found.ks[1:].max()) < 0.05
    assert found.embedding is not None
    assert found.embedding > 0.8
    for values in (found.psi, found.ks):
        assert next(iter(worst(values, NAMES, 2))) == "range"


@pytest.mark.parametrize("sign", [1, -1])
def test_what_moved_further_is_further(sign: int) -> None:
    found = [
        measure(REFERENCE, draw(seed=1, shift=sign * s), states(seed=1, shift=sign * s))
        for s in (0.0, 0.2, 0.5, 1.0, 2.0, 3.0)
    ]
    for distances in (
        [drift.psi[0] for drift in found],
        [drift.ks[0] for drift in found],
        [drift.embedding for drift in found],
    ):
        assert all(b > a for a, b in pairwise(distances))


def test_the_same_rows_in_any_order_are_at_the_same_distance() -> None:
    x, hidden = draw(seed=1, shift=0.7), states(seed=1)
    one, other = measure(REFERENCE, x, hidden), measure(REFERENCE, x[::-1], hidden)
    np.testing.assert_array_equal(one.psi, other.psi)
    np.testing.assert_array_equal(one.ks, other.ks)
    assert one.embedding == other.embedding


@given(samples, samples)
def test_ks_is_the_largest_difference_of_shares_but_for_what_lies_between_two_quantiles(
    before: np.ndarray, after: np.ndarray
) -> None:
    found = measure(InputReference.fit(before[:, None]), after[:, None]).ks[0]
    values = np.union1d(before, after)
    exact = max(abs(np.mean(before <= v) - np.mean(after <= v)) for v in values)
    assert found <= exact + 1e-6
    assert found >= exact - 1 / len(QUANTILES) - 1e-6


@given(samples, samples)
def test_no_distance_is_negative_or_without_a_bound(before: np.ndarray, after: np.ndarray) -> None:
    found = measure(InputReference.fit(before[:, None]), after[:, None])
    assert 0 <= found.psi[0] < 14
    assert 0 <= found.ks[0] <= 1


def test_a_feature_that_stood_still_is_far_once_it_stands_elsewhere() -> None:
    reference = InputReference.fit(np.zeros((100, 1)))
    assert measure(reference, np.zeros((7, 1))).ks[0] == 0
    for elsewhere in (-1.0, 1.0):
        assert measure(reference, np.full((7, 1), elsewhere)).ks[0] == 1


def test_a_shift_by_the_spread_and_a_spread_twice_as_wide_are_both_one() -> None:
    unit = Gaussian(np.zeros(4, np.float32), np.eye(4, dtype=np.float32))
    assert frechet(unit, unit) == pytest.approx(0, abs=1e-6)
    assert frechet(unit, unit._replace(mean=np.ones(4, np.float32))) == pytest.approx(1)
    assert frechet(unit, unit._replace(covariance=4 * unit.covariance)) == pytest.approx(1)


def test_the_distance_of_two_gaussians_does_not_depend_on_the_axes() -> None:
    turn = np.linalg.qr(np.random.default_rng(3).normal(size=(H, H)))[0]
    one, other = states(), states(seed=1, shift=0.5, scale=2.0)
    assert frechet(gaussian(one @ turn), gaussian(other @ turn)) == pytest.approx(
        frechet(gaussian(one), gaussian(other)), rel=1e-3
    )


def test_without_hidden_states_on_both_sides_there_is_no_distance_of_them() -> None:
    assert measure(REFERENCE, draw()).embedding is None
    assert measure(InputReference.fit(draw()), draw(), states()).embedding is None


@pytest.mark.parametrize("wrong", [np.nan, np.inf, 1e300])
def test_what_is_not_finite_is_refused(wrong: float) -> None:
    x, hidden = draw(), states()
    x[5, 1] = hidden[7, 2] = wrong
    with np.errstate(over="ignore"):
        for rows, h in ((x, None), (draw(), hidden), (draw(0), None), (draw(), states(1))):
            with pytest.raises(ValueError, match=r"finite|covariance"):
                InputReference.fit(rows, h)
            with pytest.raises(ValueError, match=r"finite|covariance"):
                measure(REFERENCE, rows, h)


@pytest.mark.parametrize("hidden", [None, states()])
def test_a_reference_reads_back_as_it_was(hidden: np.ndarray | None) -> None:
    reference = InputReference.fit(draw(), hidden)
    back = InputReference.from_arrays(reference.arrays(), F)
    for name, array in reference.arrays().items():
        assert array.dtype == np.float32
        np.testing.assert_array_equal(back.arrays()[name], array)


@pytest.mark.parametrize(
    "changed",
    [
        {"more": np.zeros(1)},
        {"edges": np.zeros((F, 3))},
        {"hidden_mean": np.zeros((H, 1))},
        {"hidden_covariance": np.zeros((H, H + 1))},
    ],
)
def test_arrays_that_are_no_reference_are_refused(changed: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"reference|fit together"):
        InputReference.from_arrays({**REFERENCE.arrays(), **changed}, F)
    with pytest.raises(ValueError, match="no reference"):
        InputReference.from_arrays({}, F)
    with pytest.raises(ValueError, match="other features"):
        InputReference.from_arrays(REFERENCE.arrays(), F + 1)
