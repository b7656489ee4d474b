"""Scores without noise labels, and scores that are gradients, against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from oracles import GMM5, SCHEDULES, optimised

import jaxdiff as jd
from jaxdiff import networks, trace
from jaxdiff.data.batches import FreshBatches
from jaxdiff.networks.energy import Conservative, log_density
from jaxdiff.objectives.score_matching import implicit_score_matching, sliced_score_matching
from jaxdiff.parameterizations import edm
from jaxdiff.processes.base import score
from jaxdiff.training import init_state, make_train_step, warmup_adam

KEY = jax.random.key(0)
VP = jd.Gaussian(SCHEDULES["linear_beta"])
PROBES = (trace.rademacher, trace.gaussian)


def curved(params, x):
    """A nonlinear field of states of any shape, whose Jacobian is not symmetric."""
    flat = x.reshape(x.shape[0], -1)
    out = jnp.tanh(flat @ params["in"]) @ params["out"] + flat**2
    return out.reshape(x.shape)


def weights(size, width=5):
    draw = lambda i, shape: jax.random.normal(jax.random.key(i), shape)
    return {"in": draw(1, (size, width)), "out": draw(2, (width, size))}


def jacobians(field, x):
    """[b, n, n], one example at a time."""
    size = x[0].size
    one = lambda x: jax.jacrev(lambda x: field(x[None])[0])(x).reshape(size, size)
    return jax.vmap(one)(x)


# The objectives


@pytest.mark.parametrize("shape", [(3,), (2, 2, 1)])
def test_loss_is_half_the_square_and_the_exact_trace(shape):
    x = jax.random.normal(KEY, (6, *shape))
    params = weights(x[0].size)
    loss, metrics = implicit_score_matching(curved)(params, KEY, {"x": x})
    trace = jnp.trace(jacobians(lambda x: curved(params, x), x), axis1=1, axis2=2)
    square = jnp.sum(curved(params, x).reshape(6, -1) ** 2, axis=1)
    np.testing.assert_allclose(metrics["trace"], trace, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(metrics["half_square"], square / 2, rtol=1e-5)
    np.testing.assert_allclose(loss, square / 2 + trace, rtol=1e-4, atol=1e-5)


def test_linear_minimiser_is_the_score_of_gaussian_data():
    """For data of exactly the moments μ, Σ: s = −Σ⁻¹(x − μ), and the loss there is −½ tr Σ⁻¹."""
    mean = np.array([0.5, -1.0, 0.2])
    factor = np.array([[0.8, 0.0, 0.0], [0.3, 0.5, 0.0], [-0.2, 0.1, 0.6]])
    raw = np.random.default_rng(0).standard_normal((200, 3))
    raw -= raw.mean(0)
    white = raw @ np.linalg.inv(np.linalg.cholesky(raw.T @ raw / 200)).T
    x = jnp.asarray(mean + white @ factor.T, jnp.float32)
    precision = np.linalg.inv(factor @ factor.T)

    linear = lambda params, x: x @ params[:3] + params[3][None]
    loss = lambda p: implicit_score_matching(linear)(p.reshape(4, 3), KEY, {"x": x})[0].mean()
    truth = jnp.asarray(np.concatenate([-precision, (precision @ mean)[None]]), jnp.float32)
    value, slope = jax.value_and_grad(loss)(truth.reshape(12))
    np.testing.assert_allclose(value, -np.trace(precision) / 2, rtol=1e-4)
    np.testing.assert_allclose(slope, 0.0, atol=1e-3)
    # The loss is quadratic in a linear model: one Newton step finds its minimum.
    zero = jnp.zeros(12)
    found = -jnp.linalg.solve(jax.hessian(loss)(zero), jax.grad(loss)(zero)).reshape(4, 3)
    np.testing.assert_allclose(found, truth, atol=1e-3 * np.abs(precision).max())


@pytest.mark.parametrize("probe", PROBES)
@pytest.mark.parametrize("probes", [1, 3])
def test_slices_estimate_the_trace(probe, probes):
    """Mean and variance over many copies of one example, each with probes of its own."""
    x = jnp.broadcast_to(jax.random.normal(KEY, (1, 3)), (20_000, 3))
    params = weights(3)
    exact, parts = implicit_score_matching(curved)(params, KEY, {"x": x[:1]})
    sliced = sliced_score_matching(curved, probes=probes, probe=probe)
    loss, metrics = sliced(params, jax.random.key(1), {"x": x})
    np.testing.assert_allclose(metrics["half_square"], parts["half_square"][0], rtol=1e-5)

    jacobian = np.asarray(jacobians(lambda x: curved(params, x), x[:1])[0])
    squares = ((jacobian + jacobian.T) / 2) ** 2
    if probe is trace.rademacher:
        squares -= np.diag(np.diag(squares))
    variance = 2 * squares.sum() / probes
    np.testing.assert_allclose(loss.mean(), exact[0], atol=3 * (variance / 20_000) ** 0.5)
    np.testing.assert_allclose(loss.var(), variance, rtol=0.06)


def test_one_coordinate_has_one_slice():
    """v² = 1 for signs: exact for D = 1, whatever the key."""
    x, params = jax.random.normal(KEY, (50, 1)), weights(1)
    exact = implicit_score_matching(curved)(params, KEY, {"x": x})[0]
    sliced = sliced_score_matching(curved, probe=trace.rademacher)
    np.testing.assert_allclose(sliced(params, KEY, {"x": x})[0], exact, rtol=1e-5, atol=1e-5)


def test_slices_do_not_depend_on_the_batch_around_them():
    x, params = jax.random.normal(KEY, (8, 3)), weights(3)
    objective = sliced_score_matching(curved, probe=trace.gaussian)
    whole, half = (objective(params, KEY, {"x": x[:n]})[0] for n in (8, 4))
    np.testing.assert_allclose(half, whole[:4], rtol=1e-5)


@pytest.mark.parametrize("make", [implicit_score_matching, sliced_score_matching])
def test_gradient_goes_through_the_trace(make):
    """Central differences, in double precision."""
    with jax.enable_x64(True):
        wide = lambda tree: jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), tree)
        x, params, direction = wide((jax.random.normal(KEY, (6, 3)), weights(3), weights(3)))
        loss = lambda params: make(curved)(params, KEY, {"x": x})[0].mean()
        along = lambda h: loss(jax.tree.map(lambda a, d: a + h * d, params, direction))
        expected = (along(1e-5) - along(-1e-5)) / 2e-5
        slopes = jax.grad(loss)(params)
        found = sum(
            jnp.sum(a * d)
            for a, d in zip(jax.tree.leaves(slopes), jax.tree.leaves(direction), strict=True)
        )
        np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_condition_and_dropout_reach_the_network():
    seen = {}

    def network(params, x, label=None, rngs=None):
        seen["label"], seen["rngs"] = label, rngs
        return params * x * label[:, None]

    batch = {"x": jnp.ones((4, 2)), "label": jnp.arange(4.0)}
    loss, _ = implicit_score_matching(network)(jnp.float32(0.5), KEY, batch)
    np.testing.assert_allclose(loss, 0.25 * jnp.arange(4) ** 2 + jnp.arange(4), rtol=1e-6)
    assert seen["rngs"] is None
    sliced_score_matching(network, dropout=True)(jnp.float32(0.5), KEY, batch)
    assert set(seen["rngs"]) == {"dropout"}


def test_no_probes_are_refused():
    with pytest.raises(ValueError, match="probes must be at least 1, got 0"):
        sliced_score_matching(curved, probes=0)


@pytest.mark.parametrize("make", [implicit_score_matching, sliced_score_matching])
def test_network_learns_the_score_of_a_mixture(make):
    """Five modes, blurred to a width of 0.37: its Fisher divergence against the best Gaussian's."""
    alpha, sigma = VP.schedule(jnp.float32(0.1))
    mixture = GMM5.diffused(alpha, sigma)
    net = networks.MLP(width=64, depth=2)
    apply = lambda params, x: net.apply(params, x, jnp.zeros(x.shape[0]))
    params = net.init(KEY, jnp.zeros((1, 2)), jnp.zeros(1))
    params = trained(make(apply), params, mixture.sample, 500)

    x = mixture.sample(jax.random.key(13), 5000)
    exact = jax.vmap(mixture.score)(x)
    mean, cov = mixture.moments()
    gaussian = (mean[None] - x) @ jnp.linalg.inv(cov)
    divergence = lambda guess: 0.5 * jnp.mean(jnp.sum((guess - exact) ** 2, axis=1))
    assert divergence(apply(params, x)) < 0.05 * divergence(gaussian)


