"""Loss weights over time.

The denoising loss is the squared error of the noise, ‖ε̂ − ε‖², times a weight w(t). Seen as an
error of the score it is σ²‖ŝ − s‖², and as an error of the data SNR·‖x̂_0 − x_0‖²: every weighting
in use is a w(t) on one of the three, stated here on the first. Whatever w > 0, the minimiser is the
true score; the weight decides where a finite network spends its errors.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from jaxdiff import struct
from jaxdiff.processes.base import SDE
from jaxdiff.processes.gaussian import Gaussian
from jaxdiff.typing import Scalar, Time

__all__ = [
    "P2",
    "EDMWeighting",
    "MinSNR",
    "Weighting",
    "edm",
    "likelihood",
    "min_snr",
    "p2",
    "simple",
]

Weighting = Callable[[Any, Time], Time]
"""(process, t) ↦ w(t) ≥ 0, the weight of ‖ε̂ − ε‖²."""


def simple(process: SDE, t: Time) -> Time:
    """w = 1: L_simple, the perceptual choice λ = σ² on the score.

    References: Ho et al. 2020, arXiv:2006.11239, eq. 14.
    """
    return jnp.ones_like(t)


def likelihood(process: Gaussian, t: Time) -> Time:
    """w = g²/σ²: λ = g² on the score, for which the loss bounds −log p(x_0).

    The bound is ½ D loss + a constant of the process: the loss is a mean over D coordinates.

    Raises:
        ValueError: if the process has no schedule, as `CLD`.

    References: Song et al. 2021, arXiv:2101.09258, eq. 7 and theorem 1.
    """
    if not hasattr(process, "schedule"):
        raise ValueError(f"the likelihood's weight needs a process with a schedule, got {process}.")
    _, sigma = process.schedule(t)
    return (process.diffusion(t) / sigma) ** 2


@struct.dataclass
class EDMWeighting:
    """w = 1 + (σ̃/σ_d)²."""

    sigma_data: Scalar

    def __call__(self, process: Gaussian, t: Time) -> Time:
        """The weight at t."""
        return 1.0 + jnp.exp(-process.log_snr(t)) / self.sigma_data**2


def edm(sigma_data: float = 0.5) -> EDMWeighting:
    """w = (σ̃² + σ_d²)/σ_d² with σ̃ = σ/α: unit effective weight of EDM's network at every level.

    On x_0 it is the paper's λ = (σ̃² + σ_d²)/(σ̃ σ_d)². Use it with the log-normal time sampler.

    Args:
        sigma_data: standard deviation of the data, > 0.

    Raises:
        ValueError: unless sigma_data > 0.

    References: Karras et al. 2022, arXiv:2206.00364, table 1.
    """
    if not sigma_data > 0.0:
        raise ValueError(f"sigma_data must be positive, got {sigma_data}.")
    return EDMWeighting(sigma_data=sigma_data)


@struct.dataclass
class P2:
    """w = (k + SNR)^−γ."""

    gamma: Scalar
    k: Scalar

    def __call__(self, process: Gaussian, t: Time) -> Time:
        """The weight at t."""
        return (self.k + jnp.exp(process.log_snr(t))) ** -self.gamma


def p2(gamma: float = 1.0, k: float = 1.0) -> P2:
    """w = (k + SNR)^−γ: less weight on the nearly clean images; γ = 0 is `simple`.

    Args:
        gamma: strength, ≥ 0.
        k: where the damping sets in, > 0.

    Raises:
        ValueError: unless gamma ≥ 0 and k > 0.

    References: Choi et al. 2022, arXiv:2204.00227, eq. 8.
    """
    if not (gamma >= 0.0 and k > 0.0):
        raise ValueError(f"p2 needs gamma >= 0 and k > 0, got gamma={gamma}, k={k}.")
    return P2(gamma=gamma, k=k)


@struct.dataclass
class MinSNR:
    """w = min(SNR, γ)/SNR."""

    gamma: Scalar

    def __call__(self, process: Gaussian, t: Time) -> Time:
        """The weight at t."""
        return jnp.minimum(1.0, self.gamma * jnp.exp(-process.log_snr(t)))


def min_snr(gamma: float = 5.0) -> MinSNR:
    """w = min(SNR, γ)/SNR: on x_0, the SNR clipped from above at γ.

    Args:
        gamma: the clip, > 0.

    Raises:
        ValueError: unless gamma > 0.

    References: Hang et al. 2023, arXiv:2303.09556, eq. 8 and section 3.4.
    """
    if not gamma > 0.0:
        raise ValueError(f"gamma must be positive, got {gamma}.")
    return MinSNR(gamma=gamma)
