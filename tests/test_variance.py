"""The reverse variance, learned and analytic: formulas, optima, and real digits."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from oracles import BETAS, GMM5, SCHEDULES, GaussianData, gate, passes

import jaxdiff as jd
from jaxdiff import networks
from jaxdiff.data.batches import Batches
from jaxdiff.data.images import load_images, to_model
from jaxdiff.metrics import energy_distance
from jaxdiff.objectives.elbo import discrete_decoder, elbo
from jaxdiff.objectives.improved_ddpm import improved_ddpm
from jaxdiff.parameterizations import learned_variance
from jaxdiff.processes.base import Denoised
from jaxdiff.samplers.analytic_dpm import AnalyticVariance, analytic_variance
from jaxdiff.training import init_state, make_train_step, warmup_adam

KEY = jax.random.key(0)
VP = jd.Gaussian(SCHEDULES["linear_beta"])
DDPM = jd.Gaussian(SCHEDULES["from_betas"])


# Learned


def reverse_variance(process, var, t, s):
    zero = jnp.zeros(())
    return process.posterior(zero, Denoised(zero, var), t, s).std ** 2


def test_learned_variance_is_the_papers_interpolation():
    """exp(v log β_i + (1 − v) log β̃_i) at every step i, with β̃_2 for β̃_1."""
    parameterization = learned_variance(jd.epsilon(), steps=1000)
    products = np.concatenate([[1.0], np.cumprod(1 - BETAS)])
    for i in (1, 2, 3, 10, 500, 1000):
        t, s = jnp.float32(i / 1000), jnp.float32((i - 1) / 1000)
        j = max(i, 2)
        lower = BETAS[j - 1] * (1 - products[j - 1]) / (1 - products[j])
        for v in (0.0, 0.3, 1.0):
            expected = np.exp(v * np.log(BETAS[i - 1]) + (1 - v) * np.log(lower))
            var = parameterization.variance(DDPM, jnp.float32(v), t)
            found = reverse_variance(DDPM, var, t, s)
            np.testing.assert_allclose(found, expected, rtol=3e-5)


@pytest.mark.parametrize("name", SCHEDULES)
def test_learned_variance_joins_both_fixed_ones_at_every_stride(name):
    """v = 0 is x_0 known, v = 1 is x_0 of N(0, I) data: for every process, stride and time."""
    process = jd.Gaussian(SCHEDULES[name])
    parameterization = learned_variance(jd.x0(), steps=20)
    times = jnp.linspace(0.11, oracles.start_of(name), 9)
    of = lambda v: jax.vmap(lambda t: parameterization.variance(process, jnp.float32(v), t))(times)
    alpha, sigma = jax.vmap(process.schedule)(times)
    unit = sigma**2 / (alpha**2 + sigma**2)
    np.testing.assert_allclose(of(1.0), unit, rtol=2e-3)
    np.testing.assert_allclose(of(0.0) / unit, 0.0, atol=1e-5)
    between = of(0.5) / unit
    assert np.all((between > 0.0) & (between < 1.0))
    for t in map(jnp.float32, (0.0, 1e-4, 0.02, 0.05, 0.07, 1.0)):
        for v in (-3.0, 0.0, 0.5, 1.0):
            var = parameterization.variance(process, jnp.float32(v), t)
            assert np.isfinite(var)
            assert var >= 0.0


def test_learned_variance_reads_two_halves_of_the_channels():
    parameterization = learned_variance(jd.v(), steps=50)
    x, out = jnp.array([0.3, -0.8]), jnp.array([0.4, 0.1, -1.0, 1.0])
    t = jnp.float32(0.4)
    found = parameterization.denoised(VP, out, x, t)
    np.testing.assert_array_equal(found.mean, jd.v().denoised(VP, out[:2], x, t).mean)
    np.testing.assert_allclose(
        reverse_variance(VP, found.var[1], t, t - 0.02),
        reverse_variance(VP, jd.UnitVariance(VP, lambda x, t: Denoised(x))(x, t).var, t, t - 0.02),
        rtol=1e-5,
    )
    assert found.var[0] == 0.0
    for ours, theirs in zip(
        parameterization.inputs(VP, x, t), jd.v().inputs(VP, x, t), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)


def ten_steps(key, process, n):
    """Each of the times 0.1, …, 1.0, equally often."""
    return (jnp.arange(n) % 10 + 1.0) / 10, jnp.ones(n)


def test_hybrid_loss_is_the_written_sum():
    """L_simple + λ T L_t, rebuilt by hand from the same keys, with SciPy's densities."""
    x0 = jax.random.normal(KEY, (20, 3))
    network = lambda params, x, level: jnp.concatenate([params[0] * x, params[1] * x], axis=-1)
    objective = improved_ddpm(
        network,
        VP,
        learned_variance(jd.epsilon(), steps=10),
        weight=0.02,
        time_sampler=lambda key, process, n: (ten_steps(key, process, n)[0] - 0.03, jnp.ones(n)),
    )
    params, key = jnp.array([0.5, -0.7]), jax.random.key(5)
    loss, metrics = objective(params, key, {"x": x0})
    noise_key = jax.random.split(key, 3)[1]
    for i in range(20):
        t = (i % 10 + 1.0) / 10
        s = t - 0.1 if i % 10 else 0.0
        noise = jax.random.normal(jax.random.fold_in(noise_key, i), (3,))
        alpha, sigma = map(float, VP.schedule(jnp.float32(t)))
        alpha_s, sigma_s = map(float, VP.schedule(jnp.float32(s)))
        x = np.asarray(alpha * x0[i] + sigma * noise)
        guess, v = 0.5 * x, 0.5 * (1 - 0.7 * x)
        mse = np.mean((guess - noise) ** 2)
        beta = 1 - (alpha / alpha_s) ** 2
        fixed = beta * (sigma_s / sigma) ** 2
        second = [float(VP.schedule(jnp.float32(u))[0]) ** 2 for u in (0.1, 0.2)]
        clipped = (1 - second[1] / second[0]) * (1 - second[0]) / (1 - second[1])
        lower = fixed if s else clipped
        var = np.maximum(np.exp(v * np.log(beta) + (1 - v) * np.log(lower)), fixed)
        mean = lambda eps: (x - beta / sigma * eps) / (alpha / alpha_s)  # noqa: B023
        if s:
            shift = (mean(noise) - mean(guess)) ** 2
            vlb = np.mean(0.5 * (np.log(var / fixed) + (fixed + shift) / var - 1))
        else:
            square = (np.asarray(x0[i]) - mean(guess)) ** 2 / var
            vlb = np.mean(0.5 * (square + np.log(2 * np.pi * var)))
        np.testing.assert_allclose(metrics["mse"][i], mse, rtol=1e-4)
        np.testing.assert_allclose(metrics["vlb"][i], 10 * vlb, rtol=2e-3, atol=1e-4)
        np.testing.assert_allclose(loss[i], mse + 0.02 * 10 * vlb, rtol=2e-3, atol=1e-5)


