"""The command line: `jaxdiff train | sample | eval`.

A user's mistake is answered with one line and exit code 2, before anything is written.
"""

import contextlib
import dataclasses
import io
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

__all__ = ["main"]

USAGE = """usage: jaxdiff COMMAND …

  jaxdiff train CONFIG --workdir RUN [options]   train, then sample and evaluate
  jaxdiff sample RUN --num 64 --out samples.png  sample from a trained run
  jaxdiff eval RUN                               evaluate a trained run

CONFIG is a Python file such as configs/digits.py. `jaxdiff train CONFIG --help` lists its options,
with their defaults; the same call goes on with a run that was interrupted.
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Runs a command; exits with 2 on a mistake of the user's, and 1 if the run fails.

    Args:
        argv: the words after the program's name; by default those of the process.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    commands = {"train": _train, "sample": _sample, "eval": _evaluate}
    if not words or words[0] in ("-h", "--help"):
        print(USAGE, end="")
        raise SystemExit(0 if words else 2)
    if words[0] not in commands:
        _fail(f"no command {words[0]!r}; there are {', '.join(commands)}.")
    try:
        commands[words[0]](words[1:])
    except _user_errors() as error:
        _fail(str(error))
    except RuntimeError as error:
        print(f"jaxdiff: error: {error}", file=sys.stderr)
        raise SystemExit(1) from error
    except KeyboardInterrupt:
        print("jaxdiff: interrupted; the same command goes on.", file=sys.stderr)
        raise SystemExit(130) from None


def _user_errors() -> tuple[type[Exception], ...]:
    return (ValueError, FileNotFoundError, PermissionError, NotADirectoryError)


def _fail(message: str) -> None:
    print(f"jaxdiff: error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(2)


def _parse(kind: type, words: Sequence[str], prog: str) -> Any:
    """Parses words into a dataclass; tyro's boxed errors become one line."""
    import tyro

    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr):
            return tyro.cli(kind, args=list(words), prog=prog)
    except SystemExit as error:
        if error.code:
            _fail(_unboxed(stderr.getvalue()) or "the options could not be read.")
        raise


def _unboxed(text: str) -> str:
    """The message of a box: its lines down to the first rule, without the title."""
    lines = [line.strip().strip("│").strip() for line in text.splitlines()]
    body = [line for line in lines if line and not line.startswith("╭")]
    rules = [i for i, line in enumerate(body) if set(line) <= set("─╰╯")]
    return " ".join(body[: rules[0]] if rules else body)


def _train(words: Sequence[str]) -> None:
    import tyro

    from jaxdiff.experiment import load_config, save_run

    if not words or words[0].startswith("-"):
        if words and words[0] in ("-h", "--help"):
            print(USAGE, end="")
            return
        raise ValueError("train needs a config file first: jaxdiff train CONFIG --workdir RUN.")
    source = Path(words[0])
    module = load_config(source)
    options = dataclasses.make_dataclass(
        "Options",
        [
            ("workdir", Annotated[Path, tyro.conf.arg(help="Folder of the run.")]),
            (
                "progress",
                Annotated[bool, tyro.conf.arg(help="Show a progress bar.")],
                True,
            ),
            (
                "compilation_cache",
                Annotated[
                    Path | None, tyro.conf.arg(help="Folder that keeps compiled programs.")
                ],
                None,
            ),
            (
                "config",
                Annotated[tyro.conf.OmitArgPrefixes[module.Config], tyro.conf.arg(name="")],
                dataclasses.field(default_factory=module.Config),
            ),
        ],
    )
    chosen = _parse(options, words[1:], f"jaxdiff train {source}")
    if chosen.compilation_cache is not None:
        _keep_compiled(chosen.compilation_cache)
    experiment = module.experiment(chosen.config)
    batches = experiment.batches()
    save_run(chosen.workdir, source, experiment.config)
    _fit(experiment, batches, chosen.workdir, progress=chosen.progress)
    params = _parameters(experiment, chosen.workdir)
    _draw_samples(experiment, params, chosen.workdir / "samples.png", num=64, seed=experiment.seed)
    _draw_trajectory(experiment, params, chosen.workdir / "trajectory.png", seed=experiment.seed)
    _write_report(experiment, params, chosen.workdir / "eval.json", seed=experiment.seed)


