"""Likelihoods of a data set: a row an example, resumed, retried, shared by devices."""

import csv
import json
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import GMM5, SCHEDULES

import jaxdiff as jd
from jaxdiff import trace
from jaxdiff.data_likelihood import (
    in_chunks,
    likelihood_report,
    likelihood_rows,
    likelihood_sweeps,
)
from jaxdiff.parallel import data_mesh
from jaxdiff.solve import adaptive

KEY = jax.random.key(0)
VP = jd.Gaussian(SCHEDULES["linear_beta"])
X = np.asarray(GMM5.sample(jax.random.key(7), 22))
SHIFT = {"shift": jnp.zeros(2)}


def estimate(params, keys, x, *, tolerance=1e-4, probes=2, per_example=False):
    return jd.log_likelihood(
        VP,
        GMM5.denoiser(VP),
        x + params["shift"][None],
        key=keys,
        probes=probes,
        probe=trace.rademacher,
        controller=adaptive(tolerance),
        per_example=per_example,
    )


def parts(estimate=estimate, **options):
    return jd.Likelihood(examples=lambda split, key: X, estimate=estimate, **{"size": 8, **options})


def counted(calls):
    def counting(params, keys, x, **options):
        jax.debug.callback(lambda: calls.append(len(x)))
        return estimate(params, keys, x, **options)

    return parts(counting)


def test_rows_are_those_of_the_estimate():
    """22 examples in chunks of 8: each with the key of its index, each once."""
    rows = likelihood_rows(parts(), SHIFT, X, KEY)
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(KEY, jnp.arange(22))
    for chunk in (slice(0, 8), slice(8, 16), slice(14, 22)):
        found = estimate(SHIFT, keys[chunk], X[chunk])
        fresh = slice(16, 22) if chunk.start == 14 else chunk
        skip = fresh.start - chunk.start
        np.testing.assert_allclose(rows["nll_nats"][fresh], -found.value[skip:], rtol=1e-5)
        # Two programs: an error bar has the rounding of the value whose spread it is.
        rounding = 1e-6 * np.abs(found.value[skip:]).max()
        np.testing.assert_allclose(
            rows["stderr_nats"][fresh], found.stderr[skip:], rtol=1e-5, atol=rounding
        )
        error = found.solver_error[skip:]  # differences of nearly equal numbers
        np.testing.assert_allclose(rows["solver_error_nats"][fresh], error, rtol=1e-2)
        np.testing.assert_array_equal(rows["calls"][fresh], found.num_evaluations[skip:])
    np.testing.assert_array_equal(rows["index"], np.arange(22))
    assert rows["nll_nats"].dtype == np.float64
    assert rows["converged"].all()


@pytest.mark.parametrize("left", [0, 5, 8, 19])
def test_a_table_is_gone_on_with(tmp_path, left):
    """Wherever it was cut, even within a line: whole chunks are kept, and the file ends equal."""
    whole = tmp_path / "whole.csv"
    rows = likelihood_rows(parts(), SHIFT, X, KEY, path=whole)
    lines = whole.read_text().splitlines(keepends=True)
    assert len(lines) == 23
    cut = tmp_path / "cut.csv"
    cut.write_text("".join(lines[: 1 + left]) + lines[1 + left][:7])
    calls = []
    again = likelihood_rows(counted(calls), SHIFT, X, KEY, path=cut)
    jax.effects_barrier()
    assert len(calls) == 3 - left // 8
    assert cut.read_text() == whole.read_text()
    for name in rows:
        np.testing.assert_array_equal(again[name], rows[name])
    assert {path.name for path in tmp_path.iterdir()} == {"whole.csv", "cut.csv"}


@pytest.mark.parametrize("lost", [1, 2, 5])
def test_a_number_that_was_being_written_is_no_number(tmp_path, lost):
    """A bound tells its value alone, and a line of numbers may be cut so that it still reads."""

    def plain(params, keys, x):
        class Found(NamedTuple):
            value: Any

        return Found(-jnp.sum(x**2, axis=1) / 7)

    whole, cut = tmp_path / "whole.csv", tmp_path / "cut.csv"
    rows = likelihood_rows(parts(plain), SHIFT, X, KEY, path=whole)
    assert list(rows) == ["index", "nll_nats"]
    cut.write_text(whole.read_text()[:-lost])
    again = likelihood_rows(parts(plain), SHIFT, X, KEY, path=cut)
    np.testing.assert_array_equal(again["nll_nats"], rows["nll_nats"])
    assert cut.read_text() == whole.read_text()


def test_one_program_serves_all_chunks_and_calls():
    traced = []

    def watched(params, keys, x):
        traced.append(x.shape)
        return estimate(params, keys, x)

    likelihood = parts(watched)
    for _ in range(2):
        likelihood_rows(likelihood, SHIFT, X, KEY)
    assert len(traced) == 1


