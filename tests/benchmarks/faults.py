"""What a run loses when something breaks: kills, signals, full disks, damaged files, bad data.

    pip install -e .
    python tests/benchmarks/faults.py

Every run is a process of its own, `jaxdiff train` of a small model with a checkpoint every five
steps; two processes have two devices each, and meet on this machine. Whatever is broken off is
started again with the same command, and at the end its state must be that of a run without a break,
bit for bit, and its evaluation the same. Steps lost are those in the log that had to be taken
again; they are at most those since the last complete checkpoint, for a save goes on behind the next
steps.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

TESTS = Path(__file__).parents[1]
sys.path.insert(0, str(TESTS))
from runs import free_port

CONFIG = '''
import os
from dataclasses import dataclass
import jax, jax.numpy as jnp, numpy as np, optax
import jaxdiff as jd
from jaxdiff import plotting
from jaxdiff.data.batches import Batches

@dataclass(frozen=True)
class Config:
    """A small model of points in the plane."""
    steps: int = 400
    """Updates."""
    width: int = 384
    """Units of a layer; the state is what takes time to save."""

class Faulty(Batches):
    """Without a number from batch BAD_BATCH on, and none at all from UNREADABLE on."""
    def __getitem__(self, step):
        if step >= int(os.environ.get("UNREADABLE", 10**9)):
            raise OSError("the data cannot be read")
        batch = super().__getitem__(step)
        bad = int(os.environ.get("BAD_BATCH", 10**9))
        return {"x": batch["x"] * (np.nan if step >= bad else 1)}

def apply(params, x, noise_level):
    hidden = jnp.tanh(x @ params["in"] + noise_level[:, None])
    return jnp.tanh(hidden @ params["middle"]) @ params["out"]

def experiment(config):
    process = jd.Gaussian(jd.linear_beta())
    count = int(os.environ.get("EXAMPLES", 1000))
    points = np.random.default_rng(0).normal(size=(count, 2)).astype(np.float32)

    def init(key):
        shapes = {"in": (2, config.width), "middle": (config.width,) * 2, "out": (config.width, 2)}
        keys = jax.random.split(key, 3)
        return {n: 0.05 * jax.random.normal(k, s) for k, (n, s) in zip(keys, shapes.items())}

    def denoiser(params):
        return jd.NetDenoiser(params, process, apply, jd.epsilon())

    def sample(params, key, n, mesh=None, **options):
        x = process.prior((n, 2)).sample(key)
        grid = jd.grids.uniform(10)
        return jd.sample(jd.DDIM(process), denoiser(params), grid, key, x, **options)

    def trajectory(params, key, n):
        return sample(params, key, n, trajectory=True), jd.grids.uniform(10)

    likelihood = jd.Likelihood(
        examples=lambda split, key: jnp.asarray(points[:200]),
        estimate=lambda params, keys, x, **options: jd.log_likelihood(
            process, denoiser(params), x, key=keys, probes=1, **options),
        size=20,
    )
    return jd.Experiment(
        config=config, init=init, process=process, denoiser=denoiser,
        objective=jd.denoising(apply, process, jd.epsilon()),
        optimizer=optax.adam(1e-3), ema_decay=0.99, steps=config.steps, seed=0,
        batches=lambda: Faulty({"x": points}, 64),
        validate=lambda params, mesh=None: {"loss": float(jnp.square(params["out"]).sum())},
        sample=sample, trajectory=trajectory, likelihood=likelihood,
        evaluate=lambda params, key, mesh=None: {"mean": float(sample(params, key, 64).mean())},
        draw=plotting.points, draw_trajectory=plotting.point_trajectory, shown=(500, 500),
        intervals={"log_every": 1, "eval_every": 50, "save_every": 5},
    )
'''
SAVE_EVERY, STEPS = 5, 400
MAIN = "from jaxdiff.cli import main; main()"
HEARTBEAT = 10
PATIENCE = 180
"""Seconds after which a process counts as hanging."""


class Row(NamedTuple):
    """A line of the table."""

    fault: str
    times: int
    outcome: str
    lost: int | None = None
    seconds: float | None = None


class Run:
    """A folder that runs are started in, again and again."""

    def __init__(self, folder: Path, *options: str, config: Path | None = None):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.options = folder / "run", options
        self.config, self.log = config or folder.parent / "config.py", folder / "stderr"
        self.logs = [folder / "stderr-0", folder / "stderr-1"]

    def start(self, *others: str, log: Path | None = None, **environment: str) -> subprocess.Popen:
        words = ["train", str(self.config), "--workdir", str(self.folder), "--no-progress"]
        words += ["--compilation-cache", str(self.config.parent / "compiled")]
        return subprocess.Popen(
            [sys.executable, "-c", MAIN, *words, *self.options, *others],
            env=os.environ | {"JAX_PLATFORMS": "cpu"} | environment,
            stdout=subprocess.DEVNULL,
            stderr=(log or self.log).open("w"),
        )

    def start_two(self, **second: str) -> list[subprocess.Popen]:
        """Two processes that train together; the second has an environment of its own."""
        words = ["--distributed", "--coordinator", f"localhost:{free_port()}"]
        words += ["--num-processes", "2", "--heartbeat-timeout", str(HEARTBEAT), "--process-id"]
        return [
            self.start(*words, str(i), log=self.logs[i], JAX_NUM_CPU_DEVICES="2", **own)
            for i, own in enumerate(({}, second))
        ]

    def finish(self, **environment: str) -> int:
        return self.start(**environment).wait(timeout=PATIENCE)

    def said(self) -> list[str]:
        return [line for line in self.log.read_text().splitlines() if line.startswith("jaxdiff:")]

    def saved(self) -> int:
        """The step of the newest complete checkpoint."""
        steps = [int(p.name) for p in self.folder.glob("checkpoints/*") if p.name.isdigit()]
        return max(steps, default=0)

    def saving(self) -> bool:
        return any(self.folder.glob("checkpoints/*tmp*"))

    def logged(self) -> int:
        """The step of the last whole row."""
        path = self.folder / "metrics.jsonl"
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        return json.loads(lines[-1])["step"] if lines else 0

    def lost(self) -> int:
        return max(0, self.logged() - self.saved())

    def wait_for(self, step: int, process: subprocess.Popen | None = None) -> None:
        deadline = time.monotonic() + PATIENCE
        while self.saved() < step and (process is None or process.poll() is None):
            assert time.monotonic() < deadline, f"no step {step} in {self.folder}"
            time.sleep(0.002)

    def result(self) -> tuple:
        """The last state's checksums, and the evaluation but for its time."""
        contents = self.folder / "checkpoints" / str(self.saved()) / "contents" / "metadata"
        report = self.folder / "eval.json"
        found = json.loads(report.read_text()) if report.exists() else {}
        return json.loads(contents.read_text())["leaves"], {**found, "seconds": 0}


