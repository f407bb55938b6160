"""A bundle on the CPU by matrix products and compiled passes between them: the fastest here.

One step is one product for each layer, all n rows at once; what lies between (scaling, gate, cells,
attention) is one pass each over rows that are still in the cache. State and rings are read and
written where they lie, whatever the slots.

Shapes: n sequences, S slots, F features, H hidden size, T window, D attention size, N heads,
d = D / N, O outputs.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from models.bundle import Bundle, BundleRejected
from models.network_config import NetworkConfig, lag_bias
from models.runtimes import Slots, Step, rebuild_steps
from models.runtimes.products import Precision, Product, product_by
from models.scaling import CLIP

Floats = NDArray[np.float32]
Weights = Mapping[str, NDArray[Any]]

LANES = 8
"""Rings of keys are padded to a multiple of it: a loop over the window is then whole vectors."""


class NumbaRuntime:
    def __init__(
        self,
        bundle: Bundle,
        capacity: int = 0,
        device: str = "cpu",
        precision: Precision = "float32",
    ) -> None:
        """`precision` is that of the products of layers and attention; state is float32 in any case.

        Raises BundleRejected if the weights do not fit, ValueError for a device or a precision it has not.
        """
        if device not in ("auto", "cpu"):
            raise ValueError(f"the numba runtime has no device {device!r}; the torch runtime may")
        config = bundle.config.sequence
        if not config.takes(bundle.weights):
            raise BundleRejected(f"{bundle.version}: weights do not fit the network")
        self.bundle = bundle
        self.steps_seen = np.zeros(0, np.int64)
        self._config = config
        self._centre = bundle.scaler.centre.astype(np.float32)
        self._factor = (1 / bundle.scaler.scale).astype(np.float32)
        self._weights = {name: _as_factor(name, a) for name, a in bundle.weights.items()}
        cells = [_cell(config, bundle.weights, layer) for layer in range(config.layers)]
        self._products = {
            name: product_by(weight, precision)
            for name in ("gate", "attention.qkv")
            if (weight := self._weights.get(f"{name}.weight")) is not None
        }
        self._cells = [(product_by(weight, precision), bias) for weight, bias in cells]
        self._lag_bias = _by_distance(lag_bias(config, bundle.weights))
        self._rows: dict[str, Floats] = {}
        N, T, L = config.heads, config.window, config.layers
        d, padded = config.attention_size // N, -(-T // LANES) * LANES
        carried = config.hidden if config.cell == "lstm" else 0
        self._h = np.zeros((L, 0, config.hidden), np.float32)
        self._c = np.zeros((L, 0, carried), np.float32)
        self._keys = np.zeros((0, N, d, padded), np.float32)
        self._values = np.zeros((0, N, T, d), np.float32)
        self.grow(capacity)

    @property
    def _attends(self) -> bool:
        return self._config.attention != "none"

    def step(self, slots: Slots, x: Floats) -> Step:
        outputs, weights = self._step(slots, x)
        return Step(*self.bundle.values(outputs), weights)

    def rebuild(self, slots: Slots, x: Floats, lengths: Slots) -> None:
        self.reset(slots)
        for row, runs in rebuild_steps(lengths, x.shape[1]):
            self._step(slots[runs], x[runs, row])

    def reset(self, slots: Slots) -> None:
        self._h[:, slots] = 0.0
        self._c[:, slots] = 0.0
        self.steps_seen[slots] = 0  # hides what the ring holds

    def grow(self, capacity: int) -> None:
        more = capacity - len(self.steps_seen)
        if more <= 0:
            return
        self.steps_seen = np.concatenate([self.steps_seen, np.zeros(more, np.int64)])
        self._h = _longer(self._h, more, 1)
        self._c = _longer(self._c, more, 1)
        if self._attends:
            self._keys = _longer(self._keys, more, 0)
            self._values = _longer(self._values, more, 0)

    def export(self, slots: Slots) -> dict[str, NDArray[Any]]:
        none = np.zeros((len(slots), 0), np.float32)
        T = self._config.window
        return {
            "h": self._h[:, slots].swapaxes(0, 1),
            "c": self._c[:, slots].swapaxes(0, 1),
            "keys": self._keys[slots, :, :, :T] if self._attends else none,
            "values": self._values[slots] if self._attends else none,
            "steps": self.steps_seen[slots],
        }

    def load(self, slots: Slots, state: Mapping[str, NDArray[Any]]) -> None:
        self._h[:, slots] = state["h"].swapaxes(0, 1)
        self._c[:, slots] = state["c"].swapaxes(0, 1)
        if self._attends:
            self._keys[slots, :, :, : self._config.window] = state["keys"]
            self._values[slots] = state["values"]
        self.steps_seen[slots] = state["steps"]

    def _step(self, slots: Slots, x: Floats) -> tuple[Floats, Floats]:
        """Of x f32[n, F] unscaled: outputs f32[n, O], weights f32[n, T] by lag."""
        config, w, n = self._config, self._weights, len(slots)
        H, T = config.hidden, config.window
        scaled = self._buffer("scaled", n, config.n_features)
        _scale(x, self._centre, self._factor, scaled)
        y = scaled
        if config.gate:
            gate = self._product("gate", scaled, self._products["gate"])
            _open_gate(gate, w["gate.bias"], scaled)
            y = gate
        advance = _lstm if config.cell == "lstm" else _gru
        for layer, (product, bias) in enumerate(self._cells):
            h, c = self._h[layer], self._c[layer]
            both = self._buffer(f"both{layer}", n, y.shape[1] + H)
            _beside(y, h, slots, both)
            gates = self._product("gates", both, product)
            y = self._buffer(f"y{layer}", n, H)
            advance(gates, bias, h, c, slots, y)
            if config.layer_norm:
                _normalise(y, w[f"norms.{layer}.weight"], w[f"norms.{layer}.bias"])
        weights = np.zeros((n, T), np.float32)
        if self._attends:
            qkv = self._product("qkv", y, self._products["attention.qkv"])
            seen = self._buffer("seen", n, H + config.attention_size)
            direction = w.get("attention.direction", _NO_DIRECTION)
            rings = self._keys, self._values, slots, self.steps_seen
            _attend(
                qkv, w["attention.qkv.bias"], direction, self._lag_bias, *rings, weights, y, seen
            )
            y = seen
        self.steps_seen[slots] += 1
        outputs: Floats = y @ w["head.weight"]
        outputs += w["head.bias"]
        if config.skip:
            outputs += scaled @ w["skip.weight"]
        return outputs, weights

    def _product(self, name: str, x: Floats, product: Product) -> Floats:
        out = self._buffer(name, len(x), product.width)
        product(x, out)
        return out

    def _buffer(self, name: str, n: int, width: int) -> Floats:
        """Room for n rows, the same memory in every step."""
        held = self._rows.get(name)
        if held is None or len(held) < n:
            held = self._rows[name] = np.empty((n, width), np.float32)
        return held[:n]


_NO_DIRECTION = np.zeros((0, 0), np.float32)


def _as_factor(name: str, weight: NDArray[Any]) -> Floats:
    """A matrix [out, in] as [in, out], to multiply rows by from the right; anything else as it is."""
    return np.ascontiguousarray(weight.T if name.endswith(".weight") else weight, np.float32)


def _cell(config: NetworkConfig, weights: Weights, layer: int) -> tuple[Floats, Floats]:
    """Product [in + H, 4 H] and bias [4 H] that make all gates of a layer from (x, h) side by side.

    LSTM: i, f, g, o. GRU: r, z, and the new state's parts from x and from h apart, as r weighs the
    latter alone.
    """
    name = f"recurrent.{layer}"
    w_ih, w_hh, b_ih, b_hh = (
        np.asarray(weights[f"{name}.{part}_l0"], np.float32)
        for part in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    )
    if config.cell == "lstm":
        return np.ascontiguousarray(np.concatenate([w_ih, w_hh], 1).T), b_ih + b_hh
    H = config.hidden
    of_x, of_h = np.zeros((4 * H, w_ih.shape[1])), np.zeros((4 * H, H))
    of_x[: 3 * H], of_h[: 2 * H], of_h[3 * H :] = w_ih, w_hh[: 2 * H], w_hh[2 * H :]
    bias = np.concatenate([b_ih[: 2 * H] + b_hh[: 2 * H], b_ih[2 * H :], b_hh[2 * H :]])
    return np.ascontiguousarray(np.concatenate([of_x, of_h], 1).T, np.float32), bias


def _by_distance(bias: Floats) -> Floats:
    """[N, 2 T + LANES]: from T - p % T on it holds the bias of slots 0, 1, ... at position p."""
    N, T = bias.shape
    table = np.zeros((N, 2 * T + LANES), np.float32)
    table[:, : 2 * T] = bias[:, -np.arange(2 * T) % T]
    return table


def _longer(array: Floats, more: int, axis: int) -> Floats:
    """What is not used yet of it takes no memory."""
    shape = list(array.shape)
    shape[axis] += more
    longer = np.zeros(shape, np.float32)
    longer[(slice(None),) * axis + (slice(array.shape[axis]),)] = array
    return longer


# The passes. Each is one loop over rows; inner loops run over contiguous numbers.

_F0, _F1, _F2 = np.float32(0), np.float32(1), np.float32(2)
_CLIP = np.float32(CLIP)
_compiled = njit(
    cache=True, nogil=True, error_model="numpy", fastmath={"reassoc", "contract", "arcp", "nsz"}
)


@njit(inline="always")
def _exp(x):  # type: ignore[no-untyped-def]
    """To the power of e in float32, to 3e-7 relative, within -87..88: Cephes' polynomial, which vectorises."""
    x = min(max(x, np.float32(-87)), np.float32(88))
    n = np.floor(x * np.float32(1.44269504) + np.float32(0.5))
    r = x - n * np.float32(0.693359375) + n * np.float32(2.12194440e-4)
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    power = np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)
    return (p * r * r + r + _F1) * power


