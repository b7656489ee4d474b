"""Equal settings, equal samples: diffusers' schedulers on our ε-function and their own grids."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
diffusers = pytest.importorskip("diffusers", reason="needs the test extra")
pytest.importorskip("torch", reason="needs the test extra")

import diffusers_rival
from oracles import GMM5

import jaxdiff as jd
from jaxdiff.processes.base import example_keys
from jaxdiff.samplers import unipc
from jaxdiff.samplers.deis import DEIS
from jaxdiff.samplers.dpm_solver import DPMSolver, weights_over
from jaxdiff.samplers.dpm_solver_plus import DPMSolverPP, DPMSolverPPSingle
from jaxdiff.samplers.edm import EDMSampler
from jaxdiff.samplers.pndm import PNDM
from jaxdiff.samplers.unipc import UniPC

PROCESS = diffusers_rival.PROCESS
DENOISE = GMM5.denoiser(PROCESS)
KEY = jax.random.key(0)
X = PROCESS.prior((200, 2)).sample(KEY)


@jax.jit
def advance(step, keys, index, x, state, t, s):
    keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, index)
    return step.update(keys, x, state, t, s, DENOISE)


def drive(steps, grid, x=X):
    """A step, or one for each interval of the grid, with the keys of `jd.sample`."""
    grid, keys = jnp.asarray(grid), example_keys(KEY, len(x))
    steps = steps if isinstance(steps, list) else [steps] * (len(grid) - 1)
    state = steps[0].init(x)
    for index, step in enumerate(steps):
        x, state = advance(step, keys, index, x, state, grid[index], grid[index + 1])
    return np.asarray(x)


def noises(count):
    """What our samplers draw, step by step, for theirs to be given."""
    keys = example_keys(KEY, len(X))
    draw = lambda key, i: jax.random.normal(jax.random.fold_in(key, i), X.shape[1:])
    return [jax.vmap(draw, in_axes=(0, None))(keys, i) for i in range(count)]


def test_our_table_is_their_table():
    """α and σ at the knots, to the precision of float32."""
    alphas = np.sqrt(np.cumprod(1.0 - diffusers_rival.BETAS))
    times = jnp.asarray((np.arange(1000) + 1.0) / 1000)
    alpha, sigma = jax.vmap(PROCESS.schedule)(times)
    np.testing.assert_allclose(alpha, alphas, rtol=5e-7)
    np.testing.assert_allclose(sigma, np.sqrt(1.0 - alphas**2), rtol=5e-7)


class Pair(NamedTuple):
    """Our sampler and theirs.

    Attributes:
        ours: the step.
        theirs: the scheduler's name.
        options: its options.
        end: where it stops: at their first knot, or at 0.
        atol: their coefficients of third order cancel in float32; in double precision the two agree
            to 1e-12.
    """

    ours: Any
    theirs: str
    options: dict
    end: float = 0.0
    atol: float = 1e-4


ODE = {"solver_order": 2}
SDE = {"algorithm_type": "sde-dpmsolver++"}
MULTISTEP = "DPMSolverMultistepScheduler"
PAIRS = {
    "DDIM": Pair(
        jd.DDIM(PROCESS), "DDIMScheduler", {"clip_sample": False, "timestep_spacing": "trailing"}
    ),
    "++2M": Pair(DPMSolverPP(PROCESS), MULTISTEP, ODE),
    "++2M, leading": Pair(DPMSolverPP(PROCESS), MULTISTEP, {"timestep_spacing": "leading"}),
    "SDE ++1": Pair(DPMSolverPP(PROCESS, 1, 1.0), MULTISTEP, {**SDE, "solver_order": 1}),
    "SDE ++2M": Pair(DPMSolverPP(PROCESS, 2, 1.0), MULTISTEP, SDE),
    "Euler, ancestral": Pair(jd.DDIM(PROCESS, eta=1.0), "EulerAncestralDiscreteScheduler", {}),
    "UniPC-1": Pair(UniPC(PROCESS, 1), "UniPCMultistepScheduler", {"solver_order": 1}),
    "UniPC-2": Pair(UniPC(PROCESS, 2), "UniPCMultistepScheduler", ODE),
    "UniPC-2, B = h": Pair(
        UniPC(PROCESS, 2, unipc.bh1),
        "UniPCMultistepScheduler",
        {"solver_type": "bh1", "final_sigmas_type": "sigma_min", "lower_order_final": False},
        1e-3,
    ),
    "UniPC-3": Pair(
        UniPC(PROCESS, 3),
        "UniPCMultistepScheduler",
        {"solver_order": 3, "final_sigmas_type": "sigma_min", "lower_order_final": False},
        1e-3,
        1e-3,
    ),
    "DEIS-2": Pair(
        DEIS(PROCESS, 2), "DEISMultistepScheduler", {**ODE, "lower_order_final": False}, 1e-3
    ),
    "DEIS-3": Pair(
        DEIS(PROCESS, 3),
        "DEISMultistepScheduler",
        {"solver_order": 3, "lower_order_final": False},
        1e-3,
        1e-3,
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_equal_settings_give_equal_samples(name):
    """In float32, for 200 starts and 20 steps."""
    ours, theirs, options, end, atol = PAIRS[name]
    rival = diffusers_rival.run(
        getattr(diffusers, theirs), 20, DENOISE, X, noises=noises(20), **options
    )
    grid = np.append(rival.times, end)
    assert len(grid) == 21
    np.testing.assert_allclose(drive(ours, grid), rival.x, atol=atol)


def test_heun():
    rival = diffusers_rival.run(diffusers.HeunDiscreteScheduler, 20, DENOISE, X)
    grid = np.append(rival.times[::2], 0.0)
    assert len(rival.times) == 39
    np.testing.assert_allclose(drive(EDMSampler(PROCESS), grid), rival.x, atol=1e-4)


def test_pndm():
    """Theirs repeats its times, and ends on a step from the first knot to itself."""
    rival = diffusers_rival.run(diffusers.PNDMScheduler, 20, DENOISE, X)
    grid = np.concatenate([rival.times[:12:4], rival.times[12:]])
    assert len(grid) == 20
    np.testing.assert_allclose(drive(PNDM(PROCESS), grid), rival.x, atol=1e-4)


def test_plms():
    """The same scheduler without Kutta's steps: the second time comes twice."""
    rival = diffusers_rival.run(diffusers.PNDMScheduler, 20, DENOISE, X, skip_prk_steps=True)
    grid = np.append(rival.times[0], rival.times[2:])
    assert len(grid) == 20
    np.testing.assert_allclose(drive(PNDM(PROCESS, kutta=False), grid), rival.x, atol=1e-4)


