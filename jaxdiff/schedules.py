"""Noise schedules: t ↦ (α, σ), the scale of the data and the noise's standard deviation.

A scalar Gaussian process is x_t = α(t) x_0 + σ(t) ε, and its schedule is the whole of it. With
t ∈ [0, 1] and data at 0,

    log-SNR(t) = log α² / σ²     falls from (nearly) +∞ to (nearly) −∞,

and drift, diffusion coefficient, posteriors and loss weights follow by differentiation. A schedule
is any callable t ↦ (α, σ) that `jax.jvp` can differentiate; those below are pytrees, so their
numbers can be swept or trained without compiling anew. A plain function serves too: wrap it as
`jax.tree_util.Partial(fn, numbers…)` to have the same of yours.

=============  =====================  ================================  ==================
factory        α(t)                   σ(t)                              α, σ at t = 1
=============  =====================  ================================  ==================
linear_beta    exp(−½∫β)              √(1 − α²)                         .0066, 1 (ᾱ = 4e-5)
cosine         cos-shaped             √(1 − α²)                         5.5e-4, 1
subvp          exp(−½∫β)              1 − α²                            .0066, 1
exploding      1                      σ_min (σ_max/σ_min)^t             1, σ_max
edm            1                      Karras ρ-warp σ_min … σ_max       1, σ_max
straight       1 − t                  t                                 0, 1
from_betas     ∏√(1 − β_i)            √(1 − α²)                         the table's
learned_gamma  √sigmoid(−γ)           √sigmoid(γ)                       .082, .997, trained
=============  =====================  ================================  ==================

At t = 1 the variance-exploding ones (exploding, edm) keep ᾱ = 1: their prior is N(0, σ_max²), and
σ_max must dwarf the data. `straight` has α(1) = 0: there a prediction of ε or of the score says
nothing of x_0, so use `x0`, `v` or `velocity` with it, or start below 1.
"""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optimistix
from jaxtyping import Array, Float

from jaxdiff import struct
from jaxdiff.distributions import root
from jaxdiff.typing import Scalar, Time

__all__ = [
    "Cosine",
    "EDMSchedule",
    "Exploding",
    "LearnedGamma",
    "LinearBeta",
    "Schedule",
    "Straight",
    "SubVP",
    "TabulatedBeta",
    "cosine",
    "cosine_betas",
    "edm",
    "exploding",
    "from_betas",
    "learned_gamma",
    "linear_beta",
    "log_snr",
    "straight",
    "subvp",
    "time_of_log_snr",
]

Schedule = Callable[[Time], tuple[Time, Time]]
"""t ↦ (alpha, sigma)."""


def log_snr(schedule: Schedule, t: Time) -> Time:
    """The log signal-to-noise ratio log α²/σ² at t; +∞ where σ = 0 and −∞ where α = 0.

    References: Kingma et al. 2021, arXiv:2107.00630, section 3.1 (γ = −log-SNR).
    """
    alpha, sigma = schedule(t)
    return 2.0 * (_log(alpha) - _log(sigma))


def _log(x: Time) -> Time:
    # −∞ at 0 for whatever parameters: no gradient from there.
    return jnp.where(x > 0.0, jnp.log(jnp.where(x > 0.0, x, 1.0)), -jnp.inf)


def time_of_log_snr(schedule: Schedule, value: Float[Array, ""]) -> Time:
    """The time in [0, 1] at which a schedule has the given log-SNR, by bisection.

    Args:
        schedule: any schedule whose log-SNR falls in t.
        value: the log-SNR wanted; outside the schedule's range the nearer end is returned.

    Returns:
        t, to a relative error of about 1e-6 (more where rounding flattens the log-SNR).
    """

    def excess(t, _):
        # Bisection reads only the sign; clipping keeps the infinite ends finite.
        return jnp.clip(value - log_snr(schedule, t), -1.0, 1.0)

    low, high = log_snr(schedule, jnp.ones_like(value)), log_snr(schedule, jnp.zeros_like(value))
    inside = (value > low) & (value < high)
    solution = optimistix.root_find(
        lambda t, _: jnp.where(inside, excess(t, None), t - 0.5),
        # It rises: said here, since else two more values are computed and checked on the host.
        optimistix.Bisection(rtol=1e-7, atol=1e-12, flip=False),
        0.5 * jnp.ones_like(value),
        options={"lower": jnp.zeros_like(value), "upper": jnp.ones_like(value)},
        max_steps=64,
        throw=False,
    )
    return jnp.where(inside, solution.value, jnp.where(value <= low, 1.0, 0.0))


