"""A U-Net that keeps magnitudes: of activations, of weights, and so of what an update changes.

A network whose weights and activations grow in training has, for the same learning rate, ever
smaller relative updates. Here no layer can grow: every kernel is used with rows of norm 1, so that
what has variance 1 keeps it, and every other operation is scaled to keep it as well,

    silu(x) / 0.596,    (1 - t) a + t b, over √((1 - t)² + t²),    [a, b] with weights by t,

with no biases and no group norms. A block divides each pixel by its root mean square on the way
down, and multiplies by 1 + gain · (W c) where c is the conditioning vector and the gain starts at
zero, as does the gain of the output: at the start the whole network returns zero.

References: Karras et al. 2024, arXiv 2312.02696, sections 2 and B.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from jaxdiff.networks import cpu
from jaxdiff.networks.attention import attention
from jaxdiff.networks.unet import doubled, halved, widened
from jaxdiff.typing import Array

__all__ = ["EDM2", "MPConv", "forced_normalization", "mp_cat", "mp_silu", "mp_sum", "normalized"]

Image = Float[Array, "b h w c"]

EPSILON = 1e-4
SILU = 0.596
"""Root mean square of silu of a standard normal variable."""
CLIP = 256.0
"""Bound of the activations between blocks."""


def normalized(x: Array, axis: int | tuple[int, ...]) -> Array:
    """x over its root mean square along `axis`, in float32 at least."""
    wide = x.astype(widened(x.dtype))
    rms = jnp.sqrt(jnp.mean(jnp.square(wide), axis, keepdims=True))
    return (wide / (EPSILON + rms)).astype(x.dtype)


def mp_silu(x: Array) -> Array:
    """silu(x) / 0.596 (equation 81)."""
    return nn.silu(x) / SILU


def mp_sum(a: Array, b: Array, t: float) -> Array:
    """((1 - t) a + t b) / √((1 - t)² + t²), t in [0, 1] (equation 88)."""
    return ((1 - t) * a + t * b) / math.hypot(1 - t, t)


def mp_cat(a: Array, b: Array, t: float) -> Array:
    """[a, b] along the last axis, weighted as in `mp_sum` whatever their widths (equation 103)."""
    m, n = a.shape[-1], b.shape[-1]
    scale = math.sqrt(m + n) / math.hypot(1 - t, t)
    return jnp.concatenate([scale * (1 - t) / math.sqrt(m) * a, scale * t / math.sqrt(n) * b], -1)


class MPConv(nn.Module):
    """A convolution, or a product along the last axis, by a kernel of norm 1 for every output.

    Args:
        features: channels of the output.
        side: of the kernel; None for a product.
        dtype: of the computation; the kernel is normalised in float32.
    """

    features: int
    side: int | None = None
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array, gain: Array | float = 1.0) -> Array:
        """Return gain · (x * kernel)."""
        spatial = () if self.side is None else (self.side, self.side)
        shape = (*spatial, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.normal(1.0), shape, jnp.float32)
        kernel = normalized(kernel, tuple(range(len(shape) - 1)))
        kernel = (kernel * (gain / math.sqrt(math.prod(shape[:-1])))).astype(self.dtype)
        x = x.astype(self.dtype)
        return x @ kernel if self.side is None else cpu.convolve(x, kernel)


class _Waves(nn.Module):
    """√2 cos(f u + φ), with frequencies f ~ 2π N(0, 1) and phases φ ~ U(0, 2π), both frozen."""

    dim: int

    @nn.compact
    def __call__(self, noise_level: Float[Array, "b"]) -> Float[Array, "b dim"]:
        def init(key: Any, shape: tuple[int, ...], dtype: Any) -> Array:
            frequencies, phases = jax.random.split(key)
            turns = jax.random.normal(frequencies, shape[1:], dtype)
            return 2 * jnp.pi * jnp.stack([turns, jax.random.uniform(phases, shape[1:], dtype)])

        waves = self.param("waves", init, (2, self.dim), jnp.float32)
        frequencies, phases = jax.lax.stop_gradient(waves)
        angle = noise_level[:, None] * frequencies[None, :] + phases[None, :]
        return math.sqrt(2) * jnp.cos(angle)


class _Block(nn.Module):
    """x, c -> the sum of x and of a residual, and of that and of its attention."""

    net: "EDM2"
    channels: int
    down: bool
    attends: bool = False

    @nn.compact
    def __call__(self, x: Image, condition: Float[Array, "b d"]) -> Float[Array, "b h w c2"]:
        net = self.net
        conv = partial(MPConv, dtype=net.dtype)
        skipping = conv(self.channels, 1, name="skip")

        def skip(x: Image) -> Float[Array, "b h w c2"]:
            return x if x.shape[-1] == self.channels else skipping(x)

        if self.down:
            x = normalized(skip(x), -1)
        h = conv(self.channels, 3, name="conv_0")(mp_silu(x))
        gain = self.param("inject_gain", nn.initializers.zeros, (), jnp.float32)
        scale = 1 + conv(self.channels, name="inject")(condition, gain)
        h = mp_silu(h * scale[:, None, None, :])
        h = nn.Dropout(net.dropout)(h, deterministic=not self.has_rng("dropout"))
        h = conv(self.channels, 3, name="conv_1")(h)
        x = mp_sum(x if self.down else skip(x), h, net.residual_balance)
        if self.attends:
            b, height, width, c = x.shape
            pixels = x.reshape(b, height * width, c)

            def project(name: str) -> Float[Array, "b n heads d"]:
                y = conv(c, name=name)(pixels)
                return y.reshape(b, height * width, -1, net.head_width)

            query, key, value = (normalized(project(n), -1) for n in ("query", "key", "value"))
            mixed = attention(query, key, value, flash=net.flash).reshape(pixels.shape)
            attended = conv(c, name="out")(mixed).reshape(x.shape)
            x = mp_sum(x, attended, net.attention_balance)
        return jnp.clip(x, -CLIP, CLIP)


class EDM2(nn.Module):
    """EDM2's U-Net: images [b, h, w, c] -> images of the same sides, in float32.

    The noise level is log(σ) / 4, as under `parameterizations.edm`. The sizes of the paper differ
    in `width`: 128 (XS), 192 (S), 256 (M), 320 (L), 384 (XL), 448 (XXL).

    Args:
        width: channels of the first level.
        multipliers: channels of each level over `width`; each level halves the side.
        blocks: residual blocks a level on the way down; one more on the way up.
        attention: sides (the longer one, in pixels) of the levels that attend; the middle always
            does.
        head_width: channels of an attention head; must divide those of the levels that attend.
        dropout: rate in [0, 1) inside the residual blocks.
        num_classes: number of classes k, or None. Label k, or no label, is the null label.
        class_balance: t of the sum of noise level and class.
        skip_balance: t of the joining with what the way down had computed.
        residual_balance: t of the sum of a block's input and its residual.
        attention_balance: t of the sum with the attention.
        dtype: of the computation; parameters, norms, softmax and the output stay in float32.
        out_channels: channels of the output; None for as many as the input has.
        remat: keep only what passes between blocks for the gradient, and compute their inside
            again: less memory for about a third more time.
        flash: attention by cuDNN's flash kernel where JAX runs on an NVIDIA GPU; `dtype` must then
            be bfloat16 or float16. It has no forward mode, so for a likelihood take
            `net.clone(flash=False)`, whose parameters are the same.

    Raises:
        ValueError: if a level has a side of less than 2 pixels or an odd one above it, if
            `head_width` does not divide the channels, or if a label is given to a network without
            classes.

    Note:
        In training the kernels' own norms, of which the output does not depend, grow, and what an
        update turns them by shrinks. The paper resets them after each update: chain
        `forced_normalization()` behind the optimizer.

    References: Karras et al. 2024, arXiv 2312.02696, configuration G, figure 21 and table 5.
    """

    width: int = 192
    multipliers: tuple[int, ...] = (1, 2, 3, 4)
    blocks: int = 3
    attention: tuple[int, ...] = (16, 8)
    head_width: int = 64
    dropout: float = 0.0
    num_classes: int | None = None
    class_balance: float = 0.5
    skip_balance: float = 0.5
    residual_balance: float = 0.3
    attention_balance: float = 0.3
    dtype: DTypeLike = jnp.float32
    out_channels: int | None = None
    remat: bool = False
    flash: bool = False

    @nn.compact
    def __call__(
        self, x: Image, noise_level: Float[Array, "b"], label: Int[Array, "b"] | None = None
    ) -> Float[Array, "b h w c2"]:
        """Return the network's output [b, h, w, c2]; no label means the null label."""
        self._check(x, label)
        channels = [m * self.width for m in self.multipliers]
        c = MPConv(max(channels), name="noise")(_Waves(channels[0], name="embedding")(noise_level))
        if self.num_classes is not None:
            # Of the null label all are zero.
            null = jnp.full(noise_level.shape, self.num_classes)
            one_hot = jax.nn.one_hot(null if label is None else label, self.num_classes)
            told = MPConv(max(channels), name="label")(math.sqrt(self.num_classes) * one_hot)
            c = mp_sum(c, told, self.class_balance)
        c = mp_silu(c).astype(self.dtype)

        def block(n: int, down: bool, name: str, h: Image, attends: bool = False) -> Array:
            kind = nn.remat(_Block) if self.remat else _Block
            return kind(self.clone(parent=None), n, down, attends, name=name)(h, c)

        def attends(h: Image) -> bool:
            return max(h.shape[1:3]) in self.attention

        h = jnp.concatenate([x, jnp.ones_like(x[..., :1])], axis=-1)  # In place of biases.
        h = MPConv(channels[0], 3, self.dtype, name="in")(h)
        skips = [h]
        for level, n in enumerate(channels):
            if level > 0:
                h = block(h.shape[-1], True, f"down_{level}", halved(h))
                skips.append(h)
            for i in range(self.blocks):
                h = block(n, True, f"down_{level}_block_{i}", h, attends(h))
                skips.append(h)
        h = block(channels[-1], False, "middle_block_0", h, True)
        h = block(channels[-1], False, "middle_block_1", h)
        for level, n in reversed(list(enumerate(channels))):
            for i in range(self.blocks + 1):
                h = mp_cat(h, skips.pop(), self.skip_balance)
                h = block(n, False, f"up_{level}_block_{i}", h, attends(h))
            if level > 0:
                wide = doubled(h, skips[-1].shape[1:3])
                h = block(n, False, f"up_{level}", wide)
        gain = self.param("out_gain", nn.initializers.zeros, (), jnp.float32)
        features = x.shape[-1] if self.out_channels is None else self.out_channels
        return MPConv(features, 3, widened(self.dtype), name="out")(h, gain)

    def _check(self, x: Array, label: Array | None) -> None:
        if label is not None and self.num_classes is None:
            raise ValueError("label must be None for a network whose num_classes is None")
        smallest = 2 ** (len(self.multipliers) - 1)
        if x.ndim != 4 or any(side % smallest or side < 2 * smallest for side in x.shape[1:3]):
            raise ValueError(
                f"x must be images [b, h, w, c] of sides that {smallest} divides, at least "
                f"{2 * smallest}, got shape {x.shape}"
            )
        if any(m * self.width % self.head_width for m in self.multipliers):
            raise ValueError(
                f"head_width must divide the channels of every level, {self.width} × "
                f"{self.multipliers}, got {self.head_width}"
            )


def forced_normalization() -> optax.GradientTransformation:
    """Resets every kernel's outputs to root mean square 1 after an update (section 2.3).

    Chained last: u -> normalized(p + u) - p for each kernel p of `MPConv`; other updates pass.
    """

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        if params is None:
            raise ValueError("params must be given to update, as to optax.adamw")

        def forced(path: Any, update: Array, p: Array) -> Array:
            if getattr(path[-1], "key", None) != "kernel":
                return update
            return normalized(p + update, tuple(range(p.ndim - 1))) - p

        return jax.tree_util.tree_map_with_path(forced, updates, params), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
