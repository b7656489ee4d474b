"""D3PM: diffusion of discrete data by Markov chains, each position by itself.

Data take one of K classes at every position; a state is their one-hot code [*positions, K], so that
E[x_0 | x_t] *is* the vector of class probabilities and `Denoised.mean` needs no new meaning. The
chain is known by its transition matrices, q(x_t = j | x_s = i) = Q_{t|s}[i, j]. A `Kernel` applies
them from either side,

    forward   p ↦ p Q_{t|s}        the law of x_t when that of x_s is p,
    backward  x ↦ Q_{t|s} xᵀ       the likelihood q(x_t = x | x_s = ·),

and all else follows by Bayes' rule. For an uncertain x_0 the posterior is the predictive

    q(x_s | x_t) = Σ_{x_0} q(x_s | x_t, x_0) p(x_0 | x_t)
                 ∝ q(x_t | x_s) Σ_{x_0} q(x_s | x_0) [p(x_0 | x_t) / q(x_t | x_0)].

The bracket, up to a constant, is what all *other* positions and the prior say of x_0. That is
what a network learns best (`Logits`): its own noisy value, and how to weigh it, is then put in by
the process exactly.

References: Austin et al. 2021, arXiv:2107.03006.
"""

import math
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxdiff import struct
from jaxdiff.distributions import Categorical
from jaxdiff.processes.base import Denoised
from jaxdiff.typing import Data, Key, State, Time

__all__ = [
    "D3PM",
    "AbsorbingKernel",
    "Keep",
    "Kernel",
    "Logits",
    "TableKernel",
    "UniformKernel",
    "absorbing",
    "centred_time",
    "cosine",
    "discretized_gaussian",
    "linear",
    "transitions",
    "uniform",
]

Tokens = Int[Array, "*positions"]

Keep = Callable[[Time], Time]
"""t ↦ ᾱ(t), the probability that a position has not been touched until t; from 1 down to 0."""


def linear(t: Time) -> Time:
    """ᾱ = 1 − t: on T steps, β_t = 1/(T − t + 1).

    References: Sohl-Dickstein et al. 2015, arXiv:1503.03585, section 2.4; for the absorbing
        kernel it is the mutual-information schedule of Austin et al. 2021, arXiv:2107.03006,
        section 3.2.
    """
    return 1.0 - t


def cosine(t: Time) -> Time:
    """ᾱ = f(t)/f(0) with f(t) = cos(½π (t + 0.008)/1.008), exactly 0 at t = 1.

    References: Hoogeboom et al. 2021, arXiv:2102.05379; Austin et al. 2021,
        arXiv:2107.03006, section 3.2 (for the uniform kernel).
    """
    quarter = 0.5 * math.pi / 1.008
    return jnp.sin(quarter * (1.0 - t)) / math.sin(quarter)


@runtime_checkable
class Kernel(Protocol):
    """The transition matrices Q_{t|s}, s ≤ t, of one position with K classes."""

    @property
    def classes(self) -> int:
        """K, with any that only noise takes."""
        ...

    @property
    def data_classes(self) -> int:
        """The classes 0 … n − 1 that data take."""
        ...

    def prior(self) -> Float[Array, "K"]:
        """The law of x_1."""
        ...

    def forward(self, p: State, s: Time, t: Time) -> State:
        """p Q_{t|s} for p [*positions, K], which need not sum to 1."""
        ...

    def backward(self, x: State, s: Time, t: Time) -> State:
        """Q_{t|s} xᵀ for x [*positions, K]."""
        ...

    def draw(self, key: Key, tokens: Tokens, t: Time) -> Tokens:
        """A draw of q(x_t | x_0), both as class indices [*positions]."""
        ...


