"""Grey levels as points of their cells: by a flow, against the exact sum over a cell."""

import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxdiff as jd
from jaxdiff.data.batches import FreshBatches
from jaxdiff.data.images import dequantize, to_model
from jaxdiff.data_likelihood import likelihood_report, likelihood_rows
from jaxdiff.experiment import load_config
from jaxdiff.networks import Dequantizer
from jaxdiff.objectives.dequantization import dequantized, fill
from jaxdiff.solve import adaptive
from jaxdiff.training import init_state, make_train_step, warmup_adam

KEY = jax.random.key(0)
FLOW = Dequantizer(width=8)


def weights(shape, scale=0.05, flow=FLOW):
    """With nothing at zero, as after some training."""
    x = jnp.zeros((1, *shape))
    params = flow.init(KEY, x, x)
    return jax.tree.map(lambda a: a + scale * jax.random.normal(KEY, a.shape), params)


def test_at_the_start_it_is_uniform_noise():
    x = jnp.zeros((2000, 4, 4, 1))
    params = FLOW.init(KEY, x[:1], x[:1])
    y, log_q = fill(FLOW.apply, params, KEY, x, 17)
    np.testing.assert_allclose(log_q, 16 * math.log(17 / 2), rtol=1e-6)
    assert -1 / 17 <= y.min() < y.max() <= 1 / 17
    for power, moment in ((1, 0.0), (2, 1 / 3), (4, 1 / 5)):
        np.testing.assert_allclose(jnp.mean((17 * y) ** power), moment, atol=0.01)


@pytest.mark.parametrize("shape", [(2, 3, 1), (3, 2, 2)])
def test_density_is_the_change_of_variables(shape):
    """Against the determinant of the whole Jacobian from normal noise to u."""
    params, x = weights(shape), jax.random.uniform(jax.random.key(1), (5, *shape), minval=-1.0)
    noise = jax.random.normal(jax.random.key(2), (5, *shape))
    u, log_q = FLOW.apply(params, x, noise)
    size = math.prod(shape)

    def one(x, noise):
        jacobian = jax.jacobian(lambda n: FLOW.apply(params, x[None], n[None])[0][0])(noise)
        normal = jax.scipy.stats.norm.logpdf(noise).sum()
        return normal - jnp.linalg.slogdet(jacobian.reshape(size, size))[1]

    np.testing.assert_allclose(log_q, jax.vmap(one)(x, noise), rtol=1e-4, atol=1e-4)
    assert 0.0 < u.min() < u.max() < 1.0
    assert log_q.std() > 0.2


def test_every_pixel_depends_on_every_other_near_it():
    params, x = weights((3, 3, 1)), jnp.zeros((1, 3, 3, 1))
    noise = jax.random.normal(KEY, x.shape)
    jacobian = jax.jacobian(lambda n: FLOW.apply(params, x, n)[0])(noise).reshape(9, 9)
    assert (jnp.abs(jacobian) > 1e-6).all()


def test_fill_uses_an_example_s_own_key():
    params, x = weights((2, 2, 1)), jax.random.uniform(KEY, (6, 2, 2, 1))
    keys = jax.random.split(KEY, 6)
    whole, part = (fill(FLOW.apply, params, keys[:n], x[:n], 5) for n in (6, 3))
    np.testing.assert_allclose(whole[0][:3], part[0], rtol=1e-5)
    np.testing.assert_allclose(whole[1][:3], part[1], rtol=1e-4)
    assert (jnp.abs(whole[0] - x) <= 1 / 5).all()


def test_a_trained_flow_closes_the_gap_of_uniform_noise():
    """Of N(m, s²) a cell has a known probability, which the bound reaches as q becomes p/P.

    A narrow Gaussian in cells of width ½: uniform noise loses .3 nats a pixel.
    """
    mean, std = 0.1, 0.15
    x = to_model(jnp.arange(4), 4)
    edges = jax.scipy.stats.norm.cdf(jnp.linspace(-1.0, 1.0, 5), mean, std)
    mass = jnp.diff(edges)

    def bound(params, key, batch):
        y = batch["x"]
        return -jnp.mean(jax.scipy.stats.norm.logpdf(y, mean, std), axis=(1, 2, 3)), {}

    def draw(key, n):
        cells = jax.random.choice(key, 4, (n, 2, 2, 1), p=mass / mass.sum())
        return x[cells]

    objective = dequantized(bound, FLOW.apply, levels=4)
    start = {"model": {}, "dequantizer": FLOW.init(KEY, *[jnp.zeros((1, 2, 2, 1))] * 2)}
    optimizer = warmup_adam(1e-2, steps=300, warmup=20)
    step = make_train_step(objective, optimizer, ema_decay=0.9)
    state, batches = init_state(start, optimizer, KEY), FreshBatches(draw, 128)
    for i in range(300):
        state, _ = step(state, batches[i])

    test = draw(jax.random.key(5), 4000)
    exact = -float(jnp.log(mass)[jnp.searchsorted(x, test)].mean())
    gaps = [
        float(objective(params, jax.random.key(6), {"x": test})[0].mean()) - exact
        for params in (start, state.ema_params)
    ]
    # Of uniform noise: E_k [mean over the cell of −log p] + log of the width, less −log P_k.
    grid = x[:, None] + jnp.linspace(-0.25, 0.25, 2001)[None]
    loss = -jax.scipy.stats.norm.logpdf(grid, mean, std).mean(1) - math.log(0.5) + jnp.log(mass)
    np.testing.assert_allclose(gaps[0], float((mass * loss).sum() / mass.sum()), rtol=0.05)
    assert gaps[0] > 0.25
    assert -0.002 < gaps[1] < 0.05 * gaps[0]


