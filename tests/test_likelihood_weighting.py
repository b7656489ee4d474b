"""The weight that makes the denoising loss a bound on the likelihood, and the times drawn for it.

The other half of A6, the bound of a chain against exact likelihoods and against its own paths, is
in `test_elbo.py`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.interpolate
from oracles import BETAS, SCHEDULES

import jaxdiff as jd
from jaxdiff import time_samplers, weightings
from jaxdiff.objectives.elbo import discrete_decoder
from jaxdiff.parameterizations import edm
from jaxdiff.schedules import learned_gamma

KEY = jax.random.key(0)
VP = jd.Gaussian(SCHEDULES["linear_beta"])
MEAN, STD = 0.7, 0.3


# The discrete bound and its weights


def ddpm_weights(betas):
    """β²/(2 β̃ α (1 − ᾱ)) of steps 2 … T: what L_{t−1} is, over ‖ε̂ − ε‖² (Ho et al., eq. 12)."""
    products = np.cumprod(1 - betas)
    tilde = betas[1:] * (1 - products[:-1]) / (1 - products[1:])
    return betas[1:] ** 2 / (2 * tilde * (1 - betas[1:]) * (1 - products[1:]))


def test_weights_of_the_bound_fall_and_tend_to_the_likelihoods():
    """A8: large at small t, decreasing; T times as many nats an instant are ½ g²/σ²."""
    found = ddpm_weights(BETAS)
    assert np.all(np.diff(found[:100]) < 0)
    assert found[0] > 50 * found[-1]
    process = jd.Gaussian(SCHEDULES["from_betas"])
    for step in (300, 500, 900):
        t = jnp.float32((step - 0.5) / 1000)
        continuous = 0.5 * weightings.likelihood(process, t)
        np.testing.assert_allclose(1000 * found[step - 2], continuous, rtol=0.02)


def test_bound_is_the_simple_loss_with_its_weights_put_back():
    """A8: Σ_t E[w_t ‖ε̂ − ε‖²] over drawn steps is the sum of divergences, for a crude network."""
    betas = np.linspace(1e-3, 0.2, 50)
    process, table = jd.Gaussian(jd.from_betas(betas)), jnp.asarray(ddpm_weights(betas))
    network = lambda params, x, level: params * x
    x0 = MEAN + STD * jax.random.normal(KEY, (49 * 800, 2))

    def steps(key, process, n):
        return (2.0 + jnp.arange(n) % 49) / 50, jnp.full(n, 49.0)

    def weight(process, t):
        return table[jnp.round(50 * t).astype(int) - 2]

    objective = jd.denoising(network, process, jd.x0(), weighting=weight, time_sampler=steps)
    loss = jax.jit(objective)(jnp.float32(0.8), jax.random.key(1), {"x": x0})[0]
    sums = 2 * np.asarray(loss).reshape(800, 49).mean(1)
    denoise = jd.NetDenoiser(jnp.float32(0.8), process, network, jd.x0())
    grid = jnp.arange(50, -1, -1) / 50
    bound = jd.elbo(process, denoise, KEY, x0[:4000], grid, decoder=discrete_decoder(256))
    divergences = np.asarray(bound.diffusion)
    error = np.hypot(sums.std() / 800**0.5, divergences.std() / 4000**0.5)
    np.testing.assert_allclose(sums.mean(), divergences.mean(), atol=3 * error)
    assert error < 0.03 * divergences.mean()


# The continuous bound

# log α and log σ, written out again in double precision.
LOGS = {
    "linear_beta": lambda t: (-0.05 * t - 4.975 * t**2, _preserving(t, 0.5)),
    "subvp": lambda t: (-0.05 * t - 4.975 * t**2, _preserving(t, 1.0)),
    "exploding": lambda t: (0.0 * t, np.log(0.01) + t * np.log(5000.0)),
    "user": lambda t: (-2 * np.log1p(5 * t), np.log(2 * t + t**2)),
    "edm": lambda t: (0.0 * t, 7 * np.log(0.002 ** (1 / 7) * (1 - t) + 80.0 ** (1 / 7) * t)),
    "straight": lambda t: (np.log1p(-t), np.log(t)),
    "learned": lambda t: _of_log_snr(_learned()(t)),
}
PROCESSES = {name: jd.Gaussian(schedule) for name, schedule in SCHEDULES.items()} | {
    "learned": jd.Gaussian(learned_gamma(-9.0, 6.0, hidden=8))
}
START = 1e-3
END = {name: 0.95 if name == "straight" else 1.0 for name in LOGS}
MODELS = {"exact": (MEAN, STD, 0.0), "other": (0.4, 0.5, 0.0), "inconsistent": (0.6, 1.0, -0.95)}
"""Mean and deviation that the denoiser takes the data to have, and how the latter depends on t.

