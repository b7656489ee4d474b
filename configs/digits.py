"""A score model of 8×8 digits, or of any set of images, by denoising under the VP SDE.

    jaxdiff train configs/digits.py --workdir runs/digits

trains on scikit-learn's digits in minutes on two CPU cores, then samples, and evaluates the
likelihood of the test images and the quality of the samples.
"""

import functools
from dataclasses import dataclass

import jaxdiff as jd
from jaxdiff.recipes import (
    ImageOptions,
    ScoreOptions,
    TrainingOptions,
    UNetOptions,
    at_least,
    open_images,
    score_experiment,
)


@dataclass(frozen=True)
class Config(TrainingOptions, UNetOptions, ImageOptions, ScoreOptions):
    """A variance-preserving score model of small images."""

    beta_min: float = 0.1
    """Rate of the VP process at t = 0."""
    beta_max: float = 20.0
    """Rate of the VP process at t = 1."""


def experiment(config: Config) -> jd.Experiment:
    """Composes the run."""
    at_least(1, config, "sampler_steps")
    config, images, _, _ = open_images(config)

    process = jd.Gaussian(jd.linear_beta(config.beta_min, config.beta_max))
    parameterization = jd.epsilon()
    net = config.unet()
    return score_experiment(
        config,
        images,
        net=net,
        process=process,
        parameterization=parameterization,
        objective=functools.partial(
            jd.denoising,
            net.apply,
            process,
            parameterization,
            time_sampler=jd.time_samplers.low_discrepancy(),
        ),
        step=jd.DDIM(process, eta=1.0),
        grid=jd.grids.uniform_log_snr(process, config.sampler_steps),
    )
