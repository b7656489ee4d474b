"""One run on one device, on eight, and on two processes of two: the same in all."""

import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from runs import free_port

import jaxdiff as jd
from jaxdiff import networks
from jaxdiff.data.batches import Batches
from jaxdiff.data_likelihood import in_chunks, likelihood_rows
from jaxdiff.parallel import (
    data_mesh,
    from_first,
    per_shard,
    shard_batch,
    start_distributed,
    to_host,
)
from jaxdiff.training import init_state, make_eval_step, make_train_step

STEPS, SEED = 20, 5
PROCESS = jd.Gaussian(jd.linear_beta())
NET = networks.MLP(width=32, depth=2, waves=4, condition_width=16)
DATA = np.random.default_rng(0).normal([1.0, -0.5], [0.3, 1.0], (37, 2)).astype(np.float32)
SIZE = 16
# Name ↦ options of the mesh, of the step.
WAYS = {
    "jit": ({}, {}),
    "shard_map": ({}, {"by": "shard_map"}),
    "pmap": ({}, {"by": "pmap"}),
    "fsdp": ({"fsdp": 2}, {}),
}
ALL = WAYS | {
    f"{way}, two parts": (WAYS[way][0], WAYS[way][1] | {"accumulate": 2})
    for way in ("jit", "shard_map")
}


@functools.cache
def objective():
    return jd.denoising(NET.apply, PROCESS, jd.epsilon())


def key():
    # Not at once: processes must meet before anything touches a device.
    return jax.random.key(SEED)


def optimizer():
    return optax.chain(optax.clip_by_global_norm(0.5), optax.adam(1e-3))


def trained(mesh, **options):
    """The state after `STEPS` updates, and the losses."""
    step = make_train_step(objective(), optimizer(), ema_decay=0.9, mesh=mesh, **options)
    params = NET.init(key(), jnp.zeros((1, 2)), jnp.zeros(1))
    state = init_state(params, optimizer(), key(), mesh=mesh)
    batches, losses, norms = Batches({"x": DATA}, SIZE), [], []
    for i in range(STEPS):
        state, metrics = step(state, shard_batch(batches[i], mesh))
        losses.append(metrics["loss"])
        norms.append(metrics["grad_norm"])
    assert max(map(float, norms)) > 0.5  # or gradients were never clipped
    return state, np.asarray(jax.device_get(losses))


def judged(params, mesh):
    """Samples, likelihoods and a validation loss of a model."""

    def samples(params, keys):
        x = jax.vmap(PROCESS.prior((2,)).sample)(keys)
        denoise = jd.NetDenoiser(params, PROCESS, NET.apply, jd.epsilon())
        return jd.sample(jd.Ancestral(PROCESS), denoise, jd.grids.uniform(5), keys, x)

    def estimate(params, keys, x):
        denoise = jd.NetDenoiser(params, PROCESS, NET.apply, jd.epsilon())
        return jd.log_likelihood(PROCESS, denoise, x, key=keys, probes=1, per_example=True)

    def rows(count):  # of three there are fewer than devices
        likelihood = jd.Likelihood(examples=lambda split, key: DATA, estimate=estimate, size=2)
        return likelihood_rows(likelihood, params, DATA[:count], key(), mesh=mesh)["nll_nats"]

    drawn = in_chunks(functools.partial(per_shard(samples, mesh), params), key(), 16, size=16)
    validation = make_eval_step(objective(), size=8, mesh=mesh)(params, key(), {"x": DATA})
    return {
        "samples": np.concatenate(to_host(drawn)),
        "log_p": rows(16),
        "few": rows(3),
        "validation": np.array(validation["loss"]),
    }


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(to_host(tree))])


def outcome(devices, names=ALL):
    """Everything of every way, as arrays by name."""
    found = {}
    for name in names:
        of_mesh, of_step = ALL[name]
        mesh = data_mesh(devices, **of_mesh)
        state, losses = trained(mesh, **of_step)
        found |= {
            f"{name}/params": flat(state.params),
            f"{name}/ema": flat(state.ema_params),
            f"{name}/losses": losses,
        }
        if name == "jit":
            found |= judged(state.ema_params, mesh)
    return found


