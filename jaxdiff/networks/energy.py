"""Networks that are gradients: an energy for every noise level, and its slope as the output.

The score of a density is a gradient, −∇E of an energy E = −log p + constant. A network that puts
out a vector is none in general: its Jacobian is not symmetric, and its work along a closed path not
zero. `Conservative` makes one of any network f by differentiating a scalar,

    F(x) = ∇ₓ Φ(x),     Φ(x) = ⟨x, f(x)⟩.

Nothing is lost by that Φ: every smooth function with Φ(0) = 0 is of this form (Hadamard's lemma),
and a gradient does not see the constant. Of the energies in use it asks least of f. One output that
is Φ itself wants another architecture; the squared norm ‖f‖² has no slope in its parameters where
f = 0, and there the networks of this library start; the squared residual ½‖x − f‖² of a denoising
autoencoder serves as well, and on a mixture in the plane, trained alike, came no nearer.

A parameterization reads F like any other network's output: x̂_0 = c_skip x + c_out F(c_in x). By
Tweedie's formula the score is then

    (α x̂_0 − x)/σ²  =  ∇ₓ [ (α c_out/c_in) Φ(c_in x) − ½ (1 − α c_skip) ‖x‖² ] / σ²,

a gradient whatever the coefficients. So the bracket over σ², `log_density`, is log p_t(x) but for
a constant of t; with `epsilon` it is −Φ(c_in x)/(c_in σ).

What is gained is a number: densities of two states can be compared, and added, steps of Markov
chains accepted or refused, and ratios of normalisers found by annealed importance sampling, with
the noise levels as temperatures. What it costs is a backward pass in every call of the network.

References: Salimans and Ho 2021, "Should EBMs model the energy or the score?", ICLR workshop on
    energy-based models (energies do as well as free scores, for networks of like structure); Du et
    al. 2023, arXiv:2302.11552 (what the energies are good for).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from jaxdiff.typing import Key, Params, Time

__all__ = ["Conservative", "log_density"]


@dataclasses.dataclass(frozen=True)
class Conservative:
    """The gradient ∇ₓ⟨x, f(x)⟩ of a potential: [b, ...] -> [b, ...], with symmetric Jacobian.

    Its `init` and `apply` are used like a module's, so losses, denoisers, samplers and likelihoods
    take it as it is. Its parameters are those of f, and may start from a free network's.

    Attributes:
        net: f(x [b, ...], noise_level [b], **condition) -> [b, ...], like x.
    """

    net: nn.Module

    def init(
        self, key: Key, x: Float[Array, "b ..."], noise_level: Float[Array, "b"], **condition: Any
    ) -> Params:
        """Return the variables of f."""
        return self.net.init(key, x, noise_level, **condition)

    def potential(
        self,
        params: Params,
        x: Float[Array, "b ..."],
        noise_level: Float[Array, "b"],
        **condition: Any,
    ) -> Float[Array, "b"]:
        """Return Φ(x) = ⟨x, f(x)⟩ [b]."""
        out: Any = self.net.apply(params, x, noise_level, **condition)
        return jnp.sum((x * out).reshape(x.shape[0], -1), axis=1)

    def apply(
        self,
        params: Params,
        x: Float[Array, "b ..."],
        noise_level: Float[Array, "b"],
        **condition: Any,
    ) -> Float[Array, "b ..."]:
        """Return ∇Φ(x) [b, ...], each example's own; `condition` may hold a module's `rngs`."""

        def total(x: Array) -> Array:
            return jnp.sum(self.potential(params, x, noise_level, **condition))

        return jax.grad(total)(x)


def log_density(
    network: Conservative,
    params: Params,
    process: Any,
    parameterization: Any,
    x: Float[Array, "b ..."],
    t: Time,
    **condition: Any,
) -> Float[Array, "b"]:
    """The model's log p_t(x) in nats, up to a constant that depends on t.

    Its gradient in x is the score of the denoiser that the network and the parameterization make.

    Args:
        network: the network.
        params: its variables.
        process: any scalar Gaussian process, with `schedule(t) -> (alpha, sigma)`.
        parameterization: what the network was trained to predict: any one that is affine in its
            output and in x, with scalar coefficients.
        x: states [b, ...] at t.
        t: time in (0, 1], with σ(t) > 0, and α(t) > 0 where the parameterization asks for it.
        **condition: further arrays [b, ...] for the network, such as `label`.

    Returns:
        Log-densities [b].
    """
    alpha, sigma = process.schedule(t)
    one, zero = jnp.ones_like(t), jnp.zeros_like(t)
    c_in, level = parameterization.inputs(process, one, t)
    c_skip = parameterization.denoised(process, zero, one, t).mean
    c_out = parameterization.denoised(process, one, zero, t).mean

    levels = jnp.full(x.shape[:1], level)
    potential = network.potential(params, c_in * x, levels, **condition)
    half_square = 0.5 * jnp.sum((x * x).reshape(x.shape[0], -1), axis=1)
    return (alpha * c_out / c_in * potential - (1.0 - alpha * c_skip) * half_square) / sigma**2
