"""Rows times a weight: in float32 by NumPy, or in bfloat16 by torch where the CPU has instructions for it."""

from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Precision = Literal["float32", "bfloat16"]

BFLOAT16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}
"""One of them is among the flags in /proc/cpuinfo where a CPU multiplies bfloat16; the last is Arm's."""


class Product(Protocol):
    width: int

    def __call__(self, x: Floats, out: Floats) -> None:
        """Rows x f32[n, K] times the weight, into out f32[n, width]."""


class _Float32:
    def __init__(self, weight: Floats) -> None:
        self.width = weight.shape[1]
        self._weight = weight

    def __call__(self, x: Floats, out: Floats) -> None:
        np.dot(x, self._weight, out=out)


class _Bfloat16:
    """Factors and results are rounded to 8 bits, sums are float32's.

    A row's result must not depend on the rows beside it: one bit of a sum may be 0.4 % of what it is rounded to.
    """

    def __init__(self, weight: Floats) -> None:
        import torch

        self.width = weight.shape[1]
        self._weight = torch.from_numpy(weight).bfloat16()
        self._rows = torch.empty(0, len(weight), dtype=torch.bfloat16)
        self._said = torch.empty(0, self.width, dtype=torch.bfloat16)
        self._multiply, self._of = torch.mm, torch.from_numpy

    def __call__(self, x: Floats, out: Floats) -> None:
        n = len(x)
        if n > len(self._rows):
            self._rows, self._said = (t.new_empty(n, t.shape[1]) for t in (self._rows, self._said))
        rows, said = self._rows[:n], self._said[:n]
        rows.copy_(self._of(x))
        self._multiply(rows, self._weight, out=said)
        self._of(out).copy_(said)


def product_by(weight: Floats, precision: Precision) -> Product:
    """Of a weight f32[K, width]. Raises ValueError where the CPU multiplies no bfloat16."""
    if precision == "float32":
        return _Float32(weight)
    if not has_bfloat16():
        raise ValueError("this CPU multiplies no bfloat16 (avx512_bf16): take precision float32")
    return _Bfloat16(weight)


def has_bfloat16(cpu: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the CPU has instructions for it; to do without them is slower than float32."""
    return cpu.exists() and not BFLOAT16_FLAGS.isdisjoint(cpu.read_text().split())
