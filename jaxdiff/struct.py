"""Frozen dataclasses as pytrees, told apart by their type.

JAX's `register_dataclass`, and `flax.struct.dataclass` on top of it, make tree structures of two
*different* classes with equally many leaves compare equal (seen with JAX 0.10.2 and 0.12.0): a
compiled function given a linear-β process can then answer with a cosine one's program. Classes
registered as custom nodes compare by type, so this library registers its own.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar, dataclass_transform

import jax
import numpy as np
from jax.core import Tracer

__all__ = ["as_pytree", "dataclass", "field", "require"]

T = TypeVar("T")


def field(*, pytree_node: bool = True, **options: Any) -> Any:
    """A dataclass field; with `pytree_node=False` it is compiled in and compared, not traced."""
    return dataclasses.field(metadata={"pytree_node": pytree_node}, **options)


@dataclass_transform(frozen_default=True, field_specifiers=(field, dataclasses.field))
def dataclass(cls: type[T]) -> type[T]:
    """Makes a class a frozen dataclass and a pytree of its fields.

    Args:
        cls: the class; its fields are leaves or subtrees unless `field(pytree_node=False)`.

    Returns:
        The dataclass, compared by identity, so that arrays in it need no truth value.
    """
    frozen: Any = dataclasses.dataclass(frozen=True, eq=False)(cls)
    names = [(f.name, f.metadata.get("pytree_node", True)) for f in dataclasses.fields(frozen)]
    data = tuple(name for name, is_data in names if is_data)
    meta = tuple(name for name, is_data in names if not is_data)

    def flatten_with_keys(node: Any):
        children = [(jax.tree_util.GetAttrKey(name), getattr(node, name)) for name in data]
        return children, tuple(getattr(node, name) for name in meta)

    def flatten(node: Any):
        return [getattr(node, name) for name in data], tuple(getattr(node, name) for name in meta)

    def unflatten(values: Any, children: Any):
        # Past __init__: JAX also rebuilds trees of things that are no numbers.
        node = object.__new__(frozen)
        for name, value in zip(data + meta, (*children, *values), strict=True):
            object.__setattr__(node, name, value)
        return node

    jax.tree_util.register_pytree_with_keys(frozen, flatten_with_keys, unflatten, flatten)
    return frozen


def as_pytree(function: Callable[..., Any]) -> Callable[..., Any]:
    """A plain function as a tree without leaves; a pytree as it is."""
    is_leaf = jax.tree_util.all_leaves([function])
    return jax.tree_util.Partial(function) if is_leaf else function


def require(holds: Any, message: str) -> None:
    """Checks a number, or an array of them, when an object is made from it.

    Under a trace nothing is known, and nothing checked.

    Raises:
        ValueError: with the message, unless everything in `holds` is true.
    """
    if not isinstance(holds, Tracer) and not np.all(holds):
        raise ValueError(message)
