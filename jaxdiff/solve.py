"""Continuous-time sampling, encoding and likelihood: everything that diffrax solves.

With the denoised mean x̂_0(x, t) of every state known, three equations use it:

    probability flow   dx/dt = v(x, t) = f − ½ g² s
    reverse SDE        dx    = (v − ½ η² g² s) dt + η g dw̄
    likelihood         log p_{t_0}(x) = log p_1(x(1)) + ∫_{t_0}^1 ∇·v dt

with s the score and η the amount of noise: η = 1 is Anderson's reverse SDE, η = 0 the flow. All
have the same marginals.

Time in diffrax always increases. diffrax's stochastic Runge–Kutta solvers ignore the sign of a
negative step, and give wrong samples without an error; so whatever runs from t = 1 to t = 0 is
solved on the clock τ = −t, which also keeps every digit of a small t.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import lineax
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from jaxdiff import grids
from jaxdiff.compile import jit
from jaxdiff.processes.base import SDE, Denoiser, example_keys, score, velocity
from jaxdiff.typing import Grid, Key, Scalar, State, Time

__all__ = [
    "Flow",
    "LogLikelihood",
    "adaptive",
    "log_likelihood",
    "probability_flow",
    "reverse_sde",
]


class Flow(NamedTuple):
    """A solution of the probability-flow ODE.

    Attributes:
        x: [b, …] states at the end.
        num_evaluations: calls of the denoiser, exact.
    """

    x: State
    num_evaluations: Int[Array, ""]


class LogLikelihood(NamedTuple):
    """Log-likelihoods of a batch.

    Attributes:
        value: [b] log-densities in nats.
        stderr: [b] standard errors of `value` over the probes, in nats; 0 for the exact trace, NaN
            where a single probe gives no spread.
        latent: [b, …] where the flow takes the data, at t1.
        num_evaluations: calls of the denoiser (with derivatives), exact.
    """

    value: Float[Array, "b"]
    stderr: Float[Array, "b"]
    latent: State
    num_evaluations: Int[Array, ""]


def reverse_sde(
    process: SDE,
    denoise: Denoiser,
    key: Key,
    x: Float[Array, "b ..."],
    grid: Grid,
    *,
    solver: diffrax.AbstractSolver | None = None,
    eta: Scalar = 1.0,
) -> State:
    """Samples by solving the reverse-time SDE over a time grid.

    dx = (v − ½ η² g² s) dt + η g dw̄, in one compiled program.

    Args:
        process: the forward process.
        denoise: (x [b, …], t) ↦ moments of x_0.
        key: one key, or one an example [b].
        x: [b, …] states at grid[0].
        grid: [n + 1] decreasing times. End it above 0 where σ(0) = 0 and the solver evaluates the
            end of its steps: all but `Euler` do.
        solver: a diffrax SDE solver; by default `Euler`, that is Euler–Maruyama, one call a step.
            The noise is additive, so Itô and Stratonovich agree, and Milstein's method is
            Euler's: diffrax's `ItoMilstein` only takes more memory.
        eta: noise, ≥ 0: 1 is the reverse SDE, 0 the probability flow; marginals are the same. The
            number 0 is compiled as a program of its own, without noise.

    Returns:
        [b, …] states at grid[-1].

    Raises:
        ValueError: if the grid does not fall strictly within [0, 1], or eta < 0.

    References: Anderson 1982, doi:10.1016/0304-4149(82)90051-5; Song et al. 2021,
        arXiv:2011.13456, eq. 6; Zhang and Chen 2022, arXiv:2204.13902 (the family in η).
    """
    grid = jnp.asarray(grid)
    grids.check(grid)
    if not isinstance(eta, Tracer) and not float(eta) >= 0.0:
        raise ValueError(f"eta must be at least 0, got {eta}.")
    keys = example_keys(key, x.shape[0])
    solver = diffrax.Euler() if solver is None else solver
    if isinstance(eta, int | float) and eta == 0 and _is_countable(solver):
        # Without noise this is the flow, to the last bit.
        return _probability_flow(
            process,
            denoise,
            x,
            grid[0],
            grid[-1],
            solver=solver,
            controller=diffrax.StepTo(-grid),
            max_steps=grid.shape[0] - 1,
        ).x
    return _reverse_sde(process, denoise, keys, x, grid, jnp.asarray(eta), solver=solver)


def probability_flow(
    process: SDE,
    denoise: Denoiser,
    x: Float[Array, "b ..."],
    t0: Scalar,
    t1: Scalar,
    *,
    solver: diffrax.AbstractSolver | None = None,
    controller: diffrax.AbstractStepSizeController | None = None,
    max_steps: int = 4096,
    evaluations: bool = False,
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
            tolerance 1e-4, in the norm of the worst example. One that names times (`StepTo`) names
            them on the increasing clock τ = t, or τ = −t if t1 < t0.
        max_steps: solver steps after which to give up.
        evaluations: whether to count the network's calls, for explicit Runge–Kutta solvers.

    Returns:
        [b, …] states at t1; with `evaluations`, a `Flow` of states and count.

    Raises:
        ValueError: if a time lies outside [0, 1], or calls cannot be counted.
        RuntimeError: if the solver needed more than `max_steps` steps.

    References: Song et al. 2021, arXiv:2011.13456, eq. 13.
    """
    t0, t1 = _time("t0", t0), _time("t1", t1)
    solver = diffrax.Dopri5() if solver is None else solver
    controller = adaptive(1e-4) if controller is None else controller
    if evaluations:
        _calls_per_step(solver)
    solution = _probability_flow(
        process, denoise, x, t0, t1, solver=solver, controller=controller, max_steps=max_steps
    )
    return solution if evaluations else solution.x


