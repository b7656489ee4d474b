"""Stepping samplers with an exact score: the gate, its mutants, and exact identities."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import scipy.stats
from oracles import GMM5, MUTANTS, SCHEDULES, GaussianData, gate, mutated, passes

import jaxdiff as jd
from jaxdiff.data.mixture import gaussian_mixture
from jaxdiff.processes.base import Denoised

every_schedule = pytest.mark.parametrize("name", SCHEDULES)
KEY = jax.random.key(0)
VP = jd.Gaussian(SCHEDULES["linear_beta"])


def start(process, shape, key=KEY):
    return process.prior(shape).sample(key)


@every_schedule
@pytest.mark.parametrize("kind", ["ancestral", "ddim"])
def test_exact_score_passes_the_gate(name, kind, gmm_data, gmm_null):
    """A4, C5: every schedule, with the exact denoiser of the five-mode mixture."""
    process = jd.Gaussian(SCHEDULES[name])
    step = {"ancestral": jd.Ancestral(process), "ddim": jd.DDIM(process)}[kind]
    grid = jd.grids.uniform({"ancestral": 1000, "ddim": 400}[kind], start=oracles.start_of(name))
    x = jd.sample(step, GMM5.denoiser(process), grid, KEY, start(process, (2000, 2)))
    found = gate(x, GMM5, gmm_data)
    assert passes(found, gmm_null), found


@pytest.mark.parametrize("variance", ["lower", "upper"])
def test_both_fixed_variances_pass_the_gate(variance, gmm_data, gmm_null):
    """A15: β̃ and β, at T = 1000 on DDPM's own schedule."""
    process = jd.Gaussian(SCHEDULES["from_betas"])
    denoise = GMM5.denoiser(process)
    if variance == "upper":
        denoise = jd.UnitVariance(process, denoise)
    x = start(process, (2000, 2))
    x = jd.sample(jd.Ancestral(process), denoise, jd.grids.uniform(1000), KEY, x)
    found = gate(x, GMM5, gmm_data)
    assert passes(found, gmm_null), found


@pytest.mark.parametrize(
    ("kind", "mutant"),
    [("ancestral", mutant) for mutant in MUTANTS]
    + [("ddim", mutant) for mutant in MUTANTS if "noise" not in mutant],
)
def test_gate_catches_the_mutants(kind, mutant, gmm_data, gmm_null):
    """The gate has power: each plausible mistake fails it, by the number that should see it.

    Ancestral sampling has the variance β: with β̃ it is a little too narrow, which noise that is a
    little too loud would hide.
    """
    step = jd.DDIM(VP) if kind == "ddim" else jd.Ancestral(VP)
    make_grid = lambda end: jd.grids.uniform(1000, end=end or 0.0)
    step, denoise, grid = mutated(mutant, step, VP, make_grid)
    if kind == "ancestral":
        denoise = jd.UnitVariance(VP, denoise)
    x = jd.sample(step, denoise, grid, KEY, start(VP, (2000, 2)))
    found = gate(x, GMM5, gmm_data)
    assert not passes(found, gmm_null), found
    assert MUTANTS[mutant](found), found


def test_marginals_on_the_way_are_the_diffused_density():
    """A3: Kolmogorov–Smirnov against the analytic mixture at five times, 1-D."""
    data = gaussian_mixture([0.3, 0.7], [[-1.0], [0.8]], [0.15, 0.25])
    x = start(VP, (4000, 1), jax.random.key(5))
    grid = jd.grids.uniform(1000)
    passed = jd.sample(jd.Ancestral(VP), data.denoiser(VP), grid, KEY, x, trajectory=True)
    assert passed.shape == (1001, 4000, 1)
    np.testing.assert_array_equal(passed[0], x)
    for index in (200, 400, 600, 800, 1000):
        alpha, sigma = map(float, VP.schedule(grid[index]))
        weights, means = np.array([0.3, 0.7]), alpha * np.array([-1.0, 0.8])
        stds = np.sqrt(alpha**2 * np.array([0.15, 0.25]) ** 2 + sigma**2)
        cdf = lambda x, m=means, s=stds, w=weights: scipy.stats.norm.cdf(x[:, None], m, s) @ w
        assert scipy.stats.kstest(np.asarray(passed[index][:, 0]), cdf).pvalue > 0.01


