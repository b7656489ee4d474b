"""Variational diffusion models: the bound in continuous time, with a learned noise schedule.

With γ = −log-SNR rising from γ_0 to γ_1, and z_t = α x_0 + σ ε,

    −log p(x_0)  ≤  KL(q(z_1 | x_0) ‖ p(z_1))                   prior
                    − E log p(x_0 | z_0)                        reconstruction
                    + ½ E_t γ'(t) ‖ε − ε̂(z_t, t)‖²              diffusion,

the limit of `elbo` for ever more steps. Substituting γ for t, the diffusion term is an integral
over γ from γ_0 to γ_1: of the schedule the bound knows the ends alone. So the ends are trained by
the bound, and what lies between them by the *variance* of its estimate, as follows.

An estimate at one uniform t is m γ'(t) with m = ½ ‖ε − ε̂‖². Its mean is fixed, and its second
moment, again with γ for t, is

    J(η) = ∫ E[m² | γ] γ'_η(t_η(γ)) dγ,

where t_η(γ) is the time at which the schedule of parameters η is at γ. Now m no longer depends on
η; and as γ_η(t_η(γ)) = γ, the rate there changes by ∂_η γ'(t) − (γ''/γ') ∂_η γ(t). Hence

    ∂_η J = E_t  m² γ'(t) [∂_η γ'(t) − (γ''(t)/γ'(t)) ∂_η γ(t)],

which asks for no derivative of the network. Divided by J, it does not depend on the unit of m.

References: Kingma et al. 2021, arXiv:2107.00630, sections 3.5 and 5, appendix I.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdiff import struct
from jaxdiff.compile import jit
from jaxdiff.distributions import Normal
from jaxdiff.objectives.base import named
from jaxdiff.objectives.elbo import ELBO, Decoder, log_density
from jaxdiff.parameterizations import Apply, NetDenoiser, Parameterization, predict
from jaxdiff.processes.base import example_keys, of_whole_batch
from jaxdiff.processes.gaussian import Gaussian
from jaxdiff.schedules import LearnedGamma
from jaxdiff.time_samplers import even
from jaxdiff.typing import Batch, Data, Key, Metrics, Params, Scalar, Time

__all__ = ["VDM", "Bound", "LevelDecoder", "bound", "level_decoder", "vdm"]

_ENDS = ("gamma_0", "gap")
_INTERIOR = ("centres", "rates", "shares")


@struct.dataclass
class LevelDecoder:
    """The Gaussian's density at each level, normalised over the levels; see `level_decoder`."""

    centres: Float[Array, "levels"]

    def __call__(self, x0: Data, last: Any) -> Float[Array, ""]:
        """Σ log p(level of x_0) over the coordinates, for a `Normal` last."""
        std = jnp.broadcast_to(last.std, x0.shape)[..., None]
        centres = self.centres.reshape((1,) * x0.ndim + (-1,))
        log_weights = -0.5 * ((last.mean[..., None] - centres) / std) ** 2
        own = -0.5 * ((last.mean - x0) / std[..., 0]) ** 2
        return jnp.sum(own - jax.nn.logsumexp(log_weights, axis=-1))


def level_decoder(levels: int) -> LevelDecoder:
    """A decoder for data of discrete levels: p(x_0 = level k) ∝ N(level k; mean, std²).

    Level k of L lies at (2k + 1)/L − 1, as `jaxdiff.data.images.to_model` lays it into [−1, 1].

    Args:
        levels: L ≥ 2.

    Raises:
        ValueError: unless levels ≥ 2.

    References: Kingma et al. 2021, arXiv:2107.00630, section 3.3.
    """
    if levels < 2:
        raise ValueError(f"levels must be at least 2, got {levels}.")
    return LevelDecoder(centres=(2.0 * jnp.arange(levels) + 1.0) / levels - 1.0)


