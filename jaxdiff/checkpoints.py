"""Checkpoints that survive kills, damage and a change of machine.

A checkpoint is one folder `<directory>/<step>` that orbax renames into place when it is complete,
so a process killed at any moment leaves either the whole of it or a temporary folder that nobody
lists. Its items are separate (`params`, `ema`, `opt`, `train`, `config`), so that inference reads
the averaged parameters alone. One more, `contents`, says what is in them: of every leaf its dtype,
its shape and a checksum, for storage restores a flipped bit without complaint, and a run must not
go on from one.

The checksum of a leaf of 32-bit words x_0 … x_{n−1} is

    Σ_i mix(x_i ⊕ mix(i))   mod 2³²,

with the finalizer of MurmurHash3 for `mix`, a bijection of the 32-bit words. So a change within
one word changes one term by something other than 0 mod 2³², and is always found; any other change
is missed with a probability of about 2⁻³². A sum of integers is exact in any order and each term
needs nothing but its own index: a leaf is summed where it lies, whatever its sharding.

Paths are left to orbax, so a directory may be "gs://bucket/run" as well.
"""

import contextlib
import json
import math
import os
import textwrap
import time
import uuid
import warnings
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Array

from jaxdiff.parallel import from_first
from jaxdiff.training import TrainState
from jaxdiff.typing import Params

__all__ = [
    "CheckpointError",
    "CheckpointMismatch",
    "Checkpoints",
    "check_shared",
    "restore_config",
    "restore_ema",
]

