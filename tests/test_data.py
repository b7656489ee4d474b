"""Images from every kind of source, their place in model space, and the order of batches."""

import os
import pickle
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from jaxdiff.data.batches import Batches, FreshBatches
from jaxdiff.data.images import SPLITS, dequantize, from_model, load_images, to_model
from jaxdiff.data.toys import moons

KEY = jax.random.key(5)


@pytest.fixture(scope="module")
def digits_dir(tmp_path_factory):
    """A data_dir in which the digits lie prepared."""
    data_dir = tmp_path_factory.mktemp("tfds")
    load_images("digits", "train", data_dir=data_dir)
    return data_dir


# The digits


@pytest.mark.parametrize(
    ("split", "start", "stop"),
    [("train", 0, 1000), ("validation", 1000, 1350), ("test", 1350, 1797)],
)
def test_digits_are_scikit_learns_in_file_order(digits_dir, split, start, stop):
    images = load_images("digits", split, data_dir=digits_dir)
    x, label = load_digits(return_X_y=True)
    np.testing.assert_array_equal(images.x, x[start:stop].reshape(-1, 8, 8, 1))
    np.testing.assert_array_equal(images.label, label[start:stop])
    assert (images.x.dtype, images.label.dtype) == (np.uint8, np.int32)
    assert (images.levels, images.num_classes) == (17, 10)


def test_digits_are_built_quietly_by_several_processes_at_once(tmp_path):
    """No TensorFlow, nothing printed, the same data in each, and nothing half-written left."""
    code = (
        "import sys\n"
        "from jaxdiff.data.images import load_images\n"
        f"x = load_images('digits', 'test', data_dir={str(tmp_path)!r}).x\n"
        "assert 'tensorflow' not in sys.modules and 'grain' not in sys.modules\n"
        "print(int(x.sum()))"
    )
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code], stdout=-1, stderr=-1, text=True, env=environment
        )
        for _ in range(2)
    ]
    outputs = [process.communicate() for process in processes]
    expected = int(load_digits().data[1350:].sum())
    assert outputs == [(f"{expected}\n", "")] * 2
    assert os.listdir(tmp_path / "digits") == ["1.0.0"]


def test_the_environment_names_the_data_dir(digits_dir, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(digits_dir))
    monkeypatch.setenv("HOME", "/nonexistent")
    assert len(load_images("digits", "validation").x) == 350


def test_importing_the_package_loads_no_data_library():
    code = (
        "import sys, jaxdiff.data.images, jaxdiff.data.batches, jaxdiff.data.toys\n"
        "heavy = ['tensorflow', 'tensorflow_datasets', 'grain', 'matplotlib', 'torch', 'sklearn',"
        " 'tqdm', 'PIL']\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


# Other TFDS sets


def mocked_splits(tmp_path, name, splits):
    """Write a TFDS set's metadata as if it had been prepared with the given splits."""
    import tensorflow_datasets as tfds

    builder = tfds.builder(name, data_dir=tmp_path, file_format="array_record")
    template = tfds.core.ShardedFileTemplate(
        data_dir=builder.data_dir, dataset_name=name, filetype_suffix="array_record"
    )
    infos = [
        tfds.core.SplitInfo(name=split, shard_lengths=[n], num_bytes=1, filename_template=template)
        for split, n in splits.items()
    ]
    builder.info.set_splits(tfds.core.SplitDict(infos))
    os.makedirs(builder.data_dir, exist_ok=True)
    builder.info.write_to_directory(builder.data_dir)
    return tmp_path


@pytest.mark.parametrize(("name", "shape"), [("mnist", (28, 28, 1)), ("cifar10", (32, 32, 3))])
def test_tfds_sets_go_the_same_way(tmp_path, name, shape):
    import tensorflow_datasets as tfds

    data_dir = mocked_splits(tmp_path, name, {"train": 50, "test": 50})
    with tfds.testing.mock_data(num_examples=50, data_dir=str(data_dir)):
        whole = load_images(name, "test")
        train = load_images(name, "train")
        validation = load_images(name, "validation")
    assert whole.x.shape == (50, *shape)
    assert whole.x.dtype == np.uint8
    assert (whole.levels, whole.num_classes) == (256, 10)
    assert whole.label is not None
    assert whole.label.shape == (50,)
    # The mock gives every split the same images: the validation is the last tenth of train.
    np.testing.assert_array_equal(train.x, whole.x[:45])
    np.testing.assert_array_equal(validation.x, whole.x[45:])
    assert "tensorflow" not in sys.modules


def test_tfds_mock_without_metadata():
    import tensorflow_datasets as tfds

    with tfds.testing.mock_data(num_examples=3):
        assert load_images("mnist", "train").x.shape == (3, 28, 28, 1)


def test_an_unprepared_set_says_how_to_prepare_it(tmp_path, monkeypatch):
    """With no network, after one attempt, and with TFDS's own setting put back."""
    import requests
    from tensorflow_datasets.core.download import downloader

    attempts = []

    def refuse(*args, **kwargs):
        attempts.append(downloader.MAX_RETRIES)
        raise requests.exceptions.ConnectionError("Max retries exceeded")

    monkeypatch.setattr(requests.Session, "get", refuse)
    before = downloader.MAX_RETRIES
    with pytest.raises(ValueError, match=r"not prepared in .*mnist") as caught:
        load_images("mnist", "train", data_dir=tmp_path)
    message = str(caught.value)
    assert str(tmp_path) in message
    assert "tensorflow-cpu" in message
    assert "TFDS_DATA_DIR" in message
    assert "`digits` needs no network" in message
    assert "\n" not in message
    assert attempts
    assert set(attempts) == {1}
    assert before == downloader.MAX_RETRIES


@pytest.mark.parametrize(
    ("dataset", "complaint"),
    [
        ("nosuchset", "nosuchset"),
        ("", "need the name"),
        ("mnist:9.9.9", "9.9.9"),
        ("no such name", "no such name"),
        ("imagenet2012", "fixed size"),
        ("lm1b", "fixed size"),
        ("./missing", "neither a folder"),
        ("/nonexistent/images", "neither a folder"),
        ("missing.npz", "no such file"),
    ],
)
def test_unknown_sets_are_refused_in_one_line(tmp_path, dataset, complaint):
    with pytest.raises(ValueError, match=complaint) as caught:
        load_images(dataset, "train", data_dir=tmp_path)
    assert "\n" not in str(caught.value)


def test_unknown_splits_are_refused():
    with pytest.raises(ValueError, match="split = 'dev'"):
        load_images("digits", "dev")


# Folders


def write(path, pixels, mode=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels, np.uint8), mode).save(path)


