"""Pictures: each pixel and each point stands where it belongs."""

import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jaxdiff import plotting


def cell(picture, row, column, side):
    """The pixels of one image of a grid without labels."""
    stride = side + plotting.GAP
    top, left = plotting.GAP + row * stride, plotting.GAP + column * stride
    return picture[top : top + side, left : left + side]


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_image_grid_places_and_enlarges_every_pixel(rng, tmp_path):
    levels = rng.integers(256, size=(5, 4, 6, 3))
    path = tmp_path / "made" / "grid.png"
    picture = plotting.image_grid(jnp.asarray(levels / 127.5 - 1), path, columns=3, scale=2)
    assert picture.shape == (plotting.GAP + 2 * (8 + plotting.GAP), plotting.GAP * 4 + 3 * 12, 3)
    for i in range(5):
        top, left = plotting.GAP + i // 3 * (8 + plotting.GAP), plotting.GAP + i % 3 * (12 + 4)
        block = picture[top : top + 8, left : left + 12]
        for corner in (block[::2, ::2], block[1::2, 1::2]):
            np.testing.assert_array_equal(corner, levels[i])
    np.testing.assert_array_equal(np.asarray(Image.open(path)), picture)


def test_grey_images_are_clipped_and_what_is_no_number_is_black():
    x = np.array([[-3.0, -1.0, 0.0], [1.0, np.inf, np.nan]]).reshape(1, 2, 3, 1)
    picture = plotting.image_grid(x, scale=1)
    gap = plotting.GAP
    assert picture[gap:-gap, gap:-gap].tolist() == [[0, 0, 128], [255, 255, 0]]


def test_small_images_are_enlarged_and_large_ones_left_alone():
    assert plotting.image_grid(np.zeros((1, 8, 8, 1))).shape == (64 + 8, 64 + 8)
    assert plotting.image_grid(np.zeros((1, 100, 80, 1))).shape == (100 + 8, 80 + 8)


def test_trajectory_grid_has_a_row_an_example_and_a_column_a_time(tmp_path):
    frames, examples = 4, 3
    values = np.arange(frames * examples).reshape(frames, examples)
    xs = np.broadcast_to(values[:, :, None, None, None] / 127.5 - 1, (frames, examples, 8, 8, 1))
    picture = plotting.trajectory_grid(xs, scale=8)
    for frame in range(frames):
        for example in range(examples):
            assert np.all(cell(picture, example, frame, 64) == values[frame, example])
    times = [1.0, 0.5, 0.25, 0.0]
    path = tmp_path / "trajectory.png"
    labelled = plotting.trajectory_grid(xs, path, times=times, scale=8)
    strip, below = labelled[: -len(picture)], labelled[-len(picture) :]
    np.testing.assert_array_equal(below, picture)
    ink = [(part < 128).sum() for part in np.array_split(strip, frames, axis=1)]
    assert min(ink) > 10
    assert len(set(ink)) > 1
    assert Image.open(path).size == labelled.shape[::-1]


def test_interpolation_grid_has_a_row_a_pair_and_a_column_a_weight(rng):
    xs, weights = rng.uniform(-1, 1, size=(3, 2, 8, 8, 1)), [0.0, 0.5, 1.0]
    picture = plotting.interpolation_grid(xs, scale=8)
    np.testing.assert_array_equal(picture, plotting.trajectory_grid(xs, scale=8))
    labelled = plotting.interpolation_grid(xs, weights=weights, scale=8)
    np.testing.assert_array_equal(labelled[-len(picture) :], picture)
    times = plotting.trajectory_grid(xs, times=weights, scale=8)
    assert np.any(times != labelled)  # t for w


def test_losses_are_drawn_by_noise_level(tmp_path):
    row = {"train_stderr": 0.1, "heldout_stderr": 0.2}
    levels = [row | {"t": t, "train": t, "heldout": 2.0 * t} for t in (0.25, 0.75)]
    path = tmp_path / "losses.png"
    (ax,) = plotting.loss_by_noise(levels, path).axes
    train, heldout = (container.lines[0].get_xydata().tolist() for container in ax.containers)
    assert (train, heldout) == ([[0.25, 0.25], [0.75, 0.75]], [[0.25, 0.5], [0.75, 1.5]])
    bars = ax.containers[1].lines[2][0].get_segments()[0]
    assert bars[:, 1].tolist() == pytest.approx([0.1, 0.9])
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["train", "held out"]
    assert path.stat().st_size > 1000
    (ax,) = plotting.loss_by_noise([level | {"log_snr": -level["t"]} for level in levels]).axes
    assert ax.containers[0].lines[0].get_xdata().tolist() == [-0.25, -0.75]
    assert ax.get_xlabel() == "log-SNR"


