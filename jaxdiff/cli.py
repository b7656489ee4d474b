"""The command line: `jaxdiff train | sample | eval | export`.

A user's mistake is answered with one line and exit code 2, before anything is written: values and
files are looked at while a run is composed. What fails later has exit code 1, with one line where a
run can fail without anyone's mistake, and with the traceback of a bug otherwise. Of several
processes one that fails alone leaves at once, and so ends the others.
"""

import contextlib
import dataclasses
import errno
import functools
import io
import json
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, TypeVar

import jax
import tyro
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh

from jaxdiff import flops, grids
from jaxdiff.checkpoints import CheckpointError, CheckpointMismatch, check_shared, restore_ema
from jaxdiff.data.images import DatasetError
from jaxdiff.evaluation import evaluate
from jaxdiff.experiment import Experiment, free_names, load_config, load_run, save_run
from jaxdiff.export import (
    PLATFORMS,
    export_likelihood,
    export_sampler,
    sampled_by,
    save_program,
)
from jaxdiff.parallel import (
    check_divisible,
    data_mesh,
    from_first,
    shard_batch,
    start_distributed,
    state_shardings,
)
from jaxdiff.reporting import import_wandb, profile_window
from jaxdiff.samplers.ancestral import Ancestral
from jaxdiff.samplers.base import sample
from jaxdiff.samplers.ddim import DDIM
from jaxdiff.samplers.dpm_solver_plus import DPMSolverPP
from jaxdiff.samplers.heun import Heun
from jaxdiff.solve import probability_flow, reverse_sde
from jaxdiff.training import Batches, NonFiniteLoss, fit, init_state, make_train_step
from jaxdiff.typing import Params

__all__ = ["main"]

USAGE = """usage: jaxdiff COMMAND …

  jaxdiff train CONFIG --workdir RUN [options]   train, then sample and evaluate
  jaxdiff sample RUN --num 64 --out samples.png  sample from a trained run
  jaxdiff eval RUN                               evaluate a trained run
  jaxdiff export RUN --out sampler.jax           its sampler, or likelihood, for JAX alone

CONFIG is a Python file such as configs/digits.py. `jaxdiff train CONFIG --help` lists its options,
with their defaults; the same call goes on with a run that was interrupted.
"""

SPLITS = ("train", "validation", "test")

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

STEPS = {"ancestral": Ancestral, "ddim": DDIM, "dpm_solver_pp": DPMSolverPP, "heun": Heun}
"""Samplers by steps, as `--sampler` names them."""

LOADING = """it takes {taken}, the keys of n examples first, and returns {returned}:

    import jax
    from jax import export
    program = jax.jit(export.deserialize(bytearray(open("{path}", "rb").read())).call)
    keys = jax.random.split(jax.random.PRNGKey(0), 64)  # n = 64, or any other
"""


def _cache_folder() -> str:
    """The user's setting of JAX, or a folder of the user's."""
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return jax.config.jax_compilation_cache_dir or str(Path(caches) / "jaxdiff" / "xla")  # pyright: ignore[reportAttributeAccessIssue]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Options:
    """Those of every command."""

    compilation_cache: str | None = dataclasses.field(default_factory=_cache_folder)
    """Folder that keeps compiled programs for the next start; None keeps none."""


T = TypeVar("T", bound=_Options)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs a command; exits with 2 on a mistake of the user's, and 1 if the run fails.

    Args:
        argv: the words after the program's name; by default those of the process.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    commands = {"train": _train, "sample": _sample, "eval": _evaluate, "export": _export}
    if words and words[0] in ("-h", "--help"):
        print(USAGE, end="")
        return
    if not words or words[0] not in commands:
        given = repr(words[0]) if words else "none"
        _fail(f"the command must be one of {', '.join(commands)}, got {given}; see jaxdiff --help.")
    try:
        commands[words[0]](words[1:])
    except CheckpointMismatch as error:
        _fail(f"{error}; give another folder.", together=True)
    except NonFiniteLoss as error:
        _fail(str(error), code=1, together=True)
    except (CheckpointError, DatasetError) as error:
        _fail(str(error), code=1)
    except KeyboardInterrupt:
        _fail("interrupted; the same command goes on.", code=130)
    except Exception as error:
        if isinstance(error, OSError) and error.errno in FULL:
            _fail(f"{error}; once there is space, the same command goes on.", code=1)
        if not jax.distributed.is_initialized():
            raise
        traceback.print_exc()
        _leave(1)


