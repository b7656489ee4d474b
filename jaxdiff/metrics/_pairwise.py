"""Euclidean distances between two sets of vectors, a block of rows at a time.

Two sets of 10,000 images have 10⁸ pairs: blocks keep the memory at `BLOCK · m` numbers, and the
expansion |x|² + |y|² − 2 x·y leaves the work to a matrix product. In float64 the cancellation
costs about 1e-8 of the vectors' length, where two points coincide, and nothing elsewhere.
"""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Float, Real

from jaxdiff.typing import Array

__all__ = ["BLOCK", "Samples", "Vectors", "blocks", "distances", "neighbour_radii", "vectors"]

BLOCK = 1024
"""Rows a block."""

Samples = Real[np.ndarray, "..."] | Real[Array, "..."]
"""A set of samples [n, ...] of any shape, in NumPy or JAX."""

Vectors = Float[np.ndarray, "_ _"]
"""The same set as rows of float64."""


def vectors(**sets: Samples) -> list[Vectors]:
    """Flattens named sets of samples [n, ...] to float64 rows [n, d] of one common d.

    Raises:
        ValueError: a set is empty or not finite, or the sets differ in d.
    """
    rows = {}
    for name, samples in sets.items():
        array = np.asarray(samples, np.float64)
        if array.ndim == 0 or array.size == 0:
            raise ValueError(f"{name} must be [n, ...] with n >= 1, got shape {array.shape}")
        rows[name] = array.reshape(len(array), -1)
        bad = int((~np.isfinite(rows[name]).all(1)).sum())
        if bad:
            raise ValueError(f"{name} must be finite, {bad} of its {len(array)} rows are not")
    dims = {name: row.shape[1] for name, row in rows.items()}
    if len(set(dims.values())) > 1:
        raise ValueError(f"the sets must have vectors of one length, got {dims}")
    return list(rows.values())


def blocks(x: np.ndarray) -> Iterator[np.ndarray]:
    """The rows of x, `BLOCK` at a time."""
    for start in range(0, len(x), BLOCK):
        yield x[start : start + BLOCK]


def distances(x: Vectors, y: Vectors) -> Iterator[Float[np.ndarray, "_ _"]]:
    """|x_i − y_j|, a block of rows i at a time."""
    y_squared = (y**2).sum(1)
    for block in blocks(x):
        squared = (block**2).sum(1)[:, None] + y_squared[None, :] - 2 * block @ y.T
        yield np.sqrt(np.maximum(squared, 0.0))


def neighbour_radii(x: Vectors, k: int) -> Float[np.ndarray, " n"]:
    """The distance of each x_i to its k-th nearest other member of x; n > k."""
    # The zeroth of each sorted row is the point itself.
    return np.concatenate([np.partition(block, k, axis=1)[:, k] for block in distances(x, x)])
