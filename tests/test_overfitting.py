"""Training against held-out losses, and copies among samples: found where they are, and only there.

A model trained on sixteen digits knows them by heart; exact denoisers know nothing by heart.
"""

import json
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from oracles import GMM5, GaussianData
from scipy import stats

import jaxdiff as jd
from jaxdiff import evaluation, metrics
from jaxdiff.data.images import Images, dequantize, load_images, to_model
from jaxdiff.processes.base import Denoised
from jaxdiff.recipes import ImageOptions, Splits, TrainingOptions, image_experiment
from jaxdiff.training import init_state, make_train_step

KEY = jax.random.key(0)
VP = jd.Gaussian(jd.linear_beta())
FEW = 16


def as_they_are(keys, x):
    return x


def dequantized(keys, x):
    return dequantize(keys, x, 17)


@pytest.fixture(scope="module")
def digits():
    """Levels of the training and of the test images."""
    return load_images("digits", "train").x.astype(int), load_images("digits", "test").x.astype(int)


def prototypes(params, x, level):
    """x̂_0 of a mixture of learned points, of learned weights and one learned width.

    Attention with the points as keys and values: the network that learns by heart the fastest.
    """
    flat = x.reshape(len(x), -1)
    alpha, sigma = (jnp.sqrt(jax.nn.sigmoid(sign * 4.0 * level))[:, None] for sign in (1.0, -1.0))
    spread = jnp.exp(2.0 * params["log_std"])
    var = alpha**2 * spread + sigma**2
    far = flat[:, None] - alpha[:, :, None] * params["points"][None]
    logits = params["logits"][None] - 0.5 * jnp.sum(far**2, axis=-1) / var
    mean = jax.nn.softmax(logits) @ params["points"]
    return (mean + alpha * spread / var * (flat - alpha * mean)).reshape(x.shape)


@pytest.fixture(scope="module")
def parrot(digits):
    """A model, trained from random numbers on sixteen digits for a few seconds."""
    objective = jd.denoising(
        prototypes, VP, jd.x0(), time_sampler=jd.time_samplers.low_discrepancy()
    )
    optimizer = optax.adam(optax.cosine_decay_schedule(0.1, 1000))
    step = make_train_step(objective, optimizer, ema_decay=0.9)
    params = {
        "points": 0.5 * jax.random.normal(jax.random.key(1), (256, 64)),
        "logits": jnp.zeros(256),
        "log_std": jnp.float32(-1.0),
    }
    state = init_state(params, optimizer, jax.random.key(2))
    x, rng = np.tile(digits[0][:FEW], (4, 1, 1, 1)), np.random.default_rng(0)
    for _ in range(1000):
        drawn = 2.0 * (x + rng.uniform(size=x.shape)) / 17.0 - 1.0
        state, _ = step(state, {"x": drawn.astype(np.float32)})
    return jd.NetDenoiser(state.ema_params, VP, prototypes, jd.x0())


# Losses


def test_sixteen_images_learned_by_heart_are_detected(parrot, digits):
    """B30: held-out losses above 1.5 × those of training."""
    train, test = digits
    found = evaluation.overfitting_report(VP, parrot, train[:FEW], test, KEY, place=dequantized)
    assert found["gap_detected"] is True
    assert found["ratio"] > 1.5
    assert found["p_value"] < 1e-6
    assert found["gap"] > 10 * found["gap_stderr"]
    assert (found["train_images"], found["heldout_images"]) == (FEW, 447)
    assert len(found["levels"]) == 10
    assert max(level["ratio"] for level in found["levels"]) > 5.0
    # Other images that it has not seen are all alike to it.
    others = train[FEW:][np.random.default_rng(0).permutation(len(train) - FEW)]
    fair = evaluation.overfitting_report(
        VP, parrot, others[:300], others[300:], KEY, place=dequantized
    )
    assert fair["gap_detected"] is False
    assert 0.9 < fair["ratio"] < 1.1
    json.dumps(found, allow_nan=False)


def test_exact_models_are_flagged_at_the_stated_rate():
    """p-values over a hundred pairs of splits are uniform, also of splits of unequal size."""
    denoise, times = GMM5.denoiser(VP), evaluation.noise_levels(VP, 3)

    def p_value(key):
        data_key, noise_key = jax.random.split(key)
        x = GMM5.sample(data_key, 90)
        found = evaluation.overfitting_report(
            VP, denoise, x[:60], x[60:], noise_key, place=as_they_are, times=times
        )
        return found["p_value"]

    p = np.asarray([p_value(key) for key in jax.random.split(jax.random.key(4), 100)])
    assert stats.kstest(p, "uniform").pvalue > 0.05
    assert (p < 0.05).mean() <= 0.11


