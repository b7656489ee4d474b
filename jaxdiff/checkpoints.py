"""Checkpoints that survive kills, damage and a change of machine.

A checkpoint is one folder `<directory>/<step>` that orbax renames into place when it is complete,
so a process killed at any moment leaves either the whole of it or a temporary folder that nobody
lists. Its items are separate (`params`, `ema`, `opt`, `train`, `config`), so that inference reads
the averaged parameters alone. `checksums` holds a CRC-32 of every leaf: storage restores a flipped
bit without complaint, and a run must not go on from one.
"""

import os
import shutil
import textwrap
import warnings
import zlib
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxdiff.training import TrainState
from jaxdiff.typing import Params

__all__ = ["CheckpointError", "Checkpoints", "restore_config", "restore_ema"]


class CheckpointError(RuntimeError):
    """There are checkpoints, and none of them can be restored."""


class Checkpoints:
    """The checkpoints of one run, newest `keep` of them; a context manager.

    Args:
        directory: the folder that holds them; made if missing.
        keep: how many to keep, ≥ 1.

    Raises:
        ValueError: if `keep` is less than 1.
    """

    def __init__(self, directory: str | os.PathLike[str], *, keep: int = 3):
        if keep < 1:
            raise ValueError(f"keep must be at least 1, got {keep}")
        self.directory = Path(directory).absolute()
        self._manager = _manager(
            self.directory, max_to_keep=keep, create=True, cleanup_tmp_directories=True
        )

    def save(self, step: int, state: TrainState, config: Mapping[str, Any] | None = None) -> None:
        """Starts to save the state; returns once it is copied, and writes in the background.

        Args:
            step: the number of updates behind the state; more than that of every checkpoint here.
            state: the training state, replicated; it may be donated as soon as this returns.
            config: values for JSON, kept beside it.

        Raises:
            ValueError: if `step` is not newer than the newest checkpoint.
        """
        import orbax.checkpoint as ocp

        items = _items(state)
        saved = self._manager.save(
            step,
            args=ocp.args.Composite(
                config=ocp.args.JsonSave(dict(config or {})),
                checksums=ocp.args.JsonSave({name: _checksums(i) for name, i in items.items()}),
                **{name: ocp.args.StandardSave(item) for name, item in items.items()},
            ),
        )
        if not saved:
            raise ValueError(f"step must be newer than {self.latest_step()}, got {step}")

    def restore_latest(self, abstract_state: TrainState) -> TrainState | None:
        """The newest undamaged checkpoint, bit for bit.

        Damaged ones are passed over with a warning, and moved to `damaged-<step>`: left in place
        they would keep the run from saving that step again.

        Args:
            abstract_state: a state of the wanted shapes, dtypes and shardings: arrays, or
                `jax.ShapeDtypeStruct` as `jax.eval_shape` gives them (one device, if they name no
                sharding). The number of devices need not be that of the saving run.

        Returns:
            The state, or None if there is no checkpoint.

        Raises:
            CheckpointError: if there are checkpoints and all are damaged or of another model.
        """
        newest = _restore_newest(self._manager, _items(abstract_state))
        if newest is None:
            return None
        step, items = newest
        self._set_aside([other for other in self._manager.all_steps() if other > step])
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
        """Returns when everything is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for the writes and releases the folder."""
        self._manager.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _set_aside(self, steps: list[int]) -> None:
        if not steps:
            return
        if jax.process_index() == 0:
            for step in steps:
                aside = self.directory / f"damaged-{step}"
                shutil.rmtree(aside, ignore_errors=True)
                (self.directory / str(step)).rename(aside)
        multihost_utils.sync_global_devices("jaxdiff: damaged checkpoints set aside")
        self._manager.reload()


