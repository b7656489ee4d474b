"""Critically damped Langevin diffusion: closed forms, losses, likelihood and samplers.

The oracle is float64 and knows the process by its drift and diffusion alone: matrix exponentials
and quadrature, where the library has closed forms.
"""

import dataclasses
import functools
import itertools
from pathlib import Path
from typing import NamedTuple

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import scipy.integrate
import scipy.linalg
import scipy.stats
from oracles import GMM5, gate, optimised, passes

import jaxdiff as jd
from jaxdiff import latents, trace
from jaxdiff.data_likelihood import likelihood_report, likelihood_rows
from jaxdiff.distributions import BlockNormal
from jaxdiff.evaluation import evaluate
from jaxdiff.experiment import load_config
from jaxdiff.networks import MLP, UNet
from jaxdiff.processes.base import SDE, Augmented, Denoised, Process
from jaxdiff.solve import adaptive
from jaxdiff.training import fit, init_state, make_train_step

KEY = jax.random.key(0)
CLD = jd.cld()
OTHER = jd.cld(beta=2.5, mass=0.7, gamma=0.3)
every_process = pytest.mark.parametrize("process", [CLD, OTHER], ids=["paper", "other"])


# Compiled, because their many small operations are slow one by one.
conditional = jax.jit(lambda process, x0, t: process.marginal(x0, t))
transition = jax.jit(lambda process, z, s, t: process.transition(z, s, t))
posterior = jax.jit(lambda process, z, x0, t, s: process.posterior(z, x0, t, s))


# The oracle


@functools.cache
def linear(process):
    """F and G Gᵀ of dz = F z dt + G dw, read off drift and diffusion."""
    drift = lambda z: process.drift(z[:, None], jnp.float32(0.3))[:, 0]
    noise = np.asarray(process.diffusion(jnp.float32(0.3)), np.float64)
    return np.asarray(jax.jacobian(drift)(jnp.zeros(2)), np.float64), np.diag(noise**2)


def moments(process, t, s=0.0):
    """e^{F(t−s)} and ∫ e^{Fu} G Gᵀ e^{Fᵀu} du, the transition's mean and covariance."""
    f, gg = linear(process)
    nodes, weights = np.polynomial.legendre.leggauss(30)
    length = float(t) - float(s)
    flows = scipy.linalg.expm(f * length * (1.0 + nodes[:, None, None]) / 2.0)
    cov = np.einsum("n,nij,jk,nlk->il", weights, flows, gg, flows) * length / 2.0
    return scipy.linalg.expm(f * length), cov


def marginal(process, t):
    """m_t and Σ_t of q(z_t | x_0)."""
    flow, cov = moments(process, t)
    start = np.diag([0.0, float(process.gamma) * float(process.mass)])
    return flow[:, 0], flow @ start @ flow.T + cov


def covariance(normal):
    factor = np.asarray(normal.factor, np.float64)
    return np.einsum("ik...,jk...->ij...", factor, factor)


class Mixture(NamedTuple):
    """The exact denoiser of an isotropic Gaussian mixture: z_t is a mixture of Gaussians, too."""

    process: object
    mixture: object
    std: float

    def __call__(self, x, t):
        _, mean, var = jax.vmap(lambda z: self.moments(z, t))(x)
        return Denoised(mean, var)

    def log_prob(self, x, t):
        return jax.vmap(lambda z: self.moments(z, t)[0])(x)

    def moments(self, z, t):
        unit = self.process.marginal(jnp.ones(()), t)
        of_x0 = unit.mean
        cov = unit.factor @ unit.factor.T + self.std**2 * jnp.outer(of_x0, of_x0)
        centres = of_x0[None, :, None] * self.mixture.means[:, None, :]
        inverse = jnp.linalg.inv(cov)
        pull = jnp.sum(inverse[None, :, :, None] * (z[None] - centres)[:, None], axis=2)
        log_det = z.shape[1] * (jnp.log(jnp.linalg.det(cov)) + 2.0 * jnp.log(2.0 * jnp.pi))
        joint = -0.5 * (jnp.sum((z[None] - centres) * pull, axis=(1, 2)) + log_det)
        joint = joint + jnp.log(self.mixture.weights)
        means = self.mixture.means + self.std**2 * jnp.sum(of_x0[None, :, None] * pull, axis=1)
        average = lambda values: jnp.sum(jax.nn.softmax(joint)[:, None] * values, axis=0)
        mean, within = average(means), self.std**2 - self.std**4 * of_x0 @ inverse @ of_x0
        return jax.nn.logsumexp(joint), mean, within + average((means - mean[None]) ** 2)


def exact(process, mean=0.7, std=0.3):
    """The denoiser of two coordinates of data from N(mean, std²)."""
    return Mixture(process, jd.data.mixture.gaussian_mixture([1.0], [[mean] * 2], std), std)


# BlockNormal


MEAN = jnp.array([[0.3, -0.2, 1.0], [0.0, 0.4, -0.7]])
EVENT = jnp.array([[0.5, 0.2, -1.0], [1.0, -0.4, 0.3]])
FACTORS = {
    "shared": jnp.array([[0.6, 0.0], [-0.9, 0.4]]),
    "own": jnp.array(
        [[[0.6, 1.0, 0.2], [0.0] * 3], [[-0.9, 0.3, 0.5], [0.4, 2.0, 0.7]]], jnp.float32
    ),
}
every_factor = pytest.mark.parametrize("factor", FACTORS.values(), ids=FACTORS)


