"""The step protocol, and the one loop that takes steps.

A sampler is a `Step`: how to get from x_t to x_s. It is a pytree, so its numbers can be swept
without compiling anew, and it carries whatever it remembers (a multistep history, say) in an
explicit state. `sample` scans it over a time grid in one compiled program.
"""

from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdiff import grids
from jaxdiff.compile import jit
from jaxdiff.processes.base import Denoiser, example_keys
from jaxdiff.typing import Grid, Key, State, Time

__all__ = ["Step", "StepState", "sample"]

StepState = Any
"""What a step remembers: a pytree of arrays, fixed in structure and shape."""


@runtime_checkable
class Step(Protocol):
    """One step of a sampler, on a batch of states that share their time."""

    def init(self, x: State) -> StepState:
        """What is remembered before the first step."""
        ...

    def update(
        self, key: Key, x: State, state: StepState, t: Time, s: Time, denoise: Denoiser
    ) -> tuple[State, StepState]:
        """Takes x [b, …] from time t to s < t, with one key an example [b]."""
        ...


def sample(
    step: Step,
    denoise: Denoiser,
    grid: Grid,
    key: Key,
    x: Float[Array, "b ..."],
    *,
    trajectory: bool = False,
) -> Array:
    """Samples by stepping down a time grid, in one compiled scan.

    Example i draws all its noise from `fold_in(key, i)`, so it does not depend on the batch around
    it. Calls with new keys, weights or hyper-parameters reuse the compiled program, if `step` and
    `denoise` are pytrees (all of the library's are) or the same functions.

    Args:
        step: the sampler, such as `DDIM(process)`.
        denoise: (x [b, …], t) ↦ moments of x_0.
        grid: [n + 1] decreasing times in [0, 1].
        key: one key, or one an example [b].
        x: [b, …] states at grid[0], usually drawn from the prior.
        trajectory: whether to return the states at all times of the grid.

    Returns:
        [b, …] states at grid[-1]; with `trajectory`, [n + 1, b, …] states from x on.

    Raises:
        ValueError: if the grid does not fall strictly within [0, 1].
    """
    grid = jnp.asarray(grid)
    grids.check(grid)
    return _sample(step, denoise, grid, example_keys(key, x.shape[0]), x, trajectory=trajectory)


@jit
def _sample(step, denoise, grid, keys, x, *, trajectory):
    def advance(carry, point):
        x, state = carry
        index, t, s = point
        step_keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, index)
        x, state = step.update(step_keys, x, state, t, s, denoise)
        return (x, state), (x if trajectory else None)

    points = (jnp.arange(grid.shape[0] - 1), grid[:-1], grid[1:])
    (last, _), passed = jax.lax.scan(advance, (x, step.init(x)), points)
    return last if passed is None else jnp.concatenate([x[None], passed])
