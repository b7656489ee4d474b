"""The command line: `jaxdiff train | sample | eval | export`.

A user's mistake is answered with one line and exit code 2, before anything is written: values and
files are looked at while a run is composed. What fails later has exit code 1, with one line where a
run can fail without anyone's mistake, and with the traceback of a bug otherwise.
"""

import contextlib
import dataclasses
import functools
import io
import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, TypeVar

import jax
import tyro
from jax.sharding import Mesh

from jaxdiff import grids
from jaxdiff.checkpoints import CheckpointError, restore_ema
from jaxdiff.evaluation import evaluate
from jaxdiff.experiment import Experiment, load_config, load_run, save_run
from jaxdiff.export import (
    PLATFORMS,
    export_likelihood,
    export_sampler,
    sampled_by,
    save_program,
)
from jaxdiff.parallel import check_divisible, data_mesh
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

STEPS = {"ancestral": Ancestral, "ddim": DDIM, "dpm_solver_pp": DPMSolverPP, "heun": Heun}
"""Samplers by steps, as `--sampler` names them."""

LOADING = """it takes {taken}, the keys of n examples first, and returns {returned}:

    import jax
    from jax import export
    program = jax.jit(export.deserialize(bytearray(open("{path}", "rb").read())).call)
    keys = jax.random.split(jax.random.PRNGKey(0), 64)  # n = 64, or any other
"""

T = TypeVar("T")


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
    except (CheckpointError, NonFiniteLoss) as error:
        _fail(str(error), code=1)
    except KeyboardInterrupt:
        _fail("interrupted; the same command goes on.", code=130)


def _fail(message: str, *, code: int = 2) -> NoReturn:
    print(f"jaxdiff: error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(code)


@contextlib.contextmanager
def _mistakes() -> Iterator[None]:
    """Bad values and files are the user's while a run is composed, and bugs once it works."""
    try:
        yield
    except (ValueError, OSError) as error:
        _fail(str(error))


def _parse(kind: type[T], words: Sequence[str], prog: str) -> T:
    """Parses words into a dataclass; tyro's boxed errors become one line."""
    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr):
            return tyro.cli(kind, args=list(words), prog=prog)
    except SystemExit as error:
        if error.code:
            _fail(_unboxed(stderr.getvalue()) or "the options could not be read.")
        raise


def _unboxed(text: str) -> str:
    """The message of a box in Unicode or ASCII: its paragraphs, without the title and the help."""
    lines = [line.strip(" │|╭╮╰╯+") for line in text.splitlines()]
    body = "\n".join(line for line in lines if line).partition("\n")[2]
    paragraphs = re.split(r"^[─-]+$", body, flags=re.MULTILINE)
    telling = [p for p in paragraphs if p.strip() and "helptext" not in p]
    return "; ".join(" ".join(p.split()) for p in telling)


