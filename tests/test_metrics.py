"""Metrics against closed forms, hand-made cases and independent implementations."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import linalg, optimize, stats
from scipy.spatial import distance
from sklearn.datasets import load_digits

from jaxdiff import metrics
from jaxdiff.metrics import _pairwise
from jaxdiff.metrics.classifier import _couple


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture(scope="module")
def digits():
    """(train, train labels, test, test labels) in model space, as the data pipeline splits them."""
    x, labels = load_digits(return_X_y=True)
    return _to_model(x[:1000]), labels[:1000], _to_model(x[1350:]), labels[1350:]


@pytest.fixture(scope="module")
def validation():
    return _to_model(load_digits().data[1000:1350])


def _to_model(x):
    return ((2 * x + 1) / 17 - 1).astype(np.float32).reshape(-1, 8, 8, 1)


# Energy distance


def test_energy_distance_is_the_integral_of_squared_cdf_differences_in_1d(rng):
    x, y = rng.normal(size=300), rng.normal(1.0, 2.0, size=211)
    expected = stats.energy_distance(x, y) ** 2
    assert metrics.energy_distance(x, y) == pytest.approx(expected, rel=1e-9)
    assert metrics.energy_distance(jnp.asarray(x), jnp.asarray(y)) == pytest.approx(expected, 1e-5)


def test_energy_distance_of_gaussians(rng):
    """E|N(m, s²)| is the mean of a folded normal; a point with itself adds E|x − x'| / n."""
    n, shift = 3000, 2.0
    apart = math.sqrt(4 / math.pi) * math.exp(-(shift**2) / 4) + shift * math.erf(shift / 2)
    alike = 2 / math.sqrt(math.pi)
    expected = 2 * apart - 2 * alike + 2 * alike / n
    distance_ = metrics.energy_distance(rng.normal(size=n), rng.normal(shift, size=n))
    assert distance_ == pytest.approx(expected, abs=0.12)


def test_energy_distance_flattens_images_and_uses_euclidean_distances(rng):
    x, y = rng.normal(size=(13, 4, 4, 3)), rng.normal(size=(17, 4, 4, 3)) + 0.3
    flat = x.reshape(13, -1), y.reshape(17, -1)
    xy, xx, yy = (distance.cdist(flat[i], flat[j]).mean() for i, j in ((0, 1), (0, 0), (1, 1)))
    assert metrics.energy_distance(x, y) == pytest.approx(2 * xy - xx - yy, rel=1e-6)
    assert metrics.energy_distance(x, x) == 0.0


def test_metrics_do_not_depend_on_the_block_size(rng, monkeypatch):
    x, y = rng.normal(size=(50, 3)), rng.normal(size=(45, 3)) + 0.5

    def everything():
        return [
            metrics.energy_distance(x, y),
            metrics.kernel_distance(x, y),
            *metrics.prdc(x, y, k=3).values(),
            *metrics.memorisation(y, x, y).values(),
        ]

    whole = everything()
    monkeypatch.setattr(_pairwise, "BLOCK", 7)
    assert everything() == pytest.approx(whole, rel=1e-9, abs=1e-12)


def test_energy_null_is_the_distance_itself_when_the_subset_is_the_pool(rng):
    pool, reference = rng.normal(size=(40, 2)), rng.normal(size=(30, 2))
    null = metrics.energy_null(jax.random.key(0), pool, reference, 40, repeats=3)
    assert null == pytest.approx(metrics.energy_distance(pool, reference), rel=1e-9)


def test_energy_null_of_single_points_is_the_farthest_of_them(rng):
    """Forty draws of one out of four miss none of them."""
    pool, reference = rng.normal(size=(4, 2)), rng.normal(size=(30, 2))
    null = metrics.energy_null(jax.random.key(0), pool, reference, 1, repeats=40)
    farthest = max(metrics.energy_distance(point[None], reference) for point in pool)
    assert null == pytest.approx(farthest, rel=1e-9)