def test_bound_sees_the_points_and_what_else_the_batch_holds():
    seen = {}

    def bound(params, key, batch):
        seen.update(batch, params=params)
        return jnp.zeros(3), {"part": jnp.ones(3)}

    params = {"model": "model", "dequantizer": weights((2, 2, 1))}
    batch = {"x": jnp.zeros((3, 2, 2, 1)), "label": jnp.arange(3)}
    loss, metrics = dequantized(bound, FLOW.apply, levels=4)(params, KEY, batch)
    assert seen["params"] == "model"
    assert (seen["label"] == batch["label"]).all()
    assert 0.0 < jnp.abs(seen["x"]).max() <= 0.25
    np.testing.assert_allclose(loss, metrics["log_q"])
    assert set(metrics) == {"part", "log_q"}
    with pytest.raises(ValueError, match="levels must be at least 2, got 1"):
        dequantized(bound, FLOW.apply, levels=1)


# The config


def configured(**options):
    module = load_config(Path(__file__).parents[1] / "configs" / "likelihood_digits.py")
    small = {"width": 8, "multipliers": (1,), "attention": (), "sampler_steps": 4}
    small |= {"eval_samples": 16, "eval_images": 8, "tolerance": 1e-2, "steps": 10}
    return module.experiment(module.Config(**small | options))


def test_untrained_flow_and_uniform_noise_have_the_same_bound():
    """Of the same network, before it learns: both are uniform in their cells."""
    bits = {}
    for way in ("uniform", "variational"):
        experiment = configured(dequantisation=way, eval_images=16, probes=4)
        params = jax.jit(experiment.init)(KEY)
        part = experiment.likelihood
        found = part.estimate(params, jax.random.split(KEY, 16), part.examples("test", KEY))
        bits[way] = part.bits(-np.asarray(found.value, np.float64)).mean()
    assert bits["uniform"] == pytest.approx(bits["variational"], abs=0.03)
    assert 2.5 < bits["uniform"] < 20.0


def test_draws_of_a_cell_are_averaged_by_importance():
    """log (1/K) Σ_k p(y_k) / q(y_k): a likelihood of its own for each of the draws."""
    experiment = configured(dequantisation="uniform", draws=3)
    noise = lambda a: a + 0.1 * jax.random.normal(KEY, a.shape)  # a density that is not flat
    params = jax.tree.map(noise, jax.jit(experiment.init)(KEY))
    x, keys = experiment.likelihood.examples("test", KEY)[:4], jax.random.split(KEY, 4)
    found = jax.jit(experiment.likelihood.estimate)(params, keys, x)

    @jax.jit
    def one(i):
        own = jax.vmap(lambda key: jax.random.split(jax.random.fold_in(key, i)))(keys)
        points, denoise = dequantize(own[:, 0], x, 17), experiment.denoiser(params)
        options = {"probes": 2, "t0": 1e-5, "controller": adaptive(1e-2)}
        return jd.log_likelihood(experiment.process, denoise, points, key=own[:, 1], **options)

    parts = [one(i) for i in range(3)]
    log_w = np.stack([part.value for part in parts]) - 64 * math.log(17 / 2)
    share = np.exp(log_w - log_w.max(0))
    expected = log_w.max(0) + np.log(share.mean(0))
    np.testing.assert_allclose(found.value, expected, rtol=1e-3)
    assert np.all(expected > log_w.mean(0) + 0.1)
    errors = np.stack([part.stderr for part in parts])
    expected = np.sqrt(np.sum((share / share.sum(0) * errors) ** 2, axis=0))
    np.testing.assert_allclose(found.stderr, expected, rtol=1e-2)
    calls = sum(part.num_evaluations for part in parts)
    np.testing.assert_array_equal(found.num_evaluations, calls)
    assert found.converged.all()


@pytest.mark.parametrize("way", ["uniform", "variational"])
def test_config_trains_and_reports(way):
    experiment = configured(dequantisation=way)
    params = jax.jit(experiment.init)(KEY)
    step = make_train_step(experiment.objective, experiment.optimizer, ema_decay=0.5)
    state = init_state(params, experiment.optimizer, KEY)
    before = jax.device_get(state.params["dequantizer"])
    for i in range(3):
        state, metrics = step(state, experiment.batches()[i])
    assert np.isfinite(metrics["loss"])
    moved = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), before, state.params["dequantizer"])
    assert any(jax.tree.leaves(moved)) == (way == "variational")
    part = experiment.likelihood
    examples = part.examples("test", KEY)
    rows = likelihood_rows(part, state.ema_params, examples, KEY)
    report = likelihood_report(part, examples, rows)
    assert np.isfinite(report["bits_per_dim"])
    assert (report["dequantisation"], report["draws"], report["examples"]) == (way, 1, 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weighting": "p2"}, "weighting must be one of simple, likelihood, got 'p2'"),
        ({"times": "often"}, "times must be one of uniform, importance, got 'often'"),
        ({"dequantisation": "no"}, "dequantisation must be one of uniform, variational"),
        ({"weighting": "simple"}, "dequantisation must be uniform with weighting=simple"),
        ({"draws": 0}, "draws must be at least 1, got 0"),
        ({"probes": 0}, "probes must be at least 1, got 0"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        configured(**options)
