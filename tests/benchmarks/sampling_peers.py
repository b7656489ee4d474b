"""Sampling side by side with diffusers, k-diffusion and azula: one network, one noise, one answer.

    pip install -e ".[bench]"
    python tests/benchmarks/sampling_peers.py

64 images by 50 steps of DDIM from the same noise at the same noise levels, by each library's own
loop around the same U-Net: the three rivals' in PyTorch, eager and compiled, ours in JAX with the
same weights. All four give the same images, which the table shows by their largest difference.
(k-diffusion has DDIM as Euler's rule of the equation in x / α.) Each contender has a process of its
own and they take turns, and so do 50 calls of the bare network in each framework: "over its calls"
is the time over theirs, what the loop costs. On a CPU ours has a device a core, and each draws its
share of the images; `--keep-memory` is that of `training.py`, for all.
"""

import argparse
import dataclasses
import functools
import math
import os
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import training
from benchmarks.training import UNET, machine, parsed, write
from benchmarks.turns import table, take_turns

IMAGES, STEPS, TRAINED = 64, 50, 1000
LEVELS = list(range(TRAINED, 0, -TRAINED // STEPS))
"""Steps 1000, 980, …, 20 of the schedule; 0 comes last."""
OURS = "jaxdiff"
LIBRARIES = ("diffusers", "k-diffusion", "azula")


def ours(folder: Path, side: int, dtype: str):
    """This library's sampler, in one compiled program."""
    os.environ["JAX_NUM_CPU_DEVICES"] = str(os.cpu_count())
    import jax
    import jax.numpy as jnp

    import jaxdiff as jd

    model = jd.interop.from_diffusers(folder)
    narrow = model.net.clone(dtype=jnp.dtype(dtype))
    model = dataclasses.replace(model, apply=narrow.apply)
    x = jnp.asarray(np.load(folder / "noise.npy")).transpose(0, 2, 3, 1)
    grid = jnp.asarray([*LEVELS, 0]) / TRAINED

    def share(model, x):
        return jd.sample(jd.DDIM(model.process), model, grid, jax.random.key(0), x)

    draw = jd.parallel.per_shard(share, jd.parallel.data_mesh())
    return kept(folder, OURS, lambda: np.asarray(draw(model, x)).transpose(0, 3, 1, 2))


def theirs(folder: Path, library: str, side: int, dtype: str, compiled: bool):
    """A rival's sampler around the network in PyTorch."""
    import diffusers
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = diffusers.UNet2DModel.from_pretrained(folder / "unet").to(device).eval()
    network = torch.compile(model) if compiled else model
    products = torch.cumprod(1 - torch.linspace(1e-4, 0.02, TRAINED, device=device), 0)
    x = torch.as_tensor(np.load(folder / "noise.npy"), device=device)
    narrow = torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16")

    def epsilon(x, t):
        with narrow:
            return network(x, t, return_dict=False)[0].float()

    loop = {"diffusers": by_diffusers, "k-diffusion": by_k_diffusion, "azula": by_azula}[library]
    with torch.no_grad():
        draw = loop(epsilon, products)

    def run():
        with torch.no_grad():
            return draw(x).cpu().numpy()

    return kept(folder, f"{library}, compiled" if compiled else library, run)


def by_diffusers(epsilon, products):
    """DDIMScheduler, in the loop of its documentation."""
    import diffusers

    scheduler = diffusers.DDIMScheduler(
        num_train_timesteps=TRAINED, clip_sample=False, timestep_spacing="trailing"
    )
    scheduler.set_timesteps(STEPS, device=products.device)

    def draw(x):
        for t in scheduler.timesteps:
            x = scheduler.step(epsilon(x, t), t, x, return_dict=False)[0]
        return x

    return draw


def by_k_diffusion(epsilon, products):
    """sample_euler, of x / α."""
    import torch
    from k_diffusion.external import DiscreteEpsDDPMDenoiser
    from k_diffusion.sampling import sample_euler

    denoiser = DiscreteEpsDDPMDenoiser(epsilon, products, quantize=True)
    sigmas = torch.stack([denoiser.sigmas[n - 1] for n in LEVELS])
    sigmas = torch.cat([sigmas, sigmas.new_zeros(1)])
    return lambda x: sample_euler(denoiser, x / products[-1].sqrt(), sigmas, disable=True)


def by_azula(epsilon, products):
    """DDIMSampler, around a denoiser of the kind that it documents."""
    import torch
    from azula.denoise import Denoiser, DiracPosterior
    from azula.sample import DDIMSampler

    table = torch.cat([products.new_ones(1), products])

    def schedule(t):
        product = table[torch.round(TRAINED * t).long()]
        return product.sqrt(), (1 - product).sqrt()

    class OfEpsilon(Denoiser):
        def __init__(self):
            super().__init__()
            self.schedule = schedule

        def forward(self, x, t, **kwargs):
            alpha, sigma = schedule(t)
            noise = epsilon(x, torch.round(TRAINED * t) - 1)
            return DiracPosterior(mean=(x - sigma * noise) / alpha)

    return DDIMSampler(OfEpsilon(), steps=STEPS, eta=0.0, silent=True, device=products.device)


def repeated(maker, *work):
    """As many calls of the bare network as samples take."""
    call = maker(*work)

    def run():
        for _ in range(STEPS):
            call()

    return run


def kept(folder: Path, name: str, run):
    """Keeps the samples of a contender's first run, to be compared."""

    def once():
        samples = run()
        if not (folder / f"{name}.npy").exists():
            np.save(folder / f"{name}.npy", samples)

    return once


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sides", nargs="+", type=int, default=[8, 32])
    parser.add_argument("--rivals", nargs="*", choices=LIBRARIES, default=LIBRARIES)
    parser.add_argument("--turns", type=int, default=5)
    args = parsed(parser)
    versions = ", ".join(f"{name} {version(name)}" for name in args.rivals)
    print(f"{machine(args)}; {versions}")
    rows = []
    for side in args.sides:
        with tempfile.TemporaryDirectory() as path:
            folder = Path(path)
            write(UNET, side, folder)
            noise = np.random.default_rng(0).standard_normal((IMAGES, 3, side, side))
            np.save(folder / "noise.npy", noise.astype(np.float32))
            makers = {OURS: functools.partial(ours, folder, side, args.dtype)}
            for library in args.rivals:
                for name, compiled in ((library, False), (f"{library}, compiled", True)):
                    work = folder, library, side, args.dtype, compiled
                    makers[name] = functools.partial(theirs, *work)
            bare = folder, "forward", side, IMAGES, args.dtype
            calls = {
                f"calls, {OURS}": (training.ours, *bare, "jit", False),
                "calls, eager": (training.theirs, *bare, False, False),
                "calls, compiled": (training.theirs, *bare, True, False),
            }
            makers |= {name: functools.partial(repeated, *work) for name, work in calls.items()}
            times = take_turns(makers, turns=args.turns)
            forward = {name: times.pop(name).median for name in calls if name in times}
            reference = np.load(folder / f"{OURS}.npy")
            apart = {name: np.abs(np.load(folder / f"{name}.npy") - reference) for name in times}
        best = min((t.median for name, t in times.items() if name != OURS), default=math.nan)
        for name, t in times.items():
            kind = OURS if name == OURS else "compiled" if "compiled" in name else "eager"
            own = forward.get(f"calls, {kind}", math.nan)
            rows.append(
                [
                    f"{side} × {side}",
                    name,
                    f"{t.median:.3f} ± {t.spread:.3f}",
                    f"{t.median / own:.2f}",
                    f"{t.median / best:.2f}",
                    f"{apart[name].max():.1e}",
                    f"{t.first:.1f}",
                ]
            )
            print(" | ".join(rows[-1]), flush=True)
    head = ["images", "by", "s", "over its calls", "over the best rival", "apart", "first, s"]
    print()
    print(table(head, rows))


if __name__ == "__main__":
    main()
