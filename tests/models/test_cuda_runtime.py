"""Steps of fixed sizes say what plain steps say, and nothing is seen of what pads them.

Without a GPU a tape stands in for a CUDA graph: it does the recorded operations again, on the same
tensors, and no line of Python between them.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from models import runtimes
from models.features import F
from models.runtimes import Slots, open_runtime
from models.runtimes import cuda as cuda_module
from models.runtimes.cuda import SIZES, CudaRuntime, Record, Work, record_on
from models.runtimes.torch import TorchRuntime
from tests.models.networks import make_bundle, make_network, variations

FEW = (2, 4, 8)
"""Sizes that small batches exceed."""
ATOL = {"cpu": 1e-5, "cuda": 1e-4}
"""Not bit for bit: a product of more rows may be summed in another order, and state carries it on."""

on_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
DEVICES = ["cpu", pytest.param("cuda", marks=on_gpu)]

Floats = NDArray[np.float32]


class Tape(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The operations done under it, to be done again: static tensors are those that it did not make."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[tuple[Callable[..., Any], Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, made))
        return made

    @torch.inference_mode()
    def play(self) -> None:
        now: dict[int, Any] = {}

        def current(leaf: Any) -> Any:
            return now.get(id(leaf), leaf)

        for func, args, kwargs, made in self.calls:
            again = func(*tree_map(current, args), **tree_map(current, kwargs))
            now.update(zip(map(id, tree_leaves(made)), tree_leaves(again), strict=True))


@dataclass
class Recordings:
    """How often work ran in Python while it was recorded, and how often a recording was played."""

    recorded: int = 0
    ran: int = 0
    played: int = 0

    def on(self, device: torch.device) -> Record:
        record = record_on(device) if device.type == "cuda" else self._taped

        def counted(work: Work) -> Work:
            def run() -> None:
                self.ran += 1
                work()

            def again() -> None:
                self.played += 1
                play()

            self.recorded += 1
            play = record(run)
            return again

        return counted

    def _taped(self, work: Work) -> Work:
        tape = Tape()
        with tape:
            work()
        return tape.play


def make_fixed(device: str, capacity: int, **options: Any) -> CudaRuntime:
    return CudaRuntime(make_bundle(**options), capacity, device, FEW, Recordings().on)


def make_x(*shape: int, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).normal(1.0, 3.0, (*shape, F)).astype(np.float32)


def everything(runtime: TorchRuntime) -> dict[str, NDArray[Any]]:
    return runtime.export(np.arange(len(runtime.steps_seen)))


NETWORKS: list[dict[str, Any]] = [
    {},
    {"attention": "none", "cell": "gru", "layer_norm": True},
    {"attention": "additive", "lag_bias": "alibi", "window": 1},
]


@pytest.mark.parametrize("device", DEVICES)
class TestFixedSizes:
    @pytest.mark.parametrize("options", NETWORKS, ids=str)
    @settings(max_examples=20, deadline=None)
    @given(data=st.data())
    def test_whatever_happens_they_say_what_plain_steps_say(
        self, device: str, options: dict[str, Any], data: st.DataObject
    ) -> None:
        fixed = make_fixed(device, 3, **options)
        plain = TorchRuntime(fixed.bundle, 3)
        for seed in range(data.draw(st.integers(1, 12))):
            capacity = len(plain.steps_seen)
            order = data.draw(st.permutations(range(capacity)))
            slots = np.array(order[: data.draw(st.integers(0, capacity))], np.int64)
            match data.draw(st.sampled_from(["step", "step", "rebuild", "reset", "grow", "swap"])):
                case "step":
                    x = make_x(len(slots), seed=seed)
                    said, want = fixed.step(slots, x), plain.step(slots, x)
                    np.testing.assert_allclose(said.values, want.values, atol=ATOL[device])
                    np.testing.assert_allclose(said.weights, want.weights, atol=ATOL[device])
                case "rebuild":
                    lengths = np.array([data.draw(st.integers(0, 5)) for _ in slots], np.int64)
                    past = make_x(len(slots), 5, seed=seed)
                    past[np.arange(5) < 5 - lengths[:, None]] = np.nan
                    fixed.rebuild(slots, past, lengths)
                    plain.rebuild(slots, past, lengths)
                case "reset":
                    fixed.reset(slots)
                    plain.reset(slots)
                case "grow":
                    capacity += data.draw(st.integers(0, 9))
                    fixed.grow(capacity)
                    plain.grow(capacity)
                case "swap":
                    one, other = fixed.export(slots), plain.export(slots)
                    fixed.load(slots[::-1].copy(), other)
                    plain.load(slots[::-1].copy(), one)
            np.testing.assert_array_equal(fixed.steps_seen, plain.steps_seen)
            for part, array in everything(plain).items():
                found = everything(fixed)[part]
                np.testing.assert_allclose(found, array, atol=ATOL[device], err_msg=part)

    def test_slots_without_a_bar_stay_as_they_are_to_the_bit(self, device: str) -> None:
        runtime = make_fixed(device, 12)
        for n in (1, 2, 3, 5, 11):  # each size for the first time, recorded beside live state
            before = everything(runtime)
            runtime.step(np.arange(n), make_x(n, seed=n))
            for part, array in everything(runtime).items():
                np.testing.assert_array_equal(array[n:], before[part][n:])
            runtime.step(np.arange(12), make_x(12))

    def test_what_lies_in_the_scratch_row_is_never_seen(self, device: str) -> None:
        clean, soiled = make_fixed(device, 5), make_fixed(device, 5)
        for state in soiled._state.h, soiled._state.c:
            state[:, -1] = torch.nan
        for state in soiled._state.keys, soiled._state.values:
            state[-1] = torch.nan
        soiled._state.steps[-1] = 7
        for t, n in enumerate((1, 3, 5, 3)):
            x = make_x(n, seed=t)
            said, want = (r.step(np.arange(n), x) for r in (soiled, clean))
            np.testing.assert_array_equal(said.values, want.values)
            np.testing.assert_array_equal(said.weights, want.weights)
        for runtime in clean, soiled:
            runtime.grow(7)
        for part, array in everything(soiled).items():
            np.testing.assert_array_equal(array, everything(clean)[part])
            assert not array[5:].any()

    def test_a_large_batch_leaves_nothing_behind_for_a_small_one(self, device: str) -> None:
        used, new = make_fixed(device, 8), make_fixed(device, 8)
        used.step(np.arange(8), np.full((8, F), np.nan, np.float32))
        used.reset(np.arange(8))
        x = make_x(5)
        said, want = (r.step(np.arange(5), x) for r in (used, new))
        np.testing.assert_array_equal(said.values, want.values)
        np.testing.assert_array_equal(said.weights, want.weights)

    def test_a_size_is_recorded_once_and_from_then_on_played(self, device: str) -> None:
        recordings = Recordings()
        runtime = CudaRuntime(make_bundle(), 20, device, FEW, recordings.on)
        for n in (1, 2, 3, 8, 7, 4, 20, 0):
            runtime.step(np.arange(n), make_x(n))
        assert recordings == Recordings(recorded=3, ran=3, played=6 + 3)  # 20 = 8 + 8 + 4
        runtime.grow(20)
        runtime.rebuild(np.arange(2), make_x(2, 4), np.array([4, 4]))
        assert recordings == Recordings(recorded=3, ran=3, played=9 + 4)
        runtime.grow(21)
        runtime.step(np.array([20]), make_x(1))
        assert recordings == Recordings(recorded=4, ran=4, played=13 + 1)


@pytest.mark.skipif(torch.version.cuda is None, reason="torch was built without CUDA")
@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize("options", [v for v in variations() if v["mode"] == "carried"], ids=str)
def test_a_step_can_be_captured_as_it_never_leaves_the_device(options: dict[str, Any]) -> None:
    """On tensors without values: whoever needs one, or one of the host, raises or is seen."""
    with FakeTensorMode(), torch.device("cuda"):
        network = make_network(n_features=F, **options).requires_grad_(False)
        state = network.initial_state(9, "cuda")
        x, rows = torch.zeros(4, F), torch.zeros(4, dtype=torch.int64)
        with Tape() as tape:
            network.step(x, state, rows)
    tensors = [leaf for leaf in tree_leaves(tape.calls) if isinstance(leaf, torch.Tensor)]
    assert len(tensors) > 100
    assert {t.device.type for t in tensors} == {"cuda"}


def test_batches_of_any_length_have_a_size() -> None:
    assert list(SIZES) == sorted(set(SIZES))
    runtime = CudaRuntime(make_bundle(), 4_200, "cpu")
    said = runtime.step(np.arange(4_200), make_x(4_200))
    want = TorchRuntime(runtime.bundle, 4_200).step(np.arange(4_200), make_x(4_200))
    np.testing.assert_allclose(said.values, want.values, atol=ATOL["cpu"])
    assert set(runtime._steps) == {4_096, 256}


@pytest.mark.parametrize(("asked", "given_device"), [("auto", "cuda"), ("cuda:1", "cuda:1")])
def test_torch_on_a_gpu_takes_steps_of_fixed_sizes(
    asked: str, given_device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []

    def on_cpu(bundle: Any, device: str) -> CudaRuntime:
        opened.append(device)
        return CudaRuntime(bundle, device="cpu")

    bundle = make_bundle()
    monkeypatch.setattr(runtimes, "_is_cuda", lambda device: True)
    monkeypatch.setattr(cuda_module, "CudaRuntime", on_cpu)
    assert isinstance(open_runtime(bundle, "auto", asked), CudaRuntime)
    assert opened == [given_device]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
class TestGpu:
    def test_auto_takes_it_and_it_says_what_the_golden_file_says(self) -> None:
        runtime = open_runtime(make_bundle())
        assert isinstance(runtime, CudaRuntime)
        assert runtime._state.keys.is_cuda
        (step,) = runtime._steps.values()
        assert step._x._here.is_pinned()
        assert isinstance(getattr(step._again, "__self__", None), torch.cuda.CUDAGraph)

    def test_a_bundle_is_opened_in_a_thread_while_another_steps(self) -> None:
        live = CudaRuntime(make_bundle(), 300, "cuda")
        plain = TorchRuntime(live.bundle, 300)

        def open_others() -> None:
            for seed in range(1, 4):
                other = open_runtime(make_bundle(seed), "torch", "cuda")
                for capacity in (100, 2_000):
                    other.grow(capacity)
                    other.step(np.arange(capacity), make_x(capacity))

        def step(slots: Slots, seed: int) -> None:
            x = make_x(len(slots), seed=seed)
            said, want = live.step(slots, x), plain.step(slots, x)
            np.testing.assert_allclose(said.values, want.values, atol=ATOL["cuda"])

        with ThreadPoolExecutor(1) as thread:
            opening, seed = thread.submit(open_others), 0
            while not opening.done():
                step(np.arange(1 + 37 * seed % 300), seed)
                seed += 1
            opening.result()
