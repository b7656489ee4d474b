"""What the shipped configs share: their options, and all of a run that is not diffusion.

    @dataclass(frozen=True)
    class Config(TrainingOptions, UNetOptions, ImageOptions):
        ...                       # further fields, and other defaults

    def experiment(config):
        ...                       # process, network, objective, sampler, likelihood
        return image_experiment(config, images, ...)

A config of your own may use them, or not.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from jaxdiff import evaluation, grids, metrics, networks, plotting, trace
from jaxdiff.data.batches import Batches, FreshBatches
from jaxdiff.data.images import Images, ImageSource, dequantize, image_sources, to_model
from jaxdiff.data.streams import Stream
from jaxdiff.data.toys import TOYS, Toy
from jaxdiff.data_likelihood import in_chunks
from jaxdiff.experiment import FREE, Experiment, Likelihood
from jaxdiff.likelihood import log_likelihood
from jaxdiff.objectives import vdm
from jaxdiff.parallel import per_shard, replicate, to_host
from jaxdiff.parameterizations import NetDenoiser, Parameterization
from jaxdiff.processes.base import Denoiser, of_whole_batch
from jaxdiff.processes.gaussian import Gaussian, Rescaled
from jaxdiff.samplers.ancestral import Ancestral
from jaxdiff.samplers.base import Step
from jaxdiff.samplers.base import sample as run_sampler
from jaxdiff.schedules import learned_gamma
from jaxdiff.solve import adaptive
from jaxdiff.training import make_eval_step, warmup_adam
from jaxdiff.typing import Array, Key, Objective, Params

__all__ = [
    "ClassOptions",
    "ImageOptions",
    "MLPOptions",
    "ScoreOptions",
    "ToyOptions",
    "TrainingOptions",
    "UNetOptions",
    "VDMOptions",
    "at_least",
    "image_experiment",
    "one_of",
    "open_images",
    "samplers",
    "score_experiment",
    "solved",
    "toy_experiment",
    "vdm_experiment",
]

Config = TypeVar("Config", bound="ImageOptions")

Run = Callable[..., Array]
"""(params, keys [n], **options of `sample`) ↦ samples."""

Place = Callable[[Key, Array], Array]
"""(keys [n], grey levels [n, h, w, c]) ↦ x_0 [n, …]."""


class Splits:
    """The splits of a data set: name ↦ the images in memory, loaded once.

    Args:
        source: name ↦ all images, decoded when they are asked for.
        most: how many of a split are loaded, the first ones; all if None.
    """

    def __init__(self, source: Callable[[str], ImageSource], most: int | None = None):
        self.source = functools.cache(source)
        self._load = functools.cache(lambda split: self.source(split).load(most))

    def __call__(self, split: str) -> Images:
        """The images of a split, at most `most`."""
        return self._load(split)


@dataclass(frozen=True)
class TrainingOptions:
    """How parameters are fitted."""

    steps: int = 5000
    """Updates of the parameters."""
    batch_size: int = 64
    """Examples in a batch, over all devices."""
    accumulate: int = 1
    """Parts of a batch that are computed one after another, to save memory."""
    learning_rate: float = 2e-3
    """Highest rate of Adam, after the warm-up."""
    warmup: int = 200
    """Updates of the warm-up; at most a tenth of all."""
    cosine: bool = True
    """Lower the rate along a cosine after the warm-up, else keep it."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    first_moment: float = 0.9
    """Decay of Adam's average of gradients."""
    second_moment: float = 0.999
    """Decay of Adam's average of squared gradients."""
    weight_decay: float = 0.0
    """Decay of matrices and kernels, times the rate."""
    ema_decay: float = 0.999
    """Decay of the averaged parameters."""
    seed: int = 0
    """Of parameters, data order and noise."""

    def experiment(self, **parts: Any) -> Experiment:
        """The experiment with these options and the other parts.

        Raises:
            ValueError: for an option outside its range.
        """
        at_least(1, self, "accumulate")
        optimizer = warmup_adam(
            self.learning_rate,
            steps=self.steps,
            warmup=min(self.warmup, self.steps // 10),
            clip=self.clip,
            cosine=self.cosine,
            first_moment=self.first_moment,
            second_moment=self.second_moment,
            weight_decay=self.weight_decay,
        )
        return Experiment(
            config=self,
            optimizer=optimizer,
            ema_decay=self.ema_decay,
            accumulate=self.accumulate,
            steps=self.steps,
            seed=self.seed,
            **parts,
        )


@dataclass(frozen=True)
class UNetOptions:
    """The size of a U-Net."""

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
    dtype: str = "float32"
    """Of the network's computation: float32, or bfloat16 on an accelerator that has it."""
    remat: bool = False
    """Save memory: compute the inside of the blocks again for the gradient."""
    scan: bool = False
    """Make a shorter program: run the equal blocks of a level as one loop."""

    def unet(self, **further: Any) -> networks.UNet:
        """The network, with further attributes of `UNet`.

        Raises:
            ValueError: for an option outside its range.
        """
        at_least(1, self, "width", "blocks")
        one_of(self, dtype=("float32", "bfloat16"))
        if not self.multipliers or min(self.multipliers) < 1:
            raise ValueError(f"multipliers must be positive, got {self.multipliers}.")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}.")
        return networks.UNet(
            width=self.width,
            multipliers=self.multipliers,
            blocks=self.blocks,
            attention=self.attention,
            dropout=self.dropout,
            dtype=jnp.dtype(self.dtype),
            remat=self.remat,
            scan=self.scan,
            **further,
        )