@pytest.fixture(scope="module")
def one():
    """On one device."""
    return outcome(jax.devices()[:1], ["jit", "jit, two parts"])


def two_processes(work, folder, *, timeout=280):
    """Runs this file's `work` in two processes of two devices; their outputs."""
    port = free_port()
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "2"}
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, work, str(index), port, str(folder)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in (0, 1)
    ]
    try:
        said = [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(said)
    return said


def assert_alike(found, expected, name):
    """To the rounding of float32, of a vector whole."""
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert error < 2e-7, f"{name}: {error:.2g}"


def assert_the_same_run(found, one):
    for name, (_, options) in ALL.items():
        alone = "jit, two parts" if "accumulate" in options else "jit"
        for part in ("params", "ema", "losses"):
            if f"{name}/{part}" in found:
                assert_alike(found[f"{name}/{part}"], one[f"{alone}/{part}"], f"{name}/{part}")
    for name in ("samples", "log_p", "few", "validation"):
        np.testing.assert_allclose(found[name], one[name], rtol=1e-4, atol=1e-5)


@pytest.mark.devices(8)
def test_eight_devices_are_one(one):
    assert_the_same_run(outcome(jax.devices()), one)


@pytest.mark.devices(8)
def test_two_processes_of_two_devices_are_one(one, tmp_path):
    two_processes("outcome", tmp_path)
    for index in (0, 1):
        with np.load(tmp_path / f"{index}.npz") as file:
            assert_the_same_run(dict(file), one)


def bytes_of_a_device(state):
    device = jax.devices()[0]
    return sum(
        shard.data.nbytes
        for leaf in jax.tree.leaves(state._replace(key=None))
        for shard in leaf.addressable_shards
        if shard.device == device
    )


@pytest.mark.devices(8)
def test_fsdp_keeps_a_part_of_the_state_and_its_losses():
    net = networks.UNet(width=32, multipliers=(1,), blocks=1, attention=())
    x = jax.random.normal(key(), (8, 8, 8, 1))
    loss = jd.denoising(net.apply, PROCESS, jd.epsilon())
    losses, sizes, data = [], [], shard_batch({"x": x}, data_mesh())
    for mesh in (data_mesh(), data_mesh(fsdp=8)):
        step = make_train_step(loss, optimizer(), ema_decay=0.9, mesh=mesh)
        params = net.init(key(), x[:1], jnp.zeros(1))
        state = init_state(params, optimizer(), key(), mesh=mesh)
        before = jax.tree.map(lambda leaf: leaf.sharding, state)
        losses.append([])
        for _ in range(3):
            old = state
            state, metrics = step(state, data)
            losses[-1].append(float(metrics["loss"]))
            assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old.params))
        assert jax.tree.map(lambda leaf: leaf.sharding, state) == before
        sizes.append(bytes_of_a_device(state))
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
    assert sizes[1] < sizes[0] / 6
    # Each part of the parameters is sent once, and activations stay where they are.
    program = jax.jit(step).lower(state, data).compile().as_text()
    parts = [leaf for leaf in jax.tree.leaves(state.params) if not leaf.is_fully_replicated]
    assert len(re.findall(r" all-gather\(", program)) == len(parts) > 10
    assert not re.search(r"all-to-all|collective-permute", program)


def write_outcome(folder, index):
    assert from_first({"index": index, "x": [0.1, float("inf")]}) == {
        "index": 0,
        "x": [0.1, float("inf")],
    }
    np.savez(folder / f"{index}.npz", **outcome(jax.devices()))


if __name__ == "__main__":
    _, work, number, port, folder = sys.argv
    start_distributed(f"localhost:{port}", 2, int(number), heartbeat_timeout_seconds=20)
    {"outcome": write_outcome}[work](Path(folder), int(number))
