"""Holds finished runs of the shipped configs against their gates.

    python tests/benchmarks/gates.py runs/digits runs/moons …

reads each run's eval.json, prints a line for each and exits with 1 if a gate is missed:

* digits: energy distance ≤ 3 × its null; the confident share ≥ 0.9 × that of real digits; every
  class between 4 % and 18 %; dequantised, better than a mixture of five Gaussians' 2.834 bits/dim;
* digits as levels, not dequantised: the bound below the independent categorical's 2.397 bits/dim
  and, the mark, the mixture's 2.241; energy distance as above;
* a toy, by exact likelihood: its negative log-likelihood within 0.035 nats of the entropy
  (checkerboard and rings 0.09) after a minute of training, after 50,000 updates and more within
  0.01 (0.03), and not below it by more than three standard errors;
* a table: its log-likelihood above that of the best Gaussian mixture, of the columns and of their
  logarithms.
"""

import argparse
import json
import warnings
from pathlib import Path

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture

from jaxdiff.data.tabular import load_table, whitening


def digits(report: dict) -> tuple[str, bool]:
    """A line about a run of configs/digits.py, and whether it passes."""
    likelihood, samples = report["likelihood"], report["samples"]
    counts = samples["class_counts"].values()
    shares = [count / samples["samples"] for count in counts]
    line = (
        f"{likelihood['bits_per_dim']:.4f} ± {likelihood['bits_per_dim_stderr']:.4f} bits/dim, "
        f"energy {samples['energy_over_null']:.2f} × null, confident "
        f"{samples['confident_share']:.3f} (real {samples['confident_share_test']:.3f}), "
        f"classes {min(shares):.3f} … {max(shares):.3f}"
    )
    passes = (
        samples["energy_over_null"] <= 3.0
        and samples["confident_share"] >= 0.9 * samples["confident_share_test"]
        and min(shares) >= 0.04
        and max(shares) <= 0.18
        and likelihood["bits_per_dim"] < 2.834
    )
    return line, passes


def levels(report: dict) -> tuple[str, bool]:
    """A line about a run of configs/d3pm_digits.py or vdm_digits.py, and whether it passes."""
    likelihood, samples = report["likelihood"], report["samples"]
    bits = likelihood["bits_per_dim"]
    line = (
        f"at most {bits:.4f} ± {likelihood['bits_per_dim_stderr']:.4f} bits/dim, "
        f"energy {samples['energy_over_null']:.2f} × null, confident "
        f"{samples['confident_share']:.3f} (real {samples['confident_share_test']:.3f})"
    )
    return line, bits < 2.241 and samples["energy_over_null"] <= 3.0


def toy(report: dict, name: str, steps: int) -> tuple[str, bool]:
    """A line about a run of configs/toy2d.py, and whether it passes."""
    found = report["likelihood"]
    line = (
        f"| {name} | {found['nll_nats']:.4f} ± {found['nll_nats_stderr']:.4f} "
        f"| {found['entropy']:.4f} | {found['gap']:+.4f} "
        f"| {found['kl']:.4f} ± {found['kl_stderr']:.4f} | {found['network_calls']} |"
    )
    hard, long = name in ("checkerboard", "rings"), steps >= 50_000
    most = {(False, False): 0.035, (True, False): 0.09, (False, True): 0.01, (True, True): 0.03}[
        hard, long
    ]
    return line, -3.0 * found["nll_nats_stderr"] <= found["gap"] <= most


def mixture(dataset: str, log: bool) -> float:
    """Test log-likelihood of the best of 112 Gaussian mixtures, chosen by the test rows themselves.

    They see what our model sees: the whitened columns or, with `log`, their logarithms.
    """
    rows = load_table(dataset)
    white = whitening(rows.train, log=log)
    (train, _), (test, change) = (white.forward(part) for part in (rows.train, rows.test))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        best = max(
            GaussianMixture(count, covariance_type=shape, reg_covar=floor, random_state=0)
            .fit(train)
            .score(test)
            for count in (1, 2, 3, 4, 5, 8, 10)
            for shape in ("full", "tied", "diag", "spherical")
            for floor in (1e-6, 1e-3, 1e-2, 1e-1)
        )
    return float(best + change.mean() + np.log(rows.unit).sum())


def table(report: dict, name: str) -> tuple[str, bool]:
    """A line about a run of configs/tabular.py, and whether it passes."""
    found = report["likelihood"]["log_likelihood"]
    plain, of_logs = (mixture(name, log) for log in (False, True))
    line = f"| {name} | {plain:.2f} | {of_logs:.2f} | {found:.2f} |"
    return line, found > max(plain, of_logs)


def main() -> None:
    """Checks the runs that are named."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, help="folders of finished runs")
    missed = 0
    for run in parser.parse_args().runs:
        report = json.loads((run / "eval.json").read_text())
        config = json.loads((run / "config.json").read_text())
        dataset = config["dataset"]
        if "entropy" in report["likelihood"]:
            line, passes = toy(report, dataset, config["steps"])
        elif "gaussian" in report["likelihood"]:
            line, passes = table(report, dataset)
        elif "dequantisation" in report["likelihood"]:
            line, passes = digits(report)
        else:
            line, passes = levels(report)
        print(line if passes else f"{line}  MISSED")
        missed += not passes
    raise SystemExit(min(missed, 1))


if __name__ == "__main__":
    main()
