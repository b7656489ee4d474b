"""Samplers with noise, correctors, Heun and EDM, their combinations, and DDIM's inverse."""

import itertools
import math
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import GMM5, MUTANTS, SCHEDULES, GaussianData, gate, mutated, passes

import jaxdiff as jd
from jaxdiff.processes.base import Denoised, example_keys
from jaxdiff.processes.cld import cld
from jaxdiff.samplers.base import run
from jaxdiff.samplers.predictor_corrector import Corrector
from jaxdiff.schedules import time_of_log_snr

KEY = jax.random.key(0)
VP = jd.Gaussian(SCHEDULES["linear_beta"])
VE = jd.Gaussian(SCHEDULES["exploding"])
FLOW = jd.Gaussian(SCHEDULES["straight"])
DENOISE = GMM5.denoiser(VP)


def start(process, shape, key=KEY):
    return process.prior(shape).sample(key)


def steps_of(process) -> dict[str, Any]:
    """Every sampler of this file, for a Gaussian process."""
    return {
        "euler": jd.EulerMaruyama(process),
        "heun": jd.Heun(process),
        "churn": jd.EDMSampler(process, churn=0.4, s_noise=1.01),
        "corrected": jd.PredictorCorrector(jd.Heun(process), jd.Langevin(process, steps=2)),
        "corrected first": jd.PredictorCorrector(
            jd.DDIM(process), jd.Langevin(process), corrector_first=True
        ),
        "annealed": jd.AnnealedLangevin(process, steps=3),
        "switch": jd.switch(jd.EulerMaruyama(process), jd.EDMSampler(process), 0.5),
    }


def counted(denoise, times):
    """A denoiser that notes the time of each call."""

    def call(x, t):
        jax.debug.callback(lambda t: times.append(float(t)), t)
        return denoise(x, t)

    return call


# The gate


def uniform(steps):
    return lambda end: jd.grids.uniform(steps, end=0.0 if end is None else end)


def warped(grid, steps, last):
    return lambda end: grid(VP, steps, end=last if end is None else end, to_zero=end is None)


NO_MISTAKES = [
    ("heun", "loud noise"),
    ("annealed", "late score"),  # p at t − 0.01 is only one more level on the way down
]
GATED = {
    "euler": (jd.EulerMaruyama(VP), uniform(400)),
    "heun": (jd.Heun(VP), uniform(100)),
    "churn": (jd.EDMSampler(VP, churn=0.4), warped(jd.grids.karras, 100, 1e-3)),
    "corrected": (
        jd.PredictorCorrector(jd.EulerMaruyama(VP), jd.Langevin(VP)),
        uniform(300),
    ),
    "corrected first": (
        jd.PredictorCorrector(jd.DDIM(VP), jd.Langevin(VP), corrector_first=True),
        uniform(300),
    ),
    "annealed": (
        jd.AnnealedLangevin(VP, steps=20),
        warped(jd.grids.uniform_log_snr, 200, 1e-4),
    ),
    "switch": (jd.switch(jd.EulerMaruyama(VP), jd.EDMSampler(VP), 0.05), uniform(300)),
}
MUTATED = [
    (name, mutant)
    for name, mutant in itertools.product(GATED, MUTANTS)
    if mutant != "no noise" and (name, mutant) not in NO_MISTAKES
]


@pytest.mark.parametrize("name", GATED)
def test_exact_score_passes_the_gate(name, gmm_data, gmm_null):
    step, make_grid = GATED[name]
    x = jd.sample(step, DENOISE, make_grid(None), KEY, start(VP, (2000, 2)))
    found = gate(x, GMM5, gmm_data)
    assert passes(found, gmm_null), found


@pytest.mark.parametrize(("name", "mutant"), MUTATED)
def test_gate_catches_the_mutants(name, mutant, gmm_data, gmm_null):
    step, make_grid = GATED[name]
    step, denoise, grid = mutated(mutant, step, VP, make_grid)
    found = gate(jd.sample(step, denoise, grid, KEY, start(VP, (2000, 2))), GMM5, gmm_data)
    assert not passes(found, gmm_null), found
    assert MUTANTS[mutant](found), found


