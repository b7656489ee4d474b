"""The likelihood of a data set: a row an example, resumed where it was stopped.

Example i has the key fold_in(key, i), and chunks begin at multiples of their size: so a table that
was begun yesterday ends as if it had never been interrupted. It holds a fingerprint of parameters,
data, key and chunk size in each row; rows of anything else are not gone on with. (How an estimate
is made is no part of it: another estimate wants another file.)
"""

import csv
import functools
import math
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxdiff import metrics
from jaxdiff.compile import jit
from jaxdiff.experiment import Likelihood
from jaxdiff.parallel import from_first, per_shard, replicate, to_host
from jaxdiff.typing import Key, Params

__all__ = ["in_chunks", "likelihood_report", "likelihood_rows", "likelihood_sweeps"]

# Columns, and what an estimate calls them; the first is minus that, and alone always there.
_COLUMNS = {
    "nll_nats": "value",
    "stderr_nats": "stderr",
    "solver_error_nats": "solver_error",
    "calls": "num_evaluations",
    "converged": "converged",
}

Row = dict[str, Any]


def in_chunks(
    run: Callable[..., Any], key: Key, count: int, *arrays: Any, size: int = 256
) -> list[Any]:
    """Runs run(keys, *parts) over chunks of equal size, and cuts the excess off the last.

    Example i has the key fold_in(key, i) whatever the chunk size, and one compiled program serves
    all chunks.

    Args:
        run: (keys [size], *parts [size, …]) ↦ a tree of arrays [size, …].
        key: the key of all.
        count: number of examples n, ≥ 1.
        *arrays: trees of arrays [n, …], cut into chunks alongside.
        size: examples at a time, ≥ 1.

    Returns:
        The result of each chunk, the last cut to what is left.
    """
    return list(_chunks(run, key, count, arrays, size))


