"""What diffrax solves, against closed forms: the reverse SDE and the probability flow."""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from oracles import GMM5, SCHEDULES, GaussianData, Late, gate, passes

import jaxdiff as jd
from jaxdiff import solve
from jaxdiff.data.mixture import gaussian_mixture
from jaxdiff.metrics import energy_distance
from jaxdiff.processes.gaussian import Rescaled
from jaxdiff.schedules import time_of_log_snr
from jaxdiff.solve import adaptive, underdamped_langevin

every_schedule = pytest.mark.parametrize("name", SCHEDULES)
KEY = jax.random.key(0)
VP = jd.Gaussian(SCHEDULES["linear_beta"])
SDE_SOLVERS = [
    diffrax.Euler(),
    diffrax.Heun(),
    diffrax.EulerHeun(),
    diffrax.SEA(),
    diffrax.ShARK(),
    diffrax.SRA1(),
    diffrax.GeneralShARK(),
    diffrax.SlowRK(),
    diffrax.SPaRK(),
]
ODE_SOLVERS = [
    diffrax.Heun(),
    diffrax.Midpoint(),
    diffrax.Ralston(),
    diffrax.Bosh3(),
    diffrax.Tsit5(),
    diffrax.Dopri5(),
    diffrax.Dopri8(),
]
named = lambda solver: type(solver).__name__


def start(process, shape, key=KEY):
    return process.prior(shape).sample(key)


def sde_grid(name, steps, end=1e-3):
    process = jd.Gaussian(SCHEDULES[name])
    if name in ("exploding", "edm", "user"):
        return jd.grids.karras(process, steps, end=end, to_zero=False)
    return jd.grids.uniform(steps, start=oracles.start_of(name), end=end)


# Reverse SDE


@every_schedule
def test_reverse_sde_passes_the_gate(name, gmm_data, gmm_null):
    """B7: Euler–Maruyama with the exact score."""
    process = jd.Gaussian(SCHEDULES[name])
    steps = 200 if name in ("linear_beta", "from_betas") else 500
    x = jd.reverse_sde(
        process, GMM5.denoiser(process), KEY, start(process, (2000, 2)), sde_grid(name, steps)
    )
    found = gate(x, GMM5, gmm_data)
    assert passes(found, gmm_null), found


MUTANTS = {
    "late score": lambda found: found.std < 0.193,
    "loud noise": lambda found: found.std > 0.207,
    "early stop": lambda found: found.std > 0.207,
    "half score": lambda found: found.energy > 0.05,
    "no noise": lambda found: found.energy > 0.5,
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_gate_catches_the_mutants_of_the_reverse_sde(mutant, gmm_data, gmm_null):
    denoise, grid, process = GMM5.denoiser(VP), sde_grid("linear_beta", 500), VP
    if mutant == "late score":
        denoise = Late(VP, denoise)
    if mutant == "early stop":
        grid = sde_grid("linear_beta", 500, end=0.02)
    if mutant == "loud noise":
        process = Loud(VP, 1.05)
    if mutant == "half score":
        process = Loud(VP, 1.0, 0.0)
    if mutant == "no noise":
        process = Loud(VP, 1e-3)
    x = jd.reverse_sde(process, denoise, KEY, start(VP, (2000, 2)), grid)
    found = gate(x, GMM5, gmm_data)
    assert not passes(found, gmm_null), found
    assert MUTANTS[mutant](found), found


class Loud:
    """A mutant: noise scaled without its share of the drift, or the Langevin part's score.

    The drift is f − ½g²s − ½g²s; without the last part it has half the score, with full noise.
    """

    def __init__(self, process, noise, score=1.0):
        self.process, self.noise, self.factor = process, noise, score
        self.prior, self.drift, self.velocity = process.prior, process.drift, process.velocity

    def marginal(self, x0, t):
        return Scaled(self.process.marginal(x0, t), self.factor / self.noise**2)

    def diffusion(self, t):
        return self.noise * self.process.diffusion(t)


class Scaled:
    """A normal whose score is scaled, so that g² s stays what it was."""

    def __init__(self, normal, factor):
        self.normal, self.factor = normal, factor
        self.noise, self.from_noise = normal.noise, normal.from_noise

    def score(self, x):
        return self.factor * self.normal.score(x)


@pytest.mark.parametrize("solver", SDE_SOLVERS, ids=named)
def test_every_sde_solver_runs_on_the_increasing_clock(solver):
    """diffrax's stochastic Runge–Kutta solvers ignore the sign of a negative step; ours is none."""
    denoise = GaussianData(VP, 0.7, 0.3)
    x = jd.reverse_sde(
        VP, denoise, KEY, start(VP, (4000, 2)), sde_grid("linear_beta", 200), solver=solver
    )
    np.testing.assert_allclose(x.mean(), 0.7, atol=0.02)
    np.testing.assert_allclose(x.std(), 0.3, atol=0.02)


def test_diffrax_still_has_the_trap():
    """The reason for the increasing clock: dy = −y dt from 1 to 0 must give e, and does not.

    If this fails, diffrax has mended it, and the note in solve.py can go.
    """
    noise = diffrax.VirtualBrownianTree(
        0.0, 1.0, 0.01, (), jax.random.key(0), diffrax.SpaceTimeLevyArea
    )
    terms = diffrax.MultiTerm(
        diffrax.ODETerm(lambda t, y, _: -y),
        diffrax.ControlTerm(lambda t, y, _: jnp.zeros(()), noise),
    )
    found = diffrax.diffeqsolve(terms, diffrax.ShARK(), 1.0, 0.0, -0.01, jnp.float32(1.0)).ys[0]
    np.testing.assert_allclose(found, np.exp(-1.0), rtol=1e-3)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0, 1.5])
