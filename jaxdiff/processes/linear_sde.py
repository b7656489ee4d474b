"""Somebody's own SDE: from a linear drift and a diffusion coefficient to a process.

If the drift is linear all conditionals stay Gaussian, and their moments given x_0 obey ordinary
differential equations of their own. With one rate for all coordinates, dx = a(t) x dt + g(t) dw,

    d log α/dt = a,      dV/dt = 2 a V + g²,      x_t = α x_0 + √V ε,

a `Gaussian` (`linear_sde`); for vectors and dx = (A x + b) dt + diag(g) dw,

    dΦ/dt = A Φ,   dm/dt = A m + b,   dC/dt = A C + C Aᵀ + diag(g²),   x_t ~ N(Φ x_0 + m, C),

a `LinearSDE` (`affine_sde`). They are solved once, when the process is made, in float64. What
remains are piecewise cubics in t that meet the solution and its slope at every knot.

A non-linear drift bends a Gaussian into something without a closed form: there is no q(x_t | x_0)
to sample from and no posterior, and denoising score matching has nothing to stand on.

References: Särkkä and Solin 2019, Applied Stochastic Differential Equations, section 6.1 (the
moments of a linear SDE); Song et al. 2021, arXiv:2011.13456, appendix B.
"""

import functools
import inspect
import math
from collections.abc import Callable

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.linalg import solve_triangular
from jaxtyping import Float

from jaxdiff import struct
from jaxdiff.distributions import root
from jaxdiff.processes.base import Denoised
from jaxdiff.processes.gaussian import Gaussian
from jaxdiff.schedules import Schedule
from jaxdiff.typing import Array, Data, Key, Scalar, State, Time

__all__ = [
    "Cubics",
    "DenseNormal",
    "LinearSDE",
    "SolvedSchedule",
    "VectorEpsilon",
    "affine_sde",
    "linear_sde",
]

Drift = Callable[[State, Time], State]
"""(x, t) ↦ f(x, t)."""

Diffusion = Callable[[Time], Scalar]
"""t ↦ g(t)."""


@struct.dataclass
class Cubics:
    """Piecewise cubics in t ∈ [0, 1], of numbers or of arrays.

    The n pieces meet at t = (i/n)²: their width falls with t, so that what starts at 0 keeps its
    relative precision there.

    Attributes:
        table: [4, n, …] the coefficients on each piece, in its own coordinate u ∈ [0, 1].
    """

    table: Scalar

    def __call__(self, t: Time) -> Float[Array, "..."]:
        """The value at t, in the precision of t."""
        n = jnp.shape(self.table)[1]
        i = jnp.clip(jnp.floor(jnp.sqrt(t) * n), 0, n - 1)
        u = (t - (i / n) ** 2) / ((2.0 * i + 1.0) / n**2)
        c = jnp.asarray(self.table)[:, i.astype(int)].astype(t.dtype)
        return c[0] + u * (c[1] + u * (c[2] + u * c[3]))


@struct.dataclass
class SolvedSchedule:
    """α = exp(c(t)) and σ = √V(t).

    Attributes:
        log_alpha: c.
        variance: V.
    """

    log_alpha: Cubics
    variance: Cubics

    def __call__(self, t: Time) -> tuple[Time, Time]:
        """(α, σ) at t."""
        return jnp.exp(self.log_alpha(t)), root(self.variance(t))


def linear_sde(
    drift: Drift,
    diffusion: Diffusion,
    *,
    schedule: Schedule | None = None,
    sigma_0: float = 0.0,
    pieces: int = 1024,
) -> Gaussian:
    """The process of dx = f(x, t) dt + g(t) dw with f(x, t) = a(t) x, on t ∈ [0, 1].

    Make it outside of `jax.jit`; to sweep a number of the SDE, make a process for each of its
    values: they all run in the same compiled programs.

    Args:
        drift: f, a JAX function of (x, t), with x of any shape and a scalar t; finite on [0, 1].
        diffusion: g, a JAX function of t; finite on [0, 1]. Smooth coefficients are met to 1e-6.
        schedule: t ↦ (α, σ) if you know it: it is held against drift and diffusion, and used. This
            also serves a drift that is infinite at t = 1, where α = 0.
        sigma_0: standard deviation of the noise at t = 0, ≥ 0 (σ_min of a variance-exploding SDE);
            of no effect with a `schedule`.
        pieces: number of cubics; more for rates that vary fast.

    Returns:
        A `Gaussian`, whose prior is N(0, σ(1)²).

    Raises:
        ValueError: if the drift is not a(t) x (it says what it is instead), if the diffusion
            depends on the state, if either is not finite or varies too fast for the pieces, or if
            the schedule is that of another SDE.
    """
    _check_numbers(drift, diffusion, sigma_0, pieces)
    with jax.enable_x64(True):
        _check_linear(drift, (2, 5))
        _check_one_rate(drift)
        if schedule is not None:
            _check_schedule(schedule, drift, diffusion)
            return Gaussian(schedule)

        def slopes(t, y):
            rate = jnp.asarray(drift(jnp.ones_like(t), t), t.dtype)
            g = _scale(diffusion, t, ())
            return {"drift": rate, "diffusion": 2.0 * rate * y["diffusion"] + g**2}

        start = {"drift": jnp.zeros(()), "diffusion": jnp.asarray(sigma_0**2)}
        solved = _solve(slopes, start, pieces)
    log_alpha, variance = (Cubics(jnp.asarray(solved[name])) for name in ("drift", "diffusion"))
    return Gaussian(SolvedSchedule(log_alpha=log_alpha, variance=variance))


