"""Narrow computation, rematerialisation and loops: is the same learnt on the digits?

    python tests/benchmarks/precision.py

The same U-Net is trained with several seeds in each way; the validation loss is that of the average
of the parameters, over the same times and noises for all. A way is as good as float32 if its mean
differs by less than the spread of float32's seeds; the last column is that difference over the
spread. A seed decides the initial parameters, the noises and the times.
"""

import argparse
import platform
import statistics
import sys
import time
from importlib.metadata import version
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import jaxdiff as jd
from jaxdiff import networks
from jaxdiff.data.batches import Batches
from jaxdiff.data.images import load_images, to_model
from jaxdiff.training import init_state, make_train_step, warmup_adam

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.turns import table

NET = networks.UNet(width=32, blocks=3)
# Name ↦ network, updates a call.
WAYS = {
    "float32": (NET, 1),
    "bfloat16": (NET.clone(dtype=jnp.bfloat16), 1),
    "remat": (NET.clone(remat=True), 1),
    "blocks in a scan": (NET.clone(scan=True), 1),
    "bfloat16, remat, scan": (NET.clone(dtype=jnp.bfloat16, remat=True, scan=True), 1),
    "ten updates in a scan": (NET, 10),
}
PROCESS = jd.Gaussian(jd.linear_beta())


def images(split: str) -> np.ndarray:
    """Digits of a split, in [-1, 1]."""
    digits = load_images("digits", split)
    return np.asarray(to_model(digits.x, digits.levels))


def train(net: networks.UNet, seed: int, steps: int, together: int):
    """The averaged parameters, and seconds an update after the first call."""
    keys = jax.random.split(jax.random.key(seed), 2)
    params = jax.jit(net.init)(keys[0], jnp.zeros((1, 8, 8, 1)), jnp.zeros(1))
    objective = jd.denoising(
        net.apply, PROCESS, jd.epsilon(), time_sampler=jd.time_samplers.low_discrepancy()
    )
    optimizer = warmup_adam(2e-3, steps=steps, warmup=steps // 20)
    step = make_train_step(objective, optimizer, ema_decay=0.995)
    several = jax.jit(
        lambda state, batches: jax.lax.scan(step, state, batches)[0], donate_argnums=0
    )
    state = init_state(params, optimizer, keys[1])
    batches = Batches({"x": images("train")}, 64)
    begin = None
    for i in range(0, steps, together):
        if together == 1:
            state, _ = step(state, batches[i])
        else:
            group = [batches[i + j] for j in range(together)]
            state = several(state, jax.tree.map(lambda *leaves: np.stack(leaves), *group))
        jax.block_until_ready(state.params)
        begin = begin or time.perf_counter()
    return state.ema_params, (time.perf_counter() - begin) / (steps - together)


def validation(net: networks.UNet, params) -> float:
    """The loss on validation images, over 8 sets of times and noises."""
    objective = jd.denoising(
        net.apply, PROCESS, jd.epsilon(), time_sampler=jd.time_samplers.low_discrepancy()
    )
    batch = {"x": jnp.asarray(images("validation"))}
    loss = jax.jit(lambda key: jnp.mean(objective(params, key, batch)[0]))
    return float(np.mean([loss(jax.random.key(i)) for i in range(8)]))


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    device = jax.devices()[0].device_kind
    print(f"Python {platform.python_version()}, jax {version('jax')}; {device}; {args}\n")
    rows, plain = [], []
    for name, (net, together) in WAYS.items():
        losses, seconds = [], []
        for seed in range(args.seeds):
            params, pace = train(net, seed, args.steps, together)
            losses.append(validation(net, params))
            seconds.append(pace)
        plain = plain or losses
        away = (statistics.mean(losses) - statistics.mean(plain)) / statistics.stdev(plain)
        rows.append(
            [
                name,
                ", ".join(f"{loss:.4f}" for loss in losses),
                f"{statistics.mean(losses):.4f}",
                f"{away:+.2f}",
                f"{1e3 * statistics.median(seconds):.1f}",
            ]
        )
        print(rows[-1], flush=True)
    head = ["U-Net", "validation loss by seed", "mean", "over float32, spreads", "ms an update"]
    print("\n" + table(head, rows))


if __name__ == "__main__":
    main()
