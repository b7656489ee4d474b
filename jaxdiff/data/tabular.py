"""Tables for density estimation, and the change of variables that makes them easy.

The figure of merit is the mean log-density of held-out rows, in nats. A density has units: here
every column is measured in its standard deviation over the training rows (the sets of
Papamakarios et al. come in units of their own, and stay in them).

Columns of a table are seldom alike. Positive quantities have long right tails, and are often
products of each other (an area is a squared radius); some columns nearly repeat others, so that the
covariance is close to singular. A denoiser sees nothing finer than its least noise, and a small
network learns no scales that are a hundred times apart. So a table is first moved, by an
invertible map with a known Jacobian,

    y = log(x + c)  or  y = x,  a column,        z = Wᵀ (y − m),        Cov[z] = I,

and a model of z is one of x:  log p(x) = log p(z) + log |det ∂z/∂x|.  For z an isotropic noise is
small against every direction alike, and the denoiser of N(0, I), which EDM's preconditioning with
σ_data = 1 is before any training, is the (log-)Gaussian fit of the table: what a network learns
comes on top. Everything is fitted on training rows alone, in float64.

The published figures for the sets of Papamakarios et al. 2017 (mean test log-likelihood, nats):

=====================================  =====  =====  =======  =========  =======
model                                  POWER  GAS    HEPMASS  MINIBOONE  BSDS300
=====================================  =====  =====  =======  =========  =======
FFJORD (Grathwohl et al. 2019)         0.46   8.59   −14.92   −10.43     157.40
RQ-NSF (AR) (Durkan et al. 2019)       0.66   13.09  −14.01   −9.22      157.31
=====================================  =====  =====  =======  =========  =======
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np

__all__ = ["UCI", "Table", "Whitening", "load_table", "whitening"]

SPLITS = ("train", "validation", "test")

UCI = {
    "power": (1_659_917, 184_435, 204_928, 6),
    "gas": (852_174, 94_685, 105_206, 8),
    "hepmass": (315_123, 35_013, 174_987, 21),
    "miniboone": (29_556, 3_284, 3_648, 43),
    "bsds300": (1_000_000, 50_000, 250_000, 63),
}
"""Rows of the three splits, and columns, of the sets of Papamakarios et al. 2017, table 2."""


class Table(NamedTuple):
    """The splits of a table, rows by columns in float64, as they were measured.

    Attributes:
        train: [n, d].
        validation: [m, d].
        test: [k, d].
        unit: [d] in which the likelihood takes each column.
    """

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray
    unit: np.ndarray


class Whitening(NamedTuple):
    """z = Wᵀ(y − m) with y = log(x + c) or x, column by column; see `whitening`.

    Attributes:
        logged: [d] whether a column is taken by its logarithm.
        offset: [d] c, 0 where there is no logarithm.
        mean: [d] m.
        matrix: [d, d] W.
    """

    logged: np.ndarray
    offset: np.ndarray
    mean: np.ndarray
    matrix: np.ndarray

    def forward(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows x [n, d] ↦ z [n, d], and log |det ∂z/∂x| [n].

        Raises:
            ValueError: if a value lies where its column's logarithm does not exist.
        """
        shifted = np.where(self.logged, x + self.offset, 1.0)
        if shifted.min() <= 0:
            column = int(np.argmin(shifted.min(axis=0)))
            raise ValueError(
                f"column {column} holds {x[:, column].min():g}, and the training rows, all "
                f"positive, called for its logarithm: leave logarithms out."
            )
        y = np.where(self.logged, np.log(shifted), x)
        log_det = np.linalg.slogdet(self.matrix)[1] - np.log(shifted).sum(axis=1)
        return (y - self.mean) @ self.matrix, log_det

    def inverse(self, z: np.ndarray) -> np.ndarray:
        """z [n, d] ↦ rows x [n, d]."""
        y = np.asarray(z, np.float64) @ np.linalg.inv(self.matrix) + self.mean
        return np.where(self.logged, np.exp(np.where(self.logged, y, 0.0)) - self.offset, y)


def whitening(x: np.ndarray, *, log: bool = True, shrinkage: float = 0.0) -> Whitening:
    """Fits the change of variables to training rows.

    With C the correlation matrix of y, the covariance taken for whitening is that with the
    correlations (1 − shrinkage) C + shrinkage I.

    Args:
        x: [n, d] training rows.
        log: whether columns without a negative value are taken by their logarithm: c is 0 if all
            are positive, and a tenth of the mean if there are zeros.
        shrinkage: in [0, 1): how far correlations are trusted less. For few rows.

    Raises:
        ValueError: if shrinkage is out of range, or a column is a linear function of others.

    References:
        Ledoit and Wolf 2004, doi:10.1016/S0047-259X(03)00096-4 (shrinkage, there to a multiple of
        the identity).
    """
    if not 0.0 <= shrinkage < 1.0:
        raise ValueError(f"shrinkage must be in [0, 1), got {shrinkage}.")
    mean = x.mean(axis=0)
    logged = (x.min(axis=0) >= 0) & (mean > 0) & log
    offset = np.where(logged & (x.min(axis=0) == 0), 0.1 * mean, 0.0)
    y = np.where(logged, np.log(np.where(logged, x + offset, 1.0)), x)
    scale = y.std(axis=0)
    if not scale.all():
        raise ValueError(f"column {int(np.argmin(scale))} is constant: leave it out.")
    correlations = np.corrcoef(y, rowvar=False).reshape(len(scale), -1)
    correlations = (1 - shrinkage) * correlations + shrinkage * np.eye(len(scale))
    variances, axes = np.linalg.eigh(correlations)
    if variances[0] < 1e-10 * variances[-1]:
        columns = np.flatnonzero(np.abs(axes[:, 0]) > 0.1).tolist()
        raise ValueError(
            f"columns {columns} determine each other (least eigenvalue of the correlations "
            f"{variances[0]:.1g}): a density needs independent columns, or shrinkage > 0."
        )
    matrix = axes / np.sqrt(variances) / scale[:, None]
    return Whitening(logged, offset, y.mean(axis=0), matrix)


