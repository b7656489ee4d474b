"""Gaussian mixtures: the data whose every diffusion quantity is known in closed form.

If x_0 ~ Σ_k w_k N(m_k, Σ_k) and x_t = alpha x_0 + sigma ε, then x_t is again a mixture, with means
alpha m_k and covariances alpha² Σ_k + sigma² I, and given x_t each component is Gaussian once more.
So the score, the denoiser E[x_0 | x_t] and its variance are exact, which makes this file the oracle
against which samplers, solvers and likelihoods are tested.

The covariances are kept as Σ_k = U_k diag(λ_k) U_kᵀ. Diffusion leaves U_k alone, so that every time
t costs no factorisation and no inverse, and a point mass (λ = 0) needs no special case.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import logsumexp
from jaxtyping import Array, Float

from jaxdiff import struct
from jaxdiff.processes.base import Denoised, example_keys
from jaxdiff.typing import Key, Scalar, Time

__all__ = ["GaussianMixture", "MixtureDenoiser", "gaussian_mixture", "gmm5"]

if TYPE_CHECKING:
    Leaf = Array
else:
    # Like `Scalar`: a field of a pytree also holds what JAX puts there while it rebuilds it.
    Leaf = Any


Numbers = Sequence[Any] | np.ndarray | Array


@struct.dataclass
class GaussianMixture:
    """The density Σ_k w_k N(x; m_k, U_k diag(λ_k) U_kᵀ); make it with `gaussian_mixture`.

    All methods but `sample` and `moments` work on one point [d]: `jax.vmap` maps them.

    Attributes:
        weights: w, shape [k], positive, summing to 1.
        means: m, shape [k, d].
        variances: λ, eigenvalues of the covariances, shape [k, d], >= 0.
        axes: U, eigenvectors of the covariances in columns, shape [k, d, d].
    """

    weights: Leaf
    means: Leaf
    variances: Leaf
    axes: Leaf

    @property
    def covs(self) -> Float[Array, "k d d"]:
        """The covariances U diag(λ) Uᵀ."""
        return jnp.einsum("kij,kj,klj->kil", self.axes, self.variances, self.axes)

    def sample(self, key: Key, n: int) -> Float[Array, "n d"]:
        """Draw n points; point i depends on the key and i alone, not on n."""

        def draw(key: Key) -> Array:
            key_component, key_noise = jax.random.split(key)
            k = jax.random.categorical(key_component, jnp.log(self.weights))
            noise = jax.random.normal(key_noise, self.means.shape[1:], self.means.dtype)
            return self.means[k] + self.axes[k] @ (jnp.sqrt(self.variances[k]) * noise)

        return jax.vmap(draw)(example_keys(key, n))

    def log_prob(self, x: Float[Array, "d"]) -> Float[Array, ""]:
        """The exact log-density at x, in nats."""
        return logsumexp(self._log_joint(x))

    def score(self, x: Float[Array, "d"]) -> Float[Array, "d"]:
        """The exact score ∇ log p(x) = Σ_k r_k(x) Σ_k⁻¹ (m_k − x)."""
        pulls = -self._back(self._coordinates(x) / self.variances)
        return jax.nn.softmax(self._log_joint(x)) @ pulls

    def diffused(self, alpha: Scalar, sigma: Scalar) -> "GaussianMixture":
        """The mixture of x_t = alpha x_0 + sigma ε, ε ~ N(0, I)."""
        variances = alpha**2 * self.variances + sigma**2
        return GaussianMixture(self.weights, alpha * self.means, variances, self.axes)

    def denoise(
        self, x: Float[Array, "d"], alpha: Scalar, sigma: Scalar
    ) -> tuple[Float[Array, "d"], Float[Array, "d"]]:
        """The mean and the marginal variances of p(x_0 | x_t = x), exactly.

        Component k has the Kalman posterior with gain alpha Σ_k (alpha² Σ_k + sigma² I)⁻¹; the law
        of total variance joins them. No term divides by alpha or by sigma, so the ends are exact:
        sigma = 0 gives (x / alpha, 0), and alpha = 0 gives the moments of the prior.

        Args:
            x: a noisy point x_t.
            alpha: scale of the data in x_t, >= 0.
            sigma: standard deviation of the noise in x_t, >= 0, not 0 together with alpha (nor
                with an eigenvalue λ of a covariance).

        Returns:
            E[x_0 | x_t] and the diagonal of Cov[x_0 | x_t], each of shape [d].
        """
        noisy = self.diffused(alpha, sigma)
        gain = alpha * self.variances / noisy.variances
        means = self.means + self._back(gain * noisy._coordinates(x))
        variances = jnp.einsum(
            "kij,kj->ki", self.axes**2, self.variances * sigma**2 / noisy.variances
        )
        weights = jax.nn.softmax(noisy._log_joint(x))
        mean = weights @ means
        return mean, weights @ (variances + (means - mean[None]) ** 2)

    def denoiser(self, process: Any) -> "MixtureDenoiser":
        """The exact denoiser of this data under a process with a `.schedule`."""
        return MixtureDenoiser(self, process)

    def moments(self) -> tuple[Float[Array, "d"], Float[Array, "d d"]]:
        """The mean and the covariance of the whole mixture."""
        mean = self.weights @ self.means
        centred = self.means - mean[None]
        spread = self.covs + centred[:, :, None] * centred[:, None, :]
        return mean, jnp.tensordot(self.weights, spread, 1)

    def _coordinates(self, x: Array) -> Array:
        """x in each component's own axes, U_kᵀ (x − m_k), shape [k, d]."""
        return jnp.einsum("kij,ki->kj", self.axes, x[None] - self.means)

    def _back(self, coordinates: Array) -> Array:
        """Vectors of the components' own axes in those of the data, U_k y_k."""
        return jnp.einsum("kij,kj->ki", self.axes, coordinates)

    def _log_joint(self, x: Array) -> Array:
        """log w_k + log N(x; m_k, Σ_k), shape [k]."""
        squares = self._coordinates(x) ** 2 / self.variances
        log_normals = -0.5 * jnp.sum(squares + jnp.log(2 * jnp.pi * self.variances), axis=1)
        return jnp.log(self.weights) + log_normals


