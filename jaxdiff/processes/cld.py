"""Critically damped Langevin diffusion: noise enters the velocity, and only so the data.

The data x are given a velocity v, and the pair z = (x, v) follows

    dx = β v/M dt,    dv = −β x dt − Γβ v/M dt + √(2Γβ) dw,    Γ² = 4M,

a harmonic oscillator in a heat bath. It forgets its start in N(0, I) × N(0, M I), and at critical
damping, Γ² = 4M, it does so fastest without overshooting. Only the score of the velocity is needed
to turn it around, and that is the score of v *given* x, which is smooth however rough p(x_0) is.

On the clock τ = β t/√M and with u = v/√M the motion has no constants left:

    dx = u dτ,  du = −(x + 2u) dτ + 2 dw,     e^{Fτ} = e^{−τ} [[1 + τ, τ], [−τ, 1 − τ]],

    Q(τ) = I − e^{Fτ} e^{Fτᵀ} = [[P(3, 2τ), 2τ² e^{−2τ}], [·, 1 − e^{−2τ} (1 − 2τ + 2τ²)]]

with P(3, y) = 1 − e^{−y} (1 + y + y²/2), the regularised incomplete gamma function. All the
conditionals follow: q(z_t | z_s) has mean e^{F(τ_t − τ_s)} z_s and covariance Q(τ_t − τ_s), and
q(z_t | x_0), with v_0 ~ N(0, γM) integrated out (hybrid score matching), has γ times the square of
the second column of e^{Fτ} added to it. A time-dependent β would only be another clock, which the
choice of grid and of training times already is.

Covariances are kept as lower Cholesky factors and never subtracted from one another, so that they
hold in float32 down to t ≈ 1e-5. A score asks for more: x̂_0 tells of v by way of x − x̂_0 ≈ τ u, to
|x|·1e-7/τ. That is 1e-4 of the noise at t = 1e-3, and a tenth of it at 1e-5: solvers that live on
the score had better stop at 1e-3. Steps to t = 0 return x̂_0, and are not concerned.

References: Dockhorn et al. 2022, arXiv:2112.07068, section 3.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdiff import struct
from jaxdiff.distributions import BlockNormal, Normal, root
from jaxdiff.processes.base import Denoised, along
from jaxdiff.typing import Data, Key, Scalar, State, Time

__all__ = ["CLD", "MixedScore", "VelocityNoise", "cld", "mixed_score", "velocity_noise"]

Matrix = Float[Array, "2 2"]


@struct.dataclass
class CLD:
    """Critically damped Langevin diffusion; make it with `cld`.

    Attributes:
        beta: β, the rate of the clock.
        mass: M; Γ = 2√M.
        gamma: γ, the variance of v_0 over M.
    """

    beta: Scalar
    mass: Scalar
    gamma: Scalar

    def prior(self, shape: tuple[int, ...]) -> BlockNormal:
        """p(z_1) = N(0, I) × N(0, M I).

        Args:
            shape: of one state, (2, *data).

        Raises:
            ValueError: unless the shape begins with 2.
        """
        if not shape or shape[0] != 2:
            raise ValueError(f"shape must be that of a state (2, ...) of x and v, got {shape}.")
        return BlockNormal(jnp.zeros(shape), self._units() * jnp.eye(2))

    def marginal(self, x0: Data, t: Time) -> BlockNormal:
        """q(z_t | x_0), with v_0 ~ N(0, γM) integrated out."""
        of_x0, factor = self._marginal(t)
        return BlockNormal(_outer(of_x0, x0), factor)

    def transition(self, x: State, s: Time, t: Time) -> BlockNormal:
        """q(z_t | z_s) for s ≤ t; from s = 0 it is the conditional of plain score matching."""
        return BlockNormal(_dot(self._flow(t - s), x), self._fresh(t - s))

    def posterior(self, x: State, x0: Denoised, t: Time, s: Time) -> BlockNormal:
        """q(z_s | z_t, x_0) for s < t; an uncertain x_0 widens it by the law of total variance.

        Both z_s and z_t are Gaussian given x_0, so it is Kalman's update of q(z_s | x_0) with gain
        K = Σ_s Aᵀ Σ_t⁻¹, A = e^{F(τ_t − τ_s)}. Its covariance is taken in Joseph's form

            (I − KA) Σ_s (I − KA)ᵀ + K Q Kᵀ + H Var[x_0] Hᵀ,    H = (I − KA) m_s,

        a sum of squares, whose factors are put side by side and made triangular: it stays positive
        in float32. At s = 0 it is x_0 itself, with the velocity that led to z_t.

        Args:
            x: z_t.
            x0: mean and variance of x_0 given z_t.
            t: the time of z_t, > 0.
            s: the earlier time.
        """
        (of_x0, of_x0_later), (spread, later) = jax.vmap(self._marginal)(jnp.stack([s, t]))
        flow, inverse = self._flow(t - s), _inverse(later)
        # Σ_s Aᵀ Σ_t⁻¹ (x − mean) = Σ_s Aᵀ L_t⁻ᵀ ε: the noise needs no second inverse.
        back = _dot(spread, _dot(inverse, _dot(flow, spread)).T)
        gain = _dot(back, inverse)
        kept = jnp.eye(2) - _dot(gain, flow)
        mean = _outer(of_x0, x0.mean) + _dot(back, _dot(inverse, x - _outer(of_x0_later, x0.mean)))
        known = jnp.concatenate([_dot(kept, spread), _dot(gain, self._fresh(t - s))], axis=1)
        std = root(jnp.asarray(x0.var))
        unknown = _outer(_dot(kept, of_x0)[:, None], std)
        rows = jnp.concatenate([_outer(known, jnp.ones_like(std)), unknown], axis=1)
        return BlockNormal(mean, _triangular(rows))

    def drift(self, x: State, t: Time) -> State:
        """f(z, t) = β (v/M, −x − Γ v/M)."""
        position, velocity = x
        pull = -position - 2.0 * velocity / jnp.sqrt(self.mass)
        return self.beta * jnp.stack([velocity / self.mass, pull])

    def diffusion(self, t: Time) -> Float[Array, "2"]:
        """g(t) = (0, √(2Γβ))."""
        friction = 2.0 * jnp.sqrt(self.mass)
        return jnp.stack([jnp.zeros_like(friction), jnp.sqrt(2.0 * friction * self.beta)])

    def velocity(self, x: State, x0: Data, t: Time) -> State:
        """dz/dt = f(z, t) − Γβ (0, ∇_v log p_t(z)) of the probability flow.

        Note: the path of the marginal's Cholesky image of fixed noise has another derivative. It
            carries the same marginals, but is not this flow.

        References: Song et al. 2021, arXiv:2011.13456, eq. 13; Dockhorn et al. 2022,
            arXiv:2112.07068, section 3.
        """
        rate = 0.5 * along(self.diffusion(t), x) ** 2
        return self.drift(x, t) - rate * self.marginal(x0, t).score(x)

    def augment(self, key: Key, x0: Data) -> State:
        """z_0 = (x_0, v_0) with v_0 ~ N(0, γM)."""
        return jnp.stack([x0, self.added(x0, jnp.zeros(())).sample(key)])

    def added(self, x0: Data, t: Time) -> Normal:
        """q(v_t | x_0), the velocity's part of the marginal; at t = 0 it is N(0, γM)."""
        of_x0, factor = self._marginal(t)
        return Normal(of_x0[1] * x0, root(jnp.sum(factor[1] ** 2)))

    def log_snr(self, t: Time) -> Time:
        """The log signal-to-noise ratio of x_t."""
        of_x0, factor = self._marginal(t)
        return 2.0 * jnp.log(of_x0[0] / factor[0, 0])

    def _clock(self, t: Time) -> Time:
        """τ = β t/√M."""
        return self.beta * t / jnp.sqrt(self.mass)

    def _units(self) -> Float[Array, "2 1"]:
        """Standard deviations of x and v in equilibrium, as a column."""
        return jnp.stack([1.0, jnp.sqrt(self.mass)])[:, None]

    def _flow(self, t: Time) -> Matrix:
        """e^{Fτ}, the mean's motion over a time t."""
        tau, units = self._clock(t), self._units()
        nilpotent = jnp.array([[1.0, 1.0], [-1.0, -1.0]])
        return jnp.exp(-tau) * (jnp.eye(2) + tau * nilpotent) * (units / units.T)

    def _fresh(self, t: Time) -> Matrix:
        """The Cholesky factor of Q, the noise gathered over a time t."""
        tau = self._clock(t)
        decay = jnp.exp(-2.0 * tau)
        xx = _gamma3(2.0 * tau)
        xv = 2.0 * tau**2 * decay
        vv = -jnp.expm1(-2.0 * tau) + 2.0 * tau * decay * (1.0 - tau)
        slope = xv / jnp.where(xx > 0.0, xx, 1.0)
        spread = root(xx)
        factor = jnp.stack([spread, jnp.zeros_like(xx), slope * spread, root(vv - xv * slope)])
        return factor.reshape(2, 2) * self._units()

    def _marginal(self, t: Time) -> tuple[Float[Array, "2"], Matrix]:
        """What q(z_t | x_0) makes of x_0, and its Cholesky factor."""
        of_x0, of_v0 = self._flow(t).T
        start = jnp.sqrt(self.gamma * self.mass)
        rows = jnp.concatenate([self._fresh(t), start * of_v0[:, None]], axis=1)
        return of_x0, _triangular(rows)


