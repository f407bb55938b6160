"""A bundle on ONNX Runtime: one CPU thread, one run of a graph a step, the state in numpy arrays.

The graph is written straight from the weights, so torch is not needed. The rings of keys and values
stay outside it: it reads the T slots of the past, of which the one that the newest step will take
is hidden, and gives the newest key and value to be stored there.

Shapes: n sequences, F features, H hidden size, T window, D attention size, N heads, d = D / N, O outputs.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from models.bundle import Bundle, BundleRejected
from models.network_config import NetworkConfig, lag_bias
from models.runtimes import Slots, Step, rebuild_steps

OPSET, IR_VERSION = 17, 9
Floats = NDArray[np.float32]
Weights = Mapping[str, NDArray[Any]]


class OnnxRuntime:
    def __init__(self, bundle: Bundle, capacity: int = 0, device: str = "cpu") -> None:
        """Raises BundleRejected if the weights do not fit, ValueError for a device it has not."""
        if device not in ("auto", "cpu"):
            raise ValueError(f"the onnx runtime has no device {device!r}; the torch runtime may")
        config = bundle.config.sequence
        if not config.takes(bundle.weights):
            raise BundleRejected(f"{bundle.version}: weights do not fit the network")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self.bundle = bundle
        self.steps_seen = np.zeros(0, np.int64)
        self._config = config
        self._session = onnxruntime.InferenceSession(
            step_graph(config, bundle.weights), options, providers=["CPUExecutionProvider"]
        )
        self._said = [output.name for output in self._session.get_outputs()]
        self._state = {n: np.zeros((0, *s), np.float32) for n, s in _state_shapes(config).items()}
        self.grow(capacity)

    def step(self, slots: Slots, x: Floats) -> Step:
        outputs, weights = self._step(slots, self.bundle.scaler.transform(x))
        return Step(*self.bundle.values(outputs), weights)

    def rebuild(self, slots: Slots, x: Floats, lengths: Slots) -> None:
        self.reset(slots)
        scaled = self.bundle.scaler.transform(x)
        for row, runs in rebuild_steps(lengths, x.shape[1]):
            self._step(slots[runs], scaled[runs, row])

    def reset(self, slots: Slots) -> None:
        for name, array in self._state.items():
            if name not in ("keys", "values"):  # zero steps hide what the ring holds
                array[slots] = 0.0
        self.steps_seen[slots] = 0

    def grow(self, capacity: int) -> None:
        more = max(capacity - len(self.steps_seen), 0)
        self.steps_seen = np.concatenate([self.steps_seen, np.zeros(more, np.int64)])
        for name, array in self._state.items():
            new = np.zeros((more, *array.shape[1:]), np.float32)
            self._state[name] = np.concatenate([array, new])

    def export(self, slots: Slots) -> dict[str, NDArray[Any]]:
        config, n, none = self._config, len(slots), np.zeros((len(slots), 0), np.float32)
        state = {name: array[slots] for name, array in self._state.items()}
        layers = range(config.layers)
        return {
            "h": np.stack([state[f"h{i}"] for i in layers], 1),
            "c": np.stack([state.get(f"c{i}", np.zeros((n, 0), np.float32)) for i in layers], 1),
            "keys": state.get("keys", none),
            "values": state.get("values", none),
            "steps": self.steps_seen[slots],
        }

    def load(self, slots: Slots, state: Mapping[str, NDArray[Any]]) -> None:
        for name, array in self._state.items():
            part, layer = (name, None) if name in state else (name[0], int(name[1:]))
            array[slots] = state[part] if layer is None else state[part][:, layer]
        self.steps_seen[slots] = state["steps"]

    def _step(self, slots: Slots, scaled: Floats) -> tuple[Floats, Floats]:
        T = self._config.window
        rows = _rows(slots)
        feeds: dict[str, NDArray[Any]] = {name: a[rows] for name, a in self._state.items()}
        feeds["x"] = scaled
        position = self.steps_seen[slots]
        if "keys" in self._state:
            feeds["row"] = np.where(position < T, position, T + position % T)
        said = dict(zip(self._said, self._session.run(None, feeds), strict=True))
        for name, array in self._state.items():
            if name == "keys":
                array[slots, :, :, position % T] = said["new_keys"]
            elif name == "values":
                array[slots, :, position % T] = said["new_values"]
            else:
                array[rows] = said[f"new_{name}"]
        self.steps_seen[slots] += 1
        weights = (
            said["weights"] if "keys" in self._state else np.zeros((len(slots), T), np.float32)
        )
        return said["outputs"], weights


def _state_shapes(config: NetworkConfig) -> dict[str, tuple[int, ...]]:
    """The parts of one slot's state; the graph takes each, and gives it as `new_...`."""
    N, d, T = config.heads, config.attention_size // config.heads, config.window
    parts = ["h", "c"] if config.cell == "lstm" else ["h"]
    shapes: dict[str, tuple[int, ...]] = {
        f"{part}{layer}": (config.hidden,) for part in parts for layer in range(config.layers)
    }
    return (
        shapes if config.attention == "none" else shapes | {"keys": (N, d, T), "values": (N, T, d)}
    )