def test_any_noise_has_the_same_marginals(eta, gmm_data, gmm_null):
    """B20, B19: η scales the Langevin part of the SDE, and no marginal moves."""
    grid = jd.grids.karras(VP, 500, end=1e-3, to_zero=False)
    x = jd.reverse_sde(
        VP, GMM5.denoiser(VP), KEY, start(VP, (2000, 2)), grid, eta=eta, solver=diffrax.ShARK()
    )
    found = gate(x, GMM5, gmm_data)
    assert passes(found, gmm_null), found


def test_no_noise_is_the_ode_bit_for_bit():
    """B20: with η = 0 the SDE's Euler scheme is the flow's."""
    x, grid = start(VP, (100, 2)), sde_grid("linear_beta", 50)
    denoise = GMM5.denoiser(VP)
    sde = jd.reverse_sde(VP, denoise, KEY, x, grid, eta=0.0)
    ode = jd.probability_flow(
        VP,
        denoise,
        x,
        grid[0],
        grid[-1],
        solver=diffrax.Euler(),
        controller=diffrax.StepTo(-grid),
    )
    np.testing.assert_array_equal(sde, ode)
    # An η that is 0 at run time only comes to the same through the SDE's own program.
    traced = jd.reverse_sde(VP, denoise, KEY, x, grid, eta=jnp.float32(0.0))
    np.testing.assert_allclose(traced, ode, rtol=1e-5, atol=1e-5)


def test_sde_is_flow_plus_langevin():
    """B19: f − g²s = (f − ½g²s) − ½g²s, against the written drift of the VP SDE."""
    x, t = start(VP, (50, 2)), jnp.float32(0.4)
    alpha, sigma = VP.schedule(t)
    score = jax.vmap(GMM5.diffused(alpha, sigma).score)(x)
    beta = 0.1 + 0.4 * 19.9
    reverse = -0.5 * beta * x - beta * score
    x0 = GMM5.denoiser(VP)(x, t).mean
    flow = jax.vmap(lambda x, x0: VP.velocity(x, x0, t))(x, x0)
    np.testing.assert_allclose(flow - 0.5 * beta * score, reverse, rtol=1e-4, atol=1e-4)


