"""A score model of 8×8 digits, or of any set of images, by denoising under the VP SDE.

    jaxdiff train configs/digits.py --workdir runs/digits

trains on scikit-learn's digits in minutes on two CPU cores, then samples, and evaluates the
likelihood of the test images and the quality of the samples.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp

import jaxdiff as jd
from jaxdiff.recipes import (
    ImageOptions,
    TrainingOptions,
    UNetOptions,
    at_least,
    image_experiment,
    open_images,
    solved,
)


@dataclass(frozen=True)
class Config(TrainingOptions, UNetOptions, ImageOptions):
    """A variance-preserving score model of small images."""

    beta_min: float = 0.1
    """Rate of the VP process at t = 0."""
    beta_max: float = 20.0
    """Rate of the VP process at t = 1."""
    sampler_steps: int = 100
    """Network calls for a sample."""
    probes: int = 2
    """Hutchinson probes an image for the likelihood."""
    tolerance: float = 1e-4
    """Of the likelihood's ODE solver: the error of the worst image, relative and absolute."""


def experiment(config: Config) -> jd.Experiment:
    """Composes the run."""
    at_least(1, config, "sampler_steps")
    config, images, shape, _ = open_images(config)

    process = jd.Gaussian(jd.linear_beta(config.beta_min, config.beta_max))
    parameterization = jd.epsilon()
    grid = jd.grids.uniform_log_snr(process, config.sampler_steps)
    net = config.unet()
    denoising = functools.partial(
        jd.denoising,
        net.apply,
        process,
        parameterization,
        time_sampler=jd.time_samplers.low_discrepancy(),
    )

    def denoiser(params):
        return jd.NetDenoiser(params, process, net.apply, parameterization)

    def run(params, keys, **options):
        start, noise = jax.vmap(jax.random.split, out_axes=1)(keys)
        x = jax.vmap(process.prior(shape).sample)(start)
        step = jd.DDIM(process, eta=1.0)
        return jd.sample(step, denoiser(params), grid, noise, x, **options)

    def log_p(params, keys, x, **accuracy):
        return jd.log_likelihood(process, denoiser(params), x, key=keys, **accuracy)

    return image_experiment(
        config,
        images,
        init=lambda key: net.init(key, jnp.zeros((1, *shape)), jnp.zeros(1)),
        process=process,
        denoiser=denoiser,
        loss=denoising(dropout=config.dropout > 0.0),
        held_out_loss=denoising(),
        run=run,
        grid=grid,
        estimate=solved(log_p, tolerance=config.tolerance, probes=config.probes, shape=shape),
        sweeps={"tolerance": (1e-2, 1e-3, 1e-4, 1e-5), "probes": (1, 2, 4, 8)},
        further={"probes": lambda: config.probes},
    )
