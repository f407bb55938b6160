"""A causal network: linear skip + feature gate -> recurrent stack -> attention over the last T steps.

    x[F] --------------------------- skip (linear) ------------------------------+
      |                                                                          |
      +- gate -> LSTM/GRU layer 1 -> ... -> layer n -> y[H] --+                  |
                                                  |           |                  |
                                                  +-> q, k, v | ring of last T   |
                                                       |      v                  v
                                                       +-> context[D] -> head -> + -> outputs[O]

`forward` runs a chunk in which every step is an example; `step` runs one bar for many sequences and
carries the same state. Both give the same numbers.

Shapes: B sequences, L steps of a chunk, F features, O outputs, H hidden size, T window, D attention
size. "Real" steps are those that are not masked out; lag 0 is the newest real step.
"""

from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from models.attention import HIDDEN, attention_of
from models.network_config import NetworkConfig as NetworkConfig


class State(NamedTuple):
    """What is carried between steps. The key of the p-th real step since the reset is in slot p % T."""

    h: Tensor
    """[layers, B, H]"""
    c: Tensor
    """[layers, B, H]; [layers, B, 0] for GRU"""
    keys: Tensor
    """[B, N, d, T]; [B, 0] without attention"""
    values: Tensor
    """[B, N, T, d]; [B, 0] without attention"""
    steps: Tensor
    """[B] int64, real steps since the last reset"""

    def detach(self) -> "State":
        return State(*(t.detach() for t in self))