@struct.dataclass
class UniformKernel:
    """Q_{t|s} = a I + (1 − a) 11ᵀ/K with a = ᾱ(t)/ᾱ(s); see `uniform`."""

    classes: int = struct.field(pytree_node=False)
    keep: Keep

    @property
    def data_classes(self) -> int:
        """All K."""
        return self.classes

    def prior(self) -> Float[Array, "K"]:
        """1/K each."""
        return jnp.full(self.classes, 1.0 / self.classes)

    def forward(self, p: State, s: Time, t: Time) -> State:
        """`a p + (1 − a) Σp/K`."""
        kept = self.keep(t) / self.keep(s)
        return kept * p + (1.0 - kept) * jnp.mean(p, axis=-1, keepdims=True)

    def backward(self, x: State, s: Time, t: Time) -> State:
        """The same: Q is symmetric."""
        return self.forward(x, s, t)

    def draw(self, key: Key, tokens: Tokens, t: Time) -> Tokens:
        """Keeps a token with probability ᾱ(t), else draws one of all K."""
        keep_key, class_key = jax.random.split(key)
        kept = _kept(keep_key, self.keep, tokens, t)
        fresh = jax.random.randint(class_key, tokens.shape, 0, self.classes, tokens.dtype)
        return jnp.where(kept, tokens, fresh)


@struct.dataclass
class AbsorbingKernel:
    """Q_{t|s} = a I + (1 − a) 1 eᵀ_mask with a = ᾱ(t)/ᾱ(s); see `absorbing`."""

    classes: int = struct.field(pytree_node=False)
    keep: Keep

    @property
    def data_classes(self) -> int:
        """K − 1: all but the mask."""
        return self.classes - 1

    @property
    def mask(self) -> int:
        """The index of the mask, the last class."""
        return self.classes - 1

    def prior(self) -> Float[Array, "K"]:
        """The mask."""
        return jax.nn.one_hot(self.mask, self.classes)

    def forward(self, p: State, s: Time, t: Time) -> State:
        """`a p + (1 − a) Σp e_mask`."""
        kept = self.keep(t) / self.keep(s)
        return (kept * p).at[..., self.mask].add((1.0 - kept) * jnp.sum(p, axis=-1))

    def backward(self, x: State, s: Time, t: Time) -> State:
        """`a x + (1 − a) x_mask`."""
        kept = self.keep(t) / self.keep(s)
        return kept * x + (1.0 - kept) * x[..., self.mask :]

    def draw(self, key: Key, tokens: Tokens, t: Time) -> Tokens:
        """Keeps a token with probability ᾱ(t), else masks it."""
        return jnp.where(_kept(key, self.keep, tokens, t), tokens, self.mask)


@struct.dataclass
class TableKernel:
    """Q_{t|s} = ∏ Q_i over the steps in (s, t], from a table; see `transitions`.

    No inverse is ever taken. Level l of the table cuts the steps into blocks of 2^{l+1} and holds,
    for every step i, the product from i to the middle of its block, or from the middle to i. Two
    steps s < t that first differ in bit l lie on either side of one middle, so Q_{t|s} is a product
    of two entries.

    Attributes:
        table: [levels, T + 1, K, K], levels = ⌈log₂(T + 1)⌉.
        probs: [K] the law of x_1.
    """

    table: Float[Array, "levels times K K"]
    probs: Float[Array, "K"]

    @property
    def classes(self) -> int:
        """K."""
        return self.table.shape[-1]

    @property
    def data_classes(self) -> int:
        """All K."""
        return self.classes

    def prior(self) -> Float[Array, "K"]:
        """The law of x_1."""
        return self.probs

    def forward(self, p: State, s: Time, t: Time) -> State:
        """p Q_{t|s}."""
        first, second, same = self._factors(s, t)
        return jnp.where(same, p, _product(_product(p, first), second))

    def backward(self, x: State, s: Time, t: Time) -> State:
        """Q_{t|s} xᵀ."""
        first, second, same = self._factors(s, t)
        return jnp.where(same, x, _product(_product(x, second.T), first.T))

    def draw(self, key: Key, tokens: Tokens, t: Time) -> Tokens:
        """Draws from the rows of Q_{t|0}."""
        first, second, same = self._factors(jnp.zeros_like(t), t)
        rows = jnp.where(same, jnp.eye(self.classes), _product(first, second))
        return jax.random.categorical(key, jnp.log(rows)[tokens]).astype(tokens.dtype)

    def _factors(self, s: Time, t: Time) -> tuple[Array, Array, Array]:
        steps = self.table.shape[1] - 1
        i, j = (jnp.round(steps * time).astype(jnp.int32) for time in (s, t))
        level = jnp.maximum(31 - jax.lax.clz(i ^ j), 0)
        return self.table[level, i], self.table[level, j], i == j


