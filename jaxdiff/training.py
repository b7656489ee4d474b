"""Training: one jitted step, and the loop that keeps the device busy with it.

The step is the usual chain: objective [b] → mean → gradient → optax → exponential moving average.
Its randomness is `fold_in(state.key, state.step)`, and batch i is a pure function of i, so the
state is all there is to a run: a run that was killed and resumed equals one that was not, bit for
bit. The loop never waits for a step. It leaves the metrics on the device and fetches them together
when a row is due, which is also when it finds out about a loss that was not finite, and at which
step.
"""

import contextlib
import math
import os
import signal
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from jaxdiff.parallel import (
    check_divisible,
    replicate,
    shard_batch,
    shard_state,
    split,
    state_shardings,
)
from jaxdiff.prefetch import Prefetch
from jaxdiff.reporting import (
    Meter,
    Profiler,
    import_wandb,
    profile_window,
    progress_bar,
    rows_log,
)
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
        mesh: lay the state on this mesh, as `parallel.state_shardings` says; the default device if
            None.

    Returns:
        The state. The train step donates it, so no array in it is shared with another or with
        the caller.
    """

    def build(params: Params, key: Key) -> TrainState:
        state = TrainState(jnp.int32(0), params, params, optimizer.init(params), key)
        return jax.tree.map(_own, state)

    if mesh is None:
        return build(params, key)
    # Compiled, so that no device ever holds the whole of what is split.
    params = shard_state(jax.tree.map(jnp.asarray, params), mesh)
    key = replicate(key, mesh)
    shardings = state_shardings(jax.eval_shape(build, params, key), mesh)
    return jax.jit(build, out_shardings=shardings)(params, key)


def make_train_step(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    *,
    ema_decay: float,
    mesh: Mesh | None = None,
    by: str = "jit",
    accumulate: int = 1,
) -> Callable[[TrainState, Mapping[str, Any]], tuple[TrainState, Metrics]]:
    """One update of the parameters and of their average, jitted; it donates the state.

    With n = state.step, loss L = mean_b objective(params, fold_in(key, n), batch):

        params ← params + optimizer(∇L),
        ema    ← d ema + (1 − d) params,   d = min(ema_decay, (1 + n) / (10 + n)).

    The warm-up of d lets the average forget the random initialisation, at any length of run.
    Over a mesh the batch is split, and the state lies as `parallel.state_shardings` says; the
    result is that of one device up to the order of the sums, for an objective that keys its noise
    by the example's index, as all here do. By "jit" the compiler splits the program and decides
    where gradients are summed. By "shard_map" or "pmap" each device runs the program on its own
    examples, and one sum over the devices of everything, laid end to end, makes the update: on
    CPUs, which wait for one another at every array that is summed, this is faster. The objective is
    then called for each device's examples with the same key: those here find the places of their
    examples by `processes.base.example_indices`, and so must yours, or each device draws the same
    noise. The masks of dropout depend on the number of devices.

    With `accumulate` = k the memory for activations is that of a k-th of the batch: L is the mean
    over the parts {i, i + k, i + 2k, …} of the batch, taken one after another, part i with the key
    fold_in(fold_in(key, n), i). On whatever devices, that is the same update; for another k the
    noise is another. By "jit" devices meet after each part, by the others after the last.

    Of a state that is split a device keeps its part, but during the step it is sent all parameters,
    and its own gradients are whole: these must fit.

    Args:
        objective: the per-example loss.
        optimizer: the optax transformation of `init_state`.
        ema_decay: limit of the average's decay, in [0, 1); 0 keeps no average.
        mesh: the mesh from `data_mesh`; the default device if None.
        by: "jit", "shard_map" or "pmap"; the latter two where the state is whole on each device.
        accumulate: parts of the batch whose gradients are averaged one after another, ≥ 1.

    Returns:
        A function (state, batch) -> (state, metrics). The metrics are scalars: "loss",
        "grad_norm" (before any clipping), and the means of those of the objective. It raises
        ValueError, before tracing, if the batch does not divide over the mesh and into the parts.

    Raises:
        ValueError: if `ema_decay` is outside [0, 1), `accumulate` is less than 1, `by` is none of
            the three, or `mesh` is not what it needs.

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
    if by != "jit" and mesh is not None and mesh.axis_names != ("data",):
        raise ValueError(f"mesh must have the axis 'data' alone for by={by!r}, got {mesh.shape}")
    if accumulate < 1:
        raise ValueError(f"accumulate must be at least 1, got {accumulate}")

    def loss_fn(params: Params, key: Key, batch: Batch) -> tuple[Array, Metrics]:
        metrics = _mean_metrics(objective, params, key, batch)
        return metrics["loss"], metrics

    def gradient(params: Params, key: Key, batch: Batch) -> tuple[Params, Metrics]:
        if mesh is not None and "fsdp" in mesh.axis_names:
            # Brought together for use; else the compiler may send activations about instead.
            params = jax.lax.with_sharding_constraint(params, NamedSharding(mesh, P()))
        gradients = jax.grad(loss_fn, has_aux=True)
        if accumulate == 1:
            return gradients(params, key, batch)
        return _mean_over_parts(gradients, accumulate, params, key, batch)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(state.key, state.step)
        grads, metrics = gradient(state.params, key, batch)
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

    return _over_mesh(step, mesh, parts=accumulate, by=by)


