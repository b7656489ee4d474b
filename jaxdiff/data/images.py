"""Images from a TFDS set, a folder or an .npz file, and their place in model space.

An image with L grey levels k = 0 … L−1 is laid into [−1, 1] so that level k owns the cell
[2k/L − 1, 2(k+1)/L − 1]. A network is shown the centre of the cell (`to_model`); a likelihood is
taken at a uniform point of it (`dequantize`); a sample belongs to the level whose cell it lies in
(`from_model`). Training and likelihood thus share one space and no constant has to be remembered
but the width 2/L of a cell: for D pixels,

    bits/dim  =  nll [nats] / (D ln 2)  +  log₂ L  −  1,

an upper bound of the code length of the discrete image (Theis et al. 2016, arXiv 1511.01844).

A set is opened as an `ImageSource`, which decodes the images that are asked for. `load_images`
decodes a split once into memory, as uint8; one that does not fit there is trained on by
`jaxdiff.data.streams`. TensorFlow is never imported to read: only to prepare the TFDS sets that ask
for it.
"""

import contextlib
import functools
import io
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer, UInt8

from jaxdiff.processes.base import example_keys
from jaxdiff.typing import Key

__all__ = [
    "SPLITS",
    "DatasetError",
    "ImageSource",
    "Images",
    "dequantize",
    "from_model",
    "image_sources",
    "load_images",
    "to_model",
]

SPLITS = ("train", "validation", "test")
"""The splits that every data set has here."""

_SUFFIXES = (".png", ".jpg", ".jpeg")


class DatasetError(ValueError):
    """An example that can no longer be read, or is another."""


class Images(NamedTuple):
    """One split of a data set, in memory.

    Attributes:
        x: grey levels 0 … levels − 1, uint8 [n, h, w, c].
        label: classes 0 … num_classes − 1, int32 [n], or None if there are none.
        levels: number of grey levels L: 17 for `digits`, else 256.
        num_classes: number of classes, 0 without labels.
    """

    x: np.ndarray
    label: np.ndarray | None
    levels: int
    num_classes: int


@dataclass(frozen=True)
class ImageSource:
    """One split of a data set, decoded when it is asked for; worker processes may have a copy.

    `source[which]`, of indices [k] or a slice, is {"x": uint8 [k, h, w, c]} and, in a set with
    classes, "label": int32 [k].

    Attributes:
        read: places [k] in what is stored ↦ {"x": …, "label": …}.
        places: where the examples of this split are stored, int [n].
        shape: height, width and channels.
        levels: number of grey levels L: 17 for `digits`, else 256.
        num_classes: number of classes, 0 without labels.
    """

    read: Callable[[np.ndarray], dict[str, np.ndarray]]
    places: np.ndarray
    shape: tuple[int, int, int]
    levels: int
    num_classes: int

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, which: np.ndarray | slice) -> dict[str, np.ndarray]:
        found = self.read(self.places[which])
        return found if self.num_classes else {"x": found["x"]}

    def unlabelled(self) -> "ImageSource":
        """The same images without their labels."""
        return replace(self, num_classes=0)

    def load(self, most: int | None = None) -> Images:
        """Decode the split into memory.

        Args:
            most: only so many, the first ones; all if None.

        Raises:
            ValueError: names an image that cannot be read.
        """
        found = self[:most]
        return Images(found["x"], found.get("label"), self.levels, self.num_classes)


def load_images(
    dataset: str, split: str, *, data_dir: str | os.PathLike[str] | None = None
) -> Images:
    """Load one split of a data set into memory.

    Args:
        dataset: name or path, as for `image_sources`.
        split: `train`, `validation` or `test`.
        data_dir: where TFDS keeps prepared sets; by default the environment's `TFDS_DATA_DIR` or
            `~/tensorflow_datasets`.

    Raises:
        ValueError: if there is no such split or data set, if it cannot be read, or if it is not
            prepared and cannot be (without network, within seconds).
    """
    _check_split(split)
    return image_sources(dataset, data_dir=data_dir)(split).load()


