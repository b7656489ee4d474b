"""How long a user waits for the first thing: import, first training step, first sample.

    pip install -e ".[bench]"
    python tests/benchmarks/start_up.py

Every run is a new process. Ours runs with an empty compilation cache and then with the one that it
left; PyTorch's eager and compiled, the latter with its cache emptied and then left. The U-Net is
that of `training.py` on 32 × 32 × 3 images; a step is of 64 of them, the sample one by 50 steps of
DDIM. With an accelerator that JAX and PyTorch see, both use it.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.training import UNET, machine, parsed, write
from benchmarks.turns import table

OURS = """
import json, sys, time
from dataclasses import replace
begin = time.perf_counter()
import jax
import jax.numpy as jnp
import jaxdiff as jd
from jaxdiff.training import init_state, warmup_adam
marks = [time.perf_counter()]
model = jd.interop.from_diffusers(sys.argv[1])
model = replace(model, apply=model.net.clone(dtype=jnp.dtype(sys.argv[2])).apply)
objective = jd.denoising(model.apply, model.process, model.parameterization)
optimizer = warmup_adam(1e-3, steps=1000)
step = jd.make_train_step(objective, optimizer, ema_decay=0.999)
state = init_state(model.params, optimizer, jax.random.key(0))
x = jax.random.normal(jax.random.key(1), (64, 32, 32, 3))
state, metrics = step(state, {"x": x})
jax.block_until_ready(state)
marks.append(time.perf_counter())
sample = jd.sample(jd.DDIM(model.process), model, model.grid[::20], jax.random.key(2), x[:1])
jax.block_until_ready(sample)
marks.append(time.perf_counter())
"""
THEIRS = """
import json, sys, time
begin = time.perf_counter()
import torch
from diffusers import DDIMScheduler, UNet2DModel
marks = [time.perf_counter()]
device = "cuda" if torch.cuda.is_available() else "cpu"
narrow = torch.autocast(device, torch.bfloat16, enabled=sys.argv[2] == "bfloat16")
finish = torch.cuda.synchronize if device == "cuda" else lambda: None
model = UNet2DModel.from_pretrained(sys.argv[1] + "/unet").to(device)
network = torch.compile(model) if COMPILED else model
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
scheduler = DDIMScheduler(num_train_timesteps=1000, clip_sample=False)
x, noise = torch.randn(2, 64, 3, 32, 32, device=device)
times = torch.randint(0, 1000, (64,), device=device)
with narrow:
    out = network(scheduler.add_noise(x, noise, times), times).sample
torch.mean((out.float() - noise) ** 2).backward()
optimizer.step()
finish()
marks.append(time.perf_counter())
scheduler.set_timesteps(50)
x = x[:1]
with torch.no_grad(), narrow:
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t).sample.float(), t, x).prev_sample
finish()
marks.append(time.perf_counter())
"""
REPORT = """
print(json.dumps([b - a for a, b in zip([begin, *marks], marks)]))
"""


def seconds(code: str, folder: Path, cache: Path, dtype: str) -> list[float]:
    """Of import, first step and first sample, in a new process."""
    given = {"JAX_COMPILATION_CACHE_DIR": str(cache), "TORCHINDUCTOR_CACHE_DIR": str(cache)}
    given |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    command = [sys.executable, "-c", code + REPORT, str(folder), dtype]
    done = subprocess.run(command, env=os.environ | given, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=3)
    args = parsed(parser)
    print(machine(args))
    codes = {
        "ours": OURS,
        "PyTorch": "COMPILED = False" + THEIRS,
        "PyTorch, compiled": "COMPILED = True" + THEIRS,
    }
    rows = []
    with tempfile.TemporaryDirectory() as path:
        folder = Path(path) / "pipeline"
        folder.mkdir()
        write(UNET, 32, folder)
        for name, code in codes.items():
            runs = {"cold": [], "with its cache": []}
            for _ in range(args.repeats):
                with tempfile.TemporaryDirectory() as cache:
                    for of in runs.values():
                        of.append(seconds(code, folder, Path(cache), args.dtype))
            for state, found in runs.items():
                median = [statistics.median(column) for column in zip(*found, strict=True)]
                row = [*median, sum(median)]
                rows.append([name, state, *(f"{value:.2f}" for value in row)])
                print(" | ".join(rows[-1]), flush=True)
    print()
    print(table(["", "cache", "import, s", "first step, s", "first sample, s", "all, s"], rows))


if __name__ == "__main__":
    main()
