"""Continuous-time sampling and encoding: everything that diffrax solves.

With the denoised mean x̂_0(x, t) of every state known, two equations use it:

    probability flow   dx/dt = v(x, t) = f − ½ g² s
    reverse SDE        dx    = (v − ½ η² g² s) dt + η g dw̄

with s the score and η the amount of noise: η = 1 is Anderson's reverse SDE, η = 0 the flow. All
have the same marginals. (`jaxdiff.likelihood` adds the flow's change of volume.)

Time in diffrax always increases. diffrax's stochastic Runge–Kutta solvers ignore the sign of a
negative step, and give wrong samples without an error; so whatever runs from t = 1 to t = 0 is
solved on the clock τ = −t, which also keeps every digit of a small t.

Where noise sets in at once, as in a variance-preserving process, σ grows with √t, and a network's
error in ε makes the flow's velocity a multiple of t^−½ there. Solvers that choose their steps would
crawl through that pole; on the clock τ = ±√t there is none.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import lineax
from jaxtyping import Array, Float, Int

from jaxdiff import grids, struct
from jaxdiff.compile import jit
from jaxdiff.processes.base import SDE, Denoiser, along, example_keys, noise_rate, score
from jaxdiff.processes.gaussian import Gaussian
from jaxdiff.typing import Grid, Key, Scalar, State, Time

__all__ = [
    "Clock",
    "Flow",
    "Solution",
    "adaptive",
    "as_time",
    "check_countable",
    "clock_of",
    "integrate",
    "one_by_one",
    "probability_flow",
    "reverse_sde",
    "underdamped_langevin",
]


class Flow(NamedTuple):
    """A solution, of the probability-flow ODE or of the reverse SDE.

    Attributes:
        x: [b, …] states at the end, or [n, b, …] states at the times asked for.
        num_evaluations: calls of the denoiser, exact; with steps per example, [b] of them.
    """

    x: State
    num_evaluations: Int[Array, "..."]


def reverse_sde(
    process: SDE,
    denoise: Denoiser,
    key: Key,
    x: Float[Array, "b ..."],
    grid: Grid,
    *,
    solver: diffrax.AbstractSolver | None = None,
    eta: Scalar | Callable[[Time], Scalar] = 1.0,
    controller: diffrax.AbstractStepSizeController | None = None,
    path_tolerance: float | None = None,
    max_steps: int = 4096,
    trajectory: bool = False,
    final_denoise: bool = False,
    evaluations: bool = False,
    adjoint: diffrax.AbstractAdjoint | None = None,
    progress: diffrax.AbstractProgressMeter | None = None,
    throw: bool = True,
) -> State | Flow:
    """Samples by solving the reverse-time SDE.

    dx = (v − ½ η² g² s) dt + η g dw̄, in one compiled program, in steps that are either those of
    the grid or chosen by a controller.

    Args:
        process: the forward process.
        denoise: (x [b, …], t) ↦ moments of x_0.
        key: one key, or one an example [b].
        x: [b, …] states at grid[0].
        grid: [n + 1] decreasing times. End it above 0 where σ(0) = 0 and the solver evaluates the
            end of its steps: all but `Euler` do.
        solver: a diffrax SDE solver; by default `Euler`, that is Euler–Maruyama, one call a step.
            `ShARK` (two calls) does better on a grid, `SPaRK` (three) with adaptive steps. The
            noise is additive, so Itô and Stratonovich agree, and Milstein's method is Euler's:
            diffrax's `ItoMilstein` only takes more memory.
        eta: noise, ≥ 0: 1 is the reverse SDE, 0 the probability flow; marginals are the same, also
            with a function of t (a switch from SDE to ODE, a window of noise). The number 0 is
            compiled as a program of its own, without noise.
        controller: None for the steps of the grid; else a step-size controller, `adaptive(0.03)`
            say, that chooses its own between the grid's ends.
        path_tolerance: resolution of the Brownian path, in units of t. None draws fresh increments
            for the steps of a grid, which is cheapest. With a number the path belongs to the key
            alone, and finer grids or tolerances see the same one; keep it below the steps. With a
            controller it defaults to 2⁻¹² of the time span.
        max_steps: solver steps after which to give up, with a controller.
        trajectory: whether to return the states at all times of the grid.
        final_denoise: whether to return x̂_0 at grid[-1], by one more network call.
        evaluations: whether to count the network's calls.
        adjoint: how diffrax takes a gradient in reverse; by default `RecursiveCheckpointAdjoint()`,
            whose memory grows with the logarithm of the steps. `checkpoints=k` bounds it.
            `BacksolveAdjoint(stepsize_controller=diffrax.StepTo(-grid[::-1]))` stores nothing; it
            wants a `path_tolerance` and a solver of one term, such as `Heun`.
        progress: one of diffrax's progress meters, `TqdmProgressMeter()` say.
        throw: whether the host raises an error where the solver gave up. If not, the states are NaN
            then; and steps on a grid without a `path_tolerance` need no host at all, so that they
            can be exported.

    Returns:
        [b, …] states at grid[-1], or [n + 1, b, …]; with `evaluations`, a `Flow` of them and the
        count.

    Raises:
        ValueError: if the grid does not fall strictly within [0, 1], eta < 0, path_tolerance ≤ 0,
            or calls cannot be counted.
        RuntimeError: if the solver needed more than `max_steps` steps, with `throw`.

    References: Anderson 1982, doi:10.1016/0304-4149(82)90051-5; Song et al. 2021,
        arXiv:2011.13456, eq. 6; Zhang and Chen 2022, arXiv:2204.13902 (the family in η); Karras et
        al. 2022, arXiv:2206.00364, appendix B.5 (η as a function of t).
    """
    grid = jnp.asarray(grid)
    grids.check(grid)
    if not callable(eta):
        struct.require(eta >= 0.0, f"eta must be at least 0, got {eta}.")
    if path_tolerance is not None and not path_tolerance > 0.0:
        raise ValueError(f"path_tolerance must be positive, got {path_tolerance}.")
    keys = example_keys(key, x.shape[0])
    solver = diffrax.Euler() if solver is None else solver
    if evaluations:
        check_countable(solver)
    on_grid = diffrax.StepTo if throw else _OnGrid
    options = {
        "controller": on_grid(-grid) if controller is None else controller,
        "max_steps": grid.shape[0] - 1 if controller is None else max_steps,
        "final_denoise": final_denoise,
        "adjoint": adjoint,
        "progress": progress,
        "throw": throw,
    }
    if isinstance(eta, int | float) and eta == 0 and _solves_odes(solver):
        # Without noise this is the flow, to the last bit.
        times = grid if trajectory else None
        solution = _probability_flow(
            process, denoise, x, grid[0], grid[-1], times, solver=solver, **options
        )
    else:
        resolution: Scalar | None = path_tolerance
        if resolution is None and _chooses(controller):
            resolution = 2.0**-12 * (grid[0] - grid[-1])
        solution = _reverse_sde(
            process,
            denoise,
            keys,
            x,
            grid,
            eta if callable(eta) else jnp.asarray(eta),
            solver=solver,
            path_tolerance=resolution,
            trajectory=trajectory,
            **options,
        )
    return solution if evaluations else solution.x


def probability_flow(
    process: SDE,
    denoise: Denoiser,
    x: Float[Array, "b ..."],
    t0: Scalar,
    t1: Scalar,
    *,
    solver: diffrax.AbstractSolver | None = None,
    controller: diffrax.AbstractStepSizeController | None = None,
    per_example: bool = False,
    times: Float[Array, "n"] | None = None,
    final_denoise: bool = False,
    max_steps: int = 4096,
    evaluations: bool = False,
    adjoint: diffrax.AbstractAdjoint | None = None,
    progress: diffrax.AbstractProgressMeter | None = None,
    throw: bool = True,
) -> State | Flow:
    """Carries states along the probability-flow ODE, in either direction.

    dx/dt = f − ½ g² ∇ log p_t(x): from 1 down it samples, from 0 up it encodes.

    Args:
        process: the forward process.
        denoise: (x [b, …], t) ↦ moments of x_0.
        x: [b, …] states at t0.
        t0: start, in [0, 1].
        t1: end, in [0, 1]. Keep both above 0 where σ(0) = 0.
        solver: a diffrax ODE solver; by default `Dopri5`.
        controller: a diffrax step-size controller; by default adaptive with relative and absolute
            tolerance 1e-4, in the norm of the worst example, on the clock of `clock_of`. One that
            names times or lengths of steps (`StepTo`, `ClipStepSizeController`) names them on the
            increasing clock τ = t, or τ = −t if t1 < t0.
        per_example: whether each example chooses its own steps: its result then does not depend on
            the batch around it at all, at the cost of waiting for the slowest.
        times: [n] times from t0 towards t1 at which to return the states, by dense output.
        final_denoise: whether to return x̂_0 for the last state, by one more network call.
        max_steps: solver steps after which to give up.
        evaluations: whether to count the network's calls, for explicit Runge–Kutta solvers.
        adjoint: how diffrax takes a gradient in reverse; by default `RecursiveCheckpointAdjoint()`,
            whose memory grows with the logarithm of the steps. `checkpoints=k` bounds it;
            `BacksolveAdjoint()` stores nothing, and solves the flow backwards instead.
        progress: one of diffrax's progress meters, `TqdmProgressMeter()` say.
        throw: whether the host raises an error where the solver gave up. If not, the states are NaN
            then; and without `times` no host is needed at all, so that the flow can be exported.

    Returns:
        [b, …] states at t1, or [n, b, …] at `times`; with `evaluations`, a `Flow` of states and
        count.

    Raises:
        ValueError: if a time lies outside [0, 1], or calls cannot be counted.
        RuntimeError: if the solver needed more than `max_steps` steps, with `throw`.

    References: Song et al. 2021, arXiv:2011.13456, eq. 13.
    """
    t0, t1 = as_time("t0", t0), as_time("t1", t1)
    solver = diffrax.Dopri5() if solver is None else solver
    controller = adaptive(1e-4) if controller is None else controller
    if evaluations:
        check_countable(solver)
    flow = _probability_flow if not per_example else _flow_per_example
    solution = flow(
        process,
        denoise,
        x,
        t0,
        t1,
        times,
        solver=solver,
        controller=controller,
        final_denoise=final_denoise,
        max_steps=max_steps,
        adjoint=adjoint,
        progress=progress,
        throw=throw,
    )
    return solution if evaluations else solution.x


def underdamped_langevin(
    process: Gaussian,
    denoise: Denoiser,
    key: Key,
    x: Float[Array, "b ..."],
    t: Scalar,
    *,
    steps: int = 10,
    step_size: Scalar = 0.5,
    friction: Scalar = 2.0,
    solver: diffrax.AbstractSolver | None = None,
) -> State:
    """Moves states about within p_t, by Langevin dynamics with momentum, at a fixed time.

    In units of the noise's standard deviation σ(t),

        dx = σ v dτ,    dv = (σ ∇log p_t(x) − γ v) dτ + √(2γ) dw,

    whose stationary law is p_t(x) N(v; 0, I). It corrects errors of the marginal in fewer network
    calls than Langevin dynamics without momentum.

    Args:
        process: the forward process.
        denoise: (x [b, …], t) ↦ moments of x_0.
        key: one key, or one an example [b].
        x: [b, …] states; the velocities are drawn.
        t: the time, with σ(t) > 0.
        steps: number of steps, ≥ 1.
        step_size: of τ, > 0; about 1 crosses the noise's own width.
        friction: γ > 0; 2 is critical for a Gaussian p_t.
        solver: one of diffrax's underdamped Langevin solvers; by default `ALIGN`, with steps + 1
            network calls; `ShOULD` takes 2 steps + 1, `QUICSORT` 2 steps.

    Returns:
        [b, …] states, of the same law where x was of p_t.

    Raises:
        ValueError: if steps < 1 or a number is not positive.

    References: Foster, Lyons and Oberhauser 2021, arXiv:2101.03446 (the solvers); Dockhorn, Vahdat
        and Kreis 2022, arXiv:2112.07068, eq. 1 (the dynamics).
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}.")
    for name, value in (("step_size", step_size), ("friction", friction)):
        struct.require(value > 0.0, f"{name} must be positive, got {value}.")
    keys = example_keys(key, x.shape[0])
    solver = diffrax.ALIGN() if solver is None else solver
    return _underdamped(
        process, denoise, keys, x, as_time("t", t), step_size, friction, steps=steps, solver=solver
    )


