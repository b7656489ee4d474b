"""The command line: mistakes, a run from beginning to end, and what its folder is good for."""

import errno
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from PIL import Image
from runs import free_port

from jaxdiff.checkpoints import Checkpoints, restore_ema
from jaxdiff.cli import main
from jaxdiff.data.images import DatasetError
from jaxdiff.experiment import load_config, load_run

# orbax leaves the coroutines of a failed read to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

ROOT = Path(__file__).parent.parent
DIGITS = ROOT / "configs" / "digits.py"

# A whole experiment of one parameter, so that runs take a moment.
SMALL = '''
import functools
from dataclasses import dataclass, replace
import jax, jax.numpy as jnp, optax
import jaxdiff as jd
from jaxdiff import evaluation, plotting
from jaxdiff.data.batches import Batches
from jaxdiff.data.images import dequantize, load_images
from jaxdiff.solve import adaptive
from jaxdiff.training import make_eval_step

@dataclass(frozen=True)
class Config:
    """A model of one number."""
    dataset: str
    """Images."""
    levels: int | None = None
    """Number of grey levels; read off the data set if not given."""
    rate: float = 0.1
    """Learning rate, not negative."""
    steps: int = 4
    """Updates."""
    batch_size: int = 8
    """Images in a batch."""
    sides: tuple[int, ...] = (1, 2)
    """A tuple."""
    fault: str = ""
    """What goes wrong, where."""

def apply(params, x, noise_level):
    return params["w"] * x

def experiment(config):
    if config.rate < 0:
        raise ValueError(f"rate must not be negative, got {config.rate}.")
    images = functools.partial(load_images, config.dataset)
    config = replace(config, levels=images("train").levels)
    shape = images("train").x.shape[1:]
    process = jd.Gaussian(jd.linear_beta())
    denoising = jd.denoising(apply, process, jd.epsilon())

    def objective(params, key, batch):
        x = dequantize(key, batch["x"], config.levels)
        loss, metrics = denoising(params, key, {"x": x})
        return (jnp.log(-1.0) if config.fault == "loss" else 1.0) * loss, metrics

    def denoiser(params):
        return jd.NetDenoiser(params, process, apply, jd.epsilon())

    def sample(params, key, n, mesh=None):
        x = process.prior((n, *shape)).sample(key)
        return jd.sample(jd.DDIM(process), denoiser(params), jd.grids.uniform(2), key, x)

    def trajectory(params, key, n):
        x = process.prior((n, *shape)).sample(key)
        grid = jd.grids.uniform(7)
        states = jd.sample(jd.DDIM(process), denoiser(params), grid, key, x, trajectory=True)
        return states, grid

    def evaluate(params, key, mesh=None):
        if config.fault == "evaluate":
            raise ValueError("a bug of the evaluation")
        samples = evaluation.sample_report(
            sample(params, key, 16), images("train"), images("test"), key
        )
        return {"samples": samples}

    def estimate(params, keys, x, *, tolerance=1e-3, per_example=False):
        return jd.log_likelihood(
            process, denoiser(params), x, key=keys, probes=1,
            controller=adaptive(tolerance), per_example=per_example,
        )

    likelihood = jd.Likelihood(
        examples=lambda split, key: dequantize(key, images(split).x, config.levels),
        estimate=estimate,
        sweeps={"tolerance": (1e-1, 1e-2)},
        size=4,
    )

    return jd.Experiment(
        config=config,
        init=lambda key: {"w": jax.random.uniform(key)},
        process=process,
        denoiser=denoiser,
        objective=objective,
        optimizer=optax.sgd(config.rate),
        ema_decay=0.5,
        steps=config.steps,
        seed=0,
        batches=lambda: Batches({"x": images("train").x}, config.batch_size),
        validate=lambda params, mesh=None: {"w": float(params["w"])},
        sample=sample,
        trajectory=trajectory,
        evaluate=evaluate,
        likelihood=likelihood,
        draw=plotting.image_grid,
        draw_trajectory=plotting.trajectory_grid,
    )
'''


def pictures(n=60):
    """n grey pictures of 8×8 pixels in three classes of different brightness."""
    label = np.arange(n) % 3
    noise = np.random.default_rng(0).integers(0, 60, (n, 8, 8))
    return (noise + 80 * label[:, None, None]).astype(np.uint8), label


