"""Times to train at: t ~ r(t), with 1/r(t) to undo the choice.

A time sampler draws the times of a batch, (key, process, n) ↦ (t, 1/r), so that the mean of
w(t)/r(t) estimates ∫ w(t) dt over [t_min, 1] whatever r. The choice of r changes only the variance
of the loss.

Where the weight is known the choice makes itself. The likelihood's weight of the noise's error is

    w = g²/σ² = −d log-SNR/dt

for every Gaussian process, since g² = 2σ² d log(σ/α)/dt. Where σ(0) = 0 it grows as 1/t towards
the data, while the error itself hardly changes: of uniform times, the few smallest carry the sum.
So `importance` draws r ∝ w, whose quantiles are known: the log-SNR is uniform between its ends, t
is where the schedule takes that value, and w/r is the same for all,

    w/r = ∫ w dt = log-SNR(t_min) − log-SNR(t_max).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdiff import struct
from jaxdiff.processes.base import SDE
from jaxdiff.processes.gaussian import Gaussian
from jaxdiff.schedules import time_of_log_snr
from jaxdiff.typing import Key, Scalar

__all__ = [
    "Importance",
    "LogNormal",
    "LogUniform",
    "LowDiscrepancy",
    "Steps",
    "TimeSampler",
    "Uniform",
    "even",
    "importance",
    "log_normal",
    "log_uniform",
    "low_discrepancy",
    "steps",
    "uniform",
]

Times = tuple[Float[Array, "n"], Float[Array, "n"]]

TimeSampler = Callable[[Key, Any, int], Times]
"""(key, process, n) ↦ (t [n], 1/r(t) [n])."""


@struct.dataclass
class Uniform:
    """t ~ U[t_min, 1]."""

    t_min: Scalar

    def __call__(self, key: Key, process: SDE, n: int) -> Times:
        """(t, 1/r) of a batch."""
        return _spread(self.t_min, jax.random.uniform(key, (n,)))


def uniform(t_min: float = 1e-5) -> Uniform:
    """t ~ U[t_min, 1], independently.

    Args:
        t_min: the smallest time, in (0, 1); below it the score of clean data grows without bound.

    Raises:
        ValueError: unless 0 < t_min < 1.
    """
    _check(t_min)
    return Uniform(t_min=t_min)


@struct.dataclass
class Steps:
    """t ~ U{1/T, 2/T, …, 1}."""

    total: Scalar

    def __call__(self, key: Key, process: SDE, n: int) -> Times:
        """(t, 1) of a batch."""
        return (1.0 + jax.random.randint(key, (n,), 0, self.total)) / self.total, jnp.ones(n)


def steps(total: int = 1000) -> Steps:
    """t ~ U{1/T, 2/T, …, 1}: the steps of a chain, such as `schedules.from_betas`.

    Args:
        total: T ≥ 1.

    Raises:
        ValueError: unless total ≥ 1.

    References: Ho et al. 2020, arXiv:2006.11239, algorithm 1.
    """
    if total < 1:
        raise ValueError(f"total must be at least 1, got {total}.")
    return Steps(total=total)


@struct.dataclass
class LowDiscrepancy:
    """t_i = (u + i/n) mod 1, on [t_min, 1]."""

    t_min: Scalar

    def __call__(self, key: Key, process: SDE, n: int) -> Times:
        """(t, 1/r) of a batch."""
        return _spread(self.t_min, even(key, n))


def low_discrepancy(t_min: float = 1e-5) -> LowDiscrepancy:
    """t_i = (u + i/n) mod 1, one u a batch: each t uniform, the batch evenly spread.

    Args:
        t_min: the smallest time, in (0, 1).

    Raises:
        ValueError: unless 0 < t_min < 1.

    References: Kingma et al. 2021, arXiv:2107.00630, appendix I.1.
    """
    _check(t_min)
    return LowDiscrepancy(t_min=t_min)


@struct.dataclass
class Importance:
    """t with log-SNR(t) uniform over [log-SNR(t_max), log-SNR(t_min)]."""

    t_min: Scalar
    t_max: Scalar

    def __call__(self, key: Key, process: Gaussian, n: int) -> Times:
        """(t, 1/r) of a batch."""
        with jax.ensure_compile_time_eval():  # so that a training step checks as it compiles
            low, high = jax.vmap(process.log_snr)(jnp.array([self.t_max, self.t_min]))
            struct.require(
                jnp.isfinite(high - low),
                f"t_min and t_max must be times of finite log-SNR, got t_min={self.t_min}, "
                f"t_max={self.t_max} with log-SNR {high}, {low}: take t_max < 1 where "
                f"alpha(1) = 0.",
            )
        log_snr = low + (high - low) * even(key, n)
        t = jax.vmap(lambda value: time_of_log_snr(process.schedule, value))(log_snr)
        t = jnp.clip(t, self.t_min, self.t_max)

        def rate(t):
            _, sigma = process.schedule(t)
            return (process.diffusion(t) / sigma) ** 2

        return t, (high - low) / jax.vmap(rate)(t)


def importance(t_min: float = 1e-5, t_max: float = 1.0) -> Importance:
    """t ~ r ∝ g²/σ² on [t_min, t_max], evenly spread over a batch: for `weightings.likelihood`.

    The log-SNR is uniform. w/r is then constant, and the loss as quiet as its errors.

    Args:
        t_min: the smallest time, in (0, 1).
        t_max: the largest, in (t_min, 1]; below 1 where α(1) = 0, as with `schedules.straight`,
            whose log-SNR has no end.

    Raises:
        ValueError: unless 0 < t_min < t_max ≤ 1; and, when times are drawn for a schedule of known
            numbers, unless the log-SNR is finite at both.

    References: Song et al. 2021, arXiv:2101.09258 (importance sampling for this weight); Kingma et
        al. 2021, arXiv:2107.00630, section 5.1 (the integral depends on the log-SNR's ends alone).
    """
    if not 0.0 < t_min < t_max <= 1.0:
        raise ValueError(
            f"t_min and t_max must satisfy 0 < t_min < t_max <= 1, got t_min={t_min}, "
            f"t_max={t_max}."
        )
    return Importance(t_min=t_min, t_max=t_max)


@struct.dataclass
class LogUniform:
    """log t ~ U[log t_min, 0]."""

    t_min: Scalar

    def __call__(self, key: Key, process: SDE, n: int) -> Times:
        """(t, 1) of a batch."""
        return jnp.asarray(self.t_min) ** (1.0 - even(key, n)), jnp.ones(n)


def log_uniform(t_min: float = 1e-3) -> LogUniform:
    """log t ~ U[log t_min, 0], evenly spread over a batch.

    For processes whose noise reaches the data late, such as `CLD`: all their detail lies in early
    times.

    Args:
        t_min: the smallest time, in (0, 1).

    Raises:
        ValueError: unless 0 < t_min < 1.

    Note: as with `log_normal`, the density is part of the objective: the factor that comes with
        its times is 1.
    """
    _check(t_min)
    return LogUniform(t_min=t_min)


@struct.dataclass
class LogNormal:
    """log σ̃ ~ N(mean, std²)."""

    mean: Scalar
    std: Scalar
    t_min: Scalar

    def __call__(self, key: Key, process: Gaussian, n: int) -> Times:
        """(t, 1) of a batch."""
        log_snr = -2.0 * (self.mean + self.std * jax.random.normal(key, (n,)))
        t = jax.vmap(lambda value: time_of_log_snr(process.schedule, value))(log_snr)
        return jnp.clip(t, self.t_min, 1.0), jnp.ones(n)


def log_normal(mean: float = -1.2, std: float = 1.2, t_min: float = 1e-5) -> LogNormal:
    """log σ̃ ~ N(mean, std²) with σ̃ = σ/α: EDM's training distribution of noise levels.

    Args:
        mean: of log σ̃.
        std: of log σ̃, > 0.
        t_min: times below it are moved up to it, in (0, 1).

    Raises:
        ValueError: unless std > 0 and 0 < t_min < 1.

    Note: in EDM the log-normal is part of the objective and not an importance sampler of another
        one, so the factor that comes with its times is 1.

    References: Karras et al. 2022, arXiv:2206.00364, table 1 (P_mean, P_std).
    """
    _check(t_min)
    if not std > 0.0:
        raise ValueError(f"std must be positive, got {std}.")
    return LogNormal(mean=mean, std=std, t_min=t_min)


def even(key: Key, n: int) -> Float[Array, "n"]:
    """Numbers in [0, 1), each uniform, evenly spread: (u + i/n) mod 1."""
    return (jax.random.uniform(key) + jnp.arange(n) / n) % 1.0


def _spread(t_min: Scalar, unit: Float[Array, "n"]) -> Times:
    return t_min + (1.0 - t_min) * unit, jnp.full_like(unit, 1.0 - t_min)


def _check(t_min: float) -> None:
    if not 0.0 < t_min < 1.0:
        raise ValueError(f"t_min must lie in (0, 1), got {t_min}.")