def _variance_preserving(log_alpha: Time) -> tuple[Time, Time]:
    # expm1 keeps σ exact where α is close to 1.
    return jnp.exp(log_alpha), root(-jnp.expm1(2.0 * log_alpha))


@struct.dataclass
class LinearBeta:
    """α = exp(−½∫β) and σ = √(1 − α²) with β(t) = β_min + t (β_max − β_min)."""

    beta_min: Scalar
    beta_max: Scalar

    def log_alpha(self, t: Time) -> Time:
        """−½ ∫₀ᵗ β."""
        return -0.5 * t * (self.beta_min + 0.5 * t * (self.beta_max - self.beta_min))

    def __call__(self, t: Time) -> tuple[Time, Time]:
        """(α, σ) at t."""
        return _variance_preserving(self.log_alpha(t))


def linear_beta(beta_min: float = 0.1, beta_max: float = 20.0) -> LinearBeta:
    """The variance-preserving schedule with a linear rate: the limit of DDPM's 1e-4 … 0.02.

    β(t) = β_min + t (β_max − β_min), α = exp(−½∫β), σ² = 1 − α².

    Args:
        beta_min: rate at t = 0, > 0.
        beta_max: rate at t = 1, ≥ beta_min.

    Raises:
        ValueError: unless 0 < beta_min ≤ beta_max.

    References: Song et al. 2021, arXiv:2011.13456, eqs. 11 and 32–33.
    """
    _check_rates(beta_min, beta_max)
    return LinearBeta(beta_min=beta_min, beta_max=beta_max)


@struct.dataclass
class SubVP(LinearBeta):
    """α = exp(−½∫β) and σ = 1 − α², below the variance-preserving one at every time."""

    def __call__(self, t: Time) -> tuple[Time, Time]:
        """(α, σ) at t."""
        log_alpha = self.log_alpha(t)
        return jnp.exp(log_alpha), -jnp.expm1(2.0 * log_alpha)


def subvp(beta_min: float = 0.1, beta_max: float = 20.0) -> SubVP:
    """The sub-variance-preserving schedule, made for likelihoods.

    α = exp(−½∫β), σ = 1 − α².

    Args:
        beta_min: rate at t = 0, > 0.
        beta_max: rate at t = 1, ≥ beta_min.

    Raises:
        ValueError: unless 0 < beta_min ≤ beta_max.

    References: Song et al. 2021, arXiv:2011.13456, eqs. 29 and 34.
    """
    _check_rates(beta_min, beta_max)
    return SubVP(beta_min=beta_min, beta_max=beta_max)


@struct.dataclass
class Cosine:
    """α = cos(φ)/cos(φ₀) with the angle φ rising linearly in t; σ = √(1 − α²)."""

    start: Scalar
    stop: Scalar

    def __call__(self, t: Time) -> tuple[Time, Time]:
        """(α, σ) at t."""
        angle = self.start + t * (self.stop - self.start)
        # 1 − cos²φ/cos²φ₀ = sin(φ+φ₀) sin(φ−φ₀)/cos²φ₀: no cancellation at small t.
        sine = jnp.sin(angle + self.start) * jnp.sin(t * (self.stop - self.start))
        return jnp.cos(angle) / jnp.cos(self.start), root(sine) / jnp.cos(self.start)


