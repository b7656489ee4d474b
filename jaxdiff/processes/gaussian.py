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
from jaxdiff.distributions import Normal, root
from jaxdiff.processes.base import Denoised, Denoiser
from jaxdiff.schedules import Schedule
from jaxdiff.typing import Array, Data, Scalar, State, Time

__all__ = ["Gaussian", "Rescaled"]


@struct.dataclass
class Gaussian:
    """x_t = α(t) x_0 + σ(t) ε.

    Attributes:
        schedule: t ↦ (α, σ); see `jaxdiff.schedules`.
        prior_mean: what the prior takes for the mean of the data: a scalar or an array of their
            shape. A process that keeps α(1) > 0 keeps the mean, and its prior is better for
            knowing it.
    """

    schedule: Schedule
    prior_mean: Scalar = 0.0

    def prior(self, shape: tuple[int, ...]) -> Normal:
        """p(x_1) = N(α(1) m, σ(1)²): what the marginal tends to once the data are drowned.

        Args:
            shape: of one state, or of a batch of them.
        """
        alpha, sigma = self.schedule(jnp.ones(()))
        return Normal(jnp.broadcast_to(alpha * self.prior_mean, shape).astype(sigma.dtype), sigma)

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
        return Normal(alpha_t / alpha_s * x, sigma_t * root(self._lost(t, s)))

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
        return Normal(of_x * x + of_x0 * x0.mean, root(var))

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

    def velocity(self, x: State, x0: Data, t: Time) -> State:
        """dx/dt of the probability flow at one state, from its denoised mean.

        Both x̂_0 and ε̂ are held fixed and the marginal's path is differentiated in t,

            dx/dt = d/dt [α(t) x̂_0 + σ(t) ε̂] = f(x, t) − ½ g(t)² ∇ log p_t(x),

        which stays finite where α = 0 and f does not.

        References: Song et al. 2021, arXiv:2011.13456, eq. 13; Song et al. 2020,
            arXiv:2010.02502, eq. 14.
        """
        noise = self.marginal(x0, t).noise(x)
        one = jnp.ones_like(t)
        return jax.jvp(lambda t: self.marginal(x0, t).from_noise(noise), (t,), (one,))[1]

    def log_snr(self, t: Time) -> Time:
        """The log signal-to-noise ratio log α²/σ² at t."""
        return schedules.log_snr(self.schedule, t)

    def _rates(self, t: Time) -> tuple[tuple[Time, Time], tuple[Time, Time]]:
        return jax.jvp(self.schedule, (t,), (jnp.ones_like(t),))

    def _lost(self, t: Time, s: Time) -> Time:
        # 1 − SNR(t)/SNR(s), the share of the signal lost between s and t, without cancellation.
        return -jnp.expm1(self.log_snr(t) - self.log_snr(s))


@struct.dataclass
class Rescaled:
    """A denoiser of one Gaussian process that serves another, without training anew.

    What x_t tells of x_0 depends on its signal-to-noise ratio and not on its scale, so

        x̂_0(y, u) = denoise(c y, t),    SNR(t) = SNR'(u),    c² = (α² + σ²)/(α'² + σ'²),

    with α', σ' of the other process at u. So a solver may run in the variables and on the clock in
    which the drift is gentlest: with α' = 1 the state is x/α.

    Attributes:
        denoise: a denoiser of `source`.
        source: the process that it was made for.
        target: the process that it is to serve; where its SNR leaves the range of the source's,
            the source's end is taken.

    References: Karras et al. 2022, arXiv:2206.00364, eq. 4 and appendix B.
    """

    denoise: Denoiser
    source: Gaussian
    target: Gaussian

    def __call__(self, x: State, t: Time) -> Denoised:
        """The moments of x_0 given x [b, …] of the target process at t."""
        s = schedules.time_of_log_snr(self.source.schedule, self.target.log_snr(t))
        alpha, sigma = self.source.schedule(s)
        own_alpha, own_sigma = self.target.schedule(t)
        scale = jnp.sqrt((alpha**2 + sigma**2) / (own_alpha**2 + own_sigma**2))
        return self.denoise(scale * x, s)
