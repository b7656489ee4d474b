"""The train step against hand-written sums, and the loop against kills, damage and bad losses."""

import math
import os
import re
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from runs import (
    STEPS,
    Data,
    abstract,
    assert_same_bits,
    denoising_loss,
    free_port,
    linear_loss,
    network_params,
    raw,
    rows,
    run,
)

from jaxdiff.checkpoints import Checkpoints, restore_config
from jaxdiff.parallel import check_divisible, data_mesh, shard_batch, start_distributed
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

KILLED_AT = 8


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
@pytest.mark.parametrize(
    ("by", "accumulate"), [("jit", 1), ("shard_map", 1), ("pmap", 1), ("shard_map", 2)]
)
def test_gradients_and_metrics_are_summed_at_once_and_the_state_is_donated(by, accumulate):
    mesh, optimizer = data_mesh(), optax.adam(1e-2)
    train_step = make_train_step(
        denoising_loss, optimizer, ema_decay=0.99, mesh=mesh, by=by, accumulate=accumulate
    )
    state = init_state(network_params(), optimizer, jax.random.key(1), mesh=mesh)
    batch = shard_batch(Data()[0], mesh)
    text = jax.jit(train_step).lower(state, batch).compile().as_text()
    sums = re.findall(r" = (.+) all-reduce\(", text)
    assert len(sums) == 1
    if by == "jit":  # two matrices, the loss and a metric
        assert sorted(re.findall(r"f32\[(.*?)\]", sums[0])) == ["", "", "16,4", "4,16"]
    else:
        assert sums[0].startswith(f"f32[{4 * 16 * 2 + 2}]")
        assert text.index("all-reduce(") > text.index("ENTRY")  # and not in the loop over parts
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
    with pytest.raises(ValueError, match="accumulate must be at least 1, got 0"):
        make_train_step(denoising_loss, optax.sgd(0.1), ema_decay=0.9, accumulate=0)
    mesh = data_mesh(fsdp=2)
    with pytest.raises(ValueError, match="axis 'data' alone for by='shard_map', got"):
        make_train_step(denoising_loss, optax.sgd(0.1), ema_decay=0.9, mesh=mesh, by="shard_map")
    with pytest.raises(ValueError, match="fsdp must be a divisor of 4 devices, got 3"):
        data_mesh(fsdp=3)


def test_accumulated_gradients_are_the_mean_of_their_parts():
    params, key, x = network_params(), jax.random.key(1), Data()[0]["x"]
    keys = [jax.random.fold_in(jax.random.fold_in(key, 0), i) for i in range(4)]

    def loss(params):
        parts = [denoising_loss(params, keys[i], {"x": x[i::4]}) for i in range(4)]
        return jnp.mean(jnp.stack([jnp.mean(part[0]) for part in parts]))

    value, gradient = jax.value_and_grad(loss)(params)
    step = make_train_step(denoising_loss, optax.sgd(0.1), ema_decay=0.0, accumulate=4)
    state, metrics = step(init_state(params, optax.sgd(0.1), key), {"x": x})
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-6)
    np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(gradient), rtol=1e-6)
    for name in params:
        np.testing.assert_allclose(
            state.params[name], params[name] - 0.1 * gradient[name], rtol=1e-6, atol=1e-7
        )


@pytest.mark.devices(4)
@pytest.mark.parametrize("size", [3, 4, 8, 20])
def test_every_example_counts_once_in_an_evaluation(size):
    key, params, x = jax.random.key(2), network_params(), Data(size=11)[0]["x"]
    totals = {"loss": 0.0, "noise": 0.0, "drawn": 0.0}

    def objective(params, key, batch):
        losses, metrics = denoising_loss(params, key, batch)
        return losses, metrics | {"drawn": jax.random.uniform(key)}  # of the batch

    for i, first in enumerate(range(0, 11, size)):
        part = x[first : first + size]
        losses, metrics = objective(params, jax.random.fold_in(key, i), {"x": part})
        for name, value in {"loss": losses, **metrics}.items():
            totals[name] += float(jnp.mean(value)) * len(part) / 11
    for mesh in (None, data_mesh()):
        found = make_eval_step(objective, size=size, mesh=mesh)(params, key, {"x": x})
        assert found == pytest.approx(totals, rel=1e-5)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(params))


def test_an_evaluation_of_nothing_at_a_time_is_refused():
    with pytest.raises(ValueError, match="size must be at least 1, got 0"):
        make_eval_step(denoising_loss, size=0)


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
    by_parts = make_train_step(objective, optimizer, ema_decay=0.9, mesh=mesh, accumulate=2)
    with pytest.raises(ValueError, match="multiple of 4 devices × 2 parts, got 12"):
        by_parts(state, Data(size=12)[0])
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
    port = free_port()
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