@struct.dataclass
class DenseNormal:
    """N(mean, L Lᵀ) of a vector.

    Attributes:
        mean: [d] the centre.
        factor: [d, d] the lower triangular L. If it is 0 the distribution is a point: it can be
            sampled, and has no density, noise or score.
    """

    mean: Data
    factor: Scalar

    def sample(self, key: Key) -> State:
        """Draws mean + L ε with ε ~ N(0, I)."""
        return self.from_noise(jax.random.normal(key, self.mean.shape, self.mean.dtype))

    def log_prob(self, x: State) -> Float[Array, ""]:
        """−½ ‖ε‖² − log det L − ½ d log 2π, in nats."""
        return -0.5 * jnp.sum(self.noise(x) ** 2 + math.log(2.0 * math.pi)) - self._log_det()

    def kl(self, other: "DenseNormal") -> Float[Array, ""]:
        """½ (‖L₂⁻¹ L₁‖² + ‖L₂⁻¹ (mean₁ − mean₂)‖² − d) + log det L₂/L₁, in nats."""
        ratio = solve_triangular(other.factor, self.factor, lower=True)
        squares = jnp.sum(ratio**2) + jnp.sum(other.noise(self.mean) ** 2) - self.mean.size
        return 0.5 * squares + other._log_det() - self._log_det()

    def noise(self, x: State) -> State:
        """L⁻¹ (x − mean)."""
        return solve_triangular(self.factor, x - self.mean, lower=True)

    def from_noise(self, noise: State) -> State:
        """Mean + L · noise."""
        return self.mean + self.factor @ noise

    def score(self, x: State) -> State:
        """−(L Lᵀ)⁻¹ (x − mean)."""
        return -solve_triangular(self.factor, self.noise(x), lower=True, trans="T")

    def _log_det(self) -> Float[Array, ""]:
        return jnp.sum(jnp.log(jnp.diagonal(self.factor)))


