"""Score matching without noise: how scores were learnt before denoising made it cheap.

The Fisher divergence between a model s and the score of the data holds a score that nobody knows.
By an integration by parts it drops out, for any density that vanishes far away:

    ½ E‖s(x) − ∇log p(x)‖²  =  E[½ ‖s(x)‖² + tr ∂s/∂x]  +  ½ E‖∇log p(x)‖².

So L = E[½‖s‖² + tr ∂s/∂x] has the data's own score as its minimiser, where it is −½ E‖∇log p‖².
Its price is the trace, a derivative a coordinate. With random v of E[v vᵀ] = I it is the mean of
vᵀ (∂s/∂x) v, and a few such slices do. Denoising needs neither, and has a bounded target even where
the data lie on a thin sheet and ∇log p has no bound: hence the rest of this library.

References: Hyvärinen 2005, JMLR 6:695–709; Song et al. 2019, arXiv:1905.07088.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdiff import struct, trace
from jaxdiff.objectives.base import named
from jaxdiff.parameterizations import Apply
from jaxdiff.processes.base import example_keys
from jaxdiff.typing import Batch, Key, Metrics, Params

__all__ = ["ScoreMatching", "implicit_score_matching", "sliced_score_matching"]


@struct.dataclass
class ScoreMatching:
    """½‖s‖² + tr ∂s/∂x; see `implicit_score_matching` and `sliced_score_matching`."""

    apply: Apply = struct.field(pytree_node=False)
    probes: int | None = struct.field(pytree_node=False)
    probe: trace.Probe = struct.field(pytree_node=False)
    dropout: bool = struct.field(pytree_node=False)

    def __call__(self, params: Params, key: Key, batch: Batch) -> tuple[Float[Array, "b"], Metrics]:
        """The loss of each example [b], and its two parts."""
        x = batch["x"]
        probe_key, dropout_key = jax.random.split(key)
        given = named(batch, dropout_key, self.dropout)
        score, forms, _ = trace.quadratic_forms(
            lambda x: (self.apply(params, x, **given), None), x, self._directions(probe_key, x)
        )
        half_square, estimate = 0.5 * trace.inner(score, score), jnp.mean(forms, axis=1)
        return half_square + estimate, {"half_square": half_square, "trace": estimate}

    def _directions(self, key: Key, x: Float[Array, "b ..."]) -> Float[Array, "b k ..."] | None:
        """Each example's own, or none for the exact trace."""
        probes = self.probes
        if probes is None:
            return None
        keys = example_keys(key, x.shape[0])
        return jax.vmap(lambda key: self.probe(key, probes, x.shape[1:], x.dtype)[0])(keys)


def implicit_score_matching(apply: Apply, *, dropout: bool = False) -> ScoreMatching:
    """Score matching with the exact trace.

    loss = ½ ‖s(x)‖² + Σ_i ∂s_i/∂x_i, a sum over coordinates.

    Args:
        apply: apply(params, x [b, …], **condition) → the score [b, …], of no noise level.
        dropout: whether to hand the network a "dropout" key (`rngs={"dropout": key}`).

    Returns:
        An objective. A batch holds "x" [b, …], data in model space; everything else in it, such
        as "label", is given to the network by name.

    Note: the trace takes a derivative a coordinate. For more than some tens of coordinates use
        `sliced_score_matching`.

    References: Hyvärinen 2005, JMLR 6:695–709, theorem 1.
    """
    return ScoreMatching(apply=apply, probes=None, probe=trace.rademacher, dropout=dropout)


def sliced_score_matching(
    apply: Apply,
    *,
    probes: int = 1,
    probe: trace.Probe = trace.orthogonal,
    dropout: bool = False,
) -> ScoreMatching:
    """Score matching along random directions, in its variance-reduced form.

    loss = ½ ‖s(x)‖² + (1/K) Σ_k v_kᵀ (∂s/∂x) v_k, unbiased for `implicit_score_matching`.

    Args:
        apply: apply(params, x [b, …], **condition) → the score [b, …], of no noise level.
        probes: K ≥ 1, directions an example.
        probe: the law of v: `orthogonal`, `rademacher` or `gaussian` of `jaxdiff.trace`; the first
            varies least.
        dropout: whether to hand the network a "dropout" key (`rngs={"dropout": key}`).

    Returns:
        An objective. A batch holds "x" [b, …], data in model space; everything else in it, such
        as "label", is given to the network by name.

    Raises:
        ValueError: unless probes ≥ 1.

    Note: the form without variance reduction has ½ (vᵀs)² in place of its mean, ½ ‖s‖².

    References: Song et al. 2019, arXiv:1905.07088, section 3 (SSM-VR).
    """
    if probes < 1:
        raise ValueError(f"probes must be at least 1, got {probes}.")
    return ScoreMatching(apply=apply, probes=probes, probe=probe, dropout=dropout)
