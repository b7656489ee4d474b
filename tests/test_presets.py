"""The configs of the papers: their networks' published sizes, and what only they ask of a run."""

import math
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import multiplications

import jaxdiff as jd
from jaxdiff import networks, recipes
from jaxdiff.experiment import load_config
from jaxdiff.networks import cpu
from jaxdiff.recipes import image_experiment, open_images
from jaxdiff.training import warmup_adam

CONFIGS = Path(__file__).parents[1] / "configs"
KEY = jax.random.key(0)


def by_xla(function, *args):
    """Operations as XLA counts them, without those on the zeros around an image."""
    with mock.patch.object(cpu, "WORK", math.inf):  # A CPU does with fewer.
        return jax.jit(function).lower(*args).cost_analysis()["flops"]


def with_zeros(function, *args):
    """Operations of products and convolutions, on those zeros too, as PyTorch counts them."""
    return 2 * multiplications(function, *args)


# Parameters, and GFLOP of one image, 2 a multiplication. Those of Song et al. 2021 and Kingma et
# al. 2021 are by their code, as in test_unet, the latter's without those of a number that is always
# zero. Ho et al. 2020 give 35.7 million: diffusers' UNet2DModel has this number, and this cost by
# PyTorch's FlopCounterMode. Karras et al. 2022 give 55.7 million, their code exactly this, but for
# what it tells the network of augmentation. ADM's 295.9 million (Dhariwal and Nichol 2021, table 3)
# with a row for no class; its cost is 110 in Karras et al. 2024, who count half of ours.
# The cost of U-ViT's 44 million is derived in test_uvit, EDM's counted in test_interop_edm.
PUBLISHED = [
    ("cifar10_ddpm", {}, 35_746_307, 12.44, with_zeros),
    ("cifar10_ddpmpp_vp", {}, 61_804_419, 20.28, by_xla),
    ("cifar10_ddpmpp_vp", {"blocks": 8}, 106_632_579, 34.64, by_xla),
    ("cifar10_ncsnpp_ve", {}, 62_758_915, 20.37, by_xla),
    ("cifar10_ncsnpp_ve", {"blocks": 8}, 107_587_075, 34.73, by_xla),
    ("cifar10_edm", {}, 55_733_891 - 1_152, 42.38, with_zeros),
    ("cifar10_uvit", {}, 44_255_328, 24.41, with_zeros),
    ("cifar10_vdm", {}, 30_578_179 - 512, 51.55, by_xla),
    ("imagenet64_adm", {}, 295_905_222, 219.37, with_zeros),
]


def composed(name, **options):
    """The run on images that nobody has to have."""
    module = load_config(CONFIGS / f"{name}.py")
    side = 64 if name.startswith("imagenet64") else 32
    return module.experiment(module.Config(shape=(side, side, 3), levels=256, **options))


@pytest.mark.parametrize(("name", "options", "parameters", "giga", "counted"), PUBLISHED)
def test_published_networks_train_and_sample(name, options, parameters, giga, counted):
    """By shapes alone: at full size, and the loss and a sample can be traced."""
    run = composed(name, **options)
    params = jax.eval_shape(run.init, KEY)
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)) == pytest.approx(
        parameters,
        abs=2 if name == "cifar10_vdm" else 0,  # the schedule's two ends
    )
    shape = run.config.shape
    denoised = lambda params, x: run.denoiser(params)(x, jnp.float32(0.5)).mean
    assert counted(denoised, params, jnp.zeros((1, *shape))) == pytest.approx(1e9 * giga, rel=0.01)
    batch = {"x": jnp.zeros((4, *shape), jnp.uint8), "label": jnp.zeros(4, int)}
    if not hasattr(run.config, "num_classes"):
        del batch["label"]
    loss, _ = jax.eval_shape(run.objective, params, KEY, batch)
    assert loss.shape == (4,)
    if not options:  # the others differ in depth alone
        sample = jax.eval_shape(lambda params: run.sample(params, KEY, 2), params)
        assert sample.shape == (2, *shape)


@pytest.mark.parametrize("name", ["cifar10_ddpm", "cifar10_ddpmpp_vp", "cifar10_uvit"])
def test_samplers_are_the_papers(name, monkeypatch):
    """DDPM's with the larger variance, along its chain; those of the VP SDE end without noise."""
    called = []

    def spy(step, denoise, grid, key, x, **options):
        called.append((step, denoise))
        return x

    monkeypatch.setattr(recipes, "run_sampler", spy)
    run = composed(name)
    params = jax.eval_shape(run.init, KEY)
    jax.eval_shape(lambda params: run.sample(params, KEY, 2), params)
    step, denoise = called[0]
    if name == "cifar10_ddpm":
        assert isinstance(denoise, jd.UnitVariance)
        told = denoise.denoise.parameterization.inputs
        levels = [float(told(run.process, jnp.zeros(3), jnp.float32(t))[1]) for t in (0.001, 1.0)]
        np.testing.assert_allclose(levels, [0.0, 999.0], atol=1e-3)
    else:
        assert not step.final_noise


def test_how_a_network_computes_is_told_to_it():
    config = load_config(CONFIGS / "digits.py").Config(dtype="bfloat16", remat=True, scan=True)
    net = config.unet()
    assert (net.dtype, net.remat, net.scan) == (jnp.bfloat16, True, True)


def test_rate_stays_after_the_warm_up():
    """As published: Adam at the rate of the config from the end of the warm-up on."""
    optimizer = warmup_adam(1e-2, steps=100, warmup=10, clip=math.inf, cosine=False)
    params, rates = {"w": jnp.ones(3)}, []
    state = optimizer.init(params)
    for _ in range(40):
        updates, state = optimizer.update({"w": jnp.full(3, 7.0)}, state, params)
        rates.append(-float(updates["w"][0]))  # of a constant gradient, Adam's step is its rate
    np.testing.assert_allclose(rates[:10], 1e-3 * np.arange(10), atol=1e-6)
    np.testing.assert_allclose(rates[10:], 1e-2, rtol=1e-4)