@every_schedule
def test_ddim_with_full_noise_is_ancestral(name):
    """C5: at η = 1 both draw from one conditional; the same noise gives the same state."""
    process = jd.Gaussian(SCHEDULES[name])
    x = start(process, (64, 3))
    denoise = GaussianData(process, 0.7, 0.3)
    t, s = jnp.float32(0.6), jnp.float32(0.5)
    keys = jax.random.split(KEY, 64)
    ancestral, _ = jd.Ancestral(process).update(keys, x, None, t, s, denoise)
    ddim, _ = jd.DDIM(process, eta=1.0).update(keys, x, None, t, s, denoise)
    np.testing.assert_allclose(ddim, ancestral, rtol=2e-4, atol=2e-5 * float(jnp.abs(x).max()))


@every_schedule
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0, 1.3])
def test_ddim_keeps_the_marginal(name, eta):
    """C5: given x_0, a step takes q(x_t | x_0) to q(x_s | x_0) for every η."""
    process = jd.Gaussian(SCHEDULES[name])
    n, t, s = 100_000, jnp.float32(0.5), jnp.float32(0.3)
    x0 = jnp.full((n, 1), 0.8)
    keys = jax.random.split(jax.random.key(1), n)
    x = jax.vmap(lambda key, x0: process.marginal(x0, t).sample(key))(keys, x0)
    keys = jax.random.split(jax.random.key(2), n)
    x, _ = jd.DDIM(process, eta=eta).update(keys, x, None, t, s, lambda x, t: Denoised(x0))
    target = process.marginal(x0[0], s)
    np.testing.assert_allclose(x.mean(), target.mean[0], atol=4 * target.std / n**0.5)
    np.testing.assert_allclose(x.std(), target.std, rtol=4 / (2 * n) ** 0.5)


def test_ddim_is_euler_in_the_scaled_variables():
    """C5: x/α moves along d(x/α) = ε d(σ/α)."""
    x = start(VP, (100, 2))
    denoise = GaussianData(VP, 0.7, 0.3)
    grid = jd.grids.uniform(20, end=0.05)
    found = jd.sample(jd.DDIM(VP), denoise, grid, KEY, x)
    for t, s in itertools.pairwise(grid):
        (alpha_t, sigma_t), (alpha_s, sigma_s) = VP.schedule(t), VP.schedule(s)
        noise = (x - alpha_t * denoise(x, t).mean) / sigma_t
        x = alpha_s * (x / alpha_t + (sigma_s / alpha_s - sigma_t / alpha_t) * noise)
    np.testing.assert_allclose(found, x, rtol=1e-5, atol=1e-5)


@every_schedule
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_point_mass_is_found_in_one_step(name, steps):
    """C5: with x_0 known, any number of steps ends on it exactly; never NaN."""
    process = jd.Gaussian(SCHEDULES[name])
    x = start(process, (5, 3))
    point = lambda x, t: Denoised(jnp.full_like(x, 0.4))
    runs = [(step, point) for step in (jd.DDIM(process), jd.DDIM(process, eta=1.0))]
    # Though unsure of x_0 by one unit, the last step of "β" adds no noise.
    runs += [
        (jd.Ancestral(process), denoise) for denoise in (point, jd.UnitVariance(process, point))
    ]
    for step, denoise in runs:
        found = jd.sample(step, denoise, jd.grids.uniform(steps), KEY, x)
        # A schedule that starts at σ(0) > 0 leaves that much noise.
        floor = 6 * float(process.schedule(jnp.zeros(()))[1])
        np.testing.assert_allclose(found, 0.4, atol=1e-5 + floor)


def test_euler_order_of_ddim():
    """DDIM is of first order: halving its steps halves the median error."""
    x = start(VP, (1000, 2))
    denoise = GMM5.denoiser(VP)
    run = lambda steps: jd.sample(jd.DDIM(VP), denoise, jd.grids.uniform(steps), KEY, x)
    exact = run(2560)
    errors = [float(jnp.median(jnp.linalg.norm(run(n) - exact, axis=1))) for n in (20, 40, 80)]
    slopes = np.diff(np.log2(errors))
    assert np.all((slopes > -1.25) & (slopes < -0.8)), errors