def test_noise_corrects_errors_that_the_ode_keeps():
    """B19: from a state 30 % too wide at t = 0.5, the SDE comes closer than the ODE."""
    alpha, sigma = VP.schedule(jnp.float32(0.5))
    noisy = GMM5.diffused(alpha, sigma).sample(jax.random.key(4), 4000)
    centre = noisy.mean(0)
    wrong = centre[None] + 1.3 * (noisy - centre[None])
    grid = jd.grids.uniform(500, start=0.5, end=1e-3)
    run = lambda eta: jd.reverse_sde(VP, GMM5.denoiser(VP), KEY, wrong, grid, eta=eta)
    fresh = GMM5.sample(jax.random.key(5), 4000)
    assert energy_distance(run(1.0), fresh) < 0.7 * energy_distance(run(0.0), fresh)


def test_reverse_sde_does_not_depend_on_the_batch_around_it():
    x, grid = start(VP, (8, 2)), sde_grid("linear_beta", 20)
    denoise = GMM5.denoiser(VP)
    whole = jd.reverse_sde(VP, denoise, KEY, x, grid)
    np.testing.assert_allclose(
        jd.reverse_sde(VP, denoise, KEY, x[:4], grid), whole[:4], rtol=1e-5, atol=1e-6
    )


@pytest.fixture(scope="module")
def on_one_path():
    """A function that solves with the same Brownian path every time, and a fine solution of it."""
    x = start(VP, (200, 2))

    def run(steps, solver, controller=None):
        return jd.reverse_sde(
            VP,
            GMM5.denoiser(VP),
            KEY,
            x,
            jd.grids.uniform(steps, end=1e-3),
            solver=solver,
            controller=controller,
            path_tolerance=2.0**-12,
            evaluations=True,
        )

    fine = run(1600, diffrax.ShARK()).x
    return lambda *a: (e := run(*a)) and (strong_error(e.x, fine), int(e.num_evaluations))


def strong_error(x, exact):
    return float(jnp.median(jnp.linalg.norm(x - exact, axis=1)))


def test_refinement_follows_one_brownian_path(on_one_path):
    """B4, B23: pathwise, Euler–Maruyama is of order 1 here, for the noise is additive (½ is for
    noise that depends on the state), and ShARK of order 1.5; both tend to the same path."""
    errors = [on_one_path(n, diffrax.Euler())[0] for n in (50, 100, 200)]
    slopes = np.diff(np.log2(errors))
    assert np.all((slopes > -1.25) & (slopes < -0.8)), errors
    errors = [on_one_path(n, diffrax.ShARK())[0] for n in (25, 50, 100)]
    assert np.all(np.diff(np.log2(errors)) < -1.3), errors


def test_fresh_noise_is_another_path():
    """Without a tolerance every grid draws its own increments, of the same law."""
    x, denoise = start(VP, (200, 2)), GMM5.denoiser(VP)
    coarse, fine = (
        jd.reverse_sde(VP, denoise, KEY, x, jd.grids.uniform(n, end=1e-3)) for n in (400, 800)
    )
    assert strong_error(coarse, fine) > 0.1


@pytest.mark.parametrize("solver", [diffrax.SPaRK(), diffrax.ShARK()], ids=named)
def test_adaptive_sde_needs_fewer_calls(solver, on_one_path, gmm_data, gmm_null):
    """B23: tighter is closer; and with as many calls Euler–Maruyama, of order 1, is further off, so
    that it needs more for the same pathwise error: at a tight tolerance twice as many or worse."""
    errors, calls = zip(
        *(on_one_path(1, solver, adaptive(jnp.float32(tol))) for tol in (0.3, 0.1, 0.01)),
        strict=True,
    )
    assert errors[0] > errors[1] > errors[2]
    euler = [on_one_path(n, diffrax.Euler())[0] for n in calls[1:]]
    assert errors[1] < euler[0], (errors, calls, euler)
    assert errors[2] < 0.5 * euler[1], (errors, calls, euler)
    x = jd.reverse_sde(
        VP,
        GMM5.denoiser(VP),
        KEY,
        start(VP, (2000, 2)),
        jd.grids.uniform(1, end=1e-3),
        solver=solver,
        controller=adaptive(0.1),
    )
    found = gate(x, GMM5, gmm_data)
    assert passes(found, gmm_null), found


