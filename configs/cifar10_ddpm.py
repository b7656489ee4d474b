"""DDPM of CIFAR-10, as published: a chain of 1,000 steps, and a U-Net that predicts its noise.

    jaxdiff train configs/cifar10_ddpm.py --workdir runs/ddpm

Values are those of Ho et al. 2020, arXiv 2006.11239, and of the script that its authors released
(github.com/hojonathanho/diffusion: scripts/run_cifar.py, "script" below). The data set must have
been prepared: see the README. A run of that length is for an accelerator.
"""

import functools
from dataclasses import dataclass

import numpy as np

import jaxdiff as jd
from jaxdiff import networks
from jaxdiff.networks.unet import DDPM
from jaxdiff.parameterizations import StepNumber
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
    """DDPM and its training."""

    dataset: str = "cifar10"
    """TFDS name, a folder of PNG or JPEG files, or an .npz file of your own."""
    flip: bool = True
    """Mirror every other training image, left to right, at random. (Appendix B.)"""
    width: int = 128
    """Channels of the U-Net's first level. (Script: ch.)"""
    multipliers: tuple[int, ...] = (1, 2, 2, 2)
    """Channels of each level over width; each level halves the side. (Script: ch_mult.)"""
    blocks: int = 2
    """Residual blocks a level. (Appendix B.)"""
    attention: tuple[int, ...] = (16,)
    """Sides, in pixels, of the levels with self-attention. (Appendix B.)"""
    dropout: float = 0.1
    """Dropout rate in the residual blocks. (Appendix B.)"""
    steps: int = 800_000
    """Updates of the parameters. (Appendix B.)"""
    batch_size: int = 128
    """Examples in a batch, over all devices. (Appendix B.)"""
    learning_rate: float = 2e-4
    """Highest rate of Adam, after the warm-up. (Appendix B.)"""
    warmup: int = 5000
    """Updates of the warm-up. (Script.)"""
    cosine: bool = False
    """Lower the rate along a cosine after the warm-up, else keep it."""
    clip: float = 1.0
    """Largest norm of the gradient. (Script: grad_clip.)"""
    ema_decay: float = 0.9999
    """Decay of the averaged parameters. (Appendix B.)"""
    train_steps: int = 1000
    """Steps T of the chain. (Section 4.)"""
    beta_first: float = 1e-4
    """Variance that the first step adds. (Section 4.)"""
    beta_last: float = 0.02
    """Variance that the last step adds; between them it grows linearly. (Section 4.)"""
    sampler_steps: int = 1000
    """Steps of the sampler. (Section 4: all of the chain.)"""


def experiment(config: Config) -> jd.Experiment:
    """Composes the run."""
    at_least(1, config, "sampler_steps", "train_steps")
    config, images, _, _ = open_images(config)

    betas = np.linspace(config.beta_first, config.beta_last, config.train_steps)
    process = jd.Gaussian(jd.from_betas(betas))
    parameterization = jd.epsilon(noise_level=StepNumber(config.train_steps))
    net = config.unet(variant=DDPM, embedding=networks.Sinusoidal(config.width))
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
            time_sampler=jd.time_samplers.steps(config.train_steps),
        ),
        step=jd.Ancestral(process),
        grid=jd.grids.trailing(config.sampler_steps, config.train_steps),
        sampled=functools.partial(jd.UnitVariance, process),  # the script's fixedlarge
    )
