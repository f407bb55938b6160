"""The alarm keeps its declared false-alarm rate, finds what it should, and says since when."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from models.drift import (
    DETECTORS,
    Calibration,
    Detector,
    DetectorName,
    block_length,
    calibrate,
    passing,
    standard_error,
)

Floats = NDArray[np.float64]


def make_calibration(**changes: float) -> Calibration:
    well = {"low": -9.0, "high": 9.0, "mean": 0.0, "sd": 1.0, "correlation": 0.0}
    rest = {"threshold": 5.0, "arl0_bars": 1000, "block_bars": 1, "n": 1000}
    return Calibration.model_validate({**well, **rest, **changes})


def overlapping(n: int, symbols: int, horizon: int, rng: np.random.Generator) -> Floats:
    """Heavy-tailed differences that share horizon - 1 of their `horizon` terms with the next one."""
    steps = rng.standard_t(4, (n + horizon, symbols)) + rng.standard_t(4, (n + horizon, 1))
    sums = np.cumsum(np.vstack([np.zeros((1, symbols)), steps]), axis=0)
    return np.asarray((sums[horizon:] - sums[:-horizon])[:n] / horizon**0.5)


def run_lengths(calibration: Calibration, differences: Floats, skip: int) -> list[int]:
    symbols = np.full(len(differences), differences.shape[1])
    z = calibration.pool(calibration.standardise(differences).mean(axis=1), symbols)
    detector = make_detector("cusum", calibration.threshold)
    lengths, start = [], 0
    while start < len(z):
        alarm = next((i for i in range(start, len(z)) if detector.update(float(z[i]), i)), None)
        if alarm is None:
            break
        lengths.append(alarm + 1 - start)
        start = alarm + 1 + skip
        detector.reset()
    return lengths


def make_detector(name: DetectorName, threshold: float = 5.0) -> Detector:
    return Detector(name, threshold)


@pytest.mark.parametrize(("symbols", "horizon"), [(1, 1), (1, 12), (20, 12)])
def test_false_alarms_come_about_as_often_as_declared(symbols: int, horizon: int) -> None:
    rng = np.random.default_rng(horizon)
    measured = []
    for seed in range(4):
        calibration = calibrate(overlapping(30_000, symbols, horizon, rng), horizon, 1_000, seed)
        fresh = overlapping(40_000, symbols, horizon, rng)
        measured.append(np.mean(run_lengths(calibration, fresh, skip=2 * horizon)))
    assert 600 < np.exp(np.mean(np.log(measured))) < 1_600


@pytest.mark.parametrize("name", DETECTORS)
class TestEveryDetector:
    """What holds for whichever is configured."""

    def test_false_alarms_come_about_as_often_as_declared(self, name: DetectorName) -> None:
        rng = np.random.default_rng(0)
        alarms, bars = 0, 0
        for seed in range(6):
            calibration = calibrate(
                rng.normal(size=(20_000, 1)), 1, 500, seed=seed, detectors=(name,)
            )
            threshold = calibration.threshold_of(name)
            assert threshold is not None
            detector = make_detector(name, threshold)
            for i, z in enumerate(rng.normal(size=10_000).tolist()):
                if detector.update(z, i):
                    alarms += 1
                    detector.reset()
            bars += 10_000
        assert 350 < bars / alarms < 720

    def test_a_shift_is_found_fast_and_its_beginning_is_named(self, name: DetectorName) -> None:
        rng = np.random.default_rng(0)
        calibration = calibrate(rng.normal(size=(20_000, 1)), 1, 5_000, seed=0, detectors=(name,))
        detector = make_detector(name, calibration.threshold_of(name) or np.nan)
        assert not any(detector.update(z, i) for i, z in enumerate(rng.normal(size=300).tolist()))
        shifted = enumerate(rng.normal(1.0, 1.0, size=100).tolist(), 300)
        found = next(i for i, z in shifted if detector.update(z, i))
        assert found < 335
        assert 280 <= detector.get().since_ts <= 310

    def test_an_improvement_is_no_alarm(self, name: DetectorName) -> None:
        detector = make_detector(name, 4.0)
        rng = np.random.default_rng(1)
        values = np.concatenate([rng.normal(0, 0.1, 500), rng.normal(-2, 0.1, 500)])
        assert not any(detector.update(z, i) for i, z in enumerate(values.tolist()))

    @settings(deadline=None, max_examples=20)
    @given(values=st.lists(st.floats(-5, 5), max_size=200), cut=st.integers(0, 200))
    def test_it_survives_a_restart_at_any_bar(
        self, name: DetectorName, values: list[float], cut: int
    ) -> None:
        whole, first, second = (make_detector(name) for _ in range(3))
        said = [whole.update(z, i) for i, z in enumerate(values)]
        again = [first.update(z, i) for i, z in enumerate(values[:cut])]
        second.load(json.loads(json.dumps(first.export())))
        again += [second.update(z, i) for i, z in enumerate(values[cut:], cut)]
        assert again == said
        assert second.get() == whole.get()

    def test_its_state_is_small(self, name: DetectorName) -> None:
        detector = make_detector(name, 1e9)
        for i, z in enumerate(np.random.default_rng(2).normal(size=50_000).tolist()):
            detector.update(z, i)
        assert len(json.dumps(detector.export())) < 900

    def test_a_reset_forgets_all(self, name: DetectorName) -> None:
        used, fresh = make_detector(name), make_detector(name)
        for i in range(50):
            used.update(1.0, i)
        used.reset()
        assert used.export() == fresh.export()

    def test_the_state_of_another_detector_is_not_taken(self, name: DetectorName) -> None:
        other = make_detector("cusum" if name != "cusum" else "adwin")
        for i in range(50):
            other.update(1.0, i)
        detector = make_detector(name)
        detector.load(other.export())
        assert detector.get() == (0.0, -1)


@settings(deadline=None)
@given(arrays(np.float64, st.integers(1, 60), elements=st.floats(-5, 5)))
def test_the_cusum_is_the_textbook_recursion(z: Floats) -> None:
    cusum = make_detector("cusum", 3.0)
    expected, since = 0.0, -1
    for i, value in enumerate(z.tolist()):
        alarm = cusum.update(value, i)
        before, expected = expected, max(0.0, expected + value - 0.25)
        since = -1 if expected == 0 else (i if before == 0 else since)
        assert cusum.get() == (expected, since)
        assert alarm == (expected > 3.0)


def test_the_shiryaev_roberts_statistic_is_the_sum_over_all_beginnings() -> None:
    z = np.random.default_rng(3).normal(size=60)
    detector = make_detector("shiryaev_roberts")
    for i, value in enumerate(z.tolist()):
        detector.update(value, i)
    steps = 0.5 * z - 0.125  # log likelihood ratios of a shift by twice the slack
    total = sum(np.exp(steps[k:].sum()) for k in range(len(z)))
    assert detector.get().statistic == pytest.approx(np.log1p(total))


def test_adwin_compares_all_that_it_remembers_at_every_cut() -> None:
    z = np.round(np.random.default_rng(4).normal(size=40) + (np.arange(40) >= 25), 3)
    detector = make_detector("adwin", 1e9)
    for i, value in enumerate(z.tolist()):
        detector.update(value, i)
    best = max((z[c:].mean() - z[:c].mean()) * np.sqrt(c * (40 - c) / 40) for c in range(8, 33))
    assert 0.85 * best <= detector.get().statistic <= best + 1e-9


@settings(deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
def test_naming_by_false_discovery_is_the_textbook_step_up(p_values: list[float]) -> None:
    named = passing(np.array(p_values), 0.1)
    n = len(p_values)
    ranked = sorted(p_values)
    k = max((i for i in range(1, n + 1) if ranked[i - 1] <= 0.1 * i / n), default=0)
    assert named.sum() == k
    assert not k or max(np.array(p_values)[named]) <= ranked[k - 1]


def test_few_of_the_named_are_named_wrongly_and_the_worse_ones_are_named() -> None:
    rng = np.random.default_rng(5)
    false, named = [], []
    for _ in range(200):
        p_values = rng.random(100)
        p_values[:10] = rng.random(10) * 1e-4
        found = passing(p_values, 0.1)
        named.append(found[:10].mean())
        false.append(found[10:].sum() / max(found.sum(), 1))
    assert np.mean(false) < 0.12
    assert np.mean(named) > 0.99


def test_the_tail_of_single_symbols_is_that_of_their_own_cusums() -> None:
    calibration = calibrate(np.random.default_rng(6).normal(size=(20_000, 3)), 1, 500, seed=0)
    # With normal values it decays as exp(-2 k x).
    assert calibration.scale_of_symbols == pytest.approx(2.0, rel=0.15)


def test_the_error_of_the_mean_grows_with_the_overlap_of_labels() -> None:
    rng = np.random.default_rng(7)
    series = overlapping(20_000, 1, 25, rng)[:, 0]
    apart = standard_error(rng.permutation(series), 250)
    assert standard_error(series, 250) == pytest.approx(5 * apart, rel=0.25)


def test_pooling_many_symbols_keeps_unit_variance_whatever_their_number() -> None:
    rng = np.random.default_rng(1)
    calibration = calibrate(overlapping(20_000, 30, 1, rng), 1, 100, seed=0)
    assert calibration.correlation == pytest.approx(0.5, abs=0.08)
    for symbols in (1, 5, 30):
        means = calibration.standardise(overlapping(20_000, symbols, 1, rng)).mean(axis=1)
        pooled = calibration.pool(means, np.full(20_000, symbols))
        assert np.std(pooled) == pytest.approx(1.0, abs=0.1)


def test_one_wild_difference_cannot_raise_the_alarm_alone() -> None:
    calibration = calibrate(np.random.default_rng(2).standard_t(3, (5_000, 1)), 1, 1_000, seed=0)
    z = calibration.standardise(np.array([1e12]))
    assert not make_detector("cusum", calibration.threshold).update(float(z[0]), 0)


def test_missing_symbols_at_some_times_are_no_obstacle() -> None:
    rng = np.random.default_rng(3)
    differences = overlapping(5_000, 5, 3, rng)
    differences[rng.random(differences.shape) < 0.4] = np.nan
    assert calibrate(differences, 3, 500, seed=0).threshold > 0


def test_differences_that_do_not_vary_are_refused() -> None:
    with pytest.raises(ValueError, match="do not vary"):
        calibrate(np.ones((1_000, 2)), 1, 1_000, seed=0)


def test_the_same_seed_gives_the_same_threshold() -> None:
    differences = np.random.default_rng(4).normal(size=(3_000, 2))
    assert calibrate(differences, 2, 500, seed=7) == calibrate(differences, 2, 500, seed=7)


@pytest.mark.parametrize("horizon", [1, 30])
def test_blocks_are_longer_than_the_overlap_of_labels(horizon: int) -> None:
    series = overlapping(20_000, 1, horizon, np.random.default_rng(5))[:, 0]
    assert 10 * horizon <= block_length(series, horizon) <= 1_000


def test_a_looser_slack_needs_a_higher_threshold_than_a_tighter_one() -> None:
    differences = np.random.default_rng(6).normal(size=(5_000, 1))
    loose = calibrate(differences, 1, 1_000, seed=0, slack=0.1)
    tight = calibrate(differences, 1, 1_000, seed=0, slack=0.5)
    assert loose.threshold > tight.threshold > make_calibration().slack
