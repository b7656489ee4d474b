"""Models of guided-diffusion: a .pt file of tensors, and the flags of its scripts.

The file holds tensors alone: neither the network's settings nor the process. Those are flags of the
scripts, so they are given here by the same names. Its step k of T is our time (k + 1)/T.

References: Dhariwal and Nichol 2021, arXiv 2105.05233, section 3; the flags of the published files
from the README of github.com/openai/guided-diffusion, their defaults from script_util.py.
"""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxdiff import grids, parameterizations, schedules
from jaxdiff.interop.base import Pretrained, from_torch, shapes_of
from jaxdiff.interop.diffusers import scheduled_betas
from jaxdiff.networks import unet
from jaxdiff.networks.embeddings import Sinusoidal
from jaxdiff.processes.gaussian import Gaussian

__all__ = [
    "IMAGENET_64",
    "IMAGENET_128",
    "IMAGENET_256",
    "IMAGENET_512",
    "LSUN_256",
    "Flags",
    "from_guided_diffusion",
]


class Flags(NamedTuple):
    """The scripts' flags that say what a file holds, with their defaults."""

    image_size: int = 64
    """Sides of the images, in pixels."""
    num_channels: int = 128
    """Channels of the first level."""
    num_res_blocks: int = 2
    """Residual blocks a level on the way down."""
    num_heads: int = 4
    """Attention heads, where their width is not given."""
    num_head_channels: int = -1
    """Channels of an attention head; -1 for as many heads as `num_heads` says."""
    attention_resolutions: tuple[int, ...] = (16, 8)
    """Sides of the levels that attend."""
    channel_mult: tuple[int | float, ...] | None = None
    """Channels of each level over those of the first; None for those of `image_size`."""
    dropout: float = 0.0
    """Rate inside the residual blocks."""
    class_cond: bool = False
    """Whether the network knows the 1000 classes of ImageNet."""
    use_scale_shift_norm: bool = True
    """Whether time and class scale and shift a norm, or are added."""
    resblock_updown: bool = False
    """Whether residual blocks change the sides, or convolutions."""
    use_new_attention_order: bool = False
    """Whether queries, keys and values come apart first, or heads."""
    learn_sigma: bool = False
    """Whether the network predicts the variance too."""
    diffusion_steps: int = 1000
    """T."""
    noise_schedule: str = "linear"
    """Linear or cosine."""


_ADM = {
    "attention_resolutions": (32, 16, 8),
    "num_head_channels": 64,
    "resblock_updown": True,
    "learn_sigma": True,
}
IMAGENET_64: Mapping[str, Any] = {
    **_ADM,
    "image_size": 64,
    "num_channels": 192,
    "num_res_blocks": 3,
    "dropout": 0.1,
    "class_cond": True,
    "use_new_attention_order": True,
    "noise_schedule": "cosine",
}
"""64x64_diffusion.pt"""
LSUN_256: Mapping[str, Any] = {**_ADM, "image_size": 256, "num_channels": 256}
"""256x256_diffusion_uncond.pt, and lsun_*.pt up to their dropout."""
IMAGENET_256: Mapping[str, Any] = {**LSUN_256, "class_cond": True}
"""256x256_diffusion.pt"""
IMAGENET_512: Mapping[str, Any] = {**IMAGENET_256, "image_size": 512}
"""512x512_diffusion.pt"""
IMAGENET_128: Mapping[str, Any] = {**IMAGENET_256, "image_size": 128, "num_head_channels": -1}
"""128x128_diffusion.pt"""

CHANNEL_MULT = {
    64: (1, 2, 3, 4),
    128: (1, 1, 2, 3, 4),
    256: (1, 1, 2, 2, 4, 4),
    512: (0.5, 1, 1, 2, 2, 4, 4),
}
SCHEDULES = {"linear": "linear", "cosine": "squaredcos_cap_v2"}
CLASSES = 1000

