"""Checkpoints of score_sde against the documented architecture, written here once more.

No package has its code. So its networks are written below from their description, over a
checkpoint's own flat names and by nothing of ours.
"""

import math
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.serialization import msgpack_serialize
from flax.traverse_util import flatten_dict, unflatten_dict

import jaxdiff as jd
from jaxdiff.interop import Pretrained, score_sde
from jaxdiff.interop.base import shapes_of
from jaxdiff.interop.score_sde import from_score_sde

# Their network


class Tape:
    """Tensors by name, as the calls of a network ask for them; without any, their shapes."""

    def __init__(self, settings, tensors=None):
        self.settings, self.tensors = settings, tensors
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.calls: Counter[tuple[str, str]] = Counter()

    @property
    def ddpm(self):
        return self.settings["name"] == "ddpm"

    def call(self, kind, inside=""):
        """The name of the next module of its class."""
        self.calls[inside, kind] += 1
        return f"{inside}{kind}_{self.calls[inside, kind] - 1}/"

    def get(self, name, *shape):
        self.shapes[name] = shape
        return jnp.zeros(shape) if self.tensors is None else self.tensors[name]


def convolved(x, kernel, stride=1, padding: Any = "SAME", **options):
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), padding, dimension_numbers=numbers, **options
    )


def conv(tape, x, out, size=3, stride=1, inside=""):
    name = tape.call("Conv", inside)
    x = convolved(x, tape.get(f"{name}kernel", size, size, x.shape[-1], out), stride)
    return x + tape.get(f"{name}bias", out)[None, None, None]