@njit(inline="always")
def _sigmoid(x):  # type: ignore[no-untyped-def]
    return _F1 / (_F1 + _exp(-x))


@njit(inline="always")
def _tanh(x):  # type: ignore[no-untyped-def]
    return _F2 / (_F1 + _exp(-_F2 * x)) - _F1


@_compiled
def _scale(x, centre, factor, out):  # type: ignore[no-untyped-def]
    for i in range(x.shape[0]):
        for j in range(x.shape[1]):
            out[i, j] = min(max((x[i, j] - centre[j]) * factor[j], -_CLIP), _CLIP)


@_compiled
def _open_gate(gate, bias, x):  # type: ignore[no-untyped-def]
    """Scores of the gate in, gated x out."""
    for i in range(x.shape[0]):
        for j in range(x.shape[1]):
            gate[i, j] = x[i, j] * _F2 * _sigmoid(gate[i, j] + bias[j])


@_compiled
def _beside(y, h, slots, both):  # type: ignore[no-untyped-def]
    width = y.shape[1]
    for i in range(slots.size):
        both[i, :width] = y[i]
        both[i, width:] = h[slots[i]]


@_compiled
def _lstm(gates, bias, h, c, slots, y):  # type: ignore[no-untyped-def]
    H = y.shape[1]
    b_i, b_f, b_g, b_o = bias[:H], bias[H : 2 * H], bias[2 * H : 3 * H], bias[3 * H :]
    for i in range(slots.size):
        now = gates[i]
        g_i, g_f, g_g, g_o = now[:H], now[H : 2 * H], now[2 * H : 3 * H], now[3 * H :]
        cell, out = c[slots[i]], y[i]
        for j in range(H):
            added = _sigmoid(g_i[j] + b_i[j]) * _tanh(g_g[j] + b_g[j])
            cell[j] = _sigmoid(g_f[j] + b_f[j]) * cell[j] + added
        for j in range(H):
            out[j] = _sigmoid(g_o[j] + b_o[j]) * _tanh(cell[j])
        h[slots[i]] = out