def test_noise_may_be_a_window():
    """η(t) = 0 above a time is the flow down to it; below it the SDE goes on (B21)."""
    x, denoise = start(VP, (50, 2)), GMM5.denoiser(VP)
    grid = jd.grids.uniform(100, end=1e-3)
    window = lambda t: jnp.where(t < 0.5, 1.0, 0.0)
    states = jd.reverse_sde(VP, denoise, KEY, x, grid, eta=window, trajectory=True)
    flow = jd.reverse_sde(VP, denoise, KEY, x, grid, eta=0.0, trajectory=True)
    half = int(jnp.argmin(grid > 0.5))
    np.testing.assert_allclose(states[: half + 1], flow[: half + 1], rtol=1e-4, atol=1e-4)
    assert strong_error(states[half + 10], flow[half + 10]) > 0.05
    rest = jd.reverse_sde(VP, denoise, KEY, states[half], grid[half:])
    np.testing.assert_allclose(states[-1], rest, rtol=1e-3, atol=1e-3)


def test_trajectory_and_final_denoising_of_the_sde():
    x, denoise = start(VP, (50, 2)), GMM5.denoiser(VP)
    grid = jd.grids.uniform(50, end=0.1)
    states = jd.reverse_sde(VP, denoise, KEY, x, grid, trajectory=True)
    last = jd.reverse_sde(VP, denoise, KEY, x, grid)
    np.testing.assert_array_equal(states[0], x)
    np.testing.assert_allclose(states[-1], last, rtol=1e-5, atol=1e-5)
    half = jd.reverse_sde(VP, denoise, KEY, x, grid[:26])
    np.testing.assert_allclose(states[25], half, rtol=1e-4, atol=1e-4)
    found = jd.reverse_sde(VP, denoise, KEY, x, grid, final_denoise=True, evaluations=True)
    np.testing.assert_allclose(found.x, denoise(last, grid[-1]).mean, rtol=1e-4, atol=1e-4)
    assert int(found.num_evaluations) == 51


@pytest.mark.parametrize("solve", ["reverse_sde", "probability_flow"])
def test_a_solve_reports_its_progress(solve, capfd):
    x, denoise = start(VP, (4, 2)), GMM5.denoiser(VP)
    meter = diffrax.TextProgressMeter(0.2)
    if solve == "reverse_sde":
        run = lambda **o: jd.reverse_sde(VP, denoise, KEY, x, jd.grids.uniform(20, end=0.1), **o)
    else:
        run = lambda **o: jd.probability_flow(VP, denoise, x, 1.0, 0.1, **o)
    plain = run()
    assert "%" not in capfd.readouterr().out
    np.testing.assert_allclose(run(progress=meter), plain, rtol=1e-6)
    jax.effects_barrier()
    assert "100.00%" in capfd.readouterr().out


@pytest.mark.parametrize("eta", [1.0, 0.0, jnp.float32(0.0)])
def test_reverse_sde_starts_from_no_signal_at_all(eta):
    """Where α(1) = 0 the SDE's rates are infinite; it starts along the flow."""
    process = jd.Gaussian(jd.straight())
    denoise = GaussianData(process, 0.7, 0.3)
    grid = jd.grids.uniform(500, end=1e-3)
    x = jd.reverse_sde(process, denoise, KEY, start(process, (4000, 2)), grid, eta=eta)
    np.testing.assert_allclose(x.mean(), 0.7, atol=0.02)
    np.testing.assert_allclose(x.std(), 0.3, atol=0.02)


SDE_CALLS = {"Euler": 1, "EulerHeun": 1, "Heun": 2, "SEA": 1, "ShARK": 2, "SRA1": 2, "SPaRK": 3}
SDE_CALLS |= {"GeneralShARK": 2, "SlowRK": 2}


@pytest.mark.parametrize("solver", SDE_SOLVERS, ids=named)
def test_calls_of_an_sde_solver_are_counted(solver):
    calls = []

    def denoise(x, t):
        jax.debug.callback(lambda _: calls.append(None), x[0, 0])
        return GaussianData(VP, 0.7, 0.3)(x, t)

    x, grid = start(VP, (4, 2)), jd.grids.uniform(10, end=1e-3)
    found = jd.reverse_sde(VP, denoise, KEY, x, grid, solver=solver, evaluations=True)
    jax.effects_barrier()
    assert int(found.num_evaluations) == len(calls) == 10 * SDE_CALLS[named(solver)]


