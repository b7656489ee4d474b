"""What a run tells: the rows of its log, its bar, and a profile of some of its updates.

A device works asynchronously, so its speed is that of many updates: the clock runs from one fetch
of their metrics to the next, and stands still while the loop compiles, evaluates and saves.
"""

import contextlib
import importlib
import json
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from jaxdiff import flops
from jaxdiff.typing import Metrics

__all__ = ["Meter", "Profiler", "import_wandb", "profile_window", "progress_bar", "rows_log"]

Log = Callable[[int, Mapping[str, Any]], None]
"""(step, row) ↦ nothing; the row's values are numbers."""

COMPILING = (
    "/jax/core/compile/jaxpr_to_mlir_module_duration",
    "/jax/core/compile/backend_compile_duration",
)
"""What JAX tells of that takes time before a program's first run, but for tracing."""


class Meter:
    """The metrics of the updates since the last row, and where their time went.

    A context manager; the clock runs from its beginning.

    Args:
        devices: the `jax.Device`s that share an update.
        flops_per_step: model FLOPs of an update, over all devices, or None.
    """

    def __init__(self, devices: Any, *, flops_per_step: float | None = None):
        self._devices = list(devices)
        self._flops_per_step = flops_per_step
        self._pending: list[Metrics] = []  # on the device
        self._fetched: list[dict[str, Any]] = []  # on the host
        self._seconds = self._waited = self._compiled = 0.0
        self._thread = threading.get_ident()

    def __enter__(self) -> "Meter":
        jax.monitoring.register_event_duration_secs_listener(self._listen)
        self.go_on()
        return self

    def __exit__(self, *error: object) -> None:
        jax.monitoring.unregister_event_duration_listener(self._listen)

    def go_on(self) -> None:
        """Starts the clock."""
        self._since = self._now()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Around what gets the next batch."""
        since = self._now()
        yield
        self._waited += self._now() - since

    def add(self, metrics: Metrics) -> None:
        """Keeps the metrics of one more update, without waiting for them."""
        self._pending.append(metrics)

    def pause(self) -> list[dict[str, Any]]:
        """Waits for the devices, stops the clock, and returns what was added since last time."""
        fetched, self._pending = jax.device_get(self._pending), []
        self._fetched += fetched
        self._seconds += self._now() - self._since
        return fetched

    def row(self, *, batch_size: int) -> dict[str, float]:
        """Means and speed since the last row; see `training.fit` for what it holds."""
        metrics, count = self._fetched, len(self._fetched)
        row = {name: sum(float(m[name]) for m in metrics) / count for name in metrics[0]}
        rate = count / self._seconds
        row |= {"steps/s": rate, "examples/s": rate * batch_size}
        if self._flops_per_step is not None:
            row["flops/s"] = rate * self._flops_per_step
            if (peak := flops.peak(self._devices)) is not None:
                row["utilisation"] = row["flops/s"] / peak
        row |= {"data_wait": self._waited / self._seconds, "compile_seconds": self._compiled}
        if (memory := _memory(self._devices)) is not None:
            row["device_memory_gb"] = memory / 1e9
        self._fetched, self._seconds, self._waited = [], 0.0, 0.0
        return row

    def _now(self) -> float:
        """Seconds of a clock that stands still while this thread compiles."""
        return time.perf_counter() - self._compiled

    def _listen(self, event: str, duration_secs: float, **kwargs: Any) -> None:
        if event in COMPILING and threading.get_ident() == self._thread:
            self._compiled += duration_secs


def _memory(devices: list[Any]) -> int | None:
    """Most bytes that a device of this process has held at once; None where nobody counts."""
    stats = [d.memory_stats() or {} for d in devices if d.process_index == jax.process_index()]
    return max((s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s), default=None)


class Profiler:
    """Traces some updates, and these only: the device is idle when it starts and when it stops.

    A context manager, at the end of which no trace goes on.

    Args:
        workdir: the run's folder, where TensorBoard shows them; None traces nothing.
        updates: which.
    """

    def __init__(self, workdir: Path | None, updates: range):
        self._workdir = workdir
        self._updates = range(0) if workdir is None else updates
        self._running = False

    def due(self, step: int) -> bool:
        """Whether it starts or stops after an update."""
        return (step in self._updates) != (step + 1 in self._updates)

    def start_before(self, step: int, state: Any) -> None:
        """Starts, if that update is to be traced and it has not yet; waits for the state."""
        if step in self._updates and not self._running and self._workdir is not None:
            jax.block_until_ready(state)
            jax.profiler.start_trace(self._workdir / "tensorboard")
            self._running = True

    def stop_after(self, step: int, state: Any) -> None:
        """Stops, if the next update is not to be traced; waits for the state."""
        if self._running and step + 1 not in self._updates:
            jax.block_until_ready(state)
            self._stop()

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(self, *error: object) -> None:
        if self._running:
            self._stop()

    def _stop(self) -> None:
        self._running = False
        jax.profiler.stop_trace()


def profile_window(profile_steps: tuple[int, int] | None, steps: int) -> range:
    """The updates to trace.

    Args:
        profile_steps: the first, and the one after the last; None for none.
        steps: updates in the whole run.

    Raises:
        ValueError: unless 1 ≤ first < stop ≤ steps + 1.
    """
    if profile_steps is None:
        return range(0)
    first, stop = profile_steps
    if not 1 <= first < stop <= steps + 1:
        raise ValueError(
            f"profile_steps must be first:stop with 1 ≤ first < stop ≤ steps + 1 = {steps + 1}, "
            f"got {first}:{stop}"
        )
    return range(first, stop)


def progress_bar(start: int, steps: int, *, show: bool) -> Any:
    """A bar of updates, as a context manager."""
    from tqdm import tqdm

    return tqdm(initial=start, total=steps, unit="step", disable=not show, dynamic_ncols=True)


@contextlib.contextmanager
def rows_log(
    workdir: Path | None,
    start: int,
    *,
    wandb: str | None = None,
    config: Mapping[str, Any] | None = None,
) -> Iterator[Log]:
    """A function that adds a row to metrics.jsonl, TensorBoard and W&B, from step `start` on.

    Args:
        workdir: the run's folder; None logs nothing.
        start: updates done; rows after it are forgotten, since they will be written again.
        wandb: project of Weights & Biases, or None. Its run goes on under the id in `wandb_id`.
        config: values that its run shows.
    """
    if workdir is None:
        yield lambda step, row: None
        return
    from tensorboardX import SummaryWriter

    path = workdir / "metrics.jsonl"
    _forget_rows_after(start, path)
    with (
        path.open("a") as file,
        SummaryWriter(str(workdir / "tensorboard"), purge_step=start + 1) as events,
        contextlib.nullcontext() if wandb is None else _wandb_run(wandb, workdir, config) as run,
    ):

        def log(step: int, row: Mapping[str, Any]) -> None:
            now = time.time()
            values = {name: float(value) for name, value in row.items()}
            # JSON knows no nan: a metric, unlike the loss, may be one.
            finite = {name: v if math.isfinite(v) else None for name, v in values.items()}
            file.write(json.dumps({"step": step, "wall_time": now, **finite}) + "\n")
            file.flush()
            for name, value in values.items():
                events.add_scalar(name, value, step, walltime=now)
            if run is not None:
                run.log(values, step=step)

        yield log


def import_wandb() -> Any:
    """The module `wandb`.

    Raises:
        ValueError: if it is not installed, or not whole.
    """
    try:
        return importlib.import_module("wandb")
    except ImportError as error:
        raise ValueError(
            f"wandb cannot be imported ({error}): pip install 'jaxdiff[wandb]'"
        ) from error


def _wandb_run(project: str, workdir: Path, config: Mapping[str, Any] | None) -> Any:
    """A run of Weights & Biases, as a context manager: that of the folder, if it has one."""
    stored = workdir / "wandb_id"
    run = import_wandb().init(
        project=project,
        id=(stored.read_text() or None) if stored.exists() else None,
        resume="allow",
        dir=str(workdir),
        config=dict(config or {}),
        allow_val_change=True,  # a run may go on for more steps than it was to take
    )
    stored.write_text(run.id)
    return run


def _forget_rows_after(step: int, path: Path) -> None:
    """Drops the rows that a resumed run writes again, and a last line that a kill cut short."""
    lines = path.read_text().splitlines() if path.exists() else []
    kept = [line for line in lines if _row_step(line) <= step]
    partial = path.with_suffix(".tmp")
    partial.write_text("".join(line + "\n" for line in kept))
    partial.replace(path)


def _row_step(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except json.JSONDecodeError:
        return math.inf
