"""The CPU's own convolutions and attention against JAX's, whose formulas they are."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import PartitionSpec as P

from jaxdiff.networks import cpu
from jaxdiff.parallel import data_mesh

KEY = jax.random.key(0)
SHAPES = pytest.mark.parametrize(
    "shape", [(8, 6, 10, 3, 5, 3), (3, 5, 7, 4, 2, 5), (1, 8, 8, 6, 6, 1)], ids=str
)


def close(ours, theirs, rtol=1e-5):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * float(jnp.abs(b).max()))


def both(size=3, features=5, **options):
    """Our convolution and Flax's, as functions of image and kernel."""
    layers = (
        layer(features, (size, size), use_bias=False, **options) for layer in (cpu.Conv, nn.Conv)
    )
    return [
        lambda x, kernel, layer=layer: layer.apply({"params": {"kernel": kernel}}, x)
        for layer in layers
    ]


def arrays(shape):
    b, height, width, channels, features, size = shape
    keys = jax.random.split(KEY, 2)
    x = jax.random.normal(keys[0], (b, height, width, channels))
    return x, jax.random.normal(keys[1], (size, size, channels, features))


def energy(f):
    return lambda x, kernel: jnp.sum(jnp.sin(f(x, kernel)))


@SHAPES
def test_convolution_and_all_its_derivatives_are_jaxs(shape):
    ours, plain = both(shape[-1], shape[-2])
    x, kernel = arrays(shape)
    dx, dk = jnp.cos(3 * x), jnp.sin(5 * kernel)

    def derivatives(f):
        grads = jax.grad(energy(f), (0, 1))
        return [
            f(x, kernel),
            grads(x, kernel),
            jax.jvp(f, (x, kernel), (dx, dk)),
            jax.jvp(grads, (x, kernel), (dx, dk)),
            jax.grad(lambda x, k: sum(jnp.sum(g**2) for g in grads(x, k)), (0, 1))(x, kernel),
        ]

    close(jax.jit(lambda: derivatives(ours))(), jax.jit(lambda: derivatives(plain))())


@pytest.mark.parametrize("axes", [(0, None), (None, 0), (0, 0), (3, 1)], ids=str)
def test_batched_convolution_is_jaxs(axes):
    x, kernel = arrays((8, 6, 10, 3, 5, 3))
    many = [
        a if axis is None else jnp.stack([a, 2 * a, a**2], axis)
        for a, axis in zip((x, kernel), axes, strict=True)
    ]
    close(*(jax.vmap(jax.grad(energy(f), (0, 1)), axes)(*many) for f in both()))


