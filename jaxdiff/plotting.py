"""Pictures of samples, of their way from noise to data, and of training.

Grids of images are made pixel by pixel, so that every pixel of an 8×8 digit is a sharp square, and
need Pillow only; plots need matplotlib, through its figure objects: nothing here touches pyplot,
a style or a display. With a path the picture is written there, its folders made; it is returned
either way.
"""

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Real, UInt8

from jaxdiff.typing import Array

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "histogram",
    "image_grid",
    "interpolation_grid",
    "likelihood",
    "loss_by_noise",
    "point_trajectory",
    "points",
    "training_curve",
    "trajectory_grid",
]

Samples = Real[np.ndarray, "..."] | Real[Array, "..."]
Picture = UInt8[np.ndarray, "_ _ *_"]
Target = str | PathLike[str] | None

TILE = 64
"""Small images are enlarged to about this many pixels."""
GAP = 4
"""Pixels between two images."""
GREY = 128
"""The colour of gaps: white strokes and white noise would run into white ones."""
WHITE = 255


def image_grid(
    x: Samples,
    path: Target = None,
    *,
    columns: int | None = None,
    scale: int | None = None,
) -> Picture:
    """Images side by side, row by row, each pixel enlarged to a sharp square.

    Args:
        x: [n, h, w, c] with c = 1 (grey) or 3 (red, green, blue), n ≥ 1, in [−1, 1]; what lies
            outside is clipped, and what is no number is drawn black.
        path: where to write the picture, as .png; None to only return it.
        columns: images in a row, ≥ 1; by default as many as rows.
        scale: the side of an enlarged pixel, ≥ 1; by default an image is about 64 pixels large.

    Returns:
        The picture, [height, width] if grey, else [height, width, 3].

    Raises:
        ValueError: x has another shape, or columns or scale is below 1.
    """
    images = _pixels(x, "x [n, h, w, c]", 4)
    columns = math.ceil(math.sqrt(len(images))) if columns is None else columns
    if columns < 1:
        raise ValueError(f"columns must be >= 1, got {columns}")
    rows = math.ceil(len(images) / columns)
    blank = np.full((rows * columns - len(images), *images.shape[1:]), GREY, np.uint8)
    tiles = np.concatenate([images, blank]).reshape(rows, columns, *images.shape[1:])
    return _write(_mosaic(tiles, scale), path)


def trajectory_grid(
    xs: Samples,
    path: Target = None,
    *,
    times: Sequence[float] | None = None,
    scale: int | None = None,
) -> Picture:
    """Images on their way from noise to data: a row for each example, a column for each time.

    Args:
        xs: [frames, n, h, w, c] in the order of the columns, so noise first; values as in
            `image_grid`.
        path: where to write the picture, as .png; None to only return it.
        times: [frames], the times that are written over the columns.
        scale: the side of an enlarged pixel, ≥ 1; by default an image is about 64 pixels large.

    Returns:
        The picture, [height, width] if grey, else [height, width, 3].

    Raises:
        ValueError: xs has another shape, times another length, or scale is below 1.
    """
    return _rows_of_frames(xs, path, "t", "times", times, scale)


def interpolation_grid(
    xs: Samples,
    path: Target = None,
    *,
    weights: Sequence[float] | None = None,
    scale: int | None = None,
) -> Picture:
    """Images on their way from one to another: a row for each pair, a column for each weight.

    Args:
        xs: [weights, n, h, w, c], as `latents.interpolate` returns them; values as in
            `image_grid`.
        path: where to write the picture, as .png; None to only return it.
        weights: [weights], the shares of the second image that are written over the columns.
        scale: the side of an enlarged pixel, ≥ 1; by default an image is about 64 pixels large.

    Returns:
        The picture, [height, width] if grey, else [height, width, 3].

    Raises:
        ValueError: xs has another shape, weights another length, or scale is below 1.
    """
    return _rows_of_frames(xs, path, "w", "weights", weights, scale)


