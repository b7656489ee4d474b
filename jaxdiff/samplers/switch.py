"""One sampler within a window of times, another outside: SDE first and ODE after, for one.

Noise forgets errors and costs steps; the probability flow is quick and keeps every error. Which of
the two serves better depends on the time, and since both have the same marginals they can be
joined anywhere.
"""

import jax

from jaxdiff import struct
from jaxdiff.processes.base import Denoiser
from jaxdiff.samplers.base import Step, StepState
from jaxdiff.typing import Key, Scalar, State, Time

__all__ = ["Window", "switch"]


@struct.dataclass
class Window:
    """Steps that start at low < t ≤ high are the inner sampler's, the others the outer one's.

    Only the sampler whose turn it is calls the network. A sampler that remembers (a multistep
    method) starts afresh when its turn comes.

    Attributes:
        inside: the step within the window.
        outside: the step elsewhere.
        low: the window's lower end, in t. The time of a noise level σ̃ = σ/α is
            `schedules.time_of_log_snr(process.schedule, -2 log σ̃)`.
        high: its upper end, in t.

    References: Karras et al. 2022, arXiv:2206.00364, section 4 (noise in a window of levels).
    """

    inside: Step
    outside: Step
    low: Scalar = 0.0
    high: Scalar = 1.0

    def __post_init__(self) -> None:
        struct.require(
            self.low <= self.high,
            f"low must be at most high, got {self.low} and {self.high}.",
        )

    def init(self, x: State) -> tuple[StepState, StepState]:
        """What both remember."""
        return self.inside.init(x), self.outside.init(x)

    def update(
        self,
        key: Key,
        x: State,
        state: tuple[StepState, StepState],
        t: Time,
        s: Time,
        denoise: Denoiser,
    ) -> tuple[State, tuple[StepState, StepState]]:
        """Takes x [b, …] from t to s, with one key an example [b]."""

        def inner():
            y, inside = self.inside.update(key, x, state[0], t, s, denoise)
            return y, (inside, self.outside.init(y))

        def outer():
            y, outside = self.outside.update(key, x, state[1], t, s, denoise)
            return y, (self.inside.init(y), outside)

        return jax.lax.cond((self.low < t) & (t <= self.high), inner, outer)


def switch(first: Step, then: Step, time: Scalar) -> Window:
    """One sampler while t > time, another from there on.

    `switch(EulerMaruyama(process), Heun(process), 0.5)` spends noise where errors are made and
    finishes on the probability flow.

    Args:
        first: the step for t > time.
        then: the step for t ≤ time.
        time: when to change over: 0 is all `first`, 1 all `then`.
    """
    return Window(inside=then, outside=first, low=0.0, high=time)
