"""Runs that end before they are done: a second start goes on as if nothing had been."""

import contextlib
import dataclasses
import gc
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from benchmarks import faults
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from runs import (
    SAVE_EVERY,
    STEPS,
    Data,
    abstract,
    assert_same_bits,
    denoising_loss,
    free_port,
    largest_file,
    network_params,
    raw,
    run,
)

from jaxdiff.checkpoints import (
    CheckpointError,
    CheckpointMismatch,
    Checkpoints,
    restore_config,
    restore_ema,
)
from jaxdiff.experiment import save_run
from jaxdiff.parallel import data_mesh, shard_state, start_distributed, to_host
from jaxdiff.reporting import Meter
from jaxdiff.training import fit, init_state, make_train_step

HEARTBEAT = 10
"""Seconds that a silent process counts as alive; the least that JAX takes well."""
TRAIN = [{}, {"accumulate": 2}]
"""Options of the train step that runs go on with."""


def assert_close(a, b):
    for x, y in zip(jax.tree.leaves(raw(a)), jax.tree.leaves(raw(b)), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


# Going on


@pytest.fixture(scope="module", params=TRAIN, ids=str)
def straight(request):
    """The options of the train step, and the state after a run without a break."""
    return request.param, run(None, Data(), train=request.param)


@pytest.mark.parametrize("point", range(1, STEPS))
def test_a_run_goes_on_to_the_same_bits_from_every_step(straight, point, tmp_path):
    options, whole = straight
    half = run(tmp_path, Data(), steps=point, train=options)
    assert int(half.step) == point
    data = Data()
    assert_same_bits(run(tmp_path, data, train=options), whole)
    assert data.asked == list(range(point, STEPS))


@pytest.mark.devices(4)
@pytest.mark.parametrize("point", range(SAVE_EVERY, STEPS, SAVE_EVERY))
def test_a_run_goes_on_to_the_same_numbers_on_other_devices(point, tmp_path):
    options = {"train": {"accumulate": 2}, "params": network_params(256)}
    meshes = {"four": data_mesh(), "two by two": data_mesh(fsdp=2), "one": None}
    whole = run(None, Data(), **options)
    for first, then in (("four", "one"), ("one", "two by two"), ("two by two", "four")):
        folder = tmp_path / f"{first}-{then}"
        run(folder, Data(), steps=point, mesh=meshes[first], **options)
        resumed = run(folder, Data(), mesh=meshes[then], **options)
        part = resumed.params["w"].addressable_shards[0].data.shape
        assert part == ((4, 128) if then == "two by two" else (4, 256))
        assert_close(resumed, whole)


def test_a_resumed_run_holds_no_second_state(tmp_path):
    """The state that the call began with is given up, as a donated one is."""
    optimizer, held = optax.adam(1e-2), []
    train_step = make_train_step(denoising_loss, optimizer, ema_decay=0.9)

    def validate(_):
        gc.collect()
        held.append(sum(array.nbytes for array in jax.live_arrays()))
        return {}

    for steps in (3, 6):
        state = init_state(network_params(256), optimizer, jax.random.key(0))
        options = {"workdir": tmp_path, "validate": validate, "progress": False}
        fit(train_step, state, Data(), steps=steps, **options)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    assert held[1] == held[0]


class Closing(Data):
    closed = 0

    def close(self):
        self.closed += 1


def test_batches_are_closed_whether_there_is_something_to_do_or_not(tmp_path):
    for steps in (3, 3, 6):
        run(tmp_path, data := Closing(), steps=steps)
        assert data.closed == 1
    with pytest.raises(CheckpointMismatch):
        run(tmp_path, data := Closing(), params=network_params(8))
    assert data.closed == 1


# What a run says of its checkpoints


def test_the_best_is_by_the_validation_of_its_own_step(tmp_path):
    """Validated at 2, 4, …, 12 and saved at 3, 6, 9, 12: told apart only at 6 and 12."""
    losses = {2: -9.0, 4: -9.0, 6: 1.0, 8: -9.0, 10: -9.0, 12: 2.0}
    order, averages = iter(losses.values()), {}

    def validate(params):
        averages[len(averages)] = jax.device_get(params)
        return {"loss": next(order)}

    run(tmp_path, Data(), validate=validate, eval_every=2)
    shapes = jax.eval_shape(network_params)
    for which, seen in {"best": 2, "last": 5, 6: 2, 12: 5}.items():
        ema = restore_ema(tmp_path / "checkpoints", shapes, checkpoint=which)
        np.testing.assert_array_equal(ema["w"], averages[seen]["w"])


def test_checkpoints_may_lie_elsewhere(tmp_path):
    whole = run(tmp_path / "run", Data(), checkpoint_dir=tmp_path / "store")
    assert not (tmp_path / "run" / "checkpoints").exists()
    again = Data()
    assert_same_bits(run(tmp_path / "new", again, checkpoint_dir=tmp_path / "store"), whole)
    assert again.asked == []


class Counted(Data):
    def __init__(self, num_examples):
        super().__init__()
        self.num_examples = num_examples


def test_data_that_changed_their_size_are_refused(tmp_path):
    run(tmp_path, Counted(80), steps=6)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(
        CheckpointMismatch, match="80 training examples, and the data set now has 8"
    ):
        run(tmp_path, Counted(81))
    assert sorted(tmp_path.rglob("*")) == before
    assert int(run(tmp_path, Counted(80)).step) == STEPS


def test_a_run_goes_on_with_the_same_config_only(tmp_path):
    config = {"rate": 0.5, "sizes": (1, 2), "steps": 6, "cores": 1}
    run(tmp_path, Data(), steps=6, config=config, free=())
    before = sorted(tmp_path.rglob("*"))
    said = f"{tmp_path / 'checkpoints' / '6'} is of a run with "
    for other, why in (
        ({"rate": 0.7}, "rate=0.5, not 0.7"),
        ({"sizes": (1, 3)}, r"sizes=\[1, 2\], not \[1, 3\]"),
        ({"new": True}, "new=None, not True"),
        ({"cores": 2}, "cores=1, not 2"),
    ):
        with pytest.raises(CheckpointMismatch, match=said + why):
            run(tmp_path, Data(), config=config | other | {"steps": 12})
    with pytest.raises(CheckpointMismatch, match=said + "steps=6, not 12"):
        run(tmp_path, Data(), config=config | {"steps": 12}, free=("cores",))
    assert sorted(tmp_path.rglob("*")) == before
    run(tmp_path, Data(), steps=9, config=None)
    assert int(run(tmp_path, Data(), config=config | {"steps": 12}).step) == STEPS
    run(tmp_path, Data(), config=config | {"cores": 2}, free=("cores", "steps"))


# Faults


@pytest.mark.parametrize("due", [6, 7])
def test_sigterm_breaks_off_an_evaluation(tmp_path, due):
    """The step is saved, whether it was due or not, and no second signal disturbs that."""

    def long(params):
        signal.raise_signal(signal.SIGTERM)
        time.sleep(20)

    data = Data()
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path, data, validate=long, eval_every=due)
    assert stopped.value.code == 143
    assert due <= len(data.asked) <= due + 2  # of which are on their way already
    again = Data()
    assert_same_bits(run(tmp_path, again), run(None, Data()))
    assert again.asked == list(range(due, STEPS))