@pytest.mark.parametrize(
    ("solver", "expected"),
    [(diffrax.ALIGN(), 4), (diffrax.ShOULD(), 7), (diffrax.QUICSORT(), 6)],
    ids=["ALIGN", "ShOULD", "QUICSORT"],
)
def test_calls_of_langevin_with_momentum(solver, expected):
    """As its docstring says, in three steps."""
    calls = []

    def denoise(x, t):
        jax.debug.callback(lambda _: calls.append(None), x[0, 0])
        return GaussianData(VP, 0.7, 0.3)(x, t)

    corrector = jd.UnderdampedLangevin(VP, steps=3, solver=solver)
    keys, model = jax.random.split(KEY, 4), jax.tree_util.Partial(denoise)
    jax.block_until_ready(corrector.correct(keys, start(VP, (4, 2)), jnp.float32(0.5), model))
    jax.effects_barrier()
    assert len(calls) == expected


def test_langevin_with_momentum_keeps_the_density_and_mends_it():
    """Its stationary law is p_t; from a state 30 % too wide it comes back within ten steps."""
    t = jnp.float32(0.5)
    alpha, sigma = VP.schedule(t)
    right = GMM5.diffused(alpha, sigma).sample(jax.random.key(4), 4000)
    centre = right.mean(0)
    wrong = centre[None] + 1.3 * (right - centre[None])
    fresh = GMM5.diffused(alpha, sigma).sample(jax.random.key(5), 4000)
    for solver in (diffrax.ALIGN(), diffrax.ShOULD(), diffrax.QUICSORT()):
        run = lambda x, solver=solver: underdamped_langevin(
            VP, GMM5.denoiser(VP), KEY, x, t, steps=10, step_size=0.5, solver=solver
        )
        np.testing.assert_allclose(run(right).std(0), fresh.std(0), rtol=0.04)
        before, after = (energy_distance(x, fresh) for x in (wrong, run(wrong)))
        assert after < 0.2 * before, (solver, before, after)


# Probability flow


@every_schedule
def test_probability_flow_passes_the_gate(name, gmm_data, gmm_null):
    process = jd.Gaussian(SCHEDULES[name])
    x = jd.probability_flow(process, GMM5.denoiser(process), start(process, (2000, 2)), 1.0, 1e-4)
    found = gate(x, GMM5, gmm_data)
    assert passes(found, gmm_null), found


def test_flow_and_sde_share_their_marginals(gmm_null):
    """B12: at t = .75, .5 and .25; and the same noise gives the same sample bit for bit."""
    x, denoise = start(VP, (2000, 2)), GMM5.denoiser(VP)
    for end in (0.75, 0.5, 0.25):
        flow = jd.probability_flow(VP, denoise, x, 1.0, end)
        grid = jd.grids.uniform(200, end=end)
        sde = jd.reverse_sde(VP, denoise, KEY, start(VP, (2000, 2), jax.random.key(1)), grid)
        assert energy_distance(flow, sde) <= 2 * gmm_null
        np.testing.assert_array_equal(flow, jd.probability_flow(VP, denoise, x, 1.0, end))


def test_adaptive_flow_is_frugal(gmm_data, gmm_null):
    """B22: tolerance 1e-3 passes the gate within 150 calls."""
    flow = jd.probability_flow(
        VP,
        GMM5.denoiser(VP),
        start(VP, (2000, 2)),
        1.0,
        1e-3,
        controller=adaptive(1e-3),
        evaluations=True,
    )
    assert passes(gate(flow.x, GMM5, gmm_data), gmm_null)
    assert flow.num_evaluations <= 150