def _fail(message: str, *, code: int = 2, together: bool = False) -> NoReturn:
    """Ends the process with one line; all of several alike, or this one alone."""
    print(f"jaxdiff: error: {' '.join(message.split())}", file=sys.stderr)
    if jax.distributed.is_initialized() and not together:
        _leave(code)
    raise SystemExit(code)


def _leave(code: int) -> NoReturn:
    """Ends the process at once: on its way out it would wait for others, which wait for it."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@contextlib.contextmanager
def _mistakes(*, together: bool = False) -> Iterator[None]:
    """Bad values and files are the user's while a run is composed, and bugs once it works."""
    try:
        yield
    except (ValueError, OSError) as error:
        _fail(str(error), together=together)


def _parse(kind: type[T], words: Sequence[str], prog: str) -> T:
    """Parses words into a dataclass; tyro's boxed errors become one line."""
    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr):
            options = tyro.cli(kind, args=list(words), prog=prog)
    except SystemExit as error:
        if error.code:
            _fail(_unboxed(stderr.getvalue()) or "the options could not be read.")
        raise
    _keep_compiled(options.compilation_cache)
    return options


def _keep_compiled(folder: str | None) -> None:
    """Compiled programs are read from a folder and written to it, by all that follows."""
    if folder is not None and not _is_writable(folder):
        print(
            f"jaxdiff: warning: compiled programs are not kept, since nothing can be written to "
            f"{folder}; see --compilation-cache.",
            file=sys.stderr,
        )
        folder = None
    compilation_cache.reset_cache()  # a config may have compiled something already
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _is_writable(folder: str) -> bool:
    if "://" in folder:  # remote: JAX's own to find out
        return True
    with contextlib.suppress(OSError):
        os.makedirs(folder, exist_ok=True)
    return os.access(folder, os.W_OK | os.X_OK)


def _unboxed(text: str) -> str:
    """The message of a box in Unicode or ASCII: its paragraphs, without the title and the help."""
    lines = [line.strip(" │|╭╮╰╯+") for line in text.splitlines()]
    body = "\n".join(line for line in lines if line).partition("\n")[2]
    paragraphs = re.split(r"^[─-]+$", body, flags=re.MULTILINE)
    telling = [p for p in paragraphs if p.strip() and "helptext" not in p]
    return "; ".join(" ".join(p.split()) for p in telling)


@dataclasses.dataclass(frozen=True)
class _Processes:
    """Which processes take part."""

    distributed: bool = False
    """One of several processes that each run this command. On Cloud TPU, Slurm, Kubernetes and Open
    MPI they find one another; elsewhere give the next three."""
    coordinator: str | None = None
    """host:port of process 0; or JAX_COORDINATOR_ADDRESS."""
    num_processes: int | None = None
    """How many processes; or JAX_NUM_PROCESSES."""
    process_id: int | None = None
    """Which of them this is, from 0; or JAX_PROCESS_ID."""
    heartbeat_timeout: int | None = None
    """Seconds after which the others stop, where a process has died; 30 if not given."""

    def join(self) -> None:
        """Meets the other processes; before anything touches a device."""
        named = (self.coordinator, self.num_processes, self.process_id)
        timeout = self.heartbeat_timeout
        if self.distributed:
            start_distributed(*named, heartbeat_timeout_seconds=30 if timeout is None else timeout)
        elif any(value is not None for value in (*named, timeout)):
            raise ValueError(
                "--coordinator, --num-processes, --process-id and --heartbeat-timeout need "
                "--distributed."
            )


