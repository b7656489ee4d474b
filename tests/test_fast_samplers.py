"""Exponential integrators and multistep samplers: the gate and its mutants, orders, the ends.

One compiled step a sampler serves almost the whole file: the schedule is a number (`AnySchedule`),
so are the mistakes, and grids are walked in Python.
"""

import dataclasses
import functools
import itertools
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import scipy.integrate
from oracles import GMM5, SCHEDULES, GaussianData, Late, Loud, gate, passes

import jaxdiff as jd
from jaxdiff.data.mixture import GaussianMixture
from jaxdiff.processes.base import example_keys
from jaxdiff.samplers import deis, dpm_solver_plus
from jaxdiff.samplers.deis import DEIS
from jaxdiff.samplers.dpm_solver import DPMSolver, weights_at, weights_over
from jaxdiff.samplers.dpm_solver_plus import DPMSolverPP, DPMSolverPPSingle
from jaxdiff.samplers.pndm import PNDM
from jaxdiff.samplers.unipc import UniPC

KEY = jax.random.key(0)
NAMES = ["linear_beta", "cosine", "subvp", "edm", "straight", "user"]


class AnySchedule(NamedTuple):
    """All schedules of the tests in one program."""

    index: Any

    def __call__(self, t):
        branches = [SCHEDULES[name] for name in NAMES]
        return jax.lax.switch(jnp.asarray(self.index, int), branches, t)


CALLS = []


class Either(NamedTuple):
    """A denoiser or its late mutant, in one program; may write down the times of its calls."""

    denoise: Any
    late: Any
    is_late: Any
    is_counted: Any

    def __call__(self, x, t):
        count = lambda: jax.debug.callback(lambda t: CALLS.append(float(t)), t)
        jax.lax.cond(self.is_counted > 0.0, count, lambda: None)
        late, plain = (lambda: self.late(x, t)), (lambda: self.denoise(x, t))
        return jax.lax.cond(self.is_late > 0.0, late, plain)


class Sampler(NamedTuple):
    """How to make a sampler, and what is expected of it.

    Attributes:
        make: from a process.
        steps: on a log-SNR grid, for the gate.
        calls: of the network in 6 steps from α > 0 to σ = 0, and in 5 from α = 0 to σ = 0.
        order: at least this, measured from 20 to 80 steps.
    """

    make: Any
    steps: int = 40
    calls: tuple[int, int] = (6, 5)
    order: float = 0.0
    noisy: bool = False


SAMPLERS = {
    "DPM-Solver-1": Sampler(lambda p: DPMSolver(p, order=1), 200, order=0.95),
    "DPM-Solver-2": Sampler(lambda p: DPMSolver(p), calls=(11, 8), order=1.9),
    "DPM-Solver-3": Sampler(lambda p: DPMSolver(p, order=3), calls=(16, 11), order=2.9),
    "++2M": Sampler(lambda p: DPMSolverPP(p), 80, order=1.9),
    "++3M": Sampler(lambda p: DPMSolverPP(p, order=3), order=2.8),
    "++2S": Sampler(lambda p: DPMSolverPPSingle(p), 80, (11, 8), 1.8),
    "SDE ++2M": Sampler(lambda p: DPMSolverPP(p, eta=1.0), 200, noisy=True),
    "SDE ++3M": Sampler(lambda p: DPMSolverPP(p, order=3, eta=1.0), 200, noisy=True),
    "SDE ++2S": Sampler(lambda p: DPMSolverPPSingle(p, eta=1.0), 200, (11, 8), noisy=True),
    "UniPC-2": Sampler(lambda p: UniPC(p), order=2.7),
    "UniPC-3": Sampler(lambda p: UniPC(p, order=3), order=3.3),
    "DEIS-3": Sampler(lambda p: DEIS(p), order=2.6),
    "DEIS-3, ρ": Sampler(lambda p: DEIS(p, clock=deis.RHO), order=2.5),
    "DEIS-4, t": Sampler(lambda p: DEIS(p, order=4, clock=deis.TIME), order=2.9),
    "PNDM-2": Sampler(lambda p: PNDM(p, order=2), 80, (7, 5), 1.8),
    "PNDM-4": Sampler(lambda p: PNDM(p), 80, (15, 11), 2.0),
    "PNDM, PLMS": Sampler(lambda p: PNDM(p, kutta=False), 80, (7, 5), 1.9),
}
every_sampler = pytest.mark.parametrize("name", SAMPLERS)


