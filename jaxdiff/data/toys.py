"""Eight toy densities of the plane, each with an exact sampler and an exact log-density.

They are the generators of FFJORD (Grathwohl et al. 2018, arXiv 1810.01367) in continuum form: a
latent angle is drawn from its law and not from a fixed list. Each density is then one of

    a finite mixture or a uniform law        8gaussians, checkerboard   closed form
    a circle smeared by Gaussian noise       rings, circles             closed form, Bessel
    a curve smeared by noise, ∫ p(x|u) du    moons, swissroll, 2spirals Gauss–Legendre in u
    a smooth map of Gaussian noise           pinwheel                   change of variables

`entropy` is the best negative log-likelihood that a model can reach, in nats: −∫ p log p, by a
midpoint rule on a grid of 800² points in float64 (its digits are all converged), or ln 32 for the
checkerboard. An NLL below it by more than the statistical error is a bug of the likelihood.

Note: FFJORD multiplies row vectors from the left, which turns the pinwheel clockwise; here angles
are counter-clockwise, so that its pinwheel is the mirror image, of equal entropy.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import i0e, log_ndtr, logsumexp
from jaxtyping import Array, Float

from jaxdiff import struct
from jaxdiff.processes.base import example_keys
from jaxdiff.typing import Key, Scalar

__all__ = [
    "TOYS",
    "Toy",
    "checkerboard",
    "circles",
    "eight_gaussians",
    "moons",
    "pinwheel",
    "rings",
    "swissroll",
    "two_spirals",
]


@struct.dataclass
class Toy:
    """A density of the plane that can be sampled and evaluated exactly.

    Attributes:
        draw: key -> one point [2].
        log_prob: point [2] -> exact log-density, nats; −inf outside a bounded support.
        entropy: −E log p, nats: the least NLL.
    """

    draw: Callable[[Key], Array] = struct.field(pytree_node=False)
    log_prob: Callable[[Array], Array] = struct.field(pytree_node=False)
    entropy: Scalar

    def sample(self, key: Key, n: int) -> Float[Array, "n 2"]:
        """Draw n points; point i depends on the key and i alone, not on n."""
        return jax.vmap(self.draw)(example_keys(key, n))


def _legendre(low: float, high: float, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes u and weights w with ∫ f(u) du over [low, high] = Σ w f(u)."""
    nodes, weights = np.polynomial.legendre.leggauss(n)
    half = (high - low) / 2
    return low + half * (nodes + 1), half * weights


def _log_normal(x: Array, centres: np.ndarray, std: float) -> Array:
    """log N(x; c, std² I) at each centre c of [m, 2], shape [m]."""
    squares = jnp.sum((x[None] - jnp.asarray(centres, x.dtype)) ** 2, axis=1)
    return -0.5 * squares / std**2 - float(np.log(2 * np.pi * std**2))


def _on_circle(angle: Array) -> Array:
    return jnp.stack([jnp.cos(angle), jnp.sin(angle)])


# 8gaussians: centres at radius 4, every 45°, + 0.5 N; all divided by 1.414.

_EIGHT_ANGLES = np.arange(8) * np.pi / 4
_EIGHT_CENTRES = 4 / 1.414 * np.stack([np.cos(_EIGHT_ANGLES), np.sin(_EIGHT_ANGLES)], 1)
_EIGHT_STD = 0.5 / 1.414


def _draw_eight_gaussians(key: Key) -> Float[Array, "2"]:
    key_centre, key_noise = jax.random.split(key)
    centre = jnp.asarray(_EIGHT_CENTRES)[jax.random.randint(key_centre, (), 0, 8)]
    return centre + _EIGHT_STD * jax.random.normal(key_noise, (2,))


def _log_eight_gaussians(x: Float[Array, "2"]) -> Float[Array, ""]:
    return logsumexp(_log_normal(x, _EIGHT_CENTRES, _EIGHT_STD)) - float(np.log(8))


eight_gaussians = Toy(_draw_eight_gaussians, _log_eight_gaussians, entropy=2.8319)


