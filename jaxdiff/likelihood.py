"""Exact likelihoods: the change of volume along the probability flow, and its errors.

The flow dx/dt = v(x, t) carries the model's density p_t with it, so along a trajectory from the
data at t0 to the prior at t1

    d/dt log p_t(x(t)) = −∇·v(x, t),
    log p_{t0}(x) = log p_{t1}(x(t1)) + ∫_{t0}^{t1} ∇·v dt.

Four errors stand between that and the number, and `LogLikelihood` tells them apart:

**Probes.** The exact divergence takes a derivative a dimension. Hutchinson's estimate
(1/K) Σ_k e_kᵀ (∂v/∂x) e_k takes K. The probes are drawn once an example and kept along the solve,
so the integrand stays smooth and each of the K integrals is an unbiased estimate of the whole;
their spread is the standard error. K rows of a matrix with orthogonal columns, drawn without
replacement, estimate better than K independent ones, and all P rows give the trace itself.

**Solver.** A local error δx of the state, made at t, moves the result by how much log p_t changes
over δx. The adjoint of the likelihood along its own flow is therefore the score, which is at hand:

    |error| ≲ Σ over steps of |δℓ| + |∇log p_t(x) · δx| + rounding,

with δℓ and δx the solver's own estimates. It costs no network call. Those estimates are of leading
order, and mean more the smaller they are: of mixtures in 2 to 64 dimensions under three processes
(`tests/benchmarks/likelihood.py`) the sum is above the error of at least 97 % of points at a
tolerance of 1e-5, 91 % at 1e-4 and 63 % at 1e-3. A stiff flow wants more: that of `CLD`, of 94 % at
1e-6, but of 46 % at 1e-5. The rounding of the denoiser's own arithmetic is not in it, and in
float32 can be as large.

**Cut-off.** The data are taken for states at t0, not at 0: the density is that of data blurred by
the noise of t0. In the mean over data that costs KL(p_0 ‖ p_{t0}) ≥ 0, a single point gains or
loses about ½ σ(t0)² (∇² log p + ‖∇ log p‖²): for details of width w, in the order of (σ(t0)/w)²
nats/dim. A process whose noise begins at σ(0) > 0 gives the density of data with that noise,
whatever t0. Two values of t0, in float64, show it.

**Prior.** p_1 is taken for the process's prior π, which changes a value by
log π(x(1)) − log p_1(x(1)): little where the signal α(1) is small beside σ(1), and in the mean over
data not more than KL(p_1 ‖ π). With a variance-exploding process and data of a mean, say so:
`Gaussian(schedule, prior_mean=…)`.
"""

import functools
import math
from typing import Any, NamedTuple

import diffrax
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxdiff import struct, trace
from jaxdiff.compile import jit
from jaxdiff.processes.base import SDE, Augmented, Denoiser, example_keys, score
from jaxdiff.solve import adaptive, as_time, check_countable, clock_of, integrate, one_by_one
from jaxdiff.typing import Key, Scalar, State

__all__ = [
    "LogLikelihood",
    "importance_weighted",
    "joint_bound",
    "log_likelihood",
]


class LogLikelihood(NamedTuple):
    """Log-likelihoods of a batch, with what they are worth.

    Attributes:
        value: [b] log-densities in nats; NaN where the solver did not arrive.
        stderr: [b] standard errors of `value` over the probes, in nats; 0 for the exact trace, NaN
            where a single probe gives no spread.
        solver_error: [b] how far `value` is off for the solver's sake, in nats: an estimate,
            from above at small tolerances (see the module); NaN if steps are not chosen by error.
        latent: [b, …] where the flow takes the data, at t = 1.
        num_evaluations: [b] calls of the denoiser (with derivatives), exact.
        converged: [b] whether the value is one: false where the solver gave up or the data or the
            network's output are not finite.
    """

    value: Float[Array, "b"]
    stderr: Float[Array, "b"]
    solver_error: Float[Array, "b"]
    latent: State
    num_evaluations: Int[Array, "b"]
    converged: Bool[Array, "b"]


