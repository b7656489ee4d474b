"""Timing of things that would disturb each other in one process, such as two frameworks' threads.

Every contender lives in a process of its own, is made and warmed up there, and waits. They take
turns, A B C A B C …, so that what else the machine does meets all of them; one runs at a time.

In each turn a contender runs again and again for half a second, and the run after that counts, as a
step of training comes after others: some virtual machines take away memory that lay idle for
seconds, and the next runs are up to twice as slow for it.
"""

import math
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["Times", "peak_memory", "table", "take_turns"]


AWAKE = 0.5
"""Seconds for which a contender runs before the run that counts; one run at least."""


class Times(NamedTuple):
    """Of one contender.

    Attributes:
        first: seconds to make it and to run it once: imports, tracing, compiling.
        runs: seconds of each later run.
        peak: most memory of its process, on its accelerator if it uses one, in bytes.
    """

    first: float
    runs: list[float]
    peak: int

    @property
    def median(self) -> float:
        """Of the runs, in seconds."""
        return statistics.median(self.runs)

    @property
    def spread(self) -> float:
        """Half of the distance between the quartiles, in seconds; not a number of one run."""
        if len(self.runs) < 2:
            return math.nan
        low, _, high = statistics.quantiles(self.runs, n=4)
        return (high - low) / 2


def take_turns(
    makers: Mapping[str, Callable[[], Callable[[], Any]]], *, turns: int, warm_up: int = 1
) -> dict[str, Times]:
    """Times contenders.

    Args:
        makers: name ↦ a function at the top of a module (or a partial of one), called in its own
            process, that returns what is to be timed; that must return only when all is done.
        turns: runs of each that are counted.
        warm_up: runs of each before that.

    Returns:
        Those that could be made; what failed is printed.
    """
    context = multiprocessing.get_context("spawn")
    workers, first = {}, {}
    for name, maker in makers.items():
        ours, theirs = context.Pipe()
        worker = context.Process(target=_serve, args=(theirs, maker), daemon=True)
        begin = time.perf_counter()
        worker.start()
        problem = ours.recv()
        if problem is not None:
            print(f"{name} could not run: {problem}")
            continue
        first[name] = time.perf_counter() - begin
        workers[name] = worker, ours
    runs = {name: [] for name in workers}
    for turn in range(warm_up + turns):
        for name, (_, pipe) in workers.items():
            pipe.send(True)
            seconds = pipe.recv()
            if turn >= warm_up:
                runs[name].append(seconds)
    times = {}
    for name, (worker, pipe) in workers.items():
        pipe.send(False)
        times[name] = Times(first[name], runs[name], pipe.recv())
        worker.join()
    return times


def peak_memory() -> int:
    """Most memory of this process, of the accelerator which it uses, else of the host; in bytes.

    The host's not by getrusage, whose number begins with the memory of the process that started
    this one.
    """
    if (torch := sys.modules.get("torch")) and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    if (jax := sys.modules.get("jax")) and (stats := jax.local_devices()[0].memory_stats()):
        return stats["peak_bytes_in_use"]
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def _serve(pipe, maker) -> None:
    try:
        run = maker()
        run()
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {error}")
        return
    pipe.send(None)
    while pipe.recv():
        awake = time.perf_counter() + AWAKE
        run()
        while time.perf_counter() < awake:
            run()
        begin = time.perf_counter()
        run()
        pipe.send(time.perf_counter() - begin)
    pipe.send(peak_memory())


def table(head: list[str], rows: list[list[str]]) -> str:
    """As markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
