"""What the objectives share."""

from typing import Any

from jaxdiff.typing import Batch, Key

__all__ = ["named"]


def named(batch: Batch, key: Key, dropout: bool) -> dict[str, Any]:
    """What a network is given by name: all of the batch but "x", and a key if it has dropout.

    Args:
        batch: the batch.
        key: of the dropout.
        dropout: whether to hand it on, as `rngs={"dropout": key}`.
    """
    condition = {name: array for name, array in batch.items() if name != "x"}
    return condition | ({"rngs": {"dropout": key}} if dropout else {})
