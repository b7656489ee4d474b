"""What a CPU computes faster in another way than a GPU or TPU: convolutions and attention.

Every function here is an operation of JAX's, equal to it up to rounding, and on a GPU or TPU it is
that very operation (a convolution of one pixel is everywhere a product of matrices). What each
earned on two cores is printed by `tests/benchmarks/cures.py`.

*Convolutions.* XLA's CPU compiler runs a convolution fast only in its standard form, and brings
others into that form only outside of loops; JAX's gradients of a convolution are not in it. So

    y[b, r, c] = Σ_{i,j} x[b, r + i - k/2, c + j - k/2] w[i, j]

has these transposes on a CPU, each a convolution in the standard form, of a kernel that is as large
as the image in the second:

    dx = dy * w',           w'[i, j] = w[k-1-i, k-1-j]ᵀ
    dw = (xᵀ * dyᵀ)ᵀ        xᵀ: channels as the batch, the batch as channels; dyᵀ: likewise

They are linear maps, not gradients by hand, so forward mode, second derivatives and batching stay.
An image whose pixels are doubled before a 3 × 3 convolution is convolved as it is, by four kernels
of 2 × 2, one for each copy of a pixel: 4/9 of the products.

*Residual sums.* The compiler computes a sum of few terms again for each of its users, and so the
terms of those terms; along a row of residual blocks, that is most of the gradient. A `barrier` at
the entry of each block ends this.

*Attention.* Between few tokens of many examples, the products are small and the weights do not fit
the cache: three plain batched products for a few examples at a time, computed again for gradients.
"""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Float

from jaxdiff.typing import Array

__all__ = ["Conv", "DoubledConv", "attention", "barrier", "convolve", "convolve_doubled"]

Image = Float[Array, "b h w c"]
Convolved = Float[Array, "b h w c2"]
Doubled = Float[Array, "b h2 w2 c2"]
Kernel = Float[Array, "k k2 c c2"]
Pads = tuple[tuple[int, int], tuple[int, int]]

LAYOUT = ("NHWC", "HWIO", "NHWC")
CACHE = 2**21
"""Bytes of the attention weights that are computed at a time."""


def convolve(
    x: Image, kernel: Array, strides: Any = (1, 1), padding: Any = "SAME", **options: Any
) -> Array:
    """`jax.lax.conv_general_dilated`, with the layout and the options that Flax's `Conv` gives it.

    Only a convolution that keeps the sides, with zeros around and an odd square kernel, is another
    one than JAX's; one with a kernel of one pixel is a product of matrices.
    """
    height, width, _, features = kernel.shape
    half = height // 2
    odd = height == width and height % 2 == 1
    if not odd or not _is_default(half, strides, padding, options):
        options = {"dimension_numbers": LAYOUT} | options
        return jax.lax.conv_general_dilated(x, kernel, strides, padding, **options)
    if height == 1:
        return (x.reshape(-1, x.shape[-1]) @ kernel[0, 0]).reshape(*x.shape[:3], features)
    return _convolution.bind(x, kernel, pads=((half, half),) * 2)


def convolve_doubled(
    x: Image, kernel: Array, strides: Any = (1, 1), padding: Any = "SAME", **options: Any
) -> Array:
    """`convolve` of the image that has every pixel of x four times, in a square."""
    if kernel.shape[:2] == (3, 3) and _is_default(1, strides, padding, options):
        return _doubling.bind(x, kernel)
    return convolve(x.repeat(2, axis=1).repeat(2, axis=2), kernel, strides, padding, **options)


def _is_default(half: int, strides: Any, padding: Any, options: Mapping[str, Any]) -> bool:
    """Whether a convolution keeps the sides, and nothing else is asked of it, here or by a context.

    A context's precision is not what it was when a primitive is lowered.
    """
    return (
        tuple(strides) == (1, 1)
        and (padding == "SAME" or list(padding) == [(half, half)] * 2)
        and all(set(options.get(name) or [1]) == {1} for name in ("lhs_dilation", "rhs_dilation"))
        and options.get("feature_group_count", 1) == options.get("batch_group_count", 1) == 1
        and options.get("precision") is options.get("preferred_element_type") is None
        and jax.config.jax_default_matmul_precision is None  # pyright: ignore
    )


