"""Files of guided-diffusion: its network written again in PyTorch, at small and published sizes."""

import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the test extra")

from torch import nn
from torch.nn import functional as F

from jaxdiff.interop import base, guided_diffusion
from jaxdiff.interop.guided_diffusion import (
    IMAGENET_64,
    IMAGENET_128,
    IMAGENET_512,
    LSUN_256,
    Flags,
    from_guided_diffusion,
)

# The network of the paper's section 3, with the names of its tensors.


class Residual(nn.Module):
    def __init__(self, inputs, outputs, width, flags, way=None):
        super().__init__()
        self.way, self.adapts = way, flags.use_scale_shift_norm
        conv = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.in_layers = nn.Sequential(nn.GroupNorm(32, inputs), nn.SiLU(), conv)
        told = nn.Linear(width, outputs * (1 + self.adapts))
        self.emb_layers = nn.Sequential(nn.SiLU(), told)
        conv = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.out_layers = nn.Sequential(nn.GroupNorm(32, outputs), nn.SiLU(), nn.Identity(), conv)
        same = inputs == outputs
        self.skip_connection = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1)

    def resampled(self, x):
        if self.way == "down":
            return F.avg_pool2d(x, 2)
        return x if self.way is None else F.interpolate(x, scale_factor=2)

    def forward(self, x, condition):
        norm, act, conv = self.in_layers
        h = conv(self.resampled(act(norm(x))))
        told = self.emb_layers(condition)[:, :, None, None]
        norm, *rest = self.out_layers
        if self.adapts:
            scale, shift = told.chunk(2, dim=1)
            h = norm(h) * (1 + scale) + shift
        else:
            h = norm(h + told)
        return self.skip_connection(self.resampled(x)) + nn.Sequential(*rest)(h)


class Attention(nn.Module):
    def __init__(self, channels, flags):
        super().__init__()
        width = flags.num_head_channels
        self.heads = flags.num_heads if width == -1 else channels // width
        self.new = flags.use_new_attention_order
        self.norm = nn.GroupNorm(32, channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)

    def forward(self, x, condition):
        b, c, pixels = *x.shape[:2], x[0, 0].numel()
        qkv = self.qkv(self.norm(x).reshape(b, c, pixels))
        d = c // self.heads
        if self.new:
            q, k, v = qkv.reshape(b, 3, self.heads, d, pixels).unbind(1)
        else:
            q, k, v = qkv.reshape(b, self.heads, 3, d, pixels).unbind(2)
        weights = torch.softmax(q.mT @ k / math.sqrt(d), dim=-1)
        return x + self.proj_out((v @ weights.mT).reshape(b, c, pixels)).reshape(x.shape)


class Resample(nn.Module):
    """A convolution that changes the sides, by the name that it has on its way."""

    def __init__(self, channels, way):
        super().__init__()
        self.way, stride = way, 2 if way == "op" else 1
        setattr(self, way, nn.Conv2d(channels, channels, 3, stride, 1))

    def forward(self, x, condition):
        x = x if self.way == "op" else F.interpolate(x, scale_factor=2)
        return getattr(self, self.way)(x)


class First(nn.Conv2d):
    def forward(self, x, condition):
        return super().forward(x)


