"""Training side by side with PyTorch: forward, gradient and a whole step of the same networks.

    pip install -e ".[bench]"
    python tests/benchmarks/training.py

The networks are diffusers' UNet2DModel and DiTTransformer2DModel, with random weights written to a
folder once; PyTorch loads them as they are, eager, compiled and with the channels last, and we by
`jd.interop.from_diffusers`, so parameters and operations are the same. A step is the whole of it:
noise, forward, gradient, Adam, exponential average. Each contender has a process of its own and
they take turns; medians are compared. The table is markdown; its last column is the time over
that of the best of PyTorch's, and the share of the rate of one large product of matrices.

XLA's convolutions use one core, so `ours` shares the batch out over as many CPU devices as there
are cores, and each runs the step on its own images (`by="shard_map"`); `by jit` lets the compiler
split the step. The other two use one device, and `by Eigen` leaves its convolutions to another
library in XLA, which uses all cores. XLA also gives every step's memory back and asks for it again:
`--keep-memory` tells the C library to keep it, in large pages, for all contenders. Where all do not
fit into the memory, name fewer by `--ours` and `--rivals`. With an accelerator that JAX and PyTorch
see, both use it (`--dtype bfloat16` for either, and then `--flash` for ours, as PyTorch attends so
by itself), and memory is the accelerator's.
"""

import argparse
import functools
import os
import platform
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.turns import table, take_turns

UNET = {
    "_class_name": "UNet2DModel",
    "layers_per_block": 2,
    "block_out_channels": [32, 64],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "norm_num_groups": 8,
    "attention_head_dim": None,
    "in_channels": 3,
    "out_channels": 3,
}
DIT = {
    "_class_name": "DiTTransformer2DModel",
    "num_attention_heads": 4,
    "attention_head_dim": 32,
    "num_layers": 4,
    "patch_size": 2,
    "num_embeds_ada_norm": 10,
    "in_channels": 3,
    "out_channels": 3,
}
LARGE = UNET | {
    "layers_per_block": 4,
    "block_out_channels": [128, 256, 256, 256],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    "norm_num_groups": 32,
}
DEEP = LARGE | {"layers_per_block": 8}
# Name ↦ config, side of the images, batch.
NETWORKS = {
    "unet 8": (UNET, 8, 64),
    "unet 8, batch 128": (UNET, 8, 128),
    "unet 32": (UNET, 32, 64),
    "unet 32, batch 128": (UNET, 32, 128),
    "dit 8": (DIT, 8, 64),
    "dit 32": (DIT, 32, 64),
    "ddpm-type 63M, batch 128": (LARGE, 32, 128),
    "ddpm-type 63M, batch 512": (LARGE, 32, 512),
    "ddpm-type 63M, batch 1024": (LARGE, 32, 1024),
    "ddpm-type deep 109M, batch 128": (DEEP, 32, 128),
    "ddpm-type deep 109M, batch 512": (DEEP, 32, 512),
    "ddpm-type deep 109M, batch 1024": (DEEP, 32, 1024),
}
# Name ↦ how devices share a step, if each core is one; whether XLA leaves convolutions to Eigen.
OURS = {
    "ours": ("shard_map", False),
    "ours, by jit": ("jit", False),
    "ours, one device": (None, False),
    "ours, one device, by Eigen": (None, True),
}
EIGEN = (
    "--xla_cpu_experimental_ynn_fusion_type=LIBRARY_FUSION_TYPE_REDUCE,LIBRARY_FUSION_TYPE_DOT"
    " --xla_cpu_prefer_vector_width=512"
)
KEPT = {
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    "MALLOC_MMAP_MAX_": 0,
    "MALLOC_TRIM_THRESHOLD_": 2**40,
}
TASKS = ("forward", "gradient", "step")
RIVALS = {
    "PyTorch": (False, False),
    "PyTorch, channels last": (False, True),
    "PyTorch, compiled": (True, False),
    "PyTorch, compiled, channels last": (True, True),
}
SCHEDULER = '{"num_train_timesteps": 1000, "beta_schedule": "linear"}'


