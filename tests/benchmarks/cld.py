"""Critically damped Langevin diffusion beside the variance-preserving process, at equal calls.

    jaxdiff train configs/cld_digits.py --workdir runs/cld && jaxdiff train configs/digits.py …
    python tests/benchmarks/cld.py runs/cld runs/digits

takes finished runs of the shipped configs, of digits or of one toy (`configs/cld_toy2d.py` and
`configs/toy2d.py`), with the same network and training each, and prints for 10, 20, 50, 100 and 200
network calls the energy distance of samples to fresh data over that of real data, and for digits
the share that a classifier is sure of; then each run's likelihood, a lower bound for CLD.

A model of the exploding process is sampled as a variance-preserving one, which it is in x/α.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import jaxdiff as jd
from jaxdiff import evaluation
from jaxdiff.checkpoints import restore_ema
from jaxdiff.data.images import load_images
from jaxdiff.data.toys import TOYS
from jaxdiff.experiment import load_run
from jaxdiff.processes.gaussian import Rescaled

BUDGETS = (10, 20, 50, 100, 200)
VP = jd.Gaussian(jd.linear_beta())

Sampler = Callable[[int, Any, int], Any]
"""(calls, key, n) ↦ n samples in the space of the data."""


def cld_samplers(process: Any, denoise: Any, shape: Sequence[int], unit: float) -> dict[str, Any]:
    """On the grid t², which is fine where the velocity's noise is small."""

    def sampler(step: Any, cost: int = 1) -> Sampler:
        def run(calls, key, n):
            keys = jax.random.split(key, n)
            z = jax.vmap(process.prior((2, *shape)).sample)(keys)
            grid = jd.grids.quadratic((calls + cost - 1) // cost)
            return unit * jd.sample(step, denoise, grid, key, z)[:, 0]

        return run

    return {
        "CLD, SSCS": sampler(jd.SSCS(process)),
        "CLD, ancestral": sampler(jd.Ancestral(process)),
        "CLD, flow by Heun": sampler(jd.Heun(process), 2),
    }


def vp_samplers(process: Any, denoise: Any, shape: Sequence[int]) -> dict[str, Any]:
    """On the grid uniform in log-SNR."""

    def sampler(step: Any, cost: int = 1) -> Sampler:
        def run(calls, key, n):
            x = process.prior((n, *shape)).sample(key)
            grid = jd.grids.uniform_log_snr(process, (calls + cost - 1) // cost)
            return jd.sample(step, denoise, grid, key, x)

        return run

    return {
        "VP, Euler–Maruyama": sampler(jd.EulerMaruyama(process)),
        "VP, ancestral": sampler(jd.Ancestral(process)),
        "VP, flow by Heun": sampler(jd.Heun(process), 2),
    }


def load(folder: Path) -> tuple[Any, Any]:
    """A run's experiment, and its averaged model."""
    experiment = load_run(folder)
    abstract = jax.eval_shape(experiment.init, jax.random.key(0))
    return experiment, experiment.denoiser(restore_ema(folder / "checkpoints", abstract))


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("cld", type=Path, help="a run of configs/cld_digits.py or cld_toy2d.py")
    parser.add_argument("vp", type=Path, help="a run of configs/digits.py or toy2d.py")
    options = parser.parse_args()
    (coupled, velocities), (plain, denoise) = load(options.cld), load(options.vp)
    dataset, key = plain.config.dataset, jax.random.key(0)
    if coupled.config.dataset != dataset:
        raise SystemExit(f"the runs are of {coupled.config.dataset} and of {dataset}.")
    if dataset in TOYS:
        shape, unit = (2,), coupled.config.sigma_data
        process = VP
        denoise = Rescaled(denoise, plain.process, VP)
        judge = lambda x: evaluation.energy_report(x, TOYS[dataset], jax.random.key(1))
        count = 4000
    else:
        shape, unit, process = plain.config.shape, 1.0, plain.process
        train, test = load_images(dataset, "train"), load_images(dataset, "test")
        judge = lambda x: evaluation.sample_report(x, train, test, jax.random.key(1))
        count = min(len(test.x), len(train.x), evaluation.MOST)

    def cell(sampler: Sampler, calls: int) -> str:
        report = judge(jnp.asarray(sampler(calls, key, count)))
        sure = report.get("confident_share")
        energy = f"{report['energy_over_null']:.2f}"
        return energy if sure is None else f"{energy} / {sure:.3f}"

    print(f"{dataset}: energy over null{'' if dataset in TOYS else ' / confident share'}")
    print("| calls |", " | ".join(map(str, BUDGETS)), "|")
    samplers = cld_samplers(coupled.process, velocities, shape, unit)
    samplers |= vp_samplers(process, denoise, shape)
    for name, sampler in samplers.items():
        print(f"| {name} |", " | ".join(cell(sampler, calls) for calls in BUDGETS), "|", flush=True)
    for folder in (options.cld, options.vp):
        print(folder, json.loads((folder / "eval.json").read_text())["likelihood"])


if __name__ == "__main__":
    main()
