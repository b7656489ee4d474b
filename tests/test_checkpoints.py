"""Checkpoints against damage, other models, other devices and other places."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from runs import Data, abstract, assert_same_bits, denoising_loss, largest_file, network_params

from jaxdiff.checkpoints import CheckpointError, Checkpoints, restore_config, restore_ema
from jaxdiff.parallel import data_mesh, replicate
from jaxdiff.training import init_state, make_train_step

# orbax leaves the coroutines of a failed read to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


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
