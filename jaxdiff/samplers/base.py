"""The step protocol, and the one loop that takes steps.

A sampler is a `Step`: how to get from x_t to x_s. It is a pytree, so its numbers can be swept
without compiling anew, and it carries whatever it remembers (a multistep history, say) in an
explicit state. `sample` scans it over a time grid in one compiled program.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol, overload, runtime_checkable

import equinox.internal as eqxi
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdiff import grids
from jaxdiff.compile import jit
from jaxdiff.processes.base import Denoised, Denoiser, example_keys
from jaxdiff.typing import Grid, Key, State, Time

__all__ = ["Step", "StepState", "repeat", "run", "sample"]

StepState = Any
"""What a step remembers: a pytree of arrays, fixed in structure and shape."""

Progress = Callable[[Array, Array], Any]
"""(index of a step, number of steps) ↦ anything, called on the host."""


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


@overload
def sample(
    step: Step,
    denoise: Denoiser,
    grid: Grid,
    key: Key,
    x: Float[Array, "b ..."],
    *,
    trajectory: bool = ...,
    x0_hats: Literal[False] = ...,
    final_denoise: bool = ...,
    progress: Progress | None = ...,
    checkpoints: int | None = ...,
) -> Array: ...


@overload
def sample(
    step: Step,
    denoise: Denoiser,
    grid: Grid,
    key: Key,
    x: Float[Array, "b ..."],
    *,
    trajectory: bool = ...,
    x0_hats: Literal[True],
    final_denoise: bool = ...,
    progress: Progress | None = ...,
    checkpoints: int | None = ...,
) -> tuple[Array, Array]: ...


def sample(
    step: Step,
    denoise: Denoiser,
    grid: Grid,
    key: Key,
    x: Float[Array, "b ..."],
    *,
    trajectory: bool = False,
    x0_hats: bool = False,
    final_denoise: bool = False,
    progress: Progress | None = None,
    checkpoints: int | None = None,
) -> Array | tuple[Array, Array]:
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
        x0_hats: whether to return x̂_0 at the start of every step, too. That costs no network call
            for a sampler which begins with `denoise(x, t)`, and one a step for others.
        final_denoise: whether to return x̂_0 at grid[-1] for the last state, by one more network
            call. A grid that ends at σ = 0 does so anyway.
        progress: called on the host as progress(step index, number of steps) before each step. The
            same function compiles nothing anew.
        checkpoints: None stores every step for a gradient of the result. A number ≥ 1 stores at
            most so many states and recomputes the rest, in memory that does not grow with the
            steps; it rules out forward-mode derivatives.

    Returns:
        [b, …] states at grid[-1]; with `trajectory`, [n + 1, b, …] states from x on. With
        `x0_hats`, a pair of that and the [n, b, …] denoised means.

    Raises:
        ValueError: if the grid does not fall strictly within [0, 1], or checkpoints < 1.
    """
    grid = jnp.asarray(grid)
    grids.check(grid)
    if checkpoints is not None and checkpoints < 1:
        raise ValueError(f"checkpoints must be at least 1, or None, got {checkpoints}.")
    last, _, passed = _scan(
        step,
        denoise,
        grid,
        example_keys(key, x.shape[0]),
        x,
        options=_Options(trajectory, x0_hats, final_denoise, progress, checkpoints),
    )
    states = last if passed.x is None else jnp.concatenate([x[None], passed.x[:-1], last[None]])
    return states if passed.x0 is None else (states, passed.x0)


def run(
    step: Step, denoise: Denoiser, grid: Grid, key: Key, x: Float[Array, "b ..."]
) -> tuple[State, StepState]:
    """Like `sample`, and also returns what the step remembers at the end.

    For steps that gather something along the grid, such as the terms of a bound, and for those that
    climb it: times may rise here, and are not checked.
    """
    grid = jnp.asarray(grid)
    keys = example_keys(key, x.shape[0])
    return _scan(step, denoise, grid, keys, x, options=_Options())[:2]


def repeat(count: int, body: Callable[[Array, State], State], x: State) -> State:
    """Applies body(index, x) `count` times: the inner loop of a step, compiled once."""
    return jax.lax.fori_loop(0, count, body, x)


class _Options(NamedTuple):
    trajectory: bool = False
    x0_hats: bool = False
    final_denoise: bool = False
    progress: Progress | None = None
    checkpoints: int | None = None


class _Passed(NamedTuple):
    """What a step leaves behind."""

    x: Array | None
    x0: Array | None


class _Known(NamedTuple):
    """A denoiser whose answer at one point has been computed."""

    denoise: Denoiser
    x: Array
    t: Array
    answer: Denoised

    def __call__(self, x: Array, t: Array) -> Denoised:
        return self.answer if x is self.x and t is self.t else self.denoise(x, t)


@jit
def _scan(step, denoise, grid, keys, x, *, options):
    steps = grid.shape[0] - 1

    def advance(carry, point):
        x, state = carry
        index, t, s = point
        if options.progress is not None:
            jax.debug.callback(options.progress, index, steps)
        known = denoise
        if options.x0_hats:
            known = _Known(denoise, x, t, denoise(x, t))
        step_keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, index)
        y, state = step.update(step_keys, x, state, t, s, known)
        x0 = known.answer.mean if isinstance(known, _Known) else None
        return (y, state), _Passed(y if options.trajectory else None, x0)

    points = (jnp.arange(steps), grid[:-1], grid[1:])
    (last, state), passed = eqxi.scan(
        advance,
        (x, step.init(x)),
        points,
        kind="lax" if options.checkpoints is None else "checkpointed",
        checkpoints=options.checkpoints,
    )
    if options.final_denoise:
        last = denoise(last, grid[-1]).mean
    return last, state, passed
