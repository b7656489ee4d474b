"""The train step against hand-written sums, and the loop against kills, damage and bad losses."""

import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdiff.checkpoints import CheckpointError, Checkpoints, restore_config, restore_ema
from jaxdiff.parallel import (
    check_divisible,
    data_mesh,
    replicate,
    shard_batch,
    start_distributed,
)
from jaxdiff.processes.base import example_indices
from jaxdiff.training import (
    NonFiniteLoss,
    fit,
    init_state,
    make_eval_step,
    make_train_step,
    warmup_adam,
)

# orbax leaves the coroutines of a failed read to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

STEPS, SAVE_EVERY, KILLED_AT = 12, 3, 8


def denoising_loss(params, key, batch):
    """A noisy regression whose noise is keyed by the example's index in the global batch."""
    indices, _ = example_indices(len(batch["x"]))
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, indices)
    noise = jax.vmap(lambda k: jax.random.normal(k, (4,)))(keys)
    hidden = jnp.tanh((batch["x"] + noise) @ params["w"])
    loss = jnp.mean((hidden @ params["v"] - noise) ** 2, axis=-1)
    return loss, {"noise": jnp.cos(indices) * noise[:, 0]}


def linear_loss(params, key, batch):
    """The gradient is the mean of x, whatever the parameters."""
    return batch["x"] @ params["w"], {}


def network_params(hidden=16):
    rng = np.random.default_rng(0)
    shapes = {"w": (4, hidden), "v": (hidden, 4)}
    return {name: jnp.array(rng.normal(size=s), jnp.float32) for name, s in shapes.items()}


class Data:
    """Batches by number, with a note of those asked for and something to do at one of them."""

    def __init__(self, size=8, at=None, do=None, note=None):
        self.size, self.at, self.do, self.note = size, at, do, note
        self.asked = []

    def __getitem__(self, step):
        if step == self.at:
            self.do()
        self.asked.append(step)
        if self.note is not None:
            with open(self.note, "a") as file:
                file.write(f"{step}\n")
        x = np.random.default_rng([7, step]).normal(size=(self.size, 4))
        return {"x": x.astype(np.float32)}


def run(workdir, data, steps=STEPS, objective=denoising_loss, params=None, **options):
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2))
    mesh = options.get("mesh")
    train_step = make_train_step(objective, optimizer, ema_decay=0.999, mesh=mesh)
    params = network_params() if params is None else params
    state = init_state(params, optimizer, jax.random.key(3), mesh=mesh)
    options = {"save_every": SAVE_EVERY, "log_every": 2, "progress": False} | options
    return fit(train_step, state, data, steps=steps, workdir=workdir, **options)


def raw(state):
    return jax.device_get(state._replace(key=jax.random.key_data(state.key)))


def assert_same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(raw(a)), jax.tree.leaves(raw(b)), strict=True):
        assert x.dtype == y.dtype
        assert x.tobytes() == y.tobytes()


def rows(workdir):
    return [json.loads(line) for line in (Path(workdir) / "metrics.jsonl").read_text().splitlines()]


def abstract(state):
    return jax.eval_shape(lambda: state)


