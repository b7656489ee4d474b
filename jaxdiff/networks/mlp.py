"""A multi-layer perceptron for vectors."""

from collections.abc import Callable

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from jaxdiff.networks.embeddings import Conditioning, SmoothFeatures
from jaxdiff.typing import Array

__all__ = ["MLP"]


class MLP(nn.Module):
    """Placeholder."""

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
        condition = Conditioning(self.width, self.embedding, self.num_classes, self.dtype)
        c = condition(noise_level, label)
        h = x
        for _ in range(self.depth):
            h = nn.Dense(self.width, dtype=self.dtype)(h)
            h = nn.silu(h + nn.Dense(self.width, use_bias=False, dtype=self.dtype)(c))
            h = nn.Dropout(self.dropout)(h, deterministic=not self.has_rng("dropout"))
        wide = jnp.promote_types(jnp.float32, self.dtype)
        return nn.Dense(x.shape[-1], kernel_init=nn.initializers.zeros, dtype=wide)(h)
