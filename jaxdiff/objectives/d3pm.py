"""Training discrete diffusion: the variational bound, its hybrid, and masked cross-entropy.

On a grid of T steps the bound of D3PM is

    L = KL(q(x_T | x_0) ‖ p(x_T)) + Σ_{t→s} E_q KL(q(x_s | x_t, x_0) ‖ p(x_s | x_t)),

whose last term, to s = 0, is −log p(x_0 | x_t). Each example is trained on one step, drawn evenly
and counted T times. Under the absorbing kernel all terms are cross-entropies of masked tokens, and
for T → ∞ they become one integral over time.

Both take class indices, not one-hot data, and noise them as such: for long sequences and large
vocabularies the largest arrays are the network's logits.
"""

from typing import Any, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxdiff import grids, struct
from jaxdiff.distributions import Categorical
from jaxdiff.objectives.base import named
from jaxdiff.parameterizations import Apply
from jaxdiff.processes.base import Denoised, example_keys, of_whole_batch
from jaxdiff.processes.d3pm import D3PM, AbsorbingKernel, Logits
from jaxdiff.time_samplers import even
from jaxdiff.typing import Batch, Grid, Key, Metrics, Params, Scalar

__all__ = ["CategoricalBound", "MaskedCrossEntropy", "categorical_bound", "masked_cross_entropy"]


@struct.dataclass
class CategoricalBound:
    """The bound of D3PM; see `categorical_bound`."""

    apply: Apply = struct.field(pytree_node=False)
    process: D3PM
    parameterization: Logits
    grid: Grid
    cross_entropy: Scalar
    dropout: bool = struct.field(pytree_node=False)

    def __call__(self, params: Params, key: Key, batch: Batch) -> tuple[Float[Array, "b"], Metrics]:
        """The loss of each example [b] in nats, and its parts."""
        time_key, key = jax.random.split(key)
        tokens = _tokens(batch)
        steps = self.grid.shape[0] - 1
        spread = of_whole_batch(lambda n: even(time_key, n), len(tokens))
        index = jnp.floor(steps * spread).astype(int)
        t, s = self.grid[index], self.grid[index + 1]
        noisy, out = _noised(self, params, key, batch, t)

        def parts(tokens, noisy, out, t, s):
            x0, x = self.process.one_hot(tokens), self.process.one_hot(noisy)
            guess = self.parameterization.denoised(self.process, out, x, t)
            truth = self.process.posterior(x, Denoised(x0), t, s)
            return {
                "prior": self.process.marginal(x0, self.grid[0]).kl(self.process.prior(x0.shape)),
                "diffusion": steps * truth.kl(self.process.posterior(x, guess, t, s)),
                "cross_entropy": steps * Categorical(x0).kl(Categorical(guess.mean)),
            }

        metrics = jax.vmap(parts)(tokens, noisy, out, t, s)
        bound = metrics["prior"] + metrics["diffusion"]
        return bound + self.cross_entropy * metrics["cross_entropy"], metrics


def categorical_bound(
    apply: Apply,
    process: D3PM,
    parameterization: Logits,
    grid: Grid,
    *,
    cross_entropy: float = 0.0,
    dropout: bool = False,
) -> CategoricalBound:
    """The variational bound of discrete data, with cross-entropy added for the hybrid loss.

    loss = L_T + T · [KL(q(x_s | x_t, x_0) ‖ p(x_s | x_t)) − λ log p(x_0 | x_t)], in nats, an
    unbiased estimate of −log p(x_0)'s bound for λ = 0.

    Args:
        apply: apply(params, class indices [b, *positions], noise_level [b], **condition) → logits
            [b, *positions, n].
        process: the chain.
        parameterization: what the logits mean.
        grid: [T + 1] times from 1 to 0: the steps of the bound.
        cross_entropy: λ ≥ 0; the paper's hybrid loss has 0.001.
        dropout: whether to hand the network a "dropout" key (`rngs={"dropout": key}`).

    Returns:
        An objective. A batch holds "x" [b, *positions], class indices; everything else in it, such
        as "label", is given to the network by name.

    Raises:
        ValueError: for a grid that does not fall from 1 to 0, or λ < 0.

    Note: eq. 5 leaves open whether the cross-entropy is a sum or a mean over steps. As in the
        authors' code, λ is its weight beside one step's KL.

    References: Austin et al. 2021, arXiv:2107.03006, eqs. 1 and 5.
    """
    grid = jnp.asarray(grid)
    grids.check(grid)
    if grid[0] != 1.0 or grid[-1] != 0.0:
        raise ValueError(f"grid must fall from 1 to 0, got {grid[0]} to {grid[-1]}.")
    if not cross_entropy >= 0.0:
        raise ValueError(f"cross_entropy must be at least 0, got {cross_entropy}.")
    return CategoricalBound(
        apply=apply,
        process=process,
        parameterization=parameterization,
        grid=grid,
        cross_entropy=cross_entropy,
        dropout=dropout,
    )