def test_annealed_langevin_sees_a_strong_score(gmm_data, gmm_null):
    """The one mutant of its own: with a score 15 % too strong the walk settles in p^1.15."""

    def strong(x, t):
        alpha, _ = VP.schedule(t)
        x0 = DENOISE(x, t).mean
        return Denoised(x0 + 0.15 * (x0 - x / alpha))

    step, make_grid = GATED["annealed"]
    found = gate(
        jd.sample(step, strong, make_grid(None), KEY, start(VP, (2000, 2))), GMM5, gmm_data
    )
    assert not passes(found, gmm_null), found
    assert found.std < 0.193, found


@pytest.mark.parametrize("name", ["churn on EDM", "corrected on VE", "corrected on sub-VP"])
def test_other_schedules_pass_the_gate(name, gmm_data, gmm_null):
    kind, schedule = name.split(" on ")
    process = jd.Gaussian(SCHEDULES[{"EDM": "edm", "VE": "exploding", "sub-VP": "subvp"}[schedule]])
    step = steps_of(process)["churn" if kind == "churn" else "corrected first"]
    grid = jd.grids.uniform(60 if kind == "churn" else 300)
    x = jd.sample(step, GMM5.denoiser(process), grid, KEY, start(process, (2000, 2)))
    found = gate(x, GMM5, gmm_data)
    assert passes(found, gmm_null), found


# Orders


class Path(NamedTuple):
    """A step that takes its noise from one Brownian path [n + 1, b, d] of n equal times."""

    step: Any
    path: Any
    span: tuple[float, float]

    def init(self, x):
        return self.step.init(x)

    def update(self, key, x, state, t, s, denoise):
        first, last = self.span
        index = lambda t: jnp.round((first - t) / (first - last) * (len(self.path) - 1)).astype(int)
        noise = (self.path[index(s)] - self.path[index(t)]) / jnp.sqrt(t - s)
        # The increments travel as keys, bit for bit, into the one place where noise is drawn.
        told = lambda key, shape, dtype: jax.lax.bitcast_convert_type(key, dtype)
        with mock.patch.object(jax.random, "normal", told):
            key = jax.lax.bitcast_convert_type(noise, jnp.uint32)
            return self.step.update(key, x, state, t, s, denoise)


def test_orders_of_euler_maruyama():
    """B4: on the reverse of an Ornstein–Uhlenbeck process, along shared Brownian paths.

    Weak order 1. The strong order is ½ for noise that depends on the state; the noise of a
    diffusion model does not, and there Euler–Maruyama is Milstein's method and of strong order 1.
    """
    process = jd.Gaussian(jd.linear_beta(2.0, 2.0))
    denoise, span, finest, n = GaussianData(process, 0.7, 0.3), (1.0, 0.1), 2048, 4000
    dw = jax.random.normal(KEY, (finest, n, 1)) * ((span[0] - span[1]) / finest) ** 0.5
    path = jnp.concatenate([jnp.zeros((1, n, 1)), jnp.cumsum(dw, axis=0)])
    x = start(process, (n, 1), jax.random.key(1))

    def solve(steps):
        grid = jd.grids.uniform(steps, start=span[0], end=span[1])
        return jd.sample(Path(jd.EulerMaruyama(process), path, span), denoise, grid, KEY, x)

    exact, runs = solve(finest), [solve(steps) for steps in (16, 32, 64)]
    strong = [float(jnp.mean(jnp.abs(x - exact))) for x in runs]
    weak = [float(jnp.abs(jnp.mean((x - 0.5) ** 2 - (exact - 0.5) ** 2))) for x in runs]
    np.testing.assert_allclose(np.diff(np.log2(strong)), -1.0, atol=0.15)
    np.testing.assert_allclose(np.diff(np.log2(weak)), -1.0, atol=0.15)


EDM = jd.Gaussian(SCHEDULES["edm"])
HEUNS = {
    "heun": (jd.Heun(VP), lambda n: jd.grids.uniform(n, end=0.02), (40, 80, 160)),
    "edm": (jd.EDMSampler(EDM), jd.grids.uniform, (20, 40, 80)),
}


