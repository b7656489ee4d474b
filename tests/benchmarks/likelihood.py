"""The truth table: log-likelihoods against densities that are known exactly.

    python tests/benchmarks/likelihood.py [--points 1000]

Mixtures of Gaussians in 2, 16 and 64 dimensions under three processes, with the exact score. In
nats per dimension, a mean ± its standard error over points, and a root mean square:

* what prior and cut-off cost, which no solver mends: the flow's likelihood, in double precision at
  1e-9, against the exact density at t0; and the exact density at t0 against that of the data;
* the exact trace at each tolerance against that flow, beside what `LogLikelihood` states of the
  solver's error, and the share of points of which that is true;
* probes against the exact trace, beside the standard errors that are stated.

The tables are in Markdown. Exits with 1 unless, in two dimensions at tolerance 1e-5, the mean error
of the exact trace against the exact density is at most 1e-4 nats/dim, probes are unbiased within
three standard errors everywhere, and their error bars cover at the rate of Student's t.
"""

import argparse
import functools
import sys
import time

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

import jaxdiff as jd
from jaxdiff import trace
from jaxdiff.data.mixture import gaussian_mixture, gmm5
from jaxdiff.solve import adaptive

PROBES = (1, 4, 16)
TOLERANCES = (1e-3, 1e-4, 1e-5, 1e-6)
CUT_OFFS = (1e-2, 1e-3, 1e-4, 1e-5)


def mixture(dim: int):
    """Five round modes in the plane; four correlated components of unequal scales above."""
    if dim == 2:
        return gmm5()
    keys = jax.random.split(jax.random.key(dim), 4)
    factors = [
        (jnp.eye(dim) + 0.5 * jax.random.normal(key, (dim, dim)) / dim**0.5) * 0.4 for key in keys
    ]
    means = 0.7 * jax.random.normal(jax.random.key(0), (4, dim))
    return gaussian_mixture(
        weights=[0.4, 0.3, 0.2, 0.1],
        means=np.asarray(means),
        stds_or_covs=np.stack([np.asarray(f @ f.T) for f in factors]),
    )


def processes(data) -> dict[str, jd.Gaussian]:
    mean = jnp.asarray(data.weights) @ jnp.asarray(data.means)
    return {
        "VP": jd.Gaussian(jd.linear_beta(0.1, 20.0)),
        "sub-VP": jd.Gaussian(jd.subvp(0.1, 20.0)),
        "VE": jd.Gaussian(jd.exploding(0.01, 50.0), prior_mean=mean),
    }


class Result:
    """A likelihood, in nats per dimension, what it states of itself, and what it cost."""

    def __init__(self, data, process, x, **options):
        denoise = data.denoiser(process)
        solve = functools.partial(jd.log_likelihood, process, denoise, x, **options)
        jax.block_until_ready(solve())
        since = time.perf_counter()
        found = jax.block_until_ready(solve())
        self.seconds = time.perf_counter() - since
        self.dim = x.shape[1]
        self.calls = int(found.num_evaluations.max())
        self.value, self.stated, self.stderr = (
            np.asarray(values, np.float64) / self.dim
            for values in (found.value, found.solver_error, found.stderr)
        )


def references(data, process, x) -> tuple[np.ndarray, dict[float, np.ndarray]]:
    """In double precision, and in nats per dimension: the flow's likelihood, to 1e-9; and the
    truth, of the data as they are at each cut-off (and, at 0, as they are)."""
    with jax.enable_x64(True):
        x = jnp.asarray(np.asarray(x), jnp.float64)
        found = jd.log_likelihood(
            process,
            data.denoiser(process),
            x,
            solver=diffrax.Dopri8(),
            controller=adaptive(1e-9),
        )
        placed = {t0: data.diffused(*process.schedule(jnp.asarray(t0))) for t0 in CUT_OFFS}
        placed[0.0] = data
        truth = {t0: jax.vmap(law.log_prob)(x) for t0, law in placed.items()}
        return jax.tree.map(lambda a: np.asarray(a) / x.shape[1], (found.value, truth))


def mean_and_rms(errors: np.ndarray) -> str:
    """Mean ± its standard error over points, and root mean square, as two cells."""
    mean, rms = errors.mean(), np.sqrt(np.mean(errors**2))
    return f"{mean:+.1e} ± {errors.std() / len(errors) ** 0.5:.0e} | {rms:.1e}"


def tolerance_rows(data, process, name, x, flow):
    """Exact trace: the solver's error against tolerance, in single and in double precision."""
    for double in (False, True):
        with jax.enable_x64(double):
            points = jnp.asarray(np.asarray(x), jnp.float64 if double else jnp.float32)
            for tolerance in TOLERANCES:
                r = Result(data, process, points, controller=adaptive(tolerance))
                error = r.value - flow
                print(
                    f"| {r.dim} | {name} | {'float64' if double else 'float32'} | {tolerance:.0e} |"
                    f" {mean_and_rms(error)} | {r.stated.mean():.1e} |"
                    f" {np.mean(np.abs(error) <= r.stated):.3f} | {r.calls} | {r.seconds:.2f} |",
                    flush=True,
                )
                if not double and tolerance == 1e-5:
                    kept = r
    return kept