def points(
    x: Samples,
    path: Target = None,
    *,
    reference: Samples | None = None,
    limits: tuple[float, float] | None = None,
) -> "Figure":
    """A scatter plot of points in the plane, beside the data that they should look like.

    Args:
        x: [n, 2], n ≥ 1.
        path: where to write the plot, as .png, .pdf or .svg; None to only return it.
        reference: data [m, 2], drawn on the left.
        limits: (low, high) of both axes; by default what the reference, or else x, spans.

    Returns:
        The matplotlib figure.

    Raises:
        ValueError: x or reference is not [n, 2], or limits is not low < high.
    """
    panels = {"samples": _plane(x, "x", 2)}
    if reference is not None:
        panels = {"data": _plane(reference, "reference", 2), **panels}
    limits = _span(next(iter(panels.values()))) if limits is None else limits
    figure, axes = _panels(len(panels))
    for ax, (title, values) in zip(axes, panels.items(), strict=True):
        _scatter(ax, values, limits)
        ax.set_title(f"{title} (n = {len(values)})")
    return _save(figure, path)


def point_trajectory(
    xs: Samples,
    path: Target = None,
    *,
    times: Sequence[float] | None = None,
    limits: tuple[float, float] | None = None,
) -> "Figure":
    """Points in the plane on their way from noise to data: a scatter plot for each time.

    Args:
        xs: [frames, n, 2] in the order of the plots, so noise first.
        path: where to write the plot, as .png, .pdf or .svg; None to only return it.
        times: [frames], the times that are written over the plots.
        limits: (low, high) of both axes of every plot; by default each spans its own points,
            because the noise of some processes is far wider than the data.

    Returns:
        The matplotlib figure.

    Raises:
        ValueError: xs is not [frames, n, 2], times has another length, or limits is not low < high.
    """
    frames = _plane(xs, "xs", 3)
    if times is not None:
        _check_frames("times", times, len(frames))
    figure, axes = _panels(len(frames))
    for i, (ax, values) in enumerate(zip(axes, frames, strict=True)):
        _scatter(ax, values, _span(values) if limits is None else limits)
        if times is not None:
            ax.set_title(f"t = {times[i]:.3g}")
    return _save(figure, path)


def histogram(
    groups: Mapping[str, Samples],
    path: Target = None,
    *,
    bins: int = 40,
    xlabel: str = "",
) -> "Figure":
    """Histograms of several sets of numbers over each other, each with area one.

    Args:
        groups: {name: numbers [n], n ≥ 1}, for example distances of samples and of held-out data;
            numbers that are not finite are left out.
        path: where to write the plot, as .png, .pdf or .svg; None to only return it.
        bins: the number of bins, ≥ 1, over the range of all sets.
        xlabel: what the numbers are, with their unit.

    Returns:
        The matplotlib figure.

    Raises:
        ValueError: there is no set, one has no finite number or is not [n], or bins is below 1.
    """
    if not groups:
        raise ValueError("groups must hold at least one set of numbers, got none")
    if bins < 1:
        raise ValueError(f"bins must be >= 1, got {bins}")
    numbers = {name: _finite(values, f"groups[{name!r}]") for name, values in groups.items()}
    edges = np.histogram_bin_edges(np.concatenate(list(numbers.values())), bins)
    figure = _figure(6.0, 4.0)
    ax = figure.subplots()
    for name, values in numbers.items():
        ax.hist(values, list(edges), density=True, alpha=0.5, label=name)
    ax.set_xlabel(xlabel)
    ax.set_ylabel("density")
    ax.legend()
    return _save(figure, path)


def likelihood(
    nll: Samples,
    path: Target = None,
    *,
    sweeps: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
) -> "Figure":
    """Negative log-likelihoods of a data set, and how accurately they are known.

    Args:
        nll: [n], n ≥ 1, in nats; numbers that are not finite are left out.
        path: where to write the plot, as .png, .pdf or .svg; None to only return it.
        sweeps: from `likelihood_sweeps`: a panel for each option of the estimate, with the mean
            against its values and bars of what the estimate itself states: two standard errors of
            the probes and the solver's error.

    Returns:
        The matplotlib figure.

    Raises:
        ValueError: nll has no finite number or is not [n].
    """
    numbers, sweeps = _finite(nll, "nll"), sweeps or {}
    figure = _figure(5.0 * (1 + len(sweeps)), 4.0)
    axes = figure.subplots(1, 1 + len(sweeps), squeeze=False)[0]
    axes[0].hist(numbers, 40)
    axes[0].axvline(numbers.mean(), color="black", linewidth=1)
    axes[0].set_xlabel(f"−log p, nats; mean {numbers.mean():.2f}")
    axes[0].set_ylabel("examples")
    for ax, (name, rows) in zip(axes[1:], sweeps.items(), strict=True):
        told = [row for row in rows if row["nll_nats"] is not None]
        bars = [2 * (row["nll_nats_stderr"] or 0) + (row["solver_error_nats"] or 0) for row in told]
        ax.errorbar(
            [row[name] for row in told],
            [row["nll_nats"] for row in told],
            yerr=bars,
            marker="o",
            capsize=3,
        )
        for row in told:
            calls = "" if row["calls"] is None else f"{row['calls']} calls"
            place = (row[name], row["nll_nats"])
            ax.annotate(
                calls, place, (6, 6), textcoords="offset points", ha="left", va="bottom", fontsize=8
            )
        ax.margins(x=0.2)
        ax.set_xscale("log")
        ax.set_xlabel(name)
        ax.set_ylabel("mean −log p, nats, of the first examples")
        ax.grid(alpha=0.3)
    return _save(figure, path)


