"""U-ViT-S/2 of CIFAR-10 under the VP SDE, as published.

    jaxdiff train configs/cifar10_uvit.py --workdir runs/uvit

Values are those of Bao et al. 2023, arXiv 2209.12152, and of the config that its authors released
(github.com/baofff/U-ViT: configs/cifar10_uvit_small.py, "code" below). Unlike theirs, the last
convolution starts at zero, and the waves of the time are those of DDPM. The data set must have been
prepared: see the README. A run of that length is for an accelerator.
"""

import functools
import math
from dataclasses import dataclass

import jax.numpy as jnp

import jaxdiff as jd
from jaxdiff import networks
from jaxdiff.parameterizations import discrete_time
from jaxdiff.recipes import (
    ImageOptions,
    ScoreOptions,
    TrainingOptions,
    at_least,
    one_of,
    open_images,
    score_experiment,
)


@dataclass(frozen=True)
class Config(TrainingOptions, ImageOptions, ScoreOptions):
    """U-ViT and its training under the VP SDE."""

    dataset: str = "cifar10"
    """TFDS name, a folder of PNG or JPEG files, or an .npz file of your own."""
    flip: bool = True
    """Mirror every other training image, left to right, at random. (Code: random_flip.)"""
    patch: int = 2
    """Side of a patch, in pixels. (Code.)"""
    width: int = 512
    """Features of a token. (Table 1.)"""
    depth: int = 13
    """Blocks; odd. (Table 1.)"""
    heads: int = 8
    """Attention heads. (Table 1.)"""
    dropout: float = 0.0
    """Dropout rate in the blocks. (None in the code.)"""
    dtype: str = "float32"
    """Of the network's computation: float32, or bfloat16 on an accelerator that has it."""
    remat: bool = False
    """Save memory: compute the inside of the blocks again for the gradient."""
    steps: int = 500_000
    """Updates of the parameters. (Code: n_steps.)"""
    batch_size: int = 128
    """Examples in a batch, over all devices. (Code.)"""
    learning_rate: float = 2e-4
    """Highest rate of Adam, after the warm-up. (Code: lr.)"""
    warmup: int = 2500
    """Updates of the warm-up. (Code: warmup_steps.)"""
    cosine: bool = False
    """Lower the rate along a cosine after the warm-up, else keep it."""
    clip: float = math.inf
    """Largest norm of the gradient. (None in the code.)"""
    first_moment: float = 0.99
    """Decay of Adam's average of gradients. (Code: betas.)"""
    weight_decay: float = 0.03
    """Decay of matrices and kernels, times the rate. (Code, of all parameters.)"""
    ema_decay: float = 0.9999
    """Decay of the averaged parameters. (Code: train.py.)"""
    beta_min: float = 0.1
    """Rate of the process at t = 0. (Code: sde.py.)"""
    beta_max: float = 20.0
    """Rate of the process at t = 1. (Code: sde.py.)"""
    sampler_steps: int = 1000
    """Steps of the sampler: Euler–Maruyama. (Code: sample_steps.)"""


def experiment(config: Config) -> jd.Experiment:
    """Composes the run."""
    at_least(1, config, "sampler_steps", "patch", "width", "heads")
    one_of(config, dtype=("float32", "bfloat16"))
    if not 0.0 <= config.dropout < 1.0:
        raise ValueError(f"dropout must be in [0, 1), got {config.dropout}.")
    config, images, _, _ = open_images(config)

    process = jd.Gaussian(jd.linear_beta(config.beta_min, config.beta_max))
    parameterization = jd.epsilon(noise_level=discrete_time)
    net = networks.UViT(
        patch=config.patch,
        width=config.width,
        depth=config.depth,
        heads=config.heads,
        dropout=config.dropout,
        dtype=jnp.dtype(config.dtype),
        remat=config.remat,
        embedding=networks.Sinusoidal(config.width),
    )
    return score_experiment(
        config,
        images,
        net=net,
        process=process,
        parameterization=parameterization,
        objective=functools.partial(jd.denoising, net.apply, process, parameterization),
        step=jd.EulerMaruyama(process, final_noise=False),
        grid=jd.grids.uniform(config.sampler_steps),
    )