def image_sources(
    dataset: str, *, data_dir: str | os.PathLike[str] | None = None
) -> Callable[[str], ImageSource]:
    """Open a data set, and look at its files' headers; no image is decoded.

    `dataset` is, in this order,

    - `digits`, scikit-learn's 8×8 digits: no network, no TensorFlow;
    - an `.npz` file with uint8 arrays `x` [n, h, w] or [n, h, w, c] and, if labelled, integers `y`
      [n]; or with `x_train`, `x_validation`, `x_test` and `y_train`, …; and `levels`, their number
      of grey levels, if it is not 256;
    - a folder of equally large 8-bit PNG or JPEG images, with the labels from the sorted names of
      its sub-folders, or of such folders named `train`, `validation`, `test`. All-grey sets keep
      one channel, others become RGB; transparency is dropped;
    - a TFDS image set (`mnist`, `cifar10`, `imagenet_resized/32x32`, …), read from `data_dir` where
      it was prepared as array_record, or else prepared there.

    A missing split is cut from the end of `train`: its last tenth serves as the validation or test
    that is missing; if both are, validation is its ninth tenth and test its last. A folder or file
    is shuffled by a fixed permutation before it is cut.

    Args:
        dataset: name or path, see above.
        data_dir: where TFDS keeps prepared sets; by default the environment's `TFDS_DATA_DIR` or
            `~/tensorflow_datasets`.

    Returns:
        A function: `train`, `validation` or `test` ↦ the split. It raises ValueError for another
        name, and if there are too few images.

    Raises:
        ValueError: if there is no such data set, if it cannot be read, or if it is not prepared and
            cannot be (without network, within seconds).
    """
    if not dataset:
        raise ValueError("dataset = '': need the name of a set, a folder or an .npz file")
    path = Path(dataset).expanduser()
    if dataset == "digits":
        return _tfds_sources(dataset, data_dir)
    if path.suffix == ".npz":
        return _npz_sources(path)
    if path.is_dir():
        return _folder_sources(path)
    if path.is_file() or path.is_absolute() or dataset.startswith((".", "~")):
        raise ValueError(f"dataset = {dataset!r}: neither a folder nor an .npz file")
    return _tfds_sources(dataset, data_dir)


def to_model(x: Integer[Array | np.ndarray, "*shape"], levels: int) -> Float[Array, "*shape"]:
    """Lay grey levels into model space, at the centres of their cells: (2k + 1)/L − 1.

    Args:
        x: levels k, 0 … levels − 1.
        levels: number of levels L.

    Returns:
        Points in [1/L − 1, 1 − 1/L].
    """
    return (2 * jnp.asarray(x, float) + 1) / levels - 1


def from_model(x: Float[Array | np.ndarray, "*shape"], levels: int) -> UInt8[Array, "*shape"]:
    """Give each point of model space the level whose cell it lies in; outside, the nearest.

    Args:
        x: points of model space.
        levels: number of levels L, at most 256.

    Returns:
        Levels ⌊L (x + 1)/2⌋, clipped to 0 … levels − 1.
    """
    cell = jnp.floor(levels / 2 * (jnp.asarray(x) + 1))
    return jnp.clip(cell, 0, levels - 1).astype(jnp.uint8)


def dequantize(
    key: Key, x: Integer[Array | np.ndarray, "n *shape"], levels: int
) -> Float[Array, "n *shape"]:
    """Draw a uniform point of each level's cell: (2k + 1 + u)/L − 1 with u ~ U(−1, 1).

    Args:
        key: one key, of which image i uses `fold_in(key, i)`, or one key an image, [n].
        x: levels k of n images, 0 … levels − 1.
        levels: number of levels L.

    Returns:
        Points of model space in [−1, 1].

    References:
        Theis et al. 2016, arXiv 1511.01844.
    """
    centres = to_model(x, levels)

    def draw(key: Key) -> Array:
        return jax.random.uniform(key, centres.shape[1:], minval=-1.0, maxval=1.0)

    return centres + jax.vmap(draw)(example_keys(key, len(x))) / levels


def _check_split(split: str) -> None:
    if split not in SPLITS:
        raise ValueError(f"split = {split!r}: need one of {', '.join(SPLITS)}")