T = TypeVar("T")


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or reached, or there are some and all are damaged."""


class CheckpointMismatch(ValueError):
    """A checkpoint is sound, but of another model, optimizer or data set than is asked for."""


class Checkpoints:
    """The checkpoints of one run: the newest `keep`, and the best; a context manager.

    The best is the one of the lowest number that `record_metric` was told.

    Args:
        directory: the folder that holds them, local or remote; made if missing.
        keep: how many of the newest to keep, ≥ 1.
        num_examples: of the training set, if it has a number. It is saved as well, and checkpoints
            of another number are refused.

    Raises:
        ValueError: if `keep` is less than 1, or the processes of a run do not share the folder.
        CheckpointError: if the folder cannot be reached.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        keep: int = 3,
        num_examples: int | None = None,
    ):
        if keep < 1:
            raise ValueError(f"keep must be at least 1, got {keep}")
        check_shared(directory)
        self._num_examples = num_examples
        self._metrics: dict[int, float] = {}
        self._manager = _manager(
            directory,
            create=True,
            cleanup_tmp_directories=True,
            preservation_policy=_NewestAndBest(keep, self._metrics),
        )
        self._metrics |= _read_metrics(self.directory)

    @property
    def directory(self) -> Any:
        """The folder, as a path of etils: like one of pathlib, but it may be remote."""
        return self._manager.directory

    def save(self, step: int, state: TrainState, config: Mapping[str, Any] | None = None) -> None:
        """Starts to save the state; returns once it is copied, and writes in the background.

        Args:
            step: the number of updates behind the state; more than that of every checkpoint here.
            state: the training state, of any shardings; it may be donated as soon as this returns.
            config: values for JSON, kept beside it.

        Raises:
            ValueError: if `step` is not newer than the newest checkpoint.
            CheckpointError: if it, or the one before it, cannot be written.
        """
        import orbax.checkpoint as ocp

        items = _items(state)
        values = json.loads(json.dumps(config or {}))
        contents = {
            "leaves": {name: _contents(tree) for name, tree in items.items()},
            "config": _crc(values),
            "num_examples": self._num_examples,
        }
        with self._writing():
            saved = self._manager.save(
                step,
                args=ocp.args.Composite(
                    config=ocp.args.JsonSave(values),
                    contents=ocp.args.JsonSave(_seal(contents)),
                    **{name: ocp.args.StandardSave(item) for name, item in items.items()},
                ),
            )
        if not saved:
            raise ValueError(f"step must be newer than {self.latest_step()}, got {step}")

    def record_metric(self, step: int, metric: float) -> None:
        """Notes how good a checkpoint is; the best is kept.

        This is not part of saving, so that a save need not wait for an evaluation.

        Args:
            step: of a checkpoint; of another step there is nothing to note.
            metric: the lower, the better; what is not finite counts as nothing.
        """
        steps = self._manager.all_steps()
        if step not in steps or not math.isfinite(metric):
            return
        self._metrics[step] = metric
        known = {str(s): m for s, m in self._metrics.items() if s in steps}
        if jax.process_index() == 0:
            partial = self.directory / f"{_METRICS}.tmp"
            with self._writing():
                partial.write_text(json.dumps(_seal({"metrics": known})))
                partial.replace(self.directory / _METRICS)

    def restore_latest(
        self,
        abstract_state: TrainState,
        *,
        config: Mapping[str, Any] | None = None,
        free: Collection[str] = (),
    ) -> TrainState | None:
        """The newest undamaged checkpoint, bit for bit.

        Damaged ones are passed over with a warning, and moved to `damaged-<step>`: left in place
        they would keep the run from saving that step again.

        Args:
            abstract_state: a state of the wanted shapes, dtypes and shardings: arrays, or
                `jax.ShapeDtypeStruct` as `jax.eval_shape` gives them (one device, if they name no
                sharding). Neither the number of devices nor the shardings need be those of the
                saving run.
            config: values for JSON, as in `save`; a checkpoint with others is refused, if it has
                any.
            free: names in `config` whose values may differ.

        Returns:
            The state, or None if there is no checkpoint.

        Raises:
            CheckpointMismatch: if the newest is of another config, model, optimizer or data set;
                names the value, or the leaves. Nothing is moved.
            CheckpointError: if there are checkpoints and all are damaged, or one cannot be reached:
                storage that does not answer, or no room on the device. Nothing is moved.
        """
        steps = from_first(sorted(self._manager.all_steps(), reverse=True))
        if not steps:
            return None
        targets = _items(abstract_state)

        def check(place: Any, contents: Mapping[str, Any]) -> None:
            _check_config(place, _read_config(place, contents), config, free)
            _check_examples(place, contents["num_examples"], self._num_examples)

        step, items = _first_sound(
            self._manager,
            steps,
            lambda place: _restore(place, targets, together=jax.process_count() > 1, check=check),
        )
        self._set_aside([other for other in steps if other > step])
        return TrainState(
            step=items["train"]["step"],
            params=items["params"],
            ema_params=items["ema"],
            opt_state=items["opt"],
            key=items["train"]["key"],
        )

    def latest_step(self) -> int | None:
        """The step of the newest checkpoint, also one still being written; None without any."""
        return self._manager.latest_step()

    def reached_preemption(self, step: int) -> bool:
        """Whether the hosts of a multi-host run agreed to stop at this step, after a SIGTERM."""
        return self._manager.reached_preemption(step)

    def wait(self) -> None:
        """Returns when everything is on disk.

        Raises:
            CheckpointError: if something cannot be written.
        """
        with self._writing():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for the writes and releases the folder.

        Raises:
            CheckpointError: if something cannot be written.
        """
        with self._writing():
            self._manager.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # orbax hands on whatever the storage raises
            raise CheckpointError(
                f"a checkpoint cannot be written to {self.directory}: {_brief(error)}"
            ) from error

    def _set_aside(self, steps: list[int]) -> None:
        if not steps:
            return
        if jax.process_index() == 0:
            for step in steps:
                aside = self.directory / f"damaged-{step}"
                if aside.exists():
                    aside.rmtree()
                (self.directory / str(step)).rename(aside)
        multihost_utils.sync_global_devices("jaxdiff: damaged checkpoints set aside")
        self._manager.reload()


def check_shared(directory: str | os.PathLike[str]) -> None:
    """Refuses a folder that is not the same for all processes of a run; all must call it.

    They would begin at different steps, or wait for one another in a save for ever.

    Args:
        directory: the folder of the checkpoints, local or remote; made if missing.

    Raises:
        ValueError: on all processes, if one does not see what process 0 writes there.
        CheckpointError: if nothing can be written there.
    """
    if jax.process_count() == 1:
        return
    folder = _folder(directory)
    with _reaching(folder):
        from etils import epath

        mark = epath.Path(folder) / from_first(f"shared-{uuid.uuid4().hex}")

        def write() -> None:
            if jax.process_index() == 0:
                mark.parent.mkdir(parents=True, exist_ok=True)
                mark.write_text("")

        _agreed(write, together=True)
        sees = multihost_utils.process_allgather(np.array(mark.exists()))
        if jax.process_index() == 0:
            mark.unlink()
    if not sees.all():
        raise ValueError(
            f"checkpoint_dir must be a folder that all processes share, got {folder}: process "
            f"{int(np.argmin(sees))} does not see what process 0 writes there"
        )


def restore_ema(
    path: str | os.PathLike[str],
    abstract_params: Params,
    *,
    checkpoint: str | int = "last",
    together: bool = False,
) -> Params:
    """The averaged parameters of an undamaged checkpoint; changes nothing on disk.

    Args:
        path: the folder of the checkpoints, local or remote.
        abstract_params: parameters of the wanted shapes, dtypes and shardings, as in
            `Checkpoints.restore_latest`; usually `jax.eval_shape(network.init, ...)`.
        checkpoint: "last", "best" by the validation metric, or a step. In place of a damaged
            one comes the one before it or, with a warning too, the next best; not of a step.
        together: whether all processes call it, and so have the same checkpoint; as they do anyway
            for parameters that are split over them. Else one alone may, for its own devices.

    Returns:
        The parameters, on the devices that `abstract_params` names.

    Raises:
        ValueError: if there is no such checkpoint.
        CheckpointMismatch: if it is of another model; names the leaves.
        CheckpointError: if there are checkpoints and all are damaged, or one cannot be reached.
    """
    together = together or _spans_processes(abstract_params)
    with _manager(path, create=False, multiprocessing_options=_alone()) as manager:
        steps = _chosen(manager, checkpoint, together)
        targets = {"ema": abstract_params}
        _, found = _first_sound(
            manager, steps, lambda place: _restore(place, targets, together=together)
        )
        return found["ema"]


def restore_config(path: str | os.PathLike[str], *, together: bool = False) -> dict[str, Any]:
    """The configuration that was saved with the newest undamaged checkpoint.

    Args:
        path: the folder of the checkpoints, local or remote.
        together: whether all processes call it, and so have that of the same checkpoint; else one
            alone may.

    Returns:
        The values, as JSON knows them.

    Raises:
        ValueError: if there is no checkpoint.
        CheckpointError: if there are checkpoints and all are damaged, or one cannot be reached.
    """
    with _manager(path, create=False, multiprocessing_options=_alone()) as manager:
        steps = _chosen(manager, "last", together)

        def read(place: Any) -> dict[str, Any]:
            def config() -> dict[str, Any]:
                return _read_config(place, _read_contents(place))

            return _agreed(lambda: _patiently(config), together)

        return _first_sound(manager, steps, read)[1]


_METRICS = "metrics.json"


class _NewestAndBest:
    """orbax's preservation policy, of metrics that are known only after the save."""

    def __init__(self, keep: int, metrics: Mapping[int, float]):
        self._keep, self._metrics = keep, metrics

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        steps = [checkpoint.step for checkpoint in checkpoints]
        kept = {*steps[-self._keep :], *_by_metric(steps, self._metrics)[:1]}
        return [step in kept for step in steps]


