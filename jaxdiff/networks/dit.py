"""A Transformer for images: patches as tokens, conditioned by the scale of every norm.

An image of sides divisible by p is cut into patches of p × p pixels; each becomes one token, to
which sines and cosines of its row and column are added. A block changes tokens by

    h <- h + g_1 ⊙ W_o attention(n_1(h)),    h <- h + g_2 ⊙ W_2 gelu(W_1 n_2(h)),
    n_i(h) = (1 + s_i) ⊙ norm(h) + b_i,

where scales s, shifts b and gates g are linear in the conditioning vector of noise level and class,
and zero at the start: a new block is the identity, and the whole network returns zero.

All blocks are one, scanned over stacked parameters: tracing and compiling take the time of one.

References: Peebles and Xie 2023, arXiv 2212.09748, section 3 (the network, sizes in table 1);
Darcet et al. 2024, arXiv 2309.16588 (registers); Chen et al. 2021, arXiv 2104.02057 (the frozen
positions).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from jaxdiff.networks.attention import attention
from jaxdiff.networks.embeddings import Conditioning, SmoothFeatures
from jaxdiff.typing import Array

__all__ = ["SIZES", "DiT"]

SIZES: dict[str, dict[str, Any]] = {
    "S": {"width": 384, "depth": 12, "heads": 6},
    "B": {"width": 768, "depth": 12, "heads": 12},
    "L": {"width": 1024, "depth": 24, "heads": 16},
    "XL": {"width": 1152, "depth": 28, "heads": 16},
}
"""The published sizes: `DiT(patch=2, **SIZES["XL"])`."""

Tokens = Float[Array, "b n d"]

_zeros = nn.initializers.zeros
_glorot = nn.initializers.xavier_uniform()


def positions(rows: int, columns: int, width: int) -> Float[Array, "n width"]:
    """Sines and cosines of a token's column, then of its row, at width/4 frequencies each.

    f_k = 10⁴ to the −k/(width/4), k = 0, 1, …; tokens in reading order.

    Args:
        rows: of tokens.
        columns: of tokens.
        width: features, a multiple of 4.

    Returns:
        [rows · columns, width] in [−1, 1].
    """
    frequencies = 1e4 ** (-jnp.arange(width // 4) / (width // 4))
    row, column = jnp.divmod(jnp.arange(rows * columns), columns)
    angles = [place[:, None] * frequencies[None, :] for place in (column, row)]
    return jnp.concatenate([wave(a) for a in angles for wave in (jnp.sin, jnp.cos)], axis=1)


def check_patches(x: Array, patch: int) -> None:
    """Raises ValueError if x is not images [b, h, w, c] that patches can tile."""
    if x.ndim != 4 or any(side % patch for side in x.shape[1:3]):
        raise ValueError(
            f"x must be images [b, h, w, c] of sides that the patch {patch} divides, got "
            f"shape {x.shape}"
        )


def split_patches(x: Float[Array, "b h w c"], patch: int) -> Float[Array, "n p"]:
    """Images -> patches as rows [b · h/p · w/p, p² c], in reading order inside and out."""
    b, height, width, channels = x.shape
    tiles = x.reshape(b, height // patch, patch, width // patch, patch, channels)
    return tiles.swapaxes(2, 3).reshape(-1, patch**2 * channels)


def join_patches(
    rows: Float[Array, "n p"], shape: tuple[int, ...], patch: int
) -> Float[Array, "b h w c"]:
    """The inverse of `split_patches`, for images of sides `shape`[1:3]."""
    b, height, width, _ = shape
    tiles = rows.reshape(b, height // patch, width // patch, patch, patch, -1)
    return tiles.swapaxes(2, 3).reshape(b, height, width, -1)


# Computed again for gradients: a scan would keep every array on the way, of every block.
@partial(jax.checkpoint, static_argnums=(3, 4), prevent_cse=False)
def _modulated(h: Tokens, scale: Array, shift: Array, epsilon: float, dtype: DTypeLike) -> Tokens:
    wide = h.astype(jnp.promote_types(jnp.float32, dtype))
    norm = jax.nn.standardize(wide, epsilon=epsilon)
    return (norm * (1 + scale[:, None, :]) + shift[:, None, :]).astype(dtype)


_gelu = jax.checkpoint(nn.gelu, prevent_cse=False)


class _Block(nn.Module):
    """Tokens, (condition, context) -> tokens, and nothing beside, as a scan wants it."""

    heads: int
    dropout: float
    epsilon: float
    dtype: DTypeLike
    flash: bool

    @nn.compact
    def __call__(
        self, h: Tokens, given: tuple[Float[Array, "b c"], Float[Array, "b m e"] | None]
    ) -> tuple[Tokens, None]:
        condition, context = given
        b, n, width = h.shape
        adapt = nn.Dense(6 * width, kernel_init=_zeros, dtype=self.dtype, name="adapt")(condition)
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = jnp.split(adapt, 6, axis=-1)

        def dense(rows: Array, features: int, name: str, init: Any = _glorot) -> Array:
            # Tokens as rows of one matrix: the gradient of a product with two leading axes is
            # slow on a CPU.
            flat = rows.reshape(-1, rows.shape[-1])
            out = nn.Dense(features, kernel_init=init, dtype=self.dtype, name=name)(flat)
            return out.reshape(*rows.shape[:-1], features)

        def attend(rows: Array, others: Array, name: str, init: Any = _glorot) -> Array:
            query, key, value = (
                dense(source, width, f"{name}{part}").reshape(
                    b, -1, self.heads, width // self.heads
                )
                for part, source in (("query", rows), ("key", others), ("value", others))
            )
            mixed = attention(query, key, value, flash=self.flash)
            return dense(mixed.reshape(b, n, width), width, f"{name}out", init)

        def drop(h: Array) -> Array:
            return nn.Dropout(self.dropout)(h, deterministic=not self.has_rng("dropout"))

        rows = _modulated(h, scale_1, shift_1, 1e-6, self.dtype)
        h = h + gate_1[:, None, :] * drop(attend(rows, rows, ""))
        if context is not None:
            h = h + attend(
                nn.LayerNorm(dtype=self.dtype, name="cross_norm")(h), context, "cross_", _zeros
            )
        rows = _modulated(h, scale_2, shift_2, self.epsilon, self.dtype)
        rows = drop(_gelu(dense(rows, 4 * width, "mlp_in")))
        return h + gate_2[:, None, :] * drop(dense(rows, width, "mlp_out")), None


class DiT(nn.Module):
    """A diffusion Transformer: images [b, h, w, c] -> images of the same sides, in float32.

    Args:
        patch: side of a patch; must divide those of the images.
        width: features of a token, a multiple of 4.
        depth: number of blocks.
        heads: attention heads; must divide `width`.
        dropout: rate in [0, 1), of what a block adds and of its hidden layer.
        embedding: noise_level [b] -> features [b, n].
        num_classes: number of classes k, or None. Label k, or no label, is the null label.
        registers: further tokens, learned, that belong to no place; their outputs are dropped.
        dtype: of the computation; parameters, norms, softmax and the output stay in float32.
        out_channels: channels of the output; None for as many as the input has.
        epsilon: added to the variance in the second norm of a block; in the others it is 1e-6.
        remat: keep only what passes between blocks for the gradient, and compute their inside
            again: less memory for about a third more time.
        unroll: blocks in one turn of the loop: more are a longer program and, as what a loop keeps
            for the gradient is copied, a faster one: on a CPU by a tenth for a loop of one turn.
        flash: attention by cuDNN's flash kernel where JAX runs on an NVIDIA GPU; `dtype` must then
            be bfloat16 or float16. It has no forward mode, so for a likelihood take
            `net.clone(flash=False)`, whose parameters are the same.

    Raises:
        ValueError: if `patch` does not divide the sides, `heads` or 4 the width, if `unroll` is not
            in [1, depth], or if a label is given to a network without classes.
    """

    patch: int = 2
    width: int = 384
    depth: int = 12
    heads: int = 6
    dropout: float = 0.0
    embedding: Callable[[Array], Array] = SmoothFeatures()
    num_classes: int | None = None
    registers: int = 0
    dtype: DTypeLike = jnp.float32
    out_channels: int | None = None
    epsilon: float = 1e-6
    remat: bool = False
    unroll: int = 1
    flash: bool = False

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b h w c"],
        noise_level: Float[Array, "b"],
        label: Int[Array, "b"] | None = None,
        context: Float[Array, "b m e"] | None = None,
    ) -> Float[Array, "b h w c2"]:
        """Return the output [b, h, w, c2]; tokens of a `context` are attended to in every block."""
        self._check(x)
        b, rows, columns = len(x), *(side // self.patch for side in x.shape[1:3])
        condition = Conditioning(
            self.width, self.embedding, self.num_classes, self.dtype, name="condition"
        )
        c = condition(noise_level, label)

        patches = nn.Dense(self.width, kernel_init=_glorot, dtype=self.dtype, name="patches")
        h = patches(split_patches(x, self.patch)).reshape(b, rows * columns, self.width)
        h = h + positions(rows, columns, self.width).astype(self.dtype)[None]
        if self.registers:
            init = nn.initializers.normal(0.02)
            extra = self.param("registers", init, (self.registers, self.width), jnp.float32)
            extra = jnp.broadcast_to(extra.astype(self.dtype), (b, *extra.shape))
            h = jnp.concatenate([extra, h], axis=1)

        blocks = nn.scan(
            nn.remat(_Block, prevent_cse=False) if self.remat else _Block,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=nn.broadcast,  # pyright: ignore[reportArgumentType]  # it is annotated int
            length=self.depth,
            unroll=self.unroll,
        )
        context = None if context is None else context.astype(self.dtype)
        options = self.heads, self.dropout, self.epsilon, self.dtype, self.flash
        h, _ = blocks(*options, name="blocks")(h, (c, context))

        wide = jnp.promote_types(jnp.float32, self.dtype)
        adapt = nn.Dense(2 * self.width, kernel_init=_zeros, dtype=wide, name="adapt")(c)
        shift, scale = jnp.split(adapt, 2, axis=-1)
        h = _modulated(h[:, self.registers :], scale, shift, 1e-6, wide)
        channels = x.shape[-1] if self.out_channels is None else self.out_channels
        out = nn.Dense(self.patch**2 * channels, kernel_init=_zeros, dtype=wide, name="out")
        return join_patches(out(h.reshape(-1, self.width)), x.shape, self.patch)

    def _check(self, x: Array) -> None:
        check_patches(x, self.patch)
        for name, divisor in (("heads", self.heads), ("4", 4)):
            if self.width % divisor:
                raise ValueError(f"{name} must divide the width {self.width}, got {divisor}")
        if not 1 <= self.unroll <= self.depth:
            raise ValueError(f"unroll must be in [1, depth={self.depth}], got {self.unroll}")
