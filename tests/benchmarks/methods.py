"""The samplers that the benchmarks compare, and what they cost."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jaxdiff as jd

__all__ = ["METHODS", "Method"]


class Method(NamedTuple):
    """A sampler and its price.

    Attributes:
        step: process ↦ step.
        calls: steps ↦ network calls, where the last step goes to σ = 0.
        noisy: whether it draws fresh noise.
        model: (process, denoiser) ↦ the denoiser that the step is to be given.
    """

    step: Callable[[jd.Gaussian], Any]
    calls: Callable[[int], int] = lambda steps: steps
    noisy: bool = False
    model: Callable[[jd.Gaussian, Any], Any] = lambda process, denoise: denoise

    def steps(self, calls: int) -> int:
        """The most steps that do not cost more."""
        return max((n for n in range(1, calls + 1) if self.calls(n) <= calls), default=0)


def two(steps: int) -> int:
    """Two calls a step, and one for the last."""
    return 2 * steps - 1


METHODS = {
    "DDIM": Method(jd.DDIM),
    "Heun in t": Method(jd.Heun, two),
    "EDM (Heun in σ/α)": Method(jd.EDMSampler, two),
    "PNDM-2": Method(lambda p: jd.PNDM(p, order=2), lambda steps: steps + 1),
    "PLMS": Method(lambda p: jd.PNDM(p, kutta=False), lambda steps: steps + min(1, steps - 1)),
    # Kutta's rule in the first three steps, but for one that ends at σ = 0.
    "PNDM-4": Method(jd.PNDM, lambda steps: steps + 3 * min(3, steps - 1)),
    "DEIS-3": Method(lambda p: jd.DEIS(p, order=3)),
    "DEIS-4": Method(lambda p: jd.DEIS(p, order=4)),
    "DPM-Solver-2": Method(lambda p: jd.DPMSolver(p, order=2), two),
    "DPM-Solver-3": Method(lambda p: jd.DPMSolver(p, order=3), lambda steps: 3 * steps - 2),
    "DPM-Solver++ 2S": Method(jd.DPMSolverPPSingle, two),
    "DPM-Solver++ 2M": Method(lambda p: jd.DPMSolverPP(p, order=2)),
    "DPM-Solver++ 3M": Method(lambda p: jd.DPMSolverPP(p, order=3)),
    "UniPC-2": Method(lambda p: jd.UniPC(p, order=2)),
    "UniPC-3": Method(lambda p: jd.UniPC(p, order=3)),
    "DDIM, η = 0.5": Method(lambda p: jd.DDIM(p, eta=0.5), noisy=True),
    "ancestral, β̃": Method(jd.Ancestral, noisy=True),
    "ancestral, β": Method(jd.Ancestral, noisy=True, model=jd.UnitVariance),
    "Euler–Maruyama": Method(jd.EulerMaruyama, noisy=True),
    "EDM, churned": Method(lambda p: jd.EDMSampler(p, churn=0.2), two, noisy=True),
    "SDE-DPM-Solver++ 2S": Method(lambda p: jd.DPMSolverPPSingle(p, eta=1.0), two, noisy=True),
    "SDE-DPM-Solver++ 2M": Method(lambda p: jd.DPMSolverPP(p, order=2, eta=1.0), noisy=True),
    "SDE-DPM-Solver++ 3M": Method(lambda p: jd.DPMSolverPP(p, order=3, eta=1.0), noisy=True),
    "annealed Langevin": Method(lambda p: jd.AnnealedLangevin(p, steps=1), noisy=True),
    "predictor–corrector": Method(
        lambda p: jd.PredictorCorrector(jd.Ancestral(p), jd.Langevin(p)), two, noisy=True
    ),
}