@pytest.mark.parametrize("make", [DPMSolver, DPMSolverPPSingle])
def test_singlestep_solvers(make):
    """Theirs takes its inner call on the grid: r is what the grid makes it."""
    data = make is DPMSolverPPSingle
    rival = diffusers_rival.run(
        diffusers.DPMSolverSinglestepScheduler,
        20,
        DENOISE,
        X,
        solver_order=2,
        algorithm_type="dpmsolver++" if data else "dpmsolver",
        lower_order_final=True,
        final_sigmas_type="zero" if data else "sigma_min",
    )
    grid = np.append(rival.times, 0.0 if data else 1e-3)
    half = np.asarray(jax.vmap(PROCESS.log_snr)(jnp.asarray(grid[:-1])))
    ratios = (half[1:-1:2] - half[:-2:2]) / (half[2::2] - half[:-2:2])
    # Nine steps of two calls, and two of one.
    steps = [make(PROCESS, ratio=float(ratio)) for ratio in ratios]
    first = DPMSolver(PROCESS, order=1)
    x = drive(steps[:9], grid[:19:2])
    np.testing.assert_allclose(drive([first, first], grid[18:], jnp.asarray(x)), rival.x, atol=1e-4)


class Halved(NamedTuple):
    """3M with half of the second difference, and 2M where there are two values."""

    step: DPMSolverPP

    def init(self, x):
        return self.step.init(x)

    def update(self, key, x, state, t, s, denoise):
        exact, after = self.step.update(key, x, state, t, s, denoise)
        start, stop = 0.5 * PROCESS.log_snr(t), 0.5 * PROCESS.log_snr(s)
        known = state.push(start, denoise(x, t).mean)
        h = stop - start
        alpha, _ = PROCESS.schedule(s)
        # Newton's second difference, and the average of (λ − λ_t)² that it should have.
        clock = jnp.where(jnp.isfinite(known.clock), known.clock, jnp.arange(3.0))
        gaps = clock[:-1] - clock[1:]
        slopes = (known.value[:-1] - known.value[1:]) / gaps[:, None, None]
        second = (slopes[0] - slopes[1]) / (clock[0] - clock[2])
        weights = weights_over(jnp.array([0.0, 1.0, 2.0]), 0.0 * h, h, lambda u: u)
        square = weights @ jnp.array([0.0, 1.0, 4.0])
        halved = exact - 0.5 * alpha * -jnp.expm1(-h) * square * second
        two, _ = DPMSolverPP(PROCESS, 2).update(key, x, state.latest(1), t, s, denoise)
        full = jnp.all(jnp.isfinite(state.clock)) & jnp.isfinite(h)
        return jnp.where(full, halved, jnp.where(jnp.isfinite(h), two, exact)), after


