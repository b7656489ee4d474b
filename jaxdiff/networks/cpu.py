"""What a CPU computes faster in another way than a GPU or TPU: convolutions and attention.

Every function here is an operation of JAX's, equal to it up to rounding of finite values. On a GPU
or TPU a convolution is JAX's very own (one of one pixel is everywhere a product of matrices), and
`networks/attention.py` takes JAX's attention. What each earned on two cores is printed by
`tests/benchmarks/cures.py`.

*Convolutions.* XLA's CPU compiler runs a convolution fast only in its standard form, and brings
others into that form only outside of loops; JAX's gradients of a convolution are not in it. So

    y[b, r, c] = Σ_{i,j} x[b, r + i - h, c + j - h] w[i, j],   h = (k - 1) / 2

has these transposes on a CPU, each a convolution in the standard form, of a kernel that is as large
as the image in the second:

    dx = dy * w',           w'[i, j] = w[k-1-i, k-1-j]ᵀ
    dw = (xᵀ * dyᵀ)ᵀ        xᵀ: channels as the batch, the batch as channels; dyᵀ: likewise

where dyᵀ is the kernel, as large as the image, and h zeros stay around xᵀ. They are linear maps,
not gradients by hand, so forward mode, second derivatives and batching stay.

y of a 3 × 3 kernel, and so dx, takes 4/9 of the multiplications by Winograd's minimal filtering
F(2 × 2, 3 × 3) (Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", 2016, section
4.1): 2 × 2 of the results are, of the 4 × 4 of the image around them, X,

    Y = R [(K w Kᵀ) ⊙ (D X Dᵀ)] Rᵀ

where ⊙ sums over the channels, so that all Y are 16 products of matrices. What is transformed is
four times as large as the image; it is computed for a few examples at a time, to stay in the cache.

*Values of several users.* The compiler computes a cheap operation, as a sum or a product of two
arrays, again in each of its users, and so the terms of those terms, back along a row of residual
blocks; or in the slow order of a transpose. With a division it does not: `once` divides by a one.

*Attention.* Between few tokens of many examples, the products are small and the weights do not fit
the cache: three plain batched products for a few examples at a time, computed again for gradients.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Float

from jaxdiff.typing import Array

__all__ = ["Conv", "attention", "convolve", "once"]

Image = Float[Array, "b h w c"]
Convolved = Float[Array, "b h w c2"]
Kernel = Float[Array, "k k c c2"]
Size = Any
"""An int, or the unknown one of an exported program."""

LAYOUT = ("NHWC", "HWIO", "NHWC")
IMAGE = ((1, 0, -1, 0), (0, 1, 1, 0), (0, -1, 1, 0), (0, 1, 0, -1))
KERNEL = ((1, 0, 0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0, 0, 1))
RESULT = ((1, 1, 1, 0), (0, 1, -1, -1))
"""D, K and R."""
WORK = 2**26
"""Multiplications of a convolution below which fewer, in more operations, take longer."""
CACHE = 2**21
"""Bytes of the attention weights that are computed at a time."""
TILES = 2**22
"""Bytes of the transformed images and results of a convolution that are computed at a time."""


def convolve(
    x: Image, kernel: Array, strides: Any = (1, 1), padding: Any = "SAME", **options: Any
) -> Array:
    """`jax.lax.conv_general_dilated`, with the layout and the options that Flax's `Conv` gives it.

    Only a convolution that keeps the sides, with zeros around and an odd square kernel, and with no
    precision asked for, is another one than JAX's; one with a kernel of one pixel is a product of
    matrices.
    """
    height, width, _, features = kernel.shape
    half = height // 2
    # A context's precision counts too: our operation is lowered outside of it.
    precision = options.get("precision") or jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]
    plain = (
        height == width
        and height % 2 == 1
        and tuple(strides) == (1, 1)
        and (padding == "SAME" or list(padding) == [(half, half)] * 2)
        and all(set(options.get(name) or [1]) == {1} for name in ("lhs_dilation", "rhs_dilation"))
        and options.get("feature_group_count", 1) == 1
        and options.get("preferred_element_type") is None
        and precision is None
    )
    if not plain:
        options = {"dimension_numbers": LAYOUT} | options
        return jax.lax.conv_general_dilated(x, kernel, strides, padding, **options)
    if height == 1:
        return (x.reshape(-1, x.shape[-1]) @ kernel[0, 0]).reshape(*x.shape[:3], features)
    return _convolution.bind(once(x), kernel)


Conv = partial(nn.Conv, conv_general_dilated_cls=lambda: convolve)
"""Flax's `Conv`, by `convolve`."""