def test_sample_does_not_depend_on_the_batch_around_it():
    x = start(VP, (8, 2))
    grid = jd.grids.uniform(20)
    denoise = GMM5.denoiser(VP)
    whole = jd.sample(jd.Ancestral(VP), denoise, grid, KEY, x)
    half = jd.sample(jd.Ancestral(VP), denoise, grid, KEY, x[:4])
    np.testing.assert_allclose(half, whole[:4], rtol=1e-5, atol=1e-6)
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(KEY, jnp.arange(4, 8))
    rest = jd.sample(jd.Ancestral(VP), denoise, grid, keys, x[4:])
    np.testing.assert_allclose(rest, whole[4:], rtol=1e-5, atol=1e-6)


def test_one_program_serves_new_numbers_and_calls_the_network_once_a_step():
    calls, traces = [], []

    def apply(params, x, level):
        traces.append(None)
        jax.debug.callback(lambda: calls.append(None))
        return params * x

    grid, x = jd.grids.uniform(10), jnp.ones((4, 2))

    def net(scale, process):
        return jd.NetDenoiser(jnp.float32(scale), process, apply, jd.epsilon())

    for beta_max, eta, weight, params in ((20.0, 0.0, 0.0, 0.5), (10.0, 0.7, 2.0, 0.3)):
        process = jd.Gaussian(jd.linear_beta(0.1, beta_max))
        denoise = jd.CFG(net(params, process), net(2 * params, process), weight)
        jd.sample(jd.DDIM(process, eta=eta), denoise, grid, jax.random.key(3), x)
    jax.effects_barrier()
    assert len(traces) == 2  # the two networks of the guided denoiser, traced once
    assert len(calls) == 2 * 2 * 10


def test_memory_does_not_grow_with_the_steps():
    """B32: sampling keeps one state, whatever the number of steps."""

    def temporary(steps):
        run = jax.jit(lambda grid, x: jd.sample(jd.DDIM(VP), GMM5.denoiser(VP), grid, KEY, x))
        lowered = run.lower(jd.grids.uniform(steps), jnp.zeros((512, 2)))
        return lowered.compile().memory_analysis().temp_size_in_bytes

    few, many = temporary(10), temporary(1000)
    assert abs(many - few) <= 32 * 990, (few, many)  # the grid itself, no states