def _rows(slots: Slots) -> slice | Slots:
    """A slice where the slots are a run: then the graph reads the state where it lies."""
    if len(slots) and slots[-1] - slots[0] == len(slots) - 1 and (np.diff(slots) == 1).all():
        return slice(int(slots[0]), int(slots[-1]) + 1)
    return slots


class _Graph:
    """ONNX nodes in the order in which they are called for; arrays become constants."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def __call__(self, operator: str, *inputs: Any, out: str = "", **attributes: Any) -> str:
        return self.several(operator, *inputs, outs=[out], **attributes)[0]

    def several(self, operator: str, *inputs: Any, outs: list[str], **attributes: Any) -> list[str]:
        names = [i if isinstance(i, str) else self._constant(np.asarray(i)) for i in inputs]
        outs = [name or f"{operator}_{len(self.nodes)}_{k}" for k, name in enumerate(outs)]
        self.nodes.append(helper.make_node(operator, names, outs, **attributes))
        return outs

    def split(self, x: str, *sizes: int) -> list[str]:
        return self.several("Split", x, np.array(sizes, np.int64), outs=[""] * len(sizes), axis=-1)

    def linear(self, x: str, weight: Any, bias: Any, out: str = "") -> str:
        return self("Gemm", x, weight, bias, transB=1, out=out)

    def shaped(self, x: str, *shape: int, out: str = "") -> str:
        return self("Reshape", x, np.array(shape, np.int64), out=out)

    def _constant(self, value: NDArray[Any]) -> str:
        name = f"constant_{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name


def step_graph(config: NetworkConfig, weights: Weights) -> bytes:
    """`CausalNetwork.step` as an ONNX model.

    Inputs: `x` [n, F] scaled, `row` [n] = p at position p < T, else T + p % T, and the state.
    Outputs: `outputs` [n, O], `weights` [n, T] by lag, and `new_...` of the state, of keys and
    values those of this step alone.
    """
    g, w = _Graph(), {name: np.asarray(a, np.float32) for name, a in weights.items()}
    y = "x"
    if config.gate:
        gate = g("Sigmoid", g.linear("x", w["gate.weight"], w["gate.bias"]))
        y = g("Mul", "x", g("Mul", gate, np.float32(2)))
    for layer in range(config.layers):
        part = {name: w[f"recurrent.{layer}.{name}_l0"] for name in _CELL_WEIGHTS}
        cell = _lstm if config.cell == "lstm" else _gru
        y = cell(g, config.hidden, layer, y, **part)
        if config.layer_norm:
            scale, shift = w[f"norms.{layer}.weight"], w[f"norms.{layer}.bias"]
            y = g("LayerNormalization", y, scale, shift, axis=-1, epsilon=1e-5)
    if config.attention != "none":
        y = g("Concat", y, _attention(g, config, w, y), axis=-1)
    outputs = g.linear(y, w["head.weight"], w["head.bias"])
    skip = g("MatMul", "x", w["skip.weight"].T) if config.skip else np.float32(0)
    g("Add", outputs, skip, out="outputs")
    return _model(g, config)


_CELL_WEIGHTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


def _lstm(
    g: _Graph,
    H: int,
    layer: int,
    x: str,
    weight_ih: Floats,
    weight_hh: Floats,
    bias_ih: Floats,
    bias_hh: Floats,
) -> str:
    both = g("Concat", x, f"h{layer}", axis=-1)
    gates = g.linear(both, np.concatenate([weight_ih, weight_hh], 1), bias_ih + bias_hh)
    i, f, c_in, o = g.split(gates, H, H, H, H)
    kept = g("Mul", g("Sigmoid", f), f"c{layer}")
    added = g("Mul", g("Sigmoid", i), g("Tanh", c_in))
    c = g("Add", kept, added, out=f"new_c{layer}")
    return g("Mul", g("Sigmoid", o), g("Tanh", c), out=f"new_h{layer}")


def _gru(
    g: _Graph,
    H: int,
    layer: int,
    x: str,
    weight_ih: Floats,
    weight_hh: Floats,
    bias_ih: Floats,
    bias_hh: Floats,
) -> str:
    r_x, z_x, n_x = g.split(g.linear(x, weight_ih, bias_ih), H, H, H)
    r_h, z_h, n_h = g.split(g.linear(f"h{layer}", weight_hh, bias_hh), H, H, H)
    r, z = g("Sigmoid", g("Add", r_x, r_h)), g("Sigmoid", g("Add", z_x, z_h))
    n = g("Tanh", g("Add", n_x, g("Mul", r, n_h)))
    return g("Add", n, g("Mul", z, g("Sub", f"h{layer}", n)), out=f"new_h{layer}")


def _attention(g: _Graph, config: NetworkConfig, w: Weights, y: str) -> str:
    """The context [n, D] of the newest step over the past's slots and itself."""
    N, T, D = config.heads, config.window, config.attention_size
    d = D // N
    q, k, v = g.split(g.linear(y, w["attention.qkv.weight"], w["attention.qkv.bias"]), D, D, D)
    new_key, new_value = (
        g.shaped(k, -1, N, d, out="new_keys"),
        g.shaped(v, -1, N, d, out="new_values"),
    )
    own_value = g.shaped(new_value, -1, N, 1, d)
    if config.attention == "dot":
        query = g.shaped(g("Mul", q, np.float32(1 / np.sqrt(d))), -1, N, 1, d)
        past = g("MatMul", query, "keys")
        own = g("MatMul", query, g.shaped(new_key, -1, N, d, 1))
    else:
        along = w["attention.direction"][:, :, None]
        query = g.shaped(q, -1, N, d, 1)
        past, own = (
            g(
                "ReduceSum",
                g("Mul", g("Tanh", g("Add", query, key)), along),
                np.array([2], np.int64),
                keepdims=1,
            )
            for key in ("keys", g.shaped(new_key, -1, N, d, 1))
        )
    bias, slot_of_lag = _tables(config, w)
    past = g("Add", past, g("Gather", bias[:, :, None], "row", axis=0))
    own = g("Add", own, lag_bias(config, w)[:, None, :1])
    attended = g("Softmax", g("Concat", past, own, axis=-1), axis=-1)
    by_slot = g("ReduceMean", attended, axes=[1, 2], keepdims=0)
    g("GatherElements", by_slot, g("Gather", slot_of_lag, "row", axis=0), axis=1, out="weights")
    w_past, w_own = g.split(attended, T, 1)
    context = g("Add", g("MatMul", w_past, "values"), g("Mul", w_own, own_value))
    return g.shaped(context, -1, D)


