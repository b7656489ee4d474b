"""FLOPs against closed forms, the meter against a clock of our own, and what a run leaves."""

import json
import math
import sys
import threading
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdiff import flops
from jaxdiff.networks.cpu import convolve
from jaxdiff.parallel import data_mesh, shard_batch
from jaxdiff.reporting import Meter, Profiler
from jaxdiff.training import fit, init_state, make_train_step

B, M, N, K = 8, 3, 5, 7

# FLOPs


def layers(params, x):
    return jnp.sum(jnp.tanh(x @ params["w"]) @ params["v"])


SHAPES = {"w": jnp.zeros((M, N)), "v": jnp.zeros((N, K))}
# Forwards, and each layer's gradients but that of the input.
LAYERS = 3 * 2 * B * (M * N + N * K) - 2 * B * M * N


def test_dense_layers_forwards_and_backwards():
    x = jnp.zeros((B, M))
    assert flops.count(layers, SHAPES, x) == 2 * B * (M * N + N * K)
    assert flops.count(jax.grad(layers), SHAPES, x) == LAYERS
    abstract = jax.ShapeDtypeStruct((B, M), jnp.bfloat16)
    assert flops.count(jax.jit(jax.grad(layers)), SHAPES, abstract) == LAYERS


def test_batched_products():
    a, b = jnp.zeros((2, 4, B, M)), jnp.zeros((2, 4, M, N))
    assert flops.count(jnp.matmul, a, b) == 2 * (2 * 4) * B * M * N


