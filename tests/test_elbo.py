"""The variational bound against exact log-likelihoods, closed-form gaps and the chain itself."""

import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import scipy.stats
from oracles import SCHEDULES

import jaxdiff as jd
from jaxdiff.objectives.elbo import discrete_decoder, elbo
from jaxdiff.processes.base import Denoised

KEY = jax.random.key(0)
VP = jd.Gaussian(SCHEDULES["linear_beta"])
MEAN, STD = 0.7, 0.3
DATA = MEAN + STD * jax.random.normal(KEY, (4000, 2))
LOG_PROB = scipy.stats.norm.logpdf(np.asarray(DATA), MEAN, STD).sum(1)


class Exact(NamedTuple):
    """Mean and variance of x_0 for data from N(MEAN, STD²)."""

    process: jd.Gaussian

    def __call__(self, x, t):
        alpha, sigma = self.process.schedule(t)
        var = (STD * sigma) ** 2 / ((alpha * STD) ** 2 + sigma**2)
        return Denoised(oracles.GaussianData(self.process, MEAN, STD)(x, t).mean, var)


def gap(process, grid, std):
    """E[log p − bound] per coordinate, where the model takes the data's deviation for `std`."""
    moments = [tuple(map(float, process.schedule(jnp.float32(t)))) for t in grid]
    alpha, sigma = moments[0]
    total = (alpha * STD) ** 2 + sigma**2
    gap = 0.5 * ((total + (alpha * MEAN) ** 2) / sigma**2 - 1 - np.log(total / sigma**2))
    for (alpha, sigma), (alpha_s, sigma_s) in itertools.pairwise(moments):
        lost = 1 - (alpha / sigma) ** 2 * (sigma_s / alpha_s) ** 2
        of_x, of_x0 = alpha / alpha_s * (sigma_s / sigma) ** 2, alpha_s * lost
        left = lambda v: v * sigma**2 / (alpha**2 * v + sigma**2)  # noqa: B023
        model = sigma_s**2 * lost + of_x0**2 * left(std**2)
        truth, shift = sigma_s**2 * lost + of_x0**2 * left(STD**2), 0.0
        if (alpha_s, sigma_s) == moments[-1]:
            # The last distribution is one of x_s, and is asked for x_0: another where σ(s) > 0.
            truth, total = left(STD**2), (alpha * STD) ** 2 + sigma**2
            shift = ((1 - of_x0) * alpha * STD**2 - of_x * total) ** 2 / total
            shift += ((1 - of_x0 - of_x * alpha) * MEAN) ** 2
        gap += 0.5 * ((truth + shift) / model - 1 - np.log(truth / model))
    return gap


@pytest.mark.parametrize("name", ["linear_beta", "subvp", "exploding", "straight", "user"])
def test_bound_is_tight_for_a_chain_that_is_exact(name):
    """Gaussian data, exact moments: the gap is the prior's alone, in one step and in twelve.

    And that of the last step where σ(0) > 0, which has its closed form too.
    """
    process = jd.Gaussian(SCHEDULES[name])
    for steps in (1, 12):
        grid = jd.grids.uniform(steps, start=oracles.start_of(name))
        found = elbo(process, Exact(process), KEY, DATA, grid)
        np.testing.assert_allclose(
            found.value, -(found.prior + found.diffusion + found.reconstruction), rtol=1e-5
        )
        assert np.all(found.prior >= -1e-5)
        missing = LOG_PROB - np.asarray(found.value)
        error = missing.std() / len(DATA) ** 0.5
        expected = 2 * gap(process, grid, STD)
        np.testing.assert_allclose(missing.mean(), expected, rtol=1e-3, atol=3 * error)
        if name != "exploding":
            assert expected < 2e-4 or name == "user"


def test_gap_of_another_variance_is_its_closed_form_and_vanishes():
    """A6: β for data that are not N(0, I): the bound lies below, by the written sum; → 0 in T."""
    gaps = []
    for steps in (4, 16, 64):
        grid = jd.grids.uniform(steps)
        exact = elbo(VP, Exact(VP), KEY, DATA, grid).value
        found = elbo(VP, jd.UnitVariance(VP, Exact(VP)), KEY, DATA, grid).value
        below = np.asarray(exact - found)
        gaps.append(2 * (gap(VP, grid, 1.0) - gap(VP, grid, STD)))
        error = below.std() / len(DATA) ** 0.5
        np.testing.assert_allclose(below.mean(), gaps[-1], atol=3 * error + 1e-4)
        assert error < 0.1 * gaps[0]
    assert gaps[2] < 0.4 * gaps[1] < 0.2 * gaps[0]


