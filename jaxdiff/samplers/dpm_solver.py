"""DPM-Solver, and what all exponential integrators of a Gaussian process's flow share.

With λ = log(α/σ), half the log-SNR, the probability flow from t to s is solved exactly but for an
average of what the network says on the way:

    x_s = (σ_s/σ_t) x_t + (α_s − σ_s α_t/σ_t) ⟨x̂_0⟩,     x̂_0 averaged under e^λ dλ      (data)
    x_s = (α_s/α_t) x_t + (σ_s − α_s σ_t/α_t) ⟨ε̂⟩,       ε̂ averaged under e^−λ dλ      (noise)

What is averaged is a polynomial through a few values, so a method is the choice of these values and
of the clock of the polynomial, hence of weights that sum to 1. With one value both lines are DDIM's
step (`transfer`), the method of first order. Further values come from network calls within the step
(singlestep: DPM-Solver, below) or from the steps before (multistep: `History`).

The ends need no care of their own. From α(t) = 0 and to σ(s) = 0 a step is infinitely long in λ:
then the value at t has all the weight, so the step is DDIM's, and to σ(s) = 0 it returns x̂_0. In
the same way a former value that is missing is one infinitely long ago, and has no weight.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxdiff import struct
from jaxdiff.processes.base import Denoiser
from jaxdiff.processes.gaussian import Gaussian
from jaxdiff.schedules import time_of_log_snr
from jaxdiff.typing import Key, Scalar, State, Time

__all__ = [
    "DPMSolver",
    "History",
    "check_order",
    "finite_step",
    "half_log_snr",
    "is_infinite",
    "time_within",
    "transfer",
    "transfer_noise",
    "weights_at",
    "weights_over",
]

Weights = Float[Array, "nodes"]
"""One a value; they sum to 1."""

_POINTS, _GAUSS = np.polynomial.legendre.leggauss(16)


@struct.dataclass
class DPMSolver:
    """DPM-Solver-1, 2 and 3: ⟨ε̂⟩ from calls within the step.

    Of order `order`; deterministic. `order` network calls a step, and one for a step to σ(s) = 0 or
    from α(t) = 0, which is DDIM's. With h = λ_s − λ_t and r the `ratio`:

    * 1: ⟨ε̂⟩ is the value at λ_t. This is DDIM.
    * 2: a value at λ_t + r h, reached by order 1; ⟨ε̂⟩ is the line through both, at λ_t + ½ h.
    * 3: a value at λ_t + ⅔ r h, reached by order 1, and one at λ_t + ⅔ h, reached by the average of
      the line through the two; ⟨ε̂⟩ is the average of the line through the first and the third.

    Attributes:
        process: the forward process.
        order: 1, 2 or 3.
        ratio: r in (0, 1]. At ½ it gives the paper's r₁ = ½ in order 2, and r₁ = ⅓ in order 3.

    Note: the paper's r₂ is not offered: the method is of third order at ⅔ alone.

    References: Lu et al. 2022, arXiv:2206.00927, eq. 3.7 and algorithms 1–2.
    """

    process: Gaussian
    order: int = struct.field(pytree_node=False, default=2)
    ratio: Scalar = 0.5

    def __post_init__(self) -> None:
        check_order(self.order, (1, 2, 3))
        struct.require(
            (self.ratio > 0.0) & (self.ratio <= 1.0),
            f"ratio must lie in (0, 1], got {self.ratio}.",
        )

    def init(self, x: State) -> None:
        """Remembers nothing."""

    def update(
        self, key: Key, x: State, state: None, t: Time, s: Time, denoise: Denoiser
    ) -> tuple[State, None]:
        """Takes x [b, …] from t to s; the keys are not used."""
        x0 = denoise(x, t).mean
        if self.order == 1:
            return transfer(self.process, x, x0, t, s), state
        x = jax.lax.cond(
            is_infinite(self.process, t, s),
            lambda: transfer(self.process, x, x0, t, s),
            lambda: self._higher(x, x0, t, s, denoise),
        )
        return x, state

    def _higher(self, x: State, x0: State, t: Time, s: Time, denoise: Denoiser) -> State:
        t, s = finite_step(self.process, t, s)
        first = self.process.marginal(x0, t).noise(x)
        start, stop = half_log_snr(self.process, t), half_log_snr(self.process, s)

        def value(x, t):
            return self.process.marginal(denoise(x, t).mean, t).noise(x)

        def move(weights, inner, s):
            noise = weights[0] * first + weights[1] * inner
            return transfer_noise(self.process, x, x0, noise, t, s)

        if self.order == 2:
            middle = time_within(self.process, t, s, self.ratio)
            inner = value(transfer(self.process, x, x0, t, middle), middle)
            line = jnp.stack([start, half_log_snr(self.process, middle)])
            return move(weights_at(line, 0.5 * (start + stop)), inner, s)

        def average(inner, s):
            line = jnp.stack([start, half_log_snr(self.process, inner)])
            return weights_over(line, start, half_log_snr(self.process, s), jnp.negative)

        fractions = jnp.stack([self.ratio * 2.0 / 3.0, jnp.full_like(t, 2.0 / 3.0)])
        # Both in one search.
        early, late = jax.vmap(lambda part: time_within(self.process, t, s, part))(fractions)
        inner = value(transfer(self.process, x, x0, t, early), early)
        inner = value(move(average(early, late), inner, late), late)
        return move(average(late, s), inner, s)


# What the other exponential integrators share


def transfer(
    process: Gaussian,
    x: State,
    x0: State,
    t: Time,
    s: Time,
    *,
    kept: Scalar = 1.0,
    fresh: Scalar = 0.0,
) -> State:
    """α_s x̂_0 + σ_s ε̂: the state at s with the denoised mean and the noise of x at t.

    The flow's exact solution if x̂_0, or ε̂, does not change; DDIM's step.

    Args:
        process: the forward process.
        x: [b, …] states at t.
        x0: [b, …] their denoised means.
        t: the time of x, with σ(t) > 0.
        s: the time to go to.
        kept: share of the noise that is kept.
        fresh: noise that is added to it, of variance 1 − kept².

    References: Song et al. 2020, arXiv:2010.02502, eq. 12.
    """
    noise = process.marginal(x0, t).noise(x)
    return process.marginal(x0, s).from_noise(kept * noise + fresh)


def transfer_noise(process: Gaussian, x: State, x0: State, noise: State, t: Time, s: Time) -> State:
    """(α_s/α_t) x + (σ_s − α_s σ_t/α_t) ε̂: the same with an average noise instead of that at t.

    A step from α(t) = 0 or to σ(s) = 0 remains `transfer`.

    Args:
        process: the forward process.
        x: [b, …] states at t.
        x0: [b, …] their denoised means at t.
        noise: [b, …] the noise averaged over the step.
        t: the time of x, with σ(t) > 0.
        s: the time to go to.
    """
    alpha, sigma = process.schedule(t)
    infinite = is_infinite(process, t, s)
    ratio = jnp.where(infinite, 0.0, sigma / jnp.where(infinite, 1.0, alpha))
    # The x̂_0 that goes with the average noise.
    x0 = x0 + ratio * (process.marginal(x0, t).noise(x) - noise)
    return transfer(process, x, x0, t, s)


def half_log_snr(process: Gaussian, t: Time) -> Time:
    """λ = log(α/σ)."""
    return 0.5 * process.log_snr(t)


def is_infinite(process: Gaussian, t: Time, s: Time) -> Bool[Array, ""]:
    """Whether a step is infinitely long in λ: from α(t) = 0 or to σ(s) = 0."""
    return ~jnp.isfinite(half_log_snr(process, s) - half_log_snr(process, t))


def finite_step(process: Gaussian, t: Time, s: Time) -> tuple[Time, Time]:
    """The ends of a step, or others where it is infinite: so that a branch not taken is finite."""
    infinite = is_infinite(process, t, s)
    return jnp.where(infinite, 0.6, t), jnp.where(infinite, 0.4, s)


def time_within(process: Gaussian, t: Time, s: Time, fraction: Scalar) -> Time:
    """The time at which λ is λ_t + fraction · (λ_s − λ_t)."""
    start, stop = process.log_snr(t), process.log_snr(s)
    return time_of_log_snr(process.schedule, start + fraction * (stop - start))


def weights_at(nodes: Weights, point: Float[Array, ""]) -> Weights:
    """The weights of a polynomial's values at the nodes for its value at a point (Lagrange).

    Args:
        nodes: where the values are, the latest first; infinite for those that are missing.
        point: where it is wanted. Infinite, the first node has all the weight.
    """
    finite = jnp.isfinite(point)
    weights = _lagrange(nodes, jnp.where(finite, point, 0.0)[None])[:, 0]
    return jnp.where(finite, weights, _first(nodes))


def weights_over(
    nodes: Weights,
    start: Float[Array, ""],
    stop: Float[Array, ""],
    log_density: Callable[[Array], Array] = jnp.zeros_like,
) -> Weights:
    """The weights of a polynomial's values at the nodes for its average over a step.

    Args:
        nodes: where the values are, the latest first; infinite for those that are missing.
        start: where the step starts.
        stop: where it stops. If either is infinite, the first node has all the weight.
        log_density: log of the density of the average at points [q], up to a constant.
    """
    finite = jnp.isfinite(stop - start)
    start, stop = jnp.where(finite, start, 0.0), jnp.where(finite, stop, 1.0)
    points = start + (stop - start) * jnp.asarray(0.5 * (_POINTS + 1.0), start.dtype)
    density = jax.nn.softmax(log_density(points) + jnp.asarray(np.log(_GAUSS), start.dtype))
    return jnp.where(finite, _lagrange(nodes, points) @ density, _first(nodes))


class History(NamedTuple):
    """Values of the steps before, the latest first.

    Attributes:
        clock: [length] where they were taken; infinite where there is none yet.
        value: [length, b, …] the values.
    """

    clock: Array
    value: Array

    @classmethod
    def empty(cls, x: State, length: int) -> "History":
        """No values yet."""
        return cls(jnp.full(length, jnp.inf, x.dtype), jnp.zeros((length, *x.shape), x.dtype))

    def push(self, clock: Time, value: State) -> "History":
        """The values with a new one in front: one more."""
        clocks = jnp.concatenate([clock[None].astype(self.clock.dtype), self.clock])
        return History(clocks, jnp.concatenate([value[None], self.value]))

    def latest(self, count: int) -> "History":
        """The latest values."""
        return History(self.clock[:count], self.value[:count])

    def combine(self, weights: Weights) -> State:
        """Their weighted mean."""
        return jnp.tensordot(weights, self.value, 1)


def check_order(order: int, allowed: tuple[int, ...]) -> None:
    """Refuses an order that a sampler does not have.

    Raises:
        ValueError: if it is none of those allowed.
    """
    if order not in allowed:
        raise ValueError(f"order must be one of {allowed}, got {order}.")


def _lagrange(nodes: Weights, points: Float[Array, "points"]) -> Float[Array, "nodes points"]:
    """The polynomials that are 1 at one finite node and 0 at the others."""
    there = jnp.isfinite(nodes)
    nodes = jnp.where(there, nodes, 0.0)
    pairs = there[:, None] & there[None, :] & ~jnp.eye(len(nodes), dtype=bool)
    gaps = jnp.where(pairs, nodes[:, None] - nodes[None, :], 1.0)
    factors = (points[None, None, :] - nodes[None, :, None]) / gaps[:, :, None]
    products = jnp.prod(jnp.where(pairs[:, :, None], factors, 1.0), axis=1)
    return jnp.where(there[:, None], products, 0.0)


def _first(nodes: Weights) -> Weights:
    return jnp.zeros_like(nodes).at[0].set(1.0)
