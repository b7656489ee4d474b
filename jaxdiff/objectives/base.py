"""What the objectives share."""

import contextlib
from typing import Any

import jax

from jaxdiff.typing import Batch, Key

__all__ = ["named"]


def named(batch: Batch, key: Key, dropout: bool) -> dict[str, Any]:
    """What a network is given by name: all of the batch but "x", and a key if it has dropout.

    Args:
        batch: the batch.
        key: of the dropout; each shard of a `shard_map` or `pmap` over "data" has one of its own.
        dropout: whether to hand it on, as `rngs={"dropout": key}`.
    """
    with contextlib.suppress(NameError):  # no such axis: the batch is whole
        key = jax.random.fold_in(key, jax.lax.axis_index("data"))
    condition = {name: array for name, array in batch.items() if name != "x"}
    return condition | ({"rngs": {"dropout": key}} if dropout else {})
