"""A run's sampler and its likelihood: as a function here, and as a file that needs JAX alone.

`jax.export` keeps a function as the program that it compiles to, here for CPU, CUDA and TPU, with
the averaged parameters inside. Whoever has JAX (and flatbuffers, by which it reads the file) loads
and calls it; neither this library nor Flax, diffrax or the data are needed:

    import jax
    from jax import export
    sample = jax.jit(export.deserialize(bytearray(open("sampler.jax", "rb").read())).call)
    x = sample(jax.random.split(jax.random.PRNGKey(0), 64))  # 64 samples, or any other number

The number of examples stays open, and example i depends on keys[i] alone: the program is that of
one example, mapped over all of them, so that a solver takes steps of its own for each. JAX promises
to read such files for six months at least; then export the run anew.
"""

import dataclasses
import functools
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from jaxdiff.checkpoints import restore_ema
from jaxdiff.data_likelihood import in_chunks
from jaxdiff.experiment import Experiment, load_run
from jaxdiff.parallel import data_mesh, per_shard, replicate
from jaxdiff.processes.base import Denoiser
from jaxdiff.typing import Array, Key, Params

__all__ = [
    "Sampler",
    "export_likelihood",
    "export_sampler",
    "load_sampler",
    "sampled_by",
    "save_program",
]

PLATFORMS = ("cpu", "cuda", "tpu")

Sampler = Callable[[Any], Callable[[Denoiser, Key, Array], Array]]
"""process ↦ (denoise, keys [b], x [b, …] drawn from the prior) ↦ samples [b, …]."""

# What is told of a likelihood, where an estimate has it.
_OUTPUTS = ("value", "stderr", "solver_error", "num_evaluations", "converged")


def load_sampler(
    run: str | os.PathLike[str],
    *,
    checkpoint: str | int = "last",
    checkpoint_dir: str | os.PathLike[str] | None = None,
    size: int = 256,
) -> Callable[..., Array]:
    """The sampler of a trained run, with its averaged parameters: sample(key, n, cond=None).

    Sample i has the key fold_in(key, i): it is the same whatever n, and up to rounding whatever the
    number of devices, which share the work. Samples [n, …] are in the model's space, images in
    [−1, 1]. Calls with an n that was seen before compile nothing.

    `cond` is of a run with classes: a label, or one a sample [n], in [0, number of classes). None
    draws classes alike often.

    Args:
        run: folder of the run.
        checkpoint: "last", "best" by the validation loss, or a step.
        checkpoint_dir: folder of the checkpoints, if not in the run's.
        size: samples at a time on each device, ≥ 1.

    Returns:
        The function. It raises a ValueError for n < 1, for labels that are none of the run's
        classes, and for labels where it has none.

    Raises:
        ValueError: if there is no run with a checkpoint, its config offers no sampler, or size < 1.
        CheckpointMismatch: if the checkpoint is of another model.
        CheckpointError: if all checkpoints are damaged.
    """
    if size < 1:
        raise ValueError(f"size must be at least 1, got {size}.")
    folder = Path(run)
    experiment = load_run(folder)
    draw, devices = _labelled(experiment), jax.local_devices()
    abstract = jax.eval_shape(experiment.init, jax.random.key(0))
    saved = folder / "checkpoints" if checkpoint_dir is None else checkpoint_dir
    params = restore_ema(saved, abstract, checkpoint=checkpoint)

    @functools.cache
    def over(count: int) -> Callable[..., Array]:
        mesh = data_mesh(devices[:count])
        return functools.partial(per_shard(draw, mesh), replicate(params, mesh))

    def sample(key: Key, n: int, cond: Any = None) -> Array:
        if n < 1:
            raise ValueError(f"n must be at least 1, got {n}.")
        labels = () if cond is None else (_labels(cond, n, experiment.num_classes),)
        count = min(n, len(devices))
        at_a_time = count * min(size, n // count)
        return jnp.concatenate(in_chunks(over(count), key, n, *labels, size=at_a_time))

    return sample


def sampled_by(experiment: Experiment, sampler: Sampler) -> Experiment:
    """An experiment whose model is sampled in another way.

    Args:
        experiment: the run.
        sampler: process ↦ (denoise, keys [b], x [b, …] drawn from the prior) ↦ samples [b, …].

    Raises:
        ValueError: if the run's samples are not states of its process.
    """
    process, shape = experiment.process, experiment.shape
    if shape is None:
        raise ValueError(
            f"sampler must be the run's own: its samples are no states of its process, "
            f"{type(process).__name__}."
        )

    sample = sampler(process)

    def draw(params: Params, keys: Key, **condition: Array) -> Array:
        start, noise = jax.vmap(jax.random.split, out_axes=1)(keys)
        x = jax.vmap(process.prior(shape).sample)(start)
        return sample(experiment.denoiser(params, **condition), noise, x)

    return dataclasses.replace(experiment, sampler=draw)


def export_sampler(experiment: Experiment, params: Params) -> jax.export.Exported:
    """The whole sampler of a run as one program, its parameters inside.

    Args:
        experiment: the run; `sampled_by` gives it another sampler.
        params: of the model.

    Returns:
        A program of (keys [n, 2]) ↦ samples [n, …] in the model's space, or for a run with classes
        of (keys [n, 2], label [n]), any n. Keys are the numbers of JAX's default keys, uint32, as
        `PRNGKey` and `key_data` have them. Labels are int32, and the number of classes is that of
        no class.

    Raises:
        ValueError: if the config offers no sampler, or the sampler calls the host, as a solver does
            that raises errors.
    """
    draw = _labelled(experiment)

    def one(key, *label):
        return draw(params, key[None], *(a[None] for a in label))[0]

    label = () if experiment.num_classes is None else (jax.ShapeDtypeStruct((), jnp.int32),)
    return _exported(one, *label)


def export_likelihood(experiment: Experiment, params: Params) -> jax.export.Exported:
    """The likelihood of a run as one program, its parameters inside.

    Args:
        experiment: the run.
        params: of the model.

    Returns:
        A program of (keys [n, 2], examples [n, …]), any n, with keys as in `export_sampler` and
        examples as the data set has them: images as their grey levels, int32. It returns a
        dictionary of arrays [n]: "value", log p in nats or a bound of it; "bits_per_dim", of
        images; and what the run's estimate tells of "stderr", "solver_error", "num_evaluations" and
        "converged".

    Raises:
        ValueError: if the run has no likelihood, or the shape of its data is not known without them
            and they cannot be read.
    """
    likelihood = experiment.likelihood
    if likelihood is None:
        raise ValueError("the run has no likelihood.")

    def one(key, x):
        found = likelihood.estimate(params, key[None], jax.tree.map(lambda a: a[None], x))
        told = {name: getattr(found, name)[0] for name in _OUTPUTS if hasattr(found, name)}
        bits = {} if likelihood.bits is None else {"bits_per_dim": likelihood.bits(-told["value"])}
        return told | bits

    example = likelihood.example
    if example is None:
        examples = jax.eval_shape(functools.partial(likelihood.examples, "test"), jax.random.key(0))
        example = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), examples)
    return _exported(one, example)


