"""What the objectives share."""

from typing import Any

import jax

from jaxdiff.processes.base import example_indices
from jaxdiff.typing import Batch, Key

__all__ = ["named"]


def named(batch: Batch, key: Key, dropout: bool) -> dict[str, Any]:
    """What a network is given by name: all of the batch but "x", and a key if it has dropout.

    Args:
        batch: the batch.
        key: of the dropout; each shard of a `shard_map` or `pmap` over "data" has one of its own.
        dropout: whether to hand it on, as `rngs={"dropout": key}`.
    """
    shard, shards = example_indices(1)
    if shards > 1:
        key = jax.random.fold_in(key, shard[0])
    condition = {name: array for name, array in batch.items() if name != "x"}
    return condition | ({"rngs": {"dropout": key}} if dropout else {})
