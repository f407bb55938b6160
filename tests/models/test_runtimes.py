"""Every runtime under one contract: the numbers of the reference network, and a state by slot."""

import logging
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from models import runtimes
from models.bundle import Bundle, BundleRejected, ModelConfig
from models.features import F
from models.network_config import NetworkConfig
from models.runtimes import (
    IN_BFLOAT16,
    RUNTIMES,
    TOLERANCE,
    Runtime,
    RuntimeUnavailable,
    Slots,
    Step,
    open_runtime,
    products,
    runtimes_of,
    set_threads,
    with_golden,
)
from models.runtimes.cuda import CudaRuntime
from models.runtimes.numba import NumbaRuntime
from models.runtimes.products import has_bfloat16
from models.runtimes.torch import TorchRuntime, load_network
from models.tabular import TabularConfig, outputs_of
from tests.models.networks import (
    DIRECTION_3,
    RETURN,
    VOLATILITY,
    make_bundle,
    make_tabular_bundle,
    variations,
)

ATOL = TOLERANCE["float32"] if torch.cuda.is_available() else 1e-5
"""A GPU has sums and exponentials of its own."""
FIXED, CUDA = "fixed", "cuda"
"""What torch does on a GPU: on the CPU, where only graphs are missing, and on one."""
ABSENT = {
    name: f"{library} is not installed"
    for name, library in RUNTIMES.items()
    if not find_spec(library)
}
if not torch.cuda.is_available():
    ABSENT[CUDA] = "no CUDA device"

Floats = NDArray[np.float32]


Case = tuple[str, str]
"""A runtime and what it runs."""
RUNS: dict[str, NetworkConfig | TabularConfig] = {
    "carried": NetworkConfig(n_features=F, n_outputs=1),
    "window": NetworkConfig(n_features=F, n_outputs=1, mode="window"),
    "tabular": TabularConfig(n_features=F, outputs=(1,)),
}
CASES: list[Case] = [(name, what) for what, run in RUNS.items() for name in runtimes_of(run)]
CASES += [(FIXED, "carried"), (CUDA, "carried")]

OPTIONS: dict[str, list[dict[str, Any]]] = {
    "carried": [
        {},
        {"attention": "none", "cell": "gru"},
        {"window": 1},
        {"window": 12, "layers": 1},
        {"attention": "additive", "lag_bias": "alibi", "layers": 3},
        {"lag_bias": "none", "layer_norm": True},
        {"skip": False, "gate": False, "heads": 4},
    ],
    "window": [
        {k: v for k, v in o.items() if k != "mode"} for o in variations() if "window" in o.values()
    ],
    "tabular": [{}, {"hidden": []}, {"window": 1, "hidden": [4, 3]}],
}


def make_any_bundle(what: str, **options: Any) -> Bundle:
    if what == "tabular":
        return make_tabular_bundle(**options)
    return make_bundle(**{"mode": what, **options})


def make_runtime(case: Case, capacity: int = 0, **options: Any) -> Runtime:
    name, what = case
    runtime = opened(make_any_bundle(what, **options), name)
    runtime.grow(max(capacity, len(runtime.steps_seen)))
    return runtime


def make_x(*shape: int, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).normal(1.0, 3.0, (*shape, F)).astype(np.float32)


