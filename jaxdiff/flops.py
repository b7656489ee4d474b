"""What a program computes, and what devices could: of both, products of matrices.

*Model FLOPs* are those of products and convolutions, two for each multiplication with its addition:

    [m, k] times [k, n]      2 m k n
    a convolution            2 · (numbers that come out) · (numbers of the kernel that make one)

All else in a network is small beside them. They are of the model and not of the machine: what
`jax.checkpoint` computes again does not count, so that nobody looks busy by it; nor do the zeros
between which the gradient of a strided convolution puts its numbers, but those around an image do.
XLA's own count is no use here: it takes a loop for one turn of it.

References: Chowdhery et al. 2022, arXiv:2204.02311, appendix B (model FLOPs utilisation).
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
from jax.extend.core import jaxprs_in_params

__all__ = ["PEAK", "count", "peak"]

PEAK = {
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40S": 362e12,
    "Tesla T4": 65e12,
    "Tesla V100-SXM2-16GB": 125e12,
    "Tesla V100-SXM2-32GB": 125e12,
    # A device is one of the two cores of a chip.
    "TPU v2": 46e12 / 2,
    "TPU v3": 123e12 / 2,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
}
"""`jax.Device.device_kind` ↦ its dense FLOP/s in bfloat16; in float16 of T4 and V100, without it.

References: data sheets of NVIDIA's A100, H100, H200, L4, L40S, T4 and V100, where a number with
sparsity is halved; Google Cloud's documentation of TPU v2 to v6e.
"""


def count(function: Callable[..., Any], *args: Any) -> float:
    """Model FLOPs of a call, over all devices; the function is traced, and nothing is computed.

    A `scan` counts each of its turns, a loop of unknown length one, and of several branches the
    costliest counts.

    Args:
        function: any function that JAX can trace, such as a train step. A jitted one that is then
            called with the same arguments is not traced again.
        *args: its arguments, or `jax.ShapeDtypeStruct` in place of arrays.

    Returns:
        The number, without what kernels written by hand compute.
    """
    return float(_count(jax.make_jaxpr(function)(*args).jaxpr))


def peak(devices: Iterable[Any]) -> float | None:
    """The sum of what devices could do, in FLOP/s, or None if one of them is not in `PEAK`.

    Args:
        devices: `jax.Device`s.
    """
    each = [PEAK.get(device.device_kind) for device in devices]
    known = [flops for flops in each if flops is not None]
    return sum(known) if len(known) == len(each) else None


def _count(jaxpr: Any) -> int:
    return sum(map(_of_equation, jaxpr.eqns))


def _of_equation(eqn: Any) -> int:
    # How JAX marks what is computed for the second time.
    if "rematted_computation" in str(eqn.source_info.name_stack):
        return 0
    params = eqn.params
    inner = max(map(_count, jaxprs_in_params(params)), default=0)
    match eqn.primitive.name:
        case "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            each = math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
        case "conv_general_dilated":
            kernel = eqn.invars[1].aval.shape
            each = math.prod(kernel) // kernel[params["dimension_numbers"].rhs_spec[0]]
            each /= math.prod(params["lhs_dilation"])
        case "convolution":  # of `networks.cpu`
            each = math.prod(eqn.invars[1].aval.shape[:-1])
        case "scan":
            return params["length"] * inner
        case "shard_map":
            mesh = params["mesh"]
            return math.prod(mesh.shape[axis] for axis in params["newly_manual_axes"]) * inner
        case _:
            return inner
    return round(2 * each * math.prod(eqn.outvars[0].aval.shape))
