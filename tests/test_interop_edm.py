"""EDM's network pickles: the networks written again in PyTorch, and files that must be refused."""

import io
import math
import os
import pickle
import sys
from types import ModuleType, SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import multiplications

torch = pytest.importorskip("torch", reason="needs the test extra")

from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from jaxdiff import schedules
from jaxdiff.interop import base, edm
from jaxdiff.interop.edm import from_edm

# The networks of the paper's appendix F, with the names of their tensors and of their arguments.


class Recorded(nn.Module):
    """A module that remembers how it was made."""

    def __init__(self, **options):
        super().__init__()
        self._init_args, self._init_kwargs = (), options


class Linear(Recorded):
    def __init__(self, inputs, outputs, bias=True):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs) / math.sqrt(inputs))
        self.bias = nn.Parameter(0.1 * torch.randn(outputs)) if bias else None

    def forward(self, x):
        return F.linear(x, self.weight, self.bias)


class Conv2d(Recorded):
    """A convolution after a change of sides, or before it (fused), or the change alone."""

    def __init__(self, inputs, outputs, side, way=None, taps=(1, 1), fused=False):
        super().__init__()
        self.way, self.fused = way, fused
        scale = math.sqrt(inputs) * max(side, 1)
        self.weight = self.bias = None
        if side:
            self.weight = nn.Parameter(torch.randn(outputs, inputs, side, side) / scale)
            self.bias = nn.Parameter(0.1 * torch.randn(outputs))
        line = torch.tensor(taps) / sum(taps)
        self.register_buffer(
            "resample_filter", torch.outer(line, line)[None, None] if way else None
        )

    def resample(self, x, padding):
        channels = x.shape[1]
        kernel = self.resample_filter.expand(channels, -1, -1, -1)
        if self.way == "up":
            return F.conv_transpose2d(x, 4 * kernel, stride=2, padding=padding, groups=channels)
        return F.conv2d(x, kernel, stride=2, padding=padding, groups=channels)

    def forward(self, x):
        own = 0 if self.weight is None else self.weight.shape[-1] // 2
        border = 0 if self.way is None else (self.resample_filter.shape[-1] - 1) // 2
        if self.fused:
            wide = F.conv2d(x, self.weight, padding=own + border)
            return self.resample(wide, 0) + self.bias[:, None, None]
        x = x if self.way is None else self.resample(x, border)
        return x if self.weight is None else F.conv2d(x, self.weight, self.bias, padding=own)