def trained(objective, params, draw, steps):
    """Averaged parameters after some seconds of training."""
    optimizer = warmup_adam(3e-3, steps=steps, warmup=100)
    step = make_train_step(objective, optimizer, ema_decay=0.99)
    state, batches = init_state(params, optimizer, KEY), FreshBatches(draw, 256)
    with optimised():
        for i in range(steps):
            state, _ = step(state, batches[i])
    return state.ema_params


# Networks that are gradients


def perturbed(net, size=2):
    """Parameters with nothing at zero, as after some training."""
    params = net.init(KEY, jnp.zeros((1, size)), jnp.zeros(1))
    return jax.tree.map(lambda a: a + 0.3 * jax.random.normal(KEY, a.shape), params)


def test_jacobian_is_symmetric_by_construction():
    """B28: of the score, to 1e-5 of its size; of a free network it is not."""
    x = jax.random.normal(KEY, (20, 3))

    def asymmetry(net):
        denoise = jd.NetDenoiser(perturbed(net, 3), VP, net.apply, jd.epsilon())
        t = jnp.float32(0.3)
        field = lambda x: jax.vmap(lambda x, x0: score(VP, x, x0, t))(x, denoise(x, t).mean)
        found = jacobians(field, x)
        return jnp.abs(found - found.swapaxes(1, 2)).max() / jnp.abs(found).max()

    free = networks.MLP(width=32, depth=2)
    assert asymmetry(Conservative(free)) < 1e-5
    assert asymmetry(free) > 0.1


