"""NCSN++ of CIFAR-10 under the VE SDE, as published; `--blocks 8` is the deep one.

    jaxdiff train configs/cifar10_ncsnpp_ve.py --workdir runs/ncsnpp

Values are those of Song et al. 2021, arXiv 2011.13456, and of the configs that its authors released
(github.com/yang-song/score_sde: ve/cifar10_ncsnpp_continuous, "code" below). There images lie in
[0, 1], here in [−1, 1]: the noise levels are twice theirs, and the network is told the logarithm of
half of them. Its input is divided by √(1 + σ²), which the paper does not do. The data set must have
been prepared: see the README. A run of that length is for an accelerator.
"""

import functools
from dataclasses import dataclass

import jax.numpy as jnp

import jaxdiff as jd
from jaxdiff import networks
from jaxdiff.networks.unet import NCSNPP
from jaxdiff.parameterizations import log_sigma
from jaxdiff.recipes import (
    ImageOptions,
    ScoreOptions,
    TrainingOptions,
    UNetOptions,
    at_least,
    open_images,
    score_experiment,
)


@dataclass(frozen=True)
class Config(TrainingOptions, UNetOptions, ImageOptions, ScoreOptions):
    """NCSN++ and its training under the VE SDE."""

    dataset: str = "cifar10"
    """TFDS name, a folder of PNG or JPEG files, or an .npz file of your own."""
    flip: bool = True
    """Mirror every other training image, left to right, at random. (Code: random_flip.)"""
    width: int = 128
    """Channels of the U-Net's first level. (Code: nf.)"""
    multipliers: tuple[int, ...] = (1, 2, 2, 2)
    """Channels of each level over width; each level halves the side. (Code: ch_mult.)"""
    blocks: int = 4
    """Residual blocks a level: 4, or 8 for the deep network. (Appendix H.)"""
    attention: tuple[int, ...] = (16,)
    """Sides, in pixels, of the levels with self-attention. (Code: attn_resolutions.)"""
    dropout: float = 0.1
    """Dropout rate in the residual blocks. (Code.)"""
    fourier_scale: float = 16.0
    """Standard deviation of the frequencies of the noise level's features. (Appendix H.)"""
    steps: int = 1_300_000
    """Updates of the parameters. (Code: n_iters; the deep networks took 950,000, appendix H.)"""
    batch_size: int = 128
    """Examples in a batch, over all devices. (Appendix H.)"""
    learning_rate: float = 2e-4
    """Highest rate of Adam, after the warm-up. (Appendix H.)"""
    warmup: int = 5000
    """Updates of the warm-up. (Appendix H.)"""
    cosine: bool = False
    """Lower the rate along a cosine after the warm-up, else keep it."""
    clip: float = 1.0
    """Largest norm of the gradient. (Appendix H.)"""
    ema_decay: float = 0.999
    """Decay of the averaged parameters. (Appendix H: 0.999 for VE, 0.9999 for VP.)"""
    sigma_min: float = 0.02
    """Standard deviation of the noise at t = 0. (Appendix C: 0.01 for images in [0, 1].)"""
    sigma_max: float = 100.0
    """Standard deviation of the noise at t = 1. (Appendix C: 50 for images in [0, 1].)"""
    sampler_steps: int = 1000
    """Steps of the sampler, a predictor and a corrector each. (Section 4.)"""
    snr: float = 0.16
    """Signal-to-noise ratio of the corrector. (Code.)"""
    tolerance: float = 1e-5
    """Of the likelihood's ODE solver. (Appendix D.2.)"""


def experiment(config: Config) -> jd.Experiment:
    """Composes the run."""
    at_least(1, config, "sampler_steps")
    config, images, _, _ = open_images(config)

    process = jd.Gaussian(jd.exploding(config.sigma_min, config.sigma_max))
    parameterization = jd.epsilon(noise_level=log_half_sigma)
    net = config.unet(
        variant=NCSNPP,
        embedding=networks.GaussianFourier(2 * config.width, config.fourier_scale),
    )
    return score_experiment(
        config,
        images,
        net=net,
        process=process,
        parameterization=parameterization,
        objective=functools.partial(jd.denoising, net.apply, process, parameterization),
        step=jd.PredictorCorrector(
            jd.Ancestral(process), jd.Langevin(process, snr=config.snr), corrector_first=True
        ),
        grid=jd.grids.uniform(config.sampler_steps),
    )


def log_half_sigma(process, t):
    """The noise level's logarithm, in units of [0, 1]."""
    return log_sigma(process, t) - jnp.log(2.0)
