"""A variational diffusion model of CIFAR-10, as published, by the bound of its grey levels.

    jaxdiff train configs/cifar10_vdm.py --workdir runs/vdm

Values are those of Kingma et al. 2021, arXiv 2107.00630, and of the config that its authors
released (github.com/google-research/vdm: configs/cifar10.py, "code" below), without augmentation.
The network is told its noise level by this library's smooth features; theirs is given a number that
is always zero beside its own, and has 512 parameters more for it. The data set must have been
prepared: see the README. A run of that length is for accelerators.
"""

from dataclasses import dataclass

import jaxdiff as jd
from jaxdiff import networks
from jaxdiff.networks.unet import VDM
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
    """The variational diffusion model and its training."""

    dataset: str = "cifar10"
    """TFDS name, a folder of PNG or JPEG files, or an .npz file of your own."""
    width: int = 128
    """Channels of the U-Net. (Code: sm_n_embd.)"""
    multipliers: tuple[int, ...] = (1,)
    """Channels of each level over width; one level: no side is ever halved. (Appendix B.)"""
    blocks: int = 32
    """Residual blocks on the way down. (Code: sm_n_layer.)"""
    attention: tuple[int, ...] = ()
    """Sides, in pixels, of the levels with self-attention, beside the middle. (Appendix B.)"""
    dropout: float = 0.1
    """Dropout rate in the residual blocks. (Code: sm_pdrop.)"""
    steps: int = 10_000_000
    """Updates of the parameters. (Code: num_steps_train.)"""
    batch_size: int = 128
    """Examples in a batch, over all devices. (Code.)"""
    learning_rate: float = 2e-4
    """Highest rate of Adam, after the warm-up. (Code.)"""
    warmup: int = 100
    """Updates of the warm-up. (Code: num_steps_lr_warmup.)"""
    cosine: bool = False
    """Lower the rate along a cosine after the warm-up, else keep it. (Code: lr_decay.)"""
    clip: float = float("inf")
    """Largest norm of the gradient. (None in the code.)"""
    second_moment: float = 0.99
    """Decay of Adam's average of squared gradients. (Code: b2.)"""
    weight_decay: float = 0.01
    """Decay of matrices and kernels, times the rate. (Code, which also decays gains of norms.)"""
    ema_decay: float = 0.9999
    """Decay of the averaged parameters. (Code: ema_rate.)"""
    fourier: tuple[int, ...] = (7, 8)
    """Exponents n of the waves sin(2ⁿπx) and cos(2ⁿπx) beside x. (Appendix C.)"""
    gamma_min: float = -13.3
    """Minus the log-SNR of the data's end, before training. (Code.)"""
    gamma_max: float = 5.0
    """Minus the log-SNR of the prior's end, before training. (Code.)"""
    hidden: int = 0
    """Hidden units of the noise schedule; 0 for one that stays linear in t. (Code: gamma_type.)"""
    sampler_steps: int = 1000
    """Network calls for a sample. (Code.)"""


def experiment(config: Config) -> jd.Experiment:
    """Composes the run."""
    config, images, _, _ = open_images(config)
    net = config.unet(
        variant=VDM, embedding=networks.SmoothFeatures(config.width), fourier=config.fourier
    )
    return vdm_experiment(config, images, net, jd.epsilon())
