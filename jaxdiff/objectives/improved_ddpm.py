"""Improved DDPM: learn the reverse variance beside the mean, by a hybrid of two losses.

L_simple teaches the mean and says nothing of the variance; the variational bound teaches both, and
is noisy. So the bound is added with a small weight and shown to the variance alone: the mean in it
is held fixed,

    L_hybrid = L_simple + λ L_vlb,     L_vlb = T · E_t KL(q(x_s | x_t, x_0) ‖ p(x_s | x_t)),

over the T steps s = t − 1/T of the chain, with −log p(x_0 | x_t) in place of the divergence at the
first.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdiff import struct
from jaxdiff.objectives.base import named
from jaxdiff.objectives.elbo import Decoder, log_density
from jaxdiff.parameterizations import Apply, LearnedVariance, predict
from jaxdiff.processes.base import Denoised, example_keys, of_whole_batch
from jaxdiff.processes.gaussian import Gaussian
from jaxdiff.time_samplers import TimeSampler, uniform
from jaxdiff.typing import Batch, Key, Metrics, Params, Scalar

__all__ = ["ImprovedDDPM", "improved_ddpm"]


@struct.dataclass
class ImprovedDDPM:
    """The hybrid loss; see `improved_ddpm`."""

    apply: Apply = struct.field(pytree_node=False)
    process: Gaussian
    parameterization: LearnedVariance
    weight: Scalar
    decoder: Decoder
    time_sampler: TimeSampler
    dropout: bool = struct.field(pytree_node=False)

    def __call__(self, params: Params, key: Key, batch: Batch) -> tuple[Float[Array, "b"], Metrics]:
        """The loss of each example [b], and its two parts."""
        x0 = batch["x"]
        time_key, noise_key, dropout_key = jax.random.split(key, 3)
        times, inverse_density = of_whole_batch(
            lambda n: self.time_sampler(time_key, self.process, n), x0.shape[0]
        )
        # Times between two steps belong to the later one.
        step = jnp.clip(jnp.ceil(times * self.parameterization.steps), 1.0)
        t, s = step / self.parameterization.steps, (step - 1.0) / self.parameterization.steps
        keys = example_keys(noise_key, x0.shape[0])

        x = jax.vmap(lambda key, x0, t: self.process.marginal(x0, t).sample(key))(keys, x0, t)
        given = named(batch, dropout_key, self.dropout)
        guess = predict(self.apply, params, self.process, self.parameterization, x, t, given)
        mse = jax.vmap(self._error)(x, x0, guess.mean, t)
        fixed = Denoised(jax.lax.stop_gradient(guess.mean), guess.var)
        vlb = self.parameterization.steps * jax.vmap(self._bound)(x, x0, fixed, t, s)
        loss = inverse_density * (mse + self.weight * vlb)
        return loss, {"mse": mse, "vlb": vlb}

    def _error(self, x, x0, guess, t):
        noise = self.process.marginal(x0, t).noise(x)
        return jnp.mean((self.process.marginal(guess, t).noise(x) - noise) ** 2)

    def _bound(self, x, x0, guess, t, s):
        """What the step costs, in nats per coordinate."""
        first = s == 0.0
        # Both are computed: at s = 0 the divergence is that of another step, and finite.
        later = jnp.where(first, 0.5 * t, s)
        exact = self.process.posterior(x, Denoised(x0), t, later)
        divergence = exact.kl(self.process.posterior(x, guess, t, later))
        surprise = -self.decoder(x0, self.process.posterior(x, guess, t, s))
        return jnp.where(first, surprise, divergence) / x0.size


def improved_ddpm(
    apply: Apply,
    process: Gaussian,
    parameterization: LearnedVariance,
    *,
    weight: float = 1e-3,
    decoder: Decoder = log_density,
    time_sampler: TimeSampler | None = None,
    dropout: bool = False,
) -> ImprovedDDPM:
    """The hybrid loss of improved DDPM, for a network of mean and variance.

    loss = 1/r(t) · (mean (ε̂ − ε)² + λ T L_t), L_t in nats per coordinate, its mean held fixed.

    Args:
        apply: apply(params, x [b, …, c], noise_level [b], **condition) → [b, …, 2c].
        process: the forward process.
        parameterization: `parameterizations.learned_variance(mean, steps=T)`.
        weight: λ ≥ 0, the weight of the bound.
        decoder: log p(x_0 | x_t) at the first step; `elbo.discrete_decoder` for levels.
        time_sampler: draws t with its 1/r(t); each is moved up to the next multiple of 1/T. By
            default uniform.
        dropout: whether to hand the network a "dropout" key (`rngs={"dropout": key}`).

    Returns:
        An objective. A batch holds "x" [b, …], data in model space; everything else in it, such
        as "label", is given to the network by name.

    Raises:
        ValueError: unless weight ≥ 0.

    Note: the paper's code counts L_t in bits; its λ is ours divided by log 2.

    References: Nichol and Dhariwal 2021, arXiv:2102.09672, eq. 16.
    """
    if not weight >= 0.0:
        raise ValueError(f"weight must be at least 0, got {weight}.")
    return ImprovedDDPM(
        apply=apply,
        process=process,
        parameterization=parameterization,
        weight=weight,
        decoder=struct.as_pytree(decoder),
        time_sampler=struct.as_pytree(uniform() if time_sampler is None else time_sampler),
        dropout=dropout,
    )