def _train_options(config: type) -> type:
    """The options of a run: where it goes, and the fields of its config."""
    return dataclasses.make_dataclass(
        "Options",
        [
            ("workdir", Annotated[Path, tyro.conf.arg(help="Folder of the run.")]),
            ("config", Annotated[tyro.conf.OmitArgPrefixes[config], tyro.conf.arg(name="")]),
            ("progress", Annotated[bool, tyro.conf.arg(help="Show a progress bar.")], True),
            (
                "processes",
                Annotated[tyro.conf.OmitArgPrefixes[_Processes], tyro.conf.arg(name="")],
                _Processes(),
            ),
            (
                "fsdp",
                Annotated[
                    int,
                    tyro.conf.arg(
                        help="How many devices share one copy of parameters, average and moments."
                    ),
                ],
                1,
            ),
            (
                "checkpoint_dir",
                Annotated[
                    str | None,
                    tyro.conf.arg(
                        help="Folder of the checkpoints, if not in --workdir: it may be remote, "
                        "such as gs://bucket/run."
                    ),
                ],
                None,
            ),
            (
                "by",
                Annotated[
                    Literal["jit", "shard_map", "pmap"],
                    tyro.conf.arg(
                        help="How devices share a step: jit splits the program; in the others each "
                        "runs it on its own examples, which is faster on CPUs."
                    ),
                ],
                "jit",
            ),
            (
                "profile_steps",
                Annotated[
                    str | None,
                    tyro.conf.arg(
                        metavar="FIRST:STOP",
                        help="Updates to trace for TensorBoard: 100:110 are 100, …, 109.",
                    ),
                ],
                None,
            ),
            (
                "wandb",
                Annotated[
                    str | None,
                    tyro.conf.arg(
                        metavar="PROJECT",
                        help="Project of Weights & Biases that the log goes to as well.",
                    ),
                ],
                None,
            ),
        ],
        bases=(_Options,),
        frozen=True,
    )


def _train(words: Sequence[str]) -> None:
    if words and words[0] in ("-h", "--help"):
        print(USAGE, end="")
        return
    if not words or words[0].startswith("-"):
        _fail("train needs a config file first: jaxdiff train CONFIG --workdir RUN.")
    source = Path(words[0])
    with _mistakes():
        module = load_config(source)
        options: Any = _parse(_train_options(module.Config), words[1:], f"jaxdiff train {source}")
        _check_workdir(options.workdir)
        _check_reachable(options.checkpoint_dir)
        options.processes.join()
        experiment = module.experiment(options.config)
        profile_steps = _window(options.profile_steps)
        profile_window(profile_steps, experiment.steps)
        if options.wandb is not None:
            import_wandb()
        batches = experiment.batches()
        several = jax.device_count() > 1 or options.fsdp != 1 or options.by != "jit"
        mesh = data_mesh(fsdp=options.fsdp) if several else None
        devices = 1 if mesh is None else len(mesh.local_devices)
        check_divisible(batches[0], devices, experiment.accumulate)
        jax.eval_shape(experiment.init, jax.random.key(0))
        train_step = make_train_step(
            experiment.objective,
            experiment.optimizer,
            ema_decay=experiment.ema_decay,
            mesh=mesh,
            by=options.by,
            accumulate=experiment.accumulate,
        )
    _begin(options.workdir, source, experiment)
    with _mistakes(together=True):
        check_shared(options.checkpoint_dir or options.workdir / "checkpoints")
    _fit(
        experiment,
        train_step,
        batches,
        options.workdir,
        mesh,
        by=options.by,
        checkpoint_dir=options.checkpoint_dir,
        progress=options.progress,
        profile_steps=profile_steps,
        wandb=options.wandb,
    )
    _heed_sigterm()
    params = _parameters(experiment, options.workdir, options.checkpoint_dir)
    picture, seed = options.workdir / "samples.png", experiment.seed
    _draw_samples(experiment, params, picture, num=experiment.shown[0], seed=seed, mesh=mesh)
    _draw_trajectory(experiment, params, options.workdir / "trajectory.png", seed=seed)
    _evaluate_run(
        experiment, params, options.workdir, seed=seed, progress=options.progress, mesh=mesh
    )


