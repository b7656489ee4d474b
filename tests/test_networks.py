"""Embeddings and the MLP against closed forms; what every network promises."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxdiff as jd
from jaxdiff.networks import MLP, GaussianFourier, Sinusoidal, SmoothFeatures, UNet, from_nnx

KEY = jax.random.key(0)
BATCH = 3
LEVELS = jnp.array([-2.0, 0.1, 3.0])


def tiny(**options):
    return UNet(**{"width": 8, "multipliers": (1, 2), "blocks": 1, "attention": (4,)} | options)


def images(side=8, channels=1):
    return jax.random.normal(jax.random.key(7), (BATCH, side, side, channels))


def vectors():
    return jax.random.normal(jax.random.key(7), (BATCH, 2))


def perturbed(net, *inputs):
    """Random parameters with nothing at zero, as after some training."""
    leaves, tree = jax.tree.flatten(jax.eval_shape(net.init, KEY, *inputs))
    random = np.random.default_rng(0)
    noisy = [jnp.asarray(0.3 * random.standard_normal(a.shape), jnp.float32) for a in leaves]
    return jax.tree.unflatten(tree, noisy)


def count(net, shape):
    params = jax.eval_shape(net.init, KEY, jnp.zeros(shape), jnp.zeros(shape[0]))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


NETWORKS = [
    pytest.param(lambda **o: MLP(width=16, depth=2, **o), vectors, id="mlp"),
    pytest.param(tiny, images, id="unet"),
    pytest.param(lambda **o: tiny(scale_shift=True, **o), images, id="unet-scale-shift"),
]


# Embeddings


def log_snr_levels():
    t = np.linspace(1e-3, 1.0, 1000)
    log_alpha2 = -(0.1 * t + 9.95 * t**2)
    return (log_alpha2 - np.log(-np.expm1(log_alpha2))) / 4


@pytest.mark.parametrize(
    ("embedding", "levels"),
    [
        (SmoothFeatures(), log_snr_levels()),
        (GaussianFourier(), log_snr_levels()),
        (Sinusoidal(), np.linspace(1.0, 1000.0, 1000)),
    ],
    ids=["smooth", "gaussian", "sinusoidal"],
)
def test_a_thousand_times_have_a_thousand_embeddings(embedding, levels):
    levels = jnp.asarray(levels, jnp.float32)
    features = np.asarray(embedding.apply(embedding.init(KEY, levels), levels), np.float64)
    assert features.shape == (1000, embedding.dim)
    squares = (features**2).sum(1)
    distance2 = squares[:, None] + squares[None, :] - 2 * features @ features.T
    assert distance2[~np.eye(1000, dtype=bool)].min() > 1e-3**2


def test_sinusoidal_is_the_published_position_encoding():
    levels, dim = np.array([0.0, 1.0, 7.0, 999.0]), 8
    frequencies = np.exp(-math.log(1e4) * np.arange(dim // 2) / (dim // 2 - 1))
    angle = levels[:, None] * frequencies
    expected = np.concatenate([np.sin(angle), np.cos(angle)], axis=1)
    got = Sinusoidal(dim).apply({}, jnp.asarray(levels, jnp.float32))
    np.testing.assert_allclose(got, expected, atol=1e-4)


def test_smooth_features_change_slowly():
    slope = jax.jacfwd(lambda u: SmoothFeatures().apply({}, u[None])[0])
    slopes = jax.vmap(slope)(jnp.linspace(-5.0, 5.0, 201))
    assert float(jnp.abs(slopes).max()) == pytest.approx(4.0, rel=1e-3)


def test_random_frequencies_have_their_scale_and_take_no_gradient():
    embedding = GaussianFourier(dim=4000, scale=16.0)
    params = embedding.init(KEY, LEVELS)
    assert float(jnp.std(params["params"]["frequencies"])) == pytest.approx(16.0, rel=0.05)
    gradient = jax.grad(lambda p: jnp.sum(embedding.apply(p, LEVELS) ** 3))(params)
    assert not jnp.any(gradient["params"]["frequencies"])
    # One turn per unit and frequency: an integer frequency repeats itself at integer levels.
    whole = {"params": {"frequencies": jnp.array([1.0, 3.0])}}
    features = GaussianFourier(dim=4).apply(whole, jnp.array([0.25, 1.25]))
    np.testing.assert_allclose(features[0], features[1], atol=1e-5)
    np.testing.assert_allclose(features[0], [1.0, -1.0, 0.0, 0.0], atol=1e-5)


@pytest.mark.parametrize("embedding", [SmoothFeatures, Sinusoidal, GaussianFourier])
@pytest.mark.parametrize("dim", [2, 7])
def test_embeddings_refuse_a_bad_dim(embedding, dim):
    with pytest.raises(ValueError, match=f"dim must be an even number.*{dim}"):
        embedding(dim).init(KEY, LEVELS)


# What every network promises


@pytest.mark.parametrize(("make", "inputs"), NETWORKS)
def test_starts_at_zero(make, inputs):
    net, x = make(), inputs()
    out = jax.jit(net.apply)(jax.jit(net.init)(KEY, x, LEVELS), x, LEVELS)
    assert out.shape == x.shape
    assert not jnp.any(out)


@pytest.mark.parametrize(("make", "inputs"), NETWORKS)
def test_every_parameter_is_wired_and_finite(make, inputs):
    net, x = make(num_classes=2), inputs()
    label = jnp.array([0, 1, 2])
    params = perturbed(net, x, LEVELS, label)
    gradient = jax.jit(jax.grad(lambda p: jnp.sum(net.apply(p, x, LEVELS, label) ** 2)))(params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        assert jnp.all(jnp.isfinite(leaf)), path
        assert jnp.any(leaf != 0), path


@pytest.mark.parametrize(("make", "inputs"), NETWORKS)
def test_learns_a_target_that_needs_the_noise_level(make, inputs):
    net, x = make(), inputs()
    x = jnp.concatenate([x] * 4)
    levels = jnp.tile(jnp.array([-3.0, -1.0, 1.0, 3.0])[:, None], (1, BATCH)).reshape(-1)
    sign = jnp.sign(levels).reshape(-1, *[1] * (x.ndim - 1))
    params = jax.jit(net.init)(KEY, x, levels)
    optimizer = optax.adam(1e-2)

    def loss(params):
        # The same x with both signs: no function of x alone does better than zero.
        return jnp.mean((net.apply(params, x, levels) - sign * x) ** 2)

    @jax.jit
    def step(params, state):
        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), state, value

    state, first = optimizer.init(params), None
    for _ in range(60):
        params, state, value = step(params, state)
        first = value if first is None else first
    assert float(value) < 0.2 * float(first)


@pytest.mark.parametrize(("make", "inputs"), NETWORKS[:2])
def test_labels_and_the_null_label(make, inputs):
    net, x = make(num_classes=3), inputs()
    params = perturbed(net, x, LEVELS)
    apply = jax.jit(net.apply)

    def of(label):
        return apply(params, x, LEVELS, jnp.full(BATCH, label))

    outputs = [of(label) for label in range(4)]
    for i in range(4):
        for j in range(i):
            assert float(jnp.abs(outputs[i] - outputs[j]).max()) > 1e-2
    np.testing.assert_array_equal(apply(params, x, LEVELS), outputs[3])
    # Each example is told its own label.
    mixed = apply(params, x, LEVELS, jnp.array([2, 0, 3]))
    for row, label in enumerate([2, 0, 3]):
        np.testing.assert_allclose(mixed[row], outputs[label][row], atol=1e-5)


@pytest.mark.parametrize(("make", "inputs"), NETWORKS[:2])
def test_a_label_without_classes_is_refused(make, inputs):
    with pytest.raises(ValueError, match="num_classes"):
        make().init(KEY, inputs(), LEVELS, jnp.zeros(BATCH, int))


@pytest.mark.parametrize(("make", "inputs"), NETWORKS[:2])
def test_dropout_acts_only_by_its_key(make, inputs):
    net, plain, x = make(dropout=0.5), make(), inputs()
    params = perturbed(net, x, LEVELS)

    @jax.jit
    def drop(key):
        return net.apply(params, x, LEVELS, rngs={"dropout": key})

    first, second = jax.random.split(KEY)
    quiet = jax.jit(net.apply)(params, x, LEVELS)
    np.testing.assert_array_equal(quiet, jax.jit(plain.apply)(params, x, LEVELS))
    np.testing.assert_array_equal(drop(first), drop(first))
    assert float(jnp.abs(drop(first) - drop(second)).max()) > 1e-2
    assert float(jnp.abs(drop(first) - quiet).max()) > 1e-2


@pytest.mark.parametrize(("make", "inputs"), NETWORKS[:2])
def test_one_compile_for_all_noise_levels_and_no_mixing_of_the_batch(make, inputs):
    net, x = make(), inputs()
    params = perturbed(net, x, LEVELS)
    apply = jax.jit(net.apply)
    out = apply(params, x, LEVELS)
    order = jnp.array([2, 0, 1])
    np.testing.assert_allclose(apply(params, x[order], LEVELS[order]), out[order], atol=1e-5)
    for level in (-4.0, 0.0, 2.5):
        apply(params, x, jnp.full(BATCH, level, jnp.float32))
    assert apply._cache_size() == 1


@pytest.mark.parametrize(("make", "inputs"), NETWORKS[:2])
def test_bfloat16_computes_nearly_the_same_and_returns_float32(make, inputs):
    net, narrow, x = make(), make(dtype=jnp.bfloat16), inputs()
    params = perturbed(net, x, LEVELS)
    kept = jax.eval_shape(narrow.init, KEY, x, LEVELS)
    assert {leaf.dtype for leaf in jax.tree.leaves(kept)} == {jnp.dtype("float32")}
    exact, rough = jax.jit(net.apply)(params, x, LEVELS), jax.jit(narrow.apply)(params, x, LEVELS)
    assert rough.dtype == jnp.float32
    error = float(jnp.abs(rough - exact).max() / jnp.abs(exact).max())
    assert 1e-5 < error < 0.05


# The MLP


def test_mlp_parameter_count():
    width, depth, dim, data = 16, 4, 64, 2
    conditioning = (dim + 1) * width + (width + 1) * width
    ends = (data + 1) * width + (width + 1) * data
    block = 2 * (width + 1) * width + (width + 1) * 2 * width
    assert count(MLP(width, depth), (1, data)) == conditioning + ends + depth // 2 * block


def test_mlp_parameter_count_with_waves_and_a_narrow_condition():
    width, data, waves, narrow, dim = 16, 2, 5, 8, 64
    conditioning = (dim + 1) * narrow + (narrow + 1) * narrow
    ends = data * waves + (data + 2 * waves + 1) * width + (width + 1) * data
    block = 2 * (width + 1) * width + (narrow + 1) * 2 * width
    net = MLP(width, 2, waves=waves, condition_width=narrow)
    assert count(net, (1, data)) == conditioning + ends + block


def test_mlp_sees_waves_by_their_angles_alone():
    """Blind to x itself, it has the period of its waves: x + 2π K⁻ᵀ m for whole numbers m."""
    net = MLP(width=16, depth=2, waves=2)
    x = vectors()
    params = perturbed(net, x, LEVELS)
    kernel = params["params"]["Dense_0"]["kernel"]
    params["params"]["Dense_0"]["kernel"] = kernel.at[:2].set(0.0)
    directions = params["params"]["waves_directions"]
    period = 2 * jnp.pi * jnp.linalg.solve(directions.T, jnp.array([1.0, -2.0]))
    out = net.apply(params, x, LEVELS)
    np.testing.assert_allclose(net.apply(params, x + period[None], LEVELS), out, atol=2e-4)
    moved = net.apply(params, x + 0.5 * period[None], LEVELS)
    assert np.abs(moved - out).max() > 0.1


@pytest.mark.parametrize("depth", [0, 3])
def test_mlp_refuses_an_odd_depth(depth):
    with pytest.raises(ValueError, match=f"depth must be even.*{depth}"):
        MLP(depth=depth).init(KEY, vectors(), LEVELS)


# Modules of NNX


class Perceptron(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(3, 8, rngs=rngs), nnx.Linear(8, 2, rngs=rngs)])
        self.drops = nnx.List([nnx.Dropout(0.5, rngs=rngs) for _ in range(2)])

    def __call__(self, x, noise_level, label=None):
        h = jnp.concatenate([x, noise_level[:, None]], axis=1)
        h = self.drops[0](jnp.tanh(self.layers[0](h)))
        h = h if label is None else h + label[:, None]
        return self.layers[1](self.drops[1](h))


@pytest.fixture
def perceptron():
    module = Perceptron(nnx.Rngs(0))
    return module, *from_nnx(module)


def test_a_module_of_nnx_is_a_pure_function(perceptron):
    module, apply, params = perceptron
    x, label = vectors(), jnp.array([0.0, 1.0, 2.0])
    run = jax.jit(apply)
    module.eval()
    np.testing.assert_allclose(run(params, x, LEVELS), module(x, LEVELS), rtol=1e-5)
    expected = module(x, LEVELS, label)
    np.testing.assert_allclose(run(params, x, LEVELS, label=label), expected, rtol=1e-5)
    kept = jax.tree.map(jnp.copy, params)
    run(jax.tree.map(lambda a: 2 * a, params), x, LEVELS)
    assert run._cache_size() == 2  # with a label and without
    jax.tree.map(np.testing.assert_array_equal, params, kept)
    slope = jax.grad(lambda p: apply(p, x, LEVELS).sum())(params)
    np.testing.assert_allclose(slope["layers"][1]["bias"], BATCH, rtol=1e-6)


def test_dropout_of_nnx_acts_only_by_its_key(perceptron):
    _, apply, params = perceptron
    x = vectors()
    drop = jax.jit(lambda key: apply(params, x, LEVELS, rngs={"dropout": key}))
    quiet = apply(params, x, LEVELS)
    np.testing.assert_array_equal(drop(KEY), drop(KEY))
    assert jnp.any(drop(KEY) != drop(jax.random.key(1)))
    assert jnp.any(drop(KEY) != quiet)


def test_a_module_of_nnx_trains_by_denoising(perceptron):
    _, apply, params = perceptron
    process = jd.Gaussian(jd.linear_beta())
    objective = jd.denoising(apply, process, jd.epsilon(), dropout=True)
    loss, slope = jax.value_and_grad(
        lambda p: objective(p, KEY, {"x": jnp.zeros((16, 2))})[0].mean()
    )(params)
    assert jnp.isfinite(loss)
    assert all(jnp.any(leaf != 0) for leaf in jax.tree.leaves(slope))
    denoise = jd.NetDenoiser(params, process, apply, jd.epsilon())
    assert denoise(vectors(), jnp.float32(0.5)).mean.shape == (BATCH, 2)