def make_eval_step(
    objective: Objective, *, size: int, mesh: Mesh | None = None
) -> Callable[[Params, Key, Mapping[str, Any]], dict[str, float]]:
    """The mean loss of any number of examples: give the same key to compare like with like.

    They are taken in batches of one size, batch i with the key fold_in(key, i), and what the last
    one lacks, or one to be shared by the devices, is made up by copies of its last example, which
    do not count. So every example counts once, one program serves all, and the number of devices
    changes nothing; but where it does not divide the size, times that are drawn for a batch
    together.

    Args:
        objective: the per-example loss.
        size: examples at a time, over all devices, ≥ 1.
        mesh: the mesh from `data_mesh`; the default device if None.

    Returns:
        A function (params, key, examples) -> means: "loss" and those of the objective's own
        metrics, of which those without an axis of examples are averaged over the batches. Over
        several processes each gives all examples.

    Raises:
        ValueError: if `size` is less than 1.
    """
    if size < 1:
        raise ValueError(f"size must be at least 1, got {size}")
    places = size + -size % (1 if mesh is None else mesh.size)

    @jax.jit
    def sums(params: Params, key: Key, batch: Batch, count: Array) -> Metrics:
        losses, metrics = objective(params, key, batch)
        counted = jnp.arange(places) < count

        def total(value: Array) -> Array:
            if value.shape[:1] != (places,):
                return count * jnp.mean(value)
            of_example = jnp.mean(value.reshape(places, -1), axis=1)
            return jnp.sum(jnp.where(counted, of_example, 0.0))

        return jax.tree.map(total, {**metrics, "loss": losses})

    def mean(params: Params, key: Key, examples: Mapping[str, Any]) -> dict[str, float]:
        check_divisible(examples, 1)
        number = len(next(iter(examples.values())))
        params = params if mesh is None else replicate(params, mesh)
        means: dict[str, float] = {}
        for i, first in enumerate(range(0, number, size)):
            count = min(size, number - first)
            index = first + np.minimum(np.arange(places), count - 1)
            batch = {name: np.asarray(array)[index] for name, array in examples.items()}
            batch = batch if mesh is None else split(batch, mesh)
            found = sums(params, jax.random.fold_in(key, i), batch, np.int32(count))
            for name, value in jax.device_get(found).items():
                means[name] = means.get(name, 0.0) + float(value) / number
        return means

    return mean


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
    free: Collection[str] = ("steps",),
    log_every: int = 100,
    eval_every: int = 1000,
    save_every: int = 1000,
    validate: Callable[[Params], Mapping[str, float]] | None = None,
    draw: Callable[[Params, Path], None] | None = None,
    progress: bool = True,
    mesh: Mesh | None = None,
    flops_per_step: float | None = None,
    profile_steps: tuple[int, int] | None = None,
    wandb: str | None = None,
) -> TrainState:
    """Trains until `steps` updates are done, going on from the newest checkpoint in `workdir`.

    Update n + 1 takes `batches[n]`. In `workdir` the run leaves

        checkpoints/<step>           every `save_every` updates; the newest three, and the best by
                                     the "loss" of `validate`, where it told one of that step
        metrics.jsonl, tensorboard/  a row every `log_every` updates: means over the updates since
                                     the last row, and what is listed below
        samples/step-<step>.png      by `draw`, every `eval_every` updates

    and all of them at the end. On SIGTERM it saves, and raises SystemExit(143) so that a launcher
    sees unfinished work; the same call then goes on. An evaluation is broken off for that, but of
    several processes, which agree on the step to stop at. Over several processes each calls `fit`.
    They must share the folder of the checkpoints; all else process 0 alone writes. Beside the means
    of the step's metrics a row holds, of all devices,

        steps/s, examples/s  the speed, without the time of compilation, evaluation and saving
        flops/s              model FLOPs in that time, if `flops_per_step` is given
        utilisation          its share of what the devices could do in bfloat16, if that is known
        data_wait            the share of that time in which the loop waited for its next batch; the
                             input limits the speed if it is near 1
        compile_seconds      spent in compilation since the call, tracing not counted
        device_memory_gb     the most that a device of process 0 has held, in 10⁹ bytes; not on CPUs

    Args:
        train_step: from `make_train_step`.
        state: from `init_state`; it is donated.
        batches: `batches[i]` gives this process's part of batch i as numpy arrays. It is called by
            one thread, in order, while earlier steps run; an error is raised when its step is due.
            If it has a `close()`, like `Stream`, that is called at the end.
        steps: updates in the whole run, ≥ 0. If there are as many already, nothing is done.
        workdir: the run's folder, a local one; None keeps nothing on disk.
        checkpoint_dir: the folder of the checkpoints, if it is not in `workdir`: on machines that
            come and go, one that stays, such as "gs://bucket/run".
        config: values for JSON, saved with each checkpoint. A run goes on from one of the same
            values only, if both have any.
        free: names in `config` whose values may differ.
        log_every: updates between rows, ≥ 1.
        eval_every: updates between evaluations, ≥ 1.
        save_every: updates between checkpoints, ≥ 1.
        validate: called on every process with the averaged parameters; its numbers are logged
            under "validation/". The parameters are donated afterwards: it must not keep them.
        draw: called on process 0 with the averaged parameters and the picture's path.
        progress: show a progress bar.
        mesh: the mesh that the train step was made for.
        flops_per_step: model FLOPs of an update, from `flops.count(train_step, state, batch)`.
        profile_steps: (first, stop) traces the updates first … stop − 1 into `workdir`, where
            TensorBoard shows them; evaluations and checkpoints that fall between them are in it.
        wandb: project of Weights & Biases that the rows go to as well; the folder keeps the id of
            its run, which a resumed one goes on with.

    Returns:
        The final state.

    Raises:
        ValueError: if a count is out of range, `profile_steps` is not within the run, either it or
            `wandb` is given without `workdir`, wandb is not installed, or the processes do not
            share the folder of the checkpoints.
        CheckpointMismatch: if the checkpoints are of another `config`, model or optimizer, or of
            another number of training examples, where `batches` has `num_examples`.
        NonFiniteLoss: if a loss was not finite: names the first such step, and the checkpoint
            before it. Noticed when the next row, evaluation or checkpoint is due.
        CheckpointError: if there are checkpoints and none can be restored, or one cannot be
            reached or written.
        SystemExit: after SIGTERM, once the state is saved.
    """
    _check_counts(steps, log_every=log_every, eval_every=eval_every, save_every=save_every)
    _check_reports(workdir, profile_steps=profile_steps, wandb=wandb)
    profiled = profile_window(profile_steps, steps)
    workdir = None if workdir is None else Path(workdir)
    primary = jax.process_index() == 0
    reports = workdir if primary else None
    with contextlib.ExitStack() as stack:
        stack.callback(getattr(batches, "close", lambda: None))
        if workdir is not None and primary:
            workdir.mkdir(parents=True, exist_ok=True)
        if checkpoint_dir is None and workdir is not None:
            checkpoint_dir = workdir / "checkpoints"
        checkpoints = None
        if checkpoint_dir is not None:
            checkpoints = stack.enter_context(_checkpoints(checkpoint_dir, batches))
        state = _resume(state, checkpoints, mesh, config, free)
        start = int(state.step)
        if start >= steps:
            return state
        log = stack.enter_context(rows_log(reports, start, wandb=wandb, config=config))
        bar = stack.enter_context(progress_bar(start, steps, show=progress and primary))
        profiler = stack.enter_context(Profiler(reports, profiled))
        terminated = stack.enter_context(_sigterm(listen=checkpoints is not None))

        profiler.start_before(start + 1, state)
        devices = state.step.sharding.device_set
        meter = stack.enter_context(Meter(devices, flops_per_step=flops_per_step))
        ahead = stack.enter_context(_ahead(batches, range(start, steps), mesh))

        def evaluate(step: int, params: Params) -> None:
            if validate is not None:
                numbers = validate(params)
                log(step, {f"validation/{name}": value for name, value in numbers.items()})
                if checkpoints is not None and "loss" in numbers:
                    checkpoints.record_metric(step, float(numbers["loss"]))
            if draw is not None and workdir is not None:
                whole = _on_this_process(params, mesh)
                if primary:
                    path = workdir / "samples" / f"step-{step:06d}.png"
                    path.parent.mkdir(exist_ok=True)
                    draw(whole, path)

        for step in range(start + 1, steps + 1):
            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                with meter.waiting():
                    batch = next(ahead)
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
            if not (log_due or eval_due or save_due or profiler.due(step)):
                continue

            _check_losses(meter.pause(), step, checkpoints)
            profiler.stop_after(step, state)
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
                    if eval_due:
                        evaluate(step, state.ema_params)
            except _Interrupted:
                if not save_due:
                    _save(checkpoints, step, state, config)
                raise SystemExit(128 + signal.SIGTERM) from None
            profiler.start_before(step + 1, state)
            meter.go_on()
    return state