@contextlib.contextmanager
def files_of_at_most(size):
    """A full disk, as far as a process can tell; size in bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_sigterm_in_the_wait_for_the_device_lets_no_evaluation_begin(tmp_path, monkeypatch):
    """The loop waits for its steps after it looked for signals, and before it evaluates."""

    def pause(meter):
        if len(data.asked) >= 6:
            signal.raise_signal(signal.SIGTERM)
        return wait(meter)

    wait, data, evaluated = Meter.pause, Data(), []
    monkeypatch.setattr(Meter, "pause", pause)
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path, data, validate=evaluated.append, eval_every=6, log_every=6)
    assert stopped.value.code == 143
    assert evaluated == []
    assert newest(tmp_path) == 6


def test_a_full_disk_is_one_error_and_spoils_nothing(tmp_path):
    """No file may outgrow half of the parameters': the save fails behind the loop's back."""
    params = network_params(4096)
    half_way = run(tmp_path, Data(), steps=3, params=params)
    with (
        files_of_at_most(30_000),
        pytest.raises(CheckpointError, match=f"cannot be written to {tmp_path}"),
    ):
        run(tmp_path, Data(), params=params)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert_same_bits(checkpoints.restore_latest(abstract(half_way)), half_way)
    again = Data()
    assert_same_bits(run(tmp_path, again, params=params), run(None, Data(), params=params))
    assert again.asked == list(range(3, STEPS))


@dataclasses.dataclass(frozen=True)
class Config:
    steps: int


def test_a_full_disk_spoils_no_run_at_its_start(tmp_path):
    folder, source = tmp_path / "run", tmp_path / "config.py"
    source.write_text("# a config of some length\n")
    for config in (Config(steps=6), Config(steps=100)):  # a new run, and one that is made longer
        kept = contents(folder)
        with files_of_at_most(8), pytest.raises(OSError, match="too large"):
            save_run(folder, source, config)
        assert contents(folder).items() >= kept.items()
        save_run(folder, source, config)
        with files_of_at_most(8):
            save_run(folder, source, config)  # who goes on writes nothing
        values = f'{{\n  "steps": {config.steps}\n}}\n'
        assert contents(folder) == {"config.py": source.read_text(), "config.json": values}


def contents(folder):
    return {path.name: path.read_text() for path in folder.glob("*")}


class Slow(Data):
    """This process's part of slow batches."""

    def __getitem__(self, step):
        time.sleep(0.1)
        part = self.size // jax.process_count()
        first = jax.process_index() * part
        return {"x": super().__getitem__(step)["x"][first : first + part]}


