"""Checkpoints of score_sde, the code of Song et al. 2021 in JAX: a state of training in one file.

Its `params_ema` is a tree of modules, each named by its class and by how many of that class were
called before it. So where a module of ours is found follows from the settings of the run. They are
not in the file, and are given by the names of its config.

With x the image as the first layer sees it, a network is told and says

    sde                     told               output
    ---------------------------------------------------------------------
    vpsde, subvpsde         999 t              ε
    vpsde, not continuous   the step, N t − 1  ε
    vesde                   log σ              −ε, divided by σ: the score

The VE models know images in [0, 1], x_t = x_0 + σ ε, and begin by 2x − 1. Of y = 2x − 1, whose
images are in [−1, 1] as everywhere here, that says y_t = y_0 + 2σ ε: the same model, exactly, with
twice the noise.

References: Song et al. 2021, arXiv 2011.13456, appendices B, C and H; its code,
github.com/yang-song/score_sde (configs, models/ncsnpp.py, models/ddpm.py, sde_lib.py).
"""

import math
from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax.numpy as jnp
import numpy as np
from flax.serialization import msgpack_restore
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxdiff import grids, parameterizations, schedules, struct
from jaxdiff.interop.base import Pretrained, check_shapes, flat, shapes_of
from jaxdiff.networks import unet
from jaxdiff.networks.embeddings import GaussianFourier, Sinusoidal
from jaxdiff.parameterizations import Linear
from jaxdiff.processes.gaussian import Gaussian
from jaxdiff.typing import Grid, Params, Scalar, State, Time

__all__ = ["RawEpsilon", "exploding", "from_score_sde"]

Settings = Mapping[str, Any]
Place = tuple[tuple[str, ...], tuple[int, ...]]
"""The path of a leaf of ours, and the shape that it has with them."""

# Of every published config, with what CIFAR-10 has where they differ by their data.
SHARED: dict[str, Any] = {
    "sde": "vpsde",
    "continuous": True,
    "image_size": 32,
    "num_channels": 3,
    "sigma_min": 0.01,
    "sigma_max": 50.0,
    "beta_min": 0.1,
    "beta_max": 20.0,
    "num_scales": 1000,
    "dropout": 0.1,
    "name": "ncsnpp",
    "normalization": "GroupNorm",
    "nonlinearity": "swish",
    "nf": 128,
    "ch_mult": (1, 2, 2, 2),
    "num_res_blocks": 4,
    "attn_resolutions": (16,),
    "resamp_with_conv": True,
    "conditional": True,
    "fir_kernel": (1, 3, 3, 1),
    "skip_rescale": True,
    "resblock_type": "biggan",
    "progressive": "none",
    "progressive_combine": "sum",
    "fourier_scale": 16.0,
}
# cifar10_ddpmpp_continuous, cifar10_ncsnpp_continuous and cifar10_ddpm.
DDPMPP = SHARED | {
    "centered": True,
    "scale_by_sigma": False,
    "fir": False,
    "progressive_input": "none",
    "embedding_type": "positional",
}
NCSNPP = SHARED | {
    "centered": False,
    "scale_by_sigma": True,
    "fir": True,
    "progressive_input": "residual",
    "embedding_type": "fourier",
}
DDPM = DDPMPP | {"num_res_blocks": 2}

IMAGE_IN = {"none": None, "residual": "residual", "input_skip": "skip"}

RESIDUAL = {
    "norm_0": "GroupNorm_0",
    "conv_0": "Conv_0",
    "inject": "Dense_0",
    "norm_1": "GroupNorm_1",
    "conv_1": "Conv_1",
    "skip": "Conv_2",
}
ATTENTION = {
    "norm": "GroupNorm_0",
    "query": "NIN_0",
    "key": "NIN_1",
    "value": "NIN_2",
    "out": "NIN_3",
}
# What a class of theirs calls its leaves, where flax has another name.
LEAVES = {
    "NIN": {"kernel": "W", "bias": "b"},
    "Conv2d": {"kernel": "weight"},
    "GaussianFourierProjection": {"frequencies": "W"},
}


# What the network is told, and what it says