def largest_file(folder):
    return max((p for p in Path(folder).rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


# The step.


def test_update_is_sgd_on_the_mean_loss_and_ema_is_the_weighted_sum_of_all_iterates():
    rate, decay, count = 0.1, 0.3, 6
    optimizer = optax.sgd(rate)
    train_step = make_train_step(linear_loss, optimizer, ema_decay=decay)
    w0 = np.array([1.0, -2.0, 0.5, 3.0], np.float32)
    state = init_state({"w": jnp.array(w0)}, optimizer, jax.random.key(0))
    data = Data()
    iterates = [w0.astype(np.float64)]
    for step in range(count):
        gradient = data[step]["x"].mean(0)
        expected_loss = gradient @ iterates[-1]
        iterates.append(iterates[-1] - rate * gradient)
        state, metrics = train_step(state, data[step])
        np.testing.assert_allclose(metrics["loss"], expected_loss, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(metrics["grad_norm"], np.linalg.norm(gradient), rtol=1e-5)
    # ema_n = sum_j p_j (1 - d_j) prod_{i > j} d_i, with the start as j = 0 and d_0 = 0.
    decays = [0.0] + [min(decay, (1 + n) / (10 + n)) for n in range(count)]
    assert decays[1] < decay == decays[-1]  # the test sees both sides of the warm-up
    weights = [(1 - decays[j]) * math.prod(decays[j + 1 :]) for j in range(count + 1)]
    assert sum(weights) == pytest.approx(1)
    ema = sum(weight * p for weight, p in zip(weights, iterates, strict=True))
    np.testing.assert_allclose(state.params["w"], iterates[-1], rtol=1e-5)
    np.testing.assert_allclose(state.ema_params["w"], ema, rtol=1e-5)
    assert int(state.step) == count
    assert state.step.dtype == jnp.int32


def test_each_step_draws_from_the_runs_key_folded_with_its_number():
    optimizer = optax.sgd(0.1)
    train_step = make_train_step(denoising_loss, optimizer, ema_decay=0.0)
    key = jax.random.key(5)
    state = init_state(network_params(), optimizer, key)
    for step in range(3):
        key_n, batch = jax.random.fold_in(key, step), Data()[step]
        losses, own = denoising_loss(state.params, key_n, jax.tree.map(jnp.array, batch))
        state, metrics = train_step(state, batch)
        np.testing.assert_allclose(metrics["loss"], losses.mean(), rtol=1e-5)
        np.testing.assert_allclose(metrics["noise"], own["noise"].mean(), rtol=1e-5)


@pytest.mark.parametrize("make_key", [jax.random.key, jax.random.PRNGKey])
def test_state_is_donated_and_shares_nothing_with_the_caller(make_key):
    optimizer = optax.adam(1e-2)
    params, key = network_params(), make_key(0)
    train_step = make_train_step(denoising_loss, optimizer, ema_decay=0.9)
    first = init_state(params, optimizer, key)
    second, _ = train_step(first, Data()[0])
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(first))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((second, params, key)))


def test_nothing_is_compiled_twice_even_from_weakly_typed_parameters():
    traces = []

    def objective(params, key, batch):
        traces.append(1)
        return batch["x"] @ params["w"] * params["scale"], {}

    optimizer = warmup_adam(1e-2, steps=10, warmup=2)
    train_step = make_train_step(objective, optimizer, ema_decay=0.9)
    params = {"w": jnp.ones(4), "scale": jnp.asarray(2.0)}
    assert params["scale"].weak_type
    state = init_state(params, optimizer, jax.random.key(0))
    for step in range(4):
        state, _ = train_step(state, Data()[step])
    state, _ = train_step(init_state(params, optimizer, jax.random.key(1)), Data()[0])
    assert len(traces) == 1


@pytest.mark.parametrize(("x64", "dtype"), [(False, jnp.bfloat16), (True, jnp.float32)])
def test_dtypes_are_those_of_the_parameters(x64, dtype):
    with jax.enable_x64(x64):
        optimizer = optax.adam(1e-2)
        train_step = make_train_step(linear_loss, optimizer, ema_decay=0.9)
        first = init_state({"w": jnp.ones(4, dtype)}, optimizer, jax.random.key(0))
        before = jax.tree.map(lambda leaf: leaf.dtype, first)
        second, _ = train_step(first, Data()[0])
        assert jax.tree.map(lambda leaf: leaf.dtype, second) == before
        assert second.ema_params["w"].dtype == dtype


@pytest.mark.devices(4)
def test_four_devices_do_what_one_does():
    optimizer = optax.adam(1e-2)
    states, noises = [], []
    ways = [(None, "jit"), (data_mesh(jax.devices()[:1]), "jit")]
    for mesh, by in ways + [(data_mesh(), by) for by in ("pmap", "shard_map", "jit")]:
        train_step = make_train_step(denoising_loss, optimizer, ema_decay=0.99, mesh=mesh, by=by)
        state = init_state(network_params(), optimizer, jax.random.key(1), mesh=mesh)
        noise = []
        for step in range(5):
            batch = Data()[step] if mesh is None else shard_batch(Data()[step], mesh)
            state, metrics = train_step(state, batch)
            noise.append(float(metrics["noise"]))
        states.append(raw(state))
        noises.append(noise)
    assert len(data_mesh().devices) == 4
    assert len(state.params["w"].addressable_shards) == 4
    assert len(batch["x"].sharding.device_set) == 4
    assert batch["x"].addressable_shards[0].data.shape[0] == 2
    for other, noise in zip(states[1:], noises[1:], strict=True):
        np.testing.assert_allclose(noise, noises[0], rtol=1e-6, atol=1e-7)
        for x, y in zip(jax.tree.leaves(states[0]), jax.tree.leaves(other), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


@pytest.mark.devices(4)
@pytest.mark.parametrize("by", ["shard_map", "pmap"])
def test_gradients_and_metrics_are_summed_at_once_and_the_state_is_donated(by):
    mesh, optimizer = data_mesh(), optax.adam(1e-2)
    train_step = make_train_step(denoising_loss, optimizer, ema_decay=0.99, mesh=mesh, by=by)
    state = init_state(network_params(), optimizer, jax.random.key(1), mesh=mesh)
    batch = shard_batch(Data()[0], mesh)
    text = jax.jit(train_step).lower(state, batch).compile().as_text()
    sums = re.findall(r" = (\S+) all-reduce\(", text)
    assert len(sums) == 1
    assert sums[0].startswith(f"f32[{4 * 16 * 2 + 2}]")  # two matrices, the loss and a metric
    assert not re.search(r"all-gather|all-to-all|collective-permute", text)
    old = state.params["w"]
    train_step(state, batch)
    assert old.is_deleted()


@pytest.mark.devices(4)
@pytest.mark.parametrize("by", ["shard_map", "pmap"])
def test_narrow_parameters_stay_narrow_and_nothing_compiles_anew(by):
    traced = []

    def objective(params, key, batch):
        traced.append(by)
        return denoising_loss(params, key, batch)

    mesh, optimizer = data_mesh(), optax.adam(1e-2)
    train_step = make_train_step(objective, optimizer, ema_decay=0.9, mesh=mesh, by=by)
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), network_params())
    state = init_state(params, optimizer, jax.random.key(1), mesh=mesh)
    before = jax.tree.map(lambda leaf: leaf.dtype, state)
    for step in range(3):
        state, _ = train_step(state, shard_batch(Data()[step], mesh))
    assert jax.tree.map(lambda leaf: leaf.dtype, state) == before
    assert len(traced) == 1


