"""The diffusion Transformer: its parts by independent derivations, its sizes as published."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from oracles import multiplications
from test_networks import BATCH, KEY, LEVELS, images, perturbed

from jaxdiff.networks import DiT, Sinusoidal
from jaxdiff.networks.dit import SIZES, _modulated, positions


def tiny(**options):
    return DiT(**{"patch": 2, "width": 16, "depth": 2, "heads": 2} | options)


def test_places_are_told_apart_by_column_then_row():
    """cos of differences: the inner product of two places depends on their distance alone."""
    found = positions(3, 5, 32)
    assert found.shape == (15, 32)
    assert len(np.unique(np.asarray(found).round(4), axis=0)) == 15
    frequencies = 1e4 ** (-np.arange(8) / 8)
    column, row = found[:, :16], found[:, 16:]
    # Token 7 is in row 1, column 2.
    np.testing.assert_allclose(column[7, :8], np.sin(2 * frequencies), rtol=1e-5)
    np.testing.assert_allclose(column[7, 8:], np.cos(2 * frequencies), rtol=1e-5)
    np.testing.assert_allclose(row[7, :8], np.sin(frequencies), rtol=1e-5)
    np.testing.assert_allclose(row[7, 8:], np.cos(frequencies), rtol=1e-5)


def test_a_new_block_is_the_identity_and_the_output_zero():
    net, x = tiny(num_classes=3, registers=2), images()
    params = jax.jit(net.init)(KEY, x, LEVELS)
    assert not jnp.any(net.apply(params, x, LEVELS))
    # With the last layer set free, depth does not matter at the start.
    out = jax.random.normal(KEY, params["params"]["out"]["kernel"].shape)
    free = {"params": {**params["params"], "out": {"kernel": out, "bias": jnp.zeros(4)}}}
    shallow = jax.tree.map(lambda a: a, free)
    shallow["params"]["blocks"] = jax.tree.map(lambda a: a[:1], free["params"]["blocks"])
    deep = net.apply(free, x, LEVELS)
    assert jnp.any(deep)
    np.testing.assert_array_equal(net.clone(depth=1).apply(shallow, x, LEVELS), deep)


@pytest.mark.parametrize("epsilon", [1e-6, 1e-5])
def test_modulation_is_flaxs_norm_then_scale_and_shift(epsilon):
    """Of features so small that what is added to their variance is seen."""
    h, cotangent, scale, shift = (
        jax.random.normal(key, shape)
        for key, shape in zip(jax.random.split(KEY, 4), 2 * [(2, 5, 8)] + 2 * [(2, 8)], strict=True)
    )
    norm = nn.LayerNorm(epsilon=epsilon, use_bias=False, use_scale=False)

    def expected(h, scale, shift):
        return norm.apply({}, h) * (1 + scale[:, None, :]) + shift[:, None, :]

    ours = lambda *args: _modulated(*args, epsilon, jnp.float32)
    results = [jax.vjp(f, 1e-3 * h, scale, shift) for f in (ours, expected)]
    for found, wanted in zip(*((out, *pull(cotangent)) for out, pull in results), strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-5 * float(jnp.abs(wanted).max()))


def test_every_parameter_is_wired_and_finite():
    net, x, label = tiny(num_classes=2, registers=1), images(), jnp.array([0, 1, 2])
    context = jax.random.normal(KEY, (BATCH, 5, 7))
    params = perturbed(net, x, LEVELS, label, context)
    run = jax.jit(net.apply)
    gradient = jax.jit(jax.grad(lambda p: jnp.sum(net.apply(p, x, LEVELS, label, context) ** 2)))(
        params
    )
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        assert jnp.all(jnp.isfinite(leaf)), path
        # A shift of all keys moves no softmax.
        if "key" not in str(path) or "bias" not in str(path):
            assert jnp.any(leaf != 0), path
    # What a context says matters, its order does not; nor does one example see another's.
    out = run(params, x, LEVELS, label, context)
    np.testing.assert_allclose(run(params, x, LEVELS, label, context[:, ::-1]), out, atol=1e-4)
    other = run(params, x, LEVELS, label, context.at[0].add(1.0))
    assert float(jnp.abs(other[0] - out[0]).max()) > 1e-3
    np.testing.assert_allclose(other[1:], out[1:], atol=1e-5)


def test_patches_come_back_to_their_places():
    """A pixel's neighbourhood is its patch where nothing attends: no other output moves."""
    net, x = tiny(depth=1), images(side=8)
    params = perturbed(net, x, LEVELS)
    mute = jax.tree.map(jnp.zeros_like, params["params"]["blocks"])
    params["params"]["blocks"] = mute
    moved = net.apply(params, x.at[:, 3, 6].add(1.0), LEVELS) - net.apply(params, x, LEVELS)
    changed = np.asarray(jnp.abs(moved[0, :, :, 0]) > 1e-6)
    expected = np.zeros((8, 8), bool)
    expected[2:4, 6:8] = True
    np.testing.assert_array_equal(changed, expected)


@pytest.mark.parametrize("options", [{"remat": True}, {"unroll": 2}, {"unroll": 3}])
def test_what_is_computed_again_or_not_in_a_loop_is_the_same(options):
    x, found = images(side=16), []
    params = perturbed(tiny(depth=3), x, LEVELS)
    for net in (tiny(depth=3), tiny(depth=3, **options)):
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
    ("name", "millions", "giga"),
    [("S", 33, 6.06), ("B", 130, 23.01), ("L", 458, 80.71), ("XL", 675, 118.64)],
)
def test_published_parameter_counts_and_cost(name, millions, giga):
    """Tables 1 and 4 of the paper, patches of 2, 1000 classes, mean and variance of 32 × 32 × 4.

    Its Gflops are multiplications with their additions.
    """
    net = DiT(patch=2, **SIZES[name], embedding=Sinusoidal(256), num_classes=1000, out_channels=8)
    inputs = jnp.zeros((1, 32, 32, 4)), jnp.zeros(1)
    params = jax.eval_shape(net.init, KEY, *inputs)
    assert multiplications(net.apply, params, *inputs) / 1e9 == pytest.approx(giga, rel=0.01)
    total = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    assert round(total / 1e6) == pytest.approx(millions, abs=0.6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch": 3}, r"x must be images.*that the patch 3 divides.*\(3, 8, 8, 1\)"),
        ({"heads": 3}, "heads must divide the width 16, got 3"),
        ({"width": 6, "heads": 2}, "4 must divide the width 6"),
        ({"unroll": 3}, r"unroll must be in \[1, depth=2\], got 3"),
    ],
)
def test_sizes_that_do_not_divide_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        tiny(**options).init(KEY, images(), LEVELS)