def _stored_part(split: str, stored: Sequence[str], dataset: str) -> tuple[str, int, int]:
    """Which stored split, from which percent to which, serves as `split`."""
    _check_split(split)
    if "train" not in stored:
        raise ValueError(f"dataset = {dataset!r}: has no train split, only {sorted(stored)}")
    missing = [name for name in SPLITS if name not in stored]
    if split in missing:
        start = 100 - 10 * (len(missing) - missing.index(split))
        return "train", start, start + 10
    return split, 0, 100 - 10 * len(missing) if split == "train" else 100


def _cut(n: int, part: tuple[int, int], dataset: str, split: str) -> slice:
    """The examples of n that a part in percent holds."""
    start, stop = (n * percent // 100 for percent in part)
    if start == stop:
        raise ValueError(f"dataset = {dataset!r}: {n} images are too few to give a {split} split")
    return slice(start, stop)


def _cut_shuffled(n: int, part: tuple[int, int], dataset: str, split: str) -> np.ndarray:
    """As `_cut`, of a set that may be sorted by class: by a fixed permutation, unless whole."""
    cut = _cut(n, part, dataset, split)
    return np.arange(n) if part == (0, 100) else np.random.default_rng(0).permutation(n)[cut]


# TFDS


def _tfds_sources(
    name: str, data_dir: str | os.PathLike[str] | None
) -> Callable[[str], ImageSource]:
    builder = _prepared_builder(name, data_dir)
    features = dict(builder.info.features.items())
    classes = getattr(features.get("label"), "num_classes", None) or 0

    def source(split: str) -> ImageSource:
        # `tfds.testing.mock_data` knows no splits and answers to all.
        stored, *part = _stored_part(split, list(builder.info.splits) or SPLITS, name)
        try:
            records = builder.as_data_source(split=stored)
        except NotImplementedError as error:
            raise ValueError(
                f"dataset = {name!r}: the data in {builder.data_dir} are not stored as "
                "array_record; prepare them anew, or convert them with `tfds convert_format`"
            ) from error
        cut = _cut(len(records), (part[0], part[1]), name, split)
        return ImageSource(
            functools.partial(_read_records, records, str(builder.data_dir)),
            np.arange(cut.start, cut.stop),
            tuple(features["image"].shape),
            17 if name == "digits" else 256,
            classes,
        )

    return source


def _read_records(records: Any, folder: str, places: np.ndarray) -> dict[str, np.ndarray]:
    try:
        examples = [records[place] for place in places.tolist()]
    except Exception as error:  # whatever reading, parsing and decoding happen to meet
        raise DatasetError(f"dataset: cannot read the records in '{folder}'") from error
    found = {"x": np.stack([example["image"] for example in examples])}
    if "label" in examples[0]:
        found["label"] = np.array([example["label"] for example in examples], np.int32)
    return found


@contextlib.contextmanager
def _log_errors_only() -> Iterator[None]:
    """Hide the warnings of TFDS that a set still to be prepared is not there."""
    log = logging.getLogger("absl")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


@_log_errors_only()
def _prepared_builder(name: str, data_dir: str | os.PathLike[str] | None) -> Any:
    """Open a TFDS set, and prepare it if that was never done."""
    import tensorflow_datasets as tfds

    if name == "digits":
        from jaxdiff.data.digits import Digits as make
    else:
        make = functools.partial(tfds.builder, name)
    where = data_dir or os.environ.get("TFDS_DATA_DIR")
    make = functools.partial(make, data_dir=where, file_format="array_record")
    try:
        builder = make()
    except Exception as error:  # a name, version, configuration or stored format at odds with TFDS
        raise ValueError(
            f"dataset = {name!r}: no folder, no .npz file, and TFDS cannot open it "
            f"({_first_line(error)}); `digits` needs neither files nor network"
        ) from error
    _check_features(name, builder.info.features)
    if builder.is_prepared():
        return builder
    failure = None
    try:
        with _one_download_attempt(), _quiet() if name == "digits" else contextlib.nullcontext():
            builder.download_and_prepare()
    except Exception as error:  # network, disk, TensorFlow: whatever a set's own code may raise
        failure = error
    # Opened anew, for what is on disk now: another process may have been the first to finish.
    prepared = make()
    if failure and not prepared.is_prepared():
        raise ValueError(_how_to_prepare(name, builder.data_dir, failure)) from failure
    return prepared


def _check_features(name: str, features: Any) -> None:
    """Refuse, before any download, what is no set of equally large 8-bit images."""
    image = dict(features.items()).get("image") if hasattr(features, "items") else None
    shape = getattr(image, "shape", None) or ()
    if len(shape) != 3 or None in shape or getattr(image, "np_dtype", None) != np.uint8:
        raise ValueError(
            f"dataset = {name!r}: no set of uint8 images of one fixed size (its image: {image})"
        )


@contextlib.contextmanager
def _one_download_attempt() -> Iterator[None]:
    """Let TFDS fail at once without a network; its ten attempts take minutes."""
    from tensorflow_datasets.core.download import downloader

    attempts = getattr(downloader, "MAX_RETRIES", None)  # private: may go
    if attempts is None:
        yield
        return
    downloader.MAX_RETRIES = 1
    try:
        yield
    finally:
        downloader.MAX_RETRIES = attempts


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide the announcements and progress bars of a build that takes a second."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def _how_to_prepare(name: str, data_dir: Any, failure: Exception) -> str:
    reason = _first_line(failure)
    if name == "digits":
        return f"dataset = 'digits': cannot be written to {data_dir} ({reason})"
    return (
        f"dataset = {name!r}: not prepared in {data_dir}, and preparing it failed ({reason}). "
        "On a machine with network access, where jaxdiff and tensorflow-cpu are installed: "
        'python -c "'
        f"from jaxdiff.data.images import load_images; load_images('{name}', 'train', "
        "data_dir='DIR')\"; then copy DIR here and set TFDS_DATA_DIR to it. "
        "The data set `digits` needs no network."
    )


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:160]


