"""The variational bound on log p(x_0) of a chain with finitely many steps.

A grid t_0 > … > t_n makes a latent-variable model: x_{t_0} ~ p(x_1), then x_s from the posterior
q(x_s | x_t, x̂_0) of the process, with the moments of the denoiser for x̂_0, and at last x_0 itself.
With the forward process as its encoder,

    −log p(x_0)  ≤  L_T + Σ_i L_i + L_0
    L_T = KL(q(x_{t_0} | x_0) ‖ p(x_1))                                               prior
    L_i = E KL(q(x_s | x_t, x_0) ‖ q(x_s | x_t, x̂_0))      all pairs but the last     diffusion
    L_0 = −E log p(x_0 | x_{t_{n−1}})                      the last pair              reconstruction

of which nothing but the posterior's Kullback–Leibler divergence is asked: DDPM, VDM and D3PM have
one and the same bound. A process whose states are more than the data, such as one with a velocity,
needs a decoder of its own.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdiff import grids, struct
from jaxdiff.compile import jit
from jaxdiff.distributions import Distribution, Normal
from jaxdiff.processes.base import Denoised, Denoiser, Process, example_keys
from jaxdiff.samplers.base import run
from jaxdiff.typing import Data, Grid, Key, Scalar, Time

__all__ = [
    "ELBO",
    "Decoder",
    "DiscreteDecoder",
    "Divergence",
    "discrete_decoder",
    "elbo",
    "log_density",
]

Decoder = Callable[[Data, Distribution], Float[Array, ""]]
"""(x_0, the last step's distribution) ↦ log p(x_0 | x_t) in nats, of one example."""

# For ±∞, whose product with a vanishing derivative would be NaN.
_FAR = 1e6


class ELBO(NamedTuple):
    """The bound of each example and what it is made of, in nats.

    Attributes:
        value: [b] ≤ log p(x_0): minus the sum of the others.
        prior: [b] L_T, what the end of the chain still tells of x_0.
        diffusion: [b] Σ L_i, what the steps lose.
        reconstruction: [b] L_0, what x_0 costs once the last state is known.
    """

    value: Float[Array, "b"]
    prior: Float[Array, "b"]
    diffusion: Float[Array, "b"]
    reconstruction: Float[Array, "b"]


def log_density(x0: Data, last: Distribution) -> Float[Array, ""]:
    """log p(x_0 | x_t) as the last step's distribution has it: the default decoder.

    Right wherever that is a distribution over the data: a categorical one at s = 0, or a Gaussian
    of positive variance.

    Raises:
        ValueError: where that is a distribution over something else, such as data and velocities.
    """
    event = jax.eval_shape(last.sample, jax.random.key(0)).shape
    if event != x0.shape:
        raise ValueError(
            f"decoder must be given for a process with states {event} and data {x0.shape}: the "
            f"last step's distribution is not one over the data."
        )
    return last.log_prob(x0)


@struct.dataclass
class DiscreteDecoder:
    """The Gaussian's mass in the cell of each level; see `discrete_decoder`."""

    levels: Scalar
    floor: Scalar

    def __call__(self, x0: Data, last: Normal) -> Float[Array, ""]:
        """Σ log P(cell of x_0) over the coordinates."""
        # A point would cost infinitely much; a needle costs a lot, with a gradient.
        std = jnp.maximum(last.std, jnp.maximum(self.floor, 1e-6))
        half = 1.0 / self.levels
        # Seen from the mean outwards, where the tails are thin: no difference of two ones is left.
        offset = jnp.abs(x0 - last.mean)
        outwards = jnp.where(x0 >= last.mean, x0, -x0)
        upper = jnp.where(outwards > 1.0 - 2.0 * half, _FAR, offset + half)
        lower = jnp.where(outwards < -1.0 + 2.0 * half, -_FAR, offset - half)
        log_tail = jax.scipy.stats.norm.logsf(lower / std)
        fraction = jax.scipy.stats.norm.logsf(upper / std) - log_tail
        return jnp.sum(log_tail + jnp.log(-jnp.expm1(fraction)))


def discrete_decoder(levels: int, *, floor: float = 0.0) -> DiscreteDecoder:
    """A decoder for data of discrete levels: the Gaussian's mass in each level's cell.

    Level k of L lies at (2k + 1)/L − 1 and owns the cell of width 2/L around it; the outermost
    cells reach to ±∞. The bound is then one on the log-probability of the discrete data.

    Args:
        levels: L ≥ 2, of data as `jaxdiff.data.images.to_model` lays them into [−1, 1].
        floor: the least standard deviation, ≥ 0. DDPM's lower variance β̃ is 0 at the first step;
            it is used with √β̃ of the second.

    Raises:
        ValueError: unless levels ≥ 2 and floor ≥ 0.

    Note: the papers put the outermost levels on ±1, with cells of width 2/(L − 1).

    References: Ho et al. 2020, arXiv:2006.11239, eq. 13.
    """
    if levels < 2:
        raise ValueError(f"levels must be at least 2, got {levels}.")
    if not floor >= 0.0:
        raise ValueError(f"floor must be at least 0, got {floor}.")
    return DiscreteDecoder(levels=levels, floor=floor)


@struct.dataclass
class Divergence:
    """A `Step` that stays at the data and adds up what each pair of times costs them.

    Attributes:
        process: any process.
        decoder: log p(x_0 | the last step's distribution).
        end: the last time of the grid.
    """

    process: Process
    decoder: Decoder
    end: Scalar

    def init(self, x: Data) -> tuple[Array, Array]:
        """No nats yet: (diffusion [b], reconstruction [b])."""
        return jnp.zeros(x.shape[0], x.dtype), jnp.zeros(x.shape[0], x.dtype)

    def update(
        self, key: Key, x: Data, state: tuple[Array, Array], t: Time, s: Time, denoise: Denoiser
    ) -> tuple[Data, tuple[Array, Array]]:
        """Adds the divergence of the step t → s for the data x [b, …], at one draw of x_t each."""
        noisy = jax.vmap(lambda key, x0: self.process.marginal(x0, t).sample(key))(key, x)
        guess = denoise(noisy, t)

        def divergence(x, x0, guess):
            exact = self.process.posterior(x, Denoised(x0), t, s)
            return exact.kl(self.process.posterior(x, guess, t, s))

        def surprise(x, x0, guess):
            return -self.decoder(x0, self.process.posterior(x, guess, t, s))

        axes = (0, 0, guess.axes)
        nothing = jnp.zeros_like(state[0])
        costs = jax.lax.cond(
            s > self.end,
            lambda: (jax.vmap(divergence, axes)(noisy, x, guess), nothing),
            lambda: (nothing, jax.vmap(surprise, axes)(noisy, x, guess)),
        )
        return x, jax.tree.map(jnp.add, state, costs)


def elbo(
    process: Process,
    denoise: Denoiser,
    key: Key,
    x0: Float[Array, "b ..."],
    grid: Grid,
    *,
    decoder: Decoder = log_density,
) -> ELBO:
    """The variational bound on the log-likelihood of data, all steps summed.

    Every term is estimated at one draw of x_t an example, so the bound is unbiased; its standard
    error is that of the mean over examples (and over keys). One network call a step.

    Args:
        process: any process.
        denoise: (x [b, …], t) ↦ moments of x_0. Its variance is part of the model: the reverse
            variance of the chain follows from it.
        key: one key, or one an example [b].
        x0: [b, …] data.
        grid: [n + 1] decreasing times, from the prior's. The last pair is the reconstruction.
        decoder: log p(x_0 | the last step's distribution of x_s); any that is normalised over x_0
            gives a bound. By default that distribution's own log-density at x_0, which needs a
            positive variance: at σ(s) = 0 a denoiser that states one, or else a grid that ends a
            little above 0. Where σ(s) > 0 it takes x_0 for x_s, and the bound is a loose one.
            `discrete_decoder` is for levels.

    Returns:
        The bound and its parts, in nats, [b].

    Raises:
        ValueError: if the grid does not fall strictly within [0, 1].

    References: Sohl-Dickstein et al. 2015, arXiv:1503.03585, eq. 14; Ho et al. 2020,
        arXiv:2006.11239, eq. 5.
    """
    keys = example_keys(key, x0.shape[0])
    grid = jnp.asarray(grid)
    grids.check(grid)
    _, (diffusion, reconstruction) = run(
        Divergence(process, struct.as_pytree(decoder), grid[-1]), denoise, grid, keys, x0
    )
    prior = _prior(process, x0, grid[0])
    return ELBO(-(prior + diffusion + reconstruction), prior, diffusion, reconstruction)


@jit
def _prior(process, x0, t):
    def divergence(x0):
        marginal = process.marginal(x0, t)
        state = jax.eval_shape(marginal.sample, jax.random.key(0))
        return marginal.kl(process.prior(state.shape))

    return jax.vmap(divergence)(x0)