def reference(mean, factor):
    """The three coordinates as one six-dimensional normal of scipy."""
    factor = np.broadcast_to(np.asarray(factor).reshape(2, 2, -1), (2, 2, 3))
    full = np.zeros((2, 3, 2, 3))
    full[:, range(3), :, range(3)] = np.moveaxis(np.einsum("ikd,jkd->ijd", factor, factor), -1, 0)
    return scipy.stats.multivariate_normal(np.asarray(mean).ravel(), full.reshape(6, 6))


@every_factor
def test_block_normal_is_that_of_scipy(factor):
    normal = BlockNormal(MEAN, factor)
    expected = reference(MEAN, factor)
    np.testing.assert_allclose(normal.log_prob(EVENT), expected.logpdf(EVENT.ravel()), rtol=1e-5)
    np.testing.assert_allclose(
        normal.score(EVENT), jax.grad(normal.log_prob)(EVENT), rtol=1e-4, atol=1e-5
    )
    np.testing.assert_allclose(normal.from_noise(normal.noise(EVENT)), EVENT, atol=1e-6)


@every_factor
def test_block_normal_divergence_is_the_closed_form(factor):
    one, other = BlockNormal(MEAN, factor), BlockNormal(EVENT, jnp.array([[1.1, 0.0], [0.4, 0.8]]))
    p, q = reference(MEAN, factor), reference(EVENT, other.factor)
    shift = q.mean - p.mean
    expected = 0.5 * (
        np.trace(np.linalg.solve(q.cov, p.cov))
        + shift @ np.linalg.solve(q.cov, shift)
        - 6.0
        + np.linalg.slogdet(q.cov)[1]
        - np.linalg.slogdet(p.cov)[1]
    )
    np.testing.assert_allclose(one.kl(other), expected, rtol=1e-5)
    np.testing.assert_allclose(one.kl(one), 0.0, atol=1e-6)


def test_block_normal_samples_have_the_stated_moments():
    n = 100_000
    draws = jax.vmap(BlockNormal(MEAN, FACTORS["own"]).sample)(jax.random.split(KEY, n))
    expected = reference(MEAN, FACTORS["own"])
    draws = np.asarray(draws).reshape(n, 6)
    scale = np.sqrt(np.diag(expected.cov))
    np.testing.assert_array_less(np.abs(draws.mean(0) - MEAN.ravel()), 4.0 * scale / n**0.5)
    error = np.abs(np.cov(draws.T) - expected.cov) / np.outer(scale, scale)
    np.testing.assert_array_less(error, 4.0 * (2.0 / n) ** 0.5)


# The forward process


def test_protocols():
    for protocol in (SDE, Process, Augmented):
        assert isinstance(CLD, protocol)


@every_process
@pytest.mark.parametrize("t", [1e-5, 1e-4, 1e-3, 1e-2, 0.1, 0.4, 1.0])
def test_closed_forms_hold_in_float32_at_every_time(process, t):
    """Means, covariances and their Cholesky factors, against quadrature in float64."""
    t = np.float32(t)
    flow, cov = moments(process, t)
    forward = transition(process, jnp.eye(2), jnp.float32(0.0), jnp.float32(t))
    np.testing.assert_allclose(forward.mean, flow, rtol=2e-6)
    np.testing.assert_allclose(forward.factor, np.linalg.cholesky(cov), rtol=1e-5)
    of_x0, cov = marginal(process, t)
    found = conditional(process, jnp.ones(()), jnp.float32(t))
    np.testing.assert_allclose(found.mean, of_x0, rtol=2e-6)
    np.testing.assert_allclose(found.factor, np.linalg.cholesky(cov), rtol=1e-5)


@every_process
def test_moments_solve_their_equations(process):
    """C7: dm/dt = F m and dΣ/dt = F Σ + Σ Fᵀ + G Gᵀ, to 1e-5."""
    f, gg = linear(process)

    def rates(t, state):
        mean, cov = state[:2], state[2:].reshape(2, 2)
        return np.concatenate([f @ mean, (f @ cov + cov @ f.T + gg).ravel()])

    start = [0.8, 0.0, 0.0, 0.0, 0.0, float(process.gamma) * float(process.mass)]
    times = np.linspace(0.05, 1.0, 20)
    solution = scipy.integrate.solve_ivp(
        rates, (0.0, 1.0), start, t_eval=times, rtol=1e-10, atol=1e-12
    )
    found = jax.vmap(process.marginal, in_axes=(None, 0))(
        jnp.float32(0.8), jnp.asarray(times, jnp.float32)
    )
    np.testing.assert_allclose(found.mean, solution.y[:2].T, atol=1e-5)
    covs = jax.vmap(lambda factor: factor @ factor.T)(found.factor)
    np.testing.assert_allclose(covs.reshape(-1, 4), solution.y[2:].T, atol=1e-5)


