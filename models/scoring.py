"""Losses of single forecasts, in the units in which they are published; smaller is better."""

import numpy as np
from numpy.typing import NDArray

from models.targets import Target

Floats = NDArray[np.float64]


def loss(target: Target, value: Floats, label: Floats) -> Floats:
    """Loss of each forecast against its matured label; NaN where either is NaN.

    - volatility: QLIKE, r - log r - 1 with r = realised / forecast variance (Patton 2011,
      J. Econometrics 160): it ranks forecasts rightly whatever unbiased proxy of variance is used.
    - return: squared error.
    - direction: Brier score, of the probability of a rise against 1 for a rise and 0 otherwise.
    """
    if target.kind == "direction":
        label = np.where(np.isnan(label), np.nan, label == target.classes - 1)
    error = label - value
    if target.kind == "volatility":
        return np.asarray(np.exp(error) - error - 1.0)
    return np.asarray(error * error)
