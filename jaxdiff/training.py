"""Training: one jitted step, and the loop that keeps the device busy with it.

The step is the usual chain: objective [b] → mean → gradient → optax → exponential moving average.
Its randomness is `fold_in(state.key, state.step)`, and batch i is a pure function of i, so the
state is all there is to a run: a run that was killed and resumed equals one that was not, bit for
bit. The loop never waits for a step. It leaves the metrics on the device and fetches them together
when a row is due, which is also when it finds out about a loss that was not finite, and at which
step.
"""

import contextlib
import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from jaxdiff.parallel import check_divisible, replicate, shard_batch
from jaxdiff.typing import Batch, Key, Metrics, Objective, Params

__all__ = [
    "Batches",
    "NonFiniteLoss",
    "TrainState",
    "fit",
    "init_state",
    "make_eval_step",
    "make_train_step",
    "warmup_adam",
]


class TrainState(NamedTuple):
    """All that a run needs to go on."""

    step: Array
    """Updates so far, int32 scalar."""
    params: Params
    ema_params: Params
    """Exponential moving average of the parameters: the ones to sample with."""
    opt_state: optax.OptState
    key: Key
    """The run's key; step i draws from fold_in(key, i)."""


@runtime_checkable
class Batches(Protocol):
    """Batches by number: `batches[i]` is the same whenever and wherever it is asked for."""

    def __getitem__(self, step: int, /) -> Mapping[str, Any]:
        """Batch i, or this process's part of it: arrays [b / processes, ...]."""
        ...


class NonFiniteLoss(RuntimeError):
    """The loss, or a parameter about to be saved, was infinite or not a number."""


def init_state(
    params: Params, optimizer: optax.GradientTransformation, key: Key, *, mesh: Mesh | None = None
) -> TrainState:
    """The state before the first update; its average starts at the parameters.

    Args:
        params: initial parameters, equal on all processes; they are copied.
        optimizer: any optax transformation.
        key: the run's key; it is copied.
        mesh: replicate the state over this mesh; the default device if None.

    Returns:
        The state. The train step donates it, so no array in it is shared with another or with
        the caller.
    """
    state = TrainState(jnp.int32(0), params, params, optimizer.init(params), key)
    state = jax.tree.map(_own, state)
    return state if mesh is None else replicate(state, mesh)


def make_train_step(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    *,
    ema_decay: float,
    mesh: Mesh | None = None,
    by: str = "jit",
) -> Callable[[TrainState, Mapping[str, Any]], tuple[TrainState, Metrics]]:
    """One update of the parameters and of their average, jitted; it donates the state.

    With n = state.step, loss L = mean_b objective(params, fold_in(key, n), batch):

        params ← params + optimizer(∇L),
        ema    ← d ema + (1 − d) params,   d = min(ema_decay, (1 + n) / (10 + n)).

    The warm-up of d lets the average forget the random initialisation, at any length of run.
    Over a mesh the batch is split and the state replicated; the result is that of one device up
    to the order of the sums, for an objective that keys its noise by the example's index, as all
    here do. By "jit" the compiler splits the program and decides where gradients are summed. By
    "shard_map" or "pmap" each device runs the program on its own examples, and one sum over the
    devices of everything, laid end to end, makes the update: on CPUs, which wait for one another
    at every array that is summed, this is faster. The objective is then called for each device's
    examples with the same key: those here find the places of their examples by
    `processes.base.example_indices`, and so must yours, or each device draws the same noise. The
    masks of dropout depend on the number of devices.

    Args:
        objective: the per-example loss.
        optimizer: the optax transformation of `init_state`.
        ema_decay: limit of the average's decay, in [0, 1); 0 keeps no average.
        mesh: the mesh from `data_mesh`; the default device if None.
        by: "jit", "shard_map" or "pmap"; the latter for the devices of one process.

    Returns:
        A function (state, batch) -> (state, metrics). The metrics are scalars: "loss",
        "grad_norm" (before any clipping), and the means of those of the objective. It raises
        ValueError, before tracing, if the batch does not divide over the mesh.

    Raises:
        ValueError: if `ema_decay` is outside [0, 1), or `by` is none of the three, or `mesh` is not
            what it needs.

    References:
        Polyak and Juditsky 1992 (averaging). The warm-up of the decay is that of TensorFlow's
        ExponentialMovingAverage with num_updates.
    """
    if not 0 <= ema_decay < 1:
        raise ValueError(f"ema_decay must be in [0, 1), got {ema_decay}")
    if by not in ("jit", "shard_map", "pmap"):
        raise ValueError(f"by must be 'jit', 'shard_map' or 'pmap', got {by!r}")
    if by != "jit" and mesh is None:
        raise ValueError(f"mesh must be given for by={by!r}, got None")
    if by == "pmap" and mesh is not None and mesh.is_multi_process:
        raise ValueError("mesh must be of one process for by='pmap', got one of several")

    def loss_fn(params: Params, key: Key, batch: Batch) -> tuple[Array, Metrics]:
        metrics = _mean_metrics(objective, params, key, batch)
        return metrics["loss"], metrics

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(state.key, state.step)
        grads, metrics = jax.grad(loss_fn, has_aux=True)(state.params, key, batch)
        if by != "jit":
            flat, unravel = ravel_pytree((grads, metrics))
            grads, metrics = unravel(jax.lax.pmean(flat, "data"))
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        decay = jnp.minimum(ema_decay, (1 + state.step) / (10 + state.step))
        ema_params = optax.incremental_update(params, state.ema_params, 1 - decay)
        ema_params = optax.tree.cast_like(ema_params, params)  # d is float32
        metrics |= {"grad_norm": optax.tree.norm(grads)}
        return TrainState(state.step + 1, params, ema_params, opt_state, state.key), metrics

    return _over_mesh(step, mesh, donate=True, by=by)