@_compiled
def _gru(gates, bias, h, c, slots, y):  # type: ignore[no-untyped-def]
    H = y.shape[1]
    b_r, b_z, b_x, b_h = bias[:H], bias[H : 2 * H], bias[2 * H : 3 * H], bias[3 * H :]
    for i in range(slots.size):
        now = gates[i]
        g_r, g_z, g_x, g_h = now[:H], now[H : 2 * H], now[2 * H : 3 * H], now[3 * H :]
        before, out = h[slots[i]], y[i]
        for j in range(H):
            r, z = _sigmoid(g_r[j] + b_r[j]), _sigmoid(g_z[j] + b_z[j])
            new = _tanh(g_x[j] + b_x[j] + r * (g_h[j] + b_h[j]))
            out[j] = new + z * (before[j] - new)
        h[slots[i]] = out


@_compiled
def _normalise(y, scale, shift):  # type: ignore[no-untyped-def]
    H = np.float32(y.shape[1])
    for i in range(y.shape[0]):
        mean = y[i].sum() / H
        variance = _F0
        for j in range(y.shape[1]):
            variance += (y[i, j] - mean) ** 2
        factor = _F1 / np.sqrt(variance / H + np.float32(1e-5))
        for j in range(y.shape[1]):
            y[i, j] = (y[i, j] - mean) * factor * scale[j] + shift[j]


