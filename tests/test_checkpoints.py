"""Checkpoints against damage, other models, other devices and other places."""

import errno
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from runs import Data, abstract, assert_same_bits, denoising_loss, largest_file, network_params

from jaxdiff import checkpoints as checkpoints_module
from jaxdiff.checkpoints import (
    CheckpointError,
    CheckpointMismatch,
    Checkpoints,
    _checksum,
    restore_config,
    restore_ema,
)
from jaxdiff.parallel import data_mesh, replicate
from jaxdiff.training import init_state, make_train_step

# orbax leaves the coroutines of a failed read to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def saved_run(folder, params=None, **options):
    """States of steps 1 and 2, saved; large enough to fill a file of their own."""
    optimizer = optax.adam(1e-2)
    train_step = make_train_step(denoising_loss, optimizer, ema_decay=0.9)
    state = init_state(params or network_params(1024), optimizer, jax.random.key(0))
    states = []
    with Checkpoints(folder, **options) as checkpoints:
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


def test_a_key_that_lost_its_type_is_damaged(tmp_path):
    """Without this file orbax finds two plain numbers of the same bits."""
    first, _ = saved_run(tmp_path)
    (tmp_path / "2" / "train" / "array_metadatas" / "process_0").unlink()
    lost = pytest.warns(RuntimeWarning, match="checksum mismatch in train/key")
    with Checkpoints(tmp_path) as checkpoints, lost:
        restored = checkpoints.restore_latest(abstract(first))
    assert_same_bits(restored, first)
    assert restored.key.dtype == first.key.dtype


def test_a_flipped_byte_is_caught_by_nothing_but_the_checksum(tmp_path):
    saved_run(tmp_path)
    flip_byte(largest_file(tmp_path / "2" / "ema"))
    shapes = jax.eval_shape(lambda: network_params(1024))
    with pytest.warns(RuntimeWarning, match=r"checksum mismatch in ema/[vw]"):
        restore_ema(tmp_path, shapes)


@pytest.mark.devices(8)
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


def other_models():
    """What is asked of a checkpoint of `saved_run`, and what is said."""
    adam, key = optax.adam(1e-2), jax.random.key(0)
    params = network_params(1024)
    v = "the checkpoint has float32 (1024, 4), the model wants "
    return {
        "shape": (
            init_state(network_params(8), adam, key),
            f"params/v: {v}float32 (8, 4); "
            "params/w: the checkpoint has float32 (4, 1024), the model wants float32 (4, 8); "
            f"ema/v: {v}float32 (8, 4); and 5 more",
        ),
        "dtype": (
            init_state(params | {"v": params["v"].astype(jnp.bfloat16)}, adam, key),
            f"params/v: {v}bfloat16 (1024, 4); ema/v: {v}bfloat16 (1024, 4); ",
        ),
        "missing": (
            init_state(params | {"u": jnp.ones(3)}, adam, key),
            "params/u: the checkpoint has no such leaf, the model wants float32 (3,); ",
        ),
        "left over": (
            init_state({"w": params["w"]}, adam, key),
            f"params/v: {v}none; ema/v: {v}none; opt/0/mu/v: {v}none; and 1 more",
        ),
        "optimizer": (
            init_state(params, optax.sgd(1e-2), key),
            "opt/0/count: the checkpoint has int32 (), the model wants none; ",
        ),
        "key": (
            init_state(params, adam, jax.random.PRNGKey(0)),
            "train/key: the checkpoint has key<fry> (), the model wants uint32 (2,)",
        ),
    }


@pytest.mark.parametrize("name", other_models())
def test_another_model_is_a_mistake_and_no_damage(tmp_path, name):
    """Its leaves are named; no older checkpoint is tried, none is moved."""
    saved_run(tmp_path)
    other, said = other_models()[name]
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(CheckpointMismatch) as refused:
            checkpoints.restore_latest(abstract(other))
        assert checkpoints.latest_step() == 2
    assert f"{tmp_path / '2'} is of another model: {said}" in str(refused.value)
    assert not list(tmp_path.glob("damaged*"))
    if name in ("shape", "dtype", "missing", "left over"):
        with pytest.raises(CheckpointMismatch, match="2 is of another model: ema/"):
            restore_ema(tmp_path, abstract(other.params))


