"""How a network is told its noise level and its class.

The noise level u is one number per example. A network learns poorly from the bare number, so it is
first spread over waves of several frequencies,

    u -> [sin(f_1 u), ..., sin(f_n u), cos(f_1 u), ..., cos(f_n u)],

and the three embeddings here differ only in their frequencies f. The choice decides more than the
fit: the drift of the reverse equation inherits the roughness of the embedding in u, and an adaptive
solver pays for it with steps. `SmoothFeatures`, the default, therefore keeps to low frequencies;
`Sinusoidal` and `GaussianFourier` are those of the papers.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from jaxdiff.typing import Array

__all__ = ["Conditioning", "GaussianFourier", "Sinusoidal", "SmoothFeatures"]


def _waves(noise_level: Float[Array, "b"], frequencies: Float[Array, "n"]) -> Float[Array, "b 2*n"]:
    angle = noise_level[:, None] * frequencies[None, :]
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)


def _check_dim(dim: int) -> None:
    if dim < 4 or dim % 2:
        raise ValueError(f"dim must be an even number of features, at least 4, got {dim}")


class SmoothFeatures(nn.Module):
    """Waves of low frequency, smooth in a noise level such as log-SNR / 4 in [-5, 5].

    f_k runs geometrically from 1/4 to 4: from a quarter-turn or so over the whole range, which is
    monotone, to a wavelength of 1.6, six nats of log-SNR. Nothing that the network computes from
    them can be rougher in time without the network having learnt it.

    Args:
        dim: number of features, even, at least 4.

    Returns:
        Features [b, dim] in [-1, 1] of a noise level [b].

    Raises:
        ValueError: if `dim` is odd or less than 4.
    """

    dim: int = 64

    def __call__(self, noise_level: Float[Array, "b"]) -> Float[Array, "b dim"]:
        """Return the features [b, dim] of a noise level [b]."""
        _check_dim(self.dim)
        return _waves(noise_level, jnp.geomspace(0.25, 4.0, self.dim // 2))


class Sinusoidal(nn.Module):
    """The transformer's position encoding, of a step number such as 1000 t.

    f_k = max_period^(-k / (n - 1)), k = 0, ..., n - 1, n = dim / 2.

    Args:
        dim: number of features, even, at least 4.
        max_period: the longest wavelength over 2π, in units of the noise level.

    Returns:
        Features [b, dim] in [-1, 1] of a noise level [b].

    Raises:
        ValueError: if `dim` is odd or less than 4.

    References:
        Vaswani et al. 2017, arXiv 1706.03762, section 3.5; Ho et al. 2020, arXiv 2006.11239,
        appendix B.
    """

    dim: int = 64
    max_period: float = 1e4

    def __call__(self, noise_level: Float[Array, "b"]) -> Float[Array, "b dim"]:
        """Return the features [b, dim] of a noise level [b]."""
        _check_dim(self.dim)
        return _waves(noise_level, jnp.geomspace(1.0, 1.0 / self.max_period, self.dim // 2))


class GaussianFourier(nn.Module):
    """Random Fourier features: frequencies drawn once from 2π scale N(0, 1) and then frozen.

    The frequencies lie among the parameters, so that they are saved with the run; no gradient
    reaches them.

    Args:
        dim: number of features, even, at least 4.
        scale: standard deviation of the frequencies, in turns per unit of the noise level.

    Returns:
        Features [b, dim] in [-1, 1] of a noise level [b].

    Raises:
        ValueError: if `dim` is odd or less than 4.

    Note:
        An optimizer that decays weights must be told to leave `frequencies` alone.

    References:
        Tancik et al. 2020, arXiv 2006.10739; Song et al. 2021, arXiv 2011.13456, appendix C.2.
    """

    dim: int = 64
    scale: float = 16.0

    @nn.compact
    def __call__(self, noise_level: Float[Array, "b"]) -> Float[Array, "b dim"]:
        """Return the features [b, dim] of a noise level [b]."""
        _check_dim(self.dim)
        init = nn.initializers.normal(stddev=self.scale)
        turns = self.param("frequencies", init, (self.dim // 2,), jnp.float32)
        return _waves(noise_level, 2 * jnp.pi * jax.lax.stop_gradient(turns))


class Conditioning(nn.Module):
    """One vector [b, width] that tells every block of a network the noise level and the class.

    c = silu(W_2 silu(W_1 embedding(noise_level)) + E[label])

    The table E has num_classes + 1 rows; the last is the null label, which stands for "no class"
    and lets one network serve both sides of classifier-free guidance. The table starts at zero: the
    network starts unconditional, and a class departs from the null label only as far as the data
    ask.

    Args:
        width: number of features.
        embedding: noise_level [b] -> features [b, n].
        num_classes: number of classes, or None for a network without labels.
        class_first: add E[label] to the embedding instead, before the two layers.
        dtype: of the computation.

    Raises:
        ValueError: if a label is given to a network without classes.

    References:
        Ho and Salimans 2022, arXiv 2207.12598, section 3.2 (the null label).
    """

    width: int
    embedding: Callable[[Array], Array]
    num_classes: int | None = None
    dtype: DTypeLike = jnp.float32
    class_first: bool = False

    @nn.compact
    def __call__(
        self, noise_level: Float[Array, "b"], label: Int[Array, "b"] | None = None
    ) -> Float[Array, "b width"]:
        """Return c [b, width]; no label means the null label."""
        if label is not None and self.num_classes is None:
            raise ValueError("label must be None for a network whose num_classes is None")

        def with_class(h: Float[Array, "b n"]) -> Float[Array, "b n"]:
            if self.num_classes is None:
                return h
            null = jnp.full(noise_level.shape, self.num_classes)
            zeros, size = nn.initializers.zeros, (self.num_classes + 1, h.shape[-1])
            table = nn.Embed(*size, dtype=self.dtype, embedding_init=zeros)
            return h + table(null if label is None else label)

        h = self.embedding(noise_level)
        h = with_class(h) if self.class_first else h
        h = nn.Dense(self.width, dtype=self.dtype)(h)
        h = nn.Dense(self.width, dtype=self.dtype)(nn.silu(h))
        return nn.silu(h if self.class_first else with_class(h))
