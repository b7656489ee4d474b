"""A score model of a density of the plane whose entropy is known exactly.

    jaxdiff train configs/toy2d.py --dataset moons --workdir runs/moons

trains for less than a minute on two CPU cores. Every batch is fresh, so there is nothing to overfit
and one figure tells how good the model is: its negative log-likelihood exceeds the entropy by the
Kullback–Leibler divergence of the model from the truth.

One set of defaults serves all densities. With α = 1 and σ in geometric progression, times uniform
in t are uniform in log-SNR, so that the plain loss is the one that bounds the likelihood (Kingma et
al. 2021, arXiv:2107.00630, eq. 17). The range of σ decides the rest: below a fraction of the finest
detail there is nothing to learn but noise to fit, and what a network adds there the likelihood
pays for; σ_min = 0.02 itself costs about 0.001 nats for details of 0.08, and σ_max = 15 as much for
the prior. The waves let the network see rings thinner than their distance.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

import jaxdiff as jd
from jaxdiff import evaluation, metrics, networks, plotting
from jaxdiff.data.batches import FreshBatches
from jaxdiff.data.toys import TOYS
from jaxdiff.training import make_eval_step, warmup_cosine_adam


@dataclass(frozen=True)
class Config:
    """A score model of a density of the plane."""

    dataset: str = "8gaussians"
    """8gaussians, checkerboard, moons, swissroll, pinwheel, 2spirals, rings or circles."""
    sigma_min: float = 0.02
    """Noise at t = 0: small against the finest detail."""
    sigma_max: float = 15.0
    """Noise at t = 1: large against the data."""
    sigma_data: float = 2.0
    """Standard deviation of a coordinate, for EDM's preconditioning; 1.4 to 2.4 in these sets."""
    width: int = 128
    """Hidden features of the perceptron."""
    depth: int = 4
    """Hidden layers; even."""
    waves: int = 32
    """Directions in which the network sees sines and cosines of the state."""
    wave_std: float = 3.0
    """Their initial frequencies, in radians per standard deviation of the data."""
    condition_width: int = 64
    """Features of the vector that tells the network the noise level."""
    steps: int = 17000
    """Updates of the parameters."""
    batch_size: int = 256
    """Points in a batch, over all devices."""
    learning_rate: float = 2e-3
    """Highest rate of Adam; warmed up, then lowered along a cosine."""
    warmup: int = 200
    """Updates of the warm-up; at most a tenth of all."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    ema_decay: float = 0.999
    """Decay of the averaged parameters."""
    seed: int = 0
    """Of parameters, data and noise."""
    sampler_steps: int = 100
    """Network calls for a sample."""
    eval_points: int = 10000
    """Fresh points whose likelihood is computed."""
    eval_samples: int = 2000
    """Samples whose energy distance to as many fresh points is computed."""


def experiment(config: Config) -> jd.Experiment:
    """Composes the run."""
    if config.dataset not in TOYS:
        raise ValueError(f"dataset must be one of {', '.join(TOYS)}, got {config.dataset!r}.")
    for name in ("width", "sampler_steps", "condition_width", "eval_samples"):
        if (value := getattr(config, name)) < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
    if config.waves < 0 or config.eval_points < 2:
        raise ValueError(
            f"waves must be at least 0 and eval_points at least 2, got {config.waves} and "
            f"{config.eval_points}."
        )
    toy = TOYS[config.dataset]

    process = jd.Gaussian(jd.exploding(config.sigma_min, config.sigma_max))
    parameterization = jd.parameterizations.edm(config.sigma_data)
    net = networks.MLP(
        width=config.width,
        depth=config.depth,
        waves=config.waves,
        wave_std=config.wave_std,
        condition_width=config.condition_width,
    )
    objective = jd.denoising(
        net.apply, process, parameterization, time_sampler=jd.time_samplers.low_discrepancy()
    )
    eval_step = make_eval_step(objective)

    def denoiser(params):
        return jd.NetDenoiser(params, process, net.apply, parameterization)

    def validate(params):
        batch = {"x": toy.sample(jax.random.key(1), 4096)}
        return {"loss": float(eval_step(params, jax.random.key(2), batch)["loss"])}

    def sample(params, key, num):
        def run(keys):
            x = jax.vmap(process.prior((2,)).sample)(keys)
            return jd.sample(jd.DDIM(process), denoiser(params), grid, key, x)

        return jnp.concatenate(evaluation.in_chunks(run, key, num, size=1000))

    def trajectory(params, key, num):
        x = process.prior((num, 2)).sample(key)
        states = jd.sample(jd.DDIM(process), denoiser(params), grid, key, x, trajectory=True)
        frames = jnp.linspace(0, config.sampler_steps, 8).astype(int)
        return states[frames], grid[frames]

    def likelihood_report(params, key):
        def run(keys, x):
            # The default solver, controller, t0 = 1e-5 and exact trace.
            return jd.log_likelihood(process, denoiser(params), x)

        x = toy.sample(key, config.eval_points)
        chunks = evaluation.in_chunks(run, key, len(x), x, size=1000)
        nll = -np.concatenate([chunk.value for chunk in chunks]).astype(np.float64)
        exact = -np.asarray(jax.vmap(toy.log_prob)(x), np.float64)
        mean, stderr = metrics.mean_and_stderr(nll)
        # On the same points most of the statistical error cancels.
        kl, kl_stderr = metrics.mean_and_stderr(nll - exact)
        return {
            "nll": mean,
            "nll_stderr": stderr,
            "entropy": float(toy.entropy),
            "gap": mean - float(toy.entropy),
            "kl": kl,
            "kl_stderr": kl_stderr,
            "points": len(nll),
            "network_calls": max(int(chunk.num_evaluations) for chunk in chunks),
        }

    def sample_report(params, key):
        sample_key, fresh_key, pool_key, null_key = jax.random.split(key, 4)
        num = config.eval_samples
        fresh, pool = toy.sample(fresh_key, num), toy.sample(pool_key, 4 * num)
        energy = metrics.energy_distance(sample(params, sample_key, num), fresh)
        null = metrics.energy_null(null_key, pool, fresh, num)
        return {
            "samples": num,
            "energy_distance": energy,
            "energy_null": null,
            "energy_over_null": energy / null,
        }

    def evaluate(params, key):
        likelihood_key, sample_key = jax.random.split(key)
        return {
            "likelihood": likelihood_report(params, likelihood_key),
            "samples": sample_report(params, sample_key),
        }

    def draw(x, path):
        return plotting.points(x, path, reference=toy.sample(jax.random.key(3), 2000))

    grid = jd.grids.uniform_log_snr(process, config.sampler_steps)
    return jd.Experiment(
        config=config,
        init=lambda key: net.init(key, jnp.zeros((1, 2)), jnp.zeros(1)),
        process=process,
        denoiser=denoiser,
        objective=objective,
        optimizer=warmup_cosine_adam(
            config.learning_rate,
            steps=config.steps,
            warmup=min(config.warmup, config.steps // 10),
            clip=config.clip,
        ),
        ema_decay=config.ema_decay,
        steps=config.steps,
        seed=config.seed,
        batches=lambda: FreshBatches(toy.sample, config.batch_size, seed=config.seed),
        validate=validate,
        sample=sample,
        trajectory=trajectory,
        evaluate=evaluate,
        draw=draw,
        draw_trajectory=lambda states, times, path: plotting.point_trajectory(
            states, path, times=np.asarray(times).tolist()
        ),
        shown=(2000, 1000),
        intervals={"log_every": 500, "eval_every": 5000, "save_every": 5000},
    )
