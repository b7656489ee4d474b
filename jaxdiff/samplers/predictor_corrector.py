"""Predictor–corrector sampling: a step in time, and steps at one time that mend its error."""

from typing import Protocol, runtime_checkable

import jax

from jaxdiff import struct
from jaxdiff.processes.base import Denoiser
from jaxdiff.samplers.base import Step, StepState
from jaxdiff.typing import Key, State, Time

__all__ = ["Corrector", "PredictorCorrector"]


@runtime_checkable
class Corrector(Protocol):
    """What moves states closer to p_t and leaves p_t itself as it is."""

    def correct(self, key: Key, x: State, t: Time, denoise: Denoiser) -> State:
        """Moves x [b, …] closer to p_t at one t > 0, with one key an example [b]."""
        ...


@struct.dataclass
class PredictorCorrector:
    """Any step from t to s, then any corrector at s; or the corrector at t, then the step.

    Network calls a step: the predictor's and the corrector's. At s = 0, where p_s may have no
    score, nothing is corrected.

    Attributes:
        predictor: any step.
        corrector: such as `Langevin(process)`.
        corrector_first: whether to correct at t before the step, as the paper's code does. It
            leaves the error of the last step alone, and mends what x has at the start.

    References: Song et al. 2021, arXiv:2011.13456, algorithm 1.
    """

    predictor: Step
    corrector: Corrector
    corrector_first: bool = struct.field(pytree_node=False, default=False)

    def init(self, x: State) -> StepState:
        """What the predictor remembers."""
        return self.predictor.init(x)

    def update(
        self, key: Key, x: State, state: StepState, t: Time, s: Time, denoise: Denoiser
    ) -> tuple[State, StepState]:
        """Takes x [b, …] from t to s, with one key an example [b]."""
        keys = jax.vmap(jax.random.split, out_axes=1)(key)
        if self.corrector_first:
            x = self.corrector.correct(keys[1], x, t, denoise)
            return self.predictor.update(keys[0], x, state, t, s, denoise)
        x, state = self.predictor.update(keys[0], x, state, t, s, denoise)

        def mend():
            return self.corrector.correct(keys[1], x, s, denoise)

        return jax.lax.cond(s > 0.0, mend, lambda: x), state
