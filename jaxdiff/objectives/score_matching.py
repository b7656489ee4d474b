"""Score matching without noise: how scores were learnt before denoising made it cheap.

The Fisher divergence between a model s and the score of the data holds a score that nobody knows.
By an integration by parts it drops out, for any density that vanishes far away:

    ½ E‖s(x) − ∇log p(x)‖²  =  E[½ ‖s(x)‖² + tr ∂s/∂x]  +  ½ E‖∇log p(x)‖².

So L = E[½‖s‖² + tr ∂s/∂x] has the data's own score as its minimiser, where it is −½ E‖∇log p‖².
Its price is the trace, a derivative a coordinate. With random v of E[v vᵀ] = I it is the mean of
vᵀ (∂s/∂x) v, and a few such slices do. Denoising needs neither, and has a bounded target even where
the data lie on a thin sheet and ∇log p has no bound: hence the rest of this library.

Examples are independent, so one `jax.jvp` of the batched network, with a tangent for each example,
gives every example's own (∂s/∂x) v.

References: Hyvärinen 2005, JMLR 6:695–709; Song et al. 2019, arXiv:1905.07088.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdiff import struct
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
    probe: Callable[..., Array] = struct.field(pytree_node=False)
    dropout: bool = struct.field(pytree_node=False)

    def __call__(self, params: Params, key: Key, batch: Batch) -> tuple[Float[Array, "b"], Metrics]:
        """The loss of each example [b], and its two parts."""
        x = batch["x"]
        probe_key, dropout_key = jax.random.split(key)
        given = named(batch, dropout_key, self.dropout)
        score, forms = _quadratic_forms(
            lambda x: self.apply(params, x, **given), x, self._directions(probe_key, x)
        )
        trace = jnp.sum(forms, axis=0) if self.probes is None else jnp.mean(forms, axis=0)
        half_square = 0.5 * _inner(score, score)
        return half_square + trace, {"half_square": half_square, "trace": trace}

    def _directions(self, key: Key, x: Float[Array, "b ..."]) -> Float[Array, "k b ..."]:
        """The unit vectors, the same for all examples, or each example's own probes."""
        if self.probes is None:
            size = x[0].size
            units = jnp.eye(size, dtype=x.dtype).reshape(size, 1, *x.shape[1:])
            return jnp.broadcast_to(units, (size, *x.shape))

        def draw(key):
            return self.probe(key, (self.probes, *x.shape[1:]), x.dtype)

        return jax.vmap(draw, out_axes=1)(example_keys(key, x.shape[0]))


def implicit_score_matching(apply: Apply, *, dropout: bool = False) -> ScoreMatching:
    """Score matching with the exact trace.

    loss = ½ ‖s(x)‖² + Σ_i ∂s_i/∂x_i, a sum over coordinates.

    Args:
        apply: apply(params, x [b, …], **condition) → the score [b, …], of no noise level.
        dropout: whether to hand the network a "dropout" key (`rngs={"dropout": key}`).

    Returns:
        An objective. A batch holds "x" [b, …], data in model space; everything else in it, such
        as "label", is given to the network by name.

    Note: the trace takes a forward-mode derivative a coordinate, all at once: D times the memory of
        one. For more than some tens of coordinates use `sliced_score_matching`.

    References: Hyvärinen 2005, JMLR 6:695–709, theorem 1.
    """
    return ScoreMatching(apply=apply, probes=None, probe=jax.random.rademacher, dropout=dropout)


def sliced_score_matching(
    apply: Apply,
    *,
    probes: int = 1,
    probe: Callable[..., Array] = jax.random.rademacher,
    dropout: bool = False,
) -> ScoreMatching:
    """Score matching along random directions, in its variance-reduced form.

    loss = ½ ‖s(x)‖² + (1/K) Σ_k v_kᵀ (∂s/∂x) v_k, unbiased for `implicit_score_matching`.

    Args:
        apply: apply(params, x [b, …], **condition) → the score [b, …], of no noise level.
        probes: K ≥ 1, directions an example.
        probe: the law of v, `jax.random.rademacher` or `jax.random.normal`: (key, shape, dtype) ↦
            zero-mean, unit-variance array. The first varies less.
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


def _quadratic_forms(
    field: Callable[[Array], Array], x: Float[Array, "b ..."], directions: Float[Array, "k b ..."]
) -> tuple[Float[Array, "b ..."], Float[Array, "k b"]]:
    """s(x), computed once, and vᵀ (∂s/∂x) v for each example and direction."""
    value, change = jax.vmap(
        lambda direction: jax.jvp(field, (x,), (direction,)), out_axes=(None, 0)
    )(directions)
    return value, jax.vmap(_inner)(directions, change)


def _inner(a: Float[Array, "b ..."], b: Float[Array, "b ..."]) -> Float[Array, "b"]:
    return jnp.sum((a * b).reshape(a.shape[0], -1), axis=1)
