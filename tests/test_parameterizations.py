"""Every prediction is read back to the x_0 that made it; every weight is the paper's."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from oracles import SCHEDULES

import jaxdiff as jd
from jaxdiff import parameterizations, weightings

X0 = jnp.array([0.6, -1.1, 0.2])
NOISE = jnp.array([-0.3, 0.8, 1.7])
ALL = {
    "epsilon": jd.epsilon(),
    "x0": jd.x0(),
    "v": jd.v(),
    "score": jd.score(),
    "velocity": jd.velocity(),
    "edm": parameterizations.edm(0.5),
}


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_perfect_output_is_read_as_the_data(name, schedule):
    """A7: out → x_0 round-trips; and the noise that follows is the noise that made x."""
    process, parameterization = jd.Gaussian(SCHEDULES[schedule]), ALL[name]
    for t in map(jnp.float32, (0.01, 0.2, 0.7)):
        x = process.marginal(X0, t).from_noise(NOISE)
        out = parameterization.target(process, X0, NOISE, t)
        found = parameterization.denoised(process, out, x, t).mean
        alpha, sigma = process.schedule(t)
        # x_0 is read off x, so it is as exact as x/α is.
        scale = float(1 + sigma / alpha)
        np.testing.assert_allclose(found, X0, rtol=1e-4, atol=2e-6 * scale)
        if name not in ("x0", "v", "velocity", "edm") or scale > 1.2:
            np.testing.assert_allclose(
                process.marginal(found, t).noise(x), NOISE, rtol=1e-4, atol=1e-4
            )


def test_outputs_are_what_their_names_say():
    """A7: F against the written definitions, on three processes."""
    t = jnp.float32(0.3)
    for schedule in ("linear_beta", "exploding", "straight"):
        process = jd.Gaussian(SCHEDULES[schedule])
        alpha, sigma = process.schedule(t)
        marginal = process.marginal(X0, t)
        x = marginal.from_noise(NOISE)
        path = lambda t, process=process: process.marginal(X0, t).from_noise(NOISE)
        expected = {
            "epsilon": NOISE,
            "x0": X0,
            "v": alpha * NOISE - sigma * X0,
            "score": marginal.score(x),
            "velocity": jax.jvp(path, (t,), (jnp.ones(()),))[1],
        }
        for name, value in expected.items():
            found = ALL[name].target(process, X0, NOISE, t)
            np.testing.assert_allclose(found, value, rtol=1e-4, atol=1e-5)
    straight = jd.Gaussian(SCHEDULES["straight"])
    np.testing.assert_allclose(jd.velocity().target(straight, X0, NOISE, t), NOISE - X0, rtol=1e-6)


def test_edm_is_the_papers_table():
    """c_skip, c_out and c_in of Karras et al. 2022, table 1, with σ = σ̃."""
    process, edm = jd.Gaussian(SCHEDULES["edm"]), parameterizations.edm(0.5)
    x, out = jnp.array([1.3]), jnp.array([0.4])
    for t in map(jnp.float32, (0.0, 0.3, 0.9)):
        sigma = float(process.schedule(t)[1])
        total = sigma**2 + 0.25
        expected = 0.25 / total * 1.3 + sigma * 0.5 / total**0.5 * 0.4
        np.testing.assert_allclose(edm.denoised(process, out, x, t).mean, expected, rtol=1e-5)
        scaled, level = edm.inputs(process, x, t)
        np.testing.assert_allclose(scaled, 1.3 / total**0.5, rtol=1e-5)
        np.testing.assert_allclose(level, -np.log(sigma) / 2, rtol=1e-5)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_edm_keeps_input_and_target_at_unit_variance(schedule):
    process, edm = jd.Gaussian(SCHEDULES[schedule]), parameterizations.edm(0.5)
    x0 = 0.5 * jax.random.normal(jax.random.key(0), (100_000,))
    noise = jax.random.normal(jax.random.key(1), (100_000,))
    for t in map(jnp.float32, (0.05, 0.5, 0.9)):
        x = process.marginal(x0, t).from_noise(noise)
        inputs, _ = edm.inputs(process, x, t)
        np.testing.assert_allclose(inputs.std(), 1.0, rtol=0.01)
        np.testing.assert_allclose(edm.target(process, x0, noise, t).std(), 1.0, rtol=0.01)


@pytest.mark.parametrize("name", ["x0", "v", "velocity"])
@pytest.mark.parametrize("schedule", ["straight", "linear_beta"])
def test_no_signal_is_no_trouble_where_it_is_defined(name, schedule):
    """A7: at α = 0 the data can still be read where the table says so."""
    process = jd.Gaussian(SCHEDULES[schedule])
    t = jnp.ones(())
    out = ALL[name].target(process, X0, NOISE, t)
    x = process.marginal(X0, t).from_noise(NOISE)
    np.testing.assert_allclose(ALL[name].denoised(process, out, x, t).mean, X0, rtol=5e-3)


def test_noise_levels():
    process = jd.Gaussian(SCHEDULES["linear_beta"])
    t = jnp.float32(0.3)
    alpha, sigma = process.schedule(t)
    for level, expected in (
        (parameterizations.quarter_log_snr, np.log(alpha**2 / sigma**2) / 4),
        (parameterizations.log_sigma, np.log(sigma / alpha)),
        (parameterizations.discrete_time, 999 * 0.3),
    ):
        found = jd.epsilon(noise_level=level).inputs(process, X0, t)[1]
        np.testing.assert_allclose(found, expected, rtol=1e-5)
    for t in map(jnp.float32, (0.0, 1.0)):
        assert np.isfinite(jd.x0().inputs(jd.Gaussian(jd.straight()), X0, t)[1])


def test_weights_are_the_papers():
    """Each weight of ‖ε̂ − ε‖², from its paper's weight of the score or of x_0."""
    process = jd.Gaussian(SCHEDULES["linear_beta"])
    for t in map(jnp.float32, (0.01, 0.3, 0.9)):
        alpha, sigma = map(float, process.schedule(t))
        snr = alpha**2 / sigma**2
        beta = 0.1 + float(t) * 19.9
        noise = sigma / alpha
        edm = (noise**2 + 0.25) / (noise * 0.5) ** 2 / snr
        cases = {
            weightings.simple: 1.0,
            weightings.likelihood: beta / sigma**2,
            weightings.edm(0.5): edm,
            weightings.p2(0.7, 2.0): (2.0 + snr) ** -0.7,
            weightings.min_snr(5.0): min(snr, 5.0) / snr,
        }
        for weighting, expected in cases.items():
            np.testing.assert_allclose(weighting(process, t), expected, rtol=1e-4)