def write(config: dict, side: int, folder: Path) -> tuple[int, int]:
    """A network of random weights as a pipeline's folder; its parameters, operations an image."""
    import diffusers
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    torch.manual_seed(0)
    given = {name: value for name, value in config.items() if name != "_class_name"}
    model = getattr(diffusers, config["_class_name"])(sample_size=side, **given)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    # The DiT of the paper embeds step and class once, diffusers' in every block.
    for block in getattr(model, "transformer_blocks", []):
        block.norm1.emb.load_state_dict(model.transformer_blocks[0].norm1.emb.state_dict())
    model.save_pretrained(
        folder / ("unet" if config["_class_name"] == "UNet2DModel" else "transformer")
    )
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(SCHEDULER)
    labels = {"class_labels": torch.zeros(1, dtype=int)} if hasattr(model, "pos_embed") else {}
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, side, side), torch.zeros(1, dtype=int), **labels)
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return parameters, counter.get_total_flops()


def ours(
    folder: Path,
    task: str,
    side: int,
    batch: int,
    dtype: str,
    by: str | None,
    eigen: bool,
    flash: bool = False,
):
    """The network by this library, as a function that runs the task once."""
    if by is not None:  # Says nothing to an accelerator.
        os.environ["JAX_NUM_CPU_DEVICES"] = str(os.cpu_count())
    if eigen:
        os.environ["XLA_FLAGS"] = EIGEN
    import jax
    import jax.numpy as jnp

    import jaxdiff as jd
    from jaxdiff import networks
    from jaxdiff.training import init_state, warmup_adam

    model = jd.interop.from_diffusers(folder)
    net = model.net.clone(dtype=jnp.dtype(dtype), flash=flash)
    if isinstance(net, networks.DiT):
        net = net.clone(unroll=net.depth)
    x = jax.random.normal(jax.random.key(0), (batch, side, side, 3))
    mesh = jd.parallel.data_mesh()
    data = jd.parallel.shard_batch({"x": x, "steps": jnp.full(batch, 500.0)}, mesh)
    params = jd.parallel.replicate(model.params, mesh)
    objective = jd.denoising(net.apply, model.process, model.parameterization)
    if task == "forward":
        run = jax.jit(net.apply)
        return lambda: jax.block_until_ready(run(params, data["x"], data["steps"]))
    if task == "gradient":
        mean = lambda params, key, x: jnp.mean(objective(params, key, {"x": x})[0])
        run = jax.jit(jax.grad(mean))
        return lambda: jax.block_until_ready(run(params, jax.random.key(1), data["x"]))
    optimizer = warmup_adam(1e-3, steps=10**6, clip=float("inf"), cosine=False)
    by = by if jax.default_backend() == "cpu" and by else "jit"
    step = jd.make_train_step(objective, optimizer, ema_decay=0.999, mesh=mesh, by=by)
    state = init_state(model.params, optimizer, jax.random.key(1), mesh=mesh)

    def run_step():
        nonlocal state
        state, _ = step(state, {"x": data["x"]})
        jax.block_until_ready(state.params)

    return run_step


def theirs(folder: Path, task: str, side: int, batch: int, dtype: str, compiled: bool, last: bool):
    """The network by diffusers and PyTorch, as a function that runs the task once."""
    import diffusers
    import torch

    name = "unet" if (folder / "unet").is_dir() else "transformer"
    kind = diffusers.UNet2DModel if name == "unet" else diffusers.DiTTransformer2DModel
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if last and name == "transformer":
        raise ValueError("a Transformer has no channels to put last")
    model = kind.from_pretrained(folder / name).to(device).train()
    x0 = torch.randn(batch, 3, side, side, device=device)
    if last:
        model = model.to(memory_format=torch.channels_last)
        x0 = x0.to(memory_format=torch.channels_last)
    parameters = [p for p in model.parameters() if p.requires_grad]
    labels = torch.full((batch,), 3, device=device)
    network = torch.compile(model) if compiled else model
    narrow = torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16")
    alphas = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, device=device), 0)

    def call(x, t):
        with narrow:
            if name == "unet":
                return network(x, t, return_dict=False)[0]
            return network(x, t, class_labels=labels, return_dict=False)[0]

    def loss():
        t = torch.randint(0, 1000, (batch,), device=device)
        noise = torch.randn_like(x0)
        alpha = alphas[t].view(-1, 1, 1, 1)
        x = alpha.sqrt() * x0 + (1 - alpha).sqrt() * noise
        return torch.mean((call(x, t).float() - noise) ** 2)

    optimizer = torch.optim.Adam(parameters, lr=1e-3, fused=True)
    average = [p.detach().clone() for p in parameters]
    middle = torch.full((batch,), 500, device=device)

    def run():
        if task == "forward":
            with torch.no_grad():
                call(x0, middle)
        else:
            optimizer.zero_grad(set_to_none=True)
            loss().backward()
        if task == "step":
            optimizer.step()
            with torch.no_grad():
                torch._foreach_lerp_(average, parameters, 0.001)
        if device == "cuda":
            torch.cuda.synchronize()

    return run