def same(run: Run, whole: Run) -> str:
    return "the same bits" if run.result() == whole.result() else "ANOTHER RESULT"


def kills(folder: Path, whole: Run, times: int) -> Iterator[Row]:
    """SIGKILL at random moments of one run's life, sorted by what it did just then."""
    run, draw = Run(folder, "--steps", str(STEPS)), random.Random(0)
    lost: dict[str, list[int]] = {"starting": [], "training": [], "saving": []}
    while run.saved() < STEPS - 6 * SAVE_EVERY:
        done = sum(map(len, lost.values()))
        process, begun = run.start(), run.saved()
        if done % 8 == 7:
            time.sleep(draw.uniform(0, 3))
        else:
            run.wait_for(begun + draw.choice([1, SAVE_EVERY + 1]), process)
            time.sleep(draw.uniform(0, 0.2))
        # Stopped, it can be looked at in the moment it dies in.
        process.send_signal(signal.SIGSTOP)
        started = run.saved() > begun
        what = "saving" if run.saving() else "training" if started else "starting"
        process.kill()
        process.wait()
        lost[what].append(run.lost())
        if min(len(lost["training"]), len(lost["saving"])) >= times:
            break
    run.finish()
    for what, steps in lost.items():
        yield Row(f"kill −9 while {what}", len(steps), same(run, whole), max(steps, default=0))


def kills_at_the_end(folder: Path, whole: Run, times: int) -> Iterator[Row]:
    """SIGKILL while pictures are drawn and the evaluation is written."""
    from PIL import Image

    draw, halves, outcome = random.Random(1), 0, "the same bits"
    run = Run(folder, "--steps", str(STEPS))
    shutil.copytree(whole.folder, run.folder)
    for _ in range(times):
        for path in [*run.folder.glob("*.png"), *run.folder.glob("*.csv"), *run.folder.glob("ev*")]:
            path.unlink()
        process = run.start()
        while not (run.folder / "samples.png").exists() and process.poll() is None:
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 2.5))
        process.kill()
        process.wait()
        for path in run.folder.glob("*.png"):
            if not path.name.startswith("."):
                with Image.open(path) as picture:
                    picture.load()
        if (run.folder / "eval.json").exists():
            json.loads((run.folder / "eval.json").read_text())
        else:
            halves += 1
        run.finish()
        outcome = outcome if same(run, whole) == outcome else "ANOTHER RESULT"
    found = f"no half file under a whole one's name ({halves} × none at all), then {outcome}"
    yield Row("kill −9 while evaluating", times, found, 0)


