"""Gradients of samples, through every kind of loop: right, and in memory that does not grow."""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import GMM5, SCHEDULES

import jaxdiff as jd
from jaxdiff.data.mixture import gaussian_mixture
from jaxdiff.solve import adaptive

KEY = jax.random.key(0)
VP = jd.Gaussian(jd.linear_beta(0.1, 20.0))
# Wide modes: no starts near a boundary between modes, where the exact derivative is huge.
SMOOTH = gaussian_mixture([0.4, 0.6], [[-0.5, 0.2], [0.6, -0.3]], [0.6, 0.8])
X = VP.prior((8, 2)).sample(KEY)
PROBE = jax.random.normal(jax.random.key(1), (8, 2))


def net(params, x, level):
    hidden = jnp.tanh(x @ params["in"] + level[:, None] * params["level"][None])
    return hidden @ params["out"]


PARAMS = {
    "in": 0.5 * jax.random.normal(jax.random.key(2), (2, 8)),
    "level": 0.3 * jax.random.normal(jax.random.key(3), (8,)),
    "out": 0.5 * jax.random.normal(jax.random.key(4), (8, 2)),
}


def sde(x, denoise, steps=5, **options):
    grid = jd.grids.uniform(steps, end=0.01)
    return jd.reverse_sde(VP, denoise, KEY, x, grid, **options)


def flow(x, denoise, **options):
    return jd.probability_flow(VP, denoise, x, 1.0, 0.01, **options)


def stepped(step, steps=20, **options):
    return lambda x, denoise: jd.sample(step, denoise, jd.grids.uniform(steps), KEY, x, **options)


SAMPLERS = {
    "ancestral": jd.Ancestral(VP),
    "ddim": jd.DDIM(VP),
    "ddim, noisy": jd.DDIM(VP, eta=0.7),
    "euler–maruyama": jd.EulerMaruyama(VP),
    "heun": jd.Heun(VP),
    "edm": jd.EDMSampler(VP),
    "edm, churned": jd.EDMSampler(VP, churn=0.2),
    "pc": jd.PredictorCorrector(jd.Ancestral(VP), jd.Langevin(VP)),
    "annealed": jd.AnnealedLangevin(VP, steps=2),
    "switch": jd.switch(jd.EulerMaruyama(VP), jd.DPMSolverPP(VP), 0.5),
    "dpm-solver-3": jd.DPMSolver(VP, order=3),
    "dpm-solver++ 2s": jd.DPMSolverPPSingle(VP),
    "dpm-solver++ 3m": jd.DPMSolverPP(VP, order=3),
    "sde-dpm-solver++ 2m": jd.DPMSolverPP(VP, eta=1.0),
    "unipc": jd.UniPC(VP),
    "deis": jd.DEIS(VP),
    "pndm": jd.PNDM(VP),
}
STEPS = pytest.mark.parametrize("name", SAMPLERS)


def slope(run, x, denoise):
    """d/dx of a projection of the sample, in reverse mode."""
    return jax.grad(lambda x: jnp.sum(PROBE * run(x, denoise)))(x)


def wide(tree):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), tree)


def assert_is_slope(run, x, denoise):
    """E7: within 1 % of central differences, on the same noise, in double precision."""
    with jax.enable_x64(True):
        x, denoise, direction = wide(x), wide(denoise), wide(PROBE)
        value = lambda x: jnp.sum(direction * run(x, denoise))
        step = 1e-5 * direction
        expected = (value(x + step) - value(x - step)) / 2e-5
        np.testing.assert_allclose(jnp.sum(jax.grad(value)(x) * direction), expected, rtol=1e-2)


@STEPS
def test_gradient_through_a_sampler(name):
    """E7: equal to finite differences; and checkpointed, to the stored gradient."""
    denoise, step = SMOOTH.denoiser(VP), SAMPLERS[name]
    assert_is_slope(stepped(step, 10), X, denoise)
    with jax.enable_x64(True):
        x, denoise = wide(X), wide(denoise)
        found, sparing = (slope(stepped(step, 10, checkpoints=n), x, denoise) for n in (None, 3))
    np.testing.assert_allclose(sparing, found, rtol=1e-8)


@STEPS
def test_gradient_is_finite_down_to_data(name):
    """The last step ends at σ = 0; an exact denoiser of narrow modes is the hard case."""
    found = slope(stepped(SAMPLERS[name], 3), X, GMM5.denoiser(VP))
    assert bool(jnp.all(jnp.isfinite(found)))


@pytest.mark.parametrize("name", ["linear_beta", "cosine", "subvp", "exploding", "from_betas"])
def test_gradient_of_the_schedule(name):
    """A schedule's own numbers are trainable, also through the last step to σ = 0."""

    def value(schedule):
        process = jd.Gaussian(schedule)
        denoise = lambda x, t: jd.Denoised(jnp.tanh(0.5 * x))
        x = stepped(jd.DDIM(process, eta=0.5), 5)(X, denoise)
        return jnp.sum(PROBE * x)

    schedule = jax.tree.map(jnp.asarray, SCHEDULES[name])
    found = jax.grad(value)(schedule)
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(found))
    for leaf, slopes in zip(jax.tree.leaves(schedule), jax.tree.leaves(found), strict=True):
        assert float(jnp.abs(slopes).max()) > 0.0, leaf