@struct.dataclass
class VDM:
    """The bound, and the variance's gradient; see `vdm`."""

    apply: Apply = struct.field(pytree_node=False)
    parameterization: Parameterization
    decoder: Decoder
    dropout: bool = struct.field(pytree_node=False)

    def process(self, params: Params) -> Gaussian:
        """The forward process with the schedule that was learned."""
        return Gaussian(LearnedGamma(**params["schedule"]))

    def denoiser(self, params: Params, **condition: Array) -> NetDenoiser:
        """The model as a `Denoiser`, with further arrays [b, …] for the network by name."""
        return NetDenoiser(
            params["network"], self.process(params), self.apply, self.parameterization, condition
        )

    def __call__(self, params: Params, key: Key, batch: Batch) -> tuple[Float[Array, "b"], Metrics]:
        """The bound of each example [b] in nats per coordinate, and its three terms."""
        x0 = batch["x"]
        time_key, noise_key, dropout_key = jax.random.split(key, 3)
        t = of_whole_batch(lambda n: even(time_key, n), x0.shape[0])
        given = named(batch, dropout_key, self.dropout)
        keys = example_keys(noise_key, x0.shape[0])

        schedule = LearnedGamma(**params["schedule"])
        terms, error = self.terms(params, _held(schedule, _INTERIOR), keys, x0, t, given)
        terms, error = jax.tree.map(lambda nats: nats / x0[0].size, (terms, error))
        moment = jax.vmap(lambda error, t: _second_moment(schedule, error, t))(error, t)
        # Relative: or the size of the data would decide how the two gradients compare.
        scale = jnp.mean(terms.diffusion**2) + jnp.finfo(x0.dtype).tiny
        spread = moment / jax.lax.stop_gradient(scale)
        # Of value zero: its gradient alone counts.
        loss = -terms.value + (spread - jax.lax.stop_gradient(spread))
        return loss, {name: term for name, term in terms._asdict().items() if name != "value"}

    def terms(
        self,
        params: Params,
        schedule: LearnedGamma,
        keys: Key,
        x0: Float[Array, "b ..."],
        t: Float[Array, "b"],
        given: Mapping[str, Any],
    ) -> tuple[ELBO, Float[Array, "b"]]:
        """The bound in nats, each example at its own time and noise, and ½ ‖ε − ε̂‖² there."""
        process = Gaussian(schedule)

        def noised(key, x0, t):
            noise_key, last_key = jax.random.split(key)
            alpha, sigma = schedule(jnp.zeros_like(t))
            seen = Normal(x0, sigma / alpha).sample(last_key)
            reconstruction = -self.decoder(x0, Normal(seen, sigma / alpha))
            prior = process.marginal(x0, jnp.ones_like(t)).kl(process.prior(x0.shape))
            return process.marginal(x0, t).sample(noise_key), prior, reconstruction

        x, prior, reconstruction = jax.vmap(noised)(keys, x0, t)
        network = params["network"]
        guess = predict(self.apply, network, process, self.parameterization, x, t, given).mean

        def error(x, x0, guess, t):
            noise = process.marginal(x0, t).noise(x)
            return 0.5 * jnp.sum((process.marginal(guess, t).noise(x) - noise) ** 2)

        errors = jax.vmap(error)(x, x0, guess, t)
        diffusion = jax.vmap(lambda t: _slope(schedule.gamma, t))(t) * errors
        value = -(prior + diffusion + reconstruction)
        return ELBO(value, prior, diffusion, reconstruction), errors


def vdm(
    apply: Apply,
    parameterization: Parameterization,
    *,
    decoder: Decoder = log_density,
    dropout: bool = False,
) -> VDM:
    """The bound on −log p(x_0) in continuous time, which trains network and noise schedule.

    loss = (prior + ½ γ'(t) ‖ε − ε̂‖² + reconstruction) / D, in nats per coordinate, one t an
    example, evenly spread over the batch. Its gradient is

    - for the network, and for the schedule's ends γ_0 and γ_1: that of the loss;
    - for what lies between the ends: that of the logarithm of the diffusion term's second moment,
      whose mean they cannot change, and so of its variance.

    Args:
        apply: apply(params, x [b, …], noise_level [b], **condition) → [b, …].
        parameterization: what the network predicts.
        decoder: log p(x_0 | z_0) from N(z_0/α, (σ/α)²), the Gaussian that z_0 makes likely. By
            default that itself, for continuous data; `level_decoder(levels)` for levels.
        dropout: whether to hand the network a "dropout" key (`rngs={"dropout": key}`).

    Returns:
        An objective. Its parameters are {"network": …, "schedule": vars(learned_gamma(…))}. A
        batch holds "x" [b, …], data in model space; everything else in it, such as "label", is
        given to the network by name. The metrics are the terms, in nats per coordinate.

        For sampling it offers `.process(params)` and `.denoiser(params, **condition)`. Samples
        keep the noise of z_0, and belong to the nearest level.

    Note: the prior is the process's, N(0, σ(1)²), where the paper has N(0, 1). The paper takes the
        gradient of the squared loss, and obtains it through the network.

    References: Kingma et al. 2021, arXiv:2107.00630, sections 3.5, 5 and 5.3, appendix I.
    """
    return VDM(
        apply=apply,
        parameterization=parameterization,
        decoder=struct.as_pytree(decoder),
        dropout=dropout,
    )