@pytest.mark.parametrize("solver", ODE_SOLVERS, ids=named)
@pytest.mark.parametrize("chooses", [True, False])
def test_reported_calls_are_the_calls_made(solver, chooses):
    """B22: counted on the host, for every explicit solver, rejected steps and all."""
    calls = []

    def denoise(x, t):
        jax.debug.callback(lambda _: calls.append(None), x[0, 0])
        return GaussianData(VP, 0.7, 0.3)(x, t)

    controller = adaptive(1e-3) if chooses else diffrax.StepTo(jnp.linspace(-1.0, -1e-3, 11))
    flow = jd.probability_flow(
        VP,
        denoise,
        start(VP, (4, 2)),
        1.0,
        1e-3,
        solver=solver,
        controller=controller,
        evaluations=True,
    )
    jax.effects_barrier()
    assert int(flow.num_evaluations) == len(calls)


def test_first_step_that_is_rejected_is_counted_too():
    calls = []

    def denoise(x, t):
        jax.debug.callback(lambda _: calls.append(None), x[0, 0])
        # A cliff within the first step, that the choice of the first step cannot see.
        return jd.Denoised(jnp.where(t < 0.9999, 1.0, 0.0) * jnp.tanh(50 * x))

    flow = jd.probability_flow(
        VP, denoise, start(VP, (4, 2)), 1.0, 0.9, controller=adaptive(1e-4), evaluations=True
    )
    jax.effects_barrier()
    assert int(flow.num_evaluations) == len(calls)


def test_trajectories_do_not_cross():
    """B14: a thousand sorted starts arrive in order."""
    data = gaussian_mixture([0.3, 0.7], [[-1.0], [0.8]], [0.15, 0.25])
    x = jnp.linspace(-3.0, 3.0, 1000)[:, None]
    end = jd.probability_flow(VP, data.denoiser(VP), x, 1.0, 1e-3, controller=adaptive(1e-6))
    assert np.all(np.diff(np.asarray(end)[:, 0]) > 0)


@every_schedule
def test_encoding_round_trips(name):
    """B15, B13: data to latents to data within 5e-3, and the latents are the prior's."""
    process = jd.Gaussian(SCHEDULES[name])
    denoise = GMM5.denoiser(process)
    x = GMM5.sample(jax.random.key(7), 2000)
    x = jax.vmap(lambda x, key: process.marginal(x, jnp.float32(1e-3)).sample(key))(
        x, jax.random.split(KEY, 2000)
    )
    end = 1.0 if name != "user" else 0.999
    options = {"controller": adaptive(1e-5)}
    latent = jd.probability_flow(process, denoise, x, 1e-3, end, **options)
    back = jd.probability_flow(process, denoise, latent, end, 1e-3, **options)
    assert jnp.abs(back - x).max() <= 5e-3
    alpha, sigma = process.schedule(jnp.float32(end))
    mean, cov = GMM5.moments()
    cov = alpha**2 * cov + sigma**2 * jnp.eye(2)
    error = jnp.sqrt(jnp.diagonal(cov) / 2000)
    np.testing.assert_array_less(jnp.abs(latent.mean(0) - alpha * mean), 3 * error)
    spread = np.cov(np.asarray(latent).T) / np.sqrt(np.outer(np.diag(cov), np.diag(cov)))
    expected = cov / np.sqrt(np.outer(np.diag(cov), np.diag(cov)))
    np.testing.assert_allclose(spread, expected, atol=3 * np.sqrt(2 / 2000))