def _manager(directory: str | os.PathLike[str], **options: Any) -> Any:
    import orbax.checkpoint as ocp

    folder = _folder(directory)
    with _reaching(folder):
        return ocp.CheckpointManager(folder, options=ocp.CheckpointManagerOptions(**options))


def _folder(directory: str | os.PathLike[str]) -> str:
    """As orbax takes it: absolute, or remote."""
    folder = os.fspath(directory)
    return folder if "://" in folder else os.path.abspath(folder)


@contextlib.contextmanager
def _reaching(folder: str) -> Iterator[None]:
    try:
        yield
    except (ImportError, OSError) as error:
        raise CheckpointError(f"{folder} cannot be reached: {_brief(error)}") from error


def _items(state: TrainState) -> dict[str, Any]:
    return {
        "params": state.params,
        "ema": state.ema_params,
        "opt": state.opt_state,
        "train": {"step": state.step, "key": state.key},
    }


def _chosen(manager: Any, checkpoint: str | int, together: bool) -> list[int]:
    """The steps to try, one after the other."""
    metrics = _read_metrics(manager.directory) if checkpoint == "best" else {}
    listed = [sorted(manager.all_steps(), reverse=True), list(metrics.items())]
    # What was just written is not listed everywhere at once.
    steps, metrics = from_first(listed) if together else listed
    if not steps:
        raise ValueError(f"path must hold a checkpoint, got {str(manager.directory)!r}")
    if checkpoint == "last":
        return steps
    if checkpoint == "best":
        rated = _by_metric(steps, dict(metrics))
        if not rated:
            raise ValueError(
                f"checkpoint='best': none in {manager.directory} has a validation metric"
            )
        return rated
    if checkpoint not in steps:
        raise ValueError(f"checkpoint must be 'last', 'best' or one of {steps}, got {checkpoint!r}")
    return [int(checkpoint)]