@pytest.fixture(scope="module")
def npz(tmp_path_factory):
    path = tmp_path_factory.mktemp("npz") / "own.npz"
    x, y = pictures()
    np.savez(path, x=x, y=y)
    return path


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "small.py"
    path.write_text(SMALL)
    return path


@pytest.fixture(scope="module")
def small_run(tmp_path_factory, small, npz):
    """A trained run; the tests that change it copy it."""
    run = tmp_path_factory.mktemp("runs") / "deep" / "run"
    command(small, npz, run)
    return run


@pytest.fixture
def copied_run(small_run, tmp_path):
    return Path(shutil.copytree(small_run, tmp_path / "copied"))


def command(config, dataset, run, *options):
    words = ["train", config, "--workdir", run, "--dataset", dataset, "--no-progress", *options]
    main([str(word) for word in words])


def files(folder):
    """All files with their contents' length and time of change."""
    return {
        path.relative_to(folder): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


def mistake(capsys, *words, code=2):
    """Runs a command that must fail with one line, and returns the line."""
    with pytest.raises(SystemExit) as stopped:
        main([str(word) for word in words])
    written = capsys.readouterr().err
    assert stopped.value.code == code, written
    assert written.startswith("jaxdiff: error: "), written
    assert written.count("\n") == 1, written
    assert written.endswith("\n")
    assert "─" not in written
    assert "---" not in written
    return written


# Mistakes

OPTIONS = {
    "unknown": (["--nope", "1"], "--nope"),
    "misspelt": (["--widht", "8"], "--width"),
    "stray word": (["stray"], "stray"),
    "no value": (["--width"], "--width"),
    "no number": (["--width", "wide"], "--width"),
    "no whole number": (["--width", "1.5"], "--width"),
    "no list of numbers": (["--multipliers", "1", "b"], "--multipliers"),
    "no steps": (["--steps", "0"], "steps"),
    "negative width": (["--width", "-1"], "width"),
    "no width": (["--width", "0"], "width"),
    "negative blocks": (["--blocks", "-1"], "blocks"),
    "negative rate": (["--learning-rate", "-1"], "learning_rate"),
    "dropout of all": (["--dropout", "1"], "dropout"),
    "huge batch": (["--batch-size", "100000"], "batch_size"),
    "no batch": (["--batch-size", "0"], "batch_size"),
    "no beta": (["--beta-max", "0"], "beta_max"),
    "negative beta": (["--beta-min", "-1"], "beta_min"),
    "negative seed": (["--seed", "-1"], "seed"),
    "negative warm-up": (["--warmup", "-1"], "warmup"),
    "infinite rate": (["--beta-max", "inf"], "beta_max"),
    "no level": (["--multipliers", "0"], "multipliers"),
    "no clip": (["--clip", "0"], "clip"),
    "endless average": (["--ema-decay", "1"], "ema_decay"),
    "no sampler steps": (["--sampler-steps", "0"], "steps"),
    "no samples": (["--eval-samples", "0"], "eval_samples"),
    "no probes": (["--probes", "0"], "probes"),
    "too many probes": (["--probes", "99999"], "probes must be at most"),
    "no tolerance": (["--tolerance", "0"], "tolerance"),
    "no data set": (["--dataset", "missing.npz"], "missing.npz"),
    "no parts": (["--accumulate", "0"], "accumulate"),
    "uneven parts": (["--accumulate", "3"], "1 devices × 3 parts"),
    "too few devices": (["--fsdp", "2"], "fsdp must be a divisor of 1 devices, got 2"),
    "alone among others": (["--coordinator", "localhost:1"], "--distributed"),
    "heart-beat of one": (["--heartbeat-timeout", "9"], "--distributed"),
    "no heart-beat": (["--distributed", "--heartbeat-timeout", "0"], "heartbeat_timeout"),
    "process out of range": (
        ["--distributed", "--num-processes", "2", "--process-id", "2"],
        "process_id must be in [0, 2), got 2",
    ),
    "no one to meet": (["--distributed"], "give coordinator, num_processes and process_id"),
    "remote folder": (["--workdir", "gs://bucket/run"], "--checkpoint-dir may be on gs://"),
    "no window": (["--profile-steps", "3"], "--profile-steps must be FIRST:STOP"),
    "window of nothing": (["--profile-steps", "3:3"], "got 3:3"),
    "window beyond the end": (["--profile-steps", "3:6"], "steps + 1 = 5, got 3:6"),
    "window of words": (["--profile-steps", "a:b"], "got 'a:b'"),
}


@pytest.fixture
def refused(npz, tmp_path, monkeypatch, capsys):
    """What a training says that is refused for its options, and leaves nothing."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("jaxdiff.cli.fit", None)  # whatever gets so far has gone too far
    base = ["--workdir", "run", "--dataset", npz, "--steps", "4", "--warmup", "1"]

    def line(*options):
        said = mistake(capsys, "train", DIGITS, *base, "--batch-size", "8", *options)
        assert not list(tmp_path.iterdir())
        return said

    return line


@pytest.mark.parametrize("name", OPTIONS)
def test_bad_option_is_one_line(name, refused):
    options, named = OPTIONS[name]
    assert named in refused(*options)


def test_wandb_without_its_package_is_one_line(refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert "pip install 'jaxdiff[wandb]'" in refused("--wandb", "mine")


def test_a_bucket_without_the_package_for_it_is_one_line(refused, monkeypatch):
    monkeypatch.setattr("jaxdiff.cli.find_spec", lambda name: None)
    assert "pip install 'jaxdiff[gcs]'" in refused("--checkpoint-dir", "gs://bucket/run")


@pytest.mark.devices(4)
def test_a_batch_that_devices_cannot_share_is_one_line(refused):
    assert "multiple of 4 devices" in refused("--batch-size", "6")


def test_parts_reach_the_step(refused, monkeypatch):
    def make(*args, accumulate, **options):
        raise ValueError(f"told {accumulate}")

    monkeypatch.setattr("jaxdiff.cli.make_train_step", make)
    assert "told 2" in refused("--accumulate", "2")


COMMANDS = {
    "no command": ([], "train, sample, eval"),
    "unknown command": (["fly"], "'fly'"),
    "no config": (["train"], "config"),
    "option for config": (["train", "--workdir", "run"], "config"),
    "missing config": (["train", "nope.py", "--workdir", "run"], "nope.py"),
    "config is no Python": (["train", "notes.txt", "--workdir", "run"], "notes.txt"),
    "config without Config": (["train", "empty.py", "--workdir", "run"], "Config"),
    "config that fails": (["train", "broken.py", "--workdir", "run"], "ZeroDivisionError"),
    "config is no code": (["train", "garbled.py", "--workdir", "run"], "SyntaxError"),
    "no workdir": (["train", DIGITS], "--workdir"),
    "no run": (["sample"], "PATH"),
    "missing run": (["sample", "nope"], "nope"),
    "empty run": (["eval", "empty"], "empty"),
    "foreign run": (["sample", "foreign"], "foreign"),
    "file as run": (["eval", "notes.txt"], "notes.txt"),
    "no samples": (["sample", "foreign", "--num", "0"], "--num"),
    "half a sample": (["sample", "foreign", "--num", "1.5"], "--num"),
    "out is no picture": (["sample", "foreign", "--out", "x.gif"], ".png"),
    "out is a folder": (["sample", "foreign", "--out", "folder.png"], "folder.png"),
    "no folder for out": (["sample", "foreign", "--out", "nope/x.png"], "nope"),
    "negative seed": (["eval", "foreign", "--seed", "-1"], "--seed"),
    "unknown option": (["eval", "foreign", "--nope"], "--nope"),
}


@pytest.fixture
def strange(tmp_path, monkeypatch):
    """A working directory of things that are neither configs nor runs."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("notes")
    (tmp_path / "empty.py").write_text("def experiment(config): ...")
    (tmp_path / "broken.py").write_text("1 / 0")
    (tmp_path / "garbled.py").write_text("class (")
    (tmp_path / "empty").mkdir()
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.tex").write_text("years of work")
    return tmp_path


@pytest.mark.parametrize("name", COMMANDS)
def test_bad_command_is_one_line(name, strange, capsys):
    before = files(strange)
    words, named = COMMANDS[name]
    assert named in mistake(capsys, *words)
    assert files(strange) == before


@pytest.mark.parametrize("workdir", ["foreign", "notes.txt", "notes.txt/run"])
def test_workdir_of_something_else_is_refused(workdir, strange, small, npz, capsys):
    before = files(strange)
    words = ["train", small, "--workdir", workdir, "--dataset", npz]
    assert "notes.txt" in (line := mistake(capsys, *words)) or "foreign" in line
    assert files(strange) == before


def test_a_bug_keeps_its_traceback(small, npz, tmp_path):
    """A ValueError of the work itself is nobody's mistake."""
    with pytest.raises(ValueError, match="a bug of the evaluation"):
        command(small, npz, tmp_path / "run", "--fault", "evaluate")


def test_non_finite_loss_is_one_line_and_code_1(small, npz, tmp_path, capsys):
    words = ["train", small, "--workdir", tmp_path / "run", "--dataset", npz, "--no-progress"]
    line = mistake(capsys, *words, "--fault", "loss", code=1)
    assert "nan at step 1" in line


def test_mistakes_end_a_process_with_code_2(tmp_path):
    """The same from outside, where nothing is caught by pytest."""
    code = "from jaxdiff.cli import main; main()"
    for words in (["fly"], ["train", str(DIGITS), "--workdir", "run", "--width", "wide"]):
        done = subprocess.run(
            [sys.executable, "-c", code, *words],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={**os.environ, "COLUMNS": "40"},
        )
        assert (done.returncode, done.stdout) == (2, "")
        assert re.fullmatch(r"jaxdiff: error: [^\n]+\n", done.stderr)
    assert not list(tmp_path.iterdir())


# Compiled programs


@pytest.fixture
def no_cache():
    """JAX without a folder for compiled programs; afterwards all is as it was."""
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    jax.config.update("jax_compilation_cache_dir", before)
    compilation_cache.reset_cache()


@pytest.mark.parametrize("command", [["sample"], ["eval"], ["train", str(DIGITS), "--workdir"]])
def test_programs_are_kept_in_the_user_s_cache(command, no_cache, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "nope").touch()
    mistake(capsys, *command, tmp_path / "nope")
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "jaxdiff" / "xla")
    assert (tmp_path / "jaxdiff" / "xla").is_dir()
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "mine"))
    mistake(capsys, *command, tmp_path / "nope")
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "mine")
    mistake(capsys, *command, tmp_path / "nope", "--compilation-cache", "None")
    assert jax.config.jax_compilation_cache_dir is None