class Network(nn.Module):
    """What both modes are made of: skip, gate, recurrent stack, attention, head."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config
        F, H, O = config.n_features, config.hidden, config.n_outputs  # noqa: E741
        D = config.attention_size if config.attends else 0
        recurrent = nn.LSTM if config.cell == "lstm" else nn.GRU
        sizes = [F] + [config.width] * (config.layers - 1)

        self.skip = nn.Linear(F, O, bias=False) if config.skip else None
        self.gate = nn.Linear(F, F) if config.gate else None
        self.recurrent = nn.ModuleList(
            recurrent(n, H, batch_first=True, bidirectional=config.bidirectional) for n in sizes
        )
        self.norms = nn.ModuleList(nn.LayerNorm(config.width) for _ in sizes if config.layer_norm)
        self.attention = attention_of(config)
        self.head = nn.Linear(config.width + D, O)
        self.dropout = nn.Dropout(config.dropout)
        self.input_dropout = nn.Dropout(config.input_dropout)
        self._start_linear()

    def _start_linear(self) -> None:
        """An open gate and a silent head: training starts at the linear model and adds what it lacks."""
        for linear in (self.skip, self.gate, self.head):
            for parameter in linear.parameters() if linear is not None else ():
                nn.init.zeros_(parameter)
        H = self.config.hidden
        for layer in self.recurrent:
            for name, weight in layer.named_parameters():
                if name.startswith("weight_hh"):
                    for block in weight.data.chunk(weight.shape[0] // H):
                        nn.init.orthogonal_(block)
                elif name.startswith("bias"):
                    nn.init.zeros_(weight)
                if name.startswith("bias_ih") and isinstance(layer, nn.LSTM):
                    nn.init.ones_(
                        weight.data[H : 2 * H]
                    )  # remember at first: Jozefowicz et al. 2015

    def _gated(self, x: Tensor) -> Tensor:
        x = x if self.gate is None else x * (2 * torch.sigmoid(self.gate(x)))
        return cast(Tensor, self.input_dropout(x))

    def _normed(self, index: int, h: Tensor) -> Tensor:
        return cast(Tensor, self.norms[index](h)) if self.config.layer_norm else h

    def _outputs(self, x: Tensor, y: Tensor, context: Tensor | None) -> Tensor:
        outputs = self.head(y if context is None else torch.cat([y, self.dropout(context)], -1))
        return cast(Tensor, outputs if self.skip is None else outputs + self.skip(x))


class CausalNetwork(Network):
    def initial_state(self, B: int, device: torch.device | str | None = None) -> State:
        config, device = self.config, device or self.head.weight.device
        C = config.hidden if config.cell == "lstm" else 0
        empty = torch.zeros(B, 0, device=device)
        ring = self.attention.empty_ring(B, device) if self.attention else (empty, empty)
        return State(
            h=torch.zeros(config.layers, B, config.hidden, device=device),
            c=torch.zeros(config.layers, B, C, device=device),
            keys=ring[0],
            values=ring[1],
            steps=torch.zeros(B, dtype=torch.int64, device=device),
        )

    def forward(
        self,
        x: Tensor,
        state: State | None = None,
        mask: Tensor | None = None,
        reset: Tensor | None = None,
        need_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None, State]:
        """x[B, L, F] -> outputs[B, L, O], weights[B, L, T] by lag (mean of heads) or None, state.

        A step with mask[B, L] False leaves the state alone and its output is zero. reset[B, L] True
        starts anew before that step. The state that is passed in is left as it was.
        """
        B, L, _ = x.shape
        state = self.initial_state(B, x.device) if state is None else state
        regular = mask is None and reset is None
        real = torch.ones(B, L, dtype=torch.bool, device=x.device) if mask is None else mask
        anew = torch.zeros_like(real) if reset is None else reset
        x = x.masked_fill(~real.unsqueeze(-1), 0.0) if mask is not None else x

        y, hs, cs = self._gated(x), [], []
        for index, layer in enumerate(self.recurrent):
            h, c = state.h[index], state.c[index]
            if regular:
                y, h, c = _fused(layer, y, h, c)
            else:
                y, h, c = _unrolled(layer, y, h, c, real, anew)
            y = self.dropout(self._normed(index, y))
            hs.append(h)
            cs.append(c)

        band = _regular_band if regular else _irregular_band
        lag, filled, source, count = band(state.steps, real, anew, self.config.window)
        keys, values, context, weights = state.keys, state.values, None, None
        if self.attention is not None:
            q, k, v = self.attention.project(y)
            T = self.config.window
            by_age = (state.steps.unsqueeze(1) + torch.arange(T, device=x.device)) % T
            past_k, past_v = self.attention.unpacked(keys, values)
            k = torch.cat([_pick(past_k, by_age), k], 1)
            v = torch.cat([_pick(past_v, by_age), v], 1)
            context, weights = self.attention(q, k, v, lag, filled, need_weights)
            keys, values = self.attention.packed(_pick(k, source), _pick(v, source))
        outputs = self._outputs(x, y, context)
        outputs = outputs.masked_fill(~real.unsqueeze(-1), 0.0) if mask is not None else outputs
        if need_weights:
            weights = self._by_lag(weights, lag, real)
        return outputs, weights, State(torch.stack(hs), torch.stack(cs), keys, values, count)

    @torch.inference_mode()
    def step(
        self, x: Tensor, state: State, rows: slice | Tensor | None = None
    ) -> tuple[Tensor, Tensor, State]:
        """x[n, F] -> outputs[n, O], weights[n, T] by lag (mean of heads), state updated IN PLACE.

        `rows` are the n of the state's B sequences that have a new bar: all, a slice, or unique
        indices[n]. A slice is cheaper: keys and values are read where they lie.
        """
        T = self.config.window
        B = state.steps.shape[0]
        rows = slice(0, B) if rows is None else rows
        y = self._gated(x)
        for index, layer in enumerate(self.recurrent):
            h_all, c_all = state.h[index], state.c[index]
            h, c = _cell(layer, y, _take(h_all, rows), _take(c_all, rows))
            h_all[rows], c_all[rows] = h, c
            y = self._normed(index, h)
        position = _take(state.steps, rows).clone()
        state.steps[rows] = position + 1
        if self.attention is None:
            return self._outputs(x, y, None), x.new_zeros(x.shape[0], T), state

        q, k, v = self.attention.project(y)
        ids = rows if isinstance(rows, Tensor) else torch.arange(B, device=x.device)[rows]
        self.attention.store(state.keys, state.values, ids, position % T, k, v)
        keys, values = _take(state.keys, rows), _take(state.values, rows)
        context, weights = self.attention.newest(q, keys, values, position)
        return self._outputs(x, y, context), weights, state

    def _by_lag(self, weights: Tensor | None, lag: Tensor, real: Tensor) -> Tensor:
        by_lag = torch.zeros(*real.shape, self.config.window + 1, device=real.device)
        if weights is not None:
            where = lag.where(lag != HIDDEN, self.config.window).expand_as(weights)
            by_lag = by_lag.scatter(2, where, weights)
        return by_lag[..., :-1] * real.unsqueeze(-1)


# Recurrence: a fused run where nothing happens inside the chunk, else the cell, one step at a time.


def _fused(layer: nn.Module, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if isinstance(layer, nn.LSTM):
        y, (h, c) = layer(x, (h.unsqueeze(0), c.unsqueeze(0)))
        return y, h.squeeze(0), c.squeeze(0)
    y, h = layer(x, h.unsqueeze(0))
    return y, h.squeeze(0), c


def _unrolled(
    layer: nn.Module, x: Tensor, h: Tensor, c: Tensor, real: Tensor, anew: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    ys = []
    for now, ok, new in zip(x.unbind(1), real.unbind(1), anew.unbind(1), strict=True):
        ok, keep = ok.unsqueeze(1), ~new.unsqueeze(1)
        h, c = h * keep, c * keep
        h_next, c_next = _cell(layer, now, h, c)
        h, c = h_next.where(ok, h), c_next.where(ok, c)
        ys.append(h)
    return torch.stack(ys, 1), h, c


def _cell(layer: nn.Module, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """One step of nn.LSTM or nn.GRU with its own parameters; faster than the module on length 1."""
    w_ih, w_hh, b_ih, b_hh = layer.parameters()
    if isinstance(layer, nn.LSTM):
        gates = torch.addmm(b_ih + b_hh, x, w_ih.t()).addmm_(h, w_hh.t())
        H = h.shape[1]
        gates[:, 2 * H : 3 * H].mul_(2)  # tanh(g) = 2 sigmoid(2 g) - 1 takes a third of the time
        i, f, g, o = gates.sigmoid_().chunk(4, 1)
        c = (f * c).addcmul_(i, g, value=2).sub_(i)
        return o * (2 * torch.sigmoid(2 * c) - 1), c
    r_x, z_x, n_x = torch.addmm(b_ih, x, w_ih.t()).chunk(3, 1)
    r_h, z_h, n_h = torch.addmm(b_hh, h, w_hh.t()).chunk(3, 1)
    z = torch.sigmoid(z_x + z_h)
    n = torch.tanh(n_x + torch.sigmoid(r_x + r_h) * n_h)
    return torch.lerp(n, h, z), c


# Bands: who sees whom in a chunk. Keys are the T of the ring, oldest first, then the L of the chunk.
# Each gives lag[B or 1, L, T + L], filled[B, T + L], and for the ring after the chunk
# source[B, T] (slot -> key) and count[B].

Band = tuple[Tensor, Tensor, Tensor, Tensor]


def _regular_band(count: Tensor, real: Tensor, anew: Tensor, T: int) -> Band:
    L = real.shape[1]
    slots = torch.arange(T, device=real.device)
    after = count + L
    keys = torch.arange(-T, L, device=real.device)
    lag = torch.arange(L, device=real.device).unsqueeze(1) - keys
    lag = lag.where((lag >= 0) & (lag < T), HIDDEN).unsqueeze(0)
    filled = keys >= -count.unsqueeze(1)
    source = L + (slots - after.unsqueeze(1)) % T
    return lag, filled, source, after


def _irregular_band(count: Tensor, real: Tensor, anew: Tensor, T: int) -> Band:
    """Positions count real steps since the last reset; only keys of the same segment are seen."""
    B, L = real.shape
    slots = torch.arange(T, device=real.device)
    segment = anew.cumsum(1)
    so_far = real.cumsum(1)
    at_reset = (so_far - real.long()).where(anew, 0).cummax(1).values
    before = count.unsqueeze(1).where(segment == 0, 0)
    position = before + so_far - at_reset - 1

    ring_position = count.unsqueeze(1) - T + slots
    key_position = torch.cat([ring_position, position], 1)
    key_segment = torch.cat([torch.zeros_like(ring_position), segment], 1)
    filled = torch.cat([ring_position >= 0, torch.ones_like(real)], 1)
    lag = position.unsqueeze(2) - key_position.unsqueeze(1)
    seen = (lag >= 0) & (lag < T) & (segment.unsqueeze(2) == key_segment.unsqueeze(1))
    seen[:, :, T:] &= real.unsqueeze(1)
    lag = lag.where(seen, HIDDEN)
    lag.diagonal(T, 1, 2).zero_()  # an absent step sees itself, so that no query is left blind

    after = position[:, -1] + 1
    kept = real & (segment == segment[:, -1:]) & (position >= (after - T).unsqueeze(1))
    into = (position % T).where(kept, T)
    source = torch.cat([(slots - count.unsqueeze(1)) % T, slots.new_zeros(B, 1)], 1)
    steps = torch.arange(T, T + L, device=real.device).expand(B, L)
    return lag, filled, source.scatter(1, into, steps)[:, :T], after


def _take(t: Tensor, rows: slice | Tensor) -> Tensor:
    return t.index_select(0, rows) if isinstance(rows, Tensor) else t[rows]


def _pick(t: Tensor, index: Tensor) -> Tensor:
    """t[B, K, D], index[B, T] -> [B, T, D]."""
    return t.gather(1, index.unsqueeze(2).expand(-1, -1, t.shape[2]))
