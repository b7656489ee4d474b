"""Discrete diffusion of 8×8 digits: 64 pixels of 17 levels, masked and uncovered again.

    jaxdiff train configs/d3pm_digits.py --workdir runs/d3pm

trains on scikit-learn's digits on two CPU cores, then samples, and bounds the likelihood of the
test images. No dequantisation: the pixels are classes, and the bound is one on their probability.

The levels are ordinal, which the absorbing kernel does not know; so the network is told: it sees
each pixel as the row of thresholds that its level exceeds.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

import jaxdiff as jd
from jaxdiff.data.images import to_model
from jaxdiff.objectives.d3pm import masked_cross_entropy
from jaxdiff.objectives.elbo import elbo
from jaxdiff.processes import d3pm
from jaxdiff.recipes import (
    ImageOptions,
    TrainingOptions,
    UNetOptions,
    at_least,
    image_experiment,
    open_images,
)

MARK = 2.2412
"""Bits/dim of the digits' test split under a mixture of ten products of categoricals."""


@dataclass(frozen=True)
class Config(TrainingOptions, UNetOptions, ImageOptions):
    """An absorbing D3PM of small images."""

    width: int = 24
    """Channels of the U-Net's first level."""
    dropout: float = 0.2
    """Dropout rate in the residual blocks."""
    steps: int = 4000
    """Updates of the parameters."""
    ema_decay: float = 0.998
    """Decay of the averaged parameters."""
    sampler_steps: int = 128
    """Network calls for a sample."""
    bound_steps: int = 256
    """Steps of the chain whose likelihood is bounded."""


def experiment(config: Config) -> jd.Experiment:
    """Composes the run."""
    at_least(1, config, "sampler_steps", "bound_steps")
    config, images, shape, levels = open_images(config)
    mask, bits = levels, math.prod(shape) * math.log(2.0)

    grid = jd.grids.uniform(config.sampler_steps)
    process = d3pm.D3PM(d3pm.absorbing(levels + 1))
    parameterization = d3pm.Logits()
    net = config.unet(out_channels=shape[2] * levels)

    def see(tokens):
        """[b, h, w, c] levels as [b, h, w, c · levels]: thresholds ±1, 0 where masked; the mask."""
        hidden = (tokens == mask)[..., None]
        steps = jnp.arange(levels - 1).reshape(1, 1, 1, 1, -1)
        thresholds = jnp.where(tokens[..., None] > steps, 1.0, -1.0)
        seen = jnp.concatenate([hidden, jnp.where(hidden, 0.0, thresholds)], axis=-1)
        return seen.reshape(*tokens.shape[:3], -1)

    def apply(params, tokens, noise_level, **options):
        out = jnp.asarray(net.apply(params["net"], see(tokens), noise_level, **options))
        return out.reshape(*tokens.shape, levels) + params["pixels"][None]

    def init(key):
        blank = jnp.zeros((1, *shape), int)
        # What each pixel is like, before anything is seen of the others, is learned apart.
        pixels = jnp.zeros((*shape, levels))
        return {"net": net.init(key, see(blank), jnp.zeros(1)), "pixels": pixels}

    def objective_with(dropout):
        nats = masked_cross_entropy(apply, process, parameterization, dropout=dropout)

        def objective(params, key, batch):
            loss, parts = nats(params, key, batch)
            return loss / bits, parts

        return objective

    def denoiser(params):
        return jd.NetDenoiser(params, process, apply, parameterization)

    def run(params, keys, **options):
        start, noise = jax.vmap(jax.random.split, out_axes=1)(keys)
        x = jax.vmap(process.prior((*shape, levels + 1)).sample)(start)
        x = jd.sample(jd.Ancestral(process), denoiser(params), grid, noise, x, **options)
        tokens = jnp.argmax(x, axis=-1)
        return jnp.where(tokens == mask, 0.0, to_model(tokens, levels))  # masked pixels are grey

    def estimate(params, keys, tokens):
        chain = jd.grids.uniform(config.bound_steps)
        return elbo(process, denoiser(params), keys, jax.vmap(process.one_hot)(tokens), chain)

    def independent():
        test = images("test").x[: config.eval_images]
        return _independent(images("train").x, test, levels)

    further = {"independent_bits_per_dim": independent}
    if config.dataset == "digits":
        further["mixture_bits_per_dim"] = lambda: MARK
    return image_experiment(
        config,
        images,
        init=init,
        process=process,
        denoiser=denoiser,
        loss=objective_with(dropout=config.dropout > 0.0),
        held_out_loss=objective_with(dropout=False),
        run=run,
        grid=grid,
        estimate=estimate,
        place=lambda keys, tokens: jax.vmap(process.one_hot)(tokens),
        further=further,
    )


def _independent(train: np.ndarray, test: np.ndarray, levels: int) -> float:
    """Bits/dim of one categorical a pixel, with 0.3 pseudo-counts a level."""
    values = np.arange(levels)[:, None, None, None]
    counts = np.stack([(train == value).sum(0) for value in values]) + 0.3
    log_probs = np.log2(counts / counts.sum(0))
    return -float(np.mean(np.take_along_axis(log_probs, test, axis=0)))