def norm(tape, x, inside=""):
    name = tape.call("GroupNorm", inside)
    b, h, w, c = x.shape
    grouped = x.reshape(b, h * w, 32 if tape.ddpm else min(c // 4, 32), -1)
    mean, var = grouped.mean((1, 3), keepdims=True), grouped.var((1, 3), keepdims=True)
    x = ((grouped - mean) / jnp.sqrt(var + 1e-6)).reshape(x.shape)
    scale, bias = (tape.get(f"{name}{leaf}", c)[None, None, None] for leaf in ("scale", "bias"))
    return x * scale + bias


def dense(tape, x, out, inside=""):
    name = tape.call("Dense", inside)
    return x @ tape.get(f"{name}kernel", x.shape[-1], out) + tape.get(f"{name}bias", out)[None]


def nin(tape, x, out, inside):
    name = tape.call("NIN", inside)
    x = jnp.einsum("bhwc,cd->bhwd", x, tape.get(f"{name}W", x.shape[-1], out))
    return x + tape.get(f"{name}b", out)[None, None, None]


def filtered(x, up=1, down=1, pad=1):
    """Zeros between the pixels, [1, 3, 3, 1] along either side, and every other pixel dropped."""
    taps = up * np.array([1.0, 3.0, 3.0, 1.0], np.float32) / 8
    kernel = jnp.tile(jnp.asarray(np.outer(taps, taps))[:, :, None, None], (1, 1, 1, x.shape[-1]))
    padding = [(pad, pad)] * 2
    options = {"lhs_dilation": (up, up), "feature_group_count": x.shape[-1]}
    return convolved(x, kernel, down, padding, **options)


def down(tape, x):
    b, h, w, c = x.shape
    halves = x.reshape(b, h // 2, 2, w // 2, 2, c)
    return filtered(x, down=2) if tape.settings["fir"] else halves.mean((2, 4))


def up(tape, x):
    twice = x.repeat(2, axis=1).repeat(2, axis=2)
    return filtered(x, up=2, pad=2) if tape.settings["fir"] else twice


def added(tape, x, h):
    return x + h if tape.ddpm else (x + h) / math.sqrt(2)


def residual(tape, x, temb, out=None, resample=None):
    name = tape.call("ResnetBlockDDPM" if tape.ddpm else "ResnetBlockBigGANpp")
    out = out or x.shape[-1]
    h = jax.nn.silu(norm(tape, x, name))
    if resample is not None:
        h, x = resample(tape, h), resample(tape, x)
    h = conv(tape, h, out, inside=name)
    h = h + dense(tape, jax.nn.silu(temb), out, name)[:, None, None]
    h = conv(tape, jax.nn.silu(norm(tape, h, name)), out, inside=name)
    if x.shape[-1] != out or resample is not None:
        x = nin(tape, x, out, name) if tape.ddpm else conv(tape, x, out, 1, inside=name)
    return added(tape, x, h)


def attention(tape, x):
    name = tape.call("AttnBlock" if tape.ddpm else "AttnBlockpp")
    b, h, w, c = x.shape
    y = norm(tape, x, name)
    q, k, v = (nin(tape, y, c, name).reshape(b, h * w, c) for _ in range(3))
    weights = jax.nn.softmax(jnp.einsum("bic,bjc->bij", q, k) / math.sqrt(c), axis=-1)
    y = jnp.einsum("bij,bjc->bic", weights, v).reshape(x.shape)
    return added(tape, x, nin(tape, y, c, name))


def embedded(tape, told):
    n = tape.settings["nf"]
    if tape.settings["embedding_type"] == "fourier":
        turns = tape.get(tape.call("GaussianFourierProjection") + "W", n)
        angles = jnp.log(told)[:, None] * turns[None] * 2 * jnp.pi
    else:
        falling = jnp.exp(-math.log(10000) / (n // 2 - 1) * jnp.arange(n // 2))
        angles = told[:, None] * falling[None]
    temb = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
    return dense(tape, jax.nn.silu(dense(tape, temb, 4 * n)), 4 * n)


def shown(tape, image, h):
    """How the image goes down beside the network: what goes on as the image, and as the state."""
    if tape.settings["progressive_input"] == "none":
        return image, h
    if tape.settings["progressive_input"] == "input_skip":
        image = down(tape, image)
        return image, conv(tape, image, h.shape[-1], 1, inside=tape.call("Combine")) + h
    name, c = tape.call("Downsample"), h.shape[-1]
    if tape.settings["fir"]:
        name = tape.call("Conv2d", name)
        kernel = tape.get(f"{name}weight", 3, 3, image.shape[-1], c)
        image = convolved(filtered(image, pad=2), kernel, 2, "VALID")
        image = image + tape.get(f"{name}bias", c)[None, None, None]
    else:
        image = conv(tape, image, c, stride=2, inside=name)
    image = added(tape, image, h)
    return image, image


def network(tape, x, told):
    """Their output for x [b, h, w, c] and what the network is told [b]: a step, or σ."""
    s, channels = tape.settings, x.shape[-1]
    temb = embedded(tape, told)
    image = x if s["centered"] else 2 * x - 1
    h = conv(tape, image, s["nf"])
    hs = [h]
    for level, multiplier in enumerate(s["ch_mult"]):
        for _ in range(s["num_res_blocks"]):
            h = residual(tape, h, temb, s["nf"] * multiplier)
            h = attention(tape, h) if h.shape[1] in s["attn_resolutions"] else h
            hs.append(h)
        if level < len(s["ch_mult"]) - 1:
            if tape.ddpm:
                h = conv(tape, h, h.shape[-1], stride=2, inside=tape.call("Downsample"))
            else:
                h = residual(tape, h, temb, resample=down)
                image, h = shown(tape, image, h)
            hs.append(h)
    h = residual(tape, h, temb)
    h = attention(tape, h)
    h = residual(tape, h, temb)
    out = None
    for level, multiplier in reversed(list(enumerate(s["ch_mult"]))):
        for _ in range(s["num_res_blocks"] + 1):
            joined = jnp.concatenate([h, hs.pop()], axis=-1)
            h = residual(tape, joined, temb, s["nf"] * multiplier)
        h = attention(tape, h) if h.shape[1] in s["attn_resolutions"] else h
        if s["progressive"] == "output_skip" or level == 0:
            part = conv(tape, jax.nn.silu(norm(tape, h)), channels)
            out = part if out is None else part + up(tape, out)
        if level > 0 and tape.ddpm:
            h = conv(tape, up(tape, h), h.shape[-1], inside=tape.call("Upsample"))
        elif level > 0:
            h = residual(tape, h, temb, resample=up)
    assert not hs
    assert out is not None
    return out / told[:, None, None, None] if s["scale_by_sigma"] else out


def their_shapes(settings):
    tape, side = Tape(settings), settings["image_size"]
    jax.eval_shape(
        lambda x, told: network(tape, x, told), jnp.zeros((1, side, side, 3)), jnp.ones(1)
    )
    return tape.shapes


# Parity

SMALL = {
    "nf": 16,
    "ch_mult": (1, 2),
    "num_res_blocks": 1,
    "attn_resolutions": (8,),
    "image_size": 16,
}
LARGE = {"progressive": "output_skip", "progressive_input": "input_skip"}
CASES: dict[str, dict[str, Any]] = {
    "DDPM++": SMALL,
    "NCSN++": SMALL | {"sde": "vesde"},
    "NCSN++ of large images": SMALL | LARGE | {"sde": "vesde"},
    "DDPM": SMALL | {"name": "ddpm", "nf": 32},
}
RNG = np.random.default_rng(0)
X, PROBE = jnp.asarray(RNG.normal(size=(2, 2, 16, 16, 3)), jnp.float32)
T = jnp.array([0.2, 0.7])


def written(tensors, path):
    """A state of training, as their code saves it."""
    params = unflatten_dict(tensors, sep="/")
    state = {
        "step": 5,
        "optimizer": {"target": {"Conv_0": {"bias": np.zeros(3)}}, "state": {"step": np.int32(5)}},
        "lr": 2e-4,
        "model_state": {},
        "ema_rate": 0.999,
        "params_ema": params,
        "rng": np.zeros(2, np.uint32),
    }
    path.write_bytes(msgpack_serialize(state))
    return path


class Rival(NamedTuple):
    """A checkpoint of random weights, and what was made of it here."""

    settings: dict[str, Any]
    tensors: dict[str, np.ndarray]
    path: Path
    ours: Pretrained

    @property
    def explodes(self):
        return self.settings["sde"] == "vesde"

    def told(self):
        """What the network is told at the times T, by the published formulas."""
        if not self.explodes:
            return 999 * T
        low, high = self.settings["sigma_min"], self.settings["sigma_max"]
        return low * (high / low) ** T

    def theirs(self, tensors, x):
        """Their output at the times T, for images in their range."""
        return network(Tape(self.settings, tensors), x, self.told())

    def found(self, params, x, net=None):
        """The same of ours, or of a changed network."""
        net, told = net or self.ours.net, self.told()
        if not self.explodes:
            return net.apply(params, x, told)
        return net.apply(params, 2 * x - 1, jnp.log(told)) / told[:, None, None, None]


@pytest.fixture(scope="module")
def rivals(tmp_path_factory):
    """Each case's checkpoint, made once; weights small enough that the ε of a norm is seen."""
    cache = {}

    def rival(name):
        if name not in cache:
            case = CASES[name]
            settings = score_sde._settings({}, case)
            tensors, rng = {}, np.random.default_rng(1)
            for key, shape in their_shapes(settings).items():
                draw = rng.normal(size=shape)
                if key.endswith("scale"):
                    draw = 1 + 0.05 * draw
                elif key.startswith("GaussianFourier"):
                    draw = draw * settings["fourier_scale"]
                elif len(shape) == 1:
                    draw = 0.05 * draw
                else:
                    draw = draw / math.sqrt(math.prod(shape[:-1]))
                small = 0.05 if key.startswith("Conv_0/") else 1.0
                tensors[key] = (small * draw).astype(np.float32)
            path = written(tensors, tmp_path_factory.mktemp("run") / "checkpoint_1")
            cache[name] = Rival(settings, tensors, path, from_score_sde(path, **case))
        return cache[name]

    return rival


def error(found, expected):
    return float(jnp.abs(found - expected).max() / jnp.abs(expected).max())


def with_gradient(run):
    """Of (weights, X): the output and the gradient of a projection of it."""

    def projected(x, weights):
        out = run(weights, x)
        return jnp.sum(PROBE * out), out

    return lambda weights, x: jax.grad(projected, has_aux=True)(x, weights)


@pytest.mark.parametrize("name", ["DDPM++", "NCSN++"])
def test_outputs_and_gradients_are_the_same(name, rivals):
    """Relative to the greatest: outputs to 1e-5, gradients to 1e-4."""
    rival = rivals(name)
    slope, out = jax.jit(with_gradient(rival.found))(rival.ours.params, X)
    expected_slope, expected = jax.jit(with_gradient(rival.theirs))(rival.tensors, X)
    assert error(out, expected) < 1e-5
    assert error(slope, expected_slope) < 1e-4


@pytest.mark.parametrize("name", ["NCSN++ of large images", "DDPM"])
def test_outputs_of_the_others_are_the_same(name, rivals):
    rival = rivals(name)
    out = jax.jit(rival.found)(rival.ours.params, X)
    assert error(out, jax.jit(rival.theirs)(rival.tensors, X)) < 1e-5


@pytest.mark.parametrize(
    "mutant", ["transposed kernel", "transposed matrix", "no square root", "epsilon", "no filter"]
)
def test_parity_catches_the_mutants(mutant, rivals):
    rival = rivals("NCSN++")
    params, variant = rival.ours.params, rival.ours.net.variant
    if mutant == "transposed kernel":
        params = jax.tree.map(lambda a: a.swapaxes(0, 1) if a.ndim == 4 else a, params)
    if mutant == "transposed matrix":
        square = lambda a: a.ndim == 2 and a.shape[0] == a.shape[1]
        params = jax.tree.map(lambda a: a.T if square(a) else a, params)
    if mutant == "no square root":
        variant = variant._replace(rescale=False)
    if mutant == "epsilon":
        variant = variant._replace(epsilon=1e-5)
    if mutant == "no filter":
        variant = variant._replace(smooth=False)
    net = rival.ours.net.clone(variant=variant)
    out = jax.jit(lambda params, x: rival.found(params, x, net))(params, X)
    assert error(out, jax.jit(rival.theirs)(rival.tensors, X)) > 5e-5


@pytest.mark.parametrize("sde", ["vpsde", "subvpsde", "vesde"])
def test_what_the_network_is_told_and_means_is_theirs(sde, rivals):
    """The denoiser from their score, by their process; ours has images in [-1, 1]."""
    rival = rivals("NCSN++" if sde == "vesde" else "DDPM++")
    s, ours = rival.settings, rival.ours
    if sde == "subvpsde":
        ours = from_score_sde(rival.path, **SMALL, sde=sde)
    out, x = PROBE[0], X[0]
    for t, told in zip(T, rival.told(), strict=True):
        if sde == "vesde":
            x0 = x + told**2 * out / told
            y, expected, level = 2 * x - 1, 2 * x0 - 1, jnp.log(told)
        else:
            log_alpha = -0.25 * t**2 * (s["beta_max"] - s["beta_min"]) - 0.5 * t * s["beta_min"]
            std = jnp.sqrt(1 - jnp.exp(2 * log_alpha))
            std = std**2 if sde == "subvpsde" else std
            y, expected, level = x, (x - std * out) / jnp.exp(log_alpha), told
        seen, found = ours.parameterization.inputs(ours.process, y, t)
        np.testing.assert_array_equal(seen, y)
        np.testing.assert_allclose(found, level, rtol=1e-6)
        mean = ours.parameterization.denoised(ours.process, out, y, t).mean
        assert error(mean, expected) < 1e-5


def test_the_process_is_theirs_in_our_range(rivals):
    vp, ve = rivals("DDPM++").ours, rivals("NCSN++").ours
    assert ve.shape == (16, 16, 3)
    prior = ve.process.prior((1,))
    # 0 and 50 in [0, 1].
    np.testing.assert_allclose([float(prior.mean[0]), float(prior.std)], [-1.0, 100.0], rtol=1e-6)
    np.testing.assert_allclose(ve.process.schedule(jnp.zeros(()))[1], 0.02, rtol=1e-6)
    assert len(ve.grid) == 1000
    times = np.asarray(vp.grid)[[0, 1, -2, -1]]
    np.testing.assert_allclose(times, [1.0, 0.999, 1e-3, 0.0], atol=1e-6)


def test_a_ddpm_of_discrete_steps_is_told_the_step(rivals):
    rival = rivals("DDPM")
    ours = from_score_sde(rival.path, **CASES["DDPM"], continuous=False)
    t = jnp.float32(701 / 1000)
    assert float(ours.parameterization.inputs(ours.process, X[0], t)[1]) == pytest.approx(700.0)
    betas = np.linspace(0.1 / 1000, 20.0 / 1000, 1000)
    alpha, _ = ours.process.schedule(t)
    assert float(alpha) == pytest.approx(math.sqrt(np.prod(1 - betas[:701])), rel=1e-5)


def test_samplers_accept_it(rivals):
    ours = rivals("NCSN++ of large images").ours
    process = ours.process
    step = jd.PredictorCorrector(jd.Ancestral(process), jd.Langevin(process))
    x = process.prior((2, *ours.shape)).sample(jax.random.key(0))
    out = jd.sample(step, ours, jd.grids.uniform(2), jax.random.key(1), x)
    assert jnp.all(jnp.isfinite(out))


def test_a_config_says_the_same_as_settings(rivals):
    rival = rivals("NCSN++ of large images")
    config = {
        "training": {"sde": "vesde", "continuous": True, "batch_size": 64},
        "data": {"image_size": 256, "centered": False},
        "model": SMALL | LARGE | {"fir_kernel": [1, 3, 3, 1], "ema_rate": 0.999},
    }
    del config["model"]["image_size"]
    ours = from_score_sde(rival.path, config, image_size=16)
    assert ours.net == rival.ours.net
    jax.tree.map(np.testing.assert_array_equal, ours.params, rival.ours.params)


DEEP = {"num_res_blocks": 8}
LSUN = LARGE | {"image_size": 256, "ch_mult": (1, 1, 2, 2, 2, 2, 2), "num_res_blocks": 2}
PUBLISHED = {
    "DDPM++": ({}, 61_804_419),
    "DDPM++ deep": (DEEP, 106_632_579),
    "NCSN++ continuous": ({"sde": "vesde"}, 62_758_915),
    "NCSN++ deep continuous": ({"sde": "vesde"} | DEEP, 107_587_075),
    "DDPM": ({"name": "ddpm"}, 35_218_947),
    "NCSN++ church": ({"sde": "vesde", "sigma_max": 380.0} | LSUN, None),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_tensor_of_the_published_size_has_its_place(name):
    """Names and shapes, without weights; counts of Ho et al. 2020 and Song et al. 2021."""
    given, count = PUBLISHED[name]
    settings = score_sde._settings({}, given)
    net, side = score_sde._network(settings), settings["image_size"]
    shapes = shapes_of(net, jnp.zeros((1, side, side, 3)), jnp.zeros(1))
    places = score_sde._places(shapes, score_sde._names(net, side))
    theirs = their_shapes(settings)
    assert {name: shape for name, (_, shape) in places.items()} == theirs
    assert {path for path, _ in places.values()} == flatten_dict(shapes["params"]).keys()
    if count is not None:
        assert sum(map(math.prod, theirs.values())) == count


# Mistakes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: {k: v for k, v in t.items() if k != "Conv_0/bias"},
            "lacks tensors: Conv_0/bias",
        ),
        (lambda t: t | {"Conv_9/bias": np.zeros(3)}, "belong nowhere: Conv_9/bias"),
        (
            lambda t: t | {"AttnBlockpp_0/NIN_0/W": np.zeros((32, 16), np.float32)},
            r"AttnBlockpp_0/NIN_0/W is \(32, 16\), should be \(32, 32\)",
        ),
    ],
    ids=["missing", "unknown", "shape"],
)
def test_tensors_that_do_not_fit_are_named(change, message, rivals, tmp_path):
    path = written(change(rivals("DDPM++").tensors), tmp_path / "checkpoint_2")
    with pytest.raises(ValueError, match=message):
        from_score_sde(path, **CASES["DDPM++"])


def test_damaged_files_are_named(rivals, tmp_path):
    path, whole = tmp_path / "checkpoint_3", rivals("DDPM++").path.read_bytes()
    with pytest.raises(ValueError, match=r"there is no file .*checkpoint_3"):
        from_score_sde(path, **SMALL)
    for part in (whole[: len(whole) // 2], whole[:-1], whole[1:], b""):
        path.write_bytes(part)
        with pytest.raises(ValueError, match=r"checkpoint_3 (is truncated|must be a state)"):
            from_score_sde(path, **SMALL)
    path.write_bytes(msgpack_serialize({"params": {}}))
    with pytest.raises(ValueError, match="no params_ema"):
        from_score_sde(path, **SMALL)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sde": "edm"}, "sde must be 'vpsde' or 'subvpsde' or 'vesde'.*got 'edm'"),
        ({"sde": "vesde", "continuous": False}, "continuous must be True with vesde, got False"),
        ({"centered": False}, "centered must be True with vpsde, got False"),
        ({"sde": "vesde", "name": "ncsnv2"}, "name must be 'ncsnpp' with vesde, got 'ncsnv2'"),
        ({"resblock_type": "ddpm"}, "resblock_type must be 'biggan'"),
        ({"progressive": "residual"}, "progressive must be 'none' or 'output_skip'"),
        ({"width": 32}, "settings must be of attn_resolutions.*got width"),
    ],
)
def test_settings_that_no_network_has_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        from_score_sde("nowhere", **settings)