def test_simulation_has_the_marginal():
    """C7: Heun's rule with additive noise from t = 0 to 0.3, within four standard errors."""
    process, n, steps, t = OTHER, 100_000, 200, 0.3
    h = t / steps
    z = jax.vmap(process.augment, in_axes=(0, None))(jax.random.split(KEY, n), jnp.full(1, 0.8))
    drift = jax.vmap(process.drift, in_axes=(0, None))

    def step(z, key):
        kick = jnp.sqrt(h) * process.diffusion(jnp.float32(0.0))[None, :, None]
        kick = kick * jax.random.normal(key, z.shape)
        slope = drift(z, jnp.float32(0.0))
        later = drift(z + h * slope + kick, jnp.float32(0.0))
        return z + 0.5 * h * (slope + later) + kick, None

    z, _ = jax.lax.scan(step, z, jax.random.split(jax.random.key(1), steps))
    z = np.asarray(z[:, :, 0], np.float64)
    found = conditional(process, jnp.float32(0.8), jnp.float32(t))
    cov = covariance(found)
    scale = np.sqrt(np.diag(cov))
    np.testing.assert_array_less(np.abs(z.mean(0) - found.mean), 4.0 * scale / n**0.5)
    error = np.abs(np.cov(z.T) - cov) / np.outer(scale, scale)
    np.testing.assert_array_less(error, 4.0 * (2.0 / n) ** 0.5)


def test_path_of_the_data_is_smooth_and_that_of_the_velocity_is_not():
    """C7: Σ(Δx)² falls as 1/n, Σ(Δv)² tends to ∫ 2Γβ dt."""
    variations = []
    for n in (64, 256, 1024):
        times = jnp.linspace(0.0, 1.0, n + 1)

        def step(z, point):
            key, s, t = point
            moved = CLD.transition(z, s, t).sample(key)
            return moved, (moved - z) ** 2

        keys = jax.random.split(jax.random.key(3), n)
        z0 = CLD.augment(KEY, jnp.zeros(200))
        _, squares = jax.lax.scan(step, z0, (keys, times[:-1], times[1:]))
        variations.append(squares.sum(0).mean(1))
    variation_x, variation_v = np.array(variations).T
    np.testing.assert_allclose(variation_x[:-1] / variation_x[1:], 4.0, rtol=0.1)
    expected = float(CLD.diffusion(jnp.float32(0.0))[1]) ** 2
    np.testing.assert_allclose(variation_v[-1], expected, rtol=0.02)


PAIRS = [(1.0, 0.9), (1.0, 1e-3), (0.5, 0.499), (0.1, 0.05), (1e-2, 1e-3), (1e-3, 1e-4)]


@every_process
@pytest.mark.parametrize("var", [0.0, 0.04])
def test_posterior_is_the_conditioned_joint_normal(process, var):
    """q(z_s | z_t, x_0) by conditioning q(z_s, z_t | x_0) in float64, integrated over x_0."""
    x0 = np.array([0.8, -1.1])
    noise = np.random.default_rng(0).standard_normal((2, 2))
    for t, s in np.float32(PAIRS):
        (m_t, cov_t), (m_s, cov_s) = marginal(process, t), marginal(process, s)
        gain = cov_s @ moments(process, t, s)[0].T @ np.linalg.inv(cov_t)
        z = np.float32(np.outer(m_t, x0) + np.linalg.cholesky(cov_t) @ noise)
        mean = np.outer(m_s, x0) + gain @ (z - np.outer(m_t, x0))
        unknown = m_s - gain @ m_t
        cov = cov_s - gain @ cov_t @ gain.T + var * np.outer(unknown, unknown)
        found = process.posterior(
            jnp.asarray(z),
            Denoised(jnp.float32(x0), jnp.float32(var)),
            jnp.float32(t),
            jnp.float32(s),
        )
        scale = np.sqrt(np.diag(cov))
        # Scores lose |x|·1e-7/τ; in units of the spread that is still little.
        np.testing.assert_allclose((found.mean - mean) / scale[:, None], 0.0, atol=2e-2)
        np.testing.assert_allclose(
            covariance(found) / np.outer(scale, scale), cov / np.outer(scale, scale), atol=1e-4
        )


def test_posterior_at_zero_is_the_data():
    """Σ_xx = 0 there: x is x̂_0, as uncertain as it is, and v what led to z_t."""
    z, x0 = jnp.array([[0.7, 0.1], [-0.2, 0.4]]), jnp.array([0.5, 0.3])
    t, s = jnp.float32(0.01), jnp.float32(0.0)
    draw = lambda key, var: posterior(CLD, z, Denoised(x0, var), t, s).sample(key)
    np.testing.assert_array_equal(draw(KEY, 0.0)[0], x0)
    keys = jax.random.split(KEY, 20_000)
    wide = jax.vmap(draw, in_axes=(0, None))(keys, jnp.array([0.04, 0.0]))
    np.testing.assert_allclose(wide[:, 0].std(0), [0.2, 0.0], atol=0.004)
    m_t, cov_t = marginal(CLD, t)
    gain = 0.01 * moments(CLD, t)[0].T[1] @ np.linalg.inv(cov_t)
    expected = gain @ (np.asarray(z) - np.outer(m_t, x0))
    # A larger x̂_0 asks for a lower velocity, so that the two are drawn together.
    np.testing.assert_allclose(wide[:, 1].mean(0), expected, atol=0.003)
    assert np.corrcoef(wide[:, 0, 0], wide[:, 1, 0])[0, 1] < -0.5


