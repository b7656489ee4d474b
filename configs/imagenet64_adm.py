"""ADM of ImageNet at 64 × 64: mean and variance of every step of DDPM, of a class or of none.

    jaxdiff train configs/imagenet64_adm.py --workdir runs/adm

Values are those of Dhariwal and Nichol 2021, arXiv 2105.05233, and of the flags of its authors'
code (github.com/openai/guided-diffusion, "code" below). The data set must have been prepared: see
the README. A run of that length is for many accelerators.
"""

import functools
from dataclasses import dataclass

import jaxdiff as jd
from jaxdiff import networks
from jaxdiff.networks.unet import ADM
from jaxdiff.parameterizations import StepNumber
from jaxdiff.recipes import (
    ClassOptions,
    ImageOptions,
    ScoreOptions,
    TrainingOptions,
    UNetOptions,
    at_least,
    open_images,
    score_experiment,
)
from jaxdiff.schedules import cosine_betas


@dataclass(frozen=True)
class Config(TrainingOptions, UNetOptions, ImageOptions, ClassOptions, ScoreOptions):
    """ADM and its training."""

    dataset: str = "imagenet_resized/64x64"
    """TFDS name, a folder of PNG or JPEG files, or an .npz file of your own."""
    num_classes: int = 1000
    """Number of classes."""
    label_dropout: float = 0.1
    """How often training shows an image without its class. (0 in the paper, whose guidance is by a
    classifier.)"""
    width: int = 192
    """Channels of the U-Net's first level. (Code: num_channels.)"""
    multipliers: tuple[int, ...] = (1, 2, 3, 4)
    """Channels of each level over width; each level halves the side. (Table 11.)"""
    blocks: int = 3
    """Residual blocks a level. (Code: num_res_blocks.)"""
    attention: tuple[int, ...] = (32, 16, 8)
    """Sides, in pixels, of the levels with self-attention. (Code: attention_resolutions.)"""
    head_width: int = 64
    """Channels of an attention head. (Code: num_head_channels.)"""
    dropout: float = 0.1
    """Dropout rate in the residual blocks. (Code.)"""
    steps: int = 540_000
    """Updates of the parameters. (Table 11.)"""
    batch_size: int = 2048
    """Examples in a batch, over all devices. (Table 11.)"""
    learning_rate: float = 3e-4
    """Rate of Adam. (Table 11.)"""
    warmup: int = 0
    """Updates of the warm-up. (None in the code.)"""
    cosine: bool = False
    """Lower the rate along a cosine after the warm-up, else keep it."""
    clip: float = float("inf")
    """Largest norm of the gradient. (None in the code.)"""
    ema_decay: float = 0.9999
    """Decay of the averaged parameters. (Appendix on hyperparameters.)"""
    train_steps: int = 1000
    """Steps of the chain in training. (Code: diffusion_steps.)"""
    sampler_steps: int = 250
    """Steps of the sampler. (Code: timestep_respacing.)"""


def experiment(config: Config) -> jd.Experiment:
    """Composes the run."""
    at_least(1, config, "sampler_steps")
    at_least(2, config, "train_steps")
    config, images, shape, _ = open_images(config)

    process = jd.Gaussian(jd.from_betas(cosine_betas(config.train_steps)))
    parameterization = jd.learned_variance(
        jd.epsilon(noise_level=StepNumber(config.train_steps)), steps=config.train_steps
    )
    net = config.unet(
        variant=ADM,
        scale_shift=True,
        head_width=config.head_width,
        num_classes=config.num_classes,
        out_channels=2 * shape[-1],
        embedding=networks.Sinusoidal(config.width),
    )
    return score_experiment(
        config,
        images,
        net=net,
        process=process,
        parameterization=parameterization,
        objective=functools.partial(jd.improved_ddpm, net.apply, process, parameterization),
        step=jd.Ancestral(process),
        grid=jd.grids.trailing(config.sampler_steps, config.train_steps),
    )
