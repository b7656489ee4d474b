"""The config of the plane's densities: its report against exact densities and entropies."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.data.toys import TOYS
from jaxdiff.evaluation import evaluate
from jaxdiff.experiment import load_config
from jaxdiff.training import fit, init_state, make_train_step

toy2d = load_config(Path(__file__).parents[1] / "configs" / "toy2d.py")

SMALL = toy2d.Config(
    dataset="8gaussians",
    width=64,
    waves=16,
    condition_width=32,
    depth=2,
    steps=300,
    warmup=20,
    ema_decay=0.98,
    learning_rate=4e-3,
    eval_points=1000,
    eval_samples=1000,
    sampler_steps=30,
)
GAUSSIAN_FIT = 4.2548  # nats: the best Gaussian on 8gaussians


@pytest.fixture(scope="module")
def experiment():
    return toy2d.experiment(SMALL)


@pytest.fixture(scope="module")
def untrained(experiment):
    return experiment.init(jax.random.key(SMALL.seed))


@pytest.fixture(scope="module")
def trained(experiment, untrained):
    step = make_train_step(
        experiment.objective, experiment.optimizer, ema_decay=experiment.ema_decay
    )
    state = init_state(untrained, experiment.optimizer, jax.random.key(1))
    options = experiment.intervals | {"eval_every": SMALL.steps}
    state = fit(
        step, state, experiment.batches(), steps=experiment.steps, progress=False, **options
    )
    return state.ema_params


@pytest.fixture(scope="module")
def reports(experiment, untrained, trained):
    return {
        "untrained": evaluate(experiment, untrained, jax.random.key(2)),
        "trained": evaluate(experiment, trained, jax.random.key(2)),
    }


@pytest.mark.parametrize("model", ["untrained", "trained"])
def test_nll_is_entropy_plus_divergence(model, reports):
    report = reports[model]["likelihood"]
    assert report["entropy"] == TOYS["8gaussians"].entropy
    assert report["gap"] == pytest.approx(report["nll_nats"] - report["entropy"])
    # nll − kl is the mean of −log p_true, whose standard deviation a point is about 1 nat.
    assert report["nll_nats"] - report["kl"] == pytest.approx(report["entropy"], abs=4 / 1000**0.5)
    assert report["nll_nats"] > report["entropy"] - 3 * report["nll_nats_stderr"]
    assert report["kl"] > -3 * report["kl_stderr"]
    assert report["examples"] == SMALL.eval_points


def test_an_untrained_network_is_the_gaussian_of_the_preconditioning(reports):
    """With its last layer at zero the denoiser is that of N(0, σ_d² I), whose NLL is known.

    Its flow widens σ_d² + σ_min² to σ_d² + σ_max², where the prior has σ_max².
    """
    report = reports["untrained"]["likelihood"]
    low, data, high = SMALL.sigma_min**2, SMALL.sigma_data**2, SMALL.sigma_max**2
    var = (data + low) * high / (data + high)
    x = np.asarray(TOYS["8gaussians"].sample(jax.random.key(5), 100_000), float)
    expected = np.log(2 * np.pi * var) + 0.5 * (x**2).sum(1).mean() / var
    assert report["nll_nats"] == pytest.approx(expected, abs=4 * report["nll_nats_stderr"])


def test_a_few_seconds_of_training_beat_the_gaussian_fit(reports):
    trained, untrained = reports["trained"], reports["untrained"]
    assert trained["likelihood"]["nll_nats"] < GAUSSIAN_FIT - 0.5
    assert trained["samples"]["energy_distance"] < 0.2 * untrained["samples"]["energy_distance"]


def test_samples_do_not_depend_on_their_number(experiment, trained):
    many = experiment.sample(trained, jax.random.key(3), SMALL.eval_samples)
    few = experiment.sample(trained, jax.random.key(3), 2)
    np.testing.assert_allclose(few, many[:2], atol=1e-4)


def test_a_trajectory_goes_from_the_prior_to_the_data(experiment, trained):
    states, times = experiment.trajectory(trained, jax.random.key(4), SMALL.eval_samples)
    assert states.shape == (8, SMALL.eval_samples, 2)
    assert (times[0], times[-1]) == (1.0, 0.0)
    np.testing.assert_allclose(jnp.std(states[0]), SMALL.sigma_max, rtol=0.1)
    nll = {i: -jax.vmap(TOYS["8gaussians"].log_prob)(states[i]).mean() for i in (0, -1)}
    assert nll[-1] < 4.5 < nll[0]


def test_pictures_and_validation(experiment, trained, tmp_path):
    experiment.draw(np.zeros((4, 2)), tmp_path / "points.png")
    times = np.linspace(1, 0, 8).tolist()
    experiment.draw_trajectory(jnp.zeros((8, 4, 2)), tmp_path / "way.png", times=times)
    assert all((tmp_path / name).stat().st_size for name in ("points.png", "way.png"))
    losses = [experiment.validate(params)["loss"] for params in (trained, trained)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("name", sorted(TOYS))
def test_every_density_composes(name):
    experiment = toy2d.experiment(dataclasses.replace(SMALL, dataset=name))
    assert experiment.batches()[0]["x"].shape == (SMALL.batch_size, 2)


def test_an_unknown_density_is_named_with_the_known_ones():
    with pytest.raises(ValueError, match=r"8gaussians.*circles.*'spiral'"):
        toy2d.experiment(toy2d.Config(dataset="spiral"))
