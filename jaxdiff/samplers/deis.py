"""DEIS: Adams–Bashforth for the noise, with the flow's linear part solved exactly.

In y = x/α and ρ = σ/α the flow is dy = ε̂ dρ. Over a step ε̂ is a polynomial through its last values
in some clock: ρ itself, log ρ, or the time t; and a step adds its integral.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxdiff import struct
from jaxdiff.processes.base import Denoiser
from jaxdiff.processes.gaussian import Gaussian
from jaxdiff.samplers.dpm_solver import (
    History,
    check_order,
    half_log_snr,
    is_infinite,
    transfer_noise,
    weights_over,
)
from jaxdiff.typing import Array, Key, State, Time

__all__ = ["DEIS", "LOG_RHO", "RHO", "TIME", "Clock"]


class Clock(NamedTuple):
    """The variable in which ε̂ is a polynomial.

    Attributes:
        at: its value at a time t.
        log_rate: log |dρ/d clock| at values of the clock, up to a constant.
    """

    at: Callable[[Gaussian, Time], Time]
    log_rate: Callable[[Gaussian, Array], Array]


def _rho(process: Gaussian, t: Time) -> Time:
    alpha, sigma = process.schedule(t)
    return sigma / alpha


def _rate_of_rho(process: Gaussian, rho: Array) -> Array:
    return jnp.zeros_like(rho)


def _log_rho(process: Gaussian, t: Time) -> Time:
    return -half_log_snr(process, t)


def _rate_of_log_rho(process: Gaussian, log_rho: Array) -> Array:
    return log_rho


def _time(process: Gaussian, t: Time) -> Time:
    return t


def _rate_of_time(process: Gaussian, times: Array) -> Array:
    def log_rate(t):
        log_rho, slope = jax.jvp(lambda t: _log_rho(process, t), (t,), (jnp.ones_like(t),))
        return log_rho + jnp.log(slope)

    return jax.vmap(log_rate)(times)


RHO = Clock(_rho, _rate_of_rho)
LOG_RHO = Clock(_log_rho, _rate_of_log_rho)
TIME = Clock(_time, _rate_of_time)


@struct.dataclass
class DEIS:
    """x_s = α_s (x/α_t + (ρ_s − ρ_t) ⟨ε̂⟩), ⟨ε̂⟩ the average under dρ of a polynomial in a clock.

    Of order `order`, the number of values that the polynomial goes through; deterministic. One
    network call a step. The first steps are of lower order, for want of values, and a step to
    σ(s) = 0 or from α(t) = 0 is DDIM's, as every step is with order 1.

    Attributes:
        process: the forward process.
        order: 1, 2, 3 or 4; the paper's AB3 is order 4.
        clock: `LOG_RHO`, which does not see how the schedule is clocked; `TIME`, the paper's tAB;
            or `RHO`, its ρAB.

    Note: the averages are Gauss–Legendre sums of 16 points: exact in ρ, to rounding in log ρ.

    References: Zhang and Chen 2022, arXiv:2204.13902, section 3 (tAB) and section 4 (ρAB).
    """

    process: Gaussian
    order: int = struct.field(pytree_node=False, default=3)
    clock: Clock = struct.field(pytree_node=False, default=LOG_RHO)

    def __post_init__(self) -> None:
        check_order(self.order, (1, 2, 3, 4))

    def init(self, x: State) -> History:
        """No values yet."""
        return History.empty(x, self.order - 1)

    def update(
        self, key: Key, x: State, state: History, t: Time, s: Time, denoise: Denoiser
    ) -> tuple[State, History]:
        """Takes x [b, …] from t to s; the keys are not used."""
        x0 = denoise(x, t).mean
        start, stop = self.clock.at(self.process, t), self.clock.at(self.process, s)
        stop = jnp.where(is_infinite(self.process, t, s), jnp.inf, stop)
        known = state.push(start, self.process.marginal(x0, t).noise(x))
        weights = weights_over(
            known.clock, start, stop, lambda clock: self.clock.log_rate(self.process, clock)
        )
        x = transfer_noise(self.process, x, x0, known.combine(weights), t, s)
        return x, known.latest(self.order - 1)
