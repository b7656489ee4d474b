"""The autoencoder of latent diffusion against diffusers': outputs, gradients, files and sizes."""

import json
import math
import shutil
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
diffusers = pytest.importorskip("diffusers", reason="needs the test extra")
torch = pytest.importorskip("torch", reason="needs the test extra")
safetensors = pytest.importorskip("safetensors.numpy", reason="needs the test extra")

from jaxdiff.interop.autoencoder_kl import (
    PretrainedAutoencoder,
    _names,
    _network,
    _shapes,
    autoencoder_from_diffusers,
    autoencoder_to_diffusers,
)
from jaxdiff.interop.base import _their_name, to_torch
from jaxdiff.networks import autoencoder
from jaxdiff.networks.autoencoder import AutoencoderKL
from jaxdiff.networks.unet import DDPM


def levels(*channels):
    return {
        "block_out_channels": channels,
        "down_block_types": ["DownEncoderBlock2D"] * len(channels),
        "up_block_types": ["UpDecoderBlock2D"] * len(channels),
    }


# As Stable Diffusion's; as Flux's, with a shift; and without attention.
CONFIGS: dict[str, dict[str, Any]] = {
    "Stable Diffusion": levels(8, 16) | {"norm_num_groups": 4},
    "Flux": levels(8, 8, 16)
    | {
        "norm_num_groups": 2,
        "latent_channels": 6,
        "scaling_factor": 0.3611,
        "shift_factor": 0.1159,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    },
    "no attention": levels(8, 16)
    | {"norm_num_groups": 4, "layers_per_block": 2, "mid_block_add_attention": False},
}
every_config = pytest.mark.parametrize("name", CONFIGS)
HALVES = ("encode", "decode")
SIDE = {"encode": 16, "decode": 4}
WEIGHTS = "vae/diffusion_pytorch_model.safetensors"
KEY = jax.random.key(0)


class Rival(NamedTuple):
    """A model of diffusers with random weights, saved, and loaded here."""

    model: Any
    folder: Path
    ours: PretrainedAutoencoder

    def inputs(self, half):
        channels = 3 if half == "encode" else self.ours.net.latent_channels
        shape = (2, SIDE[half], SIDE[half], channels)
        return np.random.default_rng(1).normal(size=shape).astype(np.float32)

    def theirs(self, half):
        """A half's output, and the gradients of a projection of it by input and parameters."""
        self.model.zero_grad()
        x = torch.tensor(self.inputs(half).transpose(0, 3, 1, 2), requires_grad=True)
        if half == "encode":
            latent = self.model.encode(x).latent_dist
            out = torch.cat([latent.mean, latent.logvar], dim=1)
        else:
            out = self.model.decode(x).sample
        out = out.permute(0, 2, 3, 1)
        (out * torch.tensor(probe(out.shape))).sum().backward()
        slopes = {
            key: tensor.grad.numpy()
            for key, tensor in self.model.named_parameters()
            if tensor.grad is not None
        }
        return out.detach().numpy(), x.grad.numpy().transpose(0, 2, 3, 1), slopes

    def run(self, half, params, x):
        return joined(self.ours.net.apply(params, x, method=half))

    def found(self, half):
        """The same of ours."""

        @jax.jit
        def both(params, x):
            def projected(params, x):
                out = self.run(half, params, x)
                return jnp.sum(probe(out.shape) * out), out

            return jax.grad(projected, argnums=(0, 1), has_aux=True)(params, x)

        (slopes, slope), out = both(self.ours.params, jnp.asarray(self.inputs(half)))
        return out, slope, to_torch(slopes, _names(self.ours.net))


def joined(out):
    """The moments side by side, an image as it is."""
    return jnp.concatenate(out, axis=-1) if isinstance(out, tuple) else out


def probe(shape):
    return np.random.default_rng(2).normal(size=tuple(shape)).astype(np.float32)


def error(found, expected):
    return float(np.abs(np.asarray(found) - expected).max() / np.abs(expected).max())


@pytest.fixture(scope="module")
def rivals(tmp_path_factory):
    """Each config's model, made once; weights small enough that the ε of a norm is seen."""
    cache = {}

    def rival(name):
        if name not in cache:
            torch.manual_seed(0)
            model = diffusers.AutoencoderKL(**CONFIGS[name]).eval()
            with torch.no_grad():
                for tensor in model.parameters():
                    if tensor.ndim == 1:
                        tensor.add_(0.05 * torch.randn_like(tensor))
                for half in (model.encoder, model.decoder):
                    half.conv_in.weight.mul_(0.05)
                    half.conv_in.bias.mul_(0.05)
            folder = tmp_path_factory.mktemp("pipeline")
            model.save_pretrained(folder / "vae")
            cache[name] = Rival(model, folder, autoencoder_from_diffusers(folder))
        return cache[name]

    return rival


