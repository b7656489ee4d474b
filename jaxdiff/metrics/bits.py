"""Likelihoods in the units that people compare: bits per dimension, mean ± standard error."""

import math
from typing import TypeVar

import numpy as np

from jaxdiff.metrics._pairwise import Samples, vectors
from jaxdiff.typing import Array

__all__ = ["bits_per_dim", "mean_and_stderr"]

Nats = TypeVar("Nats", float, np.ndarray, Array)


def bits_per_dim(nll: Nats, dim: int, levels: int, span: float = 2.0) -> Nats:
    """Bits that one coordinate costs, of data with `levels` values dequantised into an interval.

        bits = nll / (D ln 2) + log₂(levels) − log₂(span)

    A level is a cell of width span/levels, so the discrete probability that p stands for is
    P(cell) = E_u[p(x + u)] · (span/levels)^D, and with u uniform over the cell −log P ≤ −E_u[log p]
    − D log(span/levels): this is an upper bound on the cost of the discrete data. With u drawn from
    a q(u | x) on the cell, E_q[log p(x + u) − log q(u | x)] takes the place of the mean log p. The
    uniform density on the interval costs exactly log₂(levels).

    Args:
        nll: −log p(x) of the dequantised data in nats, natural logarithm, any shape.
        dim: D, the number of coordinates of one example, ≥ 1.
        levels: the number of values that a coordinate takes, ≥ 2 (256 for 8-bit images).
        span: length of the interval that the cells fill, > 0: 2 for [−1, 1], 1 for [0, 1], and
            `levels` for data that keep their integers.

    Returns:
        Bits per dimension, in nll's shape.

    Raises:
        ValueError: dim, levels or span is too small.

    References:
        Theis, van den Oord and Bethge 2016, arXiv 1511.01844, section 3.1.
    """
    if dim < 1:
        raise ValueError(f"dim must be >= 1, got {dim}")
    if levels < 2:
        raise ValueError(f"levels must be >= 2, got {levels}")
    if not span > 0.0:
        raise ValueError(f"span must be > 0, got {span}")
    return nll / (dim * math.log(2)) + (math.log2(levels) - math.log2(span))


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