@pytest.mark.parametrize(
    "options",
    [
        {"strides": 2},
        {"strides": 2, "padding": ((0, 1), (0, 1))},
        {"padding": "VALID"},
        {"padding": "CIRCULAR"},
        {"padding": ((2, 0), (1, 1))},
        {"kernel_dilation": 2},
        {"input_dilation": 2, "padding": ((1, 1), (1, 1))},
        {"feature_group_count": 2},
    ],
    ids=str,
)
def test_other_convolutions_are_jaxs(options):
    x, kernel = arrays((4, 8, 8, 4, 6, 3))
    kernel = kernel[:, :, : 4 // options.get("feature_group_count", 1)]
    close(*(jax.value_and_grad(energy(f), (0, 1))(x, kernel) for f in both(features=6, **options)))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_convolution_is_jaxs(dtype):
    x, kernel = (a.astype(dtype) for a in arrays((8, 6, 10, 3, 5, 3)))
    ours, plain = (jax.grad(energy(f), (0, 1))(x, kernel) for f in both(dtype=dtype))
    assert [a.dtype for a in ours] == [dtype, dtype]
    close([a.astype(float) for a in ours], [a.astype(float) for a in plain], rtol=0.02)


def test_a_wider_result_is_given_where_it_is_asked_for():
    x, kernel = (a.astype(jnp.bfloat16) for a in arrays((8, 6, 10, 3, 5, 3)))
    assert cpu.convolve(x, kernel, preferred_element_type=jnp.float32).dtype == jnp.float32


def test_precision_of_a_context_is_jaxs():
    """Of the context in which a function is traced; it is lowered after that."""
    x, kernel = arrays((8, 6, 10, 3, 5, 3))

    def precisions(f):
        def precise(x, kernel):
            with jax.default_matmul_precision("highest"):
                return f(x, kernel)

        program = jax.jit(jax.grad(energy(precise), (0, 1))).trace(x, kernel)
        text = program.lower(lowering_platforms=("tpu",)).as_text()
        return re.findall(r"precision (\w+)", text)

    ours, plain = map(precisions, both())
    assert ours == plain == ["HIGHEST"] * 6  # Of both operands of a convolution and its gradients.


@pytest.mark.devices(4)
@pytest.mark.parametrize("shared", [(True, False), (False, True), (True, True)], ids=str)
def test_convolution_in_a_shard_map(shared):
    """With the sum over devices where JAX has it: in the gradient of what all devices share."""
    x, kernel = arrays((8, 6, 10, 3, 5, 3))
    x = x.reshape(4, 2, *x.shape[1:])
    kernel = jnp.stack([kernel, 2 * kernel, kernel**2, kernel**3])
    specs = tuple(P("data") if share else P() for share in shared)

    def gradients(f):
        def share(x, kernel):
            loss = lambda x, kernel: jax.lax.psum(energy(f)(x[0], kernel[0]), "data")
            return jax.grad(loss, (0, 1))(x, kernel)

        mapped = jax.shard_map(share, mesh=data_mesh(), in_specs=specs, out_specs=specs)
        return jax.jit(mapped)(x, kernel)

    close(*(gradients(f) for f in both()))


def test_convolutions_of_a_loop_have_the_form_that_is_fast():
    """XLA's CPU compiler runs only this form by its fast kernels inside of a loop."""
    x, kernel = arrays((8, 6, 10, 3, 5, 3))

    def form(f):
        def body(x, _):
            dx, dk = jax.grad(energy(f), (0, 1))(x, kernel)
            return x + dx, dk

        text = jax.jit(lambda x: jax.lax.scan(body, x, None, 2)).lower(x).compile().as_text()
        lines = [line for line in text.splitlines() if " convolution(" in line]
        slow = [
            line
            for line in lines
            if "dim_labels=b01f_01io->b01f" not in line or "rhs_reversal" in line
        ]
        return len(lines), len(slow)

    ours, plain = both()
    assert form(ours) == (3, 0)
    assert form(plain)[1] > 0  # Else our own form is no longer needed.


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_elsewhere_the_programs_are_jaxs(platform):
    x, kernel = arrays((8, 6, 10, 3, 5, 3))

    def convolutions(f):
        program = jax.jit(jax.grad(energy(f), (0, 1))).trace(x, kernel)
        text = program.lower(lowering_platforms=(platform,)).as_text()
        return sorted(re.findall(r"stablehlo.convolution.*(dim_numbers = .*)", text))

    ours, plain = (convolutions(f) for f in both())
    assert ours == plain
    assert len(plain) == 3

    barrier = jax.jit(jax.grad(lambda x: jnp.sin(cpu.barrier(x)).sum())).trace(x)
    assert "barrier" not in barrier.lower(lowering_platforms=(platform,)).as_text()
    assert "barrier" in barrier.lower(lowering_platforms=("cpu",)).as_text()

    q = jax.random.normal(KEY, (64, 128, 2, 4))
    program = jax.jit(jax.grad(lambda q: cpu.attention(q, q, q).sum())).trace(q)
    assert "stablehlo.while" not in program.lower(lowering_platforms=(platform,)).as_text()
    assert "stablehlo.while" in program.lower(lowering_platforms=("cpu",)).as_text()


ATTENTION = pytest.mark.parametrize(
    "shape", [(3, 5, 7, 2, 4), (64, 128, 96, 2, 4), (24, 160, 160, 1, 8)], ids=str
)


@ATTENTION
def test_attention_and_all_its_derivatives_are_jaxs(shape):
    b, n, m, heads, d = shape
    keys = jax.random.split(KEY, 4)
    q, k, v = (
        2 * jax.random.normal(key, (b, size, heads, d))
        for key, size in zip(keys, (n, m, m), strict=False)
    )
    dy = jax.random.normal(keys[3], q.shape)

    def derivatives(f):
        loss = lambda q, k, v: jnp.sum(dy * f(q, k, v))
        grads = jax.grad(loss, (0, 1, 2))
        tangents = (jnp.cos(q), jnp.sin(k), jnp.cos(v))
        return [
            f(q, k, v),
            grads(q, k, v),
            jax.jvp(f, (q, k, v), tangents),
            jax.jvp(grads, (q, k, v), tangents),
        ]

    ours, plain = (
        jax.jit(lambda f=f: derivatives(f))() for f in (cpu.attention, jax.nn.dot_product_attention)
    )
    close(ours, plain)


def test_batched_attention_is_jaxs():
    q = jax.random.normal(KEY, (3, 16, 128, 1, 8))
    functions = (cpu.attention, jax.nn.dot_product_attention)
    close(*(jax.vmap(f, (0, None, 0))(q, q[0], 2 * q) for f in functions))


def test_narrow_attention_has_a_wide_softmax():
    """Of equal logits over many tokens, the weights' sum is 1 only if it is not summed narrowly."""
    q, v = jnp.zeros((1, 1, 1, 8), jnp.bfloat16), jnp.ones((1, 4096, 1, 8), jnp.bfloat16)
    out = cpu.attention(q, jnp.zeros_like(v), v)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(float), 1.0, rtol=2**-8)


@pytest.mark.devices(4)
def test_attention_of_a_shared_batch_stays_where_it_is():
    """Slices of the batch are taken within each device's share."""
    mesh = data_mesh()
    sharding = jax.sharding.NamedSharding(mesh, P("data"))
    q = jax.device_put(jax.random.normal(KEY, (64, 128, 2, 4)), sharding)
    compiled = jax.jit(lambda q: cpu.attention(q, q, q)).lower(q).compile()
    for collective in ("all-gather", "all-to-all", "collective-permute", "all-reduce"):
        assert collective not in compiled.as_text()
    close(compiled(q), jax.nn.dot_product_attention(q, q, q))