@pytest.mark.devices(4)
def test_ways_that_there_are_not_are_refused():
    with pytest.raises(ValueError, match="by must be 'jit', 'shard_map' or 'pmap', got 'map'"):
        make_train_step(denoising_loss, optax.sgd(0.1), ema_decay=0.9, mesh=data_mesh(), by="map")
    with pytest.raises(ValueError, match="mesh must be given for by='pmap', got None"):
        make_train_step(denoising_loss, optax.sgd(0.1), ema_decay=0.9, by="pmap")


@pytest.mark.devices(4)
def test_eval_step_is_the_mean_loss_on_any_device_count():
    key, params = jax.random.key(2), network_params()
    batch = jax.tree.map(jnp.array, Data()[0])
    losses, metrics = denoising_loss(params, key, batch)
    for mesh in (None, data_mesh()):
        found = make_eval_step(denoising_loss, mesh=mesh)(params, key, batch)
        np.testing.assert_allclose(found["loss"], losses.mean(), rtol=1e-5)
        np.testing.assert_allclose(found["noise"], metrics["noise"].mean(), rtol=1e-5)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize("decay", [-0.1, 1.0, 1.5, math.nan])
def test_ema_decay_outside_its_range_is_refused(decay):
    with pytest.raises(ValueError, match=r"ema_decay must be in \[0, 1\), got"):
        make_train_step(denoising_loss, optax.sgd(0.1), ema_decay=decay)