@struct.dataclass
class MaskedCrossEntropy:
    """Weighted cross-entropy of masked tokens; see `masked_cross_entropy`."""

    apply: Apply = struct.field(pytree_node=False)
    kernel: AbsorbingKernel
    parameterization: Logits
    t_min: Scalar
    dropout: bool = struct.field(pytree_node=False)

    @property
    def process(self) -> D3PM:
        """The chain."""
        return D3PM(self.kernel)

    def __call__(self, params: Params, key: Key, batch: Batch) -> tuple[Float[Array, "b"], Metrics]:
        """The loss of each example [b] in nats, and the share of masked tokens."""
        time_key, key = jax.random.split(key)
        tokens = _tokens(batch)
        spread = of_whole_batch(lambda n: even(time_key, n), len(tokens))
        t = self.t_min + (1.0 - self.t_min) * spread
        noisy, out = _noised(self, params, key, batch, t)

        def parts(tokens, noisy, out, t):
            logits = out[..., : self.kernel.data_classes]
            chosen = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
            surprise = jax.nn.logsumexp(logits, axis=-1) - chosen
            masked = noisy == self.kernel.mask
            kept, rate = jax.jvp(self.kernel.keep, (t,), (jnp.ones_like(t),))
            weight = -(1.0 - self.t_min) * rate / (1.0 - kept)
            return weight * jnp.sum(jnp.where(masked, surprise, 0.0)), jnp.mean(masked, dtype=float)

        loss, masked = jax.vmap(parts)(tokens, noisy, out, t)
        return loss, {"masked": masked}


def masked_cross_entropy(
    apply: Apply,
    process: D3PM,
    parameterization: Logits,
    *,
    t_min: float = 1e-4,
    dropout: bool = False,
) -> MaskedCrossEntropy:
    """The bound of the absorbing kernel in continuous time.

    loss = ∫ −ᾱ'(t)/(1 − ᾱ(t)) Σ_masked −log p(x_0 | x_t) dt, in nats, one t an example, evenly
    spread over the batch. For the same network it does not depend on the schedule ᾱ.

    Args:
        apply: apply(params, class indices [b, *positions], noise_level [b], **condition) → logits
            [b, *positions, n].
        process: a `D3PM` with the `absorbing` kernel.
        parameterization: what the network is told of the time.
        t_min: the smallest time, in (0, 1). The integral starts there, and leaves out about
            1 − ᾱ(t_min) of the tokens' cross-entropy.
        dropout: whether to hand the network a "dropout" key (`rngs={"dropout": key}`).

    Returns:
        An objective. A batch holds "x" [b, *positions], class indices below the mask's; everything
        else in it is given to the network by name.

    Raises:
        ValueError: for another kernel, or t_min outside (0, 1).

    References: Shi et al. 2024, arXiv:2406.04329; Sahoo et al. 2024, arXiv:2406.07524,
        eq. 10; Kingma et al. 2021, arXiv:2107.00630, appendix I.1 (the spread of t).
    """
    if process.kernel.data_classes == process.kernel.classes:
        raise ValueError(f"process must have the absorbing kernel, got {process.kernel}.")
    if not 0.0 < t_min < 1.0:
        raise ValueError(f"t_min must lie in (0, 1), got {t_min}.")
    return MaskedCrossEntropy(
        apply=apply,
        kernel=cast(AbsorbingKernel, process.kernel),
        parameterization=parameterization,
        t_min=t_min,
        dropout=dropout,
    )


def _tokens(batch: Batch) -> Int[Array, "b ..."]:
    tokens = jnp.asarray(batch["x"])
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(f"x must be class indices, got an array of {tokens.dtype}.")
    return tokens.astype(jnp.int32)


def _noised(
    objective: CategoricalBound | MaskedCrossEntropy,
    params: Params,
    key: Key,
    batch: Batch,
    t: Float[Array, "b"],
) -> tuple[Int[Array, "b ..."], Any]:
    """Class indices at the times t, and what the network makes of them."""
    noise_key, dropout_key = jax.random.split(key)
    tokens = _tokens(batch)
    keys = example_keys(noise_key, len(tokens))
    noisy = jax.vmap(objective.process.draw)(keys, tokens, t)
    level = jax.vmap(lambda t: objective.parameterization.noise_level(objective.process, t))(t)
    given = named(batch, dropout_key, objective.dropout)
    out = objective.apply(params, noisy, level, **given)
    return noisy, out.astype(t.dtype)