def log_likelihood(
    process: SDE,
    denoise: Denoiser,
    x: Float[Array, "b ..."],
    *,
    key: Key | None = None,
    probes: int | None = None,
    probe: trace.Probe = trace.orthogonal,
    t0: Scalar = 1e-5,
    solver: diffrax.AbstractSolver | None = None,
    controller: diffrax.AbstractStepSizeController | None = None,
    per_example: bool = False,
    max_steps: int = 4096,
    adjoint: diffrax.AbstractAdjoint | None = None,
) -> LogLikelihood:
    """The exact log-likelihood of data under the probability-flow ODE.

    log p(x) = log p_1(x(1)) + ∫_{t0}^{t1} ∇·v(x(t), t) dt, with the divergence exact or by
    Hutchinson's estimator with K probes, held fixed along the solve.

    Args:
        process: the forward process.
        denoise: (x [b, …], t) ↦ moments of x_0.
        x: [b, …] data in model space.
        key: for the probes: one key, or one an example [b].
        probes: K ≥ 1; None for the exact trace, which costs a derivative a dimension: forwards, or
            backwards where that is cheaper.
        probe: the law of the probes: `orthogonal`, `rademacher` or `gaussian` of `jaxdiff.trace`. A
            part of the compiled program: pass one function, not a new lambda a call.
        t0: where the data are placed, in (0, 1): a small time at which they are taken for x_{t0}.
        solver: an explicit Runge–Kutta solver of diffrax; by default `Dopri5`.
        controller: a diffrax step-size controller; by default adaptive with relative and absolute
            tolerance 1e-5, of the state and of the value in nats per dimension, in the norm of the
            worst example, on the clock of `solve.clock_of`. One that names times or lengths of
            steps (`StepTo`) names t.
        per_example: whether each example chooses its own steps: its result then does not depend on
            the batch around it, and one that does not converge spoils no other.
        max_steps: solver steps after which to give up, ≥ 1.
        adjoint: how diffrax takes a gradient in reverse; see `probability_flow`.

    Returns:
        Values, their errors by cause, latents, and the number of network calls. Nothing is raised
        for what does not converge: `converged` tells.

    Raises:
        ValueError: for an empty batch, a time outside its range, probes that are no number ≥ 1 or
            too many, probes without a key, max_steps < 1, or a solver whose calls cannot be
            counted.

    References: Chen et al. 2018, arXiv:1806.07366, eq. 8; Grathwohl et al. 2019,
        arXiv:1810.01367, eq. 7; Song et al. 2021, arXiv:2011.13456, eqs. 39–40.
    """
    if x.shape[0] == 0:
        raise ValueError(f"x must hold one example at least, got shape {x.shape}.")
    t0 = as_time("t0", t0)
    struct.require((t0 > 0.0) & (t0 < 1.0), f"t0 must lie in (0, 1), got {t0}.")
    if max_steps < 1:
        raise ValueError(f"max_steps must be at least 1, got {max_steps}.")
    solver = diffrax.Dopri5() if solver is None else solver
    controller = adaptive(1e-5) if controller is None else controller
    check_countable(solver)
    trace.check(probes, probe, x.shape[1:])
    if probes is not None and key is None:
        raise ValueError("probes need a key: pass key=jax.random.key(seed).")
    keys = None if probes is None or key is None else example_keys(key, x.shape[0])
    found = _one_by_one if per_example else _log_likelihood
    return found(
        process,
        denoise,
        x,
        keys,
        t0,
        probes=probes,
        probe=probe,
        solver=solver,
        controller=controller,
        max_steps=max_steps,
        adjoint=adjoint,
    )


def joint_bound(
    process: Augmented,
    denoise: Denoiser,
    key: Key,
    x: Float[Array, "b ..."],
    *,
    t0: Scalar = 3e-3,
    **options: Any,
) -> LogLikelihood:
    """A lower bound of log p(x) from the exact likelihood of data and velocity together.

        log p(x) ≥ E_{v ~ q} [log p(x, v) − log q(v)],

    for any law q; here it is q(v_t | x_0 = x) at t = t0, close to the model's own law of v given x,
    where the bound is an equality. One velocity is drawn an example.

    Args:
        process: a process that augments its data, such as `CLD`.
        denoise: (z [b, 2, …], t) ↦ moments of x_0.
        key: of velocities and probes: one key, or one an example [b].
        x: [b, …] data in model space.
        t0: where the data are placed, in (0, 1): late, the model's density is blurred by the noise
            that x has gathered by then; early, a network must know details as fine as that.
        **options: further ones of `log_likelihood`.

    Returns:
        The bound, in nats, with the errors of the joint likelihood.

    Raises:
        ValueError: if the process adds nothing to its data, or as `log_likelihood`.

    References: Dockhorn, Vahdat and Kreis 2022, arXiv:2112.07068, appendix B, with t = 0 in q.
    """
    if not hasattr(process, "added"):
        raise ValueError(f"process must augment its data, as CLD does, got {process}.")
    keys = jax.vmap(lambda key: jax.random.split(key))(example_keys(key, x.shape[0]))
    t0 = as_time("t0", t0)
    v = jax.vmap(lambda key, x: process.added(x, t0).sample(key))(keys[:, 0], x)
    z = jnp.stack([x, v], axis=1)
    found = log_likelihood(process, denoise, z, key=keys[:, 1], t0=t0, **options)
    of_v = jax.vmap(lambda x, v: process.added(x, t0).log_prob(v))(x, v)
    return found._replace(value=found.value - of_v)


