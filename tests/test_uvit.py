"""The Transformer with long skips: against its equations written out, its sizes as published."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import multiplications
from test_networks import KEY, LEVELS, images, perturbed

from jaxdiff.networks import SmoothFeatures, UViT
from jaxdiff.networks.uvit import SIZES


def tiny(**options):
    return UViT(**{"patch": 2, "width": 16, "depth": 5, "heads": 2} | options)


def norm(h, p):
    """Over the features of a token."""
    mean = h.mean(-1, keepdims=True)
    return (h - mean) / np.sqrt(h.var(-1, keepdims=True) + 1e-5) * p["scale"] + p["bias"]


def dense(h, p):
    return h @ p["kernel"] + p.get("bias", 0.0)


def gelu(h):
    return h * (1 + np.vectorize(math.erf)(h / math.sqrt(2))) / 2


def attention(rows, p, heads=2):
    """One example's tokens [n, d], head by head."""
    d = rows.shape[1] // heads
    query, key, value = (dense(rows, p[name]) for name in ("query", "key", "value"))
    mixed = []
    for head in range(heads):
        part = np.s_[:, head * d : (head + 1) * d]
        weights = np.exp(query[part] @ key[part].T / math.sqrt(d))
        mixed.append(weights / weights.sum(1, keepdims=True) @ value[part])
    return dense(np.concatenate(mixed, axis=1), p["out"])


def block(h, p):
    h = h + attention(norm(h, p["norm_1"]), p)
    return h + dense(gelu(dense(norm(h, p["norm_2"]), p["mlp_in"])), p["mlp_out"])


def written_out(p, x, level, label):
    """The network of the paper on one 4 × 4 image of one channel, in float64."""
    patches = [x[i : i + 2, j : j + 2].ravel() for i in (0, 2) for j in (0, 2)]
    time = np.asarray(SmoothFeatures(16)(jnp.asarray([level])), np.float64)
    tokens = dense(np.stack(patches), p["patches"])
    h = np.concatenate([time, p["classes"]["embedding"][label : label + 1], tokens]) + p["places"]
    skips = []
    for i in range(2):
        h = block(h, jax.tree.map(lambda a, i=i: a[i], p["first_half"]))
        skips.append(h)
    h = block(h, p["middle"])
    for i in range(2):
        stage = jax.tree.map(lambda a, i=i: a[i], p["second_half"])
        h = block(dense(np.concatenate([h, skips.pop()], axis=1), stage["skip"]), stage)
    rows = dense(norm(h[2:], p["out_norm"]), p["out"]).reshape(2, 2, 2, 2)
    image = np.pad(rows.swapaxes(1, 2).reshape(4, 4), 1)
    kernel = p["out_conv"]["kernel"][:, :, 0, 0]
    windows = np.lib.stride_tricks.sliding_window_view(image, (3, 3))
    return np.einsum("ijkl,kl->ij", windows, kernel) + p["out_conv"]["bias"]


def test_it_is_the_paper_s_written_out():
    """Each token, skip and pixel in its place; the last skip is the first to come back."""
    net, x, label = tiny(num_classes=2), images(side=4), jnp.array([0, 1, 2])
    params = perturbed(net, x, LEVELS, label)
    wide = jax.tree.map(lambda a: np.asarray(a, np.float64), params["params"])
    found = jax.jit(net.apply)(params, x, LEVELS, label)
    for i in range(3):
        expected = written_out(wide, np.asarray(x[i, :, :, 0]), float(LEVELS[i]), int(label[i]))
        np.testing.assert_allclose(found[i, :, :, 0], expected, rtol=2e-4, atol=2e-4)


def test_a_new_network_returns_zero_and_no_label_is_the_null_label():
    net, x = tiny(num_classes=2), images()
    new = jax.jit(net.init)(KEY, x, LEVELS)
    assert not jnp.any(net.apply(new, x, LEVELS))
    params = perturbed(net, x, LEVELS)
    null = net.apply(params, x, LEVELS, jnp.full(len(x), 2))
    np.testing.assert_array_equal(net.apply(params, x, LEVELS), null)
    assert float(jnp.abs(net.apply(params, x, LEVELS, jnp.zeros(len(x), int)) - null).max()) > 1e-3


