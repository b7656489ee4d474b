"""UniPC: a predictor, and a corrector that costs no further network call.

The network's call at a new point serves two steps: the next one, as in every multistep method, and,
once more, the step that led there, whose average of x̂_0 can now be taken of a polynomial through
the new value too. Only the state is mended; the network is not asked again.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from jaxdiff import struct
from jaxdiff.processes.base import Denoiser
from jaxdiff.processes.gaussian import Gaussian
from jaxdiff.samplers.dpm_solver import (
    History,
    check_order,
    half_log_snr,
    transfer,
    weights_at,
    weights_over,
)
from jaxdiff.typing import Key, State, Time

__all__ = ["Corrected", "UniPC", "bh1", "bh2"]


def bh1(h: Time) -> Time:
    """B(h) = h."""
    return h


def bh2(h: Time) -> Time:
    """B(h) = 1 − e^{−h}: the paper's e^h − 1 where x̂_0 is predicted and h counts backwards."""
    return -jnp.expm1(-h)


class Corrected(NamedTuple):
    """Where the last step started, once mended, and the values of x̂_0 until then."""

    x: State
    t: Time
    history: History


@struct.dataclass
class UniPC:
    """UniPC-p in x̂_0: UniP-p predicts x_s, and UniC-p mends x_t when x̂_0 at t is known.

    Of order p = `order` by the predictor, p + 1 by the corrector. One network call a step. In both
    ⟨x̂_0⟩ is the average under e^λ dλ of the polynomial through the last p values, in the corrector
    also through the one at the end of the step; if that makes but two values, it is

        x̂_0(λ_t) + ½ B(h)/(1 − e^{−h}) (difference of the two, over h).

    A step to σ(s) = 0 or from α(t) = 0 is of first order, and not mended; so is the last state.

    Attributes:
        process: the forward process.
        order: p: 1, 2 or 3.
        scale: B(h), `bh1` or `bh2`.

    Note: from three values on, B(h) cancels.

    References: Zhao et al. 2023, arXiv:2302.04867, algorithms 1 (UniC) and 2 (UniP).
    """

    process: Gaussian
    order: int = struct.field(pytree_node=False, default=2)
    scale: Callable[[Time], Time] = struct.field(pytree_node=False, default=bh2)

    def __post_init__(self) -> None:
        check_order(self.order, (1, 2, 3))

    def init(self, x: State) -> Corrected:
        """No values yet."""
        return Corrected(x, jnp.ones((), x.dtype), History.empty(x, self.order))

    def update(
        self, key: Key, x: State, state: Corrected, t: Time, s: Time, denoise: Denoiser
    ) -> tuple[State, Corrected]:
        """Takes x [b, …] from t to s; the keys are not used."""
        start, stop = half_log_snr(self.process, t), half_log_snr(self.process, s)
        known = state.history.push(start, denoise(x, t).mean)
        x = self._corrected(x, state, known, t)
        last = known.latest(self.order)
        x0 = last.combine(self._weights(last.clock, start, stop))
        return transfer(self.process, x, x0, t, s), Corrected(x, t.astype(state.t.dtype), last)

    def _corrected(self, x: State, state: Corrected, known: History, t: Time) -> State:
        start, stop = known.clock[1], known.clock[0]
        weights = self._weights(known.clock, start, stop)
        corrected = transfer(self.process, state.x, known.combine(weights), state.t, t)
        return jnp.where(jnp.isfinite(stop - start), corrected, x)

    def _weights(self, nodes: Array, start: Time, stop: Time) -> Array:
        finite = jnp.isfinite(stop - start)
        h = jnp.where(finite, stop - start, 1.0)
        line = weights_at(nodes, start + 0.5 * h * self.scale(h) / bh2(h))
        average = weights_over(nodes, start, stop, lambda clock: clock)
        two = jnp.sum(jnp.isfinite(nodes)) <= 2
        return jnp.where(finite & two, line, average)
