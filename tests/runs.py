"""A small run, for the tests of training, of checkpoints and of faults."""

import json
import socket
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxdiff.processes.base import example_indices
from jaxdiff.training import fit, init_state, make_train_step

STEPS, SAVE_EVERY = 12, 3


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


def run(workdir, data, steps=STEPS, objective=denoising_loss, params=None, train=None, **options):
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2))
    mesh = options.get("mesh")
    train_step = make_train_step(objective, optimizer, ema_decay=0.999, mesh=mesh, **(train or {}))
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


def free_port():
    """Of this machine, for processes to meet at."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return str(free.getsockname()[1])
