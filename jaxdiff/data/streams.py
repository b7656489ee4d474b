"""Batches that are read and decoded ahead of the steps that take them.

A set of images that does not fit into memory is decoded while the model trains:

    source = image_sources("FOLDER")("train")
    with Stream(Batches(source, 256), workers=4) as batches:
        fit(train_step, state, batches, steps=100_000)

`batches[i]` is still a pure function of i, the very one that `Batches` is, so that a run trains the
same bits from a stream as from memory, and resumes exactly, also with other processes or workers.
Steps that are asked for one after the other are served by grain, whose threads or processes are
then some batches ahead; any other step is made on the spot.
"""

import multiprocessing
import os
import signal
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, runtime_checkable

import numpy as np

__all__ = ["Numbered", "Stream"]


@runtime_checkable
class Numbered(Protocol):
    """Batches by number, such as `Batches`."""

    def __len__(self) -> int:
        """How many there are."""
        ...

    def __getitem__(self, step: int, /) -> Mapping[str, Any]:
        """The batch of a step: named arrays."""
        ...


class Stream:
    """Batches made ahead by threads or by processes, while steps are taken in sequence.

    One thread at a time may ask. What runs ahead ends with `close`, with the `with` block, with an
    error and with the program; it starts with the second of two successive steps.

    Args:
        batches: the batches to be made.
        workers: processes that make them, each with its own copy of `batches`; 0 for threads of
            this process. Processes take seconds to start, and import the program's main file: a
            script needs its `if __name__ == "__main__":`.
        threads: threads that make them if there are no workers; by default one a core, at most 8.

    Raises:
        ValueError: if a number is out of range.
    """

    def __init__(self, batches: Numbered, *, workers: int = 0, threads: int | None = None):
        threads = min(os.cpu_count() or 1, 8) if threads is None else threads
        for name, value, least in (("workers", workers, 0), ("threads", threads, 1)):
            if value < least:
                raise ValueError(f"{name} = {value}: need at least {least}")
        self._batches, self._workers, self._threads = batches, workers, threads
        self._next, self._ahead, self._end = -1, None, None
        self.num_examples: int | None = getattr(batches, "num_examples", None)

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, step: int) -> Mapping[str, np.ndarray]:
        step = int(step)
        if step != self._next:  # a look at one batch, or the first of a run
            self.close()
            batch = self._batches[step]
        else:
            batch = self._take(step)
        self._next = step + 1
        return batch

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the threads or processes that run ahead, and forgets what they made."""
        if self._end is not None:
            self._end()
        self._next, self._ahead, self._end = -1, None, None

    def _take(self, step: int) -> Mapping[str, np.ndarray]:
        if self._ahead is None:
            pipelines = _pipelines(self._batches, step, self._workers, self._threads)
            self._ahead = _in_turn(pipelines)
            self._end = weakref.finalize(self, _close, self._ahead, pipelines)
        try:
            batch = next(self._ahead)
        except BaseException:
            self.close()
            raise
        if not self._workers:
            return batch
        # A worker's batch lies in shared memory, which is short, until no one has it any more.
        return {name: np.array(array) for name, array in batch.items()}


def _pipelines(batches: Any, step: int, workers: int, threads: int) -> list[Any]:
    """Iterators over batches from `step` on; of n workers, each has one of every n-th batch."""
    import grain
    from absl import flags

    if not flags.FLAGS.is_parsed():  # as in any program that is not absl's, and grain reads them
        flags.FLAGS.mark_as_parsed()
    source = grain.MapDataset.source(batches)
    if not workers:
        ahead = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
        return [iter(source[step:].to_iter_dataset(ahead))]
    one = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
    process = grain.MultiprocessingOptions(num_workers=1, per_worker_buffer_size=1)
    # Not one pipeline with all: closed early, grain leaves those running that gave nothing yet.
    return [
        iter(source[step + i :: workers].to_iter_dataset(one).mp_prefetch(process, _begin))
        for i in range(workers)
    ]


def _in_turn(pipelines: Sequence[Any]) -> Iterator[Any]:
    with ThreadPoolExecutor(len(pipelines)) as pool:  # they start together
        yield from pool.map(next, pipelines)
    while True:
        yield from map(next, pipelines)


def _close(ahead: Any, pipelines: Sequence[Any]) -> None:
    ahead.close()
    for pipeline in pipelines:
        pipeline.close()


def _begin(index: int, count: int) -> None:
    """Prepares a worker process."""
    # Sent to all processes of a job, while the run still needs batches to come to its end.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
