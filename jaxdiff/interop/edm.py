"""Network pickles of EDM and EDM2, read without running anything that they hold.

A pickle is a program that calls what it names. EDM's name a function that is handed the source code
of an object's class and its state, and runs the one to rebuild the other. Here that name, and the
few more that such a file needs, stand for functions of our own, which keep the class's name, the
state and the numbers; every other name is refused. What a network is, is known from its class and
from the arguments that it was made with, which are part of its state.

References: Karras et al. 2022, arXiv 2206.00364, table 1 and appendix F; Karras et al. 2024, arXiv
2312.02696, figure 21 (EDM2); the layout of the file as torch_utils/persistence.py of
github.com/NVlabs/edm and edm2 writes it, version 6.
"""

import io
import math
import pickle
from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxdiff import grids, parameterizations, schedules
from jaxdiff.interop.base import Pretrained, from_torch, setting, shapes_of
from jaxdiff.interop.score_sde import LogSigma, RawEpsilon
from jaxdiff.networks import unet
from jaxdiff.networks.edm2 import EDM2
from jaxdiff.networks.embeddings import GaussianFourier, Sinusoidal
from jaxdiff.parameterizations import Parameterization
from jaxdiff.processes.gaussian import Gaussian
from jaxdiff.typing import Grid, Time

__all__ = ["from_edm"]

Settings = Mapping[str, Any]
Tensors = Mapping[str, np.ndarray]
Names = Mapping[str, str]

# What their constructors take where nothing is given.
SONG = {
    "label_dim": 0,
    "augment_dim": 0,
    "model_channels": 128,
    "channel_mult": [1, 2, 2, 2],
    "channel_mult_emb": 4,
    "num_blocks": 4,
    "attn_resolutions": [16],
    "dropout": 0.10,
    "label_dropout": 0,
    "embedding_type": "positional",
    "channel_mult_noise": 1,
    "encoder_type": "standard",
    "decoder_type": "standard",
    "resample_filter": [1, 1],
}
DHARIWAL = {
    "label_dim": 0,
    "augment_dim": 0,
    "model_channels": 192,
    "channel_mult": [1, 2, 3, 4],
    "channel_mult_emb": 4,
    "num_blocks": 3,
    "attn_resolutions": [32, 16, 8],
    "dropout": 0.10,
    "label_dropout": 0,
}
PRESERVING = {
    "model_channels": 192,
    "channel_mult": [1, 2, 3, 4],
    "channel_mult_noise": None,
    "channel_mult_emb": None,
    "num_blocks": 3,
    "attn_resolutions": [16, 8],
    "label_balance": 0.5,
    "concat_balance": 0.5,
    "resample_filter": [1, 1],
    "channels_per_head": 64,
    "dropout": 0,
    "res_balance": 0.3,
    "attn_balance": 0.3,
    "clip_act": 256,
}
# What their constructors must be told.
IN_AND_OUT = {"img_resolution", "in_channels", "out_channels"}
IMAGE_AND_LABEL = {"img_resolution", "img_channels", "label_dim"}

RESIDUAL = {
    "norm_0": "norm0",
    "conv_0": "conv0",
    "inject": "affine",
    "norm_1": "norm1",
    "conv_1": "conv1",
    "skip": "skip",
}
ATTENTION = {
    "norm": "norm2",
    "query": "qkv.query",
    "key": "qkv.key",
    "value": "qkv.value",
    "out": "proj",
}
PRESERVING_BLOCK = {
    "conv_0": "conv_res0",
    "inject": "emb_linear",
    "conv_1": "conv_res1",
    "skip": "conv_skip",
    "query": "attn_qkv.query",
    "key": "attn_qkv.key",
    "value": "attn_qkv.value",
    "out": "attn_proj",
}


# The file


class _Object:
    """An object of theirs: the name of its class and its state."""

    kind = ""

    def __init__(self, *_: object) -> None:
        self.state: Any = {}

    def __setstate__(self, state: Any) -> None:
        self.state = state


def _persistent(meta: Mapping[str, Any]) -> _Object:
    """What would run meta["module_src"]."""
    found = _Object()
    found.kind, found.state = meta["class_name"], meta["state"]
    if found.kind not in CLASSES:
        raise ValueError(f"classes must be {', '.join(sorted(CLASSES))}, got {found.kind}.")
    return found


def _parameter(tensor: np.ndarray, *_: object) -> np.ndarray:
    return tensor


def _tensor(
    storage: np.ndarray, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], *_: object
) -> np.ndarray:
    """A view of a storage, inside of its bounds, which numpy sees to."""
    size = storage.itemsize
    return np.ndarray(shape, storage.dtype, storage, size * offset, [size * n for n in strides])