def once(x: Array) -> Array:
    """x, of which neither value nor cotangent is computed anew by each of its users on a CPU."""
    return _once.bind(x)


def _divided(x: Array) -> Array:
    # Of the smallest of |x| and 0, the compiler does not know the value.
    return x / (1 + jnp.minimum(jnp.abs(x), 0))


_once = Primitive("once")
_once.def_impl(lambda x: x)
_once.def_abstract_eval(lambda x: x)
ad.deflinear(_once, lambda dy: [_once.bind(dy)])
batching.defvectorized(_once)
mlir.register_lowering(_once, lambda ctx, x: [x])
mlir.register_lowering(_once, mlir.lower_fun(_divided, multiple_results=False), platform="cpu")


def _forward(x: Image, kernel: Kernel) -> Convolved:
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=LAYOUT)


def _forward_on_cpu(x: Image, kernel: Kernel) -> Convolved:
    """`_forward`, by fewer multiplications where that is faster."""
    b, height, width, channels = x.shape
    size, _, _, features = kernel.shape
    # That of an exported program may be of any size: then by one example after the other.
    known = isinstance(b, int)
    examples = b if known else 1
    filtered = (
        size == 3
        and all(isinstance(n, int) for n in x.shape[1:])
        and height % 2 == width % 2 == 0
        and x.dtype.itemsize >= 4
        # Of small matrices, the transforms would be most of the work.
        and min(channels, features, examples * height * width // 16) >= 16
        and examples * height * width * kernel.size >= WORK
    )
    if not filtered:
        return _forward(x, kernel)

    transformed = _sandwich(KERNEL, kernel)
    tiles = 4 * examples * height * width * (channels + features) * x.dtype.itemsize
    slices = _slices(b, tiles, TILES) if known else b
    if slices == 1:
        return _winograd(x, transformed)
    x = _sliced(x, slices)

    # Not by `lax.map`, for which the slices must be copied to the front.
    def one(i: Array, y: Array) -> Array:
        part = jax.lax.dynamic_index_in_dim(x, i, 1, keepdims=False)
        return jax.lax.dynamic_update_index_in_dim(y, _winograd(part, transformed), i, 1)

    # In a shard_map, the results differ among all devices among which the image or the kernel does.
    y = jnp.zeros_like(x, shape=(*x.shape[:-1], features)) * jnp.zeros_like(kernel, shape=())
    return jax.lax.fori_loop(0, slices, one, y).reshape(b, height, width, features)


def _winograd(x: Image, transformed: Float[Array, "4 4 c c2"]) -> Convolved:
    """`_forward` of the kernel w, from K w Kᵀ."""
    b, height, width, channels = x.shape
    rows, columns = height // 2, width // 2
    pairs = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    pairs = pairs.reshape(b, rows + 1, 2, columns + 1, 2, channels)

    def every_other(i: int, j: int) -> Array:
        (above, i), (left, j) = divmod(i, 2), divmod(j, 2)
        return pairs[:, above : above + rows, i, left : left + columns, j]

    image = _sandwich(IMAGE, [[every_other(i, j) for j in range(4)] for i in range(4)])
    products = image.reshape(4, 4, -1, channels) @ transformed
    y = _sandwich(RESULT, products.reshape(4, 4, b, rows, columns, -1))
    return y.transpose(2, 3, 0, 4, 1, 5).reshape(b, height, width, -1)


def _sandwich(matrix: tuple[tuple[float | int, ...], ...], arrays: Any) -> Array:
    """M A Mᵀ of a matrix A of arrays, by additions."""

    def combined(arrays: Any) -> list[Any]:
        sums = []
        for row in matrix:
            terms = [(c, a) for c, a in zip(row, arrays, strict=True) if c]
            sums.append(sum(a if c == 1 else -a if c == -1 else c * a for c, a in terms))
        return sums

    columns = zip(*map(combined, arrays), strict=True)
    return jnp.stack([jnp.stack(combined(column)) for column in columns], 1)


def _slices(b: Size, size: Size, most: int) -> int:
    """In how many parts to compute a batch, of `most` bytes each, with a share of each device's."""
    mesh = jax.sharding.get_abstract_mesh()
    devices = 1 if mesh.manual_axes else jax.device_count()  # In a `shard_map`, b is a share.
    slices = 1
    while isinstance(size, int) and b % (2 * slices * devices) == 0 and size > most * slices:
        slices *= 2
    return slices


def _sliced(a: Array, slices: Size) -> Array:
    """The slices of a batch along axis 1; slice i is of every `slices`-th example from i on."""
    return a.reshape(a.shape[0] // slices, slices, *a.shape[1:])


def _image_gradient(dy: Convolved, kernel: Kernel) -> Image:
    """dx of `_forward`."""
    turned = kernel[::-1, ::-1].swapaxes(2, 3)
    # Else the compiler takes the turn into the convolution again.
    return _convolution.bind(dy, jax.lax.optimization_barrier(turned))


def _kernel_gradient(dy: Convolved, x: Image, size: int) -> Kernel:
    """dw of `_forward`."""
    half = size // 2
    turned = jax.lax.conv_general_dilated(
        x.transpose(3, 1, 2, 0),
        dy.transpose(1, 2, 0, 3),
        (1, 1),
        [(half, half)] * 2,
        dimension_numbers=LAYOUT,
    )
    return turned.transpose(1, 2, 0, 3)


def _summed(gradient: Array, aval: Any) -> Array:
    """The sum over those devices of a `shard_map` among which only the gradient differs."""
    one = jnp.ones_like(gradient, shape=())
    return jax.linear_transpose(lambda a: a * one, aval)(gradient)[0]


def _transposed(quick: Any, forward: Any, aval: Any, dy: Convolved, other: Array) -> Array:
    """The gradient of `forward` by its first argument, of type `aval`; on a CPU by `quick`."""

    def on_cpu(dy: Convolved, other: Array) -> Array:
        return _summed(quick(dy, other), aval)

    def plain(dy: Convolved, other: Array) -> Array:
        return jax.linear_transpose(lambda a: forward(a, other), aval)(dy)[0]

    return jax.lax.platform_dependent(dy, other, cpu=on_cpu, default=plain)


def _transpose_image(dy: Convolved, x: Any, kernel: Kernel) -> Image:
    return _transposed(_image_gradient, _forward, x.aval, dy, kernel)


def _transpose_kernel(dy: Convolved, x: Image, kernel: Any) -> Kernel:
    quick = partial(_kernel_gradient, size=kernel.aval.shape[0])
    return _transposed(quick, lambda kernel, x: _forward(x, kernel), kernel.aval, dy, x)


def _batched(operands: tuple[Array, Array], axes: tuple[int | None, int | None]) -> tuple[Any, int]:
    (x, kernel), (of_x, of_kernel) = operands, axes
    if of_x is None or of_kernel is not None:
        return jax.vmap(_forward, axes)(x, kernel), 0
    x = jnp.moveaxis(x, of_x, 0)
    flat = _convolution.bind(x.reshape(-1, *x.shape[2:]), kernel)
    return flat.reshape(*x.shape[:2], *flat.shape[1:]), 0


_convolution = Primitive("convolution")
_convolution.def_impl(jax.jit(_forward))
_convolution.def_abstract_eval(lambda x, kernel: jax.make_jaxpr(_forward)(x, kernel).out_avals[0])
mlir.register_lowering(_convolution, mlir.lower_fun(_forward, multiple_results=False))
mlir.register_lowering(
    _convolution, mlir.lower_fun(_forward_on_cpu, multiple_results=False), platform="cpu"
)
ad.defbilinear(_convolution, _transpose_image, _transpose_kernel)
batching.primitive_batchers[_convolution] = _batched


def attention(
    query: Float[Array, "b n heads d"],
    key: Float[Array, "b m heads d"],
    value: Float[Array, "b m heads d"],
) -> Float[Array, "b n heads d"]:
    """`jax.nn.dot_product_attention`, by slices of the batch; the softmax in float32 at least."""
    b, n, heads, _ = query.shape
    slices = _slices(b, 4 * b * heads * n * key.shape[1], CACHE)
    if slices == 1:
        return _attend(query, key, value)
    attend = jax.checkpoint(_attend)
    sliced = tuple(_sliced(a, slices).swapaxes(0, 1) for a in (query, key, value))
    out = jax.lax.map(lambda args: attend(*args), sliced)
    return out.swapaxes(0, 1).reshape(query.shape)


def _attend(query: Array, key: Array, value: Array) -> Array:
    b, n, heads, d = query.shape
    wide = jnp.promote_types(jnp.float32, query.dtype)
    q, k, v = (a.swapaxes(1, 2).reshape(b * heads, -1, d) for a in (query, key, value))
    logits = jnp.matmul(q / math.sqrt(d), k.swapaxes(1, 2), preferred_element_type=wide)
    mixed = jax.nn.softmax(logits, axis=-1).astype(v.dtype) @ v
    return mixed.reshape(b, heads, n, d).swapaxes(1, 2)
