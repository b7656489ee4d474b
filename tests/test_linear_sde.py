"""Processes from somebody's own SDE: SciPy's moments, brute-force conditioning, the gate."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import scipy.integrate
import scipy.stats
from oracles import GMM5, gate, passes

import jaxdiff as jd
from jaxdiff.processes.base import SDE, Denoised, Process
from jaxdiff.processes.linear_sde import (
    DenseNormal,
    LinearSDE,
    VectorEpsilon,
    affine_sde,
    linear_sde,
)

KEY = jax.random.key(0)
TIMES = np.geomspace(1e-5, 1.0, 40)


def beta(t):
    return 0.1 + 19.9 * t


# (f, g, σ(0)) as people write them
SDES = {
    "vp": (lambda x, t: -0.5 * beta(t) * x, lambda t: jnp.sqrt(beta(t)), 0.0),
    "subvp": (
        lambda x, t: -0.5 * beta(t) * x,
        lambda t: jnp.sqrt(beta(t) * -jnp.expm1(-2 * (0.1 * t + 9.95 * t**2))),
        0.0,
    ),
    "ve": (lambda x, t: 0.0 * x, lambda t: 0.01 * 5000.0**t * np.sqrt(2 * np.log(5000.0)), 0.01),
    "own": (lambda x, t: -(0.2 + 9 * jnp.sin(2 * t) ** 2) * x, lambda t: 0.5 + 8 * t, 0.0),
}
every_sde = pytest.mark.parametrize("name", SDES)


@functools.cache
def solved(name):
    drift, diffusion, sigma_0 = SDES[name]
    return linear_sde(drift, diffusion, sigma_0=sigma_0)


@every_sde
def test_moments_are_those_of_the_sde(name):
    """B2, B3: α, σ, drift and g to 1e-5 of an independent float64 solution, down to t = 1e-5."""
    drift, diffusion, sigma_0 = SDES[name]
    process = solved(name)
    with jax.enable_x64(True):
        rate = jax.jit(lambda t: jnp.asarray(drift(jnp.ones(()), t)))
        scale = jax.jit(lambda t: jnp.asarray(diffusion(t)))

        def moments(t, y):
            return [float(rate(t)), 2 * float(rate(t)) * y[1] + float(scale(t)) ** 2]

        solution = scipy.integrate.solve_ivp(
            moments, (0, 1), [0, sigma_0**2], "DOP853", TIMES, rtol=1e-10, atol=1e-17
        )
        rates = np.array([rate(t) for t in TIMES]), np.array([scale(t) for t in TIMES])
    t = jnp.asarray(TIMES, jnp.float32)
    alpha, sigma = jax.vmap(process.schedule)(t)
    np.testing.assert_allclose(alpha, np.exp(solution.y[0]), rtol=1e-5)
    np.testing.assert_allclose(sigma, np.sqrt(solution.y[1]), rtol=1e-5)
    found = jax.vmap(lambda t: process.drift(jnp.ones(()), t))(t)
    np.testing.assert_allclose(found, rates[0], rtol=1e-5)
    np.testing.assert_allclose(jax.vmap(process.diffusion)(t), rates[1], rtol=1e-5)
    np.testing.assert_allclose(process.prior((3,)).std, np.sqrt(solution.y[1, -1]), rtol=1e-5)
    assert isinstance(process, jd.Gaussian)
    assert sigma.dtype == jnp.float32


def test_known_processes_are_recovered():
    """B2: from f and g alone, the library's own schedules, with their log-SNR and posterior."""
    t = jnp.asarray(TIMES, jnp.float32)
    for name, schedule in (("vp", jd.linear_beta()), ("subvp", jd.subvp()), ("ve", jd.exploding())):
        for found, expected in zip(
            jax.vmap(solved(name).schedule)(t), jax.vmap(schedule)(t), strict=True
        ):
            np.testing.assert_allclose(found, expected, rtol=1e-5)
    one, other = solved("vp"), jd.Gaussian(jd.linear_beta())
    x, x0 = jnp.array([0.3, -1.2]), Denoised(jnp.array([0.5, 0.1]), 0.05)
    for t, s in [(1.0, 0.999), (0.5, 0.4), (0.1, 0.0), (2e-3, 1e-3)]:
        found = one.posterior(x, x0, jnp.float32(t), jnp.float32(s))
        expected = other.posterior(x, x0, jnp.float32(t), jnp.float32(s))
        np.testing.assert_allclose(found.mean, expected.mean, rtol=1e-4)
        np.testing.assert_allclose(found.std, expected.std, rtol=1e-4)


