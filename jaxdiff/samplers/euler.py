"""Euler–Maruyama: the plainest rule for the reverse SDE, and the yardstick of the others.

Reverse in time, a process dx = f dt + g dw runs as dx = (v − ½ η² g² s) dt + η g dw̄, with v the
velocity of its probability flow and s its score; every η ≥ 0 has the same marginals. The rule holds
the bracket and g fixed over a step.
"""

import jax
import jax.numpy as jnp

from jaxdiff import struct
from jaxdiff.processes.base import SDE, Denoiser, along, noise_rate, score
from jaxdiff.typing import Key, Scalar, State, Time

__all__ = ["EulerMaruyama"]


@struct.dataclass
class EulerMaruyama:
    """x_s = x + (s − t)(v − ½ η² g² ∇log p_t) + η g √(t − s) z. One network call a step.

    Of weak order 1. Of strong order ½ for a general SDE and 1 for these, whose noise is additive:
    g does not depend on x. It evaluates nothing at s, so it may step to σ(s) = 0.

    Attributes:
        process: any SDE.
        eta: noise, ≥ 0: 1 is Anderson's reverse SDE, 0 Euler's rule for the probability flow.
        final_noise: whether a step to s = 0 adds its noise too, as the SDE has it; images are shown
            without (github.com/yang-song/score_sde: sampling.py, noise_removal).

    Note: where α(t) = 0 the rate g is infinite; there the step is the probability flow's, whose
        marginals are the same.

    References: Anderson 1982, doi:10.1016/0304-4149(82)90051-5; Song et al. 2021,
        arXiv:2011.13456, eqs. 6 and 47; Kloeden and Platen 1992, doi:10.1007/978-3-662-12616-5,
        section 10.2 (orders).
    """

    process: SDE
    eta: Scalar = 1.0
    final_noise: bool = struct.field(pytree_node=False, default=True)

    def __post_init__(self) -> None:
        struct.require(self.eta >= 0.0, f"eta must be at least 0, got {self.eta}.")

    def init(self, x: State) -> None:
        """Remembers nothing."""

    def update(
        self, key: Key, x: State, state: None, t: Time, s: Time, denoise: Denoiser
    ) -> tuple[State, None]:
        """Takes x [b, …] from t to s, with one key an example [b]."""
        rate = self.eta * noise_rate(self.process, t)
        spread = jnp.sqrt(t - s)
        if not self.final_noise:
            spread = jnp.where(s > 0.0, spread, 0.0)

        def move(key, x, x0):
            g = along(rate, x)
            slope = self.process.velocity(x, x0, t)
            slope = slope - 0.5 * g**2 * score(self.process, x, x0, t)
            noise = jax.random.normal(key, x.shape, x.dtype)
            return x + (s - t) * slope + g * spread * noise

        return jax.vmap(move)(key, x, denoise(x, t).mean), state