def adaptive(tolerance: Scalar) -> diffrax.PIDController:
    """Adaptive steps that keep the error of the *worst* example of a batch at a tolerance.

    diffrax's own norm averages over the batch, where one example's error hides among the others'.
    The steps heed the error before the last one, too (a PI controller): on trained networks that
    halves the calls to an error, against those that heed the last alone.

    Args:
        tolerance: relative and absolute, > 0.

    Raises:
        ValueError: unless tolerance > 0.
    """
    struct.require(tolerance > 0.0, f"tolerance must be positive, got {tolerance}.")
    return diffrax.PIDController(
        rtol=tolerance, atol=tolerance, pcoeff=0.4, icoeff=0.3, norm=_worst_example
    )


def _flow_field(process: SDE, denoise: Denoiser, t: Time, x: Array) -> Array:
    """The velocity of a batch."""
    x0 = denoise(x, t).mean
    return jax.vmap(lambda x, x0: process.velocity(x, x0, t))(x, x0)


@jit
def _reverse_sde(
    process,
    denoise,
    keys,
    x,
    grid,
    eta,
    *,
    solver,
    controller,
    path_tolerance,
    max_steps,
    trajectory,
    final_denoise,
    adjoint,
    progress,
    throw,
):
    def noise_level(eta: Any, process, t):
        scale: Any = eta(t) if callable(eta) else eta
        return scale * noise_rate(process, t)

    def drift(clock, x, args):
        process, denoise, eta = args
        t = -clock
        g = noise_level(eta, process, t)
        x0 = denoise(x, t).mean

        def backwards(x, x0):
            pull = score(process, x, x0, t)
            return 0.5 * along(g, x) ** 2 * pull - process.velocity(x, x0, t)

        return jax.vmap(backwards)(x, x0)

    def diffusion(clock, x, args):
        process, _, eta = args
        g = noise_level(eta, process, -clock)
        scale = jax.vmap(lambda x: jnp.broadcast_to(along(g, x), x.shape))(x)
        return lineax.DiagonalLinearOperator(scale.astype(x.dtype))

    shape = jax.ShapeDtypeStruct(x.shape[1:], x.dtype)
    if path_tolerance is None:
        noise = _FreshNoise(keys=keys, shape=shape, levy_area=_levy_area(solver))
    else:
        noise = _TreeNoise(
            keys=keys,
            shape=shape,
            # Of one kind for all solvers, so that all of them see one path.
            levy_area=diffrax.SpaceTimeLevyArea,
            t0=-grid[0],
            t1=-grid[-1],
            tolerance=path_tolerance,
        )
    solution = integrate(
        diffrax.MultiTerm(diffrax.ODETerm(drift), diffrax.ControlTerm(diffusion, noise)),
        x,
        -grid[0],
        -grid[-1],
        (process, denoise, eta),
        times=-grid if trajectory else None,
        solver=solver,
        controller=controller,
        max_steps=max_steps,
        adjoint=adjoint,
        progress=progress,
        throw=throw,
    )
    return _finish(denoise, solution, grid[-1], final_denoise, trajectory=trajectory)


