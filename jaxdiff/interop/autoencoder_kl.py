"""Autoencoders of the library diffusers, of the class AutoencoderKL, and back.

A pipeline's folder has them in `vae/`: config.json beside diffusion_pytorch_model.safetensors. Its
diffusion model sees latents that were shifted and scaled to about unit variance,

    z = scaling (z' - shift),      z' ~ q(z'|x),

so that is what `PretrainedAutoencoder` returns and takes.

References: Rombach et al. 2022, arXiv 2112.10752, appendix G (the scaling).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float

from jaxdiff import struct
from jaxdiff.distributions import Normal
from jaxdiff.interop.base import (
    from_torch,
    read_safetensors,
    shapes_of,
    to_torch,
)
from jaxdiff.interop.diffusers import (
    ATTENTION,
    RESIDUAL,
    WEIGHTS,
    Config,
    given,
    one_of,
    read_json,
    renamed,
    write_model,
)
from jaxdiff.networks.autoencoder import AutoencoderKL
from jaxdiff.processes.base import example_keys
from jaxdiff.typing import Array, Key, Params, Scalar

__all__ = ["PretrainedAutoencoder", "autoencoder_from_diffusers", "autoencoder_to_diffusers"]

Image = Float[Array, "b h w c"]
Latent = Float[Array, "b h2 w2 d"]

ENDS = {"in": "conv_in", "out_norm": "conv_norm_out", "out_conv": "conv_out"}


@struct.dataclass
class PretrainedAutoencoder:
    """An autoencoder from a file: images to latents as a diffusion model wants them, and back.

    Attributes:
        params: the network's parameters.
        net: the network, to be trained further.
        scaling: 1 over the standard deviation of latents.
        shift: their mean.
    """

    params: Params
    net: AutoencoderKL = struct.field(pytree_node=False)
    scaling: Scalar = 1.0
    shift: Scalar = 0.0

    def encode(self, key: Key, x: Image) -> Latent:
        """Draws z of images x [b, h, w, c] in [-1, 1]; example i uses `fold_in(key, i)`."""
        mean, logvar = self._apply(x, "encode")
        keys = example_keys(key, len(x))
        draw = jax.vmap(lambda key, mean, std: Normal(mean, std).sample(key))
        return self.scaling * (draw(keys, mean, jnp.exp(0.5 * logvar)) - self.shift)

    def mean(self, x: Image) -> Latent:
        """The mean of z."""
        return self.scaling * (self._apply(x, "encode")[0] - self.shift)

    def decode(self, z: Latent) -> Image:
        """The images [b, h, w, c] of latents z."""
        return self._apply(z / self.scaling + self.shift, "decode")

    def _apply(self, x: Array, method: str) -> Any:
        return self.net.apply(self.params, x, method=method)


def _network(config: Config) -> AutoencoderKL:
    """The autoencoder of a config.json.

    Raises:
        ValueError: names the setting that no network here has.
    """
    given(config, "_class_name", "block_out_channels", "down_block_types", "up_block_types")
    given(config, "in_channels", "out_channels", "latent_channels")
    one_of(config, "_class_name", "AutoencoderKL")
    channels = tuple(config["block_out_channels"])
    for name, kind in (
        ("down_block_types", "DownEncoderBlock2D"),
        ("up_block_types", "UpDecoderBlock2D"),
    ):
        one_of({name: list(config[name])}, name, [kind] * len(channels))
    one_of(config, "act_fn", "silu", "swish")
    # Pipelines do not agree on whether these come beside the scaling or in its place.
    one_of(config, "latents_mean", None)
    one_of(config, "latents_std", None)
    use_quant_conv = one_of(config, "use_quant_conv", True, False)
    one_of({"use_post_quant_conv": True, **config}, "use_post_quant_conv", use_quant_conv)
    return AutoencoderKL(
        channels=channels,
        blocks=config.get("layers_per_block", 1),
        latent_channels=config["latent_channels"],
        out_channels=config["out_channels"],
        groups=config.get("norm_num_groups", 32),
        attention=one_of(config, "mid_block_add_attention", True, False),
        use_quant_conv=use_quant_conv,
    )


def _names(net: AutoencoderKL) -> dict[str, str]:
    """Where each module of ours is found in their state."""
    last = len(net.channels) - 1
    names = {name: name for name in ("quant_conv", "post_quant_conv")}

    def inside(ours: str, theirs: str, table: Mapping[str, str]) -> None:
        names.update({f"{ours}/{a}": f"{theirs}.{b}" for a, b in table.items()})

    for half in ("encoder", "decoder"):
        inside(half, half, ENDS)
        inside(f"{half}/middle_attention", f"{half}.mid_block.attentions.0", ATTENTION)
        for i in range(2):
            inside(f"{half}/middle_block_{i}", f"{half}.mid_block.resnets.{i}", RESIDUAL)
    for level in range(last + 1):
        down, up = f"encoder.down_blocks.{level}", f"decoder.up_blocks.{last - level}"
        for i in range(net.blocks + 1):
            inside(f"encoder/down_{level}_block_{i}", f"{down}.resnets.{i}", RESIDUAL)
            inside(f"decoder/up_{level}_block_{i}", f"{up}.resnets.{i}", RESIDUAL)
        # Theirs halve at the end of a level, ours at the beginning of the next.
        names[f"encoder/down_{level + 1}"] = f"{down}.downsamplers.0.conv"
        names[f"decoder/up_{level}"] = f"{up}.upsamplers.0.conv"
    return names


def _shapes(net: AutoencoderKL, in_channels: int) -> Params:
    side = 2 ** (len(net.channels) - 1)
    return shapes_of(net, jnp.zeros((1, side, side, in_channels)))


def autoencoder_from_diffusers(path: str | Path) -> PretrainedAutoencoder:
    """An `AutoencoderKL` of diffusers, such as Stable Diffusion's.

    Args:
        path: its folder, or that of a pipeline with `vae/`.

    Returns:
        The autoencoder, in float32, with the scaling and shift of its config.

    Raises:
        ValueError: names the file that is missing or truncated, the setting that no network here
            has, or the tensors that are missing, unknown or of another shape.
        ImportError: without the extra `interop`.
    """
    folder = Path(path)
    folder = folder / "vae" if (folder / "vae").is_dir() else folder
    config = read_json(folder / "config.json")
    net = _network(config)
    source = folder / WEIGHTS
    tensors = {renamed(name): array for name, array in read_safetensors(source).items()}
    return PretrainedAutoencoder(
        from_torch(tensors, _shapes(net, config["in_channels"]), _names(net), str(source)),
        net,
        # Configs older than this setting mean Stable Diffusion's.
        scaling=config.get("scaling_factor", 0.18215),
        shift=config.get("shift_factor") or 0.0,
    )


def autoencoder_to_diffusers(params: Params, config: Config, path: str | Path) -> None:
    """Writes parameters as the autoencoder of a pipeline: the inverse of the above.

    Args:
        params: of the network that `config` describes.
        config: of an AutoencoderKL, as its config.json has it.
        path: the pipeline's folder; they go to its `vae/`.

    Raises:
        ValueError: names the setting that no network here has.
        ImportError: without the extra `interop`.
    """
    tensors = to_torch(params, _names(_network(config)))
    write_model(Path(path) / "vae", config, tensors)
