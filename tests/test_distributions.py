"""Normal against scipy, numerical integration and its own inverse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from jaxdiff.distributions import Distribution, GaussianDistribution, Normal

X = jnp.array([[0.3, -1.2, 0.7], [2.0, 0.1, -0.4]])
MEAN = jnp.array([[0.1, -0.2, 1.0], [1.0, 0.0, 0.5]])
STDS = [0.7, jnp.array([[0.5, 1.0, 2.0], [0.3, 0.9, 1.1]])]


@pytest.mark.parametrize("std", STDS)
def test_log_prob_is_that_of_scipy(std):
    expected = scipy.stats.norm.logpdf(X, MEAN, std).sum()
    np.testing.assert_allclose(Normal(MEAN, std).log_prob(X), expected, rtol=1e-6)


@pytest.mark.parametrize("std", STDS)
def test_score_is_the_gradient_of_the_log_density(std):
    normal = Normal(MEAN, std)
    np.testing.assert_allclose(normal.score(X), jax.grad(normal.log_prob)(X), rtol=1e-5)


@pytest.mark.parametrize("std", STDS)
def test_noise_inverts_from_noise(std):
    normal = Normal(MEAN, std)
    np.testing.assert_allclose(normal.from_noise(normal.noise(X)), X, rtol=1e-5)


def test_kl_is_the_integral_of_its_definition():
    p, q = Normal(jnp.array([0.3]), 0.6), Normal(jnp.array([-0.4]), 1.1)
    grid = np.linspace(-8.0, 8.0, 20001)
    log_p = scipy.stats.norm.logpdf(grid, 0.3, 0.6)
    log_q = scipy.stats.norm.logpdf(grid, -0.4, 1.1)
    expected = np.trapezoid(np.exp(log_p) * (log_p - log_q), grid)
    np.testing.assert_allclose(p.kl(q), expected, rtol=1e-5)
    assert p.kl(p) == 0.0
    # The sum runs over coordinates, whichever of the two carries the shape of the deviation.
    wide, narrow = Normal(MEAN, 1.1), Normal(MEAN, jnp.full_like(MEAN, 0.6))
    single = Normal(jnp.zeros(1), 0.6).kl(Normal(jnp.zeros(1), 1.1))
    np.testing.assert_allclose(narrow.kl(wide), 6 * single, rtol=1e-5)


def test_samples_have_the_stated_moments():
    keys = jax.random.split(jax.random.key(0), 100_000)
    x = jax.vmap(Normal(jnp.array([1.0, -2.0]), jnp.array([0.5, 2.0])).sample)(keys)
    np.testing.assert_allclose(x.mean(0), [1.0, -2.0], atol=4 * 2.0 / 316)
    np.testing.assert_allclose(x.std(0), [0.5, 2.0], rtol=4 / (2 * 100_000) ** 0.5)


def test_normal_is_what_the_protocols_ask_for():
    assert isinstance(Normal(X, 1.0), Distribution)
    assert isinstance(Normal(X, 1.0), GaussianDistribution)
