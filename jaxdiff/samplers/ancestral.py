"""Ancestral sampling: draw x_s from its posterior given x_t and what is known of x_0.

This is DDPM's sampler and, since it asks the process for its posterior, that of every process. The
moments of x_0 decide the reverse variance:

* `var = 0`, x_0 taken as known: β̃, the lower bound (DDPM's "fixed small");
* `UnitVariance`, x_0 as uncertain as N(0, I) data would leave it: β, the upper bound ("fixed
  large");
* a denoiser that knows its own variance: the law of total variance.
"""

import jax
import jax.numpy as jnp

from jaxdiff import struct
from jaxdiff.processes.base import Denoised, Denoiser, Process
from jaxdiff.processes.gaussian import Gaussian
from jaxdiff.typing import Key, State, Time

__all__ = ["Ancestral", "UnitVariance"]


@struct.dataclass
class Ancestral:
    """x_s ~ q(x_s | x_t, x_0) averaged over p(x_0 | x_t). One network call a step.

    On a coarse grid this is strided ancestral sampling. A step to s = 0 takes x̂_0 for known, as
    DDPM does: where σ(0) = 0 it returns x̂_0.

    Attributes:
        process: any process.
        final_noise: whether that last step, too, is drawn with the variance that the denoiser
            states. Its spread is right then, and its detail noise.

    References: Ho et al. 2020, arXiv:2006.11239, algorithm 2; Nichol and Dhariwal 2021,
        arXiv:2102.09672, section 4 (strided).
    """

    process: Process
    final_noise: bool = struct.field(pytree_node=False, default=False)

    def init(self, x: State) -> None:
        """Remembers nothing."""

    def update(
        self, key: Key, x: State, state: None, t: Time, s: Time, denoise: Denoiser
    ) -> tuple[State, None]:
        """Draws x_s [b, …] from the posterior, with one key an example [b]."""
        x0 = denoise(x, t)
        if not self.final_noise:
            x0 = Denoised(x0.mean, jnp.where(s > 0.0, x0.var, 0.0))

        def draw(key, x, x0):
            return self.process.posterior(x, x0, t, s).sample(key)

        return jax.vmap(draw, in_axes=(0, 0, x0.axes))(key, x, x0), state


@struct.dataclass
class UnitVariance:
    """A denoiser with the variance that x_0 would have for data from N(0, I).

    Var[x_0 | x_t] = σ²/(α² + σ²), which turns the ancestral reverse variance from β̃ into
    1 − ᾱ_t/ᾱ_s = β on a variance-preserving process.

    Attributes:
        process: whose α and σ are meant.
        denoise: the denoiser that gives the mean.

    References: Ho et al. 2020, arXiv:2006.11239, section 3.2.
    """

    process: Gaussian
    denoise: Denoiser

    def __call__(self, x: State, t: Time) -> Denoised:
        """The moments of x_0 given x [b, …] at t."""
        alpha, sigma = self.process.schedule(t)
        return Denoised(self.denoise(x, t).mean, sigma**2 / (alpha**2 + sigma**2))
