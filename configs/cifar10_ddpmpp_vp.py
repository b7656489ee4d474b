"""DDPM++ of CIFAR-10 under the VP SDE, as published; `--blocks 8` is the deep one.

    jaxdiff train configs/cifar10_ddpmpp_vp.py --workdir runs/ddpmpp

Values are those of Song et al. 2021, arXiv 2011.13456, and of the configs that its authors released
(github.com/yang-song/score_sde: vp/cifar10_ddpmpp_continuous, "code" below). The data set must have
been prepared: see the README. A run of that length is for an accelerator.
"""

import functools
from dataclasses import dataclass

import jaxdiff as jd
from jaxdiff import networks
from jaxdiff.parameterizations import discrete_time
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
    """DDPM++ and its training under the VP SDE."""

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
    ema_decay: float = 0.9999
    """Decay of the averaged parameters. (Appendix H: 0.9999 for VP, 0.999 for VE.)"""
    beta_min: float = 0.1
    """Rate of the process at t = 0. (Appendix C.)"""
    beta_max: float = 20.0
    """Rate of the process at t = 1. (Appendix C.)"""
    sampler_steps: int = 1000
    """Steps of the sampler: Euler–Maruyama, the last without noise. (Section 4; code.)"""
    tolerance: float = 1e-5
    """Of the likelihood's ODE solver. (Appendix D.2.)"""


def experiment(config: Config) -> jd.Experiment:
    """Composes the run."""
    at_least(1, config, "sampler_steps")
    config, images, _, _ = open_images(config)

    process = jd.Gaussian(jd.linear_beta(config.beta_min, config.beta_max))
    parameterization = jd.epsilon(noise_level=discrete_time)
    net = config.unet(embedding=networks.Sinusoidal(config.width))
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