@pytest.mark.parametrize("kind", ["sample", "reverse_sde", "probability_flow"])
def test_gradient_of_the_weights(kind):
    """E7: the same for all adjoints, and right, with respect to a network's parameters."""
    denoise = lambda params: jd.NetDenoiser(params, VP, net, jd.x0())
    step, steps = jd.DDIM(VP), lambda: diffrax.StepTo(-jnp.linspace(1.0, 0.01, 41))
    few = diffrax.RecursiveCheckpointAdjoint(checkpoints=3)
    direct = diffrax.DirectAdjoint()
    runs = {
        "sample": [stepped(step), stepped(step, checkpoints=3)],
        "reverse_sde": [
            lambda x, d: sde(x, d, adjoint=direct),
            lambda x, d: sde(x, d, adjoint=few),
            sde,
        ],
        "probability_flow": [
            lambda x, d: flow(x, d, controller=steps(), max_steps=40, adjoint=direct),
            lambda x, d: flow(x, d, controller=steps(), max_steps=40, adjoint=few),
        ],
    }[kind]
    slopes = [jax.grad(lambda p, r=r: jnp.sum(PROBE * r(X, denoise(p))))(PARAMS) for r in runs]
    for other in slopes[1:]:
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-2, atol=1e-3), other, slopes[0]
        )
    with jax.enable_x64(True):
        value = lambda params: jnp.sum(wide(PROBE) * runs[0](wide(X), denoise(params)))
        params = wide(PARAMS)
        found = jax.grad(value)(params)
        moved = lambda h: jax.tree.map(lambda p, d: p + h * d, params, found)
        expected = (value(moved(1e-6)) - value(moved(-1e-6))) / 2e-6
        squares = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(found))
        np.testing.assert_allclose(squares, expected, rtol=1e-2)


@pytest.mark.parametrize(
    ("solver", "path_tolerance"),
    [(diffrax.Euler(), None), (diffrax.ShARK(), 1e-3), (diffrax.ReversibleHeun(), None)],
)
def test_gradient_through_the_reverse_sde(solver, path_tolerance):
    """E7: on a fixed Brownian path, fresh increments or a tree; all adjoints agree."""
    denoise = SMOOTH.denoiser(VP)

    def run(adjoint):
        return lambda x, d: sde(x, d, solver=solver, path_tolerance=path_tolerance, adjoint=adjoint)

    assert_is_slope(run(diffrax.DirectAdjoint()), X, denoise)
    found = slope(run(diffrax.DirectAdjoint()), X, denoise)
    sparing = slope(run(diffrax.RecursiveCheckpointAdjoint(checkpoints=3)), X, denoise)
    np.testing.assert_allclose(sparing, found, rtol=1e-4, atol=1e-4)


def test_gradient_through_the_adaptive_flow():
    """Also by solving backwards, with respect to states and weights."""
    run = lambda x, d: flow(x, d, controller=adaptive(1e-6))
    backwards = lambda x, d: flow(
        x, d, controller=adaptive(1e-6), adjoint=diffrax.BacksolveAdjoint()
    )
    assert_is_slope(run, X, SMOOTH.denoiser(VP))

    def slopes(run):
        model = lambda params: jd.NetDenoiser(params, VP, net, jd.x0())
        value = lambda params, x: jnp.sum(PROBE * run(x, model(params)))
        return jax.grad(value, argnums=(0, 1))(PARAMS, X)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=5e-3, atol=1e-3),
        slopes(backwards),
        slopes(run),
    )


@pytest.mark.parametrize("kind", ["sample", "reverse_sde"])
def test_checkpointed_memory_does_not_grow_with_the_steps(kind):
    """E7: 1000 steps in the temporary memory of 10, but for the grid; stored, it grows."""
    x = jnp.zeros((512, 2))

    def temporary(steps, checkpoints):
        if kind == "sample":
            run = stepped(jd.Ancestral(VP), steps, checkpoints=checkpoints)
        else:
            kept = steps if checkpoints is None else checkpoints
            adjoint = diffrax.RecursiveCheckpointAdjoint(checkpoints=kept)
            run = lambda x, d: sde(x, d, steps, adjoint=adjoint)
        total = lambda x: jnp.sum(run(x, GMM5.denoiser(VP)))
        compiled = jax.jit(jax.grad(total)).lower(x).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    few, many = temporary(10, 4), temporary(1000, 4)
    assert many - few <= 64 * 990, (few, many)  # times and keys of the steps, no states
    assert temporary(1000, None) > 20 * many


def test_gradient_by_solving_the_sde_backwards():
    """E7: along the same Brownian path, which is a tree that can be read in either direction."""
    options = {"solver": diffrax.Heun(), "path_tolerance": 1e-3}
    run = lambda adjoint: lambda x, d: sde(x, d, 200, adjoint=adjoint, **options)
    denoise = SMOOTH.denoiser(VP)
    climb = diffrax.StepTo(-jd.grids.uniform(200, end=0.01)[::-1])
    backwards = diffrax.BacksolveAdjoint(stepsize_controller=climb)
    found, expected = (slope(run(adjoint), X, denoise) for adjoint in (backwards, None))
    np.testing.assert_allclose(found, expected, rtol=2e-2, atol=2e-2)