Each makes a Gaussian model. "other" is the exact score of other data, whose likelihood is then the
bound itself; "inconsistent" is the score of no diffusion, and its likelihood lies between.
"""


def taken_std(model, log_snr):
    return model[1] + model[2] * log_snr / (1 + abs(log_snr))


def _preserving(t, power):
    return power * np.log(-np.expm1(-0.1 * t - 9.95 * t**2))


@functools.cache
def _learned():
    """log-SNR of t, all that is taken from the schedule itself."""
    t = np.geomspace(0.9 * START, 1.0, 2001)
    with jax.enable_x64(True):
        values = jax.vmap(PROCESSES["learned"].log_snr)(jnp.asarray(t))
        return scipy.interpolate.CubicSpline(t, np.asarray(values))


def _of_log_snr(value):
    return -0.5 * np.logaddexp(0.0, -value), -0.5 * np.logaddexp(0.0, value)


def kl(mean, var, other):
    """KL(N(mean, var) ‖ N(0, other))."""
    return 0.5 * ((var + mean**2) / other - 1 - np.log(var / other))


def constant(name):
    """What the loss leaves out, per coordinate: entropy of q(x_t0 | x_0), and divergence from π.

    −log p ≤ H[q(x_t0 | x_0)] + KL(q(x_1 | x_0) ‖ π) + ½ ∫ g²/σ² ‖ε̂ − ε‖² dt, by Girsanov's
    theorem for the two reverse SDEs, that of q(· | x_0) and the model's.
    """
    (_, log_sigma), (log_alpha, log_prior) = LOGS[name](START), LOGS[name](END[name])
    entropy = 0.5 * np.log(2 * np.pi * np.e) + log_sigma
    second_moment = np.exp(2 * log_alpha) * (MEAN**2 + STD**2)
    return entropy + 0.5 * second_moment / np.exp(2 * log_prior)


def expected_bound(name, model):
    """The bound's expectation per coordinate, by quadrature."""
    ends = [2 * np.subtract(*LOGS[name](t)) for t in (END[name], START)]
    log_snr = np.linspace(*ends, 20_001)
    snr, mean, std = np.exp(log_snr), model[0], taken_std(model, log_snr)
    error = (snr * (STD**2 + (MEAN - mean) ** 2) + (snr * std**2) ** 2) / (1 + snr * std**2) ** 2
    return constant(name) + 0.5 * np.trapezoid(error, log_snr)


def model_nll(name, model):
    """E[−log p] of x_t0 per coordinate, p being where the model's reverse SDE ends, from π.

    Its score is affine, so p is a Gaussian whose moments solve an ODE: by Runge and Kutta's rule.
    """

    def rates(t):
        h = 1e-5 * t
        up, down = np.array(LOGS[name](t + h)), np.array(LOGS[name](t - h))
        return (up - down) / (2 * h)

    def slope(log_t, moments):
        t = np.exp(log_t)
        (log_alpha, log_sigma), (drift, growth) = LOGS[name](t), rates(t)
        alpha, squared = np.exp(log_alpha), 2 * np.exp(2 * log_sigma) * (growth - drift)
        std = taken_std(model, 2 * (log_alpha - log_sigma))
        pull = squared / ((alpha * std) ** 2 + np.exp(2 * log_sigma))
        centre, var = moments
        of_centre = drift * centre + pull * (centre - alpha * model[0])
        return t * np.array([of_centre, 2 * (drift + pull) * var - squared])

    moments = np.array([0.0, np.exp(2 * LOGS[name](END[name])[1])])
    grid = np.linspace(np.log(END[name]), np.log(START), 601)
    h = grid[1] - grid[0]
    for log_t in grid[:-1]:
        one = slope(log_t, moments)
        two = slope(log_t + h / 2, moments + h / 2 * one)
        three = slope(log_t + h / 2, moments + h / 2 * two)
        four = slope(log_t + h, moments + h * three)
        moments = moments + h / 6 * (one + 2 * two + 2 * three + four)
    log_alpha, log_sigma = LOGS[name](START)
    alpha, (centre, var) = np.exp(log_alpha), moments
    spread = (alpha * STD) ** 2 + np.exp(2 * log_sigma) + (alpha * MEAN - centre) ** 2
    return 0.5 * (np.log(2 * np.pi * var) + spread / var)


