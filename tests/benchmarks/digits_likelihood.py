"""What decides the likelihood of digits: weight, times, dequantisation, Fourier features.

    python tests/benchmarks/digits_likelihood.py weighting [--steps 2500] [--seeds 0 1 2]

trains a shipped config with one choice changed at a time, over several seeds, and prints a table in
Markdown: bits/dim of the test digits, with the spread over seeds; the energy distance of samples
over that of real digits; and the variance of the gradient, over times and noise at the trained
parameters, in units of the first row's. Tables:

* weighting: simple and likelihood weighting, times uniform and by importance
  (configs/likelihood_digits.py, dequantised uniformly);
* dequantisation: uniform, and by a flow, otherwise the same;
* fourier: a variational diffusion model (configs/vdm_digits.py) with and without waves of its
  input.

Nothing is selected: every run that is made is in its row. Exits with 1 if, in the mean over seeds,
the choice that is for the likelihood has more bits/dim than the one that is not: likelihood
weighting (by importance) than simple, the flow's dequantisation than the uniform one, waves than
none.
"""

import argparse
import itertools
import json
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff.data_likelihood import likelihood_report, likelihood_rows
from jaxdiff.experiment import load_config
from jaxdiff.training import fit, init_state, make_train_step

CONFIGS = Path(__file__).parents[2] / "configs"
SCORE = {"dequantisation": "uniform"}
TABLES: dict[str, tuple[str, dict[str, dict[str, Any]]]] = {
    "weighting": (
        "likelihood_digits.py",
        {
            f"{weighting} weight, {times} times": SCORE | {"weighting": weighting, "times": times}
            for weighting, times in itertools.product(
                ("simple", "likelihood"), ("uniform", "importance")
            )
        },
    ),
    "dequantisation": (
        "likelihood_digits.py",
        {way: {"dequantisation": way} for way in ("uniform", "variational")},
    ),
    "fourier": (
        "vdm_digits.py",
        {"without waves": {"fourier": ()}, "waves of 2³π and 2⁴π": {"fourier": (3, 4)}},
    ),
}
FOR_LIKELIHOOD = {
    "weighting": ("simple weight, uniform times", "likelihood weight, importance times"),
    "dequantisation": ("uniform", "variational"),
    "fourier": ("without waves", "waves of 2³π and 2⁴π"),
}
"""Rows of a table, the second of which is the one for the likelihood."""
KEYS = 64
"""Draws of times and noise that the gradient's variance is taken over."""


def gradient_variance(experiment: Any, params: Any) -> float:
    """Σ Var ∂L/∂θ of the mean loss of one batch, over times and noise."""
    batch = jax.tree.map(jnp.asarray, experiment.batches()[0])

    @jax.jit
    def gradient(key):
        def loss(params):
            return experiment.objective(params, key, batch)[0].mean()

        return jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(jax.grad(loss)(params))])

    draws = np.stack([gradient(jax.random.key(100 + i)) for i in range(KEYS)]).astype(np.float64)
    return float(draws.var(axis=0, ddof=1).sum())


def run(config: str, options: dict[str, Any], seed: int, steps: int | None) -> dict[str, float]:
    """Trains once, and evaluates."""
    module = load_config(CONFIGS / config)
    longer = {} if steps is None else {"steps": steps}
    experiment = module.experiment(module.Config(**options, **longer, seed=seed))
    step = make_train_step(
        experiment.objective, experiment.optimizer, ema_decay=experiment.ema_decay
    )
    init_key, train_key = jax.random.split(jax.random.key(seed))
    since = time.perf_counter()
    state = init_state(jax.jit(experiment.init)(init_key), experiment.optimizer, train_key)
    state = fit(
        step,
        state,
        experiment.batches(),
        steps=experiment.steps,
        progress=False,
        eval_every=experiment.steps,
    )
    seconds = time.perf_counter() - since
    params, part, key = state.ema_params, experiment.likelihood, jax.random.key(1)
    assert part is not None
    found = {"seconds": seconds, "variance": gradient_variance(experiment, params)}
    x = part.examples("test", key)
    report = likelihood_report(part, x, likelihood_rows(part, params, x, key))
    samples = experiment.evaluate(params, jax.random.key(2))["samples"]
    return found | {
        "bits": report["bits_per_dim"],
        "energy": samples["energy_over_null"],
        "confident": samples["confident_share"] / samples["confident_share_test"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--steps", type=int, help="updates of a run; by default the config's")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    config, rows = TABLES[args.table]
    found: dict[str, list[dict[str, float]]] = {name: [] for name in rows}
    # Seeds outside, so that whatever the machine does in the meantime meets all rows.
    for seed, (name, options) in itertools.product(args.seeds, rows.items()):
        found[name].append(run(config, options, seed, args.steps))
        print(json.dumps({"row": name, "seed": seed, **found[name][-1]}), flush=True)

    def cell(name: str, key: str, digits: int) -> str:
        values = np.array([one[key] for one in found[name]])
        spread = f" ± {values.std(ddof=1):.{digits}f}" if len(values) > 1 else ""
        return f"{values.mean():.{digits}f}{spread}"

    print(f"\n{len(args.seeds)} seeds; ± is the standard deviation over them\n")
    print("| | bits/dim | energy / null | confident / real | variance |")
    print("|---|---|---|---|---|")
    unit = np.mean([one["variance"] for one in found[next(iter(rows))]])
    for name in rows:
        variance = np.mean([one["variance"] for one in found[name]]) / unit
        cells = (
            cell(name, "bits", 3),
            cell(name, "energy", 2),
            cell(name, "confident", 2),
            f"{variance:.3g}",
        )
        print(f"| {name} | {' | '.join(cells)} |")

    without, chosen = FOR_LIKELIHOOD[args.table]
    before, after = (np.array([one["bits"] for one in found[name]]) for name in (without, chosen))
    change = after - before
    print(f"\n{chosen} instead of {without}: {change.mean():+.4f} bits/dim, by seed {change}")
    if change.mean() > 0.0:
        sys.exit(1)


if __name__ == "__main__":
    main()
