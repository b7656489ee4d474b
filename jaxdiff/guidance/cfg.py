"""Classifier-free guidance: extrapolate from the unconditional to the conditional denoiser."""

from jaxdiff import struct
from jaxdiff.processes.base import Denoised, Denoiser
from jaxdiff.typing import Scalar, State, Time

__all__ = ["CFG"]


@struct.dataclass
class CFG:
    """x̂_0 = (1 + w) x̂_0(x, c) − w x̂_0(x, ∅). Two network calls where a denoiser makes one.

    Score, noise and x_0 are affine in one another, so this is the same extrapolation as on any of
    them: score = (1 + w) ∇log p(x | c) − w ∇log p(x), the score of p(x) p(c | x)^{1+w}.

    Attributes:
        denoise: the conditional denoiser; its variance is kept.
        null: the unconditional one.
        weight: w; 0 is conditional, −1 unconditional, larger trades diversity for precision.

    Note: Imagen and diffusers count the weight from 1 (theirs = 1 + ours).

    References: Ho and Salimans 2022, arXiv:2207.12598, eq. 6.
    """

    denoise: Denoiser
    null: Denoiser
    weight: Scalar = 0.0

    def __call__(self, x: State, t: Time) -> Denoised:
        """The guided moments of x_0 given x [b, …] at t."""
        conditional = self.denoise(x, t)
        unconditional = self.null(x, t)
        mean = conditional.mean + self.weight * (conditional.mean - unconditional.mean)
        return Denoised(mean, conditional.var)
