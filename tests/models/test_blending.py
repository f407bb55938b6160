"""Weights of an ensemble: shares of one, that move only on what is known to have been good."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from models.blending import bayesian, by_performance, judged, stacked, weigh
from models.scoring import Floats

WAYS = ("equal", "shrunk", "stacked", "bayesian")


def members(n: int = 4_000, noises: tuple[float, ...] = (0.5, 1.0, 2.0)) -> tuple[Floats, Floats]:
    """Values f64[n, M] that miss the labels f64[n] by independent noise of these deviations."""
    rng = np.random.default_rng(0)
    labels = rng.normal(size=n)
    return labels[:, None] + rng.normal(size=(n, len(noises))) * noises, labels


def squared(values: Floats, labels: Floats) -> Floats:
    return np.asarray((values - labels[:, None]) ** 2)


@pytest.mark.parametrize("way", WAYS)
@settings(max_examples=40, deadline=None)
@given(
    values=arrays(np.float64, (12, 3), elements=st.floats(-9, 9)),
    labels=arrays(np.float64, 12, elements=st.floats(-9, 9)),
    periods=st.floats(0, 500),
)
def test_weights_are_shares_of_one_whatever_happened(
    way: str, values: Floats, labels: Floats, periods: float
) -> None:
    shares = weigh(way, squared(values, labels), values, labels, periods)  # type: ignore[arg-type]
    assert shares.shape == (3,)
    assert (shares >= 0).all()
    assert shares.sum() == pytest.approx(1)


@pytest.mark.parametrize("way", WAYS)
def test_without_a_matured_label_all_members_count_alike(way: str) -> None:
    nothing = np.empty((0, 3))
    shares = weigh(way, nothing, nothing, np.empty(0), 0.0)  # type: ignore[arg-type]
    np.testing.assert_allclose(shares, 1 / 3)


@pytest.mark.parametrize("way", ["shrunk", "stacked", "bayesian"])
def test_a_better_member_weighs_more(way: str) -> None:
    values, labels = members()
    shares = weigh(way, squared(values, labels), values, labels, 50.0)  # type: ignore[arg-type]
    assert shares[0] > shares[1] > shares[2] - 1e-12


def test_stacking_finds_the_best_blend_that_there_is() -> None:
    values, labels = members()
    shares = stacked(values, labels)
    best = np.mean((values @ shares - labels) ** 2)
    rng = np.random.default_rng(1)
    for other in rng.dirichlet(np.ones(3), size=200):
        assert best <= np.mean((values @ other - labels) ** 2) + 1e-12
    np.testing.assert_allclose(shares, np.array([4, 1, 0.25]) / 5.25, atol=0.03)


def test_stacking_leaves_out_a_member_that_only_harms() -> None:
    values, labels = members()
    values[:, 2] = labels + 3 * (values[:, 0] - labels)
    assert stacked(values, labels)[2] == 0


def test_performance_weights_are_inverse_losses() -> None:
    losses = np.array([[1.0, 2.0, 4.0]])
    np.testing.assert_allclose(by_performance(losses), np.array([4, 2, 1]) / 7)


def test_the_posterior_grows_sharper_with_evidence_and_knows_no_units() -> None:
    losses = np.array([[1.0, 1.1, 2.0]])
    little, much = bayesian(losses, 5), bayesian(losses, 500)
    assert much[0] > 0.99 > 0.6 > little[0]
    np.testing.assert_allclose(bayesian(1e-8 * losses, 5), little)


def test_shrunk_weights_are_half_way_to_equal_ones() -> None:
    values, labels = members()
    losses = squared(values, labels)
    np.testing.assert_allclose(
        weigh("shrunk", losses, values, labels, 9.0), (by_performance(losses) + 1 / 3) / 2
    )


def test_stacking_by_another_loss_finds_what_is_best_by_that_loss() -> None:
    values, labels = members(noises=(0.3, 0.5, 0.5))
    values[:, 1] += 0.4  # too high costs QLIKE less than too low

    def qlike(said: Floats) -> Floats:
        error = labels - said
        return np.asarray(np.exp(error) - error - 1)

    shares = judged(values, qlike)
    assert shares.sum() == pytest.approx(1)
    best = qlike(values @ shares).mean()
    for other in np.random.default_rng(1).dirichlet(np.ones(3), size=200):
        assert best <= qlike(values @ other).mean() + 1e-7
    assert abs(shares - stacked(values, labels)).max() > 0.02