@contextlib.contextmanager
def two_processes(task, folder):
    """They do a task of this file together; what they say goes to the folder's log."""
    port = free_port()
    with (folder / "log").open("w") as log:
        processes = [
            subprocess.Popen(
                [sys.executable, __file__, task, port, str(index), str(folder / "run")],
                env=os.environ | {"JAX_NUM_CPU_DEVICES": "2"},
                stderr=log,
            )
            for index in (0, 1)
        ]
        try:
            yield processes
        finally:
            for process in processes:
                process.kill()
                process.wait()


@pytest.fixture
def pair(tmp_path):
    """Two processes that train together, and have saved a checkpoint."""
    with two_processes("train", tmp_path) as processes:
        deadline = time.monotonic() + 120
        while not list((tmp_path / "run").glob("checkpoints/[0-9]")):
            assert time.monotonic() < deadline, (tmp_path / "log").read_text()
            assert all(p.poll() is None for p in processes), (tmp_path / "log").read_text()
            time.sleep(0.05)
        yield processes


def newest(folder):
    return max(int(p.name) for p in (folder / "checkpoints").iterdir() if p.name.isdigit())


def test_sigterm_to_one_of_two_processes_saves_and_stops_both(pair, tmp_path):
    pair[1].send_signal(signal.SIGTERM)
    codes = [process.wait(timeout=60) for process in pair]
    assert codes == [143, 143], (tmp_path / "log").read_text()
    reached = newest(tmp_path / "run")
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == reached  # the step that both agreed on, and none was lost
    again = Data()
    assert_close(
        run(tmp_path / "run", again, steps=reached + 3), run(None, Data(), steps=reached + 3)
    )
    assert again.asked == list(range(reached, reached + 3))


@pytest.mark.parametrize("victim", [0, 1], ids=["coordinator", "worker"])
def test_the_death_of_one_process_ends_the_other(victim, pair, tmp_path):
    pair[victim].kill()
    killed = time.monotonic()
    assert pair[1 - victim].wait(timeout=60) != 0
    assert time.monotonic() - killed < HEARTBEAT + 5
    reached = newest(tmp_path / "run")
    again = Data()
    assert_close(
        run(tmp_path / "run", again, steps=reached + 3), run(None, Data(), steps=reached + 3)
    )
    assert again.asked == list(range(reached, reached + 3))