def process_of(schedule):
    return jd.Gaussian(AnySchedule(float(NAMES.index(schedule))))


VP = process_of("linear_beta")


def loud(step, factor=1.0):
    """The step; one that takes noise, with all of it scaled, and so in one program for all η."""
    return Loud(step, factor) if hasattr(step, "eta") else step


def sampler(name, process=VP):
    return loud(SAMPLERS[name].make(process))


@functools.cache
def log_snr_grid(schedule, steps, end=None):
    """Steps equal in log-SNR, read off a table: from where it is finite to `end`, or to 0."""
    times = np.geomspace(oracles.start_of(schedule), end or 1e-3, 20001)
    table = np.asarray(jax.vmap(jd.Gaussian(SCHEDULES[schedule]).log_snr)(jnp.asarray(times)))
    levels = np.linspace(table[0], table[-1], steps + (end is not None))
    grid = np.interp(levels, table, times)
    return jnp.asarray(grid if end is not None else np.append(grid, 0.0))


@functools.cache
def start(schedule):
    return jd.Gaussian(SCHEDULES[schedule]).prior((2000, 2)).sample(KEY)


@jax.jit
def advance(step, denoise, keys, index, x, state, t, s):
    keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, index)
    return step.update(keys, x, state, t, s, denoise)


@jax.jit
def _drive(step, denoise, keys, times, count, x):
    def body(index, carry):
        return advance(step, denoise, keys, index, *carry, times[index], times[index + 1])

    return jax.lax.fori_loop(0, count, body, (x, step.init(x)))[0]


def drive(step, denoise, grid, x, counted=0.0):
    """What `jd.sample` does, in a program that serves all lengths of grids."""
    late = isinstance(denoise, Late)
    plain = denoise.denoise if late else denoise
    denoise = Either(plain, Late(plain.process, plain), float(late), counted)
    # Weakly typed numbers would compile anew.
    denoise = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), denoise)
    count, times = len(grid) - 1, jnp.zeros(300).at[: len(grid)].set(jnp.asarray(grid))
    return _drive(step, denoise, example_keys(KEY, len(x)), times, count, x)


def calls(step, denoise, grid, x):
    """The times at which the network is called."""
    CALLS.clear()
    drive(step, denoise, grid, x, counted=1.0).block_until_ready()
    jax.effects_barrier()
    return list(CALLS)


def errors(found, exact):
    return float(jnp.median(jnp.linalg.norm(found - exact, axis=1)))


# The gate


@every_sampler
def test_exact_score_passes_the_gate(name, gmm_data, gmm_null):
    """On the variance-preserving schedule, and on another by turns."""
    another = NAMES[1 + list(SAMPLERS).index(name) % (len(NAMES) - 1)]
    for schedule in ("linear_beta", another):
        process = process_of(schedule)
        grid = log_snr_grid(schedule, SAMPLERS[name].steps)
        x = drive(sampler(name, process), GMM5.denoiser(process), grid, start(schedule))
        found = gate(x, GMM5, gmm_data)
        assert passes(found, gmm_null), (schedule, found)


@every_sampler
def test_gate_catches_the_mutants(name):
    """Each by the number that should see it, so that the energy distance can be spared."""
    plain, grid_to = SAMPLERS[name].make(VP), lambda end: log_snr_grid("linear_beta", steps, end)
    steps, noisy = SAMPLERS[name].steps, SAMPLERS[name].noisy
    for mutant in ("late score", "early stop", "wrong weights", *(["loud noise"] * noisy)):
        step, denoise, grid = oracles.mutated(mutant, plain, VP, grid_to)
        step = loud(step) if step is plain else step
        with mock.patch.object(oracles, "energy_distance", return_value=0.0):
            found = gate(drive(step, denoise, grid, start("linear_beta")), GMM5, None)
        assert not passes(found, 1.0), (mutant, found)
        assert oracles.MUTANTS[mutant](found), (mutant, found)