class LogSigma(NamedTuple):
    """The network is told log σ of images that are 1/scale of ours."""

    scale: float

    def __call__(self, process: Gaussian, t: Time) -> Time:
        """Log(σ/scale)."""
        return parameterizations.log_sigma(process, t) - math.log(self.scale)


@struct.dataclass
class RawEpsilon(Linear):
    """F = ±ε, of a network that sees x as it is, at whatever variance.

    Attributes:
        sign: 1 for ε, −1 for −ε = σ times the score.
    """

    sign: Scalar = 1.0

    def coefficients(self, process: Gaussian, t: Time) -> tuple[Scalar, Scalar]:
        """(0, ±1)."""
        return 0.0, self.sign

    def inputs(self, process: Gaussian, x: State, t: Time) -> tuple[State, Time]:
        """(x, noise level)."""
        return x, self.noise_level(process, t)


def exploding(sigma_min: float, sigma_max: float, *, centered: bool) -> tuple[Gaussian, RawEpsilon]:
    """The process of a VE model and what its network says, before that is divided by σ.

    Args:
        sigma_min: its noise at t = 0, > 0.
        sigma_max: its noise at t = 1, > sigma_min.
        centered: whether its images are ours; else they are in [0, 1], and it begins by 2x − 1.

    Returns:
        The process, of images in [−1, 1], with the prior that it has been sampled from; and the
        parameterization.

    Raises:
        ValueError: unless 0 < sigma_min < sigma_max.
    """
    scale = 1.0 if centered else 2.0
    process = Gaussian(
        schedules.exploding(scale * sigma_min, scale * sigma_max), prior_mean=1.0 - scale
    )
    return process, RawEpsilon(sign=-1.0, noise_level=LogSigma(scale))


def _process(settings: Settings) -> tuple[Gaussian, RawEpsilon, Grid]:
    """The process, the parameterization and the times of their sampler."""
    steps = settings["num_scales"]
    if settings["sde"] == "vesde":
        process, parameterization = exploding(
            settings["sigma_min"], settings["sigma_max"], centered=settings["centered"]
        )
        return process, parameterization, grids.uniform(steps - 1)
    rates = settings["beta_min"], settings["beta_max"]
    if not settings["continuous"]:
        betas = np.linspace(*rates, steps) / steps
        told = RawEpsilon(noise_level=parameterizations.StepNumber(steps))
        return Gaussian(schedules.from_betas(betas)), told, grids.uniform(steps)
    make = schedules.subvp if settings["sde"] == "subvpsde" else schedules.linear_beta
    told = RawEpsilon(noise_level=parameterizations.discrete_time)
    # They stop at 1e-3 and denoise from there.
    grid = jnp.append(grids.uniform(steps - 1, end=1e-3), 0.0)
    return Gaussian(make(*rates)), told, grid


# The network


def _settings(config: Mapping[str, Any], given: Settings) -> dict[str, Any]:
    """All settings: those given, else of the config, else as published.

    Raises:
        ValueError: names the setting that there is not, or that no network here has.
    """
    found: dict[str, Any] = {}
    for section in ("training", "data", "model"):
        found |= {**config.get(section, {})}
    found |= given
    published = NCSNPP if found.get("sde") == "vesde" else DDPMPP
    published = DDPM if found.get("name") == "ddpm" else published
    if unknown := given.keys() - published.keys():
        raise ValueError(
            f"settings must be of {', '.join(sorted(published))}, got {', '.join(sorted(unknown))}."
        )
    settings = {name: found.get(name, default) for name, default in published.items()}
    settings = {name: tuple(v) if isinstance(v, list) else v for name, v in settings.items()}
    for name, allowed in _allowed(settings).items():
        if settings[name] not in allowed:
            words = " or ".join(map(repr, allowed))
            raise ValueError(
                f"{name} must be {words} with {settings['sde']}, got {settings[name]!r}."
            )
    return settings