def opened(bundle: Bundle, name: str) -> Runtime:
    if name in ABSENT:
        pytest.skip(ABSENT[name])
    if name == CUDA:
        return open_runtime(bundle, "torch", "cuda")
    if name != FIXED:
        return open_runtime(bundle, name, "cpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtimes, "_open", lambda bundle, *_: CudaRuntime(bundle, device="cpu"))
        return open_runtime(bundle, "torch", "cpu")


def forecast(bundle: Bundle, x: Floats) -> tuple[NDArray[np.float64], Floats]:
    """What the model says to x[n, L, F] in one chunk from zero state."""
    scaled = bundle.scaler.transform(x)
    n, L, T = *x.shape[:2], bundle.config.window
    if isinstance(bundle.config.network, TabularConfig):
        padded = np.pad(scaled, ((0, 0), (T - 1, 0), (0, 0)))
        windows = np.stack([padded[:, t : t + T] for t in range(L)], 1).reshape(n * L, T, F)
        outputs = outputs_of(bundle.config.network, bundle.weights, windows)
        weights = np.zeros((n, L, T), np.float32)
    else:
        with torch.inference_mode():
            said, by_lag, _ = load_network(bundle)(torch.from_numpy(scaled), need_weights=True)
        outputs, weights = said.flatten(0, 1).numpy(), by_lag.numpy()
    return bundle.values(outputs)[0].reshape(n, L, -1), weights


def marked(case: Case) -> Any:
    return pytest.param(case, marks=[pytest.mark.gpu] if case[0] == CUDA else [], id="-".join(case))


@pytest.mark.parametrize("case", [marked(case) for case in CASES])
class TestEveryRuntime:
    def test_it_says_what_the_model_says_to_the_whole_chunk(self, case: Case) -> None:
        for options in OPTIONS[case[1]]:
            runtime = make_runtime(case, 5, **options)
            x = make_x(5, 10)
            values, weights = forecast(runtime.bundle, x)
            for t in range(10):
                step = runtime.step(np.arange(5), x[:, t])
                np.testing.assert_allclose(step.values, values[:, t], atol=ATOL, rtol=ATOL)
                np.testing.assert_allclose(step.weights, weights[:, t], atol=ATOL)

    def test_probabilities_come_with_directions(self, case: Case) -> None:
        runtime = make_runtime(case, 4, targets=(VOLATILITY, DIRECTION_3, RETURN))
        step = runtime.step(np.arange(4), make_x(4))
        assert step.probabilities.keys() == {1}
        assert step.probabilities[1].shape == (4, 3)
        np.testing.assert_array_equal(step.probabilities[1][:, 2], step.values[:, 1])

    @settings(max_examples=25, deadline=None)
    @given(data=st.data())
    def test_any_mixture_of_slots_gives_each_its_own_numbers(
        self, case: Case, data: st.DataObject
    ) -> None:
        runtime = _RUNTIMES.get(case) or _RUNTIMES.setdefault(case, make_runtime(case, 7))
        runtime.reset(np.arange(7))
        x = make_x(7, 12)
        values, weights = forecast(runtime.bundle, x)
        at = np.zeros(7, np.int64)
        for _ in range(12):
            slots = np.array(
                data.draw(st.lists(st.integers(0, 6), min_size=1, max_size=7, unique=True))
            )
            step = runtime.step(slots, x[slots, at[slots]])
            np.testing.assert_allclose(step.values, values[slots, at[slots]], atol=ATOL, rtol=ATOL)
            np.testing.assert_allclose(step.weights, weights[slots, at[slots]], atol=ATOL)
            at[slots] += 1
            np.testing.assert_array_equal(runtime.steps_seen[:7], at)

    def test_it_leaves_its_inputs_alone(self, case: Case) -> None:
        runtime = make_runtime(case, 3)
        slots, x = np.array([2, 0]), make_x(2)
        before = slots.copy(), x.copy()
        runtime.step(slots, x)
        runtime.rebuild(slots, np.stack([x, x], 1), np.array([2, 1]))
        runtime.export(slots)
        assert np.array_equal(slots, before[0])
        assert np.array_equal(x, before[1])

    def test_what_it_said_stays_said(self, case: Case) -> None:
        runtime = make_runtime(case, 3)
        first = runtime.step(np.arange(3), make_x(3))
        values, weights = first.values.copy(), first.weights.copy()
        runtime.step(np.arange(3), make_x(3, seed=1))
        assert np.array_equal(first.values, values)
        assert np.array_equal(first.weights, weights)

    def test_a_rebuilt_slot_goes_on_as_one_that_ran_all_along(self, case: Case) -> None:
        runtime = make_runtime(case, 6)
        x = make_x(3, 9)
        past, lengths = x[:, :8].copy(), np.array([8, 3, 0])
        for i, length in enumerate(lengths):
            past[i, : 8 - length] = np.nan
            for t in range(8 - length, 8):
                runtime.step(np.array([i]), x[i : i + 1, t])
        runtime.step(np.array([5, 3]), make_x(2, seed=3))
        runtime.rebuild(np.array([5, 3, 4]), past, lengths)
        np.testing.assert_array_equal(runtime.steps_seen[[5, 3, 4]], lengths)
        ran = runtime.step(np.arange(3), x[:, 8])
        rebuilt = runtime.step(np.array([5, 3, 4]), x[:, 8])
        np.testing.assert_allclose(rebuilt.values, ran.values, atol=ATOL)
        np.testing.assert_allclose(rebuilt.weights, ran.weights, atol=ATOL)

    def test_a_reset_slot_starts_anew_and_others_go_on(self, case: Case) -> None:
        runtime = make_runtime(case, 3)
        x = make_x(3, 6)
        for t in range(6):
            runtime.step(np.arange(3), x[:, t])
        untouched = runtime.export(np.array([0, 2]))
        runtime.reset(np.array([1]))
        assert runtime.steps_seen.tolist() == [6, 0, 6]
        said = runtime.step(np.array([1]), x[1:2, 0])
        values, weights = forecast(runtime.bundle, x[1:2])
        np.testing.assert_allclose(said.values, values[:, 0], atol=ATOL, rtol=ATOL)
        np.testing.assert_allclose(said.weights, weights[:, 0], atol=ATOL)
        for part, array in runtime.export(np.array([0, 2])).items():
            np.testing.assert_array_equal(array, untouched[part])

    def test_growing_keeps_what_is_there(self, case: Case) -> None:
        small, large = make_runtime(case, 4), make_runtime(case, 9)
        x = make_x(4, 6)
        for t in range(6):
            said, want = (r.step(np.arange(4), x[:, t]) for r in (small, large))
            np.testing.assert_allclose(said.values, want.values, atol=ATOL)
            small.grow(len(small.steps_seen) + t)
        assert not small.steps_seen[4:].any()

    def test_exported_state_goes_on_in_another_slot_of_another_process(self, case: Case) -> None:
        one, other = make_runtime(case, 4), make_runtime(case, 8)
        x = make_x(3, 7)
        for t in range(6):
            one.step(np.array([3, 0, 1]), x[:, t])
        other.step(np.arange(8), make_x(8, seed=2))
        state = one.export(np.array([3, 0, 1]))
        kept = {part: array.copy() for part, array in state.items()}
        said = one.step(np.array([3, 0, 1]), x[:, 6])
        for part, array in state.items():
            np.testing.assert_array_equal(array, kept[part])
        other.load(np.array([6, 2, 7]), state)
        assert other.steps_seen[[6, 2, 7]].tolist() == [6, 6, 6]
        again = other.step(np.array([6, 2, 7]), x[:, 6])
        np.testing.assert_allclose(again.values, said.values, atol=ATOL)
        np.testing.assert_allclose(again.weights, said.weights, atol=ATOL)

    def test_exported_state_goes_on_in_any_other_runtime(self, case: Case) -> None:
        x = make_x(3, 7)
        for options in OPTIONS[case[1]][:2]:
            one = make_runtime(case, 3, **options)
            for t in range(6):
                one.step(np.arange(3), x[:, t])
            state = one.export(np.arange(3))
            said = one.step(np.arange(3), x[:, 6])
            for another in CASES:
                if another[1] != case[1] or another[0] in ABSENT:
                    continue
                other = make_runtime(another, 3, **options)
                other.load(np.arange(3), state)
                again = other.step(np.arange(3), x[:, 6])
                np.testing.assert_allclose(again.values, said.values, atol=ATOL)
                np.testing.assert_allclose(again.weights, said.weights, atol=ATOL)

    def test_no_slots_is_no_work(self, case: Case) -> None:
        runtime = make_runtime(case, 2)
        none = np.zeros(0, np.int64)
        step = runtime.step(none, make_x(0))
        assert step.values.shape == (0, 2)
        assert step.weights.shape == (0, 4)
        runtime.rebuild(none, make_x(0, 5), none)
        runtime.reset(none)
        runtime.load(none, runtime.export(none))

    def test_it_is_opened_only_if_it_says_what_the_golden_file_says(self, case: Case) -> None:
        name, what = case
        bundle = make_any_bundle(what)
        for part in ("values", "weights"):
            other = {**bundle.golden, part: bundle.golden[part] + 0.01}
            with pytest.raises(BundleRejected, match="golden"):
                opened(bundle.with_golden(other), name)
        for golden in ({}, {**bundle.golden, "x": bundle.golden["x"][..., :-1]}):
            with pytest.raises(BundleRejected, match="golden"):
                opened(bundle.with_golden(golden), name)

    def test_weights_that_do_not_fit_are_refused(self, case: Case) -> None:
        name, what = case
        bundle = make_any_bundle(what)
        first = next(iter(bundle.weights))
        for weights in (
            {k: a for k, a in bundle.weights.items() if k != first},
            {**bundle.weights, first: np.zeros(3, np.float32)},
        ):
            with pytest.raises(BundleRejected, match="fit"):
                opened(replace(bundle, weights=weights), name)

    def test_a_slot_that_was_checked_is_not_left_warm(self, case: Case) -> None:
        runtime = opened(make_any_bundle(case[1]), case[0])
        assert not runtime.steps_seen.any()


_RUNTIMES: dict[Case, Runtime] = {}


def test_an_unknown_runtime_is_an_error_that_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="torch"):
        open_runtime(make_bundle(), "abacus")


