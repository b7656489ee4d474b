"""Holds finished runs of the shipped configs against their gates.

    python tests/benchmarks/gates.py runs/digits runs/moons …

reads each run's eval.json, prints a line for each and exits with 1 if a gate is missed:

* digits: energy distance ≤ 3 × its null; the confident share ≥ 0.9 × that of real digits; every
  class between 4 % and 18 %; better than one Gaussian's 2.967 bits/dim (a mixture of five: 2.834);
* digits as classes: its bound below the independent categorical's 2.397 bits/dim and, the mark, the
  mixture's 2.241; energy distance as above;
* a toy, by exact likelihood: its negative log-likelihood within 0.035 nats of the entropy
  (checkerboard and rings 0.09), and not below it by more than three standard errors.
"""

import argparse
import json
from pathlib import Path


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
        and likelihood["bits_per_dim"] < 2.967
    )
    return line, passes


def classes(report: dict) -> tuple[str, bool]:
    """A line about a run of configs/d3pm_digits.py, and whether it passes."""
    likelihood, samples = report["likelihood"], report["samples"]
    bits = likelihood["bits_per_dim"]
    line = (
        f"at most {bits:.4f} ± {likelihood['bits_per_dim_stderr']:.4f} bits/dim, "
        f"energy {samples['energy_over_null']:.2f} × null, confident "
        f"{samples['confident_share']:.3f} (real {samples['confident_share_test']:.3f})"
    )
    return line, bits < likelihood["mixture_bits_per_dim"] and samples["energy_over_null"] <= 3.0


def toy(report: dict, name: str) -> tuple[str, bool]:
    """A line about a run of configs/toy2d.py, and whether it passes."""
    found = report["likelihood"]
    line = (
        f"| {name} | {found['nll_nats']:.4f} ± {found['nll_nats_stderr']:.4f} "
        f"| {found['entropy']:.4f} | {found['gap']:+.4f} "
        f"| {found['kl']:.4f} ± {found['kl_stderr']:.4f} | {found['network_calls']} |"
    )
    most = 0.09 if name in ("checkerboard", "rings") else 0.035
    return line, -3.0 * found["nll_nats_stderr"] <= found["gap"] <= most


def main() -> None:
    """Checks the runs that are named."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, help="folders of finished runs")
    missed = 0
    for run in parser.parse_args().runs:
        report = json.loads((run / "eval.json").read_text())
        dataset = json.loads((run / "config.json").read_text())["dataset"]
        if "entropy" in report["likelihood"]:
            line, passes = toy(report, dataset)
        elif "mixture_bits_per_dim" in report["likelihood"]:
            line, passes = classes(report)
        else:
            line, passes = digits(report)
        print(line if passes else f"{line}  MISSED")
        missed += not passes
    raise SystemExit(min(missed, 1))


if __name__ == "__main__":
    main()
