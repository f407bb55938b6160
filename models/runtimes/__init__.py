"""What runs a bundle: one small interface, one file for each library that can."""

import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from models.blending import EnsembleConfig, of_member
from models.bundle import Bundle, BundleRejected, ModelConfig
from models.network_config import NetworkConfig
from models.runtimes.products import Precision

log = logging.getLogger(__name__)

Slots = NDArray[np.int64]

RUNTIMES: Final[Mapping[str, str]] = {
    "numba": "numba",
    "torch": "torch",
    "onnx": "onnxruntime",
    "tensorflow": "tensorflow",
    "sklearn": "numpy",
    "ensemble": "xgboost",
}
"""Names, and the library that each needs."""

TOLERANCE: Final[Mapping[Precision, float]] = {"float32": 1e-4, "bfloat16": 5e-3}
"""How far a runtime may be from the golden values: float32 sums in another order, not other sums; or
numbers of 8 bits (tests/benchmarks/hot-path.md)."""

IN_BFLOAT16 = ("numba", "ensemble")
"""Runtimes that have the precision bfloat16; the ensemble's network is run by the other."""

GPU_DEVICES = ("/dev/nvidiactl", "/dev/nvmap", "/dev/dxg", "/dev/kfd")
"""One of them is there where Linux has a GPU that torch can use: NVIDIA, its Tegra, WSL, AMD."""


class RuntimeUnavailable(ValueError):
    """There is no such runtime, or its library is not installed; the message says what there is."""


class Step(NamedTuple):
    """What a bundle says about n bars; shapes: K targets, T steps of attention."""

    values: NDArray[np.float64]
    """[n, K] in the targets' units"""
    probabilities: Mapping[int, NDArray[np.float64]]
    """target index -> [n, classes], for directions only"""
    weights: NDArray[np.float32]
    """[n, T] by lag, lag 0 = this bar; mean of the heads"""


class Runtime(Protocol):
    """A bundle with the state of its slots; one thread at a time."""

    bundle: Bundle

    @property
    def steps_seen(self) -> NDArray[np.int64]:
        """[capacity] steps since the slot's reset."""

    def step(self, slots: Slots, x: NDArray[np.float32]) -> Step:
        """One bar for each of n unique slots; x f32[n, F] unscaled."""

    def rebuild(self, slots: Slots, x: NDArray[np.float32], lengths: Slots) -> None:
        """State from zero over the last lengths[i] rows of x f32[n, R, F], newest row last."""

    def reset(self, slots: Slots) -> None: ...

    def grow(self, capacity: int) -> None:
        """Make room for at least so many slots."""

    def export(self, slots: Slots) -> dict[str, NDArray[Any]]:
        """A copy of the state, slot on the first axis; any runtime of the same bundle can load it."""

    def load(self, slots: Slots, state: Mapping[str, NDArray[Any]]) -> None: ...


def rebuild_steps(lengths: Slots, R: int) -> Iterator[tuple[int, Slots]]:
    """The steps of `Runtime.rebuild`: a row of the R, oldest first, and which sequences it belongs to."""
    for row in range(R - int(lengths.max(initial=0)), R):
        yield row, np.flatnonzero(lengths >= R - row)


def open_runtime(
    bundle: Bundle, name: str = "auto", device: str = "auto", precision: Precision = "float32"
) -> Runtime:
    """A runtime that was seen to say what the bundle's golden file says; a log line names it.

    `auto` passes over one that does not, with a warning, and takes the next fastest: the library
    may be broken on this machine, not the bundle. Where the reference fails too, it is the bundle.

    Raises BundleRejected if weights do not fit the network, the golden values are not met, or the
    runtime cannot run such a network, or not in this precision; RuntimeUnavailable for a runtime that is
    unknown or not installed; ValueError for a precision that the CPU has not.
    """
    able = runtimes_of(bundle.config.network)
    if precision == "bfloat16" and name == "auto":
        name = next((each for each in able if each in IN_BFLOAT16), able[0])
    for each in _by_speed(able, device) if name == "auto" else [name]:
        try:
            runtime = _build(bundle, each, device, precision)
            _check_golden(runtime, TOLERANCE[precision])
        except (BundleRejected, ValueError) as error:
            if name != "auto" or each == able[0]:
                raise
            _tell(logging.WARNING, "runtime passed over", bundle, each, error=str(error))
            continue
        runtime.reset(np.arange(len(runtime.steps_seen)))
        _tell(logging.INFO, "runtime", bundle, each)
        return runtime
    raise RuntimeUnavailable(f"none of {', '.join(able)} is installed")


def _tell(level: int, event: str, bundle: Bundle, runtime: str, **fields: str) -> None:
    told = {"bundle": bundle.version, "runtime": runtime, **fields}
    log.log(level, event, extra={"fields": told})


def runtimes_of(config: ModelConfig) -> tuple[str, ...]:
    """Who can run it, the reference first."""
    if isinstance(config, EnsembleConfig):
        return ("ensemble",)
    if not isinstance(config, NetworkConfig):
        return ("sklearn",)
    if config.mode == "window":
        return ("torch",)
    return ("torch", "numba", "onnx", "tensorflow")


def set_threads(n: int) -> None:
    """Threads of one step in this process, of the libraries that are loaded by now.

    Those of NumPy's products and of torch; other runtimes have one.
    """
    threadpool_limits(n, user_api="blas")
    if "torch" in sys.modules:
        import torch

        torch.set_num_threads(n)