def grey(value, size=(4, 6)):
    return np.full(size, value, np.uint8)


def test_folder_with_classes_is_cut_in_three_disjoint_parts(tmp_path):
    for i in range(40):
        write(tmp_path / ("b" if i % 2 else "a") / f"{i:02}.png", grey(i))
    parts = {split: load_images(str(tmp_path), split) for split in SPLITS}
    assert [len(parts[split].x) for split in SPLITS] == [32, 4, 4]
    values = np.concatenate([parts[split].x[:, 0, 0, 0] for split in SPLITS])
    assert sorted(values) == list(range(40))
    for part in parts.values():
        assert part.x.shape[1:] == (4, 6, 1)
        assert (part.levels, part.num_classes) == (256, 2)
        np.testing.assert_array_equal(part.label, part.x[:, 0, 0, 0] % 2)
        assert set(part.label) == {0, 1}  # shuffled, though the files are sorted by class
    np.testing.assert_array_equal(load_images(str(tmp_path), "train").x, parts["train"].x)


def test_folder_with_split_folders_keeps_them(tmp_path):
    for i in range(10):
        write(tmp_path / "train" / "ab"[i % 2] / f"{i}.png", grey(i))
    write(tmp_path / "test" / "b" / "x.png", grey(77))
    test = load_images(str(tmp_path), "test")
    assert test.x[:, 0, 0, 0].tolist() == [77]
    assert test.label.tolist() == [1]  # `b` is class 1 although this split has no `a`
    assert test.num_classes == 2
    assert len(load_images(str(tmp_path), "train").x) == 9
    assert len(load_images(str(tmp_path), "validation").x) == 1


def test_one_colour_image_makes_a_folder_rgb(tmp_path):
    for i in range(9):
        write(tmp_path / f"{i}.png", grey(i))
    write(tmp_path / "9.png", np.full((4, 6, 3), (9, 8, 7)))
    x = np.concatenate([load_images(str(tmp_path), split).x for split in SPLITS])
    assert x.shape == (10, 4, 6, 3)
    assert {tuple(pixel) for pixel in x[:, 0, 0]} == {(i, i, i) for i in range(9)} | {(9, 8, 7)}
    assert load_images(str(tmp_path), "train").label is None


def test_jpeg_folders(tmp_path):
    for i in range(10):
        write(tmp_path / f"{i}.JPEG", grey(20 * i, (8, 8)))
    assert load_images(str(tmp_path), "train").x.shape == (8, 8, 8, 1)


def spoil_nothing(root):
    for path in root.glob("*.png"):
        path.unlink()


def spoil_size(root):
    write(root / "large.png", grey(1, (9, 9)))


def spoil_bytes(root):
    (root / "broken.png").write_bytes(b"no image")


def spoil_end(root):
    path = root / "3.png"
    path.write_bytes(path.read_bytes()[:-30])
    for i in range(10):
        if i != 3:  # so that the damaged one is in every split
            (root / f"{i}.png").write_bytes(path.read_bytes())


