"""Embeddings, the MLP and the U-Net against closed forms and independent derivations."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from jaxdiff.networks import MLP, GaussianFourier, Sinusoidal, SmoothFeatures, UNet
from jaxdiff.networks.unet import _Attention, _downsample, _groups, _Norm, _ResBlock, _upsample

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


# The U-Net's parts


@pytest.mark.parametrize("scale_shift", [False, True])
def test_a_new_residual_block_is_its_skip(scale_shift):
    x = images(channels=8)
    c = jax.random.normal(KEY, (BATCH, 5))
    block = _ResBlock(8, 0.0, scale_shift, jnp.float32)
    out = block.apply(block.init(KEY, x, c), x, c)
    np.testing.assert_allclose(out, x / math.sqrt(2), rtol=1e-6)
    attention = _Attention(2, jnp.float32)
    out = attention.apply(attention.init(KEY, x), x)
    np.testing.assert_allclose(out, x / math.sqrt(2), rtol=1e-6)


def test_attention_against_a_loop_over_heads_and_pixels():
    b, side, channels, heads = 2, 4, 8, 2
    x = jax.random.normal(KEY, (b, side, side, channels))
    layer = _Attention(heads, jnp.float32)
    params = perturbed(layer, x)
    got = layer.apply(params, x)

    p = jax.tree.map(np.asarray, params["params"])
    norm = nn.GroupNorm(_groups(channels), epsilon=1e-6)
    y = np.asarray(norm.apply({"params": p["_Norm_0"]}, x)).reshape(b, side * side, channels)
    q, k, v = (y @ p[f"Dense_{i}"]["kernel"] + p[f"Dense_{i}"]["bias"] for i in range(3))
    mixed = np.zeros_like(q)
    d = channels // heads
    for i in range(b):
        for cut in (slice(h * d, (h + 1) * d) for h in range(heads)):
            for pixel in range(side * side):
                weight = np.exp(k[i, :, cut] @ q[i, pixel, cut] / math.sqrt(d))
                mixed[i, pixel, cut] = weight / weight.sum() @ v[i, :, cut]
    out = (mixed @ p["Dense_3"]["kernel"] + p["Dense_3"]["bias"]).reshape(x.shape)
    np.testing.assert_allclose(got, (x + out) / math.sqrt(2), atol=1e-5)


@pytest.mark.parametrize("channels", [4, 32, 144])
def test_norm_is_group_normalisation_then_scale_and_shift(channels):
    x = 1.0 + 3.0 * images(channels=channels)
    layer = _Norm(jnp.float32)
    params = perturbed(layer, x)
    reference = nn.GroupNorm(_groups(channels), epsilon=1e-6, use_fast_variance=False)
    expected = reference.apply(params, x)
    np.testing.assert_allclose(layer.apply(params, x), expected, atol=1e-4)
    scale, shift = jax.random.normal(KEY, (2, BATCH, channels))
    adapted = expected * (1 + scale[:, None, None, :]) + shift[:, None, None, :]
    np.testing.assert_allclose(layer.apply(params, x, scale, shift), adapted, atol=1e-4)


def test_groups_divide_the_channels():
    # DDPM's min(32, c / 4) wherever it divides, and the next smaller divisor where not.
    assert [_groups(c) for c in (1, 4, 8, 32, 48, 128, 144, 256)] == [1, 1, 2, 8, 12, 32, 24, 32]


def test_halving_averages_and_doubling_repeats():
    x = jnp.arange(15.0).reshape(1, 3, 5, 1)
    expected = [[3.0, 5.0, 6.5], [10.5, 12.5, 14.0]]
    np.testing.assert_allclose(_downsample(x)[0, :, :, 0], expected)
    up = _upsample(_downsample(x), (3, 5))[0, :, :, 0]
    np.testing.assert_allclose(up[:2, :], [[3.0, 3.0, 5.0, 5.0, 6.5]] * 2)
    np.testing.assert_allclose(up[2, :], [10.5, 10.5, 12.5, 12.5, 14.0])


# The whole U-Net


@pytest.mark.parametrize(
    "shape", [(8, 8), (10, 10), (16, 16), (18, 18), (28, 28), (32, 32), (8, 14)]
)
def test_any_even_side_comes_back(shape):
    net = tiny(width=4, multipliers=(1, 1, 2))
    x = jnp.zeros((2, *shape, 3))
    params = jax.eval_shape(net.init, KEY, x, jnp.zeros(2))
    out = jax.eval_shape(net.apply, params, x, jnp.zeros(2))
    assert out.shape == x.shape


def test_odd_levels_reach_the_last_corner():
    # 10 -> 5 -> 3 -> 5 -> 10: what is padded and cropped on the way is not the image.
    net = tiny(width=4, multipliers=(1, 1, 1), attention=())
    x = jax.random.normal(KEY, (2, 10, 10, 1))
    x = x.at[1].set(x[0]).at[1, -1, -1].add(1.0)
    out = jax.jit(net.apply)(perturbed(net, x, LEVELS[:2]), x, jnp.zeros(2))
    assert jnp.all(jnp.isfinite(out))
    assert float(jnp.abs(out[0, -1, -1] - out[1, -1, -1]).max()) > 1e-3


@pytest.mark.parametrize("shape", [(7, 8), (8, 9), (6, 6), (28, 27)])
def test_odd_or_small_images_are_refused(shape):
    with pytest.raises(ValueError, match=r"x must be images.*even.*at least 8"):
        tiny().init(KEY, jnp.zeros((1, *shape, 1)), jnp.zeros(1))


def test_heads_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match=r"heads must divide the channels.*got 3"):
        tiny(heads=3).init(KEY, images(), LEVELS)


def test_attention_acts_at_the_sides_asked_for():
    def attentions(net, side):
        x = jnp.zeros((1, side, side, 1))
        params = jax.eval_shape(net.init, KEY, x, jnp.zeros(1))["params"]
        return sum("Attention" in name for name in params)

    # The middle always; at side 4 once per block down and once up; at 8 the same.
    assert attentions(tiny(attention=()), 8) == 1
    assert attentions(tiny(attention=(4,), blocks=2), 8) == 1 + 2 + 1
    assert attentions(tiny(attention=(4, 8), blocks=1), 8) == 1 + 2 * 2
    assert attentions(tiny(attention=(4,)), 16) == 1


def test_published_parameter_counts():
    # Song et al. 2021, DDPM++ and DDPM++ deep for CIFAR-10, from the official code.
    def published(blocks):
        return UNet(128, (1, 2, 2, 2), blocks, attention=(16,), embedding=Sinusoidal(128))

    assert count(published(4), (1, 32, 32, 3)) == 61_804_419
    assert count(published(8), (1, 32, 32, 3)) == 106_632_579


def test_parameter_count_by_hand():
    w, dim = 8, 64
    c = 4 * w

    def conv(n, m, side=3):
        return side * side * n * m + m

    def block(n, m, skip):
        norms = 2 * n + 2 * m
        return norms + conv(n, m) + (c + 1) * m + conv(m, m) + (conv(n, m, 1) if skip else 0)

    total = (dim + 1) * c + (c + 1) * c  # conditioning
    total += conv(1, w) + block(w, w, False)  # down, side 8
    total += 2 * block(w, w, False)  # middle
    total += 2 * w + 4 * conv(w, w, 1)  # its attention
    total += 2 * block(2 * w, w, True)  # up, side 8: a block for each of two skips
    total += 2 * w + conv(w, 1)
    assert count(tiny(multipliers=(1,), attention=()), (1, 8, 8, 1)) == total