def uniform(classes: int, keep: Keep = cosine) -> UniformKernel:
    """A token is kept with probability ᾱ(t), or else replaced by one of all K.

    Args:
        classes: K ≥ 2.
        keep: ᾱ, from 1 at t = 0 down to 0 at t = 1: `cosine`, `linear` or your own.

    Raises:
        ValueError: if K < 2, or ᾱ does not fall within [0, 1].

    References: Austin et al. 2021, arXiv:2107.03006, section 3.1; Hoogeboom et al. 2021,
        arXiv:2102.05379.
    """
    _check_classes(classes)
    return UniformKernel(classes=classes, keep=_checked(keep))


def absorbing(classes: int, keep: Keep = linear) -> AbsorbingKernel:
    """A token is kept with probability ᾱ(t), or else replaced by the mask.

    Args:
        classes: K ≥ 2 with the mask, which is the last: data are 0 … K − 2, the mask K − 1.
        keep: ᾱ, from 1 at t = 0 down to 0 at t = 1: `linear`, `cosine` or your own. Where
            ᾱ(1) > 0 some tokens of x_1 are not masked, and the bound's prior term is infinite.

    Raises:
        ValueError: if K < 2, or ᾱ does not fall within [0, 1].

    References: Austin et al. 2021, arXiv:2107.03006, section 3.1.
    """
    _check_classes(classes)
    return AbsorbingKernel(classes=classes, keep=_checked(keep))


def transitions(
    matrices: np.ndarray | Array, prior: Sequence[float] | np.ndarray | Array | None = None
) -> TableKernel:
    """A chain of your own, from its T one-step matrices Q_1 … Q_T.

    Step i leads from time (i − 1)/T to i/T; other times mean the nearest of them. Sampling on a
    coarser grid multiplies the matrices in between.

    Args:
        matrices: [T, K, K], non-negative, with rows that sum to 1: Q[i, j] = q(j | i).
        prior: [K] the law that sampling starts from; by default that of x_1 for x_0 uniform over
            the classes, which serves if the chain forgets its start.

    Raises:
        ValueError: for any other matrices or prior.

    Note: the table holds ⌈log₂(T + 1)⌉ (T + 1) K² numbers: 12 MB for 17 classes and 1000 steps,
        but 2.6 GB for 256 classes; there take fewer steps.
    """
    one_step = np.asarray(matrices, np.float64)
    if one_step.ndim != 3 or one_step.shape[1] != one_step.shape[2] or not one_step.size:
        raise ValueError(f"matrices must have the shape [T, K, K], got {one_step.shape}.")
    _check_classes(one_step.shape[1])
    if not (one_step.min() >= 0.0 and np.abs(one_step.sum(-1) - 1.0).max() < 1e-5):
        raise ValueError(
            "matrices must be non-negative with rows that sum to 1, got entries from "
            f"{one_step.min()} and sums up to {np.abs(one_step.sum(-1) - 1.0).max()} off."
        )
    table = _table(one_step)
    # Level l of the last step is a product from its start only at the highest level.
    through = _between(table, 0, len(one_step))
    law = through.mean(axis=0) if prior is None else np.asarray(prior, np.float64)
    if law.shape != (one_step.shape[1],) or law.min() < 0.0 or abs(law.sum() - 1.0) > 1e-5:
        raise ValueError(f"prior must be {one_step.shape[1]} probabilities, got {law.tolist()}.")
    return TableKernel(table=jnp.asarray(table, float), probs=jnp.asarray(law, float))