def _check_workdir(workdir: Path) -> None:
    if remote := re.match(r"(\w{2,}):/", str(workdir)):  # of two slashes a path keeps one
        raise ValueError(
            f"--workdir must be a local folder, got {workdir}; --checkpoint-dir may be on "
            f"{remote[1]}://."
        )


def _check_reachable(folder: str | None) -> None:
    ways = ("gcsfs", "tensorflow")  # etils takes the latter where it is installed
    if folder is not None and folder.startswith("gs://") and not any(map(find_spec, ways)):
        raise ValueError(f"--checkpoint-dir {folder} needs gcsfs: pip install 'jaxdiff[gcs]'.")


def _begin(workdir: Path, source: Path, experiment: Experiment) -> None:
    """Makes the run's folder, before anyone else writes to it, or refuses it on all processes."""
    refused = None
    if _first():
        try:
            save_run(workdir, source, experiment.config)
        except (ValueError, OSError) as error:
            refused = str(error)
    if (refused := from_first(refused)) is not None:
        _fail(refused, together=True)


def _first() -> bool:
    """Whether this process is the one that writes."""
    return jax.process_index() == 0


def _window(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    words = re.fullmatch(r"(\d+):(\d+)", text)
    if words is None:
        raise ValueError(f"--profile-steps must be FIRST:STOP such as 100:110, got {text!r}.")
    return int(words[1]), int(words[2])


def _fit(
    experiment: Experiment,
    train_step: Any,
    batches: Batches,
    workdir: Path,
    mesh: Mesh | None,
    *,
    by: str,
    checkpoint_dir: str | None,
    progress: bool,
    profile_steps: tuple[int, int] | None,
    wandb: str | None,
) -> None:
    init_key, train_key, draw_key = jax.random.split(jax.random.key(experiment.seed), 3)
    shardings = None
    if mesh is not None:  # so that no device ever holds the whole of what is split
        shardings = state_shardings(jax.eval_shape(experiment.init, init_key), mesh)
    init = jax.jit(experiment.init, out_shardings=shardings)
    # No name for the parameters, of which the state has its own: they would stay on the device.
    state = init_state(init(init_key), experiment.optimizer, train_key, mesh=mesh)
    batch = batches[0] if mesh is None else shard_batch(batches[0], mesh)
    programs = jax.process_count() if by == "pmap" else 1  # each process has its own
    own = None if mesh is None else data_mesh(jax.local_devices())  # the first draws alone
    fit(
        train_step,
        state,
        batches,
        steps=experiment.steps,
        workdir=workdir,
        checkpoint_dir=checkpoint_dir,
        config=dataclasses.asdict(experiment.config),
        free=free_names(experiment.config),
        validate=functools.partial(experiment.validate, mesh=mesh),
        draw=lambda params, path: experiment.draw(
            experiment.sample(params, draw_key, experiment.shown[0], mesh=own), path
        ),
        progress=progress,
        mesh=mesh,
        flops_per_step=flops.count(train_step, state, batch) * programs,
        profile_steps=profile_steps,
        wandb=wandb,
        **experiment.intervals,
    )


def _heed_sigterm() -> None:
    """JAX keeps SIGTERM from a process that could save; from here on there is nothing to save."""
    if jax.distributed.is_initialized():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _parameters(
    experiment: Experiment, run: Path, folder: str | None = None, checkpoint: str = "last"
) -> Params:
    """The averaged parameters of one of a run's checkpoints."""
    with _mistakes():
        _check_reachable(folder)
        if folder is None and not (run / "checkpoints").is_dir():
            raise ValueError(f"RUN {run} has no checkpoint yet; train it first.")
        abstract = jax.eval_shape(experiment.init, jax.random.key(0))
        return restore_ema(
            run / "checkpoints" if folder is None else folder,
            abstract,
            checkpoint=int(checkpoint) if checkpoint.isdecimal() else checkpoint,
            together=jax.process_count() > 1,
        )


def _draw_samples(
    experiment: Experiment,
    params: Params,
    path: Path,
    *,
    num: int,
    seed: int,
    mesh: Mesh | None = None,
) -> None:
    x = experiment.sample(params, jax.random.key(seed), num, mesh=mesh)
    if _first():
        experiment.draw(x, path)
        print(f"wrote {path}")


def _draw_trajectory(experiment: Experiment, params: Params, path: Path, *, seed: int) -> None:
    if _first():
        states, times = experiment.trajectory(params, jax.random.key(seed), experiment.shown[1])
        experiment.draw_trajectory(states, path, times=times.tolist())
        print(f"wrote {path}")


def _evaluate_run(
    experiment: Experiment,
    params: Params,
    run: Path,
    *,
    seed: int,
    split: str = "test",
    progress: bool,
    mesh: Mesh | None,
) -> None:
    since = time.perf_counter()
    report = evaluate(
        experiment,
        params,
        jax.random.key(seed),
        split=split,
        folder=run if _first() else None,
        mesh=mesh,
        progress=progress,
    )
    if _first():
        _write_report(report, run, split, time.perf_counter() - since)
    from_first(None)  # they end together


def _write_report(report: dict[str, Any], run: Path, split: str, seconds: float) -> None:
    report["seconds"] = seconds
    path = run / ("eval.json" if split == "test" else f"eval_{split}.json")
    # JSON has no word for what is not a finite number.
    finite = json.loads(json.dumps(report), parse_constant=lambda _: None)
    text = json.dumps(finite, indent=2)
    partial = path.with_suffix(".tmp")
    partial.write_text(text + "\n")
    partial.replace(path)
    print(text)
    print(f"wrote {path}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _RunOptions(_Options):
    """Those of every command on a trained run."""

    run: tyro.conf.Positional[Path]
    """Folder of the run."""
    checkpoint: str = "last"
    """last, best by the validation loss, or a step."""
    checkpoint_dir: str | None = None
    """Folder of the checkpoints, if not in RUN."""

    def parameters(self, experiment: Experiment) -> Params:
        """The averaged parameters of the checkpoint."""
        return _parameters(experiment, self.run, self.checkpoint_dir, self.checkpoint)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _SampleOptions(_RunOptions):
    """Samples from a trained run into a picture."""

    num: int = 64
    """How many samples."""
    out: Path = Path("samples.png")
    """Picture to write."""
    seed: int = 0
    """Seed of the noise."""


def _sample(words: Sequence[str]) -> None:
    options = _parse(_SampleOptions, words, "jaxdiff sample")
    with _mistakes():
        if options.num < 1:
            raise ValueError(f"--num must be at least 1, got {options.num}.")
        _check_seed(options.seed)
        if options.out.suffix.lower() != ".png" or options.out.is_dir():
            raise ValueError(f"--out must be a file that ends in .png, got {options.out}.")
        if not options.out.absolute().parent.is_dir():
            raise ValueError(f"--out {options.out}: there is no folder {options.out.parent}.")
        experiment = load_run(options.run)
    params = options.parameters(experiment)
    mesh = data_mesh() if jax.device_count() > 1 else None
    _draw_samples(experiment, params, options.out, num=options.num, seed=options.seed, mesh=mesh)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _EvaluateOptions(_RunOptions):
    """Evaluates a trained run: eval.json, a row an example in likelihood_SPLIT.csv, and pictures.

    The same call goes on with rows that were interrupted. Over several processes RUN must be on
    every host.
    """

    split: str = "test"
    """train, validation or test; of the first two the likelihood only, into eval_SPLIT.json."""
    seed: int = 0
    """Seed of noise and probes."""
    progress: bool = True
    """Show a progress bar."""
    processes: tyro.conf.OmitArgPrefixes[_Processes] = _Processes()


def _evaluate(words: Sequence[str]) -> None:
    options = _parse(_EvaluateOptions, words, "jaxdiff eval")
    with _mistakes():
        _check_seed(options.seed)
        if options.split not in SPLITS:
            raise ValueError(f"--split must be one of {', '.join(SPLITS)}, got {options.split!r}.")
        options.processes.join()
        _heed_sigterm()
        experiment = load_run(options.run)
        experiment.batches()  # the data are there, and of the run's shape
        if options.split != "test" and experiment.likelihood is None:
            raise ValueError(f"--split {options.split}: RUN {options.run} has no likelihood.")
    params = options.parameters(experiment)
    _evaluate_run(
        experiment,
        params,
        options.run,
        seed=options.seed,
        split=options.split,
        progress=options.progress,
        mesh=data_mesh() if jax.device_count() > 1 else None,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _ExportOptions(_RunOptions):
    """Writes the sampler of a trained run, or its likelihood, as a program that needs JAX alone."""

    out: Path
    """File to write."""
    sampler: str = "run"
    """run, the config's own; ancestral, ddim, dpm_solver_pp, heun or reverse_sde, in steps even in
    log-SNR; or probability_flow, which chooses its steps."""
    steps: int | None = None
    """Steps of a sampler that is named; 100 if not given."""
    likelihood: bool = False
    """The likelihood instead, as the config computes it."""


def _export(words: Sequence[str]) -> None:
    options = _parse(_ExportOptions, words, "jaxdiff export")
    with _mistakes():
        _check_export(options)
        experiment = load_run(options.run)
        if options.sampler != "run":
            sampler = functools.partial(_sampler, options.sampler, options.steps or 100)
            experiment = sampled_by(experiment, sampler)
    params = options.parameters(experiment)
    with _mistakes():
        export = export_likelihood if options.likelihood else export_sampler
        program = export(experiment, params)
        save_program(program, options.out)
    megabytes = options.out.stat().st_size / 1e6
    print(f"wrote {options.out}: {megabytes:.1f} MB, for {', '.join(PLATFORMS)}")
    taken, _ = jax.tree.unflatten(program.in_tree, [a.str_short() for a in program.in_avals])
    returned = jax.tree.unflatten(program.out_tree, [a.str_short() for a in program.out_avals])
    print(LOADING.format(path=options.out, taken=", ".join(map(str, taken)), returned=returned))


def _check_export(options: _ExportOptions) -> None:
    names = ("run", *STEPS, "reverse_sde", "probability_flow")
    if options.sampler not in names:
        raise ValueError(f"--sampler must be one of {', '.join(names)}, got {options.sampler!r}.")
    if options.likelihood and options.sampler != "run":
        raise ValueError(f"--likelihood has no sampler, got --sampler {options.sampler}.")
    if options.steps is not None:
        if options.likelihood or options.sampler in ("run", "probability_flow"):
            raise ValueError(f"--steps are those of another --sampler, got {options.steps}.")
        if options.steps < 2:
            raise ValueError(f"--steps must be at least 2, got {options.steps}.")
    if options.out.is_dir() or not options.out.absolute().parent.is_dir():
        raise ValueError(f"--out must be a file in a folder that exists, got {options.out}.")


def _sampler(name: str, steps: int, process: Any) -> Callable[..., Any]:
    """(denoise, keys, x) ↦ samples."""
    if name == "probability_flow":
        return lambda denoise, keys, x: probability_flow(
            process, denoise, x, 1.0, 1e-3, final_denoise=True, throw=False
        )
    if name == "reverse_sde":
        grid = grids.uniform_log_snr(process, steps, to_zero=False)
        return lambda denoise, keys, x: reverse_sde(
            process, denoise, keys, x, grid, final_denoise=True, throw=False
        )
    step, grid = STEPS[name](process), grids.uniform_log_snr(process, steps)
    return lambda denoise, keys, x: sample(step, denoise, grid, keys, x)


def _check_seed(seed: int) -> None:
    if not 0 <= seed < 2**63:
        raise ValueError(f"--seed must be in [0, 2**63), got {seed}.")
