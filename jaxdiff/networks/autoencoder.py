"""The autoencoder of latent diffusion: images to a few channels on a coarse grid, and back.

For images x [b, h, w, c] and L levels, each of half the side of the last, f = 2^(L - 1), the
encoder gives a normal distribution of latents z [b, h/f, w/f, d] and the decoder an image,

    q(z|x) = N(mean(x), exp(logvar(x))),      x ≈ D(z),

trained on the reconstruction's error and a small weight times KL(q(z|x) || N(0, I)): enough to keep
latents near the origin, too little for them to be draws of N(0, I). That is left to the diffusion
model, which learns the law of z, scaled to unit variance.

Both halves are built like DDPM's U-Net without its skips: residual blocks which are told neither
noise level nor class, convolutions of stride 2 on the way down, repeated pixels and a convolution
on the way up, and attention at the coarsest level alone.

References: Rombach et al. 2022, arXiv 2112.10752, section 3.1 and appendix G; Kingma and Welling
2014, arXiv 1312.6114; Ho et al. 2020, arXiv 2006.11239, appendix B (the U-Net).
"""

from functools import partial

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Float

from jaxdiff.networks import cpu
from jaxdiff.networks.unet import DDPM, Attention, Norm, ResBlock, Variant, doubled, widened
from jaxdiff.typing import Array

__all__ = ["AutoencoderKL"]

Image = Float[Array, "b h w c"]
Latent = Float[Array, "b h2 w2 d"]


class _Coder(nn.Module):
    """What encoder and decoder have in common."""

    features: int
    channels: tuple[int, ...]
    blocks: int
    attention: bool
    variant: Variant
    dtype: DTypeLike

    def block(self, channels: int, name: str) -> ResBlock:
        return ResBlock(channels, 0.0, False, self.variant, self.dtype, name=name)

    def middle(self, h: Image) -> Image:
        h = self.block(self.channels[-1], "middle_block_0")(h)
        if self.attention:
            h = Attention(None, self.variant, self.dtype, name="middle_attention")(h)
        return self.block(self.channels[-1], "middle_block_1")(h)

    def read(self, h: Image) -> Float[Array, "b h w c2"]:
        wide = widened(self.dtype)
        h = nn.silu(Norm(self.variant, wide, name="out_norm")(h))
        return cpu.Conv(self.features, (3, 3), dtype=wide, name="out_conv")(h)


class _Encoder(_Coder):
    @nn.compact
    def __call__(self, x: Image) -> Latent:
        conv = partial(cpu.Conv, kernel_size=(3, 3), dtype=self.dtype)
        padding = (self.variant.padding, self.variant.padding)
        h = conv(self.channels[0], name="in")(x)
        for level, n in enumerate(self.channels):
            if level > 0:
                h = conv(h.shape[-1], strides=2, padding=padding, name=f"down_{level}")(h)
            for i in range(self.blocks):
                h = self.block(n, f"down_{level}_block_{i}")(h)
        return self.read(self.middle(h))


class _Decoder(_Coder):
    @nn.compact
    def __call__(self, z: Latent) -> Image:
        conv = partial(cpu.Conv, kernel_size=(3, 3), dtype=self.dtype)
        h = self.middle(conv(self.channels[-1], name="in")(z))
        for level, n in reversed(list(enumerate(self.channels))):
            for i in range(self.blocks + 1):
                h = self.block(n, f"up_{level}_block_{i}")(h)
            if level > 0:
                _, height, width, _ = h.shape
                h = conv(n, name=f"up_{level}")(doubled(h, (2 * height, 2 * width)))
        return self.read(h)


class AutoencoderKL(nn.Module):
    """Images [b, h, w, c] -> the moments of their latents [b, h/f, w/f, d]; latents -> images.

    `net.apply(params, x, method="encode")` and `net.apply(params, z, method="decode")` are its
    halves. The defaults are Stable Diffusion's, of 83,653,863 parameters for RGB.

    Args:
        channels: of each level; each but the first halves the side, so f = 2^(levels - 1).
        blocks: residual blocks a level of the encoder; the decoder has one more.
        latent_channels: d.
        out_channels: of the decoded images.
        groups: of the norms; must divide the channels of every level.
        attention: whether the middle attends.
        use_quant_conv: mix channels once more after the encoder and before the decoder.
        dtype: of the computation; parameters, norms, softmax and the outputs stay in float32.

    Raises:
        ValueError: if f does not divide a side of the images, or `groups` not the channels.
    """

    channels: tuple[int, ...] = (128, 256, 512, 512)
    blocks: int = 2
    latent_channels: int = 4
    out_channels: int = 3
    groups: int = 32
    attention: bool = True
    use_quant_conv: bool = True
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        """Builds the halves."""
        if any(n % self.groups for n in self.channels):
            raise ValueError(
                f"groups must divide the channels of every level, {self.channels}, got "
                f"{self.groups}"
            )
        d, variant = self.latent_channels, DDPM._replace(groups=self.groups)
        sizes = (self.channels, self.blocks, self.attention, variant, self.dtype)
        self.encoder = _Encoder(2 * d, *sizes)
        self.decoder = _Decoder(self.out_channels, *sizes)
        if self.use_quant_conv:
            self.quant_conv = cpu.Conv(2 * d, (1, 1), dtype=widened(self.dtype))
            self.post_quant_conv = cpu.Conv(d, (1, 1), dtype=self.dtype)

    def encode(self, x: Image) -> tuple[Latent, Latent]:
        """Return mean and log-variance of q(z|x), each [b, h/f, w/f, d].

        The log-variance is kept in [-30, 20], as in the published code.
        """
        factor = 2 ** (len(self.channels) - 1)
        if x.ndim != 4 or any(side % factor for side in x.shape[1:3]):
            raise ValueError(
                f"x must be images [b, h, w, c] of sides that {factor} divides, got shape {x.shape}"
            )
        h = self.encoder(x)
        h = self.quant_conv(h) if self.use_quant_conv else h
        mean, logvar = jnp.split(h, 2, axis=-1)
        return mean, jnp.clip(logvar, -30.0, 20.0)

    def decode(self, z: Latent) -> Image:
        """Return the images [b, f h2, f w2, c] of latents [b, h2, w2, d]."""
        return self.decoder(self.post_quant_conv(z) if self.use_quant_conv else z)

    def __call__(self, x: Image) -> Float[Array, "b h w c2"]:
        """Return the image of the latents' mean."""
        return self.decode(self.encode(x)[0])
