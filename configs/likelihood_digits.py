"""A score model of 8×8 digits trained for their likelihood.

    jaxdiff train configs/likelihood_digits.py --workdir runs/likelihood

As configs/digits.py, with three choices that decide what likelihood a score model reaches: the
weight of the noise levels in the loss (`simple` looks better, `likelihood` bounds −log p), how the
times of a batch are drawn (which is only noise of the gradient), and how grey levels become points
of [−1, 1] (uniform in their cells, or by a flow that is trained together with the model).
"""

import functools
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp

import jaxdiff as jd
from jaxdiff import networks, weightings
from jaxdiff.data.images import dequantize, to_model
from jaxdiff.likelihood import importance_weighted
from jaxdiff.objectives.dequantization import dequantized, fill
from jaxdiff.recipes import (
    ImageOptions,
    TrainingOptions,
    UNetOptions,
    at_least,
    image_experiment,
    one_of,
    open_images,
    solved,
)


@dataclass(frozen=True)
class Config(TrainingOptions, UNetOptions, ImageOptions):
    """A variance-preserving score model of small images, trained for their likelihood."""

    weighting: str = "likelihood"
    """Of the loss over noise levels: simple or likelihood."""
    times: str = "importance"
    """How times are drawn: uniform, or in proportion to the likelihood's weight."""
    dequantisation: str = "variational"
    """How grey levels become points: uniform in their cells, or variational."""
    fourier: tuple[int, ...] = ()
    """Exponents n of the waves sin(2ⁿπx) and cos(2ⁿπx) that the network sees beside x."""
    t_min: float = 1e-5
    """Smallest time of training; the data are placed there."""
    sampler_steps: int = 100
    """Network calls for a sample."""
    probes: int = 2
    """Hutchinson probes an image for the likelihood."""
    tolerance: float = 1e-4
    """Of the likelihood's ODE solver: the error of the worst image, relative and absolute."""
    draws: int = 1
    """Points of an image's cells whose importance-weighted bound is taken. More tighten it; but
    noise of the probes then biases it upwards, so take more of these too."""


def experiment(config: Config) -> jd.Experiment:
    """Composes the run."""
    at_least(1, config, "sampler_steps", "draws")
    one_of(config, weighting=("simple", "likelihood"), times=("uniform", "importance"))
    one_of(config, dequantisation=("uniform", "variational"))
    variational = config.dequantisation == "variational"
    if variational and config.weighting == "simple":
        raise ValueError(
            "dequantisation must be uniform with weighting=simple, got variational: the flow needs "
            "a bound of the likelihood."
        )
    config, images, shape, levels = open_images(config)
    dim = math.prod(shape)

    process = jd.Gaussian(jd.linear_beta())
    parameterization = jd.epsilon()
    grid = jd.grids.uniform_log_snr(process, config.sampler_steps)
    net, flow = config.unet(fourier=config.fourier), networks.Dequantizer()
    draw_times = {
        "uniform": jd.time_samplers.low_discrepancy,
        "importance": jd.time_samplers.importance,
    }
    denoising = functools.partial(
        jd.denoising,
        net.apply,
        process,
        parameterization,
        weighting=getattr(weightings, config.weighting),
        time_sampler=draw_times[config.times](config.t_min),
    )

    def init(key):
        net_key, flow_key = jax.random.split(key)
        x = jnp.zeros((1, *shape))
        model = net.init(net_key, x, jnp.zeros(1))
        return {"model": model, "dequantizer": flow.init(flow_key, x, x) if variational else {}}

    def points(params, keys, x):
        """Points in the cells of levels, and log q of them, in nats."""
        centres = to_model(x, levels)
        if variational:
            return fill(flow.apply, params["dequantizer"], keys, centres, levels)
        return dequantize(keys, x, levels), jnp.full(len(x), dim * math.log(levels / 2))

    def of_levels(objective):
        """In nats a pixel where it is a bound, but for a constant."""

        def bound(params, key, batch):
            loss, parts = objective(params, key, batch)
            return 0.5 * loss, parts

        whole = dequantized(bound, flow.apply, levels=levels)

        def loss(params, key, batch):
            if variational:
                return whole(params, key, {"x": to_model(batch["x"], levels)})
            level_key, key = jax.random.split(key)
            x = dequantize(level_key, batch["x"], levels)
            return bound(params["model"], key, {"x": x})

        return loss

    def denoiser(params):
        return jd.NetDenoiser(params["model"], process, net.apply, parameterization)

    def run(params, keys, **options):
        start, noise = jax.vmap(jax.random.split, out_axes=1)(keys)
        x = jax.vmap(process.prior(shape).sample)(start)
        step = jd.DDIM(process, eta=1.0)
        return jd.sample(step, denoiser(params), grid, noise, x, **options)

    def bound_of_levels(params, keys, x, **accuracy):
        def of_one_draw(i):
            own = jax.vmap(lambda key: jax.random.split(jax.random.fold_in(key, i)))(keys)
            y, log_q = points(params, own[:, 0], x)
            found = jd.log_likelihood(
                process, denoiser(params), y, key=own[:, 1], t0=config.t_min, **accuracy
            )
            return found._replace(value=found.value - log_q)

        found = jax.lax.map(of_one_draw, jnp.arange(config.draws))
        share = jax.nn.softmax(found.value, axis=0)
        return found._replace(
            value=importance_weighted(found.value),
            stderr=jnp.sqrt(jnp.sum((share * found.stderr) ** 2, axis=0)),
            solver_error=jnp.sum(share * found.solver_error, axis=0),
            latent=found.latent[0],
            num_evaluations=jnp.sum(found.num_evaluations, axis=0),
            converged=jnp.all(found.converged, axis=0),
        )

    return image_experiment(
        config,
        images,
        init=init,
        process=process,
        denoiser=denoiser,
        shape=shape,
        loss=of_levels(denoising(dropout=config.dropout > 0.0)),
        held_out_loss=of_levels(denoising()),
        run=run,
        grid=grid,
        estimate=solved(
            bound_of_levels, tolerance=config.tolerance, probes=config.probes, shape=shape
        ),
        place=lambda keys, x: dequantize(keys, x, levels),
        sweeps={"tolerance": (1e-2, 1e-3, 1e-4, 1e-5), "probes": (1, 2, 4, 8)},
        further={"dequantisation": lambda: config.dequantisation, "draws": lambda: config.draws},
    )
