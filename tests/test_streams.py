"""Batches decoded while the model trains: the same as from memory, whoever makes them and when."""

import dataclasses
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image

from jaxdiff import evaluation
from jaxdiff.data import images
from jaxdiff.data.batches import Batches
from jaxdiff.data.images import DatasetError, image_sources, load_images
from jaxdiff.data.streams import Stream
from jaxdiff.experiment import load_config, save_run
from jaxdiff.prefetch import Prefetch
from jaxdiff.recipes import open_images
from jaxdiff.training import NonFiniteLoss, fit, init_state

ROOT = Path(__file__).parents[1]
DIGITS = ROOT / "configs" / "digits.py"
LONG = 60.0  # seconds after which a test that waits for a thread has failed


def write(folder, number=50):
    rng = np.random.default_rng(7)
    for i in range(number):
        path = folder / "ab"[i % 2] / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (4, 6, 3), np.uint8)).save(path)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def opened(folder, tmp_path_factory):
    """Data set ↦ its training images as a source, and those in memory."""
    data_dir = tmp_path_factory.mktemp("tfds")

    def open_set(name):
        where = str(folder) if name == "folder" else name
        train = load_images(where, "train", data_dir=data_dir)
        arrays = {"x": train.x, "label": train.label}
        return image_sources(where, data_dir=data_dir)("train"), arrays

    return open_set


def assert_equal(batch, expected):
    assert batch.keys() == expected.keys()
    for name, array in batch.items():
        assert array.dtype == expected[name].dtype
        np.testing.assert_array_equal(array, expected[name])


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image)


def prefetching():
    return [t.name for t in threading.enumerate() if t.name.startswith("prefetch")]


# Streams


@pytest.mark.parametrize("name", ["folder", "digits"])
def test_a_stream_is_the_batches_of_memory(opened, name):
    """Over the edge of an epoch, from the start and resumed."""
    source, arrays = opened(name)
    expected = Batches(arrays, 9, seed=3)
    edge = expected.steps_per_epoch
    with Stream(Batches(source, 9, seed=3), threads=3) as stream:
        for step in [*range(4), *range(edge - 3, edge + 3), 1, 1]:
            assert_equal(stream[step], expected[step])


@pytest.mark.parametrize("count", [2, 4])
def test_streams_of_the_processes_make_up_the_global_batch(opened, count):
    source, arrays = opened("folder")
    streams = [
        Stream(Batches(source, 12, process_index=i, process_count=count)) for i in range(count)
    ]
    for step in range(5, 8):  # gone on with by another number of processes
        parts = [stream[step] for stream in streams]
        whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        assert_equal(whole, Batches(arrays, 12, process_count=1, process_index=0)[step])
    for stream in streams:
        stream.close()


def test_worker_processes_make_the_same_batches_and_name_a_broken_image(tmp_path):
    """The error comes with the batch of the image, and ends the processes."""
    source = image_sources(str(write(tmp_path)))("train")
    expected = Batches(source[:], 5, seed=1)
    steps = [expected[step] for step in range(8)]  # an epoch
    bad = 6
    path = next(p for p in tmp_path.glob("*/*") if (pixels(p) == steps[bad]["x"][2]).all())
    path.write_bytes(path.read_bytes()[:60])
    stream = Stream(Batches(source, 5, seed=1), workers=2)
    batches = [stream[step] for step in range(bad)]
    assert len(multiprocessing.active_children()) == 2
    for batch, step in zip(batches, steps, strict=False):
        assert_equal(batch, step)
        assert {type(array) for array in batch.values()} == {np.ndarray}  # of no shared memory
    with pytest.raises(DatasetError, match=f"cannot read the image '{path}'"):
        stream[bad]
    assert not multiprocessing.active_children()
    assert_equal(stream[bad + 1], steps[bad + 1])