@every_config
@pytest.mark.parametrize("half", HALVES)
def test_outputs_and_gradients_are_the_same(half, name, rivals):
    """Relative to the greatest: outputs to 1e-5, gradients by input and parameters to 1e-4."""
    rival = rivals(name)
    (out, slope, slopes), (expected, expected_slope, theirs) = rival.found(half), rival.theirs(half)
    assert error(out, expected) < 1e-5
    assert error(slope, expected_slope) < 1e-4
    greatest = max(np.abs(tensor).max() for tensor in theirs.values())
    for key, tensor in slopes.items():
        wanted = theirs.get(key, 0.0)  # of the other half they have none
        assert np.abs(tensor - wanted).max() < 1e-4 * greatest, key


def transposed(params):
    return jax.tree.map(lambda a: a.swapaxes(0, 1) if a.ndim == 4 else a, params)


@pytest.mark.parametrize(
    ("mutant", "half"),
    [
        ("transposed kernel", "encode"),
        ("transposed kernel", "decode"),
        ("epsilon", "encode"),
        ("epsilon", "decode"),
        ("padding", "encode"),
    ],
)
def test_parity_catches_the_mutants(mutant, half, rivals, monkeypatch):
    rival = rivals("Stable Diffusion")
    params, x = rival.ours.params, jnp.asarray(rival.inputs(half))
    if mutant == "transposed kernel":
        params = transposed(params)
    if mutant == "epsilon":
        monkeypatch.setattr(autoencoder, "DDPM", DDPM._replace(epsilon=1e-5))
    if mutant == "padding":
        monkeypatch.setattr(autoencoder, "DDPM", DDPM._replace(padding=(1, 0)))
    found = jax.jit(lambda params, x: rival.run(half, params, x))(params, x)
    assert error(found, rival.theirs(half)[0]) > 5e-5


def test_the_log_variance_is_bounded(rivals):
    ours = rivals("Stable Diffusion").ours

    @jax.jit
    def logvar(bias):
        moved = {**ours.params["params"]["quant_conv"], "bias": jnp.full(8, bias)}
        params = {"params": {**ours.params["params"], "quant_conv": moved}}
        return ours.net.apply(params, jnp.zeros((1, 8, 8, 3)), method="encode")[1]

    np.testing.assert_array_equal(logvar(1e3), 20.0)
    np.testing.assert_array_equal(logvar(-1e3), -30.0)


@pytest.mark.parametrize("half", HALVES)
def test_bfloat16_computes_the_same_more_coarsely(half, rivals):
    rival = rivals("Stable Diffusion")
    net = rival.ours.net.clone(dtype=jnp.bfloat16)
    run = jax.jit(lambda params, x: joined(net.apply(params, x, method=half)))
    narrow = run(rival.ours.params, jnp.asarray(rival.inputs(half)))
    assert narrow.dtype == jnp.float32
    assert 1e-4 < error(narrow, rival.theirs(half)[0]) < 0.05


# Latents as a diffusion model sees them


def test_latents_are_shifted_and_scaled_draws(rivals):
    rival = rivals("Flux")
    images = jnp.tile(jnp.asarray(rival.inputs("encode"))[:1], (100, 1, 1, 1))

    @jax.jit
    def encoded(ours, x):
        moments = ours.net.apply(ours.params, x, method="encode")
        return moments, ours.mean(x), ours.encode(KEY, x)

    (mean, logvar), centre, z = encoded(rival.ours, images)
    np.testing.assert_allclose(centre, 0.3611 * (mean - 0.1159), atol=1e-6)
    noise = (z / 0.3611 + 0.1159 - mean) / jnp.exp(0.5 * logvar)
    # Of 100 × 4 × 4 × 6 draws of N(0, 1), five standard errors.
    assert abs(float(noise.mean())) < 5 / math.sqrt(9600)
    assert float(noise.std()) == pytest.approx(1.0, abs=5 / math.sqrt(2 * 9600))
    # Each image has its own, whatever the batch.
    np.testing.assert_allclose(encoded(rival.ours, images[:3])[-1], z[:3], atol=1e-5)


def test_latents_are_decoded_as_their_pipelines_do(rivals):
    rival = rivals("Flux")
    z = rival.inputs("decode")
    with torch.no_grad():
        theirs = torch.tensor(z.transpose(0, 3, 1, 2)) / 0.3611 + 0.1159
        expected = rival.model.decode(theirs).sample.numpy().transpose(0, 2, 3, 1)
    found = jax.jit(PretrainedAutoencoder.decode)(rival.ours, jnp.asarray(z))
    assert error(found, expected) < 1e-5


# Files


@every_config
def test_saved_weights_are_the_same_file(name, rivals, tmp_path):
    rival = rivals(name)
    config = json.loads((rival.folder / "vae" / "config.json").read_text())
    autoencoder_to_diffusers(rival.ours.params, config, tmp_path)
    before, after = (safetensors.load_file(f / WEIGHTS) for f in (rival.folder, tmp_path))
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        np.testing.assert_array_equal(after[key], tensor, err_msg=key)
    assert json.loads((tmp_path / "vae" / "config.json").read_text()) == config


@pytest.fixture
def folder(rivals, tmp_path):
    """A copy of a pipeline, to be changed."""
    shutil.copytree(rivals("Stable Diffusion").folder, tmp_path / "pipeline")
    return tmp_path / "pipeline"