def test_steps_per_example_do_not_know_of_the_batch():
    """B22: alone or among others, an example takes the same steps to the same end."""
    x, denoise = start(VP, (64, 2)), GMM5.denoiser(VP)
    run = lambda x: jd.probability_flow(
        VP,
        denoise,
        x,
        1.0,
        1e-3,
        per_example=True,
        controller=diffrax.PIDController(rtol=1e-4, atol=1e-4),
        evaluations=True,
    )
    whole, part = run(x), run(x[:5])
    np.testing.assert_allclose(whole.x[:5], part.x, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(whole.num_evaluations[:5], part.num_evaluations)
    assert len(np.unique(whole.num_evaluations)) > 3
    exact = jd.probability_flow(VP, denoise, x, 1.0, 1e-3, controller=adaptive(1e-6))
    assert strong_error(whole.x, exact) < 1e-3


def test_steps_per_example_take_their_own_condition():
    """Each example of a labelled batch sees its own label."""

    def apply(params, x, level, label):
        return params * x + label[:, None]

    label = jnp.arange(4.0)
    denoise = jd.NetDenoiser(jnp.float32(0.3), VP, apply, jd.x0(), {"label": label})
    x = start(VP, (4, 2))
    shared, own = (
        jd.probability_flow(VP, denoise, x, 1.0, 0.1, controller=adaptive(1e-6), per_example=each)
        for each in (False, True)
    )
    np.testing.assert_allclose(own, shared, rtol=1e-4, atol=1e-4)


def test_states_on_the_way_come_from_dense_output():
    x, denoise = start(VP, (50, 2)), GMM5.denoiser(VP)
    options = {"controller": adaptive(1e-6)}
    times = jnp.array([0.9, 0.4, 1e-3])
    states = jd.probability_flow(VP, denoise, x, 1.0, 1e-3, times=times, **options)
    for t, state in zip(times, states, strict=True):
        expected = jd.probability_flow(VP, denoise, x, 1.0, t, **options)
        assert strong_error(state, expected) < 1e-3
    found = jd.probability_flow(
        VP, denoise, x, 1.0, 0.2, times=jnp.array([0.5, 0.2]), final_denoise=True, **options
    )
    np.testing.assert_allclose(
        found[1],
        denoise(jd.probability_flow(VP, denoise, x, 1.0, 0.2, **options), jnp.float32(0.2)).mean,
        rtol=1e-3,
        atol=1e-3,
    )
    # Denoised is the last state asked for, at its own time.
    early = jd.probability_flow(
        VP, denoise, x, 1.0, 0.2, times=jnp.array([0.5]), final_denoise=True, **options
    )
    np.testing.assert_allclose(
        early[0], denoise(found[0], jnp.float32(0.5)).mean, rtol=1e-3, atol=1e-3
    )


@every_schedule
def test_denoiser_serves_another_process(name):
    """The exact denoiser of one process, rescaled, is the exact one of every other."""
    source, target = VP, jd.Gaussian(SCHEDULES[name])
    rescaled = Rescaled(GMM5.denoiser(source), source, target)
    lowest, highest = (float(source.log_snr(jnp.float32(t))) for t in (1.0, 1e-4))
    for t in (0.9, 0.5, 0.1):
        t = jnp.float32(t)
        if not lowest < float(target.log_snr(t)) < highest:
            continue
        alpha, sigma = target.schedule(t)
        x = GMM5.diffused(alpha, sigma).sample(KEY, 100)
        expected = GMM5.denoiser(target)(x, t).mean
        assert strong_error(rescaled(x, t).mean, expected) < 2e-3


def test_flow_on_a_gentler_clock_is_the_same_flow():
    """B24: in (x/α, σ/α), on EDM's clock, the same x_1 gives the same x_0."""
    target = jd.Gaussian(jd.edm(2e-3, 100.0))
    rescaled = Rescaled(GMM5.denoiser(VP), VP, target)
    s = 0.95
    level = VP.log_snr(jnp.float32(s))
    u = time_of_log_snr(target.schedule, level)
    x = start(VP, (200, 2))
    options = {"controller": adaptive(1e-6)}
    ends = [jnp.float32(0.01), None]
    ends[1] = time_of_log_snr(target.schedule, VP.log_snr(ends[0]))
    plain = jd.probability_flow(VP, GMM5.denoiser(VP), x, s, ends[0], **options)
    alpha, _ = VP.schedule(jnp.float32(s))
    gentle = jd.probability_flow(target, rescaled, x / alpha, u, ends[1], **options)
    alpha, _ = VP.schedule(ends[0])
    assert strong_error(alpha * gentle, plain) < 1e-4


def test_no_solve_compiles_twice():
    traces = []

    def apply(params, x, level):
        traces.append(None)
        return params * x

    x, grid = jnp.ones((4, 2)), sde_grid("linear_beta", 10)
    runs = {
        "sde": lambda p, d, key, eta: jd.reverse_sde(p, d, key, x, grid, eta=eta),
        "flow": lambda p, d, key, eta: jd.probability_flow(p, d, x, 1.0, 1e-3 + 1e-3 * eta),
        "likelihood": lambda p, d, key, eta: jd.log_likelihood(p, d, x, key=key, probes=2),
    }
    for run in runs.values():
        counts = []
        for seed, beta_max, scale, eta in ((0, 20.0, 0.5, 1.0), (1, 10.0, 0.3, 0.5)):
            process = jd.Gaussian(jd.linear_beta(0.1, beta_max))
            denoise = jd.NetDenoiser(jnp.float32(scale), process, apply, jd.epsilon())
            run(process, denoise, jax.random.key(seed), eta)
            counts.append(len(traces))
        assert counts[0] == counts[1]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, d: jd.probability_flow(VP, d, x, 1.5, 0.0), "t0"),
        (lambda x, d: jd.probability_flow(VP, d, x, 1.0, -0.1), "t1"),
        (lambda x, d: jd.reverse_sde(VP, d, KEY, x, jd.grids.uniform(5), eta=-1.0), "eta"),
        (lambda x, d: jd.reverse_sde(VP, d, KEY, x, jnp.array([0.1, 0.5])), "grid"),
    ],
)
def test_bad_arguments_are_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call(jnp.zeros((2, 2)), GMM5.denoiser(VP))