def _storage(data: bytes) -> np.ndarray:
    """A storage as torch.save wrote it before there were zip files.

    It is five pickles, of which the fourth says the type and the number of elements, followed by
    that number again and by the elements.
    """
    file = io.BytesIO(data)
    _, _, _, described, _ = (_Unpickler(file).load() for _ in range(5))
    _, dtype, _, _, count, _ = described
    file.read(8)
    return np.frombuffer(file.read(), dtype, count)


class _Unpickler(pickle.Unpickler):
    """Of a pickle that may name no more than `GLOBALS`."""

    def find_class(self, module: str, name: str) -> Any:
        found = GLOBALS.get(f"{module}.{name}")
        if found is None:
            raise ValueError(f"a network pickle must not call {module}.{name}: it is refused.")
        return found

    def persistent_load(self, pid: Any) -> Any:
        return pid


GLOBALS: Mapping[str, Any] = {
    "collections.OrderedDict": OrderedDict,
    "torch_utils.persistence._reconstruct_persistent_obj": _persistent,
    "torch.nn.modules.container.ModuleDict": _Object,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch.storage._load_from_bytes": _storage,
    "torch.HalfStorage": "<f2",
    "torch.FloatStorage": "<f4",
    "torch.DoubleStorage": "<f8",
    # Some settings, none of which is needed, are scalars of numpy.
    "numpy.dtype": _Object,
    "numpy.core.multiarray.scalar": _Object,
    "numpy._core.multiarray.scalar": _Object,
    # EDM2 keeps its encoder of images beside the network, with arrays of its own.
    "dnnlib.util.EasyDict": dict,
    "numpy.ndarray": _Object,
    "numpy.core.multiarray._reconstruct": _Object,
    "numpy._core.multiarray._reconstruct": _Object,
}


def _read(path: Path) -> tuple[_Object, _Object]:
    """The preconditioned network of a file, and the network in it."""
    if not path.is_file():
        raise ValueError(f"path must be a network pickle, but there is no {path}.")
    damage = AttributeError, EOFError, IndexError, KeyError, TypeError, pickle.UnpicklingError
    try:
        with path.open("rb") as file:
            outer = _Unpickler(file).load()["ema"]
            modules = outer.state["_modules"]
            inner = modules["unet"] if outer.kind == "Precond" else modules["model"]
            kinds = outer.kind, inner.kind
    except damage as error:
        raise ValueError(f"{path} is truncated or is no network pickle: {error!r}.") from error
    for kind, allowed in zip(kinds, (PRECONDITIONS, MODELS), strict=True):
        if kind not in allowed:
            words = " or ".join(allowed)
            raise ValueError(f"{path} must have a network of class {words} there, got {kind}.")
    if (outer.kind == "Precond") != (inner.kind == "UNet"):
        raise ValueError(f"{path} has a {inner.kind} in a {outer.kind}: that is neither's place.")
    return outer, inner


def _tensors(module: _Object, prefix: str = "") -> dict[str, np.ndarray]:
    """All tensors of a module and of those inside it, by their path."""
    own = {**module.state["_parameters"], **module.state["_buffers"]}
    found = {prefix + name: tensor for name, tensor in own.items() if tensor is not None}
    for name, inner in module.state["_modules"].items():
        found |= _tensors(inner, f"{prefix}{name}.")
    return found


# The network


class Layout(NamedTuple):
    """How one of their networks is written as one of ours.

    Attributes:
        net: the network.
        channels: of the images.
        names: where each module is found, once `to_ours` has been applied.
        to_ours: from their tensors to those that differ from our parameters by names alone.
    """

    net: nn.Module
    channels: int
    names: Names
    to_ours: Callable[[Tensors], Tensors]


one_of = partial(setting, source="the pickle")


def _settings(model: _Object) -> Settings:
    """The arguments that a network was made with, and the defaults of the others."""
    defaults, required, _ = MODELS[model.kind]
    given = model.state.get("_init_kwargs") or {}
    if missing := required - given.keys():
        raise ValueError(f"{', '.join(sorted(missing))} must be given by name in the pickle.")
    if unknown := given.keys() - defaults.keys() - required:
        raise ValueError(
            f"settings must be those of {model.kind}, got {', '.join(sorted(unknown))} as well."
        )
    return {**defaults, **given}


