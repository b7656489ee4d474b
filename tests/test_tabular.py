"""Tables, their whitening, and the config that models them, against closed forms."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats
from scipy.integrate import quad

import jaxdiff as jd
from jaxdiff.data import tabular
from jaxdiff.data.tabular import UCI, load_table, whitening
from jaxdiff.evaluation import evaluate
from jaxdiff.experiment import load_config
from jaxdiff.training import fit, init_state, make_train_step

config_module = load_config(Path(__file__).parents[1] / "configs" / "tabular.py")


def normal(mean: Any, covariance: Any = 1) -> Any:
    return stats.multivariate_normal(mean, covariance)


@pytest.fixture(scope="module")
def skewed():
    """Rows with a log-normal column, one with zeros, and one of both signs that depends on them."""
    rng = np.random.default_rng(0)
    a = np.exp(rng.normal(size=300))
    b = np.maximum(a + 0.5 * rng.normal(size=300), 0.0)
    c = np.log(a) + 0.1 * rng.normal(size=300) - 2.0
    return np.stack([100 * a, b, c], axis=1)


# The sets


@pytest.mark.parametrize(
    ("name", "shapes", "standard", "gaussian"),
    [
        ("breast_cancer", [(398, 30), (57, 30), (114, 30)], -44.67, -14.17),
        ("wine", [(124, 13), (18, 13), (36, 13)], -18.24, -14.77),
    ],
)
def test_the_splits_are_those_of_the_known_figures(name, shapes, standard, gaussian):
    table = load_table(name)
    assert [x.shape for x in table[:3]] == shapes
    train, test = ((x - table.train.mean(0)) / table.unit for x in (table.train, table.test))
    fit = normal(np.zeros(train.shape[1]), np.cov(train.T, bias=True))
    unfit = normal(np.zeros(train.shape[1]))
    assert unfit.logpdf(test).mean() == pytest.approx(standard, abs=0.006)
    assert fit.logpdf(test).mean() == pytest.approx(gaussian, abs=0.006)
    z, log_det = whitening(table.train, log=False).forward(table.test)
    ours = unfit.logpdf(z) + log_det + np.log(table.unit).sum()
    np.testing.assert_allclose(ours, fit.logpdf(test), rtol=1e-6)


@pytest.mark.parametrize("header", ["", "height,width,'depth'\n"])
def test_a_csv_file_is_read_with_and_without_names(header, skewed, tmp_path):
    path = tmp_path / "table.csv"
    path.write_text(header + "\n".join(",".join(map(repr, row)) for row in skewed.tolist()) + "\n")
    table = load_table(str(path))
    order = np.random.RandomState(0).permutation(300)
    np.testing.assert_array_equal(np.concatenate(table[:3]), skewed[order])
    assert [len(x) for x in table[:3]] == [210, 30, 60]
    np.testing.assert_allclose(table.unit, table.train.std(axis=0))


def test_an_npz_file_may_have_its_own_splits(skewed, tmp_path):
    path = tmp_path / "table.npz"
    np.savez(path, x_train=skewed[:100], x_validation=skewed[100:120], x_test=skewed[120:])
    for ours, theirs in zip(load_table(str(path))[:3], np.split(skewed, [100, 120]), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    np.savez(path, x=skewed)
    assert len(load_table(str(path)).test) == 60


def test_a_uci_set_keeps_its_order_and_units(monkeypatch, tmp_path):
    monkeypatch.setitem(UCI, "power", (5, 2, 3, 4))
    x = np.arange(40, dtype=np.float32).reshape(10, 4)
    np.save(tmp_path / "POWER.npy", x)
    table = load_table(str(tmp_path / "POWER.npy"))
    for ours, theirs in zip(table[:3], np.split(x, [5, 7]), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(table.unit, np.ones(4))
    np.save(tmp_path / "POWER.npy", x[:-1])
    with pytest.raises(ValueError, match=r"is \(9, 4\), need \(10, 4\)"):
        load_table(str(tmp_path / "POWER.npy"))


@pytest.mark.parametrize("name", ["gas", "somewhere/HEPMASS.npy"])
def test_a_missing_uci_set_says_where_to_get_it(name):
    with pytest.raises(ValueError, match=r"zenodo.org/record/1161203.*process.py"):
        load_table(name)


def test_what_is_no_table_is_refused_by_name(skewed, tmp_path):
    with pytest.raises(ValueError, match=r"'iris': need breast_cancer.*POWER.npy"):
        load_table("iris")
    (tmp_path / "words.csv").write_text("a,b\n1,2\n3,four\n")
    (tmp_path / "hole.csv").write_text("1,2\n" * 20 + "1,nan\n" * 20)
    (tmp_path / "constant.csv").write_text("".join(f"{i},2\n" for i in range(20)))
    (tmp_path / "narrow.csv").write_text("".join(f"{i}\n" for i in range(20)))
    np.savez(tmp_path / "parts.npz", x_train=skewed, x_test=skewed)
    np.savez(tmp_path / "widths.npz", x_train=skewed, x_validation=skewed, x_test=skewed[:, :2])
    for name, message in [
        ("words.csv", "no table of numbers"),
        ("hole.csv", "missing or infinite"),
        ("constant.csv", "column 1 is constant"),
        ("narrow.csv", r"need \[n ≥ 2, d ≥ 2\]"),
        ("parts.npz", "x_validation"),
        ("widths.npz", r"\(300, 2\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_table(str(tmp_path / name))


# The change of variables


@pytest.mark.parametrize("log", [True, False])
def test_whitened_training_rows_have_unit_covariance(log, skewed):
    white = whitening(skewed, log=log)
    z, _ = white.forward(skewed)
    np.testing.assert_allclose(z.mean(axis=0), 0.0, atol=1e-9)
    np.testing.assert_allclose(np.cov(z.T, bias=True), np.eye(3), atol=1e-9)
    np.testing.assert_allclose(white.inverse(z), skewed, rtol=1e-9, atol=1e-9)
    assert white.logged.tolist() == ([True, True, False] if log else [False] * 3)
    # Zeros have a logarithm too; positive columns need no offset.
    assert (white.offset > 0).tolist() == [False, log, False]


@pytest.mark.parametrize("log", [True, False])
def test_log_determinant_is_that_of_the_jacobian(log, skewed):
    white = whitening(skewed, log=log, shrinkage=0.2)
    rows = skewed[:5] + 0.05
    _, log_det = white.forward(rows)
    for row, ours in zip(rows, log_det, strict=True):
        steps = 1e-5 * np.abs(row)[:, None] * np.eye(3)
        change = white.forward(row + steps)[0] - white.forward(row - steps)[0]
        jacobian = change / (2 * np.diag(steps))[:, None]
        assert ours == pytest.approx(np.linalg.slogdet(jacobian)[1], abs=1e-6)


def test_a_density_of_z_becomes_one_of_x(skewed):
    white = whitening(skewed[:, 1:2])

    def density(x):
        z, log_det = white.forward(np.array([[x]]))
        return float(np.exp(-0.5 * z[0, 0] ** 2 + log_det[0]) / np.sqrt(2 * np.pi))

    total = quad(density, -white.offset[0] + 1e-12, 200.0, points=[0.1, 1.0, 10.0], limit=500)[0]
    assert total == pytest.approx(1.0, abs=1e-5)


def test_shrinkage_trusts_correlations_less():
    """Of a correlation ρ, the principal variances 1 ± ρ are taken for 1 ± (1 − s) ρ."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(400, 2)) @ np.array([[1.0, 0.8], [0.0, 5.0]])
    rho = np.asarray(np.corrcoef(x, rowvar=False))[0, 1]
    z, _ = whitening(x, shrinkage=0.3).forward(x)
    found = np.linalg.eigvalsh(np.cov(z.T, bias=True))
    signs = np.array([-1.0, 1.0])
    expected = (1 + signs * rho) / (1 + 0.7 * signs * rho)
    np.testing.assert_allclose(found, np.sort(expected), rtol=1e-9)