def test_a_bar_counts_what_was_done_before(tmp_path, capsys):
    path = tmp_path / "rows.csv"
    likelihood_rows(parts(), SHIFT, X, KEY, path=path)
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:9]))
    likelihood_rows(parts(), SHIFT, X, KEY, path=path, progress=True)
    bar = capsys.readouterr().err
    assert "8/22" in bar
    assert "22/22" in bar


def test_no_examples_are_refused():
    with pytest.raises(ValueError, match="examples must hold one at least"):
        likelihood_rows(parts(), SHIFT, X[:0], KEY)


def test_a_finished_table_is_read(tmp_path):
    likelihood_rows(parts(), SHIFT, X, KEY, path=tmp_path / "rows.csv")
    calls = []
    rows = likelihood_rows(counted(calls), SHIFT, X, KEY, path=tmp_path / "rows.csv")
    jax.effects_barrier()
    assert not calls
    assert (rows["nll_nats"].dtype, rows["calls"].dtype) == (np.float64, np.int64)


@pytest.mark.parametrize(
    "other",
    [
        {"params": {"shift": jnp.full(2, 0.1)}},
        {"key": jax.random.key(1)},
        {"examples": X[::-1]},
    ],
    ids=["parameters", "key", "data"],
)
def test_rows_of_something_else_are_not_gone_on_with(tmp_path, other):
    path, work = tmp_path / "rows.csv", {"params": SHIFT, "examples": X, "key": KEY}
    before = likelihood_rows(parts(), **work, path=path)
    calls = []
    after = likelihood_rows(counted(calls), **work | other, path=path)
    jax.effects_barrier()
    assert len(calls) == 3
    assert (before["nll_nats"] != after["nll_nats"]).any()
    with path.open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 22


def test_bits_stand_beside_nats(tmp_path):
    path = tmp_path / "rows.csv"
    rows = likelihood_rows(parts(bits=lambda nll: nll / math.log(2)), SHIFT, X, KEY, path=path)
    np.testing.assert_allclose(rows["bits_per_dim"], rows["nll_nats"] / math.log(2))
    with path.open(newline="") as file:
        assert float(next(csv.DictReader(file))["bits_per_dim"]) == rows["bits_per_dim"][0]


# What fails


def rough(params, keys, x, *, tolerance=1e-4, per_example=False):
    """A denoiser that no step can follow where x is large."""

    def denoise(x, t):
        noise = jnp.where(x[:, :1] > 50.0, jnp.sin(1e5 * t), 0.0)
        return jd.Denoised(0.5 * x + 100.0 * noise)

    return jd.log_likelihood(
        VP,
        jax.tree_util.Partial(denoise),
        x,
        controller=adaptive(tolerance),
        per_example=per_example,
        max_steps=100,
    )


def test_only_what_fails_alone_is_lost():
    """One example spoils its chunk, whose others are then solved with steps of their own."""
    x = X.copy()
    x[10] = 100.0
    likelihood = parts(rough, sweeps={"tolerance": (1e-4,)})
    rows = likelihood_rows(likelihood, SHIFT, x, KEY)
    np.testing.assert_array_equal(np.flatnonzero(~rows["converged"]), [10])
    np.testing.assert_array_equal(np.flatnonzero(np.isnan(rows["nll_nats"])), [10])
    fair = likelihood_rows(likelihood, SHIFT, X, KEY)
    good = rows["converged"]
    np.testing.assert_allclose(rows["nll_nats"][good], fair["nll_nats"][good], rtol=1e-3)
    report = likelihood_report(likelihood, x, rows)
    assert (report["examples"], report["failed"]) == (22, [10])
    assert report["nll_nats"] == pytest.approx(fair["nll_nats"][good].mean(), rel=1e-3)
    json.dumps(report, allow_nan=False)


def test_a_sweep_is_of_those_that_converge():
    x = X.copy()
    x[10] = 100.0
    likelihood = parts(rough, sweeps={"tolerance": (1e-4,)})
    (row,) = likelihood_sweeps(likelihood, SHIFT, x, KEY)["tolerance"]
    fair = likelihood_rows(likelihood, SHIFT, np.delete(X, 10, axis=0), KEY)
    assert row["nll_nats"] == pytest.approx(fair["nll_nats"].mean(), rel=1e-3)
    assert row["solver_error_nats"] == pytest.approx(fair["solver_error_nats"].mean(), rel=1e-2)
    (row,) = likelihood_sweeps(likelihood, SHIFT, np.full((4, 2), 100.0), KEY)["tolerance"]
    assert row["nll_nats"] is None
    json.dumps(row, allow_nan=False)


def test_nothing_left_is_no_mean():
    likelihood = parts(rough, sweeps={"tolerance": (1e-4,)})
    x = np.full((4, 2), 100.0, np.float32)
    report = likelihood_report(likelihood, x, likelihood_rows(likelihood, SHIFT, x, KEY))
    reason = "0 of 4 examples have a value; it takes 2"
    assert report == {"examples": 4, "failed": [0, 1, 2, 3], "no_mean": reason}