@dataclass(frozen=True)
class MLPOptions:
    """The size of a perceptron."""

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

    def mlp(self, **further: Any) -> networks.MLP:
        """The network, with further attributes of `MLP`.

        Raises:
            ValueError: for an option outside its range.
        """
        at_least(1, self, "width", "condition_width")
        at_least(0, self, "waves")
        return networks.MLP(
            width=self.width,
            depth=self.depth,
            waves=self.waves,
            wave_std=self.wave_std,
            condition_width=self.condition_width,
            **further,
        )


@dataclass(frozen=True)
class ToyOptions:
    """Which density of the plane, and how much of it is judged."""

    dataset: str = "8gaussians"
    """8gaussians, checkerboard, moons, swissroll, pinwheel, 2spirals, rings or circles."""
    eval_points: int = 10000
    """Fresh points whose likelihood is computed."""
    eval_samples: int = 2000
    """Samples whose energy distance to as many fresh points is computed."""

    def toy(self) -> Toy:
        """The density.

        Raises:
            ValueError: for an option outside its range.
        """
        one_of(self, dataset=tuple(TOYS))
        at_least(1, self, "eval_samples")
        at_least(2, self, "eval_points")
        return TOYS[self.dataset]


@dataclass(frozen=True)
class ImageOptions:
    """Which images, and how many of them are judged."""

    dataset: str = "digits"
    """TFDS name, a folder of PNG or JPEG files, or an .npz file of your own."""
    shape: tyro.conf.Suppress[tuple[int, int, int] | None] = None
    """Height, width and channels: read off the data set, and kept with the run."""
    levels: tyro.conf.Suppress[int | None] = None
    """Number of grey levels: read off the data set, and kept with the run."""
    stream: bool = field(default=False, metadata=FREE)
    """Decode training images while the model trains, instead of all of them before: for a set that
    does not fit into memory."""
    workers: int = field(default=0, metadata=FREE)
    """Processes that decode a stream; 0 for threads."""
    flip: bool = False
    """Mirror every other training image, left to right, at random."""
    eval_samples: int = 447
    """Samples whose quality is judged; at most as many as there are training images."""
    eval_images: int = 1000
    """Test images whose likelihood is computed, at most; and images of training and test whose
    losses are compared."""


