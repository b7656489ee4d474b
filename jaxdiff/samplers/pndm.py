"""PNDM: linear multistep methods for the noise, on the manifold of DDIM's step.

A classical method for dx/dt = v moves along a straight line, off the states that the network knows.
A *pseudo* numerical method combines noises as the classical one combines slopes, with the
coefficients of Adams–Bashforth in t, and moves by DDIM's step.
"""

import jax
import jax.numpy as jnp

from jaxdiff import struct
from jaxdiff.processes.base import Denoiser
from jaxdiff.processes.gaussian import Gaussian
from jaxdiff.samplers.dpm_solver import (
    History,
    check_order,
    finite_step,
    is_infinite,
    transfer_noise,
    weights_over,
)
from jaxdiff.typing import Key, State, Time

__all__ = ["PNDM"]


@struct.dataclass
class PNDM:
    """x_s = DDIM's step with ⟨ε̂⟩, the average over t of the polynomial through the last values.

    Of second order, deterministic. One network call a step once `order` − 1 values are known;
    before that, in the first `order` − 1 steps, a Runge–Kutta step in the same manner:

    * order 2, S-PNDM: ⟨ε̂⟩ = (3 ε̂_t − ε̂')/2; 2 calls in the first step (Heun's, of noises);
    * order 4, F-PNDM: (55, −59, 37, −9)/24; 4 calls in each of the first 3 steps (Kutta's). Without
      `kutta` it is PLMS: the first step is Heun's, of 2 calls, and then as many values are used as
      are known. That is better with few calls.

    One call for a step to σ(s) = 0 or from α(t) = 0, which is DDIM's.

    Attributes:
        process: the forward process.
        order: 2 or 4, the number of values.
        kutta: whether order 4 begins with Kutta's steps.

    Note: the coefficients are the paper's where the steps are equal; elsewhere they are those of
        Adams and Bashforth for unequal steps.

    References: Liu et al. 2022, arXiv:2202.09778, section 3 and algorithm 2.
    """

    process: Gaussian
    order: int = struct.field(pytree_node=False, default=4)
    kutta: bool = struct.field(pytree_node=False, default=True)

    def __post_init__(self) -> None:
        check_order(self.order, (2, 4))

    def init(self, x: State) -> History:
        """No values yet."""
        return History.empty(x, self.order - 1)

    def update(
        self, key: Key, x: State, state: History, t: Time, s: Time, denoise: Denoiser
    ) -> tuple[State, History]:
        """Takes x [b, …] from t to s; the keys are not used."""
        x0 = denoise(x, t).mean
        noise = self.process.marginal(x0, t).noise(x)
        known = state.push(t, noise)
        infinite = is_infinite(self.process, t, s)
        by_heun = self.order == 2 or not self.kutta
        starting = ~jnp.isfinite(state.clock[0 if by_heun else -1])
        first = self._heun if by_heun else self._kutta

        def multistep():
            return known.combine(weights_over(known.clock, t, jnp.where(infinite, jnp.inf, s)))

        average = jax.lax.cond(
            starting & ~infinite, lambda: first(x, x0, noise, t, s, denoise), multistep
        )
        x = transfer_noise(self.process, x, x0, average, t, s)
        return x, known.latest(self.order - 1)

    def _heun(self, x: State, x0: State, noise: State, t: Time, s: Time, denoise: Denoiser):
        t, s = finite_step(self.process, t, s)
        return 0.5 * (noise + self._value(x, x0, noise, t, s, denoise))

    def _kutta(self, x: State, x0: State, noise: State, t: Time, s: Time, denoise: Denoiser):
        t, s = finite_step(self.process, t, s)
        middle = 0.5 * (t + s)
        second = self._value(x, x0, noise, t, middle, denoise)
        third = self._value(x, x0, second, t, middle, denoise)
        fourth = self._value(x, x0, third, t, s, denoise)
        return (noise + 2.0 * second + 2.0 * third + fourth) / 6.0

    def _value(
        self, x: State, x0: State, noise: State, t: Time, s: Time, denoise: Denoiser
    ) -> State:
        """The noise seen at s, after a step from t along `noise`."""
        x = transfer_noise(self.process, x, x0, noise, t, s)
        return self.process.marginal(denoise(x, s).mean, s).noise(x)
