"""A residual multi-layer perceptron for vectors: two-dimensional toys, tables, latents.

A block is a pair of layers around which the identity runs,

    h <- h + W_2 dropout(silu((1 + s(c)) W_1 silu(h) + b(c))),

where scale s and shift b are linear in the conditioning vector c of noise level and class. The
scale matters: at low noise the score of a sharp density is large near its edges, and it lets one
set of weights be steep there and gentle at high noise.

A perceptron of few coordinates learns their slow variations first, and fine ones, such as thin
rings close to each other, hardly at all. `waves` gives it sines and cosines of the state to start
from.
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
    """A residual perceptron: vectors [b, d] -> vectors [b, n], in float32, zero at the start.

    Args:
        width: hidden features.
        depth: hidden layers, even; two make a residual block.
        dropout: rate in [0, 1) inside the blocks.
        waves: number n of directions k in which the first layer sees sin(k·x) and cos(k·x) beside
            x itself; they are trained. 0 for none.
        wave_std: standard deviation of their initial coordinates, in radians per unit of x: about
            the inverse of the finest detail's width, or less.
        condition_width: features of the conditioning vector c; None for `width`.
        embedding: noise_level [b] -> features [b, n].
        num_classes: number of classes k, or None. Label k, or no label, is the null label.
        dtype: of the computation; parameters and the output stay in float32.
        out_features: features n of the output; None for as many as the input has.

    Raises:
        ValueError: if `depth` is odd or less than 2, or if a label is given to a network without
            classes.

    References:
        He et al. 2016, arXiv 1603.05027 (residual blocks); Perez et al. 2018, arXiv 1709.07871
        (scale and shift); Tancik et al. 2020, arXiv 2006.10739, section 4 (waves of the input,
        there with frozen directions).
    """

    width: int = 192
    depth: int = 4
    dropout: float = 0.0
    waves: int = 0
    wave_std: float = 3.0
    condition_width: int | None = None
    embedding: Callable[[Array], Array] = SmoothFeatures()
    num_classes: int | None = None
    dtype: DTypeLike = jnp.float32
    out_features: int | None = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b d"],
        noise_level: Float[Array, "b"],
        label: Int[Array, "b"] | None = None,
    ) -> Float[Array, "b n"]:
        """Return the network's output [b, n]; no label means the null label."""
        if self.depth < 2 or self.depth % 2:
            raise ValueError(f"depth must be even and at least 2, got {self.depth}")
        condition_width = self.width if self.condition_width is None else self.condition_width
        condition = Conditioning(condition_width, self.embedding, self.num_classes, self.dtype)
        c = condition(noise_level, label)
        h = nn.Dense(self.width, dtype=self.dtype)(self._with_waves(x))
        for _ in range(self.depth // 2):
            scale, shift = jnp.split(nn.Dense(2 * self.width, dtype=self.dtype)(c), 2, axis=-1)
            r = nn.Dense(self.width, dtype=self.dtype)(nn.silu(h))
            r = nn.silu(r * (1 + scale) + shift)
            r = nn.Dropout(self.dropout)(r, deterministic=not self.has_rng("dropout"))
            h = h + nn.Dense(self.width, dtype=self.dtype)(r)
        wide = jnp.promote_types(jnp.float32, self.dtype)
        features = x.shape[-1] if self.out_features is None else self.out_features
        return nn.Dense(features, kernel_init=nn.initializers.zeros, dtype=wide)(nn.silu(h))

    def _with_waves(self, x: Float[Array, "b d"]) -> Float[Array, "b n"]:
        if not self.waves:
            return x
        init = nn.initializers.normal(self.wave_std)
        directions = self.param("waves_directions", init, (x.shape[-1], self.waves), jnp.float32)
        angles = x @ directions
        return jnp.concatenate([x, jnp.sin(angles), jnp.cos(angles)], axis=-1)