@pytest.mark.parametrize("eta", [0.4, 1.4])
def test_every_eta_has_the_same_marginals(eta, gmm_data, gmm_null):
    for make in (DPMSolverPP, DPMSolverPPSingle):
        step = loud(make(VP, eta=eta))
        x = drive(step, GMM5.denoiser(VP), log_snr_grid("linear_beta", 200), start("linear_beta"))
        found = gate(x, GMM5, gmm_data)
        assert passes(found, gmm_null), found


# Orders


@pytest.fixture(scope="module")
def exact():
    """The flow of the five modes from 1 to 0.01, by diffrax."""
    process = jd.Gaussian(SCHEDULES["linear_beta"])
    x = jd.probability_flow(
        process,
        GMM5.denoiser(process),
        start("linear_beta"),
        1.0,
        0.01,
        controller=jd.solve.adaptive(1e-6),
    )
    return x


@pytest.mark.parametrize("name", [name for name in SAMPLERS if SAMPLERS[name].order])
def test_order(name, exact):
    """B25, B26: the median error falls as the order says."""
    x, denoise, step = start("linear_beta"), GMM5.denoiser(VP), sampler(name)
    found = [
        errors(drive(step, denoise, log_snr_grid("linear_beta", n, 0.01), x), exact)
        for n in (20, 40, 80)
    ]
    order = np.log2(found[0] / found[2]) / 2
    assert order >= SAMPLERS[name].order, (order, found)
    if name == "DPM-Solver-1":
        assert order < 1.1, found
    if name == "++2M":
        assert found[0] / found[1] >= 3.2, found


class Gaussian1D(NamedTuple):
    """A stochastic sampler's step on N(0, 0.5²), driven by given noises."""

    step: Any

    def variance(self, steps):
        """The exact variance at the end: the squared effects of all noises, one a row, summed."""
        process = self.step.process
        grid = log_snr_grid("linear_beta", steps, 0.01)
        draws = 2 if isinstance(self.step, DPMSolverPPSingle) else 1
        rows = 1 + draws * steps
        x = jnp.zeros((rows, 1)).at[0, 0].set(1.0)
        denoise, state = GaussianData(process, 0.0, 0.5), self.step.init(x)
        for i, (t, s) in enumerate(itertools.pairwise(jnp.asarray(grid))):
            noises = jnp.zeros((draws, rows, 1))
            noises = noises.at[jnp.arange(draws), 1 + draws * i + jnp.arange(draws), 0].set(1.0)
            x, state = _advance_with(self.step, denoise, noises, x, state, t, s)
        alpha, sigma = process.schedule(jnp.asarray(1.0))
        scale = jnp.ones(rows).at[0].set(jnp.sqrt((0.5 * alpha) ** 2 + sigma**2))
        alpha, sigma = process.schedule(jnp.asarray(grid[-1]))
        return float(jnp.sum((scale * x[:, 0]) ** 2) - (0.5 * alpha) ** 2 - sigma**2)


@jax.jit
def _advance_with(step, denoise, noises, x, state, t, s):
    keys = example_keys(KEY, len(x))
    with mock.patch.object(dpm_solver_plus, "_noise", side_effect=list(noises)):
        return step.update(keys, x, state, t, s, denoise)


@pytest.mark.parametrize("make", [DPMSolverPP, DPMSolverPPSingle])
def test_weak_order_of_the_stochastic_forms(make):
    """Gaussian data make a sampler linear: its variance, and the error of it, are exact sums."""
    process = jd.Gaussian(SCHEDULES["linear_beta"])
    found = [abs(Gaussian1D(make(process, eta=1.0)).variance(n)) for n in (40, 80)]
    assert abs(np.log2(found[0] / found[1]) - 2.0) < 0.15, found


# Identities


