"""What a forward process is: a family of exact conditionals.

A process offers a prior p(x_1), a marginal q(x_t | x_0) and a posterior q(x_s | x_t, x_0). A
network, whatever it predicts, becomes a `Denoiser`: it returns the moments of p(x_0 | x_t). From
these two everything else of a diffusion model is derived, once, for all processes:

    score            ∇ log p_t(x)  =  marginal(E[x_0 | x], t).score(x)            (Tweedie)
    noise            ε(x, t)       =  marginal(E[x_0 | x], t).noise(x)
    ancestral step   x_s           ~  posterior(x, E[x_0 | x], t, s)
    velocity         dx/dt         =  f − ½ g² score, in the form that the process knows best
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxdiff.distributions import Distribution, GaussianDistribution
from jaxdiff.typing import Data, Key, Scalar, State, Time

__all__ = [
    "SDE",
    "Augmented",
    "Denoised",
    "Denoiser",
    "Process",
    "along",
    "example_indices",
    "example_keys",
    "noise_rate",
    "of_whole_batch",
    "score",
]


T = TypeVar("T")


class Denoised(NamedTuple):
    """The moments of p(x_0 | x_t).

    Attributes:
        mean: E[x_0 | x_t], of the shape of the data.
        var: Var[x_0 | x_t], a scalar or of the shape of `mean`; 0 treats x_0 as known.
    """

    mean: Data
    var: Scalar = 0.0

    @property
    def axes(self) -> "Denoised":
        """The `in_axes` that map over a batch of these: a scalar variance is shared."""
        return Denoised(0, 0 if jnp.ndim(self.var) else None)  # pyright: ignore[reportArgumentType]


Denoiser = Callable[[State, Time], Denoised]
"""A batch of states [b, …] and one time ↦ the moments of their x_0, [b, …]."""


@runtime_checkable
class Process(Protocol):
    """A family of conditionals; every method is for one example and a scalar time."""

    def prior(self, shape: tuple[int, ...]) -> Distribution:
        """p(x_1), from which sampling starts."""
        ...

    def marginal(self, x0: Data, t: Time) -> Distribution:
        """q(x_t | x_0)."""
        ...

    def posterior(self, x: State, x0: Denoised, t: Time, s: Time) -> Distribution:
        """q(x_s | x_t, x_0) for s < t, averaged over the given uncertainty of x_0."""
        ...


@runtime_checkable
class SDE(Protocol):
    """A process dx = f(x, t) dt + g(t) dw, whose conditionals are Gaussian."""

    def prior(self, shape: tuple[int, ...]) -> GaussianDistribution:
        """p(x_1), from which sampling starts."""
        ...

    def marginal(self, x0: Data, t: Time) -> GaussianDistribution:
        """q(x_t | x_0)."""
        ...

    def drift(self, x: State, t: Time) -> State:
        """f(x, t)."""
        ...

    def diffusion(self, t: Time) -> Float[Array, "..."]:
        """g(t): a scalar, or an array whose axes are the first axes of a state."""
        ...

    def velocity(self, x: State, x0: Float[Array, "..."], t: Time) -> State:
        """dx/dt = f − ½ g² ∇ log p_t(x) of the probability flow, where E[x_0 | x] = x0."""
        ...


@runtime_checkable
class Augmented(SDE, Protocol):
    """An SDE whose states [2, …] are the data and a velocity."""

    def added(self, x0: Float[Array, "..."], t: Time) -> Distribution:
        """The law of the velocity, q(v_t | x_0), for one point of data."""
        ...


def score(process: SDE, x: State, x0: Float[Array, "..."], t: Time) -> State:
    """∇ₓ log p_t(x) of one state, from its denoised mean (Tweedie's formula).

    References: Efron 2011, doi:10.1198/jasa.2011.tm11181, eq. 2.8.
    """
    return process.marginal(x0, t).score(x)


def along(g: Float[Array, "..."], x: Float[Array, "..."]) -> Float[Array, "..."]:
    """A diffusion g(t) with axes of length 1 after its own, so that it multiplies a state x."""
    return g.reshape(g.shape + (1,) * (x.ndim - g.ndim))


def noise_rate(process: SDE, t: Time) -> Float[Array, "..."]:
    """g(t), or 0 where it is infinite, as it is at α = 0.

    There the reverse SDE has no drift to go by, but the probability flow has, with the same
    marginals: so that is followed for an instant.
    """
    g = process.diffusion(t)
    return jnp.where(jnp.isfinite(g), g, 0.0)


def example_indices(count: int) -> tuple[Int[Array, "count"], int]:
    """The places of a function's examples in the whole batch, and the size of that.

    Under a `shard_map` or `pmap` over the axis "data" a function sees the examples of one shard.
    Noise that is keyed by these indices is then that of the whole batch on one device.

    Args:
        count: number of examples that the function sees.

    Returns:
        ([count] indices, size of the whole batch).
    """
    try:
        shard, shards = jax.lax.axis_index("data"), jax.lax.axis_size("data")
    except NameError:  # no such axis: the batch is whole
        return jnp.arange(count), count
    return shard * count + jnp.arange(count), shards * count


def of_whole_batch(draw: Callable[[int], T], count: int) -> T:
    """What a shard has of numbers drawn for the whole batch; see `example_indices`.

    Args:
        draw: size of the whole batch ↦ a tree of arrays [size, …].
        count: number of examples that the calling function sees.

    Returns:
        The tree of arrays [count, …].
    """
    index, total = example_indices(count)
    drawn = draw(total)
    return drawn if total == count else jax.tree.map(lambda array: array[index], drawn)


def example_keys(key: Key, count: int) -> Key:
    """One key an example: `fold_in(key, index)`, whatever the batch is split into.

    The indices are those of `example_indices`.

    Args:
        key: one key, or already one an example [count], which is returned as it is: so a caller
            who works in chunks folds in the global indices.
        count: number of examples.

    Returns:
        [count] keys.

    Raises:
        ValueError: if `key` holds a number of keys other than one or `count`.
    """
    single = 0 if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else 1
    if key.ndim == single:
        index, _ = example_indices(count)
        return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, index)
    if key.shape[0] != count:
        raise ValueError(f"key holds {key.shape[0]} keys for a batch of {count}; give one or all.")
    return key
