"""A Transformer for images with the long skips of a U-Net: noise level and class are tokens too.

An image is cut into patches as in `DiT`. Noise level and class become one token each, put before
the patches, and every token has a learned place. The first half of the blocks leaves its tokens for
the second half, the last for the first to come back:

    h <- W_s [h, skip],   h <- h + W_o attention(n(h)),   h <- h + W_2 gelu(W_1 n(h)).

The halves are scanned over stacked parameters: compiling takes the time of three blocks. A
convolution of 3 × 3 pixels, zero at the start, joins the patches of the output.

References: Bao et al. 2023, arXiv 2209.12152, section 3 (the network) and table 1 (sizes).
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from jaxdiff.networks import cpu
from jaxdiff.networks.attention import attention
from jaxdiff.networks.dit import check_patches, join_patches, split_patches
from jaxdiff.networks.embeddings import SmoothFeatures
from jaxdiff.typing import Array

__all__ = ["SIZES", "UViT"]

SIZES: dict[str, dict[str, Any]] = {
    "S": {"width": 512, "depth": 13, "heads": 8},
    "S deep": {"width": 512, "depth": 17, "heads": 8},
    "M": {"width": 768, "depth": 17, "heads": 12},
    "L": {"width": 1024, "depth": 21, "heads": 16},
    "H": {"width": 1152, "depth": 29, "heads": 16},
}
"""The published sizes: `UViT(patch=2, **SIZES["S"])`."""

Tokens = Float[Array, "b n d"]

_normal = nn.initializers.truncated_normal(0.02)


class _Block(nn.Module):
    """Tokens, the tokens of its twin -> tokens, to go on and to be kept, as a scan wants it."""

    heads: int
    dropout: float
    dtype: DTypeLike
    flash: bool

    @nn.compact
    def __call__(self, h: Tokens, skip: Tokens | None) -> tuple[Tokens, Tokens]:
        b, n, width = h.shape

        def dense(rows: Array, features: int, name: str, *, bias: bool = True) -> Array:
            # Tokens as rows of one matrix: the gradient of a product with two leading axes is
            # slow on a CPU.
            layer = nn.Dense(
                features, use_bias=bias, kernel_init=_normal, dtype=self.dtype, name=name
            )
            return layer(rows.reshape(b * n, -1)).reshape(b, n, features)

        def normed(h: Tokens, name: str) -> Tokens:
            wide = jnp.promote_types(jnp.float32, self.dtype)
            return nn.LayerNorm(epsilon=1e-5, dtype=wide, name=name)(h).astype(self.dtype)

        def drop(h: Array) -> Array:
            return nn.Dropout(self.dropout)(h, deterministic=not self.has_rng("dropout"))

        if skip is not None:
            h = dense(jnp.concatenate([h, skip], axis=-1), width, "skip")
        rows = normed(h, "norm_1")
        query, key, value = (
            dense(rows, width, name, bias=False).reshape(b, n, self.heads, width // self.heads)
            for name in ("query", "key", "value")
        )
        mixed = attention(query, key, value, flash=self.flash).reshape(b, n, width)
        h = h + drop(dense(mixed, width, "out"))
        rows = nn.gelu(dense(normed(h, "norm_2"), 4 * width, "mlp_in"), approximate=False)
        h = h + drop(dense(drop(rows), width, "mlp_out"))
        return h, h


class UViT(nn.Module):
    """A Transformer with long skips: images [b, h, w, c] -> images of the same sides, in float32.

    Args:
        patch: side of a patch; must divide those of the images, which must be those of `init`.
        width: features of a token.
        depth: number of blocks, odd: half of them leave a skip, one is the middle.
        heads: attention heads; must divide `width`.
        dropout: rate in [0, 1), of what a block adds and of its hidden layer.
        embedding: noise_level [b] -> the token [b, width]; None for `SmoothFeatures(width)`.
        num_classes: number of classes k, or None. Label k, or no label, is the null label.
        dtype: of the computation; parameters, norms, softmax and the output stay in float32.
        out_channels: channels of the output; None for as many as the input has.
        remat: keep only what passes between blocks for the gradient, and compute their inside
            again: less memory for about a third more time.
        flash: attention by cuDNN's flash kernel where JAX runs on an NVIDIA GPU; `dtype` must then
            be bfloat16 or float16. It has no forward mode, so for a likelihood take
            `net.clone(flash=False)`, whose parameters are the same.

    Raises:
        ValueError: if `patch` does not divide the sides or `heads` the width, if `depth` is even,
            if the embedding has other features than `width`, or if a label is given to a network
            without classes.
    """

    patch: int = 2
    width: int = 512
    depth: int = 13
    heads: int = 8
    dropout: float = 0.0
    embedding: Callable[[Array], Array] | None = None
    num_classes: int | None = None
    dtype: DTypeLike = jnp.float32
    out_channels: int | None = None
    remat: bool = False
    flash: bool = False

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b h w c"],
        noise_level: Float[Array, "b"],
        label: Int[Array, "b"] | None = None,
    ) -> Float[Array, "b h w c2"]:
        """Return the output [b, h, w, c2]; no label means the null label."""
        check_patches(x, self.patch)
        embedding = SmoothFeatures(self.width) if self.embedding is None else self.embedding
        features = embedding(noise_level)
        self._check(features, label)
        wide = jnp.promote_types(jnp.float32, self.dtype)

        first = [features[:, None, :]]
        if self.num_classes is not None:
            null = jnp.full(noise_level.shape, self.num_classes)
            table = nn.Embed(
                self.num_classes + 1, self.width, embedding_init=_normal, name="classes"
            )
            first.append(table(null if label is None else label)[:, None, :])
        patches = nn.Dense(self.width, kernel_init=_normal, dtype=self.dtype, name="patches")
        tokens = patches(split_patches(x, self.patch)).reshape(len(x), -1, self.width)
        h = jnp.concatenate([*first, tokens.astype(wide)], axis=1)
        places = self.param("places", _normal, h.shape[1:], jnp.float32)
        h = (h + places[None]).astype(self.dtype)

        block = nn.remat(_Block, prevent_cse=False) if self.remat else _Block
        half = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            length=self.depth // 2,
        )
        options = self.heads, self.dropout, self.dtype, self.flash
        h, skips = half(*options, name="first_half")(h, None)
        h, _ = block(*options, name="middle")(h, None)
        h, _ = half(*options, name="second_half")(h, skips[::-1])

        h = nn.LayerNorm(epsilon=1e-5, dtype=wide, name="out_norm")(h[:, len(first) :])
        channels = x.shape[-1] if self.out_channels is None else self.out_channels
        pixels = nn.Dense(self.patch**2 * channels, kernel_init=_normal, dtype=wide, name="out")
        image = join_patches(pixels(h.reshape(-1, self.width)), x.shape, self.patch)
        last = cpu.Conv(
            channels, (3, 3), kernel_init=nn.initializers.zeros, dtype=wide, name="out_conv"
        )
        return last(image)

    def _check(self, features: Array, label: Array | None) -> None:
        if self.width % self.heads:
            raise ValueError(f"heads must divide the width {self.width}, got {self.heads}")
        if self.depth < 3 or self.depth % 2 == 0:
            raise ValueError(f"depth must be odd and at least 3, got {self.depth}")
        if features.shape[-1] != self.width:
            raise ValueError(
                f"embedding must have {self.width} features, the width, got {features.shape[-1]}"
            )
        if label is not None and self.num_classes is None:
            raise ValueError("label must be None for a network whose num_classes is None")