class UNetModel(nn.Module):
    def __init__(self, flags, multipliers):
        super().__init__()
        width, blocks = flags.num_channels, flags.num_res_blocks
        told, attends = 4 * width, flags.attention_resolutions
        self.width = width
        linear = nn.Linear(width, told), nn.Linear(told, told)
        self.time_embed = nn.Sequential(linear[0], nn.SiLU(), linear[1])
        if flags.class_cond:
            self.label_emb = nn.Embedding(1000, told)

        def residual(inputs, outputs, way=None):
            return Residual(inputs, outputs, told, flags, way)

        def resample(channels, way, name):
            if flags.resblock_updown:
                return residual(channels, channels, way)
            return Resample(channels, name)

        now, side = int(multipliers[0] * width), flags.image_size
        downs, ups, skips = [[First(3, now, 3, padding=1)]], [], [now]
        for i, multiplier in enumerate(multipliers):
            if i:
                downs.append([resample(now, "down", "op")])
                skips.append(now)
                side //= 2
            for _ in range(blocks):
                layers = [residual(now, int(multiplier * width))]
                now = int(multiplier * width)
                downs.append(layers + [Attention(now, flags)] * (side in attends))
                skips.append(now)
        middle = [residual(now, now), Attention(now, flags), residual(now, now)]
        for i, multiplier in reversed(list(enumerate(multipliers))):
            for j in range(blocks + 1):
                layers = [residual(now + skips.pop(), int(multiplier * width))]
                now = int(multiplier * width)
                layers += [Attention(now, flags)] * (side in attends)
                ups.append(layers + [resample(now, "up", "conv")] * (i > 0 and j == blocks))
            side *= 2
        self.input_blocks = nn.ModuleList(map(nn.ModuleList, downs))
        self.middle_block = nn.ModuleList(middle)
        self.output_blocks = nn.ModuleList(map(nn.ModuleList, ups))
        conv = nn.Conv2d(now, 6 if flags.learn_sigma else 3, 3, padding=1)
        self.out = nn.Sequential(nn.GroupNorm(32, now), nn.SiLU(), conv)

    def forward(self, x, steps, label=None):
        n = self.width // 2
        angles = steps[:, None] * 1e-4 ** (torch.arange(n) / n)
        condition = self.time_embed(torch.cat([angles.cos(), angles.sin()], dim=1))
        condition = condition if label is None else condition + self.label_emb(label)

        def run(layers, x):
            for layer in layers:
                x = layer(x, condition)
            return x

        skips = []
        for layers in self.input_blocks:
            x = run(layers, x)
            skips.append(x)
        x = run(self.middle_block, x)
        for layers in self.output_blocks:
            x = run(layers, torch.cat([x, skips.pop()], dim=1))
        return self.out(x)


SMALL = {
    "image_size": 16,
    "num_channels": 32,
    "num_res_blocks": 1,
    "attention_resolutions": (8,),
    "channel_mult": (1, 2),
}
FLAGS = {
    "as published": SMALL
    | {
        "num_head_channels": 16,
        "class_cond": True,
        "learn_sigma": True,
        "resblock_updown": True,
        "use_new_attention_order": True,
        "noise_schedule": "cosine",
    },
    "defaults": SMALL | {"attention_resolutions": (16, 8)},
    "narrow at first": SMALL | {"num_channels": 64, "channel_mult": (0.5, 1)},
    "without scale and shift": SMALL | {"use_scale_shift_norm": False, "num_head_channels": 32},
}
RNG = np.random.default_rng(0)
X = RNG.normal(size=(2, 16, 16, 3)).astype(np.float32)
STEPS = np.array([3.0, 150.0], np.float32)
LABELS = np.array([1, 996])


