"""What a config file composes, and what the command line runs.

A config is a Python file with

    @dataclass(frozen=True)
    class Config:                 # its fields, with their comments, become the run's options
        ...

    def experiment(config: Config) -> Experiment:
        ...                       # composes process, network, objective, optimizer, data, sampler

and nothing else is needed to train, sample and evaluate. The run's folder keeps a copy of the file
and the values as JSON, so that later commands need only the folder.
"""

import dataclasses
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import optax

from jaxdiff.typing import Array, Key, Objective, Params

__all__ = ["FREE", "Experiment", "Likelihood", "free_names", "load_config", "load_run", "save_run"]

FREE = {"free": True}
"""Metadata of a config's field that changes how a run is computed and not what: a run may go on
with another value."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Likelihood:
    """What the likelihood of a run is computed of, and how.

    Attributes:
        examples: (split, key) ↦ a tree of arrays [n, …], n ≥ 2; split is "train", "validation" or
            "test".
        estimate: (parameters, keys [m], examples [m, …]) ↦ log p, or a bound of it, as .value [m]
            in nats; and, where they apply, the other attributes of `LogLikelihood`. It is compiled.
        bits: −log p in nats ↦ bits a dimension, or None.
        further: (examples, −log p [n]) ↦ JSON-able entries of the report, or None.
        sweeps: option of `estimate` ↦ values of it: how accurate it is shown to be. One that has
            "tolerance" solves an equation, and also takes `per_example=True`.
        size: examples at a time, on each device.
        example: shapes and dtypes of one example, if they are known without the data.
    """

    examples: Callable[[str, Key], Any]
    estimate: Callable[..., Any]
    bits: Callable[[Any], Any] | None = None
    further: Callable[[Any, Any], dict[str, Any]] | None = None
    sweeps: Mapping[str, Sequence[float | int]] = dataclasses.field(default_factory=dict)
    size: int = 256
    example: Any = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    """The parts of a run; all are functions, so that nothing is loaded before it is needed.

    Attributes:
        config: the values, complete: what was left open is filled in, such as the data's shape.
        init: key ↦ the network's parameters.
        process: the forward process.
        denoiser: parameters ↦ the model, a `Denoiser` for any sampler or solver.
        objective: the training loss.
        optimizer: the optax transformation.
        ema_decay: decay of the averaged parameters, in [0, 1).
        accumulate: parts of a batch that a step takes one after another, ≥ 1.
        steps: number of updates.
        seed: of parameters, data order and noise.
        batches: () ↦ an object whose item i is batch i, a pure function of i.
        validate: (parameters, mesh=None) ↦ named numbers, at intervals. Here and below, the devices
            of the mesh share the work.
        sample: (parameters, key, n, mesh=None) ↦ n samples in the model's space.
        trajectory: (parameters, key, n) ↦ (states [times, n, …] from noise to data, times).
        evaluate: (parameters, key, mesh=None) ↦ a JSON-able report of anything but the likelihood.
        likelihood: of its data, or None.
        draw: (samples, path), writes a picture.
        draw_trajectory: (states, path, times=times), writes a picture.
        sampler: (parameters, keys [n]) ↦ samples [n, …] in the model's space, sample i of keys[i]
            alone; of a run with classes label=[n], too, without which it draws classes. A pure
            function, of which programs are made, or None.
        num_classes: number of classes that samples can be asked for, or None. `denoiser` then has
            an option label=[n], too.
        shape: of a state of the process, where samples are such states; else None.
        shown: samples in the pictures of samples and of trajectories.
        intervals: how often `fit` logs, evaluates and saves, by its argument names.
    """

    config: Any
    init: Callable[[Key], Params]
    process: Any
    denoiser: Callable[..., Any]
    objective: Objective
    optimizer: optax.GradientTransformation
    ema_decay: float
    steps: int
    seed: int
    batches: Callable[[], Any]
    validate: Callable[..., Mapping[str, float]]
    sample: Callable[..., Array]
    trajectory: Callable[[Params, Key, int], tuple[Array, Array]]
    evaluate: Callable[..., dict[str, Any]]
    draw: Callable[[Array, Path], Any]
    draw_trajectory: Callable[..., Any]
    likelihood: Likelihood | None = None
    accumulate: int = 1
    sampler: Callable[..., Array] | None = None
    num_classes: int | None = None
    shape: tuple[int, ...] | None = None
    shown: tuple[int, int] = (64, 8)
    intervals: Mapping[str, int] = dataclasses.field(default_factory=dict)


def load_config(path: Path) -> ModuleType:
    """Imports a config file.

    Args:
        path: of a Python file that defines `Config` and `experiment`.

    Raises:
        ValueError: if there is no such file, it cannot be imported or lacks one of the two.
    """
    if not path.is_file():
        raise ValueError(f"CONFIG {path} does not exist; give the path of a config file.")
    if path.suffix != ".py":
        raise ValueError(f"CONFIG {path} is not a Python file.")
    # Not by an importer: it would leave a __pycache__ beside the file, and could read a stale one.
    module = ModuleType(f"jaxdiff_config_{path.stem}")
    module.__file__ = str(path.resolve())
    sys.modules[module.__name__] = module  # dataclasses look their module up
    try:
        exec(compile(path.read_text(), module.__file__, "exec"), module.__dict__)
    except Exception as error:
        raise ValueError(f"CONFIG {path} fails on import: {error!r}.") from error
    if not dataclasses.is_dataclass(getattr(module, "Config", None)):
        raise ValueError(f"CONFIG {path} does not define a dataclass Config.")
    if not callable(getattr(module, "experiment", None)):
        raise ValueError(f"CONFIG {path} does not define a function experiment.")
    return module


def save_run(folder: Path, source: Path, config: Any) -> None:
    """Makes a run's folder, or checks that it holds the same run.

    Args:
        folder: a new or empty folder, or one of a run with the same file and values, but for
            `steps`, which may grow: the rest then follows the longer run's schedule.
        source: the config file, of which the folder keeps a copy.
        config: its values.

    Raises:
        ValueError: if the folder holds something else, or a run with other values.
    """
    values = json.loads(json.dumps(dataclasses.asdict(config)))
    stored, copy = folder / "config.json", folder / "config.py"
    text = source.read_text()
    if stored.is_file():
        previous = _read_values(stored)
        if copy.is_file() and copy.read_text() != text:
            raise ValueError(
                f"--workdir {folder} holds a run of another version of {source.name}; "
                f"give another folder."
            )
        if values.get("steps", 0) < previous.get("steps", 0):
            raise ValueError(
                f"--workdir {folder} holds a run with steps={previous['steps']}; "
                f"steps cannot shrink to {values['steps']}."
            )
        for name in sorted((values.keys() | previous.keys()) - free_names(config)):
            if values.get(name) != previous.get(name):
                raise ValueError(
                    f"--workdir {folder} holds a run with {name}={previous.get(name)!r}, "
                    f"not {values.get(name)!r}; give another folder, or that value."
                )
    elif folder.exists() and not (folder.is_dir() and _may_begin(folder)):
        raise ValueError(f"--workdir {folder} is not empty and not a run; give another folder.")
    folder.mkdir(parents=True, exist_ok=True)
    # The values last: a folder that has them is a run.
    _write(copy, text)
    _write(stored, json.dumps(values, indent=2) + "\n")


def _write(path: Path, text: str) -> None:
    """In one piece, or on a full disk not at all; what is there already is left alone."""
    if path.is_file() and path.read_text() == text:
        return
    partial = path.with_name(path.name + ".tmp")
    partial.write_text(text)
    partial.replace(path)


def free_names(config: Any) -> set[str]:
    """Names of the fields of a config that may change when its run goes on: "steps" and `FREE`."""
    return {"steps"} | {f.name for f in dataclasses.fields(config) if f.metadata == FREE}


def load_run(folder: Path) -> Experiment:
    """The experiment that a run's folder holds.

    Raises:
        ValueError: if the folder is no run.
    """
    if not folder.is_dir():
        raise ValueError(f"RUN {folder} is not a folder.")
    if not (folder / "config.json").is_file() or not (folder / "config.py").is_file():
        raise ValueError(f"RUN {folder} is not a run: it has no config.json and config.py.")
    module = load_config(folder / "config.py")
    values = _read_values(folder / "config.json")
    try:
        lists = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
        config = module.Config(**lists)
    except TypeError as error:
        raise ValueError(f"RUN {folder} has a config.json that does not fit: {error}.") from error
    return module.experiment(config)


def _read_values(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}.") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold the values of a config, got {values!r}.")
    return values


def _may_begin(folder: Path) -> bool:
    """Whether a folder is empty, but for what a run killed at its very start had written."""
    begun = {"config.py", "config.py.tmp", "config.json.tmp"}
    return {path.name for path in folder.iterdir()} <= begun