def restore_ema(path: str | os.PathLike[str], abstract_params: Params) -> Params:
    """The averaged parameters of the newest undamaged checkpoint; changes nothing on disk.

    Args:
        path: the folder of the checkpoints.
        abstract_params: parameters of the wanted shapes, dtypes and shardings, as in
            `Checkpoints.restore_latest`; usually `jax.eval_shape(network.init, ...)`.

    Returns:
        The parameters, on the devices that `abstract_params` names.

    Raises:
        ValueError: if there is no checkpoint.
        CheckpointError: if there are checkpoints and all are damaged or of another model.
    """
    with _reader(path) as manager:
        newest = _restore_newest(manager, {"ema": abstract_params})
    if newest is None:
        raise ValueError(f"path must hold a checkpoint, got {os.fspath(path)!r}")
    return newest[1]["ema"]


def restore_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The configuration that was saved with the newest checkpoint.

    Args:
        path: the folder of the checkpoints.

    Returns:
        The values, as JSON knows them.

    Raises:
        ValueError: if there is no checkpoint.
    """
    import orbax.checkpoint as ocp

    with _reader(path) as manager:
        step = manager.latest_step()
        if step is None:
            raise ValueError(f"path must hold a checkpoint, got {os.fspath(path)!r}")
        return manager.restore(step, args=ocp.args.Composite(config=ocp.args.JsonRestore()))[
            "config"
        ]


def _manager(directory: str | os.PathLike[str], **options: Any) -> Any:
    import orbax.checkpoint as ocp

    return ocp.CheckpointManager(
        Path(directory).absolute(), options=ocp.CheckpointManagerOptions(**options)
    )


def _reader(path: str | os.PathLike[str]) -> Any:
    if not Path(path).is_dir():
        raise ValueError(f"path must hold a checkpoint, got {os.fspath(path)!r}")
    return _manager(path, create=False)


def _items(state: TrainState) -> dict[str, Any]:
    return {
        "params": state.params,
        "ema": state.ema_params,
        "opt": state.opt_state,
        "train": {"step": state.step, "key": state.key},
    }


def _restore_newest(manager: Any, targets: dict[str, Any]) -> tuple[int, dict[str, Any]] | None:
    failures: dict[int, Exception] = {}
    for step in sorted(manager.all_steps(), reverse=True):
        try:
            restored = _restore(manager, step, targets)
        except Exception as error:  # orbax raises a bare Exception for a truncated file
            failures[step] = error
            continue
        for bad, error in failures.items():
            warnings.warn(
                f"checkpoint {bad} in {manager.directory} is damaged ({_brief(error)}); "
                f"going back to {step}",
                RuntimeWarning,
                stacklevel=3,
            )
        return step, restored
    if failures:
        newest = failures[max(failures)]
        raise CheckpointError(
            f"no checkpoint in {manager.directory} can be restored: all are damaged or of another "
            f"model ({_brief(newest)})"
        ) from newest
    return None


def _restore(manager: Any, step: int, targets: dict[str, Any]) -> dict[str, Any]:
    import orbax.checkpoint as ocp

    restored = manager.restore(
        step,
        args=ocp.args.Composite(
            checksums=ocp.args.JsonRestore(),
            **{name: ocp.args.StandardRestore(_target(tree)) for name, tree in targets.items()},
        ),
    )
    for name in targets:
        expected = restored["checksums"][name]
        for leaf, checksum in _checksums(restored[name]).items():
            if checksum != expected[leaf]:
                raise ValueError(f"checksum mismatch in {name}{leaf}")
    return {name: restored[name] for name in targets}


def _target(tree: Any) -> Any:
    """What orbax should build: without a sharding it asks for the devices of the saving run."""
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None) or here
        ),
        tree,
    )


def _checksums(tree: Any) -> dict[str, int]:
    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(_raw_keys(tree)))
    return {
        jax.tree_util.keystr(path): zlib.crc32(np.asarray(leaf).tobytes()) for path, leaf in leaves
    }


def _raw_keys(tree: Any) -> Any:
    def raw(leaf: Any) -> Any:
        is_key = jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return jax.random.key_data(leaf) if is_key else leaf

    return jax.tree.map(raw, tree)


def _brief(error: Exception) -> str:
    return textwrap.shorten(str(error) or type(error).__name__, 160)