# .npz files


def _npz_sources(path: Path) -> Callable[[str], ImageSource]:
    arrays = _read_npz(path)
    names = {name: f"_{name}" for name in SPLITS if f"x_{name}" in arrays}
    if not names and "x" in arrays:
        names = {"train": ""}
    if not names:
        raise ValueError(f"dataset = '{path}': need arrays x or x_train; it has {sorted(arrays)}")
    images = {name: _npz_images(arrays[f"x{end}"], path) for name, end in names.items()}
    if len({x.shape[1:] for x in images.values()}) > 1:
        shapes = {name: x.shape for name, x in images.items()}
        raise ValueError(f"dataset = '{path}': the images of its splits differ in size, {shapes}")
    labels = {
        name: _npz_labels(arrays[f"y{end}"], len(images[name]), path)
        for name, end in names.items()
        if f"y{end}" in arrays
    }
    if labels and len(labels) < len(names):
        raise ValueError(f"dataset = '{path}': has labels of {sorted(labels)} alone")
    classes = max((int(y.max()) + 1 for y in labels.values()), default=0)
    levels = _npz_levels(arrays, max(int(x.max()) for x in images.values()), path)

    def source(split: str) -> ImageSource:
        stored, *part = _stored_part(split, list(names), str(path))
        x = images[stored]
        named = {"x": x, "label": labels[stored]} if labels else {"x": x}
        places = _cut_shuffled(len(x), (part[0], part[1]), str(path), split)
        read = functools.partial(_read_arrays, named)
        return ImageSource(read, places, x.shape[1:], levels, classes)

    return source


def _read_arrays(arrays: Mapping[str, np.ndarray], places: np.ndarray) -> dict[str, np.ndarray]:
    return {name: array[places] for name, array in arrays.items()}


def _read_npz(path: Path) -> Mapping[str, np.ndarray]:
    try:
        with np.load(path) as file:
            return {name: file[name] for name in file.files}
    except FileNotFoundError as error:
        raise ValueError(f"dataset = '{path}': no such file") from error
    except Exception as error:  # zip, pickle, header: numpy raises a dozen kinds
        raise ValueError(f"dataset = '{path}': not a readable .npz file ({error})") from error


def _npz_images(x: np.ndarray, path: Path) -> np.ndarray:
    if x.ndim not in (3, 4) or x.size == 0:
        raise ValueError(f"dataset = '{path}': x is {x.shape}, need [n, h, w] or [n, h, w, c]")
    if x.dtype.kind not in "ui" or x.min() < 0 or x.max() > 255:
        raise ValueError(f"dataset = '{path}': x is {x.dtype}, need whole numbers 0 … 255 (uint8)")
    if x.ndim == 4 and x.shape[-1] not in (1, 3):
        raise ValueError(f"dataset = '{path}': x has {x.shape[-1]} channels, need 1 or 3")
    return x.astype(np.uint8).reshape(*x.shape[:3], -1)