def test_options_for_reports_reach_the_run(small, npz, tmp_path, monkeypatch):
    wandb = mock.MagicMock()
    wandb.init.return_value.id = "abc"
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setattr("jaxdiff.cli._evaluate_run", lambda *args, **options: None)
    command(small, npz, tmp_path / "run", "--profile-steps", "2:4", "--wandb", "mine")
    assert list((tmp_path / "run" / "tensorboard").glob("plugins/profile/*/*.xplane.pb"))
    assert wandb.init.call_args.kwargs["project"] == "mine"
    assert wandb.init.call_args.kwargs["config"]["rate"] == 0.1
    assert (tmp_path / "run" / "wandb_id").read_text() == "abc"


def test_a_run_fills_its_cache_and_the_next_reads_it(
    no_cache, small, npz, tmp_path, monkeypatch, request
):
    heard = []
    listen = lambda event, **_: heard.append(event)
    jax.monitoring.register_event_listener(listen)
    request.addfinalizer(lambda: jax.monitoring.unregister_event_listener(listen))
    monkeypatch.setattr("jaxdiff.cli._evaluate_run", lambda *args, **options: None)
    # A program that a config compiled, before the command knew of its folder.
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "other"))
    compilation_cache.reset_cache()
    jax.jit(lambda x: x + 1)(1.0)

    def misses(run):
        heard.clear()
        jax.clear_caches()
        command(small, npz, tmp_path / run, "--compilation-cache", tmp_path / "cache")
        return heard.count("/jax/compilation_cache/cache_misses")

    assert misses("first") > 0
    assert list((tmp_path / "cache").glob("jit_step-*-cache"))
    assert misses("second") == 0