def log_likelihood(
    process: SDE,
    denoise: Denoiser,
    x: Float[Array, "b ..."],
    *,
    key: Key | None = None,
    probes: int | None = None,
    probe: Callable[..., Array] = jax.random.rademacher,
    t0: Scalar = 1e-5,
    t1: Scalar = 1.0,
    solver: diffrax.AbstractSolver | None = None,
    controller: diffrax.AbstractStepSizeController | None = None,
    max_steps: int = 4096,
) -> LogLikelihood:
    """The exact log-likelihood of data under the probability-flow ODE.

    log p(x) = log p_1(x(1)) + ∫_{t0}^{t1} ∇·v(x(t), t) dt, with the divergence exact or by
    Hutchinson's estimator ∇·v ≈ (1/K) Σ_k e_kᵀ (∂v/∂x) e_k. The probes e_k are drawn once an
    example and held fixed along the solve, so the integrand stays smooth and each of the K
    estimates is unbiased; their spread is the standard error.

    Args:
        process: the forward process.
        denoise: (x [b, …], t) ↦ moments of x_0.
        x: [b, …] data in model space.
        key: for the probes: one key, or one an example [b].
        probes: K ≥ 1; None for the exact trace, which costs a derivative a dimension.
        probe: the law of a probe, `jax.random.rademacher` or `jax.random.normal`:
            (key, shape, dtype) ↦ zero-mean, unit-variance array.
        t0: where the data are placed, in (0, 1): a small time at which they are taken for x_{t0}.
        t1: where the prior is placed, in (t0, 1].
        solver: an explicit Runge–Kutta solver of diffrax; by default `Dopri5`.
        controller: a diffrax step-size controller; by default adaptive with relative and absolute
            tolerance 1e-5, in the norm of the worst example.
        max_steps: solver steps after which to give up.

    Returns:
        Values and standard errors in nats, latents, and the number of network calls.

    Raises:
        ValueError: for a time outside its range, probes < 1, probes without a key, or a solver
            whose calls cannot be counted.
        RuntimeError: if the solver needed more than `max_steps` steps.

    References: Chen et al. 2018, arXiv:1806.07366, eq. 8; Grathwohl et al. 2019,
        arXiv:1810.01367, eq. 7; Song et al. 2021, arXiv:2011.13456, eqs. 39–40.
    """
    t0, t1 = _time("t0", t0), _time("t1", t1)
    if not isinstance(t0, Tracer) and not isinstance(t1, Tracer) and not 0.0 < t0 < t1:
        raise ValueError(f"t0 and t1 must satisfy 0 < t0 < t1 <= 1, got t0={t0}, t1={t1}.")
    solver = diffrax.Dopri5() if solver is None else solver
    controller = adaptive(1e-5) if controller is None else controller
    _calls_per_step(solver)
    if probes is not None and probes < 1:
        raise ValueError(f"probes must be at least 1, or None for the exact trace, got {probes}.")
    if probes is not None and key is None:
        raise ValueError("probes need a key: pass key=jax.random.key(seed).")
    keys = None if key is None else example_keys(key, x.shape[0])
    return _log_likelihood(
        process,
        denoise,
        x,
        keys,
        t0,
        t1,
        probes=probes,
        probe=probe,
        solver=solver,
        controller=controller,
        max_steps=max_steps,
    )


