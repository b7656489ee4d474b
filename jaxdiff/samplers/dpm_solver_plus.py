"""DPM-Solver++: exponential integrators of the denoised mean, of the flow and of the reverse SDE.

With λ = log(α/σ), h = λ_s − λ_t and noise η, the reverse SDE between t and s is solved exactly but
for an average of x̂_0,

    x_s = (σ_s/σ_t) e^{−η²h} x_t + α_s (1 − e^{−(1+η²)h}) ⟨x̂_0⟩ + σ_s √(1 − e^{−2η²h}) z,

x̂_0 averaged under e^{(1+η²)λ} dλ. It keeps the share e^{−η²h} of the noise of x_t and replaces the
rest: η = 0 is the probability flow and η = 1 the reverse SDE; the marginals are the same for all η.
"""

import jax
import jax.numpy as jnp

from jaxdiff import struct
from jaxdiff.distributions import root
from jaxdiff.processes.base import Denoiser
from jaxdiff.processes.gaussian import Gaussian
from jaxdiff.samplers.dpm_solver import (
    History,
    check_order,
    finite_step,
    half_log_snr,
    is_infinite,
    time_within,
    transfer,
    weights_at,
    weights_over,
)
from jaxdiff.typing import Key, Scalar, State, Time

__all__ = ["DPMSolverPP", "DPMSolverPPSingle"]


@struct.dataclass
class DPMSolverPP:
    """DPM-Solver++ (2M) and (3M), and their SDE forms: ⟨x̂_0⟩ from the steps before.

    Of order `order` for η = 0; of weak order 2 at most for η > 0 (so measured on Gaussian data).
    One network call a step. ⟨x̂_0⟩ is

    * 1: the value at λ_t. This is DDIM for η = 0, and ancestral sampling for η = 1.
    * 2: the line through the last two values, at λ_t + ½ h: 2M.
    * 3: the average of the parabola through the last three: 3M.

    A step to σ(s) = 0 or from α(t) = 0 is of first order, and so are the first ones, for want of
    values.

    Attributes:
        process: the forward process.
        order: 1, 2 or 3.
        eta: noise, ≥ 0: 0 solves the probability flow, 1 the reverse SDE.

    Note: the average in 3M is exact. The authors' code, and diffusers after it, take half of the
        parabola's second difference, which leaves the method at second order. The paper has η = 0
        and 1; k-diffusion's `eta` is our η².

    References: Lu et al. 2022, arXiv:2211.01095, algorithm 2 (2M); Xue et al. 2023,
        arXiv:2309.05019, section 4 (any η).
    """

    process: Gaussian
    order: int = struct.field(pytree_node=False, default=2)
    eta: Scalar = 0.0

    def __post_init__(self) -> None:
        check_order(self.order, (1, 2, 3))
        struct.require(self.eta >= 0.0, f"eta must be at least 0, got {self.eta}.")

    def init(self, x: State) -> History:
        """No values yet."""
        return History.empty(x, self.order - 1)

    def update(
        self, key: Key, x: State, state: History, t: Time, s: Time, denoise: Denoiser
    ) -> tuple[State, History]:
        """Takes x [b, …] from t to s, with one key an example [b]."""
        start, stop = half_log_snr(self.process, t), half_log_snr(self.process, s)
        known = state.push(start, denoise(x, t).mean)
        if self.order == 3:
            rate = 1.0 + self.eta**2
            weights = weights_over(known.clock, start, stop, lambda clock: rate * clock)
        else:
            weights = weights_at(known.clock, 0.5 * (start + stop))
        kept, lost = _shares(start, stop, self.eta)
        fresh = lost * _noise(key, x)
        x = transfer(self.process, x, known.combine(weights), t, s, kept=kept, fresh=fresh)
        return x, known.latest(self.order - 1)


@struct.dataclass
class DPMSolverPPSingle:
    """DPM-Solver++ (2S), and its SDE form: ⟨x̂_0⟩ from a call within the step.

    Of second order; for η > 0 in the weak sense, since the inner value lies on the path of the
    noise that the whole step takes. Two network calls a step, and one for a step to σ(s) = 0 or
    from α(t) = 0, which is of first order. A value at λ_t + r h, reached by order 1, and that at
    λ_t give a line; ⟨x̂_0⟩ is the line at λ_t + ½ h.

    Attributes:
        process: the forward process.
        ratio: r in (0, 1].
        eta: noise, ≥ 0: 0 solves the probability flow, 1 the reverse SDE.

    Note: the paper has the 2S of the flow. Its SDE form is the 2M's with this value instead of the
        extrapolated one.

    References: Lu et al. 2022, arXiv:2211.01095, algorithm 1.
    """

    process: Gaussian
    ratio: Scalar = 0.5
    eta: Scalar = 0.0

    def __post_init__(self) -> None:
        struct.require(
            (self.ratio > 0.0) & (self.ratio <= 1.0),
            f"ratio must lie in (0, 1], got {self.ratio}.",
        )
        struct.require(self.eta >= 0.0, f"eta must be at least 0, got {self.eta}.")

    def init(self, x: State) -> None:
        """Remembers nothing."""

    def update(
        self, key: Key, x: State, state: None, t: Time, s: Time, denoise: Denoiser
    ) -> tuple[State, None]:
        """Takes x [b, …] from t to s, with one key an example [b]."""
        x0 = denoise(x, t).mean
        early, late = jnp.moveaxis(jax.vmap(jax.random.split)(key), 1, 0)
        early, late = _noise(early, x), _noise(late, x)

        def first():
            kept, lost = self._shares(t, s)
            return transfer(self.process, x, x0, t, s, kept=kept, fresh=lost * late)

        def second():
            begin, end = finite_step(self.process, t, s)
            middle = time_within(self.process, begin, end, self.ratio)
            kept, lost = self._shares(begin, middle)
            fresh = lost * early
            inner = transfer(self.process, x, x0, begin, middle, kept=kept, fresh=fresh)
            rest, lost = self._shares(middle, end)
            kept, fresh = rest * kept, rest * fresh + lost * late
            start, between, stop = (half_log_snr(self.process, t) for t in (begin, middle, end))
            weights = weights_at(jnp.stack([start, between]), 0.5 * (start + stop))
            mean = weights[0] * x0 + weights[1] * denoise(inner, middle).mean
            return transfer(self.process, x, mean, begin, end, kept=kept, fresh=fresh)

        return jax.lax.cond(is_infinite(self.process, t, s), first, second), state

    def _shares(self, t: Time, s: Time) -> tuple[Time, Time]:
        return _shares(half_log_snr(self.process, t), half_log_snr(self.process, s), self.eta)


def _shares(start: Time, stop: Time, eta: Scalar) -> tuple[Time, Time]:
    """e^{−η²h} and √(1 − e^{−2η²h}): how much of the noise is kept, and how much is fresh."""
    endless = jnp.isinf(stop - start)
    exponent = eta**2 * jnp.where(endless, 1.0, stop - start)
    exponent = jnp.where(endless & (exponent > 0.0), jnp.inf, exponent)
    return jnp.exp(-exponent), root(-jnp.expm1(-2.0 * exponent))


def _noise(key: Key, x: State) -> State:
    return jax.vmap(lambda key, x: jax.random.normal(key, x.shape, x.dtype))(key, x)
