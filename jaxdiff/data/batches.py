"""Batches as a pure function of (seed, step, process).

The place in the data is then nothing but the number of the training step: there is no iterator to
save, resuming is exact, and it stays exact when the number of processes changes, because each
process takes its contiguous slice of the one global batch.

Of arrays in memory a batch costs one gather (tens of microseconds for 128 images of 32×32×3), and
there is nothing for worker threads to hide: the same source behind grain's iterator, with
prefetching threads or without, took 1.5 to 3 times as much CPU time a batch. Examples that must be
read and decoded are made ahead by `jaxdiff.data.streams`, in the same order.
"""

from collections.abc import Callable, Mapping
from typing import Protocol, runtime_checkable

import jax
import numpy as np
from jaxtyping import Array

from jaxdiff.typing import Key

__all__ = ["Batches", "Examples", "FreshBatches"]

_ENDLESS = 10**9
_STREAM = 0x64617461
"""Sets the keys of the data apart from those that training derives from the same seed."""


@runtime_checkable
class Examples(Protocol):
    """Examples by number, read when asked for, such as an `ImageSource`."""

    def __len__(self) -> int:
        """How many there are."""
        ...

    def __getitem__(self, which: np.ndarray, /) -> Mapping[str, np.ndarray]:
        """Those of the numbers [k]: named arrays [k, …]."""
        ...


class Batches:
    """Shuffled mini-batches, epoch after epoch.

    Epoch e walks through the permutation that `numpy.random.default_rng([seed, e])` gives; the
    n mod batch_size examples that do not fill a batch sit that epoch out. `batches[step]` is this
    process's share of the batch of `step`: a dictionary of arrays [batch_size / process_count, …].

    Args:
        arrays: named arrays with a common first axis n, such as {"x": …, "label": …}; or n
            `Examples`, which need not lie in memory.
        batch_size: examples in the global batch, 1 … n, a multiple of `process_count`.
        seed: of the permutations, >= 0.
        process_index: which share is ours; by default `jax.process_index()`.
        process_count: number of shares; by default `jax.process_count()`.

    Raises:
        ValueError: if the arrays differ in length, or a number is out of range.
    """

    def __init__(
        self,
        arrays: Mapping[str, np.ndarray] | Examples,
        batch_size: int,
        *,
        seed: int = 0,
        process_index: int | None = None,
        process_count: int | None = None,
    ):
        self._examples = _Arrays(arrays) if isinstance(arrays, Mapping) else arrays
        self.num_examples = len(self._examples)
        if batch_size > self.num_examples:
            raise ValueError(
                f"batch_size = {batch_size}: there are only {self.num_examples} examples"
            )
        self._share = _share(batch_size, seed, process_index, process_count)
        self._batch_size = batch_size
        self._seed = seed
        self._latest = -1, np.empty(0, int)

    @property
    def steps_per_epoch(self) -> int:
        """Full batches in one pass over the data."""
        return self.num_examples // self._batch_size

    def __len__(self) -> int:
        return _ENDLESS

    def __getitem__(self, step: int) -> Mapping[str, np.ndarray]:
        epoch, k = divmod(int(step), self.steps_per_epoch)
        batch = self._permutation(epoch)[k * self._batch_size : (k + 1) * self._batch_size]
        return self._examples[batch[self._share]]

    def _permutation(self, epoch: int) -> np.ndarray:
        # Read and replaced as one pair: threads may race and lose nothing but time.
        latest, permutation = self._latest
        if latest != epoch:
            permutation = np.random.default_rng([self._seed, epoch]).permutation(self.num_examples)
            self._latest = epoch, permutation
        return permutation


class _Arrays:
    """Examples in memory."""

    def __init__(self, arrays: Mapping[str, np.ndarray]):
        lengths = {name: len(array) for name, array in arrays.items()}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"arrays = {lengths}: need one or more arrays of one length")
        self._arrays, self._length = dict(arrays), next(iter(lengths.values()))

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, which: np.ndarray) -> dict[str, np.ndarray]:
        return {name: array[which] for name, array in self._arrays.items()}


class FreshBatches:
    """Batches of new exact samples: data without end, of which no example is seen twice.

    `batches[step]` is {"x": this process's share of sample(key of (seed, step), batch_size)}.

    Args:
        sample: (key, n) -> n examples [n, …], such as `toys.moons.sample`; traced once.
        batch_size: examples in the global batch, >= 1, a multiple of `process_count`.
        seed: of the keys, >= 0.
        process_index: which share is ours; by default `jax.process_index()`.
        process_count: number of shares; by default `jax.process_count()`.

    Raises:
        ValueError: if a number is out of range.
    """

    def __init__(
        self,
        sample: Callable[[Key, int], Array],
        batch_size: int,
        *,
        seed: int = 0,
        process_index: int | None = None,
        process_count: int | None = None,
    ):
        share = _share(batch_size, seed, process_index, process_count)

        @jax.jit
        def draw(step: Array) -> Array:
            key = jax.random.fold_in(jax.random.key(seed), _STREAM)
            return sample(jax.random.fold_in(key, step), batch_size)[share]

        self._draw = draw

    def __len__(self) -> int:
        return _ENDLESS

    def __getitem__(self, step: int) -> dict[str, Array]:
        return {"x": self._draw(np.uint32(step))}


def _share(batch_size: int, seed: int, index: int | None, count: int | None) -> slice:
    """The contiguous slice of a global batch that belongs to one process."""
    index = jax.process_index() if index is None else index
    count = jax.process_count() if count is None else count
    if not 0 <= index < count:
        raise ValueError(f"process_index = {index}: need 0 … process_count − 1 = {count - 1}")
    if batch_size < 1 or batch_size % count:
        raise ValueError(f"batch_size = {batch_size}: need a multiple of {count} (processes), > 0")
    if seed < 0:
        raise ValueError(f"seed = {seed}: need at least 0")
    size = batch_size // count
    return slice(index * size, (index + 1) * size)
