"""A U-Net for images: the DDPM++ architecture, for any even side of at least 8.

An image passes down through levels of halved side, through the middle, and up again; on its way up
each block is also given what its twin on the way down had computed. A block is

    h = conv(dropout(silu(norm(conv(resample(silu(norm(x)))) + W c))),    x <- (skip(x) + h) / √2

where c is the conditioning vector of noise level and class and the last convolution starts at zero:
at the start a block is its skip connection over √2, and the whole network returns zero. Halving
averages 2 × 2 pixels and doubling repeats them, both inside a residual block of its own. A level of
odd side n is padded with its own edge to n + 1 before it is halved and cropped back to n after it
was doubled, so 10 -> 5 -> 3 -> 5 -> 10.

References: Ho et al. 2020, arXiv 2006.11239, appendix B; Song et al. 2021, arXiv 2011.13456,
appendix H (DDPM++: rescaled skips, BigGAN blocks); Dhariwal and Nichol 2021, arXiv 2105.05233,
section 3.1 (scale and shift).
"""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from jaxdiff.networks.embeddings import Conditioning, SmoothFeatures
from jaxdiff.typing import Array

__all__ = ["UNet"]

Image = Float[Array, "b h w c"]

_zeros = nn.initializers.zeros


def _wide(dtype: DTypeLike) -> DTypeLike:
    # Statistics, softmax and the output must not suffer from a narrow computation.
    return jnp.promote_types(jnp.float32, dtype)