def test_bad_rows_are_refused(skewed):
    with pytest.raises(ValueError, match=r"shrinkage must be in \[0, 1\), got 1"):
        whitening(skewed, shrinkage=1.0)
    with pytest.raises(ValueError, match=r"columns \[0, 3\] determine each other"):
        whitening(np.concatenate([skewed, 2 * skewed[:, :1]], axis=1))
    with pytest.raises(ValueError, match=r"column 1 is constant"):
        whitening(np.stack([skewed[:, 0], np.zeros(300)], axis=1))
    with pytest.raises(ValueError, match=r"column 0 holds -3"):
        whitening(skewed).forward(np.array([[-3.0, 1.0, 1.0]]))


# The config


@pytest.fixture(scope="module")
def two_clusters(tmp_path_factory):
    """Positive rows whose logarithms are a mixture of two far clusters."""
    rng = np.random.default_rng(2)
    y = 0.3 * rng.normal(size=(1000, 2)) + 2.0 * rng.integers(0, 2, size=(1000, 1))
    path = tmp_path_factory.mktemp("tables") / "clusters.npz"
    np.savez(path, x=np.exp(y) * [1.0, 50.0])
    return str(path)


@pytest.fixture(scope="module")
def small(two_clusters):
    return config_module.Config(
        dataset=two_clusters,
        width=32,
        depth=2,
        condition_width=16,
        dropout=0.1,
        weight_decay=0.1,
        members=2,
        sigma_min=0.1,
        steps=200,
        learning_rate=5e-3,
        ema_decay=0.95,
        sampler_steps=20,
    )


