"""Scikit-learn's 8×8 digits as a TFDS data set that needs no network and no TensorFlow.

Optical recognition of handwritten digits (Alpaydin and Kaynak 1998, UCI repository), the 1,797
images that scikit-learn carries: 17 grey levels 0..16, ten classes. The splits are cut in file
order, so that every figure ever given for them can be compared: train 0:1000, validation 1000:1350,
test 1350:1797.

This module imports TFDS; `jaxdiff.data.images.load_images("digits", split)` is the way in.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

__all__ = ["Digits"]


class Digits(tfds.core.GeneratorBasedBuilder):
    """The TFDS builder `digits`: `image` uint8 [8, 8, 1] in 0..16 and `label` in 0..9."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        # An `Image` feature would be encoded by TensorFlow; a `Tensor` is stored as it is.
        features = tfds.features.FeaturesDict(
            {
                "image": tfds.features.Tensor(shape=(8, 8, 1), dtype=np.uint8),
                "label": tfds.features.ClassLabel(num_classes=10),
            }
        )
        return tfds.core.DatasetInfo(
            builder=self,
            description="Handwritten digits of 8×8 pixels in 17 grey levels.",
            features=features,
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict]]]:
        del dl_manager  # the images come with scikit-learn
        from sklearn.datasets import load_digits

        images, labels = load_digits(return_X_y=True)
        images = images.reshape(-1, 8, 8, 1).astype(np.uint8)
        ranges = {"train": (0, 1000), "validation": (1000, 1350), "test": (1350, 1797)}
        return {
            split: self._generate_examples(images[start:stop], labels[start:stop])
            for split, (start, stop) in ranges.items()
        }

    def _generate_examples(
        self, images: np.ndarray, labels: np.ndarray
    ) -> Iterator[tuple[int, dict]]:
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            yield i, {"image": image, "label": int(label)}