def cosine(offset: float = 0.008, log_snr_min: float = -15.0) -> Cosine:
    """The variance-preserving cosine schedule, gentler at both ends.

    α(t) = cos(φ(t)) / cos(φ(0)) with φ(0) = ½π · offset/(1 + offset).

    Args:
        offset: keeps the noise from vanishing too fast at t = 0; in (0, 1).
        log_snr_min: log-SNR at t = 1, < 0. The paper reaches −∞ and clips β at 0.999; a finite end
            keeps α(1) > 0, so that every parameterization is defined there.

    Raises:
        ValueError: for an argument outside its range.

    References: Nichol and Dhariwal 2021, arXiv:2102.09672, eq. 17.
    """
    if not 0.0 < offset < 1.0:
        raise ValueError(f"offset must lie in (0, 1), got {offset}.")
    if not (log_snr_min < 0.0 and math.isfinite(log_snr_min)):
        raise ValueError(f"log_snr_min must be negative and finite, got {log_snr_min}.")
    start = 0.5 * math.pi * offset / (1.0 + offset)
    last_alpha = 1.0 / math.sqrt(1.0 + math.exp(-log_snr_min))
    return Cosine(start=start, stop=math.acos(last_alpha * math.cos(start)))


@struct.dataclass
class Exploding:
    """α = 1 and σ = σ_min (σ_max/σ_min)^t."""

    sigma_min: Scalar
    sigma_max: Scalar

    def __call__(self, t: Time) -> tuple[Time, Time]:
        """(α, σ) at t."""
        ratio = jnp.log(self.sigma_max / jnp.asarray(self.sigma_min, t.dtype))
        return jnp.ones_like(t), self.sigma_min * jnp.exp(t * ratio)


def exploding(sigma_min: float = 0.01, sigma_max: float = 50.0) -> Exploding:
    """The variance-exploding schedule: σ in geometric progression, as in NCSN.

    α = 1, σ(t) = σ_min (σ_max/σ_min)^t.

    Args:
        sigma_min: noise at t = 0, > 0: small against the data's finest detail.
        sigma_max: noise at t = 1, > sigma_min: large against the largest distance of two data.

    Raises:
        ValueError: unless 0 < sigma_min < sigma_max.

    References: Song et al. 2021, arXiv:2011.13456, eqs. 9 and 31.
    """
    _check_noises(sigma_min, sigma_max)
    return Exploding(sigma_min=sigma_min, sigma_max=sigma_max)


@struct.dataclass
class EDMSchedule:
    """α = 1 and σ = (σ_min^{1/ρ} + t (σ_max^{1/ρ} − σ_min^{1/ρ}))^ρ."""

    sigma_min: Scalar
    sigma_max: Scalar
    rho: Scalar

    def __call__(self, t: Time) -> tuple[Time, Time]:
        """(α, σ) at t."""
        low = jnp.asarray(self.sigma_min, t.dtype) ** (1.0 / self.rho)
        high = jnp.asarray(self.sigma_max, t.dtype) ** (1.0 / self.rho)
        return jnp.ones_like(t), (low + t * (high - low)) ** self.rho