def _tables(config: NetworkConfig, w: Weights) -> tuple[Floats, NDArray[np.int64]]:
    """By row: the bias [2 T, N, T] of each slot, and the slot [2 T, T] of each lag (T = this step).

    Rows 0..T-1 are positions before the ring is full; T..2T-1 are full rings by position % T.
    """
    T = config.window
    position, steps = np.arange(2 * T)[:, None], np.arange(T)
    lag_of_slot = (position - steps) % T
    hidden = (lag_of_slot == 0) | (lag_of_slot > position)
    bias = np.where(hidden[:, None], -np.inf, lag_bias(config, w)[:, lag_of_slot].swapaxes(0, 1))
    return bias.astype(np.float32), np.where(steps == 0, T, (position - steps) % T)


def _model(g: _Graph, config: NetworkConfig) -> bytes:
    number = onnx.TensorProto.FLOAT
    state = _state_shapes(config)
    news = {f"new_{name}": shape for name, shape in state.items() if name not in ("keys", "values")}
    outputs: dict[str, tuple[int, ...]] = {"outputs": (config.n_outputs,), **news}
    inputs = [
        helper.make_tensor_value_info(name, number, ["n", *shape])
        for name, shape in {"x": (config.n_features,), **state}.items()
    ]
    if config.attention != "none":
        by_head = (config.heads, config.attention_size // config.heads)
        outputs |= {"weights": (config.window,), "new_keys": by_head, "new_values": by_head}
        inputs.append(helper.make_tensor_value_info("row", onnx.TensorProto.INT64, ["n"]))
    said = [helper.make_tensor_value_info(n, number, ["n", *s]) for n, s in outputs.items()]
    graph = helper.make_graph(g.nodes, "step", inputs, said, g.constants)
    opset = [helper.make_opsetid("", OPSET)]
    model = helper.make_model(graph, opset_imports=opset, ir_version=IR_VERSION)
    onnx.checker.check_model(model, full_check=True)
    return bytes(model.SerializeToString())
