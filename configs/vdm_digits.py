"""A variational diffusion model of 8×8 digits: the likelihood of their grey levels, bounded.

    jaxdiff train configs/vdm_digits.py --workdir runs/vdm

trains network and noise schedule by the bound itself, on scikit-learn's digits and two CPU cores,
then samples, and bounds the likelihood of the test images. No dequantisation: the decoder gives
each grey level its probability.
"""

from dataclasses import dataclass

import jaxdiff as jd
from jaxdiff.recipes import (
    ImageOptions,
    TrainingOptions,
    UNetOptions,
    VDMOptions,
    open_images,
    vdm_experiment,
)


@dataclass(frozen=True)
class Config(TrainingOptions, UNetOptions, ImageOptions, VDMOptions):
    """A variational diffusion model of small images."""

    width: int = 24
    """Channels of the U-Net's first level."""
    dropout: float = 0.2
    """Dropout rate in the residual blocks."""
    steps: int = 4000
    """Updates of the parameters."""
    ema_decay: float = 0.998
    """Decay of the averaged parameters."""


def experiment(config: Config) -> jd.Experiment:
    """Composes the run."""
    config, images, _, _ = open_images(config)
    return vdm_experiment(config, images, config.unet(fourier=config.fourier), jd.v())