@pytest.mark.parametrize("name", HEUNS)
def test_heun_is_of_second_order(name):
    """B27: by the median error on GMM5."""
    step, make_grid, counts = HEUNS[name]
    denoise, x = GMM5.denoiser(step.process), start(step.process, (500, 2))
    solve = lambda n: jd.sample(step, denoise, make_grid(n), KEY, x)
    exact = solve(4 * counts[-1])
    errors = [float(jnp.median(jnp.linalg.norm(solve(n) - exact, axis=1))) for n in counts]
    assert np.all(np.diff(np.log2(errors)) < -1.7), errors


# Euler–Maruyama


def test_euler_maruyama_is_the_written_rule():
    """x − (f − g² s) h + g √h z of the VP process, from β alone."""
    x, t, s = start(VP, (50, 2)), jnp.float32(0.4), jnp.float32(0.35)
    keys = example_keys(KEY, 50)
    found, _ = jd.EulerMaruyama(VP).update(keys, x, None, t, s, DENOISE)
    beta = 0.1 + 0.4 * 19.9
    score = jax.vmap(GMM5.diffused(*VP.schedule(t)).score)(x)
    noise = jax.vmap(lambda key: jax.random.normal(key, (2,)))(keys)
    expected = x + 0.05 * (0.5 * beta * x + beta * score) + (0.05 * beta) ** 0.5 * noise
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("s", [0.0, 0.01])
def test_euler_maruyama_s_last_step_may_leave_its_noise_out(s):
    x, keys = start(VP, (50, 2)), example_keys(KEY, 50)

    def step(keys, **options):
        euler = jd.EulerMaruyama(VP, **options)
        return euler.update(keys, x, None, jnp.float32(0.02), jnp.float32(s), DENOISE)[0]

    quiet, noisy = step(keys, final_noise=False), step(keys)
    if s > 0.0:
        np.testing.assert_array_equal(quiet, noisy)
        return
    other = example_keys(jax.random.key(7), 50)
    np.testing.assert_array_equal(quiet, step(other, final_noise=False))
    noise = jax.vmap(lambda key: jax.random.normal(key, (2,)))(keys)
    spread = math.sqrt(0.02 * (0.1 + 0.02 * 19.9))
    np.testing.assert_allclose(noisy - quiet, spread * noise, rtol=1e-3, atol=1e-4)


def test_euler_without_noise_is_exact_on_straight_lines():
    """η = 0 on the straight path to one point: one step gets there, from α = 0 to σ = 0."""
    point = lambda x, t: Denoised(jnp.full_like(x, 0.4))
    for step in (jd.EulerMaruyama(FLOW, eta=0.0), jd.Heun(FLOW)):
        x = jd.sample(step, point, jd.grids.uniform(1), KEY, start(FLOW, (5, 3)))
        np.testing.assert_allclose(x, 0.4, atol=1e-6)


# EDM


def test_edm_is_the_papers_algorithm():
    """Algorithm 2 of Karras et al., line by line on y = x/α, with the same noise."""
    churn, s_min, s_max, s_noise, n = 0.3, 1.5, 20.0, 1.02, 8
    grid = jd.grids.karras(VP, n)
    keys = example_keys(KEY, 64)
    x = start(VP, (64, 2))
    step = jd.EDMSampler(VP, churn=churn, s_min=s_min, s_max=s_max, s_noise=s_noise)
    found = jd.sample(step, DENOISE, grid, KEY, x)

    @jax.jit
    def denoised(y, level):
        alpha, sigma = VP.schedule(time_of_log_snr(VP.schedule, -2 * jnp.log(level)))
        return jax.vmap(lambda y: GMM5.denoise(alpha * y, alpha, sigma)[0])(y)

    levels = [sigma / alpha for alpha, sigma in map(VP.schedule, grid)]
    y = x / VP.schedule(grid[0])[0]
    for index, (now, after) in enumerate(itertools.pairwise(levels)):
        gamma = churn if s_min <= now <= s_max else 0.0
        step_keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, index)
        noise = s_noise * jax.vmap(lambda key: jax.random.normal(key, (2,)))(step_keys)
        raised = now * (1 + gamma)
        y = y + jnp.sqrt(raised**2 - now**2) * noise
        slope = (y - denoised(y, raised)) / raised
        following = y + (after - raised) * slope
        if after > 0:
            second = (following - denoised(following, after)) / after
            following = y + (after - raised) * 0.5 * (slope + second)
        y = following
    np.testing.assert_allclose(found, y, rtol=2e-3, atol=2e-3)