@pytest.mark.parametrize("schedule", [jd.linear_beta(), jd.exploding(), jd.subvp()])
def test_losses_are_those_of_the_noise(schedule):
    """For N(m, s²) data the exact ε̂ errs by α²s²/(α²s² + σ²), at every level."""
    process = jd.Gaussian(schedule)
    x = jnp.asarray(0.2 + 0.5 * np.random.default_rng(0).normal(size=(2000, 6)), float)
    found = evaluation.overfitting_report(
        process, GaussianData(process, 0.2, 0.5), x[:1000], x[1000:], KEY, place=as_they_are
    )
    assert found["p_value"] > 0.05
    for level in found["levels"]:
        alpha, sigma = process.schedule(jnp.float32(level["t"]))
        expected = 0.25 * alpha**2 / (0.25 * alpha**2 + sigma**2)
        for split in ("train", "heldout"):
            assert abs(level[split] - expected) < 4 * level[f"{split}_stderr"]
        assert level["log_snr"] == pytest.approx(2 * np.log(alpha / sigma), abs=1e-3)


class Constant(NamedTuple):
    """A model that always guesses the same."""

    guess: Any

    def __call__(self, x, t):
        return Denoised(jnp.broadcast_to(self.guess, (len(x), *self.guess.shape)))


def test_losses_of_augmented_states_are_those_of_the_pair():
    """CLD: x_0² mᵀ Σ⁻¹ m, for a guess of 0."""
    process = jd.cld()
    x = jnp.asarray(np.random.default_rng(0).normal(size=(40, 6)), float)
    found = evaluation.overfitting_report(
        process, Constant(jnp.zeros(6)), x, 2 * x, KEY, place=as_they_are
    )
    assert found["ratio"] == pytest.approx(4.0, rel=1e-4)
    # The levels of one image are no independent draws: it is the images that make the error.
    squares = np.asarray(jnp.mean(x**2, axis=1), float)
    expected = found["train"] * squares.std(ddof=1) / squares.mean() / np.sqrt(40)
    assert found["train_stderr"] == pytest.approx(expected, rel=1e-3)
    for level in found["levels"]:
        marginal = process.marginal(jnp.ones(()), jnp.float32(level["t"]))
        white = np.linalg.solve(np.asarray(marginal.factor, float), np.asarray(marginal.mean))
        expected = float((white**2).sum() * jnp.mean(x**2))
        assert level["train"] == pytest.approx(expected, rel=1e-3)


def test_losses_of_classes_are_cross_entropies():
    """Masked classes: 2 (1 − t) × nats of the guess, here of probability ½ and ¼."""
    process = jd.D3PM(jd.d3pm.absorbing(4))
    probs = jnp.broadcast_to(jnp.array([0.5, 0.25, 0.25, 0.0]), (3, 4))
    seen, fresh = jnp.zeros((5, 3), int), jnp.ones((6, 3), int)
    found = evaluation.overfitting_report(
        process, Constant(probs), seen, fresh, KEY, place=lambda keys, x: process.one_hot(x)
    )
    assert [level["t"] for level in found["levels"]] == pytest.approx(np.arange(0.05, 1.0, 0.1))
    for level in found["levels"]:
        in_sight = 2.0 * (1.0 - level["t"])
        assert level["train"] == pytest.approx(in_sight * np.log(2), rel=1e-4)
        assert level["heldout"] == pytest.approx(in_sight * np.log(4), rel=1e-4)
        assert "log_snr" not in level
    assert found["ratio"] == pytest.approx(2.0, rel=1e-4)


def test_both_splits_see_the_same_noise():
    """The same images have the same losses, in whatever chunks: no gap at all."""
    x, denoise = GMM5.sample(KEY, 30), GMM5.denoiser(VP)
    run = lambda *x, **options: evaluation.overfitting_report(
        VP, denoise, *x, KEY, place=as_they_are, **options
    )
    same = run(x, x)
    assert same["gap"] == 0.0
    assert same["p_value"] >= 0.5
    assert same["gap_stderr"] < 1e-6
    assert run(x, x[:7])["train"] == pytest.approx(run(x, x[:7], size=4)["train"], rel=1e-5)
    assert run(x[:7], x)["train"] == pytest.approx(run(x, x[:7])["heldout"], rel=1e-5)


def test_noise_levels_are_even_in_log_snr():
    for schedule, high, low in (
        (jd.linear_beta(), 8.0, -8.0),
        (jd.straight(), 8.0, -8.0),
        (jd.exploding(0.05, 10.0), 2 * np.log(20), -2 * np.log(10)),
    ):
        process = jd.Gaussian(schedule)
        times = evaluation.noise_levels(process, 6)
        snr = jax.vmap(process.log_snr)(jnp.asarray(times, float))
        np.testing.assert_allclose(snr, np.linspace(high, low, 6), atol=0.02)
    assert len(evaluation.noise_levels(VP)) == 10
    assert abs(VP.log_snr(jnp.float32(evaluation.noise_levels(VP, most=4.0)[0])) - 4.0) < 0.02


# Copies


