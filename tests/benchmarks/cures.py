"""What the CPU's own operations (`jaxdiff/networks/cpu.py`) earn, each by itself.

    python tests/benchmarks/cures.py

First single operations: JAX's and ours, alone and inside a `scan` of several, forward and the
gradients, time per call. Then whole training steps of DDPM's U-Net: with all cures, a device a core
and the memory kept in large pages (the settings are in the README), beside one with one of these
left out; `ratio` is that over the other. Each contender has a process of its own and they take
turns.
"""

import argparse
import functools
import math
import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.training import KEPT
from benchmarks.turns import table, take_turns

# Batch, side, channels in and out.
CONVOLUTIONS = [(128, 8, 32, 32), (64, 16, 64, 64), (64, 32, 32, 32)]
# Batch, tokens, heads, width of a head.
ATTENTIONS = [(64, 16, 1, 64), (64, 256, 1, 64), (64, 256, 4, 32)]
# What a training step is without.
WITHOUT = (
    "convolutions",
    "fewer multiplications",
    "attention by slices",
    "values computed once",
    "one sum of gradients",
    "a device a core",
    "memory kept",
)
# Side of the images, batch.
STEPS = [(8, 64), (32, 64)]
CALLS = 4
"""Of a loop."""


def convolution(shape: tuple[int, int, int, int], wanted: str, by: str, loop: bool):
    """Forward, or a gradient, of a 3 × 3 convolution."""
    import jax

    from jaxdiff.networks import cpu

    b, side, channels, features = shape
    run = cpu.convolve if by == "ours" else jax.lax.conv_general_dilated
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (b, side, side, channels))
    kernel = jax.random.normal(keys[1], (3, 3, channels, features))
    dy = jax.random.normal(keys[2], (b, side, side, features))

    def once(x, kernel, dy):
        forward = lambda x, k: run(x, k, (1, 1), "SAME", dimension_numbers=cpu.LAYOUT)
        if wanted == "forward":
            return forward(x, kernel)
        argument = 0 if wanted == "images' gradient" else 1
        return jax.vjp(forward, x, kernel)[1](dy)[argument]

    return timed(once, (x, kernel, dy), loop)


def attention(shape: tuple[int, int, int, int], wanted: str, by: str, loop: bool):
    """Forward, or all gradients, of attention."""
    import jax

    from jaxdiff.networks import cpu

    run = cpu.attention if by == "ours" else jax.nn.dot_product_attention
    keys = jax.random.split(jax.random.key(0), 4)

    def once(q, k, v, dy):
        return run(q, k, v) if wanted == "forward" else jax.vjp(run, q, k, v)[1](dy)

    return timed(once, tuple(jax.random.normal(key, shape) for key in keys), loop)


def timed(once, arrays, loop: bool):
    """A function that runs `once`, or a loop of several."""
    import jax
    import jax.numpy as jnp

    def several(*arrays):
        def body(total, scale):
            scaled = [scale * a for a in arrays]
            return jax.tree.map(jnp.add, total, once(*scaled)), None

        return jax.lax.scan(body, once(*arrays), jnp.arange(2.0, CALLS + 1))[0]

    run = jax.jit(several if loop else once)
    return lambda: jax.block_until_ready(run(*arrays))


def step(side: int, batch: int, without: str):
    """A training step of a U-Net, with JAX's own of one operation."""
    if without != "a device a core":
        os.environ["JAX_NUM_CPU_DEVICES"] = str(os.cpu_count())
    import jax
    import jax.numpy as jnp

    import jaxdiff as jd
    from jaxdiff.networks import UNet, cpu, unet
    from jaxdiff.training import init_state, warmup_adam

    if without == "convolutions":
        cpu.convolve = jax.lax.conv_general_dilated
    if without == "fewer multiplications":
        cpu.WORK = math.inf
    if without == "attention by slices":
        cpu.attention = jax.nn.dot_product_attention
    if without == "values computed once":
        cpu.once = lambda x: x
    net = UNet(32, (1, 2), 2, attention=(side // 2,), variant=unet.DDPM)
    keys = jax.random.split(jax.random.key(0), 3)
    process = jd.Gaussian(jd.linear_beta(0.1, 20.0))
    x = jax.random.normal(keys[0], (batch, side, side, 3))
    optimizer = warmup_adam(1e-3, steps=10**6)
    objective = jd.denoising(net.apply, process, jd.epsilon())
    mesh = jd.parallel.data_mesh()
    data = jd.parallel.shard_batch({"x": x}, mesh)
    by = "jit" if without == "one sum of gradients" else "shard_map"
    run = jd.make_train_step(objective, optimizer, ema_decay=0.999, mesh=mesh, by=by)
    params = jax.jit(net.init)(keys[1], x, jnp.zeros(batch))
    state = init_state(params, optimizer, keys[2], mesh=mesh)

    def once():
        nonlocal state
        state, _ = run(state, data)
        jax.block_until_ready(state.params)

    return once


def operations(turns: int) -> list[list[str]]:
    """Rows of the first table."""
    rows = []
    jobs = [
        (convolution, s, ("forward", "images' gradient", "kernel's gradient")) for s in CONVOLUTIONS
    ]
    jobs += [(attention, s, ("forward", "gradients")) for s in ATTENTIONS]
    for work, shape, tasks in jobs:
        for task in tasks:
            makers = {
                (by, loop): functools.partial(work, shape, task, by, loop)
                for by in ("JAX", "ours")
                for loop in (False, True)
            }
            times = take_turns(makers, turns=turns)
            plain = times["JAX", False].median
            for (by, loop), t in times.items():
                calls = CALLS if loop else 1
                rows.append(
                    [
                        f"{work.__name__} {' × '.join(map(str, shape))}",
                        task,
                        by + (", in a loop" if loop else ""),
                        f"{1e3 * t.median / calls:.3g} ± {1e3 * t.spread / calls:.1g}",
                        f"{t.median / calls / plain:.2f}",
                    ]
                )
    return rows


def steps(turns: int) -> list[list[str]]:
    """Rows of the second table.

    Two contenders at a time: as many as there are cures take 22 GB together.
    """
    rows = []
    for side, batch in STEPS:
        for name in WITHOUT:
            os.environ |= {setting: str(value) for setting, value in KEPT.items()}
            makers = {which: functools.partial(step, side, batch, which) for which in ("", name)}
            if name == "memory kept":  # A setting of the environment, which is one for both.
                full = take_turns({"": makers.pop("")}, turns=turns)
                for setting in KEPT:
                    del os.environ[setting]
                times = full | take_turns(makers, turns=turns)
            else:
                times = take_turns(makers, turns=turns)
            full, t = times[""], times[name]
            rows.append(
                [
                    f"{side} × {side}, batch {batch}",
                    name,
                    *(f"{1e3 * t.median:.4g} ± {1e3 * t.spread:.2g}" for t in (full, t)),
                    f"{t.median / full.median:.2f}",
                    *(f"{t.peak / 2**20:.0f}" for t in (full, t)),
                ]
            )
    return rows


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--steps-only", action="store_true")
    args = parser.parse_args()
    print(f"Python {platform.python_version()}, jax {version('jax')}, {os.cpu_count()} cores\n")
    if not args.steps_only:
        head = ["operation", "of", "by", "ms", "ratio"]
        print(table(head, operations(args.turns)), "\n", flush=True)
    head = ["images", "without", "ms with", "without", "ratio", "memory with, MiB", "without"]
    print(table(head, steps(args.turns)))


if __name__ == "__main__":
    main()