def rewrite(folder, change):
    path = folder / WEIGHTS
    safetensors.save_file(change(safetensors.load_file(path)), path)


def configure(folder, **options):
    path = folder / "vae" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | options))


def test_old_names_and_a_folder_of_its_own_are_read(rivals, folder):
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def renamed(name):
        for new, name_then in old.items():
            name = name.replace(f".{new}.", f".{name_then}.")
        return name

    rewrite(folder, lambda tensors: {renamed(key): tensor for key, tensor in tensors.items()})
    assert any(".proj_attn." in key for key in safetensors.load_file(folder / WEIGHTS))
    ours = autoencoder_from_diffusers(folder / "vae")
    jax.tree.map(np.testing.assert_array_equal, ours.params, rivals("Stable Diffusion").ours.params)
    assert (ours.scaling, ours.shift) == (0.18215, 0.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: {k: v for k, v in t.items() if k != "quant_conv.bias"},
            "lacks.*quant_conv.bias",
        ),
        (lambda t: t | {"extra.weight": np.zeros(3)}, "belong nowhere: extra.weight"),
        (
            lambda t: t | {"encoder.conv_in.weight": np.zeros((8, 3, 1, 3), np.float32)},
            r"encoder.conv_in.weight is \(8, 3, 1, 3\), should be \(8, 3, 3, 3\)",
        ),
    ],
    ids=["missing", "unknown", "shape"],
)
def test_tensors_that_do_not_fit_are_named(change, message, folder):
    rewrite(folder, change)
    with pytest.raises(ValueError, match=message):
        autoencoder_from_diffusers(folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"_class_name": "VQModel"}, "_class_name must be 'AutoencoderKL' here, got 'VQModel'"),
        ({"latent_channels": None}, "latent_channels must be given"),
        ({"act_fn": "gelu"}, "act_fn must be 'silu' or 'swish' here, got 'gelu'"),
        ({"down_block_types": ["AttnDownEncoderBlock2D"] * 2}, "down_block_types must be .*'Attn"),
        ({"up_block_types": ["UpDecoderBlock2D"]}, "up_block_types must be .*, got"),
        ({"use_post_quant_conv": False}, "use_post_quant_conv must be True here, got False"),
        ({"latents_mean": [0.0] * 4}, "latents_mean must be None here"),
        ({"norm_num_groups": 3}, r"groups must divide the channels.*\(8, 16\), got 3"),
    ],
)
def test_settings_that_no_network_has_are_named(options, message, folder):
    configure(folder, **options)
    with pytest.raises(ValueError, match=message):
        autoencoder_from_diffusers(folder)


def test_damaged_files_are_named(folder):
    weights, config = folder / WEIGHTS, folder / "vae" / "config.json"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"model.safetensors is truncated"):
        autoencoder_from_diffusers(folder)
    weights.unlink()
    with pytest.raises(ValueError, match=r"there is no .*model.safetensors"):
        autoencoder_from_diffusers(folder)
    config.write_text(config.read_text()[:50])
    with pytest.raises(ValueError, match=r"config.json is truncated"):
        autoencoder_from_diffusers(folder)
    with pytest.raises(ValueError, match=r"path must be a folder of diffusers"):
        autoencoder_from_diffusers(folder / "nowhere")


# The network


@pytest.mark.parametrize("shape", [(1, 6, 8, 3), (1, 8, 10, 3)])
def test_sides_that_would_not_come_back_are_refused(shape):
    net = AutoencoderKL((8, 8, 8), groups=2)
    with pytest.raises(ValueError, match=r"x must be images .* that 4 divides, got shape"):
        jax.eval_shape(net.init, KEY, jnp.zeros(shape))


def test_images_of_any_such_sides_come_back():
    net = AutoencoderKL((8, 8), groups=2, out_channels=1)
    x = jnp.zeros((2, 6, 10, 1))
    out, params = jax.eval_shape(net.init_with_output, KEY, x)
    assert out.shape == x.shape
    encode = partial(net.apply, method="encode")
    assert [moment.shape for moment in jax.eval_shape(encode, params, x)] == [(2, 3, 5, 4)] * 2


# https://huggingface.co/stabilityai/sd-vae-ft-mse and black-forest-labs/FLUX.1-dev, config.json.
FULL = levels(128, 256, 512, 512) | {"layers_per_block": 2, "_class_name": "AutoencoderKL"}
FULL |= {"in_channels": 3, "out_channels": 3, "latent_channels": 4}
FLUX = {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}


@pytest.mark.parametrize(
    ("config", "parameters"),
    [(FULL, 83_653_863), (FULL | FLUX, 83_819_683)],
    ids=["Stable Diffusion", "Flux"],
)
def test_published_sizes(config, parameters):
    """The names and the number of parameters, by tracing alone."""
    with torch.device("meta"):
        theirs = diffusers.AutoencoderKL.from_config(config).state_dict()
    assert sum(tensor.numel() for tensor in theirs.values()) == parameters
    net = _network(config)
    shapes = _shapes(net, 3)
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == parameters
    paths = flatten_dict(shapes["params"])
    assert {_their_name(path, _names(net)) for path in paths} == theirs.keys()