def probe_rows(data, process, name, x, exact) -> list[str]:
    """Probes: error against the exact trace of the same flow, and the coverage of the bars."""
    wrong = []
    for law in (trace.orthogonal, trace.rademacher, trace.gaussian):
        for count in PROBES:
            rows = 1 << (x.shape[1] - 1).bit_length()  # orthogonal ones that there are
            if law is trace.orthogonal and count > rows:
                continue
            r = Result(data, process, x, key=jax.random.key(1), probes=count, probe=law)
            noise = r.value - exact.value
            rms, mean_error = np.sqrt(np.mean(noise**2)), noise.std() / len(noise) ** 0.5
            whole = count == rows and law is trace.orthogonal
            if abs(noise.mean()) > 3 * max(mean_error, 1e-6):
                wrong.append(f"{name}, {r.dim}-d, {count} {law.__name__}: biased")
            covered = stated = "–"
            if count > 1 and not whole:
                within = float(np.mean(np.abs(noise) < r.stderr))
                expected = 2 * stats.t.cdf(1.0, count - 1) - 1
                covered = f"{within:.2f} ({expected:.2f})"
                stated = f"{np.sqrt(np.mean(r.stderr**2)):.1e}"
                if abs(within - expected) > 0.1:
                    wrong.append(f"{name}, {r.dim}-d, {count} {law.__name__}: covers {within:.2f}")
            print(
                f"| {r.dim} | {name} | {law.__name__} | {count} | {noise.mean():+.1e} ±"
                f" {mean_error:.0e} | {rms:.1e} | {stated} | {covered} | {r.calls} |"
                f" {r.seconds:.2f} |",
                flush=True,
            )
    return wrong


def hutch_plus_plus(key, matrix, products):
    """A third of the products finds the range of A, whose trace is then exact; the rest is probed.

    References: Meyer et al. 2021, arXiv:2010.09649, algorithm 1.
    """
    sketch_key, probe_key = jax.random.split(key)
    shape = (len(matrix), products // 3)
    basis, _ = jnp.linalg.qr(matrix @ jax.random.rademacher(sketch_key, shape, matrix.dtype))
    probes = jax.random.rademacher(probe_key, shape, matrix.dtype)
    probes = probes - basis @ (basis.T @ probes)
    rest = jnp.sum(probes * (matrix @ probes)) / shape[1]
    return jnp.trace(basis.T @ matrix @ basis) + rest


def law_rows(data, process, name, x):
    """Equal numbers of products with the flow's Jacobian at one time: which estimate is nearest?"""
    denoise = data.denoiser(process)

    def jacobian(x, t):
        return jax.jacobian(lambda x: process.velocity(x, denoise(x[None], t).mean[0], t))(x)

    def hadamard(law):
        def estimate(key, matrix, products):
            e, _ = law(key, products, (len(matrix),), matrix.dtype)
            return jnp.mean(jnp.sum(e * (e @ matrix.T), axis=1))

        return estimate

    laws = {
        "rademacher": hadamard(trace.rademacher),
        "orthogonal": hadamard(trace.orthogonal),
        "Hutch++": hutch_plus_plus,
    }
    keys = jax.random.split(jax.random.key(2), 50)
    for t in jnp.array([0.02, 0.1, 0.3, 0.6]):
        matrices = jax.vmap(lambda x, t=t: jacobian(x, t))(x[:50])
        exact = jnp.trace(matrices, axis1=1, axis2=2)
        for products in (3, 6, 12):
            if products > x.shape[1]:
                continue
            cells = []
            for law in laws.values():
                one = functools.partial(law, products=products)
                error = jax.vmap(jax.vmap(one, (0, None)), (None, 0))(keys, matrices)
                error = error - exact[:, None]
                cells.append(f"{float(jnp.sqrt(jnp.mean(error**2))) / x.shape[1]:.1e}")
            print(
                f"| {x.shape[1]} | {name} | {float(t):.2f} | {products} | {' | '.join(cells)} |",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--points", type=int, default=1000, help="test points; in 64-d a quarter")
    parser.add_argument("--dims", type=int, nargs="+", default=[2, 16, 64])
    args = parser.parse_args()
    wrong, exact = [], {}
    cases = [
        (dim, name, data, process, x, references(data, process, x))
        for dim in args.dims
        for data in [mixture(dim)]
        for x in [data.sample(jax.random.key(7), args.points // max(1, dim // 16))]
        for name, process in processes(data).items()
    ]
    print("| dim | process | cause | mean error | rms |")
    print("|---|---|---|---|---|")
    for dim, name, _, _, _, (flow, truth) in cases:
        prior = flow - truth[CUT_OFFS[-1]]
        print(f"| {dim} | {name} | prior | {mean_and_rms(prior)} |")
        for t0 in CUT_OFFS:
            print(f"| {dim} | {name} | t0 {t0:.0e} | {mean_and_rms(truth[t0] - truth[0.0])} |")
    print(
        "\n| dim | process | dtype | tolerance | mean error | rms | stated | covered | calls | s |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for dim, name, data, process, x, (flow, truth) in cases:
        exact[dim, name] = tolerance_rows(data, process, name, x, flow)
        mean = (exact[dim, name].value - truth[CUT_OFFS[-1]]).mean()
        if dim == 2 and abs(mean) > 1e-4:
            wrong.append(f"{name}: mean error {mean:.1e} nats/dim at 1e-5 in two dimensions")
    print(
        "\n| dim | process | probes | K | mean error | rms | stated | within 1 s.e. (Student) |"
        " calls | s |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for dim, name, data, process, x, _ in cases:
        wrong += probe_rows(data, process, name, x, exact[dim, name])
    print("\nrms error of the trace over D, at equal products with the Jacobian\n")
    print("| dim | process | t | products | rademacher | orthogonal | Hutch++ |")
    print("|---|---|---|---|---|---|---|")
    for _, name, data, process, x, _ in cases:
        if x.shape[1] > 2:
            law_rows(data, process, name, x)
    for line in wrong:
        print("WRONG:", line)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