@struct.dataclass
class MixtureDenoiser:
    """`Denoiser` of a Gaussian mixture: a perfectly trained network, for tests and pictures.

    Attributes:
        mixture: the law of x_0.
        process: any process with `schedule(t) -> (alpha, sigma)`.
    """

    mixture: GaussianMixture
    process: Any

    def __call__(self, x: Float[Array, "b d"], t: Time) -> Denoised:
        """E[x_0 | x_t = x] for a batch of points at one time."""
        alpha, sigma = self.process.schedule(t)
        return Denoised(jax.vmap(lambda x: self.mixture.denoise(x, alpha, sigma)[0])(x))


def gaussian_mixture(
    weights: Numbers, means: Numbers, stds_or_covs: Numbers | float
) -> GaussianMixture:
    """Make a `GaussianMixture` from weights, means, and standard deviations or covariances.

    Args:
        weights: one positive number for each of the k components, summing to 1.
        means: shape [k, d].
        stds_or_covs: standard deviations > 0, one for all or one a component (shape [] or [k]), or
            symmetric positive definite covariances (shape [k, d, d]).

    Raises:
        ValueError: if a shape or a value is out of range.
    """
    weights_, means_ = np.asarray(weights, float), np.asarray(means, float)
    spread = np.asarray(stds_or_covs, float)
    if weights_.ndim != 1 or not (weights_ > 0).all() or abs(weights_.sum() - 1) > 1e-6:
        raise ValueError(f"weights = {weights_.tolist()}: need positive numbers that sum to 1")
    k = len(weights_)
    if means_.ndim != 2 or len(means_) != k or not np.isfinite(means_).all():
        raise ValueError(f"means has shape {means_.shape}: need finite numbers of shape [{k}, d]")
    d = means_.shape[1]
    if spread.shape in ((), (k,)):
        if not (np.isfinite(spread) & (spread > 0)).all():
            raise ValueError(f"stds_or_covs = {spread.tolist()}: standard deviations must be > 0")
        covs = np.broadcast_to(spread**2, (k,))[:, None, None] * np.eye(d)
    elif spread.shape == (k, d, d):
        covs = spread
    else:
        raise ValueError(
            f"stds_or_covs has shape {spread.shape}: need [], [{k}] (standard deviations) or "
            f"[{k}, {d}, {d}] (covariances)"
        )
    if not np.allclose(covs, covs.swapaxes(1, 2)):
        raise ValueError("stds_or_covs: the covariances must be symmetric")
    variances, axes = np.linalg.eigh(covs)
    if not (variances > 0).all():
        raise ValueError(
            f"stds_or_covs: the covariances must be positive definite; least eigenvalue "
            f"{variances.min():.3g}"
        )
    return GaussianMixture(*map(jnp.asarray, (weights_, means_, variances, axes)))


def gmm5() -> GaussianMixture:
    """The house's test bed: five unequal modes of the plane, each with standard deviation 0.2.

    The centres lie at least 1.3 apart, more than six standard deviations, so that modes can be told
    apart and a sampler's component weights and within-mode deviation measured.
    """
    return gaussian_mixture(
        weights=[0.10, 0.15, 0.20, 0.25, 0.30],
        means=[[0.0, 0.0], [1.3, 0.4], [-0.5, 1.3], [-1.3, -0.3], [0.4, -1.3]],
        stds_or_covs=0.2,
    )
