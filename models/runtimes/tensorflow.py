"""A bundle on TensorFlow, on one CPU thread: the weights of the reference network, the state in numpy.

Shapes: n sequences, F features, H hidden size, T window, D attention size, N heads, d = D / N, O outputs.
"""

from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Both bring LLVM. Triton first is well; Triton after TensorFlow ends the process, and torch's
# optimisers import it.
if find_spec("triton"):
    import_module("triton")
import tensorflow as tf

from models.bundle import Bundle, BundleRejected
from models.network_config import NetworkConfig, lag_bias
from models.runtimes import Slots, Step, rebuild_steps

Floats = NDArray[np.float32]

with suppress(RuntimeError):  # the process has used TensorFlow before: then it has chosen
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)


class TensorflowRuntime:
    def __init__(self, bundle: Bundle, device: str = "cpu") -> None:
        """Raises BundleRejected if the weights do not fit, ValueError for a device it has not."""
        if device not in ("auto", "cpu"):
            raise ValueError(f"the tensorflow runtime has no device {device!r}; torch may")
        config = bundle.config.sequence
        if not config.takes(bundle.weights):
            raise BundleRejected(f"{bundle.version}: weights do not fit the network")
        self.bundle = bundle
        self.steps_seen = np.zeros(0, np.int64)
        self._config = config
        self._said = _compiled(config, bundle.weights)
        self._state = {n: np.zeros((0, *s), np.float32) for n, s in _state_shapes(config).items()}

    def step(self, slots: Slots, x: Floats) -> Step:
        outputs, weights = self._step(slots, self.bundle.scaler.transform(x))
        return Step(*self.bundle.values(outputs), weights)

    def rebuild(self, slots: Slots, x: Floats, lengths: Slots) -> None:
        self.reset(slots)
        scaled = self.bundle.scaler.transform(x)
        for row, runs in rebuild_steps(lengths, x.shape[1]):
            self._step(slots[runs], scaled[runs, row])

    def reset(self, slots: Slots) -> None:
        for array in self._state.values():
            array[slots] = 0.0
        self.steps_seen[slots] = 0

    def grow(self, capacity: int) -> None:
        more = max(capacity - len(self.steps_seen), 0)
        self.steps_seen = np.concatenate([self.steps_seen, np.zeros(more, np.int64)])
        for name, array in self._state.items():
            new = np.zeros((more, *array.shape[1:]), np.float32)
            self._state[name] = np.concatenate([array, new])

    def export(self, slots: Slots) -> dict[str, NDArray[Any]]:
        parts = {name: array[slots] for name, array in self._state.items()}
        return parts | {"steps": self.steps_seen[slots]}

    def load(self, slots: Slots, state: Mapping[str, NDArray[Any]]) -> None:
        for name, array in self._state.items():
            array[slots] = state[name]
        self.steps_seen[slots] = state["steps"]

    def _step(self, slots: Slots, scaled: Floats) -> tuple[Floats, Floats]:
        state, place = self._state, self.steps_seen[slots]
        given = {name: array[slots] for name, array in state.items()}
        said = {n: t.numpy() for n, t in self._said(x=scaled, place=place, **given).items()}
        state["h"][slots], state["c"][slots] = said["h"], said["c"]
        if self._config.attends:
            at = place % self._config.window
            state["keys"][slots, :, :, at] = said["key"]
            state["values"][slots, :, at] = said["value"]
        self.steps_seen[slots] += 1
        return said["outputs"], said["weights"]


def _state_shapes(config: NetworkConfig) -> dict[str, tuple[int, ...]]:
    """Of one slot, as `models.runtimes.torch` exports them."""
    N, d, T = config.heads, config.attention_size // config.heads, config.window
    layers, H = config.layers, config.hidden
    return {
        "h": (layers, H),
        "c": (layers, H if config.cell == "lstm" else 0),
        "keys": (N, d, T) if config.attends else (0,),
        "values": (N, T, d) if config.attends else (0,),
    }