@jit
def _probability_flow(
    process,
    denoise,
    x,
    t0,
    t1,
    times,
    *,
    solver,
    controller,
    max_steps,
    final_denoise,
    adjoint,
    progress,
    throw,
):
    clock = clock_of(process, t0, t1, controller)

    def field(tau, x, args):
        process, denoise, clock = args
        return clock.rate(tau) * _flow_field(process, denoise, clock.time(tau), x)

    solution = integrate(
        diffrax.ODETerm(field),
        x,
        clock.of(t0),
        clock.of(t1),
        (process, denoise, clock),
        times=None if times is None else clock.of(times),
        solver=solver,
        controller=controller,
        max_steps=max_steps,
        adjoint=adjoint,
        progress=progress,
        throw=throw,
    )
    last = t1 if times is None else times[-1]
    return _finish(denoise, solution, last, final_denoise, trajectory=times is not None)


@jit
def _flow_per_example(process, denoise, x, t0, t1, times, **options):
    def one(denoise, x):
        flow = _probability_flow(process, denoise, x, t0, t1, times, **options)
        return Flow(jnp.squeeze(flow.x, 0 if times is None else 1), flow.num_evaluations)

    return one_by_one(one, denoise, x, out_axes=Flow(0 if times is None else 1, 0))  # pyright: ignore[reportArgumentType]


