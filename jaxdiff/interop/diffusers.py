"""Models of the library diffusers: a folder of json and safetensors, and back.

A pipeline's folder has the network in `unet/` or `transformer/` (config.json beside
diffusion_pytorch_model.safetensors) and the process in `scheduler/scheduler_config.json`. Its
step k of T is our time (k + 1)/T; of the VE process see `score_sde`.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff import grids, parameterizations, schedules
from jaxdiff.interop.base import (
    Pretrained,
    from_torch,
    read_safetensors,
    setting,
    shapes_of,
    to_torch,
    write_safetensors,
)
from jaxdiff.interop.score_sde import exploding
from jaxdiff.networks import unet
from jaxdiff.networks.dit import DiT
from jaxdiff.networks.embeddings import GaussianFourier, Sinusoidal
from jaxdiff.parameterizations import Parameterization
from jaxdiff.processes.gaussian import Gaussian
from jaxdiff.typing import Grid, Params

__all__ = ["from_diffusers", "to_diffusers"]

WEIGHTS = "diffusion_pytorch_model.safetensors"

Config = Mapping[str, Any]


class Block(NamedTuple):
    """What a kind of block, down or up, has beside its residual blocks."""

    attends: bool = False
    skips: bool = False
    blockwise: bool = False


# Of the names in a config, without "Down" or "Up".
BLOCKS = {
    "Block2D": Block(),
    "AttnBlock2D": Block(attends=True),
    "SkipBlock2D": Block(skips=True),
    "AttnSkipBlock2D": Block(attends=True, skips=True),
    "ResnetsampleBlock2D": Block(blockwise=True),
}

# Attention was once written as convolutions, by other names.
OLD_NAMES = {
    ".query.": ".to_q.",
    ".key.": ".to_k.",
    ".value.": ".to_v.",
    ".proj_attn.": ".to_out.0.",
}

RESIDUAL = {
    "norm_0": "norm1",
    "conv_0": "conv1",
    "inject": "time_emb_proj",
    "norm_1": "norm2",
    "conv_1": "conv2",
    "skip": "conv_shortcut",
}
ATTENTION = {
    "norm": "group_norm",
    "query": "to_q",
    "key": "to_k",
    "value": "to_v",
    "out": "to_out.0",
}
DIT_BLOCK = {
    "adapt": "norm1.linear",
    "query": "attn1.to_q",
    "key": "attn1.to_k",
    "value": "attn1.to_v",
    "out": "attn1.to_out.0",
    "mlp_in": "ff.net.0.proj",
    "mlp_out": "ff.net.2",
}


# The network


one_of = partial(setting, source="config.json")


def given(config: Config, *names: str) -> None:
    """Raises a ValueError unless the settings of these names are there."""
    if missing := [name for name in names if config.get(name) is None]:
        raise ValueError(f"{', '.join(missing)} must be given in config.json, got nothing.")


def _levels(config: Config) -> list[Block]:
    """The kinds of the levels, from the finest, the same down and up."""
    down, up = (
        [name.replace(way, "", 1) for name in config[f"{way.lower()}_block_types"]]
        for way in ("Down", "Up")
    )
    down, up = (
        [name.replace("Resnet" + way.lower(), "Resnet") for name in names]
        for names, way in ((down, "Down"), (up, "Up"))
    )
    if unknown := set(down + up) - BLOCKS.keys():
        raise ValueError(
            f"block types must be those of UNet2DModel with levels of {', '.join(BLOCKS)}, "
            f"got {', '.join(sorted(unknown))} in config.json."
        )
    if down != up[::-1]:
        raise ValueError(
            "up_block_types must mirror down_block_types, got "
            f"{config['down_block_types']} and {config['up_block_types']} in config.json."
        )
    return [BLOCKS[name] for name in down]


def _network(config: Config) -> unet.UNet:
    """The U-Net of a config.json.

    Raises:
        ValueError: names the setting that no network here has.
    """
    given(config, "block_out_channels", "down_block_types", "up_block_types", "out_channels")
    channels, levels = config["block_out_channels"], _levels(config)
    width = channels[0]
    if any(n % width for n in channels):
        raise ValueError(
            f"block_out_channels must be multiples of the first, got {channels} in config.json."
        )
    one_of(config, "act_fn", "silu", "swish")
    one_of(config, "add_attention", True)
    one_of(config, "class_embed_type", None)
    one_of(config, "mid_block_type", "UNetMidBlock2D")
    # With scale and shift, and this left open, the attention in the middle is without a norm.
    groups = config.get("norm_num_groups", 32)
    if one_of(config, "resnet_time_scale_shift", "default", "scale_shift") == "scale_shift":
        one_of({"attn_norm_num_groups": None, **config}, "attn_norm_num_groups", groups)
    else:
        one_of(config, "attn_norm_num_groups", None, groups)
    skips = any(level.skips for level in levels)
    if skips != all(level.skips for level in levels):
        raise ValueError(
            "down_block_types must have skips at all levels or at none, got "
            f"{config['down_block_types']} in config.json."
        )
    scale = math.sqrt(2.0) if skips else 1.0
    if not math.isclose(config.get("mid_block_scale_factor", 1.0), scale, rel_tol=1e-4):
        raise ValueError(
            f"mid_block_scale_factor must be {scale:.4f} with such levels, got "
            f"{config['mid_block_scale_factor']} in config.json."
        )
    blockwise = skips or one_of(config, "downsample_type", "conv", "resnet") == "resnet"
    if not skips:
        one_of(config, "upsample_type", "resnet" if blockwise else "conv")
        # Blocks that attend do as these settings say, the others as their names do.
        if any(level.blockwise != blockwise for level in levels[:-1] if not level.attends):
            raise ValueError(
                f"down_block_types must change sides as downsample_type says, got "
                f"{config['down_block_types']} and {config['downsample_type']!r} in config.json."
            )
    padding = (0, 1) if one_of(config, "downsample_padding", 1, 0) == 0 else (1, 1)
    variant = unet.Variant(
        rescale=skips,
        strided=not blockwise,
        padding=padding,
        smooth=skips,
        project=skips,
        image_in="skip" if skips else None,
        image_out=skips,
        attend_each=not skips,
        groups=None if skips else groups,
        epsilon=config.get("norm_eps", 1e-5),
    )
    if one_of(config, "time_embedding_type", "positional", "fourier") == "fourier":
        embedding: Any = GaussianFourier(2 * width)
    else:
        # Their frequencies are 10⁴ to the −k/(n − shift), ours to the −k/(n − 1).
        half = width // 2
        shift = config.get("freq_shift", 0)
        embedding = Sinusoidal(width, max_period=1e4 ** ((half - 1) / (half - shift)))
    return unet.UNet(
        width=width,
        multipliers=tuple(n // width for n in channels),
        blocks=config.get("layers_per_block", 2),
        attention=tuple(
            config["sample_size"] // 2**i for i, level in enumerate(levels) if level.attends
        ),
        head_width=config.get("attention_head_dim", 8),
        dropout=config.get("dropout", 0.0),
        embedding=embedding,
        scale_shift=config.get("resnet_time_scale_shift") == "scale_shift",
        num_classes=config.get("num_class_embeds"),
        variant=variant,
        out_channels=config["out_channels"],
    )


def _names(net: unet.UNet) -> dict[str, str]:
    """Where each module of ours is found in their state."""
    last = len(net.multipliers) - 1
    names = {
        "in": "conv_in",
        "condition/Dense_0": "time_embedding.linear_1",
        "condition/Dense_1": "time_embedding.linear_2",
        "condition/Embed_0": "class_embedding",
        "embedding": "time_proj",
        "out_0_norm": "conv_norm_out",
        "out_0_conv": "conv_out",
    }

    def inside(ours: str, theirs: str, table: Mapping[str, str]) -> Iterator[tuple[str, str]]:
        return ((f"{ours}/{a}", f"{theirs}.{b}") for a, b in table.items())

    def residual(ours: str, theirs: str) -> None:
        names.update(inside(ours, theirs, RESIDUAL))

    def attention(ours: str, theirs: str) -> None:
        names.update(inside(ours, theirs, ATTENTION))

    residual("middle_block_0", "mid_block.resnets.0")
    residual("middle_block_1", "mid_block.resnets.1")
    attention("middle_attention", "mid_block.attentions.0")
    for level in range(last + 1):
        down, up = f"down_blocks.{level}", f"up_blocks.{last - level}"
        for i in range(net.blocks + 1):
            residual(f"down_{level}_block_{i}", f"{down}.resnets.{i}")
            residual(f"up_{level}_block_{i}", f"{up}.resnets.{i}")
            attention(f"down_{level}_attention_{i}", f"{down}.attentions.{i}")
            one = 0 if not net.variant.attend_each else i
            attention(f"up_{level}_attention_{i}", f"{up}.attentions.{one}")
        if level > 0:
            names[f"out_{level}_norm"] = f"{up}.skip_norm"
            names[f"out_{level}_conv"] = f"{up}.skip_conv"
        # Theirs halve at the end of a level, ours at the beginning of the next.
        below = f"down_{level + 1}"
        if net.variant.strided:
            names[below] = f"{down}.downsamplers.0.conv"
            names[f"up_{level}"] = f"{up}.upsamplers.0.conv"
        else:
            skips = net.variant.image_out
            residual(below, f"{down}.{'resnet_down' if skips else 'downsamplers.0'}")
            residual(f"up_{level}", f"{up}.{'resnet_up' if skips else 'upsamplers.0'}")
        names[f"{below}_image"] = f"{down}.skip_conv"
    return names


class Layout(NamedTuple):
    """How one of their classes is written as one of ours.

    Attributes:
        net: the network.
        names: where each module is found, once `to_theirs` has been applied.
        to_theirs: from our parameters to a tree that differs from their state by names alone.
        to_ours: its inverse.
    """

    net: unet.UNet | DiT
    names: Mapping[str, str]
    to_theirs: Callable[[Params], Params]
    to_ours: Callable[[Params], Params]


def _swap(dense: Params) -> Params:
    """Sines and cosines the other way round, of the layer that reads them."""
    return {**dense, "kernel": jnp.roll(dense["kernel"], len(dense["kernel"]) // 2, axis=0)}


def _unet_layout(config: Config) -> Layout:
    net = _network(config)
    fourier = config.get("time_embedding_type") == "fourier"
    swapped = config.get("flip_sin_to_cos", True) and not fourier

    def conditioned(params: Params, table: Callable[[Any], Any]) -> Params:
        condition = dict(params["params"]["condition"])
        if swapped:
            condition["Dense_0"] = _swap(condition["Dense_0"])
        if "Embed_0" in condition:
            condition["Embed_0"] = {"embedding": table(condition["Embed_0"]["embedding"])}
        return {"params": {**params["params"], "condition": condition}}

    return Layout(
        net,
        _names(net),
        lambda params: conditioned(params, lambda table: table[:-1]),
        # They have no null label: of no class, nothing is added.
        lambda params: conditioned(params, lambda table: jnp.pad(table, ((0, 1), (0, 0)))),
    )


def _dit_layout(config: Config) -> Layout:
    one_of(config, "activation_fn", "gelu-approximate")
    one_of(config, "norm_type", "ada_norm_zero")
    one_of(config, "norm_elementwise_affine", False)
    one_of(config, "attention_bias", True)
    heads, depth = config.get("num_attention_heads", 16), config.get("num_layers", 28)
    net = DiT(
        patch=config.get("patch_size", 2),
        width=heads * config.get("attention_head_dim", 72),
        depth=depth,
        heads=heads,
        dropout=config.get("dropout", 0.0),
        embedding=Sinusoidal(256),
        num_classes=config.get("num_embeds_ada_norm", 1000),
        out_channels=config.get("out_channels"),
        epsilon=config.get("norm_eps", 1e-5),
    )
    embedded = "transformer_blocks.0.norm1.emb"
    names = {
        "condition/Dense_0": f"{embedded}.timestep_embedder.linear_1",
        "condition/Dense_1": f"{embedded}.timestep_embedder.linear_2",
        "condition/Embed_0": f"{embedded}.class_embedder.embedding_table",
        "patches": "pos_embed.proj",
        "adapt": "proj_out_1",
        "out": "proj_out_2",
    }
    for i in range(depth):
        names |= {f"block_{i}/{a}": f"transformer_blocks.{i}.{b}" for a, b in DIT_BLOCK.items()}

    def patches(ours: Params, *shape: int) -> Params:
        patches = ours["patches"]
        condition = ours["condition"]
        return {
            **ours,
            "patches": {**patches, "kernel": patches["kernel"].reshape(*shape, net.width)},
            "condition": {**condition, "Dense_0": _swap(condition["Dense_0"])},
        }

    def to_theirs(params: Params) -> Params:
        theirs = patches(params["params"], net.patch, net.patch, -1)
        blocks = theirs.pop("blocks")
        for i in range(depth):
            theirs[f"block_{i}"] = jax.tree.map(lambda leaf, i=i: leaf[i], blocks)
        return {"params": theirs}

    def to_ours(params: Params) -> Params:
        ours = patches(params["params"], -1)
        blocks = [ours.pop(f"block_{i}") for i in range(depth)]
        ours["blocks"] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)
        return {"params": ours}

    return Layout(net, names, to_theirs, to_ours)


LAYOUTS = {
    "UNet2DModel": ("unet", _unet_layout),
    "DiTTransformer2DModel": ("transformer", _dit_layout),
}


def _shapes(config: Config, layout: Layout) -> Params:
    """Of a tree that differs from their state by names alone."""
    side = config["sample_size"]
    x = jnp.zeros((1, side, side, config["in_channels"]))
    return jax.eval_shape(layout.to_theirs, shapes_of(layout.net, x, jnp.zeros(1)))


def _once(tensors: Mapping[str, np.ndarray], source: str) -> dict[str, np.ndarray]:
    """A DiT's embeddings of step and class, which they keep in every block, from the first alone.

    Raises:
        ValueError: if they are not the same in every block.
    """
    kept = {}
    for name, array in tensors.items():
        inside = name.partition(".norm1.emb.")[2]
        first = f"transformer_blocks.0.norm1.emb.{inside}"
        if not inside or name == first or first not in tensors:
            kept[name] = array
        elif not np.array_equal(array, tensors[first]):
            raise ValueError(f"{source} must embed step and class alike in every block: {name}.")
    return kept


# The process


def scheduled_betas(config: Config) -> np.ndarray:
    """β_1, …, β_T of a scheduler_config.json."""
    if (betas := config.get("trained_betas")) is not None:
        return np.asarray(betas, np.float64)
    count = config.get("num_train_timesteps", 1000)
    ends = config.get("beta_start", 1e-4), config.get("beta_end", 0.02)
    kind = one_of(config, "beta_schedule", "linear", "scaled_linear", "squaredcos_cap_v2")
    if kind == "linear":
        return np.linspace(*ends, count)
    if kind == "scaled_linear":
        return np.linspace(ends[0] ** 0.5, ends[1] ** 0.5, count) ** 2
    return schedules.cosine_betas(count)


def _training(config: Config, scheduler: Config) -> tuple[Gaussian, Parameterization, Grid]:
    """The process, what the network says of it, and the times of its sampler."""
    if scheduler.get("_class_name") == "ScoreSdeVeScheduler":
        # Only this embedding takes σ, and has the output divided by it.
        one_of({"time_embedding_type": "positional", **config}, "time_embedding_type", "fourier")
        process, parameterization = exploding(
            scheduler.get("sigma_min", 0.01),
            scheduler.get("sigma_max", 1348.0),
            centered=not one_of(config, "center_input_sample", False, True),
        )
        steps = scheduler.get("num_train_timesteps", 2000)
        return process, parameterization, grids.uniform(steps - 1)
    one_of(config, "center_input_sample", False)
    betas = scheduled_betas(scheduler)
    predictions = {
        "epsilon": parameterizations.epsilon,
        "sample": parameterizations.x0,
        "v_prediction": parameterizations.v,
    }
    parameterization = predictions[one_of(scheduler, "prediction_type", *predictions)](
        noise_level=parameterizations.StepNumber(len(betas))
    )
    if config.get("out_channels") == 2 * config["in_channels"]:
        parameterization = parameterizations.learned_variance(parameterization, steps=len(betas))
    return Gaussian(schedules.from_betas(betas)), parameterization, grids.uniform(len(betas))


def read_json(path: Path) -> dict[str, Any]:
    """A file of settings.

    Raises:
        ValueError: if there is no such file, or if it is truncated.
    """
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"path must be a folder of diffusers, but there is no {path}.") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is truncated or is no json: {error}.") from error


def from_diffusers(path: str | Path) -> Pretrained:
    """A pipeline of diffusers with a `UNet2DModel`, such as google/ddpm-cifar10-32, or a DiT.

    With a `ScoreSdeVeScheduler`, as google/ncsnpp-church-256 has it, the process is `exploding`.
    Where the network centres its input (`center_input_sample`) images are in [−1, 1] all the same,
    and the noise is twice the scheduler's; else they are as the network sees them.

    Args:
        path: its folder, with `unet/` or `transformer/`, and `scheduler/`. An autoencoder beside
            them is not read: what is returned is a denoiser of latents then.

    Returns:
        The denoiser, in float32, with the times of its T steps as grid.

    Raises:
        ValueError: names the file that is missing or truncated, the setting that no network here
            has, or the tensors that are missing, unknown or of another shape.
        ImportError: without the extra `interop`.
    """
    folder = Path(path)
    kinds = [folder / name for name, _ in LAYOUTS.values() if (folder / name).is_dir()]
    model = kinds[0] if kinds else folder / "unet"
    config = read_json(model / "config.json")
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    given(config, "_class_name", "sample_size", "in_channels")
    _, make = LAYOUTS[one_of(config, "_class_name", *LAYOUTS)]
    layout = make(config)
    source = model / WEIGHTS
    tensors = {renamed(name): array for name, array in read_safetensors(source).items()}
    tensors = _once(tensors, str(source))
    params = from_torch(tensors, _shapes(config, layout), layout.names, str(source))
    process, parameterization, grid = _training(config, scheduler)
    side, channels = config["sample_size"], config["in_channels"]
    return Pretrained(
        layout.to_ours(params),
        process,
        layout.net.apply,
        parameterization,
        grid=grid,
        shape=(side, side, channels),
        net=layout.net,
    )


def renamed(name: str) -> str:
    """A tensor's name in the present version of their library."""
    for old, new in OLD_NAMES.items():
        name = name.replace(old, new)
    return name


def to_diffusers(params: Params, config: Config, path: str | Path) -> None:
    """Writes parameters as the network of a pipeline: the inverse of `from_diffusers`.

    Args:
        params: of the network that `config` describes.
        config: of a UNet2DModel or DiTTransformer2DModel, as its config.json has it.
        path: the pipeline's folder.

    Raises:
        ValueError: names the setting that no network here has.
        ImportError: without the extra `interop`.
    """
    name, make = LAYOUTS[one_of(config, "_class_name", *LAYOUTS)]
    layout = make(config)
    tensors = to_torch(layout.to_theirs(params), layout.names)
    for block in range(1, config.get("num_layers", 0)):
        tensors |= {
            key.replace("blocks.0.", f"blocks.{block}.", 1): tensor
            for key, tensor in tensors.items()
            if key.startswith("transformer_blocks.0.norm1.emb.")
        }
    write_model(Path(path) / name, config, tensors)


def write_model(folder: Path, config: Config, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes a model's folder: its settings beside its tensors.

    Raises:
        ImportError: without the extra `interop`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(tensors, folder / WEIGHTS)
    (folder / "config.json").write_text(json.dumps(dict(config), indent=2))
