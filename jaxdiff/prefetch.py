"""Batches on their way to the device while the step before them runs."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

__all__ = ["Prefetch"]

T = TypeVar("T")


class Prefetch(Generic[T]):
    """Iterates over fetch(step) of one step after the other, made ahead by one thread.

    With the steps n, n + 1, …, when `next` returns what was fetched for step n, that of n + 1 and
    of n + 2 is under way. An error of fetch(n) is raised by the `next` that asks for n. At the end
    of the `with` block the fetch under way is waited for, the others are dropped, and the thread
    ends.

    Args:
        fetch: called in order, by the thread alone.
        steps: the steps.
        depth: how many fetches are ahead of the step that was asked for, ≥ 1.

    Raises:
        ValueError: if `depth` is out of range.
    """

    def __init__(self, fetch: Callable[[int], T], steps: Iterable[int], *, depth: int = 2):
        if depth < 1:
            raise ValueError(f"depth must be at least 1, got {depth}")
        self._fetch, self._steps = fetch, iter(steps)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._ahead: deque[Future[T]] = deque()
        for _ in range(depth):
            self._submit()

    def __enter__(self) -> "Prefetch[T]":
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        if not self._ahead:
            raise StopIteration
        future = self._ahead.popleft()
        self._submit()
        return future.result()

    def _submit(self) -> None:
        for step in self._steps:
            self._ahead.append(self._pool.submit(self._fetch, step))
            break