def products(dtype: str, size: int = 8192):
    """One product of two square matrices."""
    import jax
    import jax.numpy as jnp

    size = size if jax.default_backend() != "cpu" else 2048
    a = jax.random.normal(jax.random.key(0), (size, size), jnp.dtype(dtype))
    multiply = jax.jit(lambda a: a @ a)
    return lambda: multiply(a).block_until_ready()


def machine(args: argparse.Namespace) -> str:
    """Versions, threads, and the settings of a run."""
    import jax

    packages = ", ".join(f"{name} {version(name)}" for name in ("jax", "torch", "diffusers"))
    device = f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores"
    settings = ", ".join(f"{name}: {value}" for name, value in vars(args).items())
    return f"Python {platform.python_version()}, {packages}; {device}; {settings}"


def parsed(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The arguments, with those of every contest, of which memory is settled here."""
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--keep-memory", action="store_true")
    args = parser.parse_args()
    # All contenders are on one accelerator: JAX must not take three quarters of it for itself.
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    if args.keep_memory:
        os.environ |= {name: str(value) for name, value in KEPT.items()}
    return args


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    small = [name for name in NETWORKS if "ddpm" not in name and "128" not in name]
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=small)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--ours", nargs="+", choices=OURS, default=list(OURS))
    parser.add_argument("--rivals", nargs="*", choices=RIVALS, default=list(RIVALS))
    parser.add_argument("--flash", action="store_true")
    parser.add_argument("--turns", type=int, default=7)
    args = parsed(parser)
    print(machine(args))
    import jax

    peak = take_turns({"": functools.partial(products, args.dtype)}, turns=args.turns)[""].median
    on_cpu = jax.default_backend() == "cpu"
    size = 2048 if on_cpu else 8192
    peak = 2 * size**3 / peak
    print(f"matrix products: {peak / 1e12:.3g} TFLOP/s\n")

    rows = []
    for name in args.networks:
        config, side, batch = NETWORKS[name]
        with tempfile.TemporaryDirectory() as folder:
            folder = Path(folder)
            parameters, flops = write(config, side, folder)
            flops *= batch
            for task in args.tasks:
                work = folder, task, side, batch, args.dtype
                makers = {
                    who: functools.partial(ours, *work, *settings, args.flash)
                    for who, settings in OURS.items()
                    if who in args.ours
                    and (who == "ours" or (on_cpu and (task == "step" or settings[0] != "jit")))
                }
                for rival in args.rivals:
                    compiled, last = RIVALS[rival]
                    if last and config is DIT:
                        continue
                    makers[rival] = functools.partial(theirs, *work, compiled, last)
                times = take_turns(makers, turns=args.turns)
                best = min((times[r].median for r in times if r not in OURS), default=float("nan"))
                work_done = flops * (1 if task == "forward" else 3)
                rows += [
                    [
                        f"{name} ({parameters / 1e6:.2f} M, {flops / 1e9:.3g} GFLOP)",
                        task,
                        who,
                        f"{1e3 * t.median:.4g} ± {1e3 * t.spread:.2g}",
                        f"{batch / t.median:.4g}",
                        f"{t.first:.3g}",
                        f"{t.peak / 2**20:.0f}",
                        f"{t.median / best:.3f}"
                        + f" ({work_done / t.median / peak:.0%} of the products' rate)",
                    ]
                    for who, t in times.items()
                ]
                print(*(" | ".join(row) for row in rows[-len(times) :]), sep="\n", flush=True)
    head = [
        "network",
        "task",
        "by",
        "ms",
        "images/s",
        "first, s",
        "memory, MiB",
        "over the best rival",
    ]
    print()
    print(table(head, rows))


if __name__ == "__main__":
    main()
