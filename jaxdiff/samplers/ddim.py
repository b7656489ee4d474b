"""DDIM: move x_0 and the noise along the marginals, with as much fresh noise as one likes.

Given x̂_0, the state at t is the image of a noise ε̂ under the marginal; the state at s is the image
of the same noise under the marginal there. Replacing a part of that noise by a fresh one leaves the
marginal q(x_s | x_0) what it was, so η is free.
"""

import jax
import jax.numpy as jnp

from jaxdiff import struct
from jaxdiff.processes.base import Denoised, Denoiser
from jaxdiff.processes.gaussian import Gaussian
from jaxdiff.typing import Key, Scalar, State, Time

__all__ = ["DDIM"]


@struct.dataclass
class DDIM:
    """x_s = α_s x̂_0 + √(σ_s² − σ̃²) ε̂ + σ̃ z, σ̃ = η √β̃. One network call a step.

    η = 0 is deterministic, and is Euler's rule for the probability-flow ODE in the variables
    (x/α, σ/α): first order. η = 1 is ancestral sampling with variance β̃.

    Attributes:
        process: the forward process.
        eta: fresh noise, ≥ 0; above 1 it is cut where σ̃ would exceed σ_s.

    References: Song et al. 2020, arXiv:2010.02502, eqs. 12 and 16.
    """

    process: Gaussian
    eta: Scalar = 0.0

    def init(self, x: State) -> None:
        """Remembers nothing."""

    def update(
        self, key: Key, x: State, state: None, t: Time, s: Time, denoise: Denoiser
    ) -> tuple[State, None]:
        """Takes x [b, …] from t to s, with one key an example [b]."""

        def move(key, x, x0):
            noise = self.process.marginal(x0, t).noise(x)
            target = self.process.marginal(x0, s)
            fresh = self.eta * self.process.posterior(x, Denoised(x0), t, s).std
            kept = jnp.sqrt(jnp.maximum(target.std**2 - fresh**2, 0.0))
            fresh = jnp.minimum(fresh, target.std)
            return target.mean + kept * noise + fresh * jax.random.normal(key, x.shape, x.dtype)

        return jax.vmap(move)(key, x, denoise(x, t).mean), state