def _compiled(
    config: NetworkConfig, weights: Mapping[str, NDArray[Any]]
) -> Callable[..., dict[str, Any]]:
    """`CausalNetwork.step` as a graph: x[n, F], place[n] and the state -> what it says and the new state."""
    w = {name: tf.constant(np.asarray(a, np.float32)) for name, a in weights.items()}
    w["lag_bias"] = tf.constant(lag_bias(config, weights))
    shapes = {"x": (config.n_features,), **_state_shapes(config)}
    signature = {n: tf.TensorSpec((None, *shape), tf.float32) for n, shape in shapes.items()}
    signature["place"] = tf.TensorSpec((None,), tf.int64)

    def step(x: Any, place: Any, h: Any, c: Any, keys: Any, values: Any) -> dict[str, Any]:
        y = x
        if config.gate:
            y = x * (2 * tf.sigmoid(_linear(x, w["gate.weight"], w["gate.bias"])))
        hs, cs = [], []
        for layer in range(config.layers):
            y, memory = _cell(config, w, f"recurrent.{layer}", y, h[:, layer], c[:, layer])
            hs.append(y)
            cs.append(memory)
            if config.layer_norm:
                mean, variance = tf.nn.moments(y, [1], keepdims=True)
                scale, shift = w[f"norms.{layer}.weight"], w[f"norms.{layer}.bias"]
                y = (y - mean) * tf.math.rsqrt(variance + 1e-5) * scale + shift
        said = {"h": tf.stack(hs, 1), "c": tf.stack(cs, 1)}
        said["weights"] = tf.zeros((tf.shape(x)[0], config.window))
        if config.attends:
            context, attended = _attention(config, w, y, place, keys, values)
            y = tf.concat([y, context], 1)
            said |= attended
        outputs = _linear(y, w["head.weight"], w["head.bias"])
        said["outputs"] = (
            outputs + tf.matmul(x, w["skip.weight"], transpose_b=True) if config.skip else outputs
        )
        return said

    ordered = [signature[name] for name in ("x", "place", "h", "c", "keys", "values")]
    compiled: Callable[..., dict[str, Any]] = tf.function(step, input_signature=ordered)
    return compiled


def _linear(x: Any, weight: Any, bias: Any) -> Any:
    return tf.matmul(x, weight, transpose_b=True) + bias


def _cell(
    config: NetworkConfig, w: Mapping[str, Any], name: str, x: Any, h: Any, c: Any
) -> tuple[Any, Any]:
    from_x = _linear(x, w[f"{name}.weight_ih_l0"], w[f"{name}.bias_ih_l0"])
    from_h = _linear(h, w[f"{name}.weight_hh_l0"], w[f"{name}.bias_hh_l0"])
    if config.cell == "lstm":
        i, f, g, o = tf.split(from_x + from_h, 4, 1)
        c = tf.sigmoid(f) * c + tf.sigmoid(i) * tf.tanh(g)
        return tf.sigmoid(o) * tf.tanh(c), c
    r_x, z_x, n_x = tf.split(from_x, 3, 1)
    r_h, z_h, n_h = tf.split(from_h, 3, 1)
    z = tf.sigmoid(z_x + z_h)
    new = tf.tanh(n_x + tf.sigmoid(r_x + r_h) * n_h)
    return new + z * (h - new), c


def _attention(
    config: NetworkConfig, w: Mapping[str, Any], y: Any, place: Any, keys: Any, values: Any
) -> tuple[Any, dict[str, Any]]:
    """The context [n, D], and the weights by lag with the newest key and value [n, N, d]."""
    N, T, D = config.heads, config.window, config.attention_size
    d = D // N
    qkv = _linear(y, w["attention.qkv.weight"], w["attention.qkv.bias"])
    q, key, value = (tf.reshape(part, (-1, N, d)) for part in tf.split(qkv, 3, 1))
    here = tf.one_hot(place % T, T)[:, None, None, :]
    keys = keys * (1 - here) + key[..., None] * here
    here = tf.transpose(here, (0, 1, 3, 2))
    values = values * (1 - here) + value[:, :, None] * here
    if config.attention == "dot":
        scores = tf.einsum("bnd,bndt->bnt", q, keys) / np.sqrt(d).astype(np.float32)
    else:
        near = tf.tanh(q[..., None] + keys)
        scores = tf.reduce_sum(near * w["attention.direction"][..., None], 2)
    lag = tf.math.floormod(place[:, None] - tf.range(T, dtype=tf.int64), T)
    bias = tf.transpose(tf.gather(w["lag_bias"], lag, axis=1), (1, 0, 2))
    hidden = (lag > place[:, None])[:, None]
    attended = tf.nn.softmax(tf.where(hidden, -np.inf, scores + bias))
    context = tf.reshape(tf.einsum("bnt,bntd->bnd", attended, values), (-1, D))
    by_lag = tf.gather(tf.reduce_mean(attended, 1), lag, batch_dims=1)
    return context, {"weights": by_lag, "key": key, "value": value}