PARAMETERIZATIONS = {
    "epsilon": jd.epsilon(),
    "x0": jd.x0(),
    "v": jd.v(),
    "score": jd.score(),
    "velocity": jd.velocity(),
    "edm": edm(0.5),
}


@pytest.mark.parametrize("schedule", ["linear_beta", "exploding", "user"])
@pytest.mark.parametrize("name", PARAMETERIZATIONS)
def test_slope_of_the_log_density_is_the_score(name, schedule):
    process, parameterization = jd.Gaussian(SCHEDULES[schedule]), PARAMETERIZATIONS[name]
    net = Conservative(networks.MLP(width=16, depth=2, num_classes=3))
    params, label = perturbed(net), jnp.arange(4) % 3
    denoise = jd.NetDenoiser(params, process, net.apply, parameterization, {"label": label})
    x = jax.random.normal(KEY, (4, 2))
    for t in map(jnp.float32, (0.2, 0.7)):
        density = lambda x, t=t: log_density(
            net, params, process, parameterization, x, t, label=label
        )
        found = jax.grad(lambda x: density(x).sum())(x)  # noqa: B023
        expected = jax.vmap(lambda x, x0, t=t: score(process, x, x0, t))(x, denoise(x, t).mean)
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4 * jnp.abs(expected).max())


class Whole(nn.Module):
    """f with ⟨x, f⟩ = ½σ‖x‖²: its gradient σx is the exact ε of data from N(0, I) under VP."""

    @nn.compact
    def __call__(self, x, noise_level):
        return 0.5 * jnp.sqrt(jax.nn.sigmoid(-4.0 * noise_level))[:, None] * x


def test_energy_and_likelihood_of_normal_data():
    """log_density is −½‖x‖², and the library takes the network as any other."""
    net = Conservative(Whole())
    x = jax.random.normal(KEY, (16, 2))
    params = net.init(KEY, x, jnp.zeros(16))
    for t in map(jnp.float32, (0.05, 0.5, 1.0)):
        found = log_density(net, params, VP, jd.epsilon(), x, t)
        np.testing.assert_allclose(found, -0.5 * jnp.sum(x**2, axis=1), rtol=2e-3, atol=1e-4)
    denoise = jd.NetDenoiser(params, VP, net.apply, jd.epsilon())
    exact = jax.scipy.stats.norm.logpdf(x).sum(1)
    found = jd.log_likelihood(VP, denoise, x)
    np.testing.assert_allclose(found.value, exact, atol=2e-3)
    np.testing.assert_allclose(found.latent, x, atol=2e-3)  # whose flow stands still


@pytest.fixture(scope="module")
def energies():
    """log p_t of the five modes, up to constants, from a network trained for seconds."""
    net = Conservative(networks.MLP(width=64, depth=2))
    sampler = jd.time_samplers.low_discrepancy()
    objective = jd.denoising(net.apply, VP, jd.epsilon(), time_sampler=sampler)
    params = net.init(KEY, jnp.zeros((1, 2)), jnp.zeros(1))
    params = trained(objective, params, GMM5.sample, 1000)
    return lambda x, t: log_density(net, params, VP, jd.epsilon(), x, t)