def test_edm_is_deterministic_outside_its_window():
    x, grid = start(VP, (8, 2)), jd.grids.karras(VP, 12)
    plain = jd.sample(jd.EDMSampler(VP), DENOISE, grid, KEY, x)
    closed = jd.EDMSampler(VP, churn=0.4, s_max=0.0)
    np.testing.assert_array_equal(jd.sample(closed, DENOISE, grid, KEY, x), plain)
    late = jd.EDMSampler(VP, churn=0.4, s_min=1e4)
    np.testing.assert_array_equal(jd.sample(late, DENOISE, grid, KEY, x), plain)
    assert not np.allclose(jd.sample(jd.EDMSampler(VP, churn=0.4), DENOISE, grid, KEY, x), plain)


def test_churn_is_cut():
    """No step more than doubles the noise's variance."""
    x, grid = start(VP, (8, 2)), jd.grids.karras(VP, 12)
    most, more = (
        jd.sample(jd.EDMSampler(VP, churn=churn), DENOISE, grid, KEY, x)
        for churn in (2**0.5 - 1, 3.0)
    )
    np.testing.assert_array_equal(most, more)


# Langevin


def test_langevin_is_a_walk_along_the_score():
    """x + h ∇log p + √(2h) z with h = 2 snr² σ², from the mixture's own score."""
    x, t, snr = start(VP, (50, 2)), jnp.float32(0.3), 0.3
    keys = example_keys(KEY, 50)
    found = jd.Langevin(VP, snr).correct(keys, x, t, DENOISE)
    alpha, sigma = VP.schedule(t)
    size = 2 * snr**2 * sigma**2
    score = jax.vmap(GMM5.diffused(alpha, sigma).score)(x)
    draw = lambda key: jax.random.normal(jax.random.fold_in(key, 0), (2,))
    expected = x + size * score + jnp.sqrt(2 * size) * jax.vmap(draw)(keys)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("process", [VP, VE, cld()], ids=["VP", "VE", "CLD"])
def test_langevin_settles_where_it_says(process):
    """For known x_0, in N(m, Σ/(1 − ε/2)): the whole Σ, whatever the kind of process."""
    n, t, snr = 20_000, jnp.float32(0.3), 0.25
    point = jnp.full((1,), 0.4)
    target = process.marginal(point, t)
    keys = example_keys(KEY, n)
    x = jax.vmap(target.sample)(keys)
    wrong = 2.0 * x - 1.0
    denoise = lambda x, t: Denoised(jnp.broadcast_to(point, (n, 1)))
    x = jd.Langevin(process, snr, steps=60).correct(keys, wrong, t, denoise)
    # Whitened by the marginal, the states are standard normal but for the bias.
    noise = np.asarray(jax.vmap(target.noise)(x)).reshape(n, -1)
    variance = 1.0 / (1.0 - snr**2)
    np.testing.assert_allclose(noise.mean(0), 0.0, atol=4 * (variance / n) ** 0.5)
    expected = variance * np.eye(noise.shape[1])
    np.testing.assert_allclose(np.cov(noise.T), expected, atol=4 * variance * (2 / n) ** 0.5)


def test_langevin_bias_shrinks_where_the_data_dominate():
    """N(μ, s²) data: the variance v of p_t is too large by 1/(1 − ε σ²/2v)."""
    n, t, snr = 20_000, jnp.float32(0.1), 0.5
    alpha, sigma = VP.schedule(t)
    total = (alpha * 0.3) ** 2 + sigma**2
    keys = example_keys(KEY, n)
    x = alpha * 0.7 + jnp.sqrt(total) * jax.random.normal(KEY, (n, 1))
    x = jd.Langevin(VP, snr, steps=40).correct(keys, x, t, GaussianData(VP, 0.7, 0.3))
    expected = total / (1.0 - snr**2 * sigma**2 / total)
    np.testing.assert_allclose(x.var(), expected, rtol=4 * (2 / n) ** 0.5)
    assert float(expected / total) > 1.1


