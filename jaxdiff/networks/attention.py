"""Attention as each platform computes it best."""

import jax
import jax.numpy as jnp
from jax.extend.backend import get_backend
from jaxtyping import Float

from jaxdiff.networks import cpu
from jaxdiff.typing import Array

__all__ = ["attention"]

WIDEST = 256
"""Features of a head of which cuDNN's kernel is capable, on Hopper and later; before, of 128."""


def attention(
    query: Float[Array, "b n heads d"],
    key: Float[Array, "b m heads d"],
    value: Float[Array, "b m heads d"],
    *,
    flash: bool = False,
) -> Float[Array, "b n heads d"]:
    """softmax(Q Kᵀ / √d) V, the softmax in float32 at least: `jax.nn.dot_product_attention`.

    Args:
        query: of bfloat16 or float16, with d a multiple of 8 and at most 256, if `flash`.
        key: like the query.
        value: like the query.
        flash: take cuDNN's kernel, which keeps no array [n, m], if JAX's default backend is an
            NVIDIA GPU; elsewhere it changes nothing. Its derivative has reverse mode only, and the
            program runs on such GPUs only.

    Raises:
        ValueError: if `flash`, and the query is not of such a type or width, on any platform.

    References: Dao et al. 2022, arXiv 2205.14135.
    """
    if flash:
        _check(query)
        # Not by `platform_dependent`, which would keep what other platforms want for gradients.
        if "cuda" in get_backend().platform_version:
            return _flash(query, key, value)
    fused = jax.nn.dot_product_attention
    return jax.lax.platform_dependent(query, key, value, cpu=cpu.attention, default=fused)


def _flash(query: Array, key: Array, value: Array) -> Array:
    b, n, m = *query.shape[:2], key.shape[1]

    # JAX refuses gradients of odd numbers of tokens.
    def even(a: Array) -> Array:
        return jnp.pad(a, ((0, 0), (0, a.shape[1] % 2), (0, 0), (0, 0)))

    mixed = jax.nn.dot_product_attention(
        even(query),
        even(key),
        even(value),
        key_value_seq_lengths=jnp.full(b, m, jnp.int32) if m % 2 else None,
        implementation="cudnn",
    )
    return mixed[:, :n]


def _check(query: Array) -> None:
    if query.dtype not in (jnp.bfloat16, jnp.float16):
        raise ValueError(f"flash needs dtype bfloat16 or float16, got {query.dtype}")
    if query.shape[-1] % 8 or query.shape[-1] > WIDEST:
        raise ValueError(
            f"flash needs heads whose width is a multiple of 8, at most {WIDEST}, "
            f"got {query.shape[-1]}"
        )
