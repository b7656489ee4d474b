"""Latents: data carried to the prior by the probability flow, and what can be done with them there.

The flow is a bijection between data and latents that needs no encoder,

    z = x(1),   dx/dt = v(x, t),   x(t₀) = x,

and carries the law of the data to the prior. Everything follows from these two facts. Solved
backwards it returns the data, up to the solver's error. Latents of data are draws of the prior, so
their white noise ε = L⁻¹(z − m), for a prior N(m, L Lᵀ), has a radius ‖ε‖ ≈ √D, and neighbouring
coordinates that know nothing of each other; whatever shows otherwise is no datum of this model. A
path between two data has to keep to the shell of that radius, where all of the prior's mass lies,
so it is an arc and not a chord. And the flow depends on nothing but the score: two models that have
both learned it, whatever their networks, send the same datum to the same latent.

A process that augments its data, such as `CLD`, encodes whole states: hand in `augment(key, x)`.

References: Song et al. 2021, arXiv:2011.13456, section 4.3 (encoding, identifiability); Song et al.
2020, arXiv:2010.02502, section 5.3 (interpolation).
"""

import math
from typing import Any, NamedTuple

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxdiff import struct
from jaxdiff.compile import jit
from jaxdiff.processes.base import SDE, Denoiser
from jaxdiff.solve import Flow, adaptive, probability_flow
from jaxdiff.typing import Key, Scalar, State

__all__ = [
    "Identifiability",
    "RoundTrip",
    "Typicality",
    "decode",
    "encode",
    "identifiability",
    "interpolate",
    "round_trip",
    "slerp",
    "typicality",
]


class RoundTrip(NamedTuple):
    """What is lost between data and their reconstruction.

    Attributes:
        max: [b] largest error of a coordinate.
        rms: [b] root mean square error over coordinates.
    """

    max: Float[Array, "b"]
    rms: Float[Array, "b"]


class Typicality(NamedTuple):
    """How well latents pass for draws of the prior; p-values are uniform on [0, 1] if they are.

    Attributes:
        radius: [b] ‖ε‖/√D, close to 1.
        radius_p_value: [b] that a draw has a radius as unusual, two-sided.
        log_density: [b] log p(z) less its mean under the prior, in nats: ½ (D − ‖ε‖²).
        correlation: [b, axes] between neighbours along each axis of a latent that is longer than 1.
        correlation_p_value: [b, axes] that a draw has a correlation as unusual, two-sided.
    """

    radius: Float[np.ndarray, "b"]
    radius_p_value: Float[np.ndarray, "b"]
    log_density: Float[np.ndarray, "b"]
    correlation: Float[np.ndarray, "b axes"]
    correlation_p_value: Float[np.ndarray, "b axes"]


class Identifiability(NamedTuple):
    """How alike the latents of two models are.

    Attributes:
        correlation: of the two latents of each coordinate over the data, averaged over coordinates.
        shuffled: the same with the second model's data in another order; it is about 0.
        per_coordinate: […] the correlation of each coordinate.
    """

    correlation: Float[Array, ""]
    shuffled: Float[Array, ""]
    per_coordinate: Float[Array, "..."]


def encode(
    process: SDE,
    denoise: Denoiser,
    x: Float[Array, "b ..."],
    *,
    t0: Scalar = 1e-5,
    t1: Scalar = 1.0,
    controller: diffrax.AbstractStepSizeController | None = None,
    **options: Any,
) -> State | Flow:
    """Data to latents, by the probability flow from t0 up to t1.

    Args:
        process: the forward process.
        denoise: (x [b, …], t) ↦ moments of x_0.
        x: [b, …] data in model space; grey levels should be dequantised first, for a point of a
            lattice is no draw of any density.
        t0: where the data are placed, in [0, t1). At t = 0 the score of a process with σ(0) = 0 is
            infinite. With t0 > 0 the data pass for x_{t0}, which has noise σ(t0) that they lack:
            little beside any detail of theirs, 1e-3 for the VP process at 1e-5.
        t1: where the latents are, in (t0, 1].
        controller: a diffrax step-size controller; by default `adaptive(1e-5)`.
        **options: further ones of `probability_flow`: solver, per_example, max_steps, evaluations,
            adjoint and so on.

    Returns:
        [b, …] latents, close to draws of the prior if t1 = 1; with `evaluations`, a `Flow`.

    Raises:
        ValueError: unless 0 ≤ t0 < t1 ≤ 1, or as `probability_flow`.
        RuntimeError: if the solver needed more than `max_steps` steps.

    References: Song et al. 2021, arXiv:2011.13456, section 4.3.
    """
    return _carry(process, denoise, x, t0, t1, True, controller, options)


