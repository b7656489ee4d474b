"""Which sampler, at which number of network calls?

    python tests/benchmarks/solvers.py                      # two mixtures with the exact score
    python tests/benchmarks/solvers.py --run runs/digits    # a trained model of digits

The mixtures: GMM5 in the plane, and four correlated components in 64 dimensions. Every sampler gets
5, 10, 20, 50 and 100 calls (or the most steps that do not exceed them) on two grids, uniform in
time and uniform in log-SNR, and the better one is shown (t or λ). The figures:

* sliced W₂ to fresh data, in the unit of the data, beside that of data to data;
* within-mode deviation: samples whitened by the component that they belong to; exactly 1 is right;
* weights: the largest error of a component's share.

Below stand the schedulers of diffusers on the same noise prediction, each on its own spacing. For
deterministic samplers the median distance to the exact flow follows, at 10 calls and at the times
of its schedulers. Exits with 1 if ours is further off where the best of diffusers is closest.

With a run, and at most 50 calls, the figures are the energy distance to the test images over its
null, and the share of samples that a classifier is sure of.
"""

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import diffrax
import jax
import jax.numpy as jnp
import numpy as np

import jaxdiff as jd
from jaxdiff import metrics
from jaxdiff.checkpoints import restore_ema
from jaxdiff.data.images import from_model, load_images, to_model
from jaxdiff.data.mixture import GaussianMixture, gaussian_mixture, gmm5
from jaxdiff.experiment import load_run
from jaxdiff.processes.base import Denoiser
from jaxdiff.solve import adaptive

sys.path.insert(0, str(Path(__file__).parents[1]))
import diffusers_rival
from benchmarks.methods import METHODS, Method

BUDGETS = (5, 10, 20, 50, 100)
FEW = BUDGETS[:-1]  # for a network, whose calls take time
PROCESS = diffusers_rival.PROCESS
"""DDPM's own schedule, which diffusers has too."""


def grids_of(process: jd.Gaussian, steps: int) -> dict[str, Any]:
    """The two grids; of a single step there is one."""
    if steps == 1:
        return {"t": jd.grids.uniform(1)}
    return {"t": jd.grids.uniform(steps), "λ": jd.grids.uniform_log_snr(process, steps)}


def sampled(method: Method, process: jd.Gaussian, denoise: Denoiser, grid: Any, x: Any) -> Any:
    """What a method makes of x."""
    model = method.model(process, denoise)
    return jd.sample(method.step(process), model, grid, jax.random.key(0), x)