@pytest.mark.parametrize("schedule", ["linear_beta", "straight"])
def test_first_orders_are_ddim_and_ancestral(schedule):
    process, x = jd.Gaussian(SCHEDULES[schedule]), start(schedule)[:3]
    denoise = GMM5.denoiser(process)
    t, s = jnp.float32(0.6), jnp.float32(0.35)
    keys = example_keys(KEY, 3)

    def of(step):
        return step.update(keys, x, step.init(x), t, s, denoise)[0]

    scale = float(jnp.abs(x).max())
    for step in (DPMSolver(process, order=1), DPMSolverPP(process, order=1), DEIS(process, 1)):
        np.testing.assert_allclose(of(step), of(jd.DDIM(process)), rtol=1e-5, atol=2e-6 * scale)
    stochastic = of(DPMSolverPP(process, order=1, eta=1.0))
    np.testing.assert_allclose(stochastic, of(jd.Ancestral(process)), rtol=2e-4, atol=2e-5 * scale)


def test_average_in_time_is_adams_bashforth():
    """The classical coefficients of equal steps; missing values lower the order."""
    coefficients = {
        1: [1.0],
        2: [1.5, -0.5],
        3: [23 / 12, -16 / 12, 5 / 12],
        4: [55 / 24, -59 / 24, 37 / 24, -9 / 24],
    }
    for order, expected in coefficients.items():
        nodes = jnp.array([0.5 + 0.1 * k if k < order else jnp.inf for k in range(4)])
        found = weights_over(nodes, nodes[0], nodes[0] - 0.1)
        np.testing.assert_allclose(found, expected + [0.0] * (4 - order), atol=2e-5)


@pytest.mark.parametrize("rate", [-1.0, 1.0, 2.0])
def test_exponential_averages(rate):
    """Against adaptive quadrature of the interpolating parabola, at unequal nodes."""
    nodes, stop = np.array([-1.0, -1.7, -3.0]), 0.8
    density = lambda x: np.exp(rate * x)
    total = scipy.integrate.quad(density, nodes[0], stop)[0]
    found = weights_over(
        jnp.asarray(nodes), jnp.float32(nodes[0]), jnp.float32(stop), lambda x: rate * x
    )
    for i in range(3):
        basis = np.poly1d(np.polyfit(nodes, np.eye(3)[i], 2))
        mean = scipy.integrate.quad(lambda x, p=basis: p(x) * density(x), nodes[0], stop)[0] / total
        np.testing.assert_allclose(found[i], mean, rtol=1e-4)
    np.testing.assert_allclose(weights_at(jnp.asarray(nodes), jnp.float32(-1.7)), [0, 1, 0])


def test_infinite_steps_and_missing_values_have_no_weight():
    nodes = jnp.array([-1.0, jnp.inf, -jnp.inf, -2.0])
    middle = weights_at(nodes, jnp.float32(-0.5))
    np.testing.assert_allclose(middle, [1.5, 0.0, 0.0, -0.5], rtol=1e-6)
    for start, stop in ((-1.0, jnp.inf), (-jnp.inf, 1.0)):
        found = weights_over(nodes, jnp.float32(start), jnp.float32(stop), lambda x: x)
        np.testing.assert_array_equal(found, [1.0, 0.0, 0.0, 0.0])
    np.testing.assert_array_equal(weights_at(nodes, jnp.float32(jnp.inf)), [1.0, 0.0, 0.0, 0.0])


class Parabola(NamedTuple):
    """A denoiser whose mean is a parabola in λ, whatever the state."""

    process: Any

    def __call__(self, x, t):
        clock = 0.5 * self.process.log_snr(t)
        return jd.Denoised(jnp.full_like(x, 0.3 + 0.2 * clock + 0.1 * clock**2))


def test_third_order_with_noise_is_exact_for_parabolas():
    """Its mean against quadrature of the reverse SDE's solution, for η between 0 and 1."""
    process, eta = jd.Gaussian(SCHEDULES["linear_beta"]), 0.6
    times = jnp.array([0.7, 0.6, 0.45, 0.25])
    step, x = loud(DPMSolverPP(process, order=3, eta=eta), 0.0), jnp.ones((1, 1))
    state, keys = step.init(x), example_keys(KEY, 1)
    for t, s in itertools.pairwise(times):
        before = float(x[0, 0])
        x, state = advance(step, Parabola(process), keys, 0, x, state, t, s)
    (_, sigma_t), (alpha_s, sigma_s) = map(process.schedule, times[-2:])
    start, stop = (0.5 * float(process.log_snr(t)) for t in times[-2:])
    kappa = 1.0 + eta**2
    mean = lambda u: np.exp(-kappa * (stop - u)) * (0.3 + 0.2 * u + 0.1 * u**2)
    expected = sigma_s / sigma_t * np.exp(-(eta**2) * (stop - start)) * before
    expected += alpha_s * kappa * scipy.integrate.quad(mean, start, stop)[0]
    np.testing.assert_allclose(x[0, 0], expected, rtol=2e-5)