def save_program(program: jax.export.Exported, path: Path) -> None:
    """Writes a program to a file, in one piece."""
    partial = path.with_name(path.name + ".tmp")
    partial.write_bytes(program.serialize())
    partial.replace(path)


def _labelled(experiment: Experiment) -> Callable[..., Array]:
    """(params, keys [n], labels [n] or none) ↦ samples [n, …], of whatever run."""
    sampler = experiment.sampler
    if sampler is None:
        raise ValueError("the run's config offers no `sampler` in its Experiment.")

    def draw(params, keys, label=None):
        return sampler(params, keys, **({} if label is None else {"label": label}))

    return draw


def _labels(cond: Any, n: int, classes: int | None) -> Array:
    """Labels [n], checked."""
    if classes is None:
        raise ValueError(f"cond must be None for a run without classes, got {cond!r}.")
    labels = np.asarray(cond)
    if labels.shape not in ((), (n,)) or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"cond must be a whole number, or {n} of them, got {cond!r}.")
    if np.any((labels < 0) | (labels >= classes)):
        raise ValueError(f"cond must be in [0, {classes}), got {cond!r}.")
    return jnp.broadcast_to(jnp.asarray(labels, jnp.int32), (n,))


def _exported(one: Callable[..., Any], *example: Any) -> jax.export.Exported:
    """The program of (keys [n, 2], *examples [n, …]) from that of one key and example."""
    if importlib.util.find_spec("flatbuffers") is None:
        raise ValueError("flatbuffers is missing: pip install 'jaxdiff[export]'.")
    (n,) = jax.export.symbolic_shape("n")
    key = jax.ShapeDtypeStruct((2,), jnp.uint32)
    many = jax.tree.map(lambda a: jax.ShapeDtypeStruct((n, *a.shape), a.dtype), (key, *example))

    @jax.jit
    def program(keys, *examples):
        return jax.vmap(one)(jax.random.wrap_key_data(keys, impl="threefry2x32"), *examples)

    try:
        return jax.export.export(program, platforms=PLATFORMS)(*many)
    except NotImplementedError as error:
        if "callback" not in str(error):
            raise
        raise ValueError("the program calls the host: solve with throw=False.") from error