RESIDUAL = {
    "norm_0": "in_layers.0",
    "conv_0": "in_layers.2",
    "inject": "emb_layers.1",
    "norm_1": "out_layers.0",
    "conv_1": "out_layers.3",
    "skip": "skip_connection",
}
ATTENTION = {
    "norm": "norm",
    "query": "qkv.query",
    "key": "qkv.key",
    "value": "qkv.value",
    "out": "proj_out",
}


# The network


def _multipliers(flags: Flags) -> tuple[int | float, ...]:
    if flags.channel_mult is None and flags.image_size not in CHANNEL_MULT:
        sizes = ", ".join(map(str, CHANNEL_MULT))
        raise ValueError(
            f"channel_mult must be given for an image_size other than {sizes}, got None with "
            f"{flags.image_size}."
        )
    return flags.channel_mult or CHANNEL_MULT[flags.image_size]


def _network(flags: Flags) -> unet.UNet:
    channels = [int(m * flags.num_channels) for m in _multipliers(flags)]
    if any(n % channels[0] for n in channels):
        raise ValueError(f"channel_mult must be multiples of the first, got {flags.channel_mult}.")
    # Their frequencies are 10⁴ to the −k/n, ours to the −k/(n − 1).
    half = flags.num_channels // 2
    return unet.UNet(
        width=channels[0],
        multipliers=tuple(n // channels[0] for n in channels),
        blocks=flags.num_res_blocks,
        attention=flags.attention_resolutions,
        head_width=None if flags.num_head_channels == -1 else flags.num_head_channels,
        heads=flags.num_heads,
        dropout=flags.dropout,
        embedding=Sinusoidal(flags.num_channels, max_period=1e4 ** ((half - 1) / half)),
        scale_shift=flags.use_scale_shift_norm,
        num_classes=CLASSES if flags.class_cond else None,
        variant=unet.ADM._replace(strided=not flags.resblock_updown, padding=(1, 1), groups=32),
        out_channels=6 if flags.learn_sigma else 3,
        condition_width=4 * flags.num_channels,
    )


def _names(net: unet.UNet, side: int) -> dict[str, str]:
    """Where each module of ours is found in their state, which counts blocks of all levels."""
    last, each = len(net.multipliers) - 1, net.blocks + 1
    names = {
        "in": "input_blocks.0.0",
        "condition/Dense_0": "time_embed.0",
        "condition/Dense_1": "time_embed.2",
        "condition/Embed_0": "label_emb",
        "out_0_norm": "out.0",
        "out_0_conv": "out.2",
    }
    residuals = {"middle_block_0": "middle_block.0", "middle_block_1": "middle_block.2"}
    attentions = {"middle_attention": "middle_block.1"}
    for level in range(last + 1):
        down, up = level * each, (last - level) * each
        for i in range(each):
            residuals[f"down_{level}_block_{i}"] = f"input_blocks.{down + i + 1}.0"
            attentions[f"down_{level}_attention_{i}"] = f"input_blocks.{down + i + 1}.1"
            residuals[f"up_{level}_block_{i}"] = f"output_blocks.{up + i}.0"
            attentions[f"up_{level}_attention_{i}"] = f"output_blocks.{up + i}.1"
        behind = 2 if side >> level in net.attention else 1
        below, above = f"input_blocks.{down}.0", f"output_blocks.{up + net.blocks}.{behind}"
        if level > 0 and net.variant.strided:
            names |= {f"down_{level}": f"{below}.op", f"up_{level}": f"{above}.conv"}
        elif level > 0:
            residuals |= {f"down_{level}": below, f"up_{level}": above}
    for modules, table in ((residuals, RESIDUAL), (attentions, ATTENTION)):
        for ours, theirs in modules.items():
            names |= {f"{ours}/{a}": f"{theirs}.{b}" for a, b in table.items()}
    return names


def _to_ours(
    tensors: Mapping[str, np.ndarray], net: unet.UNet, flags: Flags
) -> dict[str, np.ndarray]:
    """From their tensors to those that differ from our parameters by names alone."""
    found = {}
    for name, tensor in tensors.items():
        *_, module, leaf = "", *name.split(".")
        if module == "qkv":
            rows = np.arange(len(tensor))
            heads_first = rows // (net.head_width or len(rows) // (3 * net.heads)) % 3
            kinds = 3 * rows // len(rows) if flags.use_new_attention_order else heads_first
            for i, part in enumerate(("query", "key", "value")):
                found[f"{name.removesuffix(leaf)}{part}.{leaf}"] = tensor[kinds == i].squeeze()
        elif name == "time_embed.0.weight":
            # Cosines come first in theirs.
            found[name] = np.roll(tensor, tensor.shape[1] // 2, axis=1)
        elif name == "label_emb.weight":
            # They have no null label: of no class, nothing is added.
            found[name] = np.pad(tensor, ((0, 1), (0, 0)))
        else:
            found[name] = tensor.squeeze() if module == "proj_out" else tensor
    return found


def _read(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a file that holds nothing else."""
    try:
        import torch
    except ImportError as error:
        raise ImportError("torch is missing, which reads .pt files: pip install torch") from error
    if not path.is_file():
        raise ValueError(f"path must be a .pt file of tensors, but there is no {path}.")
    damage = AttributeError, EOFError, OSError, RuntimeError, pickle.UnpicklingError
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        return {name: tensor.float().numpy() for name, tensor in state.items()}
    except damage as error:
        raise ValueError(f"{path} is truncated, or holds more than tensors: {error}.") from error


def from_guided_diffusion(path: str | Path, **flags: Any) -> Pretrained:
    """A diffusion model of guided-diffusion, such as 64x64_diffusion.pt.

    The flags of the published files are `IMAGENET_64` and so on:
    `from_guided_diffusion("64x64_diffusion.pt", **IMAGENET_64)`. A classifier and an upsampler are
    none of these networks.

    Args:
        path: the file.
        **flags: those of `Flags`, for each that is not its default.

    Returns:
        The denoiser, in float32, with grid t = k/T. No label is no class, which a class-conditional
        network was not trained for.

    Raises:
        ValueError: names the flag that no network here has, or the tensors that are missing,
            unknown or of another shape; if there is no such file, if it is truncated, or if it
            holds anything but tensors.
        TypeError: names a flag that is not one of `Flags`.
        ImportError: without torch, which reads the file.

    References: Dhariwal and Nichol 2021, arXiv 2105.05233, section 3.
    """
    path, given = Path(path), Flags(**flags)
    if given.noise_schedule not in SCHEDULES:
        raise ValueError(
            f"noise_schedule must be {' or '.join(SCHEDULES)}, got {given.noise_schedule!r}."
        )
    net, steps, shape = _network(given), given.diffusion_steps, (given.image_size,) * 2 + (3,)
    shapes = shapes_of(net, jnp.zeros((1, *shape)), jnp.zeros(1))
    tensors = _to_ours(_read(path), net, given)
    params = from_torch(tensors, shapes, _names(net, given.image_size), str(path))
    # The rates of the linear schedule do not depend on the number of steps.
    betas = scheduled_betas(
        {
            "beta_schedule": SCHEDULES[given.noise_schedule],
            "num_train_timesteps": steps,
            "beta_start": 0.1 / steps,
            "beta_end": 20.0 / steps,
        }
    )
    parameterization = parameterizations.epsilon(noise_level=parameterizations.StepNumber(steps))
    if given.learn_sigma:
        parameterization = parameterizations.learned_variance(parameterization, steps=steps)
    return Pretrained(
        params,
        Gaussian(schedules.from_betas(betas)),
        net.apply,
        parameterization,
        grid=grids.uniform(steps),
        shape=shape,
        net=net,
    )
