"""What a CIFAR-sized model does a second on the devices there are: training, sampling, likelihood.

    python tests/benchmarks/throughput.py
    python tests/benchmarks/throughput.py --width 32 --batch 16 --turns 1    # on a CPU

The network is `configs/cifar10_ddpmpp_vp.py`'s DDPM++ (61.8 M parameters; of another width if one
is given), with 32 × 32 × 3 images and random weights, over all devices of this process. A training
step is that of `jaxdiff train`, with dropout, Adam, clipping and average; a sample takes 50 steps
of DDIM, a likelihood 49 of Heun's method with one Hutchinson probe, whatever the examples. Each
has a process of its own. FLOPs are the model's (`jaxdiff/flops.py`), utilisation is the share of
what the devices' data sheets say for bfloat16, and the table is markdown.
"""

import argparse
import functools
import itertools
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.training import machine
from benchmarks.turns import table, take_turns

CONFIG = Path(__file__).parents[2] / "configs" / "cifar10_ddpmpp_vp.py"
SHAPE, STEPS = (32, 32, 3), 50


def experiment(width: int, dtype: str):
    from jaxdiff.experiment import load_config

    module = load_config(CONFIG)
    return module.experiment(module.Config(shape=SHAPE, levels=256, width=width, dtype=dtype))


def training(run, batch: int, mesh, by: str):
    """An update, and its FLOPs."""
    import jax
    import numpy as np

    import jaxdiff as jd
    from jaxdiff import flops
    from jaxdiff.training import init_state

    step = jd.make_train_step(
        run.objective, run.optimizer, ema_decay=run.ema_decay, mesh=mesh, by=by
    )
    state = init_state(run.init(jax.random.key(0)), run.optimizer, jax.random.key(1), mesh=mesh)
    images = np.random.default_rng(0).integers(0, 256, (batch, *SHAPE), np.uint8)
    data = jd.parallel.shard_batch({"x": images}, mesh)
    work, kept = flops.count(step, state, data), {"state": state}

    def update():
        kept["state"], metrics = step(kept["state"], data)
        return metrics

    return update, work


def sampling(run, batch: int, mesh, by: str):
    """Samples, and their FLOPs."""
    import jaxdiff as jd

    def draw(params, keys, x):
        step, grid = jd.DDIM(run.process), jd.grids.uniform(STEPS)
        return jd.sample(step, run.denoiser(params), grid, keys, x)

    return shared(run, batch, mesh, draw, each=STEPS)


def likelihood(run, batch: int, mesh, by: str):
    """Likelihoods, and their FLOPs: a derivative along a probe costs another call."""
    import diffrax
    import jax.numpy as jnp

    import jaxdiff as jd

    heun = {"solver": diffrax.Heun(), "controller": diffrax.StepTo(jnp.linspace(1e-5, 1, STEPS))}

    def log_p(params, keys, x):
        denoise = run.denoiser(params)
        return jd.log_likelihood(run.process, denoise, x, key=keys, probes=1, **heun).value

    return shared(run, batch, mesh, log_p, each=2 * 2 * (STEPS - 1))


def shared(run, batch: int, mesh, function, *, each: int):
    """A function of (params, keys, x) over the devices; `each` is its network calls."""
    import jax
    import jax.numpy as jnp

    import jaxdiff as jd
    from jaxdiff import flops

    params = jd.parallel.replicate(run.init(jax.random.key(0)), mesh)
    keys = jax.random.split(jax.random.key(1), batch)
    x = jax.random.uniform(jax.random.key(2), (batch, *SHAPE), minval=-1.0)
    work = flops.count(lambda x: run.denoiser(params)(x, jnp.float32(0.5)).mean, x)
    over = jd.parallel.per_shard(function, mesh)
    return functools.partial(over, params, keys, x), each * work


TASKS = {"training step": training, "samples": sampling, "likelihoods": likelihood}


def made(task: str, width: int, batch: int, dtype: str, by: str, folder: Path):
    """A task, ready to be timed; its FLOPs and those that the devices could do go to a file."""
    import jax

    from jaxdiff import flops
    from jaxdiff.parallel import data_mesh

    run, work = TASKS[task](experiment(width, dtype), batch, data_mesh(), by)
    peak = flops.peak(jax.devices())
    (folder / f"{task}{dtype}").write_text(json.dumps([work, peak]))
    return lambda: jax.block_until_ready(run())


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--by", choices=("jit", "shard_map", "pmap"), default="jit")
    parser.add_argument("--turns", type=int, default=5)
    args = parser.parse_args()
    print(machine(args) + "\n")
    head = ["", "dtype", "ms", "±", "images/s", "TFLOP/s", "of the peak", "first, s", "memory, MB"]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for task, dtype in itertools.product(args.tasks, args.dtypes):
            make = functools.partial(made, task, args.width, args.batch, dtype, args.by, folder)
            # One after the other: together they might not fit on a device.
            for t in take_turns({f"{task}, {dtype}": make}, turns=args.turns).values():
                work, peak = json.loads((folder / f"{task}{dtype}").read_text())
                rate = work / t.median
                rows.append(
                    [
                        task,
                        dtype,
                        f"{1e3 * t.median:.4g}",
                        f"{1e3 * t.spread:.2g}",
                        f"{args.batch / t.median:.4g}",
                        f"{rate / 1e12:.3g}",
                        "–" if peak is None else f"{rate / peak:.0%}",
                        f"{t.first:.1f}",
                        f"{t.peak / 2**20:.0f}",
                    ]
                )
    print(table(head, rows))


if __name__ == "__main__":
    main()