def test_posterior_takes_a_variance_for_each_coordinate():
    z, x0 = jnp.array([[0.7, 0.1], [-0.2, 0.4]]), jnp.array([0.5, 0.3])
    t, s = jnp.float32(0.3), jnp.float32(0.2)
    both = posterior(CLD, z, Denoised(x0, jnp.array([0.1, 0.02])), t, s)
    for i, var in enumerate((0.1, 0.02)):
        alone = posterior(CLD, z, Denoised(x0, var), t, s)
        np.testing.assert_allclose(both.factor[..., i], alone.factor, rtol=1e-5, atol=1e-7)


def test_velocity_is_the_marginals():
    x0, t = jnp.array([0.5, -0.7]), jnp.float32(0.1)
    joint, velocity = OTHER.marginal(x0, t), OTHER.added(x0, t)
    np.testing.assert_allclose(velocity.mean, joint.mean[1], rtol=1e-6)
    np.testing.assert_allclose(velocity.std**2, (joint.factor @ joint.factor.T)[1, 1], rtol=1e-5)


def test_density_of_the_starting_velocity():
    v = x0 = jnp.array([0.1, -0.2])
    expected = scipy.stats.norm.logpdf(v, 0.0, (0.3 * 0.7) ** 0.5).sum()
    np.testing.assert_allclose(OTHER.added(x0, jnp.float32(0.0)).log_prob(v), expected, rtol=1e-5)
    z = jax.vmap(OTHER.augment, in_axes=(0, None))(jax.random.split(KEY, 50_000), v)
    np.testing.assert_array_equal(z[:, 0], jnp.broadcast_to(v, (50_000, 2)))
    np.testing.assert_allclose(z[:, 1].std(0), (0.3 * 0.7) ** 0.5, rtol=0.015)


def test_prior_is_the_equilibrium():
    """Its score undoes the friction: the flow of N(0, I) × N(0, M) leaves it alone."""
    z = jnp.array([[0.7, 0.1], [-0.2, 0.4]])
    prior = OTHER.prior((2, 2))
    half = 0.5 * OTHER.diffusion(jnp.float32(0.5))[:, None] ** 2
    flow = lambda z: OTHER.drift(z, jnp.float32(0.5)) - half * prior.score(z)
    # dlog p/dt along the flow is −div, and both are 0: the motion is Hamilton's.
    np.testing.assert_allclose(jnp.sum(flow(z) * prior.score(z)), 0.0, atol=1e-5)
    np.testing.assert_allclose(jnp.trace(jax.jacobian(flow)(z).reshape(4, 4)), 0.0, atol=1e-5)
    with pytest.raises(ValueError, match=r"shape must be that of a state \(2, ...\)"):
        OTHER.prior((3, 2))


@pytest.mark.parametrize("bad", [{"beta": 0.0}, {"mass": -1.0}, {"gamma": 0.0}, {"gamma": 1.1}])
def test_bad_numbers_are_refused(bad):
    (name,) = bad
    with pytest.raises(ValueError, match=name):
        jd.cld(**bad)


# Scores and parameterizations


@jax.jit
def compared(process, denoise, z, t):
    """The score by differentiation and by Tweedie's formula, and the flow's velocity."""
    expected = jax.vmap(jax.grad(lambda z: denoise.moments(z, t)[0]))(z)
    x0 = denoise(z, t).mean
    score = jax.vmap(lambda z, x0: process.marginal(x0, t).score(z))(z, x0)
    return expected, score, jax.vmap(process.velocity, in_axes=(0, 0, None))(z, x0, t)


@every_process
@pytest.mark.parametrize("t", [1e-3, 0.05, 0.3, 1.0])
def test_score_and_flow_are_those_of_the_joint_density(process, t):
    """Tweedie's formula in both blocks, against the gradient of the exact log-density."""
    t, denoise = jnp.float32(t), exact(process)
    z = jax.vmap(conditional(process, jnp.array([0.5, 0.9]), t).sample)(jax.random.split(KEY, 50))
    expected, score, found = compared(process, denoise, z, t)
    # Near t = 0 float32 knows too few digits of x for the score of x; that of v is all one needs.
    for block in (0, 1) if t > 0.01 else (1,):
        size = float(jnp.abs(expected[:, block]).max())
        np.testing.assert_allclose(score[:, block], expected[:, block], atol=5e-3 * size)
    f, gg = linear(process)
    flow = jnp.einsum("ij,bjd->bid", jnp.float32(f), z)
    flow = flow - 0.5 * jnp.einsum("ij,bjd->bid", jnp.float32(gg), expected)
    np.testing.assert_allclose(found, flow, atol=5e-3 * float(jnp.abs(flow).max()))


