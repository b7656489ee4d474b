"""Weights of diffusers: the same outputs and gradients, the same samples, the same files again."""

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
diffusers = pytest.importorskip("diffusers", reason="needs the test extra")
torch = pytest.importorskip("torch", reason="needs the test extra")
safetensors = pytest.importorskip("safetensors.numpy", reason="needs the test extra")

import jaxdiff as jd
from jaxdiff.interop import Pretrained, from_diffusers, to_diffusers
from jaxdiff.networks.unet import UNet
from jaxdiff.solve import adaptive

SMALL = {
    "sample_size": 16,
    "in_channels": 3,
    "out_channels": 3,
    "layers_per_block": 1,
    "block_out_channels": (32, 64),
    "norm_num_groups": 8,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}
# Of google/ddpm-cifar10-32 but for its size; the defaults of the class; ADM; NCSN++.
CONFIGS: dict[str, dict[str, Any]] = {
    "DDPM": SMALL
    | {
        "attention_head_dim": None,
        "norm_eps": 1e-6,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "downsample_padding": 0,
    },
    "default": SMALL,
    "ADM": SMALL
    | {
        "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        "attention_head_dim": 16,
        "resnet_time_scale_shift": "scale_shift",
        "attn_norm_num_groups": 8,
        "downsample_type": "resnet",
        "upsample_type": "resnet",
        "num_class_embeds": 5,
    },
    "NCSN++": SMALL
    | {
        "block_out_channels": (128, 128),
        "norm_num_groups": None,
        "down_block_types": ("SkipDownBlock2D", "AttnSkipDownBlock2D"),
        "up_block_types": ("AttnSkipUpBlock2D", "SkipUpBlock2D"),
        "attention_head_dim": None,
        "norm_eps": 1e-6,
        "time_embedding_type": "fourier",
        "mid_block_scale_factor": 2**0.5,
    },
}
DIT = {
    "sample_size": 8,
    "in_channels": 3,
    "out_channels": 6,
    "patch_size": 2,
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_embeds_ada_norm": 5,
}
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
LABELS = np.array([1, 4])
STEPS = np.array([3.0, 700.0], np.float32)
RNG = np.random.default_rng(0)
X, PROBE = RNG.normal(size=(2, 2, 16, 16, 3)).astype(np.float32)


class Rival(NamedTuple):
    """A model of diffusers with random weights, saved, and loaded here."""

    model: Any
    folder: Path
    ours: Pretrained

    def theirs(self, x):
        """Its output and the gradient of a projection of it, in our layout."""
        x = torch.tensor(x.transpose(0, 3, 1, 2), requires_grad=True)
        classes = self.model.config.num_class_embeds
        label = {} if classes is None else {"class_labels": torch.tensor(LABELS)}
        out = self.model(x, torch.tensor(STEPS), **label).sample
        (out * torch.tensor(PROBE.transpose(0, 3, 1, 2))).sum().backward()
        return tuple(a.detach().numpy().transpose(0, 2, 3, 1) for a in (out, x.grad))

    def found(self, x, net: UNet | None = None, params=None):
        """The same of ours, or of a changed network or changed parameters."""
        net = self.ours.net if net is None else net
        params = self.ours.params if params is None else params
        fourier = self.model.config.time_embedding_type == "fourier"
        level, scale = (jnp.log(STEPS), STEPS) if fourier else (jnp.asarray(STEPS), np.ones(2))
        label = () if net.num_classes is None else (jnp.asarray(LABELS),)

        @jax.jit
        def both(params, x):
            def run(x):
                out = net.apply(params, x, level, *label) / scale[:, None, None, None]
                return jnp.sum(PROBE * out), out

            return jax.grad(run, has_aux=True)(x)

        slope, out = both(params, jnp.asarray(x))
        return out, slope


@pytest.fixture(scope="module")
def rivals(tmp_path_factory):
    """Each config's model, made once; weights small enough that the ε of a norm is seen."""
    cache = {}

    def rival(name):
        if name not in cache:
            torch.manual_seed(0)
            model = diffusers.UNet2DModel(**CONFIGS[name]).eval()
            with torch.no_grad():
                for tensor in model.parameters():
                    if tensor.ndim == 1 and tensor.requires_grad:
                        tensor.add_(0.05 * torch.randn_like(tensor))
                model.conv_in.weight.mul_(0.05)
                model.conv_in.bias.mul_(0.05)
            folder = tmp_path_factory.mktemp("pipeline")
            diffusers.DDPMPipeline(model, diffusers.DDPMScheduler()).save_pretrained(folder)
            cache[name] = Rival(model, folder, from_diffusers(folder))
        return cache[name]

    return rival