# The ends


def known(point):
    """Data that are one point, as a mixture of the usual shape."""
    return GaussianMixture(GMM5.weights, jnp.tile(point, (5, 1)), jnp.zeros((5, 2)), GMM5.axes)


@pytest.mark.parametrize("steps", [1, 2, 3])
@every_sampler
def test_point_mass_is_found_in_few_steps(name, steps):
    """B26: with x_0 known, every step is exact, on every schedule, from α = 0 and to σ = 0."""
    point = jnp.array([0.4, -0.7])
    mass = known(point)
    for schedule in NAMES:
        if name.startswith("PNDM") and schedule == "edm":
            continue  # its ε at σ = 0.002, of a state that was at 80, is lost in float32's rounding
        process = process_of(schedule)
        grid = np.linspace(1.0, 0.0, steps + 1).astype(np.float32)
        x = drive(sampler(name, process), mass.denoiser(process), grid, start(schedule))
        # A schedule that starts at σ(0) > 0 leaves that much noise.
        floor = 6 * float(SCHEDULES[schedule](jnp.zeros(()))[1])
        np.testing.assert_allclose(x - point[None], 0.0, atol=1e-5 + floor, err_msg=schedule)


@every_sampler
def test_known_data_keep_the_marginal_midway(name):
    """B26: also on the way, x_s is α_s x_0 + σ_s ε with the noise of the start, or fresh noise."""
    mass = known(jnp.array([0.4, 0.4]))
    for schedule in NAMES:
        process = process_of(schedule)
        noise = np.asarray(jax.random.normal(KEY, (2000, 2)))
        (alpha_t, sigma_t), (alpha, sigma) = (
            SCHEDULES[schedule](jnp.float32(t)) for t in (0.8, 0.3)
        )
        x = alpha_t * 0.4 + sigma_t * noise
        grid = np.array([0.8, 0.6, 0.45, 0.3], np.float32)
        x = drive(sampler(name, process), mass.denoiser(process), grid, x)
        found = (x - alpha * 0.4) / sigma
        if SAMPLERS[name].noisy:
            assert abs(float(found.std()) - 1.0) < 0.05
        else:
            np.testing.assert_allclose(found, noise, rtol=1e-3, atol=1e-3, err_msg=schedule)


@pytest.mark.parametrize("name", ["DPM-Solver-2", "++3M", "++2S", "DEIS-3", "PNDM-2"])
def test_last_step_returns_the_denoised_mean(name):
    process, grid = process_of("straight"), jnp.array([1.0, 0.7, 0.4, 0.2, 0.0])
    denoise = GMM5.denoiser(process)
    x, last = (
        drive(sampler(name, process), denoise, times, start("straight"))
        for times in (grid[:-1], grid)
    )
    np.testing.assert_allclose(last, denoise(x, grid[-2]).mean, atol=1e-5)