@pytest.mark.parametrize(("stride", "groups"), [(1, 1), (2, 1), (1, 2)])
def test_convolutions_forwards_and_backwards(stride, groups):
    side, size, c, c2 = 8, 3, 4, 6
    x, kernel = jnp.zeros((B, side, side, c)), jnp.zeros((size, size, c // groups, c2))

    def net(x, kernel):
        options = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}
        strides = (stride, stride)
        return jax.lax.conv_general_dilated(
            x, kernel, strides, "SAME", feature_group_count=groups, **options
        )

    forwards = 2 * B * (side // stride) ** 2 * c2 * size**2 * c // groups
    assert flops.count(net, x, kernel) == forwards
    gradients = jax.grad(lambda *args: jnp.sum(net(*args) ** 2), (0, 1))
    assert flops.count(gradients, x, kernel) == 3 * forwards
    if stride == groups == 1:  # those of `networks` are of a primitive of their own
        gradients = jax.grad(lambda *args: jnp.sum(convolve(*args) ** 2), (0, 1))
        assert flops.count(gradients, x, kernel) == 3 * forwards


def test_a_scan_counts_its_turns_and_of_branches_the_costliest_counts():
    def loop(x, w):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    x, w = jnp.zeros((B, N)), jnp.zeros((K, N, N))
    assert flops.count(loop, x, w) == K * 2 * B * N * N
    gradient = jax.grad(lambda w: jnp.sum(loop(x, w)))
    assert flops.count(gradient, w) == 3 * K * 2 * B * N * N
    branches = lambda x, w: jax.lax.cond(x[0, 0] > 0, lambda: x, lambda: loop(x, w))
    assert flops.count(branches, x, w) == K * 2 * B * N * N


@pytest.mark.parametrize("prevent_cse", [True, False])
def test_what_is_computed_again_does_not_count(prevent_cse):
    again = jax.checkpoint(lambda x, w: jnp.sin(jnp.tanh(x @ w) @ w), prevent_cse=prevent_cse)
    plain = lambda x, w: jnp.sin(jnp.tanh(x @ w) @ w)
    x, w = jnp.zeros((B, N)), jnp.zeros((K, N, N))
    found = []
    for block in (again, plain):

        def loss(x, w, block=block):
            x = block(block(x, w[0]), w[1])
            return jnp.sum(jax.lax.scan(lambda x, w: (block(x, w), None), x, w)[0])

        found.append(flops.count(jax.grad(loss, (0, 1)), x, w))
    assert found == [3 * (K + 2) * 2 * 2 * B * N * N] * 2


def objective(params, key, batch):
    return jnp.sum((jnp.tanh(batch["x"] @ params["w"]) @ params["v"]) ** 2, axis=-1), {}


@pytest.mark.devices(4)
def test_a_train_step_counts_the_same_over_a_mesh_and_is_traced_once():
    traced = []

    def spied(params, key, batch):
        traced.append(batch["x"].shape)
        return objective(params, key, batch)

    mesh, optimizer = data_mesh(), optax.adam(1e-2)
    for by in (None, "jit", "shard_map", "pmap"):
        split = None if by is None else mesh
        train_step = make_train_step(spied, optimizer, ema_decay=0.9, mesh=split, by=by or "jit")
        state = init_state(SHAPES, optimizer, jax.random.key(0), mesh=split)
        batch = {"x": np.zeros((B, M), np.float32)}
        batch = batch if split is None else shard_batch(batch, split)
        assert flops.count(train_step, state, batch) == LAYERS, by
        train_step(state, batch)
        assert len(traced) == 1, by
        traced.clear()


def test_peaks_add_up_where_all_are_known():
    four, other = SimpleNamespace(device_kind="TPU v4"), SimpleNamespace(device_kind="abacus")
    assert flops.peak([four] * 3) == 3 * 275e12
    assert flops.peak([four, other]) is None
    assert flops.peak(jax.devices("cpu")) is None


# The meter


class Clock:
    """Stands still but when told, also while JAX says that it compiles."""

    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr("jaxdiff.reporting.time.perf_counter", lambda: self.now)

    def compile(self, seconds, told=None):
        self.now += seconds
        for part, share in (("jaxpr_to_mlir_module", 0.25), ("backend_compile", 0.75)):
            event = f"/jax/core/compile/{part}_duration"
            jax.monitoring.record_event_duration_secs(event, share * (told or seconds))
        jax.monitoring.record_event_duration_secs("/jax/something/else", 99.0)


def device(kind, peak_bytes, process=0):
    stats = None if peak_bytes is None else {"peak_bytes_in_use": peak_bytes}
    return SimpleNamespace(device_kind=kind, process_index=process, memory_stats=lambda: stats)


def test_rows_tell_where_the_time_went(monkeypatch):
    # Made before, since to make them may take compilation in earnest.
    losses = [{"loss": jnp.float32(loss)} for loss in (1.0, 2.0, 6.0, 7.0)]
    clock = Clock(monkeypatch)
    chips = [device("TPU v4", 2 * 10**9), device("TPU v4", 3 * 10**9)]
    chips += [device("TPU v4", 9 * 10**9, process=1)]
    with Meter(chips, flops_per_step=1e12) as meter:
        for metrics in losses[:3]:
            with meter.waiting():
                clock.now += 0.5
                clock.compile(16.0)
            clock.compile(4.0)
            clock.now += 0.5
            meter.add(metrics)
        assert [m["loss"] for m in meter.pause()] == [1.0, 2.0, 6.0]
        clock.now += 100.0  # an evaluation
        clock.compile(10.0)
        meter.go_on()
        clock.now += 3.0
        elsewhere = threading.Thread(target=clock.compile, args=[0.0, 50.0])
        elsewhere.start()
        elsewhere.join()
        meter.add(losses[3])
        assert len(meter.pause()) == 1
        row = meter.row(batch_size=32)
        assert row == pytest.approx(
            {
                "loss": 4.0,
                "steps/s": 4 / 6,
                "examples/s": 32 * 4 / 6,
                "flops/s": 1e12 * 4 / 6,
                "utilisation": 1e12 * 4 / 6 / (3 * 275e12),
                "data_wait": 1.5 / 6,
                "compile_seconds": 70.0,
                "device_memory_gb": 3.0,
            }
        )
        meter.go_on()
        clock.now += 2.0
        meter.add(losses[0])
        meter.pause()
        row = meter.row(batch_size=32)
        assert (row["steps/s"], row["data_wait"], row["compile_seconds"]) == (0.5, 0.0, 70.0)
        meter.go_on()
        meter.add(losses[0])
    clock.now += 1.0
    clock.compile(5.0)  # nobody listens any more
    meter.pause()
    assert meter.row(batch_size=1)["compile_seconds"] == 70.0


# A run


class Data:
    def __init__(self, at=None, do=None):
        self.at, self.do = at, do

    def __getitem__(self, step):
        if step == self.at:
            self.do()
        x = np.random.default_rng(step).normal(size=(B, M))
        return {"x": x.astype(np.float32)}


def run(workdir, steps=8, data=None, **options):
    optimizer = optax.adam(1e-2)
    train_step = make_train_step(objective, optimizer, ema_decay=0.9)
    params = {"w": jnp.ones((M, N)), "v": jnp.ones((N, K))}
    state = init_state(params, optimizer, jax.random.key(0))
    options = {"log_every": 4, "save_every": 4, "progress": False} | options
    return fit(train_step, state, data or Data(), steps=steps, workdir=workdir, **options)


def rows(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_rows_of_a_run(tmp_path):
    run(tmp_path, flops_per_step=float(LAYERS))
    names = ["loss", "grad_norm", "steps/s", "examples/s", "flops/s", "data_wait"]
    assert len(rows(tmp_path)) == 2
    for row in rows(tmp_path):
        assert set(row) == {*names, "step", "wall_time", "compile_seconds"}
        assert row["flops/s"] == pytest.approx(LAYERS * row["steps/s"])
        assert 0 < row["data_wait"] < 1
    assert rows(tmp_path)[0]["compile_seconds"] > 0


# Profiles


def traces(workdir):
    return sorted((workdir / "tensorboard" / "plugins" / "profile").glob("*/*.xplane.pb"))


def traced_steps(path):
    planes = jax.profiler.ProfileData.from_file(str(path)).planes
    events = [event for plane in planes for line in plane.lines for event in line.events]
    return sorted(dict(e.stats)["step_num"] for e in events if e.name == "train")


@pytest.mark.parametrize("window", [(1, 3), (3, 7), (8, 9)])
def test_a_profile_is_of_its_updates(window, tmp_path):
    straight = run(tmp_path / "straight")
    profiled = run(tmp_path / "profiled", profile_steps=window)
    (path,) = traces(tmp_path / "profiled")
    assert traced_steps(path) == list(range(*window))
    assert jnp.array_equal(straight.params["w"], profiled.params["w"])
    assert [r["step"] for r in rows(tmp_path / "profiled")] == [4, 8]


def test_a_resumed_run_profiles_what_is_left_of_its_window(tmp_path):
    run(tmp_path, steps=4, profile_steps=(2, 4))
    before = traces(tmp_path)
    run(tmp_path, steps=8, profile_steps=(2, 4))
    assert traces(tmp_path) == before
    before[0].unlink()  # the next may have its name, which is that of the second

    def stop():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, steps=16, data=Data(at=10, do=stop), profile_steps=(10, 15))
    (cut,) = traces(tmp_path)
    cut.unlink()
    run(tmp_path, steps=16, profile_steps=(6, 11))  # goes on at 9
    (rest,) = traces(tmp_path)
    assert traced_steps(rest) == [9, 10]


def test_a_profile_starts_and_stops_on_idle_devices(tmp_path, monkeypatch):
    @jax.jit
    def slow(x):
        return jax.lax.fori_loop(0, 100, lambda _, x: jnp.tanh(x @ x), x)

    state, ready = slow(jnp.eye(200)), []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: ready.append(state.is_ready()))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: ready.append(state.is_ready()))
    with Profiler(tmp_path, range(2, 4)) as profiler:
        profiler.start_before(1, state)
        assert not ready
        for step in (2, 3):
            state = slow(state)
            assert not state.is_ready()
            profiler.start_before(step, state)
            profiler.stop_after(step, state)
            assert len(ready) == step - 1
    assert ready == [True, True]
    assert [profiler.due(step) for step in range(5)] == [False, True, False, True, False]


