"""Networks written with Flax NNX, as the pure functions that everything here takes."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import nnx

from jaxdiff.typing import Array, Key, Params

__all__ = ["from_nnx"]


def from_nnx(module: nnx.Module) -> tuple[Callable[..., Any], Params]:
    """A module of NNX as (apply, params).

    Args:
        module: called as module(x [b, …], noise_level [b], **condition).

    Returns:
        apply(params, x, noise_level, **condition, rngs=None), and the parameters, nested
        dictionaries of arrays. As with a Linen network, dropout acts if and only if a key is given,
        `rngs={"dropout": key}`; without, the module is in its evaluation mode. What else the module
        keeps, such as running means, stays as it was: what a call changes in it is lost.
    """
    graph, state, rest = nnx.split(module, nnx.Param, ...)

    def apply(
        params: Params,
        *inputs: Array,
        rngs: Mapping[str, Key] | None = None,
        **condition: Array,
    ) -> Any:
        # A state of its own for each call: it is filled in place.
        filled = nnx.clone(state)
        nnx.replace_by_pure_dict(filled, params)
        model = nnx.merge(graph, filled, rest, copy=True)
        if rngs is None:
            model.eval()
        else:
            model.train()
            # Modules whose random streams were not told apart have one called "default".
            keys: dict[str, Any] = {"default": jax.random.fold_in(rngs["dropout"], 1), **rngs}
            nnx.reseed(model, **keys)
        return model(*inputs, **condition)

    return apply, nnx.to_pure_dict(state)
