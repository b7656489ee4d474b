"""Langevin dynamics: random walks that drift up the score and settle in p_t, at one time or many.

With a preconditioner C, the walk x ← x + ε C ∇log p_t(x) + √(2ε C) z leaves p_t as it is, up to the
size of its steps. The natural C is the covariance Σ of the marginal q(x_t | x_0): by Tweedie's
formula Σ ∇log p_t = m − x with m the marginal's mean at x̂_0, so that

    x  ←  x − ε (x − m) + √(2ε) Σ^{1/2} z,

which divides by nothing, is right at σ = 0, has an ε without unit, and holds for the scalar σ² of a
Gaussian process and the matrix of a coupled one alike.
"""

import diffrax
import jax
import jax.numpy as jnp

from jaxdiff import struct
from jaxdiff.processes.base import SDE, Denoiser
from jaxdiff.processes.gaussian import Gaussian
from jaxdiff.samplers.base import repeat
from jaxdiff.solve import underdamped_langevin
from jaxdiff.typing import Key, Scalar, State, Time

__all__ = ["AnnealedLangevin", "Langevin", "UnderdampedLangevin"]


@struct.dataclass
class Langevin:
    """A corrector: x ← x − ε (x − m) + √(2ε) Σ^{1/2} z with ε = 2 snr², `steps` times.

    One network call each. The variance that it settles at is too large by the factor
    1/(1 − ε/2) where p_t is all noise, and by less where the data dominate: 2.6 % at snr = 0.16.

    Attributes:
        process: any SDE.
        snr: Song's r, the wanted ratio of the drift's length to the noise's.
        steps: how often.

    Note: Song et al. divide the norm of the noise by the norm of the score, averaged over the
        batch, in every step. Here the ratio is replaced by what it tends to in many dimensions:
        ‖z‖/‖∇log p_t‖ = σ. So examples are not coupled, and the step does not depend on the noise
        that it is to be taken with, which in few dimensions has heavy tails and biases the walk.
        Their factor α_i, close to 1, is left out.

    References: Song et al. 2021, arXiv:2011.13456, algorithms 4 and 5; Roberts and Tweedie 1996,
        doi:10.2307/3318418 (the bias).
    """

    process: SDE
    snr: Scalar = 0.16
    steps: int = struct.field(pytree_node=False, default=1)

    def __post_init__(self) -> None:
        struct.require(self.snr > 0.0, f"snr must be positive, got {self.snr}.")
        struct.require(self.steps >= 1, f"steps must be at least 1, got {self.steps}.")

    def correct(self, key: Key, x: State, t: Time, denoise: Denoiser) -> State:
        """Moves x [b, …] closer to p_t, with one key an example [b]."""

        def move(key, x, x0):
            marginal = self.process.marginal(x0, t)
            mean = marginal.from_noise(jnp.zeros_like(x))
            noise = marginal.from_noise(jax.random.normal(key, x.shape, x.dtype)) - mean
            return x - 2.0 * self.snr**2 * (x - mean) + 2.0 * self.snr * noise

        def walk(index, x):
            keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(key, index)
            return jax.vmap(move)(keys, x, denoise(x, t).mean)

        return repeat(self.steps, walk, x)


@struct.dataclass
class UnderdampedLangevin:
    """A corrector: Langevin dynamics with momentum, by one of diffrax's solvers.

    See `solve.underdamped_langevin`. With `ALIGN` it costs steps + 1 network calls, and mends a
    marginal in fewer than `Langevin`.

    Attributes:
        process: a Gaussian process.
        step_size: of the dynamics, > 0; about 1 crosses the noise's own width.
        friction: > 0; 2 is critical for a Gaussian p_t.
        steps: their number, ≥ 1.
        solver: an underdamped Langevin solver of diffrax.

    References: Foster, Lyons and Oberhauser 2021, arXiv:2101.03446.
    """

    process: Gaussian
    step_size: Scalar = 0.5
    friction: Scalar = 2.0
    steps: int = struct.field(pytree_node=False, default=2)
    solver: diffrax.AbstractSolver = struct.field(pytree_node=False, default=diffrax.ALIGN())

    def __post_init__(self) -> None:
        struct.require(
            self.step_size > 0.0,
            f"step_size must be positive, got {self.step_size}.",
        )
        struct.require(self.friction > 0.0, f"friction must be positive, got {self.friction}.")
        struct.require(self.steps >= 1, f"steps must be at least 1, got {self.steps}.")

    def correct(self, key: Key, x: State, t: Time, denoise: Denoiser) -> State:
        """Moves x [b, …] closer to p_t, with one key an example [b]."""
        return underdamped_langevin(
            self.process,
            denoise,
            key,
            x,
            t,
            steps=self.steps,
            step_size=self.step_size,
            friction=self.friction,
            solver=self.solver,
        )


@struct.dataclass
class AnnealedLangevin:
    """Langevin dynamics at every level of the grid, each starting where the last one ended.

    The signal x/α is kept from t to s; its noise, too large for s, is then worn down by `steps`
    steps of `Langevin`. A step to σ(s) = 0 returns x̂_0. `steps` network calls a step, and one for
    that last denoising.

    Attributes:
        process: any Gaussian process; NCSN's is `exploding`, with a uniform grid.
        snr: step size, 4 snr² being the papers' ε/σ_L²: 0.2 in NCSN, 0.062 in NCSNv2.
        steps: Langevin steps at each level.

    References: Song and Ermon 2019, arXiv:1907.05600, algorithm 1; Song and Ermon 2020,
        arXiv:2006.09011, algorithm 1 (the last denoising) and table 2.
    """

    process: Gaussian
    snr: Scalar = 0.22
    steps: int = struct.field(pytree_node=False, default=100)

    def __post_init__(self) -> None:
        struct.require(self.snr > 0.0, f"snr must be positive, got {self.snr}.")
        struct.require(self.steps >= 1, f"steps must be at least 1, got {self.steps}.")

    def init(self, x: State) -> None:
        """Remembers nothing."""

    def update(
        self, key: Key, x: State, state: None, t: Time, s: Time, denoise: Denoiser
    ) -> tuple[State, None]:
        """Takes x [b, …] from t to s, with one key an example [b]."""
        (alpha_t, sigma_t), (alpha_s, sigma_s) = map(self.process.schedule, (t, s))
        # Where there is no signal to keep, its noise is the best start.
        ratio = jnp.where(alpha_t > 0.0, alpha_s / alpha_t, sigma_s / sigma_t)

        def anneal():
            walk = Langevin(self.process, self.snr, self.steps)
            return walk.correct(key, ratio * x, s, denoise)

        return jax.lax.cond(sigma_s > 0.0, anneal, lambda: denoise(x, t).mean), state