def test_samples_of_a_model_that_learned_by_heart_are_flagged(parrot, digits):
    """B31: at least 90 %, by pixels and by components."""
    train, test = digits
    x = VP.prior((200, 8, 8, 1)).sample(jax.random.key(5))
    grid = jd.grids.uniform_log_snr(VP, 25)
    samples = np.asarray(jd.sample(jd.DDIM(VP), parrot, grid, jax.random.key(6), x))
    seen, fresh = (np.asarray(to_model(x, 17)) for x in (train[:FEW], test))
    pixels = samples, seen, fresh
    rows = metrics.principal_components(seen, samples, fresh)
    for found in (metrics.memorisation(*pixels), metrics.memorisation(rows[1], rows[0], rows[2])):
        assert found["flagged_share"] >= 0.9
        assert found["nearer_p_value"] < 1e-6


def test_report_holds_both_neighbourhoods(digits):
    """B31: fresh digits pass in both, the p-value above 0.05; copies fail in both."""
    x = np.concatenate(digits)
    x = x[np.random.default_rng(0).permutation(len(x))]
    train, test = (Images(part, None, 17, 0) for part in (x[:900], x[1200:]))
    good, bad = (
        evaluation.sample_report(to_model(part, 17), train, test, KEY)
        for part in (x[900:1200], x[:300])
    )
    for name in ("neighbours", "feature_neighbours"):
        assert good[name]["ks_p_value"] > 0.05
        assert good[name]["flagged_share"] < 0.1
        assert bad[name]["flagged_share"] == 1.0
        assert bad[name]["samples_median"] < 1e-5
    assert good["neighbours"]["samples_median"] != good["feature_neighbours"]["samples_median"]


# In the report of a run


@dataclass(frozen=True)
class Config(TrainingOptions, ImageOptions):
    pass


class Estimate(NamedTuple):
    value: Any


MASKED = jd.D3PM(jd.d3pm.absorbing(18))
SHAPE = (8, 8, 1)
GREY = jnp.zeros(SHAPE)
ODDS = jnp.broadcast_to(jnp.append(jnp.full(17, 1 / 17), 0.0), (*SHAPE, 18))


@pytest.mark.parametrize(
    ("process", "denoise", "place"),
    [
        (VP, Constant(GREY), None),
        (VP, Constant(GREY), lambda keys, x: to_model(x, 17)),
        (MASKED, Constant(ODDS), lambda keys, x: jax.vmap(MASKED.one_hot)(x)),
        (jd.cld(), Constant(GREY), None),
    ],
    ids=["grey levels", "centres of cells", "classes", "augmented"],
)
def test_every_run_of_images_reports_its_gap(process, denoise, place):
    config = replace(
        Config(), shape=SHAPE, levels=17, eval_samples=40, eval_images=100, batch_size=8
    )
    x = np.random.default_rng(0).integers(0, 17, (200, *SHAPE)).astype(np.uint8)
    experiment = image_experiment(
        config,
        Splits(lambda split: SimpleNamespace(load=lambda most: Images(x, None, 17, 0))),
        loss=lambda params, key, batch: (jnp.zeros(8), {}),
        held_out_loss=lambda params, key, batch: (jnp.zeros(8), {}),
        run=lambda params, keys: jax.vmap(lambda key: jax.random.normal(key, SHAPE))(keys),
        grid=jd.grids.uniform(2),
        estimate=lambda params, keys, x: Estimate(jnp.ones(len(x))),
        place=place,
        init=lambda key: {},
        process=process,
        denoiser=lambda params: denoise,
    )
    report = experiment.evaluate({}, KEY)
    json.dumps(report, allow_nan=False)
    found = report["overfitting"]
    assert {"neighbours", "feature_neighbours"} <= set(report["samples"])
    assert (found["train_images"], found["heldout_images"]) == (100, 100)
    assert found["gap"] == 0.0  # one split for both
    level = found["levels"][3]
    if process is MASKED:
        expected = 2.0 * (1.0 - level["t"]) * np.log(17)
    else:
        square = float(jnp.mean(to_model(x[:100], 17) ** 2)) + (place is None) / (3 * 17**2)
        one, zero = (process.marginal(jnp.float32(v), jnp.float32(level["t"])) for v in (1.0, 0.0))
        expected = 2.0 * float(one.kl(zero)) * square
    assert level["train"] == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda run, x: run(x[:1], x), "train must hold at least 2 images, got 1"),
        (lambda run, x: run(x, x[:1]), "heldout must hold at least 2 images, got 1"),
        (lambda run, x: run(x, x, significance=1.0), r"significance must be in \(0, 1\), got 1.0"),
        (lambda run, x: evaluation.noise_levels(VP, 1), "count must be at least 2, got 1"),
        (lambda run, x: evaluation.noise_levels(VP, most=0.0), "most must be positive, got 0.0"),
    ],
)
def test_bad_arguments_are_refused_by_name(call, message):
    def run(train, heldout, **options):
        return evaluation.overfitting_report(
            VP, Constant(jnp.zeros(2)), train, heldout, KEY, place=as_they_are, **options
        )

    with pytest.raises(ValueError, match=message):
        call(run, np.zeros((4, 2)))
