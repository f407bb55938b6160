"""A bundle that scikit-learn trained, on numpy alone: needs neither torch nor scikit-learn."""

import numpy as np

from models.bundle import Bundle, BundleRejected
from models.runtimes.window import Bools, Floats, WindowRuntime
from models.tabular import TabularConfig, outputs_of


class SklearnRuntime(WindowRuntime):
    def __init__(self, bundle: Bundle, device: str = "cpu") -> None:
        """Raises BundleRejected if the weights do not fit, ValueError for a device it has not."""
        if device not in ("auto", "cpu"):
            raise ValueError(f"the sklearn runtime has no device {device!r}")
        config = bundle.config.network
        if not isinstance(config, TabularConfig) or not config.takes(bundle.weights):
            raise BundleRejected(f"{bundle.version}: weights do not fit the estimators")

        def model(x: Floats, seen: Bools) -> tuple[Floats, Floats]:
            return outputs_of(config, bundle.weights, x), np.zeros(seen.shape, np.float32)

        super().__init__(bundle, model)
