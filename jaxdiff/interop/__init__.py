"""Weights of other libraries, as denoisers of this one.

A folder or file in somebody else's format becomes a `Pretrained`: a `NetDenoiser` with the process
that it was trained under, which every sampler, solve, likelihood and guidance here accepts; an
autoencoder of images becomes a `PretrainedAutoencoder`.
Everything is checked by name before anything is built: a missing, unknown or misshapen tensor, a
truncated file, a setting that no network here has. Nothing is downloaded, and no code of a file is
run.
"""

from jaxdiff.interop.autoencoder_kl import PretrainedAutoencoder as PretrainedAutoencoder
from jaxdiff.interop.autoencoder_kl import autoencoder_from_diffusers as autoencoder_from_diffusers
from jaxdiff.interop.autoencoder_kl import autoencoder_to_diffusers as autoencoder_to_diffusers
from jaxdiff.interop.base import Pretrained as Pretrained
from jaxdiff.interop.diffusers import from_diffusers as from_diffusers
from jaxdiff.interop.diffusers import to_diffusers as to_diffusers
from jaxdiff.interop.edm import from_edm as from_edm
from jaxdiff.interop.guided_diffusion import IMAGENET_64 as IMAGENET_64
from jaxdiff.interop.guided_diffusion import IMAGENET_128 as IMAGENET_128
from jaxdiff.interop.guided_diffusion import IMAGENET_256 as IMAGENET_256
from jaxdiff.interop.guided_diffusion import IMAGENET_512 as IMAGENET_512
from jaxdiff.interop.guided_diffusion import LSUN_256 as LSUN_256
from jaxdiff.interop.guided_diffusion import from_guided_diffusion as from_guided_diffusion
from jaxdiff.interop.score_sde import from_score_sde as from_score_sde

__all__ = [
    "IMAGENET_64",
    "IMAGENET_128",
    "IMAGENET_256",
    "IMAGENET_512",
    "LSUN_256",
    "Pretrained",
    "PretrainedAutoencoder",
    "autoencoder_from_diffusers",
    "autoencoder_to_diffusers",
    "from_diffusers",
    "from_edm",
    "from_guided_diffusion",
    "from_score_sde",
    "to_diffusers",
]