def _names(net: unet.UNet | EDM2, side: int, residual: Names, attention: Names) -> dict[str, str]:
    """Where the modules inside our blocks, and outside any, are found in their state."""
    sides = [f"{side >> level}x{side >> level}" for level in range(len(net.multipliers))]
    names = {"in": f"enc.{sides[0]}_conv"}
    residuals = {
        "middle_block_0": f"dec.{sides[-1]}_in0",
        "middle_block_1": f"dec.{sides[-1]}_in1",
    }
    attentions = {"middle_attention": f"dec.{sides[-1]}_in0"}
    for level, name in enumerate(sides):
        if level > 0:
            residuals[f"down_{level}"] = f"enc.{name}_down"
            residuals[f"up_{level}"] = f"dec.{sides[level - 1]}_up"
            names[f"down_{level}_image"] = f"enc.{name}_aux_residual"
        for i in range(net.blocks + 1):
            for way, part in (("down", "enc"), ("up", "dec")):
                residuals[f"{way}_{level}_block_{i}"] = f"{part}.{name}_block{i}"
                attentions[f"{way}_{level}_attention_{i}"] = f"{part}.{name}_block{i}"
    for modules, table in ((residuals, residual), (attentions, attention)):
        for ours, theirs in modules.items():
            names[ours] = theirs
            names |= {f"{ours}/{a}": f"{theirs}.{b}" for a, b in table.items()}
    return names


def _unet_names(net: unet.UNet, side: int, norm: str, conv: str) -> dict[str, str]:
    """All of a network of EDM's, its last two modules by the names given."""
    return _names(net, side, RESIDUAL, ATTENTION) | {
        "condition/Dense_0": "map_layer0",
        "condition/Dense_1": "map_layer1",
        "condition/Embed_0": "map_label",
        "embedding": "map_noise",
        "out_0_norm": norm,
        "out_0_conv": conv,
    }


def _to_ours(tensors: Tensors) -> dict[str, np.ndarray]:
    """Projections apart and as matrices, without what no network here reads."""
    found = {}
    for name, tensor in tensors.items():
        *_, module, leaf = "", *name.split(".")
        if leaf == "resample_filter" or module == "map_augment":
            continue
        if module in ("qkv", "attn_qkv"):
            # Channel by channel: a query, a key, a value.
            for i, part in enumerate(("query", "key", "value")):
                found[f"{name.removesuffix(leaf)}{part}.{leaf}"] = tensor[i::3].squeeze()
        else:
            found[name] = tensor.squeeze() if module in ("proj", "attn_proj") else tensor
    return found


def _song(settings: Settings) -> Layout:
    """DDPM++ and NCSN++."""
    one_of(settings, "channel_mult_emb", 4)
    one_of(settings, "decoder_type", "standard")
    residual = one_of(settings, "encoder_type", "standard", "residual") == "residual"
    smooth = one_of(settings, "resample_filter", [1, 1], [1, 3, 3, 1]) == [1, 3, 3, 1]
    if residual and not smooth:
        raise ValueError("resample_filter must be [1, 3, 3, 1] with encoder_type 'residual'.")
    fourier = one_of(settings, "embedding_type", "positional", "fourier") == "fourier"
    width, side = settings["model_channels"], settings["img_resolution"]
    features, classes = width * settings["channel_mult_noise"], settings["label_dim"]
    net = unet.UNet(
        width=width,
        multipliers=tuple(settings["channel_mult"]),
        blocks=settings["num_blocks"],
        attention=tuple(settings["attn_resolutions"]),
        dropout=float(settings["dropout"]),
        embedding=GaussianFourier(features) if fourier else Sinusoidal(features),
        num_classes=classes or None,
        variant=unet.Variant(
            smooth=smooth, image_in="residual" if residual else None, class_first=True
        ),
        out_channels=settings["out_channels"],
    )

    def to_ours(tensors: Tensors) -> Tensors:
        found = _to_ours(tensors)
        if fourier and "map_noise.freqs" in found:
            found["map_noise.weight"] = found.pop("map_noise.freqs")
        if {"map_label.weight", "map_label.bias"} <= found.keys():
            # A class is √k times its indicator, and none is zero: the bias alone.
            table = math.sqrt(classes) * found["map_label.weight"].T
            table = np.pad(table, ((0, 1), (0, 0))) + found.pop("map_label.bias")
            found["map_label.weight"] = table
        return found

    last = f"dec.{side}x{side}_aux"
    names = _unet_names(net, side, f"{last}_norm", f"{last}_conv")
    return Layout(net, settings["in_channels"], names, to_ours)


