"""Do samples look like the classes? A support vector machine of the real data is the judge.

One machine for each pair of classes, calibrated by Platt's sigmoid on held-out folds, and the
pairs coupled to one distribution over the classes. Coupling matters: the calibration of
one-against-rest values, normalised, calls pure noise a digit with probability 0.9 almost half
of the time; pairs disagree about anything that is no class at all, and so no class gets a high
probability.
"""

from itertools import combinations
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Shaped

from jaxdiff.metrics._pairwise import Samples, Vectors, vectors

__all__ = ["Classified", "classify"]

FOLDS = 5
"""Cross-validation folds of the calibration."""


class Classified(NamedTuple):
    """What a classifier of real data makes of samples."""

    confident_share: float
    """The share of samples whose most probable class has at least the asked probability."""

    class_counts: dict[str, int]
    """How many samples have each class as the most probable one."""

    labels: Shaped[np.ndarray, " n"]
    """The most probable class of each sample."""


def classify(
    train_x: Samples, train_labels: Samples, x: Samples, *, confidence: float = 0.9
) -> Classified:
    """Labels samples by a support vector machine trained on real data; the same at every call.

    Judge real test data by the same call and compare: the share that a classifier is sure of is
    below one for real data, too.

    Args:
        train_x: [N, ...]; training takes about N² time, 1 s for 1000 digits: a few thousand do.
        train_labels: [N], two classes at least, five examples of each at least.
        x: samples [n, ...] in the space of train_x.
        confidence: the probability from which a label counts as sure, in (0, 1].

    Returns:
        The confident share, the count of each class and the labels.

    Raises:
        ValueError: confidence is out of range, there are too few classes or examples, the number of
            labels is not N, a set is empty or not finite, or the sets differ in dimension.

    References:
        Platt 1999, "Probabilistic outputs for support vector machines" (calibration);
        Wu, Lin and Weng 2004, JMLR 5:975, the second approach (coupling).
    """
    if not 0 < confidence <= 1:
        raise ValueError(f"confidence must be in (0, 1], got {confidence}")
    train_x, x = vectors(train_x=train_x, x=x)
    train_labels = np.asarray(train_labels)
    if train_labels.shape != (len(train_x),):
        raise ValueError(f"train_labels must be [{len(train_x)}], got {train_labels.shape}")
    classes, counts = np.unique(train_labels, return_counts=True)
    if len(classes) < 2 or counts.min() < FOLDS:
        found = {int(c): int(n) for c, n in zip(classes, counts, strict=True)}
        raise ValueError(f"train_labels must hold >= 2 classes, >= {FOLDS} of each, got {found}")
    probabilities = _couple(_pair_probabilities(train_x, train_labels, classes, x))
    best = probabilities.argmax(1)
    tally = np.bincount(best, minlength=len(classes))
    return Classified(
        confident_share=float((probabilities.max(1) >= confidence).mean()),
        class_counts={str(c): int(n) for c, n in zip(classes, tally, strict=True)},
        labels=classes[best],
    )


def _pair_probabilities(
    train_x: Vectors,
    labels: Shaped[np.ndarray, " N"],
    classes: Shaped[np.ndarray, " k"],
    x: Vectors,
) -> Float[np.ndarray, "n k k"]:
    """r[:, i, j] = P(class i | class i or j); zeros on the diagonal."""
    from sklearn.calibration import CalibratedClassifierCV
    from sklearn.svm import SVC

    r = np.zeros((len(x), len(classes), len(classes)))
    for i, j in combinations(range(len(classes)), 2):
        pair = np.isin(labels, classes[[i, j]])
        machine = CalibratedClassifierCV(
            SVC(C=10.0),
            ensemble=False,  # pyright: ignore[reportArgumentType]
            cv=FOLDS,
        ).fit(train_x[pair], labels[pair] == classes[i])
        r[:, j, i], r[:, i, j] = machine.predict_proba(x).T
    return r


def _couple(r: Float[np.ndarray, "n k k"]) -> Float[np.ndarray, "n k"]:
    """Minimises Σ_i Σ_{j≠i} (r_ji p_i − r_ij p_j)² over Σ p = 1: linear, with one multiplier."""
    n, k, _ = r.shape
    system = np.ones((n, k + 1, k + 1))
    system[:, :k, :k] = -r * r.transpose(0, 2, 1)
    diagonal = np.arange(k)
    system[:, diagonal, diagonal] = (r**2).sum(1)
    system[:, k, k] = 0.0
    total = np.zeros((n, k + 1, 1))
    total[:, k] = 1.0
    return np.linalg.solve(system, total)[:, :k, 0]