@dataclass(frozen=True)
class ScoreOptions:
    """How a score model is sampled, and its likelihood computed."""

    sampler_steps: int = 100
    """Steps of the sampler."""
    probes: int = 2
    """Hutchinson probes an image for the likelihood."""
    tolerance: float = 1e-4
    """Of the likelihood's ODE solver: the error of the worst image, relative and absolute."""


@dataclass(frozen=True)
class VDMOptions:
    """The noise schedule of a variational model, and how it is sampled and judged."""

    fourier: tuple[int, ...] = (3, 4)
    """Exponents n of the waves sin(2ⁿπx) and cos(2ⁿπx) that the network sees beside x."""
    gamma_min: float = -9.0
    """Minus the log-SNR of the data's end, before training."""
    gamma_max: float = 5.0
    """Minus the log-SNR of the prior's end, before training."""
    hidden: int = 16
    """Hidden units of the noise schedule; 0 for one that stays linear in t."""
    sampler_steps: int = 128
    """Network calls for a sample."""
    bound_draws: int = 64
    """Times at which the bound of an image is estimated."""


@dataclass(frozen=True)
class ClassOptions:
    """Of a model that knows the classes of its images."""

    num_classes: int = 10
    """Number of classes."""
    label_dropout: float = 0.1
    """How often training shows an image without its class, which guidance and likelihood need."""

    def __post_init__(self) -> None:
        at_least(1, self, "num_classes")
        if not 0.0 <= self.label_dropout <= 1.0:
            raise ValueError(f"label_dropout must be in [0, 1], got {self.label_dropout}.")


def open_images(config: Config) -> tuple[Config, Splits, tuple[int, int, int], int]:
    """Finds the images that a config names; only their shape is looked at, if it is not yet known.

    Returns:
        The config, nothing left open; the splits; the images' shape and their grey levels.

    Raises:
        ValueError: for an option outside its range, or a data set that cannot be read.
    """
    at_least(1, config, "eval_samples")
    at_least(2, config, "eval_images")
    at_least(0, config, "workers")
    dataset = config.dataset
    if Path(dataset).exists() and dataset != "digits":
        dataset = str(Path(dataset).resolve())
    opened = functools.cache(lambda: image_sources(dataset))
    judged = max(evaluation.MOST, config.eval_images)
    images = Splits(lambda split: opened()(split), judged if config.stream else None)
    shape, levels = config.shape, config.levels
    if shape is None or levels is None:
        train = images.source("train")
        shape, levels = train.shape, train.levels
    return replace(config, dataset=dataset, shape=shape, levels=levels), images, shape, levels


