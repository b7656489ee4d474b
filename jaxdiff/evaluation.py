"""Evaluation of a model on data: their likelihood, and the quality of its samples.

Reports are dictionaries of plain numbers, ready for JSON; figures that mean nothing alone stand
beside what real data give for the same statistic.
"""

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxdiff import metrics, plotting
from jaxdiff.compile import jit
from jaxdiff.data.images import Images, from_model, to_model
from jaxdiff.data_likelihood import (
    in_chunks,
    likelihood_report,
    likelihood_rows,
    likelihood_sweeps,
)
from jaxdiff.experiment import Experiment
from jaxdiff.processes.base import Denoiser, Process
from jaxdiff.typing import Array, Key, Params

__all__ = [
    "MOST",
    "energies",
    "energy_report",
    "evaluate",
    "noise_levels",
    "overfitting_report",
    "sample_report",
]

MOST = 5000
"""Images that a statistic quadratic in their number is given."""


def evaluate(
    experiment: Experiment,
    params: Params,
    key: Key,
    *,
    split: str = "test",
    folder: Path | None = None,
    mesh: Mesh | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """The report of a run: the likelihood of a split and, with that of the test data, all else.

    Args:
        experiment: the run.
        params: its parameters.
        key: of all noise.
        split: "train", "validation" or "test".
        folder: where to keep `likelihood_SPLIT.csv`, a row an example, which is gone on with if it
            was begun, and pictures: `likelihood_SPLIT.png` and `overfitting.png`.
        mesh: devices that share the work of likelihood and samples.
        progress: whether to show a bar.

    Returns:
        "likelihood", and what `experiment.evaluate` tells.
    """
    data_key, likelihood_key, rest_key = jax.random.split(key, 3)
    report: dict[str, Any] = {}
    if (likelihood := experiment.likelihood) is not None:
        examples = likelihood.examples(split, data_key)
        path = None if folder is None else folder / f"likelihood_{split}.csv"
        rows = likelihood_rows(
            likelihood, params, examples, likelihood_key, path=path, mesh=mesh, progress=progress
        )
        found = likelihood_report(likelihood, examples, rows)
        sweeps = likelihood_sweeps(likelihood, params, examples, likelihood_key)
        report["likelihood"] = found | ({"sweeps": sweeps} if sweeps else {})
        if path is not None and "nll_nats" in found:
            plotting.likelihood(rows["nll_nats"], path.with_suffix(".png"), sweeps=sweeps)
    if split == "test":
        report |= experiment.evaluate(params, rest_key, mesh=mesh)
        if folder is not None and "overfitting" in report:
            plotting.loss_by_noise(report["overfitting"]["levels"], folder / "overfitting.png")
    return report


def energies(drawn: Any, fresh: Any, pool: Any, key: Key) -> dict[str, Any]:
    """Energy distance of samples to fresh data, beside that of as many real data of a pool.

    Args:
        drawn: samples [n, …].
        fresh: data [m, …] that the model has not seen.
        pool: further data, at least n.
        key: draws the subsets of the null.
    """
    energy = metrics.energy_distance(drawn, fresh)
    null = metrics.energy_null(key, pool, fresh, len(drawn))
    return {
        "samples": len(drawn),
        "energy_distance": energy,
        "energy_null": null,
        "energy_over_null": energy / null,
    }


def energy_report(samples: Array, density: Any, key: Key) -> dict[str, Any]:
    """Energy distance of samples to as many fresh points of a density, beside its null."""
    fresh_key, pool_key, null_key = jax.random.split(key, 3)
    num = len(samples)
    return energies(
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
    report = energies(drawn, fresh, seen, key)
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