def adaptive(tolerance: float) -> diffrax.PIDController:
    """Adaptive steps that keep the error of the *worst* example of a batch at a tolerance.

    diffrax's own norm averages over the batch, where one example's error hides among the others'.

    Args:
        tolerance: relative and absolute, > 0.

    Raises:
        ValueError: unless tolerance > 0.
    """
    if not tolerance > 0.0:
        raise ValueError(f"tolerance must be positive, got {tolerance}.")
    return diffrax.PIDController(rtol=tolerance, atol=tolerance, norm=_worst_example)


@jit
def _reverse_sde(process, denoise, keys, x, grid, eta, *, solver):
    def drift(clock, x, _):
        t = -clock
        x0 = denoise(x, t).mean
        flow = jax.vmap(lambda x, x0: velocity(process, x, x0, t))(x, x0)
        pull = jax.vmap(lambda x, x0: score(process, x, x0, t))(x, x0)
        return 0.5 * (eta * process.diffusion(t)) ** 2 * pull - flow

    def diffusion(clock, x, _):
        scale = jnp.broadcast_to(eta * process.diffusion(-clock), x.shape)
        return lineax.DiagonalLinearOperator(scale.astype(x.dtype))

    shape = jax.ShapeDtypeStruct(x.shape[1:], x.dtype)
    noise = _ExampleNoise(keys=keys, shape=shape, levy_area=_levy_area(solver))
    solution = diffrax.diffeqsolve(
        diffrax.MultiTerm(diffrax.ODETerm(drift), diffrax.ControlTerm(diffusion, noise)),
        solver,
        -grid[0],
        -grid[-1],
        None,
        x,
        stepsize_controller=diffrax.StepTo(-grid),
        max_steps=grid.shape[0] - 1,
    )
    assert solution.ys is not None
    return solution.ys[-1]


@jit
def _probability_flow(process, denoise, x, t0, t1, *, solver, controller, max_steps):
    def field(t, x):
        x0 = denoise(x, t).mean
        return jax.vmap(lambda x, x0: velocity(process, x, x0, t))(x, x0)

    return Flow(*_solve(field, x, t0, t1, solver, controller, max_steps))


@jit
def _log_likelihood(
    process, denoise, x, keys, t0, t1, *, probes, probe, solver, controller, max_steps
):
    size = x[0].size
    if probes is None:
        # The unit vectors: the sum over them is the trace.
        directions = jnp.eye(size, dtype=x.dtype).reshape(size, 1, *x.shape[1:])
        directions = jnp.broadcast_to(directions, (size, *x.shape))
    else:
        draw = jax.vmap(lambda key: probe(key, (probes, *x.shape[1:]), x.dtype), out_axes=1)
        directions = draw(keys)

    def field(t, state):
        def flow(x):
            x0 = denoise(x, t).mean
            return jax.vmap(lambda x, x0: velocity(process, x, x0, t))(x, x0)

        # Forward mode: transposed convolutions are very slow inside a loop on the CPU. The primal
        # does not depend on the direction, so it is computed once.
        value, change = jax.vmap(
            lambda direction: jax.jvp(flow, (state[0],), (direction,)), out_axes=(None, 0)
        )(directions)
        slopes = jnp.sum((directions * change).reshape(*directions.shape[:2], size), axis=-1)
        return value, (jnp.sum(slopes, axis=0)[None] if probes is None else slopes).T

    estimates = 1 if probes is None else probes
    start = (x, jnp.zeros((x.shape[0], estimates), x.dtype))
    (latent, volume), calls = _solve(field, start, t0, t1, solver, controller, max_steps)
    prior = jax.vmap(process.prior(x.shape[1:]).log_prob)(latent)
    if probes is None:
        stderr = jnp.zeros_like(prior)
    else:
        spread = jnp.var(volume, axis=1) * probes / (probes - 1.0)
        stderr = jnp.sqrt(spread / probes)
    return LogLikelihood(prior + jnp.mean(volume, axis=1), stderr, latent, calls)