@struct.dataclass
class LinearSDE:
    """dx = f(x, t) dt + diag(g(t)) dw of a vector, f = A(t) x + b(t); make it with `affine_sde`.

    Attributes:
        f: the drift.
        g: the diffusion coefficient, a number or [d].
        mean_map: t ↦ [Φ | m], [d, d + 1].
        covariance: t ↦ C, [d, d].
    """

    f: Drift
    g: Diffusion
    mean_map: Cubics
    covariance: Cubics

    def prior(self, shape: tuple[int, ...]) -> DenseNormal:
        """p(x_1) = N(m(1), C(1)): what the marginal tends to once the data are drowned.

        Args:
            shape: (d,), that of one state.
        """
        one = jnp.ones(())
        _, shift, cov = self._moments(one)
        if shape != shift.shape:
            raise ValueError(f"shape must be that of one state, {shift.shape}, got {shape}.")
        return DenseNormal(shift, _factor(cov))

    def marginal(self, x0: Data, t: Time) -> DenseNormal:
        """q(x_t | x_0) = N(Φ x_0 + m, C)."""
        scale, shift, cov = self._moments(t)
        return DenseNormal(scale @ x0 + shift, _factor(cov))

    def posterior(self, x: State, x0: Denoised, t: Time, s: Time) -> DenseNormal:
        """q(x_s | x_t, x_0) for s < t; an uncertain x_0 widens it by the law of total variance.

        With Ψ = Φ_t Φ_s⁻¹ and the gain K = C_s Ψᵀ C_t⁻¹ it is
        N(m_s + K (x_t − m_t) + (Φ_s − K Φ_t) x_0, C_s − K Ψ C_s).

        Args:
            x: x_t.
            x0: mean and variance of x_0 given x_t.
            t: the time of x, above 0 where there is no noise at 0.
            s: the earlier time.

        References: Särkkä and Solin 2019, section 10.1 (conditioning a linear SDE).
        """
        (scale_s, shift_s, cov_s), (scale_t, shift_t, cov_t) = self._moments(s), self._moments(t)
        step = jnp.linalg.solve(scale_s.T, scale_t.T).T
        gain = jnp.linalg.solve(cov_t, step @ cov_s).T
        of_x0 = scale_s - gain @ scale_t
        # Joseph's form: a sum of squares, so that rounding leaves no negative variance.
        kept = jnp.eye(x.shape[0], dtype=x.dtype) - gain @ step
        noise = cov_t - step @ cov_s @ step.T
        var = jnp.broadcast_to(x0.var, x.shape)
        cov = kept @ cov_s @ kept.T + gain @ noise @ gain.T + (of_x0 * var[None, :]) @ of_x0.T
        mean = shift_s + gain @ (x - shift_t) + of_x0 @ x0.mean
        return DenseNormal(mean, _factor(cov))

    def drift(self, x: State, t: Time) -> State:
        """f(x, t)."""
        return self.f(x, t)

    def diffusion(self, t: Time) -> Float[Array, "..."]:
        """g(t), a scalar or [d]."""
        return jnp.asarray(self.g(t))

    def velocity(self, x: State, x0: Data, t: Time) -> State:
        """dx/dt = f − ½ g² ∇ log p_t(x) of the probability flow, where E[x_0 | x] = x0."""
        return self.drift(x, t) - 0.5 * self.diffusion(t) ** 2 * self.marginal(x0, t).score(x)

    def _moments(self, t: Time) -> tuple[Array, Array, Array]:
        mean_map = self.mean_map(t)
        return mean_map[:, :-1], mean_map[:, -1], self.covariance(t)


@struct.dataclass
class VectorEpsilon:
    """A parameterization for a `LinearSDE`: the network predicts the noise, x_t = Φx_0 + m + L F.

    The network sees x with unit variance in each coordinate for data from N(0, I), and a quarter of
    the mean log-SNR, log det(Φ Φᵀ)/det C over the dimensions.
    """

    def inputs(self, process: LinearSDE, x: State, t: Time) -> tuple[State, Time]:
        """((x − m) / √diag(Φ Φᵀ + C), noise level)."""
        scale, shift, cov = process._moments(t)
        spread = jnp.sqrt(jnp.sum(scale**2, axis=1) + jnp.diagonal(cov))
        log_det = jnp.linalg.slogdet(scale)[1] - jnp.linalg.slogdet(cov)[1] / 2
        return (x - shift) / spread, jnp.clip(2.0 * log_det / x.size, -20.0, 20.0) / 4.0

    def denoised(self, process: LinearSDE, out: State, x: State, t: Time) -> Denoised:
        """x_0 = Φ⁻¹ (x − m − L F)."""
        scale, shift, cov = process._moments(t)
        return Denoised(jnp.linalg.solve(scale, x - shift - _factor(cov) @ out))