@pytest.mark.parametrize("t", [1e-4, 1e-3, 0.05, 0.3, 1.0])
def test_parameterizations_name_the_data(t):
    """The true ε_v gives back x_0; the mixed score gives back −v/Σ_vv at F = 0."""
    t, x0 = jnp.float32(t), jnp.array([0.5, -1.2, 0.9])
    marginal = conditional(CLD, x0, t)
    noise = jax.random.normal(KEY, (2, 3))
    z = marginal.from_noise(noise)
    found = jd.velocity_noise().denoised(CLD, noise[1], z, t).mean
    np.testing.assert_allclose(found, x0, atol=1e-3)
    mixed = jd.mixed_score().denoised(CLD, jnp.zeros(3), z, t).mean
    of_x0 = conditional(CLD, jnp.ones(()), t).mean[1]
    total = of_x0**2 + covariance(marginal)[1, 1]
    score = conditional(CLD, mixed, t).score(z)[1]
    np.testing.assert_allclose(score, -z[1] / total, atol=0.02 * float(jnp.abs(score).max()))


@pytest.mark.parametrize("t", [1e-4, 0.05, 1.0])
def test_network_sees_unit_variance(t):
    t = jnp.float32(t)

    def inputs(key):
        data_key, noise_key = jax.random.split(key)
        z = CLD.marginal(jax.random.normal(data_key, (2,)), t).sample(noise_key)
        return jd.velocity_noise().inputs(CLD, z, t)

    seen, level = jax.vmap(inputs)(jax.random.split(KEY, 20_000))
    assert seen.shape == (20_000, 4)
    np.testing.assert_allclose(seen.std(0), 1.0, rtol=0.03)
    of_x0, cov = marginal(CLD, t)
    np.testing.assert_allclose(level[0], np.log(of_x0[0] ** 2 / cov[0, 0]) / 4.0, rtol=1e-4)


# Score matching


def affine(params, x, level):
    """The best model of Gaussian data at one time."""
    return x @ params["w"] + params["b"][None]


@functools.cache
def fitted(hybrid, t=0.005):
    """The exact minimiser of the loss over affine models, on one large batch, and the loss."""
    n, time = 200_000, lambda key, process, n: (jnp.full(n, t), jnp.ones(n))
    objective = jd.hybrid_score_matching(
        affine, CLD, jd.velocity_noise(), hybrid=hybrid, time_sampler=time
    )
    batch = {"x": 0.7 + 0.3 * jax.random.normal(jax.random.key(9), (n, 1))}
    pack = lambda params: {"w": params[:2, None], "b": params[2:]}

    @jax.jit
    def solve():
        loss = lambda params: objective(pack(params), KEY, batch)[0]
        mean = lambda params: loss(params).mean()
        # A quadratic has one minimum, a Newton step away.
        best = -jnp.linalg.solve(jax.hessian(mean)(jnp.zeros(3)), jax.grad(mean)(jnp.zeros(3)))
        return best, loss(best)

    best, loss = solve()
    return pack(best), np.asarray(loss, np.float64)


@pytest.mark.parametrize("hybrid", [True, False], ids=["hybrid", "denoising"])
def test_either_score_matching_learns_the_joint_score(hybrid):
    """C7: the minimiser is the score of the joint density, its covariance of x and v included."""
    params, _ = fitted(hybrid)
    t = jnp.float32(0.005)
    draw = lambda key, x0: CLD.marginal(x0, t).sample(key)
    z = jax.vmap(draw)(jax.random.split(KEY, 200), 0.7 + 0.3 * jax.random.normal(KEY, (200, 1)))
    learnt = jd.NetDenoiser(params, CLD, affine, jd.velocity_noise())(z, t).mean
    one = Mixture(CLD, jd.data.mixture.gaussian_mixture([1.0], [[0.7]], 0.3), 0.3)
    noise = lambda z, x0: CLD.marginal(x0, t).noise(z)[1]
    found, expected = jax.vmap(noise)(z, learnt), jax.vmap(noise)(z, one(z, t).mean)
    np.testing.assert_allclose(found, expected, atol=0.02 * np.abs(expected).max())


def test_hybrid_loss_varies_less():
    (_, hybrid), (_, denoising) = fitted(True), fitted(False)
    assert hybrid.mean() < 0.9 * denoising.mean()
    assert hybrid.var() < 0.8 * denoising.var()


def test_targets_at_the_smallest_times():
    """As t → 0 the variance of the hybrid target is 1, and that of the plain one 4/3."""
    for hybrid, expected in ((True, 1.0), (False, 4.0 / 3.0)):
        objective = jd.hybrid_score_matching(affine, CLD, jd.velocity_noise(), hybrid=hybrid)
        make = jax.vmap(objective.example, in_axes=(0, None, None))
        _, target = make(jax.random.split(KEY, 20_000), jnp.ones(1), jnp.float32(1e-4))
        np.testing.assert_allclose(target.var(), expected, rtol=0.03)


# Samplers


every_kind = pytest.mark.parametrize("kind", ["sscs", "ancestral"])

# CLD's noise reaches x by way of v: 5 % more of it moves the deviation by 0.0085 only. So there are
# enough samples for a standard error of 0.001.
MANY = 8000
CAUGHT = oracles.MUTANTS | {"late score": lambda found: found.std > 0.207}


