"""Latents of digits: do they return, may one walk between them, and are they the same for all?

    jaxdiff train configs/digits.py --workdir runs/a
    jaxdiff train configs/digits.py --workdir runs/b --width 24 --seed 1
    python tests/benchmarks/latents.py runs/a runs/b

takes finished runs of one data set under one process, encodes test images by both, and prints

* the round trip's error, and the latents' typicality, of single images and of all together;
* the share of the first run's interpolants between pairs of test images that are as near to a
  training image as 95 % of the test images are: at least 0.9; and, which is harder, as near as
  95 % of the training images are to each other;
* the correlation of the two runs' latents, at least 0.9, and that of shuffled ones, at most 0.1.

It writes the first run's interpolants beside `--out`, a row for each pair.
"""

import argparse
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff import latents, metrics, plotting
from jaxdiff.checkpoints import restore_ema
from jaxdiff.data.images import dequantize, from_model, load_images, to_model
from jaxdiff.experiment import load_run
from jaxdiff.solve import adaptive

WEIGHTS = jnp.linspace(0.0, 1.0, 9)


def load(folder: Path) -> tuple[Any, Any]:
    """A run's experiment, and its averaged model."""
    experiment = load_run(folder)
    abstract = jax.eval_shape(experiment.init, jax.random.key(0))
    return experiment, experiment.denoiser(restore_ema(folder / "checkpoints", abstract))


def show_round_trip(process: Any, denoise: Any, x: Any, options: dict[str, Any]) -> None:
    """Prints what returns, and whether the latents are the prior's."""
    error = latents.round_trip(process, denoise, x, **options)
    print(f"round trip: max {float(error.max.max()):.1e}, rms {float(error.rms.max()):.1e}")
    z: Any = latents.encode(process, denoise, x, **options)
    each, pooled = (latents.typicality(process, z, pooled=pooled) for pooled in (False, True))
    unusual = np.mean(each.radius_p_value < 0.05), np.mean(each.correlation_p_value < 0.05)
    print(
        f"latents: radius {pooled.radius[0]:.3f} (p {pooled.radius_p_value[0]:.1e}; median "
        f"{np.median(each.radius):.3f}, largest {each.radius.max():.3f}), correlation "
        f"{np.round(pooled.correlation[0], 3).tolist()}; below p = 0.05 alone: radius "
        f"{unusual[0]:.3f}, correlation {unusual[1]:.3f}"
    )


def show_interpolants(path: Any, train: Any, test: Any, levels: int) -> bool:
    """Prints how near they are to training images, beside blends of pixels; whether near enough."""
    inner = path[1:-1].reshape(-1, *path.shape[2:])
    w = WEIGHTS[1:-1].reshape(-1, 1, 1, 1, 1)
    blends = ((1 - w) * path[0][None] + w * path[-1][None]).reshape(inner.shape)
    limits = metrics.memorisation(test, train, test)
    distances = {
        name: metrics.nearest_distances(to_model(from_model(x, levels), levels), train)
        for name, x in (("interpolants", inner), ("blends", blends))
    } | {"test images": metrics.nearest_distances(test, train)}
    shares = {
        name: [float((d <= limits[f"{of}_q95"]).mean()) for of in ("heldout", "train")]
        for name, d in distances.items()
    }
    limit, strict = limits["heldout_q95"], limits["train_q95"]
    print(f"share as near to a training image as 95 % of test images ({limit:.2f}), and as 95 % of")
    print(f"training images to each other ({strict:.2f}):")
    for name, (share, hard) in shares.items():
        print(f"  {name}: {share:.3f}, {hard:.3f}; median {np.median(distances[name]):.2f}")
    return shares["interpolants"][0] >= 0.9


def main() -> None:
    """Prints the checks, and exits with 1 if one is missed."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("runs", nargs=2, type=Path, help="folders of finished runs")
    parser.add_argument("--images", type=int, default=200, help="test images, an even number")
    parser.add_argument("--tolerance", type=float, default=1e-4, help="of the solver")
    parser.add_argument("--out", type=Path, default=Path("interpolation.png"), help="picture")
    options = parser.parse_args()
    (run, first), (other, second) = (load(folder) for folder in options.runs)
    if (run.config.dataset, run.config.beta_max) != (other.config.dataset, other.config.beta_max):
        raise SystemExit("the runs are of different data or processes.")
    levels, process = run.config.levels, run.process
    train = np.asarray(to_model(load_images(run.config.dataset, "train").x, levels))
    test = load_images(run.config.dataset, "test").x.astype(int)
    x = dequantize(jax.random.key(0), test[: options.images], levels)
    solve = {"controller": adaptive(options.tolerance)}

    show_round_trip(process, first, x, solve)
    half = len(x) // 2
    path = latents.interpolate(process, first, x[:half], x[half : 2 * half], WEIGHTS, **solve)
    near = show_interpolants(path, train, to_model(test, levels), levels)
    plotting.interpolation_grid(path[:, :8], options.out, weights=WEIGHTS.tolist())
    print(f"wrote {options.out}")
    same = latents.identifiability(process, first, second, x, key=jax.random.key(1), **solve)
    print(
        f"correlation of the runs' latents {float(same.correlation):.3f} (coordinates "
        f"{float(same.per_coordinate.min()):.3f} … {float(same.per_coordinate.max()):.3f}), "
        f"shuffled {float(same.shuffled):.3f}"
    )
    passes = near and same.correlation >= 0.9 and abs(same.shuffled) <= 0.1
    raise SystemExit(0 if passes else 1)


if __name__ == "__main__":
    main()
