"""A U-Net for images: the architectures of the papers, for any even side of at least 8.

An image passes down through levels of halved side, through the middle, and up again; on its way up
each block is also given what its twin on the way down had computed. A block is

    h = conv(dropout(silu(norm(conv(resample(silu(norm(x)))) + W c))),    x <- (skip(x) + h) / √2

where c is the conditioning vector of noise level and class and the last convolution starts at zero:
at the start a block is its skip connection over √2, and the whole network returns zero. A level of
odd side n is padded with its own edge to n + 1 before it is halved and cropped back to n after it
was doubled, so 10 -> 5 -> 3 -> 5 -> 10.

The papers' networks are this one with the sizes of the run (`UNet`) and a few habits (`Variant`):

    DDPM     sides change by convolutions of stride 2, attention after every block, no √2
    DDPMPP   sides change inside residual blocks, by averages and repetition (the default)
    NCSNPP   as DDPMPP, by a smooth filter; the image itself runs down beside the network
    ADM      as DDPMPP without √2 and with attention after every block; usually scale and shift
    VDM      one level, no √2

References: Ho et al. 2020, arXiv 2006.11239, appendix B; Song et al. 2021, arXiv 2011.13456,
appendix H; Dhariwal and Nichol 2021, arXiv 2105.05233, section 3; Kingma et al. 2021, arXiv
2107.00630, appendix B; Brock et al. 2019, arXiv 1809.11096 (resampling inside blocks); Zhang 2019,
arXiv 1904.11486 (the filter).
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from jaxdiff.networks import cpu
from jaxdiff.networks.attention import attention
from jaxdiff.networks.embeddings import Conditioning, SmoothFeatures
from jaxdiff.typing import Array

__all__ = [
    "ADM",
    "DDPM",
    "DDPMPP",
    "NCSNPP",
    "VDM",
    "Attention",
    "Norm",
    "ResBlock",
    "UNet",
    "Variant",
    "doubled",
    "halved",
    "widened",
]

Image = Float[Array, "b h w c"]

_zeros = nn.initializers.zeros


class Variant(NamedTuple):
    """The habits in which the published U-Nets differ, beside their sizes."""

    rescale: bool = True
    """Divide by √2 wherever two branches are added."""
    strided: bool = False
    """Change sides by a convolution of its own, else inside a residual block."""
    padding: tuple[int, int] = (0, 1)
    """Of the strided convolution: zeros before and after the image."""
    smooth: bool = False
    """Filter with [1, 3, 3, 1] when sides change, else average and repeat pixels."""
    project: bool = True
    """A convolution on the skip of every block that changes sides, not only the channels."""
    image_in: Literal["residual", "skip"] | None = None
    """How the image itself runs down beside the network: convolved at each level and added to the
    state, which goes on in its place (residual), or only filtered, and shown to each level (skip).
    """
    image_out: bool = False
    """Whether each level adds its own image to the output, else the last alone gives it."""
    attend_each: bool = False
    """On the way up, attend after every block, else after the last of a level."""
    bias: bool = True
    """Whether the conditioning is injected with a bias."""
    class_first: bool = False
    """Add the class to the embedding of the noise level, before the layers that read it."""
    groups: int | None = None
    """Of the norms; None for the greatest number up to 32 and a quarter of the channels."""
    epsilon: float = 1e-6
    """Added to the variance in a norm."""


DDPM = Variant(rescale=False, strided=True, attend_each=True)
DDPMPP = Variant()
NCSNPP = Variant(smooth=True, image_in="residual")
ADM = Variant(rescale=False, project=False, attend_each=True, epsilon=1e-5)
VDM = Variant(rescale=False, bias=False)


def widened(dtype: DTypeLike) -> DTypeLike:
    """At least float32: statistics, softmax and output must not suffer from narrow computation."""
    return jnp.promote_types(jnp.float32, dtype)


def _even(x: Image) -> Float[Array, "b h2 w2 c"]:
    _, h, w, _ = x.shape
    if h % 2 == w % 2 == 0:
        return x
    return jnp.pad(x, ((0, 0), (0, h % 2), (0, w % 2), (0, 0)), mode="edge")


def _filtered(x: Image, padding: int, stride: int) -> Float[Array, "b h2 w2 c"]:
    """Convolved with [1, 3, 3, 1] / 8 along either side, with zeros around."""
    for axis in (1, 2):
        pads = [(padding, padding) if i == axis else (0, 0) for i in range(4)]
        padded = jnp.pad(x, pads)
        end = padded.shape[axis] - 3
        taps = (
            weight * jax.lax.slice_in_dim(padded, start, start + end, stride, axis)
            for start, weight in enumerate((0.125, 0.375, 0.375, 0.125))
        )
        x = sum(taps, start=jnp.zeros((), x.dtype))
    return x


def halved(x: Image, smooth: bool = False) -> Float[Array, "b h2 w2 c"]:
    """Means of 2 × 2 pixels, or every other one after the filter (smooth); odd sides are padded."""
    x = _even(x)
    if smooth:
        return _filtered(x, padding=1, stride=2)
    b, h, w, c = x.shape
    return x.reshape(b, h // 2, 2, w // 2, 2, c).mean((2, 4))


def doubled(x: Image, shape: tuple[int, ...], smooth: bool = False) -> Float[Array, "b h2 w2 c"]:
    """Pixels repeated, or interpolated (smooth), to twice the sides; cropped to `shape`."""
    for axis in (1, 2):
        size = x.shape[axis]
        first = second = x
        if smooth:
            pads = [(1, 1) if i == axis else (0, 0) for i in range(4)]
            padded = jnp.pad(x, pads)
            before, after = (
                jax.lax.slice_in_dim(padded, start, start + size, axis=axis) for start in (0, 2)
            )
            first, second = 0.25 * before + 0.75 * x, 0.75 * x + 0.25 * after
        doubled = [2 * n if i == axis else n for i, n in enumerate(x.shape)]
        x = jnp.stack([first, second], axis=axis + 1).reshape(doubled)
    return x[:, : shape[0], : shape[1]]


def _groups(channels: int) -> int:
    return max(g for g in range(1, max(channels // 4, 1) + 1) if g <= 32 and channels % g == 0)


class Norm(nn.Module):
    """Group normalisation, adapted per example if `scale` and `shift` are given.

    (1 + scale) (gain (x - mean) / std + offset) + shift, in one pass over x for the statistics
    (sums of x and of x², in float32) and one for the result.
    """

    variant: Variant
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self,
        x: Image,
        scale: Float[Array, "b c"] | None = None,
        shift: Float[Array, "b c"] | None = None,
    ) -> Image:
        """Return the normalised image."""
        b, h, w, c = x.shape
        groups = _groups(c) if self.variant.groups is None else self.variant.groups
        wide = x.astype(widened(self.dtype))

        def group_mean(total: Float[Array, "b c"]) -> Float[Array, "b c"]:
            mean = total.reshape(b, groups, -1).sum(-1) / (h * w * c // groups)
            return jnp.repeat(mean, c // groups, axis=1)

        mean = group_mean(wide.sum((1, 2)))
        var = group_mean(jnp.square(wide).sum((1, 2))) - jnp.square(mean)
        gain = self.param("scale", nn.initializers.ones, (c,), jnp.float32)[None, :]
        gain = gain * jax.lax.rsqrt(jnp.maximum(var, 0.0) + self.variant.epsilon)
        offset = self.param("bias", nn.initializers.zeros, (c,), jnp.float32)[None, :] - gain * mean
        if scale is not None:
            gain, offset = gain * (1 + scale), offset * (1 + scale)
        if shift is not None:
            offset = offset + shift
        return (wide * gain[:, None, None, :] + offset[:, None, None, :]).astype(self.dtype)


def _add(x: Image, h: Image, variant: Variant) -> Image:
    return (x + h) / math.sqrt(2) if variant.rescale else x + h


class ResBlock(nn.Module):
    """x, c -> (skip(x) + h(x, c)) / √2; without a conditioning vector c, of x alone."""

    channels: int
    dropout: float
    scale_shift: bool
    variant: Variant
    dtype: DTypeLike
    resample: Callable[[Array], Array] | None = None

    @nn.compact
    def __call__(
        self, x: Image, condition: Float[Array, "b d"] | None = None
    ) -> Float[Array, "b h2 w2 c2"]:
        """Return the block's image."""
        x = cpu.once(x)
        conv = partial(cpu.Conv, self.channels, dtype=self.dtype)
        norm = partial(Norm, self.variant, self.dtype)
        h = nn.silu(norm(name="norm_0")(x))
        if self.resample is not None:
            h, x = self.resample(h), self.resample(x)
        h = conv((3, 3), name="conv_0")(h)
        scale = shift = None
        if condition is not None:
            inject = nn.Dense(
                (1 + self.scale_shift) * self.channels,
                use_bias=self.variant.bias,
                dtype=self.dtype,
                name="inject",
            )
            if self.scale_shift:
                scale, shift = jnp.split(inject(condition), 2, axis=-1)
            else:
                h = h + inject(condition)[:, None, None, :]
        h = norm(name="norm_1")(h, scale, shift)
        h = nn.Dropout(self.dropout)(nn.silu(h), deterministic=not self.has_rng("dropout"))
        h = conv((3, 3), kernel_init=_zeros, name="conv_1")(h)
        project = self.resample is not None and self.variant.project
        if project or x.shape[-1] != self.channels:
            x = conv((1, 1), name="skip")(x)
        return _add(x, h, self.variant)