def image_experiment(
    config: Any,
    images: Splits,
    *,
    loss: Objective,
    held_out_loss: Objective,
    run: Run,
    grid: Array,
    estimate: Callable[..., Any],
    place: Place | None = None,
    sweeps: Mapping[str, Sequence[float]] | None = None,
    further: Mapping[str, Any] | None = None,
    num_classes: int | None = None,
    **parts: Any,
) -> Experiment:
    """A run on images: batches, validation, pictures and reports.

    Args:
        config: `TrainingOptions` and `ImageOptions`, nothing left open.
        images: its splits.
        loss: of training, on batches {"x": [b, h, w, c]}.
        held_out_loss: the same without dropout.
        run: (params, keys [n], **options of `sample`) ↦ images [n, h, w, c] in model space, or all
            of the trajectory; with `num_classes` also label=[n].
        grid: its times.
        estimate: (params, keys [n], x [n, h, w, c], **options) ↦ log p or a bound of it.
        place: (keys [n], grey levels [n, h, w, c]) ↦ x_0 [n, …] of the process, for a model of the
            levels themselves: losses and estimate then take these. By default they take points of
            [−1, 1], uniform in the cells of the levels and drawn anew each time.
        sweeps: of `Likelihood`.
        further: added to the report of the likelihood, when it is made: name ↦ () ↦ value.
        num_classes: if given, batches have a "label" [b] too: of training, that of no class instead
            with probability `label_dropout` of the config, which `ClassOptions` has.
        **parts: `init`, `process`, `denoiser` and `shape` of `Experiment`.

    Raises:
        ValueError: for an option outside its range.
    """
    dim = math.prod(config.shape)

    def in_cells(keys, x):
        return dequantize(keys, x, config.levels)

    def augmented(objective: Objective) -> Objective:
        def of_either(params, key, batch):
            flip_key, drop_key, key = jax.random.split(key, 3)
            if config.flip:
                draw = functools.partial(jax.random.bernoulli, flip_key)
                flips = of_whole_batch(lambda n: draw(shape=(n, 1, 1, 1)), len(batch["x"]))
                batch = batch | {"x": jnp.where(flips, batch["x"][:, :, ::-1], batch["x"])}
            if num_classes is not None:
                draw = functools.partial(jax.random.bernoulli, drop_key, config.label_dropout)
                drops = of_whole_batch(lambda n: draw(shape=(n,)), len(batch["label"]))
                batch = batch | {"label": jnp.where(drops, num_classes, batch["label"])}
            return objective(params, key, batch)

        return of_either if config.flip or num_classes is not None else objective

    def continuous(objective: Objective) -> Objective:
        def of_points(params, key, batch):
            level_key, key = jax.random.split(key)
            return objective(params, key, batch | {"x": in_cells(level_key, batch["x"])})

        return of_points if place is None else objective

    def estimate_of_levels(params, keys, x, **options):
        if place is None:
            level_keys, keys = jax.vmap(jax.random.split, out_axes=1)(keys)
            x = in_cells(level_keys, x)
        return estimate(params, keys, x, **options)

    def bits(nll):
        if place is None:
            return metrics.bits_per_dim(nll, dim, config.levels)
        return nll / (dim * math.log(2.0))

    def entries(x, nll):
        given = {"dequantisation": "uniform"} if place is None else {}
        return given | {"levels": config.levels} | {n: get() for n, get in (further or {}).items()}

    def levels_of(split):
        return jnp.asarray(images(split).x[: config.eval_images], int)

    def batches():
        train = images.source("train")
        if train.shape != config.shape or train.levels != config.levels:
            raise ValueError(
                f"dataset {config.dataset} has images of {train.shape} with {train.levels} "
                f"levels, not of {config.shape} with {config.levels}."
            )
        for split in ("validation", "test"):
            if len(images(split).x) < 2:
                raise ValueError(f"dataset {config.dataset} has too few images for its {split}.")
        if num_classes is not None and not 0 < train.num_classes <= num_classes:
            raise ValueError(
                f"dataset {config.dataset} must have labels of at most {num_classes} classes, got "
                f"{train.num_classes}."
            )
        options = {"batch_size": config.batch_size, "seed": config.seed}
        if config.stream:
            examples = train if num_classes is not None else train.unlabelled()
            return Stream(Batches(examples, **options), workers=config.workers)
        return Batches(given("train"), **options)

    def given(split: str) -> dict[str, Any]:
        found = images(split)
        return {"x": found.x} | ({} if num_classes is None else {"label": found.label})

    held_out_mean = functools.cache(
        functools.partial(make_eval_step, continuous(held_out_loss), size=256)
    )

    def validate(params, mesh=None):
        held_out = {name: array[:1024] for name, array in given("validation").items()}
        return held_out_mean(mesh=mesh)(params, jax.random.key(2), held_out)

    sample, trajectory = samplers(run, grid, size=256)

    def evaluate(params, key, mesh=None):
        sample_key, null_key, gap_key = jax.random.split(key, 3)
        train, test = images("train"), images("test")
        count = min(config.eval_samples, len(train.x), evaluation.MOST)
        return {
            "samples": evaluation.sample_report(
                sample(params, sample_key, count, mesh), train, test, null_key
            ),
            "overfitting": evaluation.overfitting_report(
                parts["process"],
                parts["denoiser"](params),
                levels_of("train"),
                levels_of("test"),
                gap_key,
                place=place or in_cells,
            ),
        }

    return config.experiment(
        objective=augmented(continuous(loss)),
        batches=batches,
        validate=validate,
        sample=sample,
        trajectory=trajectory,
        evaluate=evaluate,
        likelihood=Likelihood(
            examples=lambda split, key: levels_of(split),
            estimate=estimate_of_levels,
            bits=bits,
            further=entries,
            sweeps=sweeps or {},
            example=jax.ShapeDtypeStruct(config.shape, jnp.result_type(int)),
        ),
        draw=plotting.image_grid,
        draw_trajectory=plotting.trajectory_grid,
        sampler=run,
        num_classes=num_classes,
        **parts,
    )


