"""The Transformer against an independent derivation, and what every network promises."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdiff.networks.transformer import Transformer

KEY = jax.random.key(0)
TOKENS = jnp.array([[0, 3, 1, 2, 2], [4, 4, 0, 1, 3], [2, 0, 0, 3, 1]])
LEVELS = jnp.array([-2.0, 0.1, 3.0])


def tiny(**options):
    return Transformer(**{"classes": 5, "width": 8, "depth": 2, "heads": 2} | options)


def run(net, *inputs, **options):
    return jax.jit(net.apply)(*inputs, **options)


def perturbed(net, *inputs):
    """Random parameters with nothing at zero, as after some training."""
    leaves, tree = jax.tree.flatten(jax.eval_shape(net.init, KEY, *inputs))
    random = np.random.default_rng(0)
    noisy = [jnp.asarray(0.3 * random.standard_normal(a.shape), jnp.float32) for a in leaves]
    return jax.tree.unflatten(tree, noisy)


def test_starts_with_equal_classes():
    net = tiny()
    params = jax.jit(net.init)(KEY, TOKENS, LEVELS)
    logits = run(net, params, TOKENS, LEVELS)
    assert logits.shape == (3, 5, 5)
    assert logits.dtype == jnp.float32
    assert not jnp.any(logits)


def test_every_parameter_is_wired_and_finite():
    net, label = tiny(num_classes=2), jnp.array([0, 1, 2])
    params = perturbed(net, TOKENS, LEVELS, label)
    loss = lambda p: jnp.sum(net.apply(p, TOKENS, LEVELS, label) ** 3)
    for path, leaf in jax.tree_util.tree_leaves_with_path(jax.jit(jax.grad(loss))(params)):
        name = jax.tree_util.keystr(path)
        assert jnp.all(jnp.isfinite(leaf)), name
        # A bias of the keys moves all scores of a query alike.
        assert jnp.any(jnp.abs(leaf) > 1e-6) or name.endswith("['Dense_1']['bias']"), name


def test_it_is_the_published_block():
    """One block by hand, in numpy: float64, one head at a time."""
    net = tiny(depth=1)
    params = perturbed(net, TOKENS, LEVELS)
    tree = jax.tree.map(lambda a: np.asarray(a, np.float64), params["params"])
    silu = lambda a: a / (1 + np.exp(-a))
    dense = lambda p, a: a @ p["kernel"] + p["bias"]

    frequencies = np.geomspace(0.25, 4.0, 32)
    angle = np.asarray(LEVELS, np.float64)[:, None] * frequencies
    c = tree["Conditioning_0"]
    c = silu(
        dense(
            c["Dense_1"],
            silu(dense(c["Dense_0"], np.concatenate([np.sin(angle), np.cos(angle)], 1))),
        )
    )

    def norm(p, h):
        scale, shift = np.split(dense(p["Dense_0"], c)[:, None], 2, axis=-1)
        h = (h - h.mean(-1, keepdims=True)) / np.sqrt(h.var(-1, keepdims=True) + 1e-6)
        h = h * p["LayerNorm_0"]["scale"] + p["LayerNorm_0"]["bias"]
        return h * (1 + scale) + shift

    h = tree["tokens"][np.asarray(TOKENS)] + tree["places"]
    block = tree["_Block_0"]
    n = norm(block["_Norm_0"], h)
    q, k, v = (dense(block[f"Dense_{i}"], n) for i in range(3))
    mixed = []
    for head in (slice(0, 4), slice(4, 8)):
        score = np.exp(q[..., head] @ k[..., head].swapaxes(1, 2) / 2.0)
        mixed.append(score / score.sum(-1, keepdims=True) @ v[..., head])
    h = h + dense(block["Dense_3"], np.concatenate(mixed, -1))
    hidden = dense(block["Dense_4"], norm(block["_Norm_1"], h))
    gelu = 0.5 * hidden * (1 + np.tanh(np.sqrt(2 / np.pi) * (hidden + 0.044715 * hidden**3)))
    h = h + dense(block["Dense_5"], gelu)
    expected = dense(tree["Dense_0"], norm(tree["_Norm_0"], h))
    np.testing.assert_allclose(run(net, params, TOKENS, LEVELS), expected, rtol=2e-4, atol=2e-4)


def test_one_hot_tokens_are_tokens():
    net = tiny()
    params = perturbed(net, TOKENS, LEVELS)
    one_hot = run(net, params, jax.nn.one_hot(TOKENS, 5), LEVELS)
    np.testing.assert_allclose(one_hot, run(net, params, TOKENS, LEVELS), rtol=1e-5, atol=1e-5)


def test_every_place_sees_every_other():
    """No causal mask, and without the places' embedding no place of its own."""
    net = tiny()
    params = perturbed(net, TOKENS, LEVELS)
    weights = jax.nn.one_hot(TOKENS[:1], 5)
    summed = lambda x: net.apply(params, x, LEVELS[:1])[0].sum(-1)
    jacobian = jax.jit(jax.jacobian(summed))(weights)[:, 0]
    assert jnp.all(jnp.abs(jacobian).sum(-1) > 1e-6)
    placeless = {"params": params["params"] | {"places": jnp.zeros((5, 8))}}
    order = jnp.array([3, 0, 4, 1, 2])
    straight, permuted = (run(net, placeless, x, LEVELS) for x in (TOKENS, TOKENS[:, order]))
    np.testing.assert_allclose(permuted, straight[:, order], rtol=1e-4, atol=1e-4)
    straight, moved = (run(net, params, x, LEVELS) for x in (TOKENS, TOKENS[:, order]))
    assert jnp.abs(moved - straight[:, order]).max() > 1e-2