def error(found, expected):
    return float(np.abs(np.asarray(found) - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("name", CONFIGS)
def test_outputs_and_gradients_are_the_same(name, rivals):
    """Relative to the greatest: outputs to 1e-5, gradients to 1e-4."""
    rival = rivals(name)
    (out, slope), (expected, expected_slope) = rival.found(X), rival.theirs(X)
    assert error(out, expected) < 1e-5
    assert error(slope, expected_slope) < 1e-4


def transposed(params):
    return jax.tree.map(lambda a: a.swapaxes(0, 1) if a.ndim == 4 else a, params)


def swapped(params):
    halves = lambda a: jnp.roll(a, a.shape[-1] // 2, axis=-1)
    of = lambda path, a: halves(a) if any("inject" in str(key) for key in path) else a
    return jax.tree_util.tree_map_with_path(of, params)


@pytest.mark.parametrize(
    ("name", "mutant"),
    [
        ("DDPM", "transposed kernel"),
        ("ADM", "swapped scale and shift"),
        ("DDPM", "epsilon"),
        ("default", "epsilon"),
        ("NCSN++", "no square root"),
        ("NCSN++", "no filter"),
    ],
)
def test_parity_catches_the_mutants(name, mutant, rivals):
    rival, net, params = rivals(name), None, None
    variant = rival.ours.net.variant
    if mutant == "transposed kernel":
        params = transposed(rival.ours.params)
    if mutant == "swapped scale and shift":
        params = swapped(rival.ours.params)
    if mutant == "epsilon":
        other = 1e-5 if variant.epsilon == 1e-6 else 1e-6
        net = rival.ours.net.clone(variant=variant._replace(epsilon=other))
    if mutant == "no square root":
        net = rival.ours.net.clone(variant=variant._replace(rescale=False))
    if mutant == "no filter":
        net = rival.ours.net.clone(variant=variant._replace(smooth=False))
    assert error(rival.found(X, net, params)[0], rival.theirs(X)[0]) > 5e-5


@pytest.mark.parametrize("name", CONFIGS)
def test_saved_weights_are_the_same_file(name, rivals, tmp_path):
    rival = rivals(name)
    config = json.loads((rival.folder / "unet" / "config.json").read_text())
    to_diffusers(rival.ours.params, config, tmp_path)
    before, after = (safetensors.load_file(f / WEIGHTS) for f in (rival.folder, tmp_path))
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        np.testing.assert_array_equal(after[key], tensor, err_msg=key)
    assert json.loads((tmp_path / "unet" / "config.json").read_text()) == config


def test_samples_are_those_of_their_pipeline(rivals):
    """DDIM in 20 steps from the same noise, within 1e-3."""
    rival = rivals("DDPM")
    scheduler = diffusers.DDIMScheduler(clip_sample=False, timestep_spacing="trailing")
    scheduler.set_timesteps(20)
    x = torch.tensor(X.transpose(0, 3, 1, 2))
    with torch.no_grad():
        for step in scheduler.timesteps:
            x = scheduler.step(rival.model(x, step).sample, step, x).prev_sample
    expected = x.numpy().transpose(0, 2, 3, 1)
    times = np.append((scheduler.timesteps.numpy() + 1.0) / 1000, 1 / 1000)
    found = jd.sample(
        jd.DDIM(rival.ours.process),
        rival.ours,
        jnp.asarray(times),
        jax.random.key(0),
        jnp.asarray(X),
    )
    assert error(found, expected) < 1e-3


def test_everything_here_accepts_it(rivals):
    """The likelihood in bits, a sampler on its own grid, a step of training."""
    ours = rivals("DDPM").ours
    assert jd.interop.from_diffusers is from_diffusers
    assert ours.shape == (16, 16, 3)
    np.testing.assert_allclose(ours.grid[:2], [1.0, 0.999], rtol=1e-6)
    found = jd.log_likelihood(
        ours.process,
        ours,
        jnp.asarray(X),
        key=jax.random.key(0),
        probes=1,
        controller=adaptive(1e-2),
    )
    assert found.converged.all()
    loss, _ = jd.denoising(ours.apply, ours.process, ours.parameterization)(
        ours.params, jax.random.key(0), {"x": jnp.asarray(X)}
    )
    assert loss.shape == (2,)


@pytest.fixture(scope="module")
def dit(tmp_path_factory):
    """A DiT of diffusers whose blocks share their embeddings, as its pretrained ones do."""
    torch.manual_seed(0)
    model = diffusers.DiTTransformer2DModel(**DIT).eval()
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.add_(0.1 * torch.randn_like(tensor))
        first = model.transformer_blocks[0].norm1.emb.state_dict()
        for block in model.transformer_blocks:
            block.norm1.emb.load_state_dict(first)
    folder = tmp_path_factory.mktemp("dit")
    model.save_pretrained(folder / "transformer")
    diffusers.DDIMScheduler().save_pretrained(folder / "scheduler")
    return model, folder, from_diffusers(folder)


def test_a_transformer_has_the_same_outputs_and_gradients(dit):
    model, _, ours = dit
    x = np.random.default_rng(1).normal(size=(2, 8, 8, 3)).astype(np.float32)
    probe = np.random.default_rng(2).normal(size=(2, 8, 8, 6)).astype(np.float32)
    theirs = torch.tensor(x.transpose(0, 3, 1, 2), requires_grad=True)
    out = model(theirs, torch.tensor(STEPS), class_labels=torch.tensor(LABELS)).sample
    (out * torch.tensor(probe.transpose(0, 3, 1, 2))).sum().backward()

    def run(x):
        found = ours.net.apply(ours.params, x, jnp.asarray(STEPS), jnp.asarray(LABELS))
        return jnp.sum(probe * found), found

    slope, found = jax.jit(jax.grad(run, has_aux=True))(jnp.asarray(x))
    assert error(found, out.detach().numpy().transpose(0, 2, 3, 1)) < 1e-5
    assert error(slope, theirs.grad.numpy().transpose(0, 2, 3, 1)) < 1e-4
    # Twice the channels are the mean and the variance.
    assert ours(jnp.asarray(x), jnp.float32(0.5)).var.shape == x.shape


def test_a_transformers_saved_weights_are_the_same_file(dit, tmp_path):
    _, folder, ours = dit
    config = json.loads((folder / "transformer" / "config.json").read_text())
    to_diffusers(ours.params, config, tmp_path)
    name = "transformer/diffusion_pytorch_model.safetensors"
    before, after = (safetensors.load_file(f / name) for f in (folder, tmp_path))
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        np.testing.assert_array_equal(after[key], tensor, err_msg=key)


def test_a_transformer_of_many_embeddings_is_refused(dit, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(dit[1], copy)
    path = copy / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = safetensors.load_file(path)
    tensors["transformer_blocks.1.norm1.emb.timestep_embedder.linear_1.bias"] += 1.0
    safetensors.save_file(tensors, path)
    with pytest.raises(ValueError, match=r"alike in every block: transformer_blocks.1.norm1"):
        from_diffusers(copy)


# Mistakes


@pytest.fixture
def folder(rivals, tmp_path):
    """A copy of a pipeline, to be damaged."""
    shutil.copytree(rivals("DDPM").folder, tmp_path / "pipeline")
    return tmp_path / "pipeline"


def rewrite(folder, change):
    path = folder / WEIGHTS
    safetensors.save_file(change(safetensors.load_file(path)), path)


def configure(folder, **options):
    path = folder / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | options))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {k: v for k, v in t.items() if k != "conv_in.bias"}, "lacks.*conv_in.bias"),
        (lambda t: t | {"extra.weight": np.zeros(3)}, "belong nowhere: extra.weight"),
        (
            lambda t: t | {"conv_in.weight": np.zeros((32, 3, 1, 3), np.float32)},
            r"conv_in.weight is \(32, 3, 1, 3\), should be \(32, 3, 3, 3\)",
        ),
    ],
    ids=["missing", "unknown", "shape"],
)
def test_tensors_that_do_not_fit_are_named(change, message, folder):
    rewrite(folder, change)
    with pytest.raises(ValueError, match=message):
        from_diffusers(folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"act_fn": "gelu"}, "act_fn must be 'silu' or 'swish' here, got 'gelu'"),
        ({"_class_name": "UNet2DConditionModel"}, "_class_name must be 'UNet2DModel'"),
        ({"down_block_types": ("KDownBlock2D", "DownBlock2D")}, "block types must be.*KBlock2D"),
        ({"up_block_types": ("UpBlock2D", "AttnUpBlock2D")}, "up_block_types must mirror"),
        ({"block_out_channels": (32, 48)}, "block_out_channels must be multiples"),
        ({"downsample_type": "resnet", "upsample_type": "resnet"}, "as downsample_type says"),
        ({"sample_size": None}, "sample_size must be given"),
        ({"mid_block_scale_factor": 2.0}, "mid_block_scale_factor must be 1.0000"),
        ({"resnet_time_scale_shift": "scale_shift"}, "attn_norm_num_groups must be 8"),
    ],
)
def test_settings_that_no_network_has_are_named(options, message, folder):
    configure(folder, **options)
    with pytest.raises(ValueError, match=message):
        from_diffusers(folder)


