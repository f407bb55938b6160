import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from models.significance import (
    by_time,
    calibration_error,
    diebold_mariano,
    long_run_variance,
    mincer_zarnowitz,
    rank_correlation,
    reliability,
)

Floats = NDArray[np.float64]


def moving_average(rng: np.random.Generator, n: int, width: int) -> Floats:
    """What overlapping labels do to loss differences: dependence over `width` steps, mean zero."""
    return np.convolve(rng.normal(size=n + width - 1), np.ones(width), "valid")


def test_one_lag_free_observation_is_the_textbook_t_test() -> None:
    d = np.random.default_rng(0).normal(0.3, 1, 400)
    assert long_run_variance(d, 0) == pytest.approx(d.var())


def test_long_run_variance_agrees_with_the_formula_written_out() -> None:
    d = np.random.default_rng(1).normal(size=50)
    c = d - d.mean()
    gamma = [float(c[k:] @ c[: len(c) - k]) / len(c) for k in range(4)]
    expected = gamma[0] + 2 * sum((1 - k / 4) * gamma[k] for k in range(1, 4))
    assert long_run_variance(d, 3) == pytest.approx(expected)


def test_a_true_null_is_rejected_about_as_often_as_promised_although_labels_overlap() -> None:
    rng = np.random.default_rng(2)
    rejected = [
        diebold_mariano(moving_average(rng, 600, 12), 12).p_value < 0.05 for _ in range(400)
    ]
    naive = [
        abs(d.mean()) / (d.std() / np.sqrt(len(d))) > 1.96
        for d in (moving_average(rng, 600, 12) for _ in range(400))
    ]
    assert np.mean(rejected) < 0.11
    assert np.mean(naive) > 0.4


def test_a_real_difference_is_found_and_its_sign_says_who_is_better() -> None:
    d = moving_average(np.random.default_rng(3), 4000, 6) - 1.0
    found = diebold_mariano(d, 6)
    assert found.p_value < 0.01
    assert found.statistic < 0
    assert found.mean == pytest.approx(d.mean())


def test_swapping_the_models_flips_the_statistic_and_keeps_the_p_value() -> None:
    d = np.random.default_rng(4).normal(0.1, 1, 300)
    one, other = diebold_mariano(d, 5), diebold_mariano(-d, 5)
    assert one.statistic == pytest.approx(-other.statistic)
    assert one.p_value == pytest.approx(other.p_value)


@pytest.mark.parametrize("d", [[], [1.0], [0.5] * 30, [0.0] * 10])
def test_too_little_to_judge_is_never_significant(d: list[float]) -> None:
    assert diebold_mariano(np.array(d), 12).p_value == 1.0


@given(st.lists(st.tuples(st.integers(0, 9), st.floats(-10, 10)), min_size=1, max_size=60))
def test_the_mean_over_times_is_the_mean_over_all_rows(rows: list[tuple[int, float]]) -> None:
    ts = np.array([t for t, _ in rows])
    d = np.array([v for _, v in rows])
    assert by_time(ts, d).mean() == pytest.approx(d.mean(), abs=1e-9)


def test_a_copy_of_every_symbol_adds_no_evidence() -> None:
    d = np.random.default_rng(5).normal(0.1, 1, 500)
    ts = np.arange(500)
    alone = diebold_mariano(by_time(ts, d), 3)
    doubled = diebold_mariano(by_time(np.tile(ts, 2), np.tile(d, 2)), 3)
    assert doubled.p_value == pytest.approx(alone.p_value)


def test_rank_correlation_ignores_scale_and_outliers() -> None:
    x = np.random.default_rng(6).normal(size=200)
    assert rank_correlation(x, np.exp(5 * x)) == pytest.approx(1.0)
    assert rank_correlation(x, -x) == pytest.approx(-1.0)
    assert rank_correlation(x, np.zeros(200)) == 0.0


def test_honest_probabilities_are_calibrated_and_bold_ones_are_not() -> None:
    rng = np.random.default_rng(7)
    p = rng.uniform(0.2, 0.8, 50_000)
    y = (rng.uniform(size=len(p)) < p).astype(float)
    assert calibration_error(reliability(p, y)) < 0.02
    assert calibration_error(reliability(np.clip(3 * p - 1, 0, 1), y)) > 0.1


def test_reliability_groups_hold_all_rows_even_when_there_are_few() -> None:
    table = reliability(np.array([0.1, 0.9, 0.5]), np.array([0.0, 1.0, 1.0]))
    assert [b.n for b in table] == [1, 1, 1]
    assert [b.realised for b in table] == [0.0, 1.0, 1.0]


def test_mincer_zarnowitz_finds_the_slope_of_a_forecast_that_swings_too_far() -> None:
    rng = np.random.default_rng(8)
    truth = rng.normal(size=20_000)
    found = mincer_zarnowitz(2 * truth + 1, truth + rng.normal(0, 0.1, 20_000))
    assert found.slope == pytest.approx(0.5, abs=0.01)
    assert found.intercept == pytest.approx(-0.5, abs=0.01)
    assert mincer_zarnowitz(np.ones(5), np.arange(5.0)).slope == 0.0