def test_annealed_langevin_walks_at_the_next_level():
    """x/α is carried over, and the walk is at s; the last step is x̂_0, of t."""
    x, (t, s), keys = start(VP, (6, 2)), jnp.float32([0.4, 0.3]), example_keys(KEY, 6)
    step = jd.AnnealedLangevin(VP, snr=0.3, steps=5)
    found, _ = step.update(keys, x, None, t, s, DENOISE)
    carried = VP.schedule(s)[0] * (x / VP.schedule(t)[0])
    expected = jd.Langevin(VP, snr=0.3, steps=5).correct(keys, carried, s, DENOISE)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    found, _ = step.update(keys, x, None, t, jnp.float32(0.0), DENOISE)
    np.testing.assert_allclose(found, DENOISE(x, t).mean, rtol=1e-5, atol=1e-6)


def test_annealing_finds_the_weights_that_langevin_alone_does_not(gmm_data):
    """B5: the failure that noise at many levels was invented for; within modes both are right."""
    denoise, times = GMM5.denoiser(VE), jd.grids.uniform(50)
    annealed = jd.sample(
        jd.AnnealedLangevin(VE, steps=40), denoise, times, KEY, start(VE, (2000, 2))
    )
    smallest = time_of_log_snr(VE.schedule, jnp.float32(-2 * np.log(0.05)))
    alone = jd.Langevin(VE, snr=0.5, steps=1000).correct(
        example_keys(KEY, 2000), 2.0 * jax.random.normal(KEY, (2000, 2)), smallest, denoise
    )
    annealed, alone = gate(annealed, GMM5, gmm_data), gate(alone, GMM5, gmm_data)
    assert annealed.weights <= 0.05, annealed
    assert alone.weights > 0.07, alone
    assert abs(annealed.std - 0.2) < 0.01
    assert abs(alone.std - 0.2) < 0.02


# Predictor–corrector


class CoupledMixture(NamedTuple):
    """The exact denoiser of GMM5 for a process whose states are pairs (x, v)."""

    process: Any

    def __call__(self, z, t):
        marginal = self.process.marginal(jnp.ones(1), t)
        of_x0, spread = marginal.mean[:, 0], marginal.factor @ marginal.factor.T
        total = jnp.linalg.inv(spread + 0.2**2 * jnp.outer(of_x0, of_x0))

        def one(z):
            rest = z[None] - of_x0[None, :, None] * GMM5.means[:, None, :]
            fits = jnp.log(GMM5.weights) - 0.5 * jnp.einsum("kid,ij,kjd->k", rest, total, rest)
            means = GMM5.means + 0.2**2 * jnp.einsum("i,ij,kjd->kd", of_x0, total, rest)
            return jax.nn.softmax(fits) @ means

        return Denoised(jax.vmap(one)(z))


CORRECTABLE = {
    "VP": (VP, DENOISE),
    "VE": (VE, GMM5.denoiser(VE)),
    "subVP": (sub := jd.Gaussian(SCHEDULES["subvp"]), GMM5.denoiser(sub)),
    "CLD": (cld(), CoupledMixture(cld())),
}


@pytest.mark.parametrize("name", CORRECTABLE)
@pytest.mark.parametrize("corrector_first", [False, True])
def test_corrector_mends_a_wrong_marginal(name, corrector_first, gmm_data):
    """B18: from states 30 % too wide at t = 0.5, one code for scalar and coupled processes."""
    process, denoise = CORRECTABLE[name]
    x0 = GMM5.sample(jax.random.key(1), 2000)
    draw = lambda key, x0: process.marginal(x0, jnp.float32(0.5)).sample(key)
    wide = 1.3 * jax.vmap(draw)(example_keys(jax.random.key(2), 2000), x0)
    grid = jd.grids.quadratic(60, start=0.5, end=1e-3)

    def error(step):
        x = jd.sample(step, denoise, grid, KEY, wide)
        return abs(gate(x if x.ndim == 2 else x[:, 0], GMM5, gmm_data).std - 0.2)

    predictor = jd.Heun(process)
    assert error(predictor) > 0.03
    correctors = [jd.Langevin(process, steps=2)]
    if name != "CLD":  # its noise is no multiple of the identity, as momentum asks here
        correctors.append(jd.UnderdampedLangevin(process))
    for corrector in correctors:
        mended = jd.PredictorCorrector(predictor, corrector, corrector_first)
        assert error(mended) <= 0.5 * error(predictor), corrector


