"""Window mode: the last T bars and nothing else, and of a slower time frame only what is complete."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from models.features import F, FeatureSpec, history
from models.network_config import NetworkConfig, burn_in_steps, warm_up_bars
from models.scaling import Scaler
from models.window_network import CLOCK, WindowNetwork, build_network
from tests.models.builders import MINUTE_MS, make_bars
from tests.models.networks import make_bundle, make_window_network

ATOL = 1e-5


def clocked(numbers: list[int], seed: int = 0) -> Tensor:
    """One window of rows that are the so-manieth bars of their sessions."""
    x = torch.randn(1, len(numbers), F, generator=torch.Generator().manual_seed(seed))
    x[..., CLOCK] = torch.log1p(torch.tensor(numbers, dtype=torch.float32))
    return x


def everything_seen(x: Tensor) -> Tensor:
    return torch.ones(x.shape[:2], dtype=torch.bool)


@pytest.mark.parametrize("attention", ["none", "dot", "additive", "self", "cross"])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_what_is_older_than_the_window_changes_nothing(attention: str, bidirectional: bool) -> None:
    network = make_window_network(
        attention=attention, bidirectional=bidirectional, window=6, slower=3
    )
    x = torch.stack([clocked([1 + i % 7 for i in range(14)], seed)[0] for seed in (0, 1)])
    other = x.clone()
    other[:, :8] = 9 * torch.randn(2, 8, F)
    with torch.inference_mode():
        assert torch.equal(network(x)[0][:, 13], network(other)[0][:, 13])
        assert not torch.equal(network(x)[0][:, 12], network(other)[0][:, 12])


@pytest.mark.parametrize("window", [10, 100, 150])
def test_windows_of_ten_to_more_than_a_hundred_bars_are_served(window: int) -> None:
    network = make_window_network(window=window, layers=1)
    x = torch.randn(2, window + 5, F)
    with torch.inference_mode():
        outputs, weights, _ = network(x, need_weights=True)
        alone, _ = network.windowed(x[:, 5:], everything_seen(x[:, 5:]))
    assert weights.shape == (2, window + 5, window)
    torch.testing.assert_close(outputs[:, -1], alone, atol=ATOL, rtol=ATOL)


def test_both_directions_are_read_from_where_each_has_seen_the_whole_window() -> None:
    network = make_window_network(bidirectional=True, attention="none", layers=1, window=5)
    x = torch.randn(1, 5, F)
    with torch.inference_mode():
        before = network(x)[0][:, 4]
        x[:, 0] += 1.0
        after = network(x)[0][:, 4]
        network.head.weight[:, 8:] = 0.0  # only the forward direction is heard
        forward = network(x)[0][:, 4]
    assert not torch.equal(before, after)
    assert not torch.equal(after, forward)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bidirectional": True}, "bidirectional needs mode='window'"),
        ({"attention": "self"}, "needs mode='window'"),
        ({"attention": "cross"}, "needs mode='window'"),
        ({"attention": "cross", "mode": "window", "window": 22}, "window >= 23"),
    ],
)
def test_what_does_not_go_together_says_why(options: dict[str, object], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        NetworkConfig.model_validate({"n_features": F, "n_outputs": 1, **options})


def test_a_window_needs_no_burn_in_and_is_warm_when_it_is_full() -> None:
    window = NetworkConfig(n_features=F, n_outputs=1, mode="window", window=20)
    carried = NetworkConfig(n_features=F, n_outputs=1, window=20)
    assert (burn_in_steps(window, 64), warm_up_bars(window, 64)) == (19, 20)
    assert (burn_in_steps(carried, 64), warm_up_bars(carried, 64)) == (64, 84)


# ---- the slower time frame ----


def slower_bars(network: WindowNetwork, x: Tensor) -> list[list[int]]:
    """The rows of each completed slower bar, as a plain list."""
    means, closed = network.slower_bars(x, everything_seen(x))
    return [means[0, i].nonzero()[:, 0].tolist() for i in closed[0].nonzero()[:, 0]]


@pytest.mark.parametrize(
    ("numbers", "bars"),
    [
        ([1, 2, 3, 4, 5, 6, 7], [[0, 1, 2], [3, 4, 5]]),  # the seventh begins the third
        ([1, 2, 3, 4, 5, 6], [[0, 1, 2], [3, 4, 5]]),
        ([2, 3, 4, 5, 6], [[2, 3, 4]]),  # the window cuts the first
        ([3, 4, 5], []),
        ([4, 5, 1, 2, 3], [[0, 1], [2, 3, 4]]),  # a session ends with a short one
        ([1, 2, 4, 5, 6, 7], [[0, 1], [2, 3, 4]]),  # its last bar is absent
        ([1, 1, 1], [[0], [1]]),  # daily bars: each is a session
    ],
)
def test_slower_bars_are_those_of_the_clock(numbers: list[int], bars: list[list[int]]) -> None:
    network = make_window_network(attention="cross", window=7, slower=3)
    assert slower_bars(network, clocked(numbers)) == bars


@settings(max_examples=50, deadline=None)
@given(start=st.integers(1, 30), session=st.integers(1, 30), gaps=st.sets(st.integers(0, 40)))
def test_a_slower_bar_that_is_not_complete_is_not_seen(
    start: int, session: int, gaps: set[int]
) -> None:
    """Whatever its rows hold, no weight and no content of it reaches the context."""
    network = make_window_network(attention="cross", window=23, slower=4)
    everyone = [1 + (start + i) % session for i in range(60)]
    numbers = [n for i, n in enumerate(everyone) if i not in gaps][-23:]
    x = clocked(numbers)
    seen = everything_seen(x)
    _, closed = network.slower_bars(x, seen)
    unfinished = 0
    while unfinished < len(numbers) and not closed[0, -1 - unfinished]:
        unfinished += 1
    with torch.inference_mode():
        _, weights = network.windowed(x, seen, need_weights=True)
        assert weights is not None
        assert not weights[0, :unfinished].any()
        context = context_for_a_fixed_query(network, x)
        for row in range(1, unfinished + 1):
            other = x.clone()
            other[0, -row] += 5.0
            other[..., CLOCK] = x[..., CLOCK]
            assert torch.equal(context, context_for_a_fixed_query(network, other))
        if unfinished < len(numbers):
            x[0, -1 - unfinished, :CLOCK] += 5.0
            assert not torch.equal(context, context_for_a_fixed_query(network, x))


def context_for_a_fixed_query(network: WindowNetwork, x: Tensor) -> Tensor:
    newest = torch.ones(1, network.config.width)
    y = torch.zeros(1, x.shape[1], network.config.width)
    return network._context(x, x, y, newest, everything_seen(x), False)[0]


def test_a_window_without_a_completed_slower_bar_has_no_context() -> None:
    network = make_window_network(attention="cross", window=7, slower=4)
    x = clocked([3, 4, 5, 6])
    x = torch.cat([torch.zeros(1, 3, F), x], 1)
    seen = torch.arange(7).unsqueeze(0) >= 3
    with torch.inference_mode():
        outputs, weights = network.windowed(x, seen, need_weights=True)
    assert torch.isfinite(outputs).all()
    assert weights is not None
    assert weights[0].sum() == 0


def test_the_clock_is_read_from_real_features_whatever_the_scaler() -> None:
    """Sessions of 78 bars with absent ones: each hour of 12 bars begins on the 1st, 13th, ... bar."""
    spec = FeatureSpec(interval_ms=5 * MINUTE_MS, timezone="America/New_York")
    ts, ohlcv = make_bars(1_200)
    rows, _ = history(spec, ts, ohlcv)
    place = (ts - ts[0]) // (5 * MINUTE_MS)
    number = place % 288 + 1  # the builder's session begins at its first bar's time of day
    config = NetworkConfig(
        n_features=F, n_outputs=1, mode="window", attention="cross", window=48, slower=12
    )
    for kind in ("standard", "robust", "minmax"):
        scaler = Scaler.fit(rows[500:], kind)
        network = build_network(config, scaler)
        assert isinstance(network, WindowNetwork)
        for end in (700, 791, 1_000):
            window = slice(end - 47, end + 1)
            x = torch.from_numpy(scaler.transform(rows[window]))[None]
            found = slower_bars(network, x)
            hour = (number[window] - 1) // 12
            assert len(found) >= 2
            for bar in found:
                assert len({(int(hour[i]), int(ts[window][i] // 86_400_000)) for i in bar}) == 1
                assert len(bar) <= 12


def test_a_bundle_whose_features_roll_has_no_clock_to_cross_by() -> None:
    bundle = make_bundle(mode="window", attention="cross", slower=2)
    rolling = bundle.config.features.model_copy(update={"rolling_half_life": 50.0})
    with pytest.raises(ValidationError, match="clock"):
        type(bundle.config).model_validate(
            {**bundle.config.model_dump(), "features": rolling.model_dump()}
        )
    assert np.isfinite(bundle.golden["values"]).all()