def test_null_label_is_no_label_and_labels_differ():
    net = tiny(num_classes=2)
    params = perturbed(net, TOKENS, LEVELS, jnp.zeros(3, int))
    null = run(net, params, TOKENS, LEVELS, jnp.full(3, 2))
    np.testing.assert_array_equal(run(net, params, TOKENS, LEVELS), null)
    assert jnp.abs(run(net, params, TOKENS, LEVELS, jnp.zeros(3, int)) - null).max() > 1e-3


def test_dropout_acts_if_and_only_if_it_has_a_key():
    net = tiny(dropout=0.5)
    params = perturbed(net, TOKENS, LEVELS)
    draw = lambda key: run(net, params, TOKENS, LEVELS, rngs={"dropout": key})
    np.testing.assert_array_equal(draw(KEY), draw(KEY))
    assert jnp.abs(draw(KEY) - draw(jax.random.key(1))).max() > 1e-3
    plain = run(net, params, TOKENS, LEVELS)
    np.testing.assert_array_equal(plain, run(tiny(), params, TOKENS, LEVELS))


def test_narrow_computation_gives_wide_logits():
    net, narrow = tiny(), tiny(dtype=jnp.bfloat16)
    params = perturbed(net, TOKENS, LEVELS)
    wide, low = (run(n, params, TOKENS, LEVELS) for n in (net, narrow))
    assert low.dtype == jnp.float32
    assert float(jnp.abs(low - wide).max()) < 0.05 * float(jnp.abs(wide).max())


def test_learns_a_copy_that_needs_time_and_neighbours():
    """Give back the token to the left at low levels, and to the right at high ones."""
    net = tiny(width=32, heads=4)
    random = np.random.default_rng(0)
    tokens = jnp.asarray(random.integers(0, 5, (256, 5)))
    levels = jnp.asarray(random.choice([-3.0, 3.0], 256), jnp.float32)
    target = jnp.where(
        levels[:, None] < 0, jnp.roll(tokens, 1, axis=1), jnp.roll(tokens, -1, axis=1)
    )
    params = jax.jit(net.init)(KEY, tokens, levels)
    optimizer = optax.adam(5e-3)

    def loss(params):
        logits = net.apply(params, tokens, levels)
        return optax.softmax_cross_entropy_with_integer_labels(logits, target).mean()

    @jax.jit
    def step(params, state):
        value, gradient = jax.value_and_grad(loss)(params)
        update, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, update), state, value

    state = jax.jit(optimizer.init)(params)
    for _ in range(150):
        params, state, value = step(params, state)
    assert value < 0.1  # log 5 at the start; a place alone cannot know its neighbours


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="heads must divide the width 8, got 3"):
        tiny(heads=3).init(KEY, TOKENS, LEVELS)
    params = perturbed(tiny(), TOKENS, LEVELS)
    with pytest.raises(ValueError, match="label must be None"):
        run(tiny(), params, TOKENS, LEVELS, jnp.zeros(3, int))