def terminations(folder: Path, whole: Run, times: int) -> Iterator[Row]:
    run, draw = Run(folder, "--steps", str(STEPS)), random.Random(2)
    lost, seconds = [], []
    for _ in range(times):
        process, begun = run.start(), run.saved()
        run.wait_for(begun + 1, process)
        time.sleep(draw.uniform(0, 0.5))
        process.terminate()
        since = time.monotonic()
        assert process.wait(timeout=PATIENCE) == 128 + signal.SIGTERM, run.said()
        seconds.append(time.monotonic() - since)
        lost.append(run.lost())
    run.finish()
    yield Row("SIGTERM", times, f"exit 143, then {same(run, whole)}", max(lost), max(seconds))


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[bool]:
    """A disk of its own, where one may mount one."""
    folder.mkdir(parents=True)
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True
    )
    try:
        yield done.returncode == 0
    finally:
        if done.returncode == 0:
            subprocess.run(["umount", "--lazy", folder], check=True)


def full_disk(folder: Path, whole: Run, times: int) -> Iterator[Row]:
    """All the room that is left is taken at a random moment, and given back after the failure."""
    draw, seconds, lost, codes = random.Random(3), [], [], set()
    with small_disk(folder, "64m") as mounted:
        if not mounted:
            yield Row("full disk", 0, "not tried: no right to mount a small one")
            return
        run = Run(folder / "inside", "--steps", str(STEPS), config=whole.config)
        run.log = whole.folder.parent / "full"
        for _ in range(times):
            process, begun = run.start(), run.saved()
            run.wait_for(begun + 1, process)
            time.sleep(draw.uniform(0, 0.3))
            since, filler = time.monotonic(), folder / "filler"
            with filler.open("wb", buffering=0) as file:
                try:
                    while True:
                        file.write(b"x" * 2**16)
                except OSError:
                    pass
            codes.add(process.wait(timeout=PATIENCE))
            seconds.append(time.monotonic() - since)
            assert len(run.said()) == 1, run.log.read_text()
            filler.unlink()
            lost.append(run.lost())
        run.finish()
        said = f"one line, exit {', '.join(map(str, codes))}, then {same(run, whole)}"
    yield Row("full disk", times, said, max(lost), max(seconds))


def bad_data(folder: Path, whole: Run) -> Iterator[Row]:
    run = Run(folder / "nan", "--steps", str(STEPS), config=whole.config)
    code = run.finish(BAD_BATCH="123")
    assert "loss is nan at step 124" in run.said()[0], run.said()
    lost = run.lost()
    run.finish()
    yield Row("batch without a number", 1, f"one line, exit {code}, then {same(run, whole)}", lost)

    run = Run(folder / "size", "--steps", str(STEPS), config=whole.config)
    process = run.start()
    run.wait_for(20, process)
    process.terminate()
    process.wait()
    code = run.finish(EXAMPLES="999")
    assert "1000 training examples, and the data set now has 999" in run.said()[0], run.said()
    run.finish()
    said = f"one line, exit {code}, then {same(run, whole)}"
    yield Row("data set of another size", 1, said, 0)


DAMAGES: dict[str, Callable[[Path, random.Random], None]] = {
    "truncated": lambda path, draw: os.truncate(path, draw.randrange(path.stat().st_size)),
    "deleted": lambda path, draw: path.unlink(),
}


