"""The flow trained by its own likelihood."""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import GMM5, SCHEDULES, optimised

import jaxdiff as jd
from jaxdiff import networks
from jaxdiff.data.batches import FreshBatches
from jaxdiff.objectives.maximum_likelihood import maximum_likelihood
from jaxdiff.training import init_state, make_train_step, warmup_adam

KEY = jax.random.key(0)
VP = jd.Gaussian(SCHEDULES["linear_beta"])
GRID = jd.grids.uniform_log_snr(VP, 30, end=1e-3, to_zero=False)


def gaussian(std, x, level):
    """E[x_0 | x_t] of N(0, std²), from x_t and log-SNR/4."""
    snr = jnp.exp(4.0 * level)[:, None]
    return std**2 * jnp.sqrt(snr * (snr + 1.0)) * x / (1.0 + snr * std**2)


def test_loss_is_minus_the_likelihood():
    x = GMM5.sample(jax.random.key(1), 64)
    objective = maximum_likelihood(gaussian, VP, jd.x0(), GRID)
    loss, _ = objective(jnp.float32(0.8), KEY, {"x": x})
    denoise = jd.NetDenoiser(jnp.float32(0.8), VP, gaussian, jd.x0())
    found = jd.log_likelihood(VP, denoise, x, t0=1e-3)
    np.testing.assert_allclose(loss, -found.value / 2, atol=5e-3)


def test_its_minimum_is_the_maximum_likelihood():
    """Of N(0, s²) the flow's width that fits best is the sample's own, less the noise of t0."""
    x = 0.7 * jax.random.normal(KEY, (500, 2))
    objective = maximum_likelihood(gaussian, VP, jd.x0(), GRID)
    loss = jax.jit(lambda std: objective(std, KEY, {"x": x})[0].mean())
    alpha, sigma = VP.schedule(GRID[-1])
    best = jnp.sqrt((jnp.mean(x**2) - sigma**2) / alpha**2)
    stds = best * jnp.linspace(0.9, 1.1, 9)
    curve = np.polyfit(stds, [float(loss(std)) for std in stds], 2)
    np.testing.assert_allclose(-curve[1] / (2 * curve[0]), best, rtol=0.02)


@pytest.mark.parametrize("probes", [None, 2])
def test_gradient_is_that_of_the_steps_taken(probes):
    """Central differences in double precision, through the trace and the solver."""
    with jax.enable_x64(True):
        wide = lambda tree: jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), tree)
        net = networks.MLP(width=8, depth=2, dtype=jnp.float64)
        params = net.init(KEY, jnp.zeros((1, 3)), jnp.zeros(1))
        params = wide(jax.tree.map(lambda a: a + 0.3 * jax.random.normal(KEY, a.shape), params))
        direction = jax.tree.map(lambda a: jax.random.normal(jax.random.key(2), a.shape), params)
        x = jax.random.normal(KEY, (4, 3), jnp.float64)
        grid = jnp.asarray(GRID[::6], jnp.float64)
        objective = maximum_likelihood(
            net.apply, VP, jd.epsilon(), grid, solver=diffrax.Heun(), probes=probes
        )
        loss = jax.jit(lambda params: objective(params, KEY, {"x": x})[0].mean())
        along = lambda h: loss(jax.tree.map(lambda a, d: a + h * d, params, direction))
        expected = (along(1e-5) - along(-1e-5)) / 2e-5
        slopes = jax.tree.map(lambda a, d: jnp.sum(a * d), jax.grad(loss)(params), direction)
        np.testing.assert_allclose(sum(jax.tree.leaves(slopes)), expected, rtol=1e-6)


def test_tuning_lowers_the_exact_nll():
    """A network that denoising left off: 60 steps, judged by adaptive solves on fresh points."""
    net = networks.MLP(width=32, depth=2)
    params = net.init(KEY, jnp.zeros((1, 2)), jnp.zeros(1))

    def trained(objective, params, steps, rate):
        optimizer = warmup_adam(rate, steps=steps, warmup=10)
        step = make_train_step(objective, optimizer, ema_decay=0.5)
        state, batches = init_state(params, optimizer, KEY), FreshBatches(GMM5.sample, 256)
        with optimised():
            for i in range(steps):
                state, _ = step(state, batches[i])
        return state.ema_params

    def nll(params):
        denoise = jd.NetDenoiser(params, VP, net.apply, jd.epsilon())
        x = GMM5.sample(jax.random.key(9), 2000)
        return -float(jd.log_likelihood(VP, denoise, x, t0=float(GRID[-1])).value.mean())

    params = trained(jd.denoising(net.apply, VP, jd.epsilon()), params, 400, 3e-3)
    objective = maximum_likelihood(
        net.apply, VP, jd.epsilon(), GRID[::2], solver=diffrax.Midpoint()
    )
    tuned = trained(objective, params, 60, 2e-3)
    exact = -float(jax.vmap(GMM5.log_prob)(GMM5.sample(jax.random.key(9), 2000)).mean())
    before, after = nll(params) - exact, nll(tuned) - exact
    assert before > 0.1
    assert 0.0 < after < 0.6 * before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grid": jd.grids.uniform(4)}, "grid must begin at 1.*and end above 0"),
        ({"grid": GRID[1:]}, "grid must begin at 1"),
        ({"grid": GRID[::-1]}, "grid must fall strictly, from at most 1"),
        ({"grid": 1.5 * GRID}, "grid must fall strictly, from at most 1"),
        ({"probes": 0}, "probes must be at least 1"),
    ],
)
def test_bad_arguments_are_refused(change, message):
    options = {"grid": GRID, "probes": None} | change
    with pytest.raises(ValueError, match=message):
        maximum_likelihood(gaussian, VP, jd.x0(), options["grid"], probes=options["probes"])
