"""The scalar Gaussian process x_t = α(t) x_0 + σ(t) ε, for any schedule.

Variance preserving, exploding, sub-VP, EDM, flow: each is one `Schedule` and this one class. With
r = SNR(t)/SNR(s) ∈ [0, 1] for s < t, its transition and posterior are

    q(x_t | x_s)      = N(α_t/α_s x_s,  σ_t² (1 − r))
    q(x_s | x_t, x_0) = N((α_t/α_s)(σ_s/σ_t)² x_t + α_s (1 − r) x_0,  σ_s² (1 − r)),

and it is the marginal of dx = f x dt + g dw with f = d log α/dt and g² = 2σ² d log(σ/α)/dt.
"""

import jax
import jax.numpy as jnp

from jaxdiff import schedules, struct
from jaxdiff.distributions import Normal
from jaxdiff.processes.base import Denoised
from jaxdiff.schedules import Schedule
from jaxdiff.typing import Array, Data, State, Time

__all__ = ["Gaussian"]


@struct.dataclass
class Gaussian:
    """x_t = α(t) x_0 + σ(t) ε.

    Attributes:
        schedule: t ↦ (α, σ); see `jaxdiff.schedules`.
    """

    schedule: Schedule

    def prior(self, shape: tuple[int, ...]) -> Normal:
        """p(x_1) = N(0, σ(1)²): what the marginal tends to once the data are drowned.

        Args:
            shape: of one state, or of a batch of them.
        """
        _, sigma = self.schedule(jnp.ones(()))
        return Normal(jnp.zeros(shape, sigma.dtype), sigma)

    def marginal(self, x0: Data, t: Time) -> Normal:
        """q(x_t | x_0) = N(α x_0, σ²)."""
        alpha, sigma = self.schedule(t)
        return Normal(alpha * x0, sigma)

    def transition(self, x: State, s: Time, t: Time) -> Normal:
        """q(x_t | x_s) for s < t: one step of the forward chain.

        References: Kingma et al. 2021, arXiv:2107.00630, eqs. 20–21.
        """
        alpha_s, _ = self.schedule(s)
        alpha_t, sigma_t = self.schedule(t)
        return Normal(alpha_t / alpha_s * x, sigma_t * jnp.sqrt(self._lost(t, s)))

    def posterior(self, x: State, x0: Denoised, t: Time, s: Time) -> Normal:
        """q(x_s | x_t, x_0) for s < t; an uncertain x_0 widens it by the law of total variance.

        With `x0.var = 0` its variance is DDPM's β̃; with the variance σ²/(α² + σ²) that N(0, I)
        data would have it is the one-step variance, DDPM's β.

        Args:
            x: x_t.
            x0: mean and variance of x_0 given x_t.
            t: the time of x, with σ(t) > 0.
            s: the earlier time, with α(s) > 0. At σ(s) = 0 the posterior is x_0 itself.

        References: Ho et al. 2020, arXiv:2006.11239, eqs. 6–7; Bao et al. 2022, arXiv:2201.06503,
            eq. 9 (the total variance).
        """
        alpha_s, sigma_s = self.schedule(s)
        alpha_t, sigma_t = self.schedule(t)
        lost = self._lost(t, s)
        of_x = alpha_t / alpha_s * (sigma_s / sigma_t) ** 2
        of_x0 = alpha_s * lost
        var = sigma_s**2 * lost + of_x0**2 * x0.var
        return Normal(of_x * x + of_x0 * x0.mean, jnp.sqrt(var))

    def drift(self, x: State, t: Time) -> State:
        """f(x, t) = x d log α/dt; infinite where α = 0."""
        (alpha, _), (d_alpha, _) = self._rates(t)
        return d_alpha / alpha * x

    def diffusion(self, t: Time) -> Array:
        """g(t) = √(2σ² d log(σ/α)/dt), a scalar.

        References: Kingma et al. 2021, arXiv:2107.00630, appendix on the continuous-time SDE.
        """
        (alpha, sigma), (d_alpha, d_sigma) = self._rates(t)
        squared = 2.0 * sigma * (d_sigma - sigma * d_alpha / alpha)
        return jnp.sqrt(jnp.maximum(squared, 0.0))

    def log_snr(self, t: Time) -> Time:
        """The log signal-to-noise ratio log α²/σ² at t."""
        return schedules.log_snr(self.schedule, t)

    def _rates(self, t: Time) -> tuple[tuple[Time, Time], tuple[Time, Time]]:
        return jax.jvp(self.schedule, (t,), (jnp.ones_like(t),))

    def _lost(self, t: Time, s: Time) -> Time:
        # 1 − SNR(t)/SNR(s), the share of the signal lost between s and t, without cancellation.
        return -jnp.expm1(self.log_snr(t) - self.log_snr(s))