def test_third_order_multistep_differs_by_half_a_difference():
    """Theirs halves it: we agree with theirs once we do so too, and only we are of third order."""
    ours, halved = DPMSolverPP(PROCESS, 3), Halved(DPMSolverPP(PROCESS, 3))
    rival = diffusers_rival.run(
        diffusers.DPMSolverMultistepScheduler, 20, DENOISE, X, solver_order=3
    )
    np.testing.assert_allclose(drive(halved, np.append(rival.times, 0.0)), rival.x, atol=1e-4)

    grids = {n: jd.grids.uniform_log_snr(PROCESS, n, end=0.05, to_zero=False) for n in (20, 80)}
    exact = drive(ours, jd.grids.uniform_log_snr(PROCESS, 640, end=0.05, to_zero=False))
    error = lambda step, n: np.median(np.linalg.norm(drive(step, grids[n]) - exact, axis=1))
    orders = [np.log2(error(step, 20) / error(step, 80)) / 2 for step in (ours, halved)]
    assert orders[0] > 2.7, orders
    assert orders[1] < 2.3, orders


def test_ours_are_no_worse_at_ten_calls():
    """The median error of the flow: on the spacing where theirs do best, and over all they offer.

    Their steps k are whole numbers, also where their noise levels lie between two.
    """
    reference = drive(UniPC(PROCESS, 3), jd.grids.uniform_log_snr(PROCESS, 600, end=1e-4))
    error = lambda x: np.median(np.linalg.norm(x - reference, axis=1))
    theirs, grid = {}, None
    for name in (MULTISTEP, "UniPCMultistepScheduler", "DEISMultistepScheduler"):
        for spacing in ("timestep_spacing", "use_karras_sigmas", "use_exponential_sigmas"):
            for order in (2, 3):
                options = {spacing: "linspace" if spacing == "timestep_spacing" else True}
                rival = diffusers_rival.run(
                    getattr(diffusers, name), 10, DENOISE, X, solver_order=order, **options
                )
                assert len(rival.times) == 10
                theirs[error(rival.x)] = np.append(rival.times, 0.0)
    best = min(theirs)
    grid = theirs[best]
    ours = min(error(drive(DEIS(PROCESS, order), grid)) for order in (3, 4))
    assert ours <= best, (ours, best)
    own = jd.grids.uniform_log_snr(PROCESS, 10, end=1e-2)
    assert error(drive(DEIS(PROCESS, 4), own)) <= 0.9 * best