def affine_sde(
    drift: Drift, diffusion: Diffusion, dim: int, *, sigma_0: float = 0.0, pieces: int = 1024
) -> LinearSDE:
    """The process of dx = (A(t) x + b(t)) dt + diag(g(t)) dw for vectors x [d], on t ∈ [0, 1].

    Make it outside of `jax.jit`. Each evaluation factorises a d × d matrix: it is for small d. For
    one rate and no offset use `linear_sde`, which is a `Gaussian` and has all that comes with it.

    Args:
        drift: f, a JAX function of (x [d], t), affine in x; finite and smooth on [0, 1].
        diffusion: g > 0, a JAX function of t, scalar or [d]; finite and smooth on [0, 1].
        dim: d ≥ 1.
        sigma_0: standard deviation of the noise at t = 0, ≥ 0.
        pieces: number of cubics; more for coefficients that vary fast.

    Returns:
        A process and SDE, whose prior is N(m(1), C(1)).

    Raises:
        ValueError: if the drift is not affine or the diffusion depends on the state, if either is
            not finite or varies too fast for the pieces, or if g is not positive: noise in some
            coordinates alone leaves the others hardly any at small t (see `CLD` for such an SDE).
    """
    _check_numbers(drift, diffusion, sigma_0, pieces)
    if dim < 1:
        raise ValueError(f"dim must be at least 1, got {dim}.")
    with jax.enable_x64(True):
        _check_linear(drift, (dim,))

        def slopes(t, y):
            g = jnp.broadcast_to(_scale(diffusion, t, (dim,)), dim)
            shift = jnp.asarray(drift(jnp.zeros(dim), t), t.dtype)

            def linear(x):
                return jnp.asarray(drift(x, t), t.dtype) - shift

            scaled = jax.vmap(linear, 1, 1)(y["drift"]).at[:, -1].add(shift)
            half = jax.vmap(linear, 1, 1)(y["diffusion"])
            return {"drift": scaled, "diffusion": half + half.T + jnp.diag(g**2)}

        start = {"drift": jnp.eye(dim, dim + 1), "diffusion": sigma_0**2 * jnp.eye(dim)}
        solved = _solve(slopes, start, pieces)
        if not min(float(jnp.min(_scale(diffusion, jnp.asarray(t), (dim,)))) for t in _TIMES) > 0.0:
            raise ValueError("diffusion must be positive for every coordinate at all times.")
    return LinearSDE(
        f=struct.as_pytree(drift),
        g=struct.as_pytree(diffusion),
        mean_map=Cubics(jnp.asarray(solved["drift"])),
        covariance=Cubics(jnp.asarray(solved["diffusion"])),
    )


def _solve(slopes: Callable, start: dict[str, Array], pieces: int) -> dict[str, np.ndarray]:
    """The cubics of y with dy/dt = slopes(t, y), named after what drives each; in float64."""
    knots = jnp.linspace(0.0, 1.0, pieces + 1) ** 2
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(lambda t, y, _: slopes(t, y)),
        diffrax.Dopri8(),
        knots[0],
        knots[-1],
        None,
        start,
        stepsize_controller=diffrax.StepTo(knots),
        saveat=diffrax.SaveAt(t0=True, steps=True),
        max_steps=pieces,
        throw=False,
    )
    assert solution.ys is not None
    rates = jax.vmap(slopes)(knots, solution.ys)
    for name, values in rates.items():
        finite = np.isfinite(np.asarray(values).reshape(len(knots), -1)).all(axis=1)
        if not finite.all():
            raise ValueError(
                f"{name} must be finite on [0, 1], and is not at t={knots[np.argmin(finite)]:.4g}:"
                " the moments cannot be solved for. If you know them, make a Gaussian of them."
            )
    tables = jax.tree.map(lambda y, slope: _cubics(y, slope, knots), solution.ys, rates)
    _check_solved(slopes, tables, knots)
    return {name: np.asarray(table) for name, table in tables.items()}


def _cubics(values: Array, slopes: Array, knots: Array) -> Array:
    """[4, n, …] coefficients of the cubics with these values and slopes at the knots (Hermite)."""
    widths = jnp.diff(knots).reshape(-1, *[1] * (values.ndim - 1))
    rise, left, right = jnp.diff(values, axis=0), slopes[:-1] * widths, slopes[1:] * widths
    return jnp.stack([values[:-1], left, 3 * rise - 2 * left - right, left + right - 2 * rise])


def _check_solved(slopes: Callable, tables: dict[str, Array], knots: Array) -> None:
    """Whether half-way between the knots the cubics have the slopes that they should."""
    middles, pieces = (knots[:-1] + knots[1:]) / 2, len(knots) - 1

    def at(t):
        y = {name: Cubics(table) for name, table in tables.items()}
        found = jax.jvp(lambda t: {name: c(t) for name, c in y.items()}, (t,), (jnp.ones_like(t),))
        return found[1], slopes(t, found[0])

    found, wanted = jax.vmap(at)(middles)
    for name in tables:
        error = float(jnp.abs(found[name] - wanted[name]).max())
        size = max(float(jnp.abs(wanted[name]).max()), 1e-300)
        if not error <= 1e-3 * size:
            raise ValueError(
                f"{name} varies too fast for pieces={pieces}: its moments are off by "
                f"{error / size:.1e} of their slope. Pass more pieces."
            )


