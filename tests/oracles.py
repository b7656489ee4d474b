"""Closed forms, and the gate that a sampler of a known mixture must pass.

The gate is three numbers, because none of them sees every mistake: the energy distance misses a
score taken 0.01 late, noise 5 % too loud and a solve that stops at t = 0.02, which the within-mode
standard deviation catches; and a wrong mixture weight shows in the shares of the modes.
"""

import contextlib
import math
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import jaxprs_in_params

import jaxdiff as jd
from jaxdiff.data.mixture import GaussianMixture, gmm5
from jaxdiff.metrics import energy_distance
from jaxdiff.processes.base import Denoised


@contextlib.contextmanager
def optimised():
    """Compiles with XLA's optimisation, which a program that is run for seconds repays."""
    jax.config.update("jax_disable_most_optimizations", False)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", True)


BETAS = np.linspace(1e-4, 0.02, 1000)


def user_schedule(t):
    """Somebody's own schedule: a plain function, neither preserving nor exploding."""
    return 1.0 / (1.0 + 5.0 * t) ** 2, 2.0 * t + t**2


SCHEDULES = {
    "linear_beta": jd.linear_beta(0.1, 20.0),
    "cosine": jd.cosine(),
    "subvp": jd.subvp(0.1, 20.0),
    "exploding": jd.exploding(0.01, 50.0),
    "edm": jd.edm(0.002, 80.0),
    "straight": jd.straight(),
    "from_betas": jd.from_betas(BETAS),
    "user": jax.tree_util.Partial(user_schedule),
}
PRESERVING = ("linear_beta", "cosine", "from_betas")
EXPLODING = ("exploding", "edm")


def start_of(name: str) -> float:
    """Where sampling starts: below 1 where the drift of the SDE is infinite at 1."""
    return 0.999 if name == "straight" else 1.0


class GaussianData(NamedTuple):
    """Data from N(mean, std²), where everything is known."""

    process: jd.Gaussian
    mean: float
    std: float

    def __call__(self, x, t):
        alpha, sigma = self.process.schedule(t)
        total = (alpha * self.std) ** 2 + sigma**2
        mean = (sigma**2 * self.mean + alpha * self.std**2 * x) / total
        return Denoised(mean)

    def log_prob(self, x):
        return jnp.sum(jax.scipy.stats.norm.logpdf(x, self.mean, self.std), axis=-1)


class Gate(NamedTuple):
    """How far samples are from a mixture."""

    energy: float
    weights: float
    std: float


def gate(x, mixture: GaussianMixture, data) -> Gate:
    """Energy distance to data, largest error of a mode's share, and within-mode deviation."""
    x, means = np.asarray(x, np.float64), np.asarray(mixture.means, np.float64)
    nearest = np.argmin(((x[:, None] - means[None]) ** 2).sum(-1), axis=1)
    shares = np.bincount(nearest, minlength=len(means)) / len(x)
    return Gate(
        energy=energy_distance(x, data),
        weights=float(np.abs(shares - np.asarray(mixture.weights)).max()),
        std=float((x - means[nearest]).std()),
    )


def passes(found: Gate, null: float, *, energy=2.0, weights=0.03, std=0.007) -> bool:
    """Whether samples pass the acceptance thresholds of an exact score."""
    return (
        found.energy <= energy * null and found.weights <= weights and abs(found.std - 0.2) <= std
    )


class Late(NamedTuple):
    """A mutant denoiser whose score is that of a time 0.01 too early."""

    process: jd.Gaussian
    denoise: object

    def __call__(self, x, t):
        early = jnp.maximum(t - 0.01, 1e-3)
        alpha, sigma = self.process.schedule(early)
        score = (alpha * self.denoise(x, early).mean - x) / sigma**2
        alpha, sigma = self.process.schedule(t)
        return Denoised((x + sigma**2 * score) / alpha)


class Loud(NamedTuple):
    """A mutant step, all of whose fresh noise is scaled."""

    step: Any
    factor: float = 1.05

    def init(self, x):
        return self.step.init(x)

    def update(self, key, x, state, t, s, denoise):
        normal = jax.random.normal
        loud = lambda *args, **options: self.factor * normal(*args, **options)
        with mock.patch.object(jax.random, "normal", loud):  # while the step is traced
            return self.step.update(key, x, state, t, s, denoise)


MUTANTS = {
    "late score": lambda found: found.std < 0.193,
    "early stop": lambda found: found.std > 0.207,
    "wrong weights": lambda found: found.weights > 0.06,
    "loud noise": lambda found: found.std > 0.207,
    "no noise": lambda found: found.energy > 0.1,
}
"""Plausible mistakes of a sampler, and the number of the gate that must see each; the last two are
for samplers with fresh noise."""


def mutated(mutant: str, step, process, make_grid):
    """A step, a denoiser of GMM5 and a grid, with one mistake in one of them.

    make_grid(end) makes a grid that stops at a time `end` with σ > 0, make_grid(None) a proper one.
    """
    denoise, grid = GMM5.denoiser(process), make_grid(0.02 if mutant == "early stop" else None)
    if mutant == "late score":
        denoise = Late(process, denoise)
    if mutant == "wrong weights":
        flat = GMM5.__class__(jnp.full(5, 0.2), GMM5.means, GMM5.variances, GMM5.axes)
        denoise = flat.denoiser(process)
    if mutant in ("loud noise", "no noise"):
        step = Loud(step, 1.05 if mutant == "loud noise" else 0.0)
    return step, denoise, grid


GMM5 = gmm5()


def multiplications(function, *args):
    """Of numbers, in all products of matrices and convolutions of a call; nothing is computed."""
    return _multiplications(jax.make_jaxpr(function)(*args).jaxpr)


def _multiplications(jaxpr):
    total = 0
    for eqn in jaxpr.eqns:
        turns = eqn.params["length"] if eqn.primitive.name == "scan" else 1
        inner = list(jaxprs_in_params(eqn.params))
        # Of branches for several platforms one is run.
        total += turns * max(map(_multiplications, inner), default=0)
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            each = math.prod(eqn.invars[0].aval.shape[i] for i in contracted)
        elif eqn.primitive.name in ("conv_general_dilated", "convolution"):
            each = math.prod(eqn.invars[1].aval.shape[:3])  # of a kernel [h, w, c, c2]
        else:
            continue
        total += each * math.prod(eqn.outvars[0].aval.shape)
    return total