@pytest.mark.parametrize("name", ["DPM-Solver-2", "++2M", "UniPC-2", "DEIS-4, t", "PNDM-2"])
def test_gradients_are_finite_at_the_ends(name):
    """From α = 0 to σ = 0, through all arguments; mapped, so that `cond` takes both sides."""
    process = jd.Gaussian(SCHEDULES["straight"])
    step, denoise = SAMPLERS[name].make(process), GMM5.denoiser(process)
    grid, keys = jnp.array([1.0, 0.7, 0.4, 0.2, 0.0]), jax.random.split(KEY, 5)
    x, state, points = start("straight")[:5], step.init(start("straight")[:5]), []
    for t, s in itertools.pairwise(grid):
        points.append((x, state, t, s))
        x, state = advance(step, denoise, keys, 0, x, state, t, s)
    x, state, t, s = jax.tree.map(lambda *leaves: jnp.stack(leaves), *points)

    @jax.jit
    @functools.partial(jax.vmap)
    def gradients(x, state, t, s):
        def total(x, past, mixture, step):
            whole = jax.tree.map(lambda old, new: new, state, past)
            denoise = mixture.denoiser(process)
            moved, _ = step.update(keys, x, whole, t, s, denoise)
            return jnp.sum(moved**2)

        return jax.grad(total, argnums=(0, 1, 2, 3))(x, state, GMM5, step)

    for leaf in jax.tree.leaves(gradients(x, state, t, s)):
        assert np.isfinite(leaf).all()


# Calls and programs


@every_sampler
def test_calls_are_as_documented(name):
    for schedule, expected in zip(("linear_beta", "straight"), SAMPLERS[name].calls, strict=True):
        process = process_of(schedule)
        grid = jnp.linspace(1.0, 0.0, 7 if schedule == "linear_beta" else 6)
        found = calls(sampler(name, process), GMM5.denoiser(process), grid, start(schedule))
        assert len(found) == expected, schedule


@every_sampler
def test_state_fits_a_scan(name):
    """What a step remembers keeps its structure, shapes and types."""
    step, x, t = SAMPLERS[name].make(VP), start("linear_beta"), jnp.float32(0.5)
    update = lambda *args: step.update(example_keys(KEY, 2000), *args, GMM5.denoiser(VP))
    state = step.init(x)
    found = jax.eval_shape(update, x, state, t, 0.5 * t)
    assert found == jax.eval_shape(lambda *args: args, x, state)


def test_numbers_compile_nothing_anew():
    traces = []

    def denoise(x, t):
        traces.append(None)
        return GMM5.denoiser(process)(x, t)

    process = jd.Gaussian(SCHEDULES["linear_beta"])
    x, grid = start("linear_beta")[:4], jnp.linspace(1.0, 0.0, 4)
    first = jd.sample(DPMSolverPP(process, eta=0.0), denoise, grid, KEY, x)
    traced = len(traces)
    second = jd.sample(DPMSolverPP(process, eta=0.3), denoise, grid, KEY, x)
    assert len(traces) == traced
    assert not np.allclose(first, second, rtol=1e-4)


@pytest.mark.parametrize("name", ["SDE ++2S", "UniPC-3"])
def test_examples_do_not_see_each_other(name):
    grid, x = log_snr_grid("linear_beta", 40)[:6], start("linear_beta")
    others = x.at[1000:].set(0.0)
    whole, half = (drive(sampler(name), GMM5.denoiser(VP), grid, x) for x in (x, others))
    np.testing.assert_array_equal(half[:1000], whole[:1000])


@pytest.mark.parametrize("make", [DPMSolver, DPMSolverPP, UniPC, DEIS, PNDM])
def test_orders_that_do_not_exist_are_refused(make):
    for order in (0, 5):
        with pytest.raises(ValueError, match=f"order must be one of .* got {order}"):
            make(VP, order=order)


@pytest.mark.parametrize("name", ["DPM-Solver-2", "SDE ++2S", "DPM-Solver-3"])
def test_inner_calls_lie_where_the_ratio_says(name):
    grid, plain_vp = jnp.array([0.6, 0.4]), jd.Gaussian(SCHEDULES["linear_beta"])
    start_snr, stop = (float(plain_vp.log_snr(t)) for t in grid)
    for ratio in (0.25, 1.0):
        step = loud(dataclasses.replace(SAMPLERS[name].make(VP), ratio=ratio))
        times = calls(step, GMM5.denoiser(VP), grid, start("linear_beta"))
        shares = [0.0, 2 / 3 * ratio, 2 / 3] if name == "DPM-Solver-3" else [0.0, ratio]
        found = [float(plain_vp.log_snr(jnp.float32(t))) for t in sorted(times, reverse=True)]
        expected = [start_snr + share * (stop - start_snr) for share in sorted(shares)]
        np.testing.assert_allclose(found, expected, rtol=1e-4)
