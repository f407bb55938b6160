"""Attention of each step over the last T real steps, by lag (lag 0 = the step itself).

Shapes: B sequences, L queries, K keys, T window, D attention size, N heads, d = D / N.
"""

import math
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.network_config import AttentionKind, LagBias, NetworkConfig, alibi_slopes

HIDDEN = -1
"""The lag of a pair that must not see each other: ahead, too far back, absent, before a reset."""


class LagBiasTable(nn.Module):
    """Adds to a score what its lag alone says: nothing, a slope per head, or a learned table.

    `alibi`: Press et al. 2022, slopes 2^(-8 n / N). `relative`: one free number per head and lag,
    so that "the same hour yesterday" can be found whatever the content.
    """

    table: Tensor

    def __init__(self, kind: LagBias, heads: int, window: int) -> None:
        super().__init__()
        table = torch.zeros(heads, window)
        if kind == "alibi":
            table = -torch.outer(torch.tensor(alibi_slopes(heads)), torch.arange(window))
        if kind == "relative":
            self.table = nn.Parameter(table)
        else:
            self.register_buffer("table", table, persistent=False)

    def forward(self, lag: Tensor) -> Tensor:
        """lag[B, L, K] -> bias[B, N, L, K], -inf where HIDDEN."""
        bias = self.table[:, lag.clamp_min(0)].transpose(0, 1)
        return bias.masked_fill((lag == HIDDEN).unsqueeze(1), -math.inf)