def decode(
    process: SDE,
    denoise: Denoiser,
    z: Float[Array, "b ..."],
    *,
    t0: Scalar = 1e-5,
    t1: Scalar = 1.0,
    controller: diffrax.AbstractStepSizeController | None = None,
    **options: Any,
) -> State | Flow:
    """Latents to data, by the probability flow from t1 down to t0: the inverse of `encode`.

    Args:
        process: the forward process.
        denoise: (x [b, …], t) ↦ moments of x_0.
        z: [b, …] latents at t1.
        t0: where the data are, in [0, t1), as in `encode`.
        t1: where the latents are, in (t0, 1].
        controller: a diffrax step-size controller; by default `adaptive(1e-5)`.
        **options: further ones of `probability_flow`, as for `encode`.

    Returns:
        [b, …] data; with `evaluations`, a `Flow`.

    Raises:
        ValueError: unless 0 ≤ t0 < t1 ≤ 1, or as `probability_flow`.
        RuntimeError: if the solver needed more than `max_steps` steps.
    """
    return _carry(process, denoise, z, t0, t1, False, controller, options)


def round_trip(
    process: SDE, denoise: Denoiser, x: Float[Array, "b ..."], **options: Any
) -> RoundTrip:
    """The error of decode(encode(x)), which is the solver's alone.

    It says how far the latents of these data can be trusted, and nothing of how good the model is:
    the flow of a wrong score is a bijection, too.

    Args:
        process: the forward process.
        denoise: (x [b, …], t) ↦ moments of x_0.
        x: [b, …] data.
        **options: of `encode` and `decode`, but `evaluations`.

    Returns:
        The error of each example.
    """
    z: Any = encode(process, denoise, x, **options)
    back: Any = decode(process, denoise, z, **options)
    error = _rows(back - x)
    return RoundTrip(jnp.max(jnp.abs(error), axis=1), jnp.sqrt(jnp.mean(error**2, axis=1)))


def slerp(
    a: Float[Array, "n ..."], b: Float[Array, "n ..."], weights: Float[Array, "k"]
) -> Float[Array, "k n ..."]:
    """Arcs between pairs of vectors: the direction turns evenly, and the length changes evenly.

        ((1 − w) |a| + w |b|) · (cos(wθ) â + sin(wθ) n̂),

    with θ the angle between a and b, and n̂ the part of b at right angles to a. For vectors of equal
    length this is Shoemake's formula, but it also holds at θ = 0 and at θ = π, where every n̂ will
    do and one is taken. A chord would pass the middle at 1/√2 of the length, where in high
    dimensions the prior has no mass. The scale of the prior does not matter: slerp(ca, cb) is
    c slerp(a, b).

    Args:
        a: [n, …] vectors of at least two coordinates, not 0.
        b: [n, …] as many, not 0.
        weights: [k] shares of b, in [0, 1].

    Returns:
        [k, n, …]: for each weight a batch.

    Raises:
        ValueError: if the shapes differ, a vector has a single coordinate, or a weight lies outside
            [0, 1].

    References: Shoemake 1985, doi:10.1145/325165.325242, section 3.3; White 2016, arXiv:1609.04468,
        section 2.1.
    """
    if a.shape != b.shape:
        raise ValueError(f"a and b must have one shape, got {a.shape} and {b.shape}.")
    if math.prod(a.shape[1:]) < 2:
        raise ValueError(f"a and b must be vectors of 2 coordinates or more, got {a.shape}.")
    return _slerp(a, b, _shares(weights))