def cld(beta: float = 4.0, mass: float = 0.25, gamma: float = 0.04) -> CLD:
    """Critically damped Langevin diffusion, by default as in the paper.

    Args:
        beta: β > 0; βt/√M is the clock, and e^{−τ}(1 + τ) of the data is left at t = 1.
        mass: M > 0, the variance of the velocity in equilibrium; Γ = 2√M.
        gamma: γ in (0, 1], the variance of the velocity at t = 0 over M.

    Raises:
        ValueError: for an argument outside its range.

    References: Dockhorn et al. 2022, arXiv:2112.07068, section 3.
    """
    for name, value in (("beta", beta), ("mass", mass)):
        if not value > 0.0:
            raise ValueError(f"{name} must be positive, got {value}.")
    if not 0.0 < gamma <= 1.0:
        raise ValueError(f"gamma must lie in (0, 1], got {gamma}.")
    return CLD(beta=beta, mass=mass, gamma=gamma)


@struct.dataclass
class VelocityNoise:
    """F = ε_v, the velocity's noise under the marginal; see `velocity_noise`."""

    def inputs(self, process: CLD, x: State, t: Time) -> tuple[Array, Time]:
        """(x and v side by side on the last axis, of unit variance for such data; log-SNR/4)."""
        of_x0, factor = process._marginal(t)
        scale = jax.lax.rsqrt(of_x0**2 + jnp.sum(factor**2, axis=1))
        level = jnp.clip(process.log_snr(t), -20.0, 20.0) / 4.0
        return jnp.concatenate([scale[0] * x[0], scale[1] * x[1]], axis=-1), level

    def denoised(self, process: CLD, out: Data, x: State, t: Time) -> Denoised:
        """x_0 = (v − r x − L_vv F) / (m_v − r m_x) with r = L_vx/L_xx."""
        of_x0, factor = process._marginal(t)
        slope = factor[1, 0] / factor[0, 0]
        of_data = x[1] - slope * x[0] - factor[1, 1] * out
        return Denoised(of_data / (of_x0[1] - slope * of_x0[0]))


