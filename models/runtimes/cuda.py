"""A causal network on a CUDA device: steps of a few fixed sizes, each recorded once as a CUDA graph.

A step is some eighty small kernels, and to launch them one by one takes longer than to run them. A
graph launches all at once, but always the same ones on the same addresses. So inputs and results
lie in buffers that stay where they are; a batch is padded to the next of the sizes, and cut where
it exceeds the largest; what pads it steps a scratch row of the state, which nobody reads.

Rules of capture and replay: https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs

Shapes: n bars of a batch, B rows of a fixed size, F features, O outputs, T steps of attention.
"""

import logging
import threading
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from models.bundle import Bundle
from models.network import CausalNetwork, State
from models.runtimes import Slots
from models.runtimes.torch import Floats, TorchRuntime
from models.scaling import CLIP, Scaler

log = logging.getLogger(__name__)

SIZES: Final = (16, 64, 256, 1_024, 4_096)
"""Each costs a capture when it is first met, so they are few; to pad a batch costs a GPU little."""
WARM_UPS: Final = 3
"""Before a capture, so that what is loaded or chosen at first use is there. Not on a side stream, which
is for the sake of autograd: it would run beside replays that share a workspace of cuBLAS with it."""

Work = Callable[[], None]
Record = Callable[[Work], Work]
"""Makes of work on a device what does it again on the same addresses; it holds none of them."""


# What only a GPU has.

_ONE_CAPTURE = threading.Lock()
"""A process may have but one under way; bundles are opened, and so recorded, in another thread."""


def record_on(device: torch.device) -> Record:
    """CUDA graphs that share their memory; on the CPU, and where a capture fails, the work itself does it again.

    They may share it in any order of replay, as results are copied out of it and all replays are
    on one stream. A pool whose graphs are all gone cannot be used again: ask anew.
    """
    if device.type != "cuda":
        return lambda work: work
    pool, stream = torch.cuda.graph_pool_handle(), _capture_stream(device)

    def recorded(work: Work) -> Work:
        graph = torch.cuda.CUDAGraph()
        try:
            # Only this thread is kept from what a capture forbids: another may be in the midst of a step.
            with _ONE_CAPTURE, torch.cuda.graph(graph, pool, stream, "thread_local"):
                work()
        except RuntimeError as error:
            log.warning("no CUDA graph: steps run kernel by kernel (%s)", error)
            return work
        return graph.replay

    return recorded


@cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all: cuBLAS keeps a workspace for each stream for good. Nothing ever runs on it."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


# What runs on a CPU too, where tests run it: all but graphs and page-locked memory.


class CudaRuntime(TorchRuntime):
    spare_rows = 1  # scratch

    def __init__(
        self,
        bundle: Bundle,
        capacity: int = 0,
        device: str = "cuda",
        sizes: Sequence[int] = SIZES,
        recorder: Callable[[torch.device], Record] = record_on,
    ) -> None:
        """`sizes` ascend. Raises BundleRejected if the weights do not fit the network."""
        self._sizes = sizes
        self._recorder = recorder
        self._steps: dict[int, _FixedStep] = {}
        super().__init__(bundle, capacity, device)

    def grow(self, capacity: int) -> None:
        """As in every runtime; the state moves, so each size is recorded anew when it is next used."""
        if capacity > len(self.steps_seen):
            self._steps.clear()
            self._record = self._recorder(self._device)
        super().grow(capacity)

    def _advance(self, slots: Slots, x: Floats) -> tuple[Floats, Floats]:
        n, config, largest = len(slots), self.network.config, self._sizes[-1]
        outputs = np.empty((n, config.n_outputs), np.float32)
        weights = np.empty((n, config.window), np.float32)
        for start in range(0, n, largest):
            piece = slice(start, start + largest)
            step = self._step_for(len(slots[piece]))
            outputs[piece], weights[piece] = step(slots[piece], x[piece])
        return outputs, weights

    def _step_for(self, n: int) -> "_FixedStep":
        size = next(size for size in self._sizes if size >= n)
        if size not in self._steps:
            self._steps[size] = _FixedStep(
                size, self.network, self.bundle.scaler, self._state, self._record
            )
        return self._steps[size]


class _FixedStep:
    """Scaling and step of at most `size` slots of a state whose last row is scratch."""

    def __init__(
        self, size: int, network: CausalNetwork, scaler: Scaler, state: State, record: Record
    ) -> None:
        config, device = network.config, state.steps.device
        self._network, self._state, self._device = network, state, device
        self._scratch = len(state.steps) - 1
        self._centre = torch.from_numpy(scaler.centre.astype(np.float32)).to(device)
        self._factor = torch.from_numpy((1 / scaler.scale).astype(np.float32)).to(device)
        self._x = _Mirrored((size, config.n_features), torch.float32, device)
        self._rows = _Mirrored((size,), torch.int64, device)
        self._outputs = _Mirrored((size, config.n_outputs), torch.float32, device)
        self._weights = _Mirrored((size, config.window), torch.float32, device)
        self._rows.there.fill_(self._scratch)
        for _ in range(WARM_UPS):
            self._work()
        self._again = record(self._work)

    def __call__(self, slots: Slots, x: Floats) -> tuple[Floats, Floats]:
        """From x f32[n, F] unscaled: outputs f32[n, O], weights f32[n, T], overwritten by the next call."""
        n = len(slots)
        self._x.here[:n] = x
        self._rows.here[:n] = slots
        self._rows.here[n:] = self._scratch
        self._x.send(n)
        self._rows.send(len(self._rows.here))
        self._again()
        self._outputs.fetch(n)
        self._weights.fetch(n)
        _finish(self._device)
        return self._outputs.here[:n], self._weights.here[:n]

    def _work(self) -> None:
        scaled = (self._x.there - self._centre).mul_(self._factor).clamp_(-CLIP, CLIP)
        outputs, weights, _ = self._network.step(scaled, self._state, self._rows.there)
        self._outputs.there.copy_(outputs)
        self._weights.there.copy_(weights)


class _Mirrored:
    """A tensor on the device, and as an array its like on the host: page-locked, so copies do not wait."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        self.there = torch.zeros(shape, dtype=dtype, device=device)
        self._here = torch.zeros(shape, dtype=dtype, pin_memory=device.type == "cuda")
        self.here: NDArray[Any] = self._here.numpy()

    def send(self, n: int) -> None:
        self.there[:n].copy_(self._here[:n], non_blocking=True)

    def fetch(self, n: int) -> None:
        self._here[:n].copy_(self.there[:n], non_blocking=True)