def make_eval_step(
    objective: Objective, *, mesh: Mesh | None = None
) -> Callable[[Params, Key, Mapping[str, Any]], Metrics]:
    """The mean loss of a batch, jitted: give the same key to compare like with like.

    Args:
        objective: the per-example loss.
        mesh: the mesh from `data_mesh`; the default device if None.

    Returns:
        A function (params, key, batch) -> metrics: "loss" and the means of the objective's own.
        It raises ValueError, before tracing, if the batch does not divide over the mesh.
    """

    def step(params: Params, key: Key, batch: Batch) -> Metrics:
        return _mean_metrics(objective, params, key, batch)

    return _over_mesh(step, mesh, donate=False)


def warmup_adam(
    learning_rate: float,
    *,
    steps: int,
    warmup: int = 0,
    clip: float = 1.0,
    cosine: bool = True,
    first_moment: float = 0.9,
    second_moment: float = 0.999,
    weight_decay: float = 0.0,
) -> optax.GradientTransformation:
    """Adam with clipped gradients; its rate rises linearly, then falls to 0 along a cosine.

    rate(n) = learning_rate · n / warmup for n < warmup, then
    learning_rate · (1 + cos(π (n − warmup) / (steps − warmup))) / 2, or learning_rate for ever.

    Args:
        learning_rate: the highest rate, > 0.
        steps: updates in the whole run.
        warmup: updates of the linear rise, in [0, steps).
        clip: largest norm of the gradient, > 0.
        cosine: whether the rate falls after the warm-up, else it stays.
        first_moment: decay of the average of gradients, in [0, 1).
        second_moment: decay of the average of their squares, in [0, 1).
        weight_decay: of matrices and kernels, not of vectors and numbers, nor of biases and scales
            of norms that a loop over blocks has stacked; ≥ 0, times the rate.

    Returns:
        The optax transformation.

    References: Kingma and Ba 2015, arXiv:1412.6980; Loshchilov and Hutter 2019, arXiv:1711.05101.

    Raises:
        ValueError: if a value is outside its range.
    """
    if not 0 < learning_rate < math.inf:
        raise ValueError(f"learning_rate must be positive and finite, got {learning_rate}")
    if not 0 <= warmup < steps:
        raise ValueError(f"warmup must be in [0, steps={steps}), got {warmup}")
    if not clip > 0:
        raise ValueError(f"clip must be positive, got {clip}")
    for name, decay in (("first_moment", first_moment), ("second_moment", second_moment)):
        if not 0 <= decay < 1:
            raise ValueError(f"{name} must be in [0, 1), got {decay}")
    if not weight_decay >= 0:
        raise ValueError(f"weight_decay must be at least 0, got {weight_decay}")
    if cosine:
        rate = optax.warmup_cosine_decay_schedule(0.0, learning_rate, warmup, steps)
    elif warmup:
        rate = optax.warmup_constant_schedule(0.0, learning_rate, warmup)
    else:  # of which that schedule makes the rate 0 for good
        rate = learning_rate
    adam = optax.adam(rate, first_moment, second_moment)
    if weight_decay:
        adam = optax.adamw(
            rate, first_moment, second_moment, weight_decay=weight_decay, mask=_decayed
        )
    return optax.chain(optax.clip_by_global_norm(clip), adam)