class Bound(NamedTuple):
    """The bound of each example, what it is made of, and its error, in nats.

    Attributes:
        value: [b] ≤ log p(x_0) in expectation: minus the sum of the three terms.
        stderr: [b] standard error of `value` over the draws, from above: their times are spread
            evenly, and it is that of independent ones. NaN for a single draw.
        prior: [b] what the end of the chain still tells of x_0.
        diffusion: [b] what the way there loses.
        reconstruction: [b] what x_0 costs once z_0 is known.
    """

    value: Float[Array, "b"]
    stderr: Float[Array, "b"]
    prior: Float[Array, "b"]
    diffusion: Float[Array, "b"]
    reconstruction: Float[Array, "b"]


def bound(
    objective: VDM,
    params: Params,
    key: Key,
    x0: Float[Array, "b ..."],
    *,
    draws: int = 1,
    **condition: Array,
) -> Bound:
    """The bound on log p(x_0) of each example, averaged over times that are even for each.

    Args:
        objective: `vdm(…)`.
        params: its parameters.
        key: one key, or one an example [b].
        x0: [b, …] data in model space.
        draws: times an example, ≥ 1: (u + j/draws) mod 1 with one u an example. As many network
            calls, without dropout, in one program whatever their number.
        **condition: further arrays [b, …] for the network by name, such as `label`.

    Returns:
        The bound, its parts and its standard error, in nats, [b].

    Raises:
        ValueError: unless draws ≥ 1.
    """
    if draws < 1:
        raise ValueError(f"draws must be at least 1, got {draws}.")
    keys = example_keys(key, x0.shape[0])
    return _bound(objective, params, keys, x0, condition, draws=draws)


@jit
def _bound(objective, params, keys, x0, condition, *, draws):
    schedule = LearnedGamma(**params["schedule"])
    start = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, 0)))(keys)

    def one(i):
        noise_keys = jax.vmap(lambda key: jax.random.fold_in(key, 1 + i))(keys)
        t = (start + i / draws) % 1.0
        return objective.terms(params, schedule, noise_keys, x0, t, condition)[0]

    drawn = jax.lax.map(one, jnp.arange(draws))
    mean = jax.tree.map(lambda nats: jnp.mean(nats, axis=0), drawn)
    spread = jnp.var(drawn.value, axis=0) / (draws - 1.0)
    return Bound(stderr=jnp.sqrt(spread), **mean._asdict())


def _held(schedule: LearnedGamma, names: tuple[str, ...]) -> LearnedGamma:
    """The schedule, without a gradient for the leaves of these names."""
    held = {name: jax.lax.stop_gradient(getattr(schedule, name)) for name in names}
    return dataclasses.replace(schedule, **held)


def _slope(function: Callable[[Time], Time], t: Time) -> Time:
    return jax.jvp(function, (t,), (jnp.ones_like(t),))[1]


def _second_moment(schedule: LearnedGamma, error: Scalar, t: Time) -> Time:
    """Whose gradient is that of the second moment of error · γ', for the schedule's interior."""
    schedule = _held(schedule, _ENDS)
    rate, curvature = jax.jvp(lambda t: _slope(schedule.gamma, t), (t,), (jnp.ones_like(t),))
    turn = jax.lax.stop_gradient(curvature / rate)
    weight = jax.lax.stop_gradient(error**2 * rate)
    return weight * (rate - turn * schedule.gamma(t))