def test_a_solve_that_does_not_finish_says_so():
    with pytest.raises(Exception, match="maximum number of solver steps"):
        jd.probability_flow(VP, GMM5.denoiser(VP), jnp.ones((2, 2)), 1.0, 1e-3, max_steps=3)


# The clock


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("ends", [(1e-5, 1.0), (1.0, 1e-3)])
def test_clock_is_the_root_where_noise_sets_in_at_once(name, ends):
    t0, t1 = map(jnp.float32, ends)
    process, steps = jd.Gaussian(SCHEDULES[name]), diffrax.StepTo(jnp.linspace(-1.0, -1e-3, 5))
    clock = solve.clock_of(process, t0, t1, adaptive(1e-3))
    # σ ∝ √t for these, by a hair for cosine; t or a constant for the others.
    rooted = name in ("linear_beta", "from_betas", "cosine")
    assert float(clock.power) == (2.0 if rooted else 1.0)
    clipped = diffrax.ClipStepSizeController(adaptive(1e-3), step_ts=jnp.array([0.5]))
    shortest = diffrax.PIDController(rtol=1e-3, atol=1e-3, dtmin=1e-4)
    for in_units_of_t in (steps, clipped, shortest):
        assert float(solve.clock_of(process, t0, t1, in_units_of_t).power) == 1.0
    t = jnp.linspace(t0, t1, 20)
    tau = clock.of(t)
    assert (jnp.diff(tau) > 0).all()
    np.testing.assert_allclose(jax.vmap(clock.time)(tau), t, rtol=1e-6)
    slopes = jax.vmap(jax.grad(clock.time))(tau)
    np.testing.assert_allclose(jax.vmap(clock.rate)(tau), slopes, rtol=1e-6)


def test_errors_of_a_network_do_not_slow_the_flow_down(monkeypatch):
    """An error of ε that stays as t → 0 is a pole t^−½ of the velocity: a quarter fewer calls."""

    def denoise(x, t):
        alpha, sigma = VP.schedule(t)
        return jd.Denoised((x - sigma * (alpha * x + 0.3 * jnp.sin(4.0 * x))) / alpha)

    model = jax.tree_util.Partial(denoise)

    def solved(n):
        x = jax.random.normal(KEY, (n, 2))
        options = {"controller": adaptive(1e-5), "evaluations": True}
        return jd.probability_flow(VP, model, x, 1e-5, 1.0, **options)

    ours = solved(20)
    plain = lambda process, t0, t1, controller: solve.Clock(jnp.float32(1.0), jnp.float32(1.0))
    monkeypatch.setattr(solve, "clock_of", plain)
    theirs = solved(21)  # of another shape, so that it is compiled anew
    np.testing.assert_allclose(ours.x, theirs.x[:20], atol=2e-4)
    assert ours.num_evaluations < 0.8 * theirs.num_evaluations
