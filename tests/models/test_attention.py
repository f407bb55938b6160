"""Each kind of attention under the same checks."""

import math
from typing import get_args

import pytest
import torch
from torch import Tensor

from models.attention import HIDDEN, Attention, LagBiasTable
from models.network_config import AttentionKind, LagBias

KINDS = [kind for kind in get_args(AttentionKind) if kind != "none"]
BIASES = get_args(LagBias)
CARRIED: tuple[AttentionKind, ...] = ("dot", "additive")
"""Those that `step` can do with a ring of the past."""
N, D, T = 2, 6, 4


def make_attention(kind: AttentionKind, bias: LagBias = "relative") -> Attention:
    torch.manual_seed(0)
    attention = Attention(kind, inputs=5, size=D, heads=N, window=T, bias=bias, sources=5)
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter)
    return attention.eval()


def projected(attention: Attention, L: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    h = torch.randn(3, L, 5)
    return attention.query(h), *attention.key_value(h)


def banded(L: int) -> Tensor:
    lag = torch.arange(L).unsqueeze(1) - torch.arange(L)
    return lag.where((lag >= 0) & (lag < T), HIDDEN).unsqueeze(0)


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("kind", KINDS)
class TestEveryKind:
    def test_asking_for_weights_does_not_change_the_context(
        self, kind: AttentionKind, bias: LagBias
    ) -> None:
        attention = make_attention(kind, bias)
        q, k, v = projected(attention)
        filled = torch.ones(3, 7, dtype=torch.bool)
        plain, none = attention(q, k, v, banded(7), filled)
        shown, weights = attention(q, k, v, banded(7), filled, need_weights=True)
        assert none is None
        torch.testing.assert_close(plain, shown, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(weights.sum(-1), torch.ones(3, 7))

    def test_the_context_is_the_weighted_mean_of_values(
        self, kind: AttentionKind, bias: LagBias
    ) -> None:
        attention = make_attention(kind, bias)
        q, k, _ = projected(attention)
        filled = torch.ones(3, 7, dtype=torch.bool)
        constant = torch.full((3, 7, D), 2.5)
        context, _ = attention(q, k, constant, banded(7), filled)
        torch.testing.assert_close(context, constant)

    def test_hidden_keys_cannot_be_told_from_absent_ones(
        self, kind: AttentionKind, bias: LagBias
    ) -> None:
        attention = make_attention(kind, bias)
        q, k, v = projected(attention)
        filled = torch.ones(3, 7, dtype=torch.bool)
        filled[1, 2] = False
        said, _ = attention(q, k, v, banded(7), filled)
        k, v = k.clone(), v.clone()
        k[1, 2], v[1, 2] = 1e6, -1e6
        torch.testing.assert_close(attention(q, k, v, banded(7), filled)[0][1, 3:], said[1, 3:])


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("kind", CARRIED)
class TestEveryKindThatIsCarried:
    def test_the_newest_query_over_a_ring_is_the_last_row_of_a_chunk(
        self, kind: AttentionKind, bias: LagBias
    ) -> None:
        attention = make_attention(kind, bias)
        for L in (1, T - 1, T, T + 3):
            h = torch.randn(3, L, 5)
            q, k, v = attention.project(h)
            for part, same in zip(
                (q, k, v), (attention.query(h), *attention.key_value(h)), strict=True
            ):
                torch.testing.assert_close(part, same)
            filled = torch.ones(3, L, dtype=torch.bool)
            want, weights = attention(q, k, v, banded(L), filled, need_weights=True)
            keys, values = attention.empty_ring(3, "cpu")
            for p in range(L):
                slots = torch.full((3,), p % T)
                attention.store(keys, values, torch.arange(3), slots, k[:, p], v[:, p])
            position = torch.full((3,), L - 1)
            said, by_lag = attention.newest(q[:, -1], keys, values, position)
            torch.testing.assert_close(said, want[:, -1], atol=1e-5, rtol=1e-5)
            n = min(L, T)
            torch.testing.assert_close(
                by_lag[:, :n], weights[:, -1].flip(-1)[:, :n], atol=1e-5, rtol=1e-5
            )

    def test_packing_a_ring_and_unpacking_it_changes_nothing(
        self, kind: AttentionKind, bias: LagBias
    ) -> None:
        attention = make_attention(kind, bias)
        k, v = torch.randn(3, T, D), torch.randn(3, T, D)
        back = attention.unpacked(*attention.packed(k, v))
        assert torch.equal(back[0], k)
        assert torch.equal(back[1], v)


def test_alibi_slopes_are_the_published_ones() -> None:
    table = LagBiasTable("alibi", heads=8, window=3).table
    torch.testing.assert_close(table[0], torch.tensor([0.0, -0.5, -1.0]))
    torch.testing.assert_close(table[7], torch.tensor([0.0, -1 / 256, -2 / 256]))


def test_only_the_relative_bias_is_learned_and_saved() -> None:
    saved = {kind: list(LagBiasTable(kind, 2, 3).state_dict()) for kind in BIASES}
    assert saved == {"none": [], "alibi": [], "relative": ["table"]}


def test_a_hidden_pair_has_no_score() -> None:
    bias = LagBiasTable("relative", 2, 3)(torch.tensor([[[0, HIDDEN]]]))
    assert bias[0, 0].tolist() == [[0.0, -math.inf]]