def test_every_parameter_is_wired():
    net, x, label = tiny(num_classes=2), images(), jnp.array([0, 1, 2])
    params = perturbed(net, x, LEVELS, label)
    loss = lambda p: jnp.sum(net.apply(p, x, LEVELS, label) ** 2)
    for path, leaf in jax.tree_util.tree_leaves_with_path(jax.jit(jax.grad(loss))(params)):
        assert jnp.all(jnp.isfinite(leaf)), path
        assert jnp.any(leaf != 0), path


def test_what_is_computed_again_is_the_same():
    x, found = images(), []
    params = perturbed(tiny(), x, LEVELS)
    for net in (tiny(), tiny(remat=True)):
        loss = lambda p, net=net: jnp.sum(net.apply(p, x, LEVELS) ** 2)
        found.append(jax.jit(jax.value_and_grad(loss))(params))
    (value, slope), (again, other) = found
    np.testing.assert_allclose(again, value, rtol=1e-6)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=2e-4, atol=1e-3), other, slope)


def test_dropout_acts_only_by_its_key():
    net, x = tiny(dropout=0.5), images()
    params = perturbed(net, x, LEVELS)
    drop = lambda key: net.apply(params, x, LEVELS, rngs={"dropout": key})
    quiet = net.apply(params, x, LEVELS)
    np.testing.assert_array_equal(quiet, tiny().apply(params, x, LEVELS))
    assert float(jnp.abs(drop(KEY) - quiet).max()) > 1e-2
    assert float(jnp.abs(drop(KEY) - drop(jax.random.key(1))).max()) > 1e-2


def test_bfloat16_computes_nearly_the_same_and_returns_float32():
    net, narrow, x = tiny(), tiny(dtype=jnp.bfloat16), images()
    params = jax.tree.map(lambda a: a / 3, perturbed(net, x, LEVELS))
    exact, rough = jax.jit(net.apply)(params, x, LEVELS), jax.jit(narrow.apply)(params, x, LEVELS)
    assert rough.dtype == jnp.float32
    assert 1e-5 < float(jnp.abs(rough - exact).max() / jnp.abs(exact).max()) < 0.05


@pytest.mark.parametrize(
    ("name", "millions"), [("S", 44), ("S deep", 58), ("M", 131), ("L", 287), ("H", 501)]
)
def test_published_parameter_counts_and_the_cost_by_hand(name, millions):
    """Table 1 of the paper: small ones for 32 × 32 × 3, the others for latents and 1000 classes."""
    small = name.startswith("S")
    net = UViT(patch=2, **SIZES[name], num_classes=None if small else 1000)
    channels = 3 if small else 4
    inputs = jnp.zeros((1, 32, 32, channels)), jnp.zeros(1)
    params = jax.eval_shape(net.init, KEY, *inputs)
    total = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    assert total / 1e6 == pytest.approx(millions, abs=0.6)
    d, depth, patches = net.width, net.depth, 16 * 16
    n = patches + (1 if small else 2)
    block = (4 + 8) * n * d**2 + 2 * n**2 * d  # four projections, two layers of 4 d, attention
    ends = 2 * patches * 4 * channels * d + 32**2 * 9 * channels**2
    expected = depth * block + depth // 2 * n * 2 * d * d + ends
    assert multiplications(net.apply, params, *inputs) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 4}, "depth must be odd and at least 3, got 4"),
        ({"heads": 3}, "heads must divide the width 16, got 3"),
        ({"patch": 3}, "sides that the patch 3 divides"),
        ({"embedding": SmoothFeatures(8)}, "embedding must have 16 features, the width, got 8"),
    ],
)
def test_mistakes_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        tiny(**options).init(KEY, images(), LEVELS)
    with pytest.raises(ValueError, match="label must be None"):
        tiny().init(KEY, images(), LEVELS, jnp.zeros(3, int))