def test_coupled_process_passes_the_gate_by_euler(gmm_data, gmm_null):
    """g(t) of CLD is a pair: noise on the velocity alone, and the same code."""
    process = cld()
    z = jax.vmap(lambda key: process.prior((2, 2)).sample(key))(example_keys(KEY, 2000))
    grid = jd.grids.quadratic(400, end=1e-3)
    x = jd.sample(jd.EulerMaruyama(process), CoupledMixture(process), grid, KEY, z)[:, 0]
    found = gate(x, GMM5, gmm_data)
    assert passes(found, gmm_null), found


def test_order_of_predictor_and_corrector():
    """By hand: the corrector at s after the predictor, or at t before it, each with own keys."""
    x, (t, s), keys = start(VP, (6, 2)), jnp.float32([0.4, 0.3]), example_keys(KEY, 6)
    predictor, corrector = jd.DDIM(VP, 1.0), jd.Langevin(VP)
    split = jax.vmap(jax.random.split)(keys)
    predict = lambda x: predictor.update(split[:, 0], x, None, t, s, DENOISE)[0]
    correct = lambda x, t: corrector.correct(split[:, 1], x, t, DENOISE)
    for first, expected in ((False, correct(predict(x), s)), (True, predict(correct(x, t)))):
        step = jd.PredictorCorrector(predictor, corrector, corrector_first=first)
        found, _ = step.update(keys, x, step.init(x), t, s, DENOISE)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert isinstance(corrector, Corrector)
    assert not isinstance(predictor, Corrector)


# Switches and windows


def test_switch_is_either_sampler_at_its_ends():
    """B21: 1 is all ODE and 0 all SDE."""
    sde, ode, grid = jd.EulerMaruyama(VP), jd.Heun(VP), jd.grids.uniform(20)
    x = start(VP, (8, 2))
    for time, expected in ((1.0, ode), (0.0, sde)):
        found = jd.sample(jd.switch(sde, ode, time), DENOISE, grid, KEY, x)
        plain = jd.sample(expected, DENOISE, grid, KEY, x)
        np.testing.assert_allclose(found, plain, rtol=1e-6, atol=1e-6)


def test_half_and_half_passes_the_gate(gmm_data, gmm_null):
    """B21: SDE to t = 0.5, ODE from there."""
    step = jd.switch(jd.EulerMaruyama(VP), jd.Heun(VP), 0.5)
    x = jd.sample(step, DENOISE, jd.grids.uniform(200), KEY, start(VP, (2000, 2)))
    found = gate(x, GMM5, gmm_data)
    assert passes(found, gmm_null), found


class Counting(NamedTuple):
    """A step that counts how often it was used since it began."""

    def init(self, x):
        return jnp.zeros((), int)

    def update(self, key, x, state, t, s, denoise):
        return x, state + 1


def test_window_is_left_closed_and_forgets():
    """low < t ≤ high of the step's start; whoever's turn comes again begins anew."""
    step = jd.Window(Counting(), Counting(), low=0.25, high=0.5)
    x = jnp.zeros((1, 2))
    for end, expected in ((0.5, (0, 2)), (0.25, (1, 0)), (0.0, (0, 1))):
        grid = jd.grids.uniform(round((1 - end) / 0.25), end=end)
        _, state = run(step, DENOISE, grid, KEY, x)
        assert tuple(map(int, state)) == expected


# DDIM's inverse


