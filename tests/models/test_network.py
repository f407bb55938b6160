"""The network: one recurrence with two entry points, and nothing from the future in either."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from models.network import CausalNetwork, State
from models.network_config import NetworkConfig, weight_shapes
from tests.models.networks import make_network

TOLERANCE = 1e-5

Stepped = tuple[Tensor, Tensor, State]


def stepped(
    network: CausalNetwork, x: Tensor, mask: Tensor | None = None, reset: Tensor | None = None
) -> Stepped:
    """What `step` says bar by bar, applying masks and resets from outside; zero where absent."""
    B, L, _ = x.shape
    state = network.initial_state(B)
    outputs = torch.zeros(B, L, network.config.n_outputs)
    weights = torch.zeros(B, L, network.config.window)
    for l in range(L):  # noqa: E741
        if reset is not None:
            anew = reset[:, l]
            state.h[:, anew], state.c[:, anew], state.steps[anew] = 0.0, 0.0, 0
        rows = torch.arange(B) if mask is None else mask[:, l].nonzero()[:, 0]
        if len(rows):
            outputs[rows, l], weights[rows, l], state = network.step(x[rows, l], state, rows)
    return outputs, weights, state


def chunked(
    network: CausalNetwork,
    x: Tensor,
    cuts: list[int],
    mask: Tensor | None = None,
    reset: Tensor | None = None,
) -> Stepped:
    """What `forward` says in chunks that end at `cuts`."""
    state, outputs, weights = None, [], []
    edges = [0, *sorted({c for c in cuts if 0 < c < x.shape[1]}), x.shape[1]]
    with torch.inference_mode():
        for a, b in pairwise(edges):
            part = (None if t is None else t[:, a:b] for t in (mask, reset))
            out, by_lag, state = network(x[:, a:b], state, *part, need_weights=True)
            outputs.append(out)
            weights.append(by_lag)
    assert state is not None
    return torch.cat(outputs, 1), torch.cat(weights, 1), state


def assert_same(one: Stepped, other: Stepped) -> None:
    for a, b in zip(one[:2], other[:2], strict=True):
        torch.testing.assert_close(a, b, atol=TOLERANCE, rtol=TOLERANCE)
    for a, b in zip(one[2][:2], other[2][:2], strict=True):
        torch.testing.assert_close(a, b, atol=TOLERANCE, rtol=TOLERANCE)
    assert torch.equal(one[2].steps, other[2].steps)


CONFIGS = st.fixed_dictionaries(
    {
        "window": st.integers(1, 9),
        "layers": st.integers(1, 4),
        "heads": st.sampled_from([1, 2, 4]),
        "cell": st.sampled_from(["lstm", "gru"]),
        "attention": st.sampled_from(["none", "dot", "additive"]),
        "lag_bias": st.sampled_from(["none", "alibi", "relative"]),
        "layer_norm": st.booleans(),
        "skip": st.booleans(),
        "gate": st.booleans(),
        "seed": st.integers(0, 99),
    }
)


@settings(max_examples=40, deadline=None)
@given(config=CONFIGS, cuts=st.lists(st.integers(1, 19), max_size=3))
def test_a_chunk_says_what_single_steps_say(config: dict[str, Any], cuts: list[int]) -> None:
    network = make_network(**config)
    x = torch.randn(3, 20, 5)
    assert_same(chunked(network, x, cuts), stepped(network, x))


@settings(max_examples=40, deadline=None)
@given(
    config=CONFIGS,
    cuts=st.lists(st.integers(1, 14), max_size=2),
    absent=st.floats(0, 1),
    anew=st.floats(0, 0.5),
)
def test_absent_steps_and_resets_are_the_same_in_chunks_and_steps(
    config: dict[str, Any], cuts: list[int], absent: float, anew: float
) -> None:
    network = make_network(**config)
    x = torch.randn(3, 15, 5)
    mask, reset = torch.rand(3, 15) >= absent, torch.rand(3, 15) < anew
    assert_same(chunked(network, x, cuts, mask, reset), stepped(network, x, mask, reset))


@pytest.mark.parametrize("attention", ["none", "dot"])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_the_fused_and_the_unrolled_recurrence_agree(cell: str, attention: str) -> None:
    network = make_network(cell=cell, attention=attention)
    x = torch.randn(3, 12, 5)
    everything = torch.ones(3, 12, dtype=torch.bool)
    assert_same(chunked(network, x, [5]), chunked(network, x, [5], everything))


def test_what_fills_an_absent_step_does_not_matter() -> None:
    network = make_network()
    x, mask = torch.randn(2, 10, 5), torch.rand(2, 10) > 0.4
    other = x.masked_fill(~mask.unsqueeze(-1), torch.nan)
    assert_same(chunked(network, x, [], mask), chunked(network, other, [], mask))


def test_a_reset_forgets_everything() -> None:
    network = make_network()
    x = torch.randn(2, 10, 5)
    reset = torch.zeros(2, 10, dtype=torch.bool)
    reset[:, 4] = True
    after = chunked(network, x, [], None, reset)[0][:, 4:]
    torch.testing.assert_close(after, chunked(network, x[:, 4:], [])[0])


@pytest.mark.parametrize("attention", ["none", "dot", "additive"])
def test_nothing_after_a_bar_changes_what_is_said_at_it(attention: str) -> None:
    network = make_network(attention=attention)
    x = torch.randn(2, 12, 5)
    for t in range(11):
        other = x.clone()
        other[:, t + 1 :] = 1e3 * torch.randn(2, 11 - t, 5)
        said, says = chunked(network, x, [])[0], chunked(network, other, [])[0]
        assert torch.equal(said[:, : t + 1], says[:, : t + 1])


@pytest.mark.parametrize("window", [1, 3, 100])
def test_attention_sees_the_last_steps_of_its_window_and_no_others(window: int) -> None:
    network = make_network(window=window)
    weights = chunked(network, torch.randn(2, 8, 5), [3])[1]
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 8))
    seen = torch.arange(window) <= torch.arange(8).unsqueeze(1)
    assert (weights[:, seen] > 0).all()
    assert (weights[:, ~seen] == 0).all()


def test_a_bias_by_lag_moves_attention_to_that_lag() -> None:
    network = make_network(window=6, lag_bias="relative")
    assert network.attention is not None
    with torch.no_grad():
        network.attention.lag_bias.table[:, 4] = 50.0
    weights = chunked(network, torch.randn(2, 10, 5), [])[1]
    assert (weights[:, 4:, 4] > 0.99).all()


def test_alibi_prefers_the_near() -> None:
    network = make_network(window=6, lag_bias="alibi")
    assert network.attention is not None
    with torch.no_grad():
        network.attention.qkv.weight.zero_()
        network.attention.qkv.bias.zero_()
    weights = chunked(network, torch.randn(1, 10, 5), [])[1]
    assert (weights[0, -1].diff() < 0).all()


def test_rows_are_updated_where_they_lie_and_others_are_left() -> None:
    network = make_network()
    x = torch.randn(7, 6, 5)
    want, _, _ = stepped(network, x)
    for rows in (torch.tensor([5, 0, 3]), slice(2, 5), slice(0, 7)):
        state = network.initial_state(7)
        for t in range(6):
            said, _, _ = network.step(x[rows, t], state, rows)
            torch.testing.assert_close(said, want[rows, t], atol=TOLERANCE, rtol=TOLERANCE)
        others = np.setdiff1d(np.arange(7), np.arange(7)[rows])
        assert not state.h[:, others].any()
        assert not state.keys[others].any()
        assert not state.steps[others].any()


def test_forward_leaves_the_state_it_was_given() -> None:
    network = make_network()
    x = torch.randn(2, 9, 5)
    _, _, state = network(x[:, :5])
    before = [t.clone() for t in state]
    network(x[:, 5:], state)
    assert all(torch.equal(a, b) for a, b in zip(before, state, strict=True))


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_a_new_network_is_its_linear_skip(cell: str) -> None:
    network = CausalNetwork(NetworkConfig(n_features=5, n_outputs=2, cell=cell)).eval()
    assert network.skip is not None
    torch.nn.init.normal_(network.skip.weight)
    x = torch.randn(3, 40, 5)
    torch.testing.assert_close(network(x)[0], network.skip(x))


def test_every_weight_learns() -> None:
    network = make_network().train()
    network(torch.randn(2, 9, 5), need_weights=True)[0].square().sum().backward()
    still = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    assert not still


def test_gradients_flow_through_masks_and_resets_as_through_a_plain_chunk() -> None:
    network = make_network(cell="lstm")
    x = torch.randn(2, 9, 5)
    plain, unrolled = (
        torch.autograd.grad(network(x, None, mask)[0].square().sum(), list(network.parameters()))
        for mask in (None, torch.ones(2, 9, dtype=torch.bool))
    )
    for a, b in zip(plain, unrolled, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@settings(max_examples=40, deadline=None)
@given(config=CONFIGS)
def test_the_shapes_of_weights_are_known_without_torch(config: dict[str, Any]) -> None:
    network = make_network(**config)
    found = {name: tuple(t.shape) for name, t in network.state_dict().items()}
    assert weight_shapes(network.config) == found


def test_heads_must_divide_attention() -> None:
    with pytest.raises(ValidationError, match="multiple of heads"):
        NetworkConfig(n_features=5, n_outputs=1, heads=3, attention_size=8)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_says_what_the_cpu_says() -> None:
    network = make_network()
    x = torch.randn(3, 12, 5)
    want = stepped(network, x)
    on_gpu = network.cuda()
    with torch.inference_mode():
        said, _, state = on_gpu(x.cuda())
    torch.testing.assert_close(said.cpu(), want[0], atol=1e-3, rtol=1e-3)
    assert state.h.is_cuda