def test_hybrid_loss_teaches_the_mean_by_the_noise_alone():
    """The gradient of the mean's weights is L_simple's; that of the variance's is the bound's."""
    x0 = 0.3 * jax.random.normal(KEY, (50, 3))
    network = lambda params, x, level: jnp.concatenate([params[0] * x, params[1] * x], axis=-1)

    def gradient(weight, params=jnp.array([0.5, 0.2])):  # noqa: B008
        objective = improved_ddpm(
            network,
            VP,
            learned_variance(jd.epsilon(), steps=10),
            weight=weight,
            time_sampler=ten_steps,
        )
        return jax.grad(lambda params: objective(params, KEY, {"x": x0})[0].mean())(params)

    none, some = gradient(0.0), gradient(1.0)
    assert np.all(np.isfinite(some))
    np.testing.assert_allclose(some[0], none[0], rtol=1e-6)
    assert none[1] == 0.0
    assert abs(some[1]) > 1e-3


def test_hybrid_loss_finds_the_variance_of_gaussian_data():
    """The bound's minimum over v is the true reverse variance, given the true mean."""
    mean, std = 0.7, 0.6
    x0 = mean + std * jax.random.normal(KEY, (100_000, 1))
    exact = GaussianData(VP, mean, std)
    t, s = jnp.float32(0.5), jnp.float32(0.4)
    alpha, sigma = VP.schedule(t)

    def network(params, x, level):
        x = x * jnp.sqrt(alpha**2 + sigma**2)
        return jnp.concatenate([exact(x, t).mean, jnp.full_like(x, params)], axis=-1)

    objective = improved_ddpm(
        network,
        VP,
        learned_variance(jd.x0(), steps=10),
        weight=1.0,
        time_sampler=lambda key, process, n: (jnp.full(n, 0.5), jnp.ones(n)),
    )
    slope = jax.jit(jax.grad(lambda params: objective(params, KEY, {"x": x0})[0].mean()))
    low, high = -1.0, 1.0
    for _ in range(20):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if slope(jnp.float32(middle)) < 0 else (low, middle)
    parameterization = learned_variance(jd.x0(), steps=10)
    found = parameterization.variance(VP, jnp.float32(0.5 * (middle + 1)), t)
    var = (std * sigma) ** 2 / ((alpha * std) ** 2 + sigma**2)
    np.testing.assert_allclose(
        reverse_variance(VP, found, t, s), reverse_variance(VP, var, t, s), rtol=5e-3
    )


# Analytic