def score_experiment(
    config: Any,
    images: Splits,
    *,
    net: networks.UNet | networks.UViT,
    process: Gaussian,
    parameterization: Parameterization,
    objective: Callable[..., Objective],
    step: Step,
    grid: Array,
    sampled: Callable[[Denoiser], Denoiser] = lambda denoise: denoise,
) -> Experiment:
    """A run on images by a score model: its samples, and its exact likelihood.

    With a network of classes, samples are of the labels given, or of classes drawn alike often; the
    likelihood is that of the model without class.

    Args:
        config: `TrainingOptions`, `ImageOptions` and `ScoreOptions`, nothing left open.
        images: its splits.
        net: the network.
        process: of the images in [−1, 1].
        parameterization: what the network's output means.
        objective: dropout ↦ the loss.
        step: of the sampler.
        grid: its times.
        sampled: the model ↦ what the sampler is given, such as `UnitVariance`.

    Raises:
        ValueError: for an option outside its range.
    """

    def denoiser(params, **condition):
        return NetDenoiser(params, process, net.apply, parameterization, condition)

    def run(params, keys, label=None, **options):
        start, noise, of_class = jax.vmap(lambda key: jax.random.split(key, 3), out_axes=1)(keys)
        x = jax.vmap(process.prior(config.shape).sample)(start)
        if label is None and (classes := net.num_classes) is not None:
            label = jax.vmap(lambda key: jax.random.randint(key, (), 0, classes))(of_class)
        condition = {} if label is None else {"label": label}
        denoise = sampled(denoiser(params, **condition))
        return run_sampler(step, denoise, grid, noise, x, **options)

    def log_p(params, keys, x, **accuracy):
        return log_likelihood(process, denoiser(params), x, key=keys, **accuracy)

    return image_experiment(
        config,
        images,
        init=lambda key: net.init(key, jnp.zeros((1, *config.shape)), jnp.zeros(1)),
        process=process,
        denoiser=denoiser,
        loss=objective(dropout=config.dropout > 0.0),
        held_out_loss=objective(dropout=False),
        run=run,
        grid=grid,
        num_classes=net.num_classes,
        shape=config.shape,
        estimate=solved(
            log_p, tolerance=config.tolerance, probes=config.probes, shape=config.shape
        ),
        sweeps={"tolerance": (1e-2, 1e-3, 1e-4, 1e-5), "probes": (1, 2, 4, 8)},
        further={"probes": lambda: config.probes},
    )