def _own(leaf: Any) -> Array:
    """A copy that no one else holds, and of a strong type: a weak one would compile twice."""
    leaf = jnp.asarray(leaf)
    return jnp.array(leaf, dtype=leaf.dtype, copy=True)


def _mean_metrics(objective: Objective, params: Params, key: Key, batch: Batch) -> Metrics:
    losses, metrics = objective(params, key, batch)
    return {**jax.tree.map(jnp.mean, metrics), "loss": jnp.mean(losses)}


def _mean_over_parts(
    gradients: Callable[..., tuple[Params, Metrics]],
    number: int,
    params: Params,
    key: Key,
    batch: Batch,
) -> tuple[Params, Metrics]:
    """Means of gradients and metrics over the batch's parts, one at a time in memory."""
    # Of every number-th example: so a device has an equal share of each part, and none moves.
    parts = jax.tree.map(lambda a: jnp.moveaxis(a.reshape(-1, number, *a.shape[1:]), 1, 0), batch)

    def at(i: Array, part: Batch) -> tuple[Params, Metrics]:
        return gradients(params, jax.random.fold_in(key, i), part)

    def add(sums: Any, part: tuple[Array, Batch]) -> tuple[Any, None]:
        # The sum has single precision at least, whatever the parameters have.
        return jax.tree.map(lambda s, g: s + g / number, sums, at(*part)), None

    first = jax.eval_shape(at, jnp.int32(0), jax.tree.map(lambda a: a[0], parts))
    zeros = jax.tree.map(
        lambda g: jnp.zeros(g.shape, jnp.promote_types(g.dtype, jnp.float32)), first
    )
    sums, _ = jax.lax.scan(add, zeros, (jnp.arange(number), parts))
    return jax.tree.map(lambda s, g: s.astype(g.dtype), sums, first)


