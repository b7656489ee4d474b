"""One `jit` for functions whose arguments mix arrays, numbers and functions."""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp

__all__ = ["jit"]

P = ParamSpec("P")
R = TypeVar("R")


def jit(function: Callable[P, R]) -> Callable[P, R]:
    """`jax.jit` for a function of processes, denoisers, steps and solvers.

    Positional arguments are data: their arrays and numbers are traced (integers as floating-point
    ones), so that no sweep over them compiles anew; functions among them are compared by identity.
    Keyword arguments are options: arrays are traced, all else is compiled in.
    """
    compiled = eqx.filter_jit(function)

    @functools.wraps(function)
    def call(*args, **options):
        traced = jax.tree.map(_traced, args)
        return compiled(*traced, **options)

    return call


def _traced(leaf: Any) -> Any:
    is_number = isinstance(leaf, int | float) and not isinstance(leaf, bool)
    return jnp.asarray(float(leaf)) if is_number else leaf
