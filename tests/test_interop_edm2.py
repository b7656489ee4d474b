"""EDM2's network pickles, and its network: written again in PyTorch."""

import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from oracles import multiplications

torch = pytest.importorskip("torch", reason="needs the test extra")

from test_interop_edm import (
    LEVELS,
    Recorded,
    X,
    channels_first,
    channels_last,
    compare,
    error,
    saved,
)
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from jaxdiff.interop import base, edm
from jaxdiff.interop.edm import from_edm
from jaxdiff.networks import EDM2
from jaxdiff.networks.edm2 import (
    MPConv as OurConv,
)
from jaxdiff.networks.edm2 import (
    forced_normalization,
    mp_cat,
    mp_silu,
    mp_sum,
)

# The network of the paper's figure 21, with the names of its tensors and of its arguments.


def unit(x, dim):
    return x / (1e-4 + x.square().mean(dim, keepdim=True).sqrt())


def summed(a, b, t):
    return torch.lerp(a, b, t) / math.sqrt(t**2 + (1 - t) ** 2)


class MPFourier(Recorded):
    def __init__(self, features):
        super().__init__()
        self.register_buffer("freqs", 2 * math.pi * torch.randn(features))
        self.register_buffer("phases", 2 * math.pi * torch.rand(features))

    def forward(self, levels):
        return math.sqrt(2) * torch.cos(torch.outer(levels, self.freqs) + self.phases)


