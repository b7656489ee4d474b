"""Time grids: each against the rule that it is named after."""

import jax.numpy as jnp
import numpy as np
import pytest
from oracles import SCHEDULES

import jaxdiff as jd

grids = jd.grids
VP = jd.Gaussian(SCHEDULES["linear_beta"])
BY_COUNT = {
    "uniform": grids.uniform,
    "quadratic": grids.quadratic,
    "trailing": grids.trailing,
    "linspace": grids.linspace,
    "leading": grids.leading,
    "karras": lambda n: grids.karras(VP, n + 1),
    "uniform_log_snr": lambda n: grids.uniform_log_snr(VP, n + 1),
}


@pytest.mark.parametrize("name", BY_COUNT)
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 333, 999])
def test_every_grid_is_one(name, steps):
    """As many times as asked for, falling strictly to 0, whether or not n divides T."""
    grid = BY_COUNT[name](steps)
    assert grid.shape[0] - 1 in (steps, steps + 1)
    grids.check(grid)
    assert grid[-1] == 0.0
    assert grid[0] == 1.0 or name == "leading"


def test_spacings_of_a_training_schedule():
    """Lin et al. 2023, table 2: ten of a thousand times, as the paper prints them."""
    printed = {
        "leading": [1, 101, 201, 301, 401, 501, 601, 701, 801, 901],
        "linspace": [1, 112, 223, 334, 445, 556, 667, 778, 889, 1000],
        "trailing": [100, 200, 300, 400, 500, 600, 700, 800, 900, 1000],
    }
    for name, times in printed.items():
        found = np.asarray(getattr(grids, name)(10, 1000)) * 1000
        np.testing.assert_allclose(found, [*times[::-1], 0], rtol=1e-6)


def test_spacings_where_the_count_does_not_divide():
    """The same rules by numpy's own words: rounding, and a whole stride."""
    trailing = np.round(np.flip(np.arange(1000, 0, -1000 / 30)))[::-1]
    np.testing.assert_allclose(grids.trailing(30)[:-1] * 1000, trailing, rtol=1e-6)
    leading = (np.arange(30) * (1000 // 30) + 1)[::-1]
    np.testing.assert_allclose(grids.leading(30)[:-1] * 1000, leading, rtol=1e-6)
    np.testing.assert_allclose(grids.trailing(25), grids.uniform(25), atol=1e-7)


def test_quadratic_is_even_in_the_root():
    grid = grids.quadratic(9, start=0.8, end=0.05)
    assert float(grid[0]) == np.float32(0.8)
    assert float(grid[-1]) == np.float32(0.05)
    roots = np.sqrt(np.asarray(grid))
    np.testing.assert_allclose(np.diff(roots), (0.05**0.5 - 0.8**0.5) / 9, rtol=1e-5)


def test_warped_grids_are_even_in_their_own_variable():
    noise = lambda t: np.exp(-0.5 * np.asarray([VP.log_snr(t) for t in t]))
    levels = noise(grids.karras(VP, 8, rho=5.0, end=1e-2, to_zero=False)) ** (1 / 5.0)
    np.testing.assert_allclose(np.diff(levels), np.diff(levels)[0], rtol=1e-3)
    levels = np.log(noise(grids.uniform_log_snr(VP, 8, end=1e-2, to_zero=False)))
    np.testing.assert_allclose(np.diff(levels), np.diff(levels)[0], rtol=1e-3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: grids.uniform(0), "steps must be at least 1, got 0"),
        (lambda: grids.quadratic(0), "steps must be at least 1, got 0"),
        (lambda: grids.quadratic(5, start=0.1, end=0.2), "start=0.1, end=0.2"),
        (lambda: grids.trailing(0), "1 <= steps <= train_steps, got steps=0"),
        (lambda: grids.leading(11, 10), "got steps=11 with train_steps=10"),
        (lambda: grids.linspace(11, 10), "got steps=11 with train_steps=10"),
        (lambda: grids.karras(VP, 5, rho=0.5), "rho must be at least 1"),
        (lambda: grids.karras(jd.Gaussian(jd.straight()), 5), "start below 1"),
        (lambda: grids.check(jnp.array([1.0, 0.5, 0.5])), "grid must fall strictly"),
        (lambda: grids.check(jnp.array([1.0])), "at least two times"),
    ],
)
def test_bad_arguments_are_refused_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        make()
