"""Heun's rule for the probability flow, of any SDE: step, look back, step by the mean slope."""

import jax

from jaxdiff import struct
from jaxdiff.processes.base import SDE, Denoiser
from jaxdiff.typing import Key, State, Time

__all__ = ["Heun"]


@struct.dataclass
class Heun:
    """x_s = x + (s − t)(v(x, t) + v(x', s))/2 with Euler's x' = x + (s − t) v(x, t).

    Second order, deterministic. Two network calls a step, and one for a step to s = 0: the score
    may not exist there, so that step is Euler's.

    Attributes:
        process: any SDE.

    Note: the clock is t. `EDMSampler` follows the same rule on the clock σ/α, where the flow of a
        Gaussian process is straighter.

    References: Karras et al. 2022, arXiv:2206.00364, algorithm 1.
    """

    process: SDE

    def init(self, x: State) -> None:
        """Remembers nothing."""

    def update(
        self, key: Key, x: State, state: None, t: Time, s: Time, denoise: Denoiser
    ) -> tuple[State, None]:
        """Takes x [b, …] from t to s; the keys are not used."""

        def velocity(x, t):
            flow = jax.vmap(lambda x, x0: self.process.velocity(x, x0, t))
            return flow(x, denoise(x, t).mean)

        before = velocity(x, t)
        euler = x + (s - t) * before

        def mean_slope():
            return x + 0.5 * (s - t) * (before + velocity(euler, s))

        return jax.lax.cond(s > 0.0, mean_slope, lambda: euler), state