def test_another_number_of_examples_is_refused(tmp_path):
    first, second = saved_run(tmp_path, num_examples=100)
    said = "2 is of a run with 100 training examples, and the data set now has 99"
    with Checkpoints(tmp_path, num_examples=99) as checkpoints:
        with pytest.raises(CheckpointMismatch, match=said):
            checkpoints.restore_latest(abstract(first))
        assert checkpoints.latest_step() == 2
    for same in (100, None):  # data without end have no number
        with Checkpoints(tmp_path, num_examples=same) as checkpoints:
            assert_same_bits(checkpoints.restore_latest(abstract(first)), second)


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


# Storage that does not answer


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def failing(monkeypatch, error, times):
    """The next reads of an item fail; the number of reads."""
    read, reads = checkpoints_module._read, []

    def flaky(path, target):
        reads.append(path)
        if len(reads) <= times:
            raise error
        return read(path, target)

    monkeypatch.setattr(checkpoints_module, "_read", flaky)
    monkeypatch.setattr(checkpoints_module, "_PAUSES", (0.0, 0.0))
    return reads


def wrapped(error):
    """As orbax hands on what reading an array raises."""
    whole = Exception("Encountered error while reading array index")
    whole.__cause__ = error
    return whole


OUT_OF_REACH = [
    TimeoutError(errno.ETIMEDOUT, "Connection timed out"),
    PermissionError(errno.EACCES, "Permission denied"),
    OSError(errno.EIO, "Input/output error"),
    wrapped(ValueError("DEADLINE_EXCEEDED: Error reading")),
    wrapped(ValueError("UNKNOWN: Failed to open: [os_error_code='5']")),
    jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 4096 bytes."),
    MemoryError(),
]


@pytest.mark.parametrize("error", OUT_OF_REACH, ids=repr)
def test_what_cannot_be_reached_is_tried_again_and_is_no_damage(tmp_path, monkeypatch, error):
    first, second = saved_run(tmp_path)
    before = names(tmp_path)
    failing(monkeypatch, error, times=2)
    with Checkpoints(tmp_path) as checkpoints:
        assert_same_bits(checkpoints.restore_latest(abstract(first)), second)
        reads = failing(monkeypatch, error, times=3)
        with pytest.raises(CheckpointError, match=r"checkpoint 2 in .* cannot be reached"):
            checkpoints.restore_latest(abstract(first))
        assert len(reads) == 3
        assert checkpoints.latest_step() == 2
    assert names(tmp_path) == before
    failing(monkeypatch, error, times=3)
    with pytest.raises(CheckpointError, match=r"checkpoint 2 in .* cannot be reached"):
        restore_ema(tmp_path, abstract(first.params))


def test_a_file_that_the_system_cannot_open_is_no_damage(tmp_path, monkeypatch):
    """A link to itself: the storage's own error, through all that lies between."""
    first, _ = saved_run(tmp_path)
    path = largest_file(tmp_path / "2" / "params")
    path.unlink()
    path.symlink_to(path)
    monkeypatch.setattr(checkpoints_module, "_PAUSES", ())
    unknown = pytest.raises(CheckpointError, match=r"2 in .* reached: UNKNOWN: Error reading")
    with Checkpoints(tmp_path) as checkpoints, unknown:
        checkpoints.restore_latest(abstract(first))
    assert not list(tmp_path.glob("damaged*"))


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(errno.ENOENT, "No such file"),
        KeyError("params"),
        wrapped(ValueError("DATA_LOSS: Error reading")),
        wrapped(ValueError("OUT_OF_RANGE: Requested byte range")),
    ],
    ids=repr,
)
def test_what_is_missing_or_makes_no_sense_is_damage_at_once(tmp_path, monkeypatch, error):
    first, _ = saved_run(tmp_path)
    reads = failing(monkeypatch, error, times=1)
    damaged = pytest.warns(RuntimeWarning, match=r"checkpoint 2 .* is damaged")
    with Checkpoints(tmp_path) as checkpoints, damaged:
        assert_same_bits(checkpoints.restore_latest(abstract(first)), first)
    assert [path.parent.name for path in reads[:2]] == ["2", "1"]


# The best


def steps_in(folder):
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit())


def numbered(step):
    """A state that tells its step."""
    return init_state({"w": jnp.full(3, float(step))}, optax.sgd(0.1), jax.random.key(0))


def ema_of(folder, checkpoint):
    shapes = jax.eval_shape(lambda: {"w": jnp.zeros(3)})
    return int(restore_ema(folder, shapes, checkpoint=checkpoint)["w"][0])