def with_golden(bundle: Bundle, x: NDArray[np.float32]) -> Bundle:
    """The bundle with what the reference runtime says to x f32[n, L, F] (unscaled) from zero state."""
    runtime = _build(bundle, runtimes_of(bundle.config.network)[0], "cpu")
    values, weights = _run(runtime, x)
    return bundle.with_golden({"x": x, "values": values, "weights": weights})


def sequence_member(bundle: Bundle) -> Bundle:
    """The network of an ensemble as a bundle of its own."""
    network = bundle.config.network
    assert isinstance(network, EnsembleConfig)
    return replace(
        bundle,
        config=bundle.config.model_copy(update={"network": network.sequence}),
        weights=of_member(bundle.weights, "sequence"),
        golden={},
    )


def _build(bundle: Bundle, name: str, device: str, precision: Precision = "float32") -> Runtime:
    able = runtimes_of(bundle.config.network)
    if name == "auto":
        name = _by_speed(able, device)[0]
    if name not in RUNTIMES:
        raise RuntimeUnavailable(
            f"no runtime is called {name!r}; there are: auto, {', '.join(RUNTIMES)}"
        )
    if name not in able:
        raise BundleRejected(
            f"{bundle.version}: the {name} runtime cannot run {bundle.config.network.summary()}; "
            f"take {' or '.join(able)}"
        )
    if precision == "bfloat16" and name not in IN_BFLOAT16:
        raise BundleRejected(f"{bundle.version}: the {name} runtime has no precision but float32")
    try:
        return _open(bundle, name, device, precision)
    except ModuleNotFoundError as error:
        others = [each for each in able if each != name and find_spec(RUNTIMES[each])]
        instead = f", or take {' or '.join(others)}" if others else ""
        raise RuntimeUnavailable(
            f"the {name} runtime needs {error.name}, which is not installed{instead}"
        ) from error


def _by_speed(able: Sequence[str], device: str) -> list[str]:
    """Those that are installed, fastest first, the reference next (tests/benchmarks/hot-path.md).

    TensorFlow only for who asks for it: to load it costs seconds and half a gigabyte.
    """
    installed = [each for each in able if find_spec(RUNTIMES[each]) and each != "tensorflow"]
    if not _is_cuda(device):
        installed.sort(key=lambda each: each != "numba")
    return installed or [able[0]]


def _is_cuda(device: str) -> bool:
    if device != "auto":
        return device.startswith("cuda")
    if not _may_have_gpu() or find_spec("torch") is None:
        return False
    import torch

    return torch.cuda.is_available()


def _may_have_gpu() -> bool:
    """To ask torch costs the seconds in which it is loaded."""
    return sys.platform != "linux" or any(Path(device).exists() for device in GPU_DEVICES)


def _open(bundle: Bundle, name: str, device: str, precision: Precision) -> Runtime:
    if name == "numba":
        from models.runtimes.numba import NumbaRuntime

        return NumbaRuntime(bundle, device=device, precision=precision)
    if name == "sklearn":
        from models.runtimes.sklearn import SklearnRuntime

        return SklearnRuntime(bundle, device)
    if name == "ensemble":
        from models.runtimes.ensemble import EnsembleRuntime

        name = "numba" if precision == "bfloat16" else "auto"
        return EnsembleRuntime(bundle, lambda network: _build(network, name, device, precision))
    if name == "onnx":
        from models.runtimes.onnx import OnnxRuntime

        return OnnxRuntime(bundle, device=device)
    if name == "tensorflow":
        from models.runtimes.tensorflow import TensorflowRuntime

        return TensorflowRuntime(bundle, device)
    if bundle.config.sequence.mode == "window":
        from models.runtimes.torch_window import TorchWindowRuntime

        return TorchWindowRuntime(bundle, device)
    if _is_cuda(device):
        from models.runtimes.cuda import CudaRuntime

        return CudaRuntime(bundle, device="cuda" if device == "auto" else device)
    from models.runtimes.torch import TorchRuntime

    return TorchRuntime(bundle, device="cpu" if device == "auto" else device)


def _run(
    runtime: Runtime, x: NDArray[np.float32]
) -> tuple[NDArray[np.float64], NDArray[np.float32]]:
    slots = np.arange(len(x))
    runtime.grow(max(len(x), len(runtime.steps_seen)))
    steps = [runtime.step(slots, np.ascontiguousarray(x[:, i])) for i in range(x.shape[1])]
    return np.stack([s.values for s in steps], 1), np.stack([s.weights for s in steps], 1)


def _check_golden(runtime: Runtime, tolerance: float) -> None:
    golden = runtime.bundle.golden
    version = runtime.bundle.version
    if not {"x", "values", "weights"} <= set(golden):
        raise BundleRejected(f"{version}: its golden file is not complete")
    x = golden["x"]
    if x.ndim != 3 or x.shape[2] != runtime.bundle.config.network.n_features:
        raise BundleRejected(f"{version}: its golden inputs have the wrong shape")
    values, weights = _run(runtime, x)
    agrees = partial(_agree, tolerance=tolerance)
    if not (agrees(values, golden["values"]) and agrees(weights, golden["weights"])):
        raise BundleRejected(f"{version}: says something else than its golden file")


def _agree(said: NDArray[Any], stored: NDArray[Any], tolerance: float) -> bool:
    return said.shape == stored.shape and np.allclose(said, stored, tolerance, tolerance)