@_compiled
def _attend(  # type: ignore[no-untyped-def]
    qkv, qkv_bias, direction, lag_bias, keys, values, slots, steps_seen, weights, y, seen
):
    """Store the newest key and value; attend; y and the context side by side in `seen`.

    The p-th step since the reset is in place p % T of the ring, so the places in use are its first.
    """
    N, d, padded = keys.shape[1:]
    T, H, D = values.shape[2], y.shape[1], N * d
    scale = _F1 / np.sqrt(np.float32(d))
    projected = np.empty(3 * D, np.float32)
    q, k, v = projected[:D], projected[D : 2 * D], projected[2 * D :]
    scores, by_slot = np.empty(padded, np.float32), np.empty(padded, np.float32)
    for i in range(slots.size):
        position = steps_seen[slots[i]]
        newest, used = position % T, min(position + 1, T)
        projected[:] = qkv[i] + qkv_bias
        seen[i, :H] = y[i]
        by_slot[:] = _F0
        for head in range(N):
            ring, held = keys[slots[i], head], values[slots[i], head]
            own = slice(head * d, head * d + d)
            ring[:, newest] = k[own]
            held[newest] = v[own]
            scores[:] = lag_bias[head, T - newest : T - newest + padded]
            if direction.size:
                _add_additive(q[own], ring, direction[head], scores)
            else:
                _add_products(q[own], ring, scale, scores)
            _softmax(scores, used)
            _mix(scores, held, used, seen[i, H + head * d : H + head * d + d])
            for t in range(padded):
                by_slot[t] += scores[t]
        share = _F1 / np.float32(N)
        for lag in range(newest + 1):
            weights[i, lag] = by_slot[newest - lag] * share
        for lag in range(newest + 1, used):
            weights[i, lag] = by_slot[newest - lag + T] * share


@njit(inline="always")
def _add_products(q, ring, scale, scores):  # type: ignore[no-untyped-def]
    d = q.size
    for j in range(0, d - 3, 4):  # four keys a pass: the scores stay in registers for longer
        q0, q1, q2, q3 = q[j] * scale, q[j + 1] * scale, q[j + 2] * scale, q[j + 3] * scale
        k0, k1, k2, k3 = ring[j], ring[j + 1], ring[j + 2], ring[j + 3]
        for t in range(scores.size):
            scores[t] += q0 * k0[t] + q1 * k1[t] + q2 * k2[t] + q3 * k3[t]
    for j in range(d - d % 4, d):
        for t in range(scores.size):
            scores[t] += q[j] * scale * ring[j, t]


@njit(inline="always")
def _add_additive(q, ring, direction, scores):  # type: ignore[no-untyped-def]
    for j in range(q.size):
        query, along, key = q[j], direction[j], ring[j]
        for t in range(scores.size):
            scores[t] += along * _tanh(query + key[t])


@njit(inline="always")
def _softmax(scores, used):  # type: ignore[no-untyped-def]
    """Over the first `used`; the rest become 0."""
    scores[used:] = np.float32(-1e30)
    top = scores[0]
    for t in range(scores.size):
        top = max(top, scores[t])
    total = _F0
    for t in range(scores.size):
        scores[t] = _exp(scores[t] - top)
        total += scores[t]
    share = _F1 / total
    for t in range(scores.size):
        scores[t] *= share
    scores[used:] = _F0


@njit(inline="always")
def _mix(weights, held, used, context):  # type: ignore[no-untyped-def]
    context[:] = _F0
    for t in range(0, used - 3, 4):
        w0, w1, w2, w3 = weights[t], weights[t + 1], weights[t + 2], weights[t + 3]
        v0, v1, v2, v3 = held[t], held[t + 1], held[t + 2], held[t + 3]
        for j in range(context.size):
            context[j] += w0 * v0[j] + w1 * v1[j] + w2 * v2[j] + w3 * v3[j]
    for t in range(used - used % 4, used):
        for j in range(context.size):
            context[j] += weights[t] * held[t, j]
