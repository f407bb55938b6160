"""How far recent inputs are from those that a bundle was made of: PSI, KS, a distance of hidden states.

They say where to look, and nothing about losses: a calm week is always far from two years, and a
forecaster may be right on inputs that it has never seen. So nothing here has a threshold or a false-
alarm rate, and nothing is raised by it; tests/benchmarks/quality-loop.md has what is usual. Rows of
neighbouring bars are alike: there are no p-values.

Shapes: n rows, F features, Q quantiles, H hidden size.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Floats32 = NDArray[np.float32]

QUANTILES: Final = np.arange(1, 100) / 100
"""Of each feature. KS looks at all of them, and so misses at most a hundredth."""
DECILES: Final = slice(9, None, 10)
"""Those that bound the ten bins of the PSI."""
LEAST_SHARE: Final = 1e-3
"""An empty bin counts as so much: the PSI would be infinite."""
LEAST_SPREAD: Final = 1e-12

_TABLES, _GAUSSIAN = ("edges", "below", "upto"), ("hidden_mean", "hidden_covariance")


class Gaussian(NamedTuple):
    mean: Floats32
    """[H]"""
    covariance: Floats32
    """[H, H]"""


@dataclass(frozen=True, eq=False)
class InputReference:
    """What features and hidden states looked like when a bundle was made; float32 throughout."""

    edges: Floats32
    """[F, Q] quantiles"""
    below: Floats32
    """[F, Q] share of the rows below each"""
    upto: Floats32
    """[F, Q] share of the rows below or at each"""
    hidden: Gaussian | None = None

    @classmethod
    def fit(cls, x: NDArray[np.floating[Any]], hidden: NDArray[Any] | None = None) -> Self:
        """Of features x [n, F], and hidden states [m, H] where the network has any.

        Raises ValueError where there are no rows, or one is not finite.
        """
        rows = _finite(x)
        edges = np.ascontiguousarray(np.quantile(rows, QUANTILES, axis=0, method="inverted_cdf").T)
        below, upto = _shares(rows, edges)
        return cls(
            edges,
            below.astype(np.float32),
            upto.astype(np.float32),
            None if hidden is None else gaussian(hidden),
        )

    def arrays(self) -> dict[str, Floats32]:
        tables = dict(zip(_TABLES, (self.edges, self.below, self.upto), strict=True))
        return tables | dict(zip(_GAUSSIAN, self.hidden or (), strict=False))

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]], n_features: int) -> Self:
        """Raises ValueError for anything that `arrays` would not have given."""
        if set(arrays) not in ({*_TABLES}, {*_TABLES, *_GAUSSIAN}):
            raise ValueError("no reference of inputs")
        tables = [arrays[name] for name in _TABLES]
        if any(table.shape != (n_features, len(QUANTILES)) for table in tables):
            raise ValueError("a reference of other features")
        edges, below, upto = tables
        if _GAUSSIAN[0] not in arrays:
            return cls(edges, below, upto)
        hidden = Gaussian(*(arrays[name] for name in _GAUSSIAN))
        if hidden.mean.ndim != 1 or hidden.covariance.shape != hidden.mean.shape * 2:
            raise ValueError("a mean and a covariance that do not fit together")
        return cls(edges, below, upto, hidden)


class InputDrift(NamedTuple):
    psi: Floats
    """[F]"""
    ks: Floats
    """[F]"""
    embedding: float | None
    """Distance of the hidden states; None where the network has none."""


def measure(
    reference: InputReference, x: NDArray[np.floating[Any]], hidden: NDArray[Any] | None = None
) -> InputDrift:
    """Of recent features x [n, F] and hidden states [m, H].

    Raises ValueError where there are no rows, or one is not finite.
    """
    below, upto = _shares(_finite(x), reference.edges)
    off = np.maximum(np.abs(below - reference.below), np.abs(upto - reference.upto))
    embedding = None
    if reference.hidden is not None and hidden is not None:
        embedding = frechet(reference.hidden, gaussian(hidden))
    return InputDrift(
        psi=psi(reference.upto[:, DECILES], upto[:, DECILES]),
        ks=np.asarray(off.max(axis=1)),
        embedding=embedding,
    )


def psi(reference: NDArray[Any], recent: NDArray[Any]) -> Floats:
    """Population stability index of each feature, from shares up to the edges of its bins [F, Q].

    The divergence of Jeffreys 1946, by bins (Siddiqi 2006, Credit Risk Scorecards): customarily
    0.1 is a little and 0.25 much, of rows that do not depend on each other.
    """
    p, q = (
        np.maximum(np.diff(shares.astype(np.float64), prepend=0.0, append=1.0), LEAST_SHARE)
        for shares in (reference, recent)
    )
    return np.asarray(np.sum((q - p) * np.log(q / p), axis=1))


def frechet(reference: Gaussian, recent: Gaussian) -> float:
    """Distance of two Gaussians in units of the reference's spread, the root of its trace.

    Dowson & Landau 1982, J. Multivariate Anal. 12; of embeddings: Heusel et al. 2017, NeurIPS. A
    shift of the mean by one spread is 1, and a twice as wide distribution is 1.
    """
    first, second = (g.covariance.astype(np.float64) for g in (reference, recent))
    shift = recent.mean.astype(np.float64) - reference.mean
    root = _root(first)
    between = np.linalg.eigvalsh(root @ second @ root)
    # The trace of the product's root: that of a symmetric matrix with the same eigenvalues.
    cross = np.sqrt(np.maximum(between, 0.0)).sum()
    squared = shift @ shift + np.trace(first) + np.trace(second) - 2 * cross
    return float(np.sqrt(max(squared, 0.0) / max(np.trace(first), LEAST_SPREAD)))


def gaussian(hidden: NDArray[Any]) -> Gaussian:
    """Raises ValueError for fewer than two rows, or if one is not finite."""
    rows = _finite(hidden).astype(np.float64)
    if len(rows) < 2:
        raise ValueError("one hidden state has no covariance")
    covariance = np.atleast_2d(np.cov(rows, rowvar=False))
    return Gaussian(rows.mean(axis=0).astype(np.float32), covariance.astype(np.float32))


def worst(values: Floats, names: Sequence[str], n: int) -> dict[str, float]:
    """The n largest by name, the largest first."""
    order = np.argsort(-values, kind="stable")[:n]
    return {names[i]: float(values[i]) for i in order.tolist()}


def _shares(rows: Floats32, edges: Floats32) -> tuple[Floats, Floats]:
    """Shares f64[F, Q] of rows [n, F] below, and below or at, each edge [F, Q].

    Their largest difference from those of other rows is the two-sample statistic of Kolmogorov
    (1933) and Smirnov (1939) at these edges, its left limits included.
    """
    ordered = np.sort(rows, axis=0).T
    sides = [
        [np.searchsorted(own, at, side) for own, at in zip(ordered, edges, strict=True)]
        for side in ("left", "right")
    ]
    below, upto = np.array(sides) / len(rows)
    return below, upto


def _root(covariance: Floats) -> Floats:
    values, vectors = np.linalg.eigh(covariance)
    return np.asarray((vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T)


def _finite(rows: NDArray[Any]) -> Floats32:
    rows = np.asarray(rows, np.float32)
    if not len(rows) or not np.isfinite(rows).all():
        raise ValueError("inputs to compare must be rows of finite numbers")
    return rows