def test_labels_fit_colour_images():
    picture = plotting.trajectory_grid(np.zeros((2, 1, 8, 8, 3)), times=[1.0, 0.0])
    assert picture.shape == (16 + 64 + 8, 2 * 68 + 4, 3)


def test_points_draws_the_samples_beside_the_data_on_the_same_axes(rng, tmp_path):
    x, reference = 3 * rng.normal(size=(50, 2)), rng.normal(size=(80, 2))
    path = tmp_path / "points.png"
    figure = plotting.points(x, path, reference=reference)
    left, right = figure.axes
    np.testing.assert_allclose(left.collections[0].get_offsets(), reference)
    np.testing.assert_allclose(right.collections[0].get_offsets(), x)
    assert left.get_xlim() == left.get_ylim() == right.get_xlim() == right.get_ylim()
    low, high = left.get_xlim()
    assert reference.min() - 1 < low < reference.min()
    assert reference.max() < high < reference.max() + 1
    assert np.asarray(Image.open(path)).std() > 10
    (only,) = plotting.points(x, limits=(-1.0, 2.0)).axes
    assert only.get_xlim() == only.get_ylim() == (-1.0, 2.0)


def test_points_survive_a_diverged_sample():
    x = np.array([[0.0, 1.0], [np.nan, 2.0], [np.inf, -np.inf]])
    (ax,) = plotting.points(x).axes
    assert np.isfinite(ax.get_xlim()).all()
    (ax,) = plotting.points(x * np.nan).axes
    assert ax.get_xlim() == pytest.approx((-1.2, 1.2))


def test_point_trajectory_draws_each_time_at_its_own_scale(rng):
    xs = np.array([50.0, 1.0])[:, None, None] * rng.normal(size=(2, 30, 2))
    noise, data = plotting.point_trajectory(xs, times=[1.0, 0.001]).axes
    np.testing.assert_allclose(noise.collections[0].get_offsets(), xs[0])
    np.testing.assert_allclose(data.collections[0].get_offsets(), xs[1])
    assert (noise.get_title(), data.get_title()) == ("t = 1", "t = 0.001")
    assert noise.get_xlim()[1] > 10 * data.get_xlim()[1]


def test_histograms_share_their_bins_and_have_area_one(rng):
    groups = {"samples": rng.normal(size=300), "held out": jnp.append(jnp.arange(4.0), jnp.nan)}
    (ax,) = plotting.histogram(groups, bins=10, xlabel="distance").axes
    first, second = ax.containers
    assert [bar.get_x() for bar in first] == [bar.get_x() for bar in second]
    for bars in ax.containers:
        assert sum(bar.get_height() * bar.get_width() for bar in bars) == pytest.approx(1.0)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["samples", "held out"]


def test_likelihood_draws_the_histogram_and_each_sweep(rng):
    nll = np.append(rng.normal(3.0, 1.0, 50), np.nan)
    told = {"nll_nats_stderr": 0.1, "solver_error_nats": 0.01}
    sweeps = {
        "tolerance": [
            {"tolerance": 1e-2, "nll_nats": 3.2, "calls": 40, **told},
            {"tolerance": 1e-4, "nll_nats": None, "calls": 90, **told},
            {"tolerance": 1e-5, "nll_nats": 3.0, "calls": None, **told, "nll_nats_stderr": None},
        ]
    }
    first, second = plotting.likelihood(nll, sweeps=sweeps).axes
    assert sum(bar.get_height() for bar in first.patches) == 50
    assert first.lines[0].get_xdata()[0] == pytest.approx(np.nanmean(nll))
    assert f"{np.nanmean(nll):.2f}" in first.get_xlabel()
    (errors,) = second.containers
    assert errors.lines[0].get_xydata().tolist() == [[1e-2, 3.2], [1e-5, 3.0]]
    bars = [np.ptp(bar[:, 1]) for bar in errors.lines[2][0].get_segments()]
    np.testing.assert_allclose(bars, [2 * 0.21, 2 * 0.01])
    assert (second.get_xlabel(), second.get_xscale()) == ("tolerance", "log")
    assert [text.get_text() for text in second.texts] == ["40 calls", ""]
    (alone,) = plotting.likelihood(nll).axes
    assert sum(bar.get_height() for bar in alone.patches) == 50