class MPConv(Recorded):
    def __init__(self, inputs, outputs, *sides):
        super().__init__()
        # Of any norm: it must not matter.
        self.weight = nn.Parameter(torch.randn(outputs, inputs, *sides) * (1 + torch.rand(1)))

    def forward(self, x, gain=1.0):
        rows = self.weight.flatten(1)
        weight = gain * unit(rows, 1) / math.sqrt(rows.shape[1])
        if self.weight.ndim == 2:
            return F.linear(x, weight)
        side = self.weight.shape[-1]
        return F.conv2d(x, weight.view_as(self.weight), padding=side // 2)


class Block(Recorded):
    def __init__(self, inputs, outputs, width, decoder, attention=False, **options):
        super().__init__()
        self.decoder, self.options = decoder, options
        self.heads = outputs // options.get("channels_per_head", 64) if attention else 0
        self.emb_gain = nn.Parameter(torch.randn([]))
        self.conv_res0 = MPConv(inputs if decoder else outputs, outputs, 3, 3)
        self.emb_linear = MPConv(width, outputs)
        self.conv_res1 = MPConv(outputs, outputs, 3, 3)
        self.conv_skip = MPConv(inputs, outputs, 1, 1) if inputs != outputs else None
        self.attn_qkv = MPConv(outputs, 3 * outputs, 1, 1) if attention else None
        self.attn_proj = MPConv(outputs, outputs, 1, 1) if attention else None

    def forward(self, x, told):
        skip = self.conv_skip or nn.Identity()
        if not self.decoder:
            x = unit(skip(x), 1)
        h = self.conv_res0(F.silu(x) / 0.596)
        h = F.silu(h * (1 + self.emb_linear(told, self.emb_gain))[:, :, None, None]) / 0.596
        h = self.conv_res1(h)
        x = summed(skip(x) if self.decoder else x, h, self.options.get("res_balance", 0.3))
        if self.heads:
            b, c, height, side = x.shape
            triples = self.attn_qkv(x).reshape(b, self.heads, c // self.heads, 3, height * side)
            q, k, v = unit(triples, 2).unbind(3)
            weights = torch.softmax(q.mT @ k / math.sqrt(c // self.heads), dim=-1)
            mixed = self.attn_proj((v @ weights.mT).reshape(x.shape))
            x = summed(x, mixed, self.options.get("attn_balance", 0.3))
        return x.clamp(-256, 256)


class UNet(Recorded):
    def __init__(self, **options):
        super().__init__(**options)
        known = {"model_channels": 192, "channel_mult": [1, 2, 3, 4], "num_blocks": 3}
        known |= {"attn_resolutions": [16, 8], "label_balance": 0.5, "concat_balance": 0.5}
        own = {name: options.get(name, value) for name, value in known.items()}
        given = {"img_resolution", "img_channels", "label_dim"}
        inner = {k: v for k, v in options.items() if k not in known and k not in given}
        self.label_balance, self.concat_balance = own["label_balance"], own["concat_balance"]
        width, blocks, side = own["model_channels"], own["num_blocks"], options["img_resolution"]
        levels = [(side >> i, width * m) for i, m in enumerate(own["channel_mult"])]
        told = max(n for _, n in levels)
        self.out_gain = nn.Parameter(torch.tensor(0.7))
        self.emb_fourier = MPFourier(levels[0][1])
        self.emb_noise = MPConv(levels[0][1], told)
        self.emb_label = MPConv(options["label_dim"], told) if options["label_dim"] else None
        self.enc, self.dec, skips = nn.ModuleDict(), nn.ModuleDict(), []

        def add(part, name, inputs, outputs, attention=False):
            block = Block(inputs, outputs, told, part is self.dec, attention, **inner)
            part[name] = block

        now = levels[0][1]
        self.enc[f"{side}x{side}_conv"] = MPConv(options["img_channels"] + 1, now, 3, 3)
        skips.append(now)
        for i, (side, n) in enumerate(levels):
            if i:
                add(self.enc, f"{side}x{side}_down", now, now)
                skips.append(now)
            for j in range(blocks):
                add(self.enc, f"{side}x{side}_block{j}", now, n, side in own["attn_resolutions"])
                now = n
                skips.append(n)
        for i, (side, n) in reversed(list(enumerate(levels))):
            if i == len(levels) - 1:
                add(self.dec, f"{side}x{side}_in0", now, now, True)
                add(self.dec, f"{side}x{side}_in1", now, now)
            else:
                add(self.dec, f"{side}x{side}_up", now, now)
            for j in range(blocks + 1):
                name = f"{side}x{side}_block{j}"
                add(self.dec, name, now + skips.pop(), n, side in own["attn_resolutions"])
                now = n
        self.out_conv = MPConv(now, options["img_channels"], 3, 3)

    def forward(self, x, levels, label=None):
        told = self.emb_noise(self.emb_fourier(levels))
        if self.emb_label is not None:
            classes = self.emb_label.weight.shape[1]
            label = torch.zeros(1, classes) if label is None else label
            told = summed(told, self.emb_label(math.sqrt(classes) * label), self.label_balance)
        told, skips = F.silu(told) / 0.596, []
        h = torch.cat([x, torch.ones_like(x[:, :1])], 1)
        for name, block in self.enc.items():
            h = F.avg_pool2d(h, 2) if name.endswith("down") else h
            h = block(h) if name.endswith("conv") else block(h, told)
            skips.append(h)
        t = self.concat_balance
        for name, block in self.dec.items():
            h = F.interpolate(h, scale_factor=2) if name.endswith("up") else h
            if "block" in name:
                a, b = h, skips.pop()
                scale = math.sqrt((a.shape[1] + b.shape[1]) / ((1 - t) ** 2 + t**2))
                a, b = (1 - t) / math.sqrt(a.shape[1]) * a, t / math.sqrt(b.shape[1]) * b
                h = scale * torch.cat([a, b], 1)
            h = block(h, told)
        return self.out_conv(h, self.out_gain)


class Precond(Recorded):
    def __init__(self, unet):
        super().__init__()
        self.sigma_data, self.use_fp16 = 0.5, True
        self.unet, self.logvar_fourier = unet, MPFourier(8)
        self.logvar_linear = MPConv(8, 1)

    def forward(self, x, sigma, label=None):
        total = sigma**2 + self.sigma_data**2
        levels = torch.full((len(x),), math.log(sigma) / 4)
        out = self.unet(x / math.sqrt(total), levels, label)
        return self.sigma_data**2 / total * x + sigma * self.sigma_data / math.sqrt(total) * out


class StabilityVAEEncoder(Recorded):
    def __init__(self):
        super().__init__()
        self.scale, self.bias = np.ones(4, np.float32), np.float32(2.0)


SMALL = {"img_resolution": 16, "img_channels": 3, "label_dim": 5, "num_blocks": 1}
SMALL |= {"model_channels": 64, "channel_mult": [1, 2], "attn_resolutions": [8]}
LAYOUTS = {
    "as published": SMALL,
    "without classes": SMALL | {"label_dim": 0},
    "other balances": SMALL
    | {
        "label_balance": 0.4,
        "concat_balance": 0.6,
        "res_balance": 0.2,
        "attn_balance": 0.7,
        "channels_per_head": 32,
    },
}


def made(name):
    torch.manual_seed(0)
    return Precond(UNet(**LAYOUTS[name])).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Each layout's network of theirs and what was read of its file."""
    cache = {}

    def pair(name):
        if name not in cache:
            theirs = made(name)
            data = {"encoder": StabilityVAEEncoder(), "ema": theirs}
            cache[name] = theirs, from_edm(saved(data, tmp_path_factory.mktemp("edm2")))
        return cache[name]

    return pair


@pytest.mark.parametrize("name", LAYOUTS)
def test_outputs_and_gradients_are_the_same(name, pairs):
    theirs, ours = pairs(name)
    compare(theirs.unet, ours)


def test_no_label_is_no_class(pairs):
    theirs, ours = pairs("as published")
    expected = channels_last(theirs.unet(channels_first(X), torch.tensor(LEVELS)))
    for labels in ((), (jnp.full(2, 5),)):
        found = jax.jit(ours.net.apply)(ours.params, jnp.asarray(X), jnp.asarray(LEVELS), *labels)
        assert error(found, expected) < 1e-5


def test_denoisers_and_grids_are_the_same(pairs):
    """Karras et al. 2024 sample with 32 noise levels from 80 to 0.002, ρ = 7."""
    theirs, ours = pairs("as published")
    mean = jax.jit(lambda t: ours(jnp.asarray(X), t).mean)
    for t in jnp.array([0.1, 0.6]):
        alpha, sigma = map(float, ours.process.schedule(t))
        expected = channels_last(theirs(channels_first(X / alpha), sigma / alpha))
        assert error(mean(t), expected) < 2e-5
    found = jax.vmap(ours.process.schedule)(ours.grid)[1]
    expected = np.linspace(80 ** (1 / 7), 0.002 ** (1 / 7), 32) ** 7
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert ours.shape == (16, 16, 3)


def test_half_precision_is_read(tmp_path, pairs):
    """As the published files are written."""
    found = from_edm(saved({"ema": made("as published").half()}, tmp_path)).params
    wide = pairs("as published")[1].params
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype(jnp.float32)}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), found, wide)


# Table 5: millions of parameters, of 64 × 64 × 4 latents and a thousand classes. The paper counts
# the 129 of the estimate of the loss as well.
PUBLISHED = {128: 125, 192: 280, 256: 498, 320: 777, 384: 1119, 448: 1523}


@pytest.mark.parametrize("width", PUBLISHED)
def test_every_tensor_of_the_published_sizes_has_its_place(width, monkeypatch):
    """Names, shapes and their number, without the numbers themselves."""
    options = {"img_resolution": 64, "img_channels": 4, "label_dim": 1000, "model_channels": width}
    with torch.device("meta"):
        model = UNet(**options)
    tensors = {key: np.broadcast_to(np.float32(), t.shape) for key, t in model.state_dict().items()}
    defaults, _, make = edm.MODELS["UNet"]
    layout = make({**defaults, **options})
    shapes = base.shapes_of(layout.net, jnp.zeros((1, 64, 64, 4)), jnp.zeros(1))
    monkeypatch.setattr(base, "jnp", SimpleNamespace(asarray=lambda array: array))
    found = base.from_torch(layout.to_ours(tensors), shapes, layout.names, str(width))
    assert jax.tree.map(np.shape, found) == jax.tree.map(np.shape, shapes)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == PUBLISHED[width]
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 4, 64, 64), torch.zeros(1), torch.zeros(1, 1000))
    cost = multiplications(layout.net.apply, shapes, jnp.zeros((1, 64, 64, 4)), jnp.zeros(1))
    assert 2 * cost == pytest.approx(counter.get_total_flops(), rel=0.01)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda net: delattr(net.emb_fourier, "phases"), "lacks tensors: emb_fourier.weight"),
        (
            lambda net: net.enc["16x16_block0"].register_buffer("extra", torch.zeros(2)),
            "belong nowhere: enc.16x16_block0.extra",
        ),
        (lambda net: net._init_kwargs.update(clip_act=None), "clip_act must be 256 here, got None"),
        (lambda net: net._init_kwargs.update(depth=3), "must be those of UNet, got depth as well"),
    ],
    ids=["missing", "unknown", "setting", "unknown setting"],
)
def test_what_does_not_fit_is_named(change, message, tmp_path):
    theirs = made("as published")
    change(theirs.unet)
    with pytest.raises(ValueError, match=message):
        from_edm(saved({"ema": theirs}, tmp_path))


