"""Memorisation: are samples nearer to the training set than fresh data are?

A model that copies its training images has perfect samples by every other measure here. Its
samples' distances to their nearest training image give it away, beside two references:

* **held-out** data, which no model has seen;
* the training set itself, each image to its nearest *other* one (leave one out): what fresh draws
  from exactly the training distribution would show. Where it differs from held-out data, the two
  splits differ (other writers, other days), and a faithful model stands with the former.
"""

import numpy as np
from jaxtyping import Float

from jaxdiff.metrics._pairwise import Samples, distances, neighbour_radii, vectors

__all__ = ["memorisation", "nearest_distances"]


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
