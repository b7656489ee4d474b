"""Where in its cell a grey level lies: a conditional flow over the cells of an image.

    z = T(n; x),  n ~ N(0, I),      u = Φ(z) ∈ (0, 1)^D,

with the normal distribution function Φ and couplings T: each moves and scales half of the pixels,
in the pattern of a chessboard, by what a small convolutional network makes of the other half and of
the grey levels x. Then

    log q(u | x) = log N(n) − log |∂T/∂n| − Σ log φ(z).

At the start T is the identity and u uniform: dequantisation by uniform noise, log q = 0.

References: Ho et al. 2019, arXiv 1902.00275, section 3.1 (variational dequantisation by a flow);
Dinh et al. 2017, arXiv 1605.08803, section 3.4 (couplings in a chessboard).
"""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Float

from jaxdiff.networks import cpu
from jaxdiff.typing import Array

__all__ = ["Dequantizer"]

Image = Float[Array, "b h w c"]


class Dequantizer(nn.Module):
    """Noise and an image -> points u of its unit cells, and log q(u | x); uniform at the start.

    Args:
        width: channels of the couplings' networks.
        couplings: their number; two let every pixel see every other near it.
        largest: bound of a coupling's log-scale.
    """

    width: int = 32
    couplings: int = 4
    largest: float = 2.0

    @nn.compact
    def __call__(self, x: Image, noise: Image) -> tuple[Image, Float[Array, "b"]]:
        """Return u [b, h, w, c] in [0, 1] and log q(u | x) [b], for levels x scaled to [-1, 1]."""
        _, h, w, c = x.shape
        rows, columns = jnp.arange(h)[:, None], jnp.arange(w)[None, :]
        board = ((rows + columns) % 2)[None, :, :, None].astype(x.dtype)
        z, log_scale = noise, jnp.zeros_like(noise)
        for i in range(self.couplings):
            seen = board if i % 2 else 1.0 - board
            inputs = [x, seen * z, jnp.broadcast_to(seen, (*x.shape[:3], 1))]
            hidden = jnp.concatenate(inputs, axis=-1)
            for _ in range(2):
                hidden = nn.silu(cpu.Conv(self.width, (3, 3))(hidden))
            out = cpu.Conv(2 * c, (3, 3), kernel_init=nn.initializers.zeros)(hidden)
            scale, shift = jnp.split((1.0 - seen) * out, 2, axis=-1)
            scale = self.largest * jnp.tanh(scale / self.largest)
            z = z * jnp.exp(scale) + shift
            log_scale = log_scale + scale
        # log N(n) - log φ(z), whose constants cancel.
        log_q = 0.5 * (z**2 - noise**2) - log_scale
        return jax.scipy.stats.norm.cdf(z), jnp.sum(log_q, axis=(1, 2, 3))