def prepared(kind, mutant=None):
    """A sampler, an exact denoiser of GMM5 and a grid, with one mistake in one of them."""
    step, steps = {
        "sscs": (jd.SSCS(CLD), 400),
        "ancestral": (jd.Ancestral(CLD, final_noise=True), 200),
    }[kind]
    denoise, end = Mixture(CLD, GMM5, 0.2), 0.0
    if mutant == "late score":
        denoise = Late(denoise)
    if mutant == "wrong weights":
        flat = dataclasses.replace(GMM5, weights=jnp.full_like(GMM5.weights, 0.2))
        denoise = denoise._replace(mixture=flat)
    if mutant == "early stop":
        end = 0.025  # x is as noisy there as with VP at 0.02
    if mutant in ("loud noise", "no noise"):
        step = oracles.Loud(step, 1.05 if mutant == "loud noise" else 0.0)
    return step, denoise, jd.grids.quadratic(steps, end=end)


class Late(NamedTuple):
    """A mutant denoiser: the network is asked for ε_v at a time 0.01 too early."""

    denoise: Mixture

    def __call__(self, x, t):
        early = jnp.maximum(t - 0.01, 1e-3)

        def wrong(x, x0):
            noise = CLD.marginal(x0, early).noise(x)[1]
            return jd.velocity_noise().denoised(CLD, noise, x, t).mean

        return Denoised(jax.vmap(wrong)(x, self.denoise(x, early).mean))


def start(n, process=CLD, key=KEY, shape=(2, 2)):
    return jax.vmap(process.prior(shape).sample)(jax.random.split(key, n))


@every_kind
def test_exact_score_passes_the_gate(kind, gmm_data, gmm_null):
    step, denoise, grid = prepared(kind)
    z = jd.sample(step, denoise, grid, KEY, start(MANY))
    found = gate(z[:, 0], GMM5, gmm_data)
    assert passes(found, gmm_null), found


@pytest.mark.parametrize("mutant", CAUGHT)
@every_kind
def test_gate_catches_the_mutants(kind, mutant, gmm_data, gmm_null):
    step, denoise, grid = prepared(kind, mutant)
    z = jd.sample(step, denoise, grid, KEY, start(MANY))
    found = gate(z[:, 0], GMM5, gmm_data)
    assert not passes(found, gmm_null), found
    assert CAUGHT[mutant](found), found


@pytest.mark.parametrize("solver", [diffrax.Euler(), diffrax.ShARK()], ids=["euler", "shark"])
def test_reverse_sde_passes_the_gate(solver, gmm_data, gmm_null):
    grid = jd.grids.quadratic(50 if isinstance(solver, diffrax.ShARK) else 400, end=1e-3)
    z = jd.reverse_sde(CLD, Mixture(CLD, GMM5, 0.2), KEY, start(2000), grid, solver=solver)
    found = gate(z[:, 0], GMM5, gmm_data)
    assert passes(found, gmm_null), found


def test_probability_flow_passes_the_gate_and_comes_back(gmm_data, gmm_null):
    denoise, z1 = Mixture(CLD, GMM5, 0.2), start(2000)
    z = jd.probability_flow(CLD, denoise, z1, 1.0, 1e-3)
    found = gate(z[:, 0], GMM5, gmm_data)
    assert passes(found, gmm_null), found
    back = jd.probability_flow(CLD, denoise, z, 1e-3, 1.0)
    assert float(jnp.median(jnp.abs(back - z1))) < 1e-2


def test_log_likelihood_of_the_joint_space():
    """Against the exact density of (x, v) at t0, for Gaussian data."""
    denoise, t0 = exact(CLD), jnp.float32(1e-3)
    x0 = 0.7 + 0.3 * jax.random.normal(KEY, (64, 2))
    z = jax.vmap(CLD.augment)(jax.random.split(KEY, 64), x0)
    found = jd.log_likelihood(CLD, denoise, z, t0=t0)
    np.testing.assert_allclose(found.value, denoise.log_prob(z, t0), atol=1e-2)


def test_errors_of_the_joint_likelihood():
    """Probes are unbiased, with the error that they state; so is the solver's, at 1e-6.

    The flow is stiff where noise sets in: more coarsely solved, it errs by more than is stated.
    """
    with jax.enable_x64(True):
        denoise, t0 = Mixture(CLD, GMM5, 0.2), jnp.asarray(1e-3)
        x0 = jnp.asarray(GMM5.sample(jax.random.key(7), 200), float)
        place = lambda key, x: CLD.marginal(x, t0).sample(key)
        z = jax.vmap(place)(jax.random.split(KEY, 200), x0)
        solve = functools.partial(jd.log_likelihood, CLD, denoise, t0=t0)
        exact, fine = (solve(z, controller=adaptive(tolerance)) for tolerance in (1e-8, 1e-6))
        error = np.abs(np.asarray(fine.value - exact.value))
        assert np.mean(error <= fine.solver_error) >= 0.9
        assert float(fine.solver_error.mean()) < 10 * error.mean()
        found = solve(z, key=KEY, probes=4, probe=trace.rademacher, controller=adaptive(1e-6))
        noise = np.asarray(found.value - exact.value)
        assert abs(noise.mean()) < 3 * noise.std() / 200**0.5
        stated = np.sqrt(np.mean(np.asarray(found.stderr) ** 2))
        np.testing.assert_allclose(stated, np.sqrt((noise**2).mean()), rtol=0.2)