def interpolate(
    process: SDE,
    denoise: Denoiser,
    x_a: Float[Array, "n ..."],
    x_b: Float[Array, "n ..."],
    weights: Float[Array, "k"],
    **options: Any,
) -> Float[Array, "k n ..."]:
    """Paths between pairs of data: encode, turn the prior's white noise along an arc, decode.

    Args:
        process: the forward process; its prior may have any mean and covariance.
        denoise: (x [n, …], t) ↦ moments of x_0.
        x_a: [n, …] data where the paths begin.
        x_b: [n, …] data where they end.
        weights: [k] places on the way, in [0, 1].
        **options: of `encode` and `decode`, but `evaluations`.

    Returns:
        [k, n, …]: for each weight a batch, as `plotting.interpolation_grid` draws it.

    Raises:
        ValueError: as `slerp` and `encode`.

    References: Song et al. 2020, arXiv:2010.02502, section 5.3 and appendix D.5; Song et al. 2021,
        arXiv:2011.13456, section 4.3.
    """
    if x_a.shape != x_b.shape:
        raise ValueError(f"x_a and x_b must have one shape, got {x_a.shape} and {x_b.shape}.")
    weights = _shares(weights)
    prior = process.prior(x_a.shape[1:])
    ends: list[Any] = [encode(process, denoise, x, **options) for x in (x_a, x_b)]
    a, b = (jax.vmap(prior.noise)(z) for z in ends)
    # One solve a weight, each of n examples: so a denoiser's condition, [n, …], fits every time.
    path: list[Any] = [
        decode(process, denoise, jax.vmap(prior.from_noise)(noise), **options)
        for noise in slerp(a, b, weights)
    ]
    return jnp.stack(path)


def typicality(process: SDE, z: Float[Array, "b ..."], *, pooled: bool = False) -> Typicality:
    """Tests latents against the prior: have they its radius, and are they white?

    A latent may be as probable as any and yet be nothing that the prior would draw: its mode, say,
    or a smooth image of the right length. Both tests are exact for draws of the prior, whatever D:

    * ‖ε‖² is χ² with D degrees of freedom;
    * cut an axis into neighbouring pairs (u, v). Then s = Σ (u + v)²/2 and d = Σ (u − v)²/2 are
      independent χ² with a degree a pair, so s/(s + d) is Beta(m/2, m/2) for m pairs, whatever the
      radius, and (s − d)/(s + d) = 2 Σ uv / Σ (u² + v²) is the correlation of neighbours.

    Args:
        process: whose prior is meant.
        z: [b, …] latents at t = 1.
        pooled: whether to judge the batch as one latent of bD coordinates, which sees deviations
            that are small in each example: a radius 5 % too large is nothing unusual in 64
            dimensions, but is in 100 such latents.

    Returns:
        Statistics and p-values of each example, in float64; of the batch alone, [1], if `pooled`.

    Raises:
        ValueError: if z is empty.

    Note: the p-values of an example, of radius and of each axis, are not independent of each other;
        those of different examples are.

    References: Nalisnick et al. 2019, arXiv:1906.02994 (typicality, also of batches).
    """
    from scipy import special

    if not z.size:
        raise ValueError(f"z must hold latents, got shape {z.shape}.")
    noise = np.asarray(jax.vmap(process.prior(z.shape[1:]).noise)(z), np.float64)

    def total(values):
        """Over coordinates, and over the batch if it is pooled."""
        sums = values.reshape(len(values), -1).sum(1)
        return sums.sum(keepdims=True) if pooled else sums

    def two_sided(below, above):
        return 2.0 * np.minimum(np.minimum(below, above), 0.5)

    size = noise.size if pooled else noise[0].size
    square = total(noise**2)
    correlations, p_values = [], []
    for axis in range(1, noise.ndim):
        if noise.shape[axis] > 1:
            rows = np.moveaxis(noise, axis, -1)
            end = rows.shape[-1] // 2 * 2
            u, v = rows[..., 0:end:2], rows[..., 1:end:2]
            alike, unlike = total((u + v) ** 2), total((u - v) ** 2)
            both, half = alike + unlike, total(np.ones_like(u)) / 2.0
            share = np.divide(alike, both, out=np.full_like(both, 0.5), where=both > 0.0)
            correlations.append(2.0 * share - 1.0)
            below, above = (special.betainc(half, half, part) for part in (share, 1.0 - share))
            p_values.append(two_sided(below, above))

    def columns(values):
        return np.asarray(values, np.float64).reshape(-1, len(square)).T

    return Typicality(
        radius=np.sqrt(square / size),
        radius_p_value=two_sided(special.chdtr(size, square), special.chdtrc(size, square)),
        log_density=0.5 * (size - square),
        correlation=columns(correlations),
        correlation_p_value=columns(p_values),
    )


