"""Critically damped Langevin diffusion of 8×8 digits, or of any set of images.

    jaxdiff train configs/cld_digits.py --workdir runs/cld

As `configs/digits.py`, but each pixel is given a velocity, noise enters there, and its score is
what the U-Net learns. The likelihood is a lower bound: that of images and velocities together, less
the velocities' own.
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
    """A critically damped Langevin model of small images."""

    beta: float = 4.0
    """Rate of the process's clock."""
    mass: float = 0.25
    """Variance of the velocity in equilibrium; that of a pixel is 1."""
    gamma: float = 0.04
    """Variance of the velocity at t = 0, over the mass."""
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

    process = jd.cld(config.beta, config.mass, config.gamma)
    parameterization = jd.mixed_score()
    grid = jd.grids.quadratic(config.sampler_steps)
    net = config.unet(out_channels=shape[2])
    matching = functools.partial(
        jd.hybrid_score_matching,
        net.apply,
        process,
        parameterization,
        time_sampler=jd.time_samplers.log_uniform(),
    )

    def denoiser(params):
        return jd.NetDenoiser(params, process, net.apply, parameterization)

    def run(params, keys, **options):
        start, noise = jax.vmap(jax.random.split, out_axes=1)(keys)
        z = jax.vmap(process.prior((2, *shape)).sample)(start)
        z = jd.sample(jd.SSCS(process), denoiser(params), grid, noise, z, **options)
        return z[..., 0, :, :, :]

    def bound(params, keys, x, **accuracy):
        return jd.joint_bound(process, denoiser(params), keys, x, **accuracy)

    return image_experiment(
        config,
        images,
        init=lambda key: net.init(key, jnp.zeros((1, *shape[:2], 2 * shape[2])), jnp.zeros(1)),
        process=process,
        denoiser=denoiser,
        loss=matching(dropout=config.dropout > 0.0),
        held_out_loss=matching(),
        run=run,
        grid=grid,
        estimate=solved(bound, tolerance=config.tolerance, probes=config.probes, shape=(2, *shape)),
        sweeps={"tolerance": (1e-2, 1e-3, 1e-4), "probes": (1, 2, 4, 8)},
        further={"probes": lambda: config.probes},
    )
