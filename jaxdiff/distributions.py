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

__all__ = ["BlockNormal", "Categorical", "Distribution", "GaussianDistribution", "Normal", "root"]


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


@struct.dataclass
class BlockNormal:
    """N(mean, L Lᵀ) on pairs (x, v): independent coordinates, each with a 2 × 2 covariance.

    With ε = (ε_x, ε_v),  x = mean_x + L_xx ε_x  and  v = mean_v + L_vx ε_x + L_vv ε_v.

    Attributes:
        mean: [2, ...] the centres of x and of v.
        factor: L, the lower Cholesky factor with diagonal ≥ 0: [2, 2], the same for all
            coordinates, or [2, 2, ...]. Where its diagonal is 0 the distribution can be sampled,
            and has no density, noise or score.
    """

    mean: Data
    factor: Float[Array, "2 2 ..."]

    def sample(self, key: Key) -> State:
        """Draws mean + L ε with ε ~ N(0, I)."""
        return self.from_noise(jax.random.normal(key, self.mean.shape, self.mean.dtype))

    def log_prob(self, x: State) -> Float[Array, ""]:
        """Σ −½|ε|² − log L_xx L_vv − log 2π over coordinates, in nats."""
        xx, _, vv = self._entries
        log_det = jnp.broadcast_to(jnp.log(xx) + jnp.log(vv), self.mean.shape[1:])
        return -0.5 * jnp.sum(self.noise(x) ** 2) - jnp.sum(log_det + math.log(2.0 * math.pi))

    def kl(self, other: "BlockNormal") -> Float[Array, ""]:
        """Σ log(|L₂|/|L₁|) + ½ ‖L₂⁻¹L₁‖² + ½ |L₂⁻¹(mean₁ − mean₂)|² − 1, in nats."""
        (xx1, vx1, vv1), (xx2, vx2, vv2) = self._entries, other._entries
        xx, vv = xx1 / xx2, vv1 / vv2
        vx = (vx1 - vx2 * xx) / vv2
        scale = 0.5 * (xx**2 + vx**2 + vv**2) - 1.0 - jnp.log(xx) - jnp.log(vv)
        shift = jnp.sum(other.noise(self.mean) ** 2)
        return jnp.sum(jnp.broadcast_to(scale, self.mean.shape[1:])) + 0.5 * shift

    def noise(self, x: State) -> State:
        """L⁻¹ (x − mean)."""
        xx, vx, vv = self._entries
        x, v = x - self.mean
        noise = x / xx
        return jnp.stack([noise, (v - vx * noise) / vv])

    def from_noise(self, noise: State) -> State:
        """Mean + L · noise."""
        xx, vx, vv = self._entries
        return self.mean + jnp.stack([xx * noise[0], vx * noise[0] + vv * noise[1]])

    def score(self, x: State) -> State:
        """−L⁻ᵀ L⁻¹ (x − mean)."""
        xx, vx, vv = self._entries
        noise = self.noise(x)
        of_v = -noise[1] / vv
        return jnp.stack([-(noise[0] + vx * of_v) / xx, of_v])

    @property
    def _entries(self) -> tuple[Array, Array, Array]:
        """L_xx, L_vx, L_vv: scalars, or of the shape of x."""
        return self.factor[0, 0], self.factor[1, 0], self.factor[1, 1]


@struct.dataclass
class Categorical:
    """Independent positions, each of one of K classes; an event is their one-hot code.

    Attributes:
        probs: [*positions, K] the class probabilities, which sum to 1 along the last axis.
    """

    probs: Data

    def sample(self, key: Key) -> State:
        """Draws a one-hot event [*positions, K]."""
        index = jax.random.categorical(key, jnp.log(self.probs))
        return jax.nn.one_hot(index, self.probs.shape[-1], dtype=self.probs.dtype)

    def log_prob(self, x: State) -> Float[Array, ""]:
        """Σ log p(x) of a one-hot event, in nats."""
        return jnp.sum(jnp.log(jnp.sum(x * self.probs, axis=-1)))

    def kl(self, other: "Categorical") -> Float[Array, ""]:
        """Σ p (log p − log q), in nats, with 0 log 0 = 0.

        A q that was rounded to 0 counts as the least number there is: 87 nats in single precision,
        not infinitely many.
        """
        least = jnp.finfo(self.probs.dtype).tiny
        p, q = (jnp.maximum(law, least) for law in (self.probs, other.probs))
        return jnp.sum(self.probs * (jnp.log(p) - jnp.log(q)))


def root(variance: Scalar) -> Array:
    """√x, whose slope at x = 0 counts as 0, so that gradients pass where there is no noise."""
    positive = jnp.asarray(variance) > 0.0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, variance, 1.0)), 0.0)