def test_what_a_runtime_cannot_run_is_an_error_that_names_those_that_can() -> None:
    for what, run in RUNS.items():
        bundle = make_any_bundle(what)
        for name in set(RUNTIMES) - set(runtimes_of(run)):
            with pytest.raises(BundleRejected, match=f"cannot run .* take {runtimes_of(run)[0]}"):
                open_runtime(bundle, name, "cpu")


def test_every_family_has_a_runtime_that_a_test_runs() -> None:
    """Here, but for the ensemble: tests/models/test_ensemble.py."""
    families = {run.family for run in RUNS.values()} | {"ensemble"}
    union = get_args(get_args(ModelConfig)[0])
    assert families == {get_args(kind.model_fields["family"].annotation)[0] for kind in union}


def test_golden_values_come_from_zero_state() -> None:
    bundle = make_bundle()
    again = with_golden(bundle, bundle.golden["x"])
    assert again.version == bundle.version


class TestBfloat16:
    """Only the numba runtime has it, and only on CPUs that do."""

    @pytest.fixture(autouse=True)
    def _skip_without(self) -> None:
        if not has_bfloat16():
            pytest.skip("this CPU has no instructions for bfloat16")

    def test_it_says_nearly_what_the_model_says(self) -> None:
        for options in OPTIONS["carried"]:
            runtime = open_runtime(make_bundle(**options), "auto", "cpu", "bfloat16")
            runtime.grow(5)
            x = make_x(5, 10)
            values, weights = forecast(runtime.bundle, x)
            said = [runtime.step(np.arange(5), x[:, t]) for t in range(10)]
            difference = np.abs(np.stack([step.values for step in said], 1) - values)
            assert 1e-6 < difference.max() < 2e-2
            by_lag = np.stack([step.weights for step in said], 1)
            np.testing.assert_allclose(by_lag, weights, atol=5e-3)

    @settings(max_examples=10, deadline=None)
    @given(data=st.data())
    def test_what_a_row_says_does_not_depend_on_the_rows_beside_it(
        self, data: st.DataObject
    ) -> None:
        x = make_x(400, 3)
        bundle = make_bundle(hidden=64, attention_size=32, window=12)
        whole, cut = (NumbaRuntime(bundle, 400, precision="bfloat16") for _ in range(2))
        for t in range(3):
            values = whole.step(np.arange(400), x[:, t]).values
            order = data.draw(st.permutations(range(400)))
            cuts = data.draw(st.lists(st.integers(0, 400), max_size=9))
            for slots in np.split(np.array(order), sorted(cuts)):
                said = cut.step(slots, x[slots, t]).values
                np.testing.assert_allclose(said, values[slots], atol=1e-6)  # the head is float32
        kept, again = (runtime.export(np.arange(400)) for runtime in (whole, cut))
        for part, array in kept.items():
            np.testing.assert_array_equal(again[part], array)

    def test_its_state_goes_on_in_float32(self) -> None:
        bundle = make_bundle()
        half = NumbaRuntime(bundle, 3, precision="bfloat16")
        whole = NumbaRuntime(bundle, 3)
        x = make_x(3, 7)
        for t in range(6):
            half.step(np.arange(3), x[:, t])
        whole.load(np.arange(3), half.export(np.arange(3)))
        said, again = (r.step(np.arange(3), x[:, 6]) for r in (half, whole))
        np.testing.assert_allclose(again.values, said.values, atol=2e-2)

    def test_a_runtime_without_it_refuses(self) -> None:
        for name, what in CASES:
            if name in set(RUNTIMES) - {*IN_BFLOAT16, *ABSENT}:
                with pytest.raises(BundleRejected, match="no precision but float32"):
                    open_runtime(make_any_bundle(what), name, "cpu", "bfloat16")
        with pytest.raises(BundleRejected, match="no precision but float32"):
            open_runtime(make_tabular_bundle(), "auto", "cpu", "bfloat16")

    def test_golden_values_are_held_to_a_wider_tolerance_and_still_held_to_it(self) -> None:
        bundle = make_bundle()
        other = {**bundle.golden, "values": bundle.golden["values"] + 0.1}
        with pytest.raises(BundleRejected, match="golden"):
            open_runtime(bundle.with_golden(other), "auto", "cpu", "bfloat16")


