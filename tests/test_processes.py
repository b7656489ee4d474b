"""Schedules and the Gaussian process against Bayes, moment equations and the written formulas."""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import scipy.stats
from oracles import BETAS, EXPLODING, PRESERVING, SCHEDULES

import jaxdiff as jd
from jaxdiff.processes.base import SDE, Process, example_keys
from jaxdiff.schedules import log_snr, time_of_log_snr

every_schedule = pytest.mark.parametrize("name", SCHEDULES)


def process_of(name):
    return jd.Gaussian(SCHEDULES[name])


@every_schedule
def test_steps_compose_to_the_marginal(name):
    """A1: T one-step kernels are the closed-form kernel, in mean and variance."""
    process = process_of(name)
    with jax.enable_x64(True):
        times = jnp.linspace(0.0, oracles.start_of(name), 1001)
        alpha_0, sigma_0 = process.schedule(times[0])

        def step(carry, pair):
            mean, var = carry
            kernel = process.transition(jnp.ones(1), pair[0], pair[1])
            factor = kernel.mean[0]
            return (factor * mean, factor**2 * var + kernel.std**2), None

        start = (alpha_0, sigma_0**2)
        (mean, var), _ = jax.lax.scan(step, start, (times[:-1], times[1:]))
        alpha, sigma = process.schedule(times[-1])
        np.testing.assert_allclose(mean, alpha, rtol=1e-5)
        np.testing.assert_allclose(var, sigma**2, rtol=1e-5)


@every_schedule
def test_simulated_chain_has_the_marginal(name):
    """A1: 1e5 simulated chains lie within four standard errors of q(x_t | x_0)."""
    process = process_of(name)
    times = jnp.linspace(0.0, 0.6, 11)
    x0 = jnp.full(1, 0.8)

    def chain(key):
        keys = jax.random.split(key, 11)
        x = process.marginal(x0, times[0]).sample(keys[0])
        for i in range(10):
            x = process.transition(x, times[i], times[i + 1]).sample(keys[i + 1])
        return x

    n = 100_000
    x = jax.jit(jax.vmap(chain))(jax.random.split(jax.random.key(1), n))
    marginal = process.marginal(x0, times[-1])
    np.testing.assert_allclose(x.mean(), marginal.mean[0], atol=4 * marginal.std / n**0.5)
    np.testing.assert_allclose(x.std(), marginal.std, rtol=4 / (2 * n) ** 0.5)


def test_ends_of_the_schedules():
    """A2, B3: what is left of the data at t = 1, and the prior that follows."""
    for name, schedule in SCHEDULES.items():
        alpha, sigma = schedule(jnp.ones(()))
        prior = jd.Gaussian(schedule).prior((3,))
        np.testing.assert_allclose(prior.std, sigma)
        np.testing.assert_array_equal(prior.mean, np.zeros(3))
        if name in EXPLODING:
            assert alpha == 1.0
        else:
            assert alpha**2 < 1e-3
    np.testing.assert_allclose(SCHEDULES["from_betas"](jnp.ones(()))[0] ** 2, 4.04e-5, rtol=2e-3)
    np.testing.assert_allclose(SCHEDULES["exploding"](jnp.ones(()))[1], 50.0, rtol=1e-5)
    np.testing.assert_allclose(SCHEDULES["edm"](jnp.ones(()))[1], 80.0, rtol=1e-5)
    np.testing.assert_allclose(SCHEDULES["edm"](jnp.zeros(()))[1], 0.002, rtol=1e-5)


@pytest.mark.parametrize("name", PRESERVING)
def test_preserving_schedules_preserve_variance(name):
    alpha, sigma = jax.vmap(SCHEDULES[name])(jnp.linspace(0.0, 1.0, 101))
    np.testing.assert_allclose(alpha**2 + sigma**2, 1.0, atol=1e-6)


