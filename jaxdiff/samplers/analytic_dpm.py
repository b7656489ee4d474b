"""Analytic-DPM: the best reverse variance, estimated once after training.

Among all reverse kernels N(mean, σ² I) the one that maximises the variational bound has the
variance that the law of total variance gives,

    σ*² = β̃ + c² · E tr Var[x_0 | x_t]/d,     E tr Var[x_0 | x_t]/d = (σ²/α²)(1 − Γ),
    Γ(t) = E‖ε̂(x_t, t)‖²/d,

with c the weight of x_0 in the posterior's mean. So it lies in one function of time, which a few
data give, and which every stride and every sampler that uses `Denoised.var` shares.

If ε̂ is exact, 1 − Γ = E‖ε̂ − ε‖²/d, since a conditional mean is orthogonal to its own error. We
estimate that right-hand side: it is what the bound asks for when ε̂ is *not* exact, and it does not
lose its digits to the difference at large t, where Γ is close to 1.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdiff import struct
from jaxdiff.processes.base import Denoised, Denoiser, example_keys
from jaxdiff.processes.gaussian import Gaussian
from jaxdiff.samplers.ancestral import UnitVariance
from jaxdiff.samplers.base import sample
from jaxdiff.typing import Grid, Key, Scalar, State, Time

__all__ = ["AnalyticVariance", "Residual", "analytic_variance"]


@struct.dataclass
class AnalyticVariance:
    """A denoiser with the mean variance of x_0 given x_t; make it with `analytic_variance`.

    It is kept as a ratio to the variance σ²/(α² + σ²) of N(0, I) data. That ratio is about constant
    at both ends of time, and interpolated in between over the log-SNR.

    Attributes:
        process: whose α and σ are meant.
        denoise: the denoiser that gives the mean.
        log_snr: [n] increasing log-SNRs of the estimates.
        ratio: [n] the estimates there.
    """

    process: Gaussian
    denoise: Denoiser
    log_snr: Scalar
    ratio: Scalar

    def __call__(self, x: State, t: Time) -> Denoised:
        """The moments of x_0 given x [b, …] at t."""
        mean, unit = UnitVariance(self.process, self.denoise)(x, t)
        ratio = jnp.interp(_level(self.process, t), self.log_snr, self.ratio)
        return Denoised(mean, unit * ratio)


@struct.dataclass
class Residual:
    """A `Step` from data to the squared errors of a denoiser at t, one an example.

    Attributes:
        process: the forward process.
        x0: [b, …] data.
    """

    process: Gaussian
    x0: Scalar

    def init(self, x: Float[Array, "b"]) -> None:
        """Remembers nothing."""

    def update(
        self,
        key: Key,
        x: Float[Array, "b"],
        state: None,
        t: Time,
        s: Time,
        denoise: Denoiser,
    ) -> tuple[Float[Array, "b"], None]:
        """The mean squared error over the coordinates of each x̂_0, at one draw of x_t [b, …]."""
        noisy = jax.vmap(lambda key, x0: self.process.marginal(x0, t).sample(key))(key, self.x0)
        squares = (denoise(noisy, t).mean - self.x0) ** 2
        return jnp.mean(squares.reshape(squares.shape[0], -1), axis=1), state


def analytic_variance(
    process: Gaussian,
    denoise: Denoiser,
    key: Key,
    x0: Float[Array, "n ..."],
    grid: Grid,
    *,
    batch_size: int = 256,
) -> AnalyticVariance:
    """Estimates the mean variance of x_0 given x_t, and adds it to a denoiser.

    Costs one network call a time and batch, once. Use the result with `Ancestral`, or in `elbo`.

    Args:
        process: the forward process.
        denoise: the trained denoiser.
        key: one key, or one an example [n].
        x0: [n, …] data, a few hundred or more.
        grid: decreasing times; the estimates are made at all but the last. Steps may be taken on
            any other grid; an estimate even in log-SNR serves all of them best.
        batch_size: number of examples that are given to the network at once.

    Returns:
        A denoiser of the same mean. Its variance is bounded as in the paper: by σ²/α², and by
        ((b − a)/2)² for data within [a, b].

    Raises:
        ValueError: if the grid does not fall strictly within [0, 1], or batch_size < 1.

    Note: the paper estimates 1 − E‖ε̂‖²/d. See above for why it is E‖ε̂ − ε‖²/d here; the optimum
        for inexact means is from the sequel.

    References: Bao et al. 2022, arXiv:2201.06503, theorems 1 (the optimum) and 2 (the bounds);
        Bao et al. 2022, arXiv:2206.07309 (inexact means).
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
    count = x0.shape[0]
    keys = example_keys(key, count)
    errors = []
    for start in range(0, count, batch_size):
        part = slice(start, start + batch_size)
        step, zeros = Residual(process, x0[part]), jnp.zeros(x0[part].shape[0])
        errors.append(sample(step, denoise, grid, keys[part], zeros, trajectory=True))
    variance = jnp.mean(jnp.concatenate(errors, axis=1)[1:], axis=1)

    half_range = 0.5 * (jnp.max(x0) - jnp.min(x0))
    times = jnp.asarray(grid)[:-1]
    alpha, sigma = jax.vmap(process.schedule)(times)
    variance = jnp.minimum(variance, jnp.minimum((sigma / alpha) ** 2, half_range**2))
    ratio = variance * (1.0 + (alpha / sigma) ** 2)
    return AnalyticVariance(process, denoise, jax.vmap(lambda t: _level(process, t))(times), ratio)


def _level(process: Gaussian, t: Time) -> Time:
    return jnp.clip(process.log_snr(t), -20.0, 20.0)
