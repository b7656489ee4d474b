"""A bidirectional Transformer for sequences of tokens.

Each position holds the embedding of its token plus that of its place; a block lets positions look
at each other, then transforms each by itself,

    h <- h + W_o attention(n(h)),    h <- h + W_2 dropout(gelu(W_1 n(h))),
    n(h) = (1 + s(c)) norm(h) + b(c),

where scale s and shift b are linear in the conditioning vector c of noise level and class. W_o, W_2
and the last layer start at zero: at the start all classes are equally likely everywhere.

References: Vaswani et al. 2017, arXiv 1706.03762; Peebles and Xie 2023, arXiv 2212.09748, section
3.2 (adaptive norms); Xiong et al. 2020, arXiv 2002.04745 (the norm first).
"""

from collections.abc import Callable

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from jaxdiff.networks.attention import attention
from jaxdiff.networks.embeddings import Conditioning, SmoothFeatures
from jaxdiff.typing import Array

__all__ = ["Transformer"]

Hidden = Float[Array, "b length width"]


class _Norm(nn.Module):
    """Layer normalisation with the scale and shift that the conditioning asks for; in float32."""

    dtype: DTypeLike

    @nn.compact
    def __call__(self, h: Hidden, condition: Float[Array, "b d"]) -> Hidden:
        wide = jnp.promote_types(jnp.float32, self.dtype)
        adapt = nn.Dense(2 * h.shape[-1], kernel_init=nn.initializers.zeros, dtype=self.dtype)
        scale, shift = jnp.split(adapt(condition)[:, None, :], 2, axis=-1)
        return (nn.LayerNorm(dtype=wide)(h) * (1 + scale) + shift).astype(self.dtype)


class _Block(nn.Module):
    """Attention, then two layers for each position, both around the identity."""

    heads: int
    dropout: float
    dtype: DTypeLike

    @nn.compact
    def __call__(self, h: Hidden, condition: Float[Array, "b d"]) -> Hidden:
        b, length, width = h.shape
        zeros = nn.initializers.zeros

        def drop(h: Array) -> Array:
            return nn.Dropout(self.dropout)(h, deterministic=not self.has_rng("dropout"))

        # Positions as rows of one matrix: the gradient of a product with two leading axes is slow
        # on a CPU.
        rows = _Norm(self.dtype)(h, condition).reshape(b * length, width)
        mixed = attention(
            *(
                nn.Dense(width, dtype=self.dtype)(rows).reshape(b, length, self.heads, -1)
                for _ in range(3)
            )
        )
        out = nn.Dense(width, kernel_init=zeros, dtype=self.dtype)(mixed.reshape(b * length, width))
        h = h + drop(out).reshape(h.shape)

        rows = _Norm(self.dtype)(h, condition).reshape(b * length, width)
        rows = drop(nn.gelu(nn.Dense(4 * width, dtype=self.dtype)(rows)))
        return h + nn.Dense(width, kernel_init=zeros, dtype=self.dtype)(rows).reshape(h.shape)


class Transformer(nn.Module):
    """Tokens [b, length] -> logits [b, length, classes], in float32, zero at the start.

    Args:
        classes: the number of classes K of a token, with the mask if there is one.
        width: features of a position.
        depth: number of blocks.
        heads: attention heads; must divide `width`.
        dropout: rate in [0, 1), of what a block adds and of its hidden layer.
        embedding: noise_level [b] -> features [b, n].
        num_classes: number of labels k of a whole sequence, or None. Label k, or no label, is the
            null label.
        dtype: of the computation; parameters, norms and the output stay in float32.

    Returns:
        Logits for tokens given as indices [b, length] or as weights of the classes, one-hot ones
        for example, [b, length, classes]. Lengths must be that of `init`.

    Raises:
        ValueError: if `heads` does not divide `width`, or if a label is given to a network without
            classes.
    """

    classes: int
    width: int = 128
    depth: int = 4
    heads: int = 4
    dropout: float = 0.0
    embedding: Callable[[Array], Array] = SmoothFeatures()
    num_classes: int | None = None
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Int[Array, "b length"] | Float[Array, "b length K"],
        noise_level: Float[Array, "b"],
        label: Int[Array, "b"] | None = None,
    ) -> Float[Array, "b length classes"]:
        """Return the logits; no label means the null label."""
        if self.width % self.heads:
            raise ValueError(f"heads must divide the width {self.width}, got {self.heads}")
        condition = Conditioning(self.width, self.embedding, self.num_classes, self.dtype)
        c = condition(noise_level, label)
        normal = nn.initializers.normal(1.0)
        table = self.param("tokens", normal, (self.classes, self.width), jnp.float32)
        places = self.param("places", normal, (x.shape[1], self.width), jnp.float32)
        tokens = table[x] if jnp.issubdtype(x.dtype, jnp.integer) else x @ table
        h = (tokens + places[None]).astype(self.dtype)
        for _ in range(self.depth):
            h = _Block(self.heads, self.dropout, self.dtype)(h, c)
        wide = jnp.promote_types(jnp.float32, self.dtype)
        rows = _Norm(wide)(h, c).reshape(-1, self.width)
        logits = nn.Dense(self.classes, kernel_init=nn.initializers.zeros, dtype=wide)(rows)
        return logits.reshape(*x.shape[:2], self.classes)
