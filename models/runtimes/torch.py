"""A bundle on PyTorch, each operation as it is called: the reference runtime."""

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from models.bundle import Bundle, BundleRejected
from models.network import CausalNetwork, Network, State
from models.runtimes import Slots, Step, rebuild_steps
from models.window_network import build_network

Floats = NDArray[np.float32]


class TorchRuntime:
    spare_rows: ClassVar[int] = 0
    """Rows of the state behind the last slot, which `export`, `load` and `reset` never reach."""

    def __init__(self, bundle: Bundle, capacity: int = 0, device: str = "cpu") -> None:
        """Raises BundleRejected if the weights do not fit the network."""
        self.bundle = bundle
        network = load_network(bundle).to(device)
        assert isinstance(network, CausalNetwork)
        self.network = network
        self.steps_seen = np.zeros(0, np.int64)
        self._device = torch.device(device)
        self._state = self.network.initial_state(0)
        self.grow(capacity)

    def step(self, slots: Slots, x: Floats) -> Step:
        outputs, weights = self._advance(slots, x)
        self.steps_seen[slots] += 1
        return Step(*self.bundle.values(outputs), weights)

    def rebuild(self, slots: Slots, x: Floats, lengths: Slots) -> None:
        self.reset(slots)
        for row, runs in rebuild_steps(lengths, x.shape[1]):
            self._advance(slots[runs], x[runs, row])
        self.steps_seen[slots] = lengths

    def reset(self, slots: Slots) -> None:
        rows = torch.from_numpy(slots).to(self._device)
        state = self._state
        state.h[:, rows] = 0.0
        state.c[:, rows] = 0.0
        state.steps[rows] = 0  # hides what the ring holds
        self.steps_seen[slots] = 0

    def grow(self, capacity: int) -> None:
        old, slots = self._state, len(self.steps_seen)
        more = capacity - slots
        if more <= 0:
            return
        new = self.network.initial_state(more + self.spare_rows, self._device)
        self._state = State(
            h=torch.cat([old.h[:, :slots], new.h], 1),
            c=torch.cat([old.c[:, :slots], new.c], 1),
            keys=torch.cat([old.keys[:slots], new.keys]),
            values=torch.cat([old.values[:slots], new.values]),
            steps=torch.cat([old.steps[:slots], new.steps]),
        )
        self.steps_seen = np.concatenate([self.steps_seen, np.zeros(more, np.int64)])

    def export(self, slots: Slots) -> dict[str, NDArray[Any]]:
        rows = torch.from_numpy(slots).to(self._device)
        state = self._state
        return {
            "h": state.h[:, rows].transpose(0, 1).numpy(force=True),
            "c": state.c[:, rows].transpose(0, 1).numpy(force=True),
            "keys": state.keys[rows].numpy(force=True),
            "values": state.values[rows].numpy(force=True),
            "steps": state.steps[rows].numpy(force=True),
        }

    def load(self, slots: Slots, state: Mapping[str, NDArray[Any]]) -> None:
        rows = torch.from_numpy(slots).to(self._device)
        mine = self._state
        saved = {name: torch.tensor(array, device=self._device) for name, array in state.items()}
        mine.h[:, rows] = saved["h"].transpose(0, 1)
        mine.c[:, rows] = saved["c"].transpose(0, 1)
        mine.keys[rows] = saved["keys"]
        mine.values[rows] = saved["values"]
        mine.steps[rows] = saved["steps"]
        self.steps_seen[slots] = state["steps"]

    def _advance(self, slots: Slots, x: Floats) -> tuple[Floats, Floats]:
        """From x f32[n, F] unscaled: outputs f32[n, O], weights f32[n, T] by lag."""
        scaled = torch.from_numpy(self.bundle.scaler.transform(x)).to(self._device)
        outputs, weights, _ = self.network.step(scaled, self._state, self._rows(slots))
        return outputs.numpy(force=True), weights.numpy(force=True)

    def _rows(self, slots: Slots) -> slice | torch.Tensor:
        """A slice where the slots are a run, which spares the copies of a gather."""
        if len(slots) and slots[-1] - slots[0] == len(slots) - 1 and (np.diff(slots) == 1).all():
            return slice(int(slots[0]), int(slots[-1]) + 1)
        return torch.from_numpy(slots).to(self._device)


def load_network(bundle: Bundle) -> Network:
    """The bundle's network with its weights, ready to run. Raises BundleRejected if they do not fit."""
    network = build_network(bundle.config.sequence)
    try:
        network.load_state_dict({name: torch.tensor(a) for name, a in bundle.weights.items()})
    except RuntimeError as error:
        raise BundleRejected(f"{bundle.version}: weights do not fit: {error}") from error
    return network.eval().requires_grad_(False)


def weights_of(network: Network) -> dict[str, NDArray[Any]]:
    return {name: t.numpy(force=True).copy() for name, t in network.state_dict().items()}