def test_weight_decay_is_of_matrices_alone_and_the_moments_are_as_told():
    gradient = {"kernel": jnp.full((2, 2), 3.0), "bias": jnp.full(2, 3.0)}
    params = {"kernel": jnp.full((2, 2), 5.0), "bias": jnp.full(2, 5.0)}

    def step(**options):
        optimizer = warmup_adam(0.1, steps=100, cosine=False, **options)
        return optimizer.update(gradient, optimizer.init(params), params)[0]

    plain, decayed = step(), step(weight_decay=0.01)
    np.testing.assert_array_equal(decayed["bias"], plain["bias"])
    np.testing.assert_allclose(decayed["kernel"] - plain["kernel"], -0.1 * 0.01 * 5.0, rtol=1e-4)
    # A vector of any name, such as a learned schedule's or the frequencies of an embedding.
    optimizer = warmup_adam(0.1, steps=100, cosine=False, weight_decay=0.5)
    vector = {"frequencies": jnp.full(3, 5.0), "number": jnp.float32(5.0)}
    state = optimizer.init(vector)
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, vector), state, vector)
    assert not any(jnp.any(leaf) for leaf in jax.tree.leaves(updates))
    # The blocks of a Transformer are stacked: their biases have two axes.
    net = networks.DiT(width=16, depth=2, heads=2)
    x = jnp.zeros((1, 4, 4, 1))
    shapes = jax.eval_shape(net.init, KEY, x, jnp.zeros(1))
    params = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 5.0), shapes)
    first = jax.tree.map(jnp.ones_like, params)
    optimizer = warmup_adam(0.1, steps=100, cosine=False, weight_decay=0.01)
    updates, _ = optimizer.update(first, optimizer.init(params), params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(updates):
        spared = leaf.ndim < 2 or path[-1].key in ("bias", "scale")
        expected = -0.1 if spared else -0.105
        np.testing.assert_allclose(leaf, expected, rtol=1e-3)
    # Two gradients, the second ten times the first: m and v by hand.
    optimizer = warmup_adam(
        0.1, steps=100, cosine=False, clip=math.inf, first_moment=0.8, second_moment=0.9
    )
    state = optimizer.init(jnp.ones(1))
    _, state = optimizer.update(jnp.ones(1), state)
    update, _ = optimizer.update(10.0 * jnp.ones(1), state)
    mean = (0.8 * 0.2 + 0.2 * 10) / (1 - 0.8**2)
    square = (0.9 * 0.1 + 0.1 * 100) / (1 - 0.9**2)
    np.testing.assert_allclose(update, -0.1 * mean / math.sqrt(square), rtol=1e-4)
    for name, value in (("first_moment", -0.1), ("second_moment", 1.0), ("weight_decay", -0.1)):
        with pytest.raises(ValueError, match=f"{name} must be .* got {value}"):
            step(**{name: value})


def seen(flip, label_dropout, num_classes):
    """x and label of 400 digits as the loss has them."""
    digits = load_config(CONFIGS / "digits.py")
    config, images, shape, _ = open_images(digits.Config(flip=flip))
    object.__setattr__(config, "label_dropout", label_dropout)

    def spy(params, key, batch):
        return jnp.zeros(len(batch["x"])), {"batch": batch}

    run = image_experiment(
        config,
        images,
        loss=spy,
        held_out_loss=spy,
        run=lambda params, keys, **options: jnp.zeros((len(keys), *shape)),
        grid=jnp.linspace(1.0, 0.0, 3),
        estimate=lambda params, keys, x: jnp.zeros(len(x)),
        place=lambda keys, x: x,
        num_classes=num_classes,
        init=lambda key: {},
        process=None,
        denoiser=lambda params: None,
    )
    train = images("train")
    batch = {"x": jnp.asarray(train.x[:400])}
    if num_classes is not None:
        batch["label"] = jnp.asarray(train.label[:400])
    return run, batch, run.objective({}, KEY, batch)[1]["batch"]


def test_half_of_the_images_are_mirrored_where_asked():
    _, batch, found = seen(flip=True, label_dropout=0.0, num_classes=None)
    same = np.all(found["x"] == batch["x"], axis=(1, 2, 3))
    turned = np.all(found["x"] == batch["x"][:, :, ::-1], axis=(1, 2, 3))
    assert np.all(same | turned)
    assert 160 < same.sum() < 240
    _, batch, found = seen(flip=False, label_dropout=0.0, num_classes=None)
    np.testing.assert_array_equal(found["x"], batch["x"])


def test_labels_are_dropped_as_often_as_told_in_training_alone():
    run, batch, found = seen(flip=False, label_dropout=0.25, num_classes=10)
    dropped = np.asarray(found["label"]) == 10
    assert 70 < dropped.sum() < 130
    np.testing.assert_array_equal(found["label"][~dropped], batch["label"][~dropped])
    assert set(run.batches()[0]) == {"x", "label"}
    with pytest.raises(ValueError, match="labels of at most 3 classes, got 10"):
        seen(flip=False, label_dropout=0.0, num_classes=3)[0].batches()
    adm = load_config(CONFIGS / "imagenet64_adm.py")
    with pytest.raises(ValueError, match=r"label_dropout must be in \[0, 1\], got 1.5"):
        adm.Config(label_dropout=1.5)
    with pytest.raises(ValueError, match="num_classes must be at least 1, got 0"):
        adm.Config(num_classes=0)