def load_table(dataset: str) -> Table:
    """Loads a table and cuts it into training, validation and test rows.

    `dataset` is one of

    - `breast_cancer` (569 × 30) and `wine` (178 × 13), which scikit-learn carries;
    - a `.csv` file of numbers, with or without a line of names, or an `.npz` file with an array `x`
      [n, d], or with `x_train`, `x_validation` and `x_test`;
    - `POWER.npy`, `GAS.npy`, `HEPMASS.npy`, `MINIBOONE.npy` or `BSDS300.npy` in any folder: the
      sets of Papamakarios et al. 2017 with their preprocessing, splits and units.

    What has no splits of its own is cut 70 : 10 : 20 by
    `numpy.random.RandomState(0).permutation(n)`.

    Args:
        dataset: a name or a path.

    Raises:
        ValueError: if there is no such set, or it is no table of finite numbers.

    References: Papamakarios et al. 2017, arXiv:1705.07057, appendix D.
    """
    if dataset in ("breast_cancer", "wine"):
        from sklearn import datasets

        x = getattr(datasets, f"load_{dataset}")().data
        return _in_deviations(dataset, _cut(x))
    path = Path(dataset).expanduser()
    name = path.stem.lower()
    if name in UCI and path.suffix in ("", ".npy"):
        return _uci(path, name)
    if path.suffix not in (".csv", ".npz") or not path.is_file():
        raise ValueError(
            f"dataset = {dataset!r}: need breast_cancer, wine, a .csv or .npz file, or one of "
            f"{', '.join(f'{name.upper()}.npy' for name in UCI)}"
        )
    return _in_deviations(dataset, _from_csv(path) if path.suffix == ".csv" else _from_npz(path))


def _in_deviations(dataset: str, splits: list[np.ndarray]) -> Table:
    """The table whose unit is each column's standard deviation over the training rows."""
    widths = {x.shape[1:] for x in splits}
    shapes = [x.shape for x in splits]
    if any(len(shape) != 2 or min(shape) < 2 for shape in shapes) or len(widths) > 1:
        raise ValueError(f"dataset = {dataset!r}: its splits are {shapes}, need [n ≥ 2, d ≥ 2]")
    if not all(np.isfinite(x).all() for x in splits):
        raise ValueError(f"dataset = {dataset!r}: has missing or infinite values")
    unit = splits[0].std(axis=0)
    if not unit.all():
        raise ValueError(f"dataset = {dataset!r}: column {int(np.argmin(unit))} is constant")
    train, validation, test = splits
    return Table(train, validation, test, unit)


def _cut(x: np.ndarray) -> list[np.ndarray]:
    order = np.random.RandomState(0).permutation(len(x))
    return np.split(np.asarray(x, np.float64)[order], [7 * len(x) // 10, 8 * len(x) // 10])


def _from_csv(path: Path) -> list[np.ndarray]:
    with path.open() as file:
        first = file.readline()
    try:
        skipped = 0 if [float(word) for word in first.split(",")] else 1
    except ValueError:
        skipped = 1  # a line of names
    try:
        return _cut(np.loadtxt(path, delimiter=",", skiprows=skipped, ndmin=2))
    except ValueError as error:
        raise ValueError(f"dataset = '{path}': no table of numbers ({error})") from error


def _from_npz(path: Path) -> list[np.ndarray]:
    try:
        with np.load(path) as arrays:
            if "x" in arrays:
                return _cut(arrays["x"])
            return [np.asarray(arrays[f"x_{split}"], np.float64) for split in SPLITS]
    except Exception as error:  # a damaged file raises what its decoder happens to meet
        raise ValueError(
            f"dataset = '{path}': need an array x, or x_train, x_validation and x_test ({error})"
        ) from error


def _uci(path: Path, name: str) -> Table:
    *rows, columns = UCI[name]
    if not path.is_file():
        raise ValueError(
            f"dataset = '{path}': no such file. Unpack data.tar.gz of zenodo.org/record/1161203 in "
            f"a clone of github.com/francois-rozet/uci-datasets, run its process.py (it needs h5py "
            f"and pandas<2), and give the path of {name.upper()}.npy."
        )
    x = np.load(path)
    if x.shape != (sum(rows), columns):
        raise ValueError(f"dataset = '{path}': is {x.shape}, need {(sum(rows), columns)}")
    train, validation, test = np.split(x.astype(np.float64), np.cumsum(rows)[:2])
    return Table(train, validation, test, np.ones(columns))