@pytest.fixture(scope="module")
def experiment(small):
    return config_module.experiment(small)


@pytest.fixture(scope="module")
def untrained(experiment):
    return experiment.init(jax.random.key(0))


@pytest.fixture(scope="module")
def trained(experiment, untrained, small):
    step = make_train_step(
        experiment.objective, experiment.optimizer, ema_decay=experiment.ema_decay
    )
    state = init_state(untrained, experiment.optimizer, jax.random.key(1))
    state = fit(step, state, experiment.batches(), steps=small.steps, progress=False)
    return state.ema_params


@pytest.fixture(scope="module")
def report(experiment, trained):
    return evaluate(experiment, trained, jax.random.key(2))


def test_an_untrained_model_is_the_gaussian_fit(experiment, untrained, small, two_clusters):
    """Its flow widens 1 + σ_min² to 1 + σ_max², where the prior has σ_max²."""
    table = load_table(two_clusters)
    low, high = small.sigma_min**2, small.sigma_max**2
    variance = (1 + low) * high / (1 + high)
    logs = np.log(table.train)
    law = normal(logs.mean(0), variance * np.cov(logs.T, bias=True))
    rows = np.log(table.validation)
    expected = law.logpdf(rows) - rows.sum(1) + np.log(table.unit).sum()
    found = experiment.validate(untrained)["log_likelihood"]
    assert found == pytest.approx(expected.mean(), abs=1e-3)


def test_training_finds_what_a_gaussian_misses(report, two_clusters):
    found = report["likelihood"]
    table = load_table(two_clusters)
    assert found["examples"] == len(table.test) == 200
    # The truth, in the table's units: two clusters of standard deviation 0.3 in the logarithms.
    y = np.log(table.test / [1.0, 50.0])
    laws = [normal([m, m], 0.09 * np.eye(2)).pdf(y) for m in (0.0, 2.0)]
    truth = np.log(np.mean(laws, axis=0)) - np.log(table.test).sum(1) + np.log(table.unit).sum()
    assert found["log_likelihood"] - found["gain"] == pytest.approx(found["gaussian"])
    assert found["gain"] > 0.6 * (truth.mean() - found["gaussian"]) > 0.3
    # Far more rows than parameters of the truth: no model is better than it but by chance.
    assert found["log_likelihood"] < truth.mean() + 0.1