def edm(sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> EDMSchedule:
    """The noise levels of EDM, parametrised so that a uniform grid in t is Karras's grid.

    α = 1, σ(t) = (σ_min^{1/ρ} + t (σ_max^{1/ρ} − σ_min^{1/ρ}))^ρ.

    Args:
        sigma_min: noise at t = 0, > 0.
        sigma_max: noise at t = 1, > sigma_min.
        rho: the warp, ≥ 1; larger spends more steps at small noise.

    Raises:
        ValueError: for an argument outside its range.

    Note: the paper writes its processes with σ = t; only the clock differs, which no marginal sees.

    References: Karras et al. 2022, arXiv:2206.00364, eq. 5.
    """
    _check_noises(sigma_min, sigma_max)
    if not 1.0 <= rho < math.inf:
        raise ValueError(f"rho must be at least 1, got {rho}.")
    return EDMSchedule(sigma_min=sigma_min, sigma_max=sigma_max, rho=rho)


@struct.dataclass
class Straight:
    """α = 1 − t and σ = t."""

    def __call__(self, t: Time) -> tuple[Time, Time]:
        """(α, σ) at t."""
        return 1.0 - t, t


def straight() -> Straight:
    """The straight path of flow matching and rectified flow: α = 1 − t, σ = t.

    References: Lipman et al. 2023, arXiv:2210.02747, eq. 20; Liu et al. 2023, arXiv:2209.03003.
    """
    return Straight()


@struct.dataclass
class TabulatedBeta:
    """α = exp of a table of log α at t = 0, 1/T, …, 1, joined by cubics; σ = √(1 − α²).

    Attributes:
        log_alphas: [T + 1] the table.
        slopes: [T + 1] d log α/dt at its times, so that the rate is continuous.
    """

    log_alphas: Scalar
    slopes: Scalar

    def __call__(self, t: Time) -> tuple[Time, Time]:
        """(α, σ) at t."""
        values, slopes = jnp.asarray(self.log_alphas), jnp.asarray(self.slopes)
        steps = values.shape[0] - 1
        i = jnp.clip(jnp.floor(t * steps), 0, steps - 1).astype(int)
        u = t * steps - i
        left, right, rise = slopes[i] / steps, slopes[i + 1] / steps, values[i + 1] - values[i]
        cubic = u * (rise + (1.0 - u) * ((left - rise) * (1.0 - u) - (right - rise) * u))
        return _variance_preserving((values[i] + cubic).astype(t.dtype))


def cosine_betas(steps: int = 1000) -> np.ndarray:
    """β_1, …, β_T of improved DDPM, for `from_betas`.

    β_i = min(1 − ᾱ(i/T)/ᾱ((i − 1)/T), 0.999),  ᾱ(u) = cos²((u + 0.008)/1.008 · π/2).

    Args:
        steps: T ≥ 2.

    Raises:
        ValueError: unless steps ≥ 2.

    References: Nichol and Dhariwal 2021, arXiv:2102.09672, eq. 17.
    """
    if steps < 2:
        raise ValueError(f"steps must be at least 2, got {steps}.")
    edges = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1 - edges[1:] / edges[:-1], 0.999)


def from_betas(betas: Sequence[float] | np.ndarray) -> TabulatedBeta:
    """The continuous schedule that passes through a discrete DDPM's ᾱ_i at t = i/T.

    α(i/T)² = ∏_{j ≤ i} (1 − β_j); cubic Hermite interpolation between, monotone, so that α falls
    and the rate has no jumps for an adaptive solver to stumble over.

    Args:
        betas: [T] the variances of the T ≥ 2 forward steps, each in (0, 1).

    Raises:
        ValueError: unless betas is a list of at least two numbers in (0, 1).

    References: Ho et al. 2020, arXiv:2006.11239, eq. 4.
    """
    table = np.asarray(betas, np.float64)
    if table.ndim != 1 or table.size < 2 or not np.all((table > 0.0) & (table < 1.0)):
        raise ValueError(f"betas must be a list of two or more numbers in (0, 1), got {betas}.")
    log_alphas = np.concatenate([[0.0], 0.5 * np.cumsum(np.log1p(-table))])
    secants = np.diff(log_alphas) * table.size
    # Harmonic means keep the cubics monotone, however rough the table (Fritsch and Butland 1984).
    inner = 2.0 * secants[:-1] * secants[1:] / (secants[:-1] + secants[1:])
    outer = secants[[0, -1]]
    ends = np.clip(1.5 * outer - 0.5 * inner[[0, -1]], 3.0 * outer, 0.0)
    slopes = np.concatenate([ends[:1], inner, ends[1:]])
    return TabulatedBeta(log_alphas=jnp.asarray(log_alphas), slopes=jnp.asarray(slopes))