def gaussian_network(model, x, level):
    """E[x_0 | x_t] of N(mean, std²), from c_in x and log-SNR/4."""
    snr = jnp.exp(4.0 * level)[:, None]
    var = taken_std(model, 4.0 * level)[:, None] ** 2
    scaled = jnp.sqrt(snr * (snr + 1.0)) * x  # α x/σ²
    return (model[0] + var * scaled) / (1.0 + snr * var)


@pytest.mark.parametrize("name", LOGS)
def test_weighted_loss_bounds_the_likelihood(name):
    """B9: ½ D loss + constant ≥ the model's exact −log p; an equality for the exact denoiser."""
    process = PROCESSES[name]
    sampler = time_samplers.importance(START, END[name])
    objective = jax.jit(
        jd.denoising(
            gaussian_network,
            process,
            jd.x0(),
            weighting=weightings.likelihood,
            time_sampler=sampler,
        )
    )
    x0 = MEAN + STD * jax.random.normal(KEY, (50_000, 2))
    bounds, nll, expected = {}, {}, {}
    for kind, model in MODELS.items():
        loss = objective(tuple(map(jnp.float32, model)), jax.random.key(1), {"x": x0})[0]
        bounds[kind] = 0.5 * 2 * np.asarray(loss, np.float64) + 2 * constant(name)
        expected[kind], nll[kind] = 2 * expected_bound(name, model), 2 * model_nll(name, model)
        error = bounds[kind].std() / len(x0) ** 0.5
        np.testing.assert_allclose(bounds[kind].mean(), expected[kind], atol=3 * error)
        # The same noise for all: their differences are known better.
        above = bounds[kind] - bounds["exact"]
        error = above.std() / len(x0) ** 0.5
        gap = expected[kind] - expected["exact"]
        np.testing.assert_allclose(above.mean(), gap, atol=3 * error + 1e-6)
        assert kind == "exact" or error < 0.05 * gap

    # What is exact: the entropy at t0, and the divergence of q_1 from the prior.
    (log_alpha, log_sigma), (last_alpha, last_sigma) = LOGS[name](START), LOGS[name](END[name])
    total = lambda log_alpha, log_sigma: (np.exp(log_alpha) * STD) ** 2 + np.exp(2 * log_sigma)
    entropy = 1 + np.log(2 * np.pi * total(log_alpha, log_sigma))
    tail = 2 * kl(np.exp(last_alpha) * MEAN, total(last_alpha, last_sigma), np.exp(2 * last_sigma))
    np.testing.assert_allclose(expected["exact"], entropy + tail, atol=1e-5)
    np.testing.assert_allclose(expected["other"], nll["other"], atol=1e-3)
    for kind in MODELS:
        assert entropy - 1e-5 < nll[kind] < expected[kind] + 1e-5
    assert nll["inconsistent"] + 0.5 < expected["inconsistent"]
    assert nll["inconsistent"] < bounds["inconsistent"].mean()


# The times drawn for it