def _decayed(params: Params) -> Any:
    def is_decayed(path: Any, leaf: Array) -> bool:
        # By the name too: what a loop over blocks stacks has one more axis.
        stacked = bool(path) and getattr(path[-1], "key", None) in ("bias", "scale")
        return leaf.ndim > 1 and not stacked

    return jax.tree_util.tree_map_with_path(is_decayed, params)


def fit(
    train_step: Callable[[TrainState, Mapping[str, Any]], tuple[TrainState, Metrics]],
    state: TrainState,
    batches: Batches,
    *,
    steps: int,
    workdir: str | os.PathLike[str] | None = None,
    checkpoint_dir: str | os.PathLike[str] | None = None,
    config: Mapping[str, Any] | None = None,
    log_every: int = 100,
    eval_every: int = 1000,
    save_every: int = 1000,
    validate: Callable[[Params], Mapping[str, float]] | None = None,
    draw: Callable[[Params, Path], None] | None = None,
    progress: bool = True,
    mesh: Mesh | None = None,
) -> TrainState:
    """Trains until `steps` updates are done, going on from the newest checkpoint in `workdir`.

    Update n + 1 takes `batches[n]`. In `workdir` the run leaves

        checkpoints/<step>           every `save_every` updates; the newest three, and the best by
                                     the "loss" of `validate`, where it told one of that step
        metrics.jsonl, tensorboard/  a row every `log_every` updates: means over the updates since
                                     the last row, and their speed without evaluation and saving
        samples/step-<step>.png      by `draw`, every `eval_every` updates

    and all of them at the end. On SIGTERM it saves, and raises SystemExit(143) so that a launcher
    sees unfinished work; the same call then goes on. An evaluation is broken off for that, but of
    several processes, which agree on the step to stop at. Over several processes each calls `fit`,
    and process 0 alone writes.

    Args:
        train_step: from `make_train_step`.
        state: from `init_state`; it is donated.
        batches: `batches[i]` gives this process's part of batch i as numpy arrays.
        steps: updates in the whole run, ≥ 0. If there are as many already, nothing is done.
        workdir: the run's folder, a local one; None keeps nothing on disk.
        checkpoint_dir: the folder of the checkpoints, if it is not in `workdir`: on machines that
            come and go, one that stays, such as "gs://bucket/run".
        config: values for JSON, saved with each checkpoint.
        log_every: updates between rows, ≥ 1.
        eval_every: updates between evaluations, ≥ 1.
        save_every: updates between checkpoints, ≥ 1.
        validate: called on every process with the averaged parameters; its numbers are logged
            under "validation/". The parameters are donated afterwards: it must not keep them.
        draw: called on process 0 with the averaged parameters and the picture's path.
        progress: show a progress bar.
        mesh: the mesh that the train step was made for.

    Returns:
        The final state.

    Raises:
        ValueError: if a count is out of range.
        CheckpointMismatch: if the checkpoints are of another model or optimizer, or of another
            number of training examples, where `batches` has `num_examples`.
        NonFiniteLoss: if a loss was not finite: names the first such step, and the checkpoint
            before it. Noticed when the next row, evaluation or checkpoint is due.
        CheckpointError: if there are checkpoints and none can be restored, or one cannot be
            written.
        SystemExit: after SIGTERM, once the state is saved.
    """
    _check_counts(steps, log_every=log_every, eval_every=eval_every, save_every=save_every)
    workdir = None if workdir is None else Path(workdir)
    primary = jax.process_index() == 0
    with contextlib.ExitStack() as stack:
        if workdir is not None and primary:
            workdir.mkdir(parents=True, exist_ok=True)
        if checkpoint_dir is None and workdir is not None:
            checkpoint_dir = workdir / "checkpoints"
        checkpoints = None
        if checkpoint_dir is not None:
            checkpoints = stack.enter_context(_checkpoints(checkpoint_dir, batches))
        state = _resume(state, checkpoints, mesh)
        start = int(state.step)
        if start >= steps:
            return state
        log = stack.enter_context(_log(workdir if primary else None, start))
        bar = stack.enter_context(_progress_bar(start, steps, show=progress and primary))
        terminated = stack.enter_context(_sigterm(listen=checkpoints is not None))

        meter = _Meter()
        for step in range(start + 1, steps + 1):
            batch = batches[step - 1]
            batch = batch if mesh is None else shard_batch(batch, mesh)
            state, metrics = train_step(state, batch)
            meter.add(metrics)
            bar.update()

            preempted = terminated.received or (
                checkpoints is not None and checkpoints.reached_preemption(step)
            )
            end = preempted or step == steps
            log_due, eval_due, save_due = (
                end or step % every == 0 for every in (log_every, eval_every, save_every)
            )
            if not (log_due or eval_due or save_due):
                continue

            _check_losses(meter.pause(), step, checkpoints)
            if log_due:
                row = meter.row(batch_size=next(iter(batch.values())).shape[0])
                bar.set_postfix_str(f"loss {row['loss']:.4g}, {row['examples/s']:.0f} examples/s")
                log(step, row)
            if save_due:
                _save(checkpoints, step, state, config)
            if preempted:
                raise SystemExit(128 + signal.SIGTERM)
            try:
                with terminated.interrupts():
                    if eval_due and validate is not None:
                        numbers = validate(state.ema_params)
                        log(step, {f"validation/{name}": value for name, value in numbers.items()})
                        if checkpoints is not None and "loss" in numbers:
                            checkpoints.record_metric(step, float(numbers["loss"]))
                    if eval_due and draw is not None and workdir is not None and primary:
                        path = workdir / "samples" / f"step-{step:06d}.png"
                        path.parent.mkdir(exist_ok=True)
                        draw(_on_this_process(state.ema_params), path)
            except _Interrupted:
                if not save_due:
                    _save(checkpoints, step, state, config)
                raise SystemExit(128 + signal.SIGTERM) from None
            meter.go_on()
    return state