def flip_bit(path: Path, draw: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def damages(folder: Path, whole: Run, repeats: int) -> Iterator[Row]:
    """Each file of the newest checkpoint, in turn; `--damage` does it in a process of its own."""
    for name, times in (("truncated", 1), ("deleted", 1), ("with a flipped bit", repeats)):
        done = subprocess.run(
            [
                sys.executable,
                __file__,
                "--damage",
                name,
                str(times),
                str(folder),
                str(whole.folder),
            ],
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
            capture_output=True,
            text=True,
            timeout=10 * PATIENCE,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        found = json.loads(done.stdout.splitlines()[-1])
        count = sum(found.values())
        said = ", ".join(f"{number} × {what}" for what, number in found.items())
        lost = SAVE_EVERY if "one step back" in found else 0
        yield Row(f"each file of a checkpoint {name}", count, said, lost)


def damage(name: str, times: int, folder: Path, source: Path) -> None:
    import jax

    from jaxdiff.checkpoints import Checkpoints
    from jaxdiff.experiment import load_run
    from jaxdiff.training import init_state

    experiment, draw = load_run(source), random.Random(4)
    params = experiment.init(jax.random.key(0))
    target = init_state(params, experiment.optimizer, jax.random.key(0))
    with Checkpoints(source / "checkpoints") as checkpoints:
        last = checkpoints.latest_step()
    known = {}
    for step in (last, last - SAVE_EVERY):
        contents = source / "checkpoints" / str(step) / "contents" / "metadata"
        known[step] = json.loads(contents.read_text())["leaves"]
    files = sorted(p for p in (source / "checkpoints" / str(last)).rglob("*") if p.is_file())
    found: dict[str, int] = {}
    for path in files * times:
        if folder.exists():
            shutil.rmtree(folder)
        shutil.copytree(source / "checkpoints", folder)
        DAMAGES.get(name, flip_bit)(folder / path.relative_to(source / "checkpoints"), draw)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Checkpoints(folder) as checkpoints:
                state = checkpoints.restore_latest(target)
                step = int(state.step)
                shutil.rmtree(folder / "again", ignore_errors=True)
        with Checkpoints(folder / "again") as again:
            again.save(step, state)
        contents = folder / "again" / str(step) / "contents" / "metadata"
        right = json.loads(contents.read_text())["leaves"] == known[step]
        what = {last: "none the worse", last - SAVE_EVERY: "one step back"}[step]
        what = what if right else "WRONG NUMBERS"
        found[what] = found.get(what, 0) + 1
    print(json.dumps(found))


def pairs(folder: Path, config: Path, steps: int) -> Iterator[Row]:
    """Two processes; the other must end by itself, and both together go on."""

    def new(name: str) -> Run:
        return Run(folder / name.replace(" ", "-"), "--steps", str(steps), config=config)

    def end(run: Run, codes: set[int]) -> str:
        ended = all(p.wait(timeout=PATIENCE) == 0 for p in run.start_two())
        result = same(run, whole) if ended else "NO END"
        return f"the other exits {', '.join(map(str, sorted(codes)))}, then {result}"

    whole = new("whole")
    assert all(p.wait(timeout=PATIENCE) == 0 for p in whole.start_two()), whole.folder
    faults = {
        "SIGTERM to one of two processes": (signal.SIGTERM, (0, 1, 0, 1)),
        "death of the coordinator": (signal.SIGKILL, (0, 0)),
        "death of the other process": (signal.SIGKILL, (1, 1)),
    }
    draw = random.Random(5)
    for fault, (number, victims) in faults.items():
        run = new(fault)
        codes, seconds, lost = set(), [], []
        for victim in victims:
            processes, begun = run.start_two(), run.saved()
            run.wait_for(begun + 1, processes[0])
            time.sleep(draw.uniform(0, 0.5))
            processes[victim].send_signal(number)
            since = time.monotonic()
            codes.add(processes[1 - victim].wait(timeout=PATIENCE))
            seconds.append(time.monotonic() - since)
            processes[victim].wait(timeout=PATIENCE)
            lost.append(run.lost())
        yield Row(fault, len(victims), end(run, codes), max(lost), max(seconds))
    run = new("unreadable")
    processes = run.start_two(UNREADABLE="33")
    while run.logged() < 33 and processes[1].poll() is None:
        time.sleep(0.05)
    since = time.monotonic()
    assert processes[1].wait(timeout=PATIENCE) != 0
    codes = {processes[0].wait(timeout=PATIENCE)}
    seconds, lost = time.monotonic() - since, run.lost()
    yield Row("data that one process cannot read", 1, end(run, codes), lost, seconds)


def main() -> None:
    if sys.argv[1:2] == ["--damage"]:
        return damage(sys.argv[2], int(sys.argv[3]), Path(sys.argv[4]), Path(sys.argv[5]))
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=20, help="of training, and of saving, each")
    parser.add_argument("--flips", type=int, default=5, help="of each file")
    parser.add_argument("--only", nargs="*", help="of kills, end, terminations, full, …")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        (place / "config.py").write_text(CONFIG)
        whole = Run(place / "whole", "--steps", str(STEPS))
        assert whole.finish() == 0, whole.log.read_text()
        print("| fault | times | outcome | steps lost, at most | seconds to exit, at most |")
        print("|---|---|---|---|---|", flush=True)
        rows = {
            "kills": lambda at: kills(at, whole, options.kills),
            "end": lambda at: kills_at_the_end(at, whole, 6),
            "terminations": lambda at: terminations(at, whole, 5),
            "full": lambda at: full_disk(at, whole, 5),
            "data": lambda at: bad_data(at, whole),
            "damages": lambda at: damages(at, whole, options.flips),
            "pairs": lambda at: pairs(at, whole.config, 150),
        }
        for name in options.only or rows:
            for row in rows[name](place / name):
                seconds = "" if row.seconds is None else f"{row.seconds:.1f}"
                lost = "" if row.lost is None else row.lost
                words = f"| {row.fault} | {row.times} | {row.outcome} | {lost} | {seconds} |"
                print(words, flush=True)


if __name__ == "__main__":
    main()
