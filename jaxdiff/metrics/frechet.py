"""Fréchet distance: how far apart are the Gaussians that two sets of samples fit?

On the features of an Inception network this is the FID; on pixels, or on the features of any other
network, it is the same formula and a different number, so say which features it was. It grows with
1/n: compare models at equal numbers of samples.
"""

import numpy as np
from jaxtyping import Float

from jaxdiff.metrics._pairwise import Samples, vectors

__all__ = ["frechet_distance", "gaussian_frechet_distance"]


def frechet_distance(x: Samples, y: Samples) -> float:
    """Squared Fréchet distance between Gaussians fitted to two sets of samples or features.

    Args:
        x: [n, ...], n ≥ 2.
        y: [m, ...], m ≥ 2, of the same shape after the first axis.

    Returns:
        `gaussian_frechet_distance` of the means and the unbiased covariances.

    Raises:
        ValueError: a set has less than two members or is not finite, or the sets differ in d.

    References:
        Heusel et al. 2017, arXiv 1706.08500, equation (6).
    """
    x, y = vectors(x=x, y=y)
    for name, rows in (("x", x), ("y", y)):
        if len(rows) < 2:
            raise ValueError(f"{name} must have at least 2 samples for a covariance, got 1")
    return gaussian_frechet_distance(
        x.mean(0), np.atleast_2d(np.cov(x.T)), y.mean(0), np.atleast_2d(np.cov(y.T))
    )


def gaussian_frechet_distance(
    mean_x: Float[np.ndarray, " d"],
    cov_x: Float[np.ndarray, "d d"],
    mean_y: Float[np.ndarray, " d"],
    cov_y: Float[np.ndarray, "d d"],
) -> float:
    """Squared 2-Wasserstein (Fréchet) distance between two Gaussians.

        |m_x − m_y|² + tr(C_x + C_y − 2 (C_x^½ C_y C_x^½)^½)

    The matrix under the root is symmetric, so its eigenvalues are real and a singular covariance
    (a pixel that never changes) does no harm, unlike with a general root of C_x C_y.

    Args:
        mean_x: [d].
        cov_x: [d, d], positive semi-definite.
        mean_y: [d].
        cov_y: [d, d], positive semi-definite.

    Returns:
        The squared distance, in the squared unit of the data.

    References:
        Dowson and Landau 1982, "The Fréchet distance between multivariate normal
        distributions", Journal of Multivariate Analysis 12:450.
    """
    values, axes = np.linalg.eigh(cov_x)
    root = (axes * np.sqrt(np.maximum(values, 0.0))[None, :]) @ axes.T
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ cov_y @ root), 0.0)).sum()
    squared = ((mean_x - mean_y) ** 2).sum() + np.trace(cov_x) + np.trace(cov_y) - 2 * cross
    return max(float(squared), 0.0)