def test_energy_null_has_the_bias_of_its_size_and_grows_with_repeats(rng):
    """The mean of the null is E|x − x'| (1/n + 1/m); its maximum lies a little above."""
    pool, reference = rng.normal(size=4000), rng.normal(size=400)
    key, alike = jax.random.key(1), 2 / math.sqrt(math.pi)
    for n in (50, 400):
        bias = alike * (1 / n + 1 / 400)
        assert bias / 2 < metrics.energy_null(key, pool, reference, n, repeats=8) < 6 * bias
    many = [metrics.energy_null(k, pool, reference, 50) for k in jax.random.split(key, 10)]
    one = [metrics.energy_null(k, pool, reference, 50, repeats=1) for k in jax.random.split(key)]
    assert np.mean(many) > np.mean(one)


def test_sliced_distance_of_shifted_gaussians_is_the_shift_seen_from_all_sides(rng):
    """⟨θ, m⟩² is |m|²/d on average over the sphere; in one dimension it is the W₂ of scipy."""
    x, shift = rng.normal(size=(2000, 3)), np.array([1.0, -2.0, 0.5])
    key = jax.random.key(0)
    found = metrics.sliced_wasserstein(key, x, x + shift, directions=4000)
    assert found == pytest.approx(np.linalg.norm(shift) / math.sqrt(3), rel=0.03)
    wide = metrics.sliced_wasserstein(key, x, 3.0 * x, directions=2000)
    assert wide == pytest.approx(2.0 * math.sqrt(np.mean(x**2)), rel=0.05)
    x, y = rng.normal(size=500), rng.exponential(size=500)
    cost = (np.sort(x)[:, None] - np.sort(y)[None]) ** 2
    pairs = optimize.linear_sum_assignment(cost)
    expected = math.sqrt(cost[pairs].mean())
    assert metrics.sliced_wasserstein(key, x, y) == pytest.approx(expected, rel=1e-9)
    assert metrics.sliced_wasserstein(key, x, rng.permutation(x)) == 0.0


def test_energy_gate_on_digits(digits):
    """Fresh digits pass three times the null; noisy digits, a single class and noise fail."""
    train, labels, test, _ = digits
    rng = np.random.default_rng(0)
    null = metrics.energy_null(jax.random.key(0), train, test, len(test))
    fresh = train[rng.permutation(len(train))[: len(test)]]
    noisy = fresh + 0.6 * rng.normal(size=fresh.shape)
    assert metrics.energy_distance(fresh, test) < 1.5 * null
    assert metrics.energy_distance(noisy, test) > 3 * null
    assert metrics.energy_distance(train[labels == 3], test) > 3 * null
    assert metrics.energy_distance(rng.normal(size=test.shape), test) > 10 * null


# Fréchet distance


def test_frechet_distance_of_gaussians_with_commuting_covariances():
    """|m|² + Σ (√a − √b)², also where a variance is zero."""
    a, b, shift = np.array([1.0, 4.0, 0.0]), np.array([9.0, 0.25, 0.0]), np.array([1.0, 2.0, 0.0])
    result = metrics.gaussian_frechet_distance(np.zeros(3), np.diag(a), shift, np.diag(b))
    assert result == pytest.approx(5.0 + 4.0 + 2.25, rel=1e-12)


def test_frechet_distance_matches_a_general_matrix_root(rng):
    d = 20
    roots = rng.normal(size=(2, d, d + 5))
    (cov_x, cov_y), (mean_x, mean_y) = roots @ roots.transpose(0, 2, 1), rng.normal(size=(2, d))
    cross = np.trace(linalg.sqrtm(cov_x @ cov_y)).real
    expected = ((mean_x - mean_y) ** 2).sum() + np.trace(cov_x) + np.trace(cov_y) - 2 * cross
    result = metrics.gaussian_frechet_distance(mean_x, cov_x, mean_y, cov_y)
    assert result == pytest.approx(expected, rel=1e-8)