# checkerboard: x₁ ~ U(−2, 2), x₂ = U(0, 1) − 2 Bernoulli(½) + (⌊x₁⌋ mod 2); times 2.


def _draw_checkerboard(key: Key) -> Float[Array, "2"]:
    key_first, key_second, key_row = jax.random.split(key, 3)
    first = jax.random.uniform(key_first, minval=-2.0, maxval=2.0)
    row = -2.0 * jax.random.bernoulli(key_row) + jnp.floor(first) % 2
    return 2 * jnp.stack([first, jax.random.uniform(key_second) + row])


def _log_checkerboard(x: Float[Array, "2"]) -> Float[Array, ""]:
    inside = jnp.all((x >= -4) & (x < 4)) & (jnp.floor(x / 2).sum() % 2 == 0)
    return jnp.where(inside, -float(np.log(32)), -jnp.inf)


checkerboard = Toy(_draw_checkerboard, _log_checkerboard, entropy=3.4657)


# moons: (cos θ, sin θ) or (1 − cos θ, ½ − sin θ), θ ~ U(0, π); times 2, minus (1, 0.2); + 0.2 N.

_MOONS_STD = 0.2


def _moons_curves(angle: np.ndarray) -> np.ndarray:
    outer = np.stack([2 * np.cos(angle) - 1, 2 * np.sin(angle) - 0.2], 1)
    inner = np.stack([1 - 2 * np.cos(angle), 0.8 - 2 * np.sin(angle)], 1)
    return np.concatenate([outer, inner])


_MOONS_ANGLES, _MOONS_WEIGHTS = _legendre(0.0, np.pi, 128)
_MOONS_NODES = _moons_curves(_MOONS_ANGLES)
_MOONS_LOG_WEIGHTS = np.log(np.tile(_MOONS_WEIGHTS / np.pi, 2) / 2)


def _draw_moons(key: Key) -> Float[Array, "2"]:
    key_angle, key_moon, key_noise = jax.random.split(key, 3)
    outer = _on_circle(jax.random.uniform(key_angle, maxval=jnp.pi))
    inner = jnp.array([1.0, 0.5]) - outer
    point = jnp.where(jax.random.bernoulli(key_moon), outer, inner)
    noise = jax.random.normal(key_noise, (2,))
    return 2 * point - jnp.array([1.0, 0.2]) + _MOONS_STD * noise


def _log_moons(x: Float[Array, "2"]) -> Float[Array, ""]:
    return logsumexp(
        jnp.asarray(_MOONS_LOG_WEIGHTS, x.dtype) + _log_normal(x, _MOONS_NODES, _MOONS_STD)
    )


moons = Toy(_draw_moons, _log_moons, entropy=2.3939)


# swissroll: u ~ U(1.5π, 4.5π); (u cos u, u sin u) / 5 + 0.2 N.

_ROLL_STD = 0.2
_ROLL_ENDS = 1.5 * np.pi, 4.5 * np.pi
_ROLL_ANGLES, _ROLL_WEIGHTS = _legendre(*_ROLL_ENDS, 256)
_ROLL_NODES = _ROLL_ANGLES[:, None] / 5 * np.stack([np.cos(_ROLL_ANGLES), np.sin(_ROLL_ANGLES)], 1)
_ROLL_LOG_WEIGHTS = np.log(_ROLL_WEIGHTS / (_ROLL_ENDS[1] - _ROLL_ENDS[0]))


def _draw_swissroll(key: Key) -> Float[Array, "2"]:
    key_angle, key_noise = jax.random.split(key)
    angle = jax.random.uniform(key_angle, minval=_ROLL_ENDS[0], maxval=_ROLL_ENDS[1])
    return angle / 5 * _on_circle(angle) + _ROLL_STD * jax.random.normal(key_noise, (2,))


def _log_swissroll(x: Float[Array, "2"]) -> Float[Array, ""]:
    log_normals = _log_normal(x, _ROLL_NODES, _ROLL_STD)
    return logsumexp(jnp.asarray(_ROLL_LOG_WEIGHTS, x.dtype) + log_normals)