def vdm_experiment(
    config: Any, images: Splits, net: networks.UNet, parameterization: Parameterization
) -> Experiment:
    """A run on the grey levels of images by a variational diffusion model: their bound, in bits.

    Args:
        config: `TrainingOptions`, `ImageOptions` and `VDMOptions`, nothing left open.
        images: its splits.
        net: the network.
        parameterization: what its output means.

    Raises:
        ValueError: for an option outside its range.
    """
    at_least(1, config, "sampler_steps", "bound_draws")
    grid = grids.uniform(config.sampler_steps)
    schedule = learned_gamma(config.gamma_min, config.gamma_max, hidden=config.hidden)
    start = Gaussian(schedule)
    objective = functools.partial(
        vdm.vdm, net.apply, parameterization, decoder=vdm.level_decoder(config.levels)
    )
    trained, held_out = objective(dropout=config.dropout > 0.0), objective()

    def init(key):
        network = net.init(key, jnp.zeros((1, *config.shape)), jnp.zeros(1))
        return {"network": network, "schedule": vars(schedule)}

    def of_levels(objective):
        def in_bits(params, key, batch):
            batch = batch | {"x": to_model(batch["x"], config.levels)}
            return jax.tree.map(lambda nats: nats / jnp.log(2.0), objective(params, key, batch))

        return in_bits

    def denoiser(params):
        # Of the process before training, which is the one that the experiment can name.
        return Rescaled(held_out.denoiser(params), held_out.process(params), start)

    def run(params, keys, **options):
        first, noise = jax.vmap(jax.random.split, out_axes=1)(keys)
        process = held_out.process(params)
        x = jax.vmap(process.prior(config.shape).sample)(first)
        return run_sampler(Ancestral(process), held_out.denoiser(params), grid, noise, x, **options)

    def estimate(params, keys, x):
        x = to_model(x, config.levels)
        return vdm.bound(held_out, params, keys, x, draws=config.bound_draws)

    return image_experiment(
        config,
        images,
        init=init,
        process=start,
        denoiser=denoiser,
        loss=of_levels(trained),
        held_out_loss=of_levels(held_out),
        run=run,
        grid=grid,
        estimate=estimate,
        place=lambda keys, x: to_model(x, config.levels),
        shape=config.shape,
    )


def toy_experiment(
    config: Any,
    toy: Toy,
    *,
    objective: Objective,
    run: Run,
    grid: Array,
    estimate: Callable[..., Any],
    sweeps: Mapping[str, Sequence[float]] | None = None,
    **parts: Any,
) -> Experiment:
    """A run on fresh points of a density of the plane: batches, validation, pictures and reports.

    Args:
        config: `TrainingOptions` and `ToyOptions`.
        toy: the density.
        objective: the loss, on batches {"x": [b, 2]}.
        run: (params, keys [n], **options of `sample`) ↦ points [n, 2], or all of the trajectory.
        grid: its times.
        estimate: (params, keys [n], x [n, 2], **options) ↦ log p or a bound of it.
        sweeps: of `Likelihood`.
        **parts: `init`, `process`, `denoiser` and `shape` of `Experiment`.

    Raises:
        ValueError: for an option outside its range.
    """
    mean = functools.cache(functools.partial(make_eval_step, objective, size=1024))
    sample, trajectory = samplers(run, grid, size=1000)

    def validate(params, mesh=None):
        points = {"x": toy.sample(jax.random.key(1), 4096)}
        return mean(mesh=mesh)(params, jax.random.key(2), points)

    def examples(split, key):
        splits = ("train", "validation", "test")  # all of them fresh
        return toy.sample(jax.random.fold_in(key, splits.index(split)), config.eval_points)

    def divergence(x, nll):
        # On the same points most of the statistical error cancels.
        kl, kl_stderr = metrics.mean_and_stderr(
            nll + np.asarray(jax.vmap(toy.log_prob)(x), np.float64)
        )
        entropy = float(toy.entropy)
        gap = float(nll.mean()) - entropy
        return {"entropy": entropy, "gap": gap, "kl": kl, "kl_stderr": kl_stderr}

    def evaluate(params, key, mesh=None):
        sample_key, energy_key = jax.random.split(key)
        drawn = sample(params, sample_key, config.eval_samples, mesh)
        return {"samples": evaluation.energy_report(drawn, toy, energy_key)}

    return config.experiment(
        objective=objective,
        batches=lambda: FreshBatches(toy.sample, config.batch_size, seed=config.seed),
        validate=validate,
        sample=sample,
        trajectory=trajectory,
        evaluate=evaluate,
        likelihood=Likelihood(
            examples=examples,
            estimate=estimate,
            further=divergence,
            sweeps=sweeps or {},
            size=1000,
        ),
        draw=lambda x, path: plotting.points(
            x, path, reference=toy.sample(jax.random.key(3), 2000)
        ),
        draw_trajectory=plotting.point_trajectory,
        sampler=run,
        shown=(2000, 1000),
        intervals={"log_every": 500, "eval_every": 5000, "save_every": 5000},
        **parts,
    )