# The report


def test_report_of_the_errors():
    further = lambda x, nll: {"rows": len(x), "least": float(nll.min())}
    likelihood = parts(further=further)
    rows = likelihood_rows(likelihood, SHIFT, X, KEY)
    report = likelihood_report(likelihood, X, rows)
    assert report["nll_nats_stderr"] == pytest.approx(rows["nll_nats"].std(ddof=1) / 22**0.5)
    assert report["probe_stderr_nats"] == pytest.approx(rows["stderr_nats"].mean())
    assert report["solver_error_nats"] == pytest.approx(rows["solver_error_nats"].mean())
    assert report["network_calls"] == rows["calls"].max()
    assert (report["rows"], report["least"]) == (22, rows["nll_nats"].min())


def test_sweeps_tell_how_accurate_the_estimate_is():
    """Each row is the estimate with one option changed, and states its own errors."""
    likelihood = parts(sweeps={"tolerance": (1e-2, 1e-5), "probes": (1, 4)})
    sweeps = likelihood_sweeps(likelihood, SHIFT, X, KEY, count=10)
    json.dumps(sweeps, allow_nan=False)
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(KEY, jnp.arange(10))
    direct = jax.jit(estimate, static_argnames="probes")
    for name in sweeps:
        for row in sweeps[name]:
            found = direct(SHIFT, keys, X[:10], **{name: row[name]})
            assert row["nll_nats"] == pytest.approx(-float(found.value.mean()), rel=1e-5)
            assert row["calls"] == int(found.num_evaluations.max())
    loose, tight = sweeps["tolerance"]
    assert loose["calls"] < tight["calls"]
    assert loose["solver_error_nats"] > 10 * tight["solver_error_nats"]
    one, four = sweeps["probes"]
    assert one["nll_nats_stderr"] is None
    stated = np.sqrt(np.sum(np.asarray(found.stderr) ** 2)) / 10  # the last was K = 4
    assert four["nll_nats_stderr"] == pytest.approx(stated, rel=1e-5)


def test_a_sweep_of_an_estimate_that_tells_its_value_alone():
    class Bound(NamedTuple):
        value: jax.Array

    def draws_of(params, keys, x, *, draws=1):
        return Bound(-jnp.sum(x**2, axis=1) / draws)

    likelihood = parts(draws_of, sweeps={"draws": (1, 2)})
    one, two = likelihood_sweeps(likelihood, SHIFT, X, KEY)["draws"]
    assert one["nll_nats"] == pytest.approx((X**2).sum(1).mean())
    assert two["nll_nats"] == pytest.approx(0.5 * one["nll_nats"])
    assert (one["nll_nats_stderr"], one["solver_error_nats"], one["calls"]) == (None, None, None)


def test_rows_of_another_key_stay_until_there_are_new_ones(tmp_path):
    path = tmp_path / "rows.csv"
    likelihood_rows(parts(), SHIFT, X, KEY, path=path)
    old = path.read_text()

    def fails(*args, **options):
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        likelihood_rows(parts(fails), SHIFT, X, jax.random.key(1), path=path)
    assert path.read_text() == old


def test_sweeps_compile_one_program_for_all_tolerances():
    traced = []

    def tracing(*args, **options):
        traced.append(options)
        return estimate(*args, **options)

    likelihood = parts(tracing, sweeps={"tolerance": (1e-2, 1e-3, 1e-4), "probes": (1, 2)})
    likelihood_sweeps(likelihood, SHIFT, X, KEY, count=10)
    assert [list(options) for options in traced] == [["tolerance"], ["probes"], ["probes"]]


# Over devices


@pytest.mark.devices(4)
@pytest.mark.parametrize(("size", "each"), [(2, 2), (8, 5)])
def test_devices_share_a_chunk(size, each):
    """Each has so many, or of fewer what goes into equal parts; the values are the same."""
    calls = []

    def watched(params, keys, x, **options):
        calls.append(x.shape)
        return estimate(params, keys, x, **options)

    rows = likelihood_rows(parts(watched, size=size), SHIFT, X, KEY, mesh=data_mesh())
    assert set(calls) == {(each, 2)}
    alone = likelihood_rows(parts(), SHIFT, X, KEY)
    np.testing.assert_allclose(rows["nll_nats"], alone["nll_nats"], atol=0.02)


@pytest.mark.devices(4)
def test_fewer_examples_than_devices_stay_on_one():
    rows = likelihood_rows(parts(), SHIFT, X[:3], KEY, mesh=data_mesh())
    assert len(rows["nll_nats"]) == 3


def test_chunks_take_trees():
    tree = {"a": jnp.arange(10.0), "b": jnp.arange(20).reshape(10, 2)}
    found = in_chunks(lambda keys, part: part, KEY, 10, tree, size=4)
    assert [len(part["a"]) for part in found] == [4, 4, 2]
    for name in tree:
        np.testing.assert_array_equal(np.concatenate([f[name] for f in found]), tree[name])
