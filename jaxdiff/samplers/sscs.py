"""SSCS: the symmetric splitting sampler of critically damped Langevin diffusion.

Backwards in time, with v/M added to and taken from the score, the motion falls into two parts,

    A:  dx = −β v/M dt,  dv = β x dt − Γβ v/M dt + √(2Γβ) dw,
    S:  dx = 0,          dv = 2Γβ (∇_v log p_t(z) + v/M) dt.

A is the forward process with its velocity turned around, and so solved exactly; S vanishes in
equilibrium and is small near it. Half a step of A, a step of S, half a step of A.
"""

import jax
import jax.numpy as jnp

from jaxdiff import struct
from jaxdiff.processes.base import Denoiser, score
from jaxdiff.processes.cld import CLD
from jaxdiff.typing import Data, Key, State, Time

__all__ = ["SSCS"]


@struct.dataclass
class SSCS:
    """z ← A(h/2) S(h) A(h/2) z with Euler's rule for S. One network call a step.

    Of weak order one, exact for data from N(0, I) with γ = 1. The score is taken in the middle of a
    step, in space and time. A step to s = 0, where it would be singular, draws z_0 from its
    posterior instead: its x is x̂_0.

    Attributes:
        process: the forward process.

    References: Dockhorn et al. 2022, arXiv:2112.07068, algorithm 1 and appendix D.
    """

    process: CLD

    def init(self, x: State) -> None:
        """Remembers nothing."""

    def update(
        self, key: Key, x: State, state: None, t: Time, s: Time, denoise: Denoiser
    ) -> tuple[State, None]:
        """Takes z [b, 2, …] from t to s, with one key an example [b]."""
        half, middle, ends = 0.5 * (t - s), 0.5 * (t + s), s == 0.0
        noise = jax.vmap(lambda key: jax.random.normal(key, (2, *x.shape[1:]), x.dtype))(key)
        z = jax.vmap(self._drift, in_axes=(0, 0, None))(noise[:, 0], x, half)
        # One call serves both kinds of step.
        z0 = denoise(jnp.where(ends, x, z), jnp.where(ends, t, middle))

        def move(noise, x, z, z0):
            last = self.process.posterior(x, z0, t, s).from_noise(noise)
            kicked = self._kick(z, z0.mean, middle, t - s)
            return jnp.where(ends, last, self._drift(noise, kicked, half))

        return jax.vmap(move, in_axes=(0, 0, 0, z0.axes))(noise[:, 1], x, z, z0), state

    def _drift(self, noise: State, z: State, duration: Time) -> State:
        """A, exactly: the forward transition, with the velocity reversed."""
        start = jnp.zeros_like(duration)
        return _reverse(self.process.transition(_reverse(z), start, duration).from_noise(noise))

    def _kick(self, z: State, x0: Data, t: Time, duration: Time) -> State:
        """S, by Euler's rule."""
        excess = score(self.process, z, x0, t) - self.process.prior(z.shape).score(z)
        x, v = z
        return jnp.stack([x, v + duration * self.process.diffusion(t)[1] ** 2 * excess[1]])


def _reverse(z: State) -> State:
    """(x, −v)."""
    return jnp.stack([z[0], -z[1]])