def test_schedules_are_the_written_formulas():
    """Each schedule against its paper's formula, in float64 NumPy."""
    t = np.linspace(0.01, 0.99, 50)
    integral = 0.1 * t + 0.5 * t**2 * 19.9
    angle = (t * (1.0 - 1e-9) + 0.008) / 1.008 * np.pi / 2
    warp = (0.002 ** (1 / 7) + t * (80 ** (1 / 7) - 0.002 ** (1 / 7))) ** 7
    expected = {
        "linear_beta": (np.exp(-0.5 * integral), np.sqrt(1 - np.exp(-integral))),
        "subvp": (np.exp(-0.5 * integral), 1 - np.exp(-integral)),
        "exploding": (np.ones(50), 0.01 * 5000**t),
        "edm": (np.ones(50), warp),
        "straight": (1 - t, t),
    }
    for name, (alpha, sigma) in expected.items():
        found = jax.vmap(SCHEDULES[name])(jnp.asarray(t, jnp.float32))
        np.testing.assert_allclose(found[0], alpha, rtol=1e-5)
        np.testing.assert_allclose(found[1], sigma, rtol=1e-5)
    # The finite end moves the paper's cosine by less than its last α.
    alpha, _ = jax.vmap(SCHEDULES["cosine"])(jnp.asarray(t, jnp.float32))
    np.testing.assert_allclose(alpha, np.cos(angle) / np.cos(0.008 / 1.008 * np.pi / 2), atol=6e-4)


def test_ddpm_table_is_met_at_its_own_times():
    times = jnp.arange(1, 1001) / 1000
    alpha, _ = jax.vmap(SCHEDULES["from_betas"])(times)
    np.testing.assert_allclose(alpha**2, np.cumprod(1 - BETAS), rtol=1e-4)


def test_rough_ddpm_tables_stay_monotone():
    """However the betas jump, α falls, σ rises and neither is ever NaN."""
    for betas in ([0.01, 0.5], [0.01, 0.02, 0.03, 0.9], [0.5, 0.001, 0.7, 0.001]):
        alpha, sigma = jax.vmap(jd.from_betas(betas))(jnp.linspace(0.0, 1.0, 201))
        assert np.all(np.diff(alpha) <= 0)
        assert np.all(np.diff(sigma) >= 0)
        np.testing.assert_allclose(alpha[-1] ** 2, np.prod(1 - np.array(betas)), rtol=1e-5)


def test_discrete_chain_tends_to_the_continuous_process():
    """B1: the marginals of DDPM with T steps converge to the VP process as 1/T."""
    beta = lambda t: 0.1 + t * 19.9
    times = jnp.linspace(0.1, 0.9, 9)
    exact = jax.vmap(SCHEDULES["linear_beta"])(times)[0]
    steps = np.array([50, 100, 200, 400])
    errors = []
    for count in steps:
        table = jd.from_betas(beta(np.arange(1, count + 1) / count) / count)
        errors.append(float(jnp.abs(jax.vmap(table)(times)[0] - exact).max()))
    order = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert 0.85 < order < 1.15


@every_schedule
def test_moment_equations_give_the_marginal(name):
    """B2: integrating dm = f m dt, dv = (2 f v + g²) dt gives the stated mean and std."""
    process = process_of(name)
    begin, end = 0.02, 0.9
    with jax.enable_x64(True):

        def moments(t, y, _):
            rate = process.drift(jnp.ones(()), t)
            return jnp.array([rate * y[0], 2 * rate * y[1] + process.diffusion(t) ** 2])

        start = process.schedule(jnp.asarray(begin))
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(moments),
            diffrax.Dopri8(),
            begin,
            end,
            1e-4,
            jnp.array([start[0], start[1] ** 2]),
            stepsize_controller=diffrax.PIDController(rtol=1e-9, atol=1e-9),
            max_steps=100_000,
        )
        alpha, sigma = process.schedule(jnp.asarray(end))
        np.testing.assert_allclose(solution.ys[-1][0], alpha, rtol=1e-5)
        np.testing.assert_allclose(solution.ys[-1][1] ** 0.5, sigma, rtol=1e-5)


def test_drift_and_diffusion_are_the_written_ones():
    """The derived f and g against the papers' formulas."""
    t = jnp.linspace(0.05, 0.95, 19)
    x = jnp.array([1.7])
    beta = 0.1 + t * 19.9
    expected = {
        "linear_beta": (-0.5 * beta, beta),
        "subvp": (-0.5 * beta, beta * (1 - jnp.exp(-2 * (0.1 * t + 9.95 * t**2)))),
        "exploding": (0 * t, (0.01 * 5000.0**t) ** 2 * 2 * np.log(5000.0)),
        "straight": (-1 / (1 - t), 2 * t / (1 - t)),
    }
    for name, (rate, squared) in expected.items():
        process = process_of(name)
        drift = jax.vmap(lambda t, process=process: process.drift(x, t))(t)[:, 0]
        np.testing.assert_allclose(drift, 1.7 * rate, rtol=2e-4, atol=1e-6)
        np.testing.assert_allclose(jax.vmap(process.diffusion)(t) ** 2, squared, rtol=2e-4)