def test_trained_energy_is_the_log_density(energies):
    """B28: corr(−E, log p_t) > 0.99, with a slope of one: in nats."""
    for t in map(jnp.float32, (0.1, 0.2, 0.4, 0.6, 0.9)):
        mixture = GMM5.diffused(*VP.schedule(t))
        x = mixture.sample(jax.random.key(3), 2000)
        found, exact = energies(x, t), jax.vmap(mixture.log_prob)(x)
        assert np.corrcoef(found, exact)[0, 1] > 0.99, float(t)
        np.testing.assert_allclose(np.polyfit(exact, found, 1)[0], 1.0, atol=0.06)


# Noise levels as temperatures


def annealed(log_prob, times, particles=2000):
    """Annealed importance sampling of log Z_t/Z_1 from the prior, and its standard error.

    At each level the weight of the change of density, then a Langevin step, accepted or refused
    (MALA), so that it leaves the level's density exactly as it is.
    """
    x = VP.prior((particles, 2)).sample(jax.random.key(5))
    start = lambda x: -0.5 * jnp.sum((x / VP.schedule(jnp.ones(()))[1]) ** 2, axis=1)

    @jax.jit
    def level(key, x, t):
        alpha, sigma = VP.schedule(t)
        step = 0.3 * ((0.2 * alpha) ** 2 + sigma**2)
        slope = jax.grad(lambda x: log_prob(x, t).sum())
        jump = lambda y, x: -jnp.sum((y - x - step * slope(x)) ** 2, axis=1) / (4 * step)
        noise_key, accept_key = jax.random.split(key)
        noise = jax.random.normal(noise_key, x.shape)
        y = x + step * slope(x) + jnp.sqrt(2 * step) * noise
        ratio = log_prob(y, t) - log_prob(x, t) + jump(x, y) - jump(y, x)
        accepted = jnp.log(jax.random.uniform(accept_key, ratio.shape)) < ratio
        x = jnp.where(accepted[:, None], y, x)
        return x, log_prob(x, t)

    density = jax.jit(log_prob)
    log_weight = density(x, times[0]) - start(x)
    for i in range(1, len(times)):
        x, before = level(jax.random.fold_in(KEY, i), x, times[i - 1])
        log_weight += density(x, times[i]) - before
    weight = np.exp(np.asarray(log_weight, np.float64))
    return np.log(weight.mean()), weight.std() / weight.mean() / particles**0.5


TIMES = jd.grids.uniform_log_snr(VP, 50, end=0.1, to_zero=False)


def mixture_energy(x, t):
    """log of Σ w exp(−½ ‖x − αm‖²/s²): the exact energy, its normaliser (2πs²)^{D/2} left out."""
    alpha, sigma = VP.schedule(t)
    squares = jnp.sum((x[:, None] - alpha * GMM5.means[None]) ** 2, axis=2)
    logits = -0.5 * squares / ((0.2 * alpha) ** 2 + sigma**2) + jnp.log(GMM5.weights)[None]
    return jax.nn.logsumexp(logits, axis=1)


def test_noise_levels_anneal_exact_energies():
    """B28: AIS from the exact prior finds log Z_t/Z_1 = log s_t² − log σ(1)² of the plane."""
    found, error = annealed(mixture_energy, TIMES)
    alpha, sigma = VP.schedule(TIMES[-1])
    expected = np.log((0.2 * alpha) ** 2 + sigma**2) - 2 * np.log(VP.schedule(jnp.ones(()))[1])
    assert error < 0.05
    assert abs(found - expected) < 3 * error


def test_noise_levels_anneal_trained_energies(energies):
    """B28: the same of a network's energies, whose normaliser is found on a fine grid."""
    found, error = annealed(energies, TIMES)
    axis = jnp.linspace(-3.0, 3.0, 301)
    points = jnp.stack(jnp.meshgrid(axis, axis), axis=-1).reshape(-1, 2)
    log_z = jax.nn.logsumexp(energies(points, TIMES[-1])) + 2 * np.log(axis[1] - axis[0])
    expected = log_z - np.log(2 * np.pi) - 2 * np.log(VP.schedule(jnp.ones(()))[1])
    assert error < 0.05
    assert abs(found - expected) < 3 * error
