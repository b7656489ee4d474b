"""The trace of a Jacobian: exact, or by Hutchinson's estimate along random directions.

    tr ∂f/∂x = Σ_i u_iᵀ (∂f/∂x) u_i = E[eᵀ (∂f/∂x) e]      for unit vectors u_i, and E[e eᵀ] = I.

The exact one takes a derivative a dimension, the mean over K directions takes K and is unbiased.

References: Hutchinson 1989, doi:10.1080/03610918908812806.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdiff.typing import Key

__all__ = ["Probe", "check", "gaussian", "inner", "orthogonal", "quadratic_forms", "rademacher"]

Probe = Callable[[Key, int, tuple[int, ...], Any], tuple[Array, float]]
"""(key, K, shape, dtype) ↦ K directions [K, *shape], and the share that they are of a whole set."""

# Directions whose derivatives are held in memory at once for an exact trace.
_BLOCK = 64


def check(count: int | None, probe: Probe, shape: tuple[int, ...]) -> None:
    """Refuses a number of directions that a law does not have in states of a shape.

    Raises:
        ValueError: unless count is None, or a whole number ≥ 1 of which the law has as many.
    """
    if count is None:
        return
    if not isinstance(count, int) or count < 1:
        raise ValueError(
            f"probes must be a whole number ≥ 1, or None for the exact trace, got {count!r}."
        )
    jax.eval_shape(lambda: probe(jax.random.key(0), count, shape, jnp.float32)[0])


def rademacher(key: Key, count: int, shape: tuple[int, ...], dtype: Any) -> tuple[Array, float]:
    """Independent signs: the least noise of independent probes, none from the diagonal."""
    return jax.random.rademacher(key, (count, *shape), dtype), 0.0


def gaussian(key: Key, count: int, shape: tuple[int, ...], dtype: Any) -> tuple[Array, float]:
    """Independent normal numbers: for the record, noisier than signs."""
    return jax.random.normal(key, (count, *shape), dtype), 0.0


def orthogonal(key: Key, count: int, shape: tuple[int, ...], dtype: Any) -> tuple[Array, float]:
    """Rows of a Hadamard matrix with random signs, drawn without replacement.

    The P rows, P the next power of two above the dimension, have the exact trace as their mean, and
    each is distributed as `rademacher` has it. So K of them have (P − K)/(P − 1) of the variance of
    K independent ones, and all of them none.

    Raises:
        ValueError: if there are fewer than `count` rows.
    """
    size = math.prod(shape)
    whole = 1 << (size - 1).bit_length()
    if count > whole:
        raise ValueError(
            f"probes must be at most {whole} for orthogonal ones in {size} dimensions, got {count}."
        )
    sign_key, row_key = jax.random.split(key)
    rows = jax.random.choice(row_key, whole, (count, 1), replace=False)
    odd = jax.lax.population_count(rows & jnp.arange(size)[None]) % 2
    signs = jax.random.rademacher(sign_key, (1, size), dtype)
    return ((1 - 2 * odd).astype(dtype) * signs).reshape(count, *shape), count / whole


def quadratic_forms(
    field: Callable[[Array], tuple[Array, Any]],
    x: Float[Array, "b ..."],
    directions: Float[Array, "b k ..."] | None,
) -> tuple[Float[Array, "b ..."], Float[Array, "b k"], Any]:
    """f(x), computed once, and eᵀ (∂f/∂x) e of each example's directions, or the exact trace.

    Args:
        field: x [b, …] ↦ (f [b, …], anything else), each example for itself.
        x: [b, …].
        directions: e [b, K, …]; None for the trace: forwards, or backwards where that is cheaper.

    Returns:
        f(x); eᵀ (∂f/∂x) e [b, K], or the trace [b, 1]; and what else the field returns.

    Note: examples are independent, so one derivative of the batched field, along a direction for
        each example, gives every example's own.
    """
    if directions is not None:
        value, change, further = jax.linearize(field, x, has_aux=True)
        return value, jax.vmap(lambda e: inner(e, change(e)), 1, 1)(directions), further

    size = x[0].size
    if _backwards(field, x):
        value, pullback, further = jax.vjp(field, x, has_aux=True)
        change = lambda e: pullback(e)[0]  # noqa: E731
    else:
        value, change, further = jax.linearize(field, x, has_aux=True)

    def diagonal(i):
        e = jnp.broadcast_to(jax.nn.one_hot(i, size, dtype=x.dtype).reshape(x.shape[1:]), x.shape)
        return inner(e, change(e))

    diagonals = jax.lax.map(diagonal, jnp.arange(size), batch_size=min(size, _BLOCK))
    return value, jnp.sum(diagonals, axis=0)[:, None], further


def inner(a: Float[Array, "b ..."], b: Float[Array, "b ..."]) -> Float[Array, "b"]:
    """The inner product of each example."""
    return jnp.sum((a * b).reshape(a.shape[0], -1), axis=-1)


def _backwards(field: Callable[[Array], Any], x: Array) -> bool:
    """Whether derivatives are cheaper backwards, where D of them are wanted.

    For perceptrons of more than a few dimensions they are. Of convolutions they are not on a CPU:
    the transposes of `networks` cost as much as forwards or a third more, JAX's many times more.
    """
    operations = str(jax.make_jaxpr(field)(x))
    convolves = "conv_general_dilated" in operations or "convolution" in operations
    return x[0].size > 8 and not (convolves and jax.default_backend() == "cpu")
