"""The CPU's own convolutions and attention against JAX's, whose formulas they are."""

import re
from functools import partial

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import PartitionSpec as P

from jaxdiff.networks import cpu
from jaxdiff.networks.attention import attention
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


def derivatives(f, x, kernel):
    dx, dk = jnp.cos(3 * x), jnp.sin(5 * kernel)
    grads = jax.grad(energy(f), (0, 1))
    return [
        f(x, kernel),
        grads(x, kernel),
        jax.jvp(f, (x, kernel), (dx, dk)),
        jax.jvp(grads, (x, kernel), (dx, dk)),
        jax.grad(lambda x, k: sum(jnp.sum(g**2) for g in grads(x, k)), (0, 1))(x, kernel),
    ]


@SHAPES
def test_convolution_and_all_its_derivatives_are_jaxs(shape):
    x, kernel = arrays(shape)
    close(*(jax.jit(partial(derivatives, f))(x, kernel) for f in both(shape[-1], shape[-2])))


@pytest.fixture
def small(monkeypatch):
    """Fewer multiplications even where they are few, of some examples at a time."""
    monkeypatch.setattr(cpu, "WORK", 0)
    monkeypatch.setattr(cpu, "TILES", 2**19)


@pytest.mark.parametrize(
    ("shape", "parts"), [((6, 6, 10, 16, 24, 3), 1), ((16, 8, 12, 32, 16, 3), 4)], ids=str
)
def test_fewer_multiplications_give_the_convolution_and_all_its_derivatives(shape, parts, small):
    x, kernel = arrays(shape)
    b, height, width, channels, features, _ = shape
    assert cpu._slices(b, 16 * b * height * width * (channels + features), cpu.TILES) == parts
    close(*(jax.jit(partial(derivatives, f))(x, kernel) for f in both(3, features)))


def convolutions_left(x, kernel):
    """Of a program for a CPU: how many convolutions and products it has."""
    program = jax.jit(both(kernel.shape[0], kernel.shape[-1])[0]).trace(x, kernel)
    text = program.lower(lowering_platforms=("cpu",)).as_text()
    return text.count("stablehlo.convolution"), text.count("stablehlo.dot_general")


@pytest.mark.parametrize(
    "shape",
    [
        (6, 5, 10, 16, 24, 3),
        (6, 6, 9, 16, 24, 3),
        (6, 6, 10, 3, 24, 3),
        (6, 6, 10, 16, 3, 3),
        (1, 8, 8, 16, 24, 3),
        (6, 6, 10, 16, 24, 5),
    ],
    ids=str,
)
def test_other_images_are_convolved_as_they_are(shape, small):
    assert convolutions_left(*arrays(shape)) == (1, 0)


def test_only_large_convolutions_of_wide_numbers_have_fewer_multiplications():
    large, kernel = arrays((32, 32, 32, 16, 16, 3))
    assert convolutions_left(large, kernel) == (0, 1)
    assert convolutions_left(large[:8], kernel) == (1, 0)
    assert convolutions_left(large.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16)) == (1, 0)


def exported(f, sizes, x, platforms=("cpu", "cuda")):
    """f as a program for x of any sizes along its first axes."""
    named = jax.export.symbolic_shape(sizes)
    shape = jax.ShapeDtypeStruct((*named, *x.shape[len(named) :]), x.dtype)
    return jax.export.export(jax.jit(f), platforms=platforms)(shape)


@pytest.mark.parametrize("sizes", ["n", "2*n", "n, 2*h"])
def test_batch_of_any_size_is_exported(sizes, small):
    x, kernel = arrays((6, 6, 10, 16, 24, 3))
    ours, plain = both(3, 24)
    program = exported(lambda x: ours(x, kernel), sizes, x)
    close(program.call(x[:4]), plain(x[:4], kernel))


