"""Denoising score matching learns the true score: in closed form, and with a trained network."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from oracles import GMM5, SCHEDULES, gate, optimised, passes

import jaxdiff as jd
from jaxdiff import networks, weightings
from jaxdiff.data.batches import FreshBatches
from jaxdiff.parameterizations import predict
from jaxdiff.solve import adaptive
from jaxdiff.training import init_state, make_train_step, warmup_adam

KEY = jax.random.key(0)
VP = jd.Gaussian(SCHEDULES["linear_beta"])


# The objective against its own definition


def test_loss_is_the_weighted_error_of_the_noise():
    """Rebuilt by hand, from the same keys: x_t = αx_0 + σε, loss = w/r · mean (ε̂ − ε)²."""
    x0 = jax.random.normal(KEY, (16, 3))
    network = lambda params, x, level: params * x + level[:, None]
    weighting = weightings.likelihood
    objective = jd.denoising(
        network, VP, jd.epsilon(), weighting=weighting, time_sampler=jd.time_samplers.uniform(0.1)
    )
    key = jax.random.key(5)
    loss, metrics = objective(jnp.float32(0.3), key, {"x": x0})
    time_key, noise_key, _ = jax.random.split(key, 3)
    t = 0.1 + 0.9 * jax.random.uniform(time_key, (16,))
    for i in range(16):
        noise = jax.random.normal(jax.random.fold_in(noise_key, i), (3,))
        alpha, sigma = VP.schedule(t[i])
        guess = 0.3 * (alpha * x0[i] + sigma * noise) + jnp.log(alpha / sigma) / 2
        mse = jnp.mean((guess - noise) ** 2)
        np.testing.assert_allclose(metrics["mse"][i], mse, rtol=2e-3)
        weight = (0.1 + t[i] * 19.9) / sigma**2 * 0.9
        np.testing.assert_allclose(loss[i], weight * mse, rtol=2e-3)


@pytest.mark.parametrize("name", SCHEDULES)
def test_bayes_denoiser_is_the_minimiser(name):
    """No perturbation of E[x_0 | x_t] lowers the loss, under every weighting."""
    process = jd.Gaussian(SCHEDULES[name])
    x0 = GMM5.sample(KEY, 2000)
    exact = GMM5.denoiser(process)

    def network(params, x, level):
        # Undo the parameterization: for x0(), the network's output is the denoised mean.
        t = jd.schedules.time_of_log_snr
        times = jax.vmap(lambda value: t(process.schedule, 4.0 * value))(level)
        alpha, sigma = jax.vmap(process.schedule)(times)
        x = x * jnp.sqrt(alpha**2 + sigma**2)[:, None]
        one = lambda x, t: exact(x[None], t).mean[0]
        return params[0] + params[1] * jax.vmap(one)(x, times)

    sampler = jd.time_samplers.low_discrepancy(0.05)
    others = (weightings.p2(1.0), weightings.min_snr(5.0)) if name == "linear_beta" else ()
    for weighting in (weightings.simple, *others):
        objective = jd.denoising(
            network, process, jd.x0(), weighting=weighting, time_sampler=sampler
        )
        mean = jax.jit(lambda params, f=objective: f(params, KEY, {"x": x0})[0].mean())
        best = mean(jnp.array([0.0, 1.0]))
        for worse in ([0.1, 1.0], [-0.1, 1.0], [0.0, 1.15], [0.0, 0.85]):
            assert mean(jnp.array(worse)) > best


def test_linear_model_recovers_the_score_of_gaussian_data():
    """B6: the linear minimiser of the loss itself is −Σ_t⁻¹(x − μ_t), for correlated 3-D data."""
    mean = jnp.array([0.5, -1.0, 0.2])
    factor = jnp.array([[0.8, 0.0, 0.0], [0.3, 0.5, 0.0], [-0.2, 0.1, 0.6]])
    x0 = mean[None] + jax.random.normal(KEY, (1_000_000, 3)) @ factor.T

    def network(params, x, level):
        return x @ params[:3] + params[3][None]

    for t in (0.1, 0.4, 0.8):
        at_t = lambda key, process, n, t=t: (jnp.full(n, t), jnp.ones(n))
        objective = jd.denoising(network, VP, jd.epsilon(), time_sampler=at_t)
        loss = lambda params, f=objective: f(params.reshape(4, 3), KEY, {"x": x0})[0].mean()
        # The loss is quadratic in a linear model: one Newton step finds its minimum.
        zero = jnp.zeros(12)
        newton = jnp.linalg.solve(jax.jit(jax.hessian(loss))(zero), jax.jit(jax.grad(loss))(zero))
        weights = -newton.reshape(4, 3)
        alpha, sigma = VP.schedule(jnp.float32(t))
        cov = alpha**2 * factor @ factor.T + sigma**2 * jnp.eye(3)
        precision = jnp.linalg.inv(cov)
        scale = float(jnp.abs(precision).max())
        np.testing.assert_allclose(-weights[:3].T / sigma, -precision, atol=0.01 * scale)
        offset = precision @ (alpha * mean)
        np.testing.assert_allclose(-weights[3] / sigma, offset, atol=0.01 * scale)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_loss_and_gradient_are_finite_at_small_times(name, dtype):
    """B10, B8: a million draws with t down to 1e-5, with a network in float32 and bfloat16."""
    process = jd.Gaussian(SCHEDULES[name])

    def network(params, x, level):
        return (params * x.astype(dtype)).astype(dtype)

    parameterization = jd.v() if name == "straight" else jd.epsilon()
    objective = jd.denoising(network, process, parameterization)
    x0 = jnp.full((1_000_000, 1), 0.7)

    @jax.jit
    def run(params, key):
        mean = lambda params: objective(params, key, {"x": x0})[0].mean()
        return jax.value_and_grad(mean)(params)

    loss, gradient = run(jnp.ones((), dtype), KEY)
    assert np.isfinite(loss)
    assert np.isfinite(gradient)


@pytest.mark.parametrize("name", SCHEDULES)
def test_score_is_finite_down_to_small_times(name):
    """B8: the score of a network at t = 1e-5, in float32, is −ε̂/σ to rounding."""
    process = jd.Gaussian(SCHEDULES[name])
    denoise = jd.NetDenoiser(
        jnp.float32(0.5), process, lambda p, x, level: p * jnp.tanh(x), jd.epsilon()
    )
    t = jnp.float32(1e-5)
    x = jax.random.normal(KEY, (100, 2))
    found = jax.vmap(lambda x, x0: process.marginal(x0, t).score(x))(x, denoise(x, t).mean)
    alpha, sigma = process.schedule(t)
    scaled = x / jnp.sqrt(alpha**2 + sigma**2)
    expected = -0.5 * jnp.tanh(scaled) / sigma
    # x̂_0 lies within σ of x, so its rounding shows as 1e-7/σ in the noise.
    np.testing.assert_allclose(found * sigma, expected * sigma, atol=2e-6 + 5e-7 / float(sigma))


def test_condition_and_dropout_reach_the_network():
    """What the batch holds beside x is given by name; the dropout key only if asked for."""
    seen = {}

    def network(params, x, level, label=None, rngs=None):
        seen["label"], seen["rngs"] = label, rngs
        return params * x + label[:, None]

    batch = {"x": jnp.ones((4, 2)), "label": jnp.arange(4)}
    jd.denoising(network, VP, jd.epsilon())(jnp.float32(1.0), KEY, batch)
    assert seen["rngs"] is None
    np.testing.assert_array_equal(seen["label"], jnp.arange(4))
    jd.denoising(network, VP, jd.epsilon(), dropout=True)(jnp.float32(1.0), KEY, batch)
    assert set(seen["rngs"]) == {"dropout"}
    denoise = jd.NetDenoiser(
        jnp.float32(0.0), VP, network, jd.x0(), condition={"label": jnp.arange(4)}
    )
    found = denoise(jnp.ones((4, 2)), jnp.float32(0.5)).mean
    np.testing.assert_array_equal(found, jnp.repeat(jnp.arange(4.0)[:, None], 2, axis=1))


# A network trained for seconds on the five modes


@pytest.fixture(scope="module")
def trained():
    """An MLP trained by denoising on the five-mode mixture, and its denoiser."""
    net = networks.MLP(width=128)
    params = net.init(KEY, jnp.zeros((1, 2)), jnp.zeros(1))
    objective = jd.denoising(
        net.apply, VP, jd.epsilon(), time_sampler=jd.time_samplers.low_discrepancy()
    )
    optimizer = warmup_adam(3e-3, steps=4000, warmup=100)
    step = make_train_step(objective, optimizer, ema_decay=0.995)
    state = init_state(params, optimizer, KEY)
    batches = FreshBatches(GMM5.sample, 512)
    with optimised():
        for i in range(4000):
            state, _ = step(state, batches[i])
    return net, state.ema_params, jd.NetDenoiser(state.ema_params, VP, net.apply, jd.epsilon())


def test_trained_network_comes_near_the_bayes_risk(trained):
    """A9: the loss exceeds that of the exact denoiser by at most 5 % of it."""
    net, params, _ = trained
    x0 = GMM5.sample(jax.random.key(11), 50_000)
    t = jnp.linspace(1e-3, 1.0, 50_000)
    keys = jax.random.split(jax.random.key(12), 50_000)
    x = jax.vmap(lambda key, x0, t: VP.marginal(x0, t).sample(key))(keys, x0, t)
    found = predict(net.apply, params, VP, jd.epsilon(), x, t, {}).mean
    exact = jax.vmap(lambda x, t: GMM5.denoiser(VP)(x[None], t).mean[0])(x, t)

    def risk(guess):
        error = jax.vmap(lambda x, a, b, t: VP.marginal(a, t).noise(x) - VP.marginal(b, t).noise(x))
        return float(jnp.mean(error(x, guess, x0, t) ** 2))

    assert risk(found) <= 1.05 * risk(exact)


def test_trained_network_has_the_score(trained):
    """B6: the Fisher divergence to the exact score is at most 5 % of the score's square."""
    _, _, denoise = trained
    for t in map(jnp.float32, (0.05, 0.2, 0.5, 0.9)):
        alpha, sigma = VP.schedule(t)
        noisy = GMM5.diffused(alpha, sigma)
        x = noisy.sample(jax.random.key(13), 10_000)
        exact = jax.vmap(noisy.score)(x)
        score = jax.vmap(lambda x, x0: VP.marginal(x0, t).score(x))  # noqa: B023
        error = jnp.mean((score(x, denoise(x, t).mean) - exact) ** 2)
        assert error <= 0.05 * jnp.mean(exact**2), float(t)


