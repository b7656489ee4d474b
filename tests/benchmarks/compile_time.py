"""How long deep U-Nets take to compile, their equal blocks one by one or in loops (`scan`).

    pip install -e ".[bench]"
    python tests/benchmarks/compile_time.py

Two programs of each config: a whole sampler of 50 steps of DDIM, and a whole training step. They
are traced and lowered, then compiled, for arrays that have only a shape, and never run. Each has a
process of its own, one at a time, without a compilation cache. The table is markdown; `processor`
is the time of all threads, which other work on the machine does not stretch, lines are those of the
lowered program, and memory is the most that the process had.
"""

import argparse
import functools
import itertools
import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.training import machine
from benchmarks.turns import peak_memory, table

CONFIGS = Path(__file__).parents[2] / "configs"
# Name ↦ config, its options. The first has eight blocks a level, the second 32 in its only one.
NETWORKS = {
    "DDPM++ deep": ("cifar10_ddpmpp_vp", {"blocks": 8}),
    "VDM": ("cifar10_vdm", {}),
}
SHAPE = (32, 32, 3)


def sampler(run, batch: int):
    """Of 50 steps, and what it is given."""
    import jax
    import jax.numpy as jnp

    import jaxdiff as jd

    def draw(params, key, x):
        step, grid = jd.DDIM(run.process), jd.grids.uniform(50)
        return jd.sample(step, run.denoiser(params), grid, key, x)

    x = jax.ShapeDtypeStruct((batch, *SHAPE), jnp.float32)
    key = jax.random.key(0)
    return draw, (jax.eval_shape(run.init, key), key, x)


def training_step(run, batch: int):
    """The step, and what it is given."""
    import jax
    import jax.numpy as jnp

    import jaxdiff as jd
    from jaxdiff.training import init_state

    def start(key):
        return init_state(run.init(key), run.optimizer, key)

    step = jd.make_train_step(run.objective, run.optimizer, ema_decay=run.ema_decay)
    data = {"x": jax.ShapeDtypeStruct((batch, *SHAPE), jnp.uint8)}
    return step, (jax.eval_shape(start, jax.random.key(0)), data)


# Name ↦ program, batch.
PROGRAMS = {"DDIM, 50 steps": (sampler, 4), "training step": (training_step, 8)}


def measure(network: str, program: str, **options: bool) -> tuple[list[float], int, int]:
    """Seconds to trace and lower, to compile, for both, of processors; lines; bytes of memory."""
    import jax

    from jaxdiff.experiment import load_config

    jax.config.update("jax_enable_compilation_cache", False)
    name, size = NETWORKS[network]
    module = load_config(CONFIGS / f"{name}.py")
    run = module.experiment(module.Config(shape=SHAPE, levels=256, **size, **options))
    make, batch = PROGRAMS[program]
    function, given = make(run, batch)
    begin, busy = time.perf_counter(), time.process_time()
    lowered = jax.jit(function).lower(*given)
    middle = time.perf_counter()
    lowered.compile()
    end, busy = time.perf_counter(), time.process_time() - busy
    peak = peak_memory()
    lines = lowered.as_text().count("\n")
    return [middle - begin, end - middle, end - begin, busy], lines, peak


def alone(function):
    """The result of a function of no arguments, in a process of its own."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function).result()


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--programs", nargs="+", choices=PROGRAMS, default=list(PROGRAMS))
    parser.add_argument("--remat", action="store_true")
    args = parser.parse_args()
    print(f"{machine(args)}\n")
    rows = []
    for which in itertools.product(args.networks, args.programs):
        for scan in (False, True):
            job = functools.partial(measure, *which, remat=args.remat, scan=scan)
            times, lines, peak = alone(job)
            by = "in loops" if scan else "one by one"
            sizes = f"{lines:,}", f"{peak / 2**20:.0f}"
            rows.append([*which, by, *(f"{t:.1f}" for t in times), *sizes])
            print(" | ".join(rows[-1]), flush=True)
    times = ["trace and lower, s", "compile, s", "both, s", "processor, s"]
    print()
    print(table(["network", "program", "blocks", *times, "lines", "memory, MiB"], rows))


if __name__ == "__main__":
    main()
