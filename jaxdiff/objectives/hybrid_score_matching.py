"""Score matching for critically damped Langevin diffusion: regress the velocity's noise.

Noise enters the velocity alone, so only ∇_v log p_t(z) has to be learnt. As always it is the mean,
given z_t, of the score of a conditional, and there are two to choose from:

    denoising   q(z_t | x_0, v_0)              target  −ε_v/L'_vv,  ε ~ N(0, I), z_t made from it
    hybrid      q(z_t | x_0), v_0 ~ N(0, γM)   target  −ε_v/L_vv

with L' and L their Cholesky factors. Both covariances couple x and v, so ε_v is the noise of v
*given* x. Times −L_vv, the hybrid target is ε_v itself and the other is (L_vv/L'_vv) ε_v. The loss

    E_{t, x_0, ε}  w(t)/r(t) · mean (ε̂_v(z_t, t) − target)²

has the true score as its minimiser with either; the hybrid target knows v_0 only in distribution,
varies less, and stays bounded as t → 0.

References: Dockhorn et al. 2022, arXiv:2112.07068, sections 3.1 and 3.2.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdiff import struct
from jaxdiff.objectives.base import named
from jaxdiff.parameterizations import Apply, Parameterization, predict
from jaxdiff.processes.base import example_keys, of_whole_batch
from jaxdiff.processes.cld import CLD
from jaxdiff.time_samplers import TimeSampler, uniform
from jaxdiff.typing import Batch, Data, Key, Metrics, Params, State, Time
from jaxdiff.weightings import Weighting, simple

__all__ = ["HybridScoreMatching", "hybrid_score_matching"]


@struct.dataclass
class HybridScoreMatching:
    """Score matching of the velocity; see `hybrid_score_matching`."""

    apply: Apply = struct.field(pytree_node=False)
    process: CLD
    parameterization: Parameterization
    weighting: Weighting
    time_sampler: TimeSampler
    hybrid: bool = struct.field(pytree_node=False)
    dropout: bool = struct.field(pytree_node=False)

    def __call__(self, params: Params, key: Key, batch: Batch) -> tuple[Float[Array, "b"], Metrics]:
        """The loss of each example [b], and its unweighted part."""
        x0 = batch["x"]
        time_key, noise_key, dropout_key = jax.random.split(key, 3)
        t, inverse_density = of_whole_batch(
            lambda n: self.time_sampler(time_key, self.process, n), x0.shape[0]
        )
        keys = example_keys(noise_key, x0.shape[0])

        z, target = jax.vmap(self.example)(keys, x0, t)
        given = named(batch, dropout_key, self.dropout)
        guess = predict(self.apply, params, self.process, self.parameterization, z, t, given).mean

        def error(z, guess, target, t):
            return jnp.mean((self.process.marginal(guess, t).noise(z)[1] - target) ** 2)

        mse = jax.vmap(error)(z, guess, target, t)
        weight = jax.vmap(lambda t: self.weighting(self.process, t))(t)
        return weight * inverse_density * mse, {"mse": mse}

    def example(self, key: Key, x0: Data, t: Time) -> tuple[State, Data]:
        """A state z_t [2, …] made from x_0, and what ε̂_v should be there."""
        start_key, noise_key = jax.random.split(key)
        marginal = self.process.marginal(x0, t)
        if self.hybrid:
            conditional = marginal
        else:
            z0 = self.process.augment(start_key, x0)
            conditional = self.process.transition(z0, jnp.zeros_like(t), t)
        noise = jax.random.normal(noise_key, marginal.mean.shape, marginal.mean.dtype)
        scale = marginal.factor[1, 1] / conditional.factor[1, 1]
        return conditional.from_noise(noise), scale * noise[1]


def hybrid_score_matching(
    apply: Apply,
    process: CLD,
    parameterization: Parameterization,
    *,
    hybrid: bool = True,
    weighting: Weighting = simple,
    time_sampler: TimeSampler | None = None,
    dropout: bool = False,
) -> HybridScoreMatching:
    """Hybrid score matching over all times, or plain denoising score matching.

    loss = w(t)/r(t) · mean over coordinates of (ε̂_v − target)².

    Args:
        apply: apply(params, inputs [b, …], noise_level [b], **condition) → [b, …].
        process: the forward process.
        parameterization: what the network predicts: `velocity_noise()` or `mixed_score()`.
        hybrid: whether v_0 is integrated out (HSM); if not, it is drawn (DSM).
        weighting: w(t), the weight of the squared error of the velocity's noise.
        time_sampler: draws t with its 1/r(t); by default uniform on [1e-4, 1].
        dropout: whether to hand the network a "dropout" key (`rngs={"dropout": key}`).

    Returns:
        An objective. A batch holds "x" [b, …], data in model space; everything else in it, such
        as "label", is given to the network by name.

    References: Dockhorn et al. 2022, arXiv:2112.07068, section 3.2.
    """
    sampler = uniform(1e-4) if time_sampler is None else time_sampler
    return HybridScoreMatching(
        apply=apply,
        process=process,
        parameterization=parameterization,
        weighting=struct.as_pytree(weighting),
        time_sampler=struct.as_pytree(sampler),
        hybrid=hybrid,
        dropout=dropout,
    )
