"""EDM's sampler: Heun's rule on the clock σ̃ = σ/α, after a little fresh noise.

In the variables y = x/α and σ̃ every Gaussian process is the same, y = x_0 + σ̃ ε, and its
probability flow is dy/dσ̃ = ε̂(y, σ̃), which is nearly straight at both ends. Before each step the
state is *churned*: carried forward in time, by the process itself, to a noise level (1 + γ) σ̃, from
where the step then starts. That is the Langevin part of an SDE, and forgets errors made earlier.
"""

import math

import jax
import jax.numpy as jnp

from jaxdiff import struct
from jaxdiff.processes.base import Denoiser
from jaxdiff.processes.gaussian import Gaussian
from jaxdiff.schedules import time_of_log_snr
from jaxdiff.typing import Key, Scalar, State, Time

__all__ = ["EDMSampler"]


@struct.dataclass
class EDMSampler:
    """y_s = y + (σ̃_s − σ̃_t)(ε̂(y, σ̃_t) + ε̂(y', σ̃_s))/2, from noise raised by the factor 1 + γ.

    Second order with γ = 0, when it is deterministic. Two network calls a step, and one for a step
    to σ(s) = 0 or from α(t) = 0, which is Euler's on this clock, that is DDIM's.

    Attributes:
        process: any Gaussian process.
        churn: γ ≥ 0, by how much a step raises the noise level first; cut at √2 − 1.
        s_min: least noise level σ/α that is churned.
        s_max: largest noise level σ/α that is churned.
        s_noise: scale of the fresh noise, a little above 1 to make up for the detail that the L2
            loss of a network removes; 1 is exact.

    Note: the paper's S_churn is γ times the number of steps. The noise is not raised beyond that of
        time 1, where the process ends.

    References: Karras et al. 2022, arXiv:2206.00364, algorithm 2 (1 with churn = 0).
    """

    process: Gaussian
    churn: Scalar = 0.0
    s_min: Scalar = 0.0
    s_max: Scalar = math.inf
    s_noise: Scalar = 1.0

    def __post_init__(self) -> None:
        struct.require(self.churn >= 0.0, f"churn must be at least 0, got {self.churn}.")
        struct.require(
            (self.s_min >= 0.0) & (self.s_min <= self.s_max),
            f"s_min must lie in [0, s_max={self.s_max}], got {self.s_min}.",
        )
        struct.require(self.s_noise >= 0.0, f"s_noise must be at least 0, got {self.s_noise}.")

    def init(self, x: State) -> None:
        """Remembers nothing."""

    def update(
        self, key: Key, x: State, state: None, t: Time, s: Time, denoise: Denoiser
    ) -> tuple[State, None]:
        """Takes x [b, …] from t to s, with one key an example [b]."""
        x, t = self._churned(key, x, t)
        (alpha_t, sigma_t), (alpha_s, sigma_s) = map(self.process.schedule, (t, s))

        def predicted(x, t):
            x0 = denoise(x, t).mean
            return x0, jax.vmap(lambda x, x0: self.process.marginal(x0, t).noise(x))(x, x0)

        x0, before = predicted(x, t)
        euler = alpha_s * x0 + sigma_s * before
        has_slopes = (sigma_s > 0.0) & (alpha_t > 0.0)

        def mean_slope():
            _, after = predicted(euler, s)
            width = sigma_s - alpha_s * sigma_t / alpha_t
            return euler + 0.5 * width * (after - before)

        return jax.lax.cond(has_slopes, mean_slope, lambda: euler), state

    def _churned(self, key: Key, x: State, t: Time) -> tuple[State, Time]:
        """The state at the noise level (1 + γ) σ̃, and its time."""
        alpha, sigma = self.process.schedule(t)
        inside = (self.s_min * alpha <= sigma) & (sigma <= self.s_max * alpha) & (t < 1.0)
        gamma = jnp.where(inside, jnp.minimum(self.churn, math.sqrt(2.0) - 1.0), 0.0)

        def noisier():
            log_snr = self.process.log_snr(t) - 2.0 * jnp.log1p(gamma)
            later = jnp.maximum(time_of_log_snr(self.process.schedule, log_snr), t)

            def move(key, x):
                there = self.process.transition(x, t, later)
                noise = jax.random.normal(key, x.shape, x.dtype)
                return there.from_noise(self.s_noise * noise)

            return jax.vmap(move)(key, x), later

        return jax.lax.cond(gamma > 0.0, noisier, lambda: (x, t))