@struct.dataclass
class LearnedGamma:
    """γ = −log-SNR as a monotone network of t, for training; make it with `learned_gamma`.

    With r_k = softplus(rate_k) and s_k = softplus(share_k)/h of h hidden units,

        γ(t) = γ_0 + softplus(gap) · n(t),      n(t) = u(t)/u(1),
        u(t) = t + Σ_k s_k [sigmoid(r_k (t − c_k)) − sigmoid(−r_k c_k)],

    so whatever values the leaves are given γ rises: n has a slope of at least 1/u(1).

    Attributes:
        gamma_0: γ(0).
        gap: what softplus makes γ(1) − γ(0) of.
        centres: [h] c, the times about which the hidden units bend γ.
        rates: [h] what softplus makes their steepness of.
        shares: [h] what softplus makes their part in u of.
    """

    gamma_0: Scalar
    gap: Scalar
    centres: Scalar
    rates: Scalar
    shares: Scalar

    def __call__(self, t: Time) -> tuple[Time, Time]:
        """(α, σ) at t: α² = sigmoid(−γ), σ² = sigmoid(γ)."""
        gamma = self.gamma(t)
        # Both exact where the other is close to 1.
        return jnp.exp(0.5 * jax.nn.log_sigmoid(-gamma)), jnp.exp(0.5 * jax.nn.log_sigmoid(gamma))

    def gamma(self, t: Time) -> Time:
        """−log-SNR at t."""
        progress = self._rise(t) / self._rise(jnp.ones_like(t))
        return self.gamma_0 + jax.nn.softplus(jnp.asarray(self.gap)) * progress

    def _rise(self, t: Time) -> Time:
        """u(t), which falls nowhere: each bracket is written as a product of rising factors."""
        rates, shares = jax.nn.softplus(self.rates), jax.nn.softplus(self.shares)
        upper, lower = rates * (t - self.centres), rates * self.centres
        bracket = jax.nn.sigmoid(upper) * jax.nn.sigmoid(lower) * -jnp.expm1(-rates * t)
        return t + jnp.sum(shares * bracket) / max(len(shares), 1)


def learned_gamma(
    gamma_min: float = -13.3, gamma_max: float = 5.0, *, hidden: int = 16
) -> LearnedGamma:
    """The variance-preserving schedule of variational diffusion models, all of it to be trained.

    α² = sigmoid(−γ(t)), σ² = sigmoid(γ(t)), with γ = −log-SNR a monotone network of t. It starts
    linear in t, to within a few per cent of its range. Its leaves are trained as
    `params["schedule"] = vars(learned_gamma(…))`, from which `LearnedGamma(**params["schedule"])`
    makes it again; see `objectives.vdm`.

    Args:
        gamma_min: γ(0) before training.
        gamma_max: γ(1) before training, > gamma_min.
        hidden: units of the hidden layer, ≥ 0. With none, γ is linear in t for good, and only its
            ends can be trained.

    Raises:
        ValueError: unless gamma_min < gamma_max, both finite, and hidden ≥ 0.

    Note: the paper's network has 1024 hidden units, and two free ends. Here few units, evenly
        spaced, do; and γ(1) is γ(0) plus a positive distance, so that the ends cannot cross.

    References: Kingma et al. 2021, arXiv:2107.00630, section 3.2 and appendix H.
    """
    if not -math.inf < gamma_min < gamma_max < math.inf:
        raise ValueError(
            f"gamma_min and gamma_max must satisfy -inf < gamma_min < gamma_max < inf, "
            f"got gamma_min={gamma_min}, gamma_max={gamma_max}."
        )
    if hidden < 0:
        raise ValueError(f"hidden must be at least 0, got {hidden}.")
    # Steps that overlap, and reach beyond both ends, add up to a straight line.
    centres = 2.0 * (jnp.arange(hidden) + 0.5) / max(hidden, 1) - 0.5
    return LearnedGamma(
        gamma_0=jnp.float32(gamma_min),
        gap=jnp.float32(_inverse_softplus(gamma_max - gamma_min)),
        centres=centres,
        rates=jnp.full(hidden, _inverse_softplus(float(max(hidden, 1)))),
        shares=jnp.full(hidden, _inverse_softplus(2.0)),
    )


def _inverse_softplus(x: float) -> float:
    return x + math.log(-math.expm1(-x))


def _check_rates(beta_min: float, beta_max: float) -> None:
    if not 0.0 < beta_min <= beta_max < math.inf:
        raise ValueError(
            f"beta_min and beta_max must satisfy 0 < beta_min <= beta_max < inf, "
            f"got beta_min={beta_min}, beta_max={beta_max}."
        )


def _check_noises(sigma_min: float, sigma_max: float) -> None:
    if not 0.0 < sigma_min < sigma_max < math.inf:
        raise ValueError(
            f"sigma_min and sigma_max must satisfy 0 < sigma_min < sigma_max < inf, "
            f"got sigma_min={sigma_min}, sigma_max={sigma_max}."
        )
