"""A variational diffusion model of 8×8 digits: the likelihood of their grey levels, bounded.

    jaxdiff train configs/vdm_digits.py --workdir runs/vdm

trains network and noise schedule by the bound itself, on scikit-learn's digits and two CPU cores,
then samples, and bounds the likelihood of the test images. No dequantisation: the decoder gives
each grey level its probability.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp

import jaxdiff as jd
from jaxdiff.data.images import to_model
from jaxdiff.objectives.vdm import bound, level_decoder, vdm
from jaxdiff.recipes import (
    ImageOptions,
    TrainingOptions,
    UNetOptions,
    at_least,
    image_experiment,
    open_images,
)
from jaxdiff.schedules import learned_gamma


@dataclass(frozen=True)
class Config(TrainingOptions, UNetOptions, ImageOptions):
    """A variational diffusion model of small images."""

    width: int = 24
    """Channels of the U-Net's first level."""
    dropout: float = 0.2
    """Dropout rate in the residual blocks."""
    steps: int = 4000
    """Updates of the parameters."""
    ema_decay: float = 0.998
    """Decay of the averaged parameters."""
    fourier: tuple[int, ...] = (3, 4)
    """Exponents n of the waves sin(2ⁿπx) and cos(2ⁿπx) that the network sees beside x."""
    gamma_min: float = -9.0
    """Minus the log-SNR of the data's end, before training."""
    gamma_max: float = 5.0
    """Minus the log-SNR of the prior's end, before training."""
    hidden: int = 16
    """Hidden units of the noise schedule; 0 for one that stays linear in t."""
    sampler_steps: int = 128
    """Network calls for a sample."""
    bound_draws: int = 64
    """Times at which the bound of an image is estimated."""


def experiment(config: Config) -> jd.Experiment:
    """Composes the run."""
    at_least(1, config, "sampler_steps", "bound_draws")
    config, images, shape, levels = open_images(config)

    grid = jd.grids.uniform(config.sampler_steps)
    schedule = learned_gamma(config.gamma_min, config.gamma_max, hidden=config.hidden)
    start = jd.Gaussian(schedule)
    net = config.unet(fourier=config.fourier)
    objective = functools.partial(vdm, net.apply, jd.v(), decoder=level_decoder(levels))
    trained, held_out = objective(dropout=config.dropout > 0.0), objective()

    def init(key):
        network = net.init(key, jnp.zeros((1, *shape)), jnp.zeros(1))
        return {"network": network, "schedule": vars(schedule)}

    def of_levels(objective):
        def in_bits(params, key, batch):
            batch = batch | {"x": to_model(batch["x"], levels)}
            return jax.tree.map(lambda nats: nats / jnp.log(2.0), objective(params, key, batch))

        return in_bits

    def denoiser(params):
        # Of the process before training, which is the one that the experiment can name.
        return jd.Rescaled(held_out.denoiser(params), held_out.process(params), start)

    def run(params, keys, **options):
        first, noise = jax.vmap(jax.random.split, out_axes=1)(keys)
        process = held_out.process(params)
        x = jax.vmap(process.prior(shape).sample)(first)
        return jd.sample(
            jd.Ancestral(process), held_out.denoiser(params), grid, noise, x, **options
        )

    def estimate(params, keys, x):
        return bound(held_out, params, keys, to_model(x, levels), draws=config.bound_draws)

    return image_experiment(
        config,
        images,
        init=init,
        process=start,
        denoiser=denoiser,
        loss=of_levels(trained),
        held_out_loss=of_levels(held_out),
        run=run,
        grid=grid,
        estimate=estimate,
        place=lambda keys, x: to_model(x, levels),
    )