def _allowed(settings: Settings) -> dict[str, tuple[Any, ...]]:
    """The values that a setting may have, for settings that are not free."""
    explodes, ddpm = settings["sde"] == "vesde", settings["name"] == "ddpm"
    allowed = {
        "sde": ("vpsde", "subvpsde", "vesde"),
        "continuous": (True, False) if settings["sde"] == "vpsde" else (True,),
        "centered": (True, False) if explodes else (True,),
        "scale_by_sigma": (explodes,),
        "name": ("ncsnpp",) if explodes else ("ncsnpp", "ddpm"),
        "normalization": ("GroupNorm",),
        "nonlinearity": ("swish",),
        "conditional": (True,),
        "resamp_with_conv": (True,),
    }
    # Of these a DDPM makes no use, whatever its config says.
    wider = {
        "embedding_type": ("fourier",) if explodes else ("positional",),
        "fir_kernel": ((1, 3, 3, 1),),
        "resblock_type": ("biggan",),
        "progressive": ("none", "output_skip"),
        "progressive_input": tuple(IMAGE_IN),
        "progressive_combine": ("sum",),
    }
    return allowed if ddpm else allowed | wider


def _network(settings: Settings) -> unet.UNet:
    width = settings["nf"]
    embedding: Any = Sinusoidal(width)
    if settings["name"] == "ddpm":
        variant = unet.DDPM._replace(attend_each=False, groups=32)
    else:
        variant = unet.Variant(
            rescale=settings["skip_rescale"],
            smooth=settings["fir"],
            image_in=IMAGE_IN[settings["progressive_input"]],
            image_out=settings["progressive"] == "output_skip",
        )
        if settings["embedding_type"] == "fourier":
            embedding = GaussianFourier(2 * width, scale=settings["fourier_scale"])
    return unet.UNet(
        width=width,
        multipliers=settings["ch_mult"],
        blocks=settings["num_res_blocks"],
        attention=settings["attn_resolutions"],
        dropout=settings["dropout"],
        embedding=embedding,
        variant=variant,
    )


def _names(net: unet.UNet, side: int) -> dict[str, str]:
    """Where each module of ours is found, by going through their calls in turn."""
    v, last = net.variant, len(net.multipliers) - 1
    names: dict[str, str] = {}
    calls: Counter[str] = Counter()

    def call(ours: str, kind: str, inside: Mapping[str, str] | None = None) -> None:
        theirs = f"{kind}_{calls[kind]}"
        calls[kind] += 1
        if inside is None:
            names[ours] = theirs
        else:
            names.update({f"{ours}/{a}": f"{theirs}/{b}" for a, b in inside.items()})

    if v.strided:
        block = partial(call, kind="ResnetBlockDDPM", inside=RESIDUAL | {"skip": "NIN_0"})
        attention = partial(call, kind="AttnBlock", inside=ATTENTION)
    else:
        block = partial(call, kind="ResnetBlockBigGANpp", inside=RESIDUAL)
        attention = partial(call, kind="AttnBlockpp", inside=ATTENTION)

    def attends(level: int) -> bool:
        return side // 2**level in net.attention

    call("embedding", "GaussianFourierProjection")
    call("condition/Dense_0", "Dense")
    call("condition/Dense_1", "Dense")
    call("in", "Conv")
    for level in range(last + 1):
        for i in range(net.blocks):
            block(f"down_{level}_block_{i}")
            if attends(level):
                attention(f"down_{level}_attention_{i}")
        below = f"down_{level + 1}"
        if v.strided:
            names[below] = f"Downsample_{level}/Conv_0"
        elif level < last:
            block(below)
        if v.image_in == "residual":
            names[f"{below}_image"] = f"Downsample_{level}/{'Conv2d' if v.smooth else 'Conv'}_0"
        if v.image_in == "skip":
            names[f"{below}_image"] = f"Combine_{level}/Conv_0"
    block("middle_block_0")
    attention("middle_attention")
    block("middle_block_1")
    for level in reversed(range(last + 1)):
        for i in range(net.blocks + 1):
            block(f"up_{level}_block_{i}")
        if attends(level):
            attention(f"up_{level}_attention_{net.blocks}")
        if v.image_out or level == 0:
            call(f"out_{level}_norm", "GroupNorm")
            call(f"out_{level}_conv", "Conv")
        if v.strided:
            names[f"up_{level}"] = f"Upsample_{last - level}/Conv_0"
        elif level > 0:
            block(f"up_{level}")
    return names


