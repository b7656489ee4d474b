"""A score model of a density of the plane whose entropy is known exactly.

    jaxdiff train configs/toy2d.py --dataset moons --workdir runs/moons

trains for less than a minute on two CPU cores. Every batch is fresh, so there is nothing to overfit
and one figure tells how good the model is: its negative log-likelihood exceeds the entropy by the
Kullback–Leibler divergence of the model from the truth.

One set of defaults serves all densities. With α = 1 and σ in geometric progression, times uniform
in t are uniform in log-SNR, so that the plain loss is the one that bounds the likelihood (Kingma et
al. 2021, arXiv:2107.00630, eq. 17). The range of σ decides the rest: below a fraction of the finest
detail there is nothing to learn but noise to fit, and what a network adds there the likelihood
pays for; σ_min = 0.02 itself costs about 0.001 nats for details of 0.08, and σ_max = 15 as much for
the prior. The waves let the network see rings thinner than their distance.
"""

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
    """A score model of a density of the plane."""

    sigma_min: float = 0.02
    """Noise at t = 0: small against the finest detail."""
    sigma_max: float = 15.0
    """Noise at t = 1: large against the data."""
    sigma_data: float = 2.0
    """Standard deviation of a coordinate, for EDM's preconditioning; 1.4 to 2.4 in these sets."""
    steps: int = 17000
    """Updates of the parameters."""
    batch_size: int = 256
    """Points in a batch, over all devices."""
    sampler_steps: int = 100
    """Network calls for a sample."""


def experiment(config: Config) -> jd.Experiment:
    """Composes the run."""
    at_least(1, config, "sampler_steps")
    toy = config.toy()

    process = jd.Gaussian(jd.exploding(config.sigma_min, config.sigma_max))
    parameterization = jd.parameterizations.edm(config.sigma_data)
    grid = jd.grids.uniform_log_snr(process, config.sampler_steps)
    net = config.mlp()
    objective = jd.denoising(
        net.apply, process, parameterization, time_sampler=jd.time_samplers.low_discrepancy()
    )

    def denoiser(params):
        return jd.NetDenoiser(params, process, net.apply, parameterization)

    def run(params, keys, **options):
        x = jax.vmap(process.prior((2,)).sample)(keys)
        return jd.sample(jd.DDIM(process), denoiser(params), grid, keys, x, **options)

    def log_p(params, keys, x, **accuracy):
        return jd.log_likelihood(process, denoiser(params), x, **accuracy)

    return toy_experiment(
        config,
        toy,
        init=lambda key: net.init(key, jnp.zeros((1, 2)), jnp.zeros(1)),
        process=process,
        denoiser=denoiser,
        shape=(2,),
        objective=objective,
        run=run,
        grid=grid,
        estimate=solved(log_p),
        sweeps={"tolerance": (1e-2, 1e-3, 1e-4, 1e-5)},
    )
