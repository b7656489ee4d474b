"""The conditionals of a diffusion, as distributions that know their own noise.

A forward process is a family of conditionals. Whatever their kind, a sampler wants to draw from
them, a likelihood wants their log-density and a bound wants their Kullback–Leibler divergence. A
Gaussian one also maps a state to the standard noise that made it and back,

    x = mean + std · ε   ⟷   ε = (x − mean) / std,     ∇ₓ log N(x) = −ε / std,

which is all that turns a denoiser into a score, a noise prediction or a deterministic step.

A distribution is over *one* event, the whole array, so its log-density is a scalar. `jax.vmap`
makes batches of them.
"""

import math
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdiff import struct
from jaxdiff.typing import Data, Key, Scalar, State

__all__ = ["Distribution", "GaussianDistribution", "Normal"]


@runtime_checkable
class Distribution(Protocol):
    """What every conditional of every process offers."""

    def sample(self, key: Key) -> State:
        """Draws one event."""
        ...

    def log_prob(self, x: State) -> Float[Array, ""]:
        """The log-density (or log-mass) of one event, in nats."""
        ...

    def kl(self, other: Any) -> Float[Array, ""]:
        """KL(self ‖ other) to another of its kind, in nats."""
        ...


@runtime_checkable
class GaussianDistribution(Distribution, Protocol):
    """A conditional that is an affine image of standard noise."""

    def noise(self, x: State) -> State:
        """The standard noise ε of which x is the image."""
        ...

    def from_noise(self, noise: State) -> State:
        """The image of a standard noise."""
        ...

    def score(self, x: State) -> State:
        """∇ₓ log p(x)."""
        ...


@struct.dataclass
class Normal:
    """N(mean, std²) with independent coordinates.

    Attributes:
        mean: [...] the centre.
        std: the standard deviation, a scalar or of the shape of `mean`, ≥ 0. Where it is 0 the
            distribution is a point: it can be sampled, and has no density, noise or score.
    """

    mean: Data
    std: Scalar

    def sample(self, key: Key) -> State:
        """Draws mean + std · ε with ε ~ N(0, I)."""
        return self.from_noise(jax.random.normal(key, self.mean.shape, self.mean.dtype))

    def log_prob(self, x: State) -> Float[Array, ""]:
        """Σ −½ε² − log std − ½ log 2π, in nats."""
        log_std = jnp.broadcast_to(jnp.log(self.std), self.mean.shape)
        return jnp.sum(-0.5 * self.noise(x) ** 2 - log_std - 0.5 * math.log(2.0 * math.pi))

    def kl(self, other: "Normal") -> Float[Array, ""]:
        """Σ log(std₂/std₁) + (std₁² + (mean₁ − mean₂)²) / (2 std₂²) − ½, in nats."""
        ratio = self.std / other.std
        shift = (self.mean - other.mean) / other.std
        scale = jnp.broadcast_to(0.5 * (ratio**2 - 1.0) - jnp.log(ratio), shift.shape)
        return jnp.sum(scale + 0.5 * shift**2)

    def noise(self, x: State) -> State:
        """(x − mean) / std."""
        return (x - self.mean) / self.std

    def from_noise(self, noise: State) -> State:
        """Mean + std · noise."""
        return self.mean + self.std * noise

    def score(self, x: State) -> State:
        """−(x − mean) / std²."""
        return -self.noise(x) / self.std
