"""Likelihoods in the units that people compare: bits per dimension, mean ± standard error."""

import math
from typing import TypeVar

import numpy as np

from jaxdiff.metrics._pairwise import Samples, vectors
from jaxdiff.typing import Array

__all__ = ["bits_per_dim", "mean_and_stderr"]

Nats = TypeVar("Nats", float, np.ndarray, Array)


def bits_per_dim(nll: Nats, dim: int, levels: int) -> Nats:
    """Bits that one coordinate costs, of data with `levels` values dequantised into [−1, 1].

        bits = nll / (D ln 2) + log₂(levels) − 1

    A level is a cell of width 2/levels, so the discrete probability that p stands for is at most
    P(cell) = E_u[p(x + u)] · (2/levels)^D, and with u uniform over the cell −log P ≤ −E_u[log p]
    − D log(2/levels): this is an upper bound on the cost of the discrete data. The uniform density
    on [−1, 1]^D costs exactly log₂(levels).

    Args:
        nll: −log p(x) of the dequantised data in nats, natural logarithm, any shape.
        dim: D, the number of coordinates of one example, ≥ 1.
        levels: the number of values that a coordinate takes, ≥ 2 (256 for 8-bit images).

    Returns:
        Bits per dimension, in nll's shape.

    Raises:
        ValueError: dim or levels is too small.

    References:
        Theis, van den Oord and Bethge 2016, arXiv 1511.01844, section 3.1.
    """
    if dim < 1:
        raise ValueError(f"dim must be >= 1, got {dim}")
    if levels < 2:
        raise ValueError(f"levels must be >= 2, got {levels}")
    return nll / (dim * math.log(2)) + (math.log2(levels) - 1)


def mean_and_stderr(values: Samples) -> tuple[float, float]:
    """The mean of independent values and the standard error of that mean.

        s / √n with s² = Σ (v − v̄)² / (n − 1)

    Args:
        values: [n], n ≥ 2, finite.

    Returns:
        (mean, standard error).

    Raises:
        ValueError: values is not [n] with n ≥ 2, or not finite.
    """
    if np.ndim(values) != 1 or len(values) < 2:
        raise ValueError(f"values must be [n] with n >= 2, got shape {np.shape(values)}")
    (rows,) = vectors(values=values)
    return float(rows.mean()), float(rows.std(ddof=1) / math.sqrt(len(rows)))