swissroll = Toy(_draw_swissroll, _log_swissroll, entropy=2.6696)


# pinwheel: f = (0.3 N + 1, 0.1 N), turned by 2πk/5 + exp(f₁)/4 in arm k of 5; times 2.

_PIN_STDS = 0.3, 0.1
_PIN_ARC = 2 * np.pi / 5
_PIN_ANGLES = np.linspace(-np.pi, np.pi, 513)


def _draw_pinwheel(key: Key) -> Float[Array, "2"]:
    key_arm, key_noise = jax.random.split(key)
    noise = jax.random.normal(key_noise, (2,))
    along, across = _PIN_STDS[0] * noise[0] + 1, _PIN_STDS[1] * noise[1]
    turn = _PIN_ARC * jax.random.randint(key_arm, (), 0, 5) + jnp.exp(along) / 4
    cos, sin = _on_circle(turn)
    return 2 * jnp.stack([cos * along - sin * across, sin * along + cos * across])


def _log_pinwheel(x: Float[Array, "2"]) -> Float[Array, ""]:
    """Sum the density of f over all f that are mapped to x.

    In polar coordinates f = (r, φ) the map keeps the radius and turns φ into
    h(φ) = φ + exp(r cos φ)/4, up to the arm's multiple of 2π/5. So the f sought lie where
    (h(φ) − angle of x) / (2π/5) is a whole number, and h'(φ) is the determinant. A whole number
    between two neighbours of a fine grid of φ brackets a root; Newton steps polish it.
    """
    radius = jnp.linalg.norm(x) / 2
    target = jnp.arctan2(x[1], x[0])

    def turned(angle: Array) -> Array:
        return angle + jnp.exp(radius * jnp.cos(angle)) / 4

    def slope(angle: Array) -> Array:
        return 1 - radius * jnp.sin(angle) * jnp.exp(radius * jnp.cos(angle)) / 4

    grid = jnp.asarray(_PIN_ANGLES, x.dtype)
    arm = (turned(grid) - target) / _PIN_ARC
    floors = jnp.floor(arm)
    brackets = floors[1:] != floors[:-1]
    whole = jnp.maximum(floors[1:], floors[:-1])
    share = jnp.where(brackets, (whole - arm[:-1]) / jnp.where(brackets, arm[1:] - arm[:-1], 1), 0)
    angle = grid[:-1] + share * (grid[1:] - grid[:-1])
    for _ in range(2):
        angle = angle - (turned(angle) - target - _PIN_ARC * whole) / slope(angle)

    along = (radius * jnp.cos(angle) - 1) / _PIN_STDS[0]
    across = radius * jnp.sin(angle) / _PIN_STDS[1]
    log_normal = -0.5 * (along**2 + across**2) - float(np.log(2 * np.pi * np.prod(_PIN_STDS)))
    terms = jnp.where(brackets, log_normal - jnp.log(jnp.abs(slope(angle))), -jnp.inf)
    return logsumexp(terms) - float(np.log(5 * 2**2))


pinwheel = Toy(_draw_pinwheel, _log_pinwheel, entropy=2.3178)


# 2spirals: n = 3π√U, d = (−n cos n, n sin n) + U(0, ½)²; ±d/3 + 0.1 N.

_SPIRAL_STD = 0.1
_SPIRAL_BOX = 1 / 6
_SPIRAL_END = 3 * np.pi
_SPIRAL_ANGLES, _SPIRAL_WEIGHTS = _legendre(0.0, _SPIRAL_END, 320)
_SPIRAL_CORNERS = (
    _SPIRAL_ANGLES[:, None] / 3 * np.stack([-np.cos(_SPIRAL_ANGLES), np.sin(_SPIRAL_ANGLES)], 1)
)
_SPIRAL_LOG_WEIGHTS = np.log(_SPIRAL_WEIGHTS * 2 * _SPIRAL_ANGLES / _SPIRAL_END**2)