def at_least(least: int, config: Any, *names: str) -> None:
    """Checks fields of a config.

    Raises:
        ValueError: names the field that is smaller.
    """
    for name in names:
        if (value := getattr(config, name)) < least:
            raise ValueError(f"{name} must be at least {least}, got {value}.")


def one_of(config: Any, **allowed: Sequence[str]) -> None:
    """Checks fields of a config.

    Raises:
        ValueError: names the field that has another value.
    """
    for name, values in allowed.items():
        if (value := getattr(config, name)) not in values:
            raise ValueError(f"{name} must be one of {', '.join(values)}, got {value!r}.")


def solved(
    log_p: Callable[..., Any],
    *,
    tolerance: float = 1e-5,
    probes: int | None = None,
    shape: tuple[int, ...] = (),
) -> Callable[..., Any]:
    """`estimate` of `Likelihood`, where it is `log_likelihood` or `joint_bound`.

    Args:
        log_p: (params, keys [n], x [n, …], **options of `log_likelihood`) ↦ its result.
        tolerance: of the solver, relative and absolute, for the worst example.
        probes: of the trace, an example; None for the exact one.
        shape: of the process's states, which bounds the number of probes.

    Returns:
        The function, whose options `tolerance`, `probes` and `per_example` can be given anew.

    Raises:
        ValueError: for a tolerance that is not positive, or a number of probes out of range.
    """
    adaptive(tolerance)
    if probes is not None:
        if probes < 1:
            raise ValueError(f"probes must be at least 1, got {probes}.")
        draw = functools.partial(trace.orthogonal, count=probes, shape=shape, dtype=jnp.float32)
        jax.eval_shape(draw, jax.random.key(0))  # or it says what they may be

    def estimate(params, keys, x, *, tolerance=tolerance, probes=probes, per_example=False):
        options = {"probes": probes, "controller": adaptive(tolerance), "per_example": per_example}
        return log_p(params, keys, x, **options)

    return estimate


def samplers(
    run: Run, grid: Array, *, size: int
) -> tuple[Callable[..., Array], Callable[[Params, Key, int], tuple[Array, Array]]]:
    """`sample` and `trajectory` of an experiment.

    Args:
        run: (params, keys [n], **options of `sample`) ↦ samples [n, …], or all of the trajectory.
        grid: its times.
        size: samples at a time, on each device.

    Returns:
        Sample i of a key is the same whatever their number and the devices of a mesh, which share
        the work if one is given; of a trajectory, eight frames.
    """
    shared = functools.cache(functools.partial(per_shard, run))

    def sample(params, key, num, mesh=None):
        if mesh is None:
            return jnp.concatenate(in_chunks(functools.partial(run, params), key, num, size=size))
        even = num + -num % mesh.size
        draw = functools.partial(shared(mesh), replicate(params, mesh))
        return jnp.concatenate(to_host(in_chunks(draw, key, even, size=size * mesh.size)))[:num]

    def trajectory(params, key, num):
        states = run(params, jax.random.split(key, num), trajectory=True)
        frames = jnp.linspace(0, len(grid) - 1, 8).astype(int)
        return states[frames], grid[frames]

    return sample, trajectory