# The network


@pytest.fixture(scope="module")
def drawn():
    """A network with gains that are not zero, and its parameters."""
    net = EDM2(64, (1, 2), 1, attention=(8,), num_classes=3)
    params = jax.jit(net.init)(jax.random.key(0), jnp.asarray(X), jnp.zeros(2))
    return net, jax.tree.map(lambda p: p + 0.5 if p.ndim == 0 else p, params)


def test_magnitudes_are_kept():
    """What has variance 1 and is independent leaves every operation with variance 1."""
    a, b = jax.random.normal(jax.random.key(1), (2, 200_000, 4))
    layer = OurConv(16)
    b = b[:, :2]
    outs = [mp_silu(a), mp_sum(a[:, :2], b, 0.3), mp_cat(a, b, 0.5)]
    outs += [layer.apply(layer.init(jax.random.key(2), a), a)]
    for out in outs:
        assert abs(float(jnp.mean(out**2)) - 1) < 0.02
    # With t = 1/2, either side has as much of the whole.
    shares = jnp.split(mp_cat(a, b, 0.5), [4], axis=-1)
    first, second = (float(jnp.sum(share**2)) for share in shares)
    assert abs(first / second - 1) < 0.02


def test_a_kernels_norm_does_not_matter(drawn):
    net, params = drawn

    def scaled(path, p):
        return 3.0 * p if path[-1].key == "kernel" else p

    run = jax.jit(net.apply)
    args = jnp.asarray(X), jnp.asarray(LEVELS), jnp.asarray([0, 2])
    found = run(jax.tree_util.tree_map_with_path(scaled, params), *args)
    np.testing.assert_allclose(found, run(params, *args), atol=2e-3)
    assert float(jnp.abs(found).max()) > 0.1