@jit
def _underdamped(process, denoise, keys, x, t, step_size, friction, *, steps, solver):
    _, sigma = process.schedule(t)

    def force(x, args):
        process, denoise, t = args
        x0 = denoise(x, t).mean
        return -jax.vmap(lambda x, x0: score(process, x, x0, t))(x, x0)

    shape = jax.ShapeDtypeStruct(x.shape[1:], x.dtype)
    own = jax.vmap(jax.random.split)(keys)
    speed = jax.vmap(lambda key: jax.random.normal(key, shape.shape, shape.dtype))(own[:, 0])
    noise = _FreshNoise(keys=own[:, 1], shape=shape, levy_area=_levy_area(solver))
    solution = diffrax.diffeqsolve(
        diffrax.MultiTerm(
            diffrax.UnderdampedLangevinDriftTerm(friction, sigma**2, force),
            diffrax.UnderdampedLangevinDiffusionTerm(friction, sigma**2, noise),
        ),
        solver,
        0.0,
        steps * step_size,
        step_size,
        (x, sigma * speed),
        (process, denoise, t),
        max_steps=steps + 1,
    )
    assert solution.ys is not None
    return solution.ys[0][-1]


def one_by_one(
    function: Callable[..., Any], denoise: Denoiser, *parts: Any, out_axes: Any = 0
) -> Any:
    """Maps a function of batches over examples, each a batch of one.

    What a denoiser is conditioned on belongs to the examples, all else of it to all of them.

    Args:
        function: (denoise, *parts [1, …]) ↦ the results of one example.
        denoise: the denoiser.
        *parts: arrays [b, …].
        out_axes: of the results, as in `jax.vmap`.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(denoise)
    owned = ["condition" in [getattr(key, "name", None) for key in path] for path, _ in leaves]
    conditions = [leaf for (_, leaf), own in zip(leaves, owned, strict=True) if own]

    def one(conditions, *parts):
        mine = iter(conditions)
        whole = [
            next(mine)[None] if own else leaf for (_, leaf), own in zip(leaves, owned, strict=True)
        ]
        return function(jax.tree.unflatten(structure, whole), *(part[None] for part in parts))

    return jax.vmap(one, out_axes=out_axes)(conditions, *parts)


class Solution(NamedTuple):
    """What `integrate` found.

    Attributes:
        y: the state at t1, or the states at the times asked for.
        num_evaluations: calls of the drift; −1 for a solver whose calls are not known.
        converged: whether t1 was reached.
        tally: what `observe` added up.
    """

    y: Any
    num_evaluations: Array
    converged: Array
    tally: Any


def integrate(
    terms: Any,
    y0: Any,
    t0: Scalar,
    t1: Scalar,
    args: Any,
    *,
    solver: diffrax.AbstractSolver,
    controller: diffrax.AbstractStepSizeController,
    max_steps: int,
    times: Array | None = None,
    adjoint: diffrax.AbstractAdjoint | None = None,
    progress: diffrax.AbstractProgressMeter | None = None,
    throw: bool = True,
    judged: Callable[[Any], Any] = lambda y: y,
    observe: Callable[..., Any] | None = None,
) -> Solution:
    """Solves on an increasing clock from t0 to t1, and counts the calls of the drift.

    Args:
        terms: diffrax's terms.
        y0: the state at t0.
        t0: start.
        t1: end, > t0.
        args: third argument of the terms' functions.
        solver: a diffrax solver.
        controller: a diffrax step-size controller.
        max_steps: steps after which to give up.
        times: at which to return the states; None for the last alone.
        adjoint: how to take gradients; None for diffrax's default.
        progress: a diffrax progress meter.
        throw: whether to raise if t1 is not reached; otherwise `converged` tells.
        judged: the part of a state whose error the controller is to see.
        observe: (y0, y1, error, dt) ↦ arrays, added up over the steps of a controller that chooses
            them; `error` is the solver's estimate of the step's error.
    """
    chooses, per_step = _chooses(controller), _calls_per_step(solver)
    watched = _Watched(controller, judged, observe) if chooses else controller
    solution = diffrax.diffeqsolve(
        terms,
        solver,
        t0,
        t1,
        None,
        y0,
        args,
        stepsize_controller=watched,
        saveat=diffrax.SaveAt(t1=times is None, ts=times, controller_state=True),
        adjoint=diffrax.RecursiveCheckpointAdjoint() if adjoint is None else adjoint,
        progress_meter=diffrax.NoProgressMeter() if progress is None else progress,
        max_steps=max_steps,
        throw=throw,
    )
    assert solution.stats is not None
    converged = solution.result == diffrax.RESULTS.successful
    y1 = solution.ys if times is not None else jax.tree.map(lambda leaf: leaf[-1], solution.ys)
    if not per_step:
        return Solution(y1, jnp.asarray(-1), converged, None)
    # Every attempt at the first step computes the first stage anew.
    state: Any = solution.controller_state
    first, tally = (state[1], state[3]) if chooses else (1, None)
    calls = per_step[0] * solution.stats["num_steps"] + per_step[1] * first
    return Solution(y1, calls, converged, tally)


def _finish(denoise, solution: Solution, t1, final_denoise, *, trajectory) -> Flow:
    """Marks states that were not reached, and denoises the last one, if that is wanted."""
    x, calls = jnp.where(solution.converged, solution.y, jnp.nan), solution.num_evaluations
    if not final_denoise:
        return Flow(x, calls)
    last = denoise(x[-1] if trajectory else x, t1).mean
    return Flow(x.at[-1].set(last) if trajectory else last, calls + 1)


class Clock(NamedTuple):
    """An increasing clock for times that rise or fall: τ = ±t^(1/power).

    Attributes:
        sign: −1 for falling times.
        power: 1, or 2 where noise sets in at once.
    """

    sign: Time
    power: Time

    def of(self, t: Array) -> Array:
        """τ at t."""
        return self.sign * jnp.where(self.power == 2.0, jnp.sqrt(t), t)

    def time(self, tau: Time) -> Time:
        """t at τ."""
        return jnp.where(self.power == 2.0, tau**2, self.sign * tau)

    def rate(self, tau: Time) -> Time:
        """dt/dτ."""
        return jnp.where(self.power == 2.0, 2.0 * tau, self.sign)


def clock_of(
    process: SDE, t0: Time, t1: Time, controller: diffrax.AbstractStepSizeController
) -> Clock:
    """The clock on which a flow from t0 to t1 is solved.

    Where a PID controller chooses the steps by error alone, and the process has a schedule whose
    σ² = g² t at the earlier of the two times to a quarter of it, so that σ ∝ √t, it is ±√t;
    otherwise ±t.
    """
    sign, power = jnp.where(t1 < t0, -1.0, 1.0).astype(t0.dtype), jnp.ones_like(t0)
    schedule = getattr(process, "schedule", None)
    if _heeds_errors_alone(controller) and schedule is not None:
        early = jnp.minimum(t0, t1)
        _, sigma = schedule(early)
        share = process.diffusion(early) ** 2 * early / sigma**2
        power = jax.lax.stop_gradient(jnp.where(jnp.abs(share - 1.0) < 0.25, 2.0, power))
    return Clock(sign, power)


def _heeds_errors_alone(controller: diffrax.AbstractStepSizeController) -> bool:
    """Whether nothing about its steps is in units of the clock."""
    return (
        isinstance(controller, diffrax.PIDController)
        and controller.dtmin is None
        and controller.dtmax is None
    )


def _chooses(controller: diffrax.AbstractStepSizeController | None) -> bool:
    return isinstance(controller, diffrax.AbstractAdaptiveStepSizeController)


def _levy_area(solver: diffrax.AbstractSolver) -> type:
    """The least that a solver wants to know of the Brownian path within a step."""
    wanted = getattr(solver, "minimal_levy_area", diffrax.BrownianIncrement)
    areas = (diffrax.BrownianIncrement, diffrax.SpaceTimeLevyArea, diffrax.SpaceTimeTimeLevyArea)
    return next(area for area in areas if issubclass(area, wanted))


def _calls_per_step(solver: diffrax.AbstractSolver) -> tuple[int, int] | None:
    """The drift's calls of an explicit solver: each step, and once more before its first.

    None for other solvers, whose calls depend on their equations.
    """
    if isinstance(solver, diffrax.Euler | diffrax.EulerHeun):
        return 1, 0
    if isinstance(solver, diffrax.AbstractSRK):
        unused = solver.tableau.ignore_stage_f
        return len(solver.tableau.b_sol) - (0 if unused is None else int(sum(unused))), 0
    if isinstance(solver, diffrax.AbstractERK):
        assert isinstance(solver.tableau, diffrax.ButcherTableau)
        first = int(solver.tableau.fsal)  # the last stage of a step is the first of the next
        return solver.tableau.num_stages - first, first
    return None


def _solves_odes(solver: diffrax.AbstractSolver) -> bool:
    return isinstance(solver, diffrax.Euler | diffrax.AbstractERK)


def check_countable(solver: diffrax.AbstractSolver) -> None:
    """Refuses a solver whose network calls are not known from its steps.

    Raises:
        ValueError: names the solver.
    """
    if _calls_per_step(solver) is None:
        raise ValueError(
            f"solver must be Euler, EulerHeun or an explicit Runge–Kutta method of diffrax for its "
            f"network calls to be counted, got {type(solver).__name__}."
        )


def _worst_example(error) -> Array:
    """The largest root mean square over the examples of the parts of a batched state.

    Part by part: one number an example would be lost among the thousands of an image. A gradient
    solved backwards adds the parameters' part, which has no examples.
    """
    leaves = jax.tree.leaves(error)
    count = leaves[0].shape[0]
    of_batch = [leaf.ndim > 0 and leaf.shape[0] == count for leaf in leaves]
    rows = [
        leaf.reshape(count if own else 1, -1) for leaf, own in zip(leaves, of_batch, strict=True)
    ]
    return jnp.max(jnp.stack([jnp.max(jnp.sqrt(jnp.mean(row**2, axis=1))) for row in rows]))


def as_time(name: str, t: Scalar) -> Time:
    """A time as an array, checked.

    Raises:
        ValueError: unless it lies in [0, 1].
    """
    struct.require((t >= 0.0) & (t <= 1.0), f"{name} must lie in [0, 1], got {t}.")
    return jnp.asarray(t, jnp.result_type(float))


class _ExampleNoise(diffrax.AbstractBrownianPath):
    """Brownian paths of a batch, example i's drawn from keys[i]."""

    keys: Key
    shape: jax.ShapeDtypeStruct = eqx.field(static=True)
    levy_area: type = eqx.field(static=True)

    def path(self, key: Key) -> diffrax.AbstractBrownianPath:
        """One example's."""
        raise NotImplementedError

    def evaluate(self, t0, t1=None, left=True, use_levy=False):
        drawn = jax.vmap(lambda key: self.path(key).evaluate(t0, t1, left, use_levy))(self.keys)
        if use_levy:
            # The time step belongs to the batch, not to each of its examples.
            drawn = eqx.tree_at(lambda area: area.dt, drawn, drawn.dt[0])
        return drawn