def test_a_folder_that_cannot_be_written_to_is_a_warning(no_cache, tmp_path, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit):
        main(["sample", "nope", "--compilation-cache", str(tmp_path / "file" / "cache")])
    warning, error = capsys.readouterr().err.splitlines()
    assert warning.startswith("jaxdiff: warning: compiled programs are not kept")
    assert "nope" in error
    assert jax.config.jax_compilation_cache_dir is None


# Help


@pytest.mark.parametrize("words", [["--help"], ["-h"], ["train", "--help"]])
def test_help_names_the_commands(words, capsys):
    main(words)
    shown = capsys.readouterr().out
    assert all(f"jaxdiff {name}" in shown for name in ("train", "sample", "eval"))


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=lambda p: p.stem)
def test_help_lists_every_field_with_its_default(path, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as stopped:
        main(["train", str(path), "--workdir", "run", "--steps", "3000", "--help"])
    assert stopped.value.code == 0
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for name, field in load_config(path).Config.__dataclass_fields__.items():
        values = field.default if isinstance(field.default, tuple) else [field.default]
        written = " ".join(str(value) for value in values)
        if name in ("shape", "levels") and field.default is None:
            assert f"--{name} " not in shown  # the data decide
            continue
        flag = f" --{name.replace('_', '-')}"
        # A flag has two forms: --log, --no-log.
        both = f"{flag}, --no-{flag[3:]} "
        option = shown.partition(both if both in shown else f"{flag} ")[2].partition(" --")[0]
        assert f"(default: {written})" in option, name
    assert not list(tmp_path.iterdir())


# Runs


def test_run_leaves_what_it_promises(small_run, small):
    left = {path.name for path in small_run.iterdir()}
    assert left == {
        "checkpoints",
        "config.json",
        "config.py",
        "eval.json",
        "likelihood_test.csv",
        "likelihood_test.png",
        "metrics.jsonl",
        "samples",
        "samples.png",
        "tensorboard",
        "trajectory.png",
    }
    assert (small_run / "config.py").read_text() == small.read_text()
    values = json.loads((small_run / "config.json").read_text())
    assert (values["levels"], values["sides"], values["steps"]) == (256, [1, 2], 4)
    assert [path.name for path in (small_run / "checkpoints").iterdir()] == ["4"]
    assert list((small_run / "tensorboard").glob("events.*"))


def test_sample_and_eval_need_only_the_folder(copied_run, tmp_path, monkeypatch, capsys):
    """Wherever the folder went, whatever became of the config, and from any directory."""
    monkeypatch.chdir(tmp_path)
    main(["sample", str(copied_run), "--num", "5", "--out", "five.png"])
    with Image.open("five.png") as picture:
        assert picture.size[0] > picture.size[1] >= 8  # 3 columns, 2 rows
    first = json.loads((copied_run / "eval.json").read_text())
    (copied_run / "eval.json").unlink()
    main(["eval", str(copied_run)])
    again = json.loads((copied_run / "eval.json").read_text())
    assert {**again, "seconds": 0} == {**first, "seconds": 0}
    shown = capsys.readouterr().out
    assert json.loads(shown[shown.index("{") : shown.rindex("}") + 1]) == again


@pytest.mark.devices(4)
def test_eval_goes_on_where_it_was_stopped(copied_run):
    """Rows of whole chunks are kept; without them all are computed anew, to the same digit."""
    path = copied_run / "likelihood_test.csv"
    whole, report = path.read_text(), json.loads((copied_run / "eval.json").read_text())
    lines = whole.splitlines(keepends=True)
    assert len(lines) == 1 + report["likelihood"]["examples"] > 5
    # A mark in a row that is kept shows that it was not computed again.
    first = lines[1].split(",")
    lines[1] = ",".join([*first[:2], "1.5", *first[3:]])
    path.write_text("".join(lines[:6])[:-3])
    main(["eval", str(copied_run), "--no-progress"])
    found = path.read_text().splitlines(keepends=True)
    assert found[0] == lines[0] and found[1] == lines[1] and found[2:] == lines[2:]  # noqa: PT018
    path.unlink()
    main(["eval", str(copied_run), "--no-progress"])
    assert path.read_text() == whole


def test_what_is_no_finite_number_is_null_in_the_report(copied_run, monkeypatch):
    found = {"ratio": math.inf, "several": [math.nan, 1.0]}
    monkeypatch.setattr("jaxdiff.cli.evaluate", lambda *args, **options: found)
    main(["eval", str(copied_run), "--no-progress"])
    report = json.loads((copied_run / "eval.json").read_text())
    assert (report["ratio"], report["several"]) == (None, [None, 1.0])


def test_eval_of_another_split(copied_run, capsys):
    """Its likelihood, in files of its own."""
    before = files(copied_run)
    main(["eval", str(copied_run), "--split", "validation", "--no-progress"])
    after = files(copied_run)
    fresh = {str(path) for path in after.keys() - before.keys()}
    names = ("eval_validation.json", "likelihood_validation.csv", "likelihood_validation.png")
    assert fresh == set(names)
    assert all(after[path] == content for path, content in before.items())
    report = json.loads((copied_run / "eval_validation.json").read_text())
    assert set(report) == {"likelihood", "seconds"}
    sweep = report["likelihood"]["sweeps"]["tolerance"]
    assert [row["tolerance"] for row in sweep] == [0.1, 0.01]
    line = mistake(capsys, "eval", copied_run, "--split", "half")
    assert "--split must be one of train, validation, test, got 'half'" in line


def test_seed_makes_the_samples(copied_run, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        main(
            [
                "sample",
                str(copied_run),
                "--num",
                "4",
                "--seed",
                str(seed),
                "--out",
                f"{tmp_path}/{name}.png",
            ]
        )
    a, b, c = ((tmp_path / f"{name}.png").read_bytes() for name in "abc")
    assert a == b != c


def test_finished_run_is_not_trained_again(copied_run, small, npz):
    kept = ("checkpoints", "metrics.jsonl", "tensorboard")
    before = {path: v for path, v in files(copied_run).items() if path.parts[0] in kept}
    command(small, npz, copied_run)
    after = {path: v for path, v in files(copied_run).items() if path.parts[0] in kept}
    assert after == before


def test_more_steps_go_on_as_if_never_stopped(copied_run, small, npz, tmp_path):
    command(small, npz, copied_run, "--steps", "7")
    command(small, npz, tmp_path / "straight", "--steps", "7")
    rows = [json.loads(line) for line in (copied_run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [4, 7]
    assert json.loads((copied_run / "config.json").read_text())["steps"] == 7
    abstract = jax.eval_shape(load_run(copied_run).init, jax.random.key(0))
    resumed, straight = (
        restore_ema(run / "checkpoints", abstract) for run in (copied_run, tmp_path / "straight")
    )
    assert float(resumed["w"]) == float(straight["w"])


@pytest.mark.parametrize("by", ["shard_map", "pmap"])
def test_every_way_to_share_a_step_goes_on_with_another_s_run(by, copied_run, small, npz, tmp_path):
    command(small, npz, copied_run, "--steps", "7", "--by", by)
    command(small, npz, tmp_path / "straight", "--steps", "7")
    abstract = jax.eval_shape(load_run(copied_run).init, jax.random.key(0))
    resumed, straight = (
        restore_ema(run / "checkpoints", abstract) for run in (copied_run, tmp_path / "straight")
    )
    np.testing.assert_allclose(resumed["w"], straight["w"], rtol=1e-6)


def test_an_image_that_breaks_on_the_way_is_one_line_and_code_1(
    small, npz, tmp_path, capsys, monkeypatch
):
    def fit(*args, **options):
        raise DatasetError("dataset: cannot read the image 'a.png'")

    monkeypatch.setattr("jaxdiff.cli.fit", fit)
    words = ["train", small, "--workdir", tmp_path / "run", "--dataset", npz]
    assert "cannot read the image 'a.png'" in mistake(capsys, *words, code=1)


def test_two_processes_leave_what_one_leaves(small_run, small, npz, tmp_path):
    coordinator = f"localhost:{free_port()}"
    words = ["train", small, "--workdir", tmp_path / "run", "--dataset", npz, "--distributed"]
    words += ["--coordinator", coordinator, "--num-processes", "2", "--process-id"]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", "from jaxdiff.cli import main; main()", *map(str, words), i],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in "01"
    ]
    said = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(said)
    assert "wrote" not in said[1]
    names = {path.name for path in small_run.iterdir()}
    assert {path.name for path in (tmp_path / "run").iterdir()} == names
    one, two = (
        json.loads((run / "eval.json").read_text()) for run in (small_run, tmp_path / "run")
    )
    for part, name in (("likelihood", "nll_nats"), ("samples", "energy_distance")):
        assert two[part][name] == pytest.approx(one[part][name], rel=1e-4)
    for name in ("samples.png", "trajectory.png"):
        shown = [np.asarray(Image.open(run / name), int) for run in (small_run, tmp_path / "run")]
        assert np.abs(shown[0] - shown[1]).max() <= 1  # a level, by rounding


def test_other_values_are_refused(copied_run, small, npz, capsys):
    before = files(copied_run)
    words = ["train", small, "--workdir", copied_run, "--dataset", npz, "--rate", "0.2"]
    line = mistake(capsys, *words)
    assert "rate=0.1" in line
    assert "0.2" in line
    assert files(copied_run) == before


def test_run_without_checkpoint_is_a_mistake(copied_run, capsys):
    shutil.rmtree(copied_run / "checkpoints")
    assert "checkpoint" in mistake(capsys, "sample", copied_run, "--out", copied_run / "x.png")
    (copied_run / "checkpoints").mkdir()
    assert "checkpoint" in mistake(capsys, "eval", copied_run)


def test_damaged_checkpoints_are_one_line_and_code_1(copied_run, small, npz, capsys):
    for path in (copied_run / "checkpoints").rglob("*"):
        if path.is_file() and path.name not in ("_CHECKPOINT_METADATA", "_METADATA"):
            path.write_bytes(b"")
    line = mistake(capsys, "sample", copied_run, "--out", copied_run / "x.png", code=1)
    assert "damaged" in line
    words = ["train", small, "--workdir", copied_run, "--dataset", npz, "--no-progress"]
    assert "damaged" in mistake(capsys, *words, code=1)


def test_any_kept_checkpoint_can_be_used(copied_run, small, npz, tmp_path, capsys, monkeypatch):
    """With two of them, of which the first is the better."""
    command(small, npz, copied_run, "--steps", "7")
    path = copied_run / "checkpoints"
    with Checkpoints(path) as checkpoints:
        for step, loss in ((4, 1.0), (7, 2.0)):
            checkpoints.record_metric(step, loss)
    shapes = jax.eval_shape(load_run(copied_run).init, jax.random.key(0))
    used = []
    monkeypatch.setattr(
        "jaxdiff.cli._draw_samples", lambda experiment, params, *_, **__: used.append(params)
    )
    moved = path.rename(tmp_path / "moved")
    words = ["sample", copied_run, "--out", tmp_path / "x.png", "--checkpoint-dir", moved]
    for which, step in (("best", 4), ("4", 4), ("last", 7)):
        main([str(word) for word in [*words, "--checkpoint", which]])
        assert used.pop() == restore_ema(moved, shapes, checkpoint=step)
    for wrong in ("5", "first"):
        line = mistake(capsys, *words, "--checkpoint", wrong)
        assert "checkpoint must be 'last', 'best' or one of [7, 4], got" in line
    (moved / "metrics.json").unlink()
    line = mistake(capsys, "eval", copied_run, *words[4:], "--checkpoint", "best")
    assert "has a validation metric" in line


def test_data_of_another_size_are_a_mistake(small, tmp_path, capsys):
    """The file was written anew since: with ten pictures fewer."""
    x, y = pictures()
    np.savez(tmp_path / "own.npz", x=x, y=y)
    run, words = tmp_path / "run", ["--dataset", tmp_path / "own.npz", "--no-progress"]
    command(small, tmp_path / "own.npz", run)
    np.savez(tmp_path / "own.npz", x=x[:50], y=y[:50])
    line = mistake(capsys, "train", small, "--workdir", run, *words, "--steps", "7")
    assert "of a run with 48 training examples, and the data set now has 40; give another" in line


def test_checkpoints_of_another_config_are_a_mistake(small, npz, copied_run, tmp_path, capsys):
    """In a new folder that says nothing of them; `steps` may differ, and what is free."""
    store, steps = copied_run / "checkpoints", ("--steps", "7")
    words = ["train", small, "--workdir", tmp_path / "b", "--checkpoint-dir", store, *steps]
    before = files(store)
    line = mistake(capsys, *words, "--dataset", npz, "--rate", "0.7", "--no-progress")
    assert f"{store / '4'} is of a run with rate=" in line
    assert "not 0.7; give another folder" in line
    assert files(store) == before
    command(small, npz, tmp_path / "c", "--checkpoint-dir", store, *steps)
    assert (store / "7").is_dir()


def test_a_full_disk_is_one_line_and_code_1(small, npz, tmp_path, capsys, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("jaxdiff.cli.fit", full)
    words = ["train", small, "--workdir", tmp_path / "run", "--dataset", npz, "--no-progress"]
    assert "No space left on device; once there is" in mistake(capsys, *words, code=1)


@pytest.mark.parametrize(
    ("text", "named"),
    [("{", "config.json"), ("[1]", "config.json"), ('{"nope": 1}', "nope")],
)
def test_garbled_run_is_a_mistake(text, named, copied_run, capsys):
    (copied_run / "config.json").write_text(text)
    assert named in mistake(capsys, "eval", copied_run)


def test_own_folder_of_labelled_pictures(small, npz, tmp_path):
    """The same pictures as PNG files: classes from the sub-folders, and the same data."""
    for i, (x, y) in enumerate(zip(*pictures(), strict=True)):
        folder = tmp_path / "own" / ("dark", "grey", "light")[y]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(x).save(folder / f"{i:03d}.png")
    run = tmp_path / "run"
    command(small, tmp_path / "own", run)
    report = json.loads((run / "eval.json").read_text())
    assert list(report["samples"]["class_counts"]) == ["0", "1", "2"]
    assert sum(report["samples"]["class_counts"].values()) == 16
    assert report["likelihood"]["examples"] == 6


def test_digits_config_takes_own_data(npz, tmp_path, capsys, monkeypatch):
    """`configs/digits.py --dataset own.npz`: the data decide on shape and levels."""
    trained = {}

    def stop(train_step, state, batches, **options):
        trained.update(options["config"], batch=batches[0]["x"].shape)
        raise KeyboardInterrupt

    monkeypatch.setattr("jaxdiff.cli.fit", stop)
    words = ["--workdir", tmp_path / "run", "--batch-size", "8", "--width", "8"]
    line = mistake(capsys, "train", DIGITS, "--dataset", npz, *words, code=130)
    assert "the same command goes on" in line
    assert (tuple(trained["shape"]), trained["levels"]) == ((8, 8, 1), 256)
    assert trained["batch"] == (8, 8, 8, 1)


# The command of the README, at a hundredth of its size


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TFDS_DATA_DIR", str(folder / "data"))
        size = "--width 8 --blocks 1 --multipliers 1 --steps 4 --warmup 1 --batch-size 16"
        evaluation = "--sampler-steps 4 --eval-samples 64 --eval-images 24 --tolerance 0.1"
        command(DIGITS, "digits", folder / "run", *size.split(), *evaluation.split())
    return folder / "run"


def test_digits_run_reports_what_is_promised(digits_run):
    report = json.loads((digits_run / "eval.json").read_text())
    likelihood, samples = report["likelihood"], report["samples"]
    assert (likelihood["dequantisation"], likelihood["levels"]) == ("uniform", 17)
    assert (likelihood["examples"], likelihood["probes"]) == (24, 2)
    # bits/dim = nats / (64 ln 2) + log₂ 17 − 1
    bits = likelihood["nll_nats"] / (64 * math.log(2)) + math.log2(17) - 1
    assert likelihood["bits_per_dim"] == pytest.approx(bits, rel=1e-6)
    assert likelihood["bits_per_dim_stderr"] > 0
    assert likelihood["network_calls"] > 10
    assert samples["samples"] == 64
    assert sum(samples["class_counts"].values()) == 64
    assert set(samples["class_counts"]) == set("0123456789")
    assert samples["energy_distance"] > samples["energy_null"] > 0  # four updates make no digits
    assert samples["confident_share"] < samples["confident_share_test"] < 1
    neighbours = samples["neighbours"]
    assert neighbours["samples_median"] > neighbours["heldout_median"] > 0
    assert report["seconds"] > 0


def test_digits_run_leaves_its_pictures_and_metrics(digits_run):
    for name in ("samples.png", "trajectory.png", "samples/step-000004.png"):
        with Image.open(digits_run / name) as picture:
            assert np.ptp(np.asarray(picture.convert("L"))) > 100, f"{name} is blank"
    rows = [json.loads(line) for line in (digits_run / "metrics.jsonl").read_text().splitlines()]
    merged = {name: value for row in rows for name, value in row.items()}
    told = {"step", "loss", "steps/s", "examples/s", "flops/s", "data_wait", "compile_seconds"}
    assert told | {"validation/loss"} <= set(merged)
    assert merged["step"] == 4
    assert (digits_run / "checkpoints" / "4").is_dir()
    assert list((digits_run / "tensorboard").glob("events.*"))
