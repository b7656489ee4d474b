"""Weights of other libraries, as denoisers of this one.

A folder or file in somebody else's format becomes a `Pretrained`: a `NetDenoiser` with the process
that it was trained under, which every sampler, solve, likelihood and guidance here accepts.
Everything is checked by name before anything is built: a missing, unknown or misshapen tensor, a
truncated file, a setting that no network here has. Nothing is downloaded, and no code of a file is
run.
"""

from jaxdiff.interop.base import Pretrained as Pretrained
from jaxdiff.interop.diffusers import from_diffusers as from_diffusers
from jaxdiff.interop.diffusers import to_diffusers as to_diffusers

__all__ = ["Pretrained", "from_diffusers", "to_diffusers"]