def _npz_levels(arrays: Mapping[str, np.ndarray], most: int, path: Path) -> int:
    levels = int(arrays["levels"]) if "levels" in arrays else 256
    if not most < levels <= 256:
        raise ValueError(f"dataset = '{path}': levels is {levels}, need {most + 1} … 256")
    return levels


def _npz_labels(y: np.ndarray, n: int, path: Path) -> np.ndarray:
    if y.size != n or y.dtype.kind not in "ui" or y.min() < 0:
        raise ValueError(
            f"dataset = '{path}': y is {y.dtype} {y.shape}, need {n} whole numbers >= 0"
        )
    return y.reshape(n).astype(np.int32)


# Folders


def _folder_sources(root: Path) -> Callable[[str], ImageSource]:
    folders = {name: root / name for name in SPLITS if (root / name).is_dir()} or {"train": root}
    files = {name: _image_files(folder) for name, folder in folders.items()}
    shape = _common_shape([path for paths in files.values() for path in paths])
    labelled = {path.parent != folders[name] for name, paths in files.items() for path in paths}
    if len(labelled) > 1:
        raise ValueError(f"dataset = '{root}': has images both beside and in its class folders")
    # Over all splits, as one of them may lack a class.
    names = sorted({path.parent.name for paths in files.values() for path in paths})
    classes = {name: i for i, name in enumerate(names)}

    def source(split: str) -> ImageSource:
        stored, *part = _stored_part(split, list(files), str(root))
        paths = files[stored]
        places = _cut_shuffled(len(paths), (part[0], part[1]), str(root), split)
        label = np.array([classes[path.parent.name] for path in paths], np.int32)
        read = functools.partial(_read_files, [str(path) for path in paths], label, shape)
        return ImageSource(read, places, shape, 256, len(names) if labelled == {True} else 0)

    return source


def _read_files(
    paths: list[str], label: np.ndarray, shape: tuple[int, int, int], places: np.ndarray
) -> dict[str, np.ndarray]:
    x = np.stack([_read_image(paths[i], shape) for i in places.tolist()])
    return {"x": x, "label": label[places]}


def _image_files(folder: Path) -> list[Path]:
    """The images of a folder and of its sub-folders, sorted."""
    files = [
        path
        for path in [*folder.glob("*"), *folder.glob("*/*")]
        if path.suffix.lower() in _SUFFIXES and not path.name.startswith(".")
    ]
    if not files:
        raise ValueError(f"dataset: no PNG or JPEG image in '{folder}' or its sub-folders")
    return sorted(files)


def _common_shape(paths: Sequence[Path]) -> tuple[int, int, int]:
    """Check from the headers that all images are of one size; 1 channel if all are grey, or 3."""
    first, grey = None, True
    for path in paths:
        size, mode = _header(path)
        first = first or size
        if size != first:
            raise ValueError(
                f"dataset: all images must be of one size; '{path}' is {size[0]}×{size[1]} and "
                f"'{paths[0]}' is {first[0]}×{first[1]}"
            )
        if mode.startswith(("I", "F")):
            raise ValueError(f"dataset: '{path}' is no 8-bit image (mode {mode})")
        grey = grey and mode in ("1", "L", "LA")
    assert first is not None  # a folder without images was refused
    return first[1], first[0], 1 if grey else 3


def _header(path: Path) -> tuple[tuple[int, int], str]:
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.size, image.mode
    except Exception as error:
        raise DatasetError(f"dataset: cannot read the image '{path}'") from error


def _read_image(path: str, shape: tuple[int, int, int]) -> np.ndarray:
    from PIL import Image

    try:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("L" if shape[2] == 1 else "RGB"))
    except Exception as error:  # a damaged file raises what its decoder happens to meet
        raise DatasetError(f"dataset: cannot read the image '{path}'") from error
    if pixels.shape[:2] != shape[:2]:  # it was, when its header was looked at
        raise DatasetError(f"dataset: the image '{path}' is no longer {shape[1]}×{shape[0]}")
    return pixels.reshape(shape)