@pytest.mark.parametrize("kind", ["ancestral", "probability flow"])
def test_trained_network_samples_the_data(trained, kind, gmm_data, gmm_null):
    """A4 with a trained network: weights ± 0.05, deviation ± 0.02, energy ≤ 5 × null."""
    _, _, denoise = trained
    x = VP.prior((2000, 2)).sample(jax.random.key(14))
    if kind == "ancestral":
        x = jd.sample(jd.Ancestral(VP), denoise, jd.grids.uniform(1000), KEY, x)
    else:
        x = jd.probability_flow(VP, denoise, x, 1.0, 1e-4)
    found = gate(x, GMM5, gmm_data)
    assert passes(found, gmm_null, energy=5.0, weights=0.05, std=0.02), found


def test_trained_likelihood_is_near_the_entropy(trained):
    """B16 with a trained network: the KL to the truth is small, and not below zero."""
    _, _, denoise = trained
    x = GMM5.sample(jax.random.key(15), 2000)
    found = jd.log_likelihood(VP, denoise, x).value
    gap = np.asarray(jax.vmap(GMM5.log_prob)(x) - found, np.float64)
    error = gap.std() / 2000**0.5
    assert -3 * error < gap.mean() < 0.05 + 3 * error, (gap.mean(), error)


def test_smooth_embedding_spares_the_adaptive_solver(trained):
    """The default embedding's point: a 1e-5 solve within 250 calls."""
    _, _, denoise = trained
    x = VP.prior((200, 2)).sample(KEY)
    found = jd.probability_flow(
        VP, denoise, x, 1.0, 1e-3, controller=adaptive(1e-5), evaluations=True
    )
    assert found.num_evaluations <= 250


def test_every_parameterization_trains():
    """A few hundred steps of each lower the loss, on a process where all are defined."""
    net = networks.MLP(width=32, depth=2)
    params = net.init(KEY, jnp.zeros((1, 2)), jnp.zeros(1))
    batches = FreshBatches(GMM5.sample, 256)
    optimizer = optax.adam(3e-3)
    for make in (jd.epsilon, jd.x0, jd.v, jd.score, jd.velocity, jd.parameterizations.edm):
        weighting = weightings.edm() if make is jd.parameterizations.edm else weightings.simple
        sampler = jd.time_samplers.uniform(0.02)
        objective = jd.denoising(net.apply, VP, make(), weighting=weighting, time_sampler=sampler)
        step = make_train_step(objective, optimizer, ema_decay=0.9)
        state = init_state(params, optimizer, KEY)
        for i in range(200):
            state, _ = step(state, batches[i])
        held_out = {"x": GMM5.sample(jax.random.key(3), 4096)}
        before, after = (
            objective(p, jax.random.key(4), held_out)[0].mean() for p in (params, state.ema_params)
        )
        assert after < 0.92 * before, (make.__name__, before, after)