@pytest.fixture
def judged(tmp_path):
    """Steps 1 to 6 with the newest two and the best of their metrics kept, over a restart."""
    metrics = {1: 5.0, 2: 1.0, 3: 4.0, 5: math.nan, 6: 2.0}  # of 4 there is none
    for steps in ((1, 2, 3), (4, 5, 6)):
        with Checkpoints(tmp_path, keep=2) as checkpoints:
            for step in steps:
                checkpoints.save(step, numbered(step))
                if step in metrics:
                    checkpoints.record_metric(step, metrics[step])
                checkpoints.record_metric(step + 1, -1.0)  # which is not saved
    return tmp_path


def test_the_best_is_kept_beside_the_newest(judged):
    assert steps_in(judged) == [2, 5, 6]
    assert [ema_of(judged, which) for which in ("last", "best", 2, 5)] == [6, 2, 2, 5]
    for absent in (3, 7, "worst"):
        said = rf"checkpoint must be 'last', 'best' or one of \[6, 5, 2\], got {absent!r}"
        with pytest.raises(ValueError, match=said):
            ema_of(judged, absent)


def test_the_newest_of_equals_is_the_best(tmp_path):
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        for step in (1, 2, 3, 4):
            checkpoints.save(step, numbered(step))
            checkpoints.record_metric(step, min(step, 2) * -1.0)
    assert steps_in(tmp_path) == [3, 4]
    assert ema_of(tmp_path, "best") == 4


def test_the_next_best_takes_the_place_of_a_damaged_one(judged):
    truncate(largest_file(judged / "2" / "ema"))
    with pytest.warns(RuntimeWarning, match="checkpoint 2 .* is damaged .*going back to 6"):
        assert ema_of(judged, "best") == 6
    truncate(largest_file(judged / "5" / "ema"))
    with pytest.raises(CheckpointError, match="restored: 5 damaged"):  # no other was asked for
        ema_of(judged, 5)


def test_damaged_metrics_are_none(judged):
    truncate(judged / "metrics.json")
    none = pytest.raises(ValueError, match=r"none in .* has a validation metric")
    with pytest.warns(RuntimeWarning, match="metrics.json is damaged"), none:
        ema_of(judged, "best")
    with pytest.warns(RuntimeWarning, match="metrics.json is damaged"):
        checkpoints = Checkpoints(judged, keep=2)
    with checkpoints:
        checkpoints.save(7, numbered(7))
        checkpoints.record_metric(7, 0.5)
    assert ema_of(judged, "best") == 7


def test_a_flipped_digit_chooses_no_other_best(judged):
    path = judged / "metrics.json"
    path.write_text(path.read_text().replace("2.0", "0.0"))
    none = pytest.raises(ValueError, match=r"none in .* has a validation metric")
    with pytest.warns(RuntimeWarning, match="checksum mismatch"), none:
        ema_of(judged, "best")


# Checksums


def numpy_checksum(words):
    """The same in 64 bits, index by index."""

    def mix(word):
        word ^= word >> 16
        word = word * 0x85EBCA6B % 2**32
        word ^= word >> 13
        word = word * 0xC2B2AE35 % 2**32
        return word ^ (word >> 16)

    return sum(mix(int(word) ^ mix(i)) for i, word in enumerate(words)) % 2**32


DTYPES = {
    **dict.fromkeys(("uint8", "int8", "float8_e4m3fn"), np.uint8),
    **dict.fromkeys(("int16", "float16", "bfloat16"), np.uint16),
    **dict.fromkeys(("uint32", "int32", "float32", "float64", "int64", "complex64"), np.uint32),
}


@pytest.mark.parametrize("name", DTYPES)
def test_every_bit_of_every_dtype_counts(name):
    with jax.enable_x64(True):
        dtype = jnp.dtype(name)
        size = 6 * dtype.itemsize
        whole = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)

        def checksum(content):
            return int(_checksum(jnp.asarray(content.view(dtype).reshape(2, 3))))

        sums = [checksum(whole)]
        assert sums[0] == numpy_checksum(whole.view(DTYPES[name]))
        for bit in range(8 * size):
            flipped = whole.copy()
            flipped[bit // 8] ^= 1 << bit % 8
            sums.append(checksum(flipped))
        assert len(set(sums)) == len(sums)


def test_what_a_plain_sum_would_miss_is_found():
    x = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)
    swapped, moved = x.copy(), x.copy()
    swapped[[0, 1], 0] = swapped[[1, 0], 0]
    moved[0, 0], moved[1, 0] = x[0, 0] + 1, x[1, 0] - 1
    signs = x.copy()
    signs[:2] *= -1  # highest bits: each even multiple of 2³¹ is 0
    sums = [int(_checksum(jnp.asarray(a))) for a in (x, swapped, moved, -x, signs, x.T)]
    assert len(set(sums)) == len(sums)


