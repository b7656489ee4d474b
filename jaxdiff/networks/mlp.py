"""A residual multi-layer perceptron for vectors: two-dimensional toys, tables, latents.

A block is a pair of layers around which the identity runs,

    h <- h + W_2 dropout(silu((1 + s(c)) W_1 silu(h) + b(c))),

where scale s and shift b are linear in the conditioning vector c of noise level and class. The
scale matters: at low noise the score of a sharp density is large near its edges, and it lets one
set of weights be steep there and gentle at high noise.
"""

from collections.abc import Callable

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from jaxdiff.networks.embeddings import Conditioning, SmoothFeatures
from jaxdiff.typing import Array

__all__ = ["MLP"]


class MLP(nn.Module):
    """A residual perceptron: vectors [b, d] -> vectors [b, d], in float32, zero at the start.

    Args:
        width: hidden features.
        depth: hidden layers, even; two make a residual block.
        dropout: rate in [0, 1) inside the blocks.
        embedding: noise_level [b] -> features [b, n].
        num_classes: number of classes k, or None. Label k, or no label, is the null label.
        dtype: of the computation; parameters and the output stay in float32.

    Raises:
        ValueError: if `depth` is odd or less than 2, or if a label is given to a network without
            classes.

    References:
        He et al. 2016, arXiv 1603.05027 (residual blocks); Perez et al. 2018, arXiv 1709.07871
        (scale and shift).
    """

    width: int = 192
    depth: int = 4
    dropout: float = 0.0
    embedding: Callable[[Array], Array] = SmoothFeatures()
    num_classes: int | None = None
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b d"],
        noise_level: Float[Array, "b"],
        label: Int[Array, "b"] | None = None,
    ) -> Float[Array, "b d"]:
        """Return the network's output [b, d]; no label means the null label."""
        if self.depth < 2 or self.depth % 2:
            raise ValueError(f"depth must be even and at least 2, got {self.depth}")
        condition = Conditioning(self.width, self.embedding, self.num_classes, self.dtype)
        c = condition(noise_level, label)
        h = nn.Dense(self.width, dtype=self.dtype)(x)
        for _ in range(self.depth // 2):
            scale, shift = jnp.split(nn.Dense(2 * self.width, dtype=self.dtype)(c), 2, axis=-1)
            r = nn.Dense(self.width, dtype=self.dtype)(nn.silu(h))
            r = nn.silu(r * (1 + scale) + shift)
            r = nn.Dropout(self.dropout)(r, deterministic=not self.has_rng("dropout"))
            h = h + nn.Dense(self.width, dtype=self.dtype)(r)
        wide = jnp.promote_types(jnp.float32, self.dtype)
        return nn.Dense(x.shape[-1], kernel_init=nn.initializers.zeros, dtype=wide)(nn.silu(h))