def training_curve(
    rows: Iterable[Mapping[str, Any]],
    path: Target = None,
    *,
    names: Sequence[str] = ("loss", "validation/loss"),
) -> "Figure":
    """Logged numbers against the training step, on a logarithmic axis if all are positive.

    Args:
        rows: what the training loop logged, {"step": int, name: float, ...} each; a row may lack a
            name, and a number that is not finite leaves a gap.
        path: where to write the plot, as .png, .pdf or .svg; None to only return it.
        names: the numbers to draw; those that no row has are left out.

    Returns:
        The matplotlib figure.

    Raises:
        ValueError: no row has any of the names.
    """
    rows = list(rows)
    curves = {name: [(row["step"], row[name]) for row in rows if name in row] for name in names}
    curves = {name: np.asarray(curve, float) for name, curve in curves.items() if curve}
    if not curves:
        known = sorted({name for row in rows for name in row})
        raise ValueError(f"names must occur in the rows, which have {known}, got {list(names)}")
    figure = _figure(6.0, 4.0)
    ax = figure.subplots()
    for name, curve in curves.items():
        ax.plot(curve[:, 0], curve[:, 1], label=name, linewidth=1, marker="." * (len(curve) < 50))
    if all((curve[:, 1] > 0).all() for curve in curves.values()):
        ax.set_yscale("log")
    ax.set_xlabel("step")
    ax.grid(alpha=0.3)
    ax.legend()
    return _save(figure, path)


def loss_by_noise(levels: Sequence[Mapping[str, float]], path: Target = None) -> "Figure":
    """Losses of training and of held-out images by noise level, with two standard errors.

    Args:
        levels: the "levels" of `evaluation.overfitting_report`, {"t", "train", "train_stderr",
            "heldout", "heldout_stderr"} each; not empty. With "log_snr" they are drawn against
            that, else against t.
        path: where to write the plot, as .png, .pdf or .svg; None to only return it.

    Returns:
        The matplotlib figure.

    Raises:
        ValueError: levels is empty.
    """
    if not levels:
        raise ValueError("levels must hold at least one noise level, got none")
    figure = _figure(6.0, 4.0)
    ax = figure.subplots()
    axis, label = ("log_snr", "log-SNR") if "log_snr" in levels[0] else ("t", "t")
    x = [level[axis] for level in levels]
    for name, title in (("train", "train"), ("heldout", "held out")):
        mean = [level[name] for level in levels]
        spread = [2.0 * level[f"{name}_stderr"] for level in levels]
        ax.errorbar(x, mean, yerr=spread, label=title, marker=".", capsize=2)
    ax.set_xlabel(label)
    ax.set_ylabel("denoising loss")
    ax.grid(alpha=0.3)
    ax.legend()
    return _save(figure, path)


def _rows_of_frames(
    xs: Samples,
    path: Target,
    symbol: str,
    name: str,
    values: Sequence[float] | None,
    scale: int | None,
) -> Picture:
    """A row for each example and a column for each frame, under what belongs to the frame."""
    frames = _pixels(xs, "xs [frames, n, h, w, c]", 5)
    grid = _mosaic(frames.swapaxes(0, 1), scale)
    if values is not None:
        _check_frames(name, values, len(frames))
        grid = np.concatenate([_labels(symbol, values, grid), grid])
    return _write(grid, path)


def _pixels(x: Samples, what: str, ndim: int) -> UInt8[np.ndarray, "..."]:
    array = np.asarray(x, np.float32)
    if array.ndim != ndim or array.size == 0 or array.shape[-1] not in (1, 3):
        raise ValueError(f"{what} must have c = 1 or 3 and nothing empty, got shape {array.shape}")
    levels = np.clip(np.nan_to_num(array, nan=-1.0), -1, 1) * 127.5 + 127.5
    return np.round(levels).astype(np.uint8)