class _Meter:
    """The metrics of the steps since the last row, and the time that these steps took."""

    def __init__(self):
        self._pending: list[Metrics] = []  # on the device
        self._fetched: list[dict[str, Any]] = []  # on the host
        self._seconds = 0.0
        self.go_on()

    def go_on(self) -> None:
        """Starts the clock."""
        self._since = time.perf_counter()

    def add(self, metrics: Metrics) -> None:
        """Keeps the metrics of one more step, without waiting for them."""
        self._pending.append(metrics)

    def pause(self) -> list[dict[str, Any]]:
        """Waits for the device, stops the clock, and returns what was added since last time."""
        fetched, self._pending = jax.device_get(self._pending), []
        self._fetched += fetched
        self._seconds += time.perf_counter() - self._since
        return fetched

    def row(self, *, batch_size: int) -> dict[str, float]:
        """Means and speed since the last row."""
        metrics, count = self._fetched, len(self._fetched)
        means = {name: sum(float(m[name]) for m in metrics) / count for name in metrics[0]}
        rate = count / self._seconds
        self._fetched, self._seconds = [], 0.0
        return {**means, "steps/s": rate, "examples/s": rate * batch_size}


def _own(leaf: Any) -> Array:
    """A copy that no one else holds, and of a strong type: a weak one would compile twice."""
    leaf = jnp.asarray(leaf)
    return jnp.array(leaf, dtype=leaf.dtype, copy=True)


def _mean_metrics(objective: Objective, params: Params, key: Key, batch: Batch) -> Metrics:
    losses, metrics = objective(params, key, batch)
    return {**jax.tree.map(jnp.mean, metrics), "loss": jnp.mean(losses)}


def _over_mesh(
    step: Callable[..., Any], mesh: Mesh | None, *, donate: bool, by: str = "jit"
) -> Callable[..., Any]:
    """Compiles step(*replicated, batch); `donate` gives up the first argument."""
    donated = 0 if donate else ()
    if mesh is None:
        compiled = jax.jit(step, donate_argnums=donated)
    elif by == "pmap":
        compiled = _pmapped(step, mesh)
    else:
        if by == "shard_map":
            specs = {"in_specs": (P(), P("data")), "out_specs": P(), "check_vma": False}
            step = jax.shard_map(step, mesh=mesh, **specs)
        whole, split = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
        compiled = jax.jit(
            step,
            donate_argnums=donated,
            in_shardings=(whole, split) if donate else (whole, whole, split),
            out_shardings=whole,
        )

    def checked(*args: Any) -> Any:
        check_divisible(args[-1], 1 if mesh is None else mesh.size)
        return compiled(*args)

    return checked


