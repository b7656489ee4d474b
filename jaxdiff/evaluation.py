"""Evaluation of a model on data: their likelihood, and the quality of its samples.

Reports are dictionaries of plain numbers, ready for JSON; figures that mean nothing alone stand
beside what real data give for the same statistic.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff import metrics
from jaxdiff.data.images import Images, from_model, to_model
from jaxdiff.typing import Array, Key

__all__ = [
    "MOST",
    "density_report",
    "energy_report",
    "in_chunks",
    "likelihood_report",
    "sample_report",
]

Estimate = Callable[[Key, Array], Any]
"""(keys [n], x [n, …]) ↦ an object with .value [n], log p or a bound of it in nats."""

MOST = 5000
"""Images that a statistic quadratic in their number is given."""


def in_chunks(
    run: Callable[..., Any], key: Key, count: int, *arrays: Any, size: int = 256
) -> list[Any]:
    """Runs run(keys, *parts) over chunks of equal size, and cuts the excess off the last.

    Example i has the key fold_in(key, i) whatever the chunk size, and one compiled program serves
    all chunks.

    Args:
        run: (keys [size], *parts [size, …]) ↦ a pytree of arrays [size, …] and scalars.
        key: the key of all.
        count: number of examples n, ≥ 1.
        *arrays: arrays [n, …], cut into chunks alongside.
        size: examples at a time, ≥ 1.

    Returns:
        The result of each chunk, arrays of the last cut to what is left.
    """
    size = min(size, count)
    results = []
    for first in range(0, count, size):
        # The last chunk starts earlier, to have the same shape, and drops what came before.
        begin = min(first, count - size)
        index = jnp.arange(begin, begin + size)
        keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, index)
        result = run(keys, *(array[begin : begin + size] for array in arrays))
        fresh = first - begin
        results.append(jax.tree.map(lambda a, n=fresh: a[n:] if jnp.ndim(a) else a, result))
    return results


def likelihood_report(
    estimate: Estimate, x: Array, key: Key, *, levels: int | None = None, size: int = 256
) -> dict[str, Any]:
    """Negative log-likelihood of data, or a bound of it, in nats and bits/dim.

    Args:
        estimate: (keys [m], x [m, …]) ↦ .value [m] in nats; and, where they apply, .stderr [m] of
            its probes and .num_evaluations, network calls.
        x: the data [n, …], n ≥ 2.
        key: of the estimate's noise.
        levels: of dequantised data in [−1, 1], the number of grey levels; None for classes, of
            which `estimate` has the probability.
        size: examples at a time.

    Returns:
        Means with their standard errors over examples, the probes' own mean standard error, and the
        largest number of network calls of a chunk.
    """
    nll, chunks = _nll(estimate, x, key, size)
    dim = math.prod(x.shape[1:])
    bits = nll / (dim * math.log(2.0)) if levels is None else metrics.bits_per_dim(nll, dim, levels)
    mean, stderr = metrics.mean_and_stderr(nll)
    bits_mean, bits_stderr = metrics.mean_and_stderr(np.asarray(bits, np.float64))
    report: dict[str, Any] = {
        "nll_nats": mean,
        "nll_nats_stderr": stderr,
        "bits_per_dim": bits_mean,
        "bits_per_dim_stderr": bits_stderr,
        "dequantisation": None if levels is None else "uniform",
        "levels": levels,
        "images": len(nll),
    }
    if hasattr(chunks[0], "num_evaluations"):
        probes = np.concatenate([chunk.stderr for chunk in chunks])
        report |= {
            # One probe has no spread to tell its error by.
            "probe_stderr_nats": float(probes.mean()) if np.isfinite(probes).all() else None,
            "network_calls": max(int(chunk.num_evaluations) for chunk in chunks),
        }
    return report


def density_report(
    estimate: Estimate, density: Any, count: int, key: Key, *, size: int = 1000
) -> dict[str, Any]:
    """Negative log-likelihood of fresh points of a known density, in nats, beside its entropy.

    Args:
        estimate: as in `likelihood_report`.
        density: with `sample(key, n)`, `log_prob(x)` of one point, and `entropy` in nats.
        count: number of points, ≥ 2.
        key: of points and the estimate's noise.
        size: points at a time.

    Returns:
        The mean, its excess over the entropy, and the Kullback–Leibler divergence, with standard
        errors over points, and the largest number of network calls of a chunk.
    """
    x = density.sample(key, count)
    nll, chunks = _nll(estimate, x, key, size)
    mean, stderr = metrics.mean_and_stderr(nll)
    # On the same points most of the statistical error cancels.
    kl, kl_stderr = metrics.mean_and_stderr(
        nll + np.asarray(jax.vmap(density.log_prob)(x), np.float64)
    )
    return {
        "nll": mean,
        "nll_stderr": stderr,
        "entropy": float(density.entropy),
        "gap": mean - float(density.entropy),
        "kl": kl,
        "kl_stderr": kl_stderr,
        "points": len(nll),
        "network_calls": max(int(chunk.num_evaluations) for chunk in chunks),
    }


def energy_report(samples: Array, density: Any, key: Key) -> dict[str, Any]:
    """Energy distance of samples to as many fresh points of a density, beside its null."""
    fresh_key, pool_key, null_key = jax.random.split(key, 3)
    num = len(samples)
    return _energies(
        samples, density.sample(fresh_key, num), density.sample(pool_key, 4 * num), null_key
    )


def sample_report(samples: Array, train: Images, test: Images, key: Key) -> dict[str, Any]:
    """How samples compare with the test images, each figure beside that of real images.

    Args:
        samples: [n, h, w, c] in model space; they are rounded to the data's levels first.
        train: training images, at least as many as samples; the first `MOST` are used.
        test: test images.
        key: draws the subsets of the null.

    Returns:
        Energy distance and its null; the share of samples that a classifier is sure of, beside
        that of test images, and counts by class (with labels); nearest-neighbour distances.

    Raises:
        ValueError: if there are fewer training images than samples.
    """
    drawn = np.asarray(to_model(from_model(samples, train.levels), train.levels))
    seen = np.asarray(to_model(train.x[:MOST], train.levels))
    fresh = np.asarray(to_model(test.x[:MOST], test.levels))
    report = _energies(drawn, fresh, seen, key)
    if train.label is not None:
        report |= _classified(seen, train.label[:MOST], drawn, fresh)
    report["neighbours"] = metrics.memorisation(drawn, seen, fresh)
    return report


def _nll(estimate: Estimate, x: Array, key: Key, size: int) -> tuple[np.ndarray, list[Any]]:
    """−log p of each example, and what each chunk said."""
    chunks = in_chunks(estimate, key, len(x), x, size=size)
    return -np.concatenate([chunk.value for chunk in chunks]).astype(np.float64), chunks


def _energies(drawn: Any, fresh: Any, pool: Any, key: Key) -> dict[str, Any]:
    """Energy distance of samples to fresh data, and that of real data from a pool."""
    energy = metrics.energy_distance(drawn, fresh)
    null = metrics.energy_null(key, pool, fresh, len(drawn))
    return {
        "samples": len(drawn),
        "energy_distance": energy,
        "energy_null": null,
        "energy_over_null": energy / null,
    }


def _classified(seen: Any, labels: Any, drawn: Any, fresh: Any) -> dict[str, Any]:
    """What a classifier makes of samples and of real images; a reason where there can be none."""
    try:
        found = metrics.classify(seen, labels, drawn)
    except ValueError as error:
        return {"confident_share": None, "no_classifier": str(error)}
    return {
        "confident_share": found.confident_share,
        "confident_share_test": metrics.classify(seen, labels, fresh).confident_share,
        "class_counts": found.class_counts,
    }