def test_bound_is_the_expected_log_ratio_of_the_chain():
    """A6: ΣKL + L_0 + L_T = E_q[log q(x_{1:T} | x_0) − log p(x_{0:T})], with a crude denoiser."""
    process = jd.Gaussian(SCHEDULES["subvp"])
    crude = lambda x, t: Denoised(jnp.tanh(x), 0.1 + 0.2 * jnp.cos(x) ** 2)
    grid, n = jnp.array([1.0, 0.6, 0.35, 0.2, 0.0]), 20_000
    x0 = jnp.full((n, 1), 0.4)
    found = elbo(process, crude, KEY, x0, grid)

    def chain(key):
        """One path up the chain, by its one-step kernels, and its log-ratio."""
        x, ratio = x0[0], 0.0
        for i, noise_key in enumerate(jax.random.split(key, 4)):
            s, t = grid[4 - i], grid[3 - i]
            forward = process.transition(x, s, t)
            y = forward.sample(noise_key)
            backward = process.posterior(y, crude(y, t), t, s)
            ratio += forward.log_prob(y) - backward.log_prob(x)
            x = y
        return ratio - process.prior((1,)).log_prob(x)

    sampled = np.asarray(jax.vmap(chain)(jax.random.split(jax.random.key(1), n)))
    error = np.hypot(sampled.std(), np.asarray(found.value).std()) / n**0.5
    np.testing.assert_allclose(-found.value.mean(), sampled.mean(), atol=3 * error)
    assert error < 0.03


def test_weights_of_the_bound_times_the_noise_error():
    """A8: with β̃ each L_i is DDPM's weight times ‖ε̂ − ε‖²; here both from the same draws."""
    process = jd.Gaussian(SCHEDULES["from_betas"])
    guess = lambda x, t: Denoised(0.8 * x)
    t, s = 0.5, 0.499
    found = elbo(process, guess, KEY, DATA, jnp.array([t, s, 0.4]))
    products = np.cumprod(1 - oracles.BETAS)
    beta, product, before = oracles.BETAS[499], products[499], products[498]
    weight = beta**2 * (1 - product) / (2 * beta * (1 - before) * (1 - beta) * (1 - product))
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.fold_in(KEY, i), 0))(jnp.arange(4000))
    noise = jax.vmap(lambda key: jax.random.normal(key, (2,)))(keys)
    x = product**0.5 * DATA + (1 - product) ** 0.5 * noise
    error = (x - product**0.5 * 0.8 * x) / (1 - product) ** 0.5 - noise
    np.testing.assert_allclose(found.diffusion, weight * (error**2).sum(1), rtol=5e-3, atol=1e-5)


# Discrete data


def test_discretized_gaussian_is_the_mass_of_the_cells():
    """Against SciPy's normal CDF; it sums to one over the levels, whatever the Gaussian."""
    levels, decoder = (2 * np.arange(17) + 1) / 17 - 1, discrete_decoder(17)
    for mean, std in ((0.1, 0.3), (-0.95, 0.02), (1.3, 1.0), (0.3, 50.0), (2 / 17, 0.1)):
        law = jd.Normal(jnp.float32(mean), std)
        log_mass = np.array([decoder(jnp.float32(level), law) for level in levels])
        np.testing.assert_allclose(np.exp(log_mass).sum(), 1.0, rtol=1e-5)
        edges = np.concatenate([[-np.inf], levels[:-1] + 1 / 17, [np.inf]])
        masses = np.diff(scipy.stats.norm.cdf(edges, mean, std))
        seen = masses > 1e-12
        np.testing.assert_allclose(np.exp(log_mass)[seen], masses[seen], rtol=2e-4)