def test_latents_of_data_with_velocities():
    """They are the prior's white noise, go back, and on the way between two of them are data."""
    denoise, x0 = Mixture(CLD, GMM5, 0.2), GMM5.sample(jax.random.key(7), 2000)
    t0 = jnp.float32(1e-3)
    place = lambda key, x: CLD.marginal(x, t0).sample(key)
    z0 = jax.vmap(place)(jax.random.split(KEY, 2000), x0)
    z = latents.encode(CLD, denoise, z0, t0=t0)
    noise = np.asarray(jax.vmap(CLD.prior((2, 2)).noise)(z), np.float64).reshape(2000, 4)
    assert np.abs(noise.mean(0)).max() < 3.5 / 2000**0.5
    assert (np.abs(np.cov(noise.T) - np.eye(4)) < 3.5 * np.sqrt((1 + np.eye(4)) / 2000)).all()
    assert latents.typicality(CLD, z, pooled=True).radius_p_value > 0.01
    assert latents.typicality(CLD, 1.05 * z, pooled=True).radius_p_value < 0.01
    back = latents.decode(CLD, denoise, z, t0=t0)
    assert float(jnp.abs(back - z0).max()) <= 5e-3
    path = latents.interpolate(CLD, denoise, z0[:50], z0[50:100], jnp.linspace(0, 1, 3), t0=t0)
    np.testing.assert_allclose(path[0], z0[:50], atol=5e-3)
    np.testing.assert_allclose(path[-1], z0[50:100], atol=5e-3)
    distance = jnp.linalg.norm(path[1, :, 0, None] - GMM5.means[None], axis=-1).min(axis=1)
    assert float(jnp.mean(distance < 3 * 0.2)) > 0.9


@pytest.mark.parametrize("t0", [1e-3, 3e-3, 1e-2])
def test_joint_bound_is_tight_early(t0):
    """Early, what the model knows of v given x is what the process says of it, so the bound is
    log p(x) itself; what one velocity's density says otherwise, and the blur, grow with t0."""
    x0 = 0.7 + 0.3 * jax.random.normal(KEY, (256, 2))
    found = jd.joint_bound(CLD, exact(CLD), jax.random.key(3), x0, t0=t0)
    truth = jax.scipy.stats.norm.logpdf(x0, 0.7, 0.3).sum(1)
    np.testing.assert_allclose(found.value.mean(), truth.mean(), atol=0.003 + 3 * t0)
    np.testing.assert_allclose(found.value, truth, atol=0.05 + 50 * t0)


def test_joint_bound_is_a_bound():
    """Late, it is loose, on average below the density of x at that time."""
    x0, t0 = 0.7 + 0.3 * jax.random.normal(KEY, (256, 2)), jnp.float32(0.2)
    found = jd.joint_bound(CLD, exact(CLD), jax.random.key(3), x0, t0=t0)
    marginal = CLD.marginal(jnp.array([0.7]), t0)
    std = jnp.hypot(0.3 * CLD.marginal(jnp.ones(1), t0).mean[0, 0], marginal.factor[0, 0])
    gap = jax.scipy.stats.norm.logpdf(x0, marginal.mean[0, 0], std).sum(1) - found.value
    assert float(gap.mean()) > 3 * float(gap.std()) / 16


class Still(jd.CLD):
    """A process whose transitions draw no noise, to see the mean of a linear sampler."""

    def transition(self, x, s, t):
        normal = super().transition(x, s, t)
        return BlockNormal(normal.mean, jnp.zeros_like(normal.factor))


jax.tree_util.register_pytree_node(
    Still,
    lambda process: ((process.beta, process.mass, process.gamma), None),
    lambda _, numbers: Still(*numbers),
)


@jax.jit
def advance(step, denoise, z, t, s):
    return step.update(jax.random.split(KEY, len(z)), z, step.init(z), t, s, denoise)[0]


def walk(step, denoise, grid, z):
    """Steps down a grid of any length in one compiled step."""
    for t, s in itertools.pairwise(grid):
        z = advance(step, denoise, z, t, s)
    return z


def test_sscs_is_of_first_order():
    """The mean it reaches at 0.1, from one state at 0.9, tends to E[z_s | z_t] as 1/n."""
    step, denoise = jd.SSCS(Still(4.0, 0.25, 0.04)), exact(CLD)
    x0, cov, t, s = 0.7, 0.3**2, 0.9, 0.1
    (m_t, cov_t), (m_s, cov_s) = marginal(CLD, t), marginal(CLD, s)
    cov_t, cov_s = cov_t + cov * np.outer(m_t, m_t), cov_s + cov * np.outer(m_s, m_s)
    gain = cov_s @ moments(CLD, t, s)[0].T @ np.linalg.inv(cov_t)
    z = start(20)
    mean = m_s[None, :, None] * x0 + gain @ (np.asarray(z) - m_t[None, :, None] * x0)
    errors = []
    for n in (50, 100):
        found = walk(step, denoise, jnp.linspace(t, s, n + 1), z)
        errors.append(np.median(np.abs(found - mean)))
    assert -1.15 < np.log2(errors[1] / errors[0]) < -0.85, errors


def test_sscs_is_exact_in_equilibrium():
    """N(0, I) data with γ = 1 are at rest: the kick is zero, and a single step is the motion."""
    process = Still(4.0, 0.25, 1.0)
    denoise = exact(process, mean=0.0, std=1.0)
    z = start(20)
    found = walk(jd.SSCS(process), denoise, jnp.array([0.8, 0.3]), z)
    flow = moments(process, 0.8, 0.3)[0] * np.array([[1.0, -1.0], [-1.0, 1.0]])
    np.testing.assert_allclose(found, flow @ np.asarray(z), atol=2e-4)


