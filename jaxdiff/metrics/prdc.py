"""Precision, recall, density and coverage: quality and diversity as two numbers, not one.

A set of samples lies in the other set's **manifold** where it falls into the ball around one of
its members that just reaches the member's k-th nearest neighbour. Precision and density ask
whether samples look real, recall and coverage whether all of the real data are produced. Density
and coverage use the balls of the real data only, so one stray sample cannot spoil them.
"""

import numpy as np

from jaxdiff.metrics._pairwise import Samples, blocks, distances, neighbour_radii, vectors

__all__ = ["prdc"]


def prdc(real: Samples, fake: Samples, *, k: int = 5) -> dict[str, float]:
    """Precision, recall, density and coverage of samples, by k-nearest-neighbour balls.

        precision = mean_j 1[y_j in some ball of x]         recall   = mean_i 1[x_i in some of y]
        density   = mean_j #{balls of x that hold y_j} / k  coverage = mean_i 1[x_i's holds some y]

    Args:
        real: x, data [n, ...], n > k.
        fake: y, samples [m, ...], m > k, best m = n: recall and coverage grow with m.
        k: the neighbour that a ball reaches to, ≥ 1.

    Returns:
        {"precision", "recall", "density", "coverage"}, all in [0, 1] but density, which is 1 on
        average for equal distributions and at most n/k.

    Raises:
        ValueError: k < 1, a set has at most k members or is not finite, or the sets differ in d.

    References:
        Kynkäänniemi et al. 2019, arXiv 1904.06991, section 2 (precision, recall);
        Naeem et al. 2020, arXiv 2002.09797, section 3 (density, coverage).
    """
    real, fake = vectors(real=real, fake=fake)
    for name, rows in (("real", real), ("fake", fake)):
        if not 1 <= k < len(rows):
            raise ValueError(f"k must be between 1 and len({name}) - 1 = {len(rows) - 1}, got {k}")
    real_radii, fake_radii = neighbour_radii(real, k), neighbour_radii(fake, k)
    balls, recalled, covered = np.zeros(len(fake)), [], []
    for block, radii in zip(distances(real, fake), blocks(real_radii), strict=True):
        inside = block < radii[:, None]
        balls += inside.sum(0)
        covered.append(inside.any(1))
        recalled.append((block < fake_radii[None, :]).any(1))
    return {
        "precision": float((balls > 0).mean()),
        "recall": float(np.concatenate(recalled).mean()),
        "density": float(balls.mean() / k),
        "coverage": float(np.concatenate(covered).mean()),
    }