def test_p2_without_damping_is_simple_bit_for_bit():
    """A10."""
    process = jd.Gaussian(SCHEDULES["linear_beta"])
    t = jnp.linspace(1e-5, 1.0, 1000)
    found = jax.vmap(lambda t: weightings.p2(0.0)(process, t))(t)
    simple = jax.vmap(lambda t: weightings.simple(process, t))(t)
    np.testing.assert_array_equal(found, simple)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: parameterizations.edm(0.0), "sigma_data"),
        (lambda: weightings.edm(-1.0), "sigma_data"),
        (lambda: weightings.p2(-1.0), "gamma"),
        (lambda: weightings.min_snr(0.0), "gamma"),
        (lambda: jd.time_samplers.uniform(0.0), "t_min"),
        (lambda: jd.time_samplers.low_discrepancy(1.0), "t_min"),
        (lambda: jd.time_samplers.log_normal(std=0.0), "std"),
        (lambda: jd.time_samplers.log_uniform(0.0), "t_min"),
        (lambda: jd.time_samplers.steps(0), "total must be at least 1, got 0"),
    ],
)
def test_bad_numbers_are_refused_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("sampler", ["uniform", "low_discrepancy"])
def test_times_are_uniform(sampler):
    process = jd.Gaussian(SCHEDULES["linear_beta"])
    t, inverse = getattr(jd.time_samplers, sampler)(0.1)(jax.random.key(0), process, 10_000)
    np.testing.assert_allclose(jnp.mean(jnp.sort(t) - jnp.linspace(0.1, 1, 10_000)), 0, atol=0.01)
    # The mean of w/r estimates the integral of w: here of 1/t over [0.1, 1].
    np.testing.assert_allclose(jnp.mean(inverse / t), np.log(10), rtol=0.02)