def _dhariwal(settings: Settings) -> Layout:
    """ADM."""
    one_of(settings, "channel_mult_emb", 4)
    multipliers = tuple(settings["channel_mult"])
    if multipliers[0] != 1:
        raise ValueError(f"channel_mult must begin with 1, got {multipliers} in the pickle.")
    width, classes = settings["model_channels"], settings["label_dim"]
    # Their frequencies are 10⁴ to the −k/n, ours to the −k/(n − 1).
    half = width // 2
    net = unet.UNet(
        width=width,
        multipliers=multipliers,
        blocks=settings["num_blocks"],
        attention=tuple(settings["attn_resolutions"]),
        head_width=64,
        dropout=float(settings["dropout"]),
        embedding=Sinusoidal(width, max_period=1e4 ** ((half - 1) / half)),
        scale_shift=True,
        num_classes=classes or None,
        variant=unet.ADM,
        out_channels=settings["out_channels"],
    )

    def to_ours(tensors: Tensors) -> Tensors:
        found = _to_ours(tensors)
        if (first := found.get("map_layer0.weight")) is not None:
            # Cosines come first in theirs.
            found["map_layer0.weight"] = np.roll(first, half, axis=1)
        if (table := found.get("map_label.weight")) is not None:
            # Of no class, nothing is added.
            found["map_label.weight"] = np.pad(table.T, ((0, 1), (0, 0)))
        return found

    names = _unet_names(net, settings["img_resolution"], "out_norm", "out_conv")
    return Layout(net, settings["in_channels"], names, to_ours)


def _preserving(settings: Settings) -> Layout:
    """EDM2."""
    one_of(settings, "channel_mult_noise", None)
    one_of(settings, "channel_mult_emb", None)
    one_of(settings, "resample_filter", [1, 1])
    one_of(settings, "clip_act", 256)
    net = EDM2(
        width=settings["model_channels"],
        multipliers=tuple(settings["channel_mult"]),
        blocks=settings["num_blocks"],
        attention=tuple(settings["attn_resolutions"]),
        head_width=settings["channels_per_head"],
        dropout=float(settings["dropout"]),
        num_classes=settings["label_dim"] or None,
        class_balance=settings["label_balance"],
        skip_balance=settings["concat_balance"],
        residual_balance=settings["res_balance"],
        attention_balance=settings["attn_balance"],
    )

    def to_ours(tensors: Tensors) -> Tensors:
        found = {
            name.replace("emb_gain", "weight").replace("out_gain", "out_gain.weight"): tensor
            for name, tensor in _to_ours(tensors).items()
        }
        waves = "emb_fourier.freqs", "emb_fourier.phases"
        if found.keys() >= set(waves):
            found["emb_fourier.weight"] = np.stack([found.pop(name) for name in waves], axis=1)
        return found

    names = _names(net, settings["img_resolution"], PRESERVING_BLOCK, {}) | {
        "embedding": "emb_fourier",
        "noise": "emb_noise",
        "label": "emb_label",
        "out": "out_conv",
        "": "out_gain",
    }
    return Layout(net, settings["img_channels"], names, to_ours)


# The process


class NearestStep(NamedTuple):
    """The network is told the step k, from −1, whose σ/α at (k + 1)/T is nearest."""

    total: int

    def __call__(self, process: Gaussian, t: Time) -> Time:
        """Of 0, …, T the nearest, less 1."""
        alphas, sigmas = jax.vmap(process.schedule)(jnp.arange(self.total + 1) / self.total)
        alpha, sigma = process.schedule(t)
        return jnp.argmin(jnp.abs(sigmas / alphas - sigma / alpha)) - 1.0


def _edm(settings: Settings) -> tuple[Gaussian, Parameterization, Grid]:
    # Where a network states no limits, its sampler's: those of table 1.
    lowest = float(max(0.002, settings["sigma_min"]))
    highest = float(min(80.0, settings["sigma_max"]))
    parameterization = parameterizations.edm(
        settings["sigma_data"], noise_level=parameterizations.quarter_log_sigma
    )
    steps = 18 if settings["img_resolution"] <= 32 else 40
    return Gaussian(schedules.edm(lowest, highest)), parameterization, grids.uniform(steps - 1)


def _edm2(settings: Settings) -> tuple[Gaussian, Parameterization, Grid]:
    parameterization = parameterizations.edm(
        settings["sigma_data"], noise_level=parameterizations.quarter_log_sigma
    )
    return Gaussian(schedules.edm(0.002, 80.0)), parameterization, grids.uniform(31)