def _by_metric(steps: Sequence[int], metrics: Mapping[int, float]) -> list[int]:
    """Those that have one, the best first; of equals the newest."""
    return sorted((s for s in steps if s in metrics), key=lambda s: (metrics[s], -s))


def _read_metrics(directory: Any) -> dict[int, float]:
    path = directory / _METRICS
    if not path.exists():
        return {}
    try:
        known = _unseal(_patiently(lambda: json.loads(path.read_text())))["metrics"]
    except ValueError as error:
        warnings.warn(f"{path} is damaged ({_brief(error)})", RuntimeWarning, stacklevel=3)
        return {}
    return {int(step): metric for step, metric in known.items()}


def _first_sound(manager: Any, steps: Sequence[int], read: Callable[[Any], T]) -> tuple[int, T]:
    """The first of the steps that is not damaged, and what is read of it."""
    failures: dict[int, Exception] = {}
    for step in steps:
        try:
            found = read(manager.directory / str(step))
        except (CheckpointError, CheckpointMismatch):
            raise
        except Exception as error:
            if not _is_damage(error):
                raise CheckpointError(
                    f"checkpoint {step} in {manager.directory} cannot be reached: {_brief(error)}"
                ) from error
            failures[step] = error
            continue
        for bad, error in failures.items():
            warnings.warn(
                f"checkpoint {bad} in {manager.directory} is damaged ({_brief(error)}); "
                f"going back to {step}",
                RuntimeWarning,
                stacklevel=3,
            )
        return step, found
    first = failures[steps[0]]
    raise CheckpointError(
        f"no checkpoint in {manager.directory} can be restored: "
        f"{', '.join(map(str, steps))} damaged ({_brief(first)})"
    ) from first


def _restore(
    place: Any,
    targets: dict[str, Any],
    *,
    together: bool,
    check: Callable[[Any, Mapping[str, Any]], None] = lambda place, contents: None,
) -> dict[str, Any]:
    targets = {name: _target(tree) for name, tree in targets.items()}

    def read() -> tuple[dict[str, Any], dict[str, Any]]:
        contents = _read_contents(place)
        check(place, contents)
        expected = contents["leaves"]
        _check_leaves(place, expected, targets)
        return expected, {name: _read(place / name, target) for name, target in targets.items()}

    def verify() -> None:
        for name, tree in restored.items():
            for leaf, found in _contents(tree).items():
                # The kind too: a key that lost its type has the same bits.
                if list(found) != expected[name][leaf]:
                    raise ValueError(f"checksum mismatch in {name}/{leaf}")

    expected, restored = _agreed(lambda: _patiently(read), together)
    _agreed(verify, together)
    return restored