class _FreshNoise(_ExampleNoise):
    """Independent increments, keyed by the times of the step."""

    # Everywhere defined; pyright takes diffrax's abstract fields for mutable ones.
    t0: Any = eqx.field(static=True, default=-math.inf)  # pyright: ignore[reportIncompatibleVariableOverride]
    t1: Any = eqx.field(static=True, default=math.inf)  # pyright: ignore[reportIncompatibleVariableOverride]

    def path(self, key):
        return diffrax.UnsafeBrownianPath(self.shape, key, self.levy_area)


class _TreeNoise(_ExampleNoise):
    """One path a key, whatever the steps, at a resolution."""

    t0: Any  # pyright: ignore[reportIncompatibleVariableOverride]
    t1: Any  # pyright: ignore[reportIncompatibleVariableOverride]
    tolerance: Any

    def path(self, key):
        return diffrax.VirtualBrownianTree(
            self.t0, self.t1, self.tolerance, self.shape, key, self.levy_area
        )


class _OnGrid(diffrax.StepTo):
    """Steps on a grid. A solve between other times is NaN, where diffrax has the host raise."""

    def wrap(self, direction):
        return _OnGrid(self.ts * direction)

    def init(self, terms, t0, t1, y0, dt0, args, func, error_order):
        between = (t0 == self.ts[0]) & (t1 == self.ts[-1])
        return jnp.where(between, self.ts[1], jnp.nan), 2