def importance_weighted(log_weights: Float[Array, "k b"]) -> Float[Array, "b"]:
    """The importance-weighted bound log (1/K) Σ_k w_k ≤ log p(x), in expectation.

    Args:
        log_weights: [K, b], K ≥ 1, of independent draws u_k of what was added to x, a
            dequantisation or a latent: log p(x, u_k) − log q(u_k | x), each itself a lower bound.
            They must be exact. Noise of a variance s² in log p, such as that of probes, is taken
            for spread of the weights, and lifts the result by up to s²/2, above log p(x) even.

    Returns:
        [b] bounds in nats, tighter with K, and exact as K → ∞.

    Raises:
        ValueError: if there is no draw.

    References: Burda, Grosse and Salakhutdinov 2016, arXiv:1509.00519, eq. 8.
    """
    if log_weights.shape[0] == 0:
        raise ValueError(f"log_weights must hold one draw at least, got {log_weights.shape}.")
    return jax.scipy.special.logsumexp(log_weights, axis=0) - math.log(log_weights.shape[0])


@jit
def _log_likelihood(
    process, denoise, x, keys, t0, *, probes, probe, solver, controller, max_steps, adjoint
):
    directions, share = None, 0.0
    if keys is not None:
        draw = functools.partial(probe, count=probes, shape=x.shape[1:], dtype=x.dtype)
        directions, share = jax.vmap(draw, out_axes=(0, None))(keys)
    finite = jnp.all(jnp.isfinite(x.reshape(x.shape[0], -1)), axis=1)
    x = jax.vmap(jnp.where, (0, 0, None))(finite, x, 0.0)

    t1 = jnp.ones_like(t0)
    clock = clock_of(process, t0, t1, controller)

    def field(tau, state, args):
        process, denoise, directions, clock = args
        velocity, slopes, pull = _divergence(
            process, denoise, clock.time(tau), state[0], directions
        )
        return clock.rate(tau) * velocity, clock.rate(tau) * slopes, pull

    estimates = 1 if probes is None else probes
    start = (x, jnp.zeros((x.shape[0], estimates), x.dtype), jnp.zeros_like(x))
    solution = integrate(
        diffrax.ODETerm(field),
        start,
        clock.of(t0),
        clock.of(t1),
        (process, denoise, directions, clock),
        solver=solver,
        controller=controller,
        max_steps=max_steps,
        adjoint=adjoint,
        throw=False,
        judged=_state_and_volume,
        observe=_local_error,
    )
    latent, volume, _ = solution.y
    value = jax.vmap(process.prior(x.shape[1:]).log_prob)(latent) + jnp.mean(volume, axis=1)
    converged = solution.converged & finite & jnp.isfinite(value)
    nothing = jnp.full_like(value, jnp.nan)
    if probes is None:
        stderr = jnp.zeros_like(value)
    else:
        # Of a whole set nothing is left to chance, though a set of one has no spread.
        spread = jnp.var(volume, axis=1) / (estimates - 1.0)
        stderr = jnp.sqrt(jnp.where(share < 1.0, spread * (1.0 - share), 0.0))
    return LogLikelihood(
        value=jnp.where(converged, value, nothing),
        stderr=stderr,
        solver_error=nothing if solution.tally is None else solution.tally,
        latent=latent,
        num_evaluations=jnp.full(x.shape[:1], solution.num_evaluations),
        converged=converged,
    )


@jit
def _one_by_one(process, denoise, x, keys, t0, **options):
    def one(denoise, x, *keys):
        mine = keys[0] if keys else None
        found = _log_likelihood(process, denoise, x, mine, t0, **options)
        return jax.tree.map(lambda leaf: leaf[0], found)

    return one_by_one(one, denoise, x, *([] if keys is None else [keys]))


def _divergence(process, denoise, t, x, directions):
    """Velocities [b, …], eᵀ (∂v/∂x) e of the directions [b, K] or the trace [b, 1], and scores."""

    def flow(x):
        x0 = denoise(x, t).mean
        return (
            jax.vmap(lambda x, x0: process.velocity(x, x0, t))(x, x0),
            jax.vmap(lambda x, x0: score(process, x, x0, t))(x, x0),
        )

    return trace.quadratic_forms(flow, x, directions)


def _state_and_volume(state):
    """What the solver's tolerance is for: the state, and its likelihood in nats per dimension."""
    x, volume, _ = state
    return x, volume / x[0].size


def _local_error(y0, y1, error, dt):
    """|δℓ| + |s · δx| of one step, with s its mean score, and what rounding adds to both."""
    x, volume, _ = y1
    pull = (y1[2] - y0[2]) / dt
    rounding = jnp.finfo(x.dtype).eps * (
        jnp.mean(jnp.abs(volume), axis=1) + jnp.sqrt(trace.inner(pull**2, x**2))
    )
    return jnp.abs(jnp.mean(error[1], axis=1)) + jnp.abs(trace.inner(pull, error[0])) + rounding