def discretized_gaussian(classes: int, betas: Sequence[float] | np.ndarray) -> TableKernel:
    """Ordinal classes that move to near ones: the paper's discretised Gaussian.

    With z = Σ_{n=1−K}^{K−1} exp(−4n² / ((K − 1)² β_t)),

        Q_t[i, j] = exp(−4|i − j|² / ((K − 1)² β_t)) / z  for i ≠ j;   rows sum to 1 by Q_t[i, i].

    Q_t is symmetric, so that x_1 tends to the uniform law. A step moves a class, seen as a number
    in [−1, 1], by about √(β_t/2).

    Args:
        classes: K ≥ 2.
        betas: β_1 … β_T, positive; the paper's are `np.linspace(1e-4, 0.02, 1000)`.

    Raises:
        ValueError: if K < 2, or the β are not positive.

    Note: the authors' code scales the distances as if K were 256; for other K this is the paper's.

    References: Austin et al. 2021, arXiv:2107.03006, section 3.1 and its appendix.
    """
    _check_classes(classes)
    rates = np.asarray(betas, np.float64)
    if rates.ndim != 1 or not rates.size or not (np.isfinite(rates) & (rates > 0.0)).all():
        raise ValueError(f"betas must be a list of positive numbers, got {betas}.")
    index = np.arange(classes)
    distance = np.abs(index[:, None] - index[None, :])
    reach = np.arange(1 - classes, classes)

    def weight(n: np.ndarray) -> np.ndarray:
        return np.exp(-4.0 * n**2 / ((classes - 1) ** 2 * rates[:, None]))

    matrices = weight(index)[:, distance] / weight(reach).sum(axis=1)[:, None, None]
    matrices[:, index, index] += 1.0 - matrices.sum(axis=-1)
    return transitions(matrices)


@struct.dataclass
class D3PM:
    """A diffusion of one-hot data [*positions, K], independent over positions given x_0.

    Attributes:
        kernel: `uniform`, `absorbing`, `discretized_gaussian` or `transitions` of this module.

    References: Austin et al. 2021, arXiv:2107.03006.
    """

    kernel: Kernel

    def prior(self, shape: tuple[int, ...]) -> Categorical:
        """p(x_1).

        Args:
            shape: of one state, [*positions, K].
        """
        return Categorical(jnp.broadcast_to(self.kernel.prior(), shape))

    def marginal(self, x0: Data, t: Time) -> Categorical:
        """q(x_t | x_0) = x_0 Q_{t|0}."""
        return self.transition(x0, jnp.zeros_like(t), t)

    def transition(self, x: State, s: Time, t: Time) -> Categorical:
        """q(x_t | x_s) = x_s Q_{t|s} for s < t."""
        return Categorical(self.kernel.forward(x, s, t))

    def posterior(self, x: State, x0: Denoised, t: Time, s: Time) -> Categorical:
        """q(x_s | x_t), averaged over the class probabilities of x_0 given x_t.

        Args:
            x: x_t, one-hot.
            x0: its mean is p(x_0 | x_t). What it grants to a class that cannot have become x_t is
                left out; where that is all, x stays as it is.
            t: the time of x.
            s: the earlier time; at s = 0 the posterior is p(x_0 | x_t) itself.

        Note: eq. 4 of the paper weights x_0 by p̃(x_0 | x_t) and not by p̃(x_0 | x_t)/q(x_t | x_0).
            The two agree for a one-hot x_0. For a soft one only the quotient is the predictive of
            a p̃ that is p(x_0 | x_t), so eq. 4 asks its p̃ to leave the position's own noisy value
            out of account; `Logits` does so, and the step is then the same.

        References: Austin et al. 2021, arXiv:2107.03006, eqs. 3–4.
        """
        likelihood = self.kernel.backward(x, jnp.zeros_like(t), t)
        weight = _quotient(x0.mean, likelihood)
        law = self.kernel.forward(weight, jnp.zeros_like(s), s) * self.kernel.backward(x, s, t)
        return Categorical(_normalised(law, x))

    def draw(self, key: Key, tokens: Tokens, t: Time) -> Tokens:
        """A draw of q(x_t | x_0) from class indices to class indices [*positions]."""
        return self.kernel.draw(key, tokens, t)

    def one_hot(self, tokens: Tokens) -> State:
        """Class indices [*positions] as a state [*positions, K]."""
        return jax.nn.one_hot(tokens, self.kernel.classes)


def centred_time(process: D3PM, t: Time) -> Time:
    """10 t − 5: a smooth noise level in the range of the default embeddings."""
    return 10.0 * t - 5.0


