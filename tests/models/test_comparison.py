"""A challenger that is no better is promoted at most alpha of the time, however often one looks."""

import json
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from models.comparison import OPENING_PAIRS, Comparison, Evidence, Rule

Draw = Callable[[np.random.Generator, int], NDArray[np.float64]]

NO_BETTER: dict[str, Draw] = {
    "normal": lambda rng, n: rng.normal(size=n),
    "heavy tails": lambda rng, n: rng.standard_t(3, size=n),
    "often a little better, sometimes much worse": lambda rng, n: 1 - rng.exponential(size=n),
    "often a little worse, sometimes much better": lambda rng, n: rng.exponential(size=n) - 1,
    "worse": lambda rng, n: rng.normal(-0.2, 1.0, size=n),
}


def until_decided(gains: NDArray[np.float64], alpha: float = 0.05, horizon: int = 1) -> Evidence:
    comparison = Comparison(Rule(alpha=alpha, max_bars=10**9))
    for ts, gain in enumerate(gains):
        comparison.update(ts, ts + horizon, float(gain))
        if comparison.get().verdict != "continue":
            break
    return comparison.get()


@pytest.mark.parametrize("name", NO_BETTER)
def test_false_promotions_stay_below_alpha_when_looking_after_every_pair(name: str) -> None:
    rng = np.random.default_rng(len(name))
    verdicts = [until_decided(NO_BETTER[name](rng, 500), alpha=0.1).verdict for _ in range(120)]
    # 0.1 * 120 = 12 expected at most; 19 is exceeded with probability 0.02 at exactly alpha
    assert verdicts.count("promote") <= 19


def test_overlapping_labels_do_not_promote_by_counting_one_thing_many_times() -> None:
    rng = np.random.default_rng(1)
    horizon, promoted = 12, 0
    for _ in range(60):
        steps = np.cumsum(rng.normal(size=3_000 + horizon))
        gains = (steps[horizon:] - steps[:-horizon]) / horizon**0.5
        promoted += until_decided(gains, alpha=0.1, horizon=horizon).verdict == "promote"
    assert promoted <= 11


def test_a_better_challenger_is_promoted_and_the_mirror_of_it_refused() -> None:
    gains = np.random.default_rng(2).standard_t(4, 2_000) + 0.4
    assert until_decided(gains).verdict == "promote"
    assert until_decided(-gains).verdict == "refuse"


def test_no_evidence_within_the_longest_duration_refuses() -> None:
    comparison = Comparison(Rule(max_bars=50))
    for ts in range(50):
        assert comparison.get().verdict == "continue"
        comparison.update(ts, ts + 1, 0.0)
    assert comparison.get().verdict == "refuse"


def test_no_pair_is_bet_upon_before_the_last_one_is_settled() -> None:
    comparison = Comparison(Rule())
    for ts in range(100):
        comparison.update(ts, ts + 10, 1.0)
    evidence = comparison.get()
    assert evidence.bars == 100
    assert evidence.pairs == 10 - OPENING_PAIRS


def test_one_false_print_decides_nothing() -> None:
    gains = np.random.default_rng(3).normal(size=60)
    for wild in (1e15, -1e15):
        gains[30] = wild
        evidence = until_decided(gains)
        assert evidence.verdict == "continue"
        assert np.isfinite(evidence.e_better)
        assert np.isfinite(evidence.e_worse)


def test_the_units_of_the_loss_do_not_matter() -> None:
    gains = np.random.default_rng(4).normal(0.2, 1.0, size=80)
    one, thousand = until_decided(gains), until_decided(1000 * gains)
    assert thousand.e_better == pytest.approx(one.e_better)


def test_differences_below_the_least_scale_are_not_magnified() -> None:
    comparison = Comparison(Rule(), least_scale=1.0)
    for ts in range(200):
        comparison.update(ts, ts + 1, 1e-4)
    assert comparison.get().verdict == "continue"


def test_twins_are_never_told_apart() -> None:
    evidence = until_decided(np.zeros(300))
    assert evidence.verdict == "continue"
    assert evidence.e_better == evidence.e_worse == 1.0


@settings(deadline=None)
@given(st.lists(st.floats(-1e6, 1e6), max_size=60), st.integers(0, 60))
def test_it_survives_a_restart_at_any_bar(gains: list[float], cut: int) -> None:
    whole, first, second = (Comparison(Rule()) for _ in range(3))
    for ts, gain in enumerate(gains):
        whole.update(ts, ts + 2, gain)
        if ts < cut:
            first.update(ts, ts + 2, gain)
    second.load(json.loads(json.dumps(first.export())))
    for ts, gain in enumerate(gains):
        if ts >= cut:
            second.update(ts, ts + 2, gain)
    assert second.get() == whole.get()
