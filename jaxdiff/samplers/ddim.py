"""DDIM: move x_0 and the noise along the marginals, with as much fresh noise as one likes.

Given x̂_0, the state at t is the image of a noise ε̂ under the marginal; the state at s is the image
of the same noise under the marginal there. Replacing a part of that noise by a fresh one leaves the
marginal q(x_s | x_0) what it was, so η is free. Without fresh noise the step is a map, and its
inverse encodes data.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdiff import grids, struct
from jaxdiff.distributions import root
from jaxdiff.processes.base import Denoised, Denoiser
from jaxdiff.processes.gaussian import Gaussian
from jaxdiff.samplers.base import repeat, run
from jaxdiff.typing import Grid, Key, Scalar, State, Time

__all__ = ["DDIM", "DDIMInversion", "invert"]


@struct.dataclass
class DDIM:
    """x_s = α_s x̂_0 + √(σ_s² − σ̃²) ε̂ + σ̃ z, σ̃ = η √β̃. One network call a step.

    η = 0 is deterministic, and is Euler's rule for the probability-flow ODE in the variables
    (x/α, σ/α): first order. η = 1 is ancestral sampling with variance β̃.

    Attributes:
        process: the forward process.
        eta: fresh noise, ≥ 0; above 1 it is cut where σ̃ would exceed σ_s.

    References: Song et al. 2020, arXiv:2010.02502, eqs. 12 and 16.
    """

    process: Gaussian
    eta: Scalar = 0.0

    def __post_init__(self) -> None:
        struct.require(self.eta >= 0.0, f"eta must be at least 0, got {self.eta}.")

    def init(self, x: State) -> None:
        """Remembers nothing."""

    def update(
        self, key: Key, x: State, state: None, t: Time, s: Time, denoise: Denoiser
    ) -> tuple[State, None]:
        """Takes x [b, …] from t to s, with one key an example [b]."""

        def move(key, x, x0):
            noise = self.process.marginal(x0, t).noise(x)
            target = self.process.marginal(x0, s)
            fresh = self.eta * self.process.posterior(x, Denoised(x0), t, s).std
            kept = root(target.std**2 - fresh**2)
            fresh = jnp.minimum(fresh, target.std)
            return target.mean + kept * noise + fresh * jax.random.normal(key, x.shape, x.dtype)

        return jax.vmap(move)(key, x, denoise(x, t).mean), state


@struct.dataclass
class DDIMInversion:
    """The inverse of a step of `DDIM`, by fixed-point iteration: from t *up* to s > t.

    DDIM's step from s to t leads to x where x_s = (α_s/α_t) x + (σ_s − σ_t α_s/α_t) ε̂(x_s, s).
    The right side is evaluated at a guess of x_s, which is x at first: once is the usual DDIM
    inversion, of first order; several times approach the exact inverse. `iterations` network calls
    a step, none of them at t, where σ may be 0.

    Attributes:
        process: the forward process.
        iterations: of the fixed point, ≥ 1.

    References: Song et al. 2020, arXiv:2010.02502, section 5.4; Pan et al. 2023,
        arXiv:2309.04907, section 3.2 (the fixed point).
    """

    process: Gaussian
    iterations: int = struct.field(pytree_node=False, default=1)

    def __post_init__(self) -> None:
        struct.require(
            self.iterations >= 1,
            f"iterations must be at least 1, got {self.iterations}.",
        )

    def init(self, x: State) -> None:
        """Remembers nothing."""

    def update(
        self, key: Key, x: State, state: None, t: Time, s: Time, denoise: Denoiser
    ) -> tuple[State, None]:
        """Takes x [b, …] from t up to s > t; the keys are not used."""
        (alpha_t, sigma_t), (alpha_s, sigma_s) = map(self.process.schedule, (t, s))
        kept = alpha_s / alpha_t
        # Where no signal is kept, x_s is all noise: that which x and x̂_0 leave at t.
        louder = sigma_s / jnp.where(sigma_t > 0.0, sigma_t, sigma_s)

        def improve(_, guess):
            x0 = denoise(guess, s).mean
            noise = jax.vmap(lambda x, x0: self.process.marginal(x0, s).noise(x))(guess, x0)
            moved = kept * x + (sigma_s - kept * sigma_t) * noise
            return jnp.where(alpha_s > 0.0, moved, louder * (x - alpha_t * x0))

        return repeat(self.iterations, improve, x), state


def invert(
    process: Gaussian,
    denoise: Denoiser,
    grid: Grid,
    x: Float[Array, "b ..."],
    *,
    iterations: int = 1,
) -> State:
    """Encodes data: the states from which `DDIM(process)` samples them on the same grid.

    Args:
        process: the forward process.
        denoise: (x [b, …], t) ↦ moments of x_0.
        grid: [n + 1] decreasing times, those of the sampling that is to be undone.
        x: [b, …] states at grid[-1].
        iterations: network calls a step, ≥ 1: with 1 the round trip is of first order in the step,
            with more it approaches the identity on any grid.

    Returns:
        [b, …] states at grid[0].

    Raises:
        ValueError: if the grid does not fall strictly within [0, 1], or iterations < 1.

    References: Song et al. 2020, arXiv:2010.02502, section 5.4.
    """
    grid = jnp.asarray(grid)
    grids.check(grid)
    step = DDIMInversion(process, iterations)
    return run(step, denoise, grid[::-1], jax.random.key(0), x)[0]
