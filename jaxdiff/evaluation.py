"""Evaluation of a model on a data set: likelihood of its images, quality of its samples.

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
from jaxdiff.data.images import Images, dequantize, from_model, to_model
from jaxdiff.processes.base import SDE, Denoiser
from jaxdiff.solve import log_likelihood
from jaxdiff.typing import Array, Key

__all__ = ["MOST", "in_chunks", "likelihood_report", "sample_report"]

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
    process: SDE,
    denoise: Denoiser,
    images: Images,
    key: Key,
    *,
    probes: int | None = 4,
    size: int = 256,
    **options: Any,
) -> dict[str, Any]:
    """Negative log-likelihood of uniformly dequantised images, in nats and bits/dim.

    Args:
        process: the forward process.
        denoise: the model.
        images: the data, [n, h, w, c].
        key: of dequantisation noise and probes.
        probes: Hutchinson probes an image; None for the exact trace.
        size: images at a time.
        **options: further options of `log_likelihood`.

    Returns:
        Means with their standard errors over images, the probes' own mean standard error, and the
        largest number of network calls of a chunk.
    """
    noise_key, probe_key = jax.random.split(key)

    def run(keys: Key, x: Array):
        return log_likelihood(process, denoise, x, key=keys, probes=probes, **options)

    x = dequantize(noise_key, images.x, images.levels)
    chunks = in_chunks(run, probe_key, len(x), x, size=size)
    nll = -np.concatenate([chunk.value for chunk in chunks]).astype(np.float64)
    dim = math.prod(images.x.shape[1:])
    mean, stderr = metrics.mean_and_stderr(nll)
    bits = metrics.bits_per_dim(nll, dim, images.levels)
    bits_mean, bits_stderr = metrics.mean_and_stderr(np.asarray(bits, np.float64))
    probe_stderr = np.concatenate([chunk.stderr for chunk in chunks])
    return {
        "nll_nats": mean,
        "nll_nats_stderr": stderr,
        "bits_per_dim": bits_mean,
        "bits_per_dim_stderr": bits_stderr,
        "dequantisation": "uniform",
        "levels": images.levels,
        "probes": probes,
        "probe_stderr_nats": None if probes == 1 else float(probe_stderr.mean()),
        "images": len(nll),
        "network_calls": max(int(chunk.num_evaluations) for chunk in chunks),
    }


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
    energy = metrics.energy_distance(drawn, fresh)
    null = metrics.energy_null(key, seen, fresh, len(drawn))
    report: dict[str, Any] = {
        "samples": len(drawn),
        "energy_distance": energy,
        "energy_null": null,
        "energy_over_null": energy / null,
    }
    if train.label is not None:
        report |= _classified(seen, train.label[:MOST], drawn, fresh)
    report["neighbours"] = metrics.memorisation(drawn, seen, fresh)
    return report


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