@pytest.mark.devices(4)
def test_an_indivisible_batch_is_refused_before_tracing():
    def objective(params, key, batch):
        raise AssertionError("traced")

    mesh, optimizer = data_mesh(), optax.sgd(0.1)
    state = init_state(network_params(), optimizer, jax.random.key(0), mesh=mesh)
    batch = Data(size=6)[0]
    with pytest.raises(ValueError, match="multiple of 4 devices, got 6"):
        make_train_step(objective, optimizer, ema_decay=0.9, mesh=mesh)(state, batch)
    with pytest.raises(ValueError, match="multiple of 4 devices, got 6"):
        make_eval_step(objective, mesh=mesh)(state.params, state.key, batch)
    with pytest.raises(ValueError, match="multiple of 4 devices, got 6"):
        shard_batch(batch, mesh)
    with pytest.raises(ValueError, match="share their first axis"):
        check_divisible({"x": np.zeros((8, 2)), "label": np.zeros(4)}, 4)


def test_warmup_adam_moves_by_its_rate_and_clips():
    peak, steps, warmup = 0.1, 8, 3
    optimizer = warmup_adam(peak, steps=steps, warmup=warmup)
    state = optimizer.init(jnp.zeros(()))
    for n in range(steps):
        # Adam divides a constant gradient by itself; clipping makes both of these the same one.
        update, state = optimizer.update(jnp.float32(1 if n % 2 else 100), state)
        if n < warmup:
            rate = peak * n / warmup
        else:
            rate = peak * (1 + math.cos(math.pi * (n - warmup) / (steps - warmup))) / 2
        np.testing.assert_allclose(update, -rate, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"learning_rate": 0.0, "steps": 5}, "learning_rate"),
        ({"learning_rate": 0.1, "steps": 5, "warmup": 5}, "warmup"),
        ({"learning_rate": 0.1, "steps": 5, "clip": 0.0}, "clip"),
    ],
)
def test_warmup_adam_refuses_bad_values(options, name):
    with pytest.raises(ValueError, match=f"{name} must be"):
        warmup_adam(**options)


# The loop.