def test_frechet_distance_of_scaled_and_shifted_samples_is_exact(rng):
    """y = a x + b: the optimal map is y itself, so the cost is |mean shift|² + (a − 1)² tr C."""
    x = rng.normal(size=(60, 2, 3)) * np.arange(1, 7).reshape(2, 3)
    y = 1.5 * x + 2.0
    rows = x.reshape(60, 6)
    variances = rows.var(0, ddof=1).sum()
    expected = ((0.5 * rows.mean(0) + 2.0) ** 2).sum() + 0.25 * variances
    assert metrics.frechet_distance(x, y) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_is_zero_on_itself_and_grows_with_noise(digits):
    train, _, test, _ = digits
    noise = np.random.default_rng(0).normal(size=test.shape)
    assert metrics.frechet_distance(test, test) < 1e-5
    levels = [metrics.frechet_distance(test + s * noise, train) for s in (0, 0.1, 0.2, 0.4, 0.8)]
    assert np.all(np.diff(levels) > 0)


# Kernel distance


def test_kernel_distance_is_the_sum_over_distinct_pairs(rng):
    x, y = rng.normal(size=(6, 4)), rng.normal(size=(5, 4)) + 0.5

    def k(a, b):
        return (sum(p * q for p, q in zip(a, b, strict=True)) / 4 + 1) ** 3

    def within(z):
        n = len(z)
        return sum(k(z[i], z[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))

    expected = within(x) + within(y) - 2 * np.mean([k(a, b) for a in x for b in y])
    assert metrics.kernel_distance(x, y) == pytest.approx(expected, rel=1e-10)


def test_kernel_distance_is_unbiased(rng):
    """Small sets of one distribution: the mean over many is zero within its standard error."""
    values = [metrics.kernel_distance(*rng.normal(size=(2, 10, 3))) for _ in range(2000)]
    mean, stderr = metrics.mean_and_stderr(np.asarray(values))
    assert abs(mean) < 3 * stderr
    assert stderr < 0.05


# Precision, recall, density, coverage


def test_prdc_by_hand():
    """k = 1: balls of the data are 0 ± 1, 1 ± 1, 10 ± 9; of the samples .5 ± 1.5, 2 ± 1.5, …"""
    real, fake = np.array([0.0, 1.0, 10.0]), np.array([0.5, 2.0, 21.0, 22.0])
    assert metrics.prdc(real, fake, k=1) == pytest.approx(
        # .5 lies in two balls, 2 in one (on the rim of another), 21 and 22 in none.
        {"precision": 2 / 4, "recall": 2 / 3, "density": 3 / 4, "coverage": 3 / 3}
    )


def test_prdc_tells_quality_from_diversity(rng):
    modes = np.array([[-5.0, 0.0], [5.0, 0.0]])
    real = modes[rng.integers(2, size=600)] + rng.normal(size=(600, 2))
    same = modes[rng.integers(2, size=600)] + rng.normal(size=(600, 2))
    dropped = modes[0] + rng.normal(size=(600, 2))
    stray = np.concatenate([same[:300], rng.uniform(-30, 30, size=(300, 2))])
    alike, missing, wrong = (metrics.prdc(real, fake) for fake in (same, dropped, stray))
    assert min(alike.values()) > 0.9
    assert alike["density"] == pytest.approx(1.0, abs=0.1)
    assert missing["precision"] > 0.9
    assert missing["recall"] == pytest.approx(0.5, abs=0.06)
    assert missing["coverage"] == pytest.approx(0.5, abs=0.06)
    assert wrong["precision"] == pytest.approx(0.5, abs=0.1)
    assert wrong["density"] == pytest.approx(0.5, abs=0.15)
    assert wrong["coverage"] > 0.8


# Nearest neighbours


def test_nearest_distances_match_a_tree_of_points(rng):
    x, reference = rng.normal(size=(30, 2, 2)), rng.normal(size=(40, 2, 2))
    expected = distance.cdist(x.reshape(30, 4), reference.reshape(40, 4)).min(1)
    np.testing.assert_allclose(metrics.nearest_distances(x, reference), expected, rtol=1e-10)


def test_memorisation_flags_copies_and_passes_fresh_data(digits, validation):
    train, _, test, _ = digits
    copies = train[:400] + 0.05 * np.random.default_rng(0).normal(size=train[:400].shape)
    good, bad = (metrics.memorisation(x, train, test) for x in (validation, copies))
    assert good["ks_p_value"] > 0.05
    assert good["nearer_p_value"] > 0.05
    assert good["flagged_share"] < 0.15
    assert bad["flagged_share"] > 0.95
    assert bad["nearer_p_value"] < 1e-6
    assert bad["samples_median"] < 0.5 < good["samples_median"]
    json.dumps(bad)


def test_memorisation_of_sixteen_images_is_flagged(digits):
    train, _, test, _ = digits
    rng = np.random.default_rng(0)
    samples = train[rng.integers(16, size=300)] + 0.2 * rng.normal(size=(300, 8, 8, 1))
    report = metrics.memorisation(samples, train[:16], test)
    assert report["flagged_share"] >= 0.9
    assert report["ks_p_value"] < 1e-6


def test_samples_that_are_merely_bad_are_not_called_copies(digits):
    train, _, test, _ = digits
    noise = np.random.default_rng(0).normal(size=test.shape)
    report = metrics.memorisation(noise, train, test)
    assert report["ks_p_value"] < 1e-6
    assert report["nearer_p_value"] > 0.99
    assert report["flagged_share"] == 0.0


def test_memorisation_leaves_each_training_image_out_of_its_own_neighbours():
    train, samples = np.array([0.0, 1.0, 3.0, 7.0]), np.array([0.5, 10.0])
    report = metrics.memorisation(samples, train, np.array([0.2, 5.0, 8.5]))
    assert report["train_median"] == pytest.approx(1.5)  # of 1, 1, 2, 4
    assert report["samples_median"] == pytest.approx(1.75)  # of 0.5, 3
    assert report["heldout_median"] == pytest.approx(1.5)  # of 0.2, 2, 1.5


# Principal components


def test_principal_components_are_white_over_the_training_set(rng):
    """Mahalanobis' distances, in as few directions as make up the share."""
    train = rng.normal(size=(500, 2, 3)) @ rng.normal(size=(3, 3)) + 5.0
    other = rng.normal(size=(7, 2, 3))
    found, moved = metrics.principal_components(train, other, share=1.0)
    np.testing.assert_allclose(found.mean(0), 0.0, atol=1e-10)
    np.testing.assert_allclose(np.cov(found.T), np.eye(6), atol=1e-9)
    flat = train.reshape(500, 6)
    precision = linalg.inv(np.cov(flat.T))
    expected = distance.cdist(other.reshape(7, 6), flat, "mahalanobis", VI=precision)
    np.testing.assert_allclose(distance.cdist(moved, found), expected, rtol=1e-8)
    # In another basis and other units they are the same.
    matrix = rng.normal(size=(3, 3))
    again, too = metrics.principal_components(train @ matrix, other @ matrix, share=1.0)
    np.testing.assert_allclose(distance.cdist(too, again), expected, rtol=1e-6)


def test_principal_components_keep_the_share_of_the_variance(rng):
    x = rng.normal(size=(4000, 4)) * np.sqrt([6.0, 2.0, 1.0, 1.0])
    for share, kept in ((0.5, 1), (0.7, 2), (0.85, 3), (0.95, 4), (1.0, 4)):
        assert metrics.principal_components(x, share=share)[0].shape == (4000, kept)
    (found,) = metrics.principal_components(x, share=0.7)
    for component, column in zip(found.T, x.T, strict=False):
        assert abs(np.corrcoef(component, column)[0, 1]) > 0.99


def test_principal_components_of_fewer_images_than_pixels(rng):
    """The same, by the smaller of two matrices; a constant pixel does no harm."""
    train, other = rng.normal(size=(6, 9)), rng.normal(size=(4, 9))
    train[:, 3], other[:, 3] = 1.0, 1.0
    found, moved = metrics.principal_components(train, other, share=1.0)
    assert found.shape == (6, 5)
    np.testing.assert_allclose(np.cov(found.T), np.eye(5), atol=1e-9)
    precision = np.linalg.pinv(np.cov(train.T))
    expected = distance.cdist(other, train, "mahalanobis", VI=precision)
    np.testing.assert_allclose(distance.cdist(moved, found), expected, rtol=1e-8)


def test_components_flag_more_of_the_copies_than_pixels(digits, validation):
    """B31: noisy or pale copies; fresh draws pass in both."""
    train, _, test, _ = digits
    rng = np.random.default_rng(0)
    noisy = train[:400] + 0.2 * rng.normal(size=train[:400].shape)
    pale = 0.8 * (train[:400] + 1.0) - 1.0
    seen, fresh, *copies = metrics.principal_components(train, test, noisy, pale)
    for pixels, features in zip((noisy, pale), copies, strict=True):
        by_pixels = metrics.memorisation(pixels, train, test)["flagged_share"]
        by_features = metrics.memorisation(features, seen, fresh)["flagged_share"]
        assert by_features > by_pixels + 0.1
    (_, good) = metrics.principal_components(train, validation)
    assert metrics.memorisation(good, seen, fresh)["ks_p_value"] > 0.05


# Bits per dimension


def test_uniform_density_costs_the_logarithm_of_the_levels():
    for dim, levels in ((64, 17), (3072, 256)):
        assert metrics.bits_per_dim(dim * math.log(2), dim, levels) == math.log2(levels)
        assert metrics.bits_per_dim(0.0, dim, levels, span=1.0) == math.log2(levels)
        assert metrics.bits_per_dim(dim * math.log(levels), dim, levels, span=float(levels)) == (
            pytest.approx(math.log2(levels), rel=1e-12)
        )


def test_a_density_constant_on_the_cells_costs_the_discrete_entropy(rng):
    """p(x) = P(level) · (levels/2)^D, so bits are −log₂ P(level) / D, exactly."""
    levels, dim = 17, 2
    mass = rng.dirichlet(np.ones(levels**dim))
    nll = -np.log(mass * (levels / 2) ** dim)
    expected = -np.log2(mass) / dim
    np.testing.assert_allclose(metrics.bits_per_dim(nll, dim, levels), expected, rtol=1e-12)
    traced = jax.jit(lambda values: metrics.bits_per_dim(values, dim, levels))(jnp.asarray(nll))
    np.testing.assert_allclose(traced, expected, rtol=1e-5)


def test_standard_error_of_the_mean():
    """1, 2, 3, 4: variance 5/3 with n − 1, over n = 4."""
    mean, stderr = metrics.mean_and_stderr(jnp.arange(1.0, 5.0))
    assert mean == 2.5
    assert stderr == pytest.approx(math.sqrt(5 / 12))


# Classifier


def test_coupling_recovers_a_distribution_from_its_pairs(rng):
    p = rng.dirichlet(np.ones(6), size=9)
    r = p[:, :, None] / (p[:, :, None] + p[:, None, :])
    r[:, range(6), range(6)] = 0.0
    np.testing.assert_allclose(_couple(r), p, atol=1e-10)


def test_coupling_minimises_the_disagreement_of_inconsistent_pairs(rng):
    r = np.triu(rng.uniform(0.05, 0.95, size=(4, 4)), 1)
    r = r + np.tril(1 - r.T, -1)

    def disagreement(p):
        return ((r.T * p[:, None] - r * p[None, :]) ** 2).sum()

    (p,) = _couple(r[None])
    assert p.sum() == pytest.approx(1.0)
    for _ in range(20):
        step = 1e-3 * rng.normal(size=4)
        assert disagreement(p + step - step.mean()) > disagreement(p)


def test_classifier_knows_digits_from_what_only_resembles_them(digits):
    train, labels, test, test_labels = digits
    rng = np.random.default_rng(0)
    flat = train.reshape(1000, -1)
    gaussian = rng.multivariate_normal(flat.mean(0), np.cov(flat.T), size=447)
    blends = (train[rng.permutation(1000)] + train[rng.permutation(1000)])[:447] / 2
    fakes = [rng.normal(size=(447, 64)), np.clip(gaussian, -1, 1), blends]
    images = np.concatenate([test, *(fake.reshape(-1, 8, 8, 1) for fake in fakes)])
    real = metrics.classify(train, labels, test)
    assert (real.labels == test_labels).mean() > 0.94
    assert real.confident_share > 0.6
    assert list(real.class_counts) == [str(digit) for digit in range(10)]
    assert sum(real.class_counts.values()) == len(test)
    both = metrics.classify(train, labels, images)
    np.testing.assert_array_equal(both.labels[:447], real.labels)
    # What is sure beyond the real digits is spread over the three fakes.
    sure_fakes = both.confident_share * len(images) - real.confident_share * len(test)
    assert sure_fakes / (3 * 447) < 0.2 * real.confident_share


def test_classifier_names_the_classes_that_it_was_given(rng):
    labels = np.repeat([3, 7, 8], 20)
    centres = {3: (-4.0, 0.0), 7: (4.0, 0.0), 8: (0.0, 6.0)}
    x = np.array([centres[label] for label in labels]) + rng.normal(size=(60, 2))
    asked = np.array([centres[7], centres[7], centres[3]])
    result = metrics.classify(x, labels, asked, confidence=0.5)
    assert result.labels.tolist() == [7, 7, 3]
    assert result.class_counts == {"3": 1, "7": 2, "8": 0}
    assert result.confident_share == 1.0
    assert metrics.classify(x, labels, asked, confidence=1.0).confident_share == 0.0


# Errors

X = np.zeros((20, 2)) + np.arange(20.0)[:, None]
BAD_NUMBERS = np.where(np.arange(40).reshape(20, 2) < 3, np.nan, 1.0)
LABELS = np.repeat([0, 1], 10)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.energy_distance(X, np.zeros((5, 3))), "one length.*'x': 2, 'y': 3"),
        (lambda: metrics.energy_distance(X, np.zeros((0, 2))), r"y must be \[n, ...\].*\(0, 2\)"),
        (lambda: metrics.energy_distance(BAD_NUMBERS, X), "x must be finite, 2 of its 20 rows"),
        (lambda: metrics.energy_null(jax.random.key(0), X, X, 21), "n must be between 1 and .*20"),
        (
            lambda: metrics.energy_null(jax.random.key(0), X, X, 5, repeats=0),
            "repeats must be >= 1",
        ),
        (lambda: metrics.frechet_distance(X, X[:1]), "y must have at least 2"),
        (lambda: metrics.kernel_distance(X[:1], X), "x must have at least 2"),
        (lambda: metrics.prdc(X, X[:5]), r"k must be between 1 and len\(fake\) - 1 = 4, got 5"),
        (lambda: metrics.prdc(X, X, k=0), "k must be between 1"),
        (lambda: metrics.memorisation(X, X, X, quantile=1.0), r"quantile must be in \(0, 1\)"),
        (lambda: metrics.memorisation(X, X[:1], X), "train must have at least 2"),
        (lambda: metrics.principal_components(X, share=0.0), r"share must be in \(0, 1\], got 0.0"),
        (lambda: metrics.principal_components(X[:1]), "members that differ, got 1"),
        (lambda: metrics.principal_components(0.0 * X), "members that differ, got 20"),
        (lambda: metrics.bits_per_dim(1.0, 0, 17), "dim must be >= 1, got 0"),
        (lambda: metrics.bits_per_dim(1.0, 2, 1), "levels must be >= 2, got 1"),
        (lambda: metrics.bits_per_dim(1.0, 2, 9, 0.0), "span must be > 0, got 0.0"),
        (lambda: metrics.mean_and_stderr(np.ones(1)), r"values must be \[n\] with n >= 2"),
        (lambda: metrics.mean_and_stderr(np.array([1.0, np.inf])), "values must be finite, 1 of"),
        (lambda: metrics.classify(X, LABELS[:5], X), r"train_labels must be \[20\]"),
        (lambda: metrics.classify(X, LABELS * 0, X), r">= 2 classes.*\{0: 20\}"),
        (lambda: metrics.classify(X, LABELS, X, confidence=0.0), r"confidence must be in \(0, 1\]"),
    ],
)
def test_bad_input_is_refused_in_one_line(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)