def test_exported_program_has_fewer_multiplications_too():
    """By one example after the other, where one is enough."""
    x, kernel = arrays((3, 32, 32, 96, 96, 3))
    ours, plain = both(3, 96)
    program = exported(lambda x: ours(x, kernel), "n", x, platforms=["cpu"])
    assert "stablehlo.convolution" not in program.mlir_module()
    assert "stablehlo.while" in program.mlir_module()
    close(program.call(x), plain(x, kernel))


@pytest.mark.parametrize("sizes", ["n", "2*n", "2*n, m"])
def test_attention_of_any_size_is_exported(sizes):
    q = jax.random.normal(KEY, (2, 128, 2, 4))
    program = exported(lambda q: attention(q, q, q), sizes, q)
    close(program.call(q), jax.nn.dot_product_attention(q, q, q))


@pytest.mark.devices(4)
@pytest.mark.parametrize("by", ["jit", "images", "kernels"])
def test_slices_of_a_shared_batch_stay_where_they_are(by, small):
    """By jit; and where images or kernels are devices' own, as `shard_map` checks."""
    # Of this few examples, slices of the wanted size would be finer than the devices' shares.
    x, kernel = arrays((8 if by == "jit" else 64, 32, 16, 16, 16, 3))
    ours, plain = both(3, 16)
    expected = plain(x, kernel)
    sharding = jax.sharding.NamedSharding(data_mesh(), P("data"))
    if by == "jit":
        x = jax.device_put(x, sharding)
    elif by == "images":
        specs = {"in_specs": (P("data"), P()), "out_specs": P("data")}
        ours = jax.shard_map(ours, mesh=data_mesh(), **specs)
    else:
        kernel = jnp.concatenate([kernel] * 4)
        specs = {"in_specs": (P(), P("data")), "out_specs": P("data")}
        ours = jax.shard_map(ours, mesh=data_mesh(), **specs)
        expected = jnp.concatenate([expected] * 4)
    compiled = jax.jit(ours).lower(x, kernel).compile()
    text = compiled.as_text()
    assert "while" in text
    for collective in ("all-gather", "all-to-all", "collective-permute", "all-reduce"):
        assert collective not in text
    close(jax.jit(ours)(x, kernel), expected)


def test_what_has_several_users_is_computed_once():
    x = jax.random.normal(KEY, (8, 16, 16, 32))

    def flips(mark):
        def f(x):
            y = mark(jnp.flip(x))
            y = mark(y + jnp.flip(y))
            y = mark(y + jnp.flip(y, 1))
            return y.transpose(3, 1, 2, 0), y @ jnp.ones((32, 32))

        return jax.jit(f).lower(x).compile().as_text().count(" reverse(")

    assert flips(cpu.once) == 3
    assert flips(lambda x: x) > 3  # Else the compiler needs no telling any longer.
    assert "once" in str(jax.make_jaxpr(jax.vjp(cpu.once, x)[1])(x))
    assert "once" in str(jax.make_jaxpr(both()[0])(*arrays((8, 6, 10, 3, 5, 3))))


def test_computed_once_is_what_it_was():
    """Exactly, infinities and narrow numbers too, and all derivatives."""
    x = jnp.array([[0.0, -0.0, 1e-37, -3.7], [jnp.inf, -jnp.inf, 3e38, jnp.nan]])
    for a in (x, x.astype(jnp.bfloat16)):
        out = jax.jit(jax.vmap(cpu.once))(a)
        assert out.dtype == a.dtype
        np.testing.assert_array_equal(out.astype(float), a.astype(float))
    f = lambda x: cpu.once(x) * jnp.sin(x)
    x = jnp.float32(1.7)
    second = 2 * np.cos(1.7) - 1.7 * np.sin(1.7)
    np.testing.assert_allclose(jax.jit(jax.jacfwd(jax.grad(f)))(x), second, rtol=1e-6)


@pytest.mark.parametrize("axes", [(0, None), (3, None), (None, 0), (0, 0), (3, 1)], ids=str)
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