@pytest.mark.parametrize("window", [(0, 3), (3, 3), (5, 4), (8, 10), (-2, 1)])
def test_a_window_outside_of_the_run_is_refused(window, tmp_path):
    with pytest.raises(ValueError, match=rf"profile_steps must be .* = 9, got {window[0]}:"):
        run(tmp_path, profile_steps=window)
    assert not any(tmp_path.iterdir())


def test_reports_need_a_folder(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace())
    with pytest.raises(ValueError, match=r"workdir must be given for profile_steps=\(1, 2\)"):
        run(None, profile_steps=(1, 2))
    with pytest.raises(ValueError, match="workdir must be given for wandb='mine'"):
        run(None, wandb="mine")


# Weights & Biases


class Wandb:
    """What was asked of the module, in its place."""

    def __init__(self, monkeypatch):
        self.begun, self.logged, self.ended = [], [], []
        monkeypatch.setitem(sys.modules, "wandb", self)

    def init(self, **options):
        self.begun.append(options)
        self.id = options["id"] or f"run-{len(self.begun)}"
        return self

    def log(self, row, *, step):
        self.logged.append((step, row))

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        self.ended.append(kind)


def test_rows_go_to_wandb_and_a_resumed_run_goes_on_in_the_same_one(tmp_path, monkeypatch):
    wandb = Wandb(monkeypatch)
    options = {"wandb": "mine", "config": {"width": 3}, "eval_every": 8}
    options["validate"] = lambda params: {"odd": math.nan}
    with pytest.raises(KeyError):
        run(tmp_path, data=Data(at=6, do=lambda: {}["kill"]), **options)
    run(tmp_path, **options)
    run(tmp_path / "other", **options)
    assert [begun["id"] for begun in wandb.begun] == [None, "run-1", None]
    for begun, folder in zip(wandb.begun, [tmp_path, tmp_path, tmp_path / "other"], strict=True):
        assert (begun["project"], begun["resume"], begun["dir"]) == ("mine", "allow", str(folder))
        assert begun["config"] == {"width": 3}
    assert wandb.ended == [KeyError, None, None]
    first = [(step, row) for step, row in wandb.logged[:3]]
    assert [step for step, _ in first] == [4, 8, 8]
    for (_, logged), row in zip(first, rows(tmp_path), strict=True):
        for name, value in logged.items():
            assert row[name] == (None if math.isnan(value) else value)
    assert math.isnan(first[-1][1]["validation/odd"])


def test_wandb_that_is_not_installed_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"wandb cannot be .*: pip install 'jaxdiff\[wandb\]'"):
        run(tmp_path, wandb="mine")
    assert not any(tmp_path.iterdir())
