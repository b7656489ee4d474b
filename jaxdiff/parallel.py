"""Data parallelism: one mesh axis, replicated state, batches split over the devices.

Every device holds the whole training state and a slice of the batch; `jax.jit` with these
shardings inserts the one all-reduce of the gradients. The axes are of type Auto: under Explicit
axes, now the default of `jax.make_mesh`, some gradients and diffrax's error norm do not trace.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxdiff.typing import Batch

__all__ = [
    "check_divisible",
    "data_mesh",
    "per_shard",
    "replicate",
    "shard_batch",
    "start_distributed",
]

T = TypeVar("T")


def data_mesh(devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of one axis, "data", over the devices.

    Args:
        devices: the `jax.Device`s to use; all devices of all processes if None.

    Returns:
        A mesh of shape {"data": number of devices}.
    """
    devices = jax.devices() if devices is None else devices
    return jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)


def replicate(tree: Any, mesh: Mesh) -> Any:
    """The same tree, whole on every device of the mesh.

    Args:
        tree: a pytree of arrays, equal on all processes.
        mesh: the mesh from `data_mesh`.

    Returns:
        The tree with sharding P() over the mesh.
    """
    sharding = NamedSharding(mesh, P())

    def put(leaf: Any) -> Any:
        if jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            # device_put of a typed key refuses devices of another process.
            data = jax.device_put(jax.random.key_data(leaf), sharding)
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
        return jax.device_put(leaf, sharding)

    return jax.tree.map(put, tree)


def shard_batch(batch: Mapping[str, Any], mesh: Mesh) -> Batch:
    """The global batch, split along its first axis over the mesh.

    Args:
        batch: arrays [b / processes, ...], the part of the global batch that this process made.
        mesh: the mesh from `data_mesh`.

    Returns:
        Global arrays [b, ...] with sharding P("data").

    Raises:
        ValueError: if the arrays' first axes differ, or do not divide over this process's devices.
    """
    check_divisible(batch, len(mesh.local_devices))
    sharding = NamedSharding(mesh, P("data"))
    return {
        name: jax.make_array_from_process_local_data(sharding, value)
        for name, value in batch.items()
    }


def check_divisible(batch: Mapping[str, Any], parts: int) -> None:
    """Refuses a batch that cannot be split into equal parts along its first axis.

    Args:
        batch: arrays [b, ...].
        parts: the number of devices that share them, ≥ 1.

    Raises:
        ValueError: if the arrays' first axes differ, or are no multiple of `parts`.
    """
    sizes = {name: value.shape[0] if value.ndim else 0 for name, value in batch.items()}
    if len(set(sizes.values())) != 1:
        raise ValueError(f"batch arrays must share their first axis, got sizes {sizes}")
    size = next(iter(sizes.values()))
    if size == 0 or size % parts:
        raise ValueError(f"batch size must be a positive multiple of {parts} devices, got {size}")


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
        coordinator: "host:port" of process 0; found by itself on Slurm, Cloud TPU and the like.
        num_processes: the number of processes, likewise.
        process_id: this process's index in [0, num_processes), likewise.
        heartbeat_timeout_seconds: how long a silent process counts as alive, in seconds.
    """
    jax.distributed.initialize(
        coordinator, num_processes, process_id, heartbeat_timeout_seconds=heartbeat_timeout_seconds
    )


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
        every device, and of the parts each device has its b/devices examples. Keep it: called
        anew, `per_shard` compiles anew.

    Raises:
        ValueError: when called with parts that do not divide over the devices.
    """

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
        whole = jax.device_put(whole, NamedSharding(mesh, P()))
        return shards(whole, jax.device_put(parts, NamedSharding(mesh, P("data"))))

    return call