def test_what_one_process_cannot_read_both_pass_over(tmp_path):
    """A state that is split over them; alone, the one would wait for the other for ever."""
    with two_processes("damage", tmp_path) as processes:
        codes = [process.wait(timeout=90) for process in processes]
    assert codes == [0, 0], (tmp_path / "log").read_text()
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["1", "damaged-2"]


@pytest.fixture
def two(tmp_path):
    """Two processes of `jaxdiff train`, as the benchmark of faults starts them."""
    (tmp_path / "config.py").write_text(faults.CONFIG)
    return faults.Run(tmp_path / "two", "--steps", "6")


def ended(processes, seconds=120):
    """Their exit codes."""
    try:
        return [process.wait(timeout=seconds) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()


def test_two_processes_of_the_benchmark_come_to_their_end(two):
    assert ended(two.start_two()) == [0, 0]
    leaves, report = two.result()
    assert two.saved() == two.logged() == 6
    assert "params" in leaves
    assert report.keys() == {"likelihood", "mean", "seconds"}


def test_a_folder_that_is_refused_ends_both_at_once(two):
    two.folder.mkdir()
    (two.folder / "notes").touch()
    assert ended(two.start_two(), 60) == [2, 2]
    for log in two.logs:
        assert "is not empty and not a run" in log.read_text().splitlines()[-1]
    assert [path.name for path in two.folder.iterdir()] == ["notes"]


def test_an_error_of_one_process_ends_the_other(two):
    processes = two.start_two(UNREADABLE="3")
    failed = processes[1].wait(timeout=120)
    since = time.monotonic()
    assert 0 not in ended(processes)
    assert time.monotonic() - since < 2 * faults.HEARTBEAT
    assert failed == 1
    assert "OSError: the data cannot be read" in two.logs[1].read_text()


def test_sigterm_after_the_last_step_ends_both(two):
    """While a trajectory is drawn; JAX would have kept the signal to itself."""
    slow = "time.sleep(100)\n        return sample(params, key, n, trajectory=True)"
    text = faults.CONFIG.replace("return sample(params, key, n, trajectory=True)", slow)
    two.config.write_text("import time\n" + text)
    processes = two.start_two()
    two.wait_for(6, processes[0])
    while not (two.folder / "samples.png").exists() and processes[0].poll() is None:
        time.sleep(0.05)
    for process in processes:
        process.terminate()
    codes = ended(processes, faults.HEARTBEAT)
    assert codes[0] == -signal.SIGTERM
    assert codes[1] in (-signal.SIGTERM, -signal.SIGABRT)  # the coordinator may take it along


def test_processes_that_share_no_folder_say_so_and_end(tmp_path):
    """Of the first alone has a checkpoint to go on from."""
    run(tmp_path / "run" / "0", Data(), steps=3)
    before = sorted((tmp_path / "run" / "0").rglob("*"))
    with two_processes("apart", tmp_path) as processes:
        codes = [process.wait(timeout=90) for process in processes]
    assert codes == [0, 0], (tmp_path / "log").read_text()
    assert sorted((tmp_path / "run" / "0").rglob("*")) == before


def apart(folder):
    own = folder / str(jax.process_index())
    said = rf"checkpoint_dir must be a folder that all processes share, got {own / 'checkpoints'}: "
    with pytest.raises(ValueError, match=said + "process 1 does not see what process 0 writes"):
        run(own, Slow(), mesh=data_mesh())


def test_two_processes_save_a_split_state_and_go_on(tmp_path):
    """As one process does, which then reads what they saved."""
    with two_processes("split", tmp_path) as processes:
        codes = [process.wait(timeout=120) for process in processes]
    assert codes == [0, 0], (tmp_path / "log").read_text()
    folder, params = tmp_path / "run" / "checkpoints", network_params(256)
    whole = run(None, Data(), steps=6, params=params)
    with Checkpoints(folder) as checkpoints:
        assert_close(checkpoints.restore_latest(abstract(whole)), whole)
    half = run(None, Data(), steps=3, params=params)
    best = restore_ema(folder, abstract(params), checkpoint="best")
    np.testing.assert_allclose(best["w"], half.ema_params["w"], rtol=1e-5, atol=1e-6)


def split(folder):
    """Three steps and three more, of which the first are the better; pictures, and the metrics."""
    first, mesh, params = jax.process_index() == 0, data_mesh(fsdp=4), network_params(256)
    data, averages, drawn = Slow(), {}, []

    def validate(ema):
        averages["last" if averages else "best"] = to_host(ema)
        return {"loss": float(len(averages))}

    def draw(ema, _):
        drawn.append(ema["w"].shape)

    for steps in (3, 6):
        options = {"mesh": mesh, "params": params, "validate": validate, "draw": draw}
        state = run(folder, data, steps=steps, **options)
    assert state.params["w"].addressable_shards[0].data.shape == (4, 64)
    assert data.asked == list(range(6))
    assert drawn == ([(4, 256)] * 2 if first else [])
    for which, average in averages.items():
        for target in (params, shard_state(params, mesh)):  # on each by itself, and split
            options = {"checkpoint": which, "together": True}
            ema = restore_ema(folder / "checkpoints", abstract_like(target), **options)
            np.testing.assert_array_equal(to_host(ema)["w"], average["w"])
    metrics = (folder / "checkpoints" / "metrics.json").read_text()
    with Checkpoints(folder / "checkpoints") as checkpoints:
        if not first:
            checkpoints.record_metric(6, -1.0)
        multihost_utils.sync_global_devices("noted")
    assert (folder / "checkpoints" / "metrics.json").read_text() == metrics


def abstract_like(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


@contextlib.contextmanager
def stale_listing():
    """The second process does not see the second checkpoint yet."""
    with pytest.MonkeyPatch.context() as patch:
        if jax.process_index() == 1:
            patch.setattr(ocp.CheckpointManager, "all_steps", lambda _: [1])
        yield


def damage(folder):
    mesh = data_mesh()
    state = init_state(network_params(1024), optax.sgd(0.1), jax.random.key(0), mesh=mesh)
    split = jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, P("data")))
    state = state._replace(params=split(state.params))
    with Checkpoints(folder) as checkpoints:
        for step in (1, 2):
            ema = jax.tree.map(lambda x, step=step: x + step, state.ema_params)
            numbered = state._replace(step=state.step + step, ema_params=ema)
            checkpoints.save(step, numbered, {"step": step})
        checkpoints.wait()
        with stale_listing():
            restored = checkpoints.restore_latest(state)
            assert int(restored.step.addressable_data(0)) == 2
            assert restore_config(folder, together=True) == {"step": 2}
            ema = restore_ema(folder, network_params(1024), together=True)
            np.testing.assert_array_equal(ema["w"], network_params(1024)["w"] + 2)
        if jax.process_index() == 0:
            path = largest_file(folder / "2" / "params" / "ocdbt.process_1")
            os.truncate(path, path.stat().st_size // 2)
        multihost_utils.sync_global_devices("damaged")
        restored = checkpoints.restore_latest(state)
        assert int(restored.step.addressable_data(0)) == 1
    if jax.process_index() == 0:  # who needs the other for nothing
        ema = restore_ema(folder, jax.eval_shape(lambda: network_params(1024)))
        np.testing.assert_array_equal(ema["w"], network_params(1024)["w"] + 1)
        assert restore_config(folder) == {"step": 1}


def train(folder):
    run(folder, Slow(), steps=10_000, mesh=data_mesh())


if __name__ == "__main__":
    task, port, index, folder = sys.argv[1:]
    start_distributed(f"localhost:{port}", 2, int(index), heartbeat_timeout_seconds=HEARTBEAT)
    tasks = {"train": train, "damage": damage, "apart": apart, "split": split}
    tasks[task](Path(folder))