def test_workers_outlive_a_jobs_sigterm_and_end_with_a_killed_run(folder):
    """They hold the standard output: it would stay open, and `run` wait for it, if one lived on."""
    done = subprocess.run(
        [sys.executable, __file__, str(folder)],
        stdout=subprocess.PIPE,
        text=True,
        timeout=LONG,
        start_new_session=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == -signal.SIGKILL
    assert done.stdout.split() == ["terminated", "went", "on", "no", "backend"]


def job(folder):
    source = image_sources(folder)("train")
    stream = Stream(Batches(NoBackend(source), 5), workers=1)
    stream[0], stream[1]
    signal.signal(signal.SIGTERM, lambda *_: print("terminated", flush=True))
    os.killpg(0, signal.SIGTERM)
    backends = [stream[step]["backend"].any() for step in range(2, 8)]
    print("went on", "backend" if any(backends) else "no backend", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


class NoBackend:
    """Examples that tell whether JAX started a device where they were read."""

    def __init__(self, source):
        self.source = source

    def __len__(self):
        return len(self.source)

    def __getitem__(self, which):
        from jax._src import xla_bridge

        here = multiprocessing.parent_process() is not None
        backend = here and xla_bridge.backends_are_initialized()
        return {**self.source[which], "backend": np.full(len(which), backend)}


class Noted:
    """Batches by number that tell when they are asked for."""

    def __init__(self, fail_at=None):
        self.started = [threading.Event() for _ in range(100)]
        self.fail_at, self.asked, self.closed = fail_at, [], 0

    def __len__(self):
        return len(self.started)

    def __getitem__(self, step):
        self.asked.append(int(step))
        self.started[step].set()
        if step == self.fail_at:
            raise ValueError(f"no batch {step}")
        return {"x": np.full((4, 2), step, np.float32)}

    def close(self):
        self.closed += 1


def test_a_stream_runs_ahead_only_of_steps_in_sequence():
    batches = Noted()
    with Stream(batches, threads=1) as stream:
        stream[3], stream[0]
        assert batches.asked == [3, 0]
        stream[1]
        assert batches.started[2].wait(LONG)
        assert batches.started[3].wait(LONG)
        assert max(batches.asked) <= 4
        np.testing.assert_array_equal(stream[7]["x"], np.full((4, 2), 7))


def test_a_file_that_changed_or_went_is_named(tmp_path):
    source = image_sources(str(write(tmp_path, 20)))("train")
    path = tmp_path / "a" / "00.png"
    Image.new("RGB", (5, 5)).save(path)
    with pytest.raises(ValueError, match=f"'{path}' is no longer 6×4"):
        source[:]
    path.unlink()
    with pytest.raises(ValueError, match=f"cannot read the image '{path}'"):
        source[:]


@pytest.mark.parametrize("option", ["workers", "threads"])
def test_numbers_out_of_range_are_refused(option):
    with pytest.raises(ValueError, match=f"{option} = -1: need at least"):
        Stream(Noted(), **{option: -1})


# Onto the device


def test_the_next_steps_are_fetched_before_they_are_asked_for():
    batches = Noted()
    with Prefetch(batches.__getitem__, range(5, 20)) as ahead:
        assert next(ahead)["x"][0, 0] == 5
        assert batches.started[6].wait(LONG)
        assert batches.started[7].wait(LONG)
        assert prefetching()
    assert batches.asked == [5, 6, 7]
    assert not prefetching()
    with Prefetch(batches.__getitem__, range(2)) as ahead:
        assert [batch["x"][0, 0] for batch in ahead] == [0, 1]
    with pytest.raises(ValueError, match="depth must be at least 1, got 0"):
        Prefetch(batches.__getitem__, range(2), depth=0)


def trained(batches, *, wait=False, loss=1.0, steps=12):
    """Fits something that notes its batches, and in every step waits for the fetch of the next."""
    taken = []

    def step(state, batch):
        taken.append(int(batch["x"][0, 0]))
        if wait and taken[-1] + 1 < steps:
            assert batches.started[taken[-1] + 1].wait(LONG)
        return state._replace(step=state.step + 1), {"loss": jnp.float32(loss)}

    state = init_state({"w": jnp.zeros(2)}, optax.sgd(0.1), jnp.zeros(2, jnp.uint32))
    state = state._replace(step=jnp.int32(3))
    try:
        fit(step, state, batches, steps=steps, log_every=4, progress=False)
    finally:
        assert batches.closed == 1
        assert not prefetching()
    return taken


def test_fit_takes_each_batch_once_and_fetches_the_next_while_it_works():
    batches = Noted()
    assert trained(batches, wait=True) == list(range(3, 12)) == batches.asked


def test_an_error_of_the_source_comes_at_its_step():
    batches, taken = Noted(fail_at=8), []
    with pytest.raises(ValueError, match="no batch 8"):
        taken = trained(batches)
    assert not taken
    assert max(batches.asked) <= 10


def test_a_loss_that_is_not_finite_leaves_nothing_behind():
    with pytest.raises(NonFiniteLoss):
        trained(Noted(), loss=np.nan)


# A run


def test_a_run_streams_the_same_batches_and_reads_no_more_than_it_judges(folder, monkeypatch):
    read = []
    read_image = images._read_image
    monkeypatch.setattr(images, "_read_image", lambda *a: read.append(a[0]) or read_image(*a))
    monkeypatch.setattr(evaluation, "MOST", 7)
    make = load_config(DIGITS)
    options = {"dataset": str(folder), "batch_size": 8, "eval_images": 4}
    memory = make.experiment(make.Config(**options)).batches()
    assert len(read) == 50
    experiment = make.experiment(make.Config(**options, stream=True))
    stream = experiment.batches()
    assert len(read) == 50 + 5 + 5  # those of validation and test
    assert_equal(stream[3], memory[3])
    assert stream[3].keys() == {"x"}
    _, splits, shape, levels = open_images(experiment.config)
    assert (shape, levels) == ((4, 6, 3), 256)
    assert splits("train").x.shape == (7, 4, 6, 3)
    np.testing.assert_array_equal(splits("train").x, load_images(str(folder), "train").x[:7])
    with pytest.raises(ValueError, match="workers must be at least 0, got -1"):
        make.experiment(make.Config(**options, workers=-1))


def test_a_run_goes_on_with_other_workers_but_not_with_another_seed(folder, tmp_path):
    config = load_config(DIGITS).Config(dataset=str(folder))
    save_run(tmp_path, DIGITS, config)
    save_run(tmp_path, DIGITS, dataclasses.replace(config, stream=True, workers=3))
    with pytest.raises(ValueError, match="seed=0, not 1"):
        save_run(tmp_path, DIGITS, dataclasses.replace(config, seed=1))


if __name__ == "__main__":
    job(sys.argv[1])
