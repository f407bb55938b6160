"""A network of window mode on PyTorch, on the CPU or a CUDA device."""

import torch

from models.bundle import Bundle
from models.runtimes.torch import load_network
from models.runtimes.window import Bools, Floats, WindowRuntime
from models.window_network import WindowNetwork


class TorchWindowRuntime(WindowRuntime):
    def __init__(self, bundle: Bundle, device: str = "cpu") -> None:
        """Raises BundleRejected if the weights do not fit the network."""
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        network = load_network(bundle).to(device)
        assert isinstance(network, WindowNetwork)
        self.network = network
        super().__init__(bundle, self._said)

    @torch.inference_mode()
    def _said(self, x: Floats, seen: Bools) -> tuple[Floats, Floats]:
        device = self.network.head.weight.device
        x_there, seen_there = torch.from_numpy(x).to(device), torch.from_numpy(seen).to(device)
        outputs, weights = self.network.windowed(x_there, seen_there, need_weights=True)
        assert weights is not None
        return outputs.numpy(force=True), weights.numpy(force=True)
