"""Learning rates over a run."""

from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.schedules import ScheduleConfig, ScheduleKind, rate_at

KINDS = get_args(ScheduleKind)


@given(
    kind=st.sampled_from(KINDS),
    warm_up=st.floats(0, 0.9),
    total=st.integers(1, 200),
    floor=st.floats(0.001, 1),
    plateaus=st.integers(0, 9),
)
def test_a_rate_is_a_share_of_the_peak(
    kind: ScheduleKind, warm_up: float, total: int, floor: float, plateaus: int
) -> None:
    config = ScheduleConfig(kind=kind, warm_up=warm_up, floor=floor)
    for step in range(total + 1):
        assert 0 < rate_at(config, step, total, plateaus) <= 1 + 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_a_rate_rises_to_its_peak_and_never_rises_again(kind: ScheduleKind) -> None:
    config = ScheduleConfig(kind=kind, warm_up=0.3)
    rates = [rate_at(config, step, 100) for step in range(101)]
    top = rates.index(max(rates))
    assert 29 <= top <= 30
    assert rates[top] == pytest.approx(1.0, abs=0.01)
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)


@pytest.mark.parametrize(
    ("kind", "end"),
    [("constant", 1.0), ("cosine", 0.1), ("exponential", 0.1), ("step", 0.1), ("one_cycle", 0.001)],
)
def test_a_rate_ends_where_it_should(kind: ScheduleKind, end: float) -> None:
    assert rate_at(ScheduleConfig(kind=kind, floor=0.1), 100, 100) == pytest.approx(end)


def test_a_plateau_halves_the_rate_each_time_and_not_below_the_floor() -> None:
    config = ScheduleConfig(kind="plateau", factor=0.5, floor=0.2)
    assert [rate_at(config, 50, 100, n) for n in range(4)] == [1.0, 0.5, 0.25, 0.2]


def test_steps_are_evenly_spaced() -> None:
    config = ScheduleConfig(kind="step", factor=0.5, drops=3, warm_up=0, floor=0.01)
    rates = [rate_at(config, step, 100) for step in (0, 24, 26, 51, 76)]
    assert rates == [1.0, 1.0, 0.5, 0.25, 0.125]