def _downsample(x: Image) -> Float[Array, "b h2 w2 c"]:
    b, h, w, c = x.shape
    x = jnp.pad(x, ((0, 0), (0, h % 2), (0, w % 2), (0, 0)), mode="edge")
    return x.reshape(b, (h + 1) // 2, 2, (w + 1) // 2, 2, c).mean((2, 4))


def _upsample(x: Image, shape: tuple[int, ...]) -> Float[Array, "b h2 w2 c"]:
    b, h, w, c = x.shape
    x = jnp.broadcast_to(x[:, :, None, :, None, :], (b, h, 2, w, 2, c))
    return x.reshape(b, 2 * h, 2 * w, c)[:, : shape[0], : shape[1]]


def _groups(channels: int) -> int:
    return max(g for g in range(1, max(channels // 4, 1) + 1) if g <= 32 and channels % g == 0)


class _Norm(nn.Module):
    """Group normalisation, adapted per example if `scale` and `shift` are given.

    (1 + scale) (gain (x - mean) / std + offset) + shift, in one pass over x for the statistics
    (sums of x and of x², in float32) and one for the result.
    """

    dtype: DTypeLike

    @nn.compact
    def __call__(
        self,
        x: Image,
        scale: Float[Array, "b c"] | None = None,
        shift: Float[Array, "b c"] | None = None,
    ) -> Image:
        b, h, w, c = x.shape
        groups = _groups(c)
        wide = x.astype(_wide(self.dtype))

        def group_mean(total: Float[Array, "b c"]) -> Float[Array, "b c"]:
            mean = total.reshape(b, groups, -1).sum(-1) / (h * w * c // groups)
            return jnp.repeat(mean, c // groups, axis=1)

        mean = group_mean(wide.sum((1, 2)))
        var = group_mean(jnp.square(wide).sum((1, 2))) - jnp.square(mean)
        gain = self.param("scale", nn.initializers.ones, (c,), jnp.float32)[None, :]
        gain = gain * jax.lax.rsqrt(jnp.maximum(var, 0.0) + 1e-6)
        offset = self.param("bias", nn.initializers.zeros, (c,), jnp.float32)[None, :] - gain * mean
        if scale is not None:
            gain, offset = gain * (1 + scale), offset * (1 + scale)
        if shift is not None:
            offset = offset + shift
        return (wide * gain[:, None, None, :] + offset[:, None, None, :]).astype(self.dtype)


class _ResBlock(nn.Module):
    """x, c -> (skip(x) + h(x, c)) / √2."""

    channels: int
    dropout: float
    scale_shift: bool
    dtype: DTypeLike
    resample: Callable[[Array], Array] | None = None

    @nn.compact
    def __call__(self, x: Image, condition: Float[Array, "b d"]) -> Float[Array, "b h2 w2 c2"]:
        conv = partial(nn.Conv, self.channels, dtype=self.dtype)
        h = nn.silu(_Norm(self.dtype)(x))
        if self.resample is not None:
            h, x = self.resample(h), self.resample(x)
        h = conv((3, 3))(h)
        injected = nn.Dense((1 + self.scale_shift) * self.channels, dtype=self.dtype)(condition)
        if self.scale_shift:
            h = _Norm(self.dtype)(h, *jnp.split(injected, 2, axis=-1))
        else:
            h = _Norm(self.dtype)(h + injected[:, None, None, :])
        h = nn.Dropout(self.dropout)(nn.silu(h), deterministic=not self.has_rng("dropout"))
        h = conv((3, 3), kernel_init=_zeros)(h)
        if self.resample is not None or x.shape[-1] != self.channels:
            x = conv((1, 1))(x)
        return (x + h) / math.sqrt(2)


class _Attention(nn.Module):
    """x -> (x + W softmax(Q Kᵀ / √d) V) / √2 over the pixels of an image."""

    heads: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Image) -> Image:
        b, h, w, c = x.shape
        # Pixels as rows of one matrix: the gradient of a product with two leading axes is slow on
        # a CPU.
        pixels = _Norm(self.dtype)(x).reshape(b * h * w, c)

        def project() -> Float[Array, "b n heads d"]:
            y = nn.Dense(c, dtype=self.dtype)(pixels)
            return y.reshape(b, h * w, self.heads, c // self.heads)

        mixed = jax.nn.dot_product_attention(project(), project(), project())
        out = nn.Dense(c, kernel_init=_zeros, dtype=self.dtype)(mixed.reshape(b * h * w, c))
        return (x + out.reshape(x.shape)) / math.sqrt(2)


class UNet(nn.Module):
    """The DDPM++ U-Net: images [b, h, w, c] -> images of the same sides, in float32.

    With `UNet(128, (1, 2, 2, 2), 4, attention=(16,), embedding=Sinusoidal(128))` and 32 × 32 × 3
    images it has the 61,804,419 parameters of the published DDPM++.

    Args:
        width: channels of the first level.
        multipliers: channels of each level over `width`; each level halves the side.
        blocks: residual blocks a level on the way down; one more on the way up.
        attention: sides (the longer one, in pixels) of the levels that attend; the middle always
            does.
        heads: attention heads; must divide the channels of the levels that attend.
        dropout: rate in [0, 1) inside the residual blocks.
        embedding: noise_level [b] -> features [b, n].
        scale_shift: inject the conditioning as scale and shift of a norm (True), or add it (False).
        num_classes: number of classes k, or None. Label k, or no label, is the null label.
        dtype: of the computation; parameters, norms, softmax and the output stay in float32.
        out_channels: channels of the output; None for as many as the input has.
        fourier: exponents n, ≥ 0: for each, the network sees sin(2ⁿ π x) and cos(2ⁿ π x) beside
            its input x. They tell neighbouring grey levels apart, which a likelihood asks for and
            the eye does not: for L levels in [-1, 1], with n about log₂ L - 1 and log₂ L.

    Raises:
        ValueError: if a side of the images is odd or less than 8, if `heads` does not divide the
            channels, if an exponent of `fourier` is negative, or if a label is given to a network
            without classes.

    References:
        Song et al. 2021, arXiv 2011.13456, appendix H; Kingma et al. 2021, arXiv 2107.00630,
        section 3.4 and appendix C (`fourier`).
    """

    width: int = 32
    multipliers: tuple[int, ...] = (1, 2)
    blocks: int = 2
    attention: tuple[int, ...] = (4,)
    heads: int = 1
    dropout: float = 0.0
    embedding: Callable[[Array], Array] = SmoothFeatures()
    scale_shift: bool = False
    num_classes: int | None = None
    dtype: DTypeLike = jnp.float32
    out_channels: int | None = None
    fourier: tuple[int, ...] = ()

    @nn.compact
    def __call__(
        self, x: Image, noise_level: Float[Array, "b"], label: Int[Array, "b"] | None = None
    ) -> Float[Array, "b h w c2"]:
        """Return the network's output [b, h, w, c2]; no label means the null label."""
        self._check(x)
        condition = Conditioning(4 * self.width, self.embedding, self.num_classes, self.dtype)
        c = condition(noise_level, label)
        block = partial(
            _ResBlock, dropout=self.dropout, scale_shift=self.scale_shift, dtype=self.dtype
        )

        def attend(h: Image) -> Image:
            return _Attention(self.heads, self.dtype)(h)

        def attends(h: Image) -> bool:
            return max(h.shape[1:3]) in self.attention

        channels = [m * self.width for m in self.multipliers]
        h = nn.Conv(self.width, (3, 3), dtype=self.dtype)(self._with_fourier(x))
        skips = [h]
        for level, n in enumerate(channels):
            if level > 0:
                h = block(h.shape[-1], resample=_downsample)(h, c)
                skips.append(h)
            for _ in range(self.blocks):
                h = block(n)(h, c)
                h = attend(h) if attends(h) else h
                skips.append(h)

        h = block(channels[-1])(attend(block(channels[-1])(h, c)), c)

        for level, n in reversed(list(enumerate(channels))):
            for _ in range(self.blocks + 1):
                h = block(n)(jnp.concatenate([h, skips.pop()], axis=-1), c)
            h = attend(h) if attends(h) else h
            if level > 0:
                h = block(n, resample=partial(_upsample, shape=skips[-1].shape[1:3]))(h, c)

        wide = _wide(self.dtype)
        h = nn.silu(_Norm(wide)(h))
        channels_out = x.shape[-1] if self.out_channels is None else self.out_channels
        return nn.Conv(channels_out, (3, 3), kernel_init=_zeros, dtype=wide)(h)

    def _with_fourier(self, x: Image) -> Float[Array, "b h w c2"]:
        # In full precision: a wave of many turns magnifies the rounding of its angle.
        wide = x.astype(_wide(self.dtype))
        angles = [2**n * jnp.pi * wide for n in self.fourier]
        waves = [wave(angle) for angle in angles for wave in (jnp.sin, jnp.cos)]
        return jnp.concatenate([wide, *waves], axis=-1)

    def _check(self, x: Array) -> None:
        if x.ndim != 4 or any(side < 8 or side % 2 for side in x.shape[1:3]):
            raise ValueError(
                "x must be images [b, h, w, c] of even height and width, at least 8 pixels each, "
                f"got shape {x.shape}"
            )
        if any(n < 0 for n in self.fourier):
            raise ValueError(f"fourier must be exponents of at least 0, got {self.fourier}")
        if any(m * self.width % self.heads for m in self.multipliers):
            raise ValueError(
                f"heads must divide the channels of every level, {self.width} × {self.multipliers},"
                f" got {self.heads}"
            )
