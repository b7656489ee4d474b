"""Kernel distance: the maximum mean discrepancy of a cubic kernel, the KID on Inception features.

Unlike the Fréchet distance its estimate is unbiased, so that small sets can be compared, and it
sees the first three moments instead of two.
"""

from jaxdiff.metrics._pairwise import Samples, Vectors, blocks, vectors

__all__ = ["kernel_distance"]


def kernel_distance(x: Samples, y: Samples) -> float:
    """Unbiased squared maximum mean discrepancy with the kernel k(x, y) = (x·y/d + 1)³.

        Σ_{i≠j} k(x_i, x_j) / n(n−1) + Σ_{i≠j} k(y_i, y_j) / m(m−1) − 2 Σ_ij k(x_i, y_j) / nm

    Args:
        x: [n, ...], n ≥ 2.
        y: [m, ...], m ≥ 2, of the same shape after the first axis.

    Returns:
        The estimate; 0 on average for equal distributions, so about half of the time negative.

    Raises:
        ValueError: a set has less than two members or is not finite, or the sets differ in d.

    References:
        Bińkowski et al. 2018, arXiv 1801.01401, the Kernel Inception Distance.
    """
    x, y = vectors(x=x, y=y)
    for name, rows in (("x", x), ("y", y)):
        if len(rows) < 2:
            raise ValueError(f"{name} must have at least 2 samples for its own pairs, got 1")
    cross = _sum_kernel(x, y) / (len(x) * len(y))
    return _mean_off_diagonal(x) + _mean_off_diagonal(y) - 2 * cross


def _sum_kernel(x: Vectors, y: Vectors) -> float:
    return float(sum(((block @ y.T / x.shape[1] + 1) ** 3).sum() for block in blocks(x)))


def _mean_off_diagonal(x: Vectors) -> float:
    diagonal = (((x**2).mean(1) + 1) ** 3).sum()
    return float((_sum_kernel(x, x) - diagonal) / (len(x) * (len(x) - 1)))
