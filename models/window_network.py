"""A network that sees the last T bars and nothing else: what `models.network` is without a state.

Rows before a symbol's reset are zeros, the mean of a standard scaler, and attention does not see them.
Chunks are served by overlapping windows, so that training, forecasting and serving call it as they
call the causal network.

Shapes: n windows, T rows of each, B sequences, L steps of a chunk, F features, O outputs, Y width of
the recurrent layers, D attention size.
"""

from typing import Final, NamedTuple

import torch
from torch import Tensor

from models.features import FEATURE_NAMES
from models.network import CausalNetwork, Network
from models.network_config import NetworkConfig
from models.scaling import Scaler

CLOCK: Final = FEATURE_NAMES.index("bars_since_open")
"""log(1 + n) of the session's n-th bar: by it, bars of the slower time frame begin and end."""
WINDOWS_AT_ONCE: Final = 2048


class WindowState(NamedTuple):
    """What a chunk leaves for the next one."""

    rows: Tensor
    """[B, T - 1, F] the newest rows, zero where there are none yet"""
    steps: Tensor
    """[B] int64, steps seen"""

    def detach(self) -> "WindowState":
        return WindowState(*(t.detach() for t in self))


class WindowNetwork(Network):
    def __init__(self, config: NetworkConfig) -> None:
        super().__init__(config)
        if config.attention == "cross":
            self.register_buffer("clock", torch.tensor([0.0, 1.0]))

    clock: Tensor
    """Centre and scale of the column CLOCK."""

    def initial_state(self, B: int, device: torch.device | str | None = None) -> WindowState:
        device = device or self.head.weight.device
        T, F = self.config.window, self.config.n_features
        rows = torch.zeros(B, T - 1, F, device=device)
        return WindowState(rows, torch.zeros(B, dtype=torch.int64, device=device))

    def forward(
        self, x: Tensor, state: WindowState | None = None, need_weights: bool = False
    ) -> tuple[Tensor, Tensor | None, WindowState]:
        """x[B, L, F] -> outputs[B, L, O], weights[B, L, T] by lag or None, state."""
        B, L, F = x.shape
        T = self.config.window
        state = self.initial_state(B, x.device) if state is None else state
        rows = torch.cat([state.rows, x], 1)
        windows = rows.unfold(1, T, 1).transpose(2, 3)
        count = state.steps.unsqueeze(1) + torch.arange(1, L + 1, device=x.device)
        lag = torch.arange(T - 1, -1, -1, device=x.device)
        seen = lag < count.unsqueeze(2)
        at_once = max(1, WINDOWS_AT_ONCE // max(B, 1))
        outputs, weights = [], []
        for some, there in zip(
            torch.split(windows, at_once, 1), torch.split(seen, at_once, 1), strict=True
        ):
            said, w = self.windowed(some.reshape(-1, T, F), there.reshape(-1, T), need_weights)
            outputs.append(said.reshape(B, some.shape[1], -1))
            weights += [] if w is None else [w.reshape(B, some.shape[1], T)]
        after = WindowState(rows[:, rows.shape[1] - T + 1 :], state.steps + L)
        return torch.cat(outputs, 1), torch.cat(weights, 1) if weights else None, after

    def windowed(
        self, x: Tensor, seen: Tensor, need_weights: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """x[n, T, F], newest row last -> outputs[n, O], weights[n, T] by lag (mean of heads) or None.

        seen[n, T] is False for rows before the reset, which must be zeros.
        """
        H, gated = self.config.hidden, self._gated(x)
        y = gated
        for index, layer in enumerate(self.recurrent):
            y = self.dropout(self._normed(index, layer(y)[0]))
        newest = y[:, -1]
        if self.config.bidirectional:
            newest = torch.cat([y[:, -1, :H], y[:, 0, H:]], -1)
        context, weights = None, None
        if self.attention is not None:
            context, weights = self._context(x, gated, y, newest, seen, need_weights)
        elif need_weights:
            weights = torch.zeros(seen.shape, device=x.device)
        outputs = self._outputs(x[:, -1], newest, context)
        return outputs, None if weights is None else weights.flip(-1)

    def _context(
        self, x: Tensor, gated: Tensor, y: Tensor, newest: Tensor, seen: Tensor, need_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        """context[n, D], and weights[n, T] by row."""
        assert self.attention is not None
        row = torch.arange(x.shape[1], device=x.device)
        lag = (x.shape[1] - 1 - row)[None, None]
        if self.config.attention == "self":
            between = (row[:, None] - row).abs().unsqueeze(0)
            context, weights = self.attention(
                *self.attention.project(y), between, seen, need_weights
            )
            context = _share(seen) @ context
        else:
            query = self.attention.query(newest).unsqueeze(1)
            some = torch.ones_like(seen[:, :1])
            if self.config.attention == "cross":
                means, closed = self.slower_bars(x, seen)
                some = closed.any(1, keepdim=True)
                y, seen_keys = means @ gated, closed | ~some
            else:
                seen_keys = seen
            context, weights = self.attention(
                query, *self.attention.key_value(y), lag, seen_keys, need_weights
            )
            context = context * some.unsqueeze(2)
        return context.squeeze(1), None if weights is None else self.by_row(weights, x, seen)

    def by_row(self, weights: Tensor, x: Tensor, seen: Tensor) -> Tensor:
        """What attends, weights[n, ..., Q, K] -> the rows that it goes back to, [n, ..., T]."""
        around = [1] * (weights.ndim - 3)
        if self.config.attention == "self":
            weights = _share(seen).view(len(x), *around, 1, -1) @ weights
        elif self.config.attention == "cross":
            means, closed = self.slower_bars(x, seen)
            weights = weights @ means.view(len(x), *around, *means.shape[1:])
            weights = weights * closed.any(1).view(-1, *around, 1, 1)
        return weights.squeeze(-2)

    def slower_bars(self, x: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        """The bars of the slower time frame, `slower` bars of a session each.

        means[n, T, T]: row i holds the shares of the rows of which i's slower bar is made so far;
        closed[n, T] where that bar is complete with row i, and begins in the window.
        """
        k, (centre, scale) = self.config.slower, self.clock
        number = torch.expm1(x[..., CLOCK] * scale + centre).round()
        which = torch.div(number - 1, k, rounding_mode="floor")
        new = (which[:, 1:] != which[:, :-1]) | (number[:, 1:] <= number[:, :-1])
        new = new | ~seen[:, :-1]
        begins = torch.cat([torch.ones_like(seen[:, :1]), new], 1)
        whole_from_first = (number - 1) % k == 0
        follows = torch.cat([torch.zeros_like(seen[:, :1]), seen[:, :-1]], 1)
        bar = begins.cumsum(1)
        whole = (begins & (follows | whole_from_first)).float()
        row = torch.arange(x.shape[1], device=x.device)
        of = (bar.unsqueeze(2) == bar.unsqueeze(1)) & (row <= row[:, None])
        ends = (number % k == 0) | torch.cat([new, torch.zeros_like(seen[:, :1])], 1)
        closed = seen & ends & (torch.einsum("nij,nj->ni", of.float(), whole) > 0)
        return of / of.sum(2, keepdim=True), closed


def _share(seen: Tensor) -> Tensor:
    """seen[n, T] -> [n, 1, T], of the mean over the rows that are seen."""
    return (seen / seen.sum(1, keepdim=True)).unsqueeze(1)


def build_network(config: NetworkConfig, scaler: Scaler | None = None) -> Network:
    """A new network of the mode that `config` asks for; `scaler` is the one of its inputs."""
    if config.mode == "carried":
        return CausalNetwork(config)
    network = WindowNetwork(config)
    if config.attention == "cross" and scaler is not None:
        clock = [scaler.centre[CLOCK], scaler.scale[CLOCK]]
        network.clock.copy_(torch.tensor(clock, dtype=torch.float32))
    return network