def velocity_noise() -> VelocityNoise:
    """The network predicts the velocity's noise ε_v: ∇_v log p = −F/L_vv.

    It is given x and v side by side on the last axis, twice the features of the data, and returns
    as many as the data have. Its output names x_0, because (x, v) = m x_0 + L (ε_x, ε_v) are two
    equations for x_0 and ε_x.

    References: Dockhorn et al. 2022, arXiv:2112.07068, section 3.2.
    """
    return VelocityNoise()


@struct.dataclass
class MixedScore(VelocityNoise):
    """F = ε_v − L_vv v/Σ_vv; see `mixed_score`."""

    def denoised(self, process: CLD, out: Data, x: State, t: Time) -> Denoised:
        """As of F + L_vv v/Σ_vv."""
        of_x0, factor = process._marginal(t)
        total = of_x0[1] ** 2 + jnp.sum(factor[1] ** 2)
        return super().denoised(process, out + factor[1, 1] / total * x[1], x, t)


def mixed_score() -> MixedScore:
    """The network predicts how the score differs from that of N(0, I) data seen by v alone.

    ∇_v log p = −v/Σ_vv − F/L_vv, with Σ_vv the variance that v_t has for data from N(0, I): with
    F = 0 the model is exact at large t.

    References: Dockhorn et al. 2022, arXiv:2112.07068, section 3.2.
    """
    return MixedScore()


def _dot(a: Array, b: Array) -> Array:
    """A matrix times a matrix, or a state; exact on accelerators, too."""
    return jnp.tensordot(a, b, axes=1, precision=jax.lax.Precision.HIGHEST)


def _outer(a: Array, b: Array) -> Array:
    """All products of entries of a with entries of b."""
    return jnp.tensordot(a, b, axes=0, precision=jax.lax.Precision.HIGHEST)


def _inverse(factor: Matrix) -> Matrix:
    """L⁻¹ of a lower triangular L."""
    xx, _, vx, vv = factor.reshape(4)
    return jnp.stack([1.0 / xx, jnp.zeros_like(xx), -vx / (xx * vv), 1.0 / vv]).reshape(2, 2)


def _triangular(rows: Float[Array, "2 k ..."]) -> Float[Array, "2 2 ..."]:
    """The Cholesky factor of R Rᵀ, by Gram–Schmidt on the two rows of R."""
    x, v = rows
    xx = root(jnp.sum(x**2, axis=0))
    direction = x / jnp.where(xx > 0.0, xx, 1.0)[None]
    vx = jnp.sum(direction * v, axis=0)
    vv = root(jnp.sum((v - vx[None] * direction) ** 2, axis=0))
    return jnp.stack([xx, jnp.zeros_like(xx), vx, vv]).reshape(2, 2, *xx.shape)


def _gamma3(y: Array) -> Array:
    """P(3, y) = 1 − e^{−y} (1 + y + y²/2), by its power series where that cancels."""
    small = y < 1.0
    base = jnp.where(small, y, 1.0)
    coefficients = jnp.array([1.0 / math.factorial(k) for k in range(3, 21)])
    series = jnp.exp(-base) * jnp.sum(coefficients * base ** jnp.arange(3.0, 21.0))
    return jnp.where(small, series, 1.0 - jnp.exp(-y) * (1.0 + y + 0.5 * y**2))