_PAUSES = (1.0, 3.0)
"""Seconds before what failed for a reason that may pass is tried again."""


def _patiently(read: Callable[[], T]) -> T:
    """Reads, and tries again if that fails for another reason than what is stored."""
    for pause in _PAUSES:
        try:
            return read()
        except CheckpointMismatch:
            raise
        except Exception as error:
            if _is_damage(error):
                raise
            time.sleep(pause)
    return read()


def _agreed(do: Callable[[], T], together: bool) -> T:
    """What each process does for itself; if one fails all do, for none waits for another then."""
    result, error, own = None, None, _FINE
    try:
        result = do()
    except Exception as problem:
        error, own = problem, _DAMAGED if _is_damage(problem) else _OTHER
    worst = int(multihost_utils.process_allgather(np.array(own)).max()) if together else own
    if error is not None and own == worst:
        raise error
    if worst == _OTHER:
        raise CheckpointError("another process cannot reach the checkpoints")
    if worst == _DAMAGED:
        raise ValueError("another process cannot read its part")
    return cast(T, result)


_FINE, _DAMAGED, _OTHER = range(3)
_ELSEWHERE = (
    "ABORTED",
    "CANCELLED",
    "DEADLINE_EXCEEDED",
    "INTERNAL",
    "PERMISSION_DENIED",
    "RESOURCE_EXHAUSTED",
    "UNAUTHENTICATED",
    "UNAVAILABLE",
    "UNKNOWN",
)
"""What tensorstore's ValueErrors begin with if it could not get at what is stored."""


def _is_damage(error: Exception) -> bool:
    """Whether an error tells of what is stored, and would come again."""
    if isinstance(error, CheckpointMismatch):
        return False
    root = _root(error)
    # The last three as well: orbax falls over its own files if a bit of them is flipped.
    kinds = (FileNotFoundError, ValueError, LookupError, AttributeError, TypeError)
    return isinstance(root, kinds) and not str(root).startswith(_ELSEWHERE)


def _root(error: BaseException) -> BaseException:
    """What is behind the bare Exception that orbax makes of an error."""
    return error.__cause__ if type(error) is Exception and error.__cause__ else error


def _check_config(
    place: Any,
    saved: Mapping[str, Any],
    config: Mapping[str, Any] | None,
    free: Collection[str],
) -> None:
    if not config or not saved:
        return
    given = json.loads(json.dumps(config))
    for name in sorted((saved.keys() | given.keys()) - set(free)):
        if saved.get(name) != given.get(name):
            raise CheckpointMismatch(
                f"checkpoint {place} is of a run with {name}={saved.get(name)!r}, "
                f"not {given.get(name)!r}"
            )


def _check_examples(place: Any, saved: int | None, number: int | None) -> None:
    if number is not None and saved not in (None, number):
        raise CheckpointMismatch(
            f"checkpoint {place} is of a run with {saved} training examples, "
            f"and the data set now has {number}"
        )


def _read(path: Any, target: Any) -> Any:
    """What an item holds, read by each process for itself."""
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer(multiprocessing_options=_alone()) as checkpointer:
        return checkpointer.restore(path, target)


def _alone() -> Any:
    """Options of orbax for reading without waiting for other processes."""
    import orbax.checkpoint as ocp

    index = jax.process_index()
    return ocp.options.MultiprocessingOptions(primary_host=index, active_processes={index})


def _read_config(place: Any, contents: Mapping[str, Any]) -> dict[str, Any]:
    values = _read_json(place / "config")
    if _crc(values) != contents["config"]:
        raise ValueError("checksum mismatch in config")
    return values