def _pmapped(step: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    run = jax.pmap(
        step,
        "data",
        in_axes=(None, 0),
        out_axes=None,
        devices=list(mesh.devices.flat),
        donate_argnums=0,
    )

    def stacked(state: TrainState, batch: Mapping[str, Any]) -> tuple[TrainState, Metrics]:
        return run(
            state,
            {name: a.reshape(mesh.size, -1, *a.shape[1:]) for name, a in batch.items()},
        )

    return stacked


def _check_counts(steps: int, **intervals: int) -> None:
    if steps < 0:
        raise ValueError(f"steps must be at least 0, got {steps}")
    for name, value in intervals.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def _checkpoints(folder: str | os.PathLike[str], batches: Batches) -> Any:
    from jaxdiff.checkpoints import Checkpoints  # which needs TrainState

    return Checkpoints(folder, num_examples=getattr(batches, "num_examples", None))


def _resume(state: TrainState, checkpoints: Any, mesh: Mesh | None) -> TrainState:
    restored = None if checkpoints is None else checkpoints.restore_latest(state)
    state = state if restored is None else restored
    return state if mesh is None else replicate(state, mesh)


def _check_losses(metrics: list[dict[str, Any]], last: int, checkpoints: Any) -> None:
    """Raises for the first loss that is not finite; the metrics are of the steps up to `last`."""
    first = last - len(metrics) + 1
    for step, row in enumerate(metrics, first):
        if not math.isfinite(row["loss"]):
            raise NonFiniteLoss(f"the loss is {row['loss']} at step {step}; {_remedy(checkpoints)}")


def _save(checkpoints: Any, step: int, state: TrainState, config: Mapping[str, Any] | None) -> None:
    if checkpoints is None:
        return
    if not _all_finite((state.params, state.ema_params)):
        raise NonFiniteLoss(
            f"a parameter is not finite after step {step}, though the loss still was; "
            f"{_remedy(checkpoints)}"
        )
    checkpoints.save(step, state, config)


def _remedy(checkpoints: Any) -> str:
    if checkpoints is None or checkpoints.latest_step() is None:
        return "there is no checkpoint"
    return f"the last good checkpoint is {checkpoints.directory / str(checkpoints.latest_step())}"


@jax.jit
def _all_finite(tree: Any) -> Array:
    return jnp.all(jnp.array([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]))


def _on_this_process(tree: Any) -> Any:
    """A process alone may not compute with arrays that span several."""
    if jax.process_count() == 1:
        return tree
    return jax.tree.map(lambda leaf: leaf.addressable_data(0), tree)


def _progress_bar(start: int, steps: int, *, show: bool) -> Any:
    from tqdm import tqdm

    return tqdm(initial=start, total=steps, unit="step", disable=not show, dynamic_ncols=True)


class _Interrupted(BaseException):
    """SIGTERM came within `_Sigterm.interrupts`."""


class _Sigterm:
    """A signal handler that takes note, and ends what would take long."""

    def __init__(self):
        self.received = False
        self._interrupts = False

    def __call__(self, *_: Any) -> None:
        self.received = True
        if self._interrupts:
            self._interrupts = False  # a second one must not disturb the save
            raise _Interrupted

    @contextlib.contextmanager
    def interrupts(self) -> Iterator[None]:
        """Raises `_Interrupted` within, as soon as SIGTERM comes."""
        self._interrupts = True
        try:
            yield
        finally:
            self._interrupts = False


@contextlib.contextmanager
def _sigterm(*, listen: bool) -> Iterator[_Sigterm]:
    """Takes note of SIGTERM, which then does not end the process.

    JAX itself listens in a distributed run, and makes all processes stop at the same step.
    """
    handler = _Sigterm()
    in_main_thread = threading.current_thread() is threading.main_thread()
    if not listen or not in_main_thread or jax.distributed.is_initialized():
        yield handler
        return
    previous = signal.signal(signal.SIGTERM, handler)
    try:
        yield handler
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if previous is None else previous)


@contextlib.contextmanager
def _log(workdir: Path | None, start: int) -> Iterator[Callable[[int, Mapping[str, Any]], None]]:
    """A function (step, row) that adds to metrics.jsonl and TensorBoard, from step `start` on."""
    if workdir is None:
        yield lambda step, row: None
        return
    from tensorboardX import SummaryWriter

    path = workdir / "metrics.jsonl"
    _forget_rows_after(start, path)
    with (
        path.open("a") as file,
        SummaryWriter(str(workdir / "tensorboard"), purge_step=start + 1) as events,
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

        yield log


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