def test_analytic_variance_is_the_optimum_of_gaussian_data():
    """A17: the reverse variance within 1e-3 of the closed form, at any stride of the table."""
    mean, std = 0.7, 0.3
    x0 = mean + std * jax.random.normal(KEY, (50_000, 64))
    exact = GaussianData(VP, mean, std)
    grid = jd.grids.uniform(20)
    analytic = analytic_variance(VP, exact, jax.random.key(1), x0, grid, batch_size=30_000)
    for t, s in [(1.0, 0.95), (0.7, 0.65), (0.5, 0.25), (0.2, 0.15), (0.05, 0.0)]:
        t, s = jnp.float32(t), jnp.float32(s)
        alpha, sigma = VP.schedule(t)
        var = (std * sigma) ** 2 / ((alpha * std) ** 2 + sigma**2)
        found = analytic(x0[:2], t)
        np.testing.assert_array_equal(found.mean, exact(x0[:2], t).mean)
        np.testing.assert_allclose(
            reverse_variance(VP, found.var, t, s), reverse_variance(VP, var, t, s), rtol=1e-3
        )


@pytest.mark.parametrize("name", ["linear_beta", "exploding", "straight"])
def test_analytic_variance_of_a_mixture_is_that_of_its_posterior(name):
    """E Var[x_0 | x_t] from the exact posterior moments; and Γ of the paper is its other half."""
    process = jd.Gaussian(SCHEDULES[name])
    x0 = GMM5.sample(KEY, 20_000)
    exact = GMM5.denoiser(process)
    grid = jd.grids.uniform_log_snr(process, 40, start=oracles.start_of(name))
    analytic = analytic_variance(process, exact, jax.random.key(1), x0, grid, batch_size=20_000)
    for t in map(jnp.float32, (0.013, 0.11, 0.4, 0.9)):  # between the times of the table
        alpha, sigma = process.schedule(t)
        x = alpha * x0 + sigma * jax.random.normal(jax.random.key(2), x0.shape)
        var = jax.vmap(GMM5.denoise, (0, None, None))(x, alpha, sigma)[1].mean()
        np.testing.assert_allclose(analytic(x, t).var, var, rtol=0.03)
        noise = (x - alpha * exact(x, t).mean) / sigma
        paper = (sigma / alpha) ** 2 * (1 - jnp.mean(noise**2))
        np.testing.assert_allclose(paper, var, atol=0.03 * var + 0.02 * (sigma / alpha) ** 2)


def test_analytic_variance_keeps_the_papers_bounds():
    """σ²/α², and half the range of the data squared, whatever the network says."""
    x0 = jax.random.uniform(KEY, (64, 4), minval=-1.0, maxval=1.0)
    wild = lambda x, t: Denoised(jnp.full_like(x, 30.0))
    analytic = analytic_variance(VP, wild, KEY, x0, jd.grids.uniform(10))
    for t in map(jnp.float32, (0.1, 0.5, 1.0)):
        alpha, sigma = VP.schedule(t)
        half_range = 0.5 * float(x0.max() - x0.min())
        expected = min(float((sigma / alpha) ** 2), half_range**2)
        np.testing.assert_allclose(analytic(x0, t).var, expected, rtol=1e-4)
    for t in map(jnp.float32, (0.0, 0.01, 1.0)):
        assert np.isfinite(analytic(x0, t).var)


def test_analytic_variance_does_not_depend_on_the_batches():
    x0 = GMM5.sample(KEY, 100)
    tables = [
        analytic_variance(VP, GMM5.denoiser(VP), KEY, x0, jd.grids.uniform(5), batch_size=size)
        for size in (100, 32)
    ]
    assert isinstance(tables[0], AnalyticVariance)
    np.testing.assert_allclose(tables[0].ratio, tables[1].ratio, rtol=1e-5)


def ancestral(process, denoise, make_grid, x, mutant=None):
    """Ancestral sampling of GMM5 with the analytic variance, perhaps with a mistake."""
    step, found, grid = jd.Ancestral(process), denoise.denoise, make_grid(None)
    if mutant is not None:
        step, found, grid = oracles.mutated(mutant, step, process, make_grid)
    return jd.sample(step, dataclasses.replace(denoise, denoise=found), grid, KEY, x)


@pytest.fixture(scope="module")
def analytic_mixture():
    """GMM5's exact denoiser with its analytic variance."""
    exact, grid = GMM5.denoiser(VP), jd.grids.uniform(100)
    return analytic_variance(VP, exact, jax.random.key(1), GMM5.sample(KEY, 4000), grid)