def _draw_two_spirals(key: Key) -> Float[Array, "2"]:
    key_angle, key_box, key_sign, key_noise = jax.random.split(key, 4)
    angle = _SPIRAL_END * jnp.sqrt(jax.random.uniform(key_angle))
    curve = angle * jnp.stack([-jnp.cos(angle), jnp.sin(angle)])
    point = (curve + jax.random.uniform(key_box, (2,), maxval=0.5)) / 3
    return jax.random.rademacher(key_sign, (), point.dtype) * point + _SPIRAL_STD * (
        jax.random.normal(key_noise, (2,))
    )


def _log_smeared_box(y: Array) -> Array:
    """Log-density of U(0, box) + std N, with its digits kept in both tails."""
    # Φ keeps its relative precision only on the left: mirror the points right of the centre.
    y = _SPIRAL_BOX / 2 - jnp.abs(y - _SPIRAL_BOX / 2)
    high, low = log_ndtr(y / _SPIRAL_STD), log_ndtr((y - _SPIRAL_BOX) / _SPIRAL_STD)
    return high + jnp.log1p(-jnp.exp(low - high)) - float(np.log(_SPIRAL_BOX))


def _log_two_spirals(x: Float[Array, "2"]) -> Float[Array, ""]:
    both = jnp.stack([x, -x])[:, None]
    boxes = _log_smeared_box(both - jnp.asarray(_SPIRAL_CORNERS, x.dtype)[None]).sum(axis=2)
    log_weights = jnp.asarray(_SPIRAL_LOG_WEIGHTS, x.dtype)
    return logsumexp(boxes + log_weights[None]) - float(np.log(2))


two_spirals = Toy(_draw_two_spirals, _log_two_spirals, entropy=2.6455)


# rings: radius 3, 2.25, 1.5 or 0.75, + 0.08 N. circles: radius 3 or 1.5, + 0.24 N.

_RINGS = np.array([3, 2.25, 1.5, 0.75]), 0.08
_CIRCLES = np.array([3, 1.5]), 0.24


def _draw_on_rings(key: Key, radii: np.ndarray, std: float) -> Array:
    key_radius, key_angle, key_noise = jax.random.split(key, 3)
    radius = jnp.asarray(radii)[jax.random.randint(key_radius, (), 0, len(radii))]
    circle = _on_circle(jax.random.uniform(key_angle, maxval=2 * jnp.pi))
    return radius * circle + std * jax.random.normal(key_noise, (2,))


def _log_rings_at(x: Array, radii: np.ndarray, std: float) -> Array:
    """The angle integrates to a Bessel function: ∮ N(x; r e(φ), std² I) dφ/2π, averaged over r."""
    distance, rings = jnp.linalg.norm(x), jnp.asarray(radii, x.dtype)
    # i0e(z) = exp(−z) I₀(z) completes the square, so that nothing overflows.
    log_rings = jnp.log(i0e(distance * rings / std**2)) - 0.5 * ((distance - rings) / std) ** 2
    return logsumexp(log_rings) - float(np.log(2 * np.pi * std**2 * len(radii)))


def _draw_rings(key: Key) -> Float[Array, "2"]:
    return _draw_on_rings(key, *_RINGS)


def _log_rings(x: Float[Array, "2"]) -> Float[Array, ""]:
    return _log_rings_at(x, *_RINGS)


def _draw_circles(key: Key) -> Float[Array, "2"]:
    return _draw_on_rings(key, *_CIRCLES)


def _log_circles(x: Float[Array, "2"]) -> Float[Array, ""]:
    return _log_rings_at(x, *_CIRCLES)


rings = Toy(_draw_rings, _log_rings, entropy=2.6232)
circles = Toy(_draw_circles, _log_circles, entropy=3.2681)


TOYS: Mapping[str, Toy] = {
    "8gaussians": eight_gaussians,
    "checkerboard": checkerboard,
    "moons": moons,
    "swissroll": swissroll,
    "pinwheel": pinwheel,
    "2spirals": two_spirals,
    "rings": rings,
    "circles": circles,
}
"""The eight by the names of the literature, for the command line."""
