"""One `jit` for functions whose arguments mix arrays, numbers and functions."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp

__all__ = ["jit"]

P = ParamSpec("P")
R = TypeVar("R")


def jit(function: Callable[P, R]) -> Callable[P, R]:
    """`jax.jit` for a function of processes, denoisers, steps and solvers.

    Positional arguments are data: their arrays and floating-point numbers are traced, so that no
    sweep over them compiles anew; functions among them are compared by identity. Keyword arguments
    are options: arrays are traced, all else is compiled in.
    """
    compiled = eqx.filter_jit(function)

    @functools.wraps(function)
    def call(*args, **options):
        traced = jax.tree.map(
            lambda leaf: jnp.asarray(leaf) if isinstance(leaf, float) else leaf, args
        )
        return compiled(*traced, **options)

    return call