def spoil_layout(root):
    write(root / "class" / "1.png", grey(1))


def spoil_depth(root):
    Image.fromarray(np.zeros((4, 6), np.uint16)).save(root / "deep.png")


def spoil_count(root):
    for i in range(5):
        (root / f"{i}.png").unlink()


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (spoil_nothing, "no PNG or JPEG"),
        (spoil_size, "one size.*large.png"),
        (spoil_bytes, "cannot read.*broken.png"),
        (spoil_end, "cannot read.*png"),
        (spoil_layout, "beside and in"),
        (spoil_depth, "8-bit"),
        (spoil_count, "too few"),
    ],
)
def test_bad_folders_are_refused(tmp_path, spoil, complaint):
    rng = np.random.default_rng(0)
    for i in range(10):
        write(tmp_path / f"{i}.png", rng.integers(0, 256, (4, 6)))
    spoil(tmp_path)
    with pytest.raises(ValueError, match=complaint):
        load_images(str(tmp_path), "validation")


# .npz files


def test_npz_pool_is_cut_like_a_folder(tmp_path):
    x = np.arange(50, dtype=np.uint8)[:, None, None] * np.ones((1, 5, 5), np.uint8)
    np.savez(tmp_path / "a.npz", x=x, y=np.arange(50) % 3)
    parts = [load_images(str(tmp_path / "a.npz"), split) for split in SPLITS]
    assert [part.x.shape for part in parts] == [(40, 5, 5, 1), (5, 5, 5, 1), (5, 5, 5, 1)]
    values = np.concatenate([part.x[:, 0, 0, 0] for part in parts])
    assert sorted(values) == list(range(50))
    np.testing.assert_array_equal(np.concatenate([part.label for part in parts]), values % 3)
    assert parts[1].num_classes == 3


def test_npz_with_splits(tmp_path):
    x = np.zeros((20, 4, 4, 3), np.uint8)
    x[:, 0, 0, 0] = range(20)
    np.savez(tmp_path / "a.npz", x_train=x, x_validation=x[:3], x_test=x[5:9])
    train, validation, test = (load_images(str(tmp_path / "a.npz"), split) for split in SPLITS)
    np.testing.assert_array_equal(train.x, x)
    np.testing.assert_array_equal(validation.x, x[:3])
    np.testing.assert_array_equal(test.x, x[5:9])
    assert train.label is None


@pytest.mark.parametrize(
    ("arrays", "complaint"),
    [
        ({"z": np.zeros(3)}, "need arrays x"),
        ({"x": np.zeros((9, 4, 4))}, "float64"),
        ({"x": np.full((9, 4, 4), 256)}, "0 … 255"),
        ({"x": np.zeros((9, 4), np.uint8)}, r"\(9, 4\)"),
        ({"x": np.zeros((9, 4, 4), np.uint8), "y": np.zeros(8, int)}, "9 whole numbers"),
        ({"x": np.zeros((9, 4, 4), np.uint8), "y": np.zeros(9)}, "9 whole numbers"),
        ({"x_test": np.zeros((9, 4, 4), np.uint8)}, "no train split"),
        (
            {"x_train": np.zeros((9, 4, 4), np.uint8), "x_test": np.zeros((9, 5, 4), np.uint8)},
            "differ in size",
        ),
        ({"x": np.array([None])}, "not a readable"),
    ],
)
def test_bad_npz_files_are_refused(tmp_path, arrays, complaint):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match=complaint):
        load_images(str(tmp_path / "a.npz"), "train")


# Model space


@pytest.mark.parametrize("levels", [2, 17, 256])
def test_levels_are_laid_out_at_equal_cells_and_come_back(levels):
    k = np.arange(levels, dtype=np.uint8)
    x = to_model(k, levels)
    np.testing.assert_allclose(np.diff(x), 2 / levels, rtol=1e-4)
    assert float(x[0] + x[-1]) == pytest.approx(0, abs=1e-6)
    assert float(x[-1]) == pytest.approx(1 - 1 / levels)
    np.testing.assert_array_equal(from_model(x, levels), k)
    for nudge in (-0.98, 0.98):
        np.testing.assert_array_equal(from_model(x + nudge / levels, levels), k)
    np.testing.assert_array_equal(from_model(jnp.array([-3.0, 3.0]), levels), [0, levels - 1])


def test_dequantized_levels_fill_their_cells_uniformly():
    k = np.repeat(np.arange(17, dtype=np.uint8), 2000).reshape(-1, 20)
    x = np.asarray(dequantize(KEY, k, 17))
    np.testing.assert_array_equal(from_model(x, 17), k)
    u = (x - np.asarray(to_model(k, 17))) * 17
    assert abs(u).max() <= 1 + 1e-5
    assert abs(u.mean()) < 4 * (1 / 3 / u.size) ** 0.5
    assert u.var() == pytest.approx(1 / 3, rel=0.02)
    assert x.min() >= -1
    assert x.max() <= 1