def _vp(settings: Settings) -> tuple[Gaussian, Parameterization, Grid]:
    steps = one_of(settings, "M", 1000)
    lowest = float(settings["beta_min"])
    schedule = schedules.linear_beta(lowest, lowest + settings["beta_d"])
    parameterization = parameterizations.epsilon(noise_level=parameterizations.discrete_time)
    return Gaussian(schedule), parameterization, grids.uniform(steps)


def _iddpm(settings: Settings) -> tuple[Gaussian, Parameterization, Grid]:
    # Their buffer u has σ/α of steps T, T − 1, …, 0, and 1 + (σ/α)² = 1/α².
    growth = 1.0 + np.asarray(settings["_buffers"]["u"][::-1], np.float64) ** 2
    steps = len(growth) - 1
    schedule = schedules.from_betas(1.0 - growth[:-1] / growth[1:])
    mean = parameterizations.epsilon(noise_level=NearestStep(steps))
    parameterization = parameterizations.learned_variance(mean, steps=steps)
    return Gaussian(schedule), parameterization, grids.uniform(steps)


def _ve(settings: Settings) -> tuple[Gaussian, Parameterization, Grid]:
    schedule = schedules.exploding(float(settings["sigma_min"]), float(settings["sigma_max"]))
    # The model knew images in [0, 1], of half the noise.
    parameterization = RawEpsilon(sign=-1.0, noise_level=LogSigma(2.0))
    return Gaussian(schedule), parameterization, grids.uniform(999)


MODELS: Mapping[str, tuple[Settings, set[str], Callable[[Settings], Layout]]] = {
    "SongUNet": (SONG, IN_AND_OUT, _song),
    "DhariwalUNet": (DHARIWAL, IN_AND_OUT, _dhariwal),
    "UNet": (PRESERVING, IMAGE_AND_LABEL, _preserving),
}
PRECONDITIONS = {
    "EDMPrecond": _edm,
    "VPPrecond": _vp,
    "VEPrecond": _ve,
    "iDDPMPrecond": _iddpm,
    "Precond": _edm2,
}
CLASSES = {
    *MODELS,
    *PRECONDITIONS,
    "UNetBlock",
    "Conv2d",
    "Linear",
    "GroupNorm",
    "PositionalEmbedding",
    "FourierEmbedding",
    # A snapshot of the training has these beside the network.
    "EDMLoss",
    "VPLoss",
    "VELoss",
    "AugmentPipe",
    "Block",
    "MPConv",
    "MPFourier",
    "EDM2Loss",
    "StandardRGBEncoder",
    "StabilityVAEEncoder",
}


def from_edm(path: str | Path) -> Pretrained:
    """A network pickle of EDM or EDM2, such as edm-cifar10-32x32-uncond-vp.pkl.

    Nothing in the file is run: it may name the classes and functions of such a network alone. The
    networks are DDPM++, NCSN++, ADM and EDM2's; what the augmentation of the training images told
    them is left out, as in sampling, and so are dropout of labels, float16 and EDM2's estimate of
    its own loss. Those of EDM2 at 512 × 512 are of latents: the autoencoder is not in the file.

    Args:
        path: the file; its entry "ema" is read.

    Returns:
        The denoiser, in float32. Under EDM's preconditioning its process has the noise levels
        0.002 … 80, and its grid those of the paper's deterministic sampler, 18 at 32 × 32 and 40
        above (32 for EDM2). The sampler's last step, from 0.002 to no noise, is the denoiser's mean
        at time 0.
        Under those of VP and VE, it has the processes of Song et al. 2021 and 1000 times. Under
        that of iDDPM, in which the weights of Dhariwal and Nichol 2021 come, it has their process,
        its 1000 steps, and the variance that they predict, of which EDM makes no use.

    Raises:
        ValueError: names what the file calls and must not, the setting that no network here has,
            or the tensors that are missing, unknown or of another shape; if there is no such file,
            or if it is truncated.

    References: Karras et al. 2022, arXiv 2206.00364, table 1, algorithm 1, appendices C.3 and F;
        Karras et al. 2024, arXiv 2312.02696, appendix B.
    """
    path = Path(path)
    outer, model = _read(path)
    settings = _settings(model)
    layout = MODELS[model.kind][-1](settings)
    side, channels = settings["img_resolution"], layout.channels
    shapes = shapes_of(layout.net, jnp.zeros((1, side, side, channels)), jnp.zeros(1))
    params = from_torch(layout.to_ours(_tensors(model)), shapes, layout.names, str(path))
    process, parameterization, grid = PRECONDITIONS[outer.kind](outer.state)
    return Pretrained(
        params,
        process,
        layout.net.apply,
        parameterization,
        grid=grid,
        shape=(side, side, channels),
        net=layout.net,
    )