# The file


def _read(path: Path) -> dict[str, np.ndarray]:
    """The averaged parameters of a checkpoint, by their names joined by /."""
    if not path.is_file():
        raise ValueError(f"path must be a checkpoint of score_sde, but there is no file {path}.")
    try:
        state = msgpack_restore(path.read_bytes())
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is truncated or is no msgpack of flax: {error}.") from error
    if not isinstance(state, dict) or not isinstance(state.get("params_ema"), dict):
        raise ValueError(f"{path} must be a state of score_sde, but it has no params_ema.")
    leaves = cast(dict[tuple[str, ...], Any], flatten_dict(state["params_ema"]))
    return {"/".join(map(str, name)): np.asarray(leaf) for name, leaf in leaves.items()}


def _places(shapes: Params, names: Mapping[str, str]) -> dict[str, Place]:
    """Where each of their tensors belongs."""
    places = {}
    for path, leaf in flat(shapes).items():
        *module, name = path
        theirs = names["/".join(module)]
        kind = theirs.rpartition("/")[2].rpartition("_")[0]
        # They write a convolution of one pixel as a matrix.
        shape = leaf.shape[-2:] if kind == "NIN" else leaf.shape
        places[f"{theirs}/{LEAVES.get(kind, {}).get(name, name)}"] = path, shape
    return places


def _params(
    tensors: Mapping[str, np.ndarray], shapes: Params, names: Mapping[str, str], source: str
) -> Params:
    """Their tensors as parameters of ours, in float32.

    Raises:
        ValueError: names tensors that are missing, unknown or of a wrong shape.
    """
    places = _places(shapes, names)
    check_shapes(tensors, {name: shape for name, (_, shape) in places.items()}, source)
    ours = flat(shapes)
    found = {
        path: jnp.asarray(tensors[name], jnp.float32).reshape(ours[path].shape)
        for name, (path, _) in places.items()
    }
    return {"params": unflatten_dict(found)}


def from_score_sde(
    path: str | Path, config: Mapping[str, Any] | None = None, **settings: Any
) -> Pretrained:
    """A checkpoint of score_sde: DDPM, DDPM++ or NCSN++, under a VP, sub-VP or VE process.

    `from_score_sde("checkpoint_8")` is DDPM++ on CIFAR-10 under the VP process,
    `from_score_sde("checkpoint_12", sde="vesde", num_res_blocks=8)` the deep NCSN++ under the VE
    process. Of the state, the averaged parameters are taken; nothing in the file is executed.

    Args:
        path: the file, checkpoint_N.
        config: of the run, as its `get_config()` returns it: the sections training, data, model.
        settings: by the config's names, above what the config says: sde, image_size, nf, ch_mult,
            num_res_blocks, progressive, sigma_max and so on. What neither gives is as published
            for CIFAR-10: DDPM++, or NCSN++ with sde="vesde", or DDPM with name="ddpm".

    Returns:
        The denoiser of images in [−1, 1], in float32. A VE model's noise is twice that of its
        config if it was trained on [0, 1] (`centered=False`). Its samples keep the noise
        σ(0) = 2 sigma_min at t = 0, which the mean of the denoiser there takes away.

    Raises:
        ValueError: names the setting that no network here has, the file that is missing or
            truncated, or the tensors that are missing, unknown or of another shape.

    Note:
        Not here: NCSN and NCSNv2, VE models of discrete levels, and the residual blocks of DDPM
        inside NCSN++.

    References: Song et al. 2021, arXiv 2011.13456, appendices C and H.
    """
    merged = _settings(config or {}, settings)
    tensors, net = _read(Path(path)), _network(merged)
    side, channels = merged["image_size"], merged["num_channels"]
    shapes = shapes_of(net, jnp.zeros((1, side, side, channels)), jnp.zeros(1))
    params = _params(tensors, shapes, _names(net, side), str(path))
    process, parameterization, grid = _process(merged)
    return Pretrained(
        params,
        process,
        net.apply,
        parameterization,
        grid=grid,
        shape=(side, side, channels),
        net=net,
    )