def test_a_cpu_without_bfloat16_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = tmp_path / "cpuinfo"
    assert not has_bfloat16(cpu)
    for flags, has in (
        ("avx512f avx512_vnni", False),
        ("avx512f avx512_bf16", True),
        ("bf16", True),
    ):
        cpu.write_text(f"flags : {flags} end")
        assert has_bfloat16(cpu) is has
    monkeypatch.setattr(products, "has_bfloat16", lambda: False)
    with pytest.raises(ValueError, match="take precision float32"):
        open_runtime(make_bundle(), "auto", "cpu", "bfloat16")


def test_threads_are_set_in_torch_too_once_it_is_loaded() -> None:
    torch.set_num_threads(2)
    set_threads(1)
    assert torch.get_num_threads() == 1


class TestAuto:
    @pytest.mark.skipif(sys.platform != "linux", reason="elsewhere torch is always asked")
    def test_torch_is_asked_for_a_gpu_only_where_a_device_file_says_that_there_may_be_one(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        for device, first in (("/dev/null", "torch"), ("/dev/nowhere", "numba")):
            monkeypatch.setattr(runtimes, "GPU_DEVICES", (device,))
            assert runtimes._by_speed(("torch", "numba"), "auto")[0] == first

    def test_a_log_line_names_who_runs_a_bundle(self, caplog: pytest.LogCaptureFixture) -> None:
        bundle = make_bundle()
        with caplog.at_level(logging.INFO, "models.runtimes"):
            open_runtime(bundle, "auto", "cpu")
        assert [record.fields for record in caplog.records] == [  # type: ignore[attr-defined]
            {"bundle": bundle.version, "runtime": "numba"}
        ]

    def test_a_runtime_that_says_something_else_is_passed_over_with_a_warning(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        bundle = make_bundle()
        right = NumbaRuntime.step

        def wrong(self: NumbaRuntime, slots: Slots, x: Floats) -> Step:
            step = right(self, slots, x)
            return step._replace(values=step.values + 0.1)

        monkeypatch.setattr(NumbaRuntime, "step", wrong)
        with caplog.at_level(logging.INFO, "models.runtimes"):
            runtime = open_runtime(bundle, "auto", "cpu")
        assert isinstance(runtime, TorchRuntime)
        assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]
        assert "golden" in caplog.records[0].fields["error"]  # type: ignore[attr-defined]
        with pytest.raises(BundleRejected, match="golden"):
            open_runtime(bundle, "numba", "cpu")

    def test_a_library_that_is_absent_is_named_with_the_runtimes_that_are_there(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def absent(*_: object) -> None:
            raise ModuleNotFoundError(name="onnxruntime")

        bundle = make_bundle()
        monkeypatch.setattr(runtimes, "_open", absent)
        with pytest.raises(RuntimeUnavailable, match=r"onnxruntime.*take torch or numba"):
            open_runtime(bundle, "onnx", "cpu")

    def test_a_bundle_that_the_reference_contradicts_is_refused(self) -> None:
        bundle = make_bundle()
        golden = {**bundle.golden, "values": bundle.golden["values"] + 0.1}
        with pytest.raises(BundleRejected, match="golden"):
            open_runtime(bundle.with_golden(golden), "auto", "cpu")