def likelihood_rows(
    likelihood: Likelihood,
    params: Params,
    examples: Any,
    key: Key,
    *,
    path: Path | None = None,
    mesh: Mesh | None = None,
    progress: bool = False,
) -> dict[str, np.ndarray]:
    """The negative log-likelihood of each example, with its errors.

    Examples whose chunk did not converge are tried again, with steps of their own, if the estimate
    solves an equation.

    Args:
        likelihood: of the run.
        params: of the model.
        examples: a tree of arrays [n, …].
        key: of the estimate's noise.
        path: a .csv file that gets a row an example, chunk by chunk. If it holds rows of the same
            model, data and key, those are kept and the rest is computed.
        mesh: devices that share a chunk, each with steps of its own; if they are of several
            processes, each calls this, and the first one reads and writes the file.
        progress: whether to show a bar.

    Returns:
        Columns [n]: "index", "nll_nats", where the run has it "bits_per_dim", and what the estimate
        tells of "stderr_nats", "solver_error_nats", "calls" and "converged".

    Raises:
        ValueError: if there are no examples.
    """
    from tqdm import tqdm

    count = len(jax.tree.leaves(examples)[0])
    if count == 0:
        raise ValueError("examples must hold one at least, got none.")
    mesh = mesh if mesh is not None and count >= mesh.size else None  # else some had nothing
    devices = 1 if mesh is None else mesh.size
    size = min(likelihood.size * devices, count // devices * devices)
    on_host = to_host(params)
    if mesh is not None:
        params = replicate(params, mesh)
    elif jax.process_count() > 1:  # of which each does the same
        params = jax.device_put(on_host)
    fingerprint = f"{_fingerprint((on_host, examples, jax.random.key_data(key), size)):08x}"
    rows = from_first([] if path is None else _read(path, fingerprint, size, count))
    path = path if jax.process_index() == 0 else None
    solve = _solver(likelihood.estimate, mesh, _solves(likelihood))
    run, begun = functools.partial(solve, params), False
    progress = progress and jax.process_index() == 0
    with tqdm(initial=len(rows), total=count, unit="example", disable=not progress) as bar:
        for found in _chunks(run, key, count, (examples,), size, start=len(rows)):
            fresh = _rows(likelihood, found, len(rows), fingerprint)
            if path is not None and begun:
                _append(path, fresh)
            elif path is not None:
                # Rows of anything else stay until there is something to put in their place.
                _begin(path, rows + fresh)
                begun = True
            rows += fresh
            bar.update(len(fresh))
    names = [name for name in rows[0] if name != "fingerprint"]
    return {name: np.asarray([row[name] for row in rows]) for name in names}


def likelihood_report(
    likelihood: Likelihood, examples: Any, rows: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    """The mean negative log-likelihood of a data set, ready for JSON.

    Args:
        likelihood: of the run.
        examples: the tree of arrays [n, …] that the rows are of.
        rows: from `likelihood_rows`.

    Returns:
        Means over the examples that have a value, in nats and bits/dim, with their standard errors;
        the mean standard error of an example's probes and the mean of its solver's error; the
        largest number of network calls; "failed", the indices of those without a value, which the
        means leave out; and what the run adds.
    """
    nll = rows["nll_nats"]
    good = np.isfinite(nll)
    report: dict[str, Any] = {"examples": len(nll), "failed": np.flatnonzero(~good).tolist()}
    if good.sum() < 2:
        return report | {"no_mean": f"{good.sum()} of {len(nll)} examples have a value; it takes 2"}
    for name in ("nll_nats", "bits_per_dim"):
        if name in rows:
            report[name], report[f"{name}_stderr"] = metrics.mean_and_stderr(rows[name][good])
    for name, kept in (("stderr_nats", "probe_stderr_nats"), ("solver_error_nats",) * 2):
        if name in rows:
            # One probe has no spread to tell its error by; fixed steps have no error to tell.
            report[kept] = _number(rows[name][good].mean())
    if "calls" in rows:
        report["network_calls"] = int(rows["calls"].max())
    if likelihood.further is not None:
        report |= likelihood.further(jax.tree.map(lambda a: a[good], examples), nll[good])
    return report


def likelihood_sweeps(
    likelihood: Likelihood, params: Params, examples: Any, key: Key, *, count: int = 64
) -> dict[str, list[dict[str, Any]]]:
    """The mean negative log-likelihood of a few examples against each accuracy of the estimate.

    Args:
        likelihood: of the run; its `sweeps` are run.
        params: of the model.
        examples: a tree of arrays [n, …].
        key: of the estimate's noise, as in `likelihood_rows`.
        count: the first so many examples are taken.

    Returns:
        For each name, a row a value: {name: value, "nll_nats", "nll_nats_stderr" of the probes,
        "solver_error_nats", "calls"}, of the examples that have a value; what the estimate does not
        tell is None.
    """
    part = jax.tree.map(lambda a: a[:count], examples)
    size = len(jax.tree.leaves(part)[0])

    solve = _solver(likelihood.estimate, None, _solves(likelihood))

    def row(name, value):
        # As an array it is traced: one program for all tolerances, and one a number of probes.
        option = jnp.asarray(value) if isinstance(value, float) else value
        run = functools.partial(solve, params, **{name: option})
        (found,) = in_chunks(run, key, size, part, size=size)
        good = np.isfinite(found["nll_nats"])

        def mean(column, power=1):
            if column not in found or not good.any():
                return None
            return _number((found[column][good] ** power).mean(dtype=np.float64))

        variance = mean("stderr_nats", 2)
        return {
            name: value,
            "nll_nats": mean("nll_nats"),
            "nll_nats_stderr": None if variance is None else math.sqrt(variance / good.sum()),
            "solver_error_nats": mean("solver_error_nats"),
            "calls": int(found["calls"].max()) if "calls" in found else None,
        }

    return {
        name: [row(name, value) for value in values] for name, values in likelihood.sweeps.items()
    }


def _chunks(
    run: Callable[..., Any],
    key: Key,
    count: int,
    arrays: Sequence[Any],
    size: int,
    start: int = 0,
) -> Iterator[Any]:
    """The results of chunks, from the example `start` on, which begins one."""
    size = min(size, count)
    for first in range(start, count, size):
        # The last chunk starts earlier, to have the same shape, and drops what came before.
        begin = min(first, count - size)
        index = jnp.arange(begin, begin + size)
        keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, index)
        parts = jax.tree.map(lambda a, i=begin: jnp.asarray(a[i : i + size]), tuple(arrays))
        yield jax.tree.map(lambda a, n=first - begin: a[n:], run(keys, *parts))


def _solves(likelihood: Likelihood) -> bool:
    """Whether the estimate solves an equation, and so may fail and be tried again."""
    return "tolerance" in likelihood.sweeps


def _solver(
    estimate: Callable[..., Any], mesh: Mesh | None, retry: bool
) -> Callable[..., dict[str, np.ndarray]]:
    """(params, keys, examples) ↦ columns, on the host."""
    # One program for all chunks and, where nothing is bound to the function, for all calls.
    compiled = jit if mesh is None else functools.partial(per_shard, mesh=mesh)
    whole = compiled(estimate)
    alone = compiled(functools.partial(estimate, per_example=True)) if retry else None

    def columns(run, *args, **options):
        found = run(*args, **options)
        told = {name: getattr(found, of) for name, of in _COLUMNS.items() if hasattr(found, of)}
        columns = to_host(told)
        return columns | {"nll_nats": -columns["nll_nats"].astype(np.float64)}

    def solve(params, keys, examples, **options):
        found = columns(whole, params, keys, examples, **options)
        if alone is not None and not found["converged"].all():
            again = columns(alone, params, keys, examples, **options)
            found = {n: np.where(found["converged"], found[n], again[n]) for n in found}
        return found

    return solve


def _rows(
    likelihood: Likelihood, found: Mapping[str, np.ndarray], first: int, fingerprint: str
) -> list[Row]:
    bits = {} if likelihood.bits is None else {"bits_per_dim": likelihood.bits(found["nll_nats"])}
    columns = {"nll_nats": found["nll_nats"]} | bits | {n: found[n] for n in _COLUMNS if n in found}
    columns = {name: values.tolist() for name, values in columns.items()}
    return [
        {"index": first + i, "fingerprint": fingerprint, **dict(zip(columns, values, strict=True))}
        for i, values in enumerate(zip(*columns.values(), strict=True))
    ]


def _read(path: Path, fingerprint: str, size: int, count: int) -> list[Row]:
    """The rows of whole chunks of the same work that a file begins with."""
    rows: list[Row] = []
    if path.is_file():
        # A last line without its end was being written.
        whole = path.read_text().rpartition("\n")[0].splitlines()
        for line in csv.DictReader(whole):
            if line.get("fingerprint") != fingerprint or line.get("index") != str(len(rows)):
                break
            try:
                rows.append({name: _value(name, text) for name, text in line.items()})
            except (KeyError, TypeError, ValueError):
                break
    return rows[:count] if len(rows) >= count else rows[: len(rows) // size * size]


def _value(name: str, text: str) -> Any:
    if name == "fingerprint":
        return text
    if name == "converged":
        return {"True": True, "False": False}[text]
    return int(text) if name in ("index", "calls") else float(text)


def _begin(path: Path, rows: Sequence[Row]) -> None:
    """A file of the rows that are kept, in one piece."""
    partial = path.with_suffix(".tmp")
    partial.write_text("")
    _append(partial, rows)
    partial.replace(path)


def _append(path: Path, rows: Sequence[Row]) -> None:
    with path.open("a", newline="") as file:
        if rows:
            writer = csv.DictWriter(file, list(rows[0]))
            if file.tell() == 0:
                writer.writeheader()
            writer.writerows(rows)
        file.flush()
        os.fsync(file.fileno())


def _fingerprint(tree: Any) -> int:
    total = 0
    for leaf in jax.tree.leaves(tree):
        total = zlib.crc32(np.ascontiguousarray(leaf).tobytes(), total)
    return total


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