def test_damaged_files_are_named(folder):
    weights, config = folder / WEIGHTS, folder / "unet" / "config.json"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"model.safetensors is truncated"):
        from_diffusers(folder)
    weights.unlink()
    with pytest.raises(ValueError, match=r"there is no .*model.safetensors"):
        from_diffusers(folder)
    config.write_text(config.read_text()[:50])
    with pytest.raises(ValueError, match=r"config.json is truncated"):
        from_diffusers(folder)
    with pytest.raises(ValueError, match=r"path must be a folder of diffusers"):
        from_diffusers(folder / "nowhere")


# The VE process


def explode(folder, **options):
    """Has a pipeline scheduled by the VE process, and its network configured anew."""
    scheduler = diffusers.ScoreSdeVeScheduler(num_train_timesteps=100, sigma_max=50.0)
    scheduler.save_pretrained(folder / "scheduler")
    configure(folder, **options)
    return folder


def test_a_pipeline_of_the_ve_process(rivals, tmp_path):
    """Its scores to 5e-5, at three levels of noise; and a sample.

    The network makes y = 2x - 1 of images in [0, 1], and y are ours.
    """
    folder = shutil.copytree(rivals("NCSN++").folder, tmp_path / "pipeline")
    ours = from_diffusers(explode(folder, center_input_sample=True))
    theirs = diffusers.UNet2DModel.from_pretrained(folder / "unet")
    denoise = jax.jit(ours)
    for t in (0.1, 0.5, 0.9):
        sigma = 0.01 * 5000.0**t
        x = 0.5 + sigma * X
        with torch.no_grad():
            score = theirs(torch.tensor(x.transpose(0, 3, 1, 2)), torch.full((2,), sigma)).sample
        found = (np.asarray(denoise(jnp.asarray(2 * x - 1), jnp.float32(t)).mean) + 1) / 2
        expected = x + sigma**2 * score.numpy().transpose(0, 2, 3, 1)
        assert error((found - x) / sigma, (expected - x) / sigma) < 5e-5
    assert len(ours.grid) == 100
    x = ours.process.prior(X.shape).sample(jax.random.key(0))
    out = jd.sample(jd.DDIM(ours.process), ours, jd.grids.uniform(2), jax.random.key(0), x)
    assert jnp.all(jnp.isfinite(out))


def test_a_ve_pipeline_may_leave_its_input_alone(rivals, tmp_path):
    """Then images and noise are those of the scheduler."""
    folder = shutil.copytree(rivals("NCSN++").folder, tmp_path / "pipeline")
    ours = from_diffusers(explode(folder))
    assert float(ours.process.prior((1,)).std) == pytest.approx(50.0)
    x, level = ours.parameterization.inputs(ours.process, jnp.asarray(X), jnp.float32(0.5))
    np.testing.assert_array_equal(x, X)
    assert float(level) == pytest.approx(np.log(0.01 * 5000.0**0.5), rel=1e-6)


def test_a_ve_pipeline_needs_a_network_that_is_told_sigma(folder):
    with pytest.raises(ValueError, match="time_embedding_type must be 'fourier' here"):
        from_diffusers(explode(folder))


def test_only_a_ve_pipeline_centers_its_input(folder):
    configure(folder, center_input_sample=True)
    with pytest.raises(ValueError, match="center_input_sample must be False here, got True"):
        from_diffusers(folder)
