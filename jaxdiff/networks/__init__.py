"""Flax networks: natively batched, `apply(params, x, noise_level, label=None) -> like x`.

A network is given the state x [b, ...], one smooth scalar noise level per example [b] (such as
log-SNR / 4) and, when it was built with `num_classes`, a label per example [b]. It knows nothing of
processes or of what its output means: that is the parameterization's business. Dropout acts if and
only if a random key named "dropout" is given: `apply(..., rngs={"dropout": key})`.
"""

from jaxdiff.networks.autoencoder import AutoencoderKL as AutoencoderKL
from jaxdiff.networks.dequantizer import Dequantizer as Dequantizer
from jaxdiff.networks.dit import DiT as DiT
from jaxdiff.networks.edm2 import EDM2 as EDM2
from jaxdiff.networks.embeddings import GaussianFourier as GaussianFourier
from jaxdiff.networks.embeddings import Sinusoidal as Sinusoidal
from jaxdiff.networks.embeddings import SmoothFeatures as SmoothFeatures
from jaxdiff.networks.energy import Conservative as Conservative
from jaxdiff.networks.energy import log_density as log_density
from jaxdiff.networks.mlp import MLP as MLP
from jaxdiff.networks.nnx import from_nnx as from_nnx
from jaxdiff.networks.transformer import Transformer as Transformer
from jaxdiff.networks.unet import UNet as UNet
from jaxdiff.networks.uvit import UViT as UViT

__all__ = [
    "EDM2",
    "MLP",
    "AutoencoderKL",
    "Conservative",
    "Dequantizer",
    "DiT",
    "GaussianFourier",
    "Sinusoidal",
    "SmoothFeatures",
    "Transformer",
    "UNet",
    "UViT",
    "from_nnx",
    "log_density",
]