def shark(process: jd.Gaussian, denoise: Denoiser, calls: int, key: Any, x: Any) -> Any:
    """diffrax's ShARK on the reverse SDE, and a last denoising."""
    grid = jd.grids.uniform(max((calls - 1) // 2, 1), end=1e-3)
    solver = diffrax.ShARK()
    return jd.reverse_sde(process, denoise, key, x, grid, solver=solver, final_denoise=True)


# The mixtures


def correlated() -> GaussianMixture:
    """Four components in 64 dimensions, standard deviations 0.1 to 1 along random axes."""
    random = np.random.default_rng(0)
    covs = []
    for _ in range(4):
        axes, _ = np.linalg.qr(random.normal(size=(64, 64)))
        covs.append(axes * np.geomspace(0.01, 1.0, 64) @ axes.T)
    means = random.normal(size=(4, 64))
    means *= 2.0 / np.linalg.norm(means, axis=1, keepdims=True)
    return gaussian_mixture([0.1, 0.2, 0.3, 0.4], means, np.stack(covs))


class Errors(NamedTuple):
    """How far samples are from a mixture."""

    sliced: float
    deviation: float
    weights: float

    def __str__(self) -> str:
        return f"{self.sliced:.4f} / {self.deviation:.3f} / {self.weights:.3f}"


def errors(mixture: GaussianMixture, x: Any, data: Any) -> Errors:
    """Of samples, against fresh data and against the components themselves."""
    x, weights = np.asarray(x, np.float64), np.asarray(mixture.weights)
    means, factors = np.asarray(mixture.means), np.linalg.cholesky(np.asarray(mixture.covs))
    whitened = np.stack(
        [np.linalg.solve(f, (x - m).T).T for f, m in zip(factors, means, strict=True)]
    )
    log_dets = np.log(np.diagonal(factors, axis1=1, axis2=2)).sum(axis=1)
    joint = np.log(weights) - log_dets - 0.5 * (whitened**2).sum(axis=2).T
    belongs = np.argmax(joint, axis=1)
    shares = np.bincount(belongs, minlength=len(weights)) / len(x)
    return Errors(
        metrics.sliced_wasserstein(jax.random.key(7), x, data),
        float(np.sqrt(np.mean(whitened[belongs, np.arange(len(x))] ** 2))),
        float(np.abs(shares - weights).max()),
    )


def on_mixture(name: str, mixture: GaussianMixture, count: int) -> bool:
    """Prints the tables of one mixture; returns whether ours is at least as close at 10 calls."""
    denoise = mixture.denoiser(PROCESS)
    key = jax.random.key(0)
    data, fresh = (mixture.sample(jax.random.key(seed), count) for seed in (1, 2))
    x = PROCESS.prior((count, data.shape[1])).sample(jax.random.key(3))

    def best(method: Method, calls: int) -> str:
        found = {
            label: sampled(method, PROCESS, denoise, grid, x)
            for label, grid in grids_of(PROCESS, method.steps(calls)).items()
        }
        # The grid is chosen on other data than those that judge.
        label = min(found, key=lambda label: errors(mixture, found[label], fresh).sliced)
        return f"{errors(mixture, found[label], data)} {label}"

    print(f"\n{name}: sliced W₂ / within-mode deviation / weights, and the grid")
    row("calls", *BUDGETS)
    row("data", errors(mixture, fresh, data))
    for label, method in METHODS.items():
        affordable = [calls for calls in BUDGETS if method.steps(calls) >= 1]
        row(label, *(best(method, calls) for calls in affordable))
    row(
        "reverse SDE, ShARK",
        *(errors(mixture, shark(PROCESS, denoise, n, key, x), data) for n in BUDGETS),
    )
    if importlib.util.find_spec("diffusers") is None:
        raise SystemExit("diffusers is not installed: no rivals (pip install diffusers torch).")
    for label, (scheduler, options) in schedulers().items():
        found = []
        for calls in BUDGETS:
            steps = (calls + 1) // 2 if "Heun" in label else calls
            rival = diffusers_rival.run(scheduler, steps, denoise, x, **options)
            found.append(f"{errors(mixture, rival.x, data)} ({len(rival.times)})")
        row(f"diffusers {label}", *found)
    return closest_at_ten(denoise, x[:500])


def schedulers() -> dict[str, tuple[Any, dict[str, Any]]]:
    """The deterministic schedulers of diffusers, at their best settings for few steps."""
    import diffusers

    log_snr = {"use_lu_lambdas": True, "final_sigmas_type": "zero"}
    multistep = diffusers.DPMSolverMultistepScheduler
    return {
        "DDIM": (diffusers.DDIMScheduler, {"clip_sample": False, "set_alpha_to_one": True}),
        "DPM-Solver++ 2M": (multistep, {"solver_order": 2, **log_snr}),
        "DPM-Solver++ 3M": (multistep, {"solver_order": 3, **log_snr}),
        "UniPC": (diffusers.UniPCMultistepScheduler, {"final_sigmas_type": "zero"}),
        "DEIS": (diffusers.DEISMultistepScheduler, {}),
        "Heun": (diffusers.HeunDiscreteScheduler, {"use_karras_sigmas": True}),
        "PNDM": (diffusers.PNDMScheduler, {"skip_prk_steps": True, "set_alpha_to_one": True}),
    }


def closest_at_ten(denoise: Denoiser, x: Any) -> bool:
    """Median distances to the exact flow after ten calls: theirs, and ours at the same times.

    Returns:
        Whether ours is at least as close where theirs is closest.
    """

    def distance(found: Any, start: float) -> float:
        exact = jd.probability_flow(PROCESS, denoise, x, start, 1e-5, controller=adaptive(1e-6))
        return float(jnp.median(jnp.linalg.norm(jnp.asarray(found) - exact, axis=1)))

    print("\nmedian distance to the exact flow from the same start, ten calls")
    row("diffusers, at its own times", "", "jaxdiff, at these times")
    found = {}
    for label, (scheduler, options) in schedulers().items():
        rival = diffusers_rival.run(scheduler, 5 if "Heun" in label else 10, denoise, x, **options)
        times = np.unique(rival.times)[::-1]  # some call twice at one time
        grid = jnp.append(jnp.asarray(times), 0.0)
        ours = {
            name: distance(sampled(method, PROCESS, denoise, grid, x), float(times[0]))
            for name, method in METHODS.items()
            if not method.noisy and method.calls(len(times)) <= len(rival.times)
        }
        name = min(ours, key=lambda name: ours[name])
        found[distance(rival.x, float(times[0]))] = ours[name]
        row(label, f"{distance(rival.x, float(times[0])):.4f}", f"{ours[name]:.4f} {name}")
    return found[min(found)] <= min(found)


# A trained model of digits


def on_run(folder: Path) -> None:
    """Prints the table of a run of configs/digits.py."""
    experiment = load_run(folder)
    abstract = jax.eval_shape(experiment.init, jax.random.key(0))
    denoise = experiment.denoiser(restore_ema(folder / "checkpoints", abstract))
    process, key = experiment.process, jax.random.key(0)
    train, test = (load_images(experiment.config.dataset, split) for split in ("train", "test"))
    real, seen = to_model(test.x, test.levels), to_model(train.x, train.levels)
    null = metrics.energy_null(key, seen, real, len(real))
    x = process.prior(real.shape).sample(jax.random.key(3))

    def quality(x: Any) -> tuple[float, float]:
        x = to_model(from_model(x, train.levels), train.levels)
        sure = metrics.classify(seen, train.label, x).confident_share
        return metrics.energy_distance(x, real) / null, sure

    def best(method: Method, calls: int) -> str:
        found = {
            label: quality(sampled(method, process, denoise, grid, x))
            for label, grid in grids_of(process, method.steps(calls)).items()
        }
        label = min(found, key=lambda label: found[label][0])
        return f"{found[label][0]:.2f} / {found[label][1]:.3f} {label}"

    print("digits: energy distance over its null / confident share, and the grid")
    row("calls", *FEW)
    sure = metrics.classify(seen, train.label, real).confident_share
    row("test images", f"confident share {sure:.3f}; training images have energy 1 at most")
    for label, method in METHODS.items():
        affordable = [calls for calls in FEW if method.steps(calls) >= 1]
        row(label, *(best(method, calls) for calls in affordable))
    found = (quality(shark(process, denoise, calls, key, x)) for calls in FEW)
    row("reverse SDE, ShARK", *(f"{energy:.2f} / {sure:.3f} t" for energy, sure in found))


def row(*cells: Any) -> None:
    """Prints a line of a table."""
    print("| " + " | ".join(str(cell) for cell in cells) + " |", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--run", type=Path, help="folder of a finished run of configs/digits.py")
    parser.add_argument("--count", type=int, default=5000, help="samples of each mixture")
    options = parser.parse_args(arguments)
    if options.run is not None:
        on_run(options.run)
        return
    beds = {"GMM5": gmm5(), "64 dimensions, correlated": correlated()}
    wins = [on_mixture(name, mixture, options.count) for name, mixture in beds.items()]
    raise SystemExit(0 if all(wins) else 1)


if __name__ == "__main__":
    main()