def saved(state, folder):
    path = folder / "model.pt"
    torch.save(state, path)
    return path


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Each model of theirs and what was read of its file."""
    cache = {}

    def pair(name):
        if name not in cache:
            torch.manual_seed(0)
            theirs = UNetModel(Flags(**FLAGS[name]), FLAGS[name]["channel_mult"])
            with torch.no_grad():
                for tensor in theirs.parameters():
                    tensor.add_(0.05 * torch.randn_like(tensor))
                # So little on the way in that the ε of a norm is seen.
                for tensor in theirs.input_blocks[0].parameters():
                    tensor.mul_(0.1)
            path = saved(theirs.state_dict(), tmp_path_factory.mktemp("guided"))
            cache[name] = theirs, from_guided_diffusion(path, **FLAGS[name])
        return cache[name]

    return pair


def channels_last(x):
    return x.detach().numpy().transpose(0, 2, 3, 1)


def error(found, expected):
    return float(np.abs(np.asarray(found) - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("name", FLAGS)
def test_outputs_and_gradients_are_the_same(name, pairs):
    """Relative to the greatest: outputs to 1e-5, gradients to 1e-4."""
    theirs, ours = pairs(name)
    classes = ours.net.num_classes is not None
    labels = (jnp.asarray(LABELS),) if classes else ()
    x = torch.tensor(X.transpose(0, 3, 1, 2), requires_grad=True)
    out = theirs(x, torch.tensor(STEPS), torch.tensor(LABELS) if classes else None)
    probe = np.random.default_rng(1).normal(size=channels_last(out).shape).astype(np.float32)
    (out * torch.tensor(probe.transpose(0, 3, 1, 2))).sum().backward()

    def run(x):
        found = ours.net.apply(ours.params, x, jnp.asarray(STEPS), *labels)
        return jnp.sum(probe * found), found

    slope, found = jax.jit(jax.grad(run, has_aux=True))(jnp.asarray(X))
    assert error(found, channels_last(out)) < 1e-5
    assert error(slope, channels_last(x.grad)) < 1e-4


def test_the_process_is_theirs(pairs):
    """Time (k + 1)/T is step k, with ᾱ_k of gaussian_diffusion.py; ε and a variance are read."""
    _, ours = pairs("as published")
    edge = lambda t: math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
    betas = [min(1 - edge((k + 1) / 1000) / edge(k / 1000), 0.999) for k in range(1000)]
    steps = np.array([0, 1, 499, 998])
    times = jnp.asarray((steps + 1) / 1000, jnp.float32)
    found = jax.vmap(ours.process.schedule)(times)[0] ** 2
    np.testing.assert_allclose(found, np.cumprod(1 - np.array(betas))[steps], rtol=1e-4)
    inputs = lambda t: ours.parameterization.inputs(ours.process, jnp.zeros(3), t)[1]
    np.testing.assert_allclose(jax.vmap(inputs)(times), steps, atol=1e-4)
    np.testing.assert_allclose(ours.grid, np.arange(1000, -1, -1) / 1000, atol=1e-6)
    assert ours(jnp.asarray(X), jnp.float32(0.5)).var.shape == X.shape
    _, plain = pairs("defaults")
    alphas = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    found = jax.vmap(plain.process.schedule)(times)[0] ** 2
    np.testing.assert_allclose(found, alphas[steps], rtol=1e-4)


# The README's files, by its flags; the paper's appendix has 296, 422, 552 and 559 million.
PUBLISHED = {
    "64x64_diffusion": (IMAGENET_64, 295_904_454),
    "128x128_diffusion": (IMAGENET_128, 421_529_606),
    "256x256_diffusion_uncond": (LSUN_256, 552_814_086),
    "512x512_diffusion": (IMAGENET_512, 558_997_638),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_tensor_of_the_published_sizes_has_its_place(name, monkeypatch):
    """Names, shapes and their number, without the numbers themselves."""
    given, count = PUBLISHED[name]
    flags = Flags(**given)
    net = guided_diffusion._network(flags)
    with torch.device("meta"):
        theirs = UNetModel(flags, guided_diffusion._multipliers(flags))
    tensors = {
        key: np.broadcast_to(np.float32(), t.shape) for key, t in theirs.state_dict().items()
    }
    x = jnp.zeros((1, flags.image_size, flags.image_size, 3))
    shapes = base.shapes_of(net, x, jnp.zeros(1))
    names = guided_diffusion._names(net, flags.image_size)
    monkeypatch.setattr(base, "jnp", SimpleNamespace(asarray=lambda array: array))
    ours = guided_diffusion._to_ours(tensors, net, flags)
    found = base.from_torch(ours, shapes, names, name)
    assert jax.tree.map(np.shape, found) == jax.tree.map(np.shape, shapes)
    assert sum(p.numel() for p in theirs.parameters()) == count


# Mistakes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("out.2.bias"), "lacks tensors: out.2.bias"),
        (lambda s: s.update(extra=torch.zeros(3)), "belong nowhere: extra"),
        (
            lambda s: s.update({"out.2.weight": torch.zeros(6, 32, 3, 3)}),
            r"out.2.weight is \(6, 32, 3, 3\), should be \(3, 32, 3, 3\)",
        ),
    ],
    ids=["missing", "unknown", "shape"],
)
def test_tensors_that_do_not_fit_are_named(change, message, pairs, tmp_path):
    state = dict(pairs("defaults")[0].state_dict())
    change(state)
    with pytest.raises(ValueError, match=message):
        from_guided_diffusion(saved(state, tmp_path), **FLAGS["defaults"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"image_size": 32}, "channel_mult must be given.*32"),
        ({"channel_mult": (2, 3)}, r"channel_mult must be multiples of the first, got \(2, 3\)"),
        ({"noise_schedule": "sigmoid"}, "noise_schedule must be linear or cosine, got 'sigmoid'"),
    ],
)
def test_flags_that_no_network_has_are_named(flags, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        from_guided_diffusion(tmp_path / "model.pt", **flags)


def test_files_that_are_damaged_or_hold_more_are_named(pairs, tmp_path):
    path = saved(pairs("defaults")[0].state_dict(), tmp_path)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"model.pt is truncated"):
        from_guided_diffusion(path, **SMALL)
    torch.save({"out.2.bias": print}, path)
    with pytest.raises(ValueError, match=r"model.pt is truncated, or holds more than tensors"):
        from_guided_diffusion(path, **SMALL)
    with pytest.raises(ValueError, match=r"must be a .pt file of tensors, but there is no"):
        from_guided_diffusion(tmp_path / "nowhere.pt", **SMALL)