@pytest.mark.parametrize("mutant", [None, *oracles.MUTANTS])
def test_exact_score_with_the_analytic_variance(mutant, analytic_mixture, gmm_data, gmm_null):
    """A15: it passes the gate, which catches every mutant."""
    make_grid = lambda end: jd.grids.uniform(1000, end=0.0 if end is None else end)
    x = ancestral(VP, analytic_mixture, make_grid, VP.prior((2000, 2)).sample(KEY), mutant)
    found = gate(x, GMM5, gmm_data)
    assert passes(found, gmm_null) == (mutant is None), found
    assert mutant is None or oracles.MUTANTS[mutant](found)


# Digits


STEPS = 50
TIMES = jd.grids.uniform(STEPS)


class Digits(NamedTuple):
    """Denoisers of one network under all reverse variances, and the images it never saw."""

    test: jax.Array
    learned: jd.NetDenoiser
    analytic: AnalyticVariance

    @property
    def lower(self):
        """β̃, as the analytic variance that is 0 (so that one program serves all)."""
        return dataclasses.replace(self.analytic, ratio=jnp.zeros(STEPS))

    @property
    def upper(self):
        """β, as the analytic variance that N(0, I) data would have."""
        return dataclasses.replace(self.analytic, ratio=jnp.ones(STEPS))

    def bound(self, denoise, steps):
        """The bound of 128 test images in `steps` steps; β̃_2 is the least last variance."""
        second = self.lower.process.posterior(
            jnp.zeros(()), Denoised(jnp.zeros(())), jnp.float32(2 / steps), jnp.float32(1 / steps)
        )
        decoder = discrete_decoder(17, floor=float(second.std))
        grid = jd.grids.uniform(steps)
        return np.asarray(elbo(VP, denoise, KEY, self.test[:128], grid, decoder=decoder).value)


@pytest.fixture(scope="module")
def digits():
    """A small U-Net of mean and variance, after 300 updates with the hybrid loss at T = 50."""
    net, kind = networks.UNet(width=16, blocks=1, out_channels=2), jd.epsilon()
    parameterization = learned_variance(kind, steps=STEPS)
    params = jax.jit(net.init)(jax.random.key(0), jnp.zeros((1, 8, 8, 1)), jnp.zeros(1))
    objective = improved_ddpm(
        net.apply,
        VP,
        parameterization,
        decoder=discrete_decoder(17),
        time_sampler=jd.time_samplers.low_discrepancy(),
    )
    optimizer = warmup_adam(2e-3, steps=300, warmup=50)
    step = make_train_step(objective, optimizer, ema_decay=0.99)
    state = init_state(params, optimizer, jax.random.key(1))
    images, test = (load_images("digits", split) for split in ("train", "test"))
    train = to_model(images.x, images.levels)
    batches = Batches({"x": np.asarray(train)}, 32)
    for i in range(300):
        state, _ = step(state, batches[i])
    learned = jd.NetDenoiser(state.ema_params, VP, net.apply, parameterization)
    analytic = analytic_variance(VP, learned, KEY, train[:256], TIMES)
    return Digits(to_model(test.x, test.levels)[:256], learned, analytic)


def better(one, other):
    """The mean advantage of one bound, in its standard errors."""
    gain = one - other
    return gain.mean() / (gain.std() / len(gain) ** 0.5)


def test_learned_variance_tightens_the_bound_on_digits(digits):
    """A16: at T = 50 its bound is no worse than that of β and of β̃ by one standard error."""
    learned, lower, upper, analytic = (
        digits.bound(d, STEPS)
        for d in (digits.learned, digits.lower, digits.upper, digits.analytic)
    )
    assert better(learned, lower) > 10
    assert better(learned, upper) > 10
    assert better(analytic, lower) > 3


def test_analytic_variance_tightens_the_bound_of_few_steps_on_digits(digits):
    """A17: at K = 10 steps its bound is better than with β and with β̃."""
    analytic = digits.bound(digits.analytic, 10)
    assert better(analytic, digits.bound(digits.lower, 10)) > 3
    assert better(analytic, digits.bound(digits.upper, 10)) > 3


def test_few_ancestral_steps_hurt_on_digits(digits):
    """C1: every tenth step of the chain alone is measurably worse; both with β̃."""
    x = VP.prior(digits.test.shape).sample(jax.random.key(2))

    def distance(steps):
        grid = jd.grids.uniform(steps)
        found = jd.sample(jd.Ancestral(VP), digits.lower, grid, jax.random.key(5), x)
        return energy_distance(found, digits.test)

    assert distance(10) > 1.3 * distance(100)


# Mistakes


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: learned_variance(jd.epsilon(), steps=1), "steps"),
        (
            lambda: improved_ddpm(jnp.tanh, VP, learned_variance(jd.epsilon()), weight=-1.0),
            "weight",
        ),
        (
            lambda: analytic_variance(
                VP, GMM5.denoiser(VP), KEY, jnp.zeros((4, 2)), jd.grids.uniform(3), batch_size=0
            ),
            "batch_size",
        ),
    ],
)
def test_bad_numbers_are_refused_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        make()