@pytest.mark.parametrize("name", SCHEDULES)
def test_importance_times_are_even_in_log_snr(name):
    """And w/r is the same for all; nothing divides 0 by 0 at either end."""
    process, last = jd.Gaussian(SCHEDULES[name]), 0.99 if name == "straight" else 1.0
    sampler = time_samplers.importance(1e-4, last)
    t, inverse = sampler(KEY, process, 1000)
    assert float(t.min()) >= np.float32(1e-4)
    assert float(t.max()) <= np.float32(last)
    values = np.asarray(jax.vmap(process.log_snr)(jnp.sort(t)), np.float64)
    np.testing.assert_allclose(np.diff(values), np.diff(values).mean(), rtol=0.02)
    ends = [float(process.log_snr(jnp.float32(end))) for end in (1e-4, last)]
    np.testing.assert_allclose(values[0] - values[-1], (ends[0] - ends[1]) * 0.999, rtol=1e-3)
    weight = jax.vmap(lambda t: weightings.likelihood(process, t))(t)
    np.testing.assert_allclose(weight * inverse, ends[0] - ends[1], rtol=1e-4)


def test_importance_density_integrates_to_its_means():
    """E[h(t)/r] = ∫ h dt, for functions that see the ends and the middle."""
    t, inverse = time_samplers.importance(1e-3)(KEY, VP, 100_000)
    for function, expected in (
        (jnp.ones_like, 1.0),
        (lambda t: t, 0.5),
        (lambda t: 1 / t, np.log(1e3)),
        (lambda t: jnp.exp(-t), 1 - np.exp(-1.0)),
    ):
        np.testing.assert_allclose(jnp.mean(function(t) * inverse), expected, rtol=3e-3)


def noise_net(params, x, level):
    return params * jnp.tanh(x)


def estimates(sampler, process=VP, parameterization=None, n=1_000_000):
    """A likelihood-weighted loss [n], all of it and its gradient finite."""
    objective = jd.denoising(
        noise_net,
        process,
        parameterization or jd.epsilon(),
        weighting=weightings.likelihood,
        time_sampler=sampler,
    )
    x0 = jnp.full((n, 1), MEAN)

    @jax.jit
    def run(params):
        def mean(params):
            loss = objective(params, KEY, {"x": x0})[0]
            return loss.mean(), loss

        return jax.grad(mean, has_aux=True)(params)

    slope, loss = run(jnp.float32(0.5))
    assert bool(jnp.all(jnp.isfinite(loss)))
    assert bool(jnp.isfinite(slope))
    return np.asarray(loss, np.float64)


@pytest.mark.parametrize("make", [jd.x0, jd.v, jd.score, jd.velocity, edm])
def test_every_parameterization_is_finite_at_small_times(make):
    """B10: a million draws from t0 = 1e-5 in single precision, weighted by g²/σ²."""
    estimates(time_samplers.uniform(1e-5), parameterization=make())


@pytest.mark.parametrize("name", sorted(set(SCHEDULES) - {"linear_beta"}))
def test_every_schedule_is_finite_at_its_important_times(name):
    """B10, for the other processes, most of whose times are now small."""
    last = 0.999 if name == "straight" else 1.0
    estimates(time_samplers.importance(1e-5, last), jd.Gaussian(SCHEDULES[name]), n=100_000)


def test_importance_times_leave_the_mean_and_take_the_variance():
    """B10, B11: means within 3 standard errors of uniform times', and 50 times less variance."""
    plain = estimates(time_samplers.uniform(1e-5))
    better = estimates(time_samplers.importance(1e-5))
    error = np.hypot(plain.std(), better.std()) / 1e3
    assert abs(plain.mean() - better.mean()) < 3 * error
    assert error < 0.05 * better.mean()
    assert plain.var() > 50 * better.var(), plain.var() / better.var()


@pytest.mark.parametrize("ends", [(0.0, 1.0), (0.5, 0.5), (1e-3, 1.1), (-1.0, 1.0)])
def test_bad_ends_are_refused(ends):
    with pytest.raises(ValueError, match=f"0 < t_min < t_max <= 1, got t_min={ends[0]}"):
        time_samplers.importance(*ends)


def test_endless_log_snr_is_refused():
    """Also where it matters, in a compiled training step."""
    sampler = time_samplers.importance()
    draw = lambda key: sampler(key, jd.Gaussian(jd.straight()), 4)
    for run in (draw, jax.jit(draw)):
        with pytest.raises(ValueError, match="take t_max < 1 where alpha"):
            run(KEY)
