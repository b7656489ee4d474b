"""Images a second that a stream decodes, beside memory, a PyTorch DataLoader and a training step.

    pip install -e ".[bench]"
    python tests/benchmarks/input.py

Sets are made in a temporary folder: smooth images with noise, as PNG of 32 × 32 and as JPEG of
64 × 64 pixels, and the 8 × 8 digits as TFDS's array_record. The DataLoader reads by the same
functions, shuffles too, and has as many workers. All are started before, and take turns: A B C A
B C …; in each a contender first makes the batches that it may have held ready, then those that
count.

The training step is that of a U-Net of 32 channels on the images of 32 × 32: of one batch over and
over, and as `fit` has it, from a stream that decodes on the same cores.
"""

import argparse
import functools
import itertools
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.turns import Times, table

BATCH = 128
READY = 24  # batches that a contender may hold ready when its turn begins


def smooth(rng: np.random.Generator, side: int) -> np.ndarray:
    """A random image that compresses as photographs do, uint8 [side, side, 3]."""
    from PIL import Image

    coarse = rng.integers(0, 256, (max(side // 8, 2),) * 2 + (3,), np.uint8)
    image = np.asarray(Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC))
    return np.clip(image + rng.normal(0, 6, image.shape), 0, 255).astype(np.uint8)


def write_folder(folder: Path, side: int, suffix: str, number: int) -> str:
    """A folder of images."""
    from PIL import Image

    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(number):
        Image.fromarray(smooth(rng, side)).save(folder / f"{i:05}{suffix}")
    return str(folder)


class One:
    """The examples of a source one by one, as PyTorch wants them."""

    def __init__(self, source):
        self.source = source

    def __len__(self):
        return len(self.source)

    def __getitem__(self, i):
        return self.source[np.array([i])]["x"][0]


def streamed(source, **options) -> Iterator:
    """Batches by a stream."""
    from jaxdiff.data.batches import Batches
    from jaxdiff.data.streams import Stream

    stream = Stream(Batches(source.unlabelled(), BATCH), **options)
    return (stream[step] for step in itertools.count())


def remembered(source) -> Iterator:
    """Batches from memory."""
    from jaxdiff.data.batches import Batches

    batches = Batches(source.unlabelled()[:], BATCH)
    return (batches[step] for step in itertools.count())


def loaded(source, workers: int) -> Iterator:
    """Batches by PyTorch."""
    import torch

    loader = torch.utils.data.DataLoader(
        One(source),
        batch_size=BATCH,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        persistent_workers=workers > 0,
        multiprocessing_context="spawn" if workers else None,
    )
    return itertools.chain.from_iterable(itertools.repeat(loader))


def contenders(source, workers: list[int], threads: list[int]) -> dict[str, Iterator]:
    """Name ↦ endless batches."""
    found = {"memory": remembered(source)}
    found |= {f"stream, {n} threads": streamed(source, threads=n) for n in threads}
    found |= {f"stream, {n} workers": streamed(source, workers=n) for n in workers}
    found |= {f"DataLoader, {n} workers": loaded(source, n) for n in [0, *workers]}
    return found


def take_turns(runs: dict[str, Callable[[], float]], turns: int) -> dict[str, Times]:
    """Seconds of each, which `run` itself measures: workers of a worker are not allowed."""
    first = {name: run() for name, run in runs.items()}
    rest = [{name: run() for name, run in runs.items()} for _ in range(turns)]
    return {name: Times(first[name], [turn[name] for turn in rest], 0) for name in runs}


def timed(batches: Iterator, number: int) -> float:
    """Seconds for a batch, of `number` after those that were ready."""
    for _ in range(READY):
        next(batches)
    begin = time.perf_counter()
    for _ in range(number):
        next(batches)
    return (time.perf_counter() - begin) / number


def steps(source, batch: int, number: int, workers: int) -> dict[str, Callable[[], float]]:
    """Seconds for a training step: of one batch over and over, and of `fit` from a stream."""
    import jax
    import jax.numpy as jnp
    import optax

    import jaxdiff as jd
    from jaxdiff.data.batches import Batches
    from jaxdiff.data.images import to_model
    from jaxdiff.data.streams import Stream
    from jaxdiff.networks import UNet
    from jaxdiff.training import fit, init_state

    net = UNet(32, (1, 2, 2), 1, attention=())
    process = jd.Gaussian(jd.linear_beta(0.1, 20.0))
    denoising = jd.denoising(net.apply, process, jd.epsilon())
    optimizer = optax.adam(1e-4)

    def objective(params, key, batch):
        return denoising(params, key, {"x": to_model(batch["x"], 256)})

    step = jd.make_train_step(objective, optimizer, ema_decay=0.999)
    params = jax.jit(net.init)(jax.random.key(0), jnp.zeros((1, *source.shape)), jnp.zeros(1))
    batches = Batches(source.unlabelled(), batch)
    stream = Stream(batches, workers=workers)

    def run(batches) -> float:
        state = init_state(params, optimizer, jax.random.key(1))
        took = []

        def timed_step(state, batch):
            took.append(time.perf_counter())
            return jax.block_until_ready(step(state, batch))

        fit(timed_step, state, batches, steps=number + 2, log_every=10**6, progress=False)
        return (took[-1] - took[1]) / number

    same = [batches[0]] * (number + 2)
    return {"one batch": lambda: run(same), "stream": lambda: run(stream)}


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--workers", nargs="*", type=int, default=[1, 2])
    parser.add_argument("--threads", nargs="*", type=int, default=[1, 2, 4])
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--batches", type=int, default=60, help="Batches that count in a turn.")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=64, help="Of the training step.")
    args = parser.parse_args()
    import jax

    from jaxdiff.data.images import image_sources

    settings = ", ".join(f"{name}: {value}" for name, value in vars(args).items())
    print(f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores; batches of {BATCH}; {settings}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sources = {
            "PNG, 32 × 32": write_folder(folder / "png", 32, ".png", args.images),
            "JPEG, 64 × 64": write_folder(folder / "jpeg", 64, ".jpg", args.images),
            "digits, array_record": "digits",
        }
        rates = {}
        for name, where in sources.items():
            begin = time.perf_counter()
            source = image_sources(where, data_dir=folder)("train")
            print(f"{name}: {len(source)} training images, opened in ", end="")
            print(f"{time.perf_counter() - begin:.2f} s")
            entered = contenders(source, args.workers, args.threads)
            runs = {n: functools.partial(timed, b, args.batches) for n, b in entered.items()}
            rates[name] = take_turns(runs, args.turns)
        rows = [
            [
                name,
                *(
                    f"{BATCH / times[name].median:,.0f} ± {error(times[name])}"
                    for times in rates.values()
                ),
            ]
            for name in next(iter(rates.values()))
        ]
        print(table(["images/s", *rates], rows))
        source = image_sources(sources["PNG, 32 × 32"])("train")
        runs = steps(source, args.batch_size, 6, 0)
        found = take_turns(runs, args.turns)
        rows = [
            [
                n,
                f"{1e3 * t.median:,.0f} ± {1e3 * t.spread:,.0f}",
                f"{args.batch_size / t.median:,.0f}",
            ]
            for n, t in found.items()
        ]
        print(table(["a U-Net's step", "ms", "images/s"], rows))


def error(times: Times) -> str:
    """Half of the distance between the quartiles, in images/s."""
    return f"{BATCH / times.median * times.spread / times.median:,.0f}"


if __name__ == "__main__":
    main()
