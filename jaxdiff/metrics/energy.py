"""Energy distance: are two sets of samples drawn from one distribution?

The distance D² = 2 E|x − y| − E|x − x'| − E|y − y'| is zero for equal distributions only, has no
bandwidth to choose and works in any dimension. Two finite sets of one distribution are still
apart by chance, so the number means something only beside its **null**: the energy distance of
real data to real data at the same sizes.

The estimate is the V-statistic: all pairs count, a point with itself too. It is the squared
distance between the two empirical measures, hence never negative, and a ratio to the null is well
defined; it is biased upwards by E|x − x'|/n + E|y − y'|/m, in the null just as in the comparison,
which is why the sizes must agree. (The U-statistic removes the bias, and is negative half of the
time under the null.)

It is blunt about small errors: within a mode, use standard deviations, and for scales a likelihood.
"""

import jax
import numpy as np

from jaxdiff.metrics._pairwise import Samples, Vectors, distances, vectors
from jaxdiff.typing import Key

__all__ = ["energy_distance", "energy_null"]


def energy_distance(x: Samples, y: Samples) -> float:
    """Squared energy distance between two sets of samples, as a V-statistic.

        2 mean_ij |x_i − y_j| − mean_ij |x_i − x_j| − mean_ij |y_i − y_j|

    Args:
        x: [n, ...].
        y: [m, ...], of the same shape after the first axis.

    Returns:
        The distance, ≥ 0, in the unit of the data.

    Raises:
        ValueError: a set is empty or not finite, or the sets differ in dimension.

    References:
        Székely and Rizzo 2013, "Energy statistics: a class of statistics based on distances",
        Journal of Statistical Planning and Inference 143:1249, section 6.
    """
    x, y = vectors(x=x, y=y)
    return 2 * _mean_distance(x, y) - _mean_distance(x, x) - _mean_distance(y, y)


def energy_null(key: Key, pool: Samples, reference: Samples, n: int, *, repeats: int = 8) -> float:
    """The largest energy distance of `repeats` real subsets to the reference: what chance allows.

        max_r D²(pool[S_r], reference), S_r a random subset of size n, without replacement

    For an evaluation, pool is the training set, reference the test set and n the number of samples
    that `energy_distance(samples, test)` was given. Then the null holds everything that a perfect
    model of the training data cannot avoid: the chance of n draws, and the shift between the
    training and the test split. Energy ≤ a few × null says that the samples are about as far
    from the test set as training data are.

    Args:
        key: draws the subsets.
        pool: real data [N, ...] that the reference does not contain.
        reference: real data [m, ...].
        n: the size of a subset, 1..N. Near N the subsets overlap so much that their maximum says
            little more than one of them: keep n ≤ N/2 if possible.
        repeats: the number of subsets, ≥ 1.

    Returns:
        The largest of the distances.

    Raises:
        ValueError: n or repeats is out of range, or the sets are not alike.
    """
    if not 1 <= n <= len(pool):
        raise ValueError(f"n must be between 1 and the size of pool, {len(pool)}, got {n}")
    if repeats < 1:
        raise ValueError(f"repeats must be >= 1, got {repeats}")
    pool, reference = vectors(pool=pool, reference=reference)
    orders = (jax.random.permutation(k, len(pool)) for k in jax.random.split(key, repeats))
    return max(energy_distance(pool[np.asarray(order[:n])], reference) for order in orders)


def _mean_distance(x: Vectors, y: Vectors) -> float:
    return float(sum(block.sum() for block in distances(x, y)) / (len(x) * len(y)))
