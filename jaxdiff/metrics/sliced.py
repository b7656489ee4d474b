"""Sliced Wasserstein distance: how far apart are two sets, in the unit of the data?

On a line the optimal transport between two equally large sets pairs them in order. Averaged over
random directions this measures distances in any dimension without solving a transport problem, and
unlike the energy distance it is linear in small shifts, so it tells good samplers from better ones.
"""

import jax
import numpy as np

from jaxdiff.metrics._pairwise import Samples, vectors
from jaxdiff.typing import Key

__all__ = ["sliced_wasserstein"]


def sliced_wasserstein(key: Key, x: Samples, y: Samples, *, directions: int = 128) -> float:
    """Sliced 2-Wasserstein distance between two sets of samples.

        ( mean_θ mean_i |⟨θ, x⟩_(i) − ⟨θ, y⟩_(i)|² )^½,     θ uniform on the sphere,

    with ⟨θ, x⟩_(i) in increasing order. Two finite sets of one distribution are apart by chance:
    compare with what two sets of data give.

    Args:
        key: draws the directions.
        x: [n, ...].
        y: [n, ...], as many and of the same shape.
        directions: their number, ≥ 1.

    Returns:
        The distance, ≥ 0, in the unit of the data.

    Raises:
        ValueError: a set is empty or not finite, the sets are not alike, or directions < 1.

    References:
        Bonneel et al. 2015, doi:10.1007/s10851-014-0506-3, eq. 9.
    """
    if directions < 1:
        raise ValueError(f"directions must be at least 1, got {directions}")
    x, y = vectors(x=x, y=y)
    if len(x) != len(y):
        raise ValueError(f"x and y must be equally many, got {len(x)} and {len(y)}")
    thetas = np.asarray(jax.random.normal(key, (x.shape[1], directions)), np.float64)
    thetas /= np.linalg.norm(thetas, axis=0, keepdims=True)
    gaps = np.sort(x @ thetas, axis=0) - np.sort(y @ thetas, axis=0)
    return float(np.sqrt(np.mean(gaps**2)))