def test_a_killed_run_resumes_to_the_same_bits(tmp_path):
    """Straight through, against SIGKILL in another process and a second start."""
    straight_data = Data()
    straight = run(tmp_path / "straight", straight_data)
    assert straight_data.asked == list(range(STEPS))

    # When batch 8 is asked for, the save of step 6 has begun, so that of step 3 is complete.
    workdir, note = tmp_path / "killed", tmp_path / "asked"
    killed = subprocess.run(
        [sys.executable, __file__, "killed", str(workdir), str(note)],
        capture_output=True,
        timeout=300,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert [int(line) for line in note.read_text().split()] == list(range(KILLED_AT))

    resumed_data = Data()
    resumed = run(workdir, resumed_data)
    assert_same_bits(resumed, straight)
    first = resumed_data.asked[0]
    assert first in (3, 6)
    assert resumed_data.asked == list(range(first, STEPS))
    assert [r["step"] for r in rows(workdir)] == [r["step"] for r in rows(tmp_path / "straight")]
    for again, once in zip(rows(workdir), rows(tmp_path / "straight"), strict=True):
        # The row after the resume averages fewer steps, if the kill fell between two rows.
        if not first < again["step"] <= first + 2:
            assert again["loss"] == pytest.approx(once["loss"], rel=1e-6)

    with Checkpoints(workdir / "checkpoints") as checkpoints:
        assert_same_bits(checkpoints.restore_latest(abstract(straight)), straight)

    idle = Data()
    assert_same_bits(run(workdir, idle), straight)
    assert idle.asked == []


@pytest.mark.devices(4)
def test_a_run_saved_on_four_devices_goes_on_on_one(tmp_path):
    whole = run(None, Data())
    run(tmp_path, Data(), steps=STEPS // 2, mesh=data_mesh())
    resumed = run(tmp_path, Data())
    assert int(resumed.step) == STEPS
    assert len(resumed.params["w"].sharding.device_set) == 1
    for x, y in zip(jax.tree.leaves(raw(whole)), jax.tree.leaves(raw(resumed)), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


def test_two_processes_train_as_one(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, "one_of_two", str(index), port, str(tmp_path)],
            env=environment,
            stderr=subprocess.PIPE,
        )
        for index in (0, 1)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors.decode()
    alone = run(None, Data(), steps=4)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        together = checkpoints.restore_latest(abstract(alone))
    assert restore_config(tmp_path / "checkpoints") == {"processes": 2}
    assert [r["step"] for r in rows(tmp_path)] == [2, 4]
    for x, y in zip(jax.tree.leaves(raw(alone)), jax.tree.leaves(raw(together)), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


def test_rows_are_means_over_their_steps_and_never_double(tmp_path):
    losses = []
    optimizer = optax.adam(1e-2)
    train_step = make_train_step(denoising_loss, optimizer, ema_decay=0.999)

    def spy(state, batch):
        state, metrics = train_step(state, batch)
        losses.append(float(metrics["loss"]))
        return state, metrics

    def start():
        return init_state(network_params(), optimizer, jax.random.key(3))

    pictures = []
    options = {
        "log_every": 3,
        "eval_every": 4,
        "save_every": 5,
        "progress": False,
        "workdir": tmp_path,
        "validate": lambda params: {"loss": float(jnp.sum(params["w"])), "odd": math.nan},
        "draw": lambda params, path: (path.write_bytes(b"png"), pictures.append(path.name)),
        "config": {"width": 3},
    }
    fit(spy, start(), Data(), steps=7, **options)
    with (tmp_path / "metrics.jsonl").open("a") as file:  # what a kill leaves behind
        file.write('{"step": 9, "wall_time": 0, "loss": 1.0}\n{"step": 12, "wa')
    last = fit(spy, start(), Data(), steps=10, **options)
    trained = {r["step"]: r for r in rows(tmp_path) if "loss" in r}
    assert [r["step"] for r in rows(tmp_path) if "loss" in r] == [3, 6, 7, 9, 10]
    for step, since in {3: 0, 6: 3, 7: 6, 9: 7, 10: 9}.items():
        assert trained[step]["loss"] == pytest.approx(np.mean(losses[since:step]), rel=1e-6)
        assert trained[step]["examples/s"] == pytest.approx(8 * trained[step]["steps/s"])
        assert "grad_norm" in trained[step]
    validated = [r for r in rows(tmp_path) if "validation/loss" in r]
    assert [r["step"] for r in validated] == [4, 7, 8, 10]
    assert validated[-1]["validation/loss"] == pytest.approx(float(jnp.sum(last.ema_params["w"])))
    assert validated[-1]["validation/odd"] is None
    assert pictures == [f"step-{n:06d}.png" for n in (4, 7, 8, 10)]
    assert sorted(p.name for p in (tmp_path / "samples").iterdir()) == pictures
    assert any((tmp_path / "tensorboard").iterdir())
    assert restore_config(tmp_path / "checkpoints") == {"width": 3}


def test_a_loss_that_is_not_finite_names_its_step_and_the_last_good_checkpoint(tmp_path):
    def objective(params, key, batch):
        loss, metrics = denoising_loss(params, key, batch)
        return loss * jnp.where(batch["x"][0, 0] == BAD, jnp.nan, 1.0), metrics

    bad_step = 8
    BAD = Data()[bad_step - 1]["x"][0, 0]
    data = Data()
    with pytest.raises(NonFiniteLoss, match=r"the loss is nan at step 8; .*checkpoints/6$"):
        run(tmp_path, data, objective=objective, log_every=10, save_every=6)
    assert len(data.asked) >= 10  # not noticed before the row was due
    with pytest.raises(NonFiniteLoss, match=r"at step 8; there is no checkpoint$"):
        run(None, Data(), objective=objective, log_every=10)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.latest_step() == 6


def test_parameters_that_are_not_finite_are_never_saved(tmp_path):
    def objective(params, key, batch):
        # A finite loss of infinite slope, at the last step before a save.
        w = params["w"]
        zero = w[0] - jax.lax.stop_gradient(w[0])
        return batch["x"] @ w + jnp.sqrt(jnp.where(batch["x"][0, 0] == LAST, zero, 1.0)), {}

    LAST = Data()[2]["x"][0, 0]
    with pytest.raises(NonFiniteLoss, match="a parameter is not finite after step 3"):
        run(tmp_path, Data(), objective=objective, params={"w": jnp.ones(4)})
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.latest_step() is None


def test_sigterm_saves_and_stops_and_the_handler_is_given_back(tmp_path):
    def handler(*_):
        raise AssertionError("the loop did not listen")

    previous = signal.signal(signal.SIGTERM, handler)
    try:
        data = Data(at=4, do=lambda: signal.raise_signal(signal.SIGTERM))
        validated = []
        with pytest.raises(SystemExit) as stopped:
            run(tmp_path, data, validate=lambda params: validated.append(params) or {})
        assert stopped.value.code == 143
        assert signal.getsignal(signal.SIGTERM) is handler
    finally:
        signal.signal(signal.SIGTERM, previous)
    assert not validated  # there is no time for that
    stop = rows(tmp_path)[-1]["step"]
    assert stop in (3, 4, 5)  # batch 4 is asked for while these run
    assert [r["step"] for r in rows(tmp_path)] == [*range(2, stop, 2), stop]
    resumed_data = Data()
    resumed = run(tmp_path, resumed_data)
    assert resumed_data.asked == list(range(stop, STEPS))
    assert_same_bits(resumed, run(None, Data()))


@pytest.mark.parametrize("option", ["log_every", "eval_every", "save_every"])
def test_counts_out_of_range_are_refused(option, tmp_path):
    with pytest.raises(ValueError, match=f"{option} must be at least 1, got 0"):
        run(tmp_path, Data(), **{option: 0})
    with pytest.raises(ValueError, match="steps must be at least 0, got -1"):
        run(tmp_path, Data(), steps=-1)
    assert not any(tmp_path.iterdir())


# Checkpoints.


def saved_run(folder, params=None):
    """States of steps 1 and 2, saved; large enough to fill a file of their own."""
    optimizer = optax.adam(1e-2)
    train_step = make_train_step(denoising_loss, optimizer, ema_decay=0.9)
    state = init_state(params or network_params(1024), optimizer, jax.random.key(0))
    states = []
    with Checkpoints(folder) as checkpoints:
        for step in (1, 2):
            state, _ = train_step(state, Data()[step])
            checkpoints.save(step, state, {"step": step})
            states.append(jax.tree.map(jnp.copy, state))
    return states


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("item", "damage"),
    [("params", truncate), ("opt", flip_byte), ("params", flip_byte), ("ema", Path.unlink)],
)
def test_a_damaged_checkpoint_is_passed_over_and_its_step_saved_anew(tmp_path, item, damage):
    first, second = saved_run(tmp_path)
    damage(largest_file(tmp_path / "2" / item))
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.warns(RuntimeWarning, match=r"checkpoint 2 .* is damaged .*going back to 1"):
            restored = checkpoints.restore_latest(abstract(first))
        assert_same_bits(restored, first)
        assert checkpoints.latest_step() == 1
        checkpoints.save(2, second)
        checkpoints.wait()
        assert_same_bits(checkpoints.restore_latest(abstract(first)), second)
    assert (tmp_path / "damaged-2").is_dir()


def test_a_flipped_byte_is_caught_by_nothing_but_the_checksum(tmp_path):
    saved_run(tmp_path)
    flip_byte(largest_file(tmp_path / "2" / "ema"))
    shapes = jax.eval_shape(lambda: network_params(1024))
    with pytest.warns(RuntimeWarning, match=r"checksum mismatch in ema\['[vw]'\]"):
        restore_ema(tmp_path, shapes)


@pytest.mark.devices(4)
def test_ema_is_restored_alone_and_the_folder_left_as_it_was(tmp_path):
    first, second = saved_run(tmp_path)
    shapes = jax.eval_shape(lambda: network_params(1024))
    ema = restore_ema(tmp_path, shapes)
    np.testing.assert_array_equal(ema["w"], second.ema_params["w"])
    assert (ema["w"] != second.params["w"]).any()
    truncate(largest_file(tmp_path / "2" / "ema"))
    before = sorted(tmp_path.rglob("*"))
    with pytest.warns(RuntimeWarning, match="going back to 1"):
        ema = restore_ema(tmp_path, replicated_shapes := on_mesh(shapes))
    np.testing.assert_array_equal(ema["w"], first.ema_params["w"])
    assert ema["w"].sharding == replicated_shapes["w"].sharding
    assert sorted(tmp_path.rglob("*")) == before


def on_mesh(shapes):
    sharding = replicate(jnp.zeros(()), data_mesh()).sharding
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), shapes)


