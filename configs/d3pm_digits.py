"""Discrete diffusion of 8×8 digits: 64 pixels of 17 levels, masked and uncovered again.

    jaxdiff train configs/d3pm_digits.py --workdir runs/d3pm

trains on scikit-learn's digits on two CPU cores, then samples, and bounds the likelihood of the
test images. No dequantisation: the pixels are classes, and the bound is one on their probability.

The levels are ordinal, which the absorbing kernel does not know; so the network is told: it sees
each pixel as the row of thresholds that its level exceeds.
"""

import functools
import math
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import jaxdiff as jd
from jaxdiff import evaluation, metrics, networks, plotting
from jaxdiff.data.batches import Batches
from jaxdiff.data.images import load_images, to_model
from jaxdiff.objectives.d3pm import masked_cross_entropy
from jaxdiff.objectives.elbo import elbo
from jaxdiff.processes import d3pm
from jaxdiff.training import make_eval_step, warmup_cosine_adam

MARK = 2.2412
"""Bits/dim of the digits' test split under a mixture of ten products of categoricals."""


@dataclass(frozen=True)
class Config:
    """An absorbing D3PM of small images."""

    dataset: str = "digits"
    """TFDS name, a folder of PNG or JPEG files, or an .npz file of your own."""
    shape: tyro.conf.Suppress[tuple[int, int, int] | None] = None
    """Height, width and channels: read off the data set, and kept with the run."""
    levels: tyro.conf.Suppress[int | None] = None
    """Number of grey levels: read off the data set, and kept with the run."""
    width: int = 24
    """Channels of the U-Net's first level."""
    multipliers: tuple[int, ...] = (1, 2)
    """Channels of each level over width; each level halves the side."""
    blocks: int = 1
    """Residual blocks a level."""
    attention: tuple[int, ...] = (4,)
    """Sides, in pixels, of the levels with self-attention."""
    dropout: float = 0.2
    """Dropout rate in the residual blocks."""
    steps: int = 4000
    """Updates of the parameters."""
    batch_size: int = 64
    """Images in a batch, over all devices."""
    learning_rate: float = 2e-3
    """Highest rate of Adam; warmed up, then lowered along a cosine."""
    warmup: int = 200
    """Updates of the warm-up; at most a tenth of all."""
    clip: float = 1.0
    """Largest norm of the gradient of the loss in bits/dim."""
    ema_decay: float = 0.998
    """Decay of the averaged parameters."""
    seed: int = 0
    """Of parameters, data order and noise."""
    sampler_steps: int = 128
    """Network calls for a sample."""
    bound_steps: int = 256
    """Steps of the chain whose likelihood is bounded."""
    eval_samples: int = 447
    """Samples whose quality is judged; at most as many as there are training images."""
    eval_images: int = 1000
    """Test images whose likelihood is bounded, at most."""


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
    mask, bits = levels, math.prod(shape) * math.log(2.0)

    kernel = d3pm.absorbing(levels + 1)
    process, parameterization = d3pm.D3PM(kernel), d3pm.Logits()
    net = networks.UNet(
        width=config.width,
        multipliers=config.multipliers,
        blocks=config.blocks,
        attention=config.attention,
        dropout=config.dropout,
        out_channels=shape[2] * levels,
    )

    def see(tokens):
        """[b, h, w, c] levels as [b, h, w, c · levels]: thresholds ±1, 0 where masked; the mask."""
        hidden = (tokens == mask)[..., None]
        steps = jnp.arange(levels - 1).reshape(1, 1, 1, 1, -1)
        thresholds = jnp.where(tokens[..., None] > steps, 1.0, -1.0)
        seen = jnp.concatenate([hidden, jnp.where(hidden, 0.0, thresholds)], axis=-1)
        return seen.reshape(*tokens.shape[:3], -1)

    def apply(params, tokens, noise_level, **options):
        out = jnp.asarray(net.apply(params["net"], see(tokens), noise_level, **options))
        return out.reshape(*tokens.shape, levels) + params["pixels"][None]

    def init(key):
        blank = jnp.zeros((1, *shape), int)
        # What each pixel is like, before anything is seen of the others, is learned apart.
        pixels = jnp.zeros((*shape, levels))
        return {"net": net.init(key, see(blank), jnp.zeros(1)), "pixels": pixels}

    def objective_with(dropout):
        nats = masked_cross_entropy(apply, process, parameterization, dropout=dropout)

        def objective(params, key, batch):
            loss, parts = nats(params, key, batch)
            return loss / bits, parts

        return objective

    eval_step = make_eval_step(objective_with(dropout=False))

    def denoiser(params):
        return jd.NetDenoiser(params, process, apply, parameterization)

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
        return {"loss": float(eval_step(params, jax.random.key(2), {"x": held_out})["loss"])}

    def picture(states):
        """States [..., levels + 1] as images in model space; masked pixels are grey."""
        tokens = jnp.argmax(states, axis=-1)
        return jnp.where(tokens == mask, 0.0, to_model(tokens, levels))

    def run(params, keys, **options):
        start, noise = jax.vmap(jax.random.split, out_axes=1)(keys)
        x = jax.vmap(process.prior((*shape, levels + 1)).sample)(start)
        return jd.sample(jd.Ancestral(process), denoiser(params), grid, noise, x, **options)

    def sample(params, key, num):
        states = evaluation.in_chunks(functools.partial(run, params), key, num)
        return picture(jnp.concatenate(states))

    def trajectory(params, key, num):
        states = run(params, jax.random.split(key, num), trajectory=True)
        frames = jnp.linspace(0, config.sampler_steps, 8).astype(int)
        return picture(states[frames]), grid[frames]

    def bound(params, key):
        """The bound of test images, in bits/dim, beside what models without structure reach."""
        tokens = images("test").x[: config.eval_images]
        steps = jd.grids.uniform(config.bound_steps)

        def run(keys, tokens):
            x0 = jax.vmap(process.one_hot)(jnp.asarray(tokens, int))
            return elbo(process, denoiser(params), keys, x0, steps)

        chunks = evaluation.in_chunks(run, key, len(tokens), tokens)
        nats = -np.concatenate([chunk.value for chunk in chunks]).astype(np.float64)
        mean, stderr = metrics.mean_and_stderr(nats)
        bits_mean, bits_stderr = metrics.mean_and_stderr(nats / bits)
        report = {
            "nll_nats": mean,
            "nll_nats_stderr": stderr,
            "bits_per_dim": bits_mean,
            "bits_per_dim_stderr": bits_stderr,
            "independent_bits_per_dim": float(
                _independent(images("train").x, tokens, levels) / bits
            ),
            "steps": config.bound_steps,
            "images": len(nats),
        }
        return report | ({"mixture_bits_per_dim": MARK} if config.dataset == "digits" else {})

    def evaluate(params, key):
        sample_key, null_key, bound_key = jax.random.split(key, 3)
        count = min(config.eval_samples, len(images("train").x), evaluation.MOST)
        samples = sample(params, sample_key, count)
        return {
            "likelihood": bound(params, bound_key),
            "samples": evaluation.sample_report(samples, images("train"), images("test"), null_key),
        }

    grid = jd.grids.uniform(config.sampler_steps)
    return jd.Experiment(
        config=config,
        process=process,
        denoiser=denoiser,
        init=init,
        objective=objective_with(dropout=config.dropout > 0.0),
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


def _independent(train: np.ndarray, test: np.ndarray, levels: int) -> float:
    """Mean −log p in nats of one categorical a pixel, with 0.3 pseudo-counts a level."""
    values = np.arange(levels)[:, None, None, None]
    counts = np.stack([(train == value).sum(0) for value in values]) + 0.3
    log_probs = np.log(counts / counts.sum(0))
    return -float(np.mean(np.sum(np.take_along_axis(log_probs, test, axis=0), axis=(1, 2, 3))))


def _check(config: Config) -> None:
    for name in ("width", "blocks", "sampler_steps", "bound_steps", "eval_samples"):
        if (value := getattr(config, name)) < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
    if config.eval_images < 2:
        raise ValueError(f"eval_images must be at least 2, got {config.eval_images}.")
    if not config.multipliers or min(config.multipliers) < 1:
        raise ValueError(f"multipliers must be positive, got {config.multipliers}.")
    if not 0.0 <= config.dropout < 1.0:
        raise ValueError(f"dropout must be in [0, 1), got {config.dropout}.")