def _train_options(config: type) -> type:
    """The options of a run: where it goes, and the fields of its config."""
    return dataclasses.make_dataclass(
        "Options",
        [
            ("workdir", Annotated[Path, tyro.conf.arg(help="Folder of the run.")]),
            ("config", Annotated[tyro.conf.OmitArgPrefixes[config], tyro.conf.arg(name="")]),
            ("progress", Annotated[bool, tyro.conf.arg(help="Show a progress bar.")], True),
            (
                "compilation_cache",
                Annotated[Path | None, tyro.conf.arg(help="Folder that keeps compiled programs.")],
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
        ],
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
        experiment = module.experiment(options.config)
        batches = experiment.batches()
        mesh = data_mesh() if jax.device_count() > 1 or options.by != "jit" else None
        check_divisible(batches[0], 1 if mesh is None else len(mesh.local_devices))
        jax.eval_shape(experiment.init, jax.random.key(0))
        train_step = make_train_step(
            experiment.objective,
            experiment.optimizer,
            ema_decay=experiment.ema_decay,
            mesh=mesh,
            by=options.by,
        )
        save_run(options.workdir, source, experiment.config)
    if options.compilation_cache is not None:
        _keep_compiled(options.compilation_cache)
    _fit(experiment, train_step, batches, options.workdir, mesh, progress=options.progress)
    params = _parameters(experiment, options.workdir)
    picture = options.workdir / "samples.png"
    _draw_samples(experiment, params, picture, num=experiment.shown[0], seed=experiment.seed)
    _draw_trajectory(experiment, params, options.workdir / "trajectory.png", seed=experiment.seed)
    _evaluate_run(
        experiment, params, options.workdir, seed=experiment.seed, progress=options.progress
    )


def _keep_compiled(folder: Path) -> None:
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _fit(
    experiment: Experiment,
    train_step: Any,
    batches: Batches,
    workdir: Path,
    mesh: Mesh | None,
    *,
    progress: bool,
) -> None:
    init_key, train_key, draw_key = jax.random.split(jax.random.key(experiment.seed), 3)
    params = jax.jit(experiment.init)(init_key)
    fit(
        train_step,
        init_state(params, experiment.optimizer, train_key, mesh=mesh),
        batches,
        steps=experiment.steps,
        workdir=workdir,
        config=dataclasses.asdict(experiment.config),
        validate=experiment.validate,
        draw=lambda params, path: experiment.draw(
            experiment.sample(params, draw_key, experiment.shown[0]), path
        ),
        progress=progress,
        mesh=mesh,
        **experiment.intervals,
    )


def _parameters(experiment: Experiment, run: Path) -> Params:
    """The averaged parameters of a run's newest checkpoint."""
    with _mistakes():
        if not (run / "checkpoints").is_dir():
            raise ValueError(f"RUN {run} has no checkpoint yet; train it first.")
        abstract = jax.eval_shape(experiment.init, jax.random.key(0))
        return restore_ema(run / "checkpoints", abstract)


def _draw_samples(
    experiment: Experiment, params: Params, path: Path, *, num: int, seed: int
) -> None:
    experiment.draw(experiment.sample(params, jax.random.key(seed), num), path)
    print(f"wrote {path}")


def _draw_trajectory(experiment: Experiment, params: Params, path: Path, *, seed: int) -> None:
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
) -> None:
    since = time.perf_counter()
    report = evaluate(
        experiment,
        params,
        jax.random.key(seed),
        split=split,
        folder=run,
        mesh=data_mesh() if jax.device_count() > 1 else None,
        progress=progress,
    )
    report["seconds"] = time.perf_counter() - since
    path = run / ("eval.json" if split == "test" else f"eval_{split}.json")
    # JSON has no word for what is not a finite number.
    finite = json.loads(json.dumps(report), parse_constant=lambda _: None)
    text = json.dumps(finite, indent=2)
    partial = path.with_suffix(".tmp")
    partial.write_text(text + "\n")
    partial.replace(path)
    print(text)
    print(f"wrote {path}")


@dataclasses.dataclass(frozen=True)
class _SampleOptions:
    """Samples from a trained run into a picture."""

    run: tyro.conf.Positional[Path]
    """Folder of the run."""
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
    params = _parameters(experiment, options.run)
    _draw_samples(experiment, params, options.out, num=options.num, seed=options.seed)


@dataclasses.dataclass(frozen=True)
class _EvaluateOptions:
    """Evaluates a trained run: eval.json, a row an example in likelihood_SPLIT.csv, and pictures.

    The same call goes on with rows that were interrupted.
    """

    run: tyro.conf.Positional[Path]
    """Folder of the run."""
    split: str = "test"
    """train, validation or test; of the first two the likelihood only, into eval_SPLIT.json."""
    seed: int = 0
    """Seed of noise and probes."""
    progress: bool = True
    """Show a progress bar."""


def _evaluate(words: Sequence[str]) -> None:
    options = _parse(_EvaluateOptions, words, "jaxdiff eval")
    with _mistakes():
        _check_seed(options.seed)
        if options.split not in SPLITS:
            raise ValueError(f"--split must be one of {', '.join(SPLITS)}, got {options.split!r}.")
        experiment = load_run(options.run)
        experiment.batches()  # the data are there, and of the run's shape
        if options.split != "test" and experiment.likelihood is None:
            raise ValueError(f"--split {options.split}: RUN {options.run} has no likelihood.")
    params = _parameters(experiment, options.run)
    _evaluate_run(
        experiment,
        params,
        options.run,
        seed=options.seed,
        split=options.split,
        progress=options.progress,
    )


@dataclasses.dataclass(frozen=True)
class _ExportOptions:
    """Writes the sampler of a trained run, or its likelihood, as a program that needs JAX alone."""

    run: tyro.conf.Positional[Path]
    """Folder of the run."""
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
    params = _parameters(experiment, options.run)
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