Conv = partial(nn.Conv, conv_general_dilated_cls=lambda: convolve)
"""Flax's `Conv`, by `convolve`."""

DoubledConv = partial(nn.Conv, conv_general_dilated_cls=lambda: convolve_doubled)
"""Flax's `Conv`, by `convolve_doubled`."""


def barrier(x: Array) -> Array:
    """x, of which neither value nor cotangent is computed anew by each of its users on a CPU."""
    return jax.lax.platform_dependent(x, cpu=jax.lax.optimization_barrier, default=lambda x: x)


def _forward(x: Image, kernel: Kernel, *, pads: Pads) -> Convolved:
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), pads, dimension_numbers=LAYOUT)


def _image_gradient(dy: Convolved, kernel: Kernel, aval: Any, *, pads: Pads) -> Image:
    """dx of `_forward`."""
    turned = kernel[::-1, ::-1].swapaxes(2, 3)
    swapped = tuple((after, before) for before, after in pads)
    # Else the compiler takes the turn into the convolution again.
    dx = _convolution.bind(dy, jax.lax.optimization_barrier(turned), pads=swapped)
    return _summed(dx, aval)


def _kernel_gradient(dy: Convolved, x: Image, aval: Any, *, pads: Pads) -> Kernel:
    """dw of `_forward`."""
    turned = jax.lax.conv_general_dilated(
        x.transpose(3, 1, 2, 0), dy.transpose(1, 2, 0, 3), (1, 1), pads, dimension_numbers=LAYOUT
    )
    return _summed(turned.transpose(1, 2, 0, 3), aval)


def _doubled(x: Image, kernel: Kernel) -> Doubled:
    return _forward(jnp.repeat(jnp.repeat(x, 2, 1), 2, 2), kernel, pads=((1, 1), (1, 1)))


def _folded(x: Image, kernel: Kernel) -> Doubled:
    """`_doubled` by 4/9 of its products: a kernel of 2 × 2 for each of the four copies."""

    def halves(kernel: Array, axis: int) -> list[tuple[Array, tuple[int, int]]]:
        first, second, third = jnp.split(kernel, 3, axis)
        before = jnp.concatenate([first, second + third], axis)
        after = jnp.concatenate([first + second, third], axis)
        return [(before, (1, 0)), (after, (0, 1))]

    rows = [
        jnp.stack(
            [_convolution.bind(x, part, pads=(tall, wide)) for part, wide in halves(half, 1)], 3
        )
        for half, tall in halves(kernel, 0)
    ]
    b, height, width, _ = x.shape
    return jnp.stack(rows, 2).reshape(b, 2 * height, 2 * width, -1)


def _summed(gradient: Array, aval: Any) -> Array:
    """The sum over those devices of a `shard_map` among which only the gradient differs."""
    one = jnp.ones_like(gradient, shape=())
    return jax.linear_transpose(lambda a: a * one, aval)(gradient)[0]


