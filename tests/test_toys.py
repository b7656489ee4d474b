"""The toy densities and Gaussian mixtures against closed forms, quadrature and each other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, stats

from jaxdiff.data.mixture import GaussianMixture, gaussian_mixture, gmm5
from jaxdiff.data.toys import TOYS, pinwheel, two_spirals

NAMES = sorted(TOYS)
# The published table of the project: measured to a standard error of 0.004 nats.
ENTROPIES = {
    "8gaussians": 2.8307,
    "checkerboard": 3.4657,
    "moons": 2.3874,
    "swissroll": 2.6712,
    "pinwheel": 2.3178,
    "2spirals": 2.6436,
    "rings": 2.6256,
    "circles": 3.2610,
}
BOX, CELLS = 8.0, 320  # pixels of 0.05, less than the least standard deviation 0.08


@pytest.fixture(scope="module")
def grids():
    """Each density at the midpoints of a grid of [−8, 8]², [CELLS, CELLS] (x₁, x₂)."""
    middle = (np.arange(CELLS) + 0.5) * 2 * BOX / CELLS - BOX
    points = jnp.asarray(np.stack(np.meshgrid(middle, middle, indexing="ij"), -1), jnp.float32)

    def density(name):
        reach = {"2spirals": 4.1, "pinwheel": 9.0, "checkerboard": 6.0}.get(name, 5.2)
        # Beyond its reach a density is less than exp(−18) of its peak.
        near = np.array(jnp.linalg.norm(points, axis=-1) < reach).reshape(-1)
        log_p = np.full(near.size, -np.inf)
        inside = points.reshape(-1, 2)[near]
        values = jax.lax.map(TOYS[name].log_prob, inside, batch_size=4096)
        log_p[near] = np.asarray(values, float)
        return log_p.reshape(CELLS, CELLS)

    cache = {}
    return lambda name: cache.setdefault(name, density(name))


@pytest.fixture(scope="module")
def samples():
    cache = {}

    def draw(name, n=100_000):
        if name not in cache:
            cache[name] = np.asarray(jax.jit(TOYS[name].sample, static_argnums=1)(KEY, n), float)
        return cache[name]

    return draw


KEY = jax.random.key(11)
AREA = (2 * BOX / CELLS) ** 2


@pytest.mark.parametrize("name", NAMES)
def test_density_integrates_to_one_and_has_the_stated_entropy(name, grids):
    log_p = grids(name)
    mass = np.exp(log_p) * AREA
    assert mass.sum() == pytest.approx(1, abs=2e-4)
    entropy = -np.sum(mass[mass > 0] * log_p[mass > 0])
    assert TOYS[name].entropy == pytest.approx(entropy, abs=4e-4)
    assert TOYS[name].entropy == pytest.approx(ENTROPIES[name], abs=3 * 0.004)


@pytest.mark.parametrize("name", NAMES)
def test_samples_have_the_stated_entropy(name, samples):
    """−E log p over the sampler's own points: the sampler and the density are one law."""
    points = jnp.asarray(samples(name)[:20_000], jnp.float32)
    nll = -np.asarray(jax.jit(jax.vmap(TOYS[name].log_prob))(points), float)
    assert np.isfinite(nll).all()
    assert abs(nll.mean() - TOYS[name].entropy) <= 4 * nll.std() / len(nll) ** 0.5 + 5e-5