def test_dequantization_follows_the_image_and_not_the_chunk():
    from jaxdiff.processes.base import example_keys

    k = np.zeros((6, 2, 2, 1), np.uint8)
    whole = dequantize(KEY, k, 17)
    np.testing.assert_array_equal(dequantize(KEY, k[:2], 17), whole[:2])
    np.testing.assert_array_equal(dequantize(example_keys(KEY, 6)[4:], k[4:], 17), whole[4:])
    assert len(np.unique(whole)) == whole.size


# Batches


def source(n=23, **options):
    x = np.arange(n)
    return Batches({"x": x[:, None], "label": x % 3}, 6, **{"seed": 4} | options)


def test_batches_are_a_pure_function_of_seed_and_step():
    forward, backward = source(), source()
    steps = list(range(12))
    batches = {step: backward[step] for step in reversed(steps)}
    for step in steps:
        np.testing.assert_array_equal(forward[step]["x"], batches[step]["x"])
        np.testing.assert_array_equal(forward[step]["label"], forward[step]["x"][:, 0] % 3)
    assert any((source(seed=5)[s]["x"] != forward[s]["x"]).any() for s in steps)


def test_an_epoch_visits_no_example_twice_and_the_next_has_another_order():
    batches = source()
    assert batches.steps_per_epoch == 3
    epochs = [np.concatenate([batches[3 * e + k]["x"] for k in range(3)])[:, 0] for e in range(20)]
    for epoch in epochs:
        assert len(set(epoch)) == 18
    assert (epochs[0] != epochs[1]).any()
    assert set(np.concatenate(epochs)) == set(range(23))  # nobody is left out for ever
    expected = np.random.default_rng([4, 1]).permutation(23)[:18]
    np.testing.assert_array_equal(epochs[1], expected)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_shares_of_the_processes_make_up_the_global_batch(count):
    whole = source()
    shares = [source(process_index=i, process_count=count) for i in range(count)]
    for step in (0, 4, 1000):
        together = np.concatenate([share[step]["x"] for share in shares])
        np.testing.assert_array_equal(together, whole[step]["x"])
    fresh = FreshBatches(moons.sample, 6, seed=1)
    shares = [
        FreshBatches(moons.sample, 6, seed=1, process_index=i, process_count=count)
        for i in range(count)
    ]
    together = np.concatenate([share[3]["x"] for share in shares])
    np.testing.assert_allclose(together, fresh[3]["x"], atol=1e-6)


def test_fresh_batches_are_a_pure_function_of_seed_and_step():
    batches = FreshBatches(moons.sample, 8, seed=2)
    again = FreshBatches(moons.sample, 8, seed=2)
    assert again[7]["x"].shape == (8, 2)
    again[0]
    np.testing.assert_array_equal(batches[7]["x"], again[7]["x"])
    assert (batches[7]["x"] != batches[8]["x"]).all()
    assert (FreshBatches(moons.sample, 8, seed=3)[7]["x"] != batches[7]["x"]).all()


def test_fresh_data_share_no_key_with_the_training_of_the_same_seed():
    batches = FreshBatches(lambda key, n: jax.random.normal(key, (n,)), 8, seed=0)
    noise = jax.random.normal(jax.random.fold_in(jax.random.key(0), 5), (8,))
    assert (batches[5]["x"] != noise).all()


def test_batches_are_a_source_for_grain():
    import grain

    batches = source()
    dataset = grain.MapDataset.source(batches)[5:].map(lambda batch: batch["x"] + 1)
    iterator = iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=1)))
    for step in range(5, 9):
        np.testing.assert_array_equal(next(iterator), batches[step]["x"] + 1)
    copy = pickle.loads(pickle.dumps(batches))
    np.testing.assert_array_equal(copy[5]["x"], batches[5]["x"])


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"batch_size": 24}, "batch_size = 24"),
        ({"batch_size": 0}, "batch_size = 0"),
        ({"process_index": 0, "process_count": 4}, "multiple of 4"),
        ({"process_index": 2, "process_count": 2}, "process_index = 2"),
        ({"seed": -1}, "seed = -1"),
        ({"arrays": {"x": np.zeros(9), "y": np.zeros(8)}}, "one length"),
        ({"arrays": {}}, "one or more"),
    ],
)
def test_bad_batches_are_refused(options, complaint):
    arguments = {"arrays": {"x": np.zeros(23)}, "batch_size": 6} | options
    with pytest.raises(ValueError, match=complaint):
        Batches(**arguments)