@every_schedule
@pytest.mark.parametrize(("t", "s"), [(0.9, 0.85), (0.5, 0.1), (0.3, 0.0)])
def test_posterior_is_bayes(name, t, s):
    """A5: q(x_s | x_t, x_0) against prior times likelihood on a grid."""
    process = process_of(name)
    x0, x = (
        0.6,
        float(process.marginal(jnp.array([0.6]), jnp.asarray(t)).from_noise(jnp.array([0.8]))[0]),
    )
    found = process.posterior(
        jnp.array([x]), jd.Denoised(jnp.array([x0])), jnp.asarray(t), jnp.asarray(s)
    )
    # In float64 with the transition's own formula, and the density by brute force.
    with jax.enable_x64(True):
        alpha_s, sigma_s = map(float, process.schedule(jnp.asarray(s)))
        alpha_t, sigma_t = map(float, process.schedule(jnp.asarray(t)))
    if sigma_s == 0.0:
        np.testing.assert_allclose(found.mean[0], x0, rtol=1e-6)
        assert found.std == 0.0
        return
    ratio = alpha_t / alpha_s
    noise = np.sqrt(sigma_t**2 - ratio**2 * sigma_s**2)
    grid = alpha_s * x0 + sigma_s * np.linspace(-12, 12, 200_001)
    log_density = scipy.stats.norm.logpdf(grid, alpha_s * x0, sigma_s)
    log_density += scipy.stats.norm.logpdf(x, ratio * grid, noise)
    density = np.exp(log_density - log_density.max())
    density /= density.sum()
    mean = (density * grid).sum()
    std = np.sqrt((density * (grid - mean) ** 2).sum())
    np.testing.assert_allclose(found.mean[0], mean, rtol=1e-5, atol=1e-5 * sigma_t)
    np.testing.assert_allclose(found.std, std, rtol=2e-5)


def test_posterior_mean_through_noise_is_that_through_data():
    """A5: DDPM's formula in ε agrees with ours in x_0."""
    with jax.enable_x64(True):
        process = jd.Gaussian(jd.from_betas(BETAS))
        x, x0 = jnp.array([0.9, -0.4]), jnp.array([0.5, 0.1])
        for i in (1, 10, 500, 999):
            t, s = jnp.asarray((i + 1) / 1000), jnp.asarray(i / 1000)
            noise = process.marginal(x0, t).noise(x)
            products = np.cumprod(1 - BETAS)
            beta, product = BETAS[i], products[i]
            expected = (x - beta / np.sqrt(1 - product) * noise) / np.sqrt(1 - beta)
            found = process.posterior(x, jd.Denoised(x0), t, s)
            np.testing.assert_allclose(found.mean, expected, rtol=1e-6)
            small = beta * (1 - products[i - 1]) / (1 - product)
            np.testing.assert_allclose(found.std**2, small, rtol=1e-6)


def test_variance_of_the_data_widens_the_posterior():
    """A15: x_0 known gives β̃, x_0 as uncertain as N(0, I) data gives β."""
    process = process_of("from_betas")
    x = jnp.zeros(1)
    for i in (1, 10, 500, 999):
        t, s = jnp.asarray((i + 1) / 1000), jnp.asarray(i / 1000)
        alpha, sigma = process.schedule(t)
        wide = jd.Denoised(x, sigma**2 / (alpha**2 + sigma**2))
        found = process.posterior(x, wide, t, s)
        np.testing.assert_allclose(found.std**2, BETAS[i], rtol=1e-4)