def test_samples_lie_in_the_clusters(experiment, trained, small, report):
    z = experiment.sample(trained, jax.random.key(3), 400)
    table = load_table(small.dataset)
    y = np.log(whitening(table.train).inverse(np.asarray(z)) / [1.0, 50.0])
    inside = [(np.abs(y - m) < 1.0).all(axis=1).mean() for m in (0.0, 2.0)]
    assert sum(inside) > 0.9
    assert min(inside) > 0.3
    assert report["samples"]["energy_distance"] < 10 * report["samples"]["energy_null"]


def test_the_model_is_the_average_of_its_members(experiment, trained, small):
    net = small.mlp(dropout=small.dropout)
    x, t = jax.random.normal(jax.random.key(4), (7, 2)), jnp.float32(0.3)
    edm = jd.parameterizations.edm(1.0)
    alone = jax.jit(
        lambda params: (
            jd.NetDenoiser(params, experiment.process, net.apply, edm)(x, jnp.float32(0.3)).mean
        )
    )
    each = [alone(jax.tree.map(lambda a, i=i: a[i], trained)) for i in range(small.members)]
    ours = jax.jit(lambda params: experiment.denoiser(params)(x, t).mean)(trained)
    np.testing.assert_allclose(ours, (each[0] + each[1]) / 2, atol=1e-6)
    assert jnp.abs(each[0] - each[1]).max() > 1e-3


def test_every_member_learns(experiment, untrained):
    batch = {"x": jnp.asarray(experiment.batches()[0]["x"])}

    @jax.jit
    def gradient(params):
        return jax.grad(lambda p: experiment.objective(p, jax.random.key(5), batch)[0].mean())(
            params
        )

    grads = gradient(untrained)
    norms = np.array([optax.tree.norm(jax.tree.map(lambda a, i=i: a[i], grads)) for i in (0, 1)])
    assert norms.min() > 0.5 * norms.max() > 0.0


def test_the_rate_is_constant_and_weights_decay(experiment, untrained, small):
    nothing = jax.tree.map(jnp.zeros_like, untrained)
    state = experiment.optimizer.init(untrained)
    update = jax.jit(experiment.optimizer.update)
    updates = nothing
    for _ in range(small.steps // 10 + 1):  # past the warm-up
        updates, state = update(nothing, state, untrained)
    expected = jax.tree.map(lambda p: -small.learning_rate * small.weight_decay * p, untrained)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), updates, expected)


def test_pictures(experiment, tmp_path):
    experiment.draw(np.zeros((4, 2)), tmp_path / "rows.png")
    times = np.linspace(1, 0, 8).tolist()
    experiment.draw_trajectory(np.zeros((8, 4, 2)), tmp_path / "way.png", times=times)
    assert all((tmp_path / name).stat().st_size for name in ("rows.png", "way.png"))


def test_a_batch_is_all_rows_of_a_small_table(experiment):
    assert experiment.batches()[0]["x"].shape == (512, 2)
    wine = config_module.experiment(config_module.Config(dataset="wine"))
    batch = wine.batches()[0]["x"]
    assert batch.shape == (124, 13)
    np.testing.assert_allclose(np.cov(batch.T, bias=True), np.eye(13), atol=1e-5)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"weight_decay": -1.0}, "weight_decay must be at least 0, got -1.0"),
        ({"members": 0}, "members must be at least 1, got 0"),
        ({"shrinkage": 2.0}, r"shrinkage must be in \[0, 1\), got 2.0"),
        ({"dataset": "mnist"}, "'mnist': need breast_cancer"),
    ],
)
def test_bad_values_are_named(values, message, small):
    with pytest.raises(ValueError, match=message):
        config_module.experiment(dataclasses.replace(small, **values))


def test_the_sizes_of_the_uci_sets_are_the_published_ones():
    """Hugely many rows, the last tenth a test; BSDS300 and HEPMASS came with splits."""
    for name in ("power", "gas", "miniboone"):
        train, validation, test, _ = tabular.UCI[name]
        total = train + validation + test
        assert test == total // 10
        assert validation == (total - test) // 10