def test_steps_are_those_of_the_chain_each_as_often():
    process = jd.Gaussian(SCHEDULES["linear_beta"])
    t, inverse = jd.time_samplers.steps(5)(jax.random.key(0), process, 10_000)
    found, counts = np.unique(np.asarray(t), return_counts=True)
    np.testing.assert_allclose(found, [0.2, 0.4, 0.6, 0.8, 1.0], rtol=1e-6)
    np.testing.assert_allclose(counts, 2000, atol=5 * math.sqrt(10_000 * 0.2 * 0.8))
    np.testing.assert_array_equal(inverse, 1.0)


def test_low_discrepancy_spreads_each_batch():
    process = jd.Gaussian(SCHEDULES["linear_beta"])
    t, _ = jd.time_samplers.low_discrepancy(1e-5)(jax.random.key(0), process, 64)
    np.testing.assert_allclose(jnp.diff(jnp.sort(t)), 1 / 64, rtol=1e-3)


def test_log_uniform_times_are_as_many_in_every_octave():
    process = jd.Gaussian(SCHEDULES["linear_beta"])
    t, factor = jd.time_samplers.log_uniform(1e-3)(jax.random.key(0), process, 1000)
    counts, _ = np.histogram(t, np.geomspace(1e-3, 1.0, 11))
    np.testing.assert_allclose(counts, 100, atol=1)
    np.testing.assert_array_equal(factor, 1.0)


@pytest.mark.parametrize("schedule", ["edm", "linear_beta", "straight"])
def test_log_normal_times_have_edms_noise_levels(schedule):
    process = jd.Gaussian(SCHEDULES[schedule])
    t, factor = jd.time_samplers.log_normal(-1.2, 1.2)(jax.random.key(0), process, 10_000)
    level = jax.vmap(lambda t: -0.5 * process.log_snr(t))(t)
    np.testing.assert_allclose(level.mean(), -1.2, atol=0.05)
    np.testing.assert_allclose(level.std(), 1.2, atol=0.05)
    np.testing.assert_array_equal(factor, 1.0)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_grids_are_even_in_their_own_clock(schedule):
    process = jd.Gaussian(SCHEDULES[schedule])
    start = oracles.start_of(schedule)
    log_snr = jax.vmap(process.log_snr)
    grid = jd.grids.uniform_log_snr(process, 11, start=start, end=1e-2)
    jd.grids.check(grid)
    assert grid.shape == (12,)
    assert (grid[0], grid[-1]) == (jnp.float32(start), 0.0)
    steps = jnp.diff(log_snr(grid[:-1]))
    np.testing.assert_allclose(steps, steps.mean(), rtol=5e-3)
    grid = jd.grids.karras(process, 10, start=start, end=1e-2, to_zero=False)
    assert grid.shape == (11,)
    assert grid[-1] == jnp.float32(1e-2)
    steps = jnp.diff(jnp.exp(-0.5 * log_snr(grid) / 7.0))
    np.testing.assert_allclose(steps, steps.mean(), rtol=5e-3)


def test_uniform_grid_on_the_edm_schedule_is_karras():
    process = jd.Gaussian(SCHEDULES["edm"])
    karras = jd.grids.karras(process, 8, end=1e-3, to_zero=False)
    uniform = jd.grids.uniform(8, end=1e-3)
    np.testing.assert_allclose(karras, uniform, rtol=1e-3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: jd.grids.uniform(0), "steps"),
        (lambda: jd.grids.uniform(5, start=1.5), "start"),
        (lambda: jd.grids.uniform(5, start=0.1, end=0.2), "end"),
        (lambda: jd.grids.karras(jd.Gaussian(jd.edm()), 5, rho=0.1), "rho"),
        (lambda: jd.grids.karras(jd.Gaussian(jd.edm()), 5, end=0.0), "end"),
        (lambda: jd.grids.karras(jd.Gaussian(jd.edm()), 1), "steps"),
        (lambda: jd.grids.uniform_log_snr(jd.Gaussian(jd.straight()), 4), "start"),
        (lambda: jd.grids.check(jnp.array([0.0, 1.0])), "grid"),
        (lambda: jd.grids.check(jnp.array([1.0])), "grid"),
        (lambda: jd.grids.check(jnp.array([2.0, 1.0])), "grid"),
    ],
)
def test_bad_grids_are_refused_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        make()