def test_posterior_kl_is_the_weighted_error_of_the_noise():
    """A8: KL = β²/(2β̃(1 − β)(1 − ᾱ)) ‖ε − ε̂‖², falling in t; its limit is ½ g²/σ²."""
    process = process_of("from_betas")
    x, x0, guess = jnp.array([0.9, -0.4]), jnp.array([0.5, 0.1]), jnp.array([0.2, 0.3])
    products = np.cumprod(1 - BETAS)
    weights = []
    for i in (1, 100, 300, 500, 999):
        t, s = jnp.asarray((i + 1) / 1000), jnp.asarray(i / 1000)
        error = process.marginal(x0, t).noise(x) - process.marginal(guess, t).noise(x)
        exact = process.posterior(x, jd.Denoised(x0), t, s)
        modelled = process.posterior(x, jd.Denoised(guess), t, s)
        variance = BETAS[i] * (1 - products[i - 1]) / (1 - products[i])
        weight = BETAS[i] ** 2 / (2 * variance * (1 - BETAS[i]) * (1 - products[i]))
        found = exact.kl(modelled)
        np.testing.assert_allclose(found, weight * float(jnp.sum(error**2)), rtol=2e-3)
        weights.append(weight)
        continuous = jd.weightings.likelihood(process, t - 5e-4) / 2 / 1000
        if i > 100:
            np.testing.assert_allclose(weight, continuous, rtol=0.02)
    # It falls by a factor of a hundred while the first details form, then levels off.
    assert weights[0] > 50 * weights[1] > 50 * weights[2]


@every_schedule
def test_velocity_is_drift_minus_half_g_squared_score(name):
    """The flow of frozen x̂_0 and ε̂ equals f − ½ g² s; and it is finite where α = 0."""
    process = process_of(name)
    x, x0 = jnp.array([0.9, -0.4]), jnp.array([0.5, 0.1])
    for t in map(jnp.asarray, (0.05, 0.4, 0.95)):
        score = process.marginal(x0, t).score(x)
        expected = process.drift(x, t) - 0.5 * process.diffusion(t) ** 2 * score
        np.testing.assert_allclose(process.velocity(x, x0, t), expected, rtol=5e-4, atol=1e-4)
    assert np.all(np.isfinite(process.velocity(x, x0, jnp.ones(()))))


@every_schedule
def test_time_of_log_snr_inverts(name):
    schedule = SCHEDULES[name]
    for t in map(jnp.float32, (1e-4, 1e-2, 0.3, 0.99)):
        found = time_of_log_snr(schedule, log_snr(schedule, t))
        np.testing.assert_allclose(found, t, rtol=2e-3)
    assert time_of_log_snr(schedule, jnp.asarray(1e3)) < 1e-10
    assert time_of_log_snr(schedule, jnp.asarray(-1e3)) == 1.0


@every_schedule
def test_gaussian_is_a_process_and_an_sde(name):
    assert isinstance(process_of(name), Process)
    assert isinstance(process_of(name), SDE)


def test_schedules_are_differentiable_and_swept_without_compiling():
    traces = []

    @jax.jit
    def alpha(schedule, t):
        traces.append(None)
        return schedule(t)[0]

    for beta_max in (5.0, 10.0, 20.0):
        alpha(jd.linear_beta(0.1, beta_max), jnp.asarray(0.5))
    assert len(traces) == 1
    gradient = jax.grad(lambda schedule: schedule(jnp.asarray(0.5))[0])(jd.linear_beta(0.1, 20.0))
    alpha_half = np.exp(-0.5 * (0.05 + 0.125 * 19.9))
    np.testing.assert_allclose(gradient.beta_max, -alpha_half * 0.0625, rtol=1e-5)


def test_example_keys_do_not_depend_on_the_split():
    key = jax.random.key(3)
    whole = example_keys(key, 8)
    np.testing.assert_array_equal(
        jax.random.key_data(whole[:4]), jax.random.key_data(example_keys(key, 4))
    )
    assert example_keys(whole, 8) is whole
    legacy = example_keys(jax.random.PRNGKey(3), 8)
    np.testing.assert_array_equal(legacy, jax.random.key_data(whole))
    with pytest.raises(ValueError, match="key holds 8 keys for a batch of 5"):
        example_keys(whole, 5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: jd.linear_beta(0.0, 20.0), "beta_min"),
        (lambda: jd.linear_beta(20.0, 0.1), "beta_max"),
        (lambda: jd.subvp(-1.0, 20.0), "beta_min"),
        (lambda: jd.exploding(1.0, 0.5), "sigma_max"),
        (lambda: jd.edm(0.0, 80.0), "sigma_min"),
        (lambda: jd.edm(rho=0.5), "rho"),
        (lambda: jd.cosine(offset=0.0), "offset"),
        (lambda: jd.cosine(log_snr_min=1.0), "log_snr_min"),
        (lambda: jd.from_betas([0.1, 1.0]), "betas"),
        (lambda: jd.from_betas([]), "betas"),
    ],
)
def test_bad_numbers_are_refused_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        make()
