"""Denoising score matching: regress the noise, learn the score of every noised density.

Of all functions of (x_t, t), the one that best predicts the x_0 that x_t was made from is
E[x_0 | x_t], which Tweedie's formula turns into ∇ log p_t(x_t). So the loss

    L = E_{t, x_0, ε}  w(t)/r(t) · mean ‖ε̂(x_t, t) − ε‖²,     x_t = α x_0 + σ ε,

has the true score as its minimiser for every weight w > 0, though no score was ever seen. Its least
value is not 0 but the variance that x_t leaves to ε.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdiff import struct
from jaxdiff.objectives.base import named
from jaxdiff.parameterizations import Apply, Parameterization, predict
from jaxdiff.processes.base import SDE, example_keys, of_whole_batch
from jaxdiff.time_samplers import TimeSampler, uniform
from jaxdiff.typing import Batch, Key, Metrics, Params
from jaxdiff.weightings import Weighting, simple

__all__ = ["Denoising", "denoising"]


@struct.dataclass
class Denoising:
    """The denoising loss; see `denoising`."""

    apply: Apply = struct.field(pytree_node=False)
    process: SDE
    parameterization: Parameterization
    weighting: Weighting
    time_sampler: TimeSampler
    dropout: bool = struct.field(pytree_node=False)

    def __call__(self, params: Params, key: Key, batch: Batch) -> tuple[Float[Array, "b"], Metrics]:
        """The loss of each example [b], and its unweighted part."""
        x0 = batch["x"]
        time_key, noise_key, dropout_key = jax.random.split(key, 3)
        t, inverse_density = of_whole_batch(
            lambda n: self.time_sampler(time_key, self.process, n), x0.shape[0]
        )
        keys = example_keys(noise_key, x0.shape[0])

        x = jax.vmap(lambda key, x0, t: self.process.marginal(x0, t).sample(key))(keys, x0, t)
        given = named(batch, dropout_key, self.dropout)
        guess = predict(self.apply, params, self.process, self.parameterization, x, t, given).mean

        def error(x, x0, guess, t):
            noise = self.process.marginal(x0, t).noise(x)
            return jnp.mean((self.process.marginal(guess, t).noise(x) - noise) ** 2)

        mse = jax.vmap(error)(x, x0, guess, t)
        weight = jax.vmap(lambda t: self.weighting(self.process, t))(t)
        return weight * inverse_density * mse, {"mse": mse}


def denoising(
    apply: Apply,
    process: SDE,
    parameterization: Parameterization,
    *,
    weighting: Weighting = simple,
    time_sampler: TimeSampler | None = None,
    dropout: bool = False,
) -> Denoising:
    """Denoising score matching over all times.

    loss = w(t)/r(t) · mean over coordinates of (ε̂ − ε)².

    Args:
        apply: apply(params, x [b, …], noise_level [b], **condition) → [b, …].
        process: the forward process.
        parameterization: what the network predicts.
        weighting: w(t), the weight of the noise's squared error.
        time_sampler: draws t with its 1/r(t); by default uniform on [1e-5, 1].
        dropout: whether to hand the network a "dropout" key (`rngs={"dropout": key}`).

    Returns:
        An objective. A batch holds "x" [b, …], data in model space; everything else in it, such
        as "label", is given to the network by name.

    References: Vincent 2011, doi:10.1162/NECO_a_00142, eq. 11; Song et al. 2021,
        arXiv:2011.13456, eq. 7; Ho et al. 2020, arXiv:2006.11239, eq. 14.
    """
    sampler = uniform() if time_sampler is None else time_sampler
    return Denoising(
        apply=apply,
        process=process,
        parameterization=parameterization,
        weighting=struct.as_pytree(weighting),
        time_sampler=struct.as_pytree(sampler),
        dropout=dropout,
    )
