"""The U-Net's parts against independent derivations, and the papers' networks by their sizes."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.signal
from flax import linen as nn
from test_cpu import close
from test_networks import BATCH, KEY, LEVELS, count, images, perturbed, tiny

from jaxdiff.networks import GaussianFourier, Sinusoidal, UNet, cpu
from jaxdiff.networks.unet import (
    ADM,
    DDPM,
    DDPMPP,
    NCSNPP,
    VDM,
    Attention,
    Norm,
    ResBlock,
    Variant,
    _groups,
    doubled,
    halved,
)
from jaxdiff.parallel import data_mesh, replicate, shard_batch

VARIANTS = {
    "DDPM": DDPM,
    "DDPM++": DDPMPP,
    "NCSN++": NCSNPP,
    "ADM": ADM,
    "VDM": VDM,
    "celebahq": NCSNPP._replace(image_in="skip", image_out=True),
    "residual, unfiltered": DDPMPP._replace(image_in="residual"),
}
every_variant = pytest.mark.parametrize("name", VARIANTS)


# Parts


def test_images_of_two_users_are_computed_once(monkeypatch):
    """Those that a block or an attention adds to, on a CPU."""
    kept = []
    monkeypatch.setattr(cpu, "convolve", jax.lax.conv_general_dilated)  # It keeps its own.
    monkeypatch.setattr(cpu, "once", lambda x: kept.append(x.shape) or x)
    net = UNet(16, (1, 2), 1, attention=(4,))
    jax.eval_shape(net.init, KEY, images(), jnp.ones(BATCH))
    sides = [side for _, side, _, _ in kept]
    # Blocks: on the way down, halving, middle, doubling, on the way up; then attentions.
    assert (sides.count(8), sides.count(4)) == (1 + 1 + 0 + 0 + 2, 1 + 0 + 2 + 1 + 2 + 3)


@pytest.mark.parametrize("variant", [DDPMPP, ADM], ids=["DDPM++", "ADM"])
@pytest.mark.parametrize("scale_shift", [False, True])
def test_a_new_residual_block_is_its_skip(scale_shift, variant):
    x = images(channels=8)
    c = jax.random.normal(KEY, (BATCH, 5))
    expected = x / math.sqrt(2) if variant.rescale else x
    block = ResBlock(8, 0.0, scale_shift, variant, jnp.float32)
    out = block.apply(block.init(KEY, x, c), x, c)
    np.testing.assert_allclose(out, expected, rtol=1e-6)
    attention = Attention(4, variant, jnp.float32)
    out = attention.apply(attention.init(KEY, x), x)
    np.testing.assert_allclose(out, expected, rtol=1e-6)


def test_attention_against_a_loop_over_heads_and_pixels():
    b, side, channels, heads = 2, 4, 8, 2
    x = jax.random.normal(KEY, (b, side, side, channels))
    layer = Attention(channels // heads, DDPMPP, jnp.float32)
    params = perturbed(layer, x)
    got = layer.apply(params, x)

    p = jax.tree.map(np.asarray, params["params"])
    norm = nn.GroupNorm(_groups(channels), epsilon=1e-6)
    y = np.asarray(norm.apply({"params": p["norm"]}, x)).reshape(b, side * side, channels)
    q, k, v = (y @ p[n]["kernel"] + p[n]["bias"] for n in ("query", "key", "value"))
    mixed = np.zeros_like(q)
    d = channels // heads
    for i in range(b):
        for cut in (slice(h * d, (h + 1) * d) for h in range(heads)):
            for pixel in range(side * side):
                weight = np.exp(k[i, :, cut] @ q[i, pixel, cut] / math.sqrt(d))
                mixed[i, pixel, cut] = weight / weight.sum() @ v[i, :, cut]
    out = (mixed @ p["out"]["kernel"] + p["out"]["bias"]).reshape(x.shape)
    np.testing.assert_allclose(got, (x + out) / math.sqrt(2), atol=1e-5)


@pytest.mark.parametrize(
    ("channels", "groups", "epsilon"),
    [(4, None, 1e-6), (32, None, 1e-6), (144, None, 1e-5), (8, 4, 0.1)],
)
def test_norm_is_group_normalisation_then_scale_and_shift(channels, groups, epsilon):
    x = 1.0 + 3.0 * images(channels=channels)
    layer = Norm(Variant(groups=groups, epsilon=epsilon), jnp.float32)
    params = perturbed(layer, x)
    groups = groups or _groups(channels)
    reference = nn.GroupNorm(groups, epsilon=epsilon, use_fast_variance=False)
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
    np.testing.assert_allclose(halved(x)[0, :, :, 0], expected)
    up = doubled(halved(x), (3, 5))[0, :, :, 0]
    np.testing.assert_allclose(up[:2, :], [[3.0, 3.0, 5.0, 5.0, 6.5]] * 2)
    np.testing.assert_allclose(up[2, :], [10.5, 10.5, 12.5, 12.5, 14.0])


def test_smooth_filter_is_the_textbooks():
    """[1, 3, 3, 1] along each axis: after zeros were put between the pixels, before every other."""
    x = jax.random.normal(KEY, (2, 6, 8, 3))
    taps = np.array([1.0, 3.0, 3.0, 1.0]) / 8

    def along(x, axis, up, down):
        # Of the whole convolution, the part where the filter's middle lies on the image.
        size = x.shape[axis] * up // down
        whole = scipy.signal.upfirdn(up * taps, np.asarray(x, float), up, 1, axis=axis)
        return whole.take(range(3 - up, 3 - up + size * down, down), axis=axis)

    shrunk = along(along(x, 1, 1, 2), 2, 1, 2)
    np.testing.assert_allclose(halved(x, smooth=True), shrunk, atol=1e-6)
    grown = along(along(x, 1, 2, 1), 2, 2, 1)
    np.testing.assert_allclose(doubled(x, (12, 16), smooth=True), grown, atol=1e-6)
    # Inside the image, what is constant stays so.
    ones = doubled(halved(jnp.ones((1, 8, 8, 1)), smooth=True), (8, 8), smooth=True)
    np.testing.assert_allclose(ones[0, 3:5, 3:5], 1.0, rtol=1e-6)


# The whole U-Net


@every_variant
@pytest.mark.parametrize("shape", [(8, 8), (10, 10), (18, 18), (28, 28), (8, 14)])
def test_any_even_side_comes_back(shape, name):
    net = tiny(width=4, multipliers=(1, 1, 2), variant=VARIANTS[name])
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


@pytest.mark.parametrize(
    ("options", "name"),
    [({"head_width": 3}, "head_width"), ({"variant": Variant(groups=3)}, "groups")],
)
def test_channels_that_do_not_divide_are_refused(options, name):
    with pytest.raises(ValueError, match=rf"{name} must divide the channels.*got 3"):
        tiny(**options).init(KEY, images(), LEVELS)


@every_variant
def test_every_parameter_of_a_variant_is_wired(name):
    net, x = tiny(variant=VARIANTS[name], multipliers=(1, 1)), images()
    params = perturbed(net, x, LEVELS)
    start = jax.jit(net.init)(KEY, x, LEVELS)
    assert not jnp.any(net.apply(start, x, LEVELS))
    gradient = jax.jit(jax.grad(lambda p: jnp.sum(net.apply(p, x, LEVELS) ** 2)))(params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        assert jnp.all(jnp.isfinite(leaf)), path
        assert jnp.any(leaf != 0), path


def test_sums_of_gradients_are_computed_once(monkeypatch):
    net, inputs = UNet(8, (1,), 2, attention=(), variant=DDPM), (images(), jnp.ones(BATCH))
    params = net.init(KEY, *inputs)

    def products():
        grads = jax.grad(lambda params: jnp.sum(net.apply(params, *inputs) ** 2))
        return jax.jit(grads).lower(params).compile().as_text().count(" multiply(")

    ours = products()
    monkeypatch.setattr(cpu, "once", lambda x: x)
    assert ours < 0.9 * products()


def energy(net, x, levels):
    """The sum of squared outputs as a function of the parameters, and the outputs."""

    def of(params):
        out = net.apply(params, x, levels)
        return jnp.sum(out**2), out

    return of


def equal_gradients(ours, theirs):
    """Each leaf by its own largest entry, if that is not rounding beside the largest of all."""
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(theirs))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        scale = max(float(jnp.abs(b).max()), 1e-3 * largest)
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * scale)


def test_what_is_computed_again_is_the_same():
    """`remat` has the same parameters, values and gradients, and keeps less for the gradient."""
    x = jnp.tile(images(side=16), (4, 1, 1, 1))
    levels = jnp.tile(LEVELS, 4)
    params = perturbed(tiny(), x, levels)
    found, kept = [], []
    for net in (tiny(), tiny(remat=True)):
        loss = lambda p, net=net: jnp.sum(net.apply(p, x, levels) ** 2)
        found.append(jax.jit(jax.value_and_grad(loss))(params))
        # What the forward pass leaves for the backward one, parameters aside.
        _, backward = jax.eval_shape(partial(jax.vjp, loss), params)
        sizes = [math.prod(leaf.shape) for leaf in jax.tree.leaves(backward)]
        kept.append(sum(sizes) - sum(leaf.size for leaf in jax.tree.leaves(params)))
    (value, slope), (again, other) = found
    np.testing.assert_allclose(again, value, rtol=1e-6)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=2e-4, atol=1e-3), other, slope)
    assert kept[1] < 0.3 * kept[0], kept


@pytest.mark.parametrize(
    ("name", "remat"), [("DDPM", False), ("DDPM++", True), ("NCSN++", False), ("ADM", True)]
)
def test_blocks_in_a_loop_are_the_same(name, remat):
    """`scan` has the same parameters, outputs and gradients, of fewer convolutions."""
    net, x = tiny(variant=VARIANTS[name], blocks=3), images()
    scan = net.clone(scan=True, remat=remat)
    params = perturbed(net, x, LEVELS)

    def program(run, first):
        return jax.jit(run).lower(first, x, LEVELS).as_text()

    assert program(scan.init, KEY) == program(net.init, KEY)
    # Eleven of the levels' fourteen blocks are in four loops; each has two convolutions.
    more, fewer = (
        program(run, params).count("stablehlo.convolution") for run in (net.apply, scan.apply)
    )
    assert more - fewer == 2 * (11 - 4)
    (loss, slope), (again, other) = (
        jax.jit(jax.value_and_grad(energy(n, x, LEVELS), has_aux=True))(params) for n in (net, scan)
    )
    close(again, loss)
    equal_gradients(other, slope)
    narrow = jax.eval_shape(scan.clone(dtype=jnp.bfloat16).apply, params, x, LEVELS)
    assert narrow.dtype == jnp.float32


def test_every_block_of_a_loop_has_its_own_dropout():
    """Three blocks in a loop that only add their masks, and a network that shows the sum."""
    net = tiny(multipliers=(1,), attention=(), blocks=3, variant=ADM, dropout=0.5, scan=True)
    x = jnp.zeros((BATCH, 8, 8, 1))
    own = jax.tree.map(jnp.zeros_like, perturbed(net, x, LEVELS))["params"]
    same = jnp.zeros((3, 3, 8, 8)).at[1, 1].set(jnp.eye(8))
    for i in range(3):
        own[f"down_0_block_{i}"]["norm_1"]["bias"] = jnp.ones(8)
        own[f"down_0_block_{i}"]["conv_1"]["kernel"] = same
    for i in range(4):
        own[f"up_0_block_{i}"]["skip"]["kernel"] = jnp.eye(16, 8)[None, None]
    own["out_0_norm"]["scale"] = jnp.ones(8)
    own["out_0_conv"]["kernel"] = same[..., :1]
    out = net.apply({"params": own}, x, LEVELS, rngs={"dropout": KEY})
    for image in np.round(out, 3):
        assert len(np.unique(image)) == 4  # a pixel was kept by 0, 1, 2 or all 3


@pytest.mark.devices(2)
def test_a_loop_over_a_mesh():
    net, x, levels = tiny(multipliers=(1,), blocks=2, scan=True), images()[:2], LEVELS[:2]
    params = perturbed(net, x, levels)
    run = jax.jit(lambda p, x, levels: jax.value_and_grad(energy(net, x, levels), has_aux=True)(p))
    mesh = data_mesh()
    data = shard_batch({"x": x, "levels": levels}, mesh)
    shared, slope = run(replicate(params, mesh), **data)
    alone, expected = run(params, x, levels)
    close(shared, alone)
    equal_gradients(slope, expected)


CIFAR = {"width": 128, "multipliers": (1, 2, 2, 2), "attention": (16,)}
WAVES = {"embedding": Sinusoidal(128)}
# Parameters and GFLOP of one image from the official code, 2 FLOP a multiply-add, as XLA counts.
PUBLISHED = {
    "DDPM": (
        UNet(**CIFAR, **WAVES, blocks=2, variant=DDPM._replace(attend_each=False)),
        35_218_947,
        11.26,
    ),
    "DDPM++": (UNet(**CIFAR, **WAVES, blocks=4), 61_804_419, 20.28),
    "DDPM++ deep": (UNet(**CIFAR, **WAVES, blocks=8), 106_632_579, 34.64),
    "NCSN++": (UNet(**CIFAR, **WAVES, blocks=4, variant=NCSNPP), 62_693_251, 20.37),
    "NCSN++ continuous": (
        UNet(**CIFAR, embedding=GaussianFourier(256), blocks=4, variant=NCSNPP),
        62_758_915,
        20.37,
    ),
    "NCSN++ deep continuous": (
        UNet(**CIFAR, embedding=GaussianFourier(256), blocks=8, variant=NCSNPP),
        107_587_075,
        34.73,
    ),
    # Beside its noise level it takes a number that is always zero.
    "VDM": (
        UNet(
            **{**CIFAR, "multipliers": (1,), "attention": ()},
            embedding=lambda u: jnp.pad(Sinusoidal(128)(u), ((0, 0), (0, 1))),
            blocks=32,
            fourier=(7, 8),
            variant=VDM,
        ),
        30_578_179,
        51.55,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_parameter_counts_and_cost(name, monkeypatch):
    """Ho et al. 2020, Song et al. 2021 and Kingma et al. 2021 for CIFAR-10."""
    net, parameters, gflop = PUBLISHED[name]
    inputs = jnp.zeros((1, 32, 32, 3)), jnp.zeros(1)
    params = jax.eval_shape(net.init, KEY, *inputs)
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)) == parameters
    monkeypatch.setattr(cpu, "WORK", math.inf)  # A CPU does with fewer.
    cost = jax.jit(net.apply).lower(params, *inputs).cost_analysis()
    assert cost["flops"] / 1e9 == pytest.approx(gflop, rel=0.01)


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