@pytest.mark.parametrize("context", [False, True])
def test_precision_is_jaxs(context):
    """A layer's, and of the context in which a function is traced; it is lowered after that."""
    x, kernel = arrays((8, 6, 10, 3, 5, 3))

    def precisions(f):
        def precise(x, kernel):
            with jax.default_matmul_precision("highest" if context else None):
                return f(x, kernel)

        program = jax.jit(jax.grad(energy(precise), (0, 1))).trace(x, kernel)
        text = program.lower(lowering_platforms=("tpu",)).as_text()
        return re.findall(r"precision (\w+)", text)

    ours, plain = map(precisions, both() if context else both(precision="highest"))
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

    once = jax.jit(jax.grad(lambda x: jnp.sin(cpu.once(x)).sum())).trace(x)
    assert "divide" not in once.lower(lowering_platforms=(platform,)).as_text()
    assert "divide" in once.lower(lowering_platforms=("cpu",)).as_text()

    q = jax.random.normal(KEY, (64, 128, 2, 4))

    def products(f, platform):
        program = jax.jit(jax.grad(lambda q: f(q, q, q).sum())).trace(q)
        text = program.lower(lowering_platforms=(platform,)).as_text()
        types = re.findall(r"stablehlo.dot_general.*contracting_dims.*? : (.*)", text)
        return sorted(types), text.count("stablehlo.while")

    there, plain = (products(f, platform) for f in (attention, jax.nn.dot_product_attention))
    assert there == plain
    assert len(plain[0]) == 5  # The output itself is not needed.
    assert products(attention, "cpu")[1] > 0


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
        jax.jit(lambda f=f: derivatives(f))() for f in (attention, jax.nn.dot_product_attention)
    )
    close(ours, plain)


def test_batched_attention_is_jaxs():
    q = jax.random.normal(KEY, (3, 16, 128, 1, 8))
    functions = (attention, jax.nn.dot_product_attention)
    close(*(jax.vmap(f, (0, None, 0))(q, q[0], 2 * q) for f in functions))


def test_narrow_attention_has_a_wide_softmax():
    """Of equal logits over many tokens, the weights' sum is 1 only if it is not summed narrowly."""
    q, v = jnp.zeros((1, 1, 1, 8), jnp.bfloat16), jnp.ones((1, 4096, 1, 8), jnp.bfloat16)
    out = attention(q, jnp.zeros_like(v), v)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(float), 1.0, rtol=2**-8)


@pytest.mark.devices(4)
def test_attention_of_a_shared_batch_stays_where_it_is():
    """Slices of the batch are taken within each device's share."""
    mesh = data_mesh()
    sharding = jax.sharding.NamedSharding(mesh, P("data"))
    q = jax.device_put(jax.random.normal(KEY, (64, 128, 2, 4)), sharding)
    compiled = jax.jit(lambda q: attention(q, q, q)).lower(q).compile()
    for collective in ("all-gather", "all-to-all", "collective-permute", "all-reduce"):
        assert collective not in compiled.as_text()
    close(compiled(q), jax.nn.dot_product_attention(q, q, q))


@pytest.mark.devices(4)
def test_a_share_of_the_batch_is_sliced_too(small):
    """In a `shard_map`, whose examples are one device's: four, fewer than two for each device."""

    def loops(f, *arrays):
        specs = tuple(P("data") if i == 0 else P() for i in range(len(arrays)))
        mapped = jax.shard_map(f, mesh=data_mesh(), in_specs=specs, out_specs=P("data"))
        return jax.jit(mapped).lower(*arrays).as_text().count("stablehlo.while")

    q = jax.random.normal(KEY, (16, 512, 2, 4))
    assert loops(lambda q: attention(q, q, q), q) == 1
    assert loops(both(3, 16)[0], *arrays((16, 32, 16, 16, 16, 3))) == 1