def _factor(cov: Float[Array, "d d"]) -> Float[Array, "d d"]:
    """The lower triangular L with L Lᵀ = cov; 0 for 0."""
    stds = root(jnp.diagonal(cov))
    some = stds > 0.0
    scale = jnp.where(some, stds, 1.0)
    eye = jnp.eye(cov.shape[0], dtype=cov.dtype)
    # Correlations: a little more than nothing on the diagonal, in each coordinate's own unit.
    relative = jnp.where(jnp.outer(some, some), cov / jnp.outer(scale, scale), eye)
    return jnp.linalg.cholesky(relative + 4 * jnp.finfo(cov.dtype).eps * eye) * stds[:, None]


def _scale(diffusion: Diffusion, t: Time, shape: tuple[int, ...]) -> Array:
    g = jnp.asarray(diffusion(t), float)
    if g.shape not in ((), shape):
        allowed = " or ".join(map(str, dict.fromkeys([(), shape])))
        raise ValueError(f"diffusion must return an array of shape {allowed}, got {g.shape}.")
    return g


def _check_numbers(drift: Drift, diffusion: Diffusion, sigma_0: float, pieces: int) -> None:
    if pieces < 1:
        raise ValueError(f"pieces must be at least 1, got {pieces}.")
    if not 0.0 <= sigma_0 < math.inf:
        raise ValueError(f"sigma_0 must be finite and at least 0, got {sigma_0}.")
    for name, function, count in (("drift", drift, 2), ("diffusion", diffusion, 1)):
        try:
            inspect.signature(function).bind(*range(count))
        except TypeError:
            wanted = "(x, t)" if name == "drift" else "t alone: noise that depends on x has no"
            wanted += "" if name == "drift" else " Gaussian marginals"
            raise ValueError(f"{name} must be a function of {wanted}; got {function}.") from None


_TIMES = (0.0, 0.01, 0.31, 0.5, 0.77, 0.99)


def _check_linear(drift: Drift, shape: tuple[int, ...]) -> None:
    """Refuses a drift that is not affine in x."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=shape), 30.0 * rng.normal(size=shape)
    for t in _TIMES:
        f = functools.partial(_at, drift, t)
        try:
            offset = f(0.0 * x)
        except (TypeError, ValueError, IndexError) as error:
            raise ValueError(f"drift must take x of shape {shape}, and fails: {error}") from error
        if offset.shape != shape:
            raise ValueError(f"drift must return an array like x, {shape}, got {offset.shape}.")
        both = _close(f(x + y) + offset, f(x) + f(y)) and _close(f(-y) + f(y), 2.0 * offset)
        if np.isfinite(offset).all() and not both:
            raise ValueError(
                f"drift must be linear in x, and is not at t={t}: f(x + y) differs from f(x) + "
                "f(y). The marginals of a non-linear SDE are not Gaussian and have no closed form, "
                "so that there is nothing to draw x_t from and no score to regress on."
            )


def _check_one_rate(drift: Drift) -> None:
    """Refuses an affine drift that is not a(t) x, and says what it is."""
    x = np.random.default_rng(1).normal(size=(2, 5))
    for t in _TIMES:
        offset, rate = _at(drift, t, 0.0 * x), _at(drift, t, np.ones(x.shape)).flat[0]
        if np.isfinite(offset).all() and not _close(offset, 0.0 * x):
            raise ValueError(
                f"drift must vanish at x = 0, got {offset.flat[0]} at t={t}: use affine_sde, or "
                "shift the data."
            )
        if np.isfinite(rate) and not _close(_at(drift, t, x), rate * x):
            raise ValueError(
                f"drift must be a(t) x with one rate for all coordinates, and is not at t={t}: use "
                "affine_sde."
            )


def _check_schedule(schedule: Schedule, drift: Drift, diffusion: Diffusion) -> None:
    process = Gaussian(schedule)
    for t in map(jnp.asarray, (0.03, 0.2, 0.5, 0.8, 0.97)):
        derived = process.drift(jnp.ones_like(t), t), process.diffusion(t)
        given = drift(jnp.ones_like(t), t), abs(_scale(diffusion, t, ()))
        for name, found, wanted in zip(("drift", "diffusion"), derived, given, strict=True):
            if not _close(np.asarray(found), np.asarray(wanted)):
                raise ValueError(
                    f"schedule is that of another SDE: its {name} at {t} is {found}, not {wanted}."
                )


def _at(drift: Drift, t: float, x: np.ndarray) -> np.ndarray:
    return np.asarray(drift(jnp.asarray(x, float), jnp.asarray(t, float)))


def _close(found: np.ndarray, wanted: np.ndarray) -> bool:
    return bool(np.allclose(found, wanted, rtol=1e-5, atol=1e-7 * (1 + np.abs(wanted).max())))
