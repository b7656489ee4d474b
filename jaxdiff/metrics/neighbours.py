"""Memorisation: are samples nearer to the training set than fresh data are?

A model that copies its training images has perfect samples by every other measure here. Its
samples' distances to their nearest training image give it away, beside two references:

* **held-out** data, which no model has seen;
* the training set itself, each image to its nearest *other* one (leave one out): what fresh draws
  from exactly the training distribution would show. Where it differs from held-out data, the two
  splits differ (other writers, other days), and a faithful model stands with the former.

Distances of pixels are made up mostly of the few directions in which all images vary much, such as
the amount of ink, and there two draws may be close by chance. Whitened principal components
(`principal_components`) count each direction in the unit in which the training set varies along it:
distances of different images are then more alike, and a copy stands out more. Of 400 copies of 8×8
digits with noise of standard deviation 0.2, 39 % are flagged by their pixels and 75 % by their
components; at four fifths of their contrast, 64 % and 80 %. Components need no labels and no
training. The probabilities of a classifier would not do: it is made to forget what tells two images
of a class apart.
"""

import math

import numpy as np
from jaxtyping import Float

from jaxdiff.metrics._pairwise import Samples, Vectors, distances, neighbour_radii, vectors

__all__ = ["memorisation", "nearest_distances", "principal_components"]

FIT = 2000
"""At most so many members of the training set are principal components fitted to, evenly spread."""


def nearest_distances(x: Samples, reference: Samples) -> Float[np.ndarray, " n"]:
    """Euclidean distance of each sample to the nearest member of the reference.

        d_i = min_j |x_i − r_j|

    Args:
        x: [n, ...].
        reference: [m, ...], of the same shape after the first axis.

    Returns:
        [n], float64.

    Raises:
        ValueError: a set is empty or not finite, or the sets differ in dimension.
    """
    x, reference = vectors(x=x, reference=reference)
    return np.concatenate([block.min(1) for block in distances(x, reference)])


def memorisation(
    samples: Samples, train: Samples, heldout: Samples, *, quantile: float = 0.05
) -> dict[str, float]:
    """Compares the samples' nearest-neighbour distances to train with those of held-out data.

    A sample is **flagged** if it is nearer to the training set than all but a share `quantile` of
    the held-out data, so fresh draws from the held-out population are flagged at that rate.

    Args:
        samples: [n, ...].
        train: what the model was trained on, [N, ...], N ≥ 2.
        heldout: what it was not trained on, [m, ...].
        quantile: in (0, 1), of the held-out distances.

    Returns:
        For each of samples, heldout and train (leave one out): `NAME_q05`, `NAME_median` and
        `NAME_q95` of the distances; `flagged_share` of the samples, and `train_flagged_share`, the
        same for the leave-one-out distances: compare the two; `ks_statistic` and `ks_p_value` of
        the two-sided Kolmogorov–Smirnov test of samples against held-out data; and
        `nearer_p_value` of the one-sided one, small only if samples are *nearer* than held-out data
        are: copies, or a shift between the splits that leave-one-out also shows.

    Raises:
        ValueError: quantile is out of range, train has less than two members, a set is empty or
            not finite, or the sets differ in dimension.

    References:
        Ho, Jain and Abbeel 2020, arXiv 2006.11239, appendix (nearest neighbours of samples);
        Theis, van den Oord and Bethge 2016, arXiv 1511.01844, section 3.3 (and their limits: an
        image shifted by a pixel is far away in pixel space).
    """
    from scipy import stats

    if not 0 < quantile < 1:
        raise ValueError(f"quantile must be in (0, 1), got {quantile}")
    samples, train, heldout = vectors(samples=samples, train=train, heldout=heldout)
    if len(train) < 2:
        raise ValueError("train must have at least 2 members, got 1")
    near = {
        "samples": nearest_distances(samples, train),
        "heldout": nearest_distances(heldout, train),
        "train": neighbour_radii(train, 1),
    }
    report = {}
    for name, values in near.items():
        q05, median, q95 = np.quantile(values, (0.05, 0.5, 0.95))
        report |= {f"{name}_q05": q05, f"{name}_median": median, f"{name}_q95": q95}
    threshold = np.quantile(near["heldout"], quantile)
    pair = near["samples"], near["heldout"]
    statistic, p_value = stats.ks_2samp(*pair, method="asymp")
    # Nearer samples: their distribution function lies above that of the held-out distances.
    _, nearer_p_value = stats.ks_2samp(*pair, alternative="greater", method="asymp")
    report |= {
        "flagged_share": (near["samples"] < threshold).mean(),
        "train_flagged_share": (near["train"] < threshold).mean(),
        "ks_statistic": statistic,
        "ks_p_value": p_value,
        "nearer_p_value": nearer_p_value,
    }
    return {name: float(value) for name, value in report.items()}


def principal_components(train: Samples, *others: Samples, share: float = 0.95) -> list[Vectors]:
    """Sets of vectors by their whitened principal components, those of the training set.

        f(x) = Λ^{−½} Uᵀ (x − mean),     cov(train) = U Λ Uᵀ,

    with the largest eigenvalues that together make up a share of the variance: so each component
    has variance 1 over the training set, and distances are Mahalanobis'.

    Args:
        train: [N, ...], N ≥ 2; the fit is to `FIT` of its members at most.
        *others: further sets, [n, ...] of the same shape after the first axis.
        share: of the variance, in (0, 1]; the rest is noise that whitening would blow up.

    Returns:
        train and the others, [n, k] each.

    Raises:
        ValueError: if share is out of range, the training set has less than two members or no
            variance, a set is empty or not finite, or the sets differ in dimension.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share must be in (0, 1], got {share}")
    named = {f"others[{i}]": other for i, other in enumerate(others)}
    sets = vectors(train=train, **named)
    seen = sets[0][:: math.ceil(len(sets[0]) / FIT)]
    mean = seen.mean(0)
    rows = (seen - mean[None]) / np.sqrt(max(len(seen) - 1, 1))
    # Of RᵀR and RRᵀ the smaller; they share their eigenvalues.
    wide = rows.shape[0] < rows.shape[1]
    values, axes = np.linalg.eigh(rows @ rows.T if wide else rows.T @ rows)
    values, axes = values[::-1], axes[:, ::-1]
    if len(seen) < 2 or not values[0] > 0.0:
        raise ValueError(f"train must have members that differ, got {len(seen)} without variance")
    # Directions without variance are rounding errors, whatever the share.
    kept = values > 1e-10 * values[0]
    total = np.cumsum(np.where(kept, values, 0.0))
    kept &= np.concatenate([[True], total[:-1] < share * total[-1]])
    values, axes = values[kept], axes[:, kept]
    whiten = rows.T @ (axes / values[None]) if wide else axes / np.sqrt(values)[None]
    return [(x - mean[None]) @ whiten for x in sets]
