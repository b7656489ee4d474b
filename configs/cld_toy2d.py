"""A critically damped Langevin model of a density of the plane whose entropy is known exactly.

    jaxdiff train configs/cld_toy2d.py --dataset 8gaussians --workdir runs/cld

The points are given velocities, and only the score of those is learnt. `configs/toy2d.py` learns
the same densities with noise on the points themselves: the same network, the same training. The
likelihood here is a lower bound: that of point and velocity together, less the velocity's own.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp

import jaxdiff as jd
from jaxdiff.recipes import (
    MLPOptions,
    ToyOptions,
    TrainingOptions,
    at_least,
    solved,
    toy_experiment,
)


@dataclass(frozen=True)
class Config(TrainingOptions, MLPOptions, ToyOptions):
    """A critically damped Langevin model of a density of the plane."""

    beta: float = 4.0
    """Rate of the process's clock."""
    mass: float = 0.25
    """Variance of the velocity in equilibrium; that of the data's unit is 1."""
    gamma: float = 0.04
    """Variance of the velocity at t = 0, over the mass."""
    sigma_data: float = 2.0
    """The unit: about the standard deviation of a coordinate, 1.4 to 2.4 in these sets."""
    steps: int = 17000
    """Updates of the parameters."""
    batch_size: int = 256
    """Points in a batch, over all devices."""
    sampler_steps: int = 100
    """Network calls for a sample."""


def experiment(config: Config) -> jd.Experiment:
    """Composes the run."""
    at_least(1, config, "sampler_steps")
    if not config.sigma_data > 0.0:
        raise ValueError(f"sigma_data must be positive, got {config.sigma_data}.")
    toy, unit = config.toy(), config.sigma_data

    process = jd.cld(config.beta, config.mass, config.gamma)
    parameterization = jd.mixed_score()
    grid = jd.grids.quadratic(config.sampler_steps)
    net = config.mlp(out_features=2)
    matching = jd.hybrid_score_matching(
        net.apply,
        process,
        parameterization,
        time_sampler=jd.time_samplers.log_uniform(),
    )

    def objective(params, key, batch):
        return matching(params, key, {"x": batch["x"] / unit})

    def denoiser(params):
        return jd.NetDenoiser(params, process, net.apply, parameterization)

    def run(params, keys, **options):
        start, noise = jax.vmap(jax.random.split, out_axes=1)(keys)
        z = jax.vmap(process.prior((2, 2)).sample)(start)
        z = jd.sample(jd.SSCS(process), denoiser(params), grid, noise, z, **options)
        return unit * z[..., 0, :]

    def log_p(params, keys, x, **accuracy):
        bound = jd.joint_bound(process, denoiser(params), keys, x / unit, **accuracy)
        return bound._replace(value=bound.value - 2.0 * math.log(unit))

    return toy_experiment(
        config,
        toy,
        init=lambda key: net.init(key, jnp.zeros((1, 4)), jnp.zeros(1)),
        process=process,
        denoiser=denoiser,
        objective=objective,
        run=run,
        grid=grid,
        estimate=solved(log_p),
        sweeps={"tolerance": (1e-2, 1e-3, 1e-4, 1e-5)},
    )
