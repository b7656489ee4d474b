"""Training over many devices: the batch is split, the state whole on each device or split as well.

A mesh has an axis "data", over which batches are split, and for large models the axis "fsdp", over
which parameters, their average and the optimizer's moments are split too (fully sharded data
parallelism, ZeRO): a device keeps its part of them, and is sent the rest of the parameters when a
step needs it. `jax.jit` with these shardings inserts all communication. The axes are of type Auto:
under Explicit axes, now the default of `jax.make_mesh`, some gradients and diffrax's error norm do
not trace.

Over several processes (`start_distributed`) everything here means the same: a mesh holds the
devices of all, and each process calls the same functions in the same order.

References: Rajbhandari et al. 2020, arXiv:1910.02054 (ZeRO).
"""

import functools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxdiff.typing import Batch

__all__ = [
    "check_divisible",
    "data_mesh",
    "from_first",
    "per_shard",
    "replicate",
    "shard_batch",
    "shard_state",
    "split",
    "start_distributed",
    "state_shardings",
    "to_host",
]

T = TypeVar("T")

_SMALL = 1024
"""Arrays of fewer elements stay whole: to send them costs more than to keep them."""


def data_mesh(devices: Sequence[Any] | None = None, *, fsdp: int = 1) -> Mesh:
    """A mesh over the devices, those of a process side by side.

    Args:
        devices: the `jax.Device`s to use; all devices of all processes if None.
        fsdp: how many devices share one copy of the training state, a divisor of their number; best
            that of the devices of one host, or of one that are linked fast.

    Returns:
        A mesh of shape {"data": number of devices}, or {"data": number / fsdp, "fsdp": fsdp}.

    Raises:
        ValueError: if `fsdp` does not divide the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    if fsdp < 1 or len(devices) % fsdp:
        raise ValueError(f"fsdp must be a divisor of {len(devices)} devices, got {fsdp}")
    # In this order a process's examples lie side by side in the whole batch.
    devices = sorted(devices, key=lambda device: (device.process_index, device.id))
    shape = {"data": len(devices) // fsdp} | ({"fsdp": fsdp} if fsdp > 1 else {})
    return Mesh(
        np.array(devices).reshape(*shape.values()),
        tuple(shape),
        axis_types=(AxisType.Auto,) * len(shape),
    )


def replicate(tree: Any, mesh: Mesh) -> Any:
    """The same tree, whole on every device of the mesh.

    Args:
        tree: a pytree of arrays, equal on all processes, or split over the mesh.
        mesh: the mesh from `data_mesh`.

    Returns:
        The tree with sharding P() over the mesh.
    """
    return jax.tree.map(lambda leaf: _put(leaf, NamedSharding(mesh, P())), tree)


def state_shardings(tree: Any, mesh: Mesh) -> Any:
    """How a training state, or a part of it, lies on a mesh.

    Without an axis "fsdp" all is whole on every device. With it each array is split along the
    longest of its axes that divides (the last of equals), and small ones, or those without such an
    axis, are whole. It is a function of shapes alone, so a parameter, its average and its moments
    are split alike.

    Args:
        tree: a pytree of arrays or of `jax.ShapeDtypeStruct`.
        mesh: the mesh from `data_mesh`.

    Returns:
        The tree of `NamedSharding`.
    """
    parts = mesh.shape.get("fsdp", 1)

    def sharding(leaf: Any) -> NamedSharding:
        sizes = [(n, axis) for axis, n in enumerate(leaf.shape) if n % parts == 0]
        if parts == 1 or leaf.size < _SMALL or not sizes:
            return NamedSharding(mesh, P())
        axis = max(sizes)[1]
        return NamedSharding(mesh, P(*(None,) * axis, "fsdp"))

    return jax.tree.map(sharding, tree)


def shard_state(tree: Any, mesh: Mesh) -> Any:
    """A training state, or a part of it, laid on a mesh as `state_shardings` says.

    Args:
        tree: a pytree of arrays, equal on all processes.
        mesh: the mesh from `data_mesh`.

    Returns:
        The tree of global arrays.
    """
    return jax.tree.map(_put, tree, state_shardings(tree, mesh))


def shard_batch(batch: Mapping[str, Any], mesh: Mesh) -> Batch:
    """The global batch, split along its first axis over the mesh.

    Args:
        batch: arrays [b / processes, ...], the part of the global batch that this process made.
        mesh: the mesh from `data_mesh`.

    Returns:
        Global arrays [b, ...], split over all axes of the mesh.

    Raises:
        ValueError: if the arrays' first axes differ, or do not divide over this process's devices.
    """
    check_divisible(batch, len(mesh.local_devices))
    sharding = _split(mesh)
    return {
        name: jax.make_array_from_process_local_data(sharding, value)
        for name, value in batch.items()
    }


def split(tree: Any, mesh: Mesh) -> Any:
    """Arrays that every process has whole, split along their first axis over the mesh.

    Args:
        tree: a pytree of arrays [b, ...], equal on all processes, b a multiple of the devices.
        mesh: the mesh from `data_mesh`.

    Returns:
        Global arrays [b, ...], split over all axes of the mesh.
    """
    return jax.tree.map(lambda leaf: _put(leaf, _split(mesh)), tree)


def check_divisible(batch: Mapping[str, Any], devices: int, parts: int = 1) -> None:
    """Refuses a batch that cannot be split equally along its first axis.

    Args:
        batch: arrays [b, ...].
        devices: how many share them, ≥ 1.
        parts: into how many parts each device cuts its share, ≥ 1.

    Raises:
        ValueError: if the arrays' first axes differ, or are no multiple of `devices` · `parts`.
    """
    sizes = {name: value.shape[0] if value.ndim else 0 for name, value in batch.items()}
    if len(set(sizes.values())) != 1:
        raise ValueError(f"batch arrays must share their first axis, got sizes {sizes}")
    size = next(iter(sizes.values()))
    if size == 0 or size % (devices * parts):
        times = f" × {parts} parts" if parts > 1 else ""
        raise ValueError(
            f"batch size must be a positive multiple of {devices} devices{times}, got {size}"
        )


def start_distributed(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    heartbeat_timeout_seconds: int = 30,
) -> None:
    """Joins this process to a multi-host run; call it before anything touches a device.

    When a process dies, the others hang in their next collective until the heartbeat times out
    and the runtime aborts them. Let the launcher then start all of them again: `fit` resumes.

    Args:
        coordinator: "host:port" of process 0; by default the environment's
            `JAX_COORDINATOR_ADDRESS`, or found by itself on Cloud TPU, Slurm, Kubernetes, Open MPI.
        num_processes: the number of processes, by default `JAX_NUM_PROCESSES`, or likewise.
        process_id: this process's index in [0, num_processes), by default `JAX_PROCESS_ID`, or
            likewise.
        heartbeat_timeout_seconds: how long a silent process counts as alive, in seconds, ≥ 1; and
            how long one that has come to its end waits for the others.

    Raises:
        ValueError: if a number is out of range, or the processes cannot meet.
    """
    num_processes = _from_environment(num_processes, "JAX_NUM_PROCESSES")
    process_id = _from_environment(process_id, "JAX_PROCESS_ID")
    if heartbeat_timeout_seconds < 1:
        raise ValueError(
            f"heartbeat_timeout_seconds must be at least 1, got {heartbeat_timeout_seconds}"
        )
    if num_processes is not None and process_id is not None and not 0 <= process_id < num_processes:
        raise ValueError(f"process_id must be in [0, {num_processes}), got {process_id}")
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            heartbeat_timeout_seconds=heartbeat_timeout_seconds,
            # Or one that fails alone, on an image say, would wait for the others for minutes.
            shutdown_timeout_seconds=heartbeat_timeout_seconds,
        )
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            "the processes of this run cannot meet; give coordinator, num_processes and process_id "
            f"if they do not find out by themselves ({error})"
        ) from error


def _from_environment(value: int | None, name: str) -> int | None:
    text = os.environ.get(name)
    if value is not None or text is None:
        return value
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{name} must be a whole number, got {text!r}") from None


def per_shard(function: Callable[..., T], mesh: Mesh) -> Callable[..., T]:
    """Runs a function of examples on every device of a mesh, each with its own and by itself.

    A solver with adaptive steps that is only jitted over a mesh compares errors over all devices in
    every step. Under `jax.shard_map` each device takes its own steps, and none waits for another:

        def one(denoise, keys, x):
            return jd.log_likelihood(process, denoise, x, key=keys, probes=1)

        found = per_shard(one, mesh)(denoise, keys, x)

    One key in `whole` does as well: each device has the noise of its examples in the whole batch
    (`example_indices`), so what a function draws for all of them alike differs between devices.

    Args:
        function: (whole, *parts [n, …]) ↦ a tree of arrays [n, …], for any number n of examples.
        mesh: the mesh from `data_mesh`.

    Returns:
        The compiled function of (whole, *parts [b, …]): `whole`, a tree such as a denoiser, goes to
        every device, and of the parts each device has its b/devices examples. Over several
        processes each gives all of both; its results are then split over all devices, `to_host`
        puts them together. Keep the function: called anew, `per_shard` compiles anew.

    Raises:
        ValueError: when called with parts that do not divide over the devices.
    """
    mesh = data_mesh(list(mesh.devices.flat))  # the axis that examples find their places by

    @jax.jit
    def shards(whole: Any, parts: tuple[Any, ...]) -> T:
        return jax.shard_map(
            lambda whole, parts: function(whole, *parts),
            mesh=mesh,
            in_specs=(P(), P("data")),
            out_specs=P("data"),
            check_vma=False,
        )(whole, parts)

    @functools.wraps(function)
    def call(whole: Any, *parts: Any) -> T:
        first_axes = {str(i): leaf for i, leaf in enumerate(jax.tree.leaves(parts))}
        check_divisible(first_axes, mesh.size)
        # Wherever they are: what is there already does not move.
        return shards(replicate(whole, mesh), split(parts, mesh))

    return call


def to_host(tree: Any) -> Any:
    """Arrays in the host's memory, whole, on every process; all processes must call it.

    Args:
        tree: a pytree of arrays, of this process or split over several.

    Returns:
        The tree of numpy arrays.
    """

    def fetch(leaf: Any) -> Any:
        alone = not isinstance(leaf, jax.Array) or leaf.is_fully_addressable
        return (
            jax.device_get(leaf) if alone else multihost_utils.process_allgather(leaf, tiled=True)
        )

    return jax.tree.map(fetch, tree)


def from_first(value: Any) -> Any:
    """What the first process has of a value that JSON can tell; all processes must call it.

    Args:
        value: numbers, strings, lists and dictionaries; that of other processes is ignored.

    Returns:
        The value of process 0.
    """
    if jax.process_count() == 1:
        return value
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(text.size)))
    text = np.resize(text, size)  # of any content elsewhere
    return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(text)).tobytes())


def _split(mesh: Mesh) -> NamedSharding:
    """A batch's first axis, over all devices."""
    return NamedSharding(mesh, P(mesh.axis_names))


def _put(leaf: Any, sharding: NamedSharding) -> Any:
    if isinstance(leaf, jax.Array) and jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        # device_put of a typed key refuses devices of another process.
        data = _put(jax.random.key_data(leaf), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
    alone = sharding.is_fully_addressable
    if not alone and (not isinstance(leaf, jax.Array) or leaf.is_fully_addressable):
        # Each process puts its part; device_put would look for a way between the processes.
        array = np.asarray(leaf)
        return jax.make_array_from_callback(array.shape, sharding, lambda part: array[part])
    return jax.device_put(leaf, sharding)