def _solve(field, y0, t0, t1, solver, controller, max_steps):
    """Solves dy/dt = field(t, y) from t0 to t1 on an increasing clock, and counts its calls."""
    sign = jnp.where(t1 < t0, -1.0, 1.0).astype(t0.dtype)

    def term(clock, y, _):
        return jax.tree.map(lambda dy: sign * dy, field(sign * clock, y))

    chooses = isinstance(controller, diffrax.AbstractAdaptiveStepSizeController)
    countable = _is_countable(solver)
    watched = _FirstAttempts(controller) if chooses and countable else controller
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(term),
        solver,
        sign * t0,
        sign * t1,
        0.01 * jnp.abs(t1 - t0) if chooses else None,
        y0,
        stepsize_controller=watched,
        saveat=diffrax.SaveAt(t1=True, controller_state=True),
        max_steps=max_steps,
    )
    assert solution.stats is not None
    y1 = jax.tree.map(lambda leaf: leaf[-1], solution.ys)
    if not countable:
        return y1, jnp.asarray(-1)
    per_step, first = _calls_per_step(solver)
    calls = per_step * solution.stats["num_steps"]
    # Every attempt at the first step computes the first stage anew.
    attempts: Any = solution.controller_state
    return y1, calls + first * (attempts[1] if chooses else 1)


def _levy_area(solver: diffrax.AbstractSolver) -> type:
    """The least that a solver wants to know of the Brownian path within a step."""
    wanted = getattr(solver, "minimal_levy_area", diffrax.BrownianIncrement)
    areas = (diffrax.BrownianIncrement, diffrax.SpaceTimeLevyArea, diffrax.SpaceTimeTimeLevyArea)
    return next(area for area in areas if issubclass(area, wanted))


def _is_countable(solver) -> bool:
    return isinstance(solver, diffrax.Euler | diffrax.AbstractERK)


def _calls_per_step(solver: diffrax.AbstractSolver) -> tuple[int, int]:
    """The calls of an explicit solver: each step, and once more before its first."""
    if isinstance(solver, diffrax.Euler):
        return 1, 0
    if isinstance(solver, diffrax.AbstractERK):
        assert isinstance(solver.tableau, diffrax.ButcherTableau)
        first = int(solver.tableau.fsal)  # the last stage of a step is the first of the next
        return solver.tableau.num_stages - first, first
    raise ValueError(
        f"solver must be Euler or an explicit Runge–Kutta method of diffrax for its network calls "
        f"to be counted, got {type(solver).__name__}."
    )


def _worst_example(error) -> Array:
    """The largest root mean square over the examples of a batched state."""
    leaves = [leaf.reshape(leaf.shape[0], -1) for leaf in jax.tree.leaves(error)]
    return jnp.max(jnp.sqrt(jnp.mean(jnp.concatenate(leaves, axis=1) ** 2, axis=1)))


def _time(name: str, t: Scalar) -> Time:
    if not isinstance(t, Tracer) and not 0.0 <= float(t) <= 1.0:
        raise ValueError(f"{name} must lie in [0, 1], got {t}.")
    return jnp.asarray(t, jnp.result_type(float))


class _ExampleNoise(diffrax.AbstractBrownianPath):
    """Brownian increments of a batch, example i's drawn from keys[i] and the step's times."""

    keys: Key
    shape: jax.ShapeDtypeStruct = eqx.field(static=True)
    levy_area: type = eqx.field(static=True)
    # Everywhere defined; pyright takes diffrax's abstract fields for mutable ones.
    t0: Any = eqx.field(static=True, default=-math.inf)  # pyright: ignore[reportIncompatibleVariableOverride]
    t1: Any = eqx.field(static=True, default=math.inf)  # pyright: ignore[reportIncompatibleVariableOverride]

    def evaluate(self, t0, t1=None, left=True, use_levy=False):
        def increment(key):
            path = diffrax.UnsafeBrownianPath(self.shape, key, self.levy_area)
            return path.evaluate(t0, t1, left, use_levy)

        drawn = jax.vmap(increment)(self.keys)
        if use_levy:
            # The time step belongs to the batch, not to each of its examples.
            drawn = eqx.tree_at(lambda area: area.dt, drawn, drawn.dt[0])
        return drawn


class _FirstAttempts(diffrax.AbstractStepSizeController):
    """A controller that also counts the attempts up to the first accepted step."""

    controller: diffrax.AbstractStepSizeController

    def wrap(self, direction):
        return _FirstAttempts(self.controller.wrap(direction))

    def init(self, terms, t0, t1, y0, dt0, args, func, error_order):
        start, state = self.controller.init(terms, t0, t1, y0, dt0, args, func, error_order)
        return start, (state, jnp.asarray(0), jnp.asarray(False))

    def adapt_step_size(
        self, t0, t1, y0, y1_candidate, args, y_error, error_order, controller_state
    ):
        inner, attempts, begun = controller_state
        keep, start, end, jump, inner, result = self.controller.adapt_step_size(
            t0, t1, y0, y1_candidate, args, y_error, error_order, inner
        )
        attempts = attempts + jnp.where(begun, 0, 1)
        return keep, start, end, jump, (inner, attempts, begun | keep), result