class GroupNorm(Recorded):
    def __init__(self, channels, eps):
        super().__init__()
        self.weight = nn.Parameter(1 + 0.1 * torch.randn(channels))
        self.bias = nn.Parameter(0.1 * torch.randn(channels))
        self.eps = eps

    def forward(self, x):
        groups = min(32, x.shape[1] // 4)
        return F.group_norm(x, groups, self.weight, self.bias, self.eps)


class UNetBlock(Recorded):
    def __init__(self, inputs, outputs, width, way=None, heads=0, adaptive=True, scale=1.0, **kind):
        super().__init__()
        self.heads, self.adaptive, self.scale = heads, adaptive, scale
        eps, taps, project = kind["eps"], kind["taps"], kind["project"]
        self.norm0 = GroupNorm(inputs, eps)
        self.conv0 = Conv2d(inputs, outputs, 3, way, taps)
        self.affine = Linear(width, outputs * (1 + adaptive))
        self.norm1 = GroupNorm(outputs, eps)
        self.conv1 = Conv2d(outputs, outputs, 3)
        self.skip = None
        if way or inputs != outputs:
            side = int(project or inputs != outputs)
            self.skip = Conv2d(inputs, outputs, side, way, taps)
        if heads:
            self.norm2 = GroupNorm(outputs, eps)
            self.qkv = Conv2d(outputs, 3 * outputs, 1)
            self.proj = Conv2d(outputs, outputs, 1)

    def forward(self, x, condition):
        h = self.conv0(F.silu(self.norm0(x)))
        told = self.affine(condition)[:, :, None, None]
        if self.adaptive:
            scale, shift = told.chunk(2, dim=1)
            h = self.norm1(h) * (1 + scale) + shift
        else:
            h = self.norm1(h + told)
        h = self.conv1(F.silu(h))
        x = (h + (x if self.skip is None else self.skip(x))) * self.scale
        return x if self.heads == 0 else (x + self.attended(x)) * self.scale

    def attended(self, x):
        b, c, height, side = x.shape
        triples = self.qkv(self.norm2(x)).reshape(b, self.heads, c // self.heads, 3, height * side)
        q, k, v = triples.unbind(3)
        weights = torch.softmax(q.mT @ k / math.sqrt(c // self.heads), dim=-1)
        return self.proj((v @ weights.mT).reshape(x.shape))


class PositionalEmbedding(Recorded):
    def __init__(self, features, endpoint):
        super().__init__()
        self.features, self.endpoint = features, endpoint

    def forward(self, levels):
        n = self.features // 2
        frequencies = 1e-4 ** (torch.arange(n) / (n - self.endpoint))
        angles = levels[:, None] * frequencies
        return torch.cat([angles.cos(), angles.sin()], dim=1)


class FourierEmbedding(Recorded):
    def __init__(self, features):
        super().__init__()
        self.register_buffer("freqs", 16 * torch.randn(features // 2))

    def forward(self, levels):
        angles = 2 * math.pi * levels[:, None] * self.freqs
        return torch.cat([angles.cos(), angles.sin()], dim=1)


class UNet(Recorded):
    """What both kinds share: the way down and the way up."""

    def build(self, make, first, multipliers, blocks, options, residual=False):
        channels, side = options["in_channels"], options["img_resolution"]
        width, attends = options["model_channels"], options["attn_resolutions"]
        self.enc, self.dec, skips = nn.ModuleDict(), nn.ModuleDict(), [first]
        sides = [f"{side // 2**i}x{side // 2**i}" for i in range(len(multipliers))]
        attention = [side // 2**i in attends for i in range(len(multipliers))]
        self.enc[f"{sides[0]}_conv"] = Conv2d(channels, first, 3)
        now, image = first, channels
        for i, multiplier in enumerate(multipliers):
            if i:
                self.enc[f"{sides[i]}_down"] = make(now, now, way="down")
                skips.append(now)
            if i and residual:
                conv = Conv2d(image, now, 3, "down", options["resample_filter"], fused=True)
                self.enc[f"{sides[i]}_aux_residual"] = conv
                image = now
            for j in range(blocks):
                block = make(now, width * multiplier, attention=attention[i])
                self.enc[f"{sides[i]}_block{j}"] = block
                now = width * multiplier
                skips.append(now)
        self.dec[f"{sides[-1]}_in0"] = make(now, now, attention=True)
        self.dec[f"{sides[-1]}_in1"] = make(now, now)
        for i, multiplier in reversed(list(enumerate(multipliers))):
            if i < len(multipliers) - 1:
                self.dec[f"{sides[i]}_up"] = make(now, now, way="up")
            for j in range(blocks + 1):
                last = j == blocks or self.everywhere
                self.dec[f"{sides[i]}_block{j}"] = make(
                    now + skips.pop(), width * multiplier, attention=attention[i] and last
                )
                now = width * multiplier
        return now, sides[0]

    def run(self, x, condition):
        skips, image = [], x
        for name, block in self.enc.items():
            if "aux" in name:
                image = x = skips[-1] = (x + block(image)) / math.sqrt(2)
            else:
                x = block(x) if isinstance(block, Conv2d) else block(x, condition)
                skips.append(x)
        for name, block in self.dec.items():
            if "aux" not in name:
                x = torch.cat([x, skips.pop()], dim=1) if "_block" in name else x
                x = block(x, condition)
        return x


class SongUNet(UNet):
    everywhere = False

    def __init__(self, **options):
        super().__init__(**options)
        width, taps = options["model_channels"], options["resample_filter"]
        features = width * options["channel_mult_noise"]
        if options["embedding_type"] == "fourier":
            self.map_noise = FourierEmbedding(features)
        else:
            self.map_noise = PositionalEmbedding(features, endpoint=True)
        if "augment_dim" in options:
            self.map_augment = Linear(options["augment_dim"], features, bias=False)
        if options.get("label_dim"):
            self.map_label = Linear(options["label_dim"], features)
        self.map_layer0 = Linear(features, 4 * width)
        self.map_layer1 = Linear(4 * width, 4 * width)
        kind = {"eps": 1e-6, "taps": taps, "project": True}

        def make(inputs, outputs, way=None, attention=False):
            # Theirs is a scalar of numpy too.
            common = {"adaptive": False, "scale": np.sqrt(0.5), **kind}
            return UNetBlock(inputs, outputs, 4 * width, way, int(attention), **common)

        residual = options["encoder_type"] == "residual"
        multipliers, blocks = options["channel_mult"], options.get("num_blocks", 4)
        options = {"attn_resolutions": [16]} | options
        now, side = self.build(make, width, multipliers, blocks, options, residual)
        self.dec[f"{side}_aux_norm"] = GroupNorm(now, 1e-6)
        self.dec[f"{side}_aux_conv"] = Conv2d(now, options["out_channels"], 3)

    def forward(self, x, levels, label=None):
        cosines, sines = self.map_noise(levels).chunk(2, dim=1)
        told = torch.cat([sines, cosines], dim=1)
        if label is not None:
            told = told + self.map_label(label * math.sqrt(label.shape[1]))
        h = self.run(x, F.silu(self.map_layer1(F.silu(self.map_layer0(told)))))
        norm, conv = list(self.dec.values())[-2:]
        return conv(F.silu(norm(h)))


class DhariwalUNet(UNet):
    everywhere = True

    def __init__(self, **options):
        super().__init__(**options)
        width = options["model_channels"]
        self.map_noise = PositionalEmbedding(width, endpoint=False)
        self.map_layer0 = Linear(width, 4 * width)
        self.map_layer1 = Linear(4 * width, 4 * width)
        if options["label_dim"]:
            self.map_label = Linear(options["label_dim"], 4 * width, bias=False)

        def make(inputs, outputs, way=None, attention=False):
            heads = outputs // 64 if attention else 0
            kind = {"eps": 1e-5, "taps": (1, 1), "project": False}
            return UNetBlock(inputs, outputs, 4 * width, way, heads, **kind)

        multipliers, blocks = options["channel_mult"], options.get("num_blocks", 3)
        options = {"attn_resolutions": [32, 16, 8]} | options
        now, _ = self.build(make, width * multipliers[0], multipliers, blocks, options)
        self.out_norm = GroupNorm(now, 1e-5)
        self.out_conv = Conv2d(now, options["out_channels"], 3)

    def forward(self, x, levels, label=None):
        condition = self.map_layer1(F.silu(self.map_layer0(self.map_noise(levels))))
        if label is not None:
            condition = condition + self.map_label(label)
        return self.out_conv(F.silu(self.out_norm(self.run(x, F.silu(condition)))))


class EDMPrecond(Recorded):
    def __init__(self, model, **settings):
        super().__init__(**settings)
        self.img_resolution, self.label_dim = model._init_kwargs["img_resolution"], 0
        self.sigma_min, self.sigma_max, self.sigma_data = 0, math.inf, 0.5
        self.model = model

    def forward(self, x, sigma, label=None):
        total = sigma**2 + self.sigma_data**2
        levels = torch.full((len(x),), math.log(sigma) / 4)
        out = self.model(x / math.sqrt(total), levels, label)
        return self.sigma_data**2 / total * x + sigma * self.sigma_data / math.sqrt(total) * out


class VPPrecond(Recorded):
    def __init__(self, model, **settings):
        super().__init__(**settings)
        self.beta_d, self.beta_min, self.M = 19.9, 0.1, 1000
        self.model = model

    def forward(self, x, sigma, label=None):
        growth = math.log(1 + sigma**2)
        time = (
            math.sqrt(self.beta_min**2 + 2 * self.beta_d * growth) - self.beta_min
        ) / self.beta_d
        levels = torch.full((len(x),), (self.M - 1) * time)
        return x - sigma * self.model(x / math.sqrt(1 + sigma**2), levels, label)


class VEPrecond(Recorded):
    def __init__(self, model, **settings):
        super().__init__(**settings)
        self.sigma_min, self.sigma_max = 0.02, 100
        self.model = model

    def forward(self, x, sigma, label=None):
        return x + sigma * self.model(x, torch.full((len(x),), math.log(sigma / 2)), label)


class iDDPMPrecond(Recorded):
    def __init__(self, model, **settings):
        super().__init__(**settings)
        self.C_1, self.C_2, self.M = 0.001, 0.008, 1000
        shares = np.sin(np.pi / 2 * np.arange(self.M + 1) / self.M / (1 + self.C_2)) ** 2
        levels = [0.0]
        for j in range(self.M, 0, -1):
            kept = max(shares[j - 1] / shares[j], self.C_1)
            levels.insert(0, math.sqrt((levels[0] ** 2 + 1) / kept - 1))
        self.register_buffer("u", torch.tensor(levels))
        self.model = model

    def forward(self, x, sigma, label=None):
        nearest = int((self.u - sigma).abs().argmin())
        steps = torch.full((len(x),), self.M - 1.0 - nearest)
        out = self.model(x / math.sqrt(sigma**2 + 1), steps, label)
        return x - sigma * out[:, : x.shape[1]]


# Their file


def _reconstruct_persistent_obj(meta):
    raise AssertionError("a pickle must not be rebuilt by its own means")


_reconstruct_persistent_obj.__module__ = "torch_utils.persistence"


class Writer(pickle.Pickler):
    """Writes an object of the classes above by name, source and state."""

    source = "raise AssertionError('the source in a pickle must not run')"

    def reducer_override(self, obj):
        if not isinstance(obj, Recorded):
            return NotImplemented
        meta = {"type": "class", "version": 6, "module_src": self.source}
        meta |= {"class_name": type(obj).__name__, "state": vars(obj)}
        return _reconstruct_persistent_obj, (meta,)


def dumped(data):
    """As `pickle.dump` with torch_utils at hand writes it."""
    persistence = ModuleType("torch_utils.persistence")
    persistence._reconstruct_persistent_obj = _reconstruct_persistent_obj
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "torch_utils", ModuleType("torch_utils"))
        patch.setitem(sys.modules, "torch_utils.persistence", persistence)
        file = io.BytesIO()
        Writer(file).dump(data)
    return file.getvalue()


IMAGES = {"img_resolution": 16, "in_channels": 3, "out_channels": 3}
SONG = {"embedding_type": "positional", "encoder_type": "standard", "decoder_type": "standard"}
DDPMPP = {**SONG, "channel_mult_noise": 1, "resample_filter": [1, 1]}
NCSNPP = {**SONG, "channel_mult_noise": 2, "resample_filter": [1, 3, 3, 1]}
NCSNPP |= {"embedding_type": "fourier", "encoder_type": "residual"}
SMALL = {**IMAGES, "num_blocks": 1, "channel_mult": [1, 2], "attn_resolutions": [8]}
LAYOUTS = {
    "DDPM++": (SongUNet, {**SMALL, **DDPMPP, "model_channels": 16, "augment_dim": 9}),
    "NCSN++": (SongUNet, {**SMALL, **NCSNPP, "model_channels": 16}),
    "DDPM++ with classes": (SongUNet, {**SMALL, **DDPMPP, "model_channels": 16, "label_dim": 5}),
    "ADM": (DhariwalUNet, {**SMALL, "model_channels": 64, "label_dim": 5}),
}
RNG = np.random.default_rng(0)
X, PROBE = RNG.normal(size=(2, 2, 16, 16, 3)).astype(np.float32)
LEVELS = np.array([-0.7, 0.4], np.float32)
LABELS = np.array([1, 4])


def made(name, precondition=EDMPrecond):
    torch.manual_seed(0)
    kind, options = LAYOUTS[name]
    # A mean and a variance.
    more = {"out_channels": 6} if precondition is iDDPMPrecond else {}
    model = kind(**options | more)
    with torch.no_grad():
        # So little on the way in that the ε of a norm is seen.
        model.enc["16x16_conv"].weight.mul_(0.05)
        model.enc["16x16_conv"].bias.mul_(0.05)
    return precondition(model).eval().requires_grad_(False)


def saved(data, folder):
    path = folder / "network.pkl"
    path.write_bytes(data if isinstance(data, bytes) else dumped(data))
    return path


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Each layout's network of theirs and what was read of its file."""
    cache = {}

    def pair(name):
        if name not in cache:
            theirs = made(name)
            cache[name] = theirs, from_edm(saved({"ema": theirs}, tmp_path_factory.mktemp("edm")))
        return cache[name]

    return pair


def channels_first(x):
    return torch.tensor(x.transpose(0, 3, 1, 2))


def channels_last(x):
    return x.detach().numpy().transpose(0, 2, 3, 1)


def error(found, expected):
    return float(np.abs(np.asarray(found) - expected).max() / np.abs(expected).max())


def compare(network, ours):
    """Theirs against ours, relative to the greatest: outputs to 1e-5, gradients to 1e-4."""
    classes = ours.net.num_classes
    labels = () if classes is None else (jnp.asarray(LABELS),)
    one_hot = None if classes is None else torch.eye(classes)[LABELS]
    x = channels_first(X).requires_grad_()
    out = network(x, torch.tensor(LEVELS), one_hot)
    (out * channels_first(PROBE)).sum().backward()

    def run(x):
        found = ours.net.apply(ours.params, x, jnp.asarray(LEVELS), *labels)
        return jnp.sum(PROBE * found), found

    slope, found = jax.jit(jax.grad(run, has_aux=True))(jnp.asarray(X))
    assert error(found, channels_last(out)) < 1e-5
    assert error(slope, channels_last(x.grad)) < 1e-4


@pytest.mark.parametrize("name", LAYOUTS)
def test_outputs_and_gradients_are_the_same(name, pairs):
    theirs, ours = pairs(name)
    compare(theirs.model, ours)


@pytest.mark.parametrize("name", ["DDPM++ with classes", "ADM"])
def test_no_label_is_no_class(name, pairs):
    theirs, ours = pairs(name)
    found = jax.jit(ours.net.apply)(ours.params, jnp.asarray(X), jnp.asarray(LEVELS))
    expected = theirs.model(channels_first(X), torch.tensor(LEVELS), torch.zeros(1, 5))
    assert error(found, channels_last(expected)) < 1e-5


@pytest.mark.parametrize(
    ("name", "precondition"),
    [
        ("DDPM++", EDMPrecond),
        ("DDPM++", VPPrecond),
        ("DDPM++", VEPrecond),
        ("ADM", iDDPMPrecond),
    ],
)
def test_denoisers_are_the_same(name, precondition, tmp_path):
    """Also between the steps of a process that has steps."""
    theirs = made(name, precondition)
    ours = from_edm(saved({"ema": theirs}, tmp_path))
    mean = jax.jit(lambda t: ours(jnp.asarray(X), t).mean)
    for t in jnp.array([0.0002, 0.1, 0.3003, 0.3008, 0.6, 0.9998]):
        alpha, sigma = map(float, ours.process.schedule(t))
        expected = channels_last(theirs(channels_first(X / alpha), sigma / alpha))
        assert error(mean(t), expected) < 2e-5


def test_the_grid_is_theirs(pairs):
    """The 18 noise levels of the paper's eq. 5 with ρ = 7."""
    ours = pairs("DDPM++")[1]
    found = jax.vmap(ours.process.schedule)(ours.grid)[1]
    expected = np.linspace(80 ** (1 / 7), 0.002 ** (1 / 7), 18) ** 7
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert ours.shape == (16, 16, 3)


def test_the_process_of_iddpm_is_theirs(tmp_path):
    """Time i/T has the noise u of step T − i, the network is told i − 1, and a variance is read."""
    theirs = made("ADM", iDDPMPrecond)
    ours = from_edm(saved({"ema": theirs}, tmp_path))
    np.testing.assert_allclose(ours.grid, np.arange(1000, -1, -1) / 1000, atol=1e-6)
    alphas, sigmas = jax.vmap(ours.process.schedule)(ours.grid)
    np.testing.assert_allclose(sigmas / alphas, theirs.u, rtol=1e-4)
    told = lambda t: ours.parameterization.inputs(ours.process, jnp.zeros(3), t)[1]
    np.testing.assert_array_equal(jax.vmap(told)(ours.grid), np.arange(999, -2, -1))
    betas = schedules.cosine_betas(1000)
    np.testing.assert_allclose(alphas[-2::-1] ** 2, np.cumprod(1 - betas), rtol=1e-4)
    assert jax.eval_shape(ours, jnp.asarray(X), jnp.float32(0.5)).var.shape == X.shape


# Settings of train.py of github.com/NVlabs/edm; parameters with those of augmentation and class.
CIFAR = {**IMAGES, "img_resolution": 32, "model_channels": 128, "channel_mult": [2, 2, 2]}
ADM = {"model_channels": 192, "channel_mult": [1, 2, 3, 4], "label_dim": 1000}
PUBLISHED = {
    "CIFAR-10, DDPM++": (SongUNet, {**CIFAR, **DDPMPP, "augment_dim": 9}, 55_733_891),
    "CIFAR-10 with classes, DDPM++": (
        SongUNet,
        {**CIFAR, **DDPMPP, "augment_dim": 9, "label_dim": 10},
        55_735_299,
    ),
    "CIFAR-10, NCSN++": (SongUNet, {**CIFAR, **NCSNPP, "augment_dim": 9}, 56_397_827),
    "ImageNet-64, ADM": (DhariwalUNet, {**IMAGES, **ADM, "img_resolution": 64}, 295_899_267),
    # As many as 64x64_diffusion.pt of guided-diffusion, whose weights these are.
    "ImageNet-64, ADM of iDDPM": (
        DhariwalUNet,
        {**IMAGES, **ADM, "img_resolution": 64, "out_channels": 6},
        295_904_454,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_tensor_of_the_published_sizes_has_its_place(name, monkeypatch):
    """Names, shapes and their number, and the cost of a call, without the numbers themselves."""
    kind, options, count = PUBLISHED[name]
    with torch.device("meta"):
        model = kind(**options)
    tensors = {key: np.broadcast_to(np.float32(), t.shape) for key, t in model.state_dict().items()}
    defaults, _, make = edm.MODELS[kind.__name__]
    layout = make({**defaults, **options})
    x = jnp.zeros((1, options["img_resolution"], options["img_resolution"], layout.channels))
    shapes = base.shapes_of(layout.net, x, jnp.zeros(1))
    monkeypatch.setattr(base, "jnp", SimpleNamespace(asarray=lambda array: array))
    found = base.from_torch(layout.to_ours(tensors), shapes, layout.names, name)
    assert jax.tree.map(np.shape, found) == jax.tree.map(np.shape, shapes)
    assert sum(p.numel() for p in model.parameters()) == count
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        side, classes = options["img_resolution"], options.get("label_dim")
        one_hot = torch.zeros(1, classes) if classes else None
        model(torch.zeros(1, 3, side, side), torch.zeros(1), one_hot)
    cost = multiplications(layout.net.apply, shapes, x, jnp.zeros(1))
    # They filter images by convolutions, which are up to 0.8 % of the whole.
    assert 2 * cost == pytest.approx(counter.get_total_flops(), rel=0.01)


# Files that must be refused


class Hostile:
    """What its unpickling calls."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("depth", ["outside", "inside of a storage"])
@pytest.mark.parametrize(
    ("function", "name"),
    [
        (os.system, f"{os.name}.system"),
        (eval, "builtins.eval"),
        (torch.load, "torch.serialization"),
    ],
)
def test_a_pickle_that_calls_anything_else_is_refused(function, name, depth, tmp_path):
    marker = tmp_path / "ran"
    hostile = Hostile(function, f"open({str(marker)!r}, 'w')")
    if function is os.system:
        hostile = Hostile(function, f"touch {marker}")
    if depth == "inside of a storage":
        hostile = Hostile(torch.storage._load_from_bytes, pickle.dumps(hostile))
    path = saved(pickle.dumps({"ema": hostile}), tmp_path)
    with pytest.raises(ValueError, match=rf"must not call {name}"):
        from_edm(path)
    assert not marker.exists()


def test_a_class_of_another_name_is_refused(tmp_path):
    class Backdoor(Recorded):
        pass

    with pytest.raises(ValueError, match=r"classes must be .*UNetBlock.*got Backdoor"):
        from_edm(saved({"ema": Backdoor()}, tmp_path))


def test_a_class_in_the_wrong_place_is_refused(tmp_path):
    model = made("DDPM++").model
    wrapped = Linear(1, 1)
    wrapped.model = model
    with pytest.raises(ValueError, match=r"of class EDMPrecond.* there, got Linear"):
        from_edm(saved({"ema": wrapped}, tmp_path))
    with pytest.raises(ValueError, match=r"is no network pickle: KeyError\('ema'\)"):
        from_edm(saved({"net": model}, tmp_path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda block: delattr(block.conv0, "bias"), "lacks tensors: enc.16x16_block0.conv0.bias"),
        (
            lambda block: block.conv0.register_buffer("extra", torch.zeros(2)),
            "belong nowhere: enc.16x16_block0.conv0.extra",
        ),
        (
            lambda block: setattr(block.affine, "weight", nn.Parameter(torch.zeros(3, 64))),
            r"enc.16x16_block0.affine.weight is \(3, 64\), should be \(16, 64\)",
        ),
    ],
    ids=["missing", "unknown", "shape"],
)
def test_tensors_that_do_not_fit_are_named(change, message, tmp_path):
    theirs = made("DDPM++")
    change(theirs.model.enc["16x16_block0"])
    with pytest.raises(ValueError, match=message):
        from_edm(saved({"ema": theirs}, tmp_path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decoder_type": "skip"}, "decoder_type must be 'standard' here, got 'skip'"),
        ({"encoder_type": "residual"}, "resample_filter must be"),
        ({"depth": 3}, "settings must be those of SongUNet, got depth as well"),
        ({"in_channels": None}, "in_channels must be given by name"),
    ],
)
def test_settings_that_no_network_has_are_named(options, message, tmp_path):
    theirs = made("DDPM++")
    given = theirs.model._init_kwargs | options
    theirs.model._init_kwargs = {k: v for k, v in given.items() if v is not None}
    with pytest.raises(ValueError, match=message):
        from_edm(saved({"ema": theirs}, tmp_path))


def test_damaged_files_are_named(tmp_path):
    whole = dumped({"ema": made("DDPM++")})
    for cut in (0, 100, len(whole) // 2, len(whole) - 1):
        with pytest.raises(ValueError, match=r"network.pkl is truncated"):
            from_edm(saved(whole[:cut], tmp_path))
    with pytest.raises(ValueError, match=r"must be a network pickle, but there is no"):
        from_edm(tmp_path / "nowhere.pkl")