class Attention(nn.Module):
    """x -> (x + W softmax(Q Kᵀ / √d) V) / √2 over the pixels of an image."""

    head_width: int | None
    variant: Variant
    dtype: DTypeLike
    heads: int = 1
    flash: bool = False

    @nn.compact
    def __call__(self, x: Image) -> Image:
        """Return the image, its pixels having attended to one another."""
        x = cpu.once(x)
        b, h, w, c = x.shape
        d = self.head_width or c // self.heads
        # Pixels as rows of one matrix: the gradient of a product with two leading axes is slow on
        # a CPU.
        pixels = Norm(self.variant, self.dtype, name="norm")(x).reshape(b * h * w, c)

        def project(name: str) -> Float[Array, "b n heads d"]:
            y = nn.Dense(c, dtype=self.dtype, name=name)(pixels)
            return y.reshape(b, h * w, c // d, d)

        query, key, value = project("query"), project("key"), project("value")
        mixed = attention(query, key, value, flash=self.flash)
        out = nn.Dense(c, kernel_init=_zeros, dtype=self.dtype, name="out")
        return _add(x, out(mixed.reshape(b * h * w, c)).reshape(x.shape), self.variant)


Stage = Sequence[nn.Module]
"""A block and, where the level attends, the attention after it."""


def _through(
    stage: Sequence[Callable[..., Any]],
    h: Image,
    skip: Float[Array, "b h w c2"] | None,
    condition: Float[Array, "b d"],
) -> Float[Array, "b h w c3"]:
    """h after a stage; its block is also given what its twin on the way down had computed."""
    block, *attention = stage
    h = block(h if skip is None else jnp.concatenate([h, skip], axis=-1), condition)
    for attend in attention:
        h = attend(h)
    return h


def _in_turn(
    stages: Sequence[Stage], h: Image, skips: Sequence[Array | None], condition: Array
) -> list[Array]:
    """h after each of several stages."""
    images = []
    for stage, skip in zip(stages, skips, strict=True):
        h = _through(stage, h, skip, condition)
        images.append(h)
    return images


def _stacked(trees: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


class UNet(nn.Module):
    """A U-Net: images [b, h, w, c] -> images of the same sides, in float32.

    With `UNet(128, (1, 2, 2, 2), 4, attention=(16,), embedding=Sinusoidal(128))` and 32 × 32 × 3
    images it has the 61,804,419 parameters of the published DDPM++.

    Args:
        width: channels of the first level.
        multipliers: channels of each level over `width`; each level halves the side.
        blocks: residual blocks a level on the way down; one more on the way up.
        attention: sides (the longer one, in pixels) of the levels that attend; the middle always
            does.
        head_width: channels of an attention head; must divide those of the levels that attend.
            None for `heads` heads at every level.
        heads: attention heads where their width is not given.
        dropout: rate in [0, 1) inside the residual blocks.
        embedding: noise_level [b] -> features [b, n].
        scale_shift: inject the conditioning as scale and shift of a norm (True), or add it (False).
        num_classes: number of classes k, or None. Label k, or no label, is the null label.
        variant: the paper's habits: `DDPM`, `DDPMPP`, `NCSNPP`, `ADM`, `VDM` or others.
        dtype: of the computation; parameters, norms, softmax and the output stay in float32.
        out_channels: channels of the output; None for as many as the input has.
        condition_width: features of noise level and class, four times `width` if None.
        fourier: exponents n, ≥ 0: for each, the network sees sin(2ⁿ π x) and cos(2ⁿ π x) beside
            its input x. They tell neighbouring grey levels apart, which a likelihood asks for and
            the eye does not: for L levels in [-1, 1], with n about log₂ L - 1 and log₂ L.
        remat: keep only what passes between blocks for the gradient, and compute their inside
            again: less memory for about a third more time.
        scan: run the equal blocks of a level as one loop: a deep network is a program of half the
            length, which is traced and, on a CPU, compiled faster. Parameters are the same (a call
            stacks those of a loop), and so are results, but for rounding and the masks of dropout;
            what Flax captures inside of blocks is not kept.
        flash: attention by cuDNN's flash kernel where JAX runs on an NVIDIA GPU; `dtype` must then
            be bfloat16 or float16. It has no forward mode, so for a likelihood take
            `net.clone(flash=False)`, whose parameters are the same.

    Raises:
        ValueError: if a side of the images is odd or less than 8, if `head_width` or the groups of
            `variant` do not divide the channels, if an exponent of `fourier` is negative, or if a
            label is given to a network without classes.

    References:
        Song et al. 2021, arXiv 2011.13456, appendix H; Kingma et al. 2021, arXiv 2107.00630,
        section 3.4 and appendix C (`fourier`); Chen et al. 2016, arXiv 1604.06174 (`remat`).
    """

    width: int = 32
    multipliers: tuple[int, ...] = (1, 2)
    blocks: int = 2
    attention: tuple[int, ...] = (4,)
    head_width: int | None = None
    heads: int = 1
    dropout: float = 0.0
    embedding: Callable[[Array], Array] = SmoothFeatures()
    scale_shift: bool = False
    num_classes: int | None = None
    variant: Variant = DDPMPP
    dtype: DTypeLike = jnp.float32
    out_channels: int | None = None
    condition_width: int | None = None
    fourier: tuple[int, ...] = ()
    remat: bool = False
    scan: bool = False
    flash: bool = False

    @nn.compact
    def __call__(
        self, x: Image, noise_level: Float[Array, "b"], label: Int[Array, "b"] | None = None
    ) -> Float[Array, "b h w c2"]:
        """Return the network's output [b, h, w, c2]; no label means the null label."""
        self._check(x)
        v, wide = self.variant, widened(self.dtype)
        condition = Conditioning(
            self.condition_width or 4 * self.width,
            self.embedding,
            self.num_classes,
            self.dtype,
            v.class_first,
            name="condition",
        )
        c = condition(noise_level, label)
        conv = partial(cpu.Conv, kernel_size=(3, 3), dtype=self.dtype)

        def read(h: Image, level: int) -> Float[Array, "b h w c2"]:
            norm = Norm(v, wide, name=f"out_{level}_norm")
            features = x.shape[-1] if self.out_channels is None else self.out_channels
            last = cpu.Conv(
                features, (3, 3), kernel_init=_zeros, dtype=wide, name=f"out_{level}_conv"
            )
            return last(nn.silu(norm(h)))

        channels = [m * self.width for m in self.multipliers]
        image = x.astype(self.dtype)
        h = conv(self.width, name="in")(self._with_fourier(x))
        skips = [h]
        for level in range(len(channels)):
            if level > 0:
                name, before = f"down_{level}", h.shape[-1]
                if v.strided:
                    down = conv(before, strides=2, padding=(v.padding, v.padding), name=name)
                    h = down(_even(h))
                else:
                    halve = partial(halved, smooth=v.smooth)
                    h = self._block(before, resample=halve, name=name)(h, c)
                if v.image_in == "residual":
                    image = _even(image)
                    image = _filtered(image, padding=2, stride=1) if v.smooth else image
                    padding = "VALID" if v.smooth else (v.padding, v.padding)
                    shown = conv(before, strides=2, padding=padding, name=f"{name}_image")
                    h = image = _add(shown(image), h, v)
                if v.image_in == "skip":
                    image = halved(image, v.smooth)
                    h = h + conv(before, kernel_size=(1, 1), name=f"{name}_image")(image)
                skips.append(h)
            skips += self._level("down", level, h, [None] * self.blocks, c)
            h = skips[-1]

        h = self._block(channels[-1], name="middle_block_0")(h, c)
        h = self._attention(name="middle_attention")(h)
        h = self._block(channels[-1], name="middle_block_1")(h, c)

        out = None
        for level, n in reversed(list(enumerate(channels))):
            beside = [skips.pop() for _ in range(self.blocks + 1)]
            h = self._level("up", level, h, beside, c)[-1]
            if v.image_out or level == 0:
                shown = read(h, level)
                out = shown if out is None else shown + doubled(out, shown.shape[1:3], v.smooth)
            if level > 0:
                double = partial(doubled, shape=skips[-1].shape[1:3], smooth=v.smooth)
                name = f"up_{level}"
                if v.strided:
                    h = conv(n, name=name)(double(h))
                else:
                    h = self._block(n, resample=double, name=name)(h, c)
        assert out is not None
        return out

    @nn.nowrap
    def _part(self, kind: Any, *options: Any, looped: bool = False, **further: Any) -> Any:
        if self.remat:
            # A loop's gradient is another loop: nothing could be merged with what it repeats.
            kind = nn.remat(kind, prevent_cse=not looped)
        return kind(*options, variant=self.variant, dtype=self.dtype, **further)

    @nn.nowrap
    def _block(self, channels: int, **further: Any) -> ResBlock:
        return self._part(ResBlock, channels, self.dropout, self.scale_shift, **further)

    @nn.nowrap
    def _attention(self, **further: Any) -> Attention:
        return self._part(Attention, self.head_width, heads=self.heads, flash=self.flash, **further)

    @nn.nowrap
    def _level(
        self,
        way: Literal["down", "up"],
        level: int,
        h: Image,
        skips: Sequence[Array | None],
        condition: Float[Array, "b d"],
    ) -> list[Array]:
        """h after each block of a level, and the attention after it."""
        n, side = self.multipliers[level] * self.width, max(h.shape[1:3])
        each = way == "down" or self.variant.attend_each
        attends = [side in self.attention and (each or i == self.blocks) for i in range(len(skips))]
        before = [h.shape[-1]] + [n] * (len(skips) - 1)
        beside = [skip if skip is None else skip.shape for skip in skips]
        structure = list(zip(attends, before, beside, strict=True))

        def stage(i: int, looped: bool) -> Stage:
            block = self._block(n, looped=looped, name=f"{way}_{level}_block_{i}")
            if not attends[i]:
                return [block]
            return [block, self._attention(looped=looped, name=f"{way}_{level}_attention_{i}")]

        images = []
        for _, equal in groupby(range(len(skips)), structure.__getitem__):
            run = list(equal)
            looped = self.scan and len(run) > 1 and not self.is_initializing()
            through = self._looped if looped else _in_turn
            stages = [stage(i, looped) for i in run]
            images += through(stages, h, [skips[i] for i in run], condition)
            h = images[-1]
        return images

    @nn.nowrap
    def _looped(
        self, stages: Sequence[Stage], h: Image, skips: Sequence[Array | None], condition: Array
    ) -> list[Array]:
        """`_in_turn` of equal stages: one, scanned over parameters, skips and keys of dropout."""
        parts = [part.clone(parent=None) for part in stages[0]]
        variables = _stacked([[part.variables for part in stage] for stage in stages])
        keys = {}
        if self.has_rng("dropout"):
            keys = {"dropout": jax.random.split(self.make_rng("dropout"), len(stages))}

        def body(h: Image, given: tuple[Any, ...]) -> tuple[Image, Image]:
            variables, skip, rngs = given
            own = zip(parts, variables, strict=True)
            stage = [partial(part.apply, variables, rngs=rngs) for part, variables in own]
            h = _through(stage, h, skip, condition)
            return h, h

        return list(jax.lax.scan(body, h, (variables, _stacked(skips), keys))[1])

    def _with_fourier(self, x: Image) -> Float[Array, "b h w c2"]:
        # In full precision: a wave of many turns magnifies the rounding of its angle.
        wide = x.astype(widened(self.dtype))
        angles = [2**n * jnp.pi * wide for n in self.fourier]
        waves = [wave(angle) for angle in angles for wave in (jnp.sin, jnp.cos)]
        return jnp.concatenate([wide, *waves], axis=-1)

    def _check(self, x: Array) -> None:
        if x.ndim != 4 or any(side < 8 or side % 2 for side in x.shape[1:3]):
            raise ValueError(
                "x must be images [b, h, w, c] of even height and width, at least 8 pixels each, "
                f"got shape {x.shape}"
            )
        if any(n < 0 for n in self.fourier):
            raise ValueError(f"fourier must be exponents of at least 0, got {self.fourier}")
        for name, divisor in (
            ("head_width", self.head_width),
            ("heads", self.heads),
            ("groups", self.variant.groups),
        ):
            if divisor is not None and any(m * self.width % divisor for m in self.multipliers):
                raise ValueError(
                    f"{name} must divide the channels of every level, {self.width} × "
                    f"{self.multipliers}, got {divisor}"
                )