def _read_contents(place: Any) -> dict[str, Any]:
    return _unseal(_read_json(place / "contents"))


def _read_json(item: Any) -> Any:
    return json.loads((item / "metadata").read_text())


def _check_leaves(place: Any, saved: Mapping[str, Any], targets: Mapping[str, Any]) -> None:
    differences = []
    for name, tree in targets.items():
        wanted = {leaf: _kind(value) for leaf, value in _named_leaves(tree)}
        for leaf in wanted | saved[name]:
            there = saved[name][leaf][0] if leaf in saved[name] else "no such leaf"
            here = wanted.get(leaf, "none")
            if there != here:
                differences.append(
                    f"{name}/{leaf}: the checkpoint has {there}, the model wants {here}"
                )
    if differences:
        more = f"; and {len(differences) - 3} more" if len(differences) > 3 else ""
        raise CheckpointMismatch(
            f"checkpoint {place} is of another model: {'; '.join(differences[:3])}{more}"
        )


def _spans_processes(tree: Any) -> bool:
    leaves = jax.tree.leaves(_target(tree))
    return not all(leaf.sharding.is_fully_addressable for leaf in leaves)


def _target(tree: Any) -> Any:
    """What orbax should build: without a sharding it asks for the devices of the saving run."""
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None) or here
        ),
        tree,
    )


def _contents(tree: Any) -> dict[str, tuple[str, int]]:
    """Of each leaf its kind and its checksum."""
    leaves = _named_leaves(tree)
    # All are on their way before the first is waited for.
    sums = jax.device_get([_checksum(leaf) for _, leaf in leaves])
    return {
        name: (_kind(leaf), int(total)) for (name, leaf), total in zip(leaves, sums, strict=True)
    }


def _named_leaves(tree: Any) -> list[tuple[str, Any]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in leaves]


def _kind(leaf: Any) -> str:
    return f"{leaf.dtype} {leaf.shape}"


@jax.jit
def _checksum(leaf: Array) -> Array:
    words = _words(leaf)
    index, stride = jnp.zeros(words.shape, jnp.uint32), 1
    for axis in reversed(range(words.ndim)):
        along = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        index += along * jnp.uint32(stride % 2**32)
        stride *= words.shape[axis]
    return jnp.sum(_mix(words ^ _mix(index)), dtype=jnp.uint32)


def _words(leaf: Array) -> Array:
    """The bits of an array as uint32: a word for each element, or two on a last axis."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    if jnp.iscomplexobj(leaf):
        leaf = jnp.stack([leaf.real, leaf.imag], -1)
    if leaf.dtype == bool:
        leaf = leaf.astype(jnp.uint8)
    narrow = {1: jnp.uint8, 2: jnp.uint16}.get(leaf.dtype.itemsize, jnp.uint32)
    return jax.lax.bitcast_convert_type(leaf, narrow).astype(jnp.uint32)


def _mix(word: Array) -> Array:
    """The finalizer of MurmurHash3: each line can be undone."""
    word ^= word >> 16
    word *= jnp.uint32(0x85EBCA6B)
    word ^= word >> 13
    word *= jnp.uint32(0xC2B2AE35)
    return word ^ word >> 16


def _seal(values: dict[str, Any]) -> dict[str, Any]:
    return values | {"crc": _crc(values)}


def _unseal(found: Any) -> dict[str, Any]:
    """The values, if they are those that were sealed."""
    values = {name: value for name, value in dict(found).items() if name != "crc"}
    if found.get("crc") != _crc(values):
        raise ValueError("checksum mismatch in its table of contents")
    return values


def _crc(values: Any) -> int:
    return zlib.crc32(json.dumps(values, sort_keys=True).encode())


def _brief(error: Exception) -> str:
    root = _root(error)
    return textwrap.shorten(str(root) or type(root).__name__, 160)