@pytest.mark.parametrize("schedule", ["linear_beta", "exploding", "subvp", "cosine"])
@pytest.mark.parametrize("iterations", [1, 3])
def test_inversion_of_gaussian_data_is_a_product_of_factors(schedule, iterations):
    """D6: every step is affine, and so is their product, taken in double precision."""
    process, grid = jd.Gaussian(SCHEDULES[schedule]), jd.grids.uniform(25)
    x = 0.7 + 0.3 * jax.random.normal(KEY, (16, 2))
    denoise = GaussianData(process, 0.7, 0.3)
    found = jd.invert(process, denoise, grid, x, iterations=iterations)
    expected = np.asarray(x, np.float64)
    alphas, sigmas = np.asarray([process.schedule(t) for t in grid[::-1]], np.float64).T
    for (a, b), (p, q) in zip(itertools.pairwise(alphas), itertools.pairwise(sigmas), strict=True):
        guess = expected
        for _ in range(iterations):
            noise = (guess - b * 0.7) * q / ((b * 0.3) ** 2 + q**2)
            guess = b * (expected / a + (q / b - p / a) * noise)
        expected = guess
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-4 * np.abs(expected).max())


def test_round_trip_is_of_first_order_and_exact_in_the_limit():
    """D6: encode and sample on one grid; the error halves with the step, or vanishes."""
    x = GMM5.sample(jax.random.key(6), 500)

    def error(steps, iterations=1):
        grid = jd.grids.quadratic(steps)
        latent = jd.invert(VP, DENOISE, grid, x, iterations=iterations)
        back = jd.sample(jd.DDIM(VP), DENOISE, grid, KEY, latent)
        return float(jnp.median(jnp.linalg.norm(back - x, axis=1)))

    slopes = np.diff(np.log2([error(steps) for steps in (40, 80, 160)]))
    assert np.all((slopes > -1.3) & (slopes < -0.75)), slopes
    assert error(40, iterations=20) < 1e-4
    assert error(160) ** 2 < 1e-2


def test_latents_are_the_prior():
    latent = jd.invert(VP, DENOISE, jd.grids.uniform_log_snr(VP, 100), GMM5.sample(KEY, 2000))
    np.testing.assert_allclose(latent.mean(0), 0.0, atol=3 / 2000**0.5)
    np.testing.assert_allclose(jnp.cov(latent.T), jnp.eye(2), atol=0.08)


def test_inversion_reaches_pure_noise():
    """From σ = 0 to α = 0, in a few steps."""
    for steps in (1, 2, 3):
        x = jd.invert(FLOW, GMM5.denoiser(FLOW), jd.grids.uniform(steps), GMM5.sample(KEY, 9))
        assert np.all(np.isfinite(x))
    grid, data = jd.grids.uniform(20), GMM5.sample(KEY, 100)
    x = jd.invert(FLOW, GMM5.denoiser(FLOW), grid, data, iterations=50)
    back = jd.sample(jd.DDIM(FLOW), GMM5.denoiser(FLOW), grid, KEY, x)
    np.testing.assert_allclose(back, data, atol=2e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"iterations": 0}, "iterations must be at least 1, got 0"),
        ({"grid": jnp.array([0.0, 1.0])}, "grid must fall"),
    ],
)
def test_bad_inversions_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        jd.invert(VP, DENOISE, **{"grid": jd.grids.uniform(3), **options}, x=jnp.zeros((2, 2)))


# What every sampler must do


ENDS = jnp.array([[1.0, 0.0], [1.0, 0.5], [0.5, 0.0], [0.7, 0.3]])


@pytest.mark.parametrize("name", ["euler", "heun", "churn", "corrected", "annealed"])
@pytest.mark.parametrize("process", [VP, FLOW], ids=["VP", "flow"])
def test_steps_and_their_gradients_are_finite(name, process):
    """The only step, a first, a last and an inner one: from α(1) = 0 where the process has it, to
    σ(0) = 0. All at once, so that both sides of every `cond` run and neither may poison the other.
    """
    x, step, denoise = start(process, (3, 2)), steps_of(process)[name], GMM5.denoiser(process)

    def total(x, ends):
        keys = example_keys(KEY, 3)
        return step.update(keys, x, step.init(x), ends[0], ends[1], denoise)[0].sum()

    found = jax.jit(jax.vmap(jax.value_and_grad(total), in_axes=(None, 0)))(x, ENDS)
    assert all(np.all(np.isfinite(leaf)) for leaf in found)