def test_leaves_of_every_kind_have_a_checksum():
    keys = [jax.random.key(1), jax.random.key(2), jax.random.split(jax.random.key(1), 2)]
    leaves = [*keys, jnp.float32(0), jnp.float32(1), jnp.array([True, False]), jnp.ones(2, bool)]
    sums = [int(_checksum(leaf)) for leaf in leaves]
    assert len(set(sums)) == len(sums)
    assert int(_checksum(jnp.zeros((0, 3)))) == 0


@pytest.mark.devices(8)
def test_a_checksum_knows_no_sharding():
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    x = np.random.default_rng(0).normal(size=(16, 8, 3)).astype(np.float32)
    expected = numpy_checksum(x.view(np.uint32).ravel())
    for spec in (P(), P("data"), P(None, "model"), P("model", "data"), P(("data", "model"))):
        assert int(_checksum(jax.device_put(x, NamedSharding(mesh, spec)))) == expected
    compiled = _checksum.lower(jax.device_put(x, NamedSharding(mesh, P("data")))).compile()
    assert "all-gather" not in compiled.as_text()


# Other devices


@pytest.mark.devices(8)
def test_a_state_is_restored_into_any_sharding(tmp_path):
    """One device, replicated, split, split another way: each into each of the others."""
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    state = init_state(network_params(), optax.adam(1e-2), jax.random.key(0))
    state = state._replace(params=jax.tree.map(lambda x: x + 1, state.params))

    def split(*axes):
        def sharding(leaf):
            whole = leaf.ndim < 2
            return NamedSharding(mesh, P() if whole else P(*axes))

        return jax.tree.map(sharding, state)

    layouts = {
        "one": jax.tree.map(lambda _: jax.sharding.SingleDeviceSharding(jax.devices()[3]), state),
        "replicated": split(),
        "by rows": split("model"),
        "by both": split("data", "model"),
        "by columns": split(None, "data"),
    }
    for name, layout in layouts.items():
        with Checkpoints(tmp_path / name) as checkpoints:
            checkpoints.save(1, jax.device_put(state, layout))
            checkpoints.wait()
            for other in layouts.values():
                target = jax.tree.map(
                    lambda leaf, place: jax.ShapeDtypeStruct(
                        leaf.shape, leaf.dtype, sharding=place
                    ),
                    state,
                    other,
                )
                restored = checkpoints.restore_latest(target)
                assert_same_bits(restored, state)
                pairs = zip(jax.tree.leaves(restored), jax.tree.leaves(other), strict=True)
                assert all(leaf.sharding.is_equivalent_to(p, leaf.ndim) for leaf, p in pairs)


# Other places


@pytest.mark.parametrize("folder", ["gs://bucket/run", "s3://bucket/run"])
def test_remote_paths_are_left_to_orbax(folder, monkeypatch):
    import orbax.checkpoint as ocp

    asked = []

    def manager(directory, options):
        asked.append(directory)
        raise ImportError("Please install gcsfs")

    monkeypatch.setattr(ocp, "CheckpointManager", manager)
    for call in (Checkpoints, restore_config):
        with pytest.raises(CheckpointError, match=f"{folder} cannot be reached: Please install"):
            call(folder)
    assert asked == [folder] * 2


def test_a_value_of_the_config_that_changed_is_damage(tmp_path):
    state = init_state(network_params(), optax.sgd(0.1), jax.random.key(0))
    with Checkpoints(tmp_path) as checkpoints:
        for step, rate in ((1, 0.25), (2, 0.5)):
            checkpoints.save(step, state, {"rate": rate})
    path = tmp_path / "2" / "config" / "metadata"
    path.write_text(path.read_text().replace("0.5", "0.7"))
    with pytest.warns(RuntimeWarning, match="checkpoint 2 .* is damaged .*config"):
        assert restore_config(tmp_path) == {"rate": 0.25}
