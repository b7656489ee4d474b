"""A score model of 8×8 digits, or of any set of images, by denoising under the VP SDE.

    jaxdiff train configs/digits.py --workdir runs/digits

trains on scikit-learn's digits in minutes on two CPU cores, then samples, and evaluates the
likelihood of the test images and the quality of the samples.
"""

import functools
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import tyro

import jaxdiff as jd
from jaxdiff import evaluation, networks, plotting
from jaxdiff.data.batches import Batches
from jaxdiff.data.images import dequantize, load_images
from jaxdiff.solve import adaptive
from jaxdiff.training import make_eval_step, warmup_cosine_adam


@dataclass(frozen=True)
class Config:
    """A variance-preserving score model of small images."""

    dataset: str = "digits"
    """TFDS name, a folder of PNG or JPEG files, or an .npz file of your own."""
    shape: tyro.conf.Suppress[tuple[int, int, int] | None] = None
    """Height, width and channels: read off the data set, and kept with the run."""
    levels: tyro.conf.Suppress[int | None] = None
    """Number of grey levels: read off the data set, and kept with the run."""
    beta_min: float = 0.1
    """Rate of the VP process at t = 0."""
    beta_max: float = 20.0
    """Rate of the VP process at t = 1."""
    width: int = 16
    """Channels of the U-Net's first level."""
    multipliers: tuple[int, ...] = (1, 2)
    """Channels of each level over width; each level halves the side."""
    blocks: int = 1
    """Residual blocks a level."""
    attention: tuple[int, ...] = (4,)
    """Sides, in pixels, of the levels with self-attention."""
    dropout: float = 0.1
    """Dropout rate in the residual blocks."""
    steps: int = 5000
    """Updates of the parameters."""
    batch_size: int = 64
    """Images in a batch, over all devices."""
    learning_rate: float = 2e-3
    """Highest rate of Adam; warmed up, then lowered along a cosine."""
    warmup: int = 200
    """Updates of the warm-up; at most a tenth of all."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    ema_decay: float = 0.999
    """Decay of the averaged parameters."""
    seed: int = 0
    """Of parameters, data order and noise."""
    sampler_steps: int = 100
    """Network calls for a sample."""
    eval_samples: int = 447
    """Samples whose quality is judged; at most as many as there are training images."""
    eval_images: int = 1000
    """Test images whose likelihood is computed, at most."""
    probes: int = 2
    """Hutchinson probes an image for the likelihood."""
    tolerance: float = 1e-4
    """Of the likelihood's ODE solver: the error of the worst image, relative and absolute."""


def experiment(config: Config) -> jd.Experiment:
    """Composes the run."""
    _check(config)
    if Path(config.dataset).exists() and config.dataset != "digits":
        config = replace(config, dataset=str(Path(config.dataset).resolve()))
    images = functools.cache(functools.partial(load_images, config.dataset))
    if config.shape is None or config.levels is None:
        train = images("train")
        config = replace(config, shape=train.x.shape[1:], levels=train.levels)
    shape, levels = config.shape, config.levels
    assert shape is not None
    assert levels is not None

    process = jd.Gaussian(jd.linear_beta(config.beta_min, config.beta_max))
    parameterization = jd.epsilon()
    net = networks.UNet(
        width=config.width,
        multipliers=config.multipliers,
        blocks=config.blocks,
        attention=config.attention,
        dropout=config.dropout,
    )
    denoising = functools.partial(
        jd.denoising,
        net.apply,
        process,
        parameterization,
        time_sampler=jd.time_samplers.low_discrepancy(),
    )
    loss, held_out_loss = denoising(dropout=config.dropout > 0.0), denoising()

    def objective(params, key, batch):
        # Fresh noise within each grey level's cell, every time that an image is seen.
        level_key, key = jax.random.split(key)
        return loss(params, key, {"x": dequantize(level_key, batch["x"], levels)})

    def denoiser(params):
        return jd.NetDenoiser(params, process, net.apply, parameterization)

    eval_step = make_eval_step(held_out_loss)

    def batches():
        train = images("train")
        if train.x.shape[1:] != shape or train.levels != levels:
            raise ValueError(
                f"dataset {config.dataset} has images of {train.x.shape[1:]} with {train.levels} "
                f"levels, not of {shape} with {levels}."
            )
        for split in ("validation", "test"):
            if len(images(split).x) < 2:
                raise ValueError(f"dataset {config.dataset} has too few images for its {split}.")
        return Batches({"x": train.x}, config.batch_size, seed=config.seed)

    def validate(params):
        held_out = images("validation").x[:1024]
        x = dequantize(jax.random.key(1), held_out, levels)
        return {"loss": float(eval_step(params, jax.random.key(2), {"x": x})["loss"])}

    def sample(params, key, num):
        def run(keys):
            start, noise = jax.vmap(jax.random.split, out_axes=1)(keys)
            x = jax.vmap(process.prior(shape).sample)(start)
            return jd.sample(jd.DDIM(process, eta=1.0), denoiser(params), grid, noise, x)

        return jnp.concatenate(evaluation.in_chunks(run, key, num))

    def trajectory(params, key, num):
        x = process.prior((num, *shape)).sample(key)
        states = jd.sample(jd.DDIM(process), denoiser(params), grid, key, x, trajectory=True)
        frames = jnp.linspace(0, config.sampler_steps, 8).astype(int)
        return states[frames], grid[frames]

    def evaluate(params, key):
        sample_key, null_key, likelihood_key = jax.random.split(key, 3)
        count = min(config.eval_samples, len(images("train").x), evaluation.MOST)
        samples = sample(params, sample_key, count)
        return {
            "likelihood": evaluation.likelihood_report(
                process,
                denoiser(params),
                images("test")._replace(x=images("test").x[: config.eval_images]),
                likelihood_key,
                probes=config.probes,
                controller=controller,
            ),
            "samples": evaluation.sample_report(samples, images("train"), images("test"), null_key),
        }

    controller = adaptive(config.tolerance)
    grid = jd.grids.uniform_log_snr(process, config.sampler_steps)
    return jd.Experiment(
        config=config,
        init=lambda key: net.init(key, jnp.zeros((1, *shape)), jnp.zeros(1)),
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
        batches=batches,
        validate=validate,
        sample=sample,
        trajectory=trajectory,
        evaluate=evaluate,
        draw=plotting.image_grid,
        draw_trajectory=lambda states, times, path: plotting.trajectory_grid(
            states, path, times=times.tolist()
        ),
    )


def _check(config: Config) -> None:
    for name in ("width", "blocks", "sampler_steps", "eval_samples", "probes"):
        if (value := getattr(config, name)) < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
    if config.eval_images < 2:
        raise ValueError(f"eval_images must be at least 2, got {config.eval_images}.")
    if not config.multipliers or min(config.multipliers) < 1:
        raise ValueError(f"multipliers must be positive, got {config.multipliers}.")
    if not 0.0 <= config.dropout < 1.0:
        raise ValueError(f"dropout must be in [0, 1), got {config.dropout}.")