def _mosaic(tiles: UInt8[np.ndarray, "rows columns h w c"], scale: int | None) -> Picture:
    rows, columns, h, w, c = tiles.shape
    scale = math.ceil(TILE / max(h, w)) if scale is None else scale
    if scale < 1:
        raise ValueError(f"scale must be >= 1, got {scale}")
    tiles = tiles.repeat(scale, axis=2).repeat(scale, axis=3)
    tiles = np.pad(tiles, ((0, 0), (0, 0), (0, GAP), (0, GAP), (0, 0)), constant_values=GREY)
    grid = tiles.swapaxes(1, 2).reshape(rows * (h * scale + GAP), columns * (w * scale + GAP), c)
    grid = np.pad(grid, ((GAP, 0), (GAP, 0), (0, 0)), constant_values=GREY)
    return grid[..., 0] if c == 1 else grid


def _labels(symbol: str, values: Sequence[float], grid: Picture) -> Picture:
    """A white strip, as wide as the grid, with a value over each column."""
    from PIL import Image, ImageDraw

    strip = Image.fromarray(np.full((16, *grid.shape[1:]), WHITE, np.uint8))
    draw = ImageDraw.Draw(strip)
    column = (grid.shape[1] - GAP) / len(values)
    for i, value in enumerate(values):
        # The third argument, black, fits a grey strip and a coloured one.
        draw.text((GAP + (i + 0.5) * column, 8), f"{symbol} = {value:.3g}", "black", anchor="mm")
    return np.asarray(strip)


def _check_frames(name: str, values: Sequence[float], frames: int) -> None:
    if len(values) != frames:
        raise ValueError(f"{name} must have one entry a frame, {frames}, got {len(values)}")


def _write(picture: Picture, path: Target) -> Picture:
    from PIL import Image

    if path is not None:
        with _in_one_piece(path) as partial:
            Image.fromarray(picture).save(partial)
    return picture


def _plane(x: Samples, name: str, ndim: int) -> Real[np.ndarray, "*batch 2"]:
    array = np.asarray(x)
    if array.ndim != ndim or array.size == 0 or array.shape[-1] != 2:
        shape = "[n, 2]" if ndim == 2 else "[frames, n, 2]"
        raise ValueError(f"{name} must be {shape} and not empty, got shape {array.shape}")
    return array


def _finite(values: Samples, name: str) -> Real[np.ndarray, " n"]:
    array = np.asarray(values)
    finite = array[np.isfinite(array)]
    if array.ndim != 1 or finite.size == 0:
        raise ValueError(f"{name} must be [n] with a finite number, got shape {array.shape}")
    return finite


def _span(x: Real[np.ndarray, "n 2"]) -> tuple[float, float]:
    """An interval that holds both coordinates of nearly all points, and a margin."""
    finite = x[np.isfinite(x)]
    low, high = np.quantile(finite, (0.001, 0.999)) if finite.size else (-1.0, 1.0)
    margin = 0.1 * (high - low) or 1.0
    return float(low - margin), float(high + margin)


def _scatter(ax: "Axes", x: Real[np.ndarray, "n 2"], limits: tuple[float, float]) -> None:
    if not limits[0] < limits[1]:
        raise ValueError(f"limits must be (low, high) with low < high, got {limits}")
    # Ink in proportion to the square root of n: a few points are seen, many do not clot.
    size = min(20.0, 300.0 / math.sqrt(len(x)))
    ax.scatter(x[:, 0], x[:, 1], s=size, alpha=0.4, linewidths=0, rasterized=True)
    ax.set(xlim=limits, ylim=limits, aspect="equal")


def _panels(count: int) -> "tuple[Figure, Sequence[Axes]]":
    figure = _figure(3.0 * count, 3.2)
    return figure, figure.subplots(1, count, squeeze=False)[0]


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: "Figure", path: Target) -> "Figure":
    if path is not None:
        with _in_one_piece(path) as partial:
            figure.savefig(partial, dpi=150)
    return figure


@contextlib.contextmanager
def _in_one_piece(path: str | PathLike[str]) -> Iterator[Path]:
    """A file beside the path that takes its place when it is whole."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}")  # the suffix is the format
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
