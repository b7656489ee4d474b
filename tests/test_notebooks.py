"""The notebooks run from top to bottom, and say at reduced size what they say at full."""

import math
import re
import sys
from pathlib import Path

import jax
import pytest

nbformat = pytest.importorskip("nbformat", reason="needs the notebooks extra")
nbclient = pytest.importorskip("nbclient", reason="needs the notebooks extra")
pytest.importorskip("ipykernel", reason="needs the notebooks extra")

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"

# What the cell tagged "parameters" is replaced by, for each notebook.
REDUCED = {
    "01_quickstart": "STEPS, BATCH, WIDTH, BLOCKS, CALLS, IMAGES = 20, 32, 8, 1, 8, 16",
    "02_processes_and_samplers": "POINTS, PATHS, FINE, BUDGETS = 1000, 12, 200, (5, 20)",
    "03_likelihood": "POINTS, MESH, STEPS, WIDTH, IMAGES, DRAWS = 300, 12, 20, 8, 16, 4",
}


def read(name):
    return nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)


def parameters(notebook):
    (cell,) = (c for c in notebook.cells if "parameters" in c.metadata.get("tags", []))
    return cell


def names(source):
    return re.findall(r"\b[A-Z]{2,}\b", re.sub("#.*", "", source))


def execute(name, folder):
    notebook = read(name)
    parameters(notebook).source = REDUCED[name]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TFDS_DATA_DIR", str(folder / "data"))
        patch.setenv("JAX_COMPILATION_CACHE_DIR", jax.config.jax_compilation_cache_dir)
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        client = nbclient.NotebookClient(
            notebook,
            timeout=600,
            kernel_name="python3",
            resources={"metadata": {"path": str(folder)}},
        )
        client.execute()
    return notebook


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    """The executed notebook."""
    return execute("01_quickstart", tmp_path_factory.mktemp("notebook"))


@pytest.fixture(scope="module")
def samplers(tmp_path_factory):
    """The executed notebook."""
    return execute("02_processes_and_samplers", tmp_path_factory.mktemp("notebook"))


@pytest.fixture(scope="module")
def likelihood(tmp_path_factory):
    """The executed notebook."""
    return execute("03_likelihood", tmp_path_factory.mktemp("notebook"))


def printed(notebook):
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "".join(o.text for o in outputs if o.output_type == "stream" and o.name == "stdout")


def test_every_notebook_is_executed():
    assert {path.stem for path in NOTEBOOKS.glob("*.ipynb")} == set(REDUCED)


@pytest.mark.parametrize("name", REDUCED)
def test_notebook_is_stored_clean(name):
    """No outputs, no counts, and the names that the test replaces are those of the notebook."""
    notebook = read(name)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None
    assert names(parameters(notebook).source) == names(REDUCED[name])
    assert "pip install" in next(c.source for c in notebook.cells if c.cell_type == "code")


def pictures(notebook):
    return [
        output.data["image/png"]
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if output.output_type in ("execute_result", "display_data") and "image/png" in output.data
    ]


def test_notebooks_draw_their_pictures(quickstart, samplers, likelihood):
    for notebook, count in ((quickstart, 6), (samplers, 6), (likelihood, 5)):
        found = pictures(notebook)
        assert len(found) == len(set(found)) == count


def test_quickstart_finds_its_numbers(quickstart):
    text = printed(quickstart)
    assert "1000 images to train on, 447 to test; (8, 8, 1), 17 grey levels" in text
    # A network that was hardly trained is a poor density, and still an invertible flow.
    (error,) = re.findall(r"root mean square error ([\d.]+);", text)
    assert float(error) < 0.02
    ((bits, stderr),) = re.findall(r"([\d.]+) ± ([\d.]+) bits/dim", text)
    assert math.log2(17) / 4 < float(bits) < 12
    assert 0 < float(stderr) < 0.1 * float(bits)


def test_quickstart_runs_on_this_interpreter(quickstart):
    version = quickstart.metadata.language_info.version
    assert version == ".".join(map(str, sys.version_info[:3]))


def test_samplers_notebook_finds_its_numbers(samplers):
    text = printed(samplers)
    moments = re.findall(r"mean ([-+.\d]+), deviation ([.\d]+); exact ([-+.\d]+), ([.\d]+)", text)
    assert len(moments) == 3
    for mean, deviation, exact_mean, exact_deviation in (map(float, row) for row in moments):
        assert abs(mean - exact_mean) < 4 * exact_deviation / 1000**0.5
        assert abs(deviation / exact_deviation - 1) < 4 / 2000**0.5
    assert "crossings of the flow's trajectories: 0" in text
    levels = [float(p) for row in re.findall(r"Smirnov p = (.+)", text) for p in row.split(", ")]
    assert len(levels) == 9
    assert min(levels) > 0.005
    smooth, rough = re.search(r"increments: ([.\d]+) of x, ([.\d]+) of v", text).groups()
    assert float(smooth) < 0.2 * float(rough)
    (best,) = re.findall(r"^20 calls: .+, ([.\d]+)$", text, re.M)
    (floor,) = re.findall(r"data to data: ([.\d]+)", text)
    assert float(best) < 2 * float(floor)


def test_likelihood_notebook_finds_its_numbers(likelihood):
    text = printed(likelihood)
    ((mean, rms),) = re.findall(r"mean error ([-+.\de]+) nats, root mean square ([.\de-]+)", text)
    assert abs(float(mean)) < 1e-3
    assert float(rms) < 5e-3
    measured, stated = (
        [float(v) for v in re.search(rf"solver, {name}: (.+)", text).group(1).split(", ")]
        for name in ("measured", "stated")
    )
    assert measured == sorted(measured, reverse=True)
    # Of leading order: from above where steps are small.
    assert all(m < 6 * s for m, s in zip(measured, stated, strict=True))
    assert measured[-1] < stated[-1]
    for row in re.findall(r"within one standard error ([.\d]+), expected ([.\d]+)", text):
        share, expected = map(float, row)
        assert abs(share - expected) < 0.1
    assert "uniform model: 4.0875 bits/dim, log2 17 = 4.0875" in text
    for name in ("grey levels, bound", "points in their cells, exact"):
        ((bits, stderr),) = re.findall(rf"{name}: ([.\d]+) ± ([.\d]+) bits/dim", text)
        assert 1.5 < float(bits) < 12.0
        assert 0.0 < float(stderr) < 0.1 * float(bits)
    (error,) = re.findall(r"largest error ([.\d]+) of", text)
    assert float(error) < 0.05