def test_another_models_checkpoints_are_an_error_and_not_a_fresh_start(tmp_path):
    saved_run(tmp_path)
    other = init_state(network_params(8), optax.adam(1e-2), jax.random.key(0))
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(CheckpointError, match="damaged or of another model"):
            checkpoints.restore_latest(abstract(other))
        assert checkpoints.latest_step() == 2
    with pytest.raises(CheckpointError, match="damaged or of another model"):
        restore_ema(tmp_path, abstract(other.params))


@pytest.mark.parametrize("make_key", [jax.random.key, jax.random.PRNGKey])
def test_a_state_without_optimizer_leaves_and_either_kind_of_key_round_trip(tmp_path, make_key):
    state = init_state(network_params(), optax.sgd(0.1), make_key(11))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state)
        checkpoints.wait()
        restored = checkpoints.restore_latest(abstract(state))
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    draw = jax.random.normal(restored.key, (3,))
    np.testing.assert_array_equal(draw, jax.random.normal(make_key(11), (3,)))
    np.testing.assert_array_equal(restored.params["w"], state.params["w"])


def test_the_last_few_are_kept_and_half_written_ones_swept_away(tmp_path):
    state = init_state(network_params(), optax.sgd(0.1), jax.random.key(0))
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, state)
        with pytest.raises(ValueError, match="step must be newer than 3, got 3"):
            checkpoints.save(3, state)
    (tmp_path / "3").rename(tmp_path / "3.orbax-checkpoint-tmp")  # as a kill leaves it
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.latest_step() == 2
        checkpoints.save(4, state)
    assert sorted(p.name for p in tmp_path.iterdir() if p.name[0].isdigit()) == ["2", "4"]


def test_a_folder_without_checkpoints_is_refused_and_left_alone(tmp_path):
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(ValueError, match="path must hold a checkpoint"):
            restore_ema(path, {})
        with pytest.raises(ValueError, match="path must hold a checkpoint"):
            restore_config(path)
    assert not any(tmp_path.iterdir())
    with pytest.raises(ValueError, match="keep must be at least 1, got 0"):
        Checkpoints(tmp_path, keep=0)


def killed(workdir, note):
    run(workdir, Data(at=KILLED_AT, do=lambda: os.kill(os.getpid(), signal.SIGKILL), note=note))


def one_of_two(index, port, workdir):
    class Half(Data):
        def __getitem__(self, step):
            half = self.size // 2
            return {"x": super().__getitem__(step)["x"][index * half : (index + 1) * half]}

    start_distributed(f"localhost:{port}", 2, index, heartbeat_timeout_seconds=20)
    run(workdir, Half(), steps=4, mesh=data_mesh(), config={"processes": jax.process_count()})


if __name__ == "__main__":
    if sys.argv[1] == "killed":
        killed(*sys.argv[2:])
    else:
        one_of_two(int(sys.argv[2]), *sys.argv[3:])