@every_sde
def test_flow_is_drift_minus_half_g_squared_score(name):
    drift, diffusion, _ = SDES[name]
    process = solved(name)
    x, x0 = jnp.array([0.9, -0.4]), jnp.array([0.5, 0.1])
    for t in map(jnp.float32, (1e-3, 0.3, 1.0)):
        score = process.marginal(x0, t).score(x)
        expected = drift(x, t) - 0.5 * diffusion(t) ** 2 * score
        np.testing.assert_allclose(process.velocity(x, x0, t), expected, rtol=2e-4, atol=1e-4)


def unit_grid(end):
    return jd.grids.uniform(1000, end=0.0 if end is None else end)


@pytest.mark.parametrize("mutant", [None, *oracles.MUTANTS])
def test_exact_score_of_an_own_sde_passes_the_gate(mutant, gmm_data, gmm_null):
    process = solved("own")
    step, denoise, grid = jd.Ancestral(process), GMM5.denoiser(process), unit_grid(None)
    if mutant is not None:
        step, denoise, grid = oracles.mutated(mutant, step, process, unit_grid)
    denoise = jd.UnitVariance(process, denoise)
    x = jd.sample(step, denoise, grid, KEY, process.prior((2000, 2)).sample(KEY))
    found = gate(x, GMM5, gmm_data)
    assert passes(found, gmm_null) == (mutant is None), found
    assert mutant is None or oracles.MUTANTS[mutant](found), found


# Vectors


def matrix(t):
    return -(0.5 + 9.0 * t) * jnp.array([[1.0, 0.6], [-0.8, 1.0]])


def offset(t):
    return jnp.stack([2.0 * jnp.cos(3 * t), -1.0 + t])


def spread(t):
    return jnp.stack([0.3 + 5.0 * t, 0.4 + 3.0 * t])


@functools.cache
def vector():
    return affine_sde(lambda x, t: matrix(t) @ x + offset(t), spread, 2)


@functools.cache
def vector_moments(t):
    """Φ, m and C at t, by SciPy in float64."""

    def slopes(t, y):
        y = y.reshape(2, 5)
        a, cov = rate(t), y[:, 3:]
        change = np.concatenate([a @ y[:, :3], a @ cov + cov @ a.T + noise(t)], axis=1)
        change[:, 2] += shift(t)
        return change.ravel()

    with jax.enable_x64(True):
        rate = lambda t: np.asarray(matrix(jnp.float64(t)))
        shift = lambda t: np.asarray(offset(jnp.float64(t)))
        noise = lambda t: np.diag(np.asarray(spread(jnp.float64(t))) ** 2)
        start = np.concatenate([np.eye(2, 3), np.zeros((2, 2))], axis=1)
        found = scipy.integrate.solve_ivp(
            slopes, (0, t), start.ravel(), "DOP853", rtol=1e-9, atol=1e-15
        ).y[:, -1]
    found = found.reshape(2, 5)
    return found[:, :2], found[:, 2], found[:, 3:]


def covariance(normal):
    return normal.factor @ normal.factor.T