@pytest.mark.parametrize("name", NAMES)
def test_sample_counts_follow_the_density(name, grids, samples):
    """Pearson's χ² over coarse cells, each a whole number of the grid's pixels."""
    coarse = 40
    mass = (np.exp(grids(name)) * AREA).reshape(coarse, CELLS // coarse, coarse, -1).sum((1, 3))
    edges = np.linspace(-BOX, BOX, coarse + 1)
    points = samples(name)
    counts, *_ = np.histogram2d(points[:, 0], points[:, 1], bins=(edges, edges))
    expected = len(points) * mass
    full = expected > 20
    counts = np.append(counts[full], len(points) - counts[full].sum())
    expected = np.append(expected[full], len(points) - expected[full].sum())
    keep = expected > 5
    chi2 = np.sum((counts - expected)[keep] ** 2 / expected[keep])
    assert stats.chi2.sf(chi2, keep.sum() - 1) > 1e-3
    assert counts[~keep].sum() <= 30


@pytest.mark.parametrize("name", NAMES)
def test_a_sample_does_not_depend_on_how_many_are_drawn(name, samples):
    np.testing.assert_allclose(TOYS[name].sample(KEY, 3), samples(name)[:3], atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_log_prob_in_float64(name, samples):
    """Single precision loses no more than 1e-4 nats where the data are."""
    points = samples(name)[:500]
    single = jax.jit(jax.vmap(TOYS[name].log_prob))(jnp.asarray(points, jnp.float32))
    with jax.enable_x64(True):
        double = jax.jit(jax.vmap(TOYS[name].log_prob))(jnp.asarray(points))
        assert double.dtype == jnp.float64
    np.testing.assert_allclose(single, double, atol=1e-4)


def test_generators_have_the_moments_of_their_definitions(samples):
    """Second moments worked out by hand from each definition."""
    var = {name: samples(name).var(0).sum() for name in NAMES}
    radius = {name: (samples(name) ** 2).sum(1).mean() for name in NAMES}
    rel = pytest.approx
    assert radius["8gaussians"] == rel((16 + 2 * 0.25) / 1.414**2, rel=0.01)
    assert var["checkerboard"] == rel(2 * 8**2 / 12, rel=0.01)
    assert radius["rings"] == rel(0.75**2 * (1 + 4 + 9 + 16) / 4 + 2 * 0.08**2, rel=0.01)
    assert radius["circles"] == rel((9 + 2.25) / 2 + 2 * 0.24**2, rel=0.01)
    assert radius["pinwheel"] == rel(4 * (1 + 0.09 + 0.01), rel=0.01)
    low, high = 1.5 * np.pi, 4.5 * np.pi
    roll = (high**3 - low**3) / (3 * (high - low)) / 25 + 2 * 0.2**2
    assert radius["swissroll"] == rel(roll, rel=0.01)
    # E(1 − cos θ)² and the like over θ ~ U(0, π), both moons alike about the middle (½, ¼).
    moons = 4 * (1 + 0.25 + 1 / 16 - 2 * 0.25 * 2 / np.pi) + 2 * 0.2**2
    assert var["moons"] == rel(moons, rel=0.01)
    n = np.linspace(0, 3 * np.pi, 20001)
    weight = 2 * n / (3 * np.pi) ** 2
    cross = n * (np.sin(n) - np.cos(n)) * 0.25 * 2
    spirals = np.trapezoid(weight * (n**2 + cross + 2 * 0.25 / 3), n) / 9 + 2 * 0.1**2
    assert radius["2spirals"] == rel(spirals, rel=0.01)


def test_two_spirals_density_by_brute_force():
    """Against adaptive quadrature of the definition, the uniform box in closed form by scipy."""

    def density(x):
        def along(n):
            d = np.array([-n * np.cos(n), n * np.sin(n)]) / 3
            boxes = [
                6 * (stats.norm.cdf(y / 0.1) - stats.norm.cdf((y - 1 / 6) / 0.1)) for y in x - d
            ]
            return 2 * n / (3 * np.pi) ** 2 * np.prod(boxes)

        return integrate.quad(along, 0, 3 * np.pi, limit=500, epsabs=1e-12)[0]

    for x in np.array([[0.2, 0.1], [1.5, -1.0], [-2.0, 1.2], [0.0, 3.0]]):
        expected = np.log(0.5 * density(x) + 0.5 * density(-x))
        assert two_spirals.log_prob(jnp.asarray(x)) == pytest.approx(expected, abs=1e-4)
    assert jnp.isfinite(two_spirals.log_prob(jnp.array([8.0, -8.0])))


def test_pinwheel_density_counts_every_preimage():
    """A Monte-Carlo count in a small disc, far out where the map folds and several f lead to x."""
    rng = np.random.default_rng(0)
    f = rng.normal(size=(1_000_000, 2)) * [0.3, 0.1] + [1, 0]
    for r, angle in [(1.0, 0.3), (1.6, 1.0), (0.4, 0.2)]:
        centre = 2 * r * np.array([np.cos(angle), np.sin(angle)])
        turn = np.exp(f[:, 0]) / 4 + 2 * np.pi / 5 * rng.integers(0, 5, len(f))
        z = 2 * (f[:, 0] + 1j * f[:, 1]) * np.exp(1j * turn)
        count = (abs(z - complex(*centre)) < 0.06).sum()
        middle = np.linspace(-0.06, 0.06, 41)
        offsets = np.stack(np.meshgrid(middle, middle), -1).reshape(-1, 2)
        offsets = offsets[(offsets**2).sum(1) < 0.06**2]
        log_p = jax.vmap(pinwheel.log_prob)(jnp.asarray(centre + offsets, jnp.float32))
        expected = len(f) * np.pi * 0.06**2 * np.exp(np.asarray(log_p, float)).mean()
        assert abs(count - expected) < 4 * expected**0.5 + 0.01 * expected


# Gaussian mixtures

COVS = np.array([[[0.3, 0.1], [0.1, 0.2]], [[0.05, -0.02], [-0.02, 0.4]], [[0.1, 0], [0, 0.1]]])
MEANS = np.array([[1.0, -0.5], [-1.0, 0.3], [0.2, 1.4]])
WEIGHTS = np.array([0.5, 0.2, 0.3])
POINTS = jnp.array([[0.3, -0.2], [1.5, 0.9], [-2.0, 0.1], [0.0, 3.0]])


@pytest.fixture(scope="module")
def mixture():
    return gaussian_mixture(WEIGHTS, MEANS, COVS)


def test_mixture_log_prob_against_scipy(mixture):
    normals = [stats.multivariate_normal(m, c) for m, c in zip(MEANS, COVS, strict=True)]
    expected = np.log(sum(w * n.pdf(POINTS) for w, n in zip(WEIGHTS, normals, strict=True)))
    np.testing.assert_allclose(jax.vmap(mixture.log_prob)(POINTS), expected, rtol=2e-5)
    np.testing.assert_allclose(mixture.covs, COVS, atol=1e-6)


def test_mixture_score_is_the_gradient(mixture):
    gradient = jax.vmap(jax.grad(mixture.log_prob))(POINTS)
    np.testing.assert_allclose(jax.vmap(mixture.score)(POINTS), gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("alpha", "sigma"), [(0.8, 0.6), (0.1, 0.995), (1.0, 3.0)])
def test_mixture_denoise_is_tweedies_formula(mixture, alpha, sigma):
    """E[x₀|x] = (x + σ² ∇ log p_t)/α and Cov = σ²/α² (I + σ² ∇² log p_t)."""
    noisy = mixture.diffused(alpha, sigma)
    with jax.default_matmul_precision("highest"):
        mean, var = jax.vmap(lambda x: mixture.denoise(x, alpha, sigma))(POINTS)
        score = jax.vmap(jax.grad(noisy.log_prob))(POINTS)
        hessian = jax.vmap(jax.hessian(noisy.log_prob))(POINTS)
    np.testing.assert_allclose(mean, (POINTS + sigma**2 * score) / alpha, atol=5e-5 / alpha)
    diagonal = jnp.diagonal(hessian, axis1=1, axis2=2)
    expected = sigma**2 / alpha**2 * (1 + sigma**2 * diagonal)
    np.testing.assert_allclose(var, expected, atol=1e-5 / alpha**2)


def test_mixture_denoise_by_quadrature():
    weights, means, stds = [0.3, 0.7], [-1.0, 0.8], [0.1, 0.4]
    one_d = gaussian_mixture(weights, np.array(means)[:, None], stds)
    x0 = np.linspace(-4, 4, 200_001)
    prior = sum(w * stats.norm.pdf(x0, m, s) for w, m, s in zip(weights, means, stds, strict=True))
    for alpha, sigma, x in [(0.9, 0.3, -0.4), (0.5, 0.8, 1.0), (0.05, 1.0, 0.3)]:
        posterior = prior * stats.norm.pdf(x, alpha * x0, sigma)
        posterior /= posterior.sum()
        mean = (posterior * x0).sum()
        var = (posterior * (x0 - mean) ** 2).sum()
        got_mean, got_var = one_d.denoise(jnp.array([x]), alpha, sigma)
        assert float(got_mean[0]) == pytest.approx(mean, abs=2e-5)
        assert float(got_var[0]) == pytest.approx(var, abs=2e-5)


def test_mixture_denoise_at_both_ends(mixture):
    x = POINTS[1]
    mean, var = mixture.denoise(x, 0.9, 0.0)
    np.testing.assert_allclose(mean, x / 0.9, rtol=1e-5)
    np.testing.assert_allclose(var, 0, atol=1e-10)
    mean, var = mixture.denoise(x, 0.0, 1.0)
    prior_mean, prior_cov = mixture.moments()
    np.testing.assert_allclose(mean, prior_mean, atol=1e-6)
    np.testing.assert_allclose(var, jnp.diagonal(prior_cov), rtol=1e-5)
    np.testing.assert_allclose(prior_mean, WEIGHTS @ MEANS, atol=1e-6)


def test_mixture_sample_has_the_moments(mixture):
    n = 200_000
    points = np.asarray(jax.jit(mixture.sample, static_argnums=1)(KEY, n))
    mean, cov = mixture.moments()
    np.testing.assert_allclose(points.mean(0), mean, atol=4 * float(cov.max() / n) ** 0.5)
    np.testing.assert_allclose(np.cov(points.T), cov, atol=0.01)
    nll = -np.asarray(jax.vmap(mixture.log_prob)(jnp.asarray(points[:50_000])))
    # Entropy by quadrature, on an independent grid.
    middle = np.linspace(-6, 6, 601)
    grid = np.stack(np.meshgrid(middle, middle), -1)
    normals = [stats.multivariate_normal(m, c).pdf(grid) for m, c in zip(MEANS, COVS, strict=True)]
    p = np.tensordot(WEIGHTS, normals, 1)
    entropy = -(p * np.log(p + 1e-300)).sum() * 0.02**2
    assert abs(nll.mean() - entropy) < 4 * nll.std() / len(nll) ** 0.5
    np.testing.assert_allclose(mixture.sample(KEY, 2), points[:2], atol=1e-5)


def test_mixture_denoiser_follows_the_schedule(mixture):
    class Process:
        def schedule(self, t):
            return jnp.cos(t), jnp.sin(t)

    t = jnp.array(0.4)
    denoised = jax.jit(lambda x, t: mixture.denoiser(Process())(x, t))(POINTS, t)
    expected = jax.vmap(lambda x: mixture.denoise(x, jnp.cos(t), jnp.sin(t))[0])(POINTS)
    np.testing.assert_allclose(denoised.mean, expected, atol=1e-6)
    assert denoised.var == 0.0


def test_mixture_is_a_pytree_and_recompiles_for_nothing(mixture):
    traces = []

    @jax.jit
    def log_prob(m: GaussianMixture, x, alpha):
        traces.append(1)
        return m.diffused(alpha, 0.5).log_prob(x)

    log_prob(mixture, POINTS[0], 0.5)
    log_prob(mixture.diffused(0.3, 0.2), POINTS[1], 0.7)
    assert len(traces) == 1


def test_gmm5_is_five_unequal_separated_modes():
    m = gmm5()
    assert m.means.shape == (5, 2)
    assert float(m.weights.sum()) == pytest.approx(1)
    assert len(set(np.asarray(m.weights).tolist())) == 5
    np.testing.assert_allclose(m.covs, np.tile(0.04 * np.eye(2), (5, 1, 1)), atol=1e-7)
    gaps = np.linalg.norm(m.means[:, None] - m.means[None], axis=-1) + 9 * np.eye(5)
    assert gaps.min() >= 1.3
    assert abs(np.asarray(m.means)).max() <= 1.5


@pytest.mark.parametrize(
    ("weights", "means", "spread", "name"),
    [
        ([0.5, 0.6], [[0.0], [1.0]], 1.0, "weights"),
        ([1.5, -0.5], [[0.0], [1.0]], 1.0, "weights"),
        ([0.5, 0.5], [[0.0]], 1.0, "means"),
        ([1.0], [[0.0]], 0.0, "stds_or_covs"),
        ([1.0], [[0.0, 0.0]], [[[1.0, 2.0], [2.0, 1.0]]], "stds_or_covs"),
        ([1.0], [[0.0, 0.0]], [[[1.0, 0.5], [0.0, 1.0]]], "stds_or_covs"),
        ([1.0], [[0.0, 0.0]], [1.0, 2.0], "stds_or_covs"),
    ],
)
def test_gaussian_mixture_refuses(weights, means, spread, name):
    with pytest.raises(ValueError, match=name):
        gaussian_mixture(weights, means, spread)
