"""Variational dequantisation: a density of points as a model of grey levels, with a learned fill.

A level k of L is the cell of width 2/L around its place in [−1, 1]. For any law q of points y in
the cells of x the model's probability of the levels, P(x) = ∫_cells p(y) dy, has the bound

    log P(x) ≥ E_{y ~ q(y | x)} [log p(y) − log q(y | x)],

an equality where q(y | x) = p(y)/P(x). Uniform q is one choice; but it asks of p to be flat in
every cell and to jump between them. A flow q, trained together with p by the bound itself, may be
as smooth as p is.

References: Theis, van den Oord and Bethge 2016, arXiv:1511.01844, section 3.1 (uniform);
Ho et al. 2019, arXiv:1902.00275, section 3.1 (a flow).
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array, Float

from jaxdiff import struct
from jaxdiff.processes.base import example_keys
from jaxdiff.typing import Batch, Key, Metrics, Objective, Params

__all__ = ["Dequantized", "dequantized", "fill"]


def fill(
    apply: Callable[..., Any],
    params: Params,
    key: Key,
    centres: Float[Array, "b ..."],
    levels: int,
) -> tuple[Float[Array, "b ..."], Float[Array, "b"]]:
    """Draws a point y of each image's cells, and its density.

    Args:
        apply: apply(params, centres, n) ↦ (u [b, …] in [0, 1], log q(u | x) [b]) with normal n,
            such as `networks.Dequantizer`'s.
        params: its parameters.
        key: one key, or one an example [b].
        centres: [b, …] the middles of the cells, from `to_model`.
        levels: number of levels L; cells are 2/L wide.

    Returns:
        y = centres + (2u − 1)/L, and log q(y | x) = log q(u | x) + D log(L/2), in nats, [b].
    """
    keys = example_keys(key, len(centres))
    noise = jax.vmap(lambda key: jax.random.normal(key, centres.shape[1:]))(keys)
    u, log_q = apply(params, centres, noise)
    return centres + (2.0 * u - 1.0) / levels, log_q + centres[0].size * math.log(levels / 2)


@struct.dataclass
class Dequantized:
    """(log q(y | x) − log p(y))/D; see `dequantized`."""

    bound: Objective
    apply: Callable[..., Any] = struct.field(pytree_node=False)
    levels: int = struct.field(pytree_node=False)

    def __call__(self, params: Params, key: Key, batch: Batch) -> tuple[Float[Array, "b"], Metrics]:
        """The bound of each example [b], in nats per coordinate, and its part log q/D."""
        fill_key, key = jax.random.split(key)
        y, log_q = fill(self.apply, params["dequantizer"], fill_key, batch["x"], self.levels)
        loss, metrics = self.bound(params["model"], key, {**batch, "x": y})
        log_q = log_q / y[0].size
        return loss + log_q, {**metrics, "log_q": log_q}


def dequantized(bound: Objective, apply: Callable[..., Any], *, levels: int) -> Dequantized:
    """Trains a density of points and the flow that fills its cells, by the bound on levels.

    Args:
        bound: an objective that bounds −log p(y)/D in nats, but for what does not depend on y nor
            the parameters: `vdm`, or half of `denoising` with `weightings.likelihood`. Its gradient
            with respect to y trains the flow.
        apply: of the flow, as in `fill`.
        levels: number of levels L ≥ 2.

    Returns:
        An objective of parameters {"model": …, "dequantizer": …}. A batch holds "x" [b, …], the
        middles of the levels' cells in [−1, 1]; everything else in it is given to `bound`.

    Raises:
        ValueError: unless levels ≥ 2.
    """
    if levels < 2:
        raise ValueError(f"levels must be at least 2, got {levels}.")
    return Dequantized(bound=struct.as_pytree(bound), apply=apply, levels=levels)
