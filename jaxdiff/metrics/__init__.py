"""How good are the samples, and the likelihoods, of a model? Plain numbers, on the host.

Everything here runs in float64 NumPy, once, after the model is done: nothing is traced and nothing
differentiates. Samples are arrays `[n, ...]`, flattened to vectors: pixels as they are, or features
that the caller computed. Results are plain floats, and dicts of them, ready for JSON.
"""

from jaxdiff.metrics.bits import bits_per_dim as bits_per_dim
from jaxdiff.metrics.bits import mean_and_stderr as mean_and_stderr
from jaxdiff.metrics.classifier import Classified as Classified
from jaxdiff.metrics.classifier import classify as classify
from jaxdiff.metrics.energy import energy_distance as energy_distance
from jaxdiff.metrics.energy import energy_null as energy_null
from jaxdiff.metrics.frechet import frechet_distance as frechet_distance
from jaxdiff.metrics.frechet import gaussian_frechet_distance as gaussian_frechet_distance
from jaxdiff.metrics.kernel import kernel_distance as kernel_distance
from jaxdiff.metrics.neighbours import memorisation as memorisation
from jaxdiff.metrics.neighbours import nearest_distances as nearest_distances
from jaxdiff.metrics.neighbours import principal_components as principal_components
from jaxdiff.metrics.prdc import prdc as prdc
from jaxdiff.metrics.sliced import sliced_wasserstein as sliced_wasserstein

__all__ = [
    "Classified",
    "bits_per_dim",
    "classify",
    "energy_distance",
    "energy_null",
    "frechet_distance",
    "gaussian_frechet_distance",
    "kernel_distance",
    "mean_and_stderr",
    "memorisation",
    "nearest_distances",
    "prdc",
    "principal_components",
    "sliced_wasserstein",
]