def _over_mesh(
    step: Callable[..., Any], mesh: Mesh | None, *, parts: int, by: str
) -> Callable[..., Any]:
    """Compiles step(state, batch), which gives up the state."""
    if mesh is None:
        compiled = jax.jit(step, donate_argnums=0)
    elif by == "pmap":
        compiled = _pmapped(step, mesh)
    else:
        if by == "shard_map":
            specs = {"in_specs": (P(), P("data")), "out_specs": P(), "check_vma": False}
            step = jax.shard_map(step, mesh=mesh, **specs)
        compiled = _jitted(step, mesh)

    def checked(state: TrainState, batch: Mapping[str, Any]) -> tuple[TrainState, Metrics]:
        devices = 1 if mesh is None else mesh.size
        check_divisible(batch, devices, parts)
        return compiled(state, batch)

    return checked


def _jitted(step: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    compiled: dict[Any, Callable[..., Any]] = {}  # by the structure of the state: in truth, one

    def run(state: TrainState, batch: Mapping[str, Any]) -> tuple[TrainState, Metrics]:
        structure = jax.tree.structure(state)
        if structure not in compiled:
            of_state = state_shardings(state, mesh)
            compiled[structure] = jax.jit(
                step,
                donate_argnums=0,
                in_shardings=(of_state, NamedSharding(mesh, P(mesh.axis_names))),
                out_shardings=(of_state, NamedSharding(mesh, P())),
            )
        return compiled[structure](state, batch)

    return run


def _pmapped(step: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    run = jax.pmap(
        step,
        "data",
        in_axes=(None, 0),
        out_axes=None,
        devices=list(mesh.devices.flat),
        donate_argnums=0,
    )

    def mapped(state: TrainState, batch: Mapping[str, Any]) -> tuple[TrainState, Metrics]:
        # Over several processes pmap takes and gives what is of this one.
        own = batch
        if mesh.is_multi_process:
            state = multihost_utils.global_array_to_host_local_array(state, mesh, P())
            own = multihost_utils.global_array_to_host_local_array(batch, mesh, P("data"))
        devices = len(mesh.local_devices)
        done = run(
            state,
            {name: a.reshape(devices, -1, *a.shape[1:]) for name, a in own.items()},
        )
        if mesh.is_multi_process:
            done = multihost_utils.host_local_array_to_global_array(done, mesh, P())
        return done

    return mapped


def _check_counts(steps: int, **intervals: int) -> None:
    if steps < 0:
        raise ValueError(f"steps must be at least 0, got {steps}")
    for name, value in intervals.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def _check_reports(
    workdir: Any, *, profile_steps: tuple[int, int] | None, wandb: str | None
) -> None:
    for name, value in (("profile_steps", profile_steps), ("wandb", wandb)):
        if value is not None and workdir is None:
            raise ValueError(f"workdir must be given for {name}={value!r}, got None")
    if wandb is not None:
        import_wandb()


def _checkpoints(folder: str | os.PathLike[str], batches: Batches) -> Any:
    from jaxdiff.checkpoints import Checkpoints  # which needs TrainState

    return Checkpoints(folder, num_examples=getattr(batches, "num_examples", None))


def _ahead(batches: Batches, steps: range, mesh: Mesh | None) -> Prefetch[Batch]:
    """The batches of the steps on the device, fetched while the steps before them run."""

    def fetch(step: int) -> Batch:
        batch = batches[step]
        return jax.device_put(batch) if mesh is None else shard_batch(batch, mesh)

    return Prefetch(fetch, steps)


def _resume(
    state: TrainState,
    checkpoints: Any,
    mesh: Mesh | None,
    config: Mapping[str, Any] | None,
    free: Collection[str],
) -> TrainState:
    restored = None
    if checkpoints is not None:
        restored = checkpoints.restore_latest(state, config=config, free=free)
    if restored is not None:
        _give_up(state, but=restored)
        state = restored
    return state if mesh is None else shard_state(state, mesh)


def _give_up(tree: Any, *, but: Any) -> None:
    """Gives up arrays as a donation would: the caller may hold on to the tree."""
    kept = {id(leaf) for leaf in jax.tree.leaves(but)}
    for leaf in jax.tree.leaves(tree):
        if isinstance(leaf, jax.Array) and id(leaf) not in kept:
            leaf.delete()


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


def _on_this_process(tree: Any, mesh: Mesh | None) -> Any:
    """A tree whole on one device of this process, which may compute with it alone."""
    if mesh is None:
        return tree
    return jax.tree.map(lambda leaf: leaf.addressable_data(0), replicate(tree, mesh))


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
        """Raises `_Interrupted` within, as soon as SIGTERM comes, or if it came before."""
        self._interrupts = True
        try:
            if self.received:  # noted by `__call__` before that could interrupt
                raise _Interrupted
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
