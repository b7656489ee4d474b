"""How a training step grows with width, side of the images and batch; PyTorch's beside it.

    pip install -e ".[bench]"
    python tests/benchmarks/scaling.py

One of the three changes at a time, from 32 channels, 16 × 16 pixels and 64 images. The U-Net is
that of `training.py`, with the same weights on both sides, and PyTorch's is eager; each contender
has a process of its own, whose largest memory is told, and they take turns. "arena" is what XLA
sets aside for a step in float32 on one device, beside parameters and data.
"""

import argparse
import functools
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.training import UNET, machine, ours, parsed, theirs, write
from benchmarks.turns import table, take_turns

SWEEPS = {
    "width": [16, 32, 64, 128],
    "side": [8, 16, 32, 64],
    "batch": [16, 64, 256],
}
MIDDLE = {"width": 32, "side": 16, "batch": 64}


def arena(folder: Path, side: int, batch: int) -> int:
    """Temporary memory of a training step, in bytes, as XLA plans it."""
    import jax
    import jax.numpy as jnp

    import jaxdiff as jd
    from jaxdiff.training import init_state, warmup_adam

    model = jd.interop.from_diffusers(folder)
    objective = jd.denoising(model.apply, model.process, model.parameterization)
    optimizer = warmup_adam(1e-3, steps=10**6, cosine=False)
    step = jd.make_train_step(objective, optimizer, ema_decay=0.999)
    state = init_state(model.params, optimizer, jax.random.key(1))
    images = {"x": jnp.zeros((batch, side, side, 3))}
    return jax.jit(step).lower(state, images).compile().memory_analysis().temp_size_in_bytes


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sweeps", nargs="+", choices=SWEEPS, default=list(SWEEPS))
    parser.add_argument("--turns", type=int, default=5)
    args = parsed(parser)
    print(machine(args))
    head = ["", "ours, images/s", "PyTorch, images/s", "ours / PyTorch, time"]
    head += ["ours, MiB", "PyTorch, MiB", "arena, MiB"]
    for name in args.sweeps:
        rows = []
        for value in SWEEPS[name]:
            sizes = MIDDLE | {name: value}
            width, side, batch = sizes.values()
            config = UNET | {"block_out_channels": [width, 2 * width]}
            with tempfile.TemporaryDirectory() as path:
                folder = Path(path)
                write(config, side, folder)
                work = folder, "step", side, batch, args.dtype
                times = take_turns(
                    {
                        "ours": functools.partial(ours, *work, "shard_map", False),
                        "PyTorch": functools.partial(theirs, *work, False, False),
                    },
                    turns=args.turns,
                )
                temporary = arena(folder, side, batch)
            a, b = times["ours"], times["PyTorch"]
            row = [f"{name} {value}", f"{batch / a.median:.4g}", f"{batch / b.median:.4g}"]
            row += [f"{a.median / b.median:.2f}"]
            rows.append(row + [f"{size / 2**20:.0f}" for size in (a.peak, b.peak, temporary)])
            print(" | ".join(rows[-1]), flush=True)
        print()
        print(table(head, rows))
        print()


if __name__ == "__main__":
    main()
