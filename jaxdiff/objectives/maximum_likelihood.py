"""Maximum likelihood: train the flow by its own likelihood, no bound and no score in sight.

    loss = −log p(x) / D,    by the change of volume along dx/dt = v_θ(x, t) (`log_likelihood`).

This is how continuous normalising flows were trained before denoising made it needless: dozens of
network calls, and their derivatives, for one gradient, where denoising takes one call. It is the
reference for what a likelihood is worth on small problems, and the last step for a trained network
that is to be tuned to it. The network is then that flow's; of the score it need no longer be.

References: Chen et al. 2018, arXiv:1806.07366, section 4; Grathwohl et al. 2019, arXiv:1810.01367.
"""

import diffrax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdiff import grids, struct
from jaxdiff.likelihood import log_likelihood
from jaxdiff.objectives.base import named
from jaxdiff.parameterizations import Apply, NetDenoiser, Parameterization
from jaxdiff.processes.gaussian import Gaussian
from jaxdiff.typing import Batch, Grid, Key, Metrics, Params

__all__ = ["MaximumLikelihood", "maximum_likelihood"]


@struct.dataclass
class MaximumLikelihood:
    """−log p(x)/D of the flow; see `maximum_likelihood`."""

    apply: Apply = struct.field(pytree_node=False)
    process: Gaussian
    parameterization: Parameterization
    grid: Grid
    solver: diffrax.AbstractSolver = struct.field(pytree_node=False)
    probes: int | None = struct.field(pytree_node=False)

    def __call__(self, params: Params, key: Key, batch: Batch) -> tuple[Float[Array, "b"], Metrics]:
        """−log p of each example [b], in nats per coordinate."""
        x = batch["x"]
        denoise = NetDenoiser(
            params, self.process, self.apply, self.parameterization, named(batch, key, False)
        )
        found = log_likelihood(
            self.process,
            denoise,
            x,
            key=key,
            probes=self.probes,
            t0=self.grid[-1],
            solver=self.solver,
            controller=diffrax.StepTo(self.grid[::-1]),
            max_steps=len(self.grid),
            adjoint=diffrax.RecursiveCheckpointAdjoint(),
        )
        return -found.value / x[0].size, {}


def maximum_likelihood(
    apply: Apply,
    process: Gaussian,
    parameterization: Parameterization,
    grid: Grid,
    *,
    solver: diffrax.AbstractSolver | None = None,
    probes: int | None = None,
) -> MaximumLikelihood:
    """The negative log-likelihood of the probability flow, per coordinate, as a training loss.

    Args:
        apply: apply(params, x [b, …], noise_level [b], **condition) → [b, …].
        process: the forward process.
        parameterization: what the network predicts.
        grid: the times of a solver's steps, falling from 1, the last above 0. Their error is
            trained upon: judge the result with more steps, or with steps chosen by error.
        solver: an explicit Runge–Kutta solver of diffrax; by default `Dopri5`.
        probes: K ≥ 1 Hutchinson probes, drawn anew for each batch; None for the exact trace.

    Returns:
        An objective. A batch holds "x" [b, …], data in model space; everything else in it, such
        as "label", is given to the network by name.

    Raises:
        ValueError: if the grid does not fall from 1 to above 0, or probes < 1.

    Note: the gradient is exact for the steps taken (diffrax's checkpointing), and stores a state
        in every few of them.
    """
    grid = jnp.asarray(grid)
    grids.check(grid)
    ends = (grid[0] == 1.0) & (grid[-1] > 0.0)
    struct.require(ends, f"grid must begin at 1, where the prior is, and end above 0, got {grid}.")
    if probes is not None and probes < 1:
        raise ValueError(f"probes must be at least 1, or None for the exact trace, got {probes}.")
    return MaximumLikelihood(
        apply=apply,
        process=process,
        parameterization=parameterization,
        grid=grid,
        solver=diffrax.Dopri5() if solver is None else solver,
        probes=probes,
    )
