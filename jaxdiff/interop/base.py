"""What all formats share: names of tensors to names of ours, checked, both ways.

A network of ours has a tree of parameters, {module: {leaf: array}}; a file has a flat mapping from
names to tensors. A format is a table from module to prefix: what is then left is that PyTorch calls
a kernel, a scale or a table "weight", and keeps kernels with the outputs first.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxdiff import struct
from jaxdiff.parameterizations import NetDenoiser
from jaxdiff.typing import Array, Params

__all__ = [
    "Pretrained",
    "check_shapes",
    "flat",
    "from_torch",
    "read_safetensors",
    "setting",
    "shapes_of",
    "to_torch",
    "write_safetensors",
]

Tensors = Mapping[str, np.ndarray]
Names = Mapping[str, str]
"""Module of ours, its path joined by /, ↦ prefix of theirs."""

_SHOWN = 5


@struct.dataclass
class Pretrained(NetDenoiser):
    """A denoiser from a file, with what its training settled.

    Attributes:
        grid: the times that its sampler of reference visits, falling to 0.
        shape: of one example.
        net: the network, to be trained further.
    """

    grid: Array = struct.field(default_factory=lambda: jnp.zeros(2))
    shape: tuple[int, ...] = struct.field(pytree_node=False, default=())
    net: nn.Module | None = struct.field(pytree_node=False, default=None)


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file.

    Raises:
        ValueError: if there is no such file, or if it is truncated or damaged.
        ImportError: without the extra `interop`.
    """
    try:
        from safetensors import SafetensorError
        from safetensors.numpy import load_file
    except ImportError as error:
        raise ImportError("safetensors is missing: pip install 'jaxdiff[interop]'") from error
    if not path.is_file():
        raise ValueError(f"path must hold weights in safetensors, but there is no {path}.")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or is no safetensors file: {error}.") from error


def write_safetensors(tensors: Tensors, path: Path) -> None:
    """Writes tensors as one file, whole or not at all.

    Raises:
        ImportError: without the extra `interop`.
    """
    try:
        from safetensors.numpy import save_file
    except ImportError as error:
        raise ImportError("safetensors is missing: pip install 'jaxdiff[interop]'") from error
    begun = path.with_suffix(".begun")
    save_file(dict(tensors), begun)
    begun.replace(path)


def shapes_of(net: nn.Module, *inputs: Any) -> Params:
    """The shapes of a network's parameters, by tracing alone."""
    return jax.eval_shape(net.init, jax.random.key(0), *inputs)


def setting(settings: Mapping[str, Any], name: str, *allowed: Any, source: str) -> Any:
    """A setting of theirs, the first of the allowed ones where nothing is said.

    Raises:
        ValueError: if it is none of those.
    """
    value = settings.get(name, allowed[0])
    if value not in allowed:
        words = " or ".join(map(repr, allowed))
        raise ValueError(f"{name} must be {words} here, got {value!r} in {source}.")
    return value


def flat(params: Params) -> dict[tuple[str, ...], Any]:
    """The leaves of a network's parameters by their paths."""
    return cast(dict[tuple[str, ...], Any], flatten_dict(params["params"]))


def _listed(names: Any) -> str:
    names = sorted(names)
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def check_shapes(tensors: Tensors, wanted: Mapping[str, tuple[int, ...]], source: str) -> None:
    """Holds the tensors of a file against the names and shapes that a network has.

    Raises:
        ValueError: names tensors that are missing, unknown or of a wrong shape.
    """
    if missing := wanted.keys() - tensors.keys():
        raise ValueError(f"{source} lacks tensors: {_listed(missing)}.")
    if unknown := tensors.keys() - wanted.keys():
        raise ValueError(f"{source} has tensors that belong nowhere: {_listed(unknown)}.")
    wrong = [
        f"{name} is {tensors[name].shape}, should be {shape}"
        for name, shape in wanted.items()
        if tensors[name].shape != shape
    ]
    if wrong:
        raise ValueError(f"{source} has tensors of other shapes: {'; '.join(wrong[:_SHOWN])}.")


def _their_name(path: tuple[str, ...], names: Names) -> str:
    *module, leaf = path
    return f"{names['/'.join(module)]}.{'bias' if leaf == 'bias' else 'weight'}"


def _to_theirs(array: np.ndarray) -> np.ndarray:
    """A kernel, [height, width, in, out] or [in, out], with the outputs first."""
    if array.ndim == 4:
        return array.transpose(3, 2, 0, 1)
    return array.T if array.ndim == 2 else array


def _to_ours(array: np.ndarray) -> np.ndarray:
    if array.ndim == 4:
        return array.transpose(2, 3, 1, 0)
    return array.T if array.ndim == 2 else array


def from_torch(tensors: Tensors, shapes: Params, names: Names, source: str) -> Params:
    """Tensors in PyTorch's layout as parameters of ours, in float32.

    Args:
        tensors: name ↦ array, all of a model.
        shapes: of our parameters.
        names: where each module of ours is found.
        source: of the tensors, for errors.

    Raises:
        ValueError: names tensors that are missing, unknown or of a wrong shape.
    """
    wanted = {}
    for path, leaf in flat(shapes).items():
        table = path[-1] == "embedding"
        wanted[_their_name(path, names)] = (path, leaf.shape, table)
    theirs = {
        name: shape if table else _to_theirs(np.empty(shape, bool)).shape
        for name, (_, shape, table) in wanted.items()
    }
    check_shapes(tensors, theirs, source)
    found = {}
    for name, (path, _, table) in wanted.items():
        array = np.asarray(tensors[name], np.float32)
        found[path] = jnp.asarray(array if table else _to_ours(array))
    return {"params": unflatten_dict(found)}


def to_torch(params: Params, names: Names) -> dict[str, np.ndarray]:
    """The inverse of `from_torch`."""
    tensors = {}
    for path, leaf in flat(params).items():
        array = np.asarray(leaf)
        array = array if path[-1] == "embedding" else _to_theirs(array)
        tensors[_their_name(path, names)] = np.ascontiguousarray(array)
    return tensors