def test_guidance_extrapolates_the_score():
    """CFG: score = (1 + w) ∇log p(x | c) − w ∇log p(x), exactly; w = 0 and −1 are the ends."""
    conditional = gaussian_mixture([1.0], [[1.3, 0.4]], 0.2)
    x, t = start(VP, (50, 2)), jnp.float32(0.3)
    alpha, sigma = VP.schedule(t)
    scores = [jax.vmap(mixture.diffused(alpha, sigma).score)(x) for mixture in (conditional, GMM5)]
    for weight in (-1.0, 0.0, 0.5, 3.0):
        denoise = jd.CFG(conditional.denoiser(VP), GMM5.denoiser(VP), weight)
        found = jax.vmap(lambda x, x0: VP.marginal(x0, t).score(x))(x, denoise(x, t).mean)
        expected = (1 + weight) * scores[0] - weight * scores[1]
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (jd.DDIM, {"eta": -0.1}, "eta must be at least 0, got -0.1"),
        (jd.EulerMaruyama, {"eta": math.nan}, "eta must be at least 0, got nan"),
        (jd.DPMSolver, {"ratio": 0.0}, r"ratio must lie in \(0, 1\], got 0.0"),
        (jd.DPMSolverPP, {"eta": -1}, "eta must be at least 0, got -1"),
        (jd.DPMSolverPPSingle, {"ratio": 1.5}, "ratio must lie in"),
        (jd.EDMSampler, {"churn": -0.1}, "churn must be at least 0"),
        (jd.EDMSampler, {"s_min": 2.0, "s_max": 1.0}, r"s_min must lie in \[0, s_max=1.0\], got 2"),
        (jd.EDMSampler, {"s_noise": -1.0}, "s_noise must be at least 0"),
        (jd.Langevin, {"snr": 0.0}, "snr must be positive, got 0.0"),
        (jd.Langevin, {"steps": 0}, "steps must be at least 1, got 0"),
        (jd.AnnealedLangevin, {"snr": -1.0}, "snr must be positive"),
        (jd.UnderdampedLangevin, {"friction": 0.0}, "friction must be positive"),
        (jd.UnderdampedLangevin, {"step_size": 0.0}, "step_size must be positive"),
        (jd.DDIM, {"eta": jnp.array([0.5, -0.5])}, "eta must be at least 0"),
    ],
)
def test_numbers_outside_their_range_are_refused(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(VP, **options)


def test_an_empty_window_is_refused():
    with pytest.raises(ValueError, match=r"low must be at most high, got 0.6 and 0.4"):
        jd.Window(jd.DDIM(VP), jd.DDIM(VP), low=0.6, high=0.4)


def test_traced_numbers_are_left_alone():
    """Inside somebody's jit, and for a batch of samplers."""
    x, grid = start(VP, (4, 2)), jd.grids.uniform(3)
    run = lambda eta: jd.sample(jd.DDIM(VP, eta=eta), GMM5.denoiser(VP), grid, KEY, x)
    etas = jnp.array([0.0, 0.5])
    np.testing.assert_allclose(jax.jit(run)(etas[1]), run(0.5), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(jax.vmap(run)(etas)[1], run(0.5), rtol=1e-5, atol=1e-6)


def test_bad_grid_is_refused():
    with pytest.raises(ValueError, match="grid must fall"):
        jd.sample(jd.DDIM(VP), GMM5.denoiser(VP), jnp.array([0.0, 1.0]), KEY, jnp.zeros((2, 2)))


def test_final_denoising_is_one_more_call():
    x, denoise = start(VP, (20, 2)), GMM5.denoiser(VP)
    grid = jd.grids.uniform(10, end=0.2)
    plain = jd.sample(jd.DDIM(VP), denoise, grid, KEY, x)
    states = jd.sample(jd.DDIM(VP), denoise, grid, KEY, x, trajectory=True, final_denoise=True)
    np.testing.assert_allclose(states[-1], denoise(plain, grid[-1]).mean, rtol=1e-5, atol=1e-5)
    assert states.shape == (11, 20, 2)


def test_denoised_means_on_the_way_cost_no_call():
    """A sampler that starts from denoise(x, t) gives what it was given."""
    calls = []

    def denoise(x, t):
        jax.debug.callback(lambda _: calls.append(None), x[0, 0])
        return GMM5.denoiser(VP)(x, t)

    x, grid = start(VP, (20, 2)), jd.grids.uniform(10)
    states, x0 = jd.sample(jd.Ancestral(VP), denoise, grid, KEY, x, trajectory=True, x0_hats=True)
    jax.effects_barrier()
    assert len(calls) == 10
    expected = jnp.stack(
        [GMM5.denoiser(VP)(x, t).mean for x, t in zip(states[:-1], grid[:-1], strict=True)]
    )
    np.testing.assert_allclose(x0, expected, rtol=1e-4, atol=1e-5)


def test_progress_is_reported_on_the_host():
    seen = []
    progress = lambda index, steps: seen.append((int(index), int(steps)))
    x = start(VP, (4, 2))
    run = lambda **options: jd.sample(
        jd.DDIM(VP), GMM5.denoiser(VP), jd.grids.uniform(5), KEY, x, **options
    )
    watched = run(progress=progress)
    jax.effects_barrier()
    assert sorted(seen) == [(i, 5) for i in range(5)]
    np.testing.assert_allclose(watched, run(), rtol=1e-6)  # of two programs


def test_nothing_asked_for_costs_nothing():
    """No callback, and no states, in the program that samples plainly."""
    run = lambda x, **options: jd.sample(
        jd.DDIM(VP), GMM5.denoiser(VP), jd.grids.uniform(100), KEY, x, **options
    )
    x = jnp.zeros((512, 2))
    lower = lambda **options: jax.jit(lambda x: run(x, **options)).lower(x)
    plain = lower()
    assert "callback" not in plain.as_text()
    assert "callback" in lower(progress=print).as_text()
    size = lambda lowered: lowered.compile().memory_analysis().output_size_in_bytes
    assert size(plain) == x.nbytes
    assert size(lower(trajectory=True)) == 101 * x.nbytes