def _bilinear(name: str, plain: Any, quick: Any, of_image: Any, of_kernel: Any) -> Primitive:
    """An operation of JAX's, `plain`(image, kernel), that is `quick` on a CPU.

    The gradients there are those that are given: (cotangent, other operand, aval) -> gradient.
    """

    def transposed(on_cpu: Any, plain: Any, aval: Any, dy: Array, other: Array) -> Array:
        return jax.lax.platform_dependent(
            dy,
            other,
            cpu=lambda dy, other: on_cpu(dy, other, aval),
            default=lambda dy, other: jax.linear_transpose(lambda a: plain(a, other), aval)(dy)[0],
        )

    def transpose_image(dy: Array, x: Any, kernel: Array, **pads: Any) -> Array:
        run = partial(plain, **pads)
        return transposed(partial(of_image, **pads), run, x.aval, dy, kernel)

    def transpose_kernel(dy: Array, x: Array, kernel: Any, **pads: Any) -> Array:
        def run(kernel: Array, x: Array) -> Array:
            return plain(x, kernel, **pads)

        return transposed(partial(of_kernel, **pads), run, kernel.aval, dy, x)

    def batched(
        operands: tuple[Array, Array], axes: tuple[int | None, int | None], **pads: Any
    ) -> tuple[Array, int]:
        (x, kernel), (of_x, of_kernel) = operands, axes
        if of_x is None or of_kernel is not None:
            return jax.vmap(partial(plain, **pads), axes)(x, kernel), 0
        x = jnp.moveaxis(x, of_x, 0)
        flat = primitive.bind(x.reshape(-1, *x.shape[2:]), kernel, **pads)
        return flat.reshape(*x.shape[:2], *flat.shape[1:]), 0

    def shaped(x: Any, kernel: Any, **pads: Any) -> Any:
        return jax.make_jaxpr(partial(plain, **pads))(x, kernel).out_avals[0]

    primitive = Primitive(name)
    primitive.def_impl(jax.jit(primitive.bind, static_argnames="pads"))
    primitive.def_abstract_eval(shaped)
    mlir.register_lowering(primitive, mlir.lower_fun(plain, multiple_results=False))
    mlir.register_lowering(primitive, mlir.lower_fun(quick, multiple_results=False), "cpu")
    ad.defbilinear(primitive, transpose_image, transpose_kernel)
    batching.primitive_batchers[primitive] = batched
    return primitive


_convolution = _bilinear("convolution", _forward, _forward, _image_gradient, _kernel_gradient)
_doubling = _bilinear(
    "doubling",
    _doubled,
    _folded,
    lambda dy, kernel, aval: jax.linear_transpose(lambda x: _folded(x, kernel), aval)(dy)[0],
    lambda dy, x, aval: jax.linear_transpose(lambda kernel: _folded(x, kernel), aval)(dy)[0],
)


def attention(
    query: Float[Array, "b n heads d"],
    key: Float[Array, "b m heads d"],
    value: Float[Array, "b m heads d"],
) -> Float[Array, "b n heads d"]:
    """softmax(Q Kᵀ / √d) V, as `jax.nn.dot_product_attention`; the softmax in float32 at least."""
    fused = jax.nn.dot_product_attention
    return jax.lax.platform_dependent(query, key, value, cpu=_by_slices, default=fused)


def _by_slices(query: Array, key: Array, value: Array) -> Array:
    b, n, heads, _ = query.shape
    slices, weights = 1, 4 * b * heads * n * key.shape[1]
    while b % (2 * slices) == 0 and weights > CACHE * slices:
        slices *= 2
    if slices == 1:
        return _attend(query, key, value)

    # A slice takes every so-manieth example: a share of each device's, where they are shared out.
    def sliced(a: Array) -> Array:
        return a.reshape(b // slices, slices, *a.shape[1:]).swapaxes(0, 1)

    attend = jax.checkpoint(_attend)
    out = jax.lax.map(lambda args: attend(*args), (sliced(query), sliced(key), sliced(value)))
    return out.swapaxes(0, 1).reshape(query.shape)


def _attend(query: Array, key: Array, value: Array) -> Array:
    b, n, heads, d = query.shape
    wide = jnp.promote_types(jnp.float32, query.dtype)
    q, k, v = (a.swapaxes(1, 2).reshape(b * heads, -1, d) for a in (query, key, value))
    logits = jnp.matmul(q / math.sqrt(d), k.swapaxes(1, 2), preferred_element_type=wide)
    mixed = jax.nn.softmax(logits, axis=-1).astype(v.dtype) @ v
    return mixed.reshape(b, heads, n, d).swapaxes(1, 2)
