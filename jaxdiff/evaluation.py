"""Evaluation of a model on data: their likelihood, and the quality of its samples.

Reports are dictionaries of plain numbers, ready for JSON; figures that mean nothing alone stand
beside what real data give for the same statistic.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff import metrics
from jaxdiff.compile import jit
from jaxdiff.data.images import Images, from_model, to_model
from jaxdiff.processes.base import Denoiser, Process
from jaxdiff.typing import Array, Key

__all__ = [
    "MOST",
    "density_report",
    "energy_report",
    "in_chunks",
    "likelihood_report",
    "noise_levels",
    "overfitting_report",
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
            "network_calls": max(int(chunk.num_evaluations.max()) for chunk in chunks),
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
        "network_calls": max(int(chunk.num_evaluations.max()) for chunk in chunks),
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
        that of test images, and counts by class (with labels); nearest-neighbour distances, of
        pixels and of the training images' whitened principal components.

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
    seen, drawn, fresh = metrics.principal_components(seen, drawn, fresh)
    report["feature_neighbours"] = metrics.memorisation(drawn, seen, fresh)
    return report


def noise_levels(process: Process, count: int = 10, *, most: float = 8.0) -> np.ndarray:
    """Times at which a process's log-SNR falls evenly from `most` to −`most`, or to its own ends.

    The variational bound of the likelihood is ½ ∫ E‖ε̂ − ε‖² dλ over the log-SNR λ, whatever the
    schedule: so at even steps of λ the plain mean of the losses is in proportion to what they cost
    in nats. Beyond ±8, noise of 2 % of the data or data of 2 % of the noise, there is little left
    to know, or to memorise. A process without a log-SNR gets times in the middle of even steps.

    Args:
        process: one with `log_snr(t)`, falling, or another.
        count: number of times, ≥ 2.
        most: the largest log-SNR, > 0.

    Returns:
        [count] increasing times.

    Raises:
        ValueError: for an argument outside its range.

    References: Kingma et al. 2021, arXiv:2107.00630, section 5.1.
    """
    if count < 2:
        raise ValueError(f"count must be at least 2, got {count}.")
    if not most > 0.0:
        raise ValueError(f"most must be positive, got {most}.")
    if not hasattr(process, "log_snr"):
        return (np.arange(count) + 0.5) / count
    t = np.concatenate([np.geomspace(1e-5, 0.1, 2000)[:-1], np.linspace(0.1, 1.0, 2000)])
    noise = -_log_snr(process, t)
    return np.interp(np.linspace(max(-most, noise[0]), min(most, noise[-1]), count), noise, t)


def overfitting_report(
    process: Process,
    denoise: Denoiser,
    train: Any,
    heldout: Any,
    key: Key,
    *,
    place: Callable[[Key, Array], Array],
    times: Any = None,
    significance: float = 0.01,
    size: int = 256,
) -> dict[str, Any]:
    """Denoising losses of training images and of others, by noise level: is the model worse there?

    The loss of an image x_0 of D pixels at t is

        2 KL(q(x_t | x_0) ‖ q(x_t | x̂_0)) / D,     x̂_0 = E[x_0 | x_t],

    which for a Gaussian process is ‖ε̂ − ε‖² / D, and for classes that are masked twice the share in
    sight times the cross-entropy, −2 (1 − t) log p(x_0 | x_t) / D with a linear schedule. Image i
    of the one split is made noisy by the same random numbers as image i of the other, and at all
    levels.

    Losses are compared by a one-sided t-test over images, paired as far as the smaller split goes,
    at each level and of each image's mean over the levels. If both splits are draws of one law, a
    model that knows the one no better than the other has its gap detected with probability
    `significance`; but where they differ (other writers, other days), that shows as well. The test
    says whether there is a gap, the ratio how large it is.

    Args:
        process: the forward process.
        denoise: (x [b, …], t) ↦ moments of x_0, without dropout.
        train: images [n, …] that the model was trained on, n ≥ 2.
        heldout: others [m, …], m ≥ 2.
        key: of the noise.
        place: (keys [b], images [b, …]) ↦ x_0 [b, …], as in training.
        times: [k] noise levels; by default `noise_levels(process)`.
        significance: of the test of all levels together, in (0, 1).
        size: images at a time.

    Returns:
        Mean losses over all levels with their standard errors over images, gap and ratio of
        held-out to training images, p-value and decision; and "levels", the same at each. A p-value
        there is one of k, and cannot be read alone.

    Raises:
        ValueError: if a split has less than two images, or significance is outside its range.
    """
    if not 0.0 < significance < 1.0:
        raise ValueError(f"significance must be in (0, 1), got {significance}.")
    for name, x in (("train", train), ("heldout", heldout)):
        if len(x) < 2:
            raise ValueError(f"{name} must hold at least 2 images, got {len(x)}.")
    times = noise_levels(process) if times is None else np.asarray(times)

    def losses(x):
        """[n, k] in float64."""

        def at(t):
            run = functools.partial(_noise_losses, process, denoise, t, place=place)
            return np.concatenate(in_chunks(run, key, len(x), x, size=size))

        return np.stack([at(t) for t in jnp.asarray(times, float)], axis=1).astype(np.float64)

    of_train, of_heldout = losses(jnp.asarray(train)), losses(jnp.asarray(heldout))
    overall = _gap(of_train.mean(1), of_heldout.mean(1))
    levels = [{"t": float(t)} for t in times]
    if hasattr(process, "log_snr"):
        snrs = _log_snr(process, times).tolist()
        levels = [level | {"log_snr": snr} for level, snr in zip(levels, snrs, strict=True)]
    gaps = [_gap(seen, fresh) for seen, fresh in zip(of_train.T, of_heldout.T, strict=True)]
    return {
        "train_images": len(train),
        "heldout_images": len(heldout),
        **overall,
        "significance": significance,
        "gap_detected": overall["p_value"] < significance,
        "levels": [level | gap for level, gap in zip(levels, gaps, strict=True)],
    }


def _log_snr(process: Any, times: np.ndarray) -> np.ndarray:
    return np.asarray(jax.vmap(process.log_snr)(jnp.asarray(times, float)), np.float64)


@jit
def _noise_losses(process, denoise, t, keys, x, *, place):
    """2 KL(q(x_t | x_0) ‖ q(x_t | x̂_0)) / D of each image."""
    place_keys, noise_keys = jax.vmap(jax.random.split, out_axes=1)(keys)
    x0 = place(place_keys, x)
    noisy = jax.vmap(lambda key, x0: process.marginal(x0, t).sample(key))(noise_keys, x0)

    def nats(x0, guess):
        return process.marginal(x0, t).kl(process.marginal(guess, t))

    return 2.0 * jax.vmap(nats)(x0, denoise(noisy, t).mean) / x[0].size


def _gap(train: np.ndarray, heldout: np.ndarray) -> dict[str, float]:
    """How much larger the losses of held-out images are."""
    from scipy import stats

    mean, stderr = metrics.mean_and_stderr(train)
    heldout_mean, heldout_stderr = metrics.mean_and_stderr(heldout)
    gap, both = heldout_mean - mean, min(len(train), len(heldout))
    # Losses of the same noise go together, as many as there are.
    shared = np.cov(train[:both], heldout[:both])[0, 1] * both / (len(train) * len(heldout))
    gap_stderr = math.sqrt(max(stderr**2 + heldout_stderr**2 - 2.0 * shared, 0.0))
    # Without any spread there is no test, but no doubt either.
    p_value = stats.t.sf(gap / gap_stderr, both - 1) if gap_stderr else float(gap <= 0.0)
    return {
        "train": mean,
        "train_stderr": stderr,
        "heldout": heldout_mean,
        "heldout_stderr": heldout_stderr,
        "gap": gap,
        "gap_stderr": gap_stderr,
        "ratio": heldout_mean / mean if mean > 0.0 else math.inf,
        "p_value": float(p_value),
    }


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