class _Watched(diffrax.AbstractStepSizeController):
    """A controller that also counts the attempts up to the first accepted step, and observes."""

    controller: diffrax.AbstractStepSizeController
    judged: Callable[[Any], Any] = eqx.field(static=True)
    observe: Callable[..., Any] | None = eqx.field(static=True)

    def wrap(self, direction):
        return _Watched(self.controller.wrap(direction), self.judged, self.observe)

    def init(self, terms, t0, t1, y0, dt0, args, func, error_order):
        # Not 0.01, whatever the length of the solve; and the host need not check its sign, as it
        # would that of a first step given to diffrax.
        dt0 = 0.01 * (t1 - t0)
        start, state = self.controller.init(
            terms, t0, t1, self.judged(y0), dt0, args, func, error_order
        )
        seen = None if self.observe is None else self.observe(y0, y0, y0, t1 - t0)
        tally = jax.tree.map(jnp.zeros_like, seen)
        return start, (state, jnp.asarray(0), jnp.asarray(False), tally)

    def adapt_step_size(
        self, t0, t1, y0, y1_candidate, args, y_error, error_order, controller_state
    ):
        inner, attempts, begun, tally = controller_state
        keep, start, end, jump, inner, result = self.controller.adapt_step_size(
            t0,
            t1,
            self.judged(y0),
            self.judged(y1_candidate),
            args,
            None if y_error is None else self.judged(y_error),
            error_order,
            inner,
        )
        attempts = attempts + jnp.where(begun, 0, 1)
        if self.observe is not None:
            seen = self.observe(y0, y1_candidate, y_error, t1 - t0)
            tally = jax.tree.map(lambda a, b: a + jnp.where(keep, b, 0), tally, seen)
        return keep, start, end, jump, (inner, attempts, begun | keep, tally), result