SAMPLERS = {"sscs": jd.SSCS, "ancestral": jd.Ancestral}
every_sampler = pytest.mark.parametrize("make", SAMPLERS.values(), ids=SAMPLERS)


POINT = jax.tree_util.Partial(lambda x, t: Denoised(jnp.full_like(x[:, 0], 0.4)))


@every_sampler
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_point_mass_is_found_in_any_number_of_steps(make, steps):
    z = walk(make(CLD), POINT, jd.grids.uniform(steps), start(5))
    np.testing.assert_allclose(z[:, 0], 0.4, atol=1e-6)
    assert np.isfinite(z).all()


@every_sampler
def test_gradients_reach_the_state_and_the_process(make):
    """Also through the last step, to Σ_xx = 0."""

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1))
    def gradient(process, z):
        denoise = lambda x, t: Denoised(0.4 + 0.1 * x[:, 0])
        return jnp.sum(advance(make(process), jax.tree_util.Partial(denoise), z, 1.0, 0.0) ** 2)

    for leaf in jax.tree.leaves(gradient(CLD, start(5))):
        assert np.isfinite(leaf).all()
        assert np.abs(leaf).max() > 0.0


@every_sampler
def test_one_network_call_a_step(make):
    calls = []

    def denoise(x, t):
        calls.append(t)
        return Denoised(x[:, 0])

    keys, time = jax.random.split(KEY, 3), jnp.float32(0.5)
    update = lambda z: make(CLD).update(keys, z, None, time, 0.5 * time, denoise)[0]
    assert jax.eval_shape(update, start(3)).shape == (3, 2, 2)
    assert len(calls) == 1


def test_a_network_with_half_the_outputs_is_a_denoiser():
    net = MLP(width=16, depth=2, out_features=3)
    z = start(4, shape=(2, 3))
    params = net.init(KEY, jnp.zeros((1, 6)), jnp.zeros(1))
    denoise = jd.NetDenoiser(params, CLD, net.apply, jd.mixed_score())
    assert denoise(z, jnp.float32(0.5)).mean.shape == (4, 3)
    objective = jd.hybrid_score_matching(net.apply, CLD, jd.mixed_score())
    loss, _ = objective(params, KEY, {"x": z[:, 0]})
    assert loss.shape == (4,)
    assert np.isfinite(loss).all()
    images, unet = jnp.zeros((2, 8, 8, 2)), UNet(width=8, blocks=1, out_channels=1)
    out, _ = jax.eval_shape(unet.init_with_output, KEY, images, jnp.zeros(2))
    assert out.shape == (2, 8, 8, 1)


# The configs


def config(name, **options):
    module = load_config(Path(__file__).parents[1] / "configs" / f"{name}.py")
    return module.experiment(module.Config(**options))


def test_toy_config_learns():
    """In 1500 steps it is better than the best Gaussian, 4.2548 nats, though a bound."""
    small = {"width": 64, "waves": 16, "condition_width": 32, "depth": 2, "learning_rate": 4e-3}
    experiment = config(
        "cld_toy2d", steps=1500, ema_decay=0.99, eval_points=500, eval_samples=1000, **small
    )
    state = init_state(jax.jit(experiment.init)(KEY), experiment.optimizer, jax.random.key(1))
    untrained = experiment.evaluate(state.ema_params, KEY)["samples"]["energy_distance"]
    step = make_train_step(experiment.objective, experiment.optimizer, ema_decay=0.99)
    with optimised():
        state = fit(step, state, experiment.batches(), steps=1500, progress=False, eval_every=1500)
    report = evaluate(experiment, state.ema_params, KEY)
    assert report["likelihood"]["entropy"] < report["likelihood"]["nll_nats"] < 4.2548
    assert report["samples"]["energy_distance"] < 0.2 * untrained
    states, times = experiment.trajectory(state.ema_params, KEY, 500)
    assert states.shape == (8, 500, 2)
    assert (times[0], times[-1]) == (1.0, 0.0)
    np.testing.assert_allclose(jnp.std(states[0]), 2.0, rtol=0.1)  # N(0, I), in the data's unit


def test_digits_config_reports_a_bound():
    """Untrained, its bound is worse than one Gaussian's 2.967 bits/dim, and finite."""
    experiment = config(
        "cld_digits",
        width=8,
        multipliers=(1,),
        attention=(),
        sampler_steps=4,
        eval_samples=16,
        eval_images=32,
        tolerance=1e-2,
    )
    params = jax.jit(experiment.init)(KEY)
    part = experiment.likelihood
    images = part.examples("test", KEY)
    report = likelihood_report(part, images, likelihood_rows(part, params, images, KEY))
    assert 2.967 < report["bits_per_dim"] < 20.0
    assert report["examples"] == 32
    states, _ = experiment.trajectory(params, KEY, 2)
    assert states.shape == (8, 2, 8, 8, 1)
    assert np.isfinite(experiment.sample(params, KEY, 3)).all()
    assert float(experiment.validate(params)["loss"]) > 0.0