@pytest.mark.parametrize("name", ["churn", "corrected first", "annealed"])
@pytest.mark.parametrize("process", [VP, FLOW], ids=["VP", "flow"])
def test_point_mass_is_found_in_few_steps(name, process):
    """Those that end on x̂_0 end on it exactly after 1, 2 or 3 steps, from α = 0 too."""
    x, step = start(process, (5, 3)), steps_of(process)[name]
    point = lambda x, t: Denoised(jnp.full_like(x, 0.4))
    update = jax.jit(lambda x, t, s: step.update(example_keys(KEY, 5), x, None, t, s, point)[0])
    for steps in (1, 2, 3):
        found = x
        for t, s in itertools.pairwise(jd.grids.uniform(steps)):
            found = update(found, t, s)
        np.testing.assert_allclose(found, 0.4, atol=1e-5)


CALLS = {  # of n steps, the last to σ = 0
    "euler": lambda n: n,
    "heun": lambda n: 2 * n - 1,
    "churn": lambda n: 2 * n - 1,
    "corrected": lambda n: (2 + 2) * (n - 1) + 1,
    "corrected first": lambda n: 2 * n,
    "annealed": lambda n: 3 * (n - 1) + 1,
    "switch": lambda n: n // 2 + 2 * (n // 2) - 1,
}


@pytest.mark.parametrize("name", CALLS)
def test_network_is_called_as_often_as_said(name):
    """And never at σ = 0, where a network knows of no noise level."""
    times = []
    denoise = counted(DENOISE, times)
    jd.sample(steps_of(VP)[name], denoise, jd.grids.uniform(8), KEY, start(VP, (4, 2)))
    jax.effects_barrier()
    assert len(times) == CALLS[name](8)
    assert min(times) > 0.0


def test_no_second_call_from_pure_noise():
    """From α = 0 a step of EDM is Euler's."""
    times = []
    denoise = counted(GMM5.denoiser(FLOW), times)
    jd.sample(jd.EDMSampler(FLOW, churn=0.2), denoise, jd.grids.uniform(4), KEY, jnp.ones((4, 2)))
    jax.effects_barrier()
    assert len(times) == 2 * 4 - 2


def test_samples_do_not_depend_on_the_batch_around_them():
    """All that draw noise, in turn: each example from its own key alone."""
    samplers = steps_of(VP)
    step = jd.switch(
        jd.switch(samplers["euler"], samplers["churn"], 0.8), samplers["annealed"], 0.4
    )
    step = jd.PredictorCorrector(step, jd.Langevin(VP, steps=2))
    grid, x = jd.grids.uniform(6), start(VP, (6, 2))
    whole = jd.sample(step, DENOISE, grid, KEY, x)
    part = jd.sample(step, DENOISE, grid, example_keys(KEY, 6)[2:5], x[2:5])
    np.testing.assert_allclose(part, whole[2:5], rtol=1e-4, atol=1e-5)


def test_no_sweep_compiles_anew():
    traces = []

    def denoise(x, t):
        traces.append(None)
        return DENOISE(x, t)

    def sweep(number):
        process = jd.Gaussian(jd.linear_beta(0.1, 10.0 + number))
        churned = jd.EDMSampler(process, number, 0.1 * number, 10 * number, 1 + 0.1 * number)
        steps = [
            jd.switch(jd.EulerMaruyama(process, number), churned, 0.5 * number),
            jd.PredictorCorrector(jd.AnnealedLangevin(process, number), jd.Langevin(process)),
        ]
        return [jd.sample(s, denoise, jd.grids.uniform(5), KEY, jnp.ones((2, 2))) for s in steps]

    first = sweep(0.3)
    count = len(traces)
    for one, other in zip(first, sweep(0.4), strict=True):
        assert not np.allclose(one, other)
    assert len(traces) == count > 0
