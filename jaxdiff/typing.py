"""The shapes that the library speaks of, once.

Under pytest the annotations are checked at run time (jaxtyping + beartype); in use they cost
nothing. All maths is written for one example and a scalar time; a leading batch axis appears only
where a docstring says so.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jaxtyping
from jaxtyping import Array, Float, Shaped, UInt32

__all__ = [
    "Array",
    "Batch",
    "Data",
    "Grid",
    "Key",
    "Metrics",
    "Objective",
    "Params",
    "Scalar",
    "State",
    "Time",
]

Key = jaxtyping.Key[Array, "..."] | UInt32[Array, "..."]
"""A JAX random key, typed (`jax.random.key`) or legacy (`jax.random.PRNGKey`), or an array of
them."""

Time = Float[Array, ""]
"""Diffusion time in [0, 1]; data at 0, the prior at 1."""

Grid = Float[Array, "times"]
"""Decreasing times from the prior's to the data's: one more than there are steps."""

Data = Float[Array, "*data"]
"""One point of data space x_0, or a batch of them."""

State = Float[Array, "*state"]
"""One point of the process's state space x_t, or a batch of them."""

Params = Any
"""A pytree of parameters: for Flax, the whole variables dictionary that `init` returned."""

Batch = Mapping[str, Shaped[Array, "b ..."]]
"""{"x": data in model space [b, ...], and further arrays [b, ...] that the network is given}."""

Metrics = dict[str, Array]
"""Named numbers, per example [b] or scalar."""

Objective = Callable[[Params, Key, Batch], tuple[Float[Array, "b"], Metrics]]
"""(params, key, batch) ↦ (loss [b], metrics): what training minimises the mean of."""

if TYPE_CHECKING:
    Scalar = float | Array
    """A hyper-parameter: a pytree leaf, so that sweeping it compiles nothing anew."""
else:
    # A field of a pytree also holds tracers, shapes and sentinels while JAX rebuilds it.
    Scalar = Any
