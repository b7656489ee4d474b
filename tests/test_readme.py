"""The README's words are true: its table, its example, and its figures are filled in."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()


def test_no_figure_is_missing():
    assert not re.findall(r"@[A-Z]+@", TEXT)


def test_method_table_points_at_files_that_cite_the_paper():
    rows = re.findall(r"^\| (.+) \| `(jaxdiff/.+)` \| ([\d.]+) \| `(tests/.+)` \|$", TEXT, re.M)
    assert len(rows) >= 15
    for method, file, paper, test in rows:
        assert paper in (ROOT / file).read_text(), (method, file, paper)
        assert (ROOT / test).is_file(), (method, test)
    # A method has its row: every sampler, objective and guidance of its own file.
    listed = {file for _, file, _, _ in rows}
    for folder in ("samplers", "objectives", "guidance"):
        for path in (ROOT / "jaxdiff" / folder).glob("*.py"):
            if path.stem not in ("__init__", "base"):
                assert str(path.relative_to(ROOT)) in listed, path


def test_example_runs_as_it_stands():
    """Every line of it, on two images, with a narrow network and few steps."""
    code = re.search(r"```python\n(.+?)```", TEXT, re.S).group(1)
    small = (
        code.replace("64", "2").replace("width=16", "width=8").replace("uniform(200", "uniform(9")
    )
    names: dict = {}
    exec(small, names)
    assert names["ll"].value.shape == (2,)