class Attention(nn.Module):
    """Multi-head attention with scaled dot-product or additive (Bahdanau) scores."""

    def __init__(
        self,
        kind: AttentionKind,
        inputs: int,
        size: int,
        heads: int,
        window: int,
        bias: LagBias,
        sources: int = 0,
    ) -> None:
        """Of `cross`, queries come from `inputs` and keys and values from other `sources`."""
        super().__init__()
        self.kind, self.heads, self.scale = kind, heads, 1 / math.sqrt(size // heads)
        self.size = size
        if kind == "cross":
            self.q, self.kv = nn.Linear(inputs, size), nn.Linear(sources, 2 * size)
        else:
            self.qkv = nn.Linear(inputs, 3 * size)
        self.lag_bias = LagBiasTable(bias, heads, window)
        if kind == "additive":
            self.direction = nn.Parameter(torch.randn(heads, size // heads) * self.scale)

    def project(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """h[..., H] -> query, key, value, each [..., D]."""
        q, k, v = self.qkv(h).chunk(3, -1)
        return q, k, v

    def query(self, h: Tensor) -> Tensor:
        """h[..., H] -> query[..., D]."""
        if self.kind == "cross":
            return cast(Tensor, self.q(h))
        return functional.linear(h, self.qkv.weight[: self.size], self.qkv.bias[: self.size])

    def key_value(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """h[..., H], or sources[..., S] of `cross` -> key, value, each [..., D]."""
        if self.kind == "cross":
            k, v = self.kv(h).chunk(2, -1)
        else:
            weight, bias = self.qkv.weight[self.size :], self.qkv.bias[self.size :]
            k, v = functional.linear(h, weight, bias).chunk(2, -1)
        return k, v

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lag: Tensor,
        filled: Tensor,
        need_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """q[B, L, D], k and v[B, K, D] -> context[B, L, D], weights[B, L, K] (mean of heads) or None.

        lag[B or 1, L, K] with HIDDEN; filled[B, K] False hides a key from all. Each query must be
        left with at least one key.
        """
        if self.kind != "additive" and not need_weights:
            bias = self._bias(lag, filled)
            q, k, v = (self._by_head(t).transpose(1, 2) for t in (q, k, v))
            context = functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
            return context.transpose(1, 2).flatten(2), None
        weights = self.weights(q, k, lag, filled)
        return self.mixed(weights, v), weights.mean(1) if need_weights else None

    def weights(self, q: Tensor, k: Tensor, lag: Tensor, filled: Tensor) -> Tensor:
        """[B, N, L, K] of every head, from what `forward` is given."""
        q, k = (self._by_head(t).transpose(1, 2) for t in (q, k))
        if self.kind != "additive":
            scores = q @ k.transpose(-1, -2) * self.scale
        else:
            along = self.direction[:, None, None, :]
            scores = (torch.tanh(q.unsqueeze(3) + k.unsqueeze(2)) * along).sum(-1)
        return torch.softmax(scores + self._bias(lag, filled), -1)

    def mixed(self, weights: Tensor, v: Tensor) -> Tensor:
        """weights[B, N, L, K], v[B, K, D] -> context[B, L, D]."""
        return (weights @ self._by_head(v).transpose(1, 2)).transpose(1, 2).flatten(2)

    def _bias(self, lag: Tensor, filled: Tensor) -> Tensor:
        bias: Tensor = self.lag_bias(lag)
        return bias.masked_fill(~filled[:, None, None, :], -math.inf)

    def empty_ring(self, B: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """Keys [B, N, d, T] and values [B, N, T, d]: as a product with one query reads them fastest."""
        N, T, d = *self.lag_bias.table.shape, self.size // self.heads
        return torch.zeros(B, N, d, T, device=device), torch.zeros(B, N, T, d, device=device)

    def packed(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """K and v[B, T, D] of slots 0..T-1 -> a ring."""
        k, v = self._by_head(k), self._by_head(v)
        return k.permute(0, 2, 3, 1).contiguous(), v.transpose(1, 2).contiguous()

    def unpacked(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """The inverse of `packed`."""
        return keys.permute(0, 3, 1, 2).flatten(2), values.transpose(1, 2).flatten(2)

    def store(
        self, keys: Tensor, values: Tensor, ids: Tensor, slots: Tensor, k: Tensor, v: Tensor
    ) -> None:
        """Put k and v[n, D] into slots[n] of the rings ids[n], in place."""
        keys[ids, :, :, slots] = self._by_head(k)
        values[ids, :, slots] = self._by_head(v)

    def newest(
        self, q: Tensor, keys: Tensor, values: Tensor, position: Tensor
    ) -> tuple[Tensor, Tensor]:
        """`forward` for one query q[B, D] at position[B] over rings in which it is already stored.

        -> context[B, D], weights[B, T] by lag (mean of heads). The p-th step is in slot p % T.
        """
        B, N, d, T = keys.shape
        # Bias and lag of each slot for positions 0..T-1, where the ring is not full, and then for
        # full rings by position % T: two small tables in place of arithmetic on [B, T].
        positions = torch.arange(2 * T, device=q.device).unsqueeze(1)
        lag_of_slot = (positions - torch.arange(T, device=q.device)) % T
        seen = lag_of_slot.masked_fill(lag_of_slot > positions, HIDDEN)
        row = position.where(position < T, T + position % T)
        bias = self.lag_bias(seen.unsqueeze(1))[row]

        if self.kind == "dot":
            q = (q * self.scale).reshape(B * N, 1, d)
            scores = torch.bmm(q, keys.view(B * N, d, T)).view(B, N, 1, T)
        else:
            near = torch.tanh(q.reshape(B, N, d, 1) + keys)
            scores = (near * self.direction.unsqueeze(-1)).sum(2, keepdim=True)
        weights = torch.softmax(scores + bias, -1)
        context = torch.bmm(weights.view(B * N, 1, T), values.view(B * N, T, d)).view(B, N * d)
        return context, weights.mean(1).squeeze(1).gather(1, lag_of_slot[row])

    def _by_head(self, t: Tensor) -> Tensor:
        return t.view(*t.shape[:-1], self.heads, t.shape[-1] // self.heads)


def attention_of(config: NetworkConfig) -> Attention | None:
    if not config.attends:
        return None
    return Attention(
        config.attention,
        config.width,
        config.attention_size,
        config.heads,
        config.window,
        config.lag_bias,
        sources=config.n_features,
    )