def test_remat_and_narrow_computation(drawn):
    net, params = drawn
    args = jnp.asarray(X), jnp.asarray(LEVELS), jnp.asarray([0, 2])

    def gradient(net):
        loss = lambda params: jnp.mean(jnp.square(net.apply(params, *args)))
        return jax.jit(jax.value_and_grad(loss))(params)

    plain, kept = gradient(net), gradient(net.clone(remat=True))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), plain, kept)
    narrow = jax.jit(net.clone(dtype=jnp.bfloat16).apply)(params, *args)
    assert narrow.dtype == jnp.float32
    assert 1e-5 < error(narrow, net.apply(params, *args)) < 0.1


def test_forced_normalization_follows_every_update(drawn):
    """Kernels return to root mean square 1, along the direction that the update gave them."""
    _, params = drawn
    optimizer = optax.chain(optax.sgd(0.1), forced_normalization())
    grads = jax.tree.map(jnp.cos, params)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    after = optax.apply_updates(params, updates)

    def check(path, p, g, new):
        plain = np.asarray(p - 0.1 * g)
        if path[-1].key == "kernel":
            rows = plain.reshape(-1, plain.shape[-1])
            plain = (rows / np.sqrt(np.mean(rows**2, axis=0))).reshape(plain.shape)
        np.testing.assert_allclose(new, plain, atol=1e-3)

    jax.tree_util.tree_map_with_path(check, params, grads, after)
    with pytest.raises(ValueError, match="params must be given"):
        optimizer.update(grads, optimizer.init(params))


@pytest.mark.parametrize(
    ("net", "shape", "label", "message"),
    [
        (EDM2(64, (1, 2)), (1, 9, 8, 3), None, r"sides that 2 divides.* got shape \(1, 9, 8, 3\)"),
        (EDM2(64, (1, 2, 2)), (1, 4, 8, 3), None, "at least 8"),
        (EDM2(48), (1, 32, 32, 3), None, "head_width must divide .*48 × .* got 64"),
        (EDM2(64), (1, 32, 32, 3), jnp.zeros(1, int), "label must be None"),
    ],
)
def test_bad_input_is_named(net, shape, label, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(net.init, jax.random.key(0), jnp.zeros(shape), jnp.zeros(1), label)