@pytest.mark.parametrize("t", [1e-5, 1e-3, 0.2, 1.0])
def test_vector_moments_are_those_of_the_sde(t):
    """B2 for a matrix, an offset and one g a coordinate."""
    scale, shift, cov = vector_moments(t)
    marginal = vector().marginal(jnp.array([0.7, -0.3]), jnp.float32(t))
    np.testing.assert_allclose(marginal.mean, scale @ [0.7, -0.3] + shift, rtol=1e-5)
    np.testing.assert_allclose(covariance(marginal), cov, rtol=1e-5, atol=1e-5 * cov.max())
    if t == 1.0:
        prior = vector().prior((2,))
        np.testing.assert_allclose(prior.mean, shift, rtol=1e-5)
        np.testing.assert_allclose(covariance(prior), cov, rtol=1e-5)
        assert np.abs(scale).max() < 0.02
    assert isinstance(vector(), Process)
    assert isinstance(vector(), SDE)


@pytest.mark.parametrize(("t", "s"), [(0.9, 0.89), (0.6, 0.2), (0.3, 0.0)])
def test_vector_posterior_is_bayes(t, s):
    """The joint law of (x_0, x_s, x_t), conditioned by brute force in float64."""
    (scale_s, shift_s, cov_s), (scale_t, shift_t, cov_t) = vector_moments(s), vector_moments(t)
    if s == 0.0:
        scale_s, shift_s, cov_s = np.eye(2), np.zeros(2), np.zeros((2, 2))
    step = scale_t @ np.linalg.inv(scale_s)
    x, x0, var = np.array([0.4, -0.6]), np.array([0.7, -0.3]), np.array([0.05, 0.4])
    gain = cov_s @ step.T @ np.linalg.inv(cov_t)
    of_x0 = scale_s - gain @ scale_t
    mean = shift_s + gain @ (x - shift_t) + of_x0 @ x0
    cov = cov_s - gain @ step @ cov_s + of_x0 @ np.diag(var) @ of_x0.T
    found = vector().posterior(
        jnp.asarray(x, jnp.float32),
        Denoised(jnp.asarray(x0, jnp.float32), jnp.asarray(var, jnp.float32)),
        jnp.float32(t),
        jnp.float32(s),
    )
    np.testing.assert_allclose(found.mean, mean, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(covariance(found), cov, rtol=1e-3, atol=1e-4 * cov.max())
    # Markov: averaged over x_t given x_0, the posterior is the marginal at s.
    average = gain @ cov_t @ gain.T + cov_s - gain @ step @ cov_s
    np.testing.assert_allclose(average, cov_s, atol=1e-9)


def test_one_rate_as_a_vector_is_the_gaussian_process():
    """A = a I: marginal, posterior, velocity and likelihood of the scalar process."""
    drift, diffusion, _ = SDES["own"]
    one, other = affine_sde(drift, diffusion, 3), solved("own")
    x, x0 = jnp.array([0.4, -0.6, 1.0]), jnp.array([0.7, -0.3, 0.2])
    t, s = jnp.float32(0.5), jnp.float32(0.45)
    pairs = [
        (one.marginal(x0, t), other.marginal(x0, t)),
        (one.posterior(x, Denoised(x0), t, s), other.posterior(x, Denoised(x0), t, s)),
        (one.prior((3,)), other.prior((3,))),
    ]
    for dense, normal in pairs:
        np.testing.assert_allclose(dense.mean, normal.mean, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(dense.log_prob(x), normal.log_prob(x), rtol=1e-4)
        np.testing.assert_allclose(dense.score(x), normal.score(x), rtol=1e-4)
        np.testing.assert_allclose(dense.noise(x), normal.noise(x), rtol=1e-4)
    np.testing.assert_allclose(one.velocity(x, x0, t), other.velocity(x, x0, t), rtol=1e-4)
    np.testing.assert_allclose(pairs[0][0].kl(pairs[2][0]), pairs[0][1].kl(pairs[2][1]), rtol=1e-4)


def test_dense_normal_is_scipys():
    factor = jnp.array([[0.7, 0.0], [-0.4, 1.3]])
    one = DenseNormal(jnp.array([0.3, -1.0]), factor)
    law = scipy.stats.multivariate_normal(np.asarray(one.mean), np.asarray(factor @ factor.T))
    x = jnp.array([1.1, 0.2])
    np.testing.assert_allclose(one.log_prob(x), law.logpdf(x), rtol=1e-5)
    np.testing.assert_allclose(one.score(x), jax.grad(one.log_prob)(x), rtol=1e-5)
    np.testing.assert_allclose(one.from_noise(one.noise(x)), x, rtol=1e-5)
    drawn = np.asarray(jax.vmap(one.sample)(jax.random.split(KEY, 100_000)))
    np.testing.assert_allclose(np.cov(drawn.T), law.cov, atol=0.03)
    other = DenseNormal(jnp.array([0.0, 0.5]), jnp.array([[1.0, 0.0], [0.5, 0.8]]))
    ratios = law.logpdf(drawn) - np.asarray(jax.vmap(other.log_prob)(drawn))
    np.testing.assert_allclose(one.kl(other), ratios.mean(), atol=4 * ratios.std() / 100_000**0.5)


class VectorMixture(NamedTuple):
    """E[x_0 | x_t] of GMM5 under the vector process, exactly."""

    process: LinearSDE

    def __call__(self, x, t):
        scale, shift, cov = self.process._moments(t)
        total = 0.04 * scale @ scale.T + cov
        gain = 0.04 * jnp.linalg.solve(total, scale).T

        def one(x):
            apart = x[None] - GMM5.means @ scale.T - shift[None]
            squares = jnp.sum(apart * jnp.linalg.solve(total, apart.T).T, axis=1)
            shares = jax.nn.softmax(jnp.log(GMM5.weights) - 0.5 * squares)
            return shares @ (GMM5.means + apart @ gain.T)

        return Denoised(jax.vmap(one)(x))


@pytest.mark.parametrize("solver", ["ancestral", "reverse_sde", "probability_flow"])
def test_exact_score_of_a_vector_sde_passes_the_gate(solver, gmm_data, gmm_null):
    """The samplers as they are, with correlated noise."""
    process = vector()
    denoise = VectorMixture(process)
    keys = jax.random.split(KEY, 2000)
    x = jax.vmap(process.prior((2,)).sample)(keys)
    if solver == "ancestral":
        x = jd.sample(jd.Ancestral(process), denoise, jd.grids.uniform(1000), KEY, x)
    elif solver == "reverse_sde":
        x = jd.reverse_sde(process, denoise, KEY, x, jd.grids.uniform(400, end=1e-3))
    else:
        x = jd.probability_flow(process, denoise, x, 1.0, 1e-3)
    found = gate(x, GMM5, gmm_data)
    assert passes(found, gmm_null), found


def test_vector_noise_prediction_is_read_as_the_data():
    process, parameterization = vector(), VectorEpsilon()
    x0, noise = jnp.array([0.7, -0.3]), jnp.array([1.2, 0.4])
    for t in map(jnp.float32, (1e-3, 0.3, 0.9)):
        x = process.marginal(x0, t).from_noise(noise)
        found = parameterization.denoised(process, noise, x, t).mean
        scale, shift, cov = vector_moments(float(t))
        tolerance = 1e-5 * np.sqrt(cov.max()) / np.abs(scale).max() + 1e-5
        np.testing.assert_allclose(found, x0, atol=tolerance)
        inputs, level = parameterization.inputs(process, x, t)
        expected = (x - shift) / np.sqrt(np.diag(scale @ scale.T + cov))
        np.testing.assert_allclose(inputs, expected, rtol=1e-4, atol=1e-5)
        determinants = np.linalg.det(scale) ** 2 / np.linalg.det(cov)
        np.testing.assert_allclose(level, np.log(determinants) / 8, rtol=1e-4, atol=1e-4)
    # As a network's, on a batch: the same numbers through `NetDenoiser`.
    denoise = jd.NetDenoiser(0.5, process, lambda params, x, level: params * x, parameterization)
    found = denoise(jnp.stack([x, 2 * x]), t).mean[1]
    out = 0.5 * parameterization.inputs(process, 2 * x, t)[0]
    np.testing.assert_allclose(
        found, parameterization.denoised(process, out, 2 * x, t).mean, rtol=1e-4
    )


# What is refused, and in which words


def test_given_marginals_are_held_against_the_sde():
    """A drift that is infinite at t = 1 is served by its schedule; another's is refused."""
    drift, diffusion = lambda x, t: -x / (1 - t), lambda t: jnp.sqrt(2 * t / (1 - t))
    process = linear_sde(drift, diffusion, schedule=jd.straight())
    assert process.schedule(jnp.ones(()))[0] == 0.0
    with pytest.raises(ValueError, match=r"not at t=1.*make a Gaussian"):
        linear_sde(drift, diffusion)
    with pytest.raises(ValueError, match="schedule is that of another SDE: its drift"):
        linear_sde(drift, diffusion, schedule=jd.linear_beta())
    with pytest.raises(ValueError, match="schedule is that of another SDE: its diffusion"):
        linear_sde(drift, lambda t: 1.1 * diffusion(t), schedule=jd.straight())


LINEAR, ONE = lambda x, t: -x, lambda t: jnp.ones_like(t)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: linear_sde(lambda x, t: -(x**3), ONE), "non-linear SDE are not Gaussian"),
        (lambda: linear_sde(lambda x, t: -jnp.tanh(x), ONE), "non-linear SDE are not Gaussian"),
        (lambda: linear_sde(lambda x, t: -jnp.abs(x), ONE), "non-linear SDE are not Gaussian"),
        (lambda: linear_sde(lambda x, t: jnp.clip(x, -9, 9), ONE), "non-linear SDE"),
        (lambda: affine_sde(lambda x, t: x * x[::-1], ONE, 2), "non-linear SDE are not Gaussian"),
        (lambda: linear_sde(lambda x, t: 1.0 - x, ONE), r"vanish at x = 0.*use affine_sde"),
        (lambda: linear_sde(lambda x, t: -x[..., ::-1], ONE), r"one rate.*use affine_sde"),
        (lambda: linear_sde(lambda x, t: jnp.sum(x), ONE), "drift must return an array like x"),
        (lambda: linear_sde(lambda x, t: jnp.eye(3) @ x, ONE), "drift must take x of shape"),
        (lambda: linear_sde(LINEAR, lambda x, t: x), "diffusion must be a function of t alone"),
        (lambda: linear_sde(lambda t: t, ONE), "drift must be a function of"),
        (lambda: linear_sde(LINEAR, lambda t: jnp.ones(2)), "diffusion must return an array"),
        (lambda: linear_sde(LINEAR, lambda t: 1.0 / t), "diffusion must be finite"),
        (lambda: linear_sde(LINEAR, ONE, sigma_0=-1.0), "sigma_0"),
        (lambda: linear_sde(LINEAR, ONE, pieces=0), "pieces"),
        (lambda: linear_sde(lambda x, t: x * jnp.sin(1e4 * t), ONE, pieces=50), "too fast"),
        (lambda: affine_sde(LINEAR, lambda t: jnp.array([1.0, 0.0]), 2), "must be positive"),
        (lambda: affine_sde(LINEAR, ONE, 0), "dim"),
        (lambda: vector().prior((5, 2)), "shape must be that of one state"),
    ],
)
def test_what_is_no_linear_sde_is_refused_with_the_reason(make, message):
    with pytest.raises(ValueError, match=message):
        make()
