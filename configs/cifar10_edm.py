"""EDM of CIFAR-10: DDPM++ with EDM's preconditioning, noise levels, weights and sampler.

    jaxdiff train configs/cifar10_edm.py --workdir runs/edm

Values are those of Karras et al. 2022, arXiv 2206.00364, configuration F, and of the training
script that its authors released (github.com/NVlabs/edm: train.py, "script" below), but for its
augmentation: of that only the mirrored images are here. The data set must have been prepared: see
the README. A run of that length is for an accelerator.
"""

import functools
import math
from dataclasses import dataclass

import jaxdiff as jd
from jaxdiff import networks, parameterizations, weightings
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
    """EDM and its training."""

    dataset: str = "cifar10"
    """TFDS name, a folder of PNG or JPEG files, or an .npz file of your own."""
    flip: bool = True
    """Mirror every other training image, left to right, at random."""
    width: int = 128
    """Channels of the U-Net's first level. (Script: cbase.)"""
    multipliers: tuple[int, ...] = (2, 2, 2)
    """Channels of each level over width; each level halves the side. (Script: cres.)"""
    blocks: int = 4
    """Residual blocks a level. (Appendix F.2.)"""
    attention: tuple[int, ...] = (16,)
    """Sides, in pixels, of the levels with self-attention. (Appendix F.2.)"""
    dropout: float = 0.13
    """Dropout rate in the residual blocks. (Table 7.)"""
    steps: int = 390_625
    """Updates of the parameters. (Table 7: 200 million images.)"""
    batch_size: int = 512
    """Examples in a batch, over all devices. (Table 7.)"""
    learning_rate: float = 1e-3
    """Highest rate of Adam, after the warm-up. (Table 7.)"""
    warmup: int = 19_531
    """Updates of the warm-up. (Table 7: 10 million images.)"""
    cosine: bool = False
    """Lower the rate along a cosine after the warm-up, else keep it."""
    clip: float = math.inf
    """Largest norm of the gradient. (None in the script.)"""
    ema_decay: float = 0.99929
    """Decay of the averaged parameters. (Table 7: a half-life of 0.5 million images.)"""
    sigma_min: float = 0.002
    """Standard deviation of the noise at t = 0. (Table 1.)"""
    sigma_max: float = 80.0
    """Standard deviation of the noise at t = 1. (Table 1.)"""
    sigma_data: float = 0.5
    """Standard deviation of the data. (Table 1.)"""
    log_sigma_mean: float = -1.2
    """Mean of the log noise level in training. (Table 1: P_mean.)"""
    log_sigma_std: float = 1.2
    """Standard deviation of the log noise level in training. (Table 1: P_std.)"""
    sampler_steps: int = 18
    """Steps of the sampler, of two network calls each. (Section 5.)"""


def experiment(config: Config) -> jd.Experiment:
    """Composes the run."""
    at_least(1, config, "sampler_steps")
    config, images, _, _ = open_images(config)

    process = jd.Gaussian(jd.edm(config.sigma_min, config.sigma_max))
    parameterization = parameterizations.edm(
        config.sigma_data, noise_level=parameterizations.quarter_log_sigma
    )
    net = config.unet(embedding=networks.Sinusoidal(config.width))
    return score_experiment(
        config,
        images,
        net=net,
        process=process,
        parameterization=parameterization,
        objective=functools.partial(
            jd.denoising,
            net.apply,
            process,
            parameterization,
            weighting=weightings.edm(config.sigma_data),
            time_sampler=jd.time_samplers.log_normal(config.log_sigma_mean, config.log_sigma_std),
        ),
        step=jd.EDMSampler(process),
        grid=jd.grids.karras(process, config.sampler_steps),
    )