def test_discretized_gaussian_never_fails():
    """A point, or a miss by thousands of deviations: finite, with a finite gradient."""
    decoder = discrete_decoder(256)
    run = lambda mean, std: decoder(jnp.float32(0.5), jd.Normal(mean, std))
    for mean, std in ((0.5, 0.0), (0.1, 0.0), (-1.0, 1e-4), (0.5, 1e3)):
        value, gradient = jax.value_and_grad(run, (0, 1))(jnp.float32(mean), jnp.float32(std))
        assert np.all(np.isfinite([value, *gradient]))
    assert run(jnp.float32(0.5), jnp.float32(0.0)) == 0.0
    np.testing.assert_allclose(
        discrete_decoder(256, floor=0.1)(jnp.float32(0.5), jd.Normal(jnp.float32(0.4), 0.0)),
        run(jnp.float32(0.4), jnp.float32(0.1)),
    )


def test_bound_of_discrete_data_reaches_their_entropy():
    """Four levels of known masses, exact moments: never above the log-mass, near it for many T."""
    masses = np.array([0.1, 0.2, 0.3, 0.4])
    levels = jnp.array([-0.75, -0.25, 0.25, 0.75])
    x0 = jax.random.choice(KEY, levels, (4000, 1), p=jnp.asarray(masses))
    log_mass = np.log(masses)[np.searchsorted(levels, np.asarray(x0[:, 0]))]

    def exact(x, t):
        alpha, sigma = VP.schedule(t)
        squares = -0.5 * ((x - alpha * levels[None, :]) / sigma) ** 2
        shares = jax.nn.softmax(squares + jnp.log(jnp.asarray(masses, x.dtype))[None, :])
        mean = shares @ levels
        return Denoised(mean[:, None], (shares @ levels**2 - mean**2)[:, None] + 1e-6)

    below, decoder = [], discrete_decoder(4)
    for steps in (10, 100):
        grid = jd.grids.uniform_log_snr(VP, steps)
        missing = log_mass - np.asarray(elbo(VP, exact, KEY, x0, grid, decoder=decoder).value)
        below.append(missing.mean())
        assert below[-1] > -3 * missing.std() / len(x0) ** 0.5
    assert below[0] > 0.2
    assert below[1] < 0.05


# What it costs, and what it refuses


def test_one_program_and_one_network_call_a_step():
    calls, traces = [], []

    def apply(params, x, level):
        traces.append(None)
        jax.debug.callback(lambda: calls.append(None))
        return params * x

    for beta_max, scale in ((20.0, 0.5), (10.0, 0.3)):
        process = jd.Gaussian(jd.linear_beta(0.1, beta_max))
        net = jd.NetDenoiser(jnp.float32(scale), process, apply, jd.epsilon())
        elbo(process, jd.UnitVariance(process, net), KEY, DATA[:4], jd.grids.uniform(7))
    jax.effects_barrier()
    assert len(traces) == 1
    assert len(calls) == 2 * 7


def test_bound_does_not_depend_on_the_batch_around_it_and_has_a_gradient():
    grid = jd.grids.uniform(5)
    denoise = jd.UnitVariance(VP, Exact(VP))
    whole = elbo(VP, denoise, KEY, DATA[:6], grid).value
    half = elbo(VP, denoise, KEY, DATA[:3], grid).value
    np.testing.assert_allclose(half, whole[:3], rtol=1e-5)

    def loss(scale):
        net = lambda x, t: Denoised(scale * x, 0.1 * scale)
        return elbo(VP, net, KEY, DATA[:6], grid, decoder=discrete_decoder(17)).value.sum()

    for value in (0.1, 1.0):
        gradient = jax.grad(loss)(jnp.float32(value))
        difference = (loss(jnp.float32(1.01 * value)) - loss(jnp.float32(0.99 * value))) / (
            0.02 * value
        )
        np.testing.assert_allclose(gradient, difference, rtol=0.02)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: discrete_decoder(1), "levels"),
        (lambda: discrete_decoder(17, floor=-1.0), "floor"),
        (lambda: elbo(VP, Exact(VP), KEY, DATA, jnp.array([0.0, 1.0])), "grid"),
    ],
)
def test_bad_numbers_are_refused_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_states_that_are_more_than_data_need_a_decoder():
    """A process with a velocity has no density of the data alone in its last step."""
    process = jd.cld()
    denoise = lambda z, t: jd.Denoised(z[:, 0], 0.1)
    with pytest.raises(ValueError, match=r"decoder must be given .* \(2, 4\) and data \(4,\)"):
        elbo(process, denoise, jax.random.key(0), jnp.zeros((3, 4)), jd.grids.uniform(4))