@struct.dataclass
class Logits:
    """The network predicts logits of x_0, before it is known what x_t itself says.

        p(x_0 | x_t) ∝ softmax(F)(x_0) · q(x_t | x_0),   position by position.

    So a perfect F is log p(x_0 | x_t at the *other* positions), which varies little with t. Under
    the absorbing kernel this copies what is not masked and never gives the mask. The network sees
    class indices [*positions] and returns logits [*positions, n], where n may also leave out the
    mask.

    Attributes:
        noise_level: (process, t) ↦ what the network is told of the time.

    Note: differences of logits beyond 30 count as 30, so that rounding rules no class out.

    References: Austin et al. 2021, arXiv:2107.03006, eq. 4 and section 3.3; Sahoo et al. 2024,
        arXiv:2406.07524, section 3.2 (the absorbing case).
    """

    noise_level: Callable[[D3PM, Time], Time] = struct.field(
        pytree_node=False, default=centred_time
    )

    def inputs(self, process: D3PM, x: State, t: Time) -> tuple[Tokens, Time]:
        """(class indices, noise level)."""
        return jnp.argmax(x, axis=-1), self.noise_level(process, t)

    def denoised(self, process: D3PM, out: Float[Array, "..."], x: State, t: Time) -> Denoised:
        """The class probabilities [*positions, K] of x_0."""
        count = process.kernel.data_classes
        logits = out[..., :count]
        top = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
        weight = jnp.exp(jnp.maximum(logits - top, -30.0))
        likelihood = process.kernel.backward(x, jnp.zeros_like(t), t)[..., :count]
        probs = _normalised(weight * likelihood, weight / jnp.sum(weight, axis=-1, keepdims=True))
        rest = [(0, 0)] * (x.ndim - 1) + [(0, process.kernel.classes - count)]
        return Denoised(jnp.pad(probs, rest))


_TINY = 1e-37
"""What is less counts as 0, for its reciprocal may be no number."""


def _quotient(p: Array, q: Array) -> Array:
    """`p/q`, and 0 where q is."""
    return jnp.where(q > _TINY, p / jnp.where(q > _TINY, q, 1.0), 0.0)


def _normalised(weights: Array, otherwise: Array) -> Array:
    """Weights over their sum along the last axis, or something else where they are all 0."""
    # Scaled first, for the derivative has the square of the sum.
    top = jax.lax.stop_gradient(jnp.max(weights, axis=-1, keepdims=True))
    weights = weights / jnp.maximum(top, _TINY)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    return jnp.where(total > 0.5, weights / jnp.where(total > 0.5, total, 1.0), otherwise)


def _product(p: Array, matrix: Array) -> Array:
    # Rounding to a narrower type, a GPU's default, would make probabilities that sum to 0.999.
    return jnp.matmul(p, matrix, precision=jax.lax.Precision.HIGHEST)


def _kept(key: Key, keep: Keep, tokens: Tokens, t: Time) -> Array:
    return jax.random.bernoulli(key, keep(t) / keep(jnp.zeros_like(t)), tokens.shape)


def _table(one_step: np.ndarray) -> np.ndarray:
    """Products between every step and the middle of its block, for blocks of 2, 4, 8, … steps."""
    steps, classes = one_step.shape[:2]
    levels = steps.bit_length()
    table = np.broadcast_to(np.eye(classes), (levels, steps + 1, classes, classes)).copy()
    for level in range(levels):
        for middle in range(1 << level, steps + 1, 2 << level):
            for i in range(middle - 1, middle - (1 << level) - 1, -1):
                table[level, i] = one_step[i] @ table[level, i + 1]
            for i in range(middle + 1, min(middle + (1 << level), steps + 1)):
                table[level, i] = table[level, i - 1] @ one_step[i - 1]
    return table


def _between(table: np.ndarray, s: int, t: int) -> np.ndarray:
    level = (s ^ t).bit_length() - 1
    return table[level, s] @ table[level, t]


def _check_classes(classes: int) -> None:
    if classes < 2:
        raise ValueError(f"classes must be at least 2, got {classes}.")


def _checked(keep: Keep) -> Keep:
    """The schedule as a pytree; its values are looked at where they are known (outside of jit)."""
    values = jax.vmap(keep)(jnp.linspace(0.0, 1.0, 101))
    falls = (jnp.abs(values[0] - 1.0) < 1e-5) & (values.min() >= 0.0) & (jnp.diff(values) < 0.0)
    struct.require(
        falls,
        f"keep must fall strictly, from 1 to at least 0, got {values[0]} at t = 0 and "
        f"{values[-1]} at t = 1.",
    )
    return jax.tree_util.Partial(keep) if jax.tree_util.all_leaves([keep]) else keep