def test_training_curve_draws_what_the_rows_hold():
    rows = [{"step": 10, "loss": 2.0, "steps/s": 5.0}, {"step": 20, "loss": 1.0}]
    rows += [{"step": 20, "validation/loss": 1.5}]
    (ax,) = plotting.training_curve(iter(rows)).axes
    curves = {line.get_label(): line.get_xydata().tolist() for line in ax.lines}
    assert curves == {"loss": [[10, 2], [20, 1]], "validation/loss": [[20, 1.5]]}
    assert ax.get_yscale() == "log"
    (ax,) = plotting.training_curve([{"step": 1, "loss": -1.0}, {"step": 2, "loss": -3.0}]).axes
    assert ax.get_yscale() == "linear"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plotting.image_grid(np.zeros((8, 8, 1))), r"x \[n, h, w, c\].*\(8, 8, 1\)"),
        (lambda: plotting.image_grid(np.zeros((2, 8, 8, 2))), r"c = 1 or 3.*\(2, 8, 8, 2\)"),
        (lambda: plotting.image_grid(np.zeros((0, 8, 8, 1))), "nothing empty"),
        (lambda: plotting.image_grid(np.zeros((2, 8, 8, 1)), columns=0), "columns must be >= 1"),
        (lambda: plotting.image_grid(np.zeros((2, 8, 8, 1)), scale=0), "scale must be >= 1"),
        (lambda: plotting.trajectory_grid(np.zeros((2, 8, 8, 1))), r"xs \[frames, n, h, w, c\]"),
        (
            lambda: plotting.trajectory_grid(np.zeros((2, 1, 8, 8, 1)), times=[1.0]),
            "times must have one entry a frame, 2, got 1",
        ),
        (
            lambda: plotting.interpolation_grid(np.zeros((2, 1, 8, 8, 1)), weights=[1.0]),
            "weights must have one entry a frame, 2, got 1",
        ),
        (lambda: plotting.loss_by_noise([]), "levels must hold at least one"),
        (lambda: plotting.points(np.zeros((3, 3))), r"x must be \[n, 2\]"),
        (lambda: plotting.points(np.zeros((3, 2)), reference=np.zeros((0, 2))), "reference must"),
        (lambda: plotting.points(np.zeros((3, 2)), limits=(1.0, 1.0)), "limits must be"),
        (lambda: plotting.point_trajectory(np.zeros((3, 2))), r"xs must be \[frames, n, 2\]"),
        (lambda: plotting.point_trajectory(np.zeros((1, 3, 2)), times=[]), "times must have one"),
        (lambda: plotting.histogram({}), "groups must hold at least one"),
        (lambda: plotting.histogram({"a": np.array([np.nan])}), r"groups\['a'\] must be \[n\]"),
        (lambda: plotting.histogram({"a": np.ones(2)}, bins=0), "bins must be >= 1"),
        (lambda: plotting.training_curve([{"step": 1, "mse": 2.0}]), r"have \['mse', 'step'\]"),
        (lambda: plotting.likelihood(np.full(3, np.nan)), "nll"),
        (lambda: plotting.training_curve([]), "names must occur"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_nothing_heavy_is_imported_before_it_is_needed_and_pyplot_never():
    program = """
import sys
import numpy
from jaxdiff import metrics, plotting
heavy = {"matplotlib", "PIL", "sklearn", "scipy.stats", "tensorflow", "torch"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
plotting.points(numpy.zeros((3, 2)))
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def test_a_picture_is_whole_or_as_it_was(tmp_path, monkeypatch):
    """What fails half way leaves the one before, and nothing else."""
    path = tmp_path / "grid.png"
    x = np.zeros((2, 8, 8, 1), np.float32)
    plotting.image_grid(x, path)
    before = path.read_bytes()

    def half(image, target, *_, **__):
        Path(target).write_bytes(before[:20])
        raise OSError("No space left on device")

    monkeypatch.setattr("PIL.Image.Image.save", half)
    with pytest.raises(OSError, match="No space left"):
        plotting.image_grid(x + 1, path)
    with pytest.raises(OSError, match="No space left"):
        plotting.points(np.zeros((3, 2)), tmp_path / "points.png")
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