def _keep_compiled(folder: Path) -> None:
    import jax

    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _fit(experiment: Any, batches: Any, workdir: Path, *, progress: bool) -> None:
    import jax

    from jaxdiff.parallel import data_mesh
    from jaxdiff.training import fit, init_state, make_train_step

    mesh = data_mesh() if jax.device_count() > 1 else None
    init_key, train_key, draw_key = jax.random.split(jax.random.key(experiment.seed), 3)
    train_step = make_train_step(
        experiment.objective, experiment.optimizer, ema_decay=experiment.ema_decay, mesh=mesh
    )
    params = jax.jit(experiment.init)(init_key)
    fit(
        train_step,
        init_state(params, experiment.optimizer, train_key, mesh=mesh),
        batches,
        steps=experiment.steps,
        workdir=workdir,
        config=dataclasses.asdict(experiment.config),
        validate=experiment.validate,
        draw=lambda params, path: experiment.draw(experiment.sample(params, draw_key, 64), path),
        progress=progress,
        mesh=mesh,
        **experiment.intervals,
    )


def _parameters(experiment: Any, run: Path) -> Any:
    """The averaged parameters of a run's newest checkpoint."""
    import jax

    from jaxdiff.checkpoints import restore_ema

    if not (run / "checkpoints").is_dir():
        raise ValueError(f"RUN {run} has no checkpoint yet; train it first.")
    abstract = jax.eval_shape(experiment.init, jax.random.key(0))
    return restore_ema(run / "checkpoints", abstract)


def _draw_samples(experiment: Any, params: Any, path: Path, *, num: int, seed: int) -> None:
    import jax

    experiment.draw(experiment.sample(params, jax.random.key(seed), num), path)
    print(f"wrote {path}")


def _draw_trajectory(experiment: Any, params: Any, path: Path, *, seed: int) -> None:
    import jax

    states, times = experiment.trajectory(params, jax.random.key(seed), 8)
    experiment.draw_trajectory(states, times, path)
    print(f"wrote {path}")


def _write_report(experiment: Any, params: Any, path: Path, *, seed: int) -> None:
    import jax

    since = time.perf_counter()
    report = experiment.evaluate(params, jax.random.key(seed))
    report["seconds"] = time.perf_counter() - since
    text = json.dumps(report, indent=2)
    path.write_text(text + "\n")
    print(text)
    print(f"wrote {path}")


def _sample(words: Sequence[str]) -> None:
    import tyro

    from jaxdiff.experiment import load_run

    options = dataclasses.make_dataclass(
        "Options",
        [
            ("run", tyro.conf.Positional[Path]),
            ("num", Annotated[int, tyro.conf.arg(help="How many samples.")], 64),
            ("out", Annotated[Path, tyro.conf.arg(help="Picture to write.")], Path("samples.png")),
            ("seed", Annotated[int, tyro.conf.arg(help="Seed of the noise.")], 0),
        ],
    )
    chosen = _parse(options, words, "jaxdiff sample")
    if chosen.num < 1:
        raise ValueError(f"--num must be at least 1, got {chosen.num}.")
    if chosen.out.suffix.lower() != ".png":
        raise ValueError(f"--out must end in .png, got {chosen.out}.")
    if not chosen.out.absolute().parent.is_dir():
        raise ValueError(f"--out {chosen.out}: there is no folder {chosen.out.parent}.")
    experiment = load_run(chosen.run)
    params = _parameters(experiment, chosen.run)
    _draw_samples(experiment, params, chosen.out, num=chosen.num, seed=chosen.seed)


def _evaluate(words: Sequence[str]) -> None:
    import tyro

    from jaxdiff.experiment import load_run

    options = dataclasses.make_dataclass(
        "Options",
        [
            ("run", tyro.conf.Positional[Path]),
            ("seed", Annotated[int, tyro.conf.arg(help="Seed of noise and probes.")], 0),
        ],
    )
    chosen = _parse(options, words, "jaxdiff eval")
    experiment = load_run(chosen.run)
    params = _parameters(experiment, chosen.run)
    _write_report(experiment, params, chosen.run / "eval.json", seed=chosen.seed)