def identifiability(
    process: SDE,
    first: Denoiser,
    second: Denoiser,
    x: Float[Array, "b ..."],
    *,
    key: Key,
    **options: Any,
) -> Identifiability:
    """Whether two models send the same data to the same latents.

    The flow is a function of the score alone, so models of the same data agree as far as both have
    learned it, whatever their networks, seeds and parameterizations.

    Args:
        process: the forward process of both.
        first: a model, (x [b, …], t) ↦ moments of x_0.
        second: another.
        x: [b, …] data, b ≥ 3.
        key: of the order in the control.
        **options: of `encode`, but `evaluations`.

    Returns:
        Correlations over the data, averaged over coordinates, and of each coordinate.

    Raises:
        ValueError: if b < 3.

    References: Song et al. 2021, arXiv:2011.13456, section 4.3 and appendix D.5 (uniquely
        identifiable encoding).
    """
    if len(x) < 3:
        raise ValueError(f"x must hold 3 examples or more, got {len(x)}.")
    z: list[Any] = [encode(process, denoise, x, **options) for denoise in (first, second)]
    each, control = (_correlation(z[0], of) for of in (z[1], jax.random.permutation(key, z[1])))
    return Identifiability(jnp.mean(each), jnp.mean(control), each)


def _carry(process, denoise, x, t0, t1, encoding, controller, options) -> State | Flow:
    """The flow between t0 and t1, up if `encoding` and else down."""
    struct.require(t0 < t1, f"t0 and t1 must satisfy t0 < t1, got t0={t0}, t1={t1}.")
    controller = adaptive(1e-5) if controller is None else controller
    start, end = (t0, t1) if encoding else (t1, t0)
    return probability_flow(process, denoise, x, start, end, controller=controller, **options)


def _shares(weights):
    weights = jnp.asarray(weights)
    inside = (weights >= 0.0) & (weights <= 1.0)
    struct.require(inside, f"weights must lie in [0, 1], got {weights}.")
    return weights


@jit
def _slerp(a, b, weights):
    def pair(a, b):
        length_a, length_b = jnp.linalg.norm(a), jnp.linalg.norm(b)
        a, b = a / length_a, b / length_b
        # Half of the angle by its tangent, which is exact where cosine or sine alone is flat.
        angle = 2.0 * jnp.arctan2(jnp.linalg.norm(b - a), jnp.linalg.norm(b + a))
        normal = _normal(a, b)

        def at(w):
            length = (1.0 - w) * length_a + w * length_b
            return length * (jnp.cos(w * angle) * a + jnp.sin(w * angle) * normal)

        return jax.vmap(at)(weights)

    found = jax.vmap(pair, out_axes=1)(_rows(a), _rows(b))
    return found.reshape(len(weights), *a.shape)


def _normal(a: Float[Array, "d"], b: Float[Array, "d"]) -> Float[Array, "d"]:
    """The unit vector at right angles to the unit vector a, towards b if b has any way to go."""

    def across(v):
        # Twice: the first time leaves a rounding error along a where v is almost parallel to it.
        v = v - jnp.dot(v, a) * a
        v = v / jnp.maximum(jnp.linalg.norm(v), jnp.finfo(v.dtype).tiny)
        v = v - jnp.dot(v, a) * a
        return v / jnp.maximum(jnp.linalg.norm(v), jnp.finfo(v.dtype).tiny)

    apart = jnp.linalg.norm(b - jnp.dot(b, a) * a) > 10.0 * jnp.finfo(a.dtype).eps
    axis = jnp.zeros_like(a).at[jnp.argmin(jnp.abs(a))].set(1.0)
    return across(jnp.where(apart, b, axis))


def _correlation(a: Float[Array, "b ..."], b: Float[Array, "b ..."]) -> Float[Array, "..."]:
    """Of each coordinate, over a batch."""
    a, b = (z - jnp.mean(z, axis=0, keepdims=True) for z in (a, b))
    return jnp.sum(a * b, axis=0) / jnp.sqrt(jnp.sum(a**2, axis=0) * jnp.sum(b**2, axis=0))


def _rows(x: Float[Array, "b ..."]) -> Float[Array, "b d"]:
    return x.reshape(x.shape[0], -1)
